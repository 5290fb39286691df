"Compiled code reaches the exchanged kernels too."
import subprocess, sys, textwrap
import pytest
from llama_nb.train.host import wide_products_problem

PROGRAM = '''
    import torch
    from torch.profiler import ProfilerActivity, profile
    from llama_nb.train.host import use_wide_products
    assert use_wide_products() == ''
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

@pytest.mark.skipif(bool(wide_products_problem()), reason=wide_products_problem())
def test_compiled_products():
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(PROGRAM)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == '3'                          # forward, and for both gradients
