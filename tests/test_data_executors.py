"Processes that fail in every way, and a Slurm that is played by four scripts; the real one is in slurm.py."
import multiprocessing, os, random, signal, stat, sys, time
from pathlib import Path
import pytest
from llama_nb.core import TemporaryError, UserError
from llama_nb.data.documents import Document, write_jsonl
from llama_nb.data.engine import run_job
from llama_nb.data.executors import Ray, Slurm, in_processes, sigterm_raises

MODULE = '''
import multiprocessing, os, signal, time
from dataclasses import replace
from llama_nb.core import UserError
from llama_nb.data.sources import read_documents
from llama_nb.data.engine import Job
from llama_nb.data.stage import Decision

class Odd(Exception):
    def __init__(self, a, b): super().__init__(f'{a} and {b}')
class Holder:
    def __reduce__(self): return load, ()
    def __call__(self, what): return what
def load():
    if multiprocessing.parent_process(): raise ImportError('no module of that name')
def act(what, seconds=0):
    time.sleep(seconds)
    if what == 'exit': os._exit(3)
    if what == 'kill': os.kill(os.getpid(), signal.SIGKILL)
    if what == 'signal': os.kill(os.getpid(), signal.SIGUSR1)
    if what == 'odd': raise Odd('this', 'that')
    if what == 'disk': raise OSError(5, 'Input/output error', 'a name')
    if what == 'cause':
        try: raise OSError(5, 'Input/output error')
        except OSError as e: raise UserError('could not read') from e
    if what == 'mistake': raise UserError('a mistake')
    if what == 'deaf':
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    return what
def shout(doc):
    if doc.id == 'deadly': os.kill(os.getpid(), signal.SIGKILL)
    if doc.id == 'wrong': raise UserError('a mistake')
    return replace(doc, text=doc.text.upper()), [Decision('shout', 0)]
def job(): return Job(read_documents, (('shout', shout),))
'''

@pytest.fixture(scope='module')
def acting(tmp_path_factory):
    folder = tmp_path_factory.mktemp('executors')
    (folder/'acting.py').write_text(MODULE)
    sys.path.insert(0, str(folder))
    import acting
    yield acting
    sys.path.remove(str(folder))

@pytest.fixture
def files(tmp_path):
    for i in range(5): write_jsonl([Document(f'text {i}', f'{i}')]*(i + 1), tmp_path/'in'/f'{i}.jsonl')
    return {p.name: str(p) for p in sorted((tmp_path/'in').iterdir())}

def contents(folder): return {p.name: p.read_bytes() for p in sorted(folder.rglob('[!.]*.zst'))}

# --- processes ----------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', range(2))
def test_everything_is_done_once_whatever_takes_how_long(acting, seed):
    rng = random.Random(seed)
    items = [(i, rng.random()*.01) for i in range(rng.randrange(60))]
    found = list(in_processes(acting.act, items, rng.randrange(1, 5)))
    assert sorted(found) == [i for i, _ in items] and not multiprocessing.active_children()

@pytest.mark.parametrize('what, kind, words', [
    ('exit', TemporaryError, 'ended with exit code 3 at exit'),
    ('kill', TemporaryError, 'was killed by SIGKILL, perhaps because the memory was full, at kill'),
    ('signal', TemporaryError, 'was killed by SIGUSR1 at signal'),
    ('odd', RuntimeError, 'Odd: this and that'), ('disk', OSError, 'Input/output error'),
    ('cause', TemporaryError, 'could not read'), ('mistake', UserError, 'a mistake')])
def test_what_happens_in_a_process_is_said(acting, what, kind, words):
    with pytest.raises(kind, match=words) as raised:
        for _ in in_processes(acting.act, [('well', 0), (what, 0), ('well', 600)], 2): pass
    assert isinstance(raised.value, TemporaryError) == (kind is TemporaryError)
    if what == 'disk': assert (raised.value.errno, raised.value.filename) == (5, 'a name')
    if what == 'odd': assert 'in act' in raised.value.__notes__[0]           # the worker's traceback
    assert not multiprocessing.active_children()

def test_a_job_that_a_worker_cannot_load_is_one_line(acting):
    with pytest.raises(UserError, match='cannot load the job: no module'):
        list(in_processes(acting.Holder(), [(1,)], 2))

def test_who_does_not_end_is_killed(acting, monkeypatch):
    monkeypatch.setattr('llama_nb.data.executors.GRACE', .5)
    found = in_processes(acting.act, [('well', 0), ('deaf', 0)], 2)
    assert next(found) == 'well'
    time.sleep(.5)
    found.close()
    assert not multiprocessing.active_children()

def test_the_handler_of_somebody_else_is_left_alone():
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with sigterm_raises(): os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)

# --- Slurm ---------------------------------------------------------------------------------------

SCRIPTS = {'sinfo': 'echo debug; echo "cpu*"', 'scontrol': 'echo localhost', 'srun': '''
while [ "${1#-}" != "$1" ]; do [ "$1" = -n ] && shift; shift; done
exec "$@"''', 'squeue': '''
[ -e $PLAY/running ] && echo 41_0 && exit
echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1''', 'sbatch': '''
for script; do :; done
echo "$*" >> $PLAY/submitted
[ -e $PLAY/refuse ] && exit 1
cp $script $PLAY/script
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' $script)
touch $PLAY/running
(for i in $(seq 0 $last); do SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here bash $PLAY/script; done
 rm $PLAY/running) > $PLAY/log 2>&1 &
echo Submitted batch job 41'''}

@pytest.fixture
def play(tmp_path, monkeypatch):
    "A folder in which a Slurm is played"
    pytest.importorskip('datatrove', reason='jobs under Slurm are submitted by datatrove')
    folder = tmp_path/'play'
    (folder/'bin').mkdir(parents=True)
    for name, text in SCRIPTS.items():
        (folder/'bin'/name).write_text(f'#!/bin/bash\n{text}\n')
        (folder/'bin'/name).chmod(stat.S_IRWXU)
    monkeypatch.setenv('PATH', f'{folder/"bin"}{os.pathsep}{os.environ["PATH"]}')
    monkeypatch.setenv('PLAY', str(folder))
    yield folder
    end = time.monotonic() + 60
    while (folder/'running').exists() and time.monotonic() < end:
        time.sleep(.05)

def test_a_command_that_comes_back_waits_for_the_same_array(acting, files, play, tmp_path, capsys):
    run_job(acting.job(), files, tmp_path/'calm')
    out, slurm = tmp_path/'out', Slurm(poll=.1)
    class Tired(Slurm):
        def __call__(self, *args):
            for name in super().__call__(*args):
                yield name
                raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run_job(acting.job(), files, out, workers=2, executor=Tired(poll=.1))
    assert 'Slurm goes on with job 41' in capsys.readouterr().err
    run_job(acting.job(), files, out, workers=2, executor=slurm)
    assert contents(out) == contents(tmp_path/'calm') and not (out/'slurm.json').exists()
    assert (out/'manifest.json').read_bytes() == (tmp_path/'calm'/'manifest.json').read_bytes()
    submitted = (play/'submitted').read_text()
    assert submitted.count('\n') == 1 and '#SBATCH --partition=cpu' in (play/'script').read_text()
    run_job(acting.job(), files, out, workers=2, executor='slurm')                # nothing is left to do
    assert (play/'submitted').read_text() == submitted

def test_what_an_array_has_left_is_said_and_done_by_the_next(acting, files, play, tmp_path):
    bad = Path(files['2.jsonl'])
    write_jsonl([Document('text', 'deadly')], bad)
    with pytest.raises(TemporaryError, match=r'job 41 of Slurm has ended, and \d of 5 files are left'):
        run_job(acting.job(), files, tmp_path/'out', workers=1, executor=Slurm(poll=.1))
    write_jsonl([Document('text', '2')]*3, bad)
    assert run_job(acting.job(), files, tmp_path/'out', workers=2)['shout'].kept == 15

def test_sbatch_may_refuse(acting, files, play, tmp_path, monkeypatch):
    (play/'refuse').touch()
    with pytest.raises(UserError, match='sbatch has refused'):
        run_job(acting.job(), files, tmp_path/'out', executor='slurm')
    monkeypatch.setenv('SLURM_ARRAY_TASK_ID', '3')
    with pytest.raises(UserError, match='a task of an array'):
        run_job(acting.job(), files, tmp_path/'out', executor='slurm')

# --- Ray -----------------------------------------------------------------------------------------

@pytest.mark.timeout(600)                # three times a Ray of its own
def test_ray_gives_the_same_bytes_and_says_what_happens(acting, files, tmp_path):
    pytest.importorskip('ray', reason='jobs under Ray need the ray package')
    run_job(acting.job(), files, tmp_path/'calm')
    bad = [('deadly', TemporaryError, 'a worker of Ray was lost at 2.jsonl'),
           ('wrong', UserError, 'a mistake')]
    for doc, kind, words in bad:
        write_jsonl([Document('text', doc)], files['2.jsonl'])
        with pytest.raises(kind, match=words):
            run_job(acting.job(), files, tmp_path/'out', workers=2, executor='ray')
    write_jsonl([Document('text 2', '2')]*3, files['2.jsonl'])
    run_job(acting.job(), files, tmp_path/'out', workers=2, executor=Ray())
    assert contents(tmp_path/'out') == contents(tmp_path/'calm')
