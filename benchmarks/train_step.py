"""Speed and memory of one training step: this package, transformers' LlamaForCausalLM, and the matrix products alone.

Same sizes, same batches, same loss, fused AdamW on both sides. Each contestant is a process of its own, so that peak memory is its own; they take turns, one step
each, so that whatever else the machine does hits all alike. Writes benchmarks/NAME.md and .json, one row with every setting for each contestant.

    python benchmarks/train_step.py --help
    python benchmarks/train_step.py --dim 4096 --layers 32 --heads 32 --vocab 32000 --seq 2048 --batch 8 --micro 1 --dtype bfloat16 --no-together --name train_step_7B
"""
import json, platform, resource, statistics, subprocess, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
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
    minutes:float=7.          # stop measuring after this time, with the rounds that are done by then
    device:str='auto'         # auto, cpu, cuda
    dtype:str='float32'       # of the matrix products; weights and optimiser stay float32
    attention:str='auto'      # auto, reference, sdpa, xformers, ...
    modes:tuple[str, ...]=('none', 'linear', 'manual') # recompute modes of ours
    compiled:bool=True        # also measure with torch.compile
    compiled_modes:tuple[str, ...]=('none', 'budget')  # recompute modes of ours there
    budget:float=0.5          # of mode budget
    together:bool=True        # all contestants in memory at once, taking turns step by step; no: one process after the other, for sizes of which only one fits
    name:str='train_step'     # of the table

@dataclass(frozen=True)
class Contestant:
    code:str                  # llama_nb, transformers, or matrix products alone
    recompute:str='none'
    compiled:bool=False
    prepared:bool=False       # by llama_nb.train.host.prepare_host: freed memory is kept, and products use the whole width of the registers
    @property
    def name(self): return ', '.join([self.code, *[f'recompute {self.recompute}']*(self.recompute != 'none'), *['compiled']*self.compiled, *['host prepared']*(self.prepared and self.code != 'llama_nb'),
                                        *['host as it comes']*(not self.prepared and self.code == 'llama_nb')])

def contestants(s):
    "Who takes part: on a CPU ours prepares the host as its trainer does, and transformers runs as it comes and on a prepared host too"
    cpu = device_of(s).type == 'cpu'
    found = [Contestant('matrix products alone', prepared=prepared) for prepared in (False, True)[:1 + cpu]]
    for compiled in (False, True)[:1 + s.compiled]:
        found += [Contestant('llama_nb', mode, compiled, True) for mode in (s.compiled_modes if compiled else s.modes)]
        if cpu and not compiled: found.append(Contestant('llama_nb'))
        found += [Contestant('transformers', 'none', compiled, prepared) for prepared in (False, True)[:1 + cpu]]
    return found

def device_of(s):
    from llama_nb.core import pick_device
    return pick_device(s.device)

def model_config(s):
    from llama_nb.config import ModelConfig
    return ModelConfig(s.dim, s.layers, s.heads, vocab_size=s.vocab, multiple_of=32 if s.dim < 1024 else 256, max_seq_len=s.seq)

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
    config = LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
                         rms_norm_eps=c.norm_eps, max_position_embeddings=c.max_seq_len, tie_word_embeddings=False, use_cache=False)
    with device: model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == c.n_params
    if who.compiled: model.compile()
    def run(inputs, targets):
        total = 0.
        for x, y in zip(inputs.split(s.micro or s.batch), targets.split(s.micro or s.batch)):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32): logits = model(x).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction='sum')/targets.numel()
            loss.backward()
            total = total + loss.detach()
        return total
    return model, run

def training_step(s, who, device, dtype):
    "A function that makes one optimiser step and returns the loss; and the bytes of weights and optimiser"
    import torch
    from llama_nb.config import OptimConfig
    from llama_nb.train.optim import clip_grad_norm, make_optimizer
    torch.manual_seed(0)
    model, run = (our_step if who.code == 'llama_nb' else their_step)(s, who, device, dtype)
    optimizer, generator = make_optimizer(model, OptimConfig()), torch.Generator().manual_seed(1)
    def step():
        rows = torch.randint(s.vocab, (s.batch, s.seq + 1), generator=generator).to(device)
        loss = run(rows[:, :-1], rows[:, 1:])
        clip_grad_norm(model.parameters(), 1.); optimizer.step(); optimizer.zero_grad(set_to_none=True)
        return loss
    return step, 12*sum(p.numel() for p in model.parameters())

def products_step(s, device, dtype):
    "The products of the linear layers, forward and backward, and nothing else"
    from llama_nb.scale.flops import _three_products, model_products
    shapes = model_products(model_config(s), (s.micro or s.batch)*s.seq)*(s.batch//(s.micro or s.batch))
    runs = {shape: _three_products(*shape, dtype, device) for shape in set(shapes)}
    def step():
        for shape in shapes: runs[shape]()
    return step

def peak_of_tensors(step, device, held):
    "Bytes that tensors occupy at the worst moment of a step: as the allocator says on a GPU, from the profiler's record of allocations on a CPU"
    import torch
    from torch.profiler import ProfilerActivity, profile
    if device.type == 'cuda': step(); return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: step()
    now = top = 0
    for e in sorted((e for e in p.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns()): now += e.nbytes(); top = max(top, now)
    return held + top

def worker(s, who):
    "One step for each line on stdin; answer with seconds, page faults, peak memory and loss. The line `memory` asks for the peak of the tensors"
    import torch
    from llama_nb.core import pick_dtype
    from llama_nb.train.host import prepare_host
    device, dtype = device_of(s), pick_dtype(s.dtype)
    if who.prepared and device.type == 'cpu': prepare_host()
    if who.code.startswith('matrix'): step, held = products_step(s, device, dtype), 0
    else: step, held = training_step(s, who, device, dtype)
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    print('ready', flush=True)
    for line in sys.stdin:
        before = resource.getrusage(resource.RUSAGE_SELF)
        if line == 'memory\n': print(json.dumps({'process_mb': before.ru_maxrss*1024/1e6, 'tensors_mb': peak_of_tensors(step, device, held)/1e6}), flush=True); continue
        wait(); start = time.perf_counter(); loss = step(); wait()
        seconds, faults = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before.ru_minflt
        print(json.dumps({'seconds': seconds, 'faults': faults, 'loss': loss if loss is None else loss.item()}), flush=True)

def start(s, who):
    w = subprocess.Popen([sys.executable, __file__, '--worker', json.dumps(asdict(s)), json.dumps(asdict(who))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    w.stdout.readline()
    return w

def ask(w, line='step'):
    w.stdin.write(f'{line}\n'); w.stdin.flush()
    answer = w.stdout.readline()
    if not answer: raise SystemExit('a contestant ended early; its message is above')
    return json.loads(answer)

def measure(s, who_all):
    "contestant -> (answers of the measured rounds, memory)"
    end, answers, memory = time.monotonic() + 60*s.minutes, {who: [] for who in who_all}, {}
    for group in [who_all] if s.together else [[who] for who in who_all]:
        workers, share = {who: start(s, who) for who in group}, end if s.together else time.monotonic() + 60*s.minutes/len(who_all)
        for i in range(s.rounds + WARM_UP):
            got = {who: ask(w) for who, w in workers.items()}
            if i >= WARM_UP:
                for who, answer in got.items(): answers[who].append(answer)
                if time.monotonic() > share: break
        for who, w in workers.items(): memory[who] = ask(w, 'memory'); w.stdin.close(); w.wait(60)
    return {who: (answers[who], memory[who]) for who in who_all}

def cpu_name():
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    return next((l.split(':')[1].strip() for l in lines if l.startswith('model name')), platform.processor())

def device_name(s):
    import torch
    return torch.cuda.get_device_name() if device_of(s).type == 'cuda' else f'{cpu_name()}, {torch.get_num_threads()} threads'

def peak_of(s, products):
    "The peak for MFU: published for a GPU, the median of the matrix products in this run for a CPU"
    from llama_nb.scale.flops import Peak, device_peak, model_products
    if device_of(s).type == 'cuda': return device_peak(device_name(s), s.dtype)
    return Peak(sum(6*n*k*m for n, k, m in model_products(model_config(s), s.batch*s.seq))/products, 'cpu', s.dtype, 'measured')

def row(s, who, got, memory, base, peak):
    "Every setting and every number of one contestant"
    from llama_nb.scale.flops import hfu, mfu
    median = statistics.median(a['seconds'] for a in got)
    numbers = {'rounds': len(got), 'median_ms': 1000*median, 'best_ms': 1000*min(a['seconds'] for a in got), 'faults': statistics.median(a['faults'] for a in got), **memory}
    if who.code.startswith('matrix'): return {**asdict(who), **numbers, 'gflops': peak.flops/1e9 if peak.source == 'measured' else None}
    rate, c = s.batch*s.seq/median, model_config(s)
    return {**asdict(who), 'attention': s.attention if who.code == 'llama_nb' else 'sdpa', **numbers, 'tokens_per_second': rate, 'ratio': base[who.compiled]/median,
            'mfu': mfu(rate, c, s.seq, peak).share, 'hfu': None if who.recompute == 'budget' else hfu(rate, c, s.seq, peak, who.recompute).share, 'loss': got[-1]['loss']}

def table(rows):
    lines = ['| | attention | tokens/s | of transformers | MFU | HFU | median ms | page faults a step | peak of tensors, MB | peak of the process, MB |', '|---|---|---|---|---|---|---|---|---|---|']
    for name, r in rows.items():
        if 'mfu' not in r: lines.append(f'| {name} | | | | | | {r["median_ms"]:.0f} | | | |'); continue
        lines.append(f'| {name} | {r["attention"]} | {r["tokens_per_second"]:,.0f} | {r["ratio"]:.2f} | {r["mfu"]:.0%} | {"" if r["hfu"] is None else format(r["hfu"], ".0%")} | {r["median_ms"]:.0f} | {r["faults"]:,.0f} | {r["tensors_mb"]:,.0f} | {r["process_mb"]:,.0f} |')
    return lines

def main(s):
    import torch, transformers
    got, c = measure(s, contestants(s)), model_config(s)
    medians = {who: statistics.median(a['seconds'] for a in answers) for who, (answers, _) in got.items()}
    base = {who.compiled: m for who, m in medians.items() if who.code == 'transformers' and not who.prepared}
    peak = peak_of(s, min(m for who, m in medians.items() if who.code.startswith('matrix')))
    rows = {who.name: row(s, who, *got[who], base, peak) for who in got}
    about = {**asdict(s), 'n_params': c.n_params, 'device_name': device_name(s), 'python': platform.python_version(), 'torch': torch.__version__, 'transformers': transformers.__version__, 'date': time.strftime('%Y-%m-%d'),
             'peak': str(peak), 'convention': 'matrices, attention'}
    (HERE/f'{s.name}.json').write_text(json.dumps({'settings': about, 'rows': rows}, indent=1) + '\n')
    lines = ['# One training step', '', f'Measured {about["date"]} on {about["device_name"]}, Python {about["python"]}, torch {about["torch"]}, transformers {about["transformers"]}. '
             f'{c.n_params:,} parameters (width {s.dim}, {s.layers} layers, {s.heads} heads, vocabulary {s.vocab}), {s.batch} sequences of {s.seq} tokens, {s.micro or s.batch} at a time, {s.dtype}; forward, backward, clipping and fused AdamW. '
             f'Medians of {min(len(a) for a, _ in got.values())} rounds, one process each, ' + ('taking turns step by step.' if s.together else 'one after the other.'), '', *table(rows), '',
             f'MFU and HFU count {"6 a matrix weight and 12 t d a layer and token"} (HFU: recomputed products too; empty where the compiler decides what to repeat), of {peak}' + (', the better of the two rates of "matrix products alone" in this run.' if peak.source == 'measured' else '.'), '']
    if device_of(s).type == 'cpu':
        from llama_nb.train.host import wide_products_problem
        lines += ['llama_nb runs as its trainer runs it, which prepares the host (`llama_nb.train.host`): glibc keeps freed memory, and large float32 products go to oneDNN where oneMKL would use half of the registers'
                  + (f' (not here: {problem})' if (problem := wide_products_problem()) else '') + '; "host prepared" does the same for the others. The peak of the process holds the imported libraries too. GPU: not measured.', '']
    lines += ['Compiled rows are compared with transformers compiled. Made by `python benchmarks/train_step.py`.']
    (HERE/f'{s.name}.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))

if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']: worker(Settings(**json.loads(sys.argv[2])), Contestant(**json.loads(sys.argv[3])))
    else:
        import tyro
        main(tyro.cli(Settings))
