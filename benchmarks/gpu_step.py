"""Parts of gpu.py: training steps beside transformers, and where their time goes.

All contestants share one set of weights, gradients and optimiser states: transformers' LlamaForCausalLM is
given our parameters under its own names. So both sides have the same precision and the same AdamW, a model of
100 GB of states is in memory once, and the contestants can take turns step by step.
"""
import statistics, time
from dataclasses import dataclass, replace
from collections import Counter
import torch
from torch import nn
from llama_nb.config import ModelConfig
from llama_nb.core import UserError
from llama_nb.interop.hf import hf_name
from llama_nb.model.backends import pick_backend
from llama_nb.model.transformer import LLaMA
from llama_nb.scale.flops import device_peak, hfu, linear_shapes, measure_matmul_peak, mfu
from llama_nb.settings import DataConfig, OptimConfig, RunConfig, TrainConfig
from llama_nb.train.optim import clip_grad_norm, make_optimizer, set_lr
from llama_nb.train.recompute import apply_recompute
from llama_nb.train.run import compile_model
from llama_nb.train.trainer import accumulate
from gpu_parts import (backends, bare_model, default_attention, device, first_line, formula_bytes, free,
                       median_ms, wait)

GOALS = {'1.3B': .55, '7B': .50}                                 # MFU; and 1.25 times transformers
FASTER = 1.25

@dataclass(frozen=True)
class Contestant:
    code:str                # llama_nb or transformers
    recompute:str='none'    # of transformers: none, or full for its gradient checkpointing
    compiled:str=''         # '', blocks or whole
    micro:int=4             # sequences in one forward and backward pass
    attention:str='auto'
    @property
    def name(self):
        words = [self.code, self.attention, f'recompute {self.recompute}'*(self.recompute != 'none'),
                 f'compiled ({self.compiled})'*bool(self.compiled)]
        return ', '.join(w for w in [*words, f'{self.micro} at a time'] if w)

# --- two codes, one set of parameters -------------------------------------------------------------

def adopt(model:nn.Module, parameters:dict[str,nn.Parameter]):
    "Put `parameters` in the place of those that `model` has; all of them, and of the same shapes"
    own = {n: p.shape for n, p in model.named_parameters()}
    assert own == {n: p.shape for n, p in parameters.items()}
    for name, p in parameters.items():
        place, _, leaf = name.rpartition('.')
        setattr(model.get_submodule(place), leaf, p)

def ours(base:LLaMA, who:Contestant, dtype):
    "A function that goes forward and backward through a batch and returns the mean loss"
    with torch.device('meta'): model = LLaMA(base.config)
    adopt(model, dict(base.named_parameters()))
    # tried before anything is compiled
    pick_backend(who.attention, base.norm.weight.device, dtype, base.config.head_dim)
    for layer in model.layers: layer.attention.backend = who.attention
    apply_recompute(model, who.recompute)
    if who.compiled: compile_model(model)
    return lambda x, y: accumulate(model, x, y, who.micro, dtype)

def theirs(base:LLaMA, who:Contestant, dtype):
    "The same for transformers"
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    c, where = base.config, base.norm.weight.device
    config = LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim,
                         num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, rms_norm_eps=c.norm_eps,
                         max_position_embeddings=c.max_seq_len, tie_word_embeddings=False, use_cache=False,
                         attn_implementation=who.attention)
    with torch.device('meta'): model = LlamaForCausalLM(config)
    with where: model.model.rotary_emb = LlamaRotaryEmbedding(config)
    adopt(model, {hf_name(n): p for n, p in base.named_parameters()})
    assert all(t.device == where for t in (*model.parameters(), *model.buffers()))
    model.train()
    if who.recompute == 'full': model.gradient_checkpointing_enable({'use_reentrant': False})
    for layer in model.model.layers if who.compiled == 'blocks' else (): layer.compile()
    if who.compiled == 'whole': model.compile()
    return lambda x, y: their_pass(model, x, y, who.micro, dtype)

def their_pass(model, inputs, targets, micro:int, dtype):
    total = 0.
    for x, y in zip(inputs.split(micro), targets.split(micro)):
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32): logits = model(x).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), y.flatten(),
                                           reduction='sum')/targets.numel()
        loss.backward()
        total = total + loss.detach()
    return total

def compute_type(desk)->torch.dtype: return torch.bfloat16 if desk.gpu else torch.float32

# --- a contest ------------------------------------------------------------------------------------

class Contest:
    "Contestants who take turns at training the same weights"
    def __init__(self, desk, table:str, config:ModelConfig, batch:int):
        self.desk, self.table, self.config, self.batch = desk, table, config, batch
        self.dtype = compute_type(desk)
        torch._dynamo.config.recompile_limit = 64  # each contestant is a version of the same code
        self.base = bare_model(desk, config, 'auto', 'none')
        self.optimizer = make_optimizer(self.base, OptimConfig())
        set_lr(self.optimizer, 1e-5)
        self.generator, self.passes, self.seconds, self.facts = torch.Generator().manual_seed(0), {}, {}, {}
        self.peak = peak_of(desk, config, batch, self.dtype)

    def step(self, who:Contestant):
        "One optimiser step of a contestant; the loss"
        rows = torch.randint(self.config.vocab_size, (self.batch, self.config.max_seq_len + 1),
                             generator=self.generator).to(self.base.norm.weight.device)
        loss = self.passes[who](rows[:, :-1], rows[:, 1:])
        clip_grad_norm(self.base.parameters(), 1.)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def timed(self, who:Contestant):
        wait(self.desk)
        start = time.perf_counter()
        loss = self.step(who)
        wait(self.desk)
        self.seconds[who].append(time.perf_counter() - start)
        self.facts[who]['loss'] = loss.item()

    def enter(self, who:Contestant, warm_up:int=3, alone:int=3):
        """Warm a contestant up, note its peak of memory, time some steps of it alone; one that fails leaves a
        row that says how"""
        free(self.desk)
        begun = time.perf_counter()
        try:
            self.passes[who] = (ours if who.code == 'llama_nb' else theirs)(self.base, who, self.dtype)
            for _ in range(warm_up): self.step(who)
            took = time.perf_counter() - begun
            self.facts[who], self.seconds[who] = {'warm_up_s': took, 'peak_gb': self.peak_gb(who)}, []
            for _ in range(alone): self.timed(who)
        except Exception as e:
            self.leave(who, e)
            return
        self.report(who)

    def leave(self, who:Contestant, error:Exception):
        for kept in (self.passes, self.seconds, self.facts): kept.pop(who, None)
        self.optimizer.zero_grad(set_to_none=True)
        for p, kept in [*self.optimizer.state.items()]:          # memory ran out while they were made
            if len(kept) < 3: del self.optimizer.state[p]
        memory = isinstance(error, torch.cuda.OutOfMemoryError)
        why = 'out of memory' if memory else first_line(error)
        self.desk.row(self.table, who.name, None if memory else False, why=why)
        error.__traceback__ = None                               # it holds on to tensors
        free(self.desk)

    def peak_gb(self, who:Contestant)->float|None:
        if not self.desk.gpu: return None
        torch.cuda.reset_peak_memory_stats()
        self.step(who)
        wait(self.desk)
        return torch.cuda.max_memory_allocated()/1e9

    def turns(self, rounds:int, reserve:float=20):
        "The contestants take turns while there is time; then their rows say medians of these rounds alone"
        alone, self.seconds = self.seconds, {who: [] for who in self.seconds}
        for _ in range(rounds):
            if self.desk.left() < reserve: break
            for who in list(self.seconds):
                try:
                    self.timed(who)
                except Exception as e:
                    self.leave(who, e)
        turned = any(self.seconds.values())
        if not turned: self.seconds = alone
        for who in self.seconds: self.report(who, 'taking turns' if turned else 'alone')

    def report(self, who:Contestant, how:str='alone'):
        c, t = self.config, self.config.max_seq_len
        median = statistics.median(self.seconds[who])
        rate, memory = self.batch*t/median, formula_gb(c, who, self.batch)
        base = [s for other, s in self.seconds.items() if other.code == 'transformers'
                and bool(other.compiled) == bool(who.compiled) and s]
        counted = who.code == 'llama_nb' and who.recompute != 'budget'
        hardware = hfu(rate, c, t, self.peak, who.recompute).share if counted else None
        facts = {**self.facts[who], 'formula_gb': memory}
        self.desk.row(self.table, who.name, tokens_per_second=rate, mfu=mfu(rate, c, t, self.peak).share,
                      hfu=hardware, median_ms=1000*median,
                      of_transformers=min(map(statistics.median, base))/median if base else None, **facts,
                      steps=len(self.seconds[who]), how=how)

    def best(self, code:str)->float|None: # seconds
        return min((statistics.median(s) for who, s in self.seconds.items() if who.code == code and s),
                   default=None)

def peak_of(desk, config:ModelConfig, batch:int, dtype):
    "Published for a GPU that is known; else measured"
    kind = str(dtype).removeprefix('torch.')
    try:
        return device_peak(torch.cuda.get_device_name(), kind)
    except (UserError, RuntimeError, AssertionError):
        pass
    one = ModelConfig(config.dim, 1, config.n_heads, vocab_size=config.vocab_size,
                      multiple_of=config.multiple_of)
    return measure_matmul_peak(linear_shapes(one, batch*config.max_seq_len), dtype, device(desk).type,
                               turns=3)

def formula_gb(c:ModelConfig, who:Contestant, batch:int)->float|None:
    "What the package says that this takes"
    if who.code != 'llama_nb': return None
    train = TrainConfig(steps=100, micro_batch_size=who.micro, dtype='bfloat16', recompute=who.recompute,
                        compile=who.compiled or 'off')
    size = formula_bytes(RunConfig('-', c, DataConfig('-', seq_len=c.max_seq_len, batch_size=batch), train,
                                   OptimConfig(warmup_steps=1)))
    return size and size/1e9

def goals(desk, contest:Contest, size:str):
    "What is aimed at, beside what came; nothing is asserted"
    tokens, mine, them = (contest.batch*contest.config.max_seq_len, contest.best('llama_nb'),
                          contest.best('transformers'))
    if mine is None: return
    got = mfu(tokens/mine, contest.config, contest.config.max_seq_len, contest.peak)
    desk.row('goals', f'MFU at {size}', goal=GOALS.get(size), got=got.share, counted=str(got))
    desk.row('goals', f'of transformers at {size}, the best of each', goal=FASTER, got=them and them/mine)

# --- the parts ------------------------------------------------------------------------------------

ONE_B, SEVEN_B = ModelConfig(2048, 24, 16), ModelConfig(4096, 32, 32)
MINI = ModelConfig(64, 2, 2, vocab_size=512, multiple_of=32, max_seq_len=64)

def flash()->list[str]:
    "Attention implementations of transformers that can run: sdpa, and flash-attn if its package is here"
    import importlib.util
    return ['sdpa', *['flash_attention_2']*(importlib.util.find_spec('flash_attn') is not None)]

def picked(desk, config:ModelConfig)->str:
    "The attention that `auto` takes"
    return default_attention(desk, config.head_dim, dtype=compute_type(desk))

def transformers_here(desk)->bool:
    import importlib.util
    here = importlib.util.find_spec('transformers') is not None
    if not here: desk.skip('transformers', 'not installed')
    return here

def step(desk):
    """1.3B parameters, or as many of its layers as fit, 8 sequences of 2,048 tokens: every recompute mode,
    eager and compiled, beside transformers"""
    micro = 4
    size, name = fitting(desk, ONE_B, micro*2048, '1.3B') if desk.gpu else (MINI, 'toy')
    if not size: return
    contest = Contest(desk, f'8 x 2,048 tokens, {name}' if desk.gpu else name, size, 8)
    best = picked(desk, size)
    others = [n for n in backends(desk, 'sdpa', 'xformers', dtype=compute_type(desk)) if n != best]
    def mine(mode, compiled='', attention=best):
        return Contestant('llama_nb', mode, compiled, micro, attention)
    them = [Contestant('transformers', 'none', '', micro, kind) for kind in flash()]*transformers_here(desk)
    eager = [mine('none'), *them, *(mine(mode) for mode in ('linear', 'full'))]
    plain = [*(replace(who, compiled='blocks') for who in them[:1]), mine('none', 'blocks')]
    compiled = [mine('linear', 'blocks'), *plain, *(replace(who, micro=8) for who in plain),
                *(mine('linear', 'blocks', other) for other in others), mine('full', 'blocks'),
                mine('budget', 'blocks')]
    if not desk.gpu: desk.skip('compiled contestants', 'minutes of compiling on a CPU')
    enter_all(desk, contest, eager + compiled*desk.gpu, 60)
    contest.turns(10 if desk.gpu else 2)
    goals(desk, contest, name)
    whole = [replace(who, compiled='whole') for who in them[:1]]    # compiles for minutes, so last
    enter_all(desk, contest, whole*desk.gpu, 120)
    if desk.gpu and set(whole) & set(contest.passes): contest.turns(10)

def enter_all(desk, contest:Contest, all_of_them:list[Contestant], reserve:float, n:int=3):
    "Each contestant enters while more than `reserve` seconds are left: `n` steps to warm up, `n` alone"
    if not desk.gpu: n = 1
    for who in all_of_them:
        if desk.gpu and desk.left() < reserve: desk.skip(who.name, 'no time left')
        else:
            contest.enter(who, n, n)

# CUDA itself, the loss, one layer's weights in bfloat16, the work space of matrix multiplications
SPARE = 4e9
# bytes that transformers, eager, keeps of a token and layer, over the width
KEPT_EAGER = 49

def fitting_layers(memory:float, whole:ModelConfig, tokens:int)->int:
    """As many layers of a model as fit into `memory` bytes: states, weights once more in bfloat16, what
    transformers keeps of `tokens` in a forward pass"""
    def need(n): return 18*replace(whole, n_layers=n).n_params + n*tokens*KEPT_EAGER*whole.dim + SPARE
    return max((n for n in range(1, whole.n_layers + 1) if need(n) <= memory), default=0)

def fitting(desk, whole:ModelConfig, tokens:int, name:str)->tuple[ModelConfig|None, str]:
    "A model with as many layers as fit on this GPU, and its name; None, and a row, if not even two do"
    memory = torch.cuda.mem_get_info()[0]
    layers = fitting_layers(memory, whole, tokens)
    if layers < 2:
        desk.skip(name, f'{memory/1e9:.0f} GB do not hold two layers of it')
        return None, name
    if layers < whole.n_layers: name = f'{layers} of the {whole.n_layers} layers of {name}'
    return replace(whole, n_layers=layers), name

def step_7B(desk):
    "The widths of 7B with float32 weights and AdamW: all 32 layers where memory allows"
    if not desk.gpu:
        desk.skip('7B', 'no GPU')
        return
    size, name = fitting(desk, SEVEN_B, 2048, '7B')
    if not size: return
    contest = Contest(desk, f'16 x 2,048 tokens, {name}', size, 16)
    attention = picked(desk, contest.config)
    them = [Contestant('transformers', *how, 'sdpa')
            for how in (('none', '', 1), ('full', '', 4), ('none', 'blocks', 1))]
    mine = [Contestant('llama_nb', *how, attention)
            for how in (('linear', 'blocks', 2), ('linear', 'blocks', 1), ('full', 'blocks', 4))]
    enter_all(desk, contest, [mine[0], *them*transformers_here(desk), *mine[1:]], 40, 2)
    contest.turns(5)
    goals(desk, contest, name)

# --- where the time goes --------------------------------------------------------------------------

# the first that fits counts
KINDS = (('optimiser and clipping', ('adam', 'multi_tensor', 'foreach', 'lpnorm')),
         ('attention', ('flash', 'fmha', 'attention', 'cutlassf', 'cutlassb')),
         ('matrix multiplications', ('gemm', 'nvjet', 'cublas', 'xmma', 'wgmma', 'cutlass', 'aten::mm',
                                     'aten::addmm', 'aten::bmm')),
         ('copies', ('memcpy', 'memset')))

def kind_of(kernel:str)->str:
    "What a kernel is for, from its name"
    name = kernel.lower()
    if name.startswith('triton_'): return 'fused by the compiler'    # it lists the operators that it fused
    return next((kind for kind, words in KINDS if any(w in name for w in words)),
                'elementwise, sums, indexing')

def kernels(p)->Counter:
    "Microseconds of each kernel in a profile; on a CPU of each operator by itself"
    found = Counter()
    # spans that a profile draws over kernels
    marks = ('ProfilerStep', 'Optimizer.', 'Torch-Compiled', '## Call', 'step')
    for e in p.events():
        on_gpu = e.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu and not getattr(e, 'is_user_annotation', False) and not e.name.startswith(marks):
            found[e.name] += e.time_range.elapsed_us()
    return found or Counter({e.key: e.self_cpu_time_total for e in p.key_averages()
                             if e.self_cpu_time_total > 0})

def profile(desk):
    "Two steps of ours under the profiler: shares by kind of kernel, and the longest ones"
    from torch.profiler import ProfilerActivity, profile as record
    config = ModelConfig(2048, 8, 16) if desk.gpu else MINI
    contest = Contest(desk, 'the step that was looked at', config, 8)
    attention = picked(desk, config)
    for compiled in ('', 'blocks') if desk.gpu else ('',):
        who = Contestant('llama_nb', 'linear', compiled, 4, attention)
        contest.enter(who, 3 if desk.gpu else 1, 3 if desk.gpu else 1)
        if who not in contest.passes: continue
        with record(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA]*desk.gpu]) as p:
            for _ in range(2): contest.step(who)
            wait(desk)
        shares(desk, who, kernels(p), 2*statistics.median(contest.seconds[who]))
        loss_share(desk, contest, who)
        keep_trace(desk, p, f'trace{"-compiled"*bool(compiled)}.json.gz')

def shares(desk, who:Contestant, found:Counter, seconds:float):
    total, kinds = sum(found.values()), Counter()
    for name, us in found.items(): kinds[kind_of(name)] += us
    for kind, us in kinds.most_common():
        desk.row(f'shares, {who.name}', kind, share=us/total, ms_a_step=us/2000)
    desk.row(f'shares, {who.name}', 'all kernels, and their share of the time that the step takes',
             share=total/1e6/seconds, ms_a_step=total/2000)
    for i, (name, us) in enumerate(found.most_common(15), 1):
        desk.row(f'longest kernels, {who.name}', f'{i}. {name[:110]}', kind=kind_of(name), share=us/total,
                 ms_a_step=us/2000)

def loss_share(desk, contest:Contest, who:Contestant):
    "The loss by itself, forward and backward, at the same size: its share of the step"
    from llama_nb.model.chunked_loss import chunked_loss_sum
    c, weight = contest.config, contest.base.output.weight
    compiler = 'inductor' if who.compiled else None
    hidden = torch.randn(who.micro, c.max_seq_len, c.dim, device=weight.device, dtype=contest.dtype,
                         requires_grad=True)
    targets = torch.randint(c.vocab_size, hidden.shape[:2], device=weight.device)
    def both(): chunked_loss_sum(hidden, weight, targets, compiler=compiler).backward()
    ms = median_ms(desk, both)*contest.batch/who.micro
    contest.optimizer.zero_grad(set_to_none=True)
    desk.row(f'shares, {who.name}', 'of that the loss, measured by itself',
             share=ms/1000/statistics.median(contest.seconds[who]), ms_a_step=ms)

def keep_trace(desk, p, name:str):
    "The trace for chrome://tracing or perfetto, if it is small when packed"
    import gzip
    desk.out.mkdir(exist_ok=True)
    plain = desk.work/'trace.json'
    p.export_chrome_trace(str(plain))
    packed = gzip.compress(plain.read_bytes())
    plain.unlink()
    if len(packed) < 700_000: (desk.out/name).write_bytes(packed)
    else:
        desk.skip(name, f'{len(packed)/1e6:.1f} MB are too many to keep')
