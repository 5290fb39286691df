"""The site in _docs, from the notebooks as they are: `make docs`, or `python tools/docs.py [FOLDER]`.

Sphinx reads copies of the notebooks in build/docs, in which hidden cells are left out, each exported cell
carries the name of its module, and checks are folded. Nothing is run, and nothing is fetched.
"""
import ast, re, shutil, sys, tomllib
from configparser import ConfigParser
from pathlib import Path
from api import write_api
from readme import title

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
NEEDED = 'the site needs what `make docs` installs (the extra `docs`: pip install -e ".[docs]")'

try:
    import nbformat
    from sphinx.cmd.build import main as sphinx_build
except ImportError as e:
    sys.exit(f'{NEEDED}: {e}')

settings = ConfigParser(delimiters=['='])
settings.read(ROOT/'settings.ini', encoding='utf-8')
SOURCE = f"{settings['DEFAULT']['git_url']}/blob/{settings['DEFAULT']['branch']}"

# --- cells ----------------------------------------------------------------------------------------

def directives(cell)->set: # 'hide', 'export', ...: the first words of the lines that begin with `#|`
    return set(re.findall(r'^#\|\s*(\w+)', cell.source, flags=re.M)) if cell.cell_type == 'code' else set()

def module_of(nb)->str: # 'llama_nb/model/norm.py', or '' for a page that exports nothing
    found = [m[1] for c in nb.cells if (m := re.match(r'#\|\s*default_exp\s+(\S+)', c.source))]
    return f"llama_nb/{found[0].replace('.', '/')}.py" if found else ''

def badge(cell, module:str):
    "A line above an exported cell: where it is exported to, with a link to the index"
    name = module.removesuffix('.py').replace('/', '.')
    if name.endswith('.__init__'): name = 'index'       # its names are those of other modules
    page = f'<a href="api/{name}.html" title="this cell is part of the package">{module}</a>'
    return nbformat.v4.new_markdown_cell(f'<div class="exported" id="cell-{cell.id}">{page}</div>')

def is_assertion(node)->bool:
    "An assertion, a call of a testing function, or a block of nothing else"
    if isinstance(node, ast.Assert): return True
    if isinstance(node, (ast.With, ast.For)):
        return expects_failure(node) or all(map(is_assertion, node.body))
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call): return False
    return re.match(r'test_|(\w+\.)*assert_', ast.unparse(node.value.func)) is not None

def expects_failure(node)->bool: # `with expect_fail(...)`
    items = map(ast.unparse, getattr(node, 'items', ()))
    return any(re.match(r'expect_fail|(pytest\.)?raises', item) for item in items)

def is_check(cell)->bool:
    "Does it only assert? Its id says so, or each of its statements"
    if cell.id.endswith('-check'): return True
    try:
        body = ast.parse(cell.source).body
    except SyntaxError:     # of a cell with `!` or `%`
        return False
    return bool(body) and all(map(is_assertion, body))

def has_picture(cell)->bool:
    return any(kind.startswith('image/') for output in cell.outputs for kind in output.get('data', {}))

def fold(cell):
    "Show a line in place of a check; a picture stays"
    lines = len(cell.source.strip().splitlines())
    words = f'Check, {lines} lines' if lines > 1 else 'Check, 1 line'
    cell.metadata['tags'] = ['check', 'hide-input' if has_picture(cell) else 'hide-cell']
    cell.metadata['mystnb'] = {'code_prompt_show': words, 'code_prompt_hide': words}

def shown(nb):
    "The cells of a page as a reader of the site sees them"
    module = module_of(nb)
    for cell in nb.cells:
        marks = directives(cell)
        if marks & {'hide', 'default_exp'}: continue
        if cell.cell_type == 'code': cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
        if not cell.source.strip(): continue
        if marks & {'export', 'exporti'}:
            cell.metadata['tags'] = ['exported']
            yield badge(cell, module)
        elif cell.cell_type == 'code' and is_check(cell): fold(cell)
        yield cell

# --- links and pictures ---------------------------------------------------------------------------

PICTURE = re.compile(r'(!\[[^\]]*\]\(|\b(?:src|srcset)=")([^)"\s:]+\.(?:png|svg|jpe?g|gif|webp))')

def place(folder:Path, match)->str:
    "Copy a picture of the repository to the pages; what to write for it there"
    path = (NBS/match[2]).resolve()
    if not path.is_file(): sys.exit(f'a page shows {match[2]}, which is not in the repository')
    name = path.relative_to(ROOT).as_posix()
    to = folder/('pages' if match[1].startswith('!') else 'extra')/name     # HTML is not looked into
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, to)
    return match[1] + name

def relinked(text:str, folder:Path)->str:
    "Links to files of the repository lead to it, pictures come along"
    text = PICTURE.sub(lambda m: place(folder, m), text)
    return re.sub(r'(\]\(|\bhref=")\.\./', rf'\1{SOURCE}/', text)

# --- pages ----------------------------------------------------------------------------------------

def contents(names:list)->str:
    "The side bar: parts with their pages, then the index of the package"
    parts = tomllib.loads((ROOT/'docs'/'parts.toml').read_text(encoding='utf-8'))
    without = [n for n in names if not n.startswith(tuple(parts))]
    if without: sys.exit(f'docs/parts.toml has no part for nbs/{without[0]}.ipynb, only {", ".join(parts)}')
    groups = [(f'{key} · {name}', [n for n in names if n.startswith(key)]) for key, name in parts.items()]
    groups.append(('The library', ['api/index']))
    return '\n\n'.join('\n'.join(['```{toctree}', ':hidden:', f':caption: {name}', '', *pages, '```'])
                       for name, pages in groups if pages)

def prepare(folder:Path):
    "Everything that Sphinx reads"
    shutil.rmtree(folder, ignore_errors=True)
    for name in ('pages', 'extra'): (folder/name).mkdir(parents=True)
    pages = {p.stem: nbformat.read(p, as_version=4) for p in sorted(NBS.glob('*.ipynb'))}
    for name, nb in pages.items():
        nb.cells = list(shown(nb))
        for cell in nb.cells:
            if cell.cell_type == 'markdown': cell.source = relinked(cell.source, folder)
        if name == 'index':
            side_bar = contents([n for n in pages if n != 'index'])
            nb.cells.append(nbformat.v4.new_markdown_cell(side_bar))
        nb.metadata['language_info'] = {'name': 'python'}
        nbformat.write(nb, folder/'pages'/f'{name}.ipynb')
    write_api(ROOT, folder/'pages'/'api', {name: title(NBS/f'{name}.ipynb') for name in pages})

def build(work:Path)->Path: # the folder of the site
    "Everything that Sphinx writes"
    code = sphinx_build(['-q', '-j', '2', '-c', str(ROOT/'docs'), '-d', str(work/'doctrees'),
                         '-D', f'html_extra_path={work/"extra"}', str(work/'pages'), str(work/'html')])
    if code: sys.exit(code)
    return work/'html'

def main():
    out = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT/'_docs'
    if len(sys.argv) > 1 and out.exists() and any(out.iterdir()) and not (out/'.buildinfo').exists():
        sys.exit(f'{out} holds something other than this site: name a new folder')
    work = ROOT/'build'/'docs' if out == ROOT/'_docs' else out.with_name(f'{out.name}.build')
    prepare(work)
    made = build(work)
    shutil.rmtree(out, ignore_errors=True)     # the old site stays until the new one is there
    shutil.move(made, out)
    print(f'{out}/index.html')

if __name__ == '__main__': main()
