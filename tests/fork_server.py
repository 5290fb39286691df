"""Programs that start in 0.05 s instead of four: forked from a server that has imported the package.

Most of the time of a test that starts four ranks went into importing PyTorch four times. The server imports
once, runs nothing, and has one thread; a program that it forks has its own arguments, environment, files and
signals. `Forked` stands in for `subprocess.Popen` where the command is `python -m MODULE ...` or
`python -c CODE ...`, on Linux; elsewhere programs start the usual way, and so do everywhere those of the
launchers and of the data pipelines. `tools/pages.py` uses it for the ranks that pages start with `run_ranks`.
"""
import atexit, faulthandler, gc, importlib, json, os, runpy, select, signal, socket, struct, subprocess
import sys, tempfile, threading, traceback
from contextlib import suppress

PRELOADED = ('llama_nb.train.run', 'llama_nb.train.host', 'llama_nb.infer.generate', 'llama_nb.toy',
             'llama_nb.parallel.processes', 'llama_nb.cli', 'torch._dynamo', 'torch.distributed.checkpoint',
             'matplotlib.figure', 'matplotlib.backends.backend_agg')
REQUEST = 2**20                                     # most bytes of arguments and environment together
NUMBER = struct.Struct('<q')

# The side of the server

def start_program(request, files):
    "In the forked process: become the program. Does not return"
    code = 1
    try:
        for to, file in enumerate(files): os.dup2(file, to)
        for file in files: os.close(file)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(request['env'])
        os.chdir(request['cwd'])
        paths = [p for p in request['env'].get('PYTHONPATH', '').split(os.pathsep) if p]
        sys.path[:] = [*paths, *(p for p in sys.path if p not in paths)]
        code = run_program(*request['args'])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)

def exit_code(e):
    "What Python makes of the argument of `sys.exit`"
    if isinstance(e.code, str): print(e.code, file=sys.stderr)
    return e.code if isinstance(e.code, int) else int(e.code is not None)

def run_module_or_code(how, what):
    if how == '-m':
        runpy.run_module(what, run_name='__main__', alter_sys=True)
    else:
        exec(compile(what, '<string>', 'exec'), {'__name__': '__main__'})

def run_program(how, what, *args):
    "The exit code of a program that ends as Python ends one"
    sys.argv, code = [what if how == '-m' else how, *args], 0
    try:
        run_module_or_code(how, what)
    except SystemExit as e:
        code = exit_code(e)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()                           # waits for threads, as the end of any program does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code

def tell(report, number):
    "The other end may have lost its interest"
    with suppress(BrokenPipeError): os.write(report, NUMBER.pack(number))

def report_ended(running):
    "Tell the exit codes of the programs that have ended"
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid: return
        report = running.pop(pid)
        tell(report, os.waitstatus_to_exitcode(status))
        os.close(report)

def watch_children():
    "A file that can be read when a program has ended"
    woken, wakes = os.pipe()
    for end in (woken, wakes): os.set_blocking(end, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return woken, wakes

def fork_program(said, files, inherited):
    "Number of the process"
    pid = os.fork()
    if pid: return pid
    signal.set_wakeup_fd(-1)
    for file in inherited: os.close(file)
    start_program(json.loads(said), files)

def serve(door):
    "Fork a program for each request, until the other end is closed"
    for module in PRELOADED: importlib.import_module(module)
    gc.freeze()
    faulthandler.enable()
    running, (woken, wakes) = {}, watch_children()  # number of the process: where its end is reported
    while True:
        ready, _, _ = select.select([door, woken], [], [])
        if woken in ready: os.read(woken, 4096)
        report_ended(running)
        if door not in ready: continue
        said, files, *_ = socket.recv_fds(door, REQUEST, 4)
        if not said: return
        *streams, report = files
        pid = fork_program(said, streams, (woken, wakes, report, door.fileno(), *running.values()))
        tell(report, pid)
        running[pid] = report
        for stream in streams: os.close(stream)

# The side of the tests

class ForkServer:
    "Started with the first program, ended with the process that uses it"
    def __init__(self): self.door, self.lock = None, threading.Lock()

    def start(self):
        self.door, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        env = {**os.environ, 'PYTHONPATH': root, 'OMP_NUM_THREADS': '1'}
        command = [sys.executable, __file__, str(other.fileno())]
        self.process = subprocess.Popen(command, env=env, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL)
        other.close()
        atexit.register(self.stop)

    def stop(self):
        self.door.close()
        self.process.wait(10)

    def ask(self, request, files):
        with self.lock:
            if self.door is None: self.start()
            socket.send_fds(self.door, [json.dumps(request).encode()], files)

SERVER = ForkServer()

class Forked:
    "A program, with what the tests use of `subprocess.Popen`; output that nobody takes is kept in files"
    def __init__(self, command, env, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
        python, *args = map(str, command)
        if args[:2] == ['-X', 'faulthandler']: args = args[2:]
        assert python == sys.executable and args[0] in ('-m', '-c'), command
        self.args, self.returncode, self.stdout, self.stderr = args, None, None, None
        with tempfile.TemporaryDirectory() as folder, open(os.devnull) as nothing:
            self.stdout, out = self.opened(stdout, f'{folder}/out')
            if stderr == subprocess.STDOUT: stderr = out
            self.stderr, err = self.opened(stderr, f'{folder}/err')
            self.report, report = os.pipe()
            request = {'args': args, 'env': dict(env), 'cwd': os.getcwd()}
            SERVER.ask(request, [nothing.fileno(), out.fileno(), err.fileno(), report])
            os.close(report)
            if self.stdout: out.close()
            if self.stderr: err.close()
        self.pid = self.told(None)
        os.set_blocking(self.report, False)

    @staticmethod
    def opened(where, path): # (to read, to write)
        if where != subprocess.PIPE: return None, where
        file = open(path, 'w')
        return open(path), file

    def told(self, seconds):
        "The next number from the server, or None"
        if not select.select([self.report], [], [], seconds)[0]: return None
        said = os.read(self.report, NUMBER.size)
        if not said: raise RuntimeError('the server that forks programs has ended')
        return NUMBER.unpack(said)[0]

    def poll(self):
        if self.returncode is None and (code := self.told(0)) is not None: self.end(code)
        return self.returncode

    def end(self, code):
        self.returncode = code
        os.close(self.report)

    def wait(self, timeout=None):
        if self.returncode is None:
            if (code := self.told(timeout)) is None: raise subprocess.TimeoutExpired(self.args, timeout)
            self.end(code)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return self.stdout and self.stdout.read(), self.stderr and self.stderr.read()

    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)

    def kill(self): self.send_signal(signal.SIGKILL)

class Started(subprocess.Popen):
    "Where there is no fork that is safe: the usual way"
    def __init__(self, command, env, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
        super().__init__(list(map(str, command)), env=env, stdout=stdout, stderr=stderr, text=True)

Program = Forked if sys.platform == 'linux' else Started

if __name__ == '__main__': serve(socket.socket(fileno=int(sys.argv[1])))
