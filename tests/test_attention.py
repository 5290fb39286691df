"""Attention that compiles: one graph a block, whatever the backend, the packing, the recompute mode and the
layout; and a backend that was tried.

The xformers here is the real one, with a CPU kernel for its two flash operators (xformers_cpu.py). Its graphs
are Dynamo's, which do not depend on the device: an operator is a name in them.
"""
import contextlib, platform, re, subprocess, sys
from pathlib import Path
import pytest, torch
from conftest import run_ranks, variant
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from llama_nb.config import ModelConfig
from llama_nb.core import UserError
from llama_nb.data.loader import batch_borders
from llama_nb.model import backends, kernels
from llama_nb.model.backends import attend, backend_problem, backend_report, pick_backend
from llama_nb.model.kernels import document_numbers
from llama_nb.model.transformer import LLaMA, document_positions, init_weights
from llama_nb.parallel.data import apply_data_parallel, materialize
from llama_nb.parallel.mesh import data_rank, make_mesh
from llama_nb.parallel.tensor import apply_tensor_parallel, finish_gradients
from llama_nb.run_file import load_run
from llama_nb.train.recompute import apply_recompute, recompute_selective
from llama_nb.train.trainer import accumulate, start_run, train_step

ROOT = Path(__file__).resolve().parent.parent
HAS_WHEEL = sys.platform == 'linux' and platform.machine() == 'x86_64'      # there xformers is a requirement
WHEEL = pytest.mark.skipif(not HAS_WHEEL, reason='xformers has wheels for Linux on x86 only')
CONFIG = ModelConfig(64, 2, 8, vocab_size=64, multiple_of=32, max_seq_len=64)
BF16 = torch.bfloat16

@pytest.fixture(scope='module')
def on_cpu():
    "xformers, as if a CPU were one of its devices"
    if not HAS_WHEEL: pytest.skip('xformers has wheels for Linux on x86 only')
    import xformers_cpu
    xformers_cpu.install()
    yield xformers_cpu
    xformers_cpu.remove()

@pytest.fixture
def backend(request):
    if request.param == 'xformers': request.getfixturevalue('on_cpu')
    return request.param
each_packing = pytest.mark.parametrize('packed', [False, True], ids=['cross', 'separate'])

@pytest.fixture
def fresh():
    "Dynamo has compiled nothing yet"
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()

def text(b=2, t=64, every=23): # tokens, targets (b, t); <s> is 1
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(3, 64, (2, b, t), generator=g)
    x.view(-1)[::every] = 1
    return x, y

def step(model, packed, dtype=BF16, **kind):
    "Forward and backward of two micro-batches"
    x, y = text(4, **kind)
    return accumulate(model, x, y, 2, dtype, batch_borders(x, 2, 1) if packed else None)

# values

def outcome(backend, q, k, v, borders=None):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, backend, borders=borders)
    return [x.float() for x in (out, *torch.autograd.grad(out.float().square().sum(), leaves))]

@pytest.mark.parametrize('t, s, ends', [(24, 24, None), (5, 24, None), (1, 24, None),
                                        (24, 24, [0, 7, 24, 25, 48]), (24, 24, [0, 7, 24, 25, 48, 48, 48]),
                                        (24, 24, [*range(49)])])
def test_xformers_agrees(on_cpu, t, s, ends):
    """Plain, behind a cache, documents, documents and padding, every token a document: what xformers is
    handed and hands back"""
    q, k, v = torch.randn(3, 2, s, 4, 16, generator=torch.Generator().manual_seed(0)).to(BF16)
    borders = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    exact = outcome('reference', q[:, -t:].float(), k.float(), v.float(), borders)
    for got, right in zip(outcome('xformers', q[:, -t:], k, v, borders), exact):
        # a document of one token has gradients of 0; bfloat16 rounds at 2^-9; a wrong mask was seen to be
        # off by .3
        assert (got - right).norm() < .02*right.norm() + 1e-4

def test_borders_and_tokens():
    """Numbers of documents come from the tokens or from the borders: the same ones; and a batch with more
    documents than there is room for is right too"""
    for every in (1, 2, 9, 1000):
        x, _ = text(4, every=every)
        begins = x == 1
        begins[:, 0] = True
        for part, borders in zip(begins.split(2), batch_borders(x, 2, 1)):
            by_tokens = part.flatten().long().cumsum(0) - 1
            assert torch.equal(document_numbers(borders, 2, 64).flatten(), by_tokens)
        q, k, v = torch.randn(3, 2, 64, 2, 8)
        exact = outcome('reference', q, k, v, borders)
        for got, right in zip(outcome('sdpa', q, k, v, borders), exact):
            assert_close(got, right, rtol=1e-5, atol=1e-5)

def test_the_reference_has_the_digits_of_its_type():
    """In float64 as PyTorch's explicit formula, plain and by documents; its derivative as finite differences.
    A softmax in float32 is off by 1e-7"""
    q, k, v = torch.randn(3, 2, 12, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    def explicit(*rows): # one document: (b, t, h, k) each
        heads = (x.transpose(1, 2) for x in rows)
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    assert_close(kernels.attend_reference(q, k, v), explicit(q, k, v), rtol=0, atol=1e-13)
    borders = torch.tensor([0, 5, 12, 24], dtype=torch.int32)
    packed = kernels.attend_reference(q, k, v, borders=borders)
    for a, b in ((0, 5), (5, 12)):
        assert_close(packed[:1, a:b], explicit(q[:1, a:b], k[:1, a:b], v[:1, a:b]), rtol=0, atol=1e-13)
    leaves = [x[:1, :5, :1, :2].clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(kernels.attend_reference, leaves)

# what is kept, what is repeated

@each_packing
@pytest.mark.parametrize('mode, passes', [('none', 1), ('linear', 1), ('selective', 1), ('full', 2)])
def test_attention_is_not_repeated(on_cpu, packed, mode, passes):
    """xformers' kernel counts for itself: once a layer and micro-batch, twice where everything is recomputed;
    gradients are those of the reference"""
    found = {}
    for name in ('xformers', 'reference'):
        torch.manual_seed(0)
        model = LLaMA(CONFIG)
        init_weights(model, .2)
        for layer in model.layers: layer.attention.backend = name
        if mode == 'selective': # as `linear` where ranks share products
            for layer in model.layers: recompute_selective(layer)
        else:
            apply_recompute(model, mode)
        # its trial is not counted
        if name == 'xformers': pick_backend(name, torch.device('cpu'), BF16, 8, packed)
        on_cpu.CALLS.clear()
        step(model, packed)
        found[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
        if name == 'xformers': assert on_cpu.CALLS == {'forward': 2*2*passes, 'backward': 2*2}
    # bfloat16, two layers
    assert (found['xformers'] - found['reference']).norm() < .03*found['reference'].norm()

# graphs

@contextlib.contextmanager
def compiled_by(name, seen):
    "`module.compile()` uses this backend; what it was told otherwise goes to `seen`"
    compile = torch.nn.Module.compile
    def patched(self, *args, backend=name, **options):
        seen.append(options)
        return compile(self, *args, backend=backend, **options)
    torch.nn.Module.compile = patched
    try:
        yield
    finally:
        torch.nn.Module.compile = compile

def compiled_model(backend, mode, degrees=(1, 1, 1), sequence=True, compiler='aot_eager'):
    "As `build_model` does it, on a fake mesh if there is more than one rank"
    mesh = make_mesh(degrees, 'cpu') if degrees != (1, 1, 1) else None
    with torch.device('meta'): model = LLaMA(CONFIG)
    for layer in model.layers: layer.attention.backend = backend
    if mesh is not None: apply_tensor_parallel(model, mesh['tensor'], sequence)
    apply_recompute(model, mode)
    for layer in model.layers: layer.compile(backend=compiler, fullgraph=True)
    if mesh is not None: apply_data_parallel(model, mesh, BF16)
    materialize(model, 0, torch.device('cpu'))
    return model

def check_graphs(model, packed):
    """One graph for all blocks; another number of documents is the same graph, another room for them one
    more, and then no more"""
    step(model, packed)
    step(model, packed, every=37)
    assert counters['stats']['unique_graphs'] == 1 and not counters['graph_break']
    for every in (9, 5, 2):
        if packed: step(model, packed, every=every)
    assert counters['stats']['unique_graphs'] == 1 + packed and not counters['graph_break']

# each mode with both backends, cross and separate
GRAPHS = {('sdpa', False): ['none', 'budget'], ('sdpa', True): ['full', 'linear'],
          ('xformers', False): ['full'], ('xformers', True): ['none', 'linear', 'budget']}
MODES = 'none', 'full', 'linear', 'budget'
EACH = [(backend, packed, mode) for backend in ('sdpa', 'xformers') for packed in (False, True)
        for mode in MODES]

def graph_case(backend, packed, mode):
    marks = [WHEEL] if backend == 'xformers' else []
    if mode not in GRAPHS[backend, packed]: marks.append(pytest.mark.variant)
    name = f'{mode}-{"separate" if packed else "cross"}-{backend}'
    return pytest.param(backend, packed, mode, marks=marks, id=name)

@pytest.mark.parametrize('backend, packed, mode', [graph_case(*c) for c in EACH], indirect=['backend'])
def test_one_graph(backend, packed, mode, fresh): check_graphs(compiled_model(backend, mode), packed)

@pytest.fixture
def fake_ranks():
    from torch.testing._internal.distributed.fake_pg import FakeStore
    started = []
    def start(n):
        dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=n)
        started.append(n)
    yield start
    if started: dist.destroy_process_group()

LAYOUTS = {'TP': ((1, 1, 2), False), 'TP+SP': ((1, 1, 2), True), 'FSDP': ((1, 2, 1), True),
           'HSDP': ((2, 2, 1), True), 'HSDP x TP+SP': ((2, 2, 2), True)}
# the others: make torture
QUICK = [('FSDP', 'none'), ('TP+SP', 'linear'), ('TP+SP', 'budget'), ('HSDP', 'linear'),
         ('HSDP x TP+SP', 'full')]
WHERE = [(layout, mode) if (layout, mode) in QUICK else variant(layout, mode)
         for layout in LAYOUTS for mode in MODES]
# each mode has others above
WAYS = [pytest.param('sdpa', False, id='cross-sdpa'),
        pytest.param('xformers', True, id='separate-xformers', marks=WHEEL),
        pytest.param('sdpa', True, id='separate-sdpa', marks=pytest.mark.variant),
        pytest.param('xformers', False, id='cross-xformers', marks=[WHEEL, pytest.mark.variant])]

@pytest.mark.parametrize('backend, packed', WAYS, indirect=['backend'])
@pytest.mark.parametrize('layout, mode', WHERE)
def test_one_graph_in_every_layout(backend, packed, layout, mode, fresh, fake_ranks):
    degrees, sequence = LAYOUTS[layout]
    fake_ranks(degrees[0]*degrees[1]*degrees[2])
    model = compiled_model(backend, mode, degrees, sequence)
    step(model, packed)
    step(model, packed, every=37)
    assert counters['stats']['unique_graphs'] == 1 and not counters['graph_break']

@pytest.mark.parametrize('documents', ['cross', 'separate'])
def test_a_compiled_run_is_compiled(run_file, documents, fresh):
    "Through the trainer: every block is one graph, and a block that breaks in two would be an error"
    told, how = [], ('--train.recompute', 'linear', '--train.compile', 'blocks')
    with compiled_by('aot_eager', told):
        config = load_run(run_file(10), ('--data.documents', documents, *how))
        run = start_run(config, report=lambda line: None)
        for _ in range(2): train_step(run)
    run.batches = None
    seen = dict(counters['stats']), dict(counters['graph_break'])
    assert counters['stats']['unique_graphs'] >= 1 and not counters['graph_break'], seen
    assert told == [{'fullgraph': True}]*2

# real ranks

def gradients_on_ranks(layout, mode, backend, dtype):
    """Largest relative error of the gradients of compiled blocks with documents on these ranks, against one
    process, uncompiled, with the reference"""
    if backend == 'xformers':
        import xformers_cpu
        xformers_cpu.install()
    x, y = text(4)
    dtype = getattr(torch, dtype)
    with torch.device('meta'): plain = LLaMA(CONFIG)
    for layer in plain.layers: layer.attention.backend = 'reference'
    materialize(plain, 0, torch.device('cpu'))
    accumulate(plain, x, y, 2, dtype, batch_borders(x, 2, 1))
    right = {n: p.grad for n, p in plain.named_parameters()}
    model = compiled_model(backend, mode, *LAYOUTS[layout])
    rank, size = data_rank(make_mesh(LAYOUTS[layout][0], 'cpu'))
    x, y = x.chunk(size)[rank], y.chunk(size)[rank]
    accumulate(model, x, y, 1, dtype, batch_borders(x, 1, 1), count=torch.tensor(4*64))
    finish_gradients(model)
    assert counters['stats']['unique_graphs'] >= 1 and not counters['graph_break']
    whole = lambda g: g.full_tensor() if hasattr(g, 'full_tensor') else g
    errors = ((whole(p.grad) - right[n]).norm()/right[n].norm() for n, p in model.named_parameters())
    return max(error.item() for error in errors)

@pytest.mark.parametrize('layout, mode, backend',
                         [pytest.param('TP+SP', 'linear', 'xformers', marks=WHEEL), ('TP+SP', 'full', 'sdpa'),
                          pytest.param('FSDP', 'linear', 'xformers', marks=WHEEL)])
def test_documents_on_ranks(layout, mode, backend):
    options = {'layout': layout, 'mode': mode, 'backend': backend, 'dtype': 'bfloat16'}
    for error in run_ranks('test_attention:gradients_on_ranks', 2, options, timeout=400):
        # bfloat16 through two layers; documents that see each other: above .3
        assert error < .05

# no host, no layer

def test_layers_ask_nothing_of_the_host():
    """On the device meta tensors have no numbers: whoever reads one raises. Positions and attention of
    documents go forward and backward there"""
    borders = torch.empty(9, dtype=torch.int32, device='meta')
    with pytest.raises((RuntimeError, NotImplementedError)): borders.tolist()
    assert document_positions(borders, 2, 64).shape == (2, 64)
    for backend in ('sdpa', 'reference'):
        leaves = [torch.empty(2, 64, 4, 16, dtype=BF16, device='meta', requires_grad=True) for _ in range(3)]
        out = attend(*leaves, backend, borders=borders)
        out.sum().backward()
        assert out.shape == (2, 64, 4, 16) and all(x.grad.shape == x.shape for x in leaves)

# which backend

def test_auto_takes_what_it_has_seen_work(on_cpu):
    cpu = torch.device('cpu')
    assert pick_backend('auto', cpu, BF16, 16) == 'xformers'
    assert pick_backend('auto', cpu, BF16, 16, True, masked=True) == 'sdpa'
    agreed = 'a trial on cpu in bfloat16 agreed with the reference'
    line = backend_report('auto', cpu, BF16, 16, True)
    assert re.fullmatch(rf'attention: xformers \(xformers [\d.]+; {agreed}\)', line)
    # no operator of xformers for it
    assert pick_backend('auto', cpu, torch.float32, 16) == pick_backend('auto', cpu, BF16, 12) == 'sdpa'
    line = backend_report('auto', cpu, BF16, 12)
    assert line.startswith('attention: sdpa (xformers') and 'query.shape[-1] % 8' in line and '\n' not in line
    advice = "'xformers' cannot run: .*float32.*; choose from auto, reference, sdpa$"
    with pytest.raises(UserError, match=advice): pick_backend('xformers', cpu, torch.float32, 16)

@pytest.mark.parametrize('how', ['wrong', 'raises'])
def test_a_backend_that_fails_its_trial(on_cpu, monkeypatch, how):
    "One that imports and then cannot run, and one that runs and is wrong in documents alone"
    right = kernels.attend_xformers
    def broken(q, k, v, visible, borders):
        if how == 'raises':
            raise RuntimeError('CUDA error: no kernel image is available\nfor execution on the device')
        # the first border is lost
        if borders is not None: borders = torch.cat((borders[:1], borders[2:]))
        return right(q, k, v, visible, borders)
    monkeypatch.setitem(backends.BACKENDS, 'xformers', broken)
    monkeypatch.setattr(backends, 'TRIALS', {})
    cpu = torch.device('cpu')
    assert pick_backend('auto', cpu, BF16, 16, True) == 'sdpa'
    problem = backend_problem('xformers', cpu, BF16, 16, True)
    said = {'wrong': 'wrong numbers (documents: relative error 0.',
            'raises': 'no kernel image is available for execution'}
    assert said[how] in problem
    assert pick_backend('auto', cpu, BF16, 16, False) == ('xformers' if how == 'wrong' else 'sdpa')
    with pytest.raises(UserError, match='choose from auto, reference, sdpa'):
        pick_backend('xformers', cpu, BF16, 16, True)

def test_nobody_sees_the_trial(monkeypatch):
    "Neither modes, nor autocast, nor inference mode, nor the random numbers of the caller"
    from torch._subclasses import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode
    monkeypatch.setattr(backends, 'TRIALS', {})
    cpu, state = torch.device('cpu'), torch.get_rng_state()
    with (FakeTensorMode(), FlopCounterMode(display=False) as count, torch.inference_mode(),
          torch.autocast('cpu', BF16), torch.device('meta')):
        assert backend_problem('sdpa', cpu, torch.float32, 16, True) == ''
    assert count.get_total_flops() == 0 and torch.equal(state, torch.get_rng_state())
    assert len(backends.TRIALS) == 1

def test_runtime_of_cuda_12(monkeypatch, tmp_path):
    "Beside a torch for CUDA 13 it is loaded if it is installed; beside others it is not looked for"
    from types import SimpleNamespace
    library, loaded = tmp_path/'cuda_runtime/lib/libcudart.so.12', []
    library.parent.mkdir(parents=True)
    library.touch()
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path/'other'), str(tmp_path)])
    monkeypatch.setattr(backends, 'find_spec', lambda name: found)
    monkeypatch.setattr(backends.ctypes, 'CDLL', loaded.append)
    for cuda, wanted in ((None, []), ('12.8', []), ('13.0', [str(library)])):
        monkeypatch.setattr(torch.version, 'cuda', cuda)
        backends.load_cuda_12_runtime()
        assert loaded == wanted

def test_xformers_is_a_requirement_on_linux(tmp_path):
    command = [sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=200)
    sections = re.split(r'\n(?=\[)', (tmp_path/'llama_nb.egg-info/requires.txt').read_text())
    (linux,) = [s for s in sections if 'xformers' in s]
    for words in ('sys_platform == "linux"', 'platform_machine == "x86_64"', 'nvidia-cuda-runtime-cu12'):
        assert words in linux
    assert 'extra' not in linux
