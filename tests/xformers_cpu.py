"""The real xformers on a CPU: its two flash operators get a kernel for it, and its tests of the device let a
CPU pass.

Everything else is xformers' own: the choice of an operator, masks, checks of shapes and strides, what it
keeps and hands to its operators. The kernels do what `torch.ops.aten._flash_attention_forward` does on a GPU:
(out, lse, rng_state) of (b, t, h, k), or of all documents in one row (total, h, k) with `cu_seqlens`. `CALLS`
counts them.
"""
import logging
from collections import Counter
from types import SimpleNamespace
import torch
from llama_nb.model import backends

CALLS = Counter()

def _scores(q, k, scale, causal): # of one document: (h, t, s) float32
    x = torch.einsum('thk,shk->hts', q.float(), k.float())*scale
    t, s = x.shape[1:]
    return x.masked_fill(torch.ones(t, s, dtype=torch.bool).triu(s - t + 1), float('-inf')) if causal else x

def _parts(x, borders): # the documents of one row, or the sequences of a batch: a list of (t, h, k)
    if borders is None: return list(x)
    assert borders.dtype == torch.int32 and borders.is_contiguous()
    ends = borders.tolist()
    assert ends[0] == 0 and ends[-1] == len(x), 'cu_seqlens do not end where the tokens end'
    return [x[a:e] for a, e in zip(ends, ends[1:])]

def _join(parts, borders): return torch.stack(parts) if borders is None else torch.cat(parts)

def _forward(query, key, value, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, p,
             softmax_scale, is_causal, window_left, window_right, return_softmax, block_tables):
    CALLS['forward'] += 1
    out, lse = [], []
    for q, k, v in zip(_parts(query, cu_seqlens_q), _parts(key, cu_seqlens_k), _parts(value, cu_seqlens_k)):
        assert len(q) <= max_seqlen_q and len(k) <= max_seqlen_k, 'a document is longer than the longest'
        x = _scores(q, k, softmax_scale, is_causal)
        out.append(torch.einsum('hts,shk->thk', x.softmax(-1), v.float()).to(q.dtype))
        lse.append(x.logsumexp(-1))
    return (_join(out, cu_seqlens_q), torch.stack(lse) if cu_seqlens_q is None else torch.cat(lse, 1),
            torch.zeros(2, dtype=torch.int64))

def _backward(grads_share_storage, grad, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k,
              max_seqlen_q, max_seqlen_k, p, softmax_scale, is_causal, window_left, window_right, rng_state):
    CALLS['backward'] += 1
    lses = list(lse) if cu_seqlens_q is None else [x.T for x in _parts(lse.T, cu_seqlens_q)]
    found = []
    by_query = [_parts(x, cu_seqlens_q) for x in (grad, query, out)]
    by_key = [_parts(x, cu_seqlens_k) for x in (key, value)]
    for dy, q, o, k, v, log_sum in zip(*by_query, *by_key, lses):
        dy, o = dy.float(), o.float()
        weights = (_scores(q, k, softmax_scale, is_causal) - log_sum[:, :, None]).exp()
        dw = torch.einsum('thk,shk->hts', dy, v.float()) - (dy*o).sum(-1).T[:, :, None]
        dx = weights*dw*softmax_scale
        found.append((torch.einsum('hts,shk->thk', dx, k.float()).to(q.dtype),
                      torch.einsum('hts,thk->shk', dx, q.float()).to(q.dtype),
                      torch.einsum('hts,thk->shk', weights, dy).to(q.dtype)))
    return tuple(_join(parts, cu_seqlens_q) for parts in zip(*found))

def _lets_cpu_pass(op):
    op.SUPPORTED_DEVICES = {'cuda', 'cpu'}
    plain = op.not_supported_reasons.__func__
    op.not_supported_reasons = classmethod(lambda cls, d: [r for r in plain(cls, d)
                                                           if not (d.device.type == 'cpu' and 'A100' in r)])

def _import():
    "xformers defines its flash operators only where PyTorch says that it has flash attention"
    backends.load_cuda_12_runtime()                          # before xformers looks for it
    flash = torch.backends.cuda.is_flash_attention_available
    torch.backends.cuda.is_flash_attention_available = lambda: True
    logging.disable(logging.WARNING)                        # that its extension does not load here
    try:
        import xformers.ops.fmha as fmha
        return fmha
    finally:
        torch.backends.cuda.is_flash_attention_available = flash
        logging.disable(logging.NOTSET)

def install():
    "xformers' module, ready for a CPU in this process; the backend 'xformers' can run there from now on"
    fmha = _import()
    if 'cpu' not in fmha.flash.FwOp.SUPPORTED_DEVICES:
        fmha.flash._flash_fwd.register_kernel('cpu')(_forward)
        fmha.flash._flash_bwd.register_kernel('cpu')(_backward)
        for op in (fmha.flash.FwOp, fmha.flash.BwOp): _lets_cpu_pass(op)
        # its list of operators for NVIDIA
        fmha.dispatch.torch = SimpleNamespace(version=SimpleNamespace(cuda='12.8', hip=None),
                                              Tensor=torch.Tensor)
    backends.XFORMERS_DEVICES.add('cpu')
    backends.TRIALS.clear()
    return fmha

def remove():
    "The backend 'xformers' cannot run on a CPU any more"
    backends.XFORMERS_DEVICES.discard('cpu')
    backends.TRIALS.clear()
