"""The parity matrix: every layout of the ranks, with every recompute mode, against one process in which no
parallel code runs.

    python benchmarks/parity.py

writes `parity.md` next to this file. Ranks are processes joined by gloo; a few minutes on two CPU cores.
`tests/test_parity.py` holds the same numbers, from the same worker, below 1e-5.
"""
import functools, tempfile
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from llama_nb.config import ModelConfig
from llama_nb.model.transformer import LLaMA
from llama_nb.parallel.data import apply_data_parallel, materialize
from llama_nb.parallel.mesh import data_rank, make_mesh, total
from llama_nb.parallel.processes import run_ranks
from llama_nb.parallel.tensor import apply_tensor_parallel, finish_gradients
from llama_nb.settings import OptimConfig
from llama_nb.train.optim import clip_grad_norm, make_optimizer
from llama_nb.train.recompute import apply_recompute
from llama_nb.train.trainer import accumulate

MODES = ['none', 'full', 'linear']
MODELS = {'even': ModelConfig(32, 2, 4, vocab_size=64, multiple_of=32, max_seq_len=16),
          # 10 and 6 rows over 4 ranks: unequal parts, one is empty
          'odd': ModelConfig(4, 2, 2, vocab_size=6, multiple_of=2, max_seq_len=16)}
# replicate, shard, tensor; sequence parallelism. Only eight ranks have two of each, as the run file of 65B
LAYOUTS = {2: {'FSDP': ((1, 2, 1), True), 'replicas': ((2, 1, 1), True), 'TP': ((1, 1, 2), False),
               'TP+SP': ((1, 1, 2), True)},
           4: {'FSDP': ((1, 4, 1), True), 'HSDP': ((2, 2, 1), True), 'TP': ((1, 1, 4), False),
               'TP+SP': ((1, 1, 4), True),
               'FSDP x TP+SP': ((1, 2, 2), True), 'replicas x TP+SP': ((2, 1, 2), True)},
           8: {'HSDP x TP+SP': ((2, 2, 2), True)}}

# inputs and targets (8, 16); of the first sequence nearly all targets count, of the last none
def batch(config, step):
    g = torch.Generator().manual_seed(step)
    x, y = torch.randint(config.vocab_size, (2, 8, 16), generator=g)
    return x, y.masked_fill(torch.rand(y.shape, generator=g) < torch.linspace(.05, 1, 8)[:, None], -100)

def whole(x): return x.full_tensor() if isinstance(x, DTensor) else x

def build(config, mode, mesh=None, sequence=True, dtype=torch.float32, compiler=None):
    "A model with its first weights, shared over `mesh` if there is one"
    with torch.device('meta'): model = LLaMA(config)
    if mesh is not None: apply_tensor_parallel(model, mesh['tensor'], sequence)
    apply_recompute(model, mode)
    for layer in model.layers if compiler else (): layer.compile(backend=compiler)
    if mesh is not None: apply_data_parallel(model, mesh, dtype)
    materialize(model, 0, 'cpu')
    with torch.no_grad():
        # at 0.02, gradients in so small a model are near AdamW's eps
        for p in model.parameters(): p.mul_(10 if p.ndim > 1 else 1)
    return model

def take_steps(model, steps=5, rank=0, size=1, micro_batches=1, dtype=torch.float32):
    """What some steps leave behind, if this is rank `rank` of `size` that share a batch and it takes its part
    in so many micro-batches"""
    # the paper's rates; no warm-up, so the first steps are the largest
    optimizer = make_optimizer(model, OptimConfig())
    out = {'start': {n: whole(p).detach().clone() for n, p in model.named_parameters()}, 'loss': [],
           'norm': []}
    for step in range(steps):
        inputs, targets = batch(model.config, step)
        mine = inputs.chunk(size)[rank], targets.chunk(size)[rank]
        out['loss'].append(accumulate(model, *mine, len(mine[0])//micro_batches, dtype,
                                      count=(targets != -100).sum()))
        finish_gradients(model)
        if step == 0: out['gradients'] = {n: whole(p.grad).clone() for n, p in model.named_parameters()}
        # a limit below the norm, so that it clips
        out['norm'].append(whole(clip_grad_norm(model.parameters(), .1)))
        optimizer.step()
        optimizer.zero_grad()
    return {**out, 'loss': torch.stack(out['loss']), 'norm': torch.stack(out['norm']),
            'weights': {n: whole(p).detach() for n, p in model.named_parameters()}}

def worst(a, b):
    return max(worst(a[n], b[n]) for n in b) if isinstance(b, dict) else ((a - b).norm()/b.norm()).item()

def compare(reference, got): # of each tensor the norm of the difference / its norm; of those the largest
    same = all(torch.equal(got['start'][n], p) for n, p in reference['start'].items())
    return {'same start': same,
            **{key: worst(got[key], reference[key]) for key in ('loss', 'gradients', 'norm', 'weights')}}

mesh_of = functools.cache(lambda degrees: make_mesh(degrees, 'cpu'))   # its groups connect once

def measure(folder, cases, steps=5):
    """On each rank and for each case (layout, recompute mode, model, dtype, factor of the gradients,
    compiler): how far it lies from the reference in `folder`, which made as many steps"""
    result = []
    for name, mode, model, dtype, factor, compiler in cases:
        degrees, sequence = LAYOUTS[dist.get_world_size()][name]
        mesh, dtype = mesh_of(degrees), getattr(torch, dtype)
        shared = build(MODELS[model], mode, mesh, sequence, dtype, compiler)
        if factor != 1:
            shared.apply(lambda m: hasattr(m, 'set_gradient_divide_factor')
                         and m.set_gradient_divide_factor(1/factor))
        rank, size = data_rank(mesh)
        got = take_steps(shared, steps, rank, size, 2, dtype)
        got['loss'] = total(got['loss'])/degrees[2]  # the ranks of a tensor group have the same part
        result.append(compare(torch.load(f'{folder}/{model}', weights_only=True), got))
    return result

def save_references(folder, steps=5):
    for name, config in MODELS.items():
        torch.save(take_steps(build(config, 'none'), steps), f'{folder}/{name}')

def case(name, mode='none', model='even', dtype='float32', factor=1., compiler=None):
    return name, mode, model, dtype, factor, compiler

def matrix():
    "One row per layout and mode: (processes, layout, mode, worst errors)"
    with tempfile.TemporaryDirectory() as folder:
        save_references(folder)
        reference = torch.load(f'{folder}/even', weights_only=True)
        rows = [(1, 'one process', mode,
                 compare(reference, take_steps(build(MODELS['even'], mode), micro_batches=2)))
                for mode in MODES]
        for n, layouts in LAYOUTS.items():
            cases = [case(name, mode) for name in layouts for mode in MODES]
            ranks = run_ranks('parity:measure', n, {'folder': folder, 'cases': cases}, timeout=1200)
            rows += [(n, *c[:2], {k: max(r[i][k] for r in ranks) for k in ranks[0][i]})
                     for i, c in enumerate(cases)]
    return rows

if __name__ == '__main__':
    rows = matrix()
    lines = ['| processes | layout | recompute | loss | gradients | norm | weights |',
             '|---|---|---|---|---|---|---|']
    lines += [f'| {n} | {layout} | {mode} | '
              + ' | '.join(f'{e[k]:.0e}' for k in ('loss', 'gradients', 'norm', 'weights')) + ' |'
              for n, layout, mode, e in rows]
    text = f'''# The parity matrix

Worst relative error of five AdamW steps against one process in which no parallel code runs: the loss and the
global gradient norm of each step, every gradient of the first, every weight after the last. Measured on a CPU
with torch {torch.__version__.split("+")[0]}, gloo and float32, by `python benchmarks/parity.py`; the batch
comes in two or more micro-batches, with unequal numbers of targets on the ranks. The error of a tensor is
the norm of the difference over its norm. Float32 rounds at 6e-8, and sums in another order add a few such
roundings in each layer. A single weight may differ more, up to 1e-5 of the largest: AdamW divides a gradient
by its own size, so where that is nearly nothing its rounding error becomes a step.

''' + '\n'.join(lines) + '\n'
    (Path(__file__).parent/'parity.md').write_text(text, encoding='utf-8')
    print(text)
