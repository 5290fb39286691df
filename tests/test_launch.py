"Ranks that the command starts itself, their signals, failures and exit codes; the check before they begin."
import os, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import pytest
from conftest import ENV, command, metrics
from fork_server import Program
from llama_nb import cli
from llama_nb.core import UserError
from llama_nb.run_file import load_run
from llama_nb.scale.memory import memory_per_rank
from llama_nb.train import launch
from llama_nb.train.check import check_run
from test_failures import is_alive

# --- llama-nb train --nproc ---------------------------------------------------------------------

BROKEN = '''
import os
from pathlib import Path
if 'RANK' in os.environ:
    from llama_nb.train import trainer
    Path(os.environ['PIDS'], os.environ['RANK']).write_text(str(os.getpid()))
    step = trainer.train_step
    def train_step(run):
        if run.step == 3 and run.rank == 1 and os.environ['HOW'] == 'bug': raise KeyError('a bug of rank 1')
        return step(run)
    trainer.train_step = train_step
'''

@pytest.fixture
def launched(tmp_path, run_file):
    "Start a run on two ranks, whose process ids are in a folder"
    started = []
    (tmp_path/'pids').mkdir()
    (tmp_path/'sitecustomize.py').write_text(BROKEN)
    def launched(how, steps):
        env = {**ENV, 'PYTHONPATH': f'{tmp_path}{os.pathsep}{ENV["PYTHONPATH"]}', 'HOW': how,
               'PIDS': str(tmp_path/'pids')}
        started.append(Program(command('train', run_file(steps), '--nproc', 2), env))
        return started[-1]
    yield launched
    for process in started: process.kill()
    for path in (tmp_path/'pids').iterdir():
        if is_alive(int(path.read_text())): os.kill(int(path.read_text()), signal.SIGKILL)

def ended(tmp_path):
    "Both ranks began, and neither is there any more"
    pids = [int(path.read_text()) for path in sorted((tmp_path/'pids').iterdir())]
    return len(pids) == 2 and not any(map(is_alive, pids))

@pytest.mark.skipif(sys.platform == 'win32', reason='signals as on Unix')
def test_a_signal_to_the_launcher_is_a_clean_stop(launched, tmp_path, wait_for):
    process, out = launched('well', 100_000), tmp_path/'run'
    wait_for(lambda: len(metrics(out)) >= 3, process)
    process.send_signal(signal.SIGINT)
    shown, err = process.communicate(120)
    assert process.returncode == 128 + signal.SIGINT, err
    assert 'Traceback' not in shown + err and 'SIGINT: this step is finished' in err
    last = metrics(out)[-1]['step']
    assert f'stopped after step {last} of 100000, saved' in shown and ended(tmp_path)
    assert [p.name for p in (out/'checkpoints').iterdir()] == [f'step-{last:08}']
    assert 'replicate 1 x shard 2 x tensor 1' in shown and shown.count('model  ') == 1

def test_a_failure_of_one_rank_is_seen_and_ends_the_others(launched, tmp_path):
    process = launched('bug', 100_000)
    shown, err = process.communicate(120)
    assert process.returncode == 1, err
    assert 'llama-nb: rank 1 failed:\nTraceback' in err and "KeyError: 'a bug of rank 1'" in err
    assert [m['step'] for m in metrics(tmp_path/'run')] == [1, 2, 3] and ended(tmp_path)

def test_a_mistake_is_said_once_before_any_rank_begins(launched, tmp_path, capsys, run_file, monkeypatch):
    path = str(run_file(5))
    for args, words in ((['--nproc', '3', '--parallel.tensor', '2'], 'must divide the number of ranks, 3'),
                        (['--nproc'], '--nproc takes a number'), (['--nproc', '0'], 'a number above 0'),
                        (['--nproc', '2', '--optim.lr', 'fast'], 'optim.lr must be a number'),
                        (['--ranks', '2'], 'belong to --check')):
        assert cli.main(['train', path, *args]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count('\n') == 1, said
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UserError, match='this is one already'): launch.launch_ranks(['train', path], 2)
    assert not (tmp_path/'run').exists()

def program(*words): return subprocess.Popen([sys.executable, '-c', ';'.join(words)])

def test_exit_codes_of_the_whole():
    "A stop is the signal's; a failure goes before it; a killed rank counts as in a shell"
    def code(*ranks):
        processes = [program(*words) for words in ranks]
        try:
            return launch._wait(processes)
        finally:
            for p in processes: p.kill()
            for p in processes: p.wait()
    stop, waits = ('import sys', 'sys.exit(143)'), ('import time', 'time.sleep(100)')
    killed = 'import os, signal', 'os.kill(os.getpid(), signal.SIGKILL)'
    assert code(('0',), ('0',)) == 0 and code(stop, stop) == 143
    start = time.monotonic()
    assert code(('import sys', 'sys.exit(75)'), waits) == 75 and code(waits, killed) == 137
    assert time.monotonic() - start < 60

def test_a_failure_that_may_pass_is_the_first(capsys):
    "The rank whose storage fails is the cause, though one that has lost it has a lower number"
    def ended(*codes):                                      # of a rank, at each look
        codes = list(codes)
        return SimpleNamespace(poll=lambda: codes.pop(0) if len(codes) > 1 else codes[0])
    assert launch.TEMPORARY == cli.TEMPORARY == 75
    assert launch._wait([ended(1), ended(75)]) == 75 and launch._wait([ended(1), ended(None, 75)]) == 75
    assert launch._wait([ended(-6), ended(75), ended(None)]) == 75
    assert 'rank 1 has ended with exit code 75; 1 others are ended' in capsys.readouterr().err
    assert launch._wait([ended(0), ended(1)]) == 1

def test_a_rank_knows_its_place(monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '7')
    env = launch.rank_environment(3, 8, '/meet')
    assert (env['RANK'], env['LOCAL_RANK'], env['WORLD_SIZE'], env['OMP_NUM_THREADS']) == ('3', '3', '8', '7')
    assert env['INIT_METHOD'] == 'file:///meet/store'

# --- llama-nb train --check ---------------------------------------------------------------------

def test_a_check_says_a_line_for_each_and_makes_nothing(run_file, tmp_path, capsys):
    path = str(run_file(20))
    before = sorted(tmp_path.rglob('*'))
    assert cli.main(['train', path, '--check', '--ranks', '2']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ['settings', 'layout', 'memory', 'text', 'folder']
    assert 'shard 2' in lines[1] and 'is new' in lines[4] and sorted(tmp_path.rglob('*')) == before

@pytest.mark.parametrize('args, words, lines',
                         [(('--ranks', '3'), 'must be a multiple of 3 ranks', 1),
                          (('--ranks', '2', '--parallel.replicate', '4'), 'are not 2 ranks', 1),
                          (('--parallel.tensor', '3'), 'choose parallel.tensor from [1, 2, 4]', 1),
                          (('--gpu-memory', '0.001'), 'a rank needs', 2),
                          (('--model.vocab_size', '300'), 'have a vocabulary of 400', 3),
                          (('--data.held_out', 'none'), 'none holds no token shards', 3),
                          (('--out', __file__), 'is a file', 4)])
def test_the_first_mistake_ends_a_check(args, words, lines, run_file, capsys):
    assert cli.main(['train', str(run_file(20)), '--check', *args]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count('\n') == 1 and len(said.out.splitlines()) == lines

def test_a_check_knows_the_folder(run_file, tmp_path, llama_nb, capsys):
    path = run_file(4, save_every=2)
    assert llama_nb('train', path)[0] == 0
    assert cli.main(['train', str(path), '--check']) == 0
    assert 'goes on after step 4 of 4' in capsys.readouterr().out
    assert cli.main(['train', str(path), '--check', '--optim.lr', '1e-4']) == 2
    assert 'optim.lr: 0.003 -> 0.0001' in capsys.readouterr().err

def test_a_check_lets_a_run_be_prolonged(run_file, llama_nb, capsys):
    "It asks what the run itself will ask: more steps of WSD are the same run, of a cosine another one"
    wsd = '--optim.schedule', 'wsd', '--optim.decay_fraction', '.5', '--optim.warmup_steps', '1'
    path = str(run_file(4, save_every=2))
    assert llama_nb('train', path, *wsd, '--train.steps', '4')[0] == 0
    out = load_run(path).out
    assert cli.main(['train', out, '--check', '--train.steps', '8']) == 2      # its decay is over
    assert '--fork' in capsys.readouterr().err
    shutil.rmtree(Path(out, 'checkpoints', 'step-00000004'))
    assert cli.main(['train', out, '--check', '--train.steps', '8']) == 0
    assert 'goes on after step 2 of 8' in capsys.readouterr().out

@pytest.mark.parametrize('args, words',
                         [(('--train.init', 'PARENT', '--model.n_heads', '2'), 'model.n_heads: 4 -> 2'),
                          (('--train.fork', 'PARENT', '--train.steps', '4'), 'all of its 4 steps'),
                          (('--train.init', 'PARENT@3'), 'no checkpoint of step 3')])
def test_a_check_knows_what_a_run_begins_with(args, words, run_file, tmp_path, llama_nb, capsys):
    "It refuses the parent that the run would refuse, and says of another one what the run would say"
    parent, path = tmp_path/'parent', run_file(8)
    assert llama_nb('train', run_file(4, name='parent'))[0] == 0
    args = [word.replace('PARENT', str(parent)) for word in args]
    assert cli.main(['train', str(path), '--check', *args]) == 2
    assert words in capsys.readouterr().err
    assert cli.main(['train', str(path), '--check', '--train.fork', str(parent)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert not (tmp_path/'run').exists()
    shown = llama_nb('train', path, '--train.fork', parent)[1]
    assert last.startswith(f'begins     as {parent}@4; train.steps: 4 -> 8') and last in shown

def test_memory_is_that_of_the_formula(run_file):
    config = load_run(run_file(4))
    for ranks in (1, 2):
        line = next(line for line in check_run(config, ranks) if line.startswith('memory'))
        assert f'{sum(memory_per_rank(config, ranks).values())/1e6:.1f} MB' in line
