"What a run shows at Weights & Biases: the real package, offline. The metrics page asks a stand-in for it."
import importlib.util
import pytest
from conftest import ENV, metrics

pytestmark = pytest.mark.skipif(importlib.util.find_spec('wandb') is None, reason='needs wandb')

@pytest.fixture(autouse=True)
def stranger(tmp_path, monkeypatch):
    "Programs start in a home where nobody has logged in"
    for name in [name for name in ENV if name.startswith('WANDB_')]: monkeypatch.delitem(ENV, name)
    monkeypatch.setitem(ENV, 'HOME', str(tmp_path))

@pytest.fixture
def offline(stranger, monkeypatch): monkeypatch.setitem(ENV, 'WANDB_MODE', 'offline')

def train(path): return 'train', path, '--train.wandb', 'llamas'

def shown(out, row):
    "For each start of the run: does W&B's file have the loss of this row? It writes numbers as our log does"
    files = sorted((out/'wandb').glob(f'offline-run-*/run-{(out/"wandb-id").read_text().strip()}.wandb'))
    return [str(row['loss']).encode() in file.read_bytes() for file in files]

def test_a_killed_run_goes_on_as_the_same(tmp_path, run_file, offline, llama_nb, start, wait_for):
    path, out = run_file(20, save_every=10), tmp_path/'run'
    process = start(*train(path))
    wait_for(lambda: len(metrics(out)) > 12, process)
    process.kill()
    process.communicate(timeout=60)
    code, _, said = llama_nb(*train(path))
    assert code == 0, said
    assert len(list((out/'wandb').glob('offline-run-*'))) == 2
    assert all(shown(out, row)[-1] for row in metrics(out))     # those before the checkpoint were told again

def test_ranks_show_one_run(tmp_path, run_file, offline, start_ranks):
    ranks = start_ranks(2, *train(run_file(4)))
    assert ranks.wait() == [0, 0], ranks.log()
    out = tmp_path/'run'
    assert len(list((out/'wandb').glob('offline-run-*'))) == 1
    assert all(shown(out, row) == [True] for row in metrics(out))

def test_a_run_without_a_login_goes_on_without(tmp_path, run_file, llama_nb):
    code, out, said = llama_nb(*train(run_file(4)))
    assert code == 0, said
    assert out.count('Weights & Biases failed and is left out from here on') == 1
    assert [m['step'] for m in metrics(tmp_path/'run')] == [1, 2, 3, 4]
