"Wrong calls of the model are refused in one line, where they would compute something else in silence."
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from llama_nb.config import ModelConfig
from llama_nb.core import UserError
from llama_nb.infer.generate import KVCache
from llama_nb.model import backends
from llama_nb.model.attention import Attention
from llama_nb.model.backends import attend, backend_problem, pick_backend
from llama_nb.model.ffn import FeedForward, gated_linear
from llama_nb.model.norm import RMSNorm
from llama_nb.model.rope import apply_rotary, frequencies, rotation_table
from llama_nb.model.transformer import LLaMA

CONFIG = ModelConfig(32, 2, 4, vocab_size=64, multiple_of=16, max_seq_len=16)
TOKENS = torch.arange(16).view(2, 8)

def drawn(*shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(0))

def refused(words, function, *args, **kwargs):
    with pytest.raises(UserError) as error: function(*args, **kwargs)
    text = str(error.value)
    assert words in text and '\n' not in text

@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return LLaMA(CONFIG).eval()

# --- attention ----------------------------------------------------------------------------------

Q = drawn(2, 8, 4, 8)
OTHERS = {'fewer values': (Q, Q, Q[:, :6], 'not (2, 8, 4, 8) and (2, 6, 4, 8)'),
          'wider values': (Q, Q, drawn(2, 8, 4, 16), 'not (2, 8, 4, 8) and (2, 8, 4, 16)'),
          'narrower keys': (Q, Q[..., :6], Q[..., :6], 'not (2, 8, 4, 6) and (2, 8, 4, 6)'),
          'another batch': (Q, Q[:1], Q[:1], 'not (1, 8, 4, 8) and (1, 8, 4, 8)'),
          'shared heads': (Q, Q[:, :, :2], Q[:, :, :2], 'k.repeat_interleave(2, 2)'),
          'too many heads': (Q[:, :, :3], Q, Q, 'as queries (2, 8, 3, 8) are'),
          'values with fewer heads': (Q, Q, Q[:, :, :2], 'not (2, 8, 4, 8) and (2, 8, 2, 8)'),
          'one head': (Q[:, :, 0], Q[:, :, 0], Q[:, :, 0], 'must be (b, t, h, k), not (2, 8, 8)')}

@pytest.mark.parametrize('backend', ['auto', 'sdpa', 'reference'])
@pytest.mark.parametrize('name', OTHERS)
def test_queries_keys_and_values_fit(backend, name):
    q, k, v, words = OTHERS[name]
    refused(words, attend, q, k, v, backend)

SEEN = torch.ones(2, 8, dtype=torch.bool)
MASKS = {'of zeros and ones': SEEN.long(), 'added to scores': SEEN.float(), 'one row': SEEN[0],
         'one sequence': SEEN[:1], 'fewer keys': SEEN[:, :7], 'of pairs': SEEN.new_ones(2, 1, 8, 8),
         'another device': SEEN.to('meta'), 'a list': SEEN.tolist()}

@pytest.mark.parametrize('backend', ['auto', 'sdpa', 'reference'])
@pytest.mark.parametrize('name', MASKS)
def test_visible_is_a_mask_of_keys(backend, name):
    refused('visible must be torch.bool (2, 8) on cpu', attend, Q, Q, Q, backend, MASKS[name])

@pytest.mark.parametrize('borders', [8, [0, 8, 16], torch.tensor(8)])
def test_borders_are_a_tensor_of_one_axis(model, borders):
    refused('borders of documents must be', attend, Q, Q, Q, borders=borders)
    refused('borders of documents must be', model, TOKENS, borders=borders)

def test_a_compiled_attention_is_one_graph():
    "Also for the third number of queries, from which on the compiler takes it for a variable"
    compiled = torch.compile(attend, backend='aot_eager', fullgraph=True)
    mask = torch.arange(8) >= torch.tensor([[0], [3]])
    for t in (8, 7, 6, 5):
        rows = Q[:, -t:], Q, Q
        assert_close(compiled(*rows, 'sdpa', mask), attend(*rows, 'reference', mask))

@pytest.mark.parametrize('sizes, words', [
    ((12, 5), 'try n_heads=6'), ((10, 0), 'from 1 to'), ((4, 8), 'try n_heads=2'), ((12, 4), 'must be even'),
    ((12, 2.), 'must be of type int'), ((12, 2, 'flash'), 'unknown attention backend'),
    ((12, 2, 'sdp'), "did you mean 'sdpa'?"), ((12, 2, None), 'unknown attention backend')])
def test_heads_and_backend_of_a_layer(sizes, words):
    refused(words, Attention, *sizes)

def test_memory_that_ran_out_does_not_outlast_the_trial(monkeypatch):
    "The error is raised, and the next question is answered by a trial"
    full, cpu = [True], torch.device('cpu')
    def crowded(*args):
        if full: raise torch.OutOfMemoryError('CUDA out of memory.')
        return backends.attend_torch(*args)
    monkeypatch.setattr(backends, 'TRIALS', {})
    monkeypatch.setitem(backends.BACKENDS, 'sdpa', crowded)
    with pytest.raises(torch.OutOfMemoryError): backend_problem('sdpa', cpu, torch.float32, 8)
    with pytest.raises(torch.OutOfMemoryError): attend(Q, Q, Q)
    full.clear()
    assert pick_backend('auto', cpu, torch.float32, 8) == 'sdpa'

# --- norm and rotation --------------------------------------------------------------------------

@pytest.mark.parametrize('x', [drawn(2, 1), drawn(2, 3), drawn(2, 5), drawn(4, 1), torch.tensor(1.),
                               torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.complex64)])
def test_a_norm_reads_numbers_of_its_width(x):
    refused('(..., 4)', RMSNorm(4), x)

def test_a_norm_of_width_one():
    refused('(..., 1)', RMSNorm(1), drawn(2, 4))
    assert RMSNorm(1)(drawn(2, 1)).shape == (2, 1)

@pytest.mark.parametrize('eps', [-1, -1e-9, float('nan'), float('inf')])
def test_eps_is_a_small_number(eps): refused('eps', RMSNorm, 4, eps)

TABLE = rotation_table(8, 8)
ROTATIONS = {'real': TABLE.real, 'one row': TABLE[:1], 'too many rows': rotation_table(8, 9),
             'of another width': rotation_table(6, 8), 'of one pair': TABLE[:, :1],
             'for another batch': TABLE.expand(3, 8, 4), 'with heads': TABLE[:, None],
             'one position': TABLE[0], 'as pairs': torch.view_as_real(TABLE)}

@pytest.mark.parametrize('name', ROTATIONS)
def test_a_rotation_has_a_row_for_each_position(name):
    refused('rotations must be complex (8, 4) or (2, 8, 4)', apply_rotary, Q, ROTATIONS[name])

@pytest.mark.parametrize('x', [Q.long(), Q[0], Q[..., :7], Q.to(torch.complex64)])
def test_queries_and_keys_can_be_turned(x): refused('(b, t, h, k)', apply_rotary, x, TABLE)

def strided(): # values (2, 8, 4, 8) in layouts that cannot be looked at as complex numbers
    yield drawn(2, 8, 8, 4).mT
    yield drawn(2*8*4*8 + 1)[1:].view(2, 8, 4, 8)
    yield drawn(2, 8, 4, 9)[..., :8]
    yield drawn(2, 8, 4, 16)[..., ::2]
    yield drawn(2, 8, 4, 1).expand(2, 8, 4, 8)

@pytest.mark.parametrize('n', range(5))
def test_any_layout_is_turned(n):
    x = list(strided())[n]
    assert_close(apply_rotary(x, TABLE), apply_rotary(x.clone(memory_format=torch.contiguous_format), TABLE))

@pytest.mark.parametrize('k', ['64', 7, 0, -2, 8., None])
def test_a_head_width_is_an_even_number(k): refused('must be even', frequencies, k)

# --- the feed-forward calls its layers ----------------------------------------------------------

class Adapter(nn.Module):
    "A product of low rank beside a layer that is not trained"
    def __init__(self, linear):
        super().__init__()
        self.linear, self.extra = linear, nn.Parameter(torch.ones(linear.out_features, 1))

    def forward(self, x): return self.linear(x) + x[..., :1]@self.extra.T

def feed_forward():
    torch.manual_seed(0)
    return FeedForward(8, 16), drawn(2, 3, 8)

def plainly(layer, x): return layer.w2(nn.functional.silu(layer.w1(x))*layer.w3(x))

def test_another_module_in_place_of_a_layer():
    layer, x = feed_forward()
    before = layer(x)
    layer.w2 = Adapter(layer.w2)
    assert_close(layer(x), plainly(layer, x))
    assert not torch.allclose(layer(x), before)
    layer(x).sum().backward()
    assert layer.w2.extra.grad.abs().sum() > 0

def test_a_layer_with_a_bias_or_another_forward_is_called():
    layer, x = feed_forward()
    for change in (lambda w: setattr(w, 'bias', nn.Parameter(torch.ones(8))),
                   lambda w: setattr(w, 'forward', lambda x: nn.functional.linear(x, w.weight) + 1)):
        layer, x = feed_forward()
        before = layer(x)
        change(layer.w2)
        assert_close(layer(x), before + 1)
    a, c = drawn(2, 5, 16)
    biased = nn.Linear(16, 8)
    assert_close(gated_linear(a, c, biased), biased(nn.functional.silu(a)*c))

@pytest.mark.parametrize('kind', ['forward', 'forward_pre', 'full_backward', 'full_backward_pre'])
@pytest.mark.parametrize('name', ['w1', 'w2', 'w3'])
def test_hooks_of_the_layers_fire(kind, name):
    layer, x = feed_forward()
    called = []
    def hook(*args): called.append(kind)
    handle = getattr(getattr(layer, name), f'register_{kind}_hook')(hook)
    layer(x).sum().backward()
    assert called == [kind]
    handle.remove()
    layer(x).sum().backward()
    assert called == [kind]

# --- the model ----------------------------------------------------------------------------------

SAME = KVCache(16)
CACHES = {'one for two layers': [KVCache(8)], 'none': [], 'three': [KVCache(8) for _ in range(3)],
          'no list': KVCache(8), 'the same twice': [SAME, SAME]}

@pytest.mark.parametrize('name', CACHES)
def test_each_layer_has_a_cache_of_its_own(model, name):
    refused('2 KV caches, one for each layer', model, TOKENS, cache=CACHES[name])

PLACES = torch.arange(8)
POSITIONS = {'before the text': PLACES - 1, 'beyond the context': PLACES + 9, 'no integers': PLACES.float(),
             'bool': PLACES > 3, 'too few': PLACES[:7], 'for another batch': PLACES.expand(3, 8),
             'one for all': PLACES[:1], 'a list': PLACES.tolist()}

@pytest.mark.parametrize('name', POSITIONS)
def test_positions_of_the_tokens(model, name):
    refused('positions must', model, TOKENS, POSITIONS[name])

def test_positions_that_fit(model):
    places = PLACES + 8
    with torch.no_grad():
        assert_close(model(TOKENS, PLACES), model(TOKENS))
        assert_close(model(TOKENS, places.int()), model(TOKENS, places.expand(2, 8)))
