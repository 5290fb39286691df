"""What only a GPU can show of single functions. `make gpu` runs this file; `make test` does not collect it.
Skipped where there is no GPU."""
from contextlib import contextmanager
import pytest, torch
from llama_nb.config import ModelConfig
from llama_nb.model.chunked_loss import chunked_loss_sum
from llama_nb.model.backends import attend, backend_problem
from llama_nb.model.transformer import LLaMA
from llama_nb.settings import OptimConfig
from llama_nb.train.loss import loss_sum
from llama_nb.train.metrics import StepInFlight
from llama_nb.train.optim import clip_grad_norm, make_optimizer

if not torch.cuda.is_available(): pytest.skip('no GPU', allow_module_level=True)
CUDA = torch.device('cuda')

def close(got, right, limit): assert (got.float() - right.float()).norm() < limit*right.float().norm()

@contextmanager
def never_waiting():
    "Whatever makes the host wait for the device raises"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')

@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('backend', ['sdpa', 'xformers'])
@pytest.mark.parametrize('k', [32, 64, 128])
def test_attention_as_the_reference(backend, k, packed):
    """Values and gradients in bfloat16 (2^-8 a rounding) for the head widths of the toy and of the large
    models"""
    if problem := backend_problem(backend, CUDA, torch.bfloat16, k, packed): pytest.skip(problem)
    g = torch.Generator().manual_seed(0)
    q, k_, v, dy = (torch.randn(2, 200, 4, k, generator=g).to(CUDA, torch.bfloat16) for _ in range(4))
    borders = torch.tensor([0, 7, 150, 200, 201, 399, 400, 400], dtype=torch.int32,
                           device=CUDA) if packed else None
    results = []
    for name, dtype in (('reference', torch.float32), (backend, torch.bfloat16)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k_, v)]
        y = attend(*leaves, name, None, borders)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))])
    for right, got in zip(*results): close(got, right, .02)

def test_the_loss_without_logits():
    "Float32: value and gradients of a vocabulary of 32,000; memory below that of the logits"
    hidden = torch.randn(2, 1024, 256, device=CUDA, requires_grad=True)
    weight = torch.randn(32000, 256, device=CUDA).mul_(.1).requires_grad_()
    targets = torch.randint(32000, (2, 1024), device=CUDA)
    right = loss_sum(hidden@weight.T, targets)[0]
    gradients = torch.autograd.grad(right, (hidden, weight))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = chunked_loss_sum(hidden, weight, targets)
    mine = torch.autograd.grad(got, (hidden, weight))
    assert torch.cuda.max_memory_allocated() - before < 4*targets.numel()*32000
    close(got, right, 1e-4)
    for a, b in zip(mine, gradients): close(a, b, 1e-4)

@pytest.mark.parametrize('compiler', [None, 'inductor'])
def test_the_loss_in_bfloat16(compiler):
    """Against float32 of the same rounded numbers: the sum is float32, the error of each logit is rounded
    once (2^-9), and the matrix's gradient grows in float32 within the multiplication: .6e-3. With each
    chunk's product rounded to bfloat16 it would be 1.8e-3 (both computed on a CPU)"""
    hidden = torch.randn(2, 1000, 256, device=CUDA).bfloat16()
    weight = torch.randn(4096, 256, device=CUDA).mul_(.1).bfloat16().float()
    targets = torch.randint(4096, (2, 1000), device=CUDA)
    targets[0, :50] = -100
    results = []
    for dtype, form in ((torch.float32, None), (torch.bfloat16, compiler)):
        leaves = [hidden.to(dtype).requires_grad_(), weight.clone().requires_grad_()]
        loss = chunked_loss_sum(*leaves, targets, compiler=form)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    right, got = results
    close(got[0], right[0], 1e-3)
    close(got[1], right[1], 6e-3)
    close(got[2], right[2], 1.2e-3)

def test_adamw_that_is_told_to_do_nothing():
    "`found_inf` on the device: weights, both moments and the count of steps stay; and nobody waits"
    layer = torch.nn.Linear(256, 256, bias=False, device=CUDA)
    optimizer, no, yes = (make_optimizer(layer, OptimConfig()), torch.zeros((), device=CUDA),
                          torch.ones((), device=CUDA))
    def step(found):
        layer.weight.grad = torch.ones_like(layer.weight)
        norm = clip_grad_norm(layer.parameters(), 1.)
        optimizer.found_inf = found + 0*norm
        optimizer.step()
        return [layer.weight.detach().clone(), *(t.clone() for t in optimizer.state[layer.weight].values())]
    with never_waiting(): first, second, third = step(no), step(yes), step(no)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not any(torch.equal(a, b) for a, b in zip(second, third))

def test_numbers_on_the_way():
    "Scalars leave the device while it works, and are those of their step"
    x, big = torch.ones((), device=CUDA), torch.randn(4096, 4096, device=CUDA)
    with never_waiting():
        for _ in range(10): big = big@big*1e-2
        travelling = StepInFlight([x, 2*x])
        x += 5
        assert travelling.read() == [1., 2.]

def test_forward_and_backward_without_waiting():
    model = LLaMA(ModelConfig(256, 2, 2, vocab_size=512, multiple_of=32, max_seq_len=128)).to(CUDA)
    tokens = torch.randint(512, (2, 128), device=CUDA)
    model(tokens).sum().backward()                              # tables are made, kernels chosen
    with never_waiting(): model(tokens).sum().backward()
