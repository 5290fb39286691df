"The run files in configs/ say what Table 2 says, and their layouts can be built and fit."
import json, re, subprocess, sys
from itertools import islice
from pathlib import Path
import pytest
from llama_nb.config import PRESETS
from llama_nb.run_file import load_run
from llama_nb.scale.memory import memory_line, memory_per_rank
from llama_nb.settings import degrees
from llama_nb.toy import toy_config
from llama_nb.train.check import check_run
from conftest import ENV, variant

CONFIGS = Path(__file__).resolve().parent.parent/'configs'

@pytest.mark.parametrize('name, lr, tokens',
                         [('7B', 3e-4, 1.0e12), ('13B', 3e-4, 1.0e12), ('33B', 1.5e-4, 1.4e12),
                          ('65B', 1.5e-4, 1.4e12)])
def test_table_2(name, lr, tokens):
    run = load_run(CONFIGS/f'{name}.toml')
    assert run.model == PRESETS[name] and run.optim.lr == lr
    batch = run.data.batch_size*run.data.seq_len
    assert batch == 4_194_304 and abs(run.train.steps*batch/tokens - 1) < 1e-5
    assert (run.optim.beta1, run.optim.beta2, run.optim.weight_decay, run.optim.max_grad_norm,
            run.optim.warmup_steps, run.optim.min_lr_ratio) == (.9, .95, .1, 1., 2000, .1)

def test_toy_file_is_the_toy():
    assert load_run(CONFIGS/'toy.toml') == toy_config('runs/toy')

def test_every_file_loads():
    assert sorted(p.stem for p in CONFIGS.glob('*.toml')) == ['13B', '33B', '65B', '7B', 'toy']

# --- layouts ------------------------------------------------------------------------------------

WORLD = {'7B': 512, '13B': 1024, '33B': 2048, '65B': 2048}
A100 = 80e9         # bytes; the card has 80 GiB, the difference is for CUDA, NCCL and holes

def layout(name):
    run = load_run(CONFIGS/f'{name}.toml')
    return run, degrees(run.parallel, run.model, WORLD[name])

def test_the_front_page_says_what_the_formula_gives():
    rows = (CONFIGS.parent/'README.md').read_text(encoding='utf-8').splitlines()
    for name, world in WORLD.items():
        total = sum(memory_per_rank(load_run(CONFIGS/f'{name}.toml'), world).values())
        row = next(line for line in rows if line.startswith(f'| [{name}]('))
        assert row.endswith(f'| {total/1e9:.1f} |'), f'{row}: the formula gives {total/1e9:.1f}'

@pytest.mark.parametrize('name', WORLD)
def test_the_batch_is_shared_without_rest_and_the_estimate_fits(name):
    run, (r, s, t) = layout(name)
    assert run.data.batch_size == r*s*run.train.micro_batch_size and run.data.seq_len % t == 0
    assert run.train.recompute == 'linear' and run.train.dtype == 'bfloat16'  # what the estimate supposes
    said = re.search(r'#   ([\d.]+ GB = .*)', (CONFIGS/f'{name}.toml').read_text())
    assert said.group(1) == memory_line(run, WORLD[name])
    assert sum(memory_per_rank(run, WORLD[name]).values()) < .9*A100

def climb(): # (nodes, words of `llama-nb train`) of each command on the page
    page = json.loads((CONFIGS.parent/'nbs'/'68_train.launch.ipynb').read_text(encoding='utf-8'))
    text = next(''.join(cell['source']) for cell in page['cells'] if cell['id'] == 'many')
    short = re.search(r'short="(.*)"', text).group(1)
    found = re.findall(r'sbatch --nodes=(\d+) +configs/train.sbatch (.*)', text)
    return [(int(nodes), words.replace('$short', short).split()) for nodes, words in found]

def test_each_step_of_the_climb_can_begin():
    "What `--check` says before it opens the text: settings, layout and memory, of GPUs with 80 GB"
    seen = []
    for nodes, (path, *more) in climb():
        run = load_run(CONFIGS.parent/path, more)
        assert len([*islice(check_run(run, 8*nodes, A100), 3)]) == 3
        seen.append((nodes, run.out, run.train.steps))
    assert [nodes for nodes, _, _ in seen] == [1, 2, 16, 256] and {steps for *_, steps in seen} == {50}
    assert len({out for _, out, _ in seen}) == 4

BUILD = """
import json, sys, torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from llama_nb.model.transformer import LLaMA
from llama_nb.parallel.data import apply_data_parallel
from llama_nb.parallel.mesh import data_rank, make_mesh
from llama_nb.parallel.tensor import apply_tensor_parallel
from llama_nb.run_file import load_run
from llama_nb.settings import degrees
path, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group('fake', store=FakeStore(), rank=rank, world_size=world)
run = load_run(path)
mesh = make_mesh(degrees(run.parallel, run.model, world), 'cpu')
with torch.device('meta'): model = LLaMA(run.model)
apply_tensor_parallel(model, mesh['tensor'], run.parallel.sequence)
apply_data_parallel(model, mesh, torch.bfloat16)
local = {n: list(p.to_local().shape) for n, p in model.named_parameters()}
parameters = list(model.parameters())
print(json.dumps({
    'place': mesh.get_coordinate(), 'part': data_rank(mesh), 'whole': sum(p.numel() for p in parameters),
    'numbers': sum(p.to_local().numel() for p in parameters),
    'types': sorted({str(p.dtype) for p in parameters}),
    'groups': {n: dist.get_process_group_ranks(mesh[n].get_group()) for n in mesh.mesh_dim_names},
    'local': {n: s for n, s in local.items() if not n.startswith('layers.') or n.startswith('layers.0.')}}))
"""

@pytest.mark.parametrize('name, rank', [('7B', 0), variant('13B', 1023), variant('33B', 1234),
                                        variant('65B', 0), ('65B', 1234)])
def test_a_rank_of_the_full_world_holds_what_the_closed_form_says(name, rank):
    """The real model is shared by the real code among all ranks, of which only this one exists; on the meta
    device, so no number has memory"""
    run, (r, s, t) = layout(name)
    done = subprocess.run([sys.executable, '-c', BUILD, CONFIGS/f'{name}.toml', str(rank), str(WORLD[name])],
                          env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    got, c = json.loads(done.stdout), run.model
    d, f, v = c.dim, c.ffn_dim, c.vocab_size
    assert got['whole'] == c.n_params and got['types'] == ['torch.float32']
    place = [rank//(s*t), rank//t%s, rank%t]
    assert got['place'] == place and got['part'] == [rank//t, r*s]
    # neighbours, in one machine of 8
    assert got['groups']['tensor'] == list(range(rank - rank%t, rank - rank%t + t))
    assert got['groups']['shard'] == [place[0]*s*t + i*t + place[2] for i in range(s)]
    columns, rows = [d//t//s, d], [d//s, d//t]  # torch keeps (out, in)
    expected = {'tok_embeddings.weight': [v//t//s, d], 'norm.weight': [d//s], 'output.weight': [v//t//s, d],
                'layers.0.attention_norm.weight': [d//s], 'layers.0.ffn_norm.weight': [d//s],
                **{f'layers.0.attention.w{x}.weight': columns for x in 'qkv'},
                'layers.0.attention.wo.weight': rows,
                'layers.0.feed_forward.w1.weight': [f//t//s, d],
                'layers.0.feed_forward.w3.weight': [f//t//s, d],
                'layers.0.feed_forward.w2.weight': [d//s, f//t]}
    assert got['local'] == expected
    gains = (2*c.n_layers + 1)*d
    assert got['numbers'] == (c.n_params - gains)//(s*t) + gains//s  # the gains are not cut by tensor
    # the estimate cuts them: 1 in 1,000 of what 65B keeps
    assert abs(4*got['numbers']/memory_per_rank(run, WORLD[name])['weights'] - 1) < .002
