"""The exchanged kernels: compiled code reaches them, wrong calls stay what they were, and nobody exchanges
them unasked."""
import json, subprocess, sys, textwrap
import pytest
from llama_nb.train import host
from llama_nb.train.host import CLEAR, clear_gain, wide_matmul_problem

needs_both = pytest.mark.skipif(bool(wide_matmul_problem()), reason=wide_matmul_problem())

def run_program(text):
    "A program in a process of its own, for an exchange lasts as long as the process"
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(text)], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout

COMPILED = '''
    import torch
    from torch.profiler import ProfilerActivity, profile
    from llama_nb.train.host import use_wide_matmul
    assert use_wide_matmul() == ''
    x, w = torch.randn(512, 256, requires_grad=True), torch.randn(256, 512, requires_grad=True)
    def f(x, w): return torch.nn.functional.silu(x@w).sum()
    def run(f):
        x.grad = w.grad = None
        f(x, w).backward()
        return x.grad, w.grad
    right, compiled = run(f), torch.compile(f)
    run(compiled)
    with profile(activities=[ProfilerActivity.CPU]) as p: got = run(compiled)
    for a, b in zip(got, right): torch.testing.assert_close(a, b)
    print({e.key: e.count for e in p.key_averages()}['mkldnn::_linear_pointwise'])
'''

@needs_both
def test_compiled_products():
    assert run_program(COMPILED).split()[-1] == '3'                # forward, and for both gradients

# Every call is made before and after the exchange. What torch answered before is right: a result (shape,
# strides, type, values) or an error, word for word.
CALLS = '''
    import warnings
    import torch
    from llama_nb.train.host import use_wide_matmul
    warnings.simplefilter('ignore')                                # an out that is resized warns
    torch.manual_seed(0)
    a, b, c = (torch.randn(256, 256) for _ in range(3))
    wide, empty = torch.randn(256, 512), torch.empty
    calls = {
        'plain': lambda: a@b,
        'transposed': lambda: a.T@b.T,
        'views': lambda: wide[:, ::2]@wide[:, 1::2],
        'out': lambda: torch.mm(a, b, out=empty(256, 256)),
        'empty out': lambda: torch.mm(a, b, out=empty(0)),
        'out of another shape': lambda: torch.mm(a, b, out=empty(3, 3)),
        'out in columns': lambda: torch.mm(a, b, out=empty(256, 256).T),
        'out with gaps': lambda: torch.mm(a, b, out=empty(256, 512)[:, ::2]),
        'out that repeats': lambda: torch.mm(a, b, out=empty(1, 256).expand(256, 256)),
        'double out': lambda: torch.mm(a, b, out=empty(256, 256, dtype=torch.float64)),
        'integer out': lambda: torch.mm(a, b, out=empty(256, 256, dtype=torch.int64)),
        'bfloat16 out': lambda: torch.mm(a, b, out=empty(256, 256, dtype=torch.bfloat16)),
        'meta out': lambda: torch.mm(a, b, out=empty(256, 256, device='meta')),
        'out and gradients': lambda: torch.mm(a.clone().requires_grad_(), b, out=empty(256, 256)),
        'shapes': lambda: torch.mm(a, torch.ones(300, 256)),
        'shapes and out': lambda: torch.mm(a, torch.ones(300, 256), out=empty(256, 256)),
        'one axis': lambda: torch.mm(a, b[0]),
        'one axis first': lambda: torch.mm(a[0], b),
        'one axis and out': lambda: torch.mm(a, b[0], out=empty(256)),
        'three axes': lambda: torch.mm(torch.ones(2, 256, 256), b),
        'types': lambda: torch.mm(a, b.double()),
        'doubles': lambda: a.double()@b.double(),
        'bfloat16': lambda: a.bfloat16()@b.bfloat16(),
        'complex': lambda: a.to(torch.complex64)@b.to(torch.complex64),
        'sparse': lambda: torch.mm(a.to_sparse(), b),
        'infinite times nothing': lambda: torch.mm(torch.full_like(a, torch.inf), torch.zeros_like(b)),
        'addmm': lambda: torch.addmm(c, a, b),
        'addmm out': lambda: torch.addmm(c, a, b, out=empty(256, 256)),
        'addmm empty out': lambda: torch.addmm(c, a, b, out=empty(0)),
        'addmm double out': lambda: torch.addmm(c, a, b, out=empty(256, 256, dtype=torch.float64)),
        'addmm one row': lambda: torch.addmm(c[0], a, b, out=empty(256, 256)),
        'addmm one number': lambda: torch.addmm(torch.tensor(1.), a, b, out=empty(256, 256)),
        'addmm wrong row': lambda: torch.addmm(torch.ones(3), a, b, out=empty(256, 256)),
        'addmm double row': lambda: torch.addmm(c.double(), a, b, out=empty(256, 256)),
        'addmm factors': lambda: torch.addmm(c, a, b, beta=.5, alpha=2., out=empty(256, 256)),
        'addmm shapes': lambda: torch.addmm(c, a, torch.ones(300, 256), out=empty(256, 256)),
        'addmm one axis': lambda: torch.addmm(c, a, b[0], out=empty(256, 256)),
        'vmap': lambda: torch.func.vmap(torch.mm, (0, None))(torch.stack([a, c]), b),
        'forward derivative': lambda: torch.func.jvp(torch.mm, (a, b), (c, c))[1],
    }
    def answer(call):
        try: x = call()
        except Exception as e: return type(e).__name__, str(e).split('Exception raised from')[0]
        return (tuple(x.shape), x.stride(), x.dtype, x.device.type), x
    before = {name: answer(call) for name, call in calls.items()}
    assert use_wide_matmul() == ''
    for name, call in calls.items():
        (kind, right), (now, got) = before[name], answer(call)
        assert now == kind, (name, kind, now, right, got)
        if isinstance(right, str): assert got == right, (name, right, got)
        elif right.device.type != 'meta':
            torch.testing.assert_close(got, right, equal_nan=True, rtol=1e-4, atol=1e-4, msg=name)
    print(sum(isinstance(x, str) for _, x in before.values()), len(calls))
'''

@needs_both
def test_every_call_is_answered_as_before():
    errors, calls = map(int, run_program(CALLS).split())
    assert errors >= 12 and calls - errors >= 15                   # the table asks for both

FAULTS = '''
    import resource, statistics, torch
    from llama_nb.config import PRESETS
    from llama_nb.model.transformer import LLaMA
    from llama_nb.train.host import keep_freed_memory
    from llama_nb.train.loss import next_token_loss
    torch.set_num_threads(1)
    toy, tokens = LLaMA(PRESETS['toy']), torch.randint(2048, (4, 257))
    def faults():
        start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        next_token_loss(toy(tokens[:, :-1]), tokens[:, 1:]).backward()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
    def per_step(): return statistics.median([faults() for _ in range(6)][1:])
    print(per_step(), keep_freed_memory(), per_step())
'''

def test_a_step_takes_no_new_memory():
    "Page faults of a step in a process of its own: thousands before, hardly any after (glibc only)"
    before, kept, after = run_program(FAULTS).split()
    if kept == 'False': pytest.skip('not glibc')
    assert float(before) > 1000 and float(after) <= float(before)/4

def test_a_trainer_leaves_its_process_alone(run_file, monkeypatch):
    from llama_nb.run_file import load_run
    from llama_nb.train.trainer import fit, start_run
    def refuse(*args): raise AssertionError('a library changed its process')
    for name in ('keep_freed_memory', 'use_wide_matmul', 'prepare_host'):
        monkeypatch.setattr(host, name, refuse)
    run = start_run(load_run(run_file(3)), report=lambda line: None)
    assert fit(run, progress=False) == 0 and not (run.out/'host.json').exists()

def test_the_command_line_decides_once(run_file, llama_nb):
    path = run_file(3)
    code, out, err = llama_nb('train', path)
    assert code == 0, err
    said = [line for line in out.splitlines() if 'float32 matmul' in line]
    written = path.with_suffix('')/'host.json'
    verdict = json.loads(written.read_text())
    assert (len(said) == 1 and ('by oneDNN' in said[0]) == verdict['wide']
            and verdict['wide'] == (verdict['gain'] > CLEAR))
    # nobody measures again
    written.write_text(json.dumps({**verdict, 'gain': 7.5, 'wide': not wide_matmul_problem()}))
    code, out, err = llama_nb('train', path)
    assert code == 0 and (bool(wide_matmul_problem()) or 'oneDNN is 7.5 times' in out), out + err

@pytest.mark.parametrize('own, wide, gain',
                         [([2., 2., 2.], [1., 1., 1.], 2.), ([1., 1., 1.], [1., 1., 1.], 1.),
                          ([8., 1., 8.], [1., 1., 1.], 1.),    # the machine was busy while PyTorch's own ran
                          ([1., 1., 1.], [.4, 1., 1.], 1.)])   # one lucky round
def test_noise_is_no_gain(own, wide, gain): assert clear_gain(own, wide) == gain

def test_a_run_keeps_its_type(run_file, monkeypatch):
    "A run begun where bfloat16 is native goes on in it elsewhere, and says so"
    import torch
    from llama_nb import core
    from llama_nb.run_file import load_run
    from llama_nb.train import run
    from llama_nb.train.trainer import fit, start_run
    path, lines = run_file(3), []
    def begin(native):
        for module in (core, run): monkeypatch.setattr(module, 'native_bfloat16', lambda device: native)
        return start_run(load_run(path, ['--train.dtype', 'auto']), report=lines.append)
    assert fit(begin(True), progress=False) == 0
    assert load_run(path.with_suffix('')/'config.toml').train.dtype == 'bfloat16'
    again = begin(False)
    assert again.dtype == torch.bfloat16 and again.config.train.dtype == 'bfloat16' and again.step == 3
    assert any('bfloat16' in line and 'slow' in line for line in lines)
