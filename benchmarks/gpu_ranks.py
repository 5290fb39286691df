"""The part of gpu.py for a machine with several GPUs: what they compute together against one of them, a run
that goes on in another layout, and how much of one GPU's speed is left to each of many."""
import json, os, re, statistics, sys, time
from dataclasses import replace
from pathlib import Path
import torch
from llama_nb.parallel.processes import stop_ranks
from llama_nb.run_file import dump_run, load_run
from llama_nb.train.trainer import start_run, train_step
from gpu_parts import LIMITS, run_config
from gpu_runs import NEAR, finish, metrics, raises, stop_in_the_middle, torchrun, write_run
from gpu_step import ONE_B, fitting

HERE = Path(__file__).resolve().parent
SETTINGS = {'compiled': {'compile': 'blocks', 'recompute': 'linear'},
            'float32': {'dtype': 'float32', 'attention': 'sdpa'}}
FAR = {'compiled': NEAR, 'float32': LIMITS['float32']}

def ranks(desk):
    "All GPUs of this machine, as many as a power of two. On a CPU, two ranks with gloo"
    n = 1 << torch.cuda.device_count().bit_length() - 1 if desk.gpu else 2
    if n < 2:
        desk.skip('two GPUs or more', 'there is one')
        return
    changes(desk, n)
    if not desk.gpu:
        desk.skip('each layout by itself; a rank among others that raises', 'the tests do it with gloo')
        desk.skip('speed', 'two ranks on one CPU share its cores')
        return
    agree(desk, n, 'float32')
    agree(desk, n, 'compiled')
    raises(desk, n)
    speed(desk, n)

def layouts(n:int)->dict[str, tuple[int, int, int]]: # name -> replicate, shard, tensor
    "The ways in which `n` ranks, a power of two, are tried"
    found = {'FSDP': (1, n, 1), 'replicas': (n, 1, 1),
             'TP+SP' if n == 2 else 'FSDP x TP+SP': (1, n//2, 2)}
    if n > 2: found['HSDP'] = (2, n//2, 1)
    if n > 4: found['HSDP x TP+SP'] = (2, n//4, 2)
    return found

def flags(layout:tuple)->list[str]:
    names = ('replicate', 'shard', 'tensor')
    return [word for name, k in zip(names, layout) for word in (f'--parallel.{name}', str(k))]

def last_words(said:str)->str:
    "What a rank said before torchrun reports that it has failed"
    return re.split(r'^.*distributed[./]elastic', said, maxsplit=1, flags=re.M)[0].strip()[-300:]

# --- the same numbers -----------------------------------------------------------------------------

def train(desk, path:Path, layout:tuple)->str:
    "The command line on as many ranks as the layout has: what it printed"
    command = ('-m', 'llama_nb', 'train', path, *flags(layout))
    return finish(torchrun(*command, ranks=layout[0]*layout[1]*layout[2]), desk.left())

def compare(desk, table:str, name:str, out:Path, right:Path, limit:float, said:str, **values):
    "Losses and gradient norms of all steps, relative to those of one rank"
    got, expected = metrics(out), metrics(right)
    if not expected or [m['step'] for m in got] != [m['step'] for m in expected]:
        desk.row(table, name, False, why=last_words(said), steps=len(got), **values)
        return
    far = {k: max(abs(a[k]/b[k] - 1) for a, b in zip(got, expected)) for k in ('loss', 'grad_norm')}
    desk.row(table, name, max(far.values()) < limit, **far, limit=limit, **values)

def agree(desk, n:int, how:str):
    "Twenty steps of every layout beside those of one rank"
    settings = {'steps': 20, 'batch': 2*n, **SETTINGS[how]}
    path, right = write_run(desk, **settings)
    train(desk, path, (1, 1, 1))
    for name, layout in layouts(n).items():
        path, out = write_run(desk, **settings)
        said = train(desk, path, layout)
        compare(desk, f'{n} ranks beside one, {how}', name, out, right, FAR[how], said)

def changes(desk, n:int):
    "A run that is stopped as FSDP and goes on with tensor parallelism, beside one rank that nobody disturbs"
    settings = {'steps': 100 if desk.gpu else 30, 'batch': 2*n, **SETTINGS['float32']}
    (whole, right), (cut, out) = (write_run(desk, **settings) for _ in range(2))
    train(desk, whole, (1, 1, 1))
    first, second = (1, n, 1), (1, n//2, 2)
    stop_in_the_middle(desk, cut, out, *flags(first), ranks=n)
    stopped = len(metrics(out))
    said = train(desk, cut, second)
    compare(desk, 'another layout in the middle', f'{n} ranks, shard {n}, then shard {n//2} x tensor 2', out,
            right, LIMITS['float32'], said, stopped_after=stopped)

# --- speed ----------------------------------------------------------------------------------------

def speed(desk, n:int):
    "Steps of 1.3B, or of as many of its layers as fit on one GPU: 8 sequences for each GPU, 4 at a time"
    size, name = fitting(desk, ONE_B, 4*2048, '1.3B')
    if not size: return
    cases = {'one GPU': ((1, 1, 1), False)} | {f'{n} GPUs, {k}': (v, False) for k, v in layouts(n).items()}
    cases |= {f'{k}, asynchronous': (v, True) for k, (v, _) in cases.items() if v[2] > 1}
    alone = None
    for case, (layout, together) in cases.items():
        if desk.left() < 60: break
        count = layout[0]*layout[1]*layout[2]
        found = timed(desk, size, layout, together)
        each = found.get('tokens_per_second', 0)/count
        alone = alone or each
        desk.row(f'{name}, 8 x 2,048 tokens for each GPU', case, None if each else False, **found,
                 each=each or None, of_one=each/alone if each and alone else None)

def timed(desk, size, layout:tuple, together:bool)->dict:
    "What a step takes on these ranks; why it took none"
    count = layout[0]*layout[1]*layout[2]
    config = run_config(desk, size, batch=8*count, micro=4, compile='blocks', recompute='none')
    shape = dict(zip(('replicate', 'shard', 'tensor'), layout), async_tensor=together)
    path, result = desk.work/'speed.toml', desk.work/'speed.json'
    path.write_text(dump_run(replace(config, parallel=replace(config.parallel, **shape))), encoding='utf-8')
    result.unlink(missing_ok=True)
    said = finish(torchrun(HERE/'gpu_ranks.py', path, result, ranks=count), min(desk.left(), 150))
    return json.loads(result.read_text()) if result.exists() else {'why': last_words(said)}

def time_steps(path:str, result:str, warm:int=5, turns:int=12):
    "A rank: steps of a run that saves nothing. The first rank writes their median"
    run = start_run(load_run(path), report=lambda line: None)
    def wait(): return run.device.type == 'cuda' and torch.cuda.synchronize()
    took = []
    for _ in range(warm + turns):
        wait()
        start = time.perf_counter()
        train_step(run)
        wait()
        took.append(time.perf_counter() - start)
    seconds, data = statistics.median(took[warm:]), run.config.data
    peak = torch.cuda.max_memory_allocated()/1e9 if run.device.type == 'cuda' else None
    found = {'tokens_per_second': data.batch_size*data.seq_len/seconds, 'peak_gb': peak}
    if os.environ['RANK'] == '0': Path(result).write_text(json.dumps(found))
    run.batches = None
    stop_ranks()

if __name__ == '__main__': time_steps(*sys.argv[1:])
