"The dry run agrees with the closed forms in every layout; its collectives, its mistakes, its command."
import json, os
from importlib.metadata import version
import pytest
from conftest import ROOT, ask, variant
from llama_nb.core import UserError
from llama_nb.flags import take_flag
from llama_nb.run_file import load_run
from llama_nb.scale.dryrun import dry_run_command, ranks_of
from llama_nb.scale.memory import buffer_bytes, memory_per_rank
from dryrun_worker import MODEL, small

CONFIGS = ROOT/'configs'
pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='dry runs of many layouts fork')

def worker(name, *arguments, **options): return ask('dryrun_worker.py', name, arguments, **options)

# --- agreement with the closed forms ------------------------------------------------------------

CASES = [((1, 1, 1), 'linear'), ((1, 1, 4), 'none'), ((1, 1, 4), 'linear', 2), ((1, 8, 1), 'none'),
         ((1, 8, 1), 'full'), ((4, 8, 1), 'linear', 2), ((2, 4, 4), 'none'),
         ((1, 8, 4), 'linear', 1, 'blocks')]
FURTHER = [((1, 1, 1), 'none', 2), ((1, 8, 4), 'linear'), ((2, 4, 4), 'full', 2),
           ((1, 8, 1), 'linear', 1, 'blocks')]

# Buffers of reduce-scatter: in torch 2.12 the variable of a loop keeps the one before alive (`post_backward`)
AT_ONCE = 2 if version('torch').startswith('2.12.') else 1

@pytest.fixture(scope='module')
def found():
    "case -> its dry run, kept for all tests of this file"
    runs = dict(zip(CASES, worker('cases', CASES)))
    def find(case):
        if case not in runs: runs[case], = worker('cases', [case])
        return runs[case]
    return find

@pytest.mark.timeout(600)
@pytest.mark.parametrize('case', [*CASES, *map(variant, FURTHER)], ids=str)
def test_peak_and_categories(found, case):
    "Replicate x shard x tensor, what is recomputed, micro-batches, compiled: within 5 %"
    run = found(case)
    most, closed = run['most'], run['closed_form']
    assert run['peak'] == sum(run['memory'].values()) == pytest.approx(sum(closed.values()), rel=.05)
    assert most['weights'] == pytest.approx(closed['weights'], rel=.01)
    assert most["AdamW's moments"] == pytest.approx(closed["AdamW's moments"], rel=.01)
    replicate, shard, tensor = case[0]
    assert most['gradients'] == pytest.approx(4*MODEL.n_params/shard/tensor, rel=.25)
    if run['phase'] == 'backward' and tensor == 1:
        assert run['memory']['gathered weights'] <= closed['gathered weights']*1.01
    buffers = buffer_bytes(small(*case), replicate*shard*tensor)
    assert most['logits'] == pytest.approx(buffers['logits'], rel=.01)
    if shard > 1 and tensor == 1:
        assert most['communication'] == pytest.approx(AT_ONCE*buffers['scatter'], rel=.01)

@pytest.mark.parametrize('case', [c for c in CASES if len(c) < 4], ids=str)
def test_saved_activations(found, case):
    "What is there when the loss begins, of all blocks, beside the table of rotations"
    from llama_nb.scale.memory import kept_bytes
    config = small(*case)
    kept = MODEL.n_layers*kept_bytes(config, case[0][2])
    assert found(case)['most']['activations'] == pytest.approx(kept, rel=.02, abs=5e5)

def test_collectives_are_those_of_fsdp(found):
    "Each group is gathered for the forward pass and for the backward pass, but for the last and the root"
    run = found(((1, 8, 1), 'none'))
    rows = {(row['name'], row['axis']): row for row in run['collectives']}
    blocks = MODEL.n_layers
    gathers, scatters = rows['all-gather', 'shard'], rows['reduce-scatter', 'shard']
    assert (gathers['count'], scatters['count'], gathers['ranks']) == (2*blocks, blocks + 1, 8)
    assert scatters['bytes'] == pytest.approx(4*MODEL.n_params, rel=.01)
    assert ('all-reduce', 'replicate') not in rows or rows['all-reduce', 'replicate']['ranks'] == 1

def test_replicas_sum_once_a_step(found):
    "However many micro-batches there are: what a rank owns"
    run = found(((4, 8, 1), 'linear', 2))
    rows = {(row['name'], row['axis']): row for row in run['collectives']}
    assert rows['all-reduce', 'replicate']['bytes'] == pytest.approx(4*MODEL.n_params/8, rel=.01)
    assert rows['reduce-scatter', 'shard']['count'] == 2*(MODEL.n_layers + 1)

def test_a_wrong_closed_form_is_seen(found):
    "Activations that lack four of 13 vectors are outside the five percent"
    run = found(((1, 8, 1), 'none'))
    stream = 2*2*512*MODEL.dim*MODEL.n_layers
    assert abs(run['peak']/(sum(run['closed_form'].values()) - 4*stream) - 1) > .05

# --- at full size -------------------------------------------------------------------------------

@pytest.mark.timeout(900)
@pytest.mark.parametrize('name, ranks, settings',
                         [('65B', 2048, ('--model.n_layers', '24')),        # all 80 take three times as long
                          variant('65B', 2048, ()), variant('33B', 2048, ()), variant('13B', 1024, ()),
                          variant('7B', 512, ()),
                          variant('7B', 8, ('--parallel.replicate', '1', '--data.batch_size', '64'))])
def test_full_size(name, ranks, settings):
    "The real model in the real layout, tensor by tensor; accumulation included"
    eager = '--train.compile', 'off', *settings
    run = worker('file', str(CONFIGS/f'{name}.toml'), eager, ranks, timeout=850)
    assert run['peak'] == pytest.approx(sum(run['closed_form'].values()), rel=.05)
    assert run['process_bytes'] < 8*2**30

def test_the_dry_runs_of_the_page_are_of_todays_formula():
    "benchmarks/dryrun.json, which page 82 draws, takes minutes to make; its closed forms take none"
    stored = json.loads((ROOT/'benchmarks'/'dryrun.json').read_text(encoding='utf-8'))
    for name in stored.keys() - {'kinds'}:
        row = stored[name]
        replicate, shard, tensor = row['layout']
        formula = memory_per_rank(load_run(CONFIGS/f'{name}.toml'), replicate*shard*tensor)
        assert row['closed_form'] == pytest.approx(formula, rel=.005), name   # the page shows three digits

# --- ranks, mistakes, the command ---------------------------------------------------------------

def test_every_rank_needs_the_same():
    "Sizes that 8 ranks divide: rank 13 of 32 like rank 0"
    a, b = worker('ranks', ((1, 8, 4), 'linear'), (0, 13))
    assert (a['peak'], a['memory'], a['collectives']) == (b['peak'], b['memory'], b['collectives'])

def test_documents_and_float32():
    packed, exact = worker('cases', [((1, 8, 1), 'linear', 1, 'off', 'bfloat16', 'separate'),
                                     ((1, 8, 1), 'linear', 1, 'off', 'float32')])
    for run in (packed, exact): assert run['peak'] == pytest.approx(sum(run['closed_form'].values()), rel=.05)

@pytest.mark.parametrize('settings, said', [
    (('--dry-run', '100'), 'are not 100 ranks'), (('--dry-run', '0'), 'above 0'),
    (('--dry-run', '512', '--gpu-memory', 'much'), 'above 0'),
    (('--dry-run', '512', '--parallel.tensor', '3'), 'cannot share'),
    (('--dry-run', '512', '--data.batch_size', '1'), 'micro_batch_size'),
    (('--dry-run', '512', '--train.recompute', 'most'), 'unknown train.recompute')])
def test_a_mistake_is_one_line(settings, said):
    with pytest.raises(UserError) as e: dry_run_command([str(CONFIGS/'7B.toml'), *settings])
    assert said in str(e.value) and '\n' not in str(e.value)

def test_the_command(llama_nb, tmp_path):
    "A run whose shards are not here: a report, and nothing is made"
    before = sorted(tmp_path.rglob('*'))
    code, out, error = llama_nb('train', CONFIGS/'7B.toml', '--dry-run', 512, '--gpu-memory', 3, '--out',
                                tmp_path/'run', '--model.n_layers', 2, '--train.compile', 'off')
    assert (code, error) == (1, '')
    for word in ('512 GPUs = replicate 64 x shard 8 x tensor 1', 'activations', 'reduce-scatter',
                 'does not fit', 'of 3 GB', 'lower train.micro_batch_size',
                 'tokens/train and tokens/held_out: not here', '4,194,304 tokens'): assert word in out
    assert sorted(tmp_path.rglob('*')) == before

def test_flags_are_taken_out():
    def taken(*args): return take_flag(list(args), '--dry-run')
    assert taken('a.toml', '--dry-run', '8', '--x', '1') == (True, 8, ['a.toml', '--x', '1'])
    assert taken('a.toml', '--dry_run=8') == (True, 8, ['a.toml'])
    assert taken('--dry-run', 'a.toml') == (True, None, ['a.toml'])
    assert taken('a.toml', '--dry-run', '--x', '1') == (True, None, ['a.toml', '--x', '1'])

def test_ranks_that_a_run_file_asks_for():
    assert ranks_of(load_run(CONFIGS/'65B.toml')) == 2048
    open_number = load_run(CONFIGS/'65B.toml', ('--parallel.shard', '0'))
    assert ranks_of(open_number) == 64 and ranks_of(load_run(CONFIGS/'toy.toml')) == 1
