"""The network under PyTorch's tools: tensors without numbers, `torch.func`, hooks and replaced layers, other
devices and types. The judge is autograd on the plain formulas."""
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from llama_nb.config import ModelConfig
from llama_nb.core import synchronizer
from llama_nb.infer.generate import generate
from llama_nb.model.ffn import FeedForward
from llama_nb.model.kernels import attend_reference, attend_sdpa
from llama_nb.model.norm import RMSNorm
from llama_nb.model.rope import rotation_table
from llama_nb.model.transformer import LLaMA
from llama_nb.scale.flops import measure_matmul_peak
from llama_nb.train.recompute import apply_recompute

CONFIG = ModelConfig(32, 2, 4, vocab_size=64, multiple_of=16, max_seq_len=16)
TOKENS = torch.arange(18).view(2, 9)
MODES = 'none', 'linear', 'full'

def fresh(mode='none'):
    torch.manual_seed(0)
    model = LLaMA(CONFIG, 'sdpa')
    apply_recompute(model, mode)
    return model

def loss_of(model, tokens=TOKENS):
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

def gradients(model):
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters()}

# --- no numbers ---------------------------------------------------------------------------------

@pytest.mark.parametrize('mode', MODES)
def test_forward_and_backward_on_the_meta_device(mode):
    model = fresh(mode).to('meta')
    loss = loss_of(model, TOKENS.to('meta'))
    loss.backward()
    assert loss.is_meta and all(p.grad.shape == p.shape for p in model.parameters())

def test_fake_tensors_leave_nothing_behind():
    "The table of rotations made under them is not the one of a call with numbers"
    model = fresh()
    right = fresh()(TOKENS)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert model(fake.from_tensor(TOKENS)).shape == right.shape
    assert torch.equal(model(TOKENS), right)

# --- torch.func ---------------------------------------------------------------------------------

def test_the_gradient_of_each_sequence():
    model = fresh()
    weights = dict(model.named_parameters())
    def loss(weights, row):
        logits = torch.func.functional_call(model, weights, row[None, :-1])
        return F.cross_entropy(logits.flatten(0, 1), row[1:])
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, TOKENS)
    for i, row in enumerate(TOKENS):
        model.zero_grad()
        loss_of(model, row[None]).backward()
        for name, p in model.named_parameters(): assert_close(each[name][i], p.grad, msg=name)

# --- hooks and other layers ---------------------------------------------------------------------

def doubled(module, inputs, output): return 2*output

class Doubling(nn.Linear):
    def forward(self, x): return 2*super().forward(x)

def hook_w1(layer): layer.feed_forward.w1.register_forward_hook(doubled)
def hook_wo(layer): layer.attention.wo.register_forward_hook(doubled)
def hook_w2(layer): layer.feed_forward.w2.register_forward_hook(doubled)
def hook_norm(layer): layer.ffn_norm.register_forward_hook(doubled)
def hook_attention(layer): layer.attention.register_forward_hook(doubled)
def pre_hook(layer): layer.attention.wq.register_forward_pre_hook(lambda module, inputs: (2*inputs[0],))
def other_forward(layer): layer.attention.wv.forward = lambda x: 2*F.linear(x, layer.attention.wv.weight)

def other_class(layer):
    wq = Doubling(32, 32, bias=False)
    wq.load_state_dict(layer.attention.wq.state_dict())
    layer.attention.wq = wq

def wrapped(layer): layer.attention.wo = nn.Sequential(layer.attention.wo, nn.Dropout(0.))

CHANGES = (hook_w1, hook_wo, hook_w2, hook_norm, hook_attention, pre_hook, other_forward, other_class,
           wrapped)

@pytest.mark.parametrize('mode', ['linear', 'full'])
@pytest.mark.parametrize('change', CHANGES)
def test_a_block_that_was_changed(change, mode):
    "After the mode was applied: the gradients are those of what is computed now"
    right, model = fresh(), fresh(mode)
    for layer in (*right.layers, *model.layers): change(layer)
    theirs = gradients(right)
    for name, g in gradients(model).items(): assert_close(g, theirs[name], msg=name)

def test_backward_hooks_are_called():
    called, model = [], fresh('linear')
    model.layers[0].feed_forward.w1.register_full_backward_hook(lambda *args: called.append(1))
    gradients(model)
    assert called

# --- shapes and types ---------------------------------------------------------------------------

@pytest.mark.parametrize('module', [RMSNorm(24), FeedForward(24, 64)])
def test_one_vector(module):
    x = torch.randn(24, requires_grad=True)
    one, = torch.autograd.grad(module(x).square().sum(), x)
    many, = torch.autograd.grad(module(x[None]).square().sum(), x)
    assert_close(one, many)

def operations_of(backward, *args):
    with profile(activities=[ProfilerActivity.CPU]) as seen: results = backward(*args)
    return results, sum(e.count for e in seen.key_averages() if e.key == 'aten::mul')

def test_a_norm_whose_weight_is_frozen():
    "Its gradient, as large as the input before it is summed, is not made"
    x, norm = torch.randn(3, 8, requires_grad=True), RMSNorm(8)
    (right, _), all_of_them = operations_of(torch.autograd.grad, norm(x).sum(), (x, norm.weight))
    norm.weight.requires_grad_(False)
    (got,), fewer = operations_of(torch.autograd.grad, norm(x).sum(), (x,))
    assert torch.equal(got, right) and fewer == all_of_them - 1

def test_double_stays_double_under_autocast():
    model = fresh().double()
    with torch.autocast('cpu', torch.bfloat16): assert model(TOKENS).dtype == torch.float64

def test_a_gate_in_float32_under_autocast():
    "As a layer in the place of w1 may give it"
    a, c = torch.randn(2, 5, 64).unbind()
    results = []
    for lean in (True, False):
        torch.manual_seed(0)
        network = FeedForward(24, 64)
        network.lean = lean
        network.w1, network.w3 = nn.Identity(), nn.Identity()
        x = a.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16): out = network(x)
        results.append(torch.autograd.grad(out.float().square().sum(), (x, network.w2.weight)))
    for mine, theirs in zip(*results): assert_close(mine, theirs, rtol=2**-6, atol=2**-6) # 8 bits

# the same numbers at other places of memory
STRIDES = {'columns first': lambda x: x.mT.contiguous().mT,
           'every second': lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2]}

@pytest.mark.parametrize('which', [(0, 1, 2), (0,), (2,)])
@pytest.mark.parametrize('strides', STRIDES)
def test_documents_wherever_their_numbers_lie(strides, which):
    borders = torch.tensor([0, 5, 12, 20, 24], dtype=torch.int32)
    rows = [torch.randn(2, 12, 4, 8) for _ in range(3)]
    laid = [STRIDES[strides](x) if i in which else x for i, x in enumerate(rows)]
    assert_close(attend_sdpa(*laid, borders=borders), attend_reference(*rows, borders=borders))

def test_no_sequence_of_documents():
    borders = torch.tensor([0, 0], dtype=torch.int32)
    assert fresh()(TOKENS[:0], borders=borders).shape == (0, 9, 64)

# --- devices ------------------------------------------------------------------------------------

def test_rotations_ask_no_default_device():
    right = rotation_table(8, 4)
    with torch.device('meta'): assert torch.equal(rotation_table(8, 4, device='cpu'), right)

def test_rotations_are_made_once_however_the_device_is_called():
    model = fresh()
    table = model.rotations('cpu')
    assert model.rotations('cpu') is table and model.rotations(torch.device('cpu')) is table

def test_who_measures_waits_for_the_device_that_works(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device=None: waited.append(device))
    synchronizer('cuda:1')()
    synchronizer('cpu')()
    assert waited == [torch.device('cuda:1')]

def test_the_peak_of_the_second_gpu_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device=None: waited.append(device))
    monkeypatch.setattr('llama_nb.scale.flops.three_matmuls', lambda *args: lambda: None)
    measure_matmul_peak([(2, 3, 4)], torch.float32, 'cuda:1', 1)
    assert set(waited) == {torch.device('cuda:1')}

# --- generation ---------------------------------------------------------------------------------

def test_only_the_last_position_becomes_logits():
    "Of prompts of many tokens one position is asked for, and the others have 4v bytes each"
    seen, model = [], fresh().eval()
    model.output.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    generate(model, [[1, 2, 3, 4], [5, 6]], 2)
    assert seen == [(2, 1, 64), (2, 1, 64)]
    assert_close(model(TOKENS, only_last=True), model(TOKENS)[:, -1:])
