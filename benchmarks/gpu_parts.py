"""Parts of gpu.py: what runs here, graphs, host synchronisation, parity, memory; by what a user calls: a run
file, `start_run`, `train_step`."""
import gc, importlib.metadata, importlib.util, itertools, math, random, statistics, subprocess, sys, time
import xml.etree.ElementTree as ET
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
import torch
from llama_nb.config import ModelConfig
from llama_nb.core import UserError, pick_dtype
from llama_nb.model.backends import backend_problem, backend_report, pick_backend
from llama_nb.model.transformer import LLaMA, init_weights
from llama_nb.scale.memory import memory_per_rank
from llama_nb.settings import DataConfig, OptimConfig, RunConfig, TrainConfig
from llama_nb.train.recompute import RECOMPUTE, apply_recompute
from llama_nb.train.trainer import Trainer, start_run, train_step

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ('cross', 'separate')
# as wide as 7B, with a small vocabulary
BLOCK_7B = ModelConfig(4096, 1, 32, vocab_size=2048)
MINI = ModelConfig(64, 1, 2, vocab_size=512, multiple_of=32, max_seq_len=64)
# heads of width 128, as in 7B
SMALL = {'gpu': ModelConfig(256, 2, 2, vocab_size=512, multiple_of=32, max_seq_len=256),
         'cpu': ModelConfig(64, 2, 2, vocab_size=512, multiple_of=32, max_seq_len=64)}

# --- what the parts share -------------------------------------------------------------------------

def device(desk)->torch.device: return torch.device('cuda' if desk.gpu else 'cpu')

def wait(desk):
    if desk.gpu: torch.cuda.synchronize()

def median_ms(desk, work, turns:int=10)->float:
    "Milliseconds of `work`, the host waiting after each turn; some go before that do not count"
    for _ in range(3 if desk.gpu else 1): work()
    took = []
    for _ in range(turns if desk.gpu else 2):
        wait(desk)
        start = time.perf_counter()
        work()
        wait(desk)
        took.append(1000*(time.perf_counter() - start))
    return statistics.median(took)

def texts(longest:int)->list[str]:
    "Python's help texts cut into documents of 40 to `longest` characters, short ones as often as long ones"
    from llama_nb.data.documents import topic_documents
    text, rng, found, at = ''.join(d.text for d in topic_documents()), random.Random(0), [], 0
    while at < len(text):
        size = int(40*(longest/40)**rng.random())
        found.append(text[at:at + size])
        at += size
    return found

def shards(desk, longest:int=4000)->str:
    "Token shards that the parts share; made at the first call"
    folder = desk.work/f'tokens-{longest}'
    if folder.exists(): return str(folder)
    from llama_nb.data.documents import Document
    from llama_nb.data.shards import write_shards
    from llama_nb.data.tokenizer import Tokenizer, train_tokenizer
    docs, path = [Document(t, f'help/{i}') for i, t in enumerate(texts(longest))], desk.work/'tokenizer.model'
    tokenizer = Tokenizer(path) if path.exists() else train_tokenizer((d.text for d in docs[:200]), path, 400)
    write_shards(docs, tokenizer, folder)
    return str(folder)

_NUMBERS = itertools.count()

def run_config(desk, model:ModelConfig, batch:int=4, micro:int=2, documents:str='cross', where:str='',
               **train)->RunConfig:
    "A run of its own folder, as a run file would describe it"
    out = desk.work/'runs'/f'{Path(sys.argv[2]).name.replace(":", "-")}-{next(_NUMBERS)}'
    train = {'steps': 1000, 'micro_batch_size': micro, 'device': where or device(desk).type,
             'dtype': 'bfloat16',
             'prefetch': 2 if desk.gpu else 0,
             'save_every': 1000, **train}
    data = DataConfig(shards(desk, 2*model.max_seq_len), seq_len=model.max_seq_len, batch_size=batch,
                      documents=documents)
    optim = OptimConfig(warmup_steps=10, max_grad_norm=1e9)     # gradients are looked at, so not clipped
    return RunConfig(str(out), model, data, TrainConfig(**train), optim)

def trainer(desk, model, **settings)->Trainer:
    return start_run(run_config(desk, model, **settings), report=lambda line: None)

def bare_model(desk, config:ModelConfig, backend:str, mode:str, compiled:bool=False)->LLaMA:
    """A model whose first weights are drawn on its device; a run draws them on the CPU, which takes seconds
    per 100 million"""
    with torch.device('meta'): model = LLaMA(config)
    model.to_empty(device=device(desk))
    init_weights(model)
    for layer in model.layers: layer.attention.backend = backend
    apply_recompute(model, mode)
    for layer in model.layers if compiled else (): layer.compile(fullgraph=True)
    return model

def backends(desk, *wanted, dtype=torch.bfloat16, k:int=128)->list[str]:
    """Those of the wanted attention backends that can run here, with documents; the others become rows that
    say why not"""
    problems = {n: backend_problem(n, device(desk), dtype, k, True) for n in wanted}
    for name, problem in problems.items():
        if problem: desk.skip(f'attention {name}, {str(dtype).removeprefix("torch.")}, heads of {k}', problem)
    return [n for n in wanted if not problems[n]]

def default_attention(desk, k:int, packed:bool=False, dtype=torch.bfloat16)->str:
    "The attention that `auto` takes, which is what compiled parts try"
    return pick_backend('auto', device(desk), dtype, k, packed)

def first_line(e:BaseException)->str: return f'{type(e).__name__}: {e}'.split('\n')[0][:300]

def free(desk):
    "Give memory back before the next model"
    gc.collect()
    if desk.gpu: torch.cuda.empty_cache()

# --- environment ----------------------------------------------------------------------------------

def environment(desk):
    "What is here, which attention `auto` picks and why, and some steps with the settings that nobody touched"
    versions(desk)
    xformers_beside(desk)
    for dtype, k in itertools.product((torch.bfloat16, torch.float32), (32, 128)):
        for name in ('reference', 'sdpa', 'varlen', 'xformers'):
            problem = backend_problem(name, device(desk), dtype, k, True)
            desk.row('attention backends', f'{name}, {str(dtype).removeprefix("torch.")}, heads of {k}',
                     runs=not problem, why=problem or None)
        for packed, words in ((False, 'whole sequences'), (True, 'packed documents')):
            desk.row('attention that auto picks',
                     f'{str(dtype).removeprefix("torch.")}, heads of {k}, {words}',
                     said=backend_report('auto', device(desk), dtype, k, packed))
    default_steps(desk)
    if torch.cuda.device_count() < 2:
        desk.skip('asynchronous tensor parallelism', 'needs two GPUs that are joined by NVLink')

def shell(*command, seconds=60)->str:
    "What a program prints; why it printed nothing if it did not run"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired) as e:
        return first_line(e)
    return (done.stdout + done.stderr if done.returncode else done.stdout).strip()

def versions(desk):
    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return 'not installed'
    for name in ('torch', 'triton', 'xformers', 'transformers', 'numpy', 'nvidia-cuda-runtime-cu12',
                 'nvidia-cuda-runtime'):
        desk.row('versions', name, value=version(name))
    desk.row('versions', 'CUDA of torch', value=torch.version.cuda)
    if not desk.gpu:
        desk.skip('driver, cuDNN, NCCL', 'no GPU')
        return
    p = torch.cuda.get_device_properties(0)
    desk.row('versions', 'device',
             value=f'{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} '
                   f'multiprocessors, '
                   f'{p.total_memory/1e9:.1f} GB')
    desk.row('versions', 'cuDNN', value=torch.backends.cudnn.version())
    desk.row('versions', 'NCCL', value='.'.join(map(str, torch.cuda.nccl.version())))
    asked = '--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm'
    desk.row('versions', 'nvidia-smi', value=shell('nvidia-smi', asked, '--format=csv,noheader'))
    for line in shell(sys.executable, '-m', 'xformers.info').splitlines():
        desk.row('xformers.info', line.partition(':')[0].strip(), value=line.partition(':')[2].strip()[:200])

XFORMERS = '''
import ctypes, importlib.util, pathlib, sys, torch
if {load}:
    places = importlib.util.find_spec('nvidia').submodule_search_locations
    found = [f for place in places for f in pathlib.Path(place).rglob('libcudart.so.12')]
    ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
import xformers._cpp_lib as lib, xformers.ops as ops
print('_built_with_cuda', getattr(lib, '_built_with_cuda', 'unknown'))
def draw(): return torch.randn(1, 64, 2, 128, device='cuda', dtype=torch.bfloat16, requires_grad=True)
q, k, v = draw(), draw(), draw()
ops.memory_efficient_attention(q, k, v, attn_bias=ops.LowerTriangularMask()).sum().backward()
print('forward and backward ran', bool(q.grad.isfinite().all()))
'''

def xformers_beside(desk):
    "xformers by itself: as it is installed, and after CUDA 12's runtime library has been loaded"
    if not desk.gpu:
        desk.skip('xformers beside a torch for CUDA 13', 'no GPU')
        return
    for load in (False, True):
        said = shell(sys.executable, '-W', 'ignore', '-c', XFORMERS.format(load=load))
        last = next((line for line in reversed(said.splitlines()) if line.strip()), '')
        desk.row('xformers by itself', 'libcudart.so.12 loaded first' if load else 'as installed',
                 runs='forward and backward ran True' in said, cuda='_built_with_cuda True' in said,
                 said=last[:200])

def default_steps(desk):
    "The command line with a run file that sets only what it must (C3)"
    from llama_nb.config import PRESETS
    from llama_nb.run_file import dump_run
    small = PRESETS['toy'] if desk.gpu else MINI
    data = DataConfig(shards(desk), seq_len=small.max_seq_len, batch_size=4)
    config = RunConfig(str(desk.work/'default'), small, data, TrainConfig(steps=5),
                       OptimConfig(warmup_steps=2))
    path = desk.work/'default.toml'
    path.write_text(dump_run(config), encoding='utf-8')
    said = subprocess.run([sys.executable, '-m', 'llama_nb', 'train', str(path)], capture_output=True,
                          text=True, timeout=desk.left())
    for line in said.stdout.splitlines() + said.stderr.splitlines(): print(line)
    attention = [line for line in (said.stdout + said.stderr).splitlines() if 'attention' in line]
    desk.row('default settings', 'llama-nb train, 5 steps', said.returncode == 0, exit_code=said.returncode,
             said=' '.join(attention)[:300] or None)

# --- the tests that need a GPU --------------------------------------------------------------------

def tests(desk):
    "tests/gpu_cuda.py, one row a test"
    file, report = ROOT/'tests'/'gpu_cuda.py', desk.work/'tests.xml'
    if not file.exists() or not importlib.util.find_spec('pytest'):
        desk.skip('tests/gpu_cuda.py', 'the file or pytest is not here')
        return
    subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '--noconftest',
                    f'--junitxml={report}', str(file)], cwd=desk.work)
    for case in ET.parse(report).iter('testcase'): test_row(desk, case)

def test_row(desk, case:ET.Element):
    "What pytest's report says of a test"
    said = next((case.find(kind) for kind in ('failure', 'error', 'skipped') if case.find(kind) is not None),
                None)
    name, seconds = case.get('name'), float(case.get('time'))
    if said is None: desk.row('tests', name, True, seconds=seconds)
    elif said.tag == 'skipped': desk.skip(name, ' '.join((said.text or said.get('message')).split())[-200:])
    else:
        desk.row('tests', name, False, seconds=seconds, why=said.get('message')[:300])

# --- graphs ---------------------------------------------------------------------------------------

def graphs(desk):
    """Each recompute mode, backend and packing, compiled with fullgraph=True: one graph and no break (C1,
    C2). One more is right where a later batch has more documents than there was room for in the borders."""
    model = BLOCK_7B if desk.gpu else MINI
    for backend, documents in itertools.product(backends(desk, 'sdpa', 'xformers', k=model.head_dim),
                                                DOCUMENTS):
        run = trainer(desk, model, batch=1, micro=1, documents=documents, attention=backend)
        for mode in ('none', 'full', 'linear', 'budget') if desk.gpu else ('none', 'linear'):
            count_graphs(desk, run, mode, 'aot_eager', f'{backend}, {documents}, {mode}')
        if desk.gpu:
            count_graphs(desk, run, 'linear', 'inductor', f'{backend}, {documents}, linear, Inductor')
        del run
        free(desk)
    if not desk.gpu: desk.skip('Inductor', 'minutes of compiling on a CPU; graphs are counted with aot_eager')

def count_graphs(desk, run:Trainer, mode:str, compiler:str, name:str):
    from torch._dynamo.utils import counters
    if mode == 'budget': compiler = 'aot_eager_decomp_partition'    # the mode is a matter of its partitioner
    torch._dynamo.reset()
    counters.clear()
    why = None
    try:
        apply_recompute(run.model, mode)
        for layer in run.model.layers: layer.compile(backend=compiler, fullgraph=True)
        for _ in range(3): train_step(run)
        wait(desk)
    except Exception as e:
        why = first_line(e)
    found, breaks = counters['stats']['unique_graphs'], sum(counters['graph_break'].values())
    right = found == 1 or found == 2 and 'separate' in name
    desk.row('graphs', name, why is None and right and breaks == 0, graphs=found, breaks=breaks, why=why)

# --- synchronisation, and a step that is skipped --------------------------------------------------

def sync(desk):
    "Steps 3 to 5 may not wait for the device; a weight that is not a number changes nothing"
    model = ModelConfig(1024, 4, 8, vocab_size=2048, max_seq_len=1024) if desk.gpu else MINI
    if not desk.gpu: desk.skip('host synchronisation', 'no GPU: there is nothing to wait for')
    names = backends(desk, 'sdpa', 'xformers', k=model.head_dim)
    cases = [(b, d, 'off') for b in (names if desk.gpu else ['sdpa']) for d in DOCUMENTS]
    usual = [(default_attention(desk, model.head_dim, d == 'separate'), d, 'blocks') for d in DOCUMENTS]
    for backend, documents, compiled in cases + usual*desk.gpu:
        name = f'{backend}, {documents}' + ', compiled'*(compiled == 'blocks')
        run = trainer(desk, model, documents=documents, attention=backend, recompute='linear',
                      compile=compiled)
        for _ in range(2): train_step(run)
        if desk.gpu: no_synchronisation(desk, run, name)
        if compiled == 'off': skipped_step(desk, run, name)
        run.batches = None
        del run
        free(desk)

def no_synchronisation(desk, run:Trainer, name:str):
    import traceback
    why = place = None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(3): train_step(run)
    except Exception as e:
        ours = [f for f in traceback.extract_tb(e.__traceback__) if 'llama_nb' in f.filename]
        why, place = first_line(e), f'{Path(ours[-1].filename).name}:{ours[-1].lineno}' if ours else None
    finally:
        torch.cuda.set_sync_debug_mode('default')
    desk.row('no host synchronisation in steps 3 to 5', name, why is None, why=why, place=place)

def learned(run:Trainer)->list[torch.Tensor]:
    "Copies of everything that a step may change: weights and the optimiser's state"
    state = [t for s in run.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    return [t.detach().clone() for t in (*run.model.parameters(), *state)]

def same_bits(a:list, b:list)->bool:
    return all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b, strict=True))

def skipped_step(desk, run:Trainer, name:str):
    "A NaN in one weight: the step leaves every bit as it was, and the next one without it learns again"
    weight = run.model.norm.weight
    old = weight.detach().clone()
    weight.data[0] = float('nan')
    before = learned(run)
    loss = train_step(run)['loss'].item()
    kept = same_bits(before, learned(run))
    weight.data.copy_(old)
    after = train_step(run)['loss'].item()
    desk.row('a NaN in one weight', name, kept and loss != loss and after == after
             and not same_bits(before[1:2], learned(run)[1:2]), loss=str(loss), kept=kept, next_loss=after)

# --- parity ---------------------------------------------------------------------------------------

# other sums and exponentials: 1e-6 between backends on a CPU, 1e-5 between layouts; ten times that
LIMITS = {'float32': 1e-4,
          # 2^-8 a rounding, dozens on the way: .02 on a CPU, whose row says what they cost by
          # themselves
          'bfloat16': .05}

def parity(desk):
    """Every gradient against the same run in float32 with plain attention on the CPU: the norm of the
    difference over the norm"""
    torch.set_float32_matmul_precision('highest')                                        # no TF32
    modes = [('none', 'off'), ('linear', 'off')]
    if desk.gpu: modes += [('full', 'off'), ('linear', 'blocks'), ('budget', 'blocks')]
    if not desk.gpu: desk.skip('compiled modes', 'minutes of compiling on a CPU')
    names = {n: backends(desk, 'reference', 'sdpa', 'xformers', dtype=pick_dtype(n),
                         k=SMALL[desk.form].head_dim) for n in LIMITS}
    losses = {}
    for documents in DOCUMENTS:
        usual = default_attention(desk, SMALL[desk.form].head_dim, documents == 'separate')
        right = gradients(desk, None, documents=documents, attention='reference', dtype='float32',
                          where='cpu')
        near = gradients(desk, right, documents=documents, attention='reference', dtype='bfloat16',
                         where='cpu')
        compare(desk, f'the CPU itself, {documents}, bfloat16', right, near, 'bfloat16')
        losses[documents] = right['loss']
        for dtype, backend, (mode, compiled) in ((d, b, m) for d in LIMITS for b in names[d] for m in modes):
            # takes minutes
            if compiled == 'blocks' and (dtype, backend) != ('bfloat16', usual): continue
            name = f'{backend}, {documents}, {mode}' + ', compiled'*(compiled == 'blocks') + f', {dtype}'
            try:
                got = gradients(desk, right, documents=documents, attention=backend, dtype=dtype,
                                recompute=mode, compile=compiled)
            except Exception as e:
                desk.row('gradients', name, False, why=first_line(e))
                continue
            compare(desk, name, right, got, dtype)
    desk.row('the batch has borders of documents', 'loss', losses['cross'] != losses['separate'], **losses)

def gradients(desk, right:dict|None, **settings)->dict:
    "Loss and gradients of the first batch, with the weights of `right` if given"
    run = trainer(desk, SMALL[desk.form], prefetch=0, **settings)
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            if right: p.copy_(right['weights'][name])
            # outputs near 1, so that attention is not near the mean
            elif p.ndim > 1: p.mul_(50/p.shape[1]**.5)
    weights, kept = {n: p.detach().cpu().clone() for n, p in run.model.named_parameters()}, {}
    def step(): kept.update({n: p.grad.detach().float().cpu() for n, p in run.model.named_parameters()})
    run.optimizer.step = step
    loss = train_step(run)['loss'].item()
    return {'loss': loss, 'gradients': {n: g.clone() for n, g in kept.items()}, 'weights': weights}

def compare(desk, name:str, right:dict, got:dict, dtype:str):
    errors = {n: ((got['gradients'][n] - g).norm()/g.norm()).item() for n, g in right['gradients'].items()}
    errors = {n: e if math.isfinite(e) else math.inf for n, e in errors.items()}
    worst, loss, limit = max(errors, key=errors.get), abs(got['loss']/right['loss'] - 1), LIMITS[dtype]
    desk.row('gradients', name, errors[worst] < limit and loss < limit, worst=errors[worst], where=worst,
             limit=limit, loss=loss)

# --- memory ---------------------------------------------------------------------------------------

@contextmanager
def collected():
    "No garbage from before, and none collected within: old memory would lower a count of new"
    free_cycles = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if free_cycles: gc.enable()

@contextmanager
def counted_bytes(desk):
    "Yields a list that receives the bytes that stayed allocated and the most at a time, both above the start"
    got = []
    with collected(), (counted_on_gpu if desk.gpu else counted_on_cpu)(desk, got): yield got

@contextmanager
def counted_on_gpu(desk, got:list):
    "By the counters of PyTorch's allocator"
    wait(desk)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    wait(desk)
    got += [torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before]

@contextmanager
def counted_on_cpu(desk, got:list):
    "By the profiler's events of memory taken and given back"
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: yield
    now = top = 0
    for e in sorted((e for e in p.profiler.kineto_results.events() if e.name() == '[memory]'),
                    key=lambda e: e.start_ns()):
        now += e.nbytes()
        top = max(top, now)
    got += [now, top]

KEPT = {'full': lambda d, f: 2*d,                                # bytes in bfloat16: the block's input
        'linear': lambda d, f: 12*d + 4*f}  # and the outputs of linear layers, less that of w2

def memory(desk):
    """What a block keeps for a token, from the difference between 3 blocks and 1, per mode; and the peak of a
    step"""
    wide = BLOCK_7B if desk.gpu else MINI
    names = backends(desk, 'sdpa', 'xformers', k=wide.head_dim)
    cases = [(b, mode, False) for b in names for mode in RECOMPUTE if mode != 'budget']
    usual = default_attention(desk, wide.head_dim)
    cases += [(usual, mode, True) for mode in ('none', 'linear')]*desk.gpu
    for backend, mode, compiled in cases:
        name = f'{backend}, {mode}' + ', compiled'*compiled
        try:
            kept = [kept_bytes(desk, wide, n, backend, mode, compiled) for n in (1, 3)]
        except Exception as e:
            desk.row('bytes that a block keeps for a token', name, False, why=first_line(e))
            continue
        finally:
            free(desk)
        got, formula = (kept[1] - kept[0])/2, KEPT.get(mode, lambda d, f: None)(wide.dim, wide.ffn_dim)
        desk.row('bytes that a block keeps for a token', name, kept=got, formula=formula,
                 ratio=formula and got/formula)
    if not desk.gpu: desk.skip('compiled modes', 'minutes of compiling on a CPU')
    peaks(desk)

def kept_bytes(desk, wide:ModelConfig, n_layers:int, backend:str, mode:str, compiled:bool)->float:
    "Bytes a token between forward and backward, everything included"
    config = replace(wide, n_layers=n_layers)
    model = bare_model(desk, config, backend, mode, compiled)
    tokens = torch.randint(400, (2, wide.max_seq_len), device=device(desk))
    def forward():
        with torch.autocast(tokens.device.type, torch.bfloat16): return model.hidden(tokens)
    forward().sum().backward()
    with counted_bytes(desk) as got: kept = forward()
    del kept
    return got[0]/tokens.numel()

def peaks(desk):
    "The most that is allocated during a step, against the package's formula"
    run = trainer(desk, ModelConfig(4096, 2, 32, vocab_size=8192) if desk.gpu else MINI, batch=4, micro=2)
    for mode in ('none', 'linear', 'full'):
        apply_recompute(run.model, mode)
        # the optimiser's state is there
        for _ in range(2): train_step(run)
        held = sum(t.nbytes for t in learned(run))
        free(desk)
        with counted_bytes(desk) as got: train_step(run)
        peak, formula = held + got[1], formula_bytes(replace(run.config,
                                                             train=replace(run.config.train, recompute=mode)))
        desk.row('peak of a step, GB', mode, states=held/1e9, peak=peak/1e9, formula=formula/1e9,
                 ratio=peak/formula)
    run.batches = None

def formula_bytes(config:RunConfig)->float|None:
    "What the package says that a process of its own needs; None where the compiler decides"
    try:
        return sum(memory_per_rank(config).values())
    except UserError:
        return None
