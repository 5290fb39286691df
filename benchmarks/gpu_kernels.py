"""A part of gpu.py: attention and the loss by themselves, each kernel or form beside the others."""
from contextlib import nullcontext
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from llama_nb.model.chunked_loss import chunked_loss_sum
from llama_nb.model.backends import attend
from gpu_parts import backends, device, first_line, median_ms

# sequences, tokens, heads and their width: half a micro-batch of 1.3B, and one of 7B
HEADS = {'gpu': [(4, 2048, 16, 128), (2, 2048, 32, 128)], 'cpu': [(1, 64, 2, 32)]}
# tokens, width, vocabulary
LOSSES = {'gpu': [(8192, 2048, 32000), (4096, 4096, 32000)], 'cpu': [(256, 64, 512)]}
CHUNKS = {'gpu': (512, 1024, 2048, 4096), 'cpu': (64,)}
KERNELS = {'flash': SDPBackend.FLASH_ATTENTION, 'cuDNN': SDPBackend.CUDNN_ATTENTION,
           'memory-efficient': SDPBackend.EFFICIENT_ATTENTION}

def kernels(desk):
    "Milliseconds of forward and backward, the host waiting after each"
    for shape in HEADS[desk.form]: attentions(desk, shape)
    for shape in LOSSES[desk.form]: losses(desk, shape)

def attentions(desk, shape):
    b, t, _, k = shape
    whole = f'{b} x {t} tokens, {shape[2]} heads of {k}'
    borders = torch.arange(0, b*t + 1, t//4, dtype=torch.int32, device=device(desk))
    for name in backends(desk, 'sdpa', 'xformers', k=k):
        attention(desk, f'{whole}: {name}', shape, name)
        attention(desk, f'{whole}: {name}, documents of {t//4}', shape, name, borders=borders)
    for name, kernel in KERNELS.items() if desk.gpu else ():
        attention(desk, f'{whole}: sdpa, {name}', shape, 'sdpa', kernel)

def attention(desk, name:str, shape, backend:str, kernel=None, borders=None):
    draw = torch.Generator().manual_seed(0)
    *qkv, dy = (torch.randn(shape, generator=draw).to(device(desk), torch.bfloat16) for _ in range(4))
    for x in qkv: x.requires_grad_()
    def forward():
        with sdpa_kernel(kernel) if kernel else nullcontext(): return attend(*qkv, backend, None, borders)
    try:
        ms = median_ms(desk, forward), median_ms(desk, lambda: torch.autograd.grad(forward(), qkv, dy))
    except RuntimeError as e:
        desk.row('attention', name, why=first_line(e))
        return
    b, t, h, k = shape
    # 4 forward and 10 backward, of half of the square
    products = 7*b*h*k*t*t if borders is None else None
    rate = products/ms[1]/1e9 if products else None
    desk.row('attention', name, forward_ms=ms[0], both_ms=ms[1], tflops_a_second=rate)

def losses(desk, shape):
    n, d, v = shape
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, n, d, generator=draw).to(device(desk), torch.bfloat16).requires_grad_()
    weight = (torch.randn(v, d, generator=draw)*.02).to(device(desk)).requires_grad_()
    targets = torch.randint(v, (1, n), generator=draw).to(device(desk))
    for compiler in (None, *['inductor']*desk.gpu):
        for chunk in CHUNKS[desk.form]:
            def both():
                loss = chunked_loss_sum(hidden, weight, targets, chunk, compiler=compiler)
                torch.autograd.grad(loss, (hidden, weight))
            ms = median_ms(desk, both)
            desk.row('loss', f'{n} tokens of {d}, vocabulary {v}, chunks of {chunk}'
                     + ', compiled'*bool(compiler), both_ms=ms, tflops_a_second=6*n*d*v/ms/1e9)
    if not desk.gpu: desk.skip('the compiled loss', 'it is compiled on a GPU only')
