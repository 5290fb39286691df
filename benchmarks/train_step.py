"""Speed and memory of one training step: this package against transformers' LlamaForCausalLM.

Same sizes, same batches, same loss (ours in chunks, as the trainer computes it), fused AdamW on both sides. Each contestant is a process of its own, so that peak memory is its own; they take
turns, one step each, so that whatever else the machine does hits all alike. Writes benchmarks/train_step.md and .json.

    python benchmarks/train_step.py --help
"""
import json, os, platform, resource, statistics, subprocess, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
KEEP = {'MALLOC_MMAP_THRESHOLD_': str(2**30), 'MALLOC_TRIM_THRESHOLD_': str(2**34), 'MALLOC_TOP_PAD_': str(2**26)}

@dataclass(frozen=True)
class Settings:
    "One training step: this package beside transformers"
    dim:int=256
    layers:int=6
    heads:int=8
    vocab:int=4096
    batch:int=8               # sequences in a step
    seq:int=256               # tokens in a sequence
    rounds:int=20             # measured steps of each contestant
    device:str='auto'         # auto, cpu, cuda
    dtype:str='float32'       # of the matrix products; weights and optimiser stay float32
    compiled:bool=True        # also measure with torch.compile
    peak_tflops:float=0.      # of the device, for MFU; 0 = not stated
    name:str='train_step'     # of the table

CONTESTANTS = {'llama_nb': ('ours', False, {}), 'llama_nb, recompute linear': ('linear', False, {}), 'llama_nb, recompute manual': ('manual', False, {}), 'transformers': ('theirs', False, {}), 'transformers, glibc keeps memory': ('theirs', False, KEEP),
               'llama_nb, compiled': ('ours', True, {}), 'transformers, compiled': ('theirs', True, {}), 'transformers, compiled, glibc keeps memory': ('theirs', True, KEEP)}

def model_config(s):
    from llama_nb.config import ModelConfig
    return ModelConfig(s.dim, s.layers, s.heads, vocab_size=s.vocab, multiple_of=32 if s.dim < 1024 else 256, max_seq_len=s.seq)

def build(s, kind, compiled, device):
    "The model, and a function (inputs, targets) -> summed loss"
    import torch
    torch.manual_seed(0)
    c = model_config(s)
    if kind != 'theirs':
        from llama_nb.model.transformer import LLaMA
        from llama_nb.train.loss import chunked_loss_sum
        from llama_nb.train.recompute import apply_recompute
        from llama_nb.train.trainer import keep_freed_memory
        if device.type == 'cpu': keep_freed_memory()                     # as the trainer does
        model = LLaMA(c).to(device)
        apply_recompute(model, 'none' if kind == 'ours' else kind)
        for layer in model.layers if compiled else (): layer.compile()
        return model, lambda x, y: chunked_loss_sum(model.hidden(x).to(torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32), model.output.weight, y)
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
                                         rms_norm_eps=c.norm_eps, max_position_embeddings=c.max_seq_len, tie_word_embeddings=False, use_cache=False)).to(device)
    assert sum(p.numel() for p in model.parameters()) == c.n_params
    if compiled: model.compile()
    return model, lambda x, y: torch.nn.functional.cross_entropy(model(x).logits.float().flatten(0, 1), y.flatten(), reduction='sum')

def worker(s, kind, compiled):
    "Train one step for each line on stdin; answer with seconds, page faults, peak memory and loss"
    import torch
    from llama_nb.config import OptimConfig
    from llama_nb.core import pick_device, pick_dtype
    from llama_nb.train.optim import clip_grad_norm, make_optimizer
    device, dtype, config = pick_device(s.device), pick_dtype(s.dtype), OptimConfig()
    model, loss_of = build(s, kind, compiled, device)
    optimizer, generator = make_optimizer(model, config), torch.Generator().manual_seed(1)
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    print('ready', flush=True)
    for line in sys.stdin:
        rows = torch.randint(s.vocab, (s.batch, s.seq + 1), generator=generator).to(device)
        wait(); faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32): loss = loss_of(rows[:, :-1], rows[:, 1:])/rows[:, 1:].numel()
        loss.backward(); clip_grad_norm(model.parameters(), config.max_grad_norm); optimizer.step(); optimizer.zero_grad(set_to_none=True)
        wait(); seconds = time.perf_counter() - start
        usage = resource.getrusage(resource.RUSAGE_SELF)
        peak = torch.cuda.max_memory_allocated() if device.type == 'cuda' else usage.ru_maxrss*1024
        print(json.dumps({'seconds': seconds, 'faults': usage.ru_minflt - faults, 'peak_mb': peak/1e6, 'loss': loss.item()}), flush=True)

def measure(s):
    "name -> list of answers, taking turns; the first three rounds are warm-up"
    wanted = {name: c for name, c in CONTESTANTS.items() if s.compiled or not c[1]}
    workers = {name: subprocess.Popen([sys.executable, __file__, '--worker', json.dumps(asdict(s)), kind, str(int(compiled))],
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **env})
               for name, (kind, compiled, env) in wanted.items()}
    answers = {name: [] for name in workers}
    for w in workers.values(): w.stdout.readline()
    for i in range(s.rounds + 3):
        for name, w in workers.items():
            w.stdin.write('go\n'); w.stdin.flush()
            answer = json.loads(w.stdout.readline())
            if i >= 3: answers[name].append(answer)
    for w in workers.values(): w.stdin.close(); w.wait(60)
    return answers

def device_name(s):
    from llama_nb.core import pick_device
    import torch
    if pick_device(s.device).type == 'cuda': return torch.cuda.get_device_name()
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    return f"{next((l.split(':')[1].strip() for l in lines if l.startswith('model name')), platform.processor())}, {torch.get_num_threads()} threads"

def main(s):
    import torch, transformers
    from llama_nb.train.trainer import flops_per_token
    c, answers, tokens = model_config(s), measure(s), s.batch*s.seq
    base = {compiled: statistics.median(a['seconds'] for a in answers[name]) for name, (kind, compiled, env) in CONTESTANTS.items() if kind == 'theirs' and not env and name in answers}
    rows = {}
    for name, got in answers.items():
        median = statistics.median(a['seconds'] for a in got)
        rate = tokens/median
        rows[name] = {'median_ms': 1000*median, 'best_ms': 1000*min(a['seconds'] for a in got), 'tokens_per_second': rate, 'gflops': rate*flops_per_token(c, s.seq)/1e9,
                      'ratio': base[CONTESTANTS[name][1]]/median, 'faults': statistics.median(a['faults'] for a in got), 'peak_mb': max(a['peak_mb'] for a in got)}
    about = {**asdict(s), 'n_params': c.n_params, 'device_name': device_name(s), 'python': platform.python_version(), 'torch': torch.__version__, 'transformers': transformers.__version__, 'date': time.strftime('%Y-%m-%d')}
    (HERE/f'{s.name}.json').write_text(json.dumps({'settings': about, 'rows': rows}, indent=1) + '\n')
    lines = ['# One training step', '', f'Measured {about["date"]} on {about["device_name"]}, Python {about["python"]}, torch {about["torch"]}, transformers {about["transformers"]}. '
             f'{c.n_params:,} parameters (width {s.dim}, {s.layers} layers, {s.heads} heads, vocabulary {s.vocab}), {s.batch} sequences of {s.seq} tokens, {s.dtype}; forward, backward, clipping and fused AdamW; '
             f'medians of {s.rounds} rounds taking turns, one process each. GFLOP/s counts 6 a weight and 12 t d a layer and token.', '',
             '| | median ms | tokens/s | GFLOP/s | of transformers | page faults a step | peak memory, MB |', '|---|---|---|---|---|---|---|']
    lines += [f'| {name} | {r["median_ms"]:.0f} | {r["tokens_per_second"]:,.0f} | {r["gflops"]:.0f} | {r["ratio"]:.2f} | {r["faults"]:,.0f} | {r["peak_mb"]:,.0f} |' for name, r in rows.items()]
    lines += ['', 'llama_nb runs as its trainer runs it, which tells glibc to keep freed memory; "glibc keeps memory" gives transformers the same by `' + ' '.join(f'{k}={v}' for k, v in KEEP.items()) + '`. '
              'Compiled rows are compared with transformers compiled.', '', f'Made by `python benchmarks/train_step.py`.']
    (HERE/f'{s.name}.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))

if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']: worker(Settings(**json.loads(sys.argv[2])), sys.argv[3], sys.argv[4] == '1')
    else:
        import tyro
        main(tyro.cli(Settings))
