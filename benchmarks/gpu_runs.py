"""Parts of gpu.py that are whole runs: one rank on NCCL, saving, stopping, a rank that raises; and what
document masking costs."""
import itertools, json, multiprocessing, os, re, signal, socket, statistics, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch
import torch
from torch.distributed.device_mesh import DeviceMesh
from llama_nb.config import ModelConfig
from llama_nb.data.shards import TokenShards
from llama_nb.parallel.mesh import make_mesh
from llama_nb.parallel.processes import stop_ranks
from llama_nb.run_file import dump_run
from llama_nb.train import trainer as loop
from llama_nb.train.stored import list_checkpoints, load_checkpoint
from llama_nb.train.optim import make_optimizer
from llama_nb.train.run import build_model
from gpu import children, end_tree
from gpu_parts import (DOCUMENTS, MINI, SMALL, backends, device, first_line, free, no_synchronisation,
                       run_config, trainer, wait)

HERE = Path(__file__).resolve().parent
WIDE = ModelConfig(2048, 2, 16, vocab_size=2048)
# and no word of NCCL's that nobody reads
LOOPBACK = {'GLOO_SOCKET_IFNAME': 'lo', 'NCCL_SOCKET_IFNAME': 'lo', 'NCCL_DEBUG': 'WARN'}

# --- one rank, as torchrun starts it --------------------------------------------------------------

def nccl(desk):
    "Saving while training; runs that are stopped and go on; a rank that raises. On a CPU the same with gloo"
    desk.row('process group', 'backend', value='NCCL, and gloo for the CPU' if desk.gpu else 'gloo')
    for where in (f'cuda:{i}' for i in range(min(torch.cuda.device_count(), 2))) if desk.gpu else ('cpu',):
        asynchronous_save(desk, where, where=where)
    if not desk.gpu or torch.cuda.device_count() == 1:
        desk.skip('a second device by its number', 'there is none')
        desk.skip('two ranks, one of which raises', 'NCCL takes one rank per GPU; the tests do it with gloo')
    raises(desk, 1, desk.share(.5))
    resumes(desk, 'plain attention', attention='reference', dtype='float32')
    if desk.gpu: resumes(desk, 'default attention', repeats=True)
    with one_rank(): asynchronous_save(desk, 'a rank of a process group', where=device(desk).type)

def free_port()->int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@contextmanager
def one_rank():
    "What torchrun tells a rank, for this process"
    told = {'WORLD_SIZE': '1', 'RANK': '0', 'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '1',
            'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': str(free_port()), **LOOPBACK}
    os.environ.update(told)
    try:
        yield
    finally:
        stop_ranks()
        for name in told: os.environ.pop(name, None)

def asynchronous_save(desk, name:str, where:str):
    """Two saves: how long the loop stands still, how long they take, and that training meanwhile does not
    change them"""
    run = trainer(desk, WIDE if desk.gpu else MINI, where=where, recompute='linear', prefetch=2)
    loop.train_step(run)
    for which in ('first', 'second'):
        wait(desk)
        before, start = [p.detach().clone() for p in run.model.parameters()], time.perf_counter()
        loop.save(run)
        stood = time.perf_counter() - start
        for _ in range(2): loop.train_step(run)                 # the weights change at once
        run.saver.wait()
        took, path = time.perf_counter() - start, list_checkpoints(run.out/'checkpoints')[-1]
        saved = load_checkpoint(path, parts=('model',))[0]['model']
        same = all(torch.equal(saved[n], b.cpu()) for (n, _), b in zip(run.model.named_parameters(), before))
        desk.row('asynchronous save', f'{name}, {which}', same, loop_stood_s=stood, published_s=took,
                 gb=size_of(path)/1e9, step=path.name)
    run.batches = None
    end = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(.1)
    desk.row('reading ahead', f'{name}: the worker process has ended', not multiprocessing.active_children())
    del run, before
    free(desk)

def size_of(folder:Path)->int: return sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())

# --- runs as processes ----------------------------------------------------------------------------

def torchrun(*program, ranks:int=1)->subprocess.Popen:
    "Ranks started by torchrun; what they print is read by `finish`"
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', ranks,
               *program]
    env = {**os.environ, **LOOPBACK}
    return subprocess.Popen([*map(str, command)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, errors='replace')

def finish(process, seconds:float)->str:
    "All that it printed; a run that does not end is killed, and says so"
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        pass
    end_tree(process.pid)
    return process.communicate()[0] + f'\nkilled after {seconds:.0f} s'

def metrics(out)->list[dict]:
    path = Path(out)/'metrics.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines(True)
            if line.endswith('}\n')] if path.exists() else []

def write_run(desk, model:ModelConfig|None=None, **settings)->tuple[Path, Path]:
    "A run file, and the folder of its run; of the small model if none is given"
    config = run_config(desk, model or SMALL[desk.form], prefetch=2, **settings)
    path = desk.work/f'{Path(config.out).name}.toml'
    path.write_text(dump_run(config), encoding='utf-8')
    return path, Path(config.out)

def stop_in_the_middle(path:Path, out:Path, *flags, seconds:float, ranks:int=1)->str:
    "Start a run and send its ranks SIGUSR1 after some steps"
    process = torchrun('-m', 'llama_nb', 'train', path, *flags, ranks=ranks)
    end = time.monotonic() + seconds
    while len(metrics(out)) < 3 and process.poll() is None and time.monotonic() < end:
        time.sleep(.01)
    if process.poll() is None:
        for rank in children(process.pid):
            with suppress(ProcessLookupError): os.kill(rank, signal.SIGUSR1)
    return finish(process, end - time.monotonic())

def what_came(out:Path)->tuple:
    "Losses of all steps, and every tensor of the last checkpoint"
    rows = [(m['step'], m['loss'], m['grad_norm'], m['lr']) for m in metrics(out)]
    tensors = load_checkpoint(list_checkpoints(out/'checkpoints')[-1])[0]
    return rows, {f'{part}/{name}': t for part, named in tensors.items() for name, t in named.items()}

def equal(a:tuple, b:tuple)->bool:
    return (a[0] == b[0] and a[1].keys() == b[1].keys()
            and all(torch.equal(a[1][n], t) for n, t in b[1].items()))

def resumes(desk, name:str, repeats:bool=False, **settings):
    """A run that SIGUSR1 stops and that goes on ends as an undisturbed one, bit for bit; with `repeats` if
    two of those do"""
    settings = {'steps': 400 if desk.gpu else 30, **settings}
    (whole, kept), (again, other), (cut, out) = (write_run(desk, **settings) for _ in range(3))
    def train(path): return finish(torchrun('-m', 'llama_nb', 'train', path), desk.left())
    with ThreadPoolExecutor() as together:
        said = together.submit(train, whole)
        stopped = together.submit(stop_in_the_middle, cut, out, seconds=desk.left())
        if repeats: together.submit(train, again)
    if not list_checkpoints(kept/'checkpoints'):
        desk.row('resumed bit for bit', name, False, why=said.result()[-300:])
        return
    twice = not repeats or equal(what_came(other), what_came(kept))
    stopped = re.search(r'stopped after step (\d+)', stopped.result())
    train(cut)
    same = equal(what_came(out), what_came(kept))
    desk.row('resumed bit for bit', name, bool(stopped) and same if twice else None,
             stopped_after=stopped and int(stopped[1]), of=settings['steps'], same=same,
             undisturbed_runs_repeat=twice if repeats else None)

def raises(desk, ranks:int, seconds:float):
    "A step that raises, in the last rank: the traceback is shown and all ranks end (C6)"
    path, _ = write_run(desk, steps=40, batch=4*ranks)
    start = time.perf_counter()
    process = torchrun(HERE/'gpu_runs.py', path, ranks=ranks)
    said = finish(process, seconds)
    shown = 'Traceback' in said and 'broken on purpose' in said
    name = 'in its third step' + f', the last of {ranks}'*(ranks > 1)
    desk.row('a rank that raises', name, shown and process.returncode not in (0, -9),
             traceback_shown=shown, exit_code=process.returncode,
             seconds=time.perf_counter() - start)

def broken_run(path:str):
    "The command line with a third step that raises"
    from llama_nb.cli import program
    whole, calls = loop.train_step, []
    def train_step(run):
        calls.append(1)
        last = os.environ['RANK'] == str(int(os.environ['WORLD_SIZE']) - 1)
        if last and len(calls) == 3: raise KeyError('broken on purpose')
        return whole(run)
    loop.train_step, sys.argv = train_step, ['llama-nb', 'train', path]
    program()

# --- layouts of many ranks, with one --------------------------------------------------------------

LAYOUTS = {'FSDP': {'shard'}, 'HSDP': {'replicate', 'shard'}, 'tensor': {'tensor'},
           'HSDP and tensor': {'replicate', 'shard', 'tensor'}}
APPLYING = {'apply_data_parallel', 'apply_tensor_parallel'}

@contextmanager
def groups_of_one(shared:set):
    """`apply_data_parallel` and `apply_tensor_parallel` leave a group of one rank alone. Here they take those
    of the `shared` dimensions for two, so that everything is wrapped and every collective is called"""
    whole = DeviceMesh.size
    def size(mesh, mesh_dim=None):
        asked_by = sys._getframe(1).f_code.co_name
        return 2 if asked_by in APPLYING and shared & {*mesh.mesh_dim_names} else whole(mesh, mesh_dim)
    with patch.object(DeviceMesh, 'size', size): yield

def layouts(desk):
    "The code of many ranks over NCCL, each group being this one rank: losses as without it, no waiting"
    with one_rank():
        for compiled in ('off', *['blocks']*desk.gpu):
            plain = trainer(desk, SMALL[desk.form], recompute='linear', compile=compiled)
            right = [loop.train_step(plain) for _ in range(4)]
            for name, shared in LAYOUTS.items():
                in_layout(desk, name + ', compiled'*(compiled == 'blocks'), shared, compiled, right)
            plain.batches = None
    if not desk.gpu: desk.skip('compiled layouts', 'minutes of compiling on a CPU')

# bfloat16 of the weights is the same with and without; sums in another order, 2^-8 a rounding
NEAR = .01

def in_layout(desk, name:str, shared:set, compiled:str, right:list[dict]):
    run = trainer(desk, SMALL[desk.form], recompute='linear', compile=compiled)
    try:
        run.mesh = make_mesh((1, 1, 1), run.device.type)
        with groups_of_one(shared): run.model = build_model(run.config, run.device, run.mesh)
        run.optimizer = make_optimizer(run.model, run.config.optim)
        got = [loop.train_step(run) for _ in range(4)]
    except Exception as e:
        desk.row('layouts of many ranks', name, False, why=first_line(e))
        return
    far = {k: max(abs(a[k].item()/b[k].item() - 1) for a, b in zip(got, right))
           for k in ('loss', 'grad_norm')}
    wrapped = sum(type(p).__name__ == 'DTensor' for p in run.model.parameters())
    desk.row('layouts of many ranks', name, wrapped > 0 and max(far.values()) < NEAR, **far, wrapped=wrapped)
    if desk.gpu: no_synchronisation(desk, run, name)
    run.batches = None

# --- document masking -----------------------------------------------------------------------------

def documents(desk):
    "Tokens per second with and without document masking, each backend, eager and compiled; all take turns"
    runs, count = {}, 5 if desk.gpu else 1
    names = backends(desk, 'sdpa', 'xformers', k=(WIDE if desk.gpu else MINI).head_dim)
    cases = [(b, 'off') for b in names] + [(b, 'blocks') for b in names]*desk.gpu
    for (backend, compiled), packing in itertools.product(cases, DOCUMENTS):
        run = open_run(desk, backend, compiled, packing, count)
        if run: runs[backend, compiled, packing] = run
    seconds = {key: [] for key in runs}
    for _ in range(12 if desk.gpu else 1):
        if desk.left() < 15: break
        for key, run in runs.items(): seconds[key].append(timed(desk, run, count)/count)
    for key, run in runs.items(): report(desk, key, run, seconds)
    for run in runs.values(): run.batches = None
    if not desk.gpu: desk.skip('compiled blocks', 'minutes of compiling on a CPU')

def open_run(desk, backend:str, compiled:str, packing:str, count:int):
    "A run that has made its first steps; None if it cannot, with a row that says why"
    name = f'{backend}, {packing}' + ', compiled'*(compiled != 'off')
    try:
        run = trainer(desk, WIDE if desk.gpu else MINI, batch=8, micro=4, documents=packing,
                      attention=backend, compile=compiled, recompute='linear')
        timed(desk, run, count)
        return run
    except Exception as e:
        desk.row('document masking', name, False, why=first_line(e))

def timed(desk, run, count:int)->float:
    wait(desk)
    start = time.perf_counter()
    for _ in range(count): loop.train_step(run)
    wait(desk)
    return time.perf_counter() - start

def report(desk, key:tuple, run, seconds:dict):
    backend, compiled, packing = key
    if not seconds[key]: return
    data, median = run.config.data, statistics.median(seconds[key])
    shards, plain = TokenShards(data.train), seconds.get((backend, compiled, 'cross'))
    desk.row('document masking', f'{backend}, {packing}' + ', compiled'*(compiled != 'off'),
             tokens_per_second=data.batch_size*data.seq_len/median,
             of_cross=statistics.median(plain)/median if plain else None,
             tokens_a_document=shards.n_tokens/shards.n_documents, steps=len(seconds[key]))

if __name__ == '__main__': broken_run(sys.argv[1])
