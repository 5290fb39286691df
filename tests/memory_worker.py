"What one rank of many keeps and needs at most, without the others and without memory: a process group that pretends, and tensors without numbers."
import gc, json, sys, weakref
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from llama_nb.config import ModelConfig
from llama_nb.model.transformer import LLaMA
from llama_nb.parallel.data import materialize
from llama_nb.parallel.mesh import make_mesh
from llama_nb.parallel.tensor import apply_tensor_parallel
from llama_nb.train.recompute import apply_recompute

def pretend(ranks): dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=ranks)

def local(x): return x._local_tensor if hasattr(x, '_local_tensor') else x

# --- what a block leaves for its backward pass --------------------------------------------------

BLOCK = ModelConfig(256, 1, 8, vocab_size=64, multiple_of=32, max_seq_len=64)

class Alive(TorchDispatchMode):
    "The storages of all results that are still there"
    def __init__(self): super().__init__(); self.seen = {}
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types): return NotImplemented      # it takes the operation apart, and comes back with local ones
        out = operator(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.seen[storage._cdata] = weakref.ref(storage), storage.nbytes()
        return out
    def bytes(self, *others): # tensors that do not count
        gc.collect()
        without = {local(x).untyped_storage()._cdata for x in others}
        return sum(size for key, (ref, size) in self.seen.items() if ref() is not None and key not in without)

class Handed:
    "The storages that are handed to autograd"
    def __init__(self): self.seen = {}
    def pack(self, x): storage = local(x).untyped_storage(); self.seen[storage._cdata] = storage.nbytes(); return x
    def bytes(self, *others): return sum(size for key, size in self.seen.items() if key not in {local(x).untyped_storage()._cdata for x in others})

def block(n, sequence, mode, compiled):
    mesh = make_mesh((1, 1, n), 'cpu')
    with torch.device('meta'): model = LLaMA(BLOCK)
    apply_tensor_parallel(model, mesh['tensor'], sequence)
    apply_recompute(model, mode)
    for layer in model.layers if compiled else (): layer.compile(backend='aot_eager_decomp_partition')
    materialize(model, 0, torch.device('cpu'))
    return model.to(torch.bfloat16)                                          # as weights are gathered; so none is cast

def kept(n, sequence, mode, compiled, b=2, t=64):
    "Bytes that one block keeps of bfloat16 input, its input included"
    model = block(n, sequence, mode, compiled)
    layer, rotation = model.layers[0], model.rotations(torch.device('cpu'))[torch.arange(t)]
    def forward():
        x = torch.randn(b, t//n if sequence else t, BLOCK.dim, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast('cpu', torch.bfloat16): return x, layer(x, rotation)
    forward()[1].float().sum().backward()                                    # compiles; works out layouts
    watch = Handed() if compiled else Alive()
    with torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda x: x) if compiled else watch: x, y = forward()
    return watch.bytes(*model.parameters(), rotation, y)

def kept_cases(n, cases):
    pretend(n)
    return [kept(n, *case) for case in cases]

if __name__ == '__main__': print(json.dumps(globals()[sys.argv[1]](*json.loads(sys.argv[2]))))
