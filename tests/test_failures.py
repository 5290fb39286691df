"""Failures that speak: the traceback before the end, exit codes that say who can mend it, time limits,
numbers that are none."""
import errno, os, random, subprocess, sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
import pytest
import torch
import torch.distributed as dist
from conftest import ENV, ROOT, metrics, run_ranks
from llama_nb import cli
from llama_nb.core import TemporaryError, UserError
from llama_nb.parallel import mesh, processes
from llama_nb.parallel.mesh import make_mesh, on_all_ranks, on_rank_zero, rank_and_size
from llama_nb.parallel.processes import host_group, start_ranks
from llama_nb.run_file import load_run
from llama_nb.settings import setting_names
from llama_nb.train import checkpoint, console, metrics as log, run as runs, trainer
from llama_nb.train.guards import SpikeGuard, collective_seconds

# --- a rank that fails --------------------------------------------------------------------------

DRIVER = '''
import errno, os, sys, time
from pathlib import Path
import torch.distributed as dist
from llama_nb import cli
from llama_nb.core import UserError
from llama_nb.train import trainer
folder, how = Path(sys.argv[2]), sys.argv[3]
(folder/f'pid-{os.environ["RANK"]}').write_text(str(os.getpid()))
def goodbye(*args):
    print('GOODBYE', flush=True)
    time.sleep(600)                          # NCCL waits here for the other rank, which waits for this one
dist.destroy_process_group = goodbye
if how == 'bug': trainer.Console.close = goodbye    # the first words come before anything is cleaned up
step = trainer.train_step
def failing(run):
    if run.step == 3 and how == 'shared': raise UserError('a mistake of all')
    if run.step == 3 and run.rank == 1 and how == 'bug': raise KeyError('a bug of rank 1')
    if run.step == 3 and run.rank == 1 and how == 'storage':
        raise OSError(errno.ESTALE, 'Stale file handle', 'tokens')
    return step(run)
trainer.train_step = failing
sys.argv[1:] = ['train', sys.argv[1]]
cli.program()
'''

def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f'/proc/{pid}/stat').read_text().split(') ')[1][0] != 'Z' if Path('/proc').exists() else True

def torchrun(tmp_path, run_file, how):
    "Two ranks under torchrun; what both said, after all processes have ended"
    (tmp_path/'driver.py').write_text(DRIVER)
    meet = ['--rdzv-backend=c10d', f'--rdzv-endpoint={tmp_path}/launcher', '--rdzv-conf=store_type=file']
    command = [sys.executable, '-m', 'torch.distributed.run', *meet, '--nproc-per-node=2',
               tmp_path/'driver.py', run_file(20), tmp_path, how]
    env = {**ENV, 'INIT_METHOD': f'file://{tmp_path}/ranks', 'GLOO_SOCKET_IFNAME': 'lo',
           'PYTHONUNBUFFERED': '1'}
    done = subprocess.run([str(c) for c in command], env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=150)
    pids = [int((tmp_path/f'pid-{rank}').read_text()) for rank in range(2)]
    assert done.returncode != 0 and not any(map(is_alive, pids)), done.stdout
    # what was done is written down
    assert [m['step'] for m in metrics(tmp_path/'run')] == [1, 2, 3], done.stdout
    assert 'GOODBYE' not in done.stdout, done.stdout
    return done.stdout

def test_the_traceback_of_a_rank_comes_first_and_then_its_end(tmp_path, run_file):
    said = torchrun(tmp_path, run_file, 'bug')
    assert 'llama-nb: rank 1 failed:\nTraceback' in said and "KeyError: 'a bug of rank 1'" in said, said

def test_storage_that_fails_one_rank_is_one_line(tmp_path, run_file):
    said = torchrun(tmp_path, run_file, 'storage')
    assert ('llama-nb: rank 1: error: Stale file handle: tokens (this may pass' in said
            and 'exitcode  : 75' in said), said

def test_a_mistake_of_all_ranks_is_a_line_of_each(tmp_path, run_file):
    said = torchrun(tmp_path, run_file, 'shared')
    assert ('llama-nb: error: a mistake of all\n' in said
            and 'llama-nb: rank 1: error: a mistake of all\n' in said), said
    assert 'train_step' not in said and 'failed:\nTraceback' not in said and 'exitcode  : 2' in said, said

def test_a_line_of_many_ranks_is_written_at_once():
    "the streams of ranks are often unbuffered, and the line of one must not stand within another's"
    file = mock.Mock()
    with mock.patch.object(sys, 'stderr', file): cli._say(UserError('a typo'))
    bar = console.Console(20, file=file, screen=False)
    bar.validation(3, 2., 1.)
    lines = [call.args[0] for call in file.write.call_args_list]
    assert len(lines) == 2 and all(line.endswith('\n') for line in lines), lines

# --- exit codes: who can mend it ----------------------------------------------------------------

@pytest.mark.parametrize('error, code',
                         [(FileNotFoundError(errno.ENOENT, 'No such file', 'x'), 2),
                          (PermissionError(errno.EACCES, 'Permission denied', 'x'), 2),
                          (UserError('a typo'), 2),
                          (OSError(errno.EIO, 'Input/output error', 'x'), 75),
                          (OSError(errno.ESTALE, 'Stale file handle'), 75),
                          (OSError(errno.ENOSPC, 'No space left'), 75),
                          (TemporaryError('rank 3: [Errno 5] Input/output error'), 75)])
def test_exit_code(error, code, capsys):
    with mock.patch.object(cli, 'dispatch', side_effect=error): assert cli.main(['train']) == code
    said = capsys.readouterr().err
    assert (said.startswith('llama-nb: error: ') and said.count('\n') == 1
            and ('may pass' in said) == (code == 75))

def test_a_failed_save_may_pass_unless_a_right_is_missing(tmp_path):
    tensors = {'model': {'w': torch.ones(3)}}
    for number, kind in ((errno.EIO, True), (errno.EACCES, False)):
        with (mock.patch.object(checkpoint, 'publish_folder',
                                side_effect=OSError(number, os.strerror(number))),
              pytest.raises(checkpoint.CheckpointError, match='could not save') as caught):
            checkpoint.save_checkpoint(tmp_path, 1, tensors, {})
        assert isinstance(caught.value, TemporaryError) == kind

# --- a run that goes on after a loss that spiked ---------------------------------------------------

def spike_log(folder, step, said):
    "The log of a run that goes on after `step`, which notes the steps of its reports"
    made = object.__new__(trainer.RunLog)
    made.metrics, made.spikes = log.open_metrics(folder, step), SpikeGuard()
    made.console = mock.Mock()
    made.run = mock.Mock(report=lambda line: said.append(int(line.split()[1])))
    trainer._go_on(made, ExitStack())
    return made

def test_a_resumed_guard_reports_what_one_that_was_not_cut_does(tmp_path):
    rng = random.Random(0)
    losses = [3 + rng.gauss(0, .05) for _ in range(400)]
    for i in (200, 300, 301, 302): losses[i] += .6
    for cuts in ([], [301], [302], [201, 303]):
        folder, said = tmp_path/str(cuts), []
        ends = [*cuts, len(losses)]
        for begin, end in zip([0, *cuts], ends):
            made = spike_log(folder, begin, said)
            for i in range(begin, end):
                made._write({'step': i + 1, 'loss': losses[i], 'tokens': i})
        assert said == [201, 301, 302, 303], cuts

# --- two real ranks: time limits, errors told, nobody leaves before the old checkpoint is gone ---

def _limit(group): return group._get_backend(torch.device('cpu')).options._timeout.total_seconds()

def _kind(call):
    try:
        return call()
    except UserError as e:
        return type(e).__name__

def _two(run_path:str, folder:str)->dict:
    "What one of two ranks sees"
    rank, found = rank_and_size()[0], {}
    def fail(error):
        def action():
            if rank == 1: raise error
        return action
    def fail_first(error):
        def action(): raise error
        return action
    stale, missing = (OSError(errno.ESTALE, 'Stale file handle'),
                      FileNotFoundError(errno.ENOENT, 'No such file'))
    found['told'] = [_kind(lambda: on_all_ranks(fail(stale))), _kind(lambda: on_all_ranks(fail(missing))),
                     _kind(lambda: on_rank_zero(fail_first(stale))),
                     _kind(lambda: on_rank_zero(fail_first(missing)))]
    remove = checkpoint._remove
    def slowly(paths):
        import time
        time.sleep(1)
        remove(paths)
    checkpoint._remove = slowly
    saver = checkpoint.Saver(folder, keep=1, timeout=77.)
    for step in (1, 2):
        saver.save(step, {'model': {'w': torch.ones(3)}}, {})
        saver.wait()
    found['left'] = sorted(p.name for p in Path(folder).iterdir())  # at once after `wait`, on each rank
    checkpoint._remove = remove
    run = trainer.start_run(load_run(run_path), report=lambda line: None)
    groups = [run.saver.group, *(run.mesh.get_group(name) for name in run.mesh.mesh_dim_names)]
    found['limits'] = [_limit(group) for group in groups]
    return found

@pytest.fixture(scope='module')
def two(tmp_path_factory, tokens):
    from conftest import RUN
    folder = tmp_path_factory.mktemp('two')
    (folder/'run.toml').write_text(RUN.format(out=(folder/'run').as_posix(), tokens=tokens.as_posix(),
                                              steps=4, save_every=2) + '[parallel]\nshard = 2\n')
    (folder/'saves').mkdir()
    return run_ranks('test_failures:_two', 2,
                     {'run_path': str(folder/'run.toml'), 'folder': str(folder/'saves')}, timeout=200)

def test_all_ranks_hear_whether_an_error_may_pass(two):
    for found in two: assert found['told'] == ['TemporaryError', 'UserError', 'TemporaryError', 'UserError']

def test_no_rank_returns_from_a_save_before_the_old_checkpoint_is_gone(two):
    for found in two: assert found['left'] == ['step-00000002']

def test_every_group_has_the_same_time_limit_below_the_watchdogs(two):
    for found in two: assert found['limits'] == [collective_seconds(30.)]*4 and found['limits'][0] < 30*60

# --- GPUs, recorded: there is none here ---------------------------------------------------------

def test_a_single_process_takes_the_gpu_it_is_told(monkeypatch):
    taken = []
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    monkeypatch.setattr(processes, 'pick_device', torch.device)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: taken.append(device))
    assert start_ranks('cuda:1') == torch.device('cuda:1') and taken == [torch.device('cuda:1')]
    assert start_ranks('cuda') == torch.device('cuda') and len(taken) == 1          # the current one stays
    with pytest.raises(UserError, match='GPU 2 is not here, this machine shows 2'): start_ranks('cuda:2')

def test_no_metrics_are_read_for_a_picture(monkeypatch, tmp_path):
    "A run of months would read its whole log at every save"
    metrics = log.open_metrics(tmp_path)
    for i in range(1, 4): metrics.add({'step': i, 'tokens': 100*i, 'loss': 1/i})
    stub = SimpleNamespace(out=tmp_path, step=3, config=SimpleNamespace(train=SimpleNamespace(steps=3)),
                           report=lambda line: None)
    def refuse(path): raise AssertionError(path)
    monkeypatch.setattr(log, '_read_rows', refuse)
    monkeypatch.setattr(log, 'open_regular', refuse)
    trainer.publish(SimpleNamespace(run=stub, metrics=metrics, signals=[]))
    assert (tmp_path/'loss.png').stat().st_size > 1000
    metrics.close()

def test_a_mark_stands_in_the_queue_of_its_own_gpu(monkeypatch):
    asked, device = [], torch.device('cuda:1')
    there = SimpleNamespace(is_cuda=True, device=device, shape=(2,))
    stub = SimpleNamespace(stack=lambda values: there,
                           empty=lambda *shape, pin_memory: SimpleNamespace(
                               copy_=lambda source, non_blocking: 'on the way'),
                           cuda=SimpleNamespace(current_stream=lambda device=None: asked.append(device)
                                                or SimpleNamespace(record_event=lambda: 'mark')))
    monkeypatch.setattr(log, 'torch', stub)
    travelling = log.StepInFlight([torch.ones(1)])
    assert (travelling.values, travelling.copied, asked) == ('on the way', 'mark', [device])

def test_a_save_waits_for_the_gpu_that_its_tensors_are_on(monkeypatch, tmp_path):
    waited, saver = [], checkpoint.Saver(tmp_path)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device=None: waited.append(device))
    gpu = torch.device('cuda:1')
    there = {n: SimpleNamespace(is_cuda=True, device=gpu, shape=(), dtype=None) for n in 'ab'}
    monkeypatch.setattr(checkpoint, 'plan_sharded',
                        lambda tensors, group: checkpoint.Plan({}, {}, {}, there, {}))
    monkeypatch.setattr(saver.host, '_make_room', lambda tensors, form: None)
    saver.host.room = {n: SimpleNamespace(copy_=lambda t, non_blocking: None) for n in 'ab'}
    monkeypatch.setattr(saver, '_work', lambda *args: None)
    saver.save(1, {}, {})
    saver.wait()
    assert waited == [torch.device('cuda:1')]

def test_one_gloo_group_beside_nccl_and_none_in_the_mesh(monkeypatch):
    made, meshes = [], []
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'new_group', lambda **kwargs: made.append(kwargs))
    monkeypatch.setattr(mesh, 'init_device_mesh', lambda *args, **kwargs: meshes.append(kwargs))
    monkeypatch.setattr(dist, 'get_backend_config', lambda: 'cuda:nccl,cpu:gloo')
    assert host_group(60.) is None and not made
    make_mesh((1, 2, 1), 'cuda')
    assert meshes[-1]['backend_override'] == {'replicate': 'nccl', 'shard': 'nccl', 'tensor': 'nccl'}
    monkeypatch.setattr(dist, 'get_backend_config', lambda: 'cpu:gloo,cuda:gloo')
    host_group(60.)
    make_mesh((1, 2, 1), 'cpu')
    assert (made[0]['backend'] == 'gloo' and made[0]['timeout'].total_seconds() == 60
            and 'backend_override' not in meshes[-1])

def test_torch_knows_what_the_mesh_is_asked():
    import inspect
    from torch.distributed.device_mesh import init_device_mesh
    assert 'backend_override' in inspect.signature(init_device_mesh).parameters

def _refused(path, name, settings):
    "What this one of two ranks says where rank 1 cannot have what all need"
    def cannot(*args): raise UserError('not on this node')
    def can(*args): return SimpleNamespace(bos_id=1)
    setattr(runs, name, cannot if dist.get_rank() else can)
    try:
        runs.start_run(load_run(path, settings), lambda line: None)
    except UserError as e:
        return str(e)

@pytest.mark.parametrize('name, settings',
                         [('Tokenizer', ('--data.documents', 'separate')),
                          ('async_tensor_parallel', ('--parallel.tensor', '2', '--parallel.async_tensor',
                                                     'True', '--train.compile', 'blocks'))])
def test_what_one_rank_cannot_open_all_refuse(run_file, name, settings):
    options = {'path': str(run_file(4)), 'name': name, 'settings': settings}
    assert run_ranks('test_failures:_refused', 2, options) == ['rank 1: not on this node']*2

# --- the watchdog -------------------------------------------------------------------------------

def test_a_wait_for_a_save_has_the_watchdogs_time_for_itself(run_file, monkeypatch):
    "The clock is wound up right before and after, and also around a validation"
    seen = []
    def noted(name, call):
        def noting(*args):
            seen.append(name)
            return call(*args)
        return noting
    @contextmanager
    def watchdog(minutes): yield lambda: seen.append('alive')
    monkeypatch.setattr(trainer, 'watchdog', watchdog)
    monkeypatch.setattr(trainer, 'validation_loss', noted('validation', trainer.validation_loss))
    run = runs.start_run(load_run(run_file(4, save_every=2)), lambda line: None)
    run.saver.wait = noted('wait', run.saver.wait)
    assert trainer.fit(run, progress=False) == 0
    long = [i for i, name in enumerate(seen) if name != 'alive']
    assert [seen[i] for i in long].count('validation') == 1 and len(long) > 3
    for i in long: assert seen[i - 1] == seen[i + 1] == 'alive'

# --- the batch script ---------------------------------------------------------------------------

def test_the_batch_script_hands_over_cores_connections_and_a_port(tmp_path):
    "An `srun` that says how it was called and what it was given"
    import resource
    (tmp_path/'srun').write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@" "limit $(ulimit -n)" "lazy $TORCH_GLOO_LAZY_INIT" "port '
        '$MASTER_PORT" > called\n')
    (tmp_path/'scontrol').write_text('#!/bin/bash\necho first-machine\n')
    (tmp_path/'python').write_text('#!/bin/bash\necho "$@" > checked\nexit $CODE\n')
    for name in ('srun', 'scontrol', 'python'): (tmp_path/name).chmod(0o755)
    slurm = dict(SLURM_JOB_NAME='llama', SLURM_JOB_ID='19999', SLURM_JOB_NODELIST='node[1-2]',
                 SLURM_NTASKS='16', SLURM_CPUS_PER_TASK='8', PATH=f'{tmp_path}:{os.environ["PATH"]}',
                 PYTHON=str(tmp_path/'python'))
    def submit(code):
        return subprocess.run(['bash', str(ROOT/'configs'/'train.sbatch'), 'run.toml'], cwd=tmp_path,
                              env={**ENV, **slurm, 'CODE': code}, capture_output=True, text=True, timeout=60)
    for code, words in (('2', 'only you can mend'), ('75', 'the storage failed, 1 of 5')):
        refused = submit(code)                                          # by the check, before any rank began
        assert refused.returncode == int(code) and words in refused.stdout
        assert not (tmp_path/'called').exists()
    slurm['PYTHON'] = str(tmp_path/'none')
    missing = submit('0')
    assert missing.returncode == 2 and 'there is no' in missing.stdout and 'set PYTHON' in missing.stdout
    slurm['PYTHON'] = str(tmp_path/'python')
    done = submit('0')
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'checked').read_text() == '-m llama_nb train run.toml --check --ranks 16\n'
    called = (tmp_path/'called').read_text().splitlines()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert {'--export=ALL', '--distribution=block:block'} <= set(called)
    assert '--cpus-per-task=8' in called and 'lazy 1' in called and 'port 29999' in called
    assert f'limit {65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)}' in called
    before = int((ROOT/'configs'/'train.sbatch').read_text().split('--signal=USR1@')[1].split()[0])
    assert before >= 600                                                # a save under way, and one more

def test_thousands_of_files_are_deleted_by_many_hands(tmp_path):
    (old := tmp_path/'step-00000001').mkdir()
    for i in range(300): (old/str(i)).touch()
    with mock.patch.object(checkpoint, 'ThreadPoolExecutor', wraps=checkpoint.ThreadPoolExecutor) as pool:
        checkpoint._remove([old])
    assert pool.call_count == 1 and list(tmp_path.iterdir()) == []

# --- numbers that are none ----------------------------------------------------------------------

NUMBERS = {name: kind for name, kind in setting_names().items() if kind in (int, float)}
WRONG = {float: ('nan', '1e400', '-inf', '-1.0', '-0.0'),
         int: ('1e400', '-9999999999999', '1'*30, '1.5', 'true')}
START = {'model': {'preset': '"7B"'}, 'data': {'train': '"tokens"'}, 'train': {'steps': '5000'}, 'optim': {},
         'parallel': {}}

def toml_with(name, value):
    section, key = name.split('.')
    tables = {s: dict(table) for s, table in START.items()}
    tables[section][key] = value
    return ('out = "run"\n'
            + '\n'.join(f'[{s}]\n' + '\n'.join(f'{k} = {v}' for k, v in table.items())
                        for s, table in tables.items()))

def assert_refused(call, name):
    with pytest.raises(UserError) as caught: call()
    said = str(caught.value)
    assert name in said and 'must be' in said and '\n' not in said, said

@pytest.mark.parametrize('name', NUMBERS)
def test_a_number_that_is_none_is_named_with_its_range(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for wrong in WRONG[NUMBERS[name]]:
        Path('run.toml').write_text(toml_with(name, wrong))
        assert_refused(lambda: load_run('run.toml'), name)
    Path('run.toml').write_text(toml_with('train.steps', '5000'))
    assert_refused(lambda: load_run('run.toml', [f'--{name}={WRONG[NUMBERS[name]][0]}']), name)
    assert [p.name for p in tmp_path.iterdir()] == ['run.toml']

@pytest.mark.parametrize('name, value',
                         [('optim.lr', '0'), ('optim.eps', '0'), ('optim.eps', '1e-50'), ('optim.beta1', '1'),
                          ('optim.beta2', '1.0'), ('optim.beta2', '0.99999999999999999'),
                          ('optim.min_lr_ratio', '1.01'), ('optim.max_grad_norm', '0'), ('optim.lr', '1e39'),
                          ('optim.lr', '1' + '0'*40), ('model.norm_eps', '0'), ('model.norm_eps', '1e-50'),
                          ('model.rope_theta', '0.5'), ('train.memory_budget', '1.5'),
                          ('train.spike_sigmas', '0'), ('train.hang_minutes', '1e-9'),
                          ('train.hang_minutes', '1e9'),
                          ('train.peak_flops', '1e-320'), ('train.prefetch', '100000'),
                          ('train.seed', str(2**63)), ('model.dim', str(2**31 - 2)),
                          ('model.vocab_size', str(2**31 - 1)), ('train.steps', '0')])
def test_numbers_out_of_their_range(name, value, tmp_path):
    (tmp_path/'run.toml').write_text(toml_with(name, value))
    assert_refused(lambda: load_run(tmp_path/'run.toml'), name)

@pytest.mark.parametrize('name, value',
                         [('optim.beta1', '0'), ('optim.weight_decay', '0'), ('optim.min_lr_ratio', '0'),
                          ('optim.min_lr_ratio', '1'), ('train.memory_budget', '0'),
                          ('train.memory_budget', '1'),
                          ('train.hang_minutes', '0'), ('train.hang_minutes', '0.5'),
                          ('train.peak_flops', '0'), ('train.seed', str(2**63 - 1)),
                          ('train.keep_every', '0'),
                          ('train.prefetch', '0'), ('parallel.shard', '0'), ('optim.lr', '1'),
                          ('train.max_skipped', '0')])
def test_numbers_at_the_edge_of_their_range(name, value, tmp_path):
    (tmp_path/'run.toml').write_text(toml_with(name, value))
    section, key = name.split('.')
    assert float(getattr(getattr(load_run(tmp_path/'run.toml'), section), key)) == float(value)

def test_seeds_at_the_edge_work(tmp_path):
    torch.manual_seed(load_run(_seed_file(tmp_path, 2**63 - 1)).train.seed)

def _seed_file(tmp_path, seed):
    (tmp_path/'run.toml').write_text(toml_with('train.seed', str(seed)))
    return tmp_path/'run.toml'

@pytest.mark.parametrize('args',
                         [('train', '--optim.lr', 'nan'), ('train', '--optim.lr', 'inf'),
                          ('train', '--optim.lr', '1e400'), ('train', '--optim.eps', '0'),
                          ('train', '--optim.beta2', '1'),
                          ('toy', '--steps', '1e400'), ('toy', '--steps=-3'), ('toy', '--steps', '1'*30),
                          ('toy', '--seed=-1'), ('toy', '--seed', str(2**64)), ('toy', '--device', 'tpu'),
                          ('tokenizer', 'new.model', '--vocab-size=-5'),
                          ('tokenizer', 'new.model', '--vocab-size', '1'*20),
                          ('tokenizer', 'new.model', '--vocab-size', 'nan'),
                          ('data', 'new', '--tokenizer', 'TOK', '--held-out', 'nan'),
                          ('data', 'new', '--tokenizer', 'TOK', '--held-out', 'inf'),
                          ('data', 'new', '--tokenizer', 'TOK', '--held-out=-0.5'),
                          ('generate', 'run', '--temperature', 'nan'),
                          ('generate', 'run', '--temperature', '1e400'),
                          ('generate', 'run', '--top-p', 'nan'), ('generate', 'run', '--seed', str(2**70)),
                          ('generate', 'run', '--max-new-tokens', '1e400'),
                          ('generate', 'run', '--max-new-tokens=-1')])
def test_commands_refuse_in_one_line_and_make_nothing(args, tokens, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('run.toml').write_text(toml_with('train.steps', '5000'))
    words = ['run.toml', *args[1:]] if args[0] == 'train' else args[1:]
    assert cli.main([args[0], *(str(tokens/'tokenizer.model') if w == 'TOK' else w for w in words)]) == 2
    said = capsys.readouterr().err
    assert said.startswith('llama-nb: error: ') and said.count('\n') == 1, said
    assert [p.name for p in tmp_path.iterdir()] == ['run.toml']

def test_text_that_cannot_be_read_is_one_line_of_the_tokenizer_too(tmp_path, capsys):
    "SentencePiece makes a traceback of what its text raises"
    bad, model = tmp_path/'bad.jsonl', tmp_path/'new.model'
    bad.write_text('{"text": "fine"}\n{"text": \n')
    assert cli.main(['tokenizer', str(model), str(bad)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f'llama-nb: error: {bad}, line 2, is not JSON') and said.count('\n') == 1, said
    assert not model.exists()

def test_a_restart_while_storage_refuses_to_read(tmp_path, run_file):
    "Nothing is damaged, so nobody is told to remove the folder: the same command may succeed later"
    command = ['train', str(run_file(4, save_every=2))]
    run = [sys.executable, '-m', 'llama_nb', *command]
    subprocess.run(run, env=ENV, check=True, capture_output=True, timeout=150)
    again = ['-c', 'import sys, errno\nfrom unittest import mock\nfrom llama_nb.cli import main\n'
             'import llama_nb.train.stored as stored\n'
             'stale = OSError(errno.ESTALE, "Stale")\n'
             'with mock.patch.object(stored, "file_digest", side_effect=stale):\n'
             '    sys.exit(main(sys.argv[1:]))', *command]
    done = subprocess.run([sys.executable, *again], env=ENV, capture_output=True, text=True, timeout=150)
    assert done.returncode == 75 and 'damaged' not in done.stderr and 'may pass' in done.stderr, done.stderr
