"""What one rank of many keeps and needs at most, without the others and without memory: a process group that
pretends, and tensors without numbers."""
import gc, json, sys, weakref
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # collectives of tensors without numbers
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from llama_nb.config import ModelConfig
from llama_nb.model import chunked_loss, transformer
from llama_nb.model.transformer import LLaMA
from llama_nb.parallel.data import apply_data_parallel, materialize
from llama_nb.parallel.mesh import make_mesh
from llama_nb.parallel.tensor import apply_tensor_parallel
from llama_nb.run_file import load_run
from llama_nb.settings import degrees
from llama_nb.train.optim import make_optimizer
from llama_nb.train.recompute import apply_recompute
from llama_nb.train.state import prepare_optimizer
from llama_nb.train.trainer import accumulate

def pretend(ranks): dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=ranks)

def local(x): return x._local_tensor if hasattr(x, '_local_tensor') else x

# --- what a block leaves for its backward pass --------------------------------------------------

BLOCK = ModelConfig(256, 1, 8, vocab_size=64, multiple_of=32, max_seq_len=64)

class Alive(TorchDispatchMode):
    "The storages of all results that are still there"
    def __init__(self):
        super().__init__()
        self.seen = {}
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        # it takes the operation apart, and comes back with local ones
        if any(issubclass(t, DTensor) for t in types): return NotImplemented
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
    def pack(self, x):
        storage = local(x).untyped_storage()
        self.seen[storage._cdata] = storage.nbytes()
        return x
    def bytes(self, *others):
        return sum(size for key, size in self.seen.items()
                   if key not in {local(x).untyped_storage()._cdata for x in others})

def block(n, sequence, mode, compiled):
    mesh = make_mesh((1, 1, n), 'cpu')
    with torch.device('meta'): model = LLaMA(BLOCK)
    apply_tensor_parallel(model, mesh['tensor'], sequence)
    apply_recompute(model, mode)
    for layer in model.layers if compiled else (): layer.compile(backend='aot_eager_decomp_partition')
    materialize(model, 0, torch.device('cpu'))
    return model.to(torch.bfloat16)  # as weights are gathered; so none is cast

def kept(n, sequence, mode, compiled, b=2, t=64):
    "Bytes that one block keeps of bfloat16 input, its input included"
    model = block(n, sequence, mode, compiled)
    layer, rotation = model.layers[0], model.rotations(torch.device('cpu'))[torch.arange(t)]
    def forward():
        x = torch.randn(b, t//n if sequence else t, BLOCK.dim, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast('cpu', torch.bfloat16): return x, layer(x, rotation)
    forward()[1].float().sum().backward()                                    # compiles; works out layouts
    watch = Handed() if compiled else Alive()
    with torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda x: x) if compiled else watch:
        x, y = forward()
    return watch.bytes(*model.parameters(), rotation, y)

def kept_cases(n, cases):
    pretend(n)
    return [kept(n, *case) for case in cases]

# --- the peak of a step -------------------------------------------------------------------------

class Torchs:
    "PyTorch's own tracker of memory"
    def __init__(self, *tensors):
        self.tracker = MemTracker()
        self.tracker.track_external(*tensors)
    def __enter__(self):
        self.tracker.__enter__()
        return self
    def __exit__(self, *error): self.tracker.__exit__(*error)
    @property
    def peak(self):
        return sum(parts['Total'] for device, parts in self.tracker.get_tracker_snapshot('peak').items()
                   if device.type == 'cpu')

def shared_model(run, ranks):
    "The model of a run as rank 0 of so many has it, on the meta device"
    with unset_fake_temporarily():
        mesh = make_mesh(degrees(run.parallel, run.model, ranks), 'cpu') if ranks > 1 else None
        model = on_meta(run, mesh)
    return model, run.data.batch_size//(mesh['replicate'].size()*mesh['shard'].size() if mesh else 1)

def on_meta(run, mesh):
    with torch.device('meta'): model = LLaMA(run.model)
    for layer in model.layers: layer.attention.backend = 'sdpa'
    if mesh: apply_tensor_parallel(model, mesh['tensor'], run.parallel.sequence)
    apply_recompute(model, run.train.recompute)
    if mesh: apply_data_parallel(model, mesh, getattr(torch, run.train.dtype))
    return model

def one_step(run, ranks):
    "The most that rank 0 needs in the forward and backward passes of a step, weights and optimiser included"
    model, share = shared_model(run, ranks)
    model.to_empty(device='cpu')
    optimizer = make_optimizer(model, run.optim)
    prepare_optimizer(model, optimizer)
    x = torch.zeros(share, run.data.seq_len, dtype=torch.int64)
    moments = [v for state in optimizer.state.values() for v in state.values()]
    with Torchs(*model.parameters(), *moments, x) as watch:
        accumulate(model, x, x, run.train.micro_batch_size, getattr(torch, run.train.dtype), None,
                   torch.tensor(1.))
    return watch.peak

def peak(path, ranks, settings):
    "Of a run at full size: bytes"
    pretend(ranks)
    # they look at numbers, and there are none
    transformer.check_tokens = chunked_loss.check_targets = lambda *_: None
    with FakeTensorMode(allow_non_fake_inputs=True): return one_step(load_run(path, settings), ranks)

if __name__ == '__main__':
    name, arguments = map(json.loads, sys.argv[1:])
    print(json.dumps(globals()[name](*arguments)))
