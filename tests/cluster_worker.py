"""The collectives that one rank issues in a step of the real model in its real layout: a process group that
pretends, and a mode that notes what is sent."""
import json, sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.distributed.tensor import DTensor
from llama_nb.config import ModelConfig
from llama_nb.model.transformer import LLaMA
from llama_nb.parallel.data import apply_data_parallel, materialize
from llama_nb.parallel.mesh import make_mesh
from llama_nb.parallel.tensor import apply_tensor_parallel, finish_gradients
from llama_nb.train.recompute import apply_recompute
from llama_nb.train.trainer import accumulate

MODEL = ModelConfig(64, 5, 4, vocab_size=256, multiple_of=32, max_seq_len=32)
NAMES = {'all_gather_into_tensor': 'all_gather', '_allgather_base_': 'all_gather',
         'reduce_scatter_tensor': 'reduce_scatter', '_reduce_scatter_base_': 'reduce_scatter',
         'all_reduce': 'all_reduce', 'allreduce_': 'all_reduce'}

class Sent(TorchDispatchMode):
    "(collective, bytes of the whole tensor) of each collective"
    def __init__(self):
        super().__init__()
        self.found = []
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types): return NotImplemented
        out = operator(*args, **(kwargs or {}))
        name = NAMES.get(operator._schema.name.split('::')[1])
        if operator is torch.ops.llama_nb.row_product.default:   # what it sends inside is not seen
            scatter, n = args[2:4]
            self.found.append(('reduce_scatter', out.nbytes*n) if scatter else ('all_reduce', out.nbytes))
        if name:
            tensors = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
            self.found.append((name, max(x.nbytes for x in tensors)))
        return out

def step(degrees, mode, micro, passes, sequence=True):
    "All collectives of the forward and backward passes of a step"
    ranks = degrees[0]*degrees[1]*degrees[2]
    dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=ranks)
    mesh = make_mesh(degrees, 'cpu')
    with torch.device('meta'): model = LLaMA(MODEL)
    apply_tensor_parallel(model, mesh['tensor'], sequence)
    apply_recompute(model, mode)
    apply_data_parallel(model, mesh, torch.bfloat16)
    materialize(model, 0, torch.device('cpu'))
    tokens = torch.zeros(micro*passes, 32, dtype=torch.int64)
    with Sent() as sent:
        accumulate(model, tokens, tokens, micro, torch.bfloat16)
        finish_gradients(model)
    dist.destroy_process_group()
    return sent.found

if __name__ == '__main__':
    print(json.dumps([step(*case) for case in json.loads(sys.argv[1])]))
