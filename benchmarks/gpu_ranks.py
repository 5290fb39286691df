"""Parts of gpu.py for a machine with several GPUs: what they compute together against one of them, a run that
goes on in another layout, and how much of one GPU's speed is left to each of many."""
import itertools, json, os, re, sys
from pathlib import Path
import torch
from llama_nb.parallel.processes import stop_ranks
from llama_nb.parallel.tensor import check_fused
from llama_nb.run_file import load_run
from llama_nb.train.trainer import start_run, train_step
from gpu import Desk
from gpu_parts import LIMITS, first_line, median_ms
from gpu_runs import NEAR, finish, metrics, raises, stop_in_the_middle, torchrun, write_run
from gpu_step import ONE_B, fitting

HERE = Path(__file__).resolve().parent
COMPILED = {'compile': 'blocks', 'recompute': 'linear'}
FLOAT32 = {'dtype': 'float32', 'attention': 'sdpa'}
ALONE = (1, 1, 1)
# of a part's time, for one run: a run that hangs leaves the rest to the others
ONE_RUN = .2

def usable()->int:
    "GPUs of this machine, as many as a power of two"
    return 1 << torch.cuda.device_count().bit_length() - 1

def layouts(n:int)->dict[str, tuple[int, int, int]]: # name -> replicate, shard, tensor
    "The ways in which `n` ranks, a power of two, are tried"
    found = {'FSDP': (1, n, 1), 'replicas': (n, 1, 1),
             'TP+SP' if n == 2 else 'FSDP x TP+SP': (1, n//2, 2)}
    if n > 2: found['HSDP'] = (2, n//2, 1)
    if n > 4: found['HSDP x TP+SP'] = (2, n//4, 2)
    return found

def size(layout:tuple)->int: return layout[0]*layout[1]*layout[2]

def flags(layout:tuple)->list[str]:
    "Of the command line"
    names = ('replicate', 'shard', 'tensor')
    return [word for name, k in zip(names, layout) for word in (f'--parallel.{name}', str(k))]

def last_words(said:str)->str:
    "What a rank said before torchrun reports that it has failed"
    return re.split(r'^.*distributed[./]elastic', said, maxsplit=1, flags=re.M)[0].strip()[-300:]

# --- the same numbers -----------------------------------------------------------------------------

def ranks(desk):
    "All layouts beside one GPU. On a CPU, two ranks with gloo that change their layout"
    n = usable() if desk.gpu else 2
    if n < 2:
        desk.skip('two GPUs or more', 'there is one')
        return
    if desk.gpu:
        agree(desk, n, 'float32', FLOAT32, LIMITS['float32'])
        changes(desk, n)
        raises(desk, n, desk.share(ONE_RUN))
        agree(desk, n, 'bfloat16, compiled', COMPILED, NEAR)
    else:
        changes(desk, n)
        desk.skip('each layout by itself; a rank among others that raises', 'the tests do it with gloo')

def train(desk, path:Path, layout:tuple)->str:
    "The command line on as many ranks as the layout has: what it printed"
    command = ('-m', 'llama_nb', 'train', path, *flags(layout))
    return finish(torchrun(*command, ranks=size(layout)), desk.share(ONE_RUN))

def alone(desk, table:str, settings:dict)->Path|None: # its folder; None, and a row, if it failed
    "The run of one rank"
    path, out = write_run(desk, **settings)
    said = train(desk, path, ALONE)
    if (out/'results.json').exists(): return out
    desk.row(table, 'one rank', False, why=last_words(said))

def difference(out:Path, right:Path)->tuple[dict, str|None]: # errors, and why there are none
    "Losses and gradient norms of all steps of a run that is finished, relative to those of another"
    got, expected = metrics(out), metrics(right)
    if [m['step'] for m in got] != [m['step'] for m in expected]: return {}, f'it has made {len(got)} steps'
    if not (out/'results.json').exists(): return {}, 'its last checkpoint was not saved'
    wrong = [m['step'] for m in (*got, *expected) if m['loss'] is None or m['grad_norm'] is None]
    if wrong: return {}, f'step {wrong[0]} is not finite'
    return {k: max(abs(a[k]/b[k] - 1) for a, b in zip(got, expected)) for k in ('loss', 'grad_norm')}, None

def compare(desk, table:str, name:str, out:Path, right:Path, limit:float, said:str, held:bool=True, **values):
    "A row: a finished run beside that of one rank. It is fine below the limit, if all else `held`"
    far, why = difference(out, right)
    desk.row(table, name, held and bool(far) and max(far.values()) < limit, **far, limit=limit, **values,
             why=why and f'{why}: {last_words(said)}')

def agree(desk, n:int, how:str, settings:dict, limit:float):
    "Twenty steps of every layout beside those of one rank"
    table, settings = f'{n} ranks beside one, {how}', {'steps': 20, 'batch': 2*n, **settings}
    right = alone(desk, table, settings)
    for name, layout in layouts(n).items() if right else ():
        if out_of_time(desk, f'{table}, {name}'): continue
        path, out = write_run(desk, **settings)
        said = train(desk, path, layout)
        compare(desk, table, name, out, right, limit, said)

def changes(desk, n:int):
    "A run that is stopped as FSDP and goes on with tensor parallelism, beside one rank that nobody disturbs"
    table, steps = 'another layout in the middle', 100 if desk.gpu else 30
    settings = {'steps': steps, 'batch': 2*n, **FLOAT32}
    right = alone(desk, table, settings)
    if not right: return
    path, out = write_run(desk, **settings)
    first, second = (1, n, 1), (1, n//2, 2)
    stop_in_the_middle(path, out, *flags(first), seconds=desk.share(ONE_RUN), ranks=n)
    stopped = len(metrics(out))
    said = train(desk, path, second)
    resumed = 0 < stopped < steps and f'after step {stopped} of {steps}' in said
    compare(desk, table, f'{n} ranks, shard {n}, then shard {n//2} x tensor 2', out, right,
            LIMITS['float32'], said, resumed, stopped_after=stopped, resumed=resumed)

def out_of_time(desk, name:str)->bool:
    if desk.left() > ONE_RUN*desk.seconds/2: return False
    desk.skip(name, 'no time was left; --patience 2 gives more')
    return True

# --- speed ----------------------------------------------------------------------------------------

def speed(desk):
    "Steps of 1.3B, or of as many of its layers as fit on one GPU: 8 sequences for each GPU, 4 at a time"
    n = usable() if desk.gpu else 1
    if n < 2:
        desk.skip('speed', 'there is one GPU' if desk.gpu else 'two ranks on one CPU share its cores')
        return
    model, name = fitting(desk, ONE_B, 4*2048, '1.3B')
    if not model: return
    table, one = f'{name}, 8 x 2,048 tokens for each GPU', None
    for case, layout, together in cases(desk, n):
        if out_of_time(desk, case): continue
        found = timed(desk, model, layout, together)
        each, why = found.get('tokens_per_second', 0)/size(layout), found.get('why', '')
        if layout == ALONE: one = each
        broken = why and 'OutOfMemoryError' not in why and 'killed after' not in why
        desk.row(table, case, False if broken else None, **found, per_gpu=each or None,
                 of_one=each/one if each and one else None)

def cases(desk, n:int):
    "Names, layouts, and whether tensor ranks send while they multiply"
    yield 'one GPU', ALONE, False
    joined = all(torch.cuda.can_device_access_peer(*pair) for pair in itertools.permutations(range(n), 2))
    for name, layout in layouts(n).items():
        yield f'{n} GPUs, {name}', layout, False
        if layout[2] > 1 and joined: yield f'{n} GPUs, {name}, asynchronous', layout, True
    if not joined: desk.skip('asynchronous tensor parallelism', 'the GPUs cannot reach each other\'s memory')

def timed(desk, model, layout:tuple, together:bool)->dict:
    "What a step takes on these ranks; why it took none"
    path, out = write_run(desk, model, batch=8*size(layout), micro=4, compile='blocks', recompute='none')
    result, asked = out.with_suffix('.json'), [*flags(layout), '--parallel.async_tensor', together]
    ranks = torchrun(HERE/'gpu_ranks.py', path, result, *asked, ranks=size(layout))
    said = finish(ranks, desk.share(ONE_RUN))
    return json.loads(result.read_text()) if result.exists() else {'why': last_words(said)}

def time_steps(path:str, result:str, *flags):
    "A rank: steps of a run that saves nothing. The first rank writes their median"
    run = start_run(load_run(path, flags), report=lambda line: None)
    gpu, data = run.device.type == 'cuda', run.config.data
    ms = median_ms(Desk('gpu' if gpu else 'cpu', run.out, 0), lambda: train_step(run))
    if run.fusions_to_check is not None: check_fused(run.fusions_to_check)
    found = {'tokens_per_second': 1000*data.batch_size*data.seq_len/ms, 'ms': ms}
    if gpu: found['peak_gb'] = torch.cuda.max_memory_allocated()/1e9
    if os.environ['RANK'] == '0': Path(result).write_text(json.dumps(found))
    run.batches = None
    stop_ranks()

def rank(*arguments):
    "Ends at once if it fails: a group that is not left as it should be may wait for ever"
    try:
        time_steps(*arguments)
    except Exception as e:
        print(first_line(e), flush=True)
        os._exit(1)

if __name__ == '__main__': rank(*sys.argv[1:])
