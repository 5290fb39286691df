"The run files in configs/ say what Table 2 says."
from pathlib import Path
import pytest
from llama_nb.config import PRESETS, load_run
from llama_nb.toy import toy_config

CONFIGS = Path(__file__).resolve().parent.parent/'configs'

@pytest.mark.parametrize('name, lr, tokens', [('7B', 3e-4, 1.0e12), ('13B', 3e-4, 1.0e12), ('33B', 1.5e-4, 1.4e12), ('65B', 1.5e-4, 1.4e12)])
def test_table_2(name, lr, tokens):
    run = load_run(CONFIGS/f'{name}.toml')
    assert run.model == PRESETS[name] and run.optim.lr == lr
    batch = run.data.batch_size*run.data.seq_len
    assert batch == 4_194_304 and abs(run.train.steps*batch/tokens - 1) < 1e-5
    assert (run.optim.beta1, run.optim.beta2, run.optim.weight_decay, run.optim.max_grad_norm, run.optim.warmup_steps, run.optim.min_lr_ratio) == (.9, .95, .1, 1., 2000, .1)

def test_toy_file_is_the_toy():
    assert load_run(CONFIGS/'toy.toml') == toy_config('runs/toy')

def test_every_file_loads():
    assert sorted(p.stem for p in CONFIGS.glob('*.toml')) == ['13B', '33B', '65B', '7B', 'toy']
