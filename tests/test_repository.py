"The repository as a whole: nothing differs from what the notebooks export, and imports point one way."
import ast, json, os, re, shutil, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest
from conftest import load_tool

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
IGNORED = shutil.ignore_patterns('.venv', '.git', 'runs', '__pycache__', '*.egg-info', '_docs', '_proc',
                                 '.pytest_cache', '.ipynb_checkpoints', 'build', 'dist')

def run(*args, cwd, **env):
    "Run a command in a folder; its exit code and output"
    done = subprocess.run([str(a) for a in args], cwd=cwd, env={**os.environ, 'PYTHONPATH': str(cwd), **env},
                          capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr

def copy_of(root, to):
    shutil.copytree(root, to, ignore=IGNORED)
    return to

def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*'))
            if p.is_file() and '__pycache__' not in p.parts}

def drift(root, tmp):
    "Files that clean, export from nothing and the README builder would change, add or leave without a source"
    work = copy_of(root, tmp/'work')
    shutil.rmtree(work/'llama_nb')
    for tool in ('nbdev_clean', 'nbdev_export'):
        code, text = run(BIN/tool, cwd=work)
        assert code == 0, text
    (work/'llama_nb'/'py.typed').touch()        # the one file of the package that no page makes
    code, text = run(sys.executable, work/'tools'/'readme.py', cwd=work)
    assert code == 0, text
    made, there = files(work), files(copy_of(root, tmp/'there'))
    return sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))

def test_export_leaves_no_difference(tmp_path):
    assert drift(ROOT, tmp_path) == [], 'run `make prepare` and commit the result'

def test_drift_is_seen(tmp_path):
    "An edited module, an orphan and a stale README are all found"
    broken = copy_of(ROOT, tmp_path/'broken')
    with open(broken/'llama_nb'/'core.py', 'a') as f: f.write('\n# edited by hand\n')
    (broken/'llama_nb'/'orphan.py').write_text('x = 1\n')
    (broken/'README.md').write_text('old\n')
    assert drift(broken, tmp_path) == ['README.md', 'llama_nb/core.py', 'llama_nb/orphan.py']

# --- a failing notebook fails the run -----------------------------------------------------------

def project(tmp, *sources):
    "A project with one notebook of the given code cells"
    import nbformat
    (tmp/'nbs').mkdir(parents=True)
    shutil.copy(ROOT/'settings.ini', tmp)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources]),
                   tmp/'nbs'/'00_x.ipynb')
    return tmp

@pytest.mark.parametrize('sources, fails', [
    (('#| default_exp x', '#| export\ndef f(): return 1', 'assert f() == 1'), False),
    (('#| default_exp x', '#| export\ndef f(): return 1', 'assert f() == 2'), True),
    (('#| default_exp x', '#| hide\nraise ValueError("hidden, and still run")'), True)])
def test_a_failing_cell_fails_the_run(tmp_path, sources, fails):
    code, text = run(BIN/'nbdev_test', '--n_workers', '0', cwd=project(tmp_path/'p', *sources))
    assert (code != 0) == fails, text

# --- imports point one way ----------------------------------------------------------------------

GROUND = ['core', 'untrusted', 'files', 'config', 'settings', 'flags', 'run_file']
BELOW = {'core': [], 'untrusted': ['core'], 'files': ['core', 'untrusted'], 'private': [],
         'config': ['core'], 'settings': ['core', 'config'],
         'flags': ['core', 'config', 'settings'],
         'run_file': ['core', 'files', 'untrusted', 'config', 'settings', 'flags'], 'data': GROUND,
         'model': [*GROUND, 'private']}
BELOW['parallel'] = [*BELOW['model'], 'model']
BELOW['scale'] = [*GROUND, 'model']                           # arithmetic on configurations
BELOW['train'] = [*BELOW['parallel'], 'parallel', 'data', 'scale']
BELOW['scale.dryrun'] = [*BELOW['train'], 'train']            # does what the training does
BELOW |= {'infer': [*GROUND, 'data', 'model'], 'eval': [*GROUND, 'data', 'model', 'infer'],
          'interop': [*GROUND, 'data', 'model']}
for page in ('infer.load', 'infer.evaluate'):  # read what a run has written, and measure as it does
    BELOW[page] = [*BELOW['train'], 'train', 'interop']
TOP = {'toy', 'commands', 'cli', '__main__'}
FOREIGN = {'nbdev', 'fastcore', 'execnb', 'IPython', 'ipykernel', 'jupyter', 'notebook', 'transformers',
           'pytest', 'nbformat', 'nbclient', 'nbconvert'}

def modules(root):
    return [p for p in sorted((root/'llama_nb').rglob('*.py')) if p.name not in ('__init__.py', '_modidx.py')]

def imported(path, root):
    "Absolute names of everything a module imports, relative ones resolved"
    package = path.relative_to(root).with_suffix('').parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(package[:len(package) - node.level + 1]) if node.level else ''
            module = '.'.join(filter(None, (base, node.module)))
            if module != 'llama_nb': yield module
            else:
                yield from (f'llama_nb.{a.name}' for a in node.names)       # from llama_nb import train

def against_the_stream(root):
    "'train.loss -> infer.generate' for each import that points the wrong way, or outside what is allowed"
    found = []
    for path in modules(root):
        parts = path.relative_to(root/'llama_nb').with_suffix('').parts
        for name in imported(path, root):
            words = name.split('.')
            if words[0] in FOREIGN: found.append(f'{".".join(parts)} -> {name}')
            if words[0] != 'llama_nb' or len(words) == 1 or parts[0] in TOP or words[1] == parts[0]: continue
            below = BELOW.get('.'.join(parts), BELOW[parts[0]])
            if words[1] not in below: found.append(f'{".".join(parts)} -> {".".join(words[1:])}')
    return found

def test_imports_point_one_way():
    assert len(modules(ROOT)) > 10
    assert against_the_stream(ROOT) == []

def test_a_wrong_import_is_seen(tmp_path):
    broken = copy_of(ROOT, tmp_path/'broken')
    with open(broken/'llama_nb'/'model'/'norm.py', 'a') as f:
        f.write('\nfrom ..train.loss import next_token_loss\nimport fastcore.all\n')
    assert against_the_stream(broken) == ['model.norm -> train.loss', 'model.norm -> fastcore.all']

def test_arithmetic_that_trains_is_seen(tmp_path):
    "FLOPs and bytes are computed without a trainer or a mesh; neither is imported, even inside a function"
    broken = copy_of(ROOT, tmp_path/'broken')
    with open(broken/'llama_nb'/'scale'/'flops.py', 'a') as f:
        f.write('\nfrom ..train.trainer import train_step\n'
                'def later(): from llama_nb.parallel import mesh\n'
                'from .. import train\n')
    found = against_the_stream(broken)
    names = ['parallel', 'train', 'train.trainer']
    assert sorted(found) == [f'scale.flops -> {name}' for name in names]

def private_names(path):
    "Names with an underscore that a module takes from torch or xformers, by import or by attribute"
    from_outside = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, 'module', None)
            names = [f'{module}.{a.name}' if module else a.name for a in node.names]
            from_outside |= {name for name in names if name.split('.')[0] in ('torch', 'xformers')}
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith('torch.'):
            from_outside.add(ast.unparse(node))
    return {name for name in from_outside if re.search(r'\._[a-z]', name, re.I)}

def users_of_private_names(root):
    "'model.norm: torch._dynamo' for each, but for the one module that wraps them"
    found = {path: private_names(path) for path in modules(root) if path.name != 'private.py'}
    return [f'{".".join(path.relative_to(root/"llama_nb").with_suffix("").parts)}: {name}'
            for path, names in found.items() for name in sorted(names)]

def test_private_apis_of_torch_are_used_in_one_module():
    assert users_of_private_names(ROOT) == []

def test_a_private_name_is_seen(tmp_path):
    broken = copy_of(ROOT, tmp_path/'broken')
    with open(broken/'llama_nb'/'model'/'norm.py', 'a') as f:
        f.write('\nfrom torch._inductor import config\nx = torch._dynamo.reset()\n')
    assert users_of_private_names(broken) == ['model.norm: torch._dynamo', 'model.norm: torch._dynamo.reset',
                                              'model.norm: torch._inductor.config']

def defined(path):
    "Names that stand at the top of a module, whatever defines or imports them; also inside of `if` and `try`"
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): yield node.id
        elif isinstance(node, ast.alias): yield node.asname or node.name

def asked_for(source):
    "(module, name) of each `from llama_nb.module import name`"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('llama_nb.'):
            yield from ((node.module, a.name) for a in node.names)

def code_of(path):
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.py': return [text]
    return [''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'code']

def missing_names(root):
    "'tests/test_x.py: llama_nb.model.norm has no y' for what programs and pages import in vain"
    there = {'.'.join(p.relative_to(root).with_suffix('').parts): set(defined(p)) for p in modules(root)}
    programs = (p for part in ('tests/*.py', 'benchmarks/*.py', 'nbs/*.ipynb')
                for p in sorted(root.glob(part)))
    return [f'{path.relative_to(root).as_posix()}: {module} has no {name}' for path in programs
            for source in code_of(path) for module, name in asked_for(source)
            if f'{module}.{name}' not in there and name not in there.get(module, ())]

def test_what_is_imported_is_there():
    "Benchmarks too, which the tests do not run"
    assert missing_names(ROOT) == []

def test_a_name_that_is_gone_is_seen(tmp_path):
    broken = copy_of(ROOT, tmp_path/'broken')
    old = 'from llama_nb.train import pieces\nfrom llama_nb.train.guards import Patience\n'
    (broken/'benchmarks'/'old.py').write_text(old)
    assert missing_names(broken) == ['benchmarks/old.py: llama_nb.train has no pieces',
                                     'benchmarks/old.py: llama_nb.train.guards has no Patience']

def test_package_needs_no_notebook_tools():
    "Everything imports where nbdev, fastcore, jupyter and the judges of the tests are not installed"
    names = ['.'.join(p.relative_to(ROOT).with_suffix('').parts) for p in modules(ROOT)
             if p.name != '__main__.py']
    code = f'''
import sys, importlib
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {FOREIGN - {'notebook'} | {'cloudpickle'}!r}:
            raise ImportError(f'{{name}} is not for the package')
sys.meta_path.insert(0, Block())
for name in {names!r}: importlib.import_module(name)
assert not any(m.split('.')[0] == 'xformers' for m in sys.modules), 'xformers is looked up on first use only'
'''
    status, text = run(sys.executable, '-c', code, cwd=ROOT)
    assert status == 0, text

def failed_cells(page):
    return [c['id'] for c in json.loads(page.read_text(encoding='utf-8'))['cells']
            for o in c.get('outputs', ()) if o['output_type'] == 'error']

@pytest.mark.parametrize('page', sorted((ROOT/'nbs').glob('*.ipynb')), ids=lambda p: p.stem)
def test_no_page_shows_a_cell_that_failed(page):
    assert failed_cells(page) == [], 'run it from top to bottom in a fresh kernel'

def test_a_failed_cell_is_seen(tmp_path):
    cells = [{'id': 'bad', 'outputs': [{'output_type': 'error'}]}, {'id': 'good', 'outputs': []}]
    (tmp_path/'page.ipynb').write_text(json.dumps({'cells': cells}))
    assert failed_cells(tmp_path/'page.ipynb') == ['bad']

def cells_with_paths(page):
    "Cells whose outputs name a file of an installed package, and so the folder of whoever ran them"
    return [c['id'] for c in json.loads(page.read_text(encoding='utf-8'))['cells']
            if 'site-packages/' in json.dumps(c.get('outputs', ()))]

@pytest.mark.parametrize('page', sorted((ROOT/'nbs').glob('*.ipynb')), ids=lambda p: p.stem)
def test_no_page_shows_where_it_was_run(page):
    assert cells_with_paths(page) == [], 'take the warning out of the cell'

def test_a_path_of_a_machine_is_seen(tmp_path):
    text = '/somewhere/lib/python3.11/site-packages/tqdm/auto.py:21: TqdmWarning'
    cells = [{'id': 'bad', 'outputs': [{'output_type': 'stream', 'name': 'stderr', 'text': [text]}]},
             {'id': 'good', 'outputs': [{'output_type': 'stream', 'name': 'stdout', 'text': ['tqdm']}]}]
    (tmp_path/'page.ipynb').write_text(json.dumps({'cells': cells}))
    assert cells_with_paths(tmp_path/'page.ipynb') == ['bad']

# --- what `make` installs: the versions that were named ------------------------------------------

@pytest.fixture
def make(tmp_path):
    """`make toy` with settings, in a checkout whose .venv only notes what pip was asked for: (exit code,
    output, new pip calls)"""
    for name in ('Makefile', 'settings.ini', 'setup.py'): shutil.copy(ROOT/name, tmp_path)
    (tmp_path/'.venv'/'bin').mkdir(parents=True)
    scripts = {'.venv/bin/python': 'echo Python 3.11.7', '.venv/bin/pip': 'echo "$*" >> pip.log',
               '.venv/bin/llama-nb': 'true',
               'same': 'echo Python 3.11.7', 'other': 'echo Python 3.12.1'}
    for name, line in scripts.items():
        (tmp_path/name).write_text(f'#!/bin/sh\n{line}\n')
        (tmp_path/name).chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHON', 'TORCH', 'TORCH_INDEX')
           and not k.startswith('MAKE')}
    def call(*settings):
        (tmp_path/'pip.log').write_text('')
        done = subprocess.run(['make', 'toy', *settings], cwd=tmp_path, env=env, capture_output=True,
                              text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr, (tmp_path/'pip.log').read_text().splitlines()
    return call

def requirements():
    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    return settings['DEFAULT']['requirements'].split()

def test_a_named_torch_is_installed_once_and_replaces_another(make):
    bound = next(r for r in requirements() if r.startswith('torch'))
    install = 'install -q --no-compile'
    assert make()[2] == [f'{install} -e . {bound}']
    assert make()[2] == []
    assert make('TORCH=2.13.0')[2] == [f'{install} -e . torch==2.13.0']
    assert make('TORCH=2.13.0')[2] == make()[2] == []                     # not named: what is there stays
    assert make('TORCH=2.14.1', 'TORCH_INDEX=http://index')[2] == [
        f'{install} --index-url http://index torch==2.14.1', f'{install} -e . torch==2.14.1']

def test_a_venv_of_another_python_is_never_used_in_silence(make):
    code, text, installed = make('PYTHON=./other')
    assert (code != 0 and not installed
            and '.venv has Python 3.11.7, ./other is Python 3.12.1: make clean' in text)
    assert make('PYTHON=./same')[0] == 0

# --- what `python -m build` makes: an sdist, and from nothing else a wheel ------------------------------

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "Names in the sdist, the folder at its top left out, and names in the wheel; nothing is fetched for them"
    tmp = tmp_path_factory.mktemp('built')
    def build(kind, source):
        call = f'from setuptools import build_meta\nbuild_meta.build_{kind}({str(tmp)!r})'
        code, text = run(sys.executable, '-c', call, cwd=source)
        assert code == 0, text
    build('sdist', copy_of(ROOT, tmp/'checkout'))
    with tarfile.open(next(tmp.glob('*.tar.gz'))) as f:
        f.extractall(tmp/'unpacked', filter='data')
    source = next((tmp/'unpacked').iterdir())
    sdist = set(files(source))
    build('wheel', source)
    with zipfile.ZipFile(next(tmp.glob('*.whl'))) as f: return sdist, set(f.namelist())

def test_the_wheel_holds_the_package_and_nothing_else(built):
    package = {f'llama_nb/{name}' for name in files(ROOT/'llama_nb')}
    assert {'llama_nb/__init__.py', 'llama_nb/py.typed', 'llama_nb/model/transformer.py'} <= package
    assert {name for name in built[1] if '.dist-info/' not in name} == package

def test_the_sdist_holds_what_builds_and_runs(built):
    "Notebooks and tests stay in the repository; half of them would be of no use"
    needed = {'setup.py', 'settings.ini', 'README.md', 'LICENSE', 'configs/7B.toml', 'llama_nb/py.typed'}
    assert needed <= built[0]
    assert not [name for name in built[0] if name.startswith(('tests/', 'nbs/'))]

# --- what ran on which version ------------------------------------------------------------------

def test_the_table_of_versions_is_made_from_the_notes():
    made = load_tool('versions')
    notes = json.loads(made.NOTES.read_text(encoding='utf-8'))
    assert made.NOTES.with_suffix('.md').read_text(encoding='utf-8') == made.table(notes)

def test_the_table_of_versions_names_what_failed():
    when = {'commit': 'abc', 'date': '2026-01-01'}
    note = {'python': '3.13.0', 'torch': '2.15.0+cpu', 'xformers': None, 'transformers': '5',
            'pages': {'run': 31, 'failed': [], 'skipped': 0, **when},
            'tests': {'run': 200, 'failed': ['test_x'], 'skipped': 1, **when}}
    text = load_tool('versions').table([note])
    row = next(line for line in text.splitlines() if line.startswith('| 2.15 |'))
    assert row == '| 2.15 | not run | not run | 31 pages, **1 of 200 tests failed** (2.15.0+cpu) |'
    assert text.splitlines()[-1].endswith('pages abc on 2026-01-01, tests abc on 2026-01-01 | 1 | test_x |')

# --- links --------------------------------------------------------------------------------------

def prose(path):
    "The Markdown of a page or of a text"
    text = path.read_text(encoding='utf-8')
    if path.suffix != '.ipynb': return text
    cells = json.loads(text)['cells']
    return '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')

def places(text):
    "What the site and GitHub call the headings of a text"
    titles = re.findall(r'^#+ (.*)$', re.sub(r'^```.*?^```', '', text, flags=re.M | re.S), re.M)
    return {re.sub(r'[^\w\- ]', '', title.strip().lower()).replace(' ', '-') for title in titles}

def broken_links(root):
    "Links of the pages and of the texts at the root that lead to no file, or to no heading in it"
    found = []
    for path in [*sorted(root.glob('*.md')), *sorted((root/'nbs').glob('*.ipynb'))]:
        for link, place in re.findall(r'\]\(([^)\s#]*)(?:#([^)\s]*))?\)', prose(path)):
            target = path.parent/link if link else path
            if ':' in link: continue
            if not target.exists(): found.append(f'{path.name}: {link}')
            elif place and place not in places(prose(target)): found.append(f'{path.name}: {link}#{place}')
    return found

def test_every_link_leads_to_a_file_and_a_heading(): assert broken_links(ROOT) == []

def test_links_that_lead_nowhere_are_seen(tmp_path):
    (tmp_path/'nbs').mkdir()
    good = '[1](#one-two) [2](b.md) [3](b.md#a-b) [4](https://example.org/c#d)'
    (tmp_path/'a.md').write_text(f'# One, `two`\n{good} [5](#one,-two) [6](c.md) [7](b.md#c)')
    (tmp_path/'b.md').write_text('## A b\n```\n# c\n```\n')
    assert broken_links(tmp_path) == ['a.md: #one,-two', 'a.md: c.md', 'a.md: b.md#c']
