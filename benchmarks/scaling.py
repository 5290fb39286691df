"""A family of toys: five sizes, each trained for five lengths, every run with a schedule of its own.

Each run is `llama-nb train` on a run file, so it is the real trainer; one that was stopped goes on, and one
that is done is not done again. The text is that of `llama-nb data mini`, made if it is not there. The losses
go into scaling.json, from which the page on scaling laws fits L(N, D) and draws Figure 1 at this size.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --help

Some 45 minutes on two quiet cores.
"""
import json, os, platform, statistics, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent

@dataclass(frozen=True)
class Size:
    "A model of the family, and the peak of its learning rate"
    dim:int
    layers:int
    heads:int
    lr:float

SIZES = {'43k': Size(32, 2, 2, 8e-3), '108k': Size(48, 3, 3, 7e-3), '233k': Size(64, 4, 4, 6e-3),
         '491k': Size(96, 4, 6, 4e-3), '1.3M': Size(128, 6, 8, 3e-3)}
STEPS = 200, 400, 800, 1600, 3200           # of 1,024 tokens
SCATTER = '233k', 800                       # the run that is repeated with other seeds
SEEDS = 1, 2, 3

@dataclass(frozen=True)
class Settings:
    "What is trained on what"
    documents:str='runs/mini'     # a mini corpus; or python (the standard library), a file or a folder
    vocab:int=1024                # tokens; a small vocabulary, or the embeddings would be most of the model
    seq:int=128                   # tokens in a sequence
    batch:int=8                   # sequences in a step
    held_out:float=.05            # share of the documents
    eval_sequences:int=512        # of the validation text, the same for all runs
    workers:int=2                 # runs at a time, one thread each
    out:str='runs/scaling'        # folder of the runs
    name:str='scaling'            # of the table

# --- what is trained -------------------------------------------------------------------------------

def is_mini(s)->bool: return s.documents == Settings.documents or (Path(s.documents)/'mixture.toml').exists()

def read(s):
    "The documents, in a fixed order"
    from llama_nb.data.documents import python_documents
    from llama_nb.data.mini import build_mini, clean_documents
    from llama_nb.data.sources import read_documents
    if s.documents == 'python': return python_documents()
    if not is_mini(s): return read_documents(s.documents)
    build_mini(s.documents)
    sources = sorted(p.name for p in (Path(s.documents)/'clean').iterdir())
    return [doc for source in sources for doc in clean_documents(s.documents, source)]

def prepare(s, out):
    "Tokenizer and shards"
    from llama_nb.data.documents import split_documents
    from llama_nb.data.shards import TokenShards, write_shards
    from llama_nb.data.tokenizer import Tokenizer, train_tokenizer
    train, held_out = split_documents(read(s), s.held_out)
    path = out/'tokenizer.model'
    if not path.exists(): train_tokenizer((d.text for d in train[::4]), path, s.vocab)
    for name, docs in (('train', train), ('held_out', held_out)):
        if not (out/name).exists(): write_shards(docs, Tokenizer(path), out/name)
    return TokenShards(out/'train')

RUN = '''out = "{out}"
[model]
dim = {dim}
n_layers = {layers}
n_heads = {heads}
vocab_size = {vocab}
multiple_of = 16
max_seq_len = {seq}
[data]
train = "{tokens}/train"
held_out = "{tokens}/held_out"
seq_len = {seq}
batch_size = {batch}
[train]
steps = {steps}
seed = {seed}
micro_batch_size = {batch}
device = "cpu"
dtype = "float32"
eval_every = {steps}
eval_sequences = {evals}
save_every = {save_every}
keep = 1
[optim]
lr = {lr}
warmup_steps = {warmup}
'''

def train(s, out, name, steps, seed, lr=None):
    "One run, to its end; its folder"
    folder, size = out/f'{name}-{steps}-{seed}', SIZES[name]
    file = out/f'{folder.name}.toml'
    settings = {**asdict(size), **asdict(s), **({'lr': lr} if lr else {})}
    file.write_text(RUN.format(**{**settings, 'out': folder.as_posix(), 'tokens': out.as_posix()},
                               steps=steps, seed=seed, warmup=steps//20, evals=s.eval_sequences,
                               save_every=max(steps//4, 100)))
    command = [sys.executable, '-m', 'llama_nb', 'train', str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    if done.returncode: raise SystemExit(f'{file}: {done.stderr[-2000:]}')
    print(folder.name, flush=True)
    return folder

# --- what came out ---------------------------------------------------------------------------------

def curve(rows, points=60):
    "(tokens, mean training loss since the point before), at points that grow geometrically"
    last, at, out = len(rows), 0, []
    for k in range(1, points + 1):
        end = max(round(last**(k/points)), at + 1)
        if end > last or end < 20: continue
        out.append([rows[end - 1]['tokens'], statistics.fmean(r['loss'] for r in rows[at:end])])
        at = end
    return out

def result(s, folder, name, steps, seed):
    from llama_nb.run_file import load_run
    c = load_run(folder/'config.toml').model
    rows = [json.loads(line) for line in (folder/'metrics.jsonl').read_text().splitlines()]
    return {'size': name, 'steps': steps, 'seed': seed, 'parameters': c.n_params,
            'matrices': c.n_params - c.vocab_size*c.dim - (2*c.n_layers + 1)*c.dim,
            'tokens': rows[-1]['tokens'], 'held_out': rows[-1]['held_out_loss'],
            'seconds': sum(r['seconds'] for r in rows), 'curve': curve(rows)}

def main(s):
    import torch
    from train_step import cpu_name
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    shards = prepare(s, out)
    wanted = [(name, steps, 0) for steps in reversed(STEPS) for name in reversed(SIZES)]
    wanted += [(*SCATTER, seed) for seed in SEEDS]
    with ThreadPoolExecutor(s.workers) as pool:
        folders = list(pool.map(lambda run: train(s, out, *run), wanted))
    runs = [result(s, folder, *run) for folder, run in zip(folders, wanted)]
    text = 'the clean documents of `llama-nb data mini`' if is_mini(s) else Path(s.documents).name
    about = {**asdict(s), 'documents': text, 'processor': cpu_name(), 'python': platform.python_version(),
             'torch': torch.__version__, 'date': time.strftime('%Y-%m-%d'),
             'train_tokens': shards.n_tokens, 'bytes_per_token': shards.n_bytes/shards.n_tokens,
             'sizes': {name: asdict(size) for name, size in SIZES.items()}}
    lines = ['{"about": ' + json.dumps(about) + ',', ' "runs": [']
    lines += ['  ' + ',\n  '.join(json.dumps(r) for r in runs), ' ]}']
    (HERE/f'{s.name}.json').write_text('\n'.join(lines) + '\n')
    for r in runs: print(r['size'], r['steps'], r['seed'], round(r['held_out'], 4), round(r['seconds']))

if __name__ == '__main__':
    import tyro
    sys.path.insert(0, str(HERE))
    main(tyro.cli(Settings))
