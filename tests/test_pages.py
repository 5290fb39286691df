"tools/pages.py: what a page shows is compared with what is stored in it; a failing cell fails as ever."
import os, platform, re, shutil, subprocess, sys
from importlib.metadata import version
from pathlib import Path
import nbformat, pytest
from conftest import load_tool
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT/'tools'/'pages.py'

@pytest.fixture(scope='module')
def pages():
    "The tool as a module, as if the pages had been made with this Python and this torch"
    module = load_tool('pages')
    module.MADE_WITH = {'python': platform.python_version(), 'torch': version('torch')}
    return module

# --- numbers and words ---------------------------------------------------------------------------

SAME = [('6.4e-05', '6.4e-05'), ('0.705', '0.704'), ('2,557,632', '2,557,632'), ('(1.20,', '(1.20,'),
        ('5.861439228057861', '5.8614392280579'), ('4.15323543548584', '4.15323512'), ('x_2', 'x_2')]
DIFFERENT = [('33', '34'), ('0.1', '0.2'), ('0.705', '0.707'), ('4.1532', '4.1570'), ('1', '1.0'),
             ('12', '1,2'), ('2,557,632', '2,557,633'), ('-0.705', '0.705'), ('1e+05', '2e+05'),
             ('0e+00', '5e-07'), ('3.0', 'nan'), ('x_2', 'y_2')]

@pytest.mark.parametrize('a, b', SAME)
def test_rounding_is_no_difference(pages, a, b): assert pages.same(a, b, any_number=False)

@pytest.mark.parametrize('a, b', DIFFERENT)
def test_another_number_is_a_difference(pages, a, b): assert not pages.same(a, b, any_number=False)

def test_any_number_keeps_the_words(pages):
    assert pages.same('14ms,', '173ms,', any_number=True)
    assert not pages.same('14ms,', '14s,', any_number=True)

def test_the_texts_of_another_python_may_differ(pages, monkeypatch):
    stored, now = {'result': 'old'}, {'result': 'new'}
    assert pages.difference(stored, now, ['python'])
    monkeypatch.setitem(pages.MADE_WITH, 'python', '3.2.1')
    assert not pages.difference(stored, now, ['python'])
    assert pages.difference(stored, now)
    assert pages.difference(stored, {}, ['python'])

def test_of_a_table_its_text_is_compared(pages):
    def table(text):
        plain = '<IPython.core.display.Markdown object>'
        return [new_output('execute_result', data={'text/plain': plain, 'text/markdown': text})]
    assert pages.difference(pages.shown(table('| 1 |')), pages.shown(table('| 2 |')))
    assert not pages.difference(pages.shown(table('| 1 |')), pages.shown(table('| 1 |')))

# --- pages ---------------------------------------------------------------------------------------

def printed(text): return new_output('stream', name='stdout', text=text)

def result(text): return new_output('execute_result', data={'text/plain': text})

def image():
    data = {'image/png': 'AAAA', 'text/plain': '<Figure size 640x480 with 1 Axes>'}
    return new_output('display_data', data=data)

PLOT = 'import matplotlib.pyplot as plt\nplt.plot([1]); plt.show()'
AGREE = {
    'the same text': ('print("a 1"); 2', [printed('a 1\n'), result('2')]),
    'an address': ('print(object())', [printed('<object object>\n')]),
    'pieces of a stream': ('print("a"); print("b")', [printed('a\n'), printed('b\n')]),
    'a warning': ('import warnings; warnings.warn("old")', []),
    'a plot': (PLOT, [image()]),
    'a cell that does not run': ('#| eval: false\nprint("now")', [printed('then\n')]),
    'a marked text': ('#| varies\nprint("now")', [printed('then\n')]),
    'marked numbers': ('#| varies numbers\nprint("in 17 ms")', [printed('in   9 ms\n')]),
    'the texts of this Python': ('#| varies python\nprint(1)', [printed('1\n')])}
DIFFER = {
    'a stale number': ('print("34 x")', [printed('33 x\n')], "'33 x' is stored, now it is '34 x'"),
    'a stale word': ('"now"', [result("'then'")], 'is stored'),
    'more words': ('print("one two")', [printed('one\n')], "'one' is stored, now it is 'one two'"),
    'nothing stored': ('print(1)', [], 'nothing is stored, now it shows printed text'),
    'nothing shown': ('1;', [result('1')], 'result is stored, now it shows nothing'),
    'a plot that is gone': ('1', [image()], 'image is stored, now it shows result'),
    'one plot more': (PLOT + '\n' + PLOT, [image()], 'is stored'),
    'another kind, marked': ('#| varies\nprint(1)', [result('1')], 'now it shows printed text'),
    'nothing, marked': ('#| varies\nNone', [result('1')], 'now it shows nothing'),
    'other words': ('#| varies numbers\nprint("17 s")', [printed('9 ms\n')], "'9 ms' is stored"),
    'other texts of this Python': ('#| varies python\nprint(1)', [printed('2\n')], "'2' is stored"),
    'a mark misspelt': ('#| varies nmbers\nprint(1)', [printed('2\n')], '`#| varies nmbers` means nothing')}

def run(tool, folder, *cells):
    "Run a project of one page; exit code and output"
    (folder/'nbs').mkdir(parents=True)
    shutil.copy(ROOT/'settings.ini', folder)
    made = [new_code_cell(source, id=f'cell-{i}', outputs=outputs)
            for i, (source, outputs, *_) in enumerate(cells)]
    nbformat.write(new_notebook(cells=made), folder/'nbs'/'00_x.ipynb')
    command = [str(tool)] if tool.suffix != '.py' else [sys.executable, str(tool)]
    env = {**os.environ, 'PYTHONPATH': str(folder), 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run([*command, '--n_workers', '0'], cwd=folder, env=env, capture_output=True, text=True,
                          timeout=120)
    return done.returncode, done.stdout + done.stderr

def tool_made_with(pages, folder, **versions):
    "The tool, as if the pages had been made with this Python and this torch, or with others"
    line = f'MADE_WITH = {({**pages.MADE_WITH, **versions})!r}'
    source, n = re.subn(r'^MADE_WITH = .*$', line, TOOL.read_text(encoding='utf-8'), flags=re.M)
    assert n == 1
    (folder/'pages.py').write_text(source, encoding='utf-8')
    return folder/'pages.py'

here = pytest.mark.skipif((platform.system(), platform.machine()) != ('Linux', 'x86_64'),
                          reason='differences fail on Linux x86-64')

@here
def test_pages_that_agree_pass(pages, tmp_path):
    code, text = run(tool_made_with(pages, tmp_path), tmp_path/'p', *AGREE.values())
    assert code == 0 and 'cell-' not in text, text

@here
def test_every_difference_is_found(pages, tmp_path):
    code, text = run(tool_made_with(pages, tmp_path), tmp_path/'p', *DIFFER.values())
    assert code == 1 and '00_x.ipynb' in text.splitlines()[-1] and 'Traceback' not in text, text
    for i, (name, (_, _, said)) in enumerate(DIFFER.items()):
        lines = [line for line in text.splitlines() if line.startswith(f'00_x.ipynb, cell cell-{i}: ')]
        assert len(lines) == 1 and said in lines[0], (name, text)

@pytest.mark.parametrize('versions', [{'torch': '1.0'}, {'python': '3.2.1'}])
def test_elsewhere_a_difference_is_one_line(pages, tmp_path, versions):
    tool = tool_made_with(pages, tmp_path, **versions)
    code, text = run(tool, tmp_path/'p', ('print(1)', [printed('2\n')]))
    assert code == 0, text
    assert set(text.splitlines()) == {"00_x.ipynb, cell cell-0: '2' is stored, now it is '1'", 'Success.'}

def test_a_cell_that_raises_fails_as_ever(pages, tmp_path):
    cells = ('print(1)', []), ('raise KeyError("a bug")', [])
    code, text = run(tool_made_with(pages, tmp_path, torch='1.0'), tmp_path/'p', *cells)
    assert code == 1 and "KeyError: 'a bug'" in text and 'While Executing Cell #2' in text, text
    assert 'is stored' not in text

def test_nbdev_test_alone_ignores_marks_and_outputs(tmp_path):
    code, text = run(Path(sys.executable).parent/'nbdev_test', tmp_path/'p', *DIFFER.values())
    assert code == 0, text
