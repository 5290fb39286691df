"""Speed and memory of one training step on a CPU: this package against transformers' LlamaForCausalLM.

Same sizes, same weights, same batches, same loss, fused AdamW on both sides. Each contestant is a process of its own, so that peak memory
is its own; they take turns, one step each, so that whatever else the machine does hits all alike. `malloc` rows run with glibc told
to keep freed memory. Writes benchmarks/train_step.md and .json.    python benchmarks/train_step.py [rounds]
"""
import json, os, platform, resource, statistics, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
KEEP = {'MALLOC_MMAP_THRESHOLD_': str(2**30), 'MALLOC_TRIM_THRESHOLD_': str(2**34), 'MALLOC_TOP_PAD_': str(2**26)}
CONTESTANTS = {'llama_nb': ('ours', {}), 'transformers': ('theirs', {}), 'llama_nb, malloc': ('ours', KEEP), 'transformers, malloc': ('theirs', KEEP)}
BATCH, SEQ = 16, 256

def build(kind):
    "The model and a function that makes logits"
    import torch
    from llama_nb.config import PRESETS
    from llama_nb.model.transformer import LLaMA
    torch.manual_seed(0)
    c = PRESETS['toy']; model = LLaMA(c)
    if kind == 'ours': return model, model
    from transformers import LlamaConfig, LlamaForCausalLM
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
                                          rms_norm_eps=c.norm_eps, max_position_embeddings=c.max_seq_len, tie_word_embeddings=False, use_cache=False))
    assert sum(p.numel() for p in theirs.parameters()) == c.n_params
    return theirs, lambda tokens: theirs(tokens).logits

def worker(kind):
    "Train one step for each line on stdin; answer with seconds, page faults, peak memory and loss"
    import torch
    from llama_nb.config import OptimConfig
    from llama_nb.train.loss import next_token_loss
    from llama_nb.train.optim import clip_grad_norm, make_optimizer
    model, logits_of = build(kind)
    optimizer, config = make_optimizer(model, OptimConfig()), OptimConfig()
    generator = torch.Generator().manual_seed(1)
    print('ready', flush=True)
    for line in sys.stdin:
        rows = torch.randint(model.config.vocab_size, (BATCH, SEQ + 1), generator=generator)
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        loss = next_token_loss(logits_of(rows[:, :-1]), rows[:, 1:])
        loss.backward(); clip_grad_norm(model.parameters(), config.max_grad_norm); optimizer.step(); optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        usage = resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps({'seconds': seconds, 'faults': usage.ru_minflt - faults, 'peak_mb': usage.ru_maxrss/1024, 'loss': loss.item()}), flush=True)

def measure(rounds):
    "name -> list of answers, taking turns; the first three rounds are warm-up"
    workers = {name: subprocess.Popen([sys.executable, __file__, '--worker', kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **env})
               for name, (kind, env) in CONTESTANTS.items()}
    answers = {name: [] for name in workers}
    for w in workers.values(): w.stdout.readline()
    for i in range(rounds + 3):
        for name, w in workers.items():
            w.stdin.write('go\n'); w.stdin.flush()
            answer = json.loads(w.stdout.readline())
            if i >= 3: answers[name].append(answer)
    for w in workers.values(): w.stdin.close(); w.wait(60)
    return answers

def cpu_name():
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    return next((l.split(':')[1].strip() for l in lines if l.startswith('model name')), platform.processor())

def main(rounds):
    import torch, transformers
    answers = measure(rounds)
    rows = {name: {'median_ms': 1000*statistics.median(a['seconds'] for a in got), 'best_ms': 1000*min(a['seconds'] for a in got),
                   'faults': statistics.median(a['faults'] for a in got), 'peak_mb': max(a['peak_mb'] for a in got)} for name, got in answers.items()}
    losses = [statistics.mean(a['loss'] for a in got) for got in answers.values()]
    machine = {'cpu': cpu_name(), 'threads': torch.get_num_threads(), 'python': platform.python_version(), 'torch': torch.__version__, 'transformers': transformers.__version__,
               'rounds': rounds, 'batch': BATCH, 'seq_len': SEQ, 'date': time.strftime('%Y-%m-%d'), 'losses': losses}
    (HERE/'train_step.json').write_text(json.dumps({'machine': machine, 'rows': rows}, indent=1) + '\n')
    lines = ['# One training step on a CPU', '', f'Measured {machine["date"]} on {machine["cpu"]}, {machine["threads"]} threads, Python {machine["python"]}, torch {machine["torch"]}, '
             f'transformers {machine["transformers"]}. The toy model (2,557,632 parameters), {BATCH} sequences of {SEQ} tokens, float32, forward, backward, clipping and fused AdamW; '
             f'{rounds} rounds taking turns, one process each.', '', '| | median ms | best ms | tokens/s | page faults a step | peak memory, MB |', '|---|---|---|---|---|---|']
    lines += [f'| {name} | {r["median_ms"]:.0f} | {r["best_ms"]:.0f} | {1000*BATCH*SEQ/r["median_ms"]:,.0f} | {r["faults"]:,.0f} | {r["peak_mb"]:,.0f} |' for name, r in rows.items()]
    lines += ['', '"malloc" rows: glibc told to keep freed memory instead of giving it back to the system after each step (`' + ' '.join(f'{k}={v}' for k, v in KEEP.items()) + '`).', '', 'Made by `python benchmarks/train_step.py`.']
    (HERE/'train_step.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))

if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']: worker(sys.argv[2])
    else: main(int(sys.argv[1]) if sys.argv[1:] else 30)
