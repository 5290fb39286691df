"""Speed and memory of one training step: this package, transformers' LlamaForCausalLM, and what both cannot
do without: the matrix multiplications alone, and those with the attention kernel.

Same sizes, same batches, same loss, fused AdamW on both sides. Each contestant is a process of its own, so
that peak memory is its own; they take turns, one step each, so that whatever else the machine does hits all
alike. Each precision that the hardware multiplies natively is measured by itself, transformers in the same
one. Writes benchmarks/NAME.md and .json, one row with every setting for each contestant.

    python benchmarks/train_step.py --help
    python benchmarks/train_step.py --quick
    python benchmarks/train_step.py --dim 4096 --layers 32 --heads 32 --vocab 32000 --seq 2048 --batch 8 \\
        --micro 1 --dtype bfloat16 --no-together --name train_step_7B
"""
import json, os, platform, resource, statistics, subprocess, sys, time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ.setdefault('KINETO_LOG_LEVEL', '99')             # the profiler's own messages
WARM_UP = 3

@dataclass(frozen=True)
class Settings:
    "One training step: this package beside transformers"
    dim:int=256
    layers:int=6
    heads:int=8
    vocab:int=4096
    batch:int=8               # sequences in a step
    micro:int=0               # sequences in one forward and backward pass; 0 = all of the batch
    seq:int=256               # tokens in a sequence
    rounds:int=25             # measured steps of each contestant
    minutes:float=9.          # stop measuring after this time, with the rounds that are done by then
    quick:bool=False          # 7 rounds and 3 minutes: a look, not a measurement
    device:str='auto'         # auto, cpu, cuda
    # of the matrix multiplications, float32 or bfloat16; auto: each that is native here. Weights stay float32
    dtype:str='auto'
    attention:str='auto'      # auto, reference, sdpa, xformers, ...
    modes:tuple[str, ...]=('none', 'linear', 'full') # recompute modes of ours
    compiled:bool=True        # also measure with torch.compile
    compiled_modes:tuple[str, ...]=('none', 'linear', 'budget', 'full')  # recompute modes of ours there
    budget:float=0.5          # of mode budget
    # all contestants in memory at once, taking turns step by step; no: one process after the other, for
    # sizes of which only one fits
    together:bool=True
    name:str='train_step'     # of the table

THEIR_WORDS = {'full': 'gradient checkpointing', 'budget': 'memory budget'}
ALONE, CORE = 'matrix multiplications alone', 'matrix multiplications and attention alone'

@dataclass(frozen=True)
class Contestant:
    code:str                  # llama_nb, transformers, ALONE or CORE
    recompute:str='none'
    compiled:bool=False
    prepared:bool=False       # by llama_nb.train.host.prepare_host, as the command line does
    dtype:str='float32'

    @property
    def alone(self): return self.code in (ALONE, CORE)

    @property
    def name(self):
        words = [self.code]
        if self.recompute != 'none':
            words.append(f'recompute {self.recompute}' if self.code == 'llama_nb'
                         else THEIR_WORDS[self.recompute])
        if self.compiled: words.append('compiled')
        if self.prepared and self.code != 'llama_nb': words.append('host prepared')
        if not self.prepared and self.code == 'llama_nb': words.append('host as it comes')
        return ', '.join(words)

def contestants(s, dtype, wide):
    """Who takes part in one precision: on a CPU ours prepares the host as its command line does, and
    transformers runs as it comes and on a prepared host too; where ours multiplies again, it does too"""
    cpu = device_of(s).type == 'cpu'
    found = [Contestant(ALONE, prepared=prepared) for prepared in (False, True)[:1 + wide]]
    found.append(Contestant(CORE, prepared=cpu))
    for compiled in (False, True)[:1 + s.compiled]:
        modes = s.compiled_modes if compiled else s.modes
        found += [Contestant('llama_nb', mode, compiled, cpu) for mode in modes]
        if cpu and not compiled: found.append(Contestant('llama_nb'))
        found += [Contestant('transformers', 'none', compiled, prepared)
                  for prepared in (False, True)[:1 + cpu]]
        found += [Contestant('transformers', mode, compiled) for mode in modes if mode in THEIR_WORDS]
    return [replace(who, dtype=dtype) for who in found]

def dtypes_of(s):
    "The precisions to measure"
    from llama_nb.core import native_bfloat16
    if s.dtype != 'auto': return [s.dtype]
    return ['float32', 'bfloat16'] if native_bfloat16(device_of(s)) else ['float32']

def bfloat16_costs(s):
    "How many times as long the first multiplication of a feed-forward takes in bfloat16 as in float32"
    import torch
    from torch.utils.benchmark import Timer
    c, took = model_config(s), {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(s.batch*s.seq, c.dim, dtype=dtype), torch.ones(c.ffn_dim, c.dim, dtype=dtype)
        took[dtype] = Timer('F.linear(x, w)', globals={'F': torch.nn.functional, 'x': x, 'w': w},
                            num_threads=torch.get_num_threads()).blocked_autorange(min_run_time=1).median
    return took[torch.bfloat16]/took[torch.float32]

def device_of(s):
    from llama_nb.core import pick_device
    return pick_device(s.device)

def model_config(s):
    from llama_nb.config import ModelConfig
    return ModelConfig(s.dim, s.layers, s.heads, vocab_size=s.vocab, multiple_of=32 if s.dim < 1024 else 256,
                       max_seq_len=s.seq)

def our_step(s, who, device, dtype):
    "The model, and a function that goes forward and backward through a batch and returns the mean loss"
    from llama_nb.model.transformer import LLaMA
    from llama_nb.train.recompute import apply_recompute
    from llama_nb.train.trainer import accumulate
    model = LLaMA(model_config(s)).to(device)
    for layer in model.layers: layer.attention.backend = s.attention
    apply_recompute(model, who.recompute, s.budget)
    for layer in model.layers if who.compiled else (): layer.compile()
    return model, lambda x, y: accumulate(model, x, y, s.micro or s.batch, dtype)

def their_step(s, who, device, dtype):
    "The same for transformers"
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    c = model_config(s)
    config = LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim,
                         num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
                         rms_norm_eps=c.norm_eps, max_position_embeddings=c.max_seq_len,
                         tie_word_embeddings=False, use_cache=False)
    with device: model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == c.n_params
    # of this process, in which nothing else is compiled
    if who.recompute == 'budget': torch._functorch.config.activation_memory_budget = s.budget
    if who.recompute == 'full':
        getattr(model, 'activation_checkpointing_enable', model.gradient_checkpointing_enable)()
    model.train()
    if who.compiled: model.compile()
    def run(inputs, targets):
        total = 0.
        for x, y in zip(inputs.split(s.micro or s.batch), targets.split(s.micro or s.batch)):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32): logits = model(x).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), y.flatten(),
                                                     reduction='sum')/targets.numel()
            loss.backward()
            total = total + loss.detach()
        return total
    return model, run

def training_step(s, who, device, dtype):
    "A function that makes one optimiser step and returns the loss; and the bytes of weights and optimiser"
    import torch
    from llama_nb.settings import OptimConfig
    from llama_nb.train.optim import clip_grad_norm, make_optimizer
    torch.manual_seed(0)
    model, run = (our_step if who.code == 'llama_nb' else their_step)(s, who, device, dtype)
    optimizer, generator = make_optimizer(model, OptimConfig()), torch.Generator().manual_seed(1)
    def step():
        rows = torch.randint(s.vocab, (s.batch, s.seq + 1), generator=generator).to(device)
        loss = run(rows[:, :-1], rows[:, 1:])
        clip_grad_norm(model.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss
    return step, 12*sum(p.numel() for p in model.parameters())

def matmuls_step(s, device, dtype, attention):
    "What linear layers multiply, forward and backward, and attention's kernel if asked; nothing else"
    import torch
    from llama_nb.scale.flops import linear_shapes, three_matmuls
    shapes = linear_shapes(model_config(s), (s.micro or s.batch)*s.seq)*(s.batch//(s.micro or s.batch))
    runs = {shape: three_matmuls(*shape, dtype, device) for shape in set(shapes)}
    c, rows = model_config(s), s.micro or s.batch
    q, k, v = (torch.randn(rows, s.seq, c.n_heads, c.head_dim, device=device,
                           dtype=dtype).transpose(1, 2).requires_grad_()
               for _ in range(3))
    def attend():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, (q, k, v), out.detach())
    def step():
        for shape in shapes: runs[shape]()
        for _ in range(c.n_layers*(s.batch//rows) if attention else 0): attend()
    return step

def peak_of_tensors(step, device, held):
    """Bytes that tensors occupy at the worst moment of a step: as the allocator says on a GPU, from the
    profiler's record of allocations on a CPU"""
    import torch
    from torch.profiler import ProfilerActivity, profile
    if device.type == 'cuda':
        step()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: step()
    now = top = 0
    for e in sorted((e for e in p.profiler.kineto_results.events() if e.name() == '[memory]'),
                    key=lambda e: e.start_ns()):
        now += e.nbytes()
        top = max(top, now)
    return held + top

def worker(s, who, verdict):
    """One step for each line on stdin; answer with seconds, page faults, peak memory and loss. The line
    `memory` asks for the peak of the tensors"""
    from llama_nb.core import pick_dtype, synchronizer
    from llama_nb.train.host import prepare_host
    device, dtype = device_of(s), pick_dtype(who.dtype)
    if who.prepared and device.type == 'cpu': prepare_host(verdict)
    if who.alone: step, held = matmuls_step(s, device, dtype, who.code == CORE), 0
    else:
        step, held = training_step(s, who, device, dtype)
    wait = synchronizer(device)
    print('ready', flush=True)
    for line in sys.stdin:
        before = resource.getrusage(resource.RUSAGE_SELF)
        if line == 'memory\n':
            print(json.dumps({'process_mb': before.ru_maxrss*1024/1e6,
                              'tensors_mb': peak_of_tensors(step, device, held)/1e6}), flush=True)
            continue
        wait()
        start = time.perf_counter()
        loss = step()
        wait()
        seconds, faults = (time.perf_counter() - start,
                           resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before.ru_minflt)
        print(json.dumps({'seconds': seconds, 'faults': faults, 'loss': loss if loss is None
                          else loss.item()}), flush=True)

def start(s, who, verdict):
    told = [json.dumps(x) for x in (asdict(s), asdict(who), verdict)]
    w = subprocess.Popen([sys.executable, __file__, '--worker', *told], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
    w.stdout.readline()
    return w

def ask(w, line='step'):
    w.stdin.write(f'{line}\n')
    w.stdin.flush()
    answer = w.stdout.readline()
    if not answer: raise SystemExit('a contestant ended early; its message is above')
    return json.loads(answer)

def measure(s, who_all, verdict, minutes):
    "contestant -> (answers of the measured rounds, memory)"
    end, answers, memory = time.monotonic() + 60*minutes, {who: [] for who in who_all}, {}
    for group in [who_all] if s.together else [[who] for who in who_all]:
        workers = {who: start(s, who, verdict) for who in group}
        share = end if s.together else time.monotonic() + 60*minutes/len(who_all)
        for i in range(s.rounds + WARM_UP):
            got = {who: ask(w) for who, w in workers.items()}
            if i >= WARM_UP:
                for who, answer in got.items(): answers[who].append(answer)
                if time.monotonic() > share: break
        for who, w in workers.items():
            memory[who] = ask(w, 'memory')
            w.stdin.close()
            w.wait(60)
    return {who: (answers[who], memory[who]) for who in who_all}

def cpu_name():
    "Maker, family, model and name of the processor, and what PyTorch makes of its registers"
    import torch
    from llama_nb.core import native_bfloat16
    from llama_nb.train.host import processor
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    named = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')),
                 platform.processor())
    native = 'native' if native_bfloat16() else 'no native'
    width = f'{torch.backends.cpu.get_cpu_capability()}, {native} bfloat16'
    return f'{named} ({processor()}; {width})'

def device_name(s):
    import torch
    if device_of(s).type == 'cuda': return torch.cuda.get_device_name()
    return f'{cpu_name()}, {torch.get_num_threads()} threads'

def peak_of(s, dtype, seconds):
    "The peak for MFU: published for a GPU, from the matrix multiplications of this run for a CPU"
    from llama_nb.scale.flops import Peak, device_peak, linear_shapes
    if device_of(s).type == 'cuda': return device_peak(device_name(s), dtype)
    flops = sum(6*n*k*m for n, k, m in linear_shapes(model_config(s), s.batch*s.seq))
    return Peak(flops/seconds, 'cpu', dtype, 'measured')

def row(s, who, got, memory, base, peak):
    "Every setting and every number of one contestant"
    from llama_nb.scale.flops import hfu, mfu
    median = statistics.median(a['seconds'] for a in got)
    numbers = {'rounds': len(got), 'median_ms': 1000*median, 'best_ms': 1000*min(a['seconds'] for a in got),
               'faults': statistics.median(a['faults'] for a in got), **memory}
    if who.alone:
        return {**asdict(who), **numbers, 'gflops': peak.flops/1e9 if peak.source == 'measured' else None}
    rate, c = s.batch*s.seq/median, model_config(s)
    attention = s.attention if who.code == 'llama_nb' else 'sdpa'
    hardware = None if who.recompute == 'budget' else hfu(rate, c, s.seq, peak, who.recompute).share
    return {**asdict(who), 'attention': attention, **numbers, 'tokens_per_second': rate,
            'ratio': base[who.compiled, who.recompute if who.recompute in THEIR_WORDS else 'none']/median,
            'mfu': mfu(rate, c, s.seq, peak).share, 'hfu': hardware, 'loss': got[-1]['loss']}

def table(rows):
    lines = ['| | attention | tokens/s | of transformers | MFU | HFU | median ms | page faults per step '
             '| peak of tensors, MB | peak of the process, MB |', '|---|---|---|---|---|---|---|---|---|---|']
    for name, r in rows.items():
        if 'mfu' not in r:
            lines.append(f'| {name} | | | | | | {r["median_ms"]:.0f} | | | |')
            continue
        lines.append(
            f'| {name} | {r["attention"]} | {r["tokens_per_second"]:,.0f} | {r["ratio"]:.2f} | '
            f'{r["mfu"]:.0%} | {"" if r["hfu"] is None else format(r["hfu"], ".0%")} | {r["median_ms"]:.0f} '
            f'| {r["faults"]:,.0f} | {r["tensors_mb"]:,.0f} | {r["process_mb"]:,.0f} |')
    return lines

def medians_of(got):
    return {who: statistics.median(a['seconds'] for a in answers) for who, (answers, _) in got.items()}

def rows_of(s, dtype, got):
    "The rows of one precision, and the peak they are compared with"
    medians = medians_of(got)
    base = {(who.compiled, who.recompute): m for who, m in medians.items() if who.code == 'transformers'
            and not who.prepared}
    peak = peak_of(s, dtype, min(m for who, m in medians.items() if who.code == ALONE))
    return {who.name: row(s, who, *got[who], base, peak) for who in got}, peak

def headline(dtype, rows):
    "What the table says, in words"
    ours = {name: r for name, r in rows.items() if r['code'] == 'llama_nb'
            and r['prepared'] == rows[core_name(rows)]['prepared']}
    best = {r['compiled']: r['ratio'] for r in ours.values() if r['recompute'] == 'none'}
    least = min(ours, key=lambda name: ours[name]['ratio'])
    core, mine, theirs = (rows[name]['median_ms'] for name in (core_name(rows), 'llama_nb', 'transformers'))
    compiled = f', {best[True]:.2f} compiled' if True in best else ''
    return (f'**{dtype}: {best[False]:.2f} times transformers{compiled}.** The least of all modes is '
            f'{ours[least]["ratio"]:.2f} ({least}). '
            f'Matrix multiplications and the attention kernel, which both programs call, are {core/mine:.0%} '
            f'of our step: with everything else for nothing it would be {theirs/core:.2f}.')

def core_name(rows): return next(name for name, r in rows.items() if r['code'] == CORE)

def report_of(s, about, tables, verdict):
    "The lines of NAME.md"
    cpu = device_of(s).type == 'cpu'
    turns = 'taking turns step by step' if s.together else 'one after the other'
    lines = ['# One training step', '',
             f'Measured {about["date"]} on {about["device_name"]}, Python {about["python"]}, torch '
             f'{about["torch"]}, '
             f'transformers {about["transformers"]}. {about["n_params"]:,} parameters (width {s.dim}, '
             f'{s.layers} layers, '
             f'{s.heads} heads, vocabulary {s.vocab}), {s.batch} sequences of {s.seq} tokens, '
             f'{s.micro or s.batch} at a time; '
             f'forward, backward, clipping and fused AdamW. Medians of {about["measured_rounds"]} rounds, '
             f'one process each, {turns}.', '']
    for dtype, (rows, peak) in tables.items(): lines += [headline(dtype, rows), '']
    if 'bfloat16_costs' in about:
        lines += ['bfloat16 was not measured: this hardware has no instructions for it. A matrix '
                  f'multiplication of the feed-forward takes {about["bfloat16_costs"]:.0f} times as long in '
                  'it as in float32, so `train.dtype = "auto"` is float32 here.', '']
    elif 'bfloat16' not in tables:
        lines += ['bfloat16 was not measured.', '']
    for dtype, (rows, peak) in tables.items():
        measured = f', the better rate of "{ALONE}" in this run'*(peak.source == 'measured')
        lines += [f'## {dtype}', '', *table(rows), '', f'MFU and HFU are shares of {peak}{measured}.', '']
    lines += ['"Of transformers" compares with transformers as it comes in the same precision, compiled rows '
              'with it compiled, and modes that repeat multiplications by design with the same in '
              'transformers: recompute full with its gradient checkpointing, budget with the same memory '
              'budget of the compiler. '
              'MFU and HFU count 6 per matrix weight and 12 t d per layer and token (HFU: repeated '
              'multiplications too; empty where the '
              'compiler decides what to repeat).', '']
    if cpu:
        from llama_nb.train.host import prepare_host
        lines += ['llama_nb runs as its command line runs it, which prepares the host '
                  '(`llama_nb.train.host`): glibc keeps freed '
                  'memory, and the faster library multiplies. Here: ' + prepare_host(verdict)
                  + '. "Host prepared" does the same '
                  'for the others. The peak of the process holds the imported libraries too. GPU: not '
                  'measured.', '']
    return [*lines, 'Made by `python benchmarks/train_step.py`.']

def main(s):
    import torch, transformers
    from llama_nb.train.host import judge_matmul
    if s.quick:
        s = replace(s, rounds=7, minutes=3., name=f'{s.name}_quick' if s.name == 'train_step' else s.name)
    verdict, dtypes = judge_matmul() if device_of(s).type == 'cpu' else {'wide': False}, dtypes_of(s)
    tables, rounds = {}, []
    for dtype in dtypes:
        got = measure(s, contestants(s, dtype, verdict['wide']), verdict, s.minutes/len(dtypes))
        tables[dtype] = rows_of(s, dtype, got)
        rounds.append(min(len(answers) for answers, _ in got.values()))
    c = model_config(s)
    about = {**asdict(s), 'n_params': c.n_params, 'device_name': device_name(s),
             'python': platform.python_version(),
             'torch': torch.__version__, 'transformers': transformers.__version__,
             'date': time.strftime('%Y-%m-%d'),
             'measured_rounds': min(rounds), 'host': verdict, 'convention': 'matrices, attention'}
    if s.dtype == 'auto' and 'bfloat16' not in dtypes: about['bfloat16_costs'] = bfloat16_costs(s)
    about['load'] = os.getloadavg()[0] if hasattr(os, 'getloadavg') else None
    results = {dtype: {'peak': str(peak), 'rows': rows} for dtype, (rows, peak) in tables.items()}
    results = {'settings': about, **next(iter(results.values())), 'precisions': results}
    (HERE/f'{s.name}.json').write_text(json.dumps(results, indent=1) + '\n')
    lines = report_of(s, about, tables, verdict)
    (HERE/f'{s.name}.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))

if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']:
        worker(Settings(**json.loads(sys.argv[2])), Contestant(**json.loads(sys.argv[3])),
               json.loads(sys.argv[4]))
    else:
        import tyro
        main(tyro.cli(Settings))
