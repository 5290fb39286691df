"""Everything that only a GPU can show: the tests that need one, then the benchmarks. `make gpu` runs it.

    python benchmarks/gpu.py --out benchmarks/gpu
    python benchmarks/gpu.py --out FOLDER --parts graphs sync --minutes 9.5 --wheels xformers.whl
    python benchmarks/gpu.py --out FOLDER --merge EARLIER LATER

Each part is a process of its own with a time limit; its rows are written as they come, to
FOLDER/DEVICE/results.json and results.md. A part that fails, hangs or is killed is recorded with its last
lines, and the next one goes on. Called again, it goes on with the parts that are not done. The limits are
those of a machine with an H200; on a slower one give more time with --patience. Without a GPU the parts that
make sense run in miniature, and the tables say what was skipped.
"""
import argparse, importlib, json, math, os, re, shutil, signal, subprocess, sys, tempfile, threading, time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROW = '\x1e'                    # what follows it in a line of a part is a row of its table
TAIL = 25                       # last lines that are kept of a part that did not end well

@dataclass(frozen=True)
class Part:
    "One part: what it shows, the function that does it, and the seconds that it may take on a GPU"
    about:str
    seconds:float
    run:str                     # module:function, called with a `Desk`

PARTS = {
    'environment': Part('versions, xformers, the attention that `auto` picks, steps with default settings',
                        120,
                        'gpu_parts:environment'),
    'tests':       Part('tests/gpu_cuda.py', 90, 'gpu_parts:tests'),
    'graphs':      Part('one block as wide as that of 7B: graphs and graph breaks', 210, 'gpu_parts:graphs'),
    'sync':        Part('steps in which the host may not wait for the device; a skipped step', 120,
                        'gpu_parts:sync'),
    'parity':      Part('gradients against float32 on the CPU', 120, 'gpu_parts:parity'),
    'step':        Part('a training step of 1.3B parameters beside transformers', 230, 'gpu_step:step'),
    'step_7B':     Part('a training step of 7B, or of as many of its layers as fit', 240, 'gpu_step:step_7B'),
    'profile':     Part('where the time of a step goes', 60, 'gpu_step:profile'),
    'memory':      Part('bytes that a block keeps, and the peak of a step, against the formula', 90,
                        'gpu_parts:memory'),
    'nccl':        Part('one rank on NCCL: saved, stopped, resumed; a rank that raises', 180,
                        'gpu_runs:nccl'),
    'layouts':     Part('FSDP, HSDP and tensor parallelism over NCCL with one rank', 120,
                        'gpu_runs:layouts'),
    'kernels':     Part('attention and the loss by themselves', 90, 'gpu_kernels:kernels'),
    'documents':   Part('packing with document masking against packing without', 120, 'gpu_runs:documents'),
    'ranks':       Part('several GPUs: every layout beside one of them, another layout in the middle of a '
                        'run, a rank that raises', 600, 'gpu_ranks:ranks'),
    'ranks_speed': Part('several GPUs: steps of 1.3B in every layout beside one of them', 600,
                        'gpu_ranks:speed'),
}

# --- inside a part --------------------------------------------------------------------------------

class Desk:
    "What a part works with: the form (gpu or cpu), a folder for data and runs, and the rows that it hands in"
    def __init__(self, form:str, work, seconds:float):
        self.form, self.gpu, self.work, self.seconds = form, form == 'gpu', Path(work), seconds
        self.end = time.monotonic() + seconds - 10              # 10 s to begin and to end in
        self.out = self.work/'files'                            # what is put here is kept beside the tables

    def left(self)->float:
        "Seconds until it should be done"
        return self.end - time.monotonic()

    def share(self, part:float)->float:
        "Seconds for one of several things: that part of all its time, or what is left"
        return min(part*self.seconds, self.left())

    def row(self, table:str, name:str, ok:bool|None=None, **values):
        """Hand in a row, in the place of one of the same table and name. `ok` False is a problem, None a
        number to look at"""
        values = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
                  for k, v in values.items()}
        print(ROW + json.dumps({'table': table, 'name': name, 'ok': ok, **values}, default=str), flush=True)

    def skip(self, name:str, why:str): self.row('skipped', name, why=why)

def work_on(part:str, form:str, work:str, seconds:str):
    "The process of a part"
    module, _, name = part.partition(':')
    getattr(importlib.import_module(module), name)(Desk(form, work, float(seconds)))

# --- around the parts -----------------------------------------------------------------------------

def environment(work:Path, form:str)->dict:
    "The variables of the parts' processes: this package on the path, no network, and no GPU in the CPU form"
    path = [str(work/'site'), str(HERE), str(HERE.parent), os.environ.get('PYTHONPATH', '')]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(p for p in path if p), 'PYTHONUNBUFFERED': '1',
           'HF_HUB_OFFLINE': '1'}
    env.setdefault('PYTORCH_ALLOC_CONF', 'expandable_segments:True')
    if form == 'cpu': env['CUDA_VISIBLE_DEVICES'] = ''
    return env

class Listener(threading.Thread):
    "Reads a part's output: rows go to `take`, everything else to the screen, and the last lines are kept"
    def __init__(self, stream, take):
        super().__init__(daemon=True)
        self.stream, self.take, self.tail = stream, take, deque(maxlen=TAIL)

    def run(self):
        for line in self.stream:
            said, mark, row = line.partition(ROW)                       # a progress bar may stand before it
            if mark: self.take(json.loads(row))
            if not said.strip() or said.startswith('USDT:'): continue   # a mark that torch's profiler leaves
            print('   ', said.rstrip(), flush=True)
            self.tail.append(said.rstrip()[:300])

def parent(pid:int)->int:
    try:
        return int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1])
    except OSError:
        return 0                                    # it has ended meanwhile

def children(pid:int)->list[int]:
    return [p for p in map(int, filter(str.isdecimal, os.listdir('/proc'))) if parent(p) == pid]

def descendants(pid:int)->list[int]:
    return [p for child in children(pid) for p in (child, *descendants(child))]

def end_tree(pid:int):
    "End a process and what it has started; torchrun gives each rank a session of its own"
    for each in (*descendants(pid), pid):
        with suppress(ProcessLookupError): os.kill(each, signal.SIGKILL)

def end_group(process):
    "End a part and everything that it has started, also what has lost its parent"
    end_tree(process.pid)
    with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
    process.wait()

def run_part(part:Part, form:str, work:Path, limit:float, take)->dict:
    "Run one part to its end or its limit; `take` receives its rows. What became of it: status, seconds, tail"
    command = [sys.executable, str(HERE/'gpu.py'), '--worker', part.run, form, str(work), str(limit)]
    begun, process, tail = time.monotonic(), None, []
    try:
        process = subprocess.Popen(command, env=environment(work, form), stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT,
                                   text=True, errors='replace', start_new_session=True)
        listener = Listener(process.stdout, take)
        listener.start()
        status = how_it_ended(process.wait(limit))
    except subprocess.TimeoutExpired:
        status = f'over its limit of {limit:.0f} s (--patience 2 doubles it)'
    except KeyboardInterrupt:
        status = 'stopped'
    finally:
        if process:
            end_group(process)
            listener.join(10)
            tail = list(listener.tail)
    tail = [] if status == 'done' else tail
    return {'status': status, 'seconds': round(time.monotonic() - begun, 1), 'tail': tail}

def how_it_ended(code:int)->str:
    return ('done' if code == 0 else f'killed by signal {-code}' if code < 0
            else f'failed with exit code {code}')

def look(form:str, work:Path)->dict:
    "The device and the versions, seen by a process that ends again, so that the GPU is free for the parts"
    code = '''import json, os, platform, torch
gpu = torch.cuda.is_available()
print(json.dumps({'gpu': gpu, 'gpus': torch.cuda.device_count(),
                  'device': torch.cuda.get_device_name() if gpu else '',
                  'memory_gb': torch.cuda.get_device_properties(0).total_memory/1e9 if gpu else 0,
                  'torch': torch.__version__, 'cuda': torch.version.cuda, 'cores': os.cpu_count(),
                  'python': platform.python_version()}))'''
    done = subprocess.run([sys.executable, '-c', code], env=environment(work, form), capture_output=True,
                          text=True, timeout=300)
    if done.returncode: raise SystemExit(f'torch does not start here:\n{done.stderr[-2000:]}')
    about = json.loads(done.stdout.splitlines()[-1])
    about['date'] = time.strftime('%Y-%m-%d')
    device = about['device'] or f'CPU {processor()}'
    return about | {'form': 'gpu' if about['gpu'] else 'cpu', 'device': device}

def processor()->str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(':')[1].strip() for line in lines if line.startswith('model name')),
                'of unknown name')

def folder_name(about:dict)->str:
    "'NVIDIA H100 80GB HBM3' -> 'NVIDIA-H100-80GB-HBM3'; eight of them: 'NVIDIA-H100-80GB-HBM3-x8'"
    name = re.sub(r'[^A-Za-z0-9]+', '-', about['device']).strip('-')
    return f'{name}-x{about["gpus"]}' if about.get('gpus', 1) > 1 else name

def install(wheels:list[str], site:Path):
    """Wheels, or folders of wheels, for the parts alone: nothing is fetched and nothing is changed outside of
    `site`"""
    files = [str(f) for w in map(Path, wheels) for f in (sorted(w.glob('*.whl')) if w.is_dir() else [w])]
    if files:
        subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--target',
                        str(site), *files], check=True)

# --- results --------------------------------------------------------------------------------------

def write_file(path:Path, text:str):
    "All of it or nothing"
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f'.{path.name}.tmp')
    tmp.write_text(text, encoding='utf-8')
    os.replace(tmp, path)

class Results:
    """The record of all parts in `folder`: results.json, and results.md made from it. A `note` that somebody
    writes into a row of results.json is shown, until its part runs again"""
    def __init__(self, folder:Path, about:dict):
        self.folder, self.path = folder, folder/'results.json'
        old = json.loads(self.path.read_text(encoding='utf-8')) if self.path.exists() else {}
        self.data = {'about': about, 'parts': old.get('parts', {})}

    def begin(self, name:str, about:dict):
        self.data['parts'][name] = {'status': 'running', 'rows': [], **about}
        self.write()

    def take(self, name:str, row:dict):
        "Add a row, or put it in the place of the one with its name"
        rows = self.data['parts'][name]['rows']
        same = [i for i, r in enumerate(rows) if (r['table'], r['name']) == (row['table'], row['name'])]
        if same: rows[same[0]] = row
        else:
            rows.append(row)
        self.write()

    def finish(self, name:str, **values):
        part = self.data['parts'][name]
        part.update(values)
        if part['status'] == 'done' and problems(part): part['status'] = 'problems'
        self.write()

    def write(self):
        write_file(self.path, json.dumps(self.data, indent=1) + '\n')
        write_file(self.folder/'results.md', render(self.data))

def problems(part:dict)->list[str]: return [r['name'] for r in part['rows'] if r['ok'] is False]

def cell(x)->str:
    "A value of a table; numbers with about three digits"
    if x is None: return ''
    if isinstance(x, bool): return 'yes' if x else '**no**'
    if isinstance(x, float): return '0' if x == 0 else f'{x:,.0f}' if abs(x) >= 1000 else f'{x:.3g}'
    return str(x).replace('|', '/').replace('\n', ' ')

def table(rows:list[dict])->list[str]:
    "A Markdown table with every key that a row has"
    keys = list(dict.fromkeys(k for r in rows for k in r if k != 'table'
                              and any(x.get(k) is not None for x in rows)))
    lines = ['| ' + ' | '.join('' if k == 'name' else k for k in keys) + ' |', '|' + '---|'*len(keys)]
    return lines + ['| ' + ' | '.join(cell(r.get(k)) for k in keys) + ' |' for r in rows]

def render_part(name:str, part:dict)->list[str]:
    about = PARTS[name].about if name in PARTS else name
    lines = ['', f'## {name}', '', f'{about}. **{part["status"]}** after {part.get("seconds", 0):.0f} s'
             f' ({part.get("limit", 0):.0f} allowed), {part.get("date", "")}, torch {part.get("torch", "")}.']
    for title in dict.fromkeys(r['table'] for r in part['rows']):
        lines += ['', f'### {title}', '', *table([r for r in part['rows'] if r['table'] == title])]
    if part.get('tail'): lines += ['', 'Its last lines:', '', '```', *part['tail'], '```']
    return lines

def render(data:dict)->str:
    "All of it as Markdown"
    a, parts = data['about'], data['parts']
    mini = ' **No GPU: a miniature that shows that the parts run; its times say nothing.**'
    mini *= a['form'] != 'gpu'
    lines = [f'# {a["device"]}', '',
             f'Measured by `python benchmarks/gpu.py`: torch {a["torch"]}, CUDA {a["cuda"]}, '
             f'Python {a["python"]}, {a["cores"]} cores.{mini}', '']
    lines += table([{'name': n, 'status': p['status'], 'problems': ', '.join(problems(p)) or None,
                     'seconds': p.get('seconds')} for n, p in parts.items()])
    for name in sorted(parts, key=lambda n: list(PARTS).index(n) if n in PARTS else len(PARTS)):
        lines += render_part(name, parts[name])
    return '\n'.join(lines) + '\n'

# --- all of it ------------------------------------------------------------------------------------

def run_parts(parts:dict[str,Part], results:Results, form:str, work:Path, minutes:float=0,
              again:bool=False, patience:float=1)->bool:
    """Run the parts that are not done yet, in `minutes` if given, with `patience` times their limits. True if
    all of them ended without a problem"""
    end = time.monotonic() + 60*minutes if minutes else float('inf')
    for name, part in parts.items():
        if not again and results.data['parts'].get(name, {}).get('status') == 'done':
            print(f'{name}: done already')
            continue
        left = end - time.monotonic()
        # a CPU may be shared
        limit = patience*(part.seconds if form == 'gpu' else min(3*part.seconds, 600))
        if left < patience*part.seconds/2:
            print(f'{name}: not begun, {max(left, 0):.0f} s left of the time given')
            continue
        limit, a = min(limit, left), results.data['about']
        print(f'{name}: {part.about} (at most {limit:.0f} s)', flush=True)
        results.begin(name, {'limit': limit, 'date': a['date'], 'torch': a['torch']})
        results.finish(name, **run_part(part, form, work, limit, lambda row: results.take(name, row)))
        keep_files(work/'files', results.folder)
        print(f'{name}: {results.data["parts"][name]["status"]}', flush=True)
        if results.data['parts'][name]['status'] == 'stopped': raise KeyboardInterrupt
    return all(results.data['parts'].get(name, {}).get('status') == 'done' for name in parts)

def keep_files(source:Path, folder:Path):
    "What a part left beside its rows, if it is small"
    for path in sorted(source.glob('*')) if source.exists() else ():
        if path.stat().st_size < 700_000: shutil.move(path, folder/path.name)

def merge(folders:list[str], out:Path):
    "One record from several of the same device; of a part that is in several the last one counts"
    found = [json.loads((Path(f)/'results.json').read_text(encoding='utf-8')) for f in folders]
    results = Results(out/folder_name(found[-1]['about']), found[-1]['about'])
    for data in found: results.data['parts'] |= data['parts']
    results.write()
    print(results.folder)

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                epilog='parts:\n'
                                + '\n'.join(f'  {n:<12} {p.seconds:4.0f} s  {p.about}'
                                            for n, p in PARTS.items()))
    p.add_argument('--out', default=str(HERE/'gpu'),
                   help='the tables go into a folder of it that is named by the device')
    p.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS), metavar='PART',
                   help='only these; all if left out')
    p.add_argument('--minutes', type=float, default=0,
                   help='end after this time: a part that is under way is cut, and none begins that would '
                        'have less than half of its limit')
    p.add_argument('--patience', type=float, default=1,
                   help='on a slower machine: this many times the limits of all parts')
    p.add_argument('--again', action='store_true', help='also the parts that are done')
    p.add_argument('--form', choices=('auto', 'gpu', 'cpu'), default='auto',
                   help='cpu: the miniature, without the GPU')
    p.add_argument('--wheels', '--xformers', nargs='+', default=[], metavar='WHEEL',
                   help='wheels, or folders of them, for these processes alone')
    p.add_argument('--merge', nargs='+', metavar='FOLDER', help='only put earlier results together')
    return p.parse_args()

def main()->int:
    a = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if a.merge:
        merge(a.merge, Path(a.out))
        return 0
    work = Path(tempfile.mkdtemp(prefix='llama_nb_gpu_'))
    try:
        install(a.wheels, work/'site')
        about = look(a.form, work)
        if a.form == 'gpu' and about['form'] != 'gpu':
            raise SystemExit('there is no GPU that torch can use; --form cpu runs the miniature')
        results = Results(Path(a.out)/folder_name(about), about)
        fine = run_parts({n: PARTS[n] for n in PARTS if n in a.parts}, results, about['form'], work,
                         a.minutes, a.again, a.patience)
    except KeyboardInterrupt:
        print('stopped; the same command goes on')
        return 130
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f'{results.folder/"results.md"}')
    return 0 if fine else 1

if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']: work_on(*sys.argv[2:])
    else:
        sys.exit(main())
