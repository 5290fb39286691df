"The site: built once, and then read as a browser would, without one and without a network."
import ast, importlib.util, inspect, json, os, re, shutil, subprocess, sys, tomllib
from collections import Counter
from html.parser import HTMLParser
from importlib.metadata import files
from pathlib import Path
from urllib.parse import unquote, urlsplit
import pytest
from conftest import load_tool

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ('sphinx', 'myst_nb', 'sphinx_book_theme', 'sphinx_copybutton')
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
REASON = f'{", ".join(MISSING)} not installed: pip install -e ".[docs]"'
needs_sphinx = pytest.mark.skipif(bool(MISSING), reason=REASON)
pytestmark = pytest.mark.timeout(900)               # the site is built by whoever asks first

# --- a page as a browser reads it ------------------------------------------------------------------

LOADS = set('stylesheet preload modulepreload prefetch preconnect dns-prefetch icon manifest'.split())
VOID = set('area base br col embed hr img input link meta source track wbr'.split())

class Page(HTMLParser):
    "What a page names, links to, loads by itself, and says"
    def __init__(self, text:str):
        super().__init__()
        self.ids, self.links, self.loads, self.formulas, self.scripts, self.styles = [], [], [], [], [], []
        self.title, self.prose, self.code, self.words = '', '', '', Counter()
        self.open = []                   # (tag, class) of the elements around
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = {k: v or '' for k, v in attrs}
        names = a.get('class', '').split()
        if 'id' in a: self.ids.append(a['id'])
        if tag == 'a' and 'href' in a: self.links.append(a['href'])
        if tag == 'link' and LOADS & set(a.get('rel', '').split()): self.loads.append(a.get('href', ''))
        self.loads += [a[k] for k in ('src', 'poster', 'data') if k in a]
        self.loads += [part.split()[0] for part in a.get('srcset', '').split(',') if part.strip()]
        if 'style' in a: self.styles.append(a['style'])
        if 'math' in names: self.formulas.append('')
        self.words.update([tag, *names])
        if tag not in VOID: self.open.append((tag, names))

    def handle_endtag(self, tag):
        if tag not in (t for t, _ in self.open): return
        while self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tags, classes = {t for t, _ in self.open}, {c for _, names in self.open for c in names}
        if 'title' in tags and 'svg' not in tags: self.title += data
        elif 'script' in tags: self.scripts.append(data)
        elif 'style' in tags: self.styles.append(data)
        elif 'math' in classes: self.formulas[-1] += '' if 'eqno' in classes else data
        elif tags & {'pre', 'code'}: self.code += data
        elif 'sig' not in classes: self.prose += data

def formulas_of(page)->list:
    "Without the signs around them"
    return [re.sub(r'^\s*\\[(\[]|\\[)\]]\s*$', '', f).strip() for f in page.formulas]

class Site:
    "A folder of pages"
    def __init__(self, folder:Path):
        self.folder = folder
        paths = [p for p in sorted(folder.rglob('*.html')) if '_static' not in p.parts]
        self.pages = {p.relative_to(folder).as_posix(): Page(p.read_text(encoding='utf-8')) for p in paths}

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')/'html'
    command = [sys.executable, ROOT/'tools'/'docs.py', folder]
    env = {**os.environ, 'PYTHONWARNINGS': 'ignore'}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    made = Site(folder)
    made.said = done.stderr
    return made

@pytest.fixture(scope='session')
def notebooks():
    "The cells of each, by name"
    paths = sorted((ROOT/'nbs').glob('*.ipynb'))
    return {p.stem: json.loads(p.read_text(encoding='utf-8'))['cells'] for p in paths}

def source(cell)->str: return ''.join(cell['source'])

def marks(cell)->set:
    "The directives of a code cell: 'hide', 'export', ..."
    if cell['cell_type'] != 'code': return set()
    return set(re.findall(r'^#\|\s*(\w+)', source(cell), flags=re.M))

def heading(cells)->str:
    prose = [source(c) for c in cells if c['cell_type'] == 'markdown']
    return next(m[1] for text in prose if (m := re.match(r'#\s+(.*)', text)))

# --- every page ------------------------------------------------------------------------------------

@needs_sphinx
def test_it_is_made_without_a_warning(site): assert site.said == ''

@needs_sphinx
def test_every_notebook_is_a_page_with_a_title_of_its_own(site, notebooks):
    titles = {name: page.title for name, page in site.pages.items()}
    assert {f'{name}.html' for name in notebooks} <= titles.keys()
    assert [t for t, n in Counter(titles.values()).items() if n > 1] == []
    plain = lambda text: re.sub(r'[`*]', '', text)
    headings = {f'{name}.html': plain(heading(cells)) for name, cells in notebooks.items() if name != 'index'}
    assert [name for name, text in headings.items() if not titles[name].startswith(text)] == []
    assert 'LLaMA' in titles['index.html']

@needs_sphinx
def test_parts_neighbours_and_ways_to_open_it(site, notebooks):
    settings = (ROOT/'settings.ini').read_text(encoding='utf-8')
    user, repo = (re.search(rf'^{key} = (.*)', settings, flags=re.M)[1] for key in ('user', 'repo'))
    parts = tomllib.loads((ROOT/'docs'/'parts.toml').read_text(encoding='utf-8'))
    names = [n for n in notebooks if n != 'index']
    order = [n for key in parts for n in names if n.startswith(key)]
    assert sorted(order) == sorted(names)
    for before, name, after in zip(['index', *order], order, [*order[1:], 'api/index']):
        page = site.pages[f'{name}.html']
        assert f'{before}.html' in page.links and f'{after}.html' in page.links, name
        text = ' '.join(page.prose.split())
        assert all(parts[key] in text for key in parts if any(n.startswith(key) for n in names)), name
        path = f'{user}/{repo}/blob/main/nbs/{name}.ipynb'
        assert f'https://github.com/{path}' in page.links, name
        assert f'https://colab.research.google.com/github/{path}' in page.links, name

# --- cells -----------------------------------------------------------------------------------------

@needs_sphinx
def test_each_exported_cell_says_where_it_is_exported_to(site, notebooks):
    shown = 0
    for name, cells in notebooks.items():
        page = site.pages[f'{name}.html']
        exported = [c['id'] for c in cells if marks(c) & {'export', 'exporti'}]
        assert [i for i in page.ids if i.startswith('cell-')] == [f'cell-{i}' for i in exported], name
        assert page.words['tag_exported'] == page.words['exported'] == len(exported), name
        named = [re.match(r'#\| default_exp (\S+)', source(c)) for c in cells]
        modules = [m[1].replace('.', '/') for m in named if m]
        assert all(page.prose.count(f'llama_nb/{m}.py') >= len(exported) for m in modules), name
        shown += len(exported)
    assert shown > 200

@needs_sphinx
def test_checks_are_folded_and_hidden_cells_are_left_out(site, notebooks):
    for name, cells in notebooks.items():
        code = [c for c in cells if c['cell_type'] == 'code' and not marks(c) & {'default_exp'}]
        hidden = {line for c in code if 'hide' in marks(c) for line in source(c).splitlines()[1:]}
        visible = {line for c in code if 'hide' not in marks(c) for line in source(c).splitlines()}
        lines = site.pages[f'{name}.html'].code.splitlines()
        assert not (hidden - visible) & set(lines), name
        demonstrations = [c for c in code if not marks(c) & {'hide', 'export', 'exporti'}]
        words = site.pages[f'{name}.html'].words
        assert words['tag_check'] >= sum(c['id'].endswith('-check') for c in demonstrations), name
        assert words['tag_check'] == words['hide'], name

@pytest.mark.parametrize('text, asserts', [
    ('assert f(1) == 2', True), ('test_eq(f(1), 2)\ntorch.testing.assert_close(a, b)', True),
    ('for x in xs:\n    assert f(x)', True), ('with expect_fail(ValueError): f(-1)', True),
    ('y = f(1)\nassert y == 2', False), ('f(1)', False),
    ('with torch.no_grad(): f(1)', False), ('%timeit f(1)', False)])
@needs_sphinx
def test_what_only_asserts(text, asserts):
    import nbformat
    assert load_tool('docs').is_check(nbformat.v4.new_code_cell(text, id='x')) == asserts

# --- links -----------------------------------------------------------------------------------------

def in_site(site, name:str, url)->bool:
    "Does a link of the page `name` lead to a file of the site, and to a place in it?"
    path = (site.folder/name).parent/unquote(url.path) if url.path else site.folder/name
    target = site.pages.get(os.path.relpath(path, site.folder))
    return path.is_file() and (not url.fragment or target is None or unquote(url.fragment) in target.ids)

def broken_links(site, repository:str)->list:
    "'page -> link' for each that leads nowhere, in the site or in the repository"
    found = []
    for name, page in site.pages.items():
        for href in set(page.links + page.loads):
            url = urlsplit(href.replace(repository, ROOT.as_uri() + '/'))
            if url.scheme not in ('', 'file') or (url.netloc and not url.scheme): continue
            is_there = Path(unquote(url.path)).exists() if url.scheme else in_site(site, name, url)
            if not is_there: found.append(f'{name} -> {href}')
    return sorted(found)

@pytest.fixture(scope='session')
def repository():
    "Where links to files of this repository begin"
    url = 'https://github.com/%s/%s/blob/main/'
    settings = (ROOT/'settings.ini').read_text(encoding='utf-8')
    return url % tuple(re.search(rf'^{key} = (.*)', settings, flags=re.M)[1] for key in ('user', 'repo'))

@needs_sphinx
def test_no_link_is_broken(site, repository):
    assert sum(len(p.links) for p in site.pages.values()) > 1000
    assert broken_links(site, repository) == []

def test_a_broken_link_is_seen(tmp_path, repository):
    a = ('#top', '#gone', 'b.html#x', 'c.html')
    b = ('a.html#top', f'{repository}README.md', f'{repository}no.md')
    links = lambda targets: ''.join(f'<a href="{target}"></a>' for target in targets)
    (tmp_path/'a.html').write_text('<h1 id="top">A</h1>' + links(a))
    (tmp_path/'b.html').write_text('<img src="no.png">' + links(b))
    assert broken_links(Site(tmp_path), repository) == [
        'a.html -> #gone', 'a.html -> b.html#x', 'a.html -> c.html',
        f'b.html -> {repository}no.md', 'b.html -> no.png']

# --- no other host ---------------------------------------------------------------------------------

ELSEWHERE = r'(?:https?:)?//'
IN_STYLE = re.compile(rf'(?:url\(\s*|@import\s*)["\']?({ELSEWHERE}[^"\')\s;]+)')
CALL = r'\b(?:fetch|import|importScripts|load|Worker|open)\(\s*(?:"\w+"\s*,\s*)?'     # open("GET", address)
IN_SCRIPT = re.compile(rf'(?:{CALL}|\.src\s*=\s*|\bfrom\s*|\bimport\s*)["\'`]({ELSEWHERE}[^"\'`]+)')

def requests(site)->list:
    "'file -> address' for each thing on another host that a browser would fetch by itself"
    found = []
    for name, page in site.pages.items():
        found += [(name, a) for a in page.loads if re.match(ELSEWHERE, a)]
        found += [(name, a) for text in page.styles for a in IN_STYLE.findall(text)]
        found += [(name, a) for text in page.scripts for a in IN_SCRIPT.findall(text)]
    for kind, pattern in (('css', IN_STYLE), ('js', IN_SCRIPT)):
        for path in sorted(site.folder.rglob(f'*.{kind}')):
            text = path.read_text(encoding='utf-8', errors='replace')
            found += [(path.name, a) for a in pattern.findall(text)]
    return [f'{name} -> {address}' for name, address in found]

@needs_sphinx
def test_no_request_to_another_host(site): assert requests(site) == []

def test_a_request_to_another_host_is_seen(tmp_path):
    (tmp_path/'a.html').write_text('''
        <a href="https://fine.org"></a> <script src="https://x.org/1"></script>
        <link rel="stylesheet" href="//x.org/2"> <script>fetch("https://x.org/3")</script>''')
    (tmp_path/'a.css').write_text('''@import "https://x.org/4";
        p { background: url(https://x.org/5) } q { background: url(fine.png) }''')
    (tmp_path/'a.js').write_text('''const page = "https://fine.org"
        import("https://x.org/6"); image.src = "https://x.org/7"''')
    assert [line[-1] for line in requests(Site(tmp_path))] == list('1234567')

# --- formulas --------------------------------------------------------------------------------------

# Without `autoload` and `require`: the site has one file of MathJax, and an extension would be another.
# Without `noundefined`: which shows an unknown command in red, and calls that no error.
COMPILE = '''
const path = process.argv[1], formulas = JSON.parse(require('fs').readFileSync(0, 'utf8'))
const settings = {loader: {load: ['input/tex', 'output/svg', 'adaptors/liteDOM']},
                  tex: {packages: {'[-]': ['autoload', 'require', 'noundefined']}}}
require(path).init(settings).then(MathJax => {
  const bad = []
  for (const formula of formulas) {
    const error = /data-mjx-error="([^"]*)"/.exec(MathJax.startup.adaptor.outerHTML(MathJax.tex2svg(formula)))
    if (error) bad.push([formula, error[1]])
  }
  console.log(JSON.stringify(bad))
})'''

def mathjax(name:str)->Path:
    return Path(next(f for f in files('sphinx-mathjax-offline') if f.name == name).locate())

def compiled(formulas:list)->list: # (formula, error) of those that MathJax cannot set
    command = ['node', '-e', COMPILE, mathjax('node-main.js')]
    done = subprocess.run(command, input=json.dumps(formulas), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [tuple(pair) for pair in json.loads(done.stdout)]

def balanced(formula:str)->bool:
    "Do braces, environments, and `left` and `right` come in pairs?"
    waiting = []
    for token in re.findall(r'\\(?:begin|end)\{[^}]*\}|\\left\b|\\right\b|\\.|[{}]', formula):
        name = re.sub(r'\\(?:begin|end)', '', token) if token[1:4] in ('beg', 'end') else ''
        if token == '{' or token == '\\left' or token.startswith('\\begin{'): waiting.append(name or token)
        elif token == '}' or token == '\\right' or token.startswith('\\end{'):
            opening = name or {'}': '{', '\\right': '\\left'}[token]
            if not waiting or waiting.pop() != opening: return False
    return not waiting

def unknown_commands(formula:str, known:set)->set: return set(re.findall(r'\\([A-Za-z]+)', formula)) - known

@pytest.fixture(scope='session')
def formulas(site): return sorted({f for page in site.pages.values() for f in formulas_of(page)})

@needs_sphinx
def test_formulas_are_balanced_and_their_commands_known(formulas):
    "Where there is no Node, this must do"
    known = set(re.findall(r'[A-Za-z]+', mathjax('tex-svg.js').read_text(encoding='utf-8')))
    assert len(formulas) > 200
    assert [f for f in formulas if not balanced(f) or unknown_commands(f, known)] == []

@needs_sphinx
@pytest.mark.skipif(shutil.which('node') is None, reason='no Node: only balance and commands are checked')
def test_every_formula_compiles(formulas):
    broken = [r'\frac{1}', r'\nosuchthing', r'\left( x', r'\boldsymbol{x}']     # the last needs another file
    assert [formula for formula, _ in compiled(['x', *broken])] == broken
    assert compiled(formulas) == []

@needs_sphinx
def test_no_formula_is_left_as_text(site):
    assert [name for name, page in site.pages.items() if re.search(r'\$[^$\s]', page.prose)] == []

def test_what_is_balanced():
    assert balanced(r'\left\{ \frac{1}{2} \right\} \begin{cases} a \\ b \end{cases}')
    assert balanced(r'\lefthook \{')
    assert not any(map(balanced, (r'\frac{1}{2', r'\left( x', r'\begin{cases} a', r'\begin{a}\end{b}', 'x}')))

# --- the index of the package ----------------------------------------------------------------------

def listed(path:Path)->set:
    "`__all__` of an exported module"
    lines = [n for n in ast.parse(path.read_text(encoding='utf-8')).body if isinstance(n, ast.Assign)]
    values = [n.value for n in lines if getattr(n.targets[0], 'id', '') == '__all__']
    return set(ast.literal_eval(values[0])) if values else set()

@pytest.fixture(scope='session')
def public():
    "Every public name: nbdev's own index, and `__all__` for the values that it leaves out"
    spec = importlib.util.spec_from_file_location('modidx', ROOT/'llama_nb'/'_modidx.py')
    spec.loader.exec_module(modidx := importlib.util.module_from_spec(spec))
    found = {}
    for module, symbols in modidx.d['syms'].items():
        names = listed(ROOT.joinpath(*module.split('.')).with_suffix('.py'))
        inner = {s.removeprefix(f'{module}.') for s in symbols}
        found[module] = names | {s for s in inner if s.split('.')[0] in names and '._' not in s}
    return found

@needs_sphinx
def test_the_index_names_every_public_symbol(site, public):
    assert sum(map(len, public.values())) > 250
    for module, names in public.items():
        if names: assert {f'{module}.{name}' for name in names} <= set(site.pages[f'api/{module}.html'].ids)
    shown = site.pages['api/index.html'].code
    assert [n for names in public.values() for n in names if '.' not in n and n not in shown] == []

@needs_sphinx
def test_the_index_leads_to_the_cell_that_defines_it(site):
    page = site.pages['api/llama_nb.model.norm.html']
    assert any(re.fullmatch(r'\.\./\d\d_model\.norm\.html#cell-rmsnorm', link) for link in page.links)

def test_parameters_carry_the_comments_that_fastcore_reads():
    "Against fastcore's docments, which imports what we only read"
    docments = pytest.importorskip('fastcore.docments').docments
    seen = 0
    for module in load_tool('api').read_modules(ROOT):
        if not module.symbols: continue
        loaded = importlib.import_module(module.name)
        for symbol in module.symbols:
            thing = getattr(loaded, symbol.name)
            if not inspect.isfunction(thing) and not inspect.isclass(thing): continue     # not fastcore's
            if inspect.isclass(thing) and issubclass(thing, tuple): continue              # it reads no fields
            theirs = docments(thing, args_kwargs=True)
            for name, _, _, note in symbol.rows:
                expected = theirs.get('return' if name == 'returns' else name.lstrip('*')) or ''
                assert note == ' '.join(expected.split()), f'{module.name}.{symbol.name}: {name}'
                seen += bool(note)
    assert seen > 300
