"Recompute modes on two processes: weights stored in shares, and products that ranks share."
import re
from collections import Counter
import pytest, torch, torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from conftest import run_ranks
from llama_nb.config import ModelConfig
from llama_nb.core import UserError
from llama_nb.model.transformer import LLaMA, init_weights
from llama_nb.parallel.tensor import apply_tensor_parallel
from llama_nb.train.loss import loss_sum
from llama_nb.train.recompute import apply_recompute, recompute_by_hand
from llama_nb.train.trainer import forward_loss

CONFIG = ModelConfig(32, 2, 4, vocab_size=64, multiple_of=32, max_seq_len=32)

def model_and_batch():
    torch.manual_seed(0)
    model = LLaMA(CONFIG)
    init_weights(model, .2)
    return model, *torch.randint(64, (2, 2, 16), generator=torch.Generator().manual_seed(1))

def plain_gradients(model, x, y):
    loss_sum(model(x), y)[0].backward()
    return {n: p.grad for n, p in model.named_parameters()}

def worst(model, right):
    "Largest relative error of the gradients, gathered from the ranks"
    return max(((p.grad.full_tensor() - right[n]).abs().max()/right[n].abs().max()).item()
               for n, p in model.named_parameters())

class Seen(TorchDispatchMode):
    "How often each operation ran on this rank's own tensors"
    def __init__(self):
        super().__init__()
        self.count = Counter()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # it takes the operation apart, and comes back with local ones
        if any(issubclass(t, DTensor) for t in types): return NotImplemented
        self.count[str(func).removeprefix('aten.')] += 1
        return func(*args, **(kwargs or {}))

def in_shares(mode):
    "Weights stored in shares after `mode` was applied: each rank takes one sequence of two"
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    right = plain_gradients(*model_and_batch())
    model, x, y = model_and_batch()
    apply_recompute(model, mode)
    mesh, mine = init_device_mesh('cpu', (2,)), slice(dist.get_rank(), dist.get_rank() + 1)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.)  # sums; gloo has no mean
        module.set_force_sum_reduction_for_comms(True)
    loss_sum(model(x[mine]), y[mine])[0].backward()
    return worst(model, right)

def shared_products(sequence):
    """Errors of the gradients, and products and collectives of forward and backward pass, for each mode; the
    answer of the way by hand"""
    from torch.distributed.device_mesh import init_device_mesh
    right, found = plain_gradients(*model_and_batch()), {}
    for mode in ('none', 'linear', 'full'):
        model, x, y = model_and_batch()
        apply_tensor_parallel(model, init_device_mesh('cpu', (2,)), sequence)
        apply_recompute(model, mode)
        # layouts are worked out at the first pass, with trial operations
        forward_loss(model, x, y).backward()
        model.zero_grad()
        with Seen() as seen: forward_loss(model, x, y).backward()
        both = seen.count['llama_nb.row_product.default']             # a product and its sum
        products = sum(n for name, n in seen.count.items() if re.search(r'(add|b|badd)?mm\.|atten', name))
        completed = 'reduce_scatter_tensor' if sequence else 'all_reduce'
        sums = seen.count[f'_c10d_functional.{completed}.default']
        found[mode] = {'error': worst(model, right), 'products': both + products, 'sums': both + sums}
    try:
        recompute_by_hand(model.layers[0])
        found['by hand'] = ''
    except UserError as e:
        found['by hand'] = str(e)
    return found

@pytest.mark.parametrize('mode', ['none', 'full', 'linear'])
def test_weights_in_shares(mode):
    # float32, sums in another order
    for error in run_ranks('test_recompute_ranks:in_shares', 2, {'mode': mode}, timeout=240):
        assert error < 1e-5

@pytest.mark.parametrize('sequence', [True, False])
def test_shared_products(sequence):
    for found in run_ranks('test_recompute_ranks:shared_products', 2, {'sequence': sequence}, timeout=240):
        for mode in ('none', 'linear', 'full'): assert found[mode]['error'] < 1e-5, found
        plain, kept, full = found['none'], found['linear'], found['full']
        assert kept['products'] == plain['products'] < full['products']
        assert kept['sums'] == plain['sums'] < full['sums'], found  # what completes a product is not repeated
        assert 'recompute_linear' in found['by hand'] and '\n' not in found['by hand']
