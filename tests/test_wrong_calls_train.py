"What a run never does and an importer may: copies of a model, wrapped models, odd checkpoints."
import copy, pickle
import numpy as np
import pytest, torch, torch.distributed as dist
from conftest import run_ranks
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from llama_nb.config import ModelConfig
from llama_nb.core import UserError
from llama_nb.infer.generate import generate
from llama_nb.model.transformer import LLaMA, init_weights
from llama_nb.parallel.data import materialize
from llama_nb.parallel.tensor import apply_tensor_parallel, finish_gradients
from llama_nb.train.checkpoint import Saver, load_into, save_checkpoint
from llama_nb.train.loss import loss_sum
from llama_nb.train.recompute import RECOMPUTE, apply_recompute, recompute_by_hand, recompute_selective
from llama_nb.train.stored import CheckpointError, list_checkpoints, load_checkpoint
from llama_nb.train.trainer import accumulate, forward_loss

CONFIG = ModelConfig(32, 2, 4, vocab_size=64, multiple_of=32, max_seq_len=32)
TOKENS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))

def fresh():
    torch.manual_seed(0)
    model = LLaMA(CONFIG)
    init_weights(model, .2)
    return model

@torch.no_grad()
def spoil(model):
    "Other numbers in all blocks"
    for p in model.layers.parameters(): p.zero_()

# --- copies of a model ---------------------------------------------------------------------------

WAYS = {**{mode: lambda m, mode=mode: apply_recompute(m, mode) for mode in RECOMPUTE},
        'selective': lambda m: [recompute_selective(layer) for layer in m.layers],
        'by hand': lambda m: [recompute_by_hand(layer) for layer in m.layers]}
COPIES = {'deepcopy': copy.deepcopy, 'pickle': lambda m: pickle.loads(pickle.dumps(m)),
          'average': lambda m: AveragedModel(m).module}

def compiled(model):
    for layer in model.layers: layer.compile(backend='aot_eager', fullgraph=True)

@pytest.mark.parametrize('how', COPIES)
@pytest.mark.parametrize('way', WAYS)
def test_a_copy_computes_with_its_own_weights(way, how):
    "Forward and backward; the original, compiled or not, is left alone"
    model = fresh()
    WAYS[way](model)
    if how == 'deepcopy': compiled(model)
    right = model(TOKENS).detach()
    other = COPIES[how](model)
    assert list(other.state_dict()) == list(model.state_dict())
    spoil(model)
    out = other(TOKENS)
    torch.testing.assert_close(out, right)
    out.sum().backward()
    assert all(p.grad is not None for p in other.parameters())
    assert all(p.grad is None for p in model.parameters())

@pytest.mark.parametrize('mode', ['full', 'linear', 'budget'])
def test_a_copy_compiles_its_own_forward(mode):
    model = fresh()
    apply_recompute(model, mode)
    right, other = model(TOKENS).detach(), copy.deepcopy(model)
    compiled(other)
    spoil(model)
    torch.testing.assert_close(other(TOKENS), right)
    assert other.layers[0]._compiled_call_impl and not model.layers[0]._compiled_call_impl

@pytest.mark.parametrize('way', WAYS)
def test_a_mask_of_padding_in_training(way):
    "Gradients are those of no recompute"
    found, visible = [], torch.arange(16) >= torch.tensor([[5], [0]])
    for change in (WAYS['none'], WAYS[way]):
        model = fresh()
        change(model)
        loss_sum(model(TOKENS, visible=visible), TOKENS)[0].backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    right, got = found
    for n, g in got.items(): assert (g - right[n]).abs().max() < 1e-5*right[n].abs().max(), n

def gathered(model):
    "The gradients, whole on every rank"
    finish_gradients(model)
    return {n: p.grad.full_tensor() if hasattr(p.grad, 'full_tensor') else p.grad
            for n, p in model.named_parameters()}

def worst(model, right):
    return max(((g - right[n]).abs().max()/right[n].abs().max()).item() for n, g in gathered(model).items())

def share(sequence, mode):
    from torch.distributed.device_mesh import init_device_mesh
    model = fresh()
    apply_tensor_parallel(model, init_device_mesh('cpu', (dist.get_world_size(),)), sequence)
    apply_recompute(model, mode)
    return model

def copies(sequence):
    "For copies of a model whose products ranks share: error of the gradients, how many the original got"
    plain, found = fresh(), {}
    loss_sum(plain(TOKENS), TOKENS)[0].backward()
    cases = [(mode, False) for mode in ('none', 'full', 'linear')] + [('full', True), ('linear', True)]
    for mode, with_compiler in cases:
        model = share(sequence, mode)
        for layer in model.layers if with_compiler else (): layer.compile(backend='aot_eager')
        other = copy.deepcopy(model)
        spoil(model)
        forward_loss(other, TOKENS, TOKENS).backward()
        error = worst(other, gathered(plain))
        found[f'{mode} {with_compiler}'] = error, sum(p.grad is not None for p in model.parameters())
    return found

@pytest.mark.parametrize('sequence', [True, False])
def test_a_copy_whose_products_are_shared(sequence):
    for found in run_ranks('test_wrong_calls_train:copies', 2, {'sequence': sequence}, timeout=240):
        for way, (error, lost) in found.items(): assert error < 1e-5 and not lost, (way, error, lost)

# --- a model whose products are shared, called as any other ----------------------------------------

PROMPT = [[1, 2, 3, 4]]

def called(sequence):
    "Differences from one process, in logits and gradients; what was generated, or said"
    plain, model = fresh(), share(sequence, 'none')
    right, logits = plain(TOKENS), model(TOKENS)
    for x in (right, logits): loss_sum(x, TOKENS)[0].backward()
    found = {'shape': list(logits.shape), 'logits': (logits - right).abs().max().item(),
             'gradients': worst(model, gathered(plain))}
    asked = {'generated': lambda: generate(model, PROMPT, 5), 'odd': lambda: model(TOKENS[:, :5]).shape}
    for name, ask in asked.items():
        try:
            found[name] = ask()
        except UserError as e:
            found[name] = str(e)
    return found

@pytest.mark.parametrize('sequence', [True, False])
def test_a_shared_model_gives_all_logits(sequence):
    "And where positions are shared, too, a text that cannot be divided is an error of one line"
    for found in run_ranks('test_wrong_calls_train:called', 2, {'sequence': sequence}, timeout=240):
        assert found['shape'] == [2, 16, 64] and found['logits'] < 1e-4 and found['gradients'] < 1e-5, found
        if not sequence: assert found['generated'] == generate(fresh(), PROMPT, 5)
        for name in ('generated', 'odd') if sequence else ():
            assert 'sequence=False' in found[name] and '\n' not in found[name], found

def shared_loss(targets):
    model = share(True, 'none')
    try:
        return forward_loss(model, TOKENS, torch.tensor(targets)).item()
    except UserError as e:
        return str(e)

def test_a_target_that_no_tensor_rank_has():
    "Each rank has half of the vocabulary, and would leave it to the other"
    for text in run_ranks('test_wrong_calls_train:shared_loss', 2, {'targets': [[64]*16]*2}):
        assert text == 'targets must lie in 0..63, or be -100 where they do not count, not 64..64'

# --- wrapped models ------------------------------------------------------------------------------

class Wrapped(nn.Module):
    "Holds a model as DistributedDataParallel does"
    def __init__(self, module):
        super().__init__()
        self.module = module
    def forward(self, *inputs): return self.module(*inputs)

@pytest.mark.parametrize('wrap', [torch.compile, Wrapped, AveragedModel])
def test_a_wrapped_model_is_refused(wrap):
    "Its wrapper would be skipped in silence"
    for train in (forward_loss, lambda *inputs: accumulate(*inputs, 1)):
        with pytest.raises(UserError, match='compile_model') as e: train(wrap(fresh()), TOKENS, TOKENS)
        assert '\n' not in str(e.value)

def test_a_compiled_hidden_is_taken():
    model = fresh()
    right = forward_loss(model, TOKENS, TOKENS)
    model.hidden = torch.compile(model.hidden, backend='eager')
    torch.testing.assert_close(forward_loss(model, TOKENS, TOKENS), right)

# --- checkpoints ---------------------------------------------------------------------------------

PARTS = {'model': {'w': torch.ones(2, 3)}, 'optimizer': {'w.exp_avg': torch.ones(2, 3)}}
ODD_STEPS = ['5', '0x5', 5.5, 5., -3, None]

@pytest.mark.parametrize('step', ODD_STEPS, ids=repr)
def test_a_step_is_a_whole_number(tmp_path, step):
    saver = Saver(tmp_path)
    for save in (lambda: save_checkpoint(tmp_path, step, PARTS, {}), lambda: saver.save(step, PARTS, {})):
        with pytest.raises(CheckpointError, match='whole number') as e: save()
        assert '\n' not in str(e.value) and list(tmp_path.iterdir()) == []

@pytest.mark.parametrize('step', [0, np.int64(7), np.uint8(3), torch.tensor(4)], ids=repr)
def test_other_libraries_have_whole_numbers_too(tmp_path, step):
    path = save_checkpoint(tmp_path, step, PARTS, {'step': int(step)})
    assert path.name == f'step-{int(step):08}' and load_checkpoint(path)[1] == {'step': int(step)}
    saver = Saver(tmp_path/'saver')
    saver.save(step, PARTS, {})
    saver.wait()
    assert [p.name for p in list_checkpoints(tmp_path/'saver')] == [path.name]

NO_PARTS = {'state_dict': {'w': torch.ones(2)}, 'model': fresh(), 'tensor': torch.ones(2),
            'optimizer': {'optimizer': torch.optim.AdamW(fresh().parameters()).state_dict()}}

@pytest.mark.parametrize('what', NO_PARTS)
def test_tensors_come_in_parts(tmp_path, what):
    tensors, saver = NO_PARTS[what], Saver(tmp_path/'new')
    path = save_checkpoint(tmp_path/'old', 1, PARTS, {})
    for use in (lambda: save_checkpoint(tmp_path/'new', 1, tensors, {}), lambda: saver.save(1, tensors, {}),
                lambda: load_into(path, tensors)):
        with pytest.raises(CheckpointError, match=r"\{'model': model.state_dict\(\)\}") as e: use()
        assert '\n' not in str(e.value) and not (tmp_path/'new').exists()

def test_the_name_of_a_part_begins_a_file(tmp_path):
    tensors = {'a/b': PARTS['model']}
    with pytest.raises(CheckpointError, match="'a/b'"): save_checkpoint(tmp_path, 1, tensors, {})
    assert list(tmp_path.iterdir()) == []

def test_parts_are_those_that_are_there(tmp_path):
    path = save_checkpoint(tmp_path, 1, PARTS, {})
    for parts in ('model', ('model',), ['model'], {'model'}):
        assert set(load_checkpoint(path, parts)[0]) == {'model'}
    for parts in (None, ('model', 'optimizer')): assert set(load_checkpoint(path, parts)[0]) == set(PARTS)
    for parts, name in ((('modle',), 'modle'), ('model optimizer', 'model optimizer'), (('model', 'x'), 'x')):
        with pytest.raises(CheckpointError, match=f'has no {name}; .*model, optimizer') as e:
            load_checkpoint(path, parts)
        assert '\n' not in str(e.value)

# --- first numbers ------------------------------------------------------------------------------

def test_first_numbers_ask_no_default_device():
    "They are drawn on the CPU, also within `with torch.device('cuda')`"
    weights = []
    for device in ('cpu', 'meta'):
        model = LLaMA(CONFIG)
        with torch.device(device): materialize(model, 0, torch.device('cpu'))
        weights.append(model.output.weight)
    assert_close(*weights)

# --- frozen weights -----------------------------------------------------------------------------

def backward_flops(model)->int:
    loss = forward_loss(model, TOKENS, TOKENS, torch.float32)
    with FlopCounterMode(display=False) as counted: loss.backward()
    return counted.get_total_flops()

@pytest.mark.parametrize('way', [None, recompute_by_hand])
def test_frozen_weights_cost_no_gradient(way):
    "As many multiplications less as autograd saves on the plain formulas, and the same gradients"
    plain, model = fresh(), fresh()
    for layer in plain.layers: layer.feed_forward.lean = False
    if way is not None:
        for layer in model.layers: way(layer)
    whole = backward_flops(plain) - backward_flops(model)
    for m in (plain, model):
        m.zero_grad()
        for layer in m.layers:
            for p in layer.feed_forward.parameters(): p.requires_grad_(False)
    assert whole == backward_flops(plain) - backward_flops(model)
    for (name, p), q in zip(plain.named_parameters(), model.parameters()):
        assert (p.grad is None) == (q.grad is None) == (not p.requires_grad), name
        if p.grad is not None: assert_close(q.grad, p.grad)

# --- compiled models ----------------------------------------------------------------------------

@pytest.fixture
def twins():
    "A model whose blocks are compiled, and one whose blocks are not"
    torch._dynamo.reset()
    model = fresh()
    compiled(model)
    yield model, fresh()
    torch._dynamo.reset()

def test_a_compiled_model_takes_texts_of_other_lengths(twins):
    "From the second length on the compiler counts with symbols"
    model, twin = twins
    for b, t in ((2, 16), (2, 12), (4, 14), (1, 1)):
        x, grads = torch.arange(b*t).view(b, t) % 64, []
        for m in (model, twin):
            m.zero_grad()
            forward_loss(m, x, x, torch.float32).backward()
            grads.append([p.grad for p in m.parameters()])
        assert_close(*grads)

def test_a_compiled_model_writes(twins):
    "One key more with each token, in rows of unequal lengths: no graph for each"
    model, twin = twins
    prompts = [[1, 5, 7, 9], [1, 4], [1]]
    assert generate(model, prompts, 12) == generate(twin, prompts, 12)
