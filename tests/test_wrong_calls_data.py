"""Wrong calls of what goes from text to a loss and back to text: one line that says what to do, at once, and
nothing half written. And right calls whose answers somebody may change in place."""
from math import inf, nan
import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from llama_nb.config import ModelConfig
from llama_nb.core import UserError
from llama_nb.data.documents import Document
from llama_nb.data.loader import Loader, permute, prefetch
from llama_nb.data.mixture import Mixture, MixtureLoader, write_mixture
from llama_nb.data.shards import TokenShards, write_shards
from llama_nb.data.tokenizer import Tokenizer, train_tokenizer
from llama_nb.infer.generate import KVCache, generate, generate_batches, pick_next, row_generators
from llama_nb.model.chunked_loss import chunked_loss_sum
from llama_nb.model.transformer import LLaMA
from llama_nb.settings import OptimConfig
from llama_nb.train.loss import loss_sum, next_token_loss, position_losses, zlib_bits_per_byte
from llama_nb.train.optim import SCHEDULES, cosine_lr, wsd_lr

def complaint(call, *args, **kwargs):
    "The line of the `UserError` that a call raises"
    with pytest.raises(UserError) as raised: call(*args, **kwargs)
    assert '\n' not in str(raised.value)
    return str(raised.value)

@pytest.fixture(scope='module')
def tokenizer(tokens): return Tokenizer(tokens/'tokenizer.model')

@pytest.fixture(scope='module')
def shards(tokens): return TokenShards(tokens/'train')

@pytest.fixture(scope='module')
def sources(tokens, tmp_path_factory):
    "A mixture of both sides, and the file in which it stands"
    path = tmp_path_factory.mktemp('mixture')/'m.toml'
    return write_mixture(path, {'a': (tokens/'train', 3), 'b': (tokens/'held_out', 1)})

@pytest.fixture(scope='module', params=['one source', 'a mixture'])
def make(request, shards, sources):
    "(t, b) -> a loader"
    text, kind = (shards, Loader) if request.param == 'one source' else (sources, MixtureLoader)
    return lambda *args, **kwargs: kind(text, *args, **kwargs)

# --- the loader ---------------------------------------------------------------------------------

@pytest.mark.parametrize('ahead', [0, 1])
def test_inputs_and_targets_are_tensors_of_their_own(make, ahead):
    "As `x.view(-1)` and `y[...] = -100` want it, from the loader and through its worker"
    loader = make(16, 4)
    for inputs, targets in (loader.batch(3), next(prefetch(loader, 3, 4, ahead=ahead))):
        before = inputs.clone()
        assert inputs.is_contiguous() and targets.view(-1).dtype == torch.int64
        assert torch.equal(targets[:, :-1], inputs[:, 1:])
        targets[:, ::2] = -100
        assert torch.equal(inputs, before)

@pytest.mark.timeout(30)
@pytest.mark.parametrize('places, n', [([0, 1, 2], 0), ([9], 4), ([-1], 4), ([0, 4], 4), ([0], -1)])
def test_places_that_are_not_there_are_not_looked_for_forever(places, n):
    assert f'below {n}' in complaint(permute, np.array(places), n, 1)

@pytest.mark.timeout(30)
@pytest.mark.parametrize('t, b', [(-1, 4), (0, 4), (16, 0), (16, -2), (16.5, 4), (16, '4')])
def test_sizes_of_batches(make, t, b):
    assert 'whole number above 0' in complaint(make, t, b)

def test_numbers_of_batches_and_ranks(make):
    loader = make(16, 4)
    for i in (-1, 1.5, None, 2**31, 2**63 - 1): assert f'no batch {i}' in complaint(loader.batch, i)
    for rank, n in ((4, 4), (-1, 4), (0, 0), (0, -2), (.5, 4)):
        assert f'no rank {rank} of {n}' in complaint(loader.batch, 0, rank, n)
    assert 'cannot be shared by 3' in complaint(loader.batch, 0, 0, 3)
    assert torch.equal(loader.batch(np.int64(2))[0], loader.batch(2)[0])

def test_batches_are_read_ahead_whatever_the_default_device(make):
    loader = make(16, 4)
    with torch.device('meta'): got = list(prefetch(loader, 2, 4, bos_id=1, micro_batch_size=2))
    for i, (inputs, *_) in enumerate(got, 2): assert torch.equal(inputs, loader.batch(i)[0])

def test_a_mixture_that_is_wrong_replaces_none(tokens, tmp_path):
    file = tmp_path/'m.toml'
    good = {'a': (tokens/'train', 3), 'b': (tokens/'held_out', 1)}
    digest, before = write_mixture(file, good).digest, file.read_bytes()
    wrongs = ((tmp_path/'none', 1), 'none holds no token shards'), ((tokens/'train', 0), 'above 0')
    for wrong, words in wrongs:
        for path in (file, tmp_path/'new.toml'):
            said = complaint(write_mixture, path, {'a': wrong})
            assert words in said and f'{path}, source' in said
    assert [p.name for p in tmp_path.iterdir()] == ['m.toml'] and file.read_bytes() == before
    assert Mixture(file).digest == digest and write_mixture(file, good, block=8).folder == file

# --- generation ---------------------------------------------------------------------------------

class Constant(nn.Module):
    "A model that gives the same logits at every place"
    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.layers, self.config = [], ModelConfig(8, 1, 2, vocab_size=len(logits), max_seq_len=16)

    def forward(self, tokens, *args, only_last): return self.logits.expand(len(tokens), 1, -1)

@pytest.mark.parametrize('settings', [{}, {'temperature': 1.}, {'temperature': .7, 'top_p': .5, 'top_k': 2}])
def test_no_token_is_chosen_from_what_is_no_number(settings):
    for logits in ([nan, 1., 2.], [0., nan, nan], [0., inf, 1.], [-inf, -inf, -inf]):
        assert 'not finite' in complaint(generate, Constant(logits), [[1], [2, 0]], 3, seed=0, **settings)
    hidden = Constant([-inf, 3., -inf])                         # a token may be impossible
    assert generate(hidden, [[1]], 3, seed=0, **settings) == [[1, 1, 1]]

def test_temperatures():
    model = Constant([0., 3., 2.])
    for wrong in (nan, inf, -1.):
        assert f'temperature must be 0 (greedy) or more, and finite, not {wrong}' in complaint(
            generate, model, [[1]], 3, wrong)
    assert generate(model, [[1]], 3, temperature=1e-320) == [[1, 1, 1]]      # the smallest is nearly greedy
    picked = pick_next(torch.zeros(999, 3), 1e308, 1., row_generators([[i] for i in range(999)], 0))
    assert set(picked.tolist()) == {0, 1, 2}

def test_ids_and_counts_are_looked_at_before_the_model_runs(monkeypatch):
    "On a GPU nobody else does: `seen_range` answers there as it does here"
    monkeypatch.setattr('llama_nb.model.transformer.seen_range', lambda *args: (0, 0))
    model = LLaMA(ModelConfig(16, 2, 2, vocab_size=20, max_seq_len=32))
    for ids in ([20], [1, -1], [2**70]):
        assert 'token ids must lie in 0..19' in complaint(generate, model, [[1], ids], 3)
    assert 'max_new_tokens must be a whole number' in complaint(generate, model, [[1]], 2.5)
    assert 'top_k must be' in complaint(generate, model, [[1]], 3, temperature=1., top_k=2.5)
    for size in (0, -1):
        batches = generate_batches(model, [[1, 2]]*3, 3, batch_size=size)
        assert 'batch_size must be a whole number above 0' in complaint(list, batches)

@pytest.mark.parametrize('settings', [{}, {'temperature': 1., 'seed': 3}])
def test_ids_that_the_tokenizer_lacks_are_not_drawn(settings):
    "A padded vocabulary: the model has eight ids, its tokenizer five"
    model = Constant([0., 1., 0., 2., 0., 9., 9., 9.])
    everything = [generate(model, [[1], [2, 3]], 8, vocab_size=5, **settings),
                  *generate_batches(model, [[1], [2, 3]], 8, vocab_size=5, **settings)]
    assert all(i < 5 for rows in everything for row in rows for i in row)
    assert any(i >= 5 for row in generate(model, [[1], [2, 3]], 8, **settings) for i in row)

@pytest.mark.parametrize('settings', [{}, {'temperature': 1., 'seed': 3}])
def test_a_model_writes_whatever_the_default_device(settings):
    torch.manual_seed(0)
    model = LLaMA(ModelConfig(16, 2, 2, vocab_size=20, max_seq_len=32))
    right = generate(model, [[1, 2], [3]], 6, **settings)
    with torch.device('meta'): assert generate(model, [[1, 2], [3]], 6, **settings) == right

def test_a_cache_takes_what_fits_it():
    def rows(b=2, t=3, h=4, k=8): return torch.zeros(b, t, h, k)
    cache = KVCache(8)
    cache.append(rows(), rows())
    wrongs = rows(b=1), rows(h=2), rows(h=1), rows(k=1), rows()[0], rows()[..., None]
    for wrong in wrongs: assert 'do not fit' in complaint(cache.append, wrong, wrong)
    for first in (cache, KVCache(8)):
        assert 'do not fit' in complaint(first.append, rows(), rows(t=2))
        assert 'do not fit' in complaint(first.append, rows(), rows(b=1))
    k, _ = cache.append(rows(t=5) + 1, rows(t=5))
    assert len(cache) == 8 and k.sum(1).eq(5).all()
    for length in ('8', 0, -1, 2.5, None): assert 'whole number above 0' in complaint(KVCache, length)

# --- schedules ----------------------------------------------------------------------------------

def test_steps_of_a_schedule():
    for name, schedule in SCHEDULES.items():
        config = OptimConfig(warmup_steps=20, schedule=name)
        assert 'no step -5' in complaint(schedule, -5, config, 100)
        for step in (0, 9):
            assert 'warmup_steps 20 must be below total_steps 10' in complaint(schedule, step, config, 10)
        for total in (0, -3):
            said = complaint(schedule, 0, OptimConfig(warmup_steps=0, schedule=name), total)
            assert 'total_steps must be' in said and 'warmup' not in said
        assert schedule(19, config, 100) == config.lr > schedule(99, config, 100) > 0

def test_a_stable_phase_is_asked_for():
    assert "schedule='wsd'" in complaint(wsd_lr, 50, OptimConfig(warmup_steps=20), 100)
    late = OptimConfig(warmup_steps=60, schedule='wsd', decay_fraction=.5)
    assert 'decay_fraction 0.5' in complaint(wsd_lr, 0, late, 100)
    assert cosine_lr(99, OptimConfig(warmup_steps=20, schedule='wsd'), 100) > 0

# --- targets ------------------------------------------------------------------------------------

LOGITS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(12, (2, 5), generator=torch.Generator().manual_seed(1))

def chunked(logits, targets): return chunked_loss_sum(logits, torch.eye(12), targets)
LOSSES = {'next token': next_token_loss, 'sum': lambda *a: loss_sum(*a)[0], 'chunked': chunked,
          'position': position_losses}
each_loss = pytest.mark.parametrize('loss', LOSSES.values(), ids=LOSSES)

@each_loss
def test_all_losses_take_the_same_targets(loss):
    some = TARGETS.clone()
    some[:, 1] = -100
    for right in (TARGETS, some):
        narrow, wide = loss(LOGITS, right.int()), loss(LOGITS, right)
        assert_close(narrow, wide, rtol=0, atol=0, equal_nan=True)
    for wrong in (TARGETS.float(), TARGETS.bool(), TARGETS.to(torch.int16)):
        assert f'not {wrong.dtype}' in complaint(loss, LOGITS, wrong)
    assert 'do not fit' in complaint(loss, LOGITS, TARGETS.tolist())
    assert 'must be a tensor' in complaint(loss, LOGITS, TARGETS.numpy())
    for value, span in ((12, '12'), (-1, '-1'), (-99, '-99'), (2**40, str(2**40))):
        for targets in (TARGETS, some):
            wrong = targets.clone()
            wrong[1, 3] = value
            said = complaint(loss, LOGITS, wrong)
            assert '0..11' in said and span in said and '-100' in said

@pytest.mark.parametrize('loss', [position_losses, chunked])
def test_values_are_looked_at_where_that_costs_nothing(loss):
    "Not on a GPU, which would have to be waited for: `meta` has no values to look at"
    with torch.device('meta'): assert loss(LOGITS.to('meta'), TARGETS.to('meta')).is_meta

def test_the_loss_is_one_graph():
    "Its value is that of the eager one; -100 counts in neither"
    some = TARGETS.clone()
    some[0, :3] = -100
    whole = torch.compile(next_token_loss, fullgraph=True, backend='aot_eager')
    for targets in (TARGETS, some, some.int()):
        assert_close(whole(LOGITS, targets), next_token_loss(LOGITS, targets))
    assert 'nothing to learn' in complaint(next_token_loss, LOGITS, torch.full_like(some, -100))

# --- documents and texts ------------------------------------------------------------------------

def test_documents_are_looked_at_before_anything_stands_there(tokenizer, tmp_path):
    wrongs = {'no text': [Document('', 'x'), Document('', 'y')], 'not Document(text=': [Document('abc', 7)],
              "not 'abc'": ['abc', 'def'], "not 'a'": 'abc', 'not None': [Document('a', 'a'), None],
              'Document(text, id)': [Document(None, 'x')]}
    for words, docs in wrongs.items():
        assert words in complaint(write_shards, docs, tokenizer, tmp_path/'out'), words
    docs = [Document('abc', 'a'), Document('', 'b')]
    for wrong in (tokenizer.path, str(tokenizer.path), None):
        assert 'Tokenizer(path)' in complaint(write_shards, docs, wrong, tmp_path/'out')
    assert list(tmp_path.iterdir()) == []
    assert write_shards(docs, tokenizer, tmp_path/'out').document_of(1) == 'a'

def test_one_text_is_not_many(tmp_path):
    for one in ('abc', b'abc'):
        assert '[text]' in complaint(train_tokenizer, one, tmp_path/'x.model', 300)
        assert '[text]' in complaint(zlib_bits_per_byte, one)
    for wrong in (3, None, b'abc'):
        assert 'must be a string' in complaint(train_tokenizer, ['abc', wrong], tmp_path/'x.model', 300)
    assert list(tmp_path.iterdir()) == []

def test_what_is_no_text_and_what_are_no_ids(tokenizer, tmp_path):
    for wrong in (None, b'abc', ['abc'], 3):
        for call in (tokenizer.encode, tokenizer.ids, tokenizer.pieces):
            assert 'must be a string' in complaint(call, wrong)
    for call in (tokenizer.encode, tokenizer.pieces): assert 'surrogate' in complaint(call, 'a\ud800')
    assert 'surrogate' in complaint(train_tokenizer, ['abc', 'a\ud800'], tmp_path/'x.model', 300)
    ids = tokenizer.encode('a llama')
    for wrong in ('12', [300.9], torch.tensor([5.5]), torch.tensor([ids]), [None], ['5'], 12, None):
        assert 'whole numbers' in complaint(tokenizer.decode, wrong)
    for right in (tuple(ids), iter(ids), np.array(ids, '<u2'), torch.tensor(ids), [*torch.tensor(ids)]):
        assert tokenizer.decode(right) == 'a llama'

def test_a_tokenizer_is_not_trained_in_vain(tmp_path):
    def texts():
        raise AssertionError('nothing is read')
        yield
    for size in (-1, 0, 2.5, '300', None, 2**30):
        assert 'vocab_size must be' in complaint(train_tokenizer, texts(), tmp_path/'x', size)
    assert 'is a folder' in complaint(train_tokenizer, texts(), tmp_path, 300)
    for size in (1, 2, 100): assert 'raise it' in complaint(train_tokenizer, ['abc']*9, tmp_path/'x', size)
    assert list(tmp_path.iterdir()) == []
