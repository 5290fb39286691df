"What the tests share: a small prepared data set, and a way to run the command line as a process."
import importlib, itertools, json, os, signal, subprocess, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
import pytest
from fork_server import Program

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}

# A shell's background job ignores Ctrl-C, and so would the programs that it starts
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

def variant(*values):
    "A case of `parametrize` that `make test` leaves to `make torture`, since others like it are tried"
    return pytest.param(*values, marks=pytest.mark.variant)

# Files that take a minute or more are begun first, so that none is left alone at the end
LONG = {'test_gpu_kit', 'test_site', 'test_parity', 'test_dryrun'}

def pytest_collection_modifyitems(items): items.sort(key=lambda item: item.path.stem not in LONG)

def ask(worker, *arguments, timeout=600):
    "What a program beside the tests answers to arguments, both as JSON, in a process of its own"
    code = f'import runpy; runpy.run_path({str(ROOT/"tests"/worker)!r}, run_name="__main__")'
    process = Program([sys.executable, '-c', code, *map(json.dumps, arguments)], ENV)
    try:
        said, err = process.communicate(timeout)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return json.loads(said.splitlines()[-1])

def load_tool(name:str):
    "A program of tools/ as a module"
    if str(ROOT/'tools') not in sys.path: sys.path.insert(0, str(ROOT/'tools'))
    return importlib.import_module(name)

def command(*args): return [sys.executable, '-m', 'llama_nb', *map(str, args)]

@pytest.fixture(scope='session')
def llama_nb():
    "Run `llama-nb ...` to its end: (exit code, stdout, stderr)"
    def run(*args, preexec_fn=None):
        if preexec_fn:
            done = subprocess.run(command(*args), env=ENV, capture_output=True, text=True, timeout=240,
                                  preexec_fn=preexec_fn)
            return done.returncode, done.stdout, done.stderr
        process = Program(command(*args), ENV)
        try:
            shown, err = process.communicate(240)
        finally:
            process.kill()
        return process.returncode, shown, err
    return run

@pytest.fixture(scope='session')
def start():
    "Start `llama-nb ...`; what still lives at the end of all tests is ended"
    started = []
    def start(*args):
        started.append(Program(command(*args), ENV))
        return started[-1]
    yield start
    for process in started: process.kill()

def run_ranks(*args, **kwargs):
    "That of the package, with ranks that are forked"
    from llama_nb.parallel import processes
    forked = SimpleNamespace(Popen=Program, STDOUT=subprocess.STDOUT)
    with mock.patch.object(processes, 'subprocess', forked): return processes.run_ranks(*args, **kwargs)

@pytest.fixture(scope='session')
def wait_for():
    "Wait until `true()` is true, at most three minutes"
    def wait(true, process, seconds=180):
        end = time.monotonic() + seconds
        while not true():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end, 'nothing happened in time'
            time.sleep(.02)
    return wait

class Ranks:
    "A run on several processes over the loopback, without a launcher; its store is a file"
    def __init__(self, n, args, folder):
        folder.mkdir()
        env = {**ENV, 'WORLD_SIZE': str(n), 'LOCAL_WORLD_SIZE': str(n),
               'INIT_METHOD': f'file://{folder}/store', 'GLOO_SOCKET_IFNAME': 'lo'}
        self.logs = [open(folder/f'{rank}.log', 'w+') for rank in range(n)]
        self.processes = [self._start({**env, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}, args, log)
                          for rank, log in enumerate(self.logs)]

    def _start(self, env, args, log): return Program(command(*args), env, log, subprocess.STDOUT)

    def log(self, rank=0):
        self.logs[rank].seek(0)
        return self.logs[rank].read()

    def tails(self): return '\n'.join(self.log(i)[-2000:] for i in range(len(self.logs)))

    def wait(self, seconds=120):
        "Exit codes of all ranks"
        end = time.monotonic() + seconds
        for p in self.processes:
            try:
                p.wait(max(end - time.monotonic(), .01))
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f'did not end in {seconds} s:\n{self.tails()}') from None
        return [p.returncode for p in self.processes]

    def until(self, true, seconds=120):
        "Wait until `true()`, while all ranks live"
        end = time.monotonic() + seconds
        while not true():
            dead = [i for i, p in enumerate(self.processes) if p.poll() is not None]
            if dead or time.monotonic() > end:
                raise AssertionError(f'ranks {dead} ended, or nothing happened in time:\n{self.tails()}')
            time.sleep(.01)

    def kill(self):
        for p in self.processes: p.kill()
        for p in self.processes: p.wait()

@pytest.fixture
def start_ranks(tmp_path):
    "Start `llama-nb ...` on several ranks; what still lives at the end of the test is ended"
    started, numbers = [], itertools.count()
    def start(n, *args):
        started.append(Ranks(n, args, tmp_path/f'ranks-{next(numbers)}'))
        return started[-1]
    yield start
    for ranks in started:
        ranks.kill()
        for log in ranks.logs: log.close()

def metrics(folder):
    "The complete lines of a run's metrics log"
    path = Path(folder)/'metrics.jsonl'
    if not path.exists(): return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith('}\n')]

def numbers(folder):
    return [(m['step'], m['loss'], m['grad_norm'], m['lr'], m['tokens']) for m in metrics(folder)]

RUN = '''
out = "{out}"
[model]
dim = 64
n_layers = 2
n_heads = 4
vocab_size = 400
multiple_of = 16
max_seq_len = 64
[data]
train = "{tokens}/train"
held_out = "{tokens}/held_out"
seq_len = 64
batch_size = 8
[train]
steps = {steps}
micro_batch_size = 4
device = "cpu"
dtype = "float32"
eval_every = 1000
save_every = {save_every}
[optim]
lr = 3e-3
warmup_steps = 2
'''

@pytest.fixture(scope='session')
def tokens(tmp_path_factory):
    "A folder with a tokenizer and shards of Python's help texts"
    from llama_nb.data.documents import split_documents, topic_documents
    from llama_nb.data.shards import write_shards
    from llama_nb.data.tokenizer import train_tokenizer
    folder = tmp_path_factory.mktemp('tokens')
    train, held_out = split_documents(topic_documents(), .1)
    tokenizer = train_tokenizer((d.text for d in train), folder/'tokenizer.model', 400)
    write_shards(train, tokenizer, folder/'train')
    write_shards(held_out, tokenizer, folder/'held_out')
    return folder

@pytest.fixture(scope='session')
def trained(tokens, llama_nb, tmp_path_factory):
    "A finished run of 8 steps with checkpoints at 4 and 8, to look at or to copy"
    folder = tmp_path_factory.mktemp('trained')
    text = RUN.format(out=f'{folder.as_posix()}/run', tokens=tokens.as_posix(), steps=8, save_every=4)
    (folder/'run.toml').write_text(text)
    status, _, err = llama_nb('train', folder/'run.toml')
    assert status == 0, err
    return folder/'run'

@pytest.fixture
def run_file(tmp_path, tokens):
    "Write a run file with the given number of steps; its path"
    def write(steps, save_every=1000, name='run'):
        path = tmp_path/f'{name}.toml'
        places = {'out': (tmp_path/name).as_posix(), 'tokens': tokens.as_posix()}
        path.write_text(RUN.format(**places, steps=steps, save_every=save_every))
        return path
    return write
