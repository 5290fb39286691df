"""Checkpoints of several processes: any layout reads any other, all ranks meet the same error, a rank that is
killed loses nothing, and no more is copied or told than needed."""
import json, os, pickle, resource, signal, subprocess, sys
from pathlib import Path
import pytest, torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from conftest import run_ranks
import llama_nb.train.sharded as pieces
from llama_nb.train import checkpoint, stored
from llama_nb.config import ModelConfig
from llama_nb.core import is_temporary
from llama_nb.model.transformer import LLaMA
from llama_nb.parallel.mesh import make_mesh
from llama_nb.parallel.processes import rank_main
from llama_nb.parallel.tensor import apply_tensor_parallel
from llama_nb.settings import OptimConfig
from llama_nb.train.checkpoint import Saver, load_into, lock_folder, save_checkpoint
from llama_nb.train.optim import make_optimizer
from llama_nb.train.state import optimizer_tensors, prepare_optimizer
from llama_nb.train.stored import (CheckpointError, consolidate, latest_checkpoint, list_checkpoints,
                                   load_checkpoint)

pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is')
ME = Path(__file__).stem

def silent(line): raise AssertionError(f'a damaged checkpoint was visible: {line}')

# --- any layout into any other -------------------------------------------------------------------

def whole(seed):
    "What is saved: even and uneven sizes, fewer rows than ranks, a scalar, an empty tensor, three types"
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=g)
    return {'model': {'even': make(8, 12), 'uneven': make(7, 5), 'few rows': make(2, 6), 'gain': make(6),
                      'half': make(5, 4).bfloat16(), 'none': make(0, 3)},
            'optimizer': {'even.exp_avg': make(8, 12), 'even.step': torch.tensor(seed*1.),
                          'uneven.exp_avg': make(7, 5), 'count': torch.tensor([seed, 2**40])}}

R, S0, S1 = Replicate(), Shard(0), Shard(1)
LAYOUTS = {'one process': None, '2 fsdp': ([2], [S0]), '2 columns': ([2], [S1]), '3 fsdp': ([3], [S0]),
           '4 fsdp': ([4], [S0]), '2x2 hsdp': ([2, 2], [R, S0]),
           '2x2 both rows': ([2, 2], [S0, S0]), '2x2 rows and columns': ([2, 2], [S0, S1])}

def laid_out(tensors, layout):
    """`tensors` as this layout's ranks hold them; None on the others. Numbers and counters stay plain, as
    AdamW's are"""
    if layout is None: return tensors if dist.get_rank() == 0 else None
    shape, placements = layout
    n = torch.Size(shape).numel()
    mesh = DeviceMesh('cpu', torch.arange(n).view(shape))
    if dist.get_rank() >= n: return None
    fits = lambda t: [p if p == R or p.dim < t.ndim else R for p in placements]
    return {part: {k: distribute_tensor(t.clone(), mesh, fits(t), src_data_rank=None)
                   if t.is_floating_point() and t.ndim else t.clone() for k, t in named.items()}
            for part, named in tensors.items()}

def layouts_worker(folder):
    "Save in each layout, load each in three: its own, the next, and the one three places on; what differed"
    folder, wrong = Path(folder), []
    groups = {n: dist.new_group(list(range(n))) for n in (1, 2, 3, 4)}
    size = lambda layout: 1 if layout is None else torch.Size(layout[0]).numel()
    local = lambda t: t.to_local() if isinstance(t, DTensor) else t
    for i, (a, layout) in enumerate(LAYOUTS.items()):
        mine = laid_out(whole(i), layout)
        if mine: save_checkpoint(folder/a, i, mine, {'layout': a}, group=groups[size(layout)])
    dist.barrier()
    for j, (b, layout) in enumerate(LAYOUTS.items()):
        for i, a in enumerate(LAYOUTS):
            if (j - i) % len(LAYOUTS) not in (0, 1, 3): continue
            want, got = laid_out(whole(i), layout), laid_out(whole(99), layout)
            if not got: continue
            path = latest_checkpoint(folder/a, silent, groups[size(layout)])
            if load_into(path, got, digests=False, group=groups[size(layout)]) != {'layout': a}:
                wrong.append(f'{a} -> {b}: state')
            wrong += [f'{a} -> {b}: {k}' for part in got for k, t in got[part].items()
                      if not torch.equal(local(t), local(want[part][k]))]
    return wrong

# --- a real model with a real optimiser ----------------------------------------------------------

CONFIG = ModelConfig(32, 2, 4, vocab_size=64, multiple_of=32, max_seq_len=32)

def model_and_optimizer(seed, mesh=None):
    from torch.distributed.fsdp import fully_shard
    torch.manual_seed(seed)
    model = LLaMA(CONFIG)
    if mesh:
        apply_tensor_parallel(model, mesh['tensor'])
        for block in (*model.layers, model): fully_shard(block, mesh=mesh['replicate', 'shard'])
    return model, make_optimizer(model, OptimConfig())

def parts(model, optimizer):
    return {'model': {n: p.detach() for n, p in model.named_parameters()},
            'optimizer': optimizer_tensors(model, optimizer)}

def step(model, optimizer, i):
    "One step with gradients that need no forward pass: they follow from the weights"
    for p in model.parameters(): p.grad = p.detach()*(i + 1)
    optimizer.step()

def model_worker(folder):
    "FSDP x TP continues what one process began; equal to the end, with the counters that AdamW made"
    mesh = make_mesh((1, 2, 2), 'cpu')
    model, optimizer = model_and_optimizer(1, mesh)
    prepare_optimizer(model, optimizer)
    state = load_into(Path(folder)/'one'/'step-00000001', parts(model, optimizer))
    step(model, optimizer, 1)
    saver = Saver(Path(folder)/'four')
    saver.save(2, parts(model, optimizer), state)
    with torch.no_grad():
        for p in model.parameters(): p.to_local().fill_(-1)  # training goes on: none of this may be saved
        for s in optimizer.state.values(): [t.zero_() for t in s.values()]
    saver.wait()
    return [str(p.placements) for p in model.parameters()][:2]

# --- what is copied, what is told ----------------------------------------------------------------

def written(path, rank):
    "Bytes of the numbers that a rank wrote"
    return sum(t.nbytes for f in path.glob(f'*-{rank:05}.safetensors') for t in load_file(f).values())

def copied_worker(folder):
    """Save a state that two groups hold twice; bytes that this rank copied before training went on, and bytes
    that it wrote"""
    mesh, rank = DeviceMesh('cpu', torch.arange(4).view(2, 2)), dist.get_rank()
    def make(seed, *shape):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return distribute_tensor(values, mesh, [R, S0], src_data_rank=None)
    tensors = {part: {f'{i}.w': make(i, 64, 3*i + 1) for i in range(8)} for part in ('model', 'optimizer')}
    tensors['optimizer']['step'] = torch.tensor(3.)
    saver, real, copied = Saver(Path(folder)/'copied'), torch.Tensor.copy_, []
    def copy_(self, source, *args, **kwargs):
        if source.numel() > 1: copied.append(source.nbytes)
        return real(self, source, *args, **kwargs)
    torch.Tensor.copy_ = copy_
    try:
        saver.save(1, tensors, {})
        before = sum(copied)
    finally:
        torch.Tensor.copy_ = real
    saver.wait()
    return {'copied': before,
            'held': sum(t.to_local().nbytes for part in tensors.values() for t in part.values()
                        if isinstance(t, DTensor)),
            'written': written(Path(folder)/'copied'/'step-00000001', rank) - 4*(rank == 0)}

def received(call):
    "Bytes that this rank receives in the collectives of `call`"
    import torch.distributed.distributed_c10d as c10d
    sizes, size = [], lambda tensors: sum(t.nbytes for t in tensors)
    counts = {'all_gather': lambda out, *args, **kwargs: size(out),
              'gather': lambda t, out=None, *args, **kwargs: size(out or kwargs.get('gather_list') or ()),
              'broadcast': lambda t, *args, **kwargs: t.nbytes if dist.get_rank() else 0,
              'scatter': lambda t, *args, **kwargs: t.nbytes,
              'all_reduce': lambda t, *args, **kwargs: t.nbytes}
    real = {name: getattr(c10d, name) for name in counts}
    def counted(name):
        def collective(*args, **kwargs):
            sizes.append(counts[name](*args, **kwargs))
            return real[name](*args, **kwargs)
        return collective
    for name in counts:
        for module in (c10d, dist): setattr(module, name, counted(name))
    try:
        call()
    finally:
        for name in counts:
            for module in (c10d, dist): setattr(module, name, real[name])
    return sum(sizes)

def received_worker(folder):
    "For few tensors and for many: bytes received while saving, looking for the newest, and loading"
    mesh, found = DeviceMesh('cpu', torch.arange(4).view(2, 2)), {}
    for n in (4, 200):
        def full(value):
            return distribute_tensor(torch.full((8, 3), value), mesh, [R, S0], src_data_rank=None)
        def make(value, n=n):
            return {part: {f'layers.{i}.weight': full(value) for i in range(n)}
                    for part in ('model', 'optimizer')}
        here, state = Path(folder)/f'received-{n}', {'a': 1}
        found[n] = {'save': received(lambda: save_checkpoint(here, 1, make(1.), state)),
                    'look': received(lambda: latest_checkpoint(here, silent)),
                    'load': received(lambda: load_into(here/'step-00000001', make(0.), digests=False))}
    return found

def odd_worker(folder):
    "A tensor that lies on a part of the ranks twice; what cannot be stored, and what was said of it"
    folder, said = Path(folder), {}
    mesh = init_device_mesh('cpu', (2, 2), mesh_dim_names=('a', 'b'))
    x = torch.arange(60.).view(6, 10)
    save_checkpoint(folder/'part', 1,
                    {'model': {'x': distribute_tensor(x, mesh['b'], [S0], src_data_rank=None),
                               'y': distribute_tensor(x + 1, mesh['a'], [S1], src_data_rank=None),
                               'z': distribute_tensor(x + 2, mesh, [S0, S1], src_data_rank=None)}}, {})
    def refused(name, tensor):
        try:
            save_checkpoint(folder/'odd', 1, {'model': {'x': tensor}}, {})
            said[name] = 'nothing'
        except CheckpointError as e:
            said[name] = str(e)
    refused('sum', DTensor.from_local(x, mesh, [R, Partial()]))
    refused('other shapes', torch.zeros(3 + (dist.get_rank() == 2)))
    if (real := getattr(pieces, 'boxes_of', None)):
        pieces.boxes_of = lambda *args: (real(*args)[0][::-1], *real(*args)[1:])
        refused('other boxes', distribute_tensor(x, mesh, [R, S0], src_data_rank=None))
        pieces.boxes_of = real
    return said

def four_worker(folder):
    return {'wrong': layouts_worker(folder), 'placements': model_worker(folder),
            'copied': copied_worker(folder), 'received': received_worker(folder), 'odd': odd_worker(folder)}

@pytest.fixture(scope='module')
def four_ranks(tmp_path_factory):
    "What four ranks left in a folder, and what they returned; they are slow to start, so once for two tests"
    folder = tmp_path_factory.mktemp('four')
    model, optimizer = model_and_optimizer(0)
    step(model, optimizer, 0)
    save_checkpoint(folder/'one', 1, parts(model, optimizer), {'a': 1})
    return folder, run_ranks(f'{ME}:four_worker', 4, {'folder': str(folder)}, timeout=400)

def test_any_layout_reads_any_other(four_ranks):
    tmp_path, found = four_ranks
    assert [f['wrong'] for f in found] == [[]]*4
    for i, name in enumerate(LAYOUTS):                                   # and here, without any process group
        path = latest_checkpoint(tmp_path/name, silent)
        got, state = load_checkpoint(path)
        assert state == {'layout': name}
        for part, named in whole(i).items():
            assert (got[part].keys() == named.keys()
                    and all(torch.equal(got[part][k], t) and got[part][k].dtype == t.dtype
                            for k, t in named.items()))
        # each number is written once, replicated ones too; torch's own reader of safetensors agrees
        # on what is there
        on_disk = sum(t.numel() for f in path.glob('*.safetensors') for t in load_file(f).values())
        assert on_disk == sum(t.numel() for named in whole(i).values() for t in named.values())
        theirs = {k: torch.zeros_like(t) for named in whole(99).values() for k, t in named.items()
                  if t.numel()}
        dcp.load(theirs, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
        assert all(torch.equal(theirs[k], t) for named in whole(i).values() for k, t in named.items()
                   if t.numel())

def test_fsdp_and_tensor_parallel_go_on_from_one_process(four_ranks, tmp_path):
    folder, found = four_ranks
    assert all('StridedShard' in f['placements'][0] for f in found)
    model, optimizer = model_and_optimizer(0)
    step(model, optimizer, 0)
    step(model, optimizer, 1)
    want, (got, state) = parts(model, optimizer), load_checkpoint(folder/'four'/'step-00000002')
    assert state == {'a': 1}
    for part, named in want.items():
        assert got[part].keys() == named.keys()
        # the same operations on other stretches: vector and scalar code round differently
        for k, t in named.items(): torch.testing.assert_close(got[part][k], t, rtol=1e-6, atol=1e-9)
    consolidate(folder/'four'/'step-00000002', tmp_path/'out.safetensors')
    plain = load_file(tmp_path/'out.safetensors')
    assert (plain.keys() == model.state_dict().keys()
            and all(torch.equal(plain[k], t) for k, t in got['model'].items()))
    assert [p.name for p in tmp_path.iterdir()] == ['out.safetensors']

def test_a_rank_copies_what_it_writes(four_ranks):
    """Each of two groups holds everything; a rank copies its half of what it holds, and all write about as
    much"""
    found = [f['copied'] for f in four_ranks[1]]
    assert [f['copied'] for f in found] == [f['written'] for f in found]
    assert sum(f['copied'] for f in found) == sum(f['held'] for f in found)/2
    assert max(f['written'] for f in found) < 1.1*min(f['written'] for f in found)

def test_no_list_of_tensors_travels_while_saving_and_one_while_loading(four_ranks):
    folder, found = four_ranks
    few, many = ([f['received'][n] for f in found] for n in ('4', '200'))
    # 392 tensors more; a digit or two of a file's size
    for a, b in zip(few, many): assert b['save'] < a['save'] + 500
    path = folder/'received-200'/'step-00000001'
    index, manifest = (len(pickle.dumps(json.loads((path/name).read_text())))
                       for name in ('index.json', 'manifest.json'))
    assert index > 10_000
    assert many[0]['load'] < 500 and many[0]['look'] < 500  # rank 0 reads; nobody sends it anything but flags
    for f in many[1:]:
        assert f['look'] < manifest + 1000                                # told once
        assert f['load'] < index + manifest + 1000

def test_a_tensor_on_a_part_of_the_ranks_is_written_once(four_ranks):
    folder, x = four_ranks[0], torch.arange(60.).view(6, 10)
    path = folder/'part'/'step-00000001'
    got, _ = load_checkpoint(path)
    assert all(torch.equal(got['model'][name], x + i) for i, name in enumerate('xyz'))
    assert sum(written(path, rank) for rank in range(4)) == 3*x.nbytes

def test_what_cannot_be_stored_is_refused_on_all_ranks(four_ranks):
    folder, found = four_ranks
    said = found[0]['odd']
    assert all(f['odd'] == said for f in found)
    assert ('x is a sum that ranks have not finished' in said['sum']
            and 'rank 2 saves other tensors than rank 0' in said['other shapes'])
    assert 'this torch cuts tensors in a way that llama_nb does not know' in said['other boxes']
    assert not list((folder/'odd').glob('*step-*'))

# --- 2,048 ranks ---------------------------------------------------------------------------------

def scale_worker(rank):
    """Plan the save of 65B's layout as one of 2,048 ranks sees it; no rank is asked: a fake process group
    would answer nonsense"""
    import hashlib
    from dataclasses import replace
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from llama_nb.config import PRESETS
    from llama_nb.parallel.data import apply_data_parallel
    dist.init_process_group('fake', store=FakeStore(), rank=rank, world_size=2048)
    mesh = make_mesh((8, 32, 8), 'cpu')
    with torch.device('meta'): model = LLaMA(replace(PRESETS['65B'], n_layers=2))
    apply_tensor_parallel(model, mesh['tensor'], True)
    apply_data_parallel(model, mesh, torch.bfloat16)
    named, plans = dict(model.named_parameters()), []
    tensors = {'model': named,
               'optimizer': {f'{n}.{k}': p for n, p in named.items() for k in ('exp_avg', 'exp_avg_sq')}
               | {f'{n}.step': torch.zeros(()) for n in named}}
    asked = received(lambda: plans.append(pieces.plan_sharded(tensors)))
    plan, load = plans[0], torch.zeros(2048, dtype=torch.int64)
    for name, t in plan.mine.items():  # this rank's slices are the boxes that all expect of it
        at = plan.writers[name].tolist().index(rank)
        assert (list(t.shape) == plan.boxes[name][1][at].tolist()
                and plan.offsets[name] == plan.boxes[name][0][at].tolist())
    for name, w in plan.writers.items():
        volume = torch.from_numpy(plan.boxes[name][1].prod(1))*4
        assert volume.sum() == 4*torch.Size(plan.kinds[name][1]).numel()    # each number once
        load[w] += volume
    writers = hashlib.sha256(json.dumps({name: w.tolist()
                                         for name, w in plan.writers.items()}).encode()).hexdigest()
    return {'asked': asked, 'writers': writers, 'written': load.sum().item(), 'total': plan.nbytes,
            'most': (load.max()/load.double().mean()).item()}

SCALE = '''
import json, os, test_sharded_checkpoint as t
for rank in (0, 9, 2047):  # a process for each: torch remembers where a rank stands in a mesh
    if os.fork() == 0:
        print(json.dumps(t.scale_worker(rank)), flush=True)
        os._exit(0)
    os.wait()
'''

def test_ranks_of_65b_plan_alone_and_agree():
    env = {**os.environ,
           'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent), *(p for p in sys.path if p)])}
    done = subprocess.run([sys.executable, '-c', SCALE], env=env, capture_output=True, text=True, timeout=300)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 3, done.stderr[-3000:]
    assert found[0] == found[1] == found[2]                               # all find the same
    assert found[0]['asked'] == 0 and found[0]['written'] == found[0]['total']
    assert found[0]['most'] < 1.1  # two layers of 80: one slice more or less shows

def test_a_prepared_state_is_like_one_that_a_step_made():
    model, optimizer = model_and_optimizer(0)
    step(model, optimizer, 0)
    fresh, prepared = model_and_optimizer(0)
    prepare_optimizer(fresh, prepared)
    a, b = optimizer_tensors(model, optimizer), optimizer_tensors(fresh, prepared)
    assert (a.keys() == b.keys()
            and all((a[k].shape, a[k].dtype, a[k].device) == (b[k].shape, b[k].dtype, b[k].device)
                    and not b[k].any() for k in a))

# --- one rank fails, all are told ----------------------------------------------------------------

def failures_worker(folder):
    "The message of each failure on this rank"
    folder, rank, told, passing = Path(folder), dist.get_rank(), {}, set()
    mesh = DeviceMesh('cpu', torch.arange(2))
    tensors = {'model': {'w': distribute_tensor(torch.arange(4000.).view(100, 40), mesh, [S0],
                                                src_data_rank=None)}}
    state = {'rank': rank}
    saver = Saver(folder, keep=2)
    def failed(name, call):
        try:
            call()
            told[name] = 'nothing'
        except CheckpointError as e:
            told[name] = str(e)
            if is_temporary(e): passing.add(name)
    def asynchronously():
        saver.save(2, tensors, state)
        saver.wait()
    saver.save(1, tensors, state)
    saver.wait()
    def unlike_torch(*args): raise CheckpointError('this torch cuts tensors in another way')
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead of a signal, as with a full disk
    for how, save in (('full', lambda: save_checkpoint(folder, 2, tensors, state)),
                      ('full, asynchronously', asynchronously)):
        if rank == 1: resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
        failed(how, save)
        if rank == 1: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,)*2)
    real = stored.save_file
    def refuse(*args): raise PermissionError(30, 'Read-only file system')
    if rank == 1: stored.save_file = refuse
    failed('read-only', asynchronously)
    stored.save_file = real
    planned = checkpoint.plan_sharded
    if rank == 1: checkpoint.plan_sharded = unlike_torch
    failed('a plan', lambda: saver.save(2, tensors, state))
    checkpoint.plan_sharded = planned
    failed('a file in the way',
           lambda: save_checkpoint(folder/'step-00000001'/'state.json', 2, tensors, state))
    failed('no JSON', lambda: save_checkpoint(folder, 2, tensors, {'x': (1,)}))
    path = folder/'step-00000001'
    like = lambda *shape: {'w': distribute_tensor(torch.zeros(shape), mesh, [S0], src_data_rank=None)}
    failed('other shape', lambda: load_into(path, {'model': like(100, 41)}))
    failed('other type', lambda: load_into(path, {'model': {'w': like(100, 40)['w'].bfloat16()}}))
    failed('more', lambda: load_into(path, {'model': like(100, 40) | {'v': torch.ones(1)}}))
    failed('other names on one rank',
           lambda: load_into(path, {'model': like(100, 40) if rank == 0 else {'v': torch.ones(1)}}))
    failed('well', asynchronously)
    dist.barrier()
    if rank == 0:
        file = folder/'step-00000002'/'model-00001.safetensors'
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    dist.barrier()
    failed('damaged', lambda: load_into(folder/'step-00000002', {'model': like(100, 40)}))
    lines = []
    told['found'] = latest_checkpoint(folder, lines.append).name
    told['lines'] = len(lines)
    told['may pass'] = sorted(passing)
    return told

def test_all_ranks_are_told_what_one_met(tmp_path):
    first, second = run_ranks(f'{ME}:failures_worker', 2, {'folder': str(tmp_path)}, timeout=200)
    assert (first.pop('lines'), second.pop('lines')) == (1, 0)            # one line is enough
    assert first == second
    for how in ('full', 'full, asynchronously'):
        for words in ('could not save in', str(tmp_path), 'rank 1: ', 'File too large', 'needed 0.0 MB',
                      'MB free', 'earlier checkpoints are intact'):
            assert words in first[how]
        assert '\n' not in first[how]
    assert 'rank 1: [Errno 30] Read-only file system' in first['read-only']
    assert first['a plan'] == 'rank 1: this torch cuts tensors in another way'  # before the thread has begun
    # a file that stands in the way stays there: the batch script must not try again
    assert 'a file in the way' not in first['may pass']
    assert 'could not save in' in first['a file in the way'] and "state['x']" in first['no JSON']
    said = 'model/w in shape (100, 40) and type float32, this run (100, 41) and float32'
    assert said in first['other shape']
    assert ('this run (100, 40) and bfloat16' in first['other type'] and 'lacks model/v' in first['more']
            and 'rank 1: ' in first['other names on one rank'])
    assert (first['well'] == 'nothing' and 'model-00001.safetensors has changed' in first['damaged']
            and first['found'] == 'step-00000001')
    # nothing half-written is left
    assert sorted(p.name for p in tmp_path.iterdir()) == ['step-00000001', 'step-00000002']
    assert load_checkpoint(tmp_path/'step-00000001')[1] == {'rank': 0}

# --- kill -9 -------------------------------------------------------------------------------------

def killed_worker(folder, doomed, where):
    """Save steps 1 and 2; the doomed rank is killed while it saves the second. What the others were told goes
    into a file"""
    folder, rank = Path(folder), dist.get_rank()
    mesh = DeviceMesh('cpu', torch.arange(2))
    tensors = lambda v: {'model': {'w': distribute_tensor(torch.full((10, 4), v), mesh, [S0],
                                                          src_data_rank=None)}}
    saver = Saver(folder/'run')
    saver.save(1, tensors(1.), {'v': 1})
    saver.wait()
    def die(*args): os.kill(os.getpid(), signal.SIGKILL)
    if rank == doomed:
        if where == 'writing': stored.save_file = die
        else:
            real = os.replace
            os.replace = lambda *args: (real(*args) if where == 'named' else None, die())
    saver.save(2, tensors(2.), {'v': 2})
    try:
        saver.wait()
        said = 'nothing'
    except CheckpointError as e:
        said = str(e)
    (folder/f'said-{rank}').write_text(said)

def fork_both(meeting, **arguments):
    """Two ranks that are forked, which spares them their start; unlike with `run_ranks`, one lives on when
    the other dies. Exit codes"""
    pids = []
    for rank in range(2):
        if (pid := os.fork()) == 0:
            try:
                signal.alarm(150)
                os.environ['GLOO_SOCKET_IFNAME'] = 'lo'
                rank_main(f'{ME}:killed_worker', json.dumps(arguments), meeting, 2, rank, 100)
            finally:
                os._exit(1)                                         # never back into pytest
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

@pytest.mark.parametrize('doomed, where, step', ((1, 'writing', 1), (0, 'unnamed', 1), (0, 'named', 2)))
def test_a_rank_is_killed(tmp_path, doomed, where, step):
    codes = fork_both(tmp_path, folder=str(tmp_path), doomed=doomed, where=where)
    assert codes[doomed] == -signal.SIGKILL
    said = (tmp_path/f'said-{1 - doomed}').read_text()
    assert f'could not save in {tmp_path/"run"}: another rank does not answer' in said and '\n' not in said
    path = latest_checkpoint(tmp_path/'run', silent)
    got, state = load_checkpoint(path)
    assert (path.name == f'step-{step:08}' and state == {'v': step}
            and torch.equal(got['model']['w'], torch.full((10, 4), float(step))))
    save_checkpoint(tmp_path/'run', 3, got, state)                       # the next save sweeps up
    kept = [f'step-{s:08}' for s in (*range(1, step + 1), 3)][-2:]
    assert sorted(p.name for p in (tmp_path/'run').iterdir()) == kept

# --- nothing that is read can run ----------------------------------------------------------------

class Bomb:
    def __init__(self, file): self.file = file
    def __reduce__(self): return Path.touch, (Path(self.file),)

def test_no_file_that_is_read_can_run(tmp_path):
    path = save_checkpoint(tmp_path/'run', 1, whole(1), {})
    for file in path.iterdir():
        assert file.suffix in ('.json', '.safetensors')
        with pytest.raises(Exception): pickle.loads(file.read_bytes())  # noqa: B017 - whatever: it is no pickle
    bomb = pickle.dumps(Bomb(tmp_path/'ran'))
    pickle.loads(bomb)  # it is one
    assert (tmp_path/'ran').exists()
    (tmp_path/'ran').unlink()
    for name in ('.metadata', '__0_0.distcp', 'model-00001.safetensors', 'state.pkl'):
        (path/name).write_bytes(bomb)
    assert load_checkpoint(latest_checkpoint(tmp_path/'run', silent))[0].keys() == {'model', 'optimizer'}
    load_into(path, whole(2))
    for name in ('index.json', 'state.json', 'model-00000.safetensors'):  # with a digest that fits
        before, listed = (path/name).read_bytes(), json.loads((path/'manifest.json').read_text())
        (path/name).write_bytes(bomb)
        listed['files'][name] = {'bytes': len(bomb), 'sha256': pieces.file_digest(path/name)}
        old = (path/'manifest.json').read_text()
        (path/'manifest.json').write_text(json.dumps(listed))
        with pytest.raises(CheckpointError): load_checkpoint(path)
        with pytest.raises(CheckpointError): load_into(path, whole(2))
        (path/name).write_bytes(before)
        (path/'manifest.json').write_text(old)
    load_checkpoint(path)
    assert not (tmp_path/'ran').exists()

WRONG = {'a hole': lambda t: t['pieces'].pop(), 'outside': lambda t: t['pieces'][0][1].__setitem__(0, 5),
         'negative': lambda t: t['pieces'][0][1].__setitem__(0, -1),
         'a path': lambda t: t['pieces'][0].__setitem__(0, '../x'),
         'no such rank': lambda t: t['pieces'][0].__setitem__(0, 9),
         'no such type': lambda t: t.update(dtype='save'),
         'a huge one': lambda t: t.update(shape=[10**9, 12]),
         'another shape': lambda t: (t.update(shape=[12, 8]), t['pieces'][0].__setitem__(2, [12, 8])),
         'a key less': lambda t: t.pop('dtype')}

@pytest.mark.parametrize('how', WRONG)
def test_an_index_that_does_not_fit_the_files(tmp_path, how):
    path = save_checkpoint(tmp_path, 1, whole(1), {})
    index, listed = (json.loads((path/'index.json').read_text()),
                     json.loads((path/'manifest.json').read_text()))
    WRONG[how](index['tensors']['model/even'])
    (path/'index.json').write_text(json.dumps(index))
    listed['files']['index.json'] = {'bytes': (path/'index.json').stat().st_size,
                                     'sha256': pieces.file_digest(path/'index.json')}
    (path/'manifest.json').write_text(json.dumps(listed))
    with pytest.raises(CheckpointError): load_checkpoint(path)
    with pytest.raises(CheckpointError): load_into(path, whole(2))

# --- asynchronous, one process -------------------------------------------------------------------

def test_what_is_saved_is_what_was_there_when_asked(tmp_path, monkeypatch):
    "The writing is held up until the tensors have changed"
    import threading
    go, real = threading.Event(), stored.save_file
    monkeypatch.setattr(stored, 'save_file', lambda *args: (go.wait(20), real(*args)))
    tensors, state, saver = whole(1), {'list': [1]}, Saver(tmp_path, keep=1)
    saver.save(1, tensors, state)
    for named in tensors.values():
        for t in named.values(): t.fill_(3)
    state['list'].append(2)
    assert latest_checkpoint(tmp_path, silent) is None                    # not yet there
    go.set()
    saver.wait()
    got, kept = load_checkpoint(latest_checkpoint(tmp_path, silent))
    assert (kept == {'list': [1]}
            and all(torch.equal(got[part][k], t) for part, named in whole(1).items()
                    for k, t in named.items()))
    saver.save(2, whole(2), state)
    saver.save(3, whole(3), state)
    saver.wait()
    saver.wait()
    assert [p.name for p in list_checkpoints(tmp_path)] == ['step-00000003']

def test_an_error_comes_at_the_next_save(tmp_path):
    (tmp_path/'file').write_text('in the way')
    saver = Saver(tmp_path/'file')
    saver.save(1, whole(1), {})
    with pytest.raises(CheckpointError, match='could not save in'): saver.save(2, whole(1), {})
    saver.save(3, whole(1), {})
    with pytest.raises(CheckpointError, match='could not save in'): saver.wait()
    saver.wait()                                                         # told once
    with pytest.raises(CheckpointError, match='at least 1'): Saver(tmp_path, keep=0)

# --- two runs on one folder ----------------------------------------------------------------------

def test_the_second_run_on_a_folder_is_refused_and_a_killed_one_lets_go(tmp_path):
    import socket
    from llama_nb.core import TemporaryError, UserError
    code = (f'from llama_nb.train.checkpoint import lock_folder; import time\n'
            f'with lock_folder({str(tmp_path)!r}): print("held", flush=True); time.sleep(60)')
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline() == 'held\n'
        with pytest.raises(UserError) as e:
            with lock_folder(tmp_path): pass
        assert '\n' not in str(e.value)
        for words in (str(tmp_path), str(p.pid), socket.gethostname()): assert words in str(e.value)
        assert not isinstance(e.value, TemporaryError)                   # the holder lives: a person decides
        (tmp_path/'.lock').write_text(f'process {p.pid} on a-lost-machine')
        with pytest.raises(TemporaryError, match='on a-lost-machine'):   # which may hold it for minutes
            with lock_folder(tmp_path): pass
    finally:
        p.kill()
        p.wait()
    with lock_folder(tmp_path): pass                                     # the system let go of it
    with lock_folder(tmp_path): pass                                     # and so did we

# --- one file ------------------------------------------------------------------------------------

def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path, 1, whole(1), {})
    (tmp_path/'out.safetensors').write_text('old')
    def refuse(*args, **kwargs): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', refuse)
        with pytest.raises(CheckpointError, match='No space left'):
            consolidate(path, tmp_path/'out.safetensors')
    assert (tmp_path/'out.safetensors').read_text() == 'old' and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(CheckpointError, match='has no model'):
        consolidate(save_checkpoint(tmp_path/'b', 1, {'x': whole(1)['model']}, {}), tmp_path/'out2')
    consolidate(path, tmp_path/'out.safetensors')
    got = load_file(tmp_path/'out.safetensors')
    assert all(torch.equal(got[k], t) for k, t in whole(1)['model'].items()) and len(got) == 6
