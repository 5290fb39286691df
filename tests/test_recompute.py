"Recompute modes inside the trainer, and under torch.compile: the same run, whatever is kept."
import pytest, torch
from conftest import variant
from llama_nb.config import ModelConfig
from llama_nb.model.transformer import LLaMA, init_weights
from llama_nb.run_file import load_run
from llama_nb.settings import RECOMPUTE_MODES
from llama_nb.train.loss import next_token_loss
from llama_nb.train.recompute import RECOMPUTE, apply_recompute
from llama_nb.train.trainer import start_run, train_step

def three_steps(path, *settings):
    "Losses and gradient norms of three steps, and the weights after them"
    run = start_run(load_run(path, settings), report=lambda line: None)
    rows = [train_step(run) for _ in range(3)]
    return [(float(r['loss']), float(r['grad_norm'])) for r in rows], run.model.state_dict()

# budget needs the compiler: below
@pytest.mark.parametrize('mode', [m for m in RECOMPUTE if m not in ('none', 'budget')])
@pytest.mark.parametrize('documents', ['cross', 'separate'])
def test_the_same_run(run_file, mode, documents):
    path, common = run_file(10), ('--data.documents', documents)  # 8 sequences a step, 4 at a time
    right, weights = three_steps(path, *common)
    got, other = three_steps(path, *common, '--train.recompute', mode)
    for a, b in zip(got, right): assert a == pytest.approx(b, rel=1e-5)  # float32, sums in another order
    for name in weights:  # Adam turns rounding of tiny gradients into steps of up to lr
        assert (other[name] - weights[name]).abs().max() < 3e-3, name

CONFIG = ModelConfig(64, 2, 4, vocab_size=101, multiple_of=16, max_seq_len=64)

def gradients(mode, backend=None, documents=None, budget=.5):
    "Of a fresh model with large weights, compiled by `backend` after `mode` was applied"
    x = torch.randint(101, (2, 49), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = LLaMA(CONFIG)
    init_weights(model, .2)
    apply_recompute(model, mode, budget)
    for layer in model.layers if backend else (): layer.compile(backend=backend)
    next_token_loss(model(x[:, :-1], borders=documents), x[:, 1:]).backward()
    return {n: p.grad for n, p in model.named_parameters()}

def agree(got, right):
    # float32, sums in another order
    for name, g in got.items(): assert (g - right[name]).abs().max() < 1e-5*right[name].abs().max(), name

@pytest.mark.parametrize('mode', ['none', 'linear', variant('full'), variant('budget')])
def test_compiled_afterwards(mode):
    "Recompute first, compile then: gradients stay those of the plain model"
    agree(gradients(mode, 'inductor'), gradients('none'))

@pytest.mark.parametrize('mode', RECOMPUTE)
def test_compiled_documents(mode):
    "Attention of packed documents is an operator that the compiler takes as it is"
    documents = torch.tensor([0, 20, 48, 96], dtype=torch.int32)
    agree(gradients(mode, 'aot_eager', documents), gradients('none', documents=documents))

def test_budgets_do_not_mix():
    """Two budgets in one process: each compiled code keeps its own, and the setting of the process is
    untouched"""
    before, kept = torch._functorch.config.activation_memory_budget, {}
    for budget in (1., 0., 1.):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            gradients('budget', 'aot_eager_decomp_partition', budget=budget)      # compiles
            sizes.clear()
            gradients('budget', 'aot_eager_decomp_partition', budget=budget)
        kept.setdefault(budget, set()).add(sum(sizes))
    assert len(kept[1.]) == len(kept[0.]) == 1 and min(kept[1.]) > 1.2*max(kept[0.])
    assert torch._functorch.config.activation_memory_budget == before

def test_bfloat16_trains_alike(run_file):
    path = run_file(10)
    right, _ = three_steps(path, '--train.dtype', 'bfloat16')
    for mode in ('linear', 'full'):
        got, _ = three_steps(path, '--train.dtype', 'bfloat16', '--train.recompute', mode)
        for a, b in zip(got, right): assert a == pytest.approx(b, rel=2**-7)      # bfloat16 has 8 bits
    full, _ = three_steps(run_file(10, name='full'))
    assert full[0][0] != right[0][0] and full[0] == pytest.approx(right[0], rel=.02)

def test_a_run_file_may_name_every_mode():
    assert tuple(RECOMPUTE) == RECOMPUTE_MODES
