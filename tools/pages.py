"""Run the pages as `nbdev_test` does, with its options, and compare what cells show with the outputs stored.

Words and whole numbers must be the same. A decimal may differ by one in its last digit where it has three or
more, or by one part in ten thousand. A cell whose output depends on more than the code says so in a line:

  #| varies           only the kind is compared: printed text, result, image or nothing
  #| varies numbers   the words are compared, and how many numbers there are
  #| varies python    texts of Python itself: compared on the Python named below, elsewhere only the kind

A difference fails where the pages were made (MADE_WITH, Linux x86-64, no GPU), and is one line elsewhere.
Many pages read Python's own sources, which change with its last number, too.

Ranks that a page starts with `run_ranks` are forked from a process that has imported PyTorch, as those of the
tests are; those of the page that writes `run_ranks` and of the launchers' pages start the usual way."""
import importlib, os, platform, re, subprocess, sys, tempfile
from contextlib import contextmanager
from decimal import Decimal
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
import nbdev.test
from execnb.shell import CaptureShell

MADE_WITH = {'python': '3.11.7', 'torch': '2.13'}
# float32 has seven digits. The order of a sum, which depends on processor and threads, changes the last one
# or two, and some steps of training the fifth.
RELATIVE = Decimal('1e-4')
NUMBER = re.compile(r'\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?')
ADDRESS = re.compile(r' at 0x[0-9a-f]+')                # nbdev_clean takes them out of what is stored
ADVICE = 'run the page from top to bottom in a fresh kernel, or mark the cell (CONTRIBUTING.md, "Outputs")'

class StaleOutput(Exception): pass

def kind_and_text(output):
    data = output.get('data', {})
    if output['output_type'] == 'stream': return 'printed text', output['text']
    if any(k.startswith('image/') for k in data): return 'image', data.get('text/plain', 'image')
    return 'result', data.get('text/markdown') or data.get('text/html') or data.get('text/plain', '')

def shown(outputs):
    "What a reader sees below a cell, by kind. Not stderr: a process warns once, whichever page it runs first"
    found = {}
    for output in outputs:
        if output.get('name') == 'stderr': continue
        kind, text = kind_and_text(output)
        text = ADDRESS.sub('', ''.join(text))
        if text.strip(): found[kind] = found.get(kind, '') + text + ('\n' if kind != 'printed text' else '')
    return found

def close(a, b):
    "Are two numbers, as printed, the same but for rounding and the order of sums? `a` is the stored one"
    if a == b: return True
    x, y = (Decimal(n.replace(',', '')) for n in (a, b))
    _, digits, exponent = x.as_tuple()
    last_digit = Decimal(1).scaleb(exponent) if len(digits) > 2 else 0
    return exponent < 0 and abs(x - y) <= max(last_digit, RELATIVE*x)

def same(a, b, any_number):
    "Are two words the same?"
    if NUMBER.split(a) != NUMBER.split(b): return False
    return any_number or all(map(close, NUMBER.findall(a), NUMBER.findall(b)))

def first_difference(old, new, any_number):
    "Where two texts part, with three words before and after; or None"
    old, new = old.split(), new.split()
    for i, (a, b) in enumerate(zip_longest(old, new, fillvalue='')):
        if same(a, b, any_number): continue
        around = slice(max(i - 3, 0), i + 4)
        return f'{" ".join(old[around])!r} is stored, now it is {" ".join(new[around])!r}'

def difference(stored, now, varies=None):
    "The first difference of two results of `shown`, or None; `varies` are the words after the directive"
    if varies not in (None, [], ['numbers'], ['python']):
        return f'`#| varies {" ".join(varies)}` means nothing'
    if stored.keys() != now.keys():
        old, new = (' + '.join(kinds) or 'nothing' for kinds in (stored, now))
        return f'{old} is stored, now it shows {new}'
    if varies == ['python'] and platform.python_version() == MADE_WITH['python']: varies = None
    if varies in ([], ['python']): return None
    found = (first_difference(stored[kind], now[kind], any_number=bool(varies)) for kind in stored)
    return next(filter(None, found), None)

def must_agree():
    "Is this a place like the one where the pages were made?"
    import torch    # not above: a process that has asked for GPUs must not fork
    if (platform.system(), platform.machine()) != ('Linux', 'x86_64'): return False
    if torch.cuda.is_available(): return False
    here = {'python': platform.python_version(), 'torch': version('torch')}
    return all(f'{here[name]}.'.startswith(f'{made}.') for name, made in MADE_WITH.items())

def forget_package():
    """A page imports modules of its own. A worker runs several pages, and one that defines an operator again
    takes it away from the module that an earlier page has imported"""
    for name in [name for name in sys.modules if name.split('.')[0] == 'llama_nb']: del sys.modules[name]

def forget_compiled():
    """What a page has compiled ends before its namespace: the compiler keeps names there, which it takes out
    when the code goes, and where they have gone already it shows a traceback"""
    dynamo = sys.modules.get('torch._dynamo')
    if dynamo is not None: dynamo.reset()

def fork_ranks():
    "Let the package's `run_ranks` fork. Imports nothing that the pages do not import"
    tests = Path(__file__).resolve().parent.parent/'tests'
    if not (tests/'fork_server.py').exists(): return        # the pages of another project
    if str(tests) not in sys.path: sys.path.append(str(tests))
    program = importlib.import_module('fork_server').Program
    processes = importlib.import_module('llama_nb.parallel.processes')
    processes.subprocess = SimpleNamespace(Popen=program, STDOUT=subprocess.STDOUT)

class PageShell(CaptureShell):
    "The shell of `nbdev_test`, which forgets what cells show; this one compares it with what is stored"
    def run_all(self, nb, **kwargs):
        forget_package()
        fork_ranks()
        ran, stored = [], [cell.get('outputs', []) for cell in nb.cells]
        for cell in nb.cells: cell.outputs = []
        try:
            super().run_all(nb, postproc=ran.append, **kwargs)
        finally:
            forget_compiled()
        found = []
        for cell in ran:
            varies = cell.directives_.get('varies')
            differs = difference(shown(stored[cell.idx_]), shown(cell.outputs), varies)
            if differs: found.append(f'{Path(nb.path_).name}, cell {cell.id}: {differs}')
        if found and must_agree():
            self.exc = StaleOutput('\n'.join([*found, ADVICE]))
            raise self.exc
        for line in found: print(line, file=sys.stderr)

    def prettytb(self, fname=None):
        return str(self.exc) if isinstance(self.exc, StaleOutput) else super().prettytb(fname)

nbdev.test.CaptureShell = PageShell                     # the name by which nbdev_test makes its shell

@contextmanager
def temporary_folder():
    "One for all pages: the processes that run them end at once, and leave what they wrote, 700 MB in all"
    with tempfile.TemporaryDirectory(prefix='pages-', ignore_cleanup_errors=True) as folder:
        os.environ['TMPDIR'] = folder
        tempfile.tempdir = None                         # asked for anew, by processes that are forked too
        yield

if __name__ == '__main__':
    with temporary_folder(): nbdev.test.nbdev_test()
