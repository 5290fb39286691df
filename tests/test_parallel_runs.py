"""Runs on several ranks: another number of them after every stop, signals to one of them, deaths, wrong
input; always the same run."""
import random, signal, time
import pytest
from conftest import metrics, numbers, variant

TWO = ('--train.micro-batch-size', 2)

def errors(log): return [line for line in log.splitlines() if 'error: ' in line]

def test_elastic_resume(run_file, start_ranks, tmp_path):
    """Killed on four ranks as FSDP of tensor groups, continued on one, stopped by a signal, continued on two:
    the batches and losses of a run on four that nobody disturbed"""
    whole = start_ranks(4, 'train', run_file(12, save_every=4, name='whole'), *TWO)
    assert whole.wait() == [0]*4, whole.log()
    path, out = run_file(12, save_every=4, name='elastic'), tmp_path/'elastic'
    ranks = start_ranks(4, 'train', path, '--parallel.tensor', 2, *TWO)
    ranks.until(lambda: len(metrics(out)) >= 5 and (out/'checkpoints'/'step-00000004').exists())
    ranks.kill()
    assert 'sequential' not in ranks.tails()    # PyTorch's advice about the norm, on every rank
    ranks = start_ranks(1, 'train', path)
    ranks.until(lambda: 'continuing' in ranks.log() and len(metrics(out)) >= 6)
    ranks.processes[0].send_signal(signal.SIGTERM)
    assert ranks.wait() == [128 + signal.SIGTERM], ranks.log()
    ranks = start_ranks(2, 'train', path, '--parallel.tensor', 2)
    assert ranks.wait() == [0, 0], ranks.log()
    assert [m[0] for m in numbers(out)] == list(range(1, 13))
    for got, right in zip(numbers(out), numbers(tmp_path/'whole')):
        # float32 sums in another order, through the steps before
        assert got[1] == pytest.approx(right[1], rel=1e-6) and got[3:] == right[3:]

def torture(n, kills, steps, run_file, start_ranks, tmp_path, seed, *args):
    """A run whose random rank is killed at random instants, saves included, writes the metrics log of one
    that is left alone"""
    whole = start_ranks(n, 'train', run_file(steps, save_every=2, name='whole'), *args)
    assert whole.wait(300) == [0]*n, whole.log()
    path, out, rng = run_file(steps, save_every=2, name='tortured'), tmp_path/'tortured', random.Random(seed)
    for kill in range(kills):
        ranks, before = start_ranks(n, 'train', path, *args), len(metrics(out))
        while len(metrics(out)) == before and ranks.processes[0].poll() is None:
            time.sleep(.01)        # it is training
        time.sleep(rng.random()*.3)
        victim = rng.choice(ranks.processes)
        if victim.poll() is not None: break                                # it was faster
        victim.kill()
        codes = ranks.wait(300)  # the others notice, and end by themselves
        assert 0 not in codes or kill == kills - 1, ranks.log()
    ranks = start_ranks(n, 'train', path, *args)
    assert ranks.wait(300) == [0]*n, ranks.log()
    assert numbers(out) == numbers(tmp_path/'whole')                       # bit for bit
    return kill

def test_a_random_rank_is_killed(run_file, start_ranks, tmp_path):
    torture(2, 2, 30, run_file, start_ranks, tmp_path, 1)

def test_a_signal_to_one_rank_stops_all_after_the_same_step(run_file, start_ranks, tmp_path):
    path, out = run_file(100_000), tmp_path/'run'
    ranks = start_ranks(2, 'train', path, '--parallel.tensor', 2)
    ranks.until(lambda: len(metrics(out)) >= 3)
    second = start_ranks(1, 'train', path)  # meanwhile, somebody starts it again
    assert (second.wait() == [2] and len(errors(second.log())) == 1
            and str(ranks.processes[0].pid) in errors(second.log())[0]), second.log()
    ranks.processes[1].send_signal(signal.SIGUSR1)
    assert ranks.wait() == [128 + signal.SIGUSR1]*2, ranks.log()
    last = metrics(out)[-1]['step']
    assert f'stopped after step {last} of 100000' in ranks.log(0) and 'stopped' not in ranks.log(1)
    assert ([m['step'] for m in metrics(out)] == list(range(1, last + 1))
            and [p.name for p in (out/'checkpoints').iterdir()] == [f'step-{last:08}'])

@pytest.mark.parametrize('args, words',
                         [(('--parallel.tensor', 3), 'choose parallel.tensor from [1, 2, 4]'),
                          variant(('--parallel.replicate', 4), 'are not 2 ranks'),
                          variant(('--train.micro-batch-size', 8),
                                  'must be a multiple of 2 ranks x train.micro_batch_size 8'),
                          (('--optim.lr', 1e30, '--train.max-skipped', 2), '3 such steps in a row')])
def test_mistakes_are_one_line_on_every_rank(run_file, start_ranks, tmp_path, args, words):
    ranks = start_ranks(2, 'train', run_file(12), *args)
    assert ranks.wait() == [2, 2], ranks.log()
    for rank in range(2):
        assert (len(errors(ranks.log(rank))) == 1 and words in errors(ranks.log(rank))[0]
                and 'Traceback' not in ranks.log(rank)), ranks.log(rank)
    assert not list(tmp_path.glob('run/checkpoints/step-*'))
