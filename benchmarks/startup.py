"""Seconds until a command answers: a help text, a mistake, an import, and the first twenty tokens of a model.

Each is a process of its own. With --before FOLDER, a checkout of an older version, its processes and those of
this checkout take turns, so that whatever else the machine does hits both alike. The run of which `generate`
is asked is made by the older version, since a later one reads it. The first round is not counted: it fills
the caches of files. Writes benchmarks/startup.md and .json.

    git worktree add /tmp/before COMMIT
    python benchmarks/startup.py --before /tmp/before
"""
import json, os, platform, resource, statistics, subprocess, sys, tempfile, time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent

@dataclass(frozen=True)
class Settings:
    "How often, and beside what"
    before:str=''             # checkout of an older version; none if empty
    rounds:int=7              # that count
    name:str='startup'        # of the table

SAMPLE = 'generate', 'runs/tiny', '--max-new-tokens', '20', '--seed', '0', '--device', 'cpu'
COMMANDS = {'`llama-nb --help`': ('-m', 'llama_nb', '--help'),
            '`llama-nb train --help`': ('-m', 'llama_nb', 'train', '--help'),
            'a mistake: `train run.toml --optim.lr fast`':
                ('-m', 'llama_nb', 'train', 'run.toml', '--optim.lr', 'fast'),
            '`import llama_nb`': ('-c', 'import llama_nb'),
            '`llama-nb generate`, 20 tokens': ('-m', 'llama_nb', *SAMPLE)}

MAKE_RUN = '''
from pathlib import Path
from llama_nb.cli import main
from llama_nb.data.documents import topic_documents
from llama_nb.data.shards import write_shards
from llama_nb.data.tokenizer import train_tokenizer
docs = [*topic_documents()]
write_shards(docs, train_tokenizer((d.text for d in docs), 'tokenizer.model', 1000), 'tokens')
Path('run.toml').write_text("""
out = "runs/tiny"
[model]
dim = 192
n_layers = 4
n_heads = 6
vocab_size = 1000
max_seq_len = 256
[data]
train = "tokens"
seq_len = 256
batch_size = 4
[train]
steps = 2
device = "cpu"
[optim]
warmup_steps = 1
""")
raise SystemExit(main(['train', 'run.toml']))
'''

def environment(checkout):
    return os.environ | {'PYTHONPATH': str(checkout), 'OMP_NUM_THREADS': '1'}

def seconds(words, checkout, folder)->tuple[float, float]: # by the clock, and of the processor
    "One process in `folder`"
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, *words]
    done = subprocess.run(command, env=environment(checkout), cwd=folder, capture_output=True)
    clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    wanted = 2 if 'fast' in words else 0
    if done.returncode != wanted: raise SystemExit(f'{words}: {done.returncode}, {done.stderr[-500:]}')
    return clock, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

def commit(checkout)->str:
    asks = ['git', 'rev-parse', '--short', 'HEAD']
    found = subprocess.run(asks, cwd=checkout, capture_output=True, text=True)
    return found.stdout.strip() or 'unknown'

def measure(s, folder):
    "Medians by command and version: clock, processor"
    checkouts = ({'before': Path(s.before).resolve()} if s.before else {}) | {'now': HERE.parent}
    oldest = next(iter(checkouts.values()))
    subprocess.run([sys.executable, '-c', MAKE_RUN], env=environment(oldest), cwd=folder, check=True)
    taken = {about: {version: [] for version in checkouts} for about in COMMANDS}
    for i in range(s.rounds + 1):
        for about, words in COMMANDS.items():
            for version, checkout in checkouts.items():
                found = seconds(words, checkout, folder)
                if i: taken[about][version].append(found)
        print(f'round {i} of {s.rounds}', flush=True)
    def medians(rows): return [statistics.median(part) for part in zip(*rows)]
    return {'commits': {version: commit(checkout) for version, checkout in checkouts.items()},
            'seconds': {about: {version: medians(rows) for version, rows in by.items()}
                        for about, by in taken.items()}}

def table(facts, s)->str:
    versions = list(facts['commits'])
    head = ' | '.join(f'{version}, {unit}' for version in versions for unit in ('clock', 'processor'))
    lines = [f'| seconds | {head} |', '|---'*(1 + 2*len(versions)) + '|']
    for about, by in facts['seconds'].items():
        numbers = ' | '.join(f'{value:.2f}' for version in versions for value in by[version])
        lines.append(f'| {about} | {numbers} |')
    commits = ', '.join(f'{version} is commit {name}' for version, name in facts['commits'].items())
    about = (f'Measured {facts["day"]} on {facts["machine"]}; {commits}. Medians of {s.rounds} rounds '
             f'in which the versions took turns. The load average was {facts["load"]:.1f} before: where it '
             'is not near 0, the clock has other work in it.')
    return '\n'.join(['# Seconds until an answer', '', about, '', *lines, '',
                      'Made by `python benchmarks/startup.py`.', ''])

def main():
    import torch, tyro
    from train_step import cpu_name
    s = tyro.cli(Settings)
    machine = f'{cpu_name()}, Python {platform.python_version()}, torch {torch.__version__}'
    facts = {'day': time.strftime('%Y-%m-%d'), 'machine': machine, 'load': os.getloadavg()[1]}
    with tempfile.TemporaryDirectory() as folder: facts |= measure(s, folder)
    facts['settings'] = {name: value for name, value in asdict(s).items() if name != 'before'}
    (HERE/f'{s.name}.json').write_text(json.dumps(facts, indent=1) + '\n')
    (HERE/f'{s.name}.md').write_text(table(facts, s))
    print(table(facts, s))

if __name__ == '__main__': main()
