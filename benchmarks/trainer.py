"""What a run pays besides its steps: for saving, in a thread and without one, and for waiting for its text.

One run at the size of train_step.py, whose blocks of steps take turns: nothing saved, saved asynchronously
after the first step, saved in the loop after the first step. So whatever else the machine does hits all three
alike. What a save costs is what the steps of its block take longer: of each step in a block the median over
the rounds, since one step varies by more than a save takes. Writes benchmarks/trainer.md and .json.

    python benchmarks/trainer.py --help
    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/trainer.py
"""
import json, platform, shutil, statistics, tempfile, time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent

@dataclass(frozen=True)
class Settings:
    "One run whose blocks of steps take turns"
    dim:int=256
    layers:int=6
    heads:int=8
    vocab:int=4096
    batch:int=8               # sequences in a step
    seq:int=256               # tokens in a sequence
    block:int=6               # steps for each save, enough for it to end
    rounds:int=25             # blocks of each kind
    every:int=20              # steps between two saves, for the share of the time that they cost
    name:str='trainer'        # of the table

def shards(folder):
    "Something to read: Python's help texts"
    from llama_nb.data.documents import topic_documents
    from llama_nb.data.shards import write_shards
    from llama_nb.data.tokenizer import train_tokenizer
    docs = list(topic_documents())
    write_shards(docs, train_tokenizer((d.text for d in docs), folder/'tokenizer.model', 1000),
                 folder/'tokens')

def open_run(folder, s, ranks):
    from llama_nb.config import ModelConfig
    from llama_nb.settings import DataConfig, OptimConfig, RunConfig, TrainConfig
    from llama_nb.train.trainer import start_run
    model = ModelConfig(s.dim, s.layers, s.heads, vocab_size=s.vocab, multiple_of=32, max_seq_len=s.seq)
    steps = 3*s.block*(s.rounds + 1) + 2
    return start_run(RunConfig(str(folder/'run'), model,
                             DataConfig(str(folder/'tokens'), seq_len=s.seq, batch_size=s.batch),
                             TrainConfig(steps=steps, micro_batch_size=s.batch//ranks, dtype='float32',
                                         save_every=steps, keep=1), OptimConfig(warmup_steps=10)))

def block(run, s, kind):
    """Seconds of each step of a block, and of those the seconds in which it waited for text and in which the
    loop stood still for saving"""
    from llama_nb.train import trainer
    seconds, waited, stood = [], 0., 0.
    def next_batch(run):
        nonlocal waited
        start = time.perf_counter()
        got = original(run)
        waited += time.perf_counter() - start
        return got
    original, trainer.next_batch = trainer.next_batch, next_batch
    try:
        for i in range(s.block):
            begin = time.perf_counter()
            trainer.train_step(run)['loss'].item()
            if i == 0 and kind != 'nothing saved':
                start = time.perf_counter()
                trainer.save(run)
                if kind == 'saved in the loop': run.saver.wait()
                stood = time.perf_counter() - start
            seconds.append(time.perf_counter() - begin)
    finally:
        trainer.next_batch = original
    run.saver.wait()
    return {'seconds': seconds, 'waited': waited, 'stood': stood}

def main(s):
    from llama_nb.parallel.mesh import on_all_ranks, on_rank_zero, rank_and_size
    from llama_nb.parallel.processes import start_ranks, stop_ranks
    start_ranks('cpu')
    rank, ranks = rank_and_size()
    folder = Path(on_rank_zero(tempfile.mkdtemp))
    on_rank_zero(lambda: shards(folder))
    run, kinds = open_run(folder, s, ranks), ('nothing saved', 'saved asynchronously', 'saved in the loop')
    got = {kind: [] for kind in kinds}
    for i in range(s.rounds + 1):
        for kind in kinds:
            found = block(run, s, kind)
            if i: got[kind].append(found)                                   # the first round warms up
    if rank == 0: write(s, got, run)
    run.batches = None
    on_all_ranks(lambda: None)  # nobody needs the folder any more
    on_rank_zero(lambda: shutil.rmtree(folder))
    stop_ranks()

def write(s, got, run):
    import torch
    from train_step import cpu_name
    steps = {kind: [statistics.median(at) for at in zip(*(b['seconds'] for b in got[kind]))] for kind in got}
    step = statistics.median(x for b in got['nothing saved'] for x in b['seconds'])
    extra = {kind: sum(steps[kind]) - sum(steps['nothing saved']) for kind in got}
    rows = {kind: {'stood': statistics.median(b['stood'] for b in got[kind]), 'extra': extra[kind],
                   'share': extra[kind]/(s.every*step),
                   'waited': statistics.median(b['waited']/sum(b['seconds']) for b in got[kind])}
            for kind in got}
    about = {**asdict(s), 'ranks': run.ranks, 'threads': torch.get_num_threads(),
             'python': platform.python_version(), 'torch': torch.__version__,
             'date': time.strftime('%Y-%m-%d')}
    size = sum(p.stat().st_size for p in run.out.rglob('*.safetensors'))/1e6
    lines = ['# What a run pays besides its steps', '',
             f'Measured {about["date"]} on {cpu_name()}, {run.ranks} rank{"s" if run.ranks > 1 else ""} of '
             f'{about["threads"]} thread{"s" if about["threads"] > 1 else ""}, Python {about["python"]}, '
             f'torch {about["torch"]}. '
             f'{run.config.model.n_params:,} parameters, {s.batch} sequences of {s.seq} tokens and '
             f'{1000*step:.0f} ms a step; checkpoints of {size:,.0f} MB. Blocks of {s.block} steps, one save '
             f'in each, took turns; medians of {s.rounds} blocks.', '',
             f'| | the loop stood still for, ms | a save lengthens the run by, ms | of a run that saves '
             f'every {s.every} steps | waiting for text |', '|---|---|---|---|---|']
    for kind, r in rows.items():
        lines.append(
            f'| {kind} | {1000*r["stood"]:.0f} | {1000*r["extra"]:.0f} | {r["share"]:.1%} | '
            f'{r["waited"]:.2%} |')
    lines += ['',
              f'A run saves every 500 steps unless told otherwise, which costs a {500//s.every}th of that. '
              f'Made by `python benchmarks/trainer.py`.']
    (HERE/f'{s.name}.json').write_text(json.dumps({'settings': about, 'rows': rows, 'blocks': got}, indent=1)
                                       + '\n')
    (HERE/f'{s.name}.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))

if __name__ == '__main__':
    import tyro
    main(tyro.cli(Settings))
