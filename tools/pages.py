"""Run the pages as `nbdev_test` does, with its options, and compare what each cell shows with the output stored in the page.

Words and whole numbers must be the same. A decimal may differ by one in its last digit where it has three or more, or by
one part in ten thousand. A cell whose output depends on more than the code says so in a line of its own:

  #| varies           only the kind is compared: printed text, result, image or nothing
  #| varies numbers   the words are compared, and how many numbers there are
  #| varies python    shows texts of Python itself: all is compared on the Python named below, elsewhere only the kind

A difference fails where the pages were made (MADE_WITH, Linux x86-64, no GPU), and is one line elsewhere."""
import platform, re, sys
from decimal import Decimal
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
import nbdev.test
from execnb.shell import CaptureShell

MADE_WITH = {'python': '3.11.7', 'torch': '2.13'}
# float32 has seven digits; the order of a sum, which depends on processor and threads, changes the last one or two,
# and some steps of training the fifth
RELATIVE = Decimal('1e-4')
NUMBER = re.compile(r'\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?')
ADDRESS = re.compile(r' at 0x[0-9a-f]+')                        # nbdev_clean takes them out of what is stored
ADVICE = 'run the page from top to bottom in a fresh kernel, or mark the cell `#| varies` (see CONTRIBUTING.md)'

class StaleOutput(Exception): pass

def shown(outputs):
    "What a reader sees below a cell, by kind; not stderr, for a process warns once, whichever page it runs first"
    found = {}
    for o in outputs:
        data = o.get('data', {})
        if o['output_type'] == 'stream': kind, text = 'printed text', o['text'] if o['name'] == 'stdout' else ''
        elif any(k.startswith('image/') for k in data): kind, text = 'image', data.get('text/plain', 'image')
        else: kind, text = 'result', data.get('text/html') or data.get('text/plain', '')
        text = ADDRESS.sub('', ''.join(text))
        if text.strip(): found[kind] = found.get(kind, '') + text + ('' if kind == 'printed text' else '\n')
    return found

def close(a, b):
    "Are two numbers, as printed, the same but for rounding and the order of sums? `a` is the stored one"
    x, y = (Decimal(n.replace(',', '')) for n in (a, b))
    _, digits, exponent = x.as_tuple()
    last_digit = Decimal(1).scaleb(exponent) if len(digits) > 2 else 0
    return a == b or (exponent < 0 and abs(x - y) <= max(last_digit, RELATIVE*x))

def same(a, b, any_number):
    "Are two words the same?"
    if NUMBER.split(a) != NUMBER.split(b): return False
    return any_number or all(map(close, NUMBER.findall(a), NUMBER.findall(b)))

def difference(stored, now, varies=None):
    "The first difference between two results of `shown`, in words, or None; `varies` is what the cell's directive says"
    if varies not in (None, [], ['numbers'], ['python']): return f'`#| varies {" ".join(varies)}` means nothing'
    if stored.keys() != now.keys(): return f'{" + ".join(stored) or "nothing"} is stored, now it shows {" + ".join(now) or "nothing"}'
    if varies == ['python'] and platform.python_version() == MADE_WITH['python']: varies = None
    if varies in ([], ['python']): return None
    for kind in stored:
        old, new = stored[kind].split(), now[kind].split()
        for i, (a, b) in enumerate(zip_longest(old, new, fillvalue='')):
            if same(a, b, any_number=bool(varies)): continue
            around = slice(max(i - 3, 0), i + 4)
            return f'{" ".join(old[around])!r} is stored, now it is {" ".join(new[around])!r}'

def must_agree():
    "Is this the kind of place where the pages were made?"
    import torch
    minor = lambda full: full.split('.')[:2]
    return ((platform.system(), platform.machine()) == ('Linux', 'x86_64') and minor(version('torch')) == minor(MADE_WITH['torch'])
            and minor(platform.python_version()) == minor(MADE_WITH['python']) and not torch.cuda.is_available())

class PageShell(CaptureShell):
    "The shell of `nbdev_test`, which forgets what cells show; this one compares it with what is stored"
    def run_all(self, nb, **kwargs):
        ran, stored = [], [cell.get('outputs', []) for cell in nb.cells]
        for cell in nb.cells: cell.outputs = []
        super().run_all(nb, postproc=ran.append, **kwargs)
        found = []
        for cell in ran:
            differs = difference(shown(stored[cell.idx_]), shown(cell.outputs), cell.directives_.get('varies'))
            if differs: found.append(f'{Path(nb.path_).name}, cell {cell.id}: {differs}')
        if found and must_agree():
            self.exc = StaleOutput('\n'.join([*found, ADVICE]))
            raise self.exc
        for line in found: print(line, file=sys.stderr)

    def prettytb(self, fname=None):
        return str(self.exc) if isinstance(self.exc, StaleOutput) else super().prettytb(fname)

nbdev.test.CaptureShell = PageShell                             # the name by which nbdev_test makes its shell

if __name__ == '__main__': nbdev.test.nbdev_test()
