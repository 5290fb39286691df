"Lines and names: what ruff finds, and two statements on a line where ruff cannot tell a guard from a body."
import ast, json, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent

def broken(folder):
    "{(file, rule)} that ruff finds"
    command = [sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format', 'json']
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1), done.stderr
    return {(Path(f['filename']).relative_to(folder).as_posix(), f['code']) for f in json.loads(done.stdout)}

def test_no_file_breaks_a_rule():
    assert sorted(broken(ROOT)) == [], 'mend them; `.venv/bin/ruff check` shows where'

def test_ruff_looks_at_pages_and_programs(tmp_path):
    "A semicolon, a long line, an unused import and a mutable default, in a page and in a module"
    shutil.copy(ROOT/'pyproject.toml', tmp_path)
    source = 'import os\nx = 1; y = 2\n' + 'z = "' + 'a'*110 + '"\ndef f(a=[]): return a\n'
    cell = {'cell_type': 'code', 'id': 'a', 'execution_count': None, 'metadata': {}, 'outputs': []}
    page = {'cells': [{**cell, 'source': source}], 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}
    (tmp_path/'page.ipynb').write_text(json.dumps(page))
    (tmp_path/'module.py').write_text(source)
    wanted = {'F401', 'E702', 'E501', 'B006'}
    assert broken(tmp_path) == {(file, rule) for file in ('page.ipynb', 'module.py') for rule in wanted}

# --- one statement a line -----------------------------------------------------------------------

GUARDS = (ast.If, ast.For, ast.With, ast.FunctionDef, ast.ClassDef)  # `if x: return y`, `def f(x): return y`

def bodies(node):
    "(statements, may they follow the header on its line?) of everything that has a body"
    for name in ('body', 'orelse', 'finalbody'):
        yield getattr(node, name, None) or [], isinstance(node, GUARDS) and name == 'body'

def crowded(source):
    "Lines on which the body of anything but a guard or a one-line function follows its header"
    lines = [line.encode() for line in source.split('\n')]
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.stmt, ast.ExceptHandler))]
    first = [(body[0], may) for node in nodes for body, may in bodies(node) if body and not may]
    return sorted(s.lineno for s, _ in first if lines[s.lineno - 1][:s.col_offset].strip())

@pytest.mark.parametrize('source, lines', [
    ('if x: y', []), ('for a in b: c(a)', []), ('with a: b', []), ('def f(x): return x', []),
    ('class A(B): pass', []),
    ('if x:\n    y\nelse:\n    z', []), ('f(lambda x: x)', []), ('if x: y\nelif z: a', []),
    ('try: x\nexcept A: y', [1, 2]), ('if x: y\nelse: z', [2]), ('while x: y', [1]),
    ('try:\n    x\nfinally: y', [3])])
def test_a_body_behind_its_header_is_seen(source, lines): assert crowded(source) == lines

def sources(path):
    "The Python of a file: a module, or the cells of a page"
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.py': return [text]
    return [''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'code']

def python_files():
    named = ('setup.py', 'tests/*.py', 'tools/*.py', 'benchmarks/*.py', 'docs/*.py', 'nbs/*.ipynb')
    return [path for name in named for path in sorted(ROOT.glob(name))]

# --- a default of None is said in the annotation -------------------------------------------------

def hidden_nones(source):
    "(line, name) of parameters such as `x:int=None`, which a type checker takes for an int"
    functions = [n.args for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
    for a in functions:
        plain = [*a.posonlyargs, *a.args]
        defaults = [*zip(plain[len(plain) - len(a.defaults):], a.defaults), *zip(a.kwonlyargs, a.kw_defaults)]
        yield from ((x.lineno, x.arg) for x, default in defaults
                    if x.annotation and isinstance(default, ast.Constant) and default.value is None
                    and 'None' not in ast.unparse(x.annotation))

@pytest.mark.parametrize('source, names', [
    ('def f(x:int=None): pass', ['x']), ('def f(x:int|None=None, y=None, z:int=0): pass', []),
    ('def f(a, *, b:"Tensor"=None, c:"Tensor|None"=None): pass', ['b'])])
def test_a_hidden_none_is_seen(source, names): assert [name for _, name in hidden_nones(source)] == names

@pytest.mark.parametrize('path', python_files(), ids=lambda p: p.name)
def test_a_default_of_none_is_in_the_annotation(path):
    assert [found for source in sources(path) for found in hidden_nones(source)] == []

@pytest.mark.parametrize('path', python_files(), ids=lambda p: p.name)
def test_one_statement_a_line(path):
    assert [line for source in sources(path) for line in crowded(source)] == []
