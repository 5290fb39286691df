"""The committed batch script on a real Slurm of one node, which is started here, in its own folder, and
stopped again.

Not part of `make test`: `make test-slurm` runs it, as root on Debian or Ubuntu, and installs Slurm if it is
not there.
"""
import json, os, shutil, socket, subprocess, sys, tempfile, time
from pathlib import Path
import pytest
from conftest import ENV, ROOT

# task/affinity: a rank sees the cores that srun gives it, and no others. cred_expire is also how long a
# requeued job waits before it may start again; 120 s if not set
CONF = '''
ClusterName=one
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={slurmd_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobRequeue=1
PreemptMode=REQUEUE
PreemptType=preempt/partition_prio
KillWait=60
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000 State=UNKNOWN
PartitionName=low Nodes=localhost Default=YES PriorityTier=1 PreemptMode=REQUEUE MaxTime=INFINITE
PartitionName=high Nodes=localhost PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
'''

CORES = 4        # two ranks of two; Slurm believes it on a machine with two, too

def wait_for(true, what, seconds=120):
    "What `true()` gives as soon as it is true"
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f'{what}: not in {seconds} s'
        time.sleep(.2)
    return found

def install():
    if all(map(shutil.which, ('slurmctld', 'slurmd', 'munged', 'sbatch'))): return
    if not shutil.which('apt-get') or os.geteuid():
        pytest.exit('test-slurm needs slurm-wlm and munge, or root on Debian or Ubuntu to install them', 2)
    for command in (['apt-get', 'update'],
                    ['apt-get', 'install', '-y', '--no-install-recommends', 'slurm-wlm', 'munge']):
        subprocess.run(command, check=True, timeout=600, stdout=subprocess.DEVNULL,
                       env={**os.environ, 'DEBIAN_FRONTEND': 'noninteractive'})

class Slurm:
    "A cluster of this machine alone"
    def __init__(self, folder):
        self.folder, self.daemons = folder, []
        with socket.socket() as a, socket.socket() as b:
            a.bind(('127.0.0.1', 0))
            b.bind(('127.0.0.1', 0))
            ports = dict(port=a.getsockname()[1], slurmd_port=b.getsockname()[1])
        for name in ('state', 'spool'): (folder/name).mkdir()
        (folder/'slurm.conf').write_text(CONF.format(folder=folder, cpus=CORES, **ports))
        # slurmd 22.05 wants the file, though nothing uses it
        (folder/'cgroup.conf').write_text('CgroupPlugin=cgroup/v1\n')
        (folder/'munge.key').write_bytes(os.urandom(1024))
        (folder/'munge.key').chmod(0o400)
        self.env = {**ENV, 'SLURM_CONF': str(folder/'slurm.conf')}

    def daemon(self, *command):
        with open(self.folder/f'{command[0]}.out', 'w') as out:
            self.daemons.append(subprocess.Popen(command, env=self.env, stdout=out, stderr=out))

    def start(self):
        f = self.folder
        self.daemon('munged', '--foreground', f'--socket={f}/munge.socket', f'--key-file={f}/munge.key',
                    f'--pid-file={f}/munge.pid', f'--seed-file={f}/munge.seed', f'--log-file={f}/munge.log')
        wait_for((f/'munge.socket').exists, 'munged')
        self.daemon('slurmctld', '-D', '-f', f'{f}/slurm.conf')
        self.daemon('slurmd', '-D', '-N', 'localhost', '-f', f'{f}/slurm.conf')
        wait_for(lambda: 'idle' in self.run('sinfo', '-h', '-o', '%T', check=False), 'an idle node')

    def run(self, *command, check=True, **env):
        done = subprocess.run([str(c) for c in command], env={**self.env, **env}, cwd=self.folder,
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout.strip()

    def job(self, number):
        return dict(word.partition('=')[::2] for word in self.run('scontrol', 'show', 'job', number).split())

    def stop(self):
        self.run('scancel', '--user=root', check=False)
        try:
            wait_for(lambda: not self.run('squeue', '-h', '-o', '%i', check=False), 'the end of all jobs')
        finally:
            for daemon in reversed(self.daemons):
                daemon.terminate()
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()

@pytest.fixture(scope='module')
def slurm():
    install()
    folder = Path(tempfile.mkdtemp(prefix='slurm-', dir='/tmp'))
    folder.chmod(0o755)  # munged wants a socket that all can reach
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
    shutil.rmtree(folder)

# ------------------------------------------------------------------------------------------------

RANKS = 2

def rows(folder):
    path = Path(folder)/'metrics.jsonl'
    return ([json.loads(line) for line in path.read_text().splitlines(True) if line.endswith('}\n')]
            if path.exists() else [])

@pytest.fixture
def submit(slurm):
    "Submit the committed batch script as it is, with what this one node has on the command line"
    def submit(name, run, ranks=RANKS, cores=1, python=sys.executable):
        flags = [f'--ntasks-per-node={ranks}', '--nodes=1', f'--cpus-per-task={cores}', '--gres=none',
                 '--time=15', f'--job-name={name}']
        return slurm.run('sbatch', '--parsable', *flags, ROOT/'configs'/'train.sbatch', run,
                         PYTHON=str(python))
    yield submit
    if slurm.daemons:
        # `make test-slurm` shows it
        for path in slurm.folder.glob('*-*.log'): print(f'--- {path.name}\n{path.read_text()}')

@pytest.mark.timeout(300)
def test_a_rank_sees_its_own_cores(slurm, submit):
    """The committed script with two cores a rank; instead of Python, a program that says which cores it may
    use"""
    ranks, program = 2, slurm.folder/'cores'
    program.write_text(f'#!{sys.executable}\nimport os\nprint(*sorted(os.sched_getaffinity(0)))\n')
    program.chmod(0o755)
    job = submit('cores', 'run.toml', ranks=ranks, cores=2, python=program)
    wait_for(lambda: slurm.job(job)['JobState'] == 'COMPLETED', 'the job')
    seen = [(slurm.folder/'logs'/f'cores-{job}'/f'{rank}.log').read_text().split() for rank in range(ranks)]
    # without --cpus-per-task, srun binds nobody, and both see all
    assert all(seen) and not set(seen[0]) & set(seen[1]), seen
    if os.cpu_count() >= CORES: assert [len(cores) for cores in seen] == [2, 2], seen

@pytest.mark.timeout(300)
def test_storage_that_fails_is_tried_again_a_bounded_number_of_times(slurm, submit):
    """Rank 1 leaves with 75 and rank 0, which waits for it, is killed: what srun says of all is a kill, what
    the script does is to try again, twice"""
    program = slurm.folder/'storage'
    # the look before the ranks begin has no rank, and finds nothing wrong
    program.write_text('#!/bin/bash\n[ -z "$RANK" ] && exit\n[ "$RANK" = 1 ] && exit 75\nexec sleep 600\n')
    program.chmod(0o755)
    quick = slurm.folder/'quick.sbatch'  # the committed script, but for the minute that the others have
    quick.write_text((ROOT/'configs'/'train.sbatch').read_text().replace('--wait=60', '--wait=3'))
    job = slurm.run('sbatch', '--parsable', f'--ntasks-per-node={RANKS}', '--nodes=1', '--cpus-per-task=1',
                    '--gres=none', '--time=15', '--job-name=storage', quick, 'run.toml',
                    PYTHON=str(program), STORAGE_TRIES='3')
    wait_for(lambda: slurm.job(job)['JobState'] == 'FAILED', 'the last attempt', 240)
    said = (slurm.folder/f'storage-{job}.log').read_text()
    assert (slurm.job(job)['Restarts'] == '2' and 'failed, 1 of 3' in said and 'failed, 2 of 3' in said
            and said.count('too often in a row') == 1), said

@pytest.mark.timeout(1200)
def test_preempted_requeued_and_out_of_time_it_equals_a_run_without_trouble(
    slurm, submit, run_file, tmp_path):
    whole, path = run_file(300, save_every=50, name='whole'), run_file(300, save_every=50, name='run')
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={RANKS}',
                '-m', 'llama_nb', 'train', whole]
    done = subprocess.run([str(c) for c in launcher], env=ENV, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr

    job, out = submit('run', path), tmp_path/'run'
    state = lambda: slurm.job(job)['JobState']
    restarts = lambda: int(slurm.job(job)['Restarts'])
    wait_for(lambda: len(rows(out)) > 30, 'the first steps')

    urgent = slurm.run('sbatch', '--parsable', '--partition=high', '--exclusive', '--output=/dev/null',
                       '--wrap=sleep 1')
    wait_for(lambda: slurm.job(urgent)['JobState'] == 'COMPLETED', 'the job that preempts')
    assert restarts() == 1 and 'DUE TO PREEMPTION' in (slurm.folder/f'run-{job}.log').read_text()
    before = len(rows(out))
    assert 30 < before < 300
    wait_for(lambda: len(rows(out)) > before + 30, 'the second attempt')

    slurm.run('scancel', '--signal=USR1', job)  # what --signal=USR1@600 sends, without waiting for it
    wait_for(lambda: restarts() == 2, 'the third attempt')
    assert len(rows(out)) < 300
    wait_for(lambda: state() == 'COMPLETED', 'the end', 300)

    said = (slurm.folder/f'run-{job}.log').read_text()
    assert ([f'attempt {i}: {RANKS} ranks' in said for i in range(4)] == [True, True, True, False]
            and 'saved before the time limit; again' in said and 'attempt 2: finished' in said)
    logs = (slurm.folder/'logs'/f'run-{job}').glob('*.log')
    ranks, attempts = [f'{i}.log' for i in range(RANKS)], [f'srun-{i}.log' for i in range(3)]
    assert sorted(p.name for p in logs) == ranks + attempts
    own = (slurm.folder/'logs'/f'run-{job}'/'0.log').read_text()
    # it saved at both signals, and was not only killed
    assert own.count('stopped after step') == 2 == own.count('continuing')
    same = lambda folder: [(r['step'], r['loss'], r['grad_norm'], r['lr'], r['tokens']) for r in rows(folder)]
    assert [r['step'] for r in rows(out)] == list(range(1, 301))
    assert same(out) == same(tmp_path/'whole')  # bit for bit: the layout is the same

def test_a_cancelled_job_saves_and_stays_cancelled(slurm, submit, run_file, tmp_path):
    path = run_file(2000, save_every=1000, name='cancelled')
    job, out = submit('cancelled', path), tmp_path/'cancelled'
    wait_for(lambda: len(rows(out)) > 30, 'the first steps')
    slurm.run('scancel', job)
    wait_for(lambda: slurm.job(job)['JobState'] == 'CANCELLED', 'the end')
    wait_for(lambda: not slurm.run('squeue', '-h', '-o', '%i', '--jobs', job, check=False), 'an empty queue')
    steps = [row['step'] for row in rows(out)]
    own = (slurm.folder/'logs'/f'cancelled-{job}'/'0.log').read_text()
    assert own.count(f'stopped after step {len(steps)}') == 1 and steps == [*range(1, len(steps) + 1)]
    said = (slurm.folder/f'cancelled-{job}.log').read_text()
    assert 'SIGTERM from Slurm' in said and 'attempt 1' not in said
    assert slurm.job(job)['Restarts'] == '0'

DATA = '''
import sys, time
from dataclasses import replace
from pathlib import Path
from llama_nb.data.sources import read_documents
from llama_nb.data.engine import Job, run_job
from llama_nb.data.executors import Slurm
from llama_nb.data.stage import Decision

def shout(doc):
    time.sleep(.2)
    return replace(doc, text=doc.text.upper()), [Decision('shout', 0)]

if __name__ == '__main__':
    import data_job
    inputs = {p.name: str(p) for p in Path(sys.argv[1]).iterdir()}
    executor = Slurm(time='10', memory=1, poll=.5) if sys.argv[3] == 'slurm' else 'local'
    job = Job(read_documents, (('shout', data_job.shout),))
    run_job(job, inputs, sys.argv[2], workers=2, executor=executor)
'''

@pytest.mark.timeout(600)
def test_a_data_job_is_preempted_and_its_bytes_are_the_same(slurm, tmp_path):
    "As an array of two tasks, both requeued on the way; the command that waits is killed and started again"
    pytest.importorskip('datatrove', reason='jobs under Slurm are submitted by datatrove')
    from llama_nb.data.documents import Document, write_jsonl
    (tmp_path/'data_job.py').write_text(DATA)
    for i in range(8):
        write_jsonl((Document(f'text {i} {j}', f'{i}/{j}') for j in range(10)), tmp_path/'in'/f'{i}.jsonl')
    def start(out, executor):
        command = [sys.executable, tmp_path/'data_job.py', tmp_path/'in', tmp_path/out, executor]
        env = {**slurm.env, 'PYTHONPATH': f'{ROOT}{os.pathsep}{tmp_path}'}
        return subprocess.Popen([str(c) for c in command], env=env, cwd=tmp_path, start_new_session=True)
    assert start('calm', 'local').wait(120) == 0
    waiting = start('out', 'slurm')
    note, records = tmp_path/'out'/'slurm.json', tmp_path/'out'/'records'
    wait_for(lambda: records.exists() and len([*records.iterdir()]) >= 2, 'the first files')
    number = json.loads(note.read_text())['job']
    waiting.kill()
    waiting.wait()
    urgent = slurm.run('sbatch', '--parsable', '--partition=high', '--exclusive', '--output=/dev/null',
                       '--wrap=sleep 1')
    wait_for(lambda: slurm.job(urgent)['JobState'] == 'COMPLETED', 'the job that preempts')
    assert len([*records.iterdir()]) < 8
    waiting = start('out', 'slurm')                              # finds the array in the queue
    assert waiting.wait(240) == 0
    logs = ''.join(p.read_text() for p in (tmp_path/'out'/'slurm'/'logs').iterdir())
    assert 'DUE TO PREEMPTION' in logs and slurm.job(f'{number}_0')['Restarts'] == '1'
    def bytes_of(out): return {p.name: p.read_bytes() for p in (tmp_path/out/'documents').iterdir()}
    assert bytes_of('calm') == bytes_of('out') and len(bytes_of('out')) == 8
    assert (tmp_path/'out'/'manifest.json').read_bytes() == (tmp_path/'calm'/'manifest.json').read_bytes()
