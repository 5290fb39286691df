"""The API index of the site: one page per module, and one page that lists every public name.

The exported modules are read, not imported, so the site needs no PyTorch. Parameters carry their comments
in fastcore's manner (docments): the one behind the parameter, else those on the lines above it.
"""
import ast, html, io, json, re, tokenize
from dataclasses import dataclass, field
from pathlib import Path

CELL = re.compile(r'^# %% \S*/([^/\s]+)\.ipynb #(\S+)$')      # nbdev's line above each exported cell
MARKUP = re.compile(r'([\\*_$<>\[\]{}|#~^])')
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
PROPERTIES = {'property', 'cached_property', 'functools.cached_property'}

# --- reading --------------------------------------------------------------------------------------

def comments_of(source:str)->dict: # line number -> comment without its sign
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = {t.start[0]: t.string.lstrip('#').strip() for t in tokens if t.type == tokenize.COMMENT}
    return {line: text for line, text in found.items() if not text.startswith('%%')}     # nbdev's own

def comment_at(line:int, comments:dict, taken:set)->str:
    "The comment behind a line, else those right above it, up to the line of another parameter"
    if line in comments: return comments[line]
    above = []
    while (line := line - 1) in comments and line not in taken:
        above.insert(0, comments[line])
    return ' '.join(above)

def unparse(node)->str: return '' if node is None else ast.unparse(node)

def arguments(node)->list: # (shown name, line, annotation, default) of each parameter of a function
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None]*(len(plain) - len(a.defaults)) + a.defaults
    rows = [('', *pair) for pair in zip(plain, defaults)]
    if a.vararg: rows.append(('*', a.vararg, None))
    rows += [('', *pair) for pair in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: rows.append(('**', a.kwarg, None))
    return [(stars + arg.arg, arg.lineno, unparse(arg.annotation), unparse(default))
            for stars, arg, default in rows]

def field_default(node)->str:
    "Default of a dataclass field: a value, or a call of `field` or the like that holds one"
    if not isinstance(node, ast.Call): return unparse(node)
    named = {k.arg: k.value for k in node.keywords}
    if 'default_factory' in named: return f"{unparse(named['default_factory'])}()"
    return unparse(node.args[0] if node.args else named.get('default'))

def fields_of(node)->list: # as `arguments`, of a dataclass
    lines = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    return [(n.target.id, n.lineno, unparse(n.annotation), field_default(n.value)) for n in lines]

def with_comments(rows:list, comments:dict, returns=None)->list: # (name, annotation, default, comment)
    "Only the last parameter of a line gets the comment behind it, and what is returned before any"
    rows = [*rows, *([('returns', returns.lineno, unparse(returns), '')] if returns else [])]
    owner = {line: name for name, line, *_ in rows}
    notes = {name: comment_at(line, comments, set(owner)) for line, name in owner.items()}
    return [(name, annotation, default, notes.get(name, '')) for name, _, annotation, default in rows]

def decorators(node)->set: return {unparse(d).partition('(')[0] for d in node.decorator_list}

@dataclass
class Symbol:
    "A public name, as Sphinx wants to be told of it"
    kind: str                                    # of its directive: function, class, method, property, data
    name: str
    line: int = 0
    summary: str = ''
    rows: list = field(default_factory=list)     # of parameters: (name, type, default, comment)
    options: list = field(default_factory=list)  # of its directive
    members: list = field(default_factory=list)

    @property
    def signature(self)->str:
        if self.kind in ('data', 'property'): return self.name
        shown = [name + (f': {kind}' if kind else '') + (f' = {default}' if default else '')
                 for name, kind, default, _ in self.rows if name != 'returns']
        after = [f' -> {kind}' for name, kind, *_ in self.rows if name == 'returns']
        return f'{self.name}({", ".join(shown)}){"".join(after)}'

def read_function(node, comments:dict)->Symbol:
    rows = with_comments(arguments(node), comments, node.returns)
    return Symbol('function', node.name, node.lineno, ast.get_docstring(node) or '', rows)

def read_method(node, comments:dict)->Symbol:
    marks, made = decorators(node), read_function(node, comments)
    if 'staticmethod' not in marks: made.rows = made.rows[1:]
    made.kind = 'property' if marks & PROPERTIES else 'method'
    returned = [kind for name, kind, *_ in made.rows if name == 'returns']
    kinds = [f':{mark}:' for mark in ('staticmethod', 'classmethod') if mark in marks]
    made.options = [f':type: {kind}' for kind in returned] if marks & PROPERTIES else kinds
    return made

def read_class(node, comments:dict)->Symbol:
    inner = [n for n in node.body if isinstance(n, FUNCTIONS)]
    init = next((n for n in inner if n.name == '__init__'), None)
    names = decorators(node) | set(map(unparse, node.bases))
    has_fields = names & {'dataclass', 'dataclasses.dataclass', 'NamedTuple', 'typing.NamedTuple'}
    rows = fields_of(node) if has_fields else arguments(init)[1:] if init else []
    members = [read_method(n, comments) for n in inner if not n.name.startswith('_')]
    made = Symbol('class', node.name, node.lineno, ast.get_docstring(node) or '', members=members)
    made.rows = with_comments(rows, comments)
    return made

def read_value(name:str, node, comments:dict)->Symbol:
    value = ' '.join(unparse(node.value).split())           # a string may have several lines
    shown = value if len(value) < 200 else f'{value[:190]} ...'
    summary = comment_at(node.lineno, comments, set())
    options = [f':value: {json.dumps(shown, ensure_ascii=False)}'] if value else []
    return Symbol('data', name, node.lineno, summary, options=options)

def read_symbol(name:str, node, comments:dict)->Symbol:
    if isinstance(node, ast.ClassDef): return read_class(node, comments)
    if isinstance(node, FUNCTIONS): return read_function(node, comments)
    return read_value(name, node, comments)

class Module:
    "An exported module: its public `symbols` in the order of the page, and the `cells` they come from"
    def __init__(self, path:Path, root:Path):
        source = path.read_text(encoding='utf-8')
        tree, self.comments = ast.parse(source), comments_of(source)
        self.path = path.relative_to(root).as_posix()
        self.name = '.'.join(path.relative_to(root).with_suffix('').parts)
        self.summary = ast.get_docstring(tree) or ''
        marks = ((i, CELL.match(line)) for i, line in enumerate(source.splitlines(), 1))
        self.cells = [(i, *m.groups()) for i, m in marks if m]     # line, page, id
        nodes = dict(definitions(tree.body))
        names = ast.literal_eval(nodes.pop('__all__').value) if '__all__' in nodes else []
        symbols = [read_symbol(name, nodes[name], self.comments) for name in names]
        self.symbols = sorted(symbols, key=lambda s: s.line)

    @property
    def page(self): return self.cells[0][1] if self.cells else ''

    def cell(self, symbol)->tuple: # (page, id) of the cell that defines it
        before = [(page, cell) for line, page, cell in self.cells if line < symbol.line]
        return before[-1] if before else (self.page, '')

def definitions(body):
    "(name, node) of what a module defines, in branches too"
    for node in body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            several = [n for t in targets for n in getattr(t, 'elts', [t])]
            yield from ((n.id, node) for n in several if isinstance(n, ast.Name))     # not `A.b = ...`
        else:
            for branch in ('body', 'orelse', 'handlers', 'finalbody'):
                yield from definitions(getattr(node, branch, []))

def read_modules(root:Path)->list: # of Module, in the order of the pages
    paths = [p for p in (root/'llama_nb').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py')]
    return sorted((Module(p, root) for p in paths), key=lambda m: (m.page, m.name))

# --- writing --------------------------------------------------------------------------------------

def plain(text:str)->str:
    "Text with nothing in it that Markdown would take for markup, but for code between backticks"
    parts = re.split(r'(`[^`\n]+`)', ' '.join(text.split()))
    return ''.join(p.replace('|', r'\|') if p[:1] == '`' else MARKUP.sub(r'\\\1', p) for p in parts)

def prose(docstring:str)->str: return '\n\n'.join(map(plain, re.split(r'\n\s*\n', docstring)))

def code(text:str)->str:
    text = ' '.join(text.split()).replace('|', r'\|')
    return f'`{text}`' if text and '`' not in text else text

def table(rows:list)->list:
    "Parameters, if any of them says more than the signature; a column without entries is left out"
    if not any(r[3] for r in rows): return []
    shown = [(name if name == 'returns' else code(name), code(kind), code(default), plain(note))
             for name, kind, default, note in rows if name != 'returns' or note]
    head = ('parameter', 'type', 'default', 'meaning')
    filled = [i for i in range(4) if any(row[i] for row in shown)]
    lines = [[row[i] for i in filled] for row in (head, ('---',)*4, *shown)]
    return ['', *(f'| {" | ".join(line)} |' for line in lines)]

def link(href:str, text:str)->str: return f'<a href="{html.escape(href)}">{text}</a>'

def entry(symbol, where='', depth=3)->list:
    "A symbol as a directive of Sphinx; its methods inside"
    inside = [line for m in symbol.members for line in entry(m, depth=depth)]
    fence = ':'*(depth + 1 if inside else depth)
    return ['', f'{fence}{{py:{symbol.kind}}} {symbol.signature}', *symbol.options, '', prose(symbol.summary),
            *table(symbol.rows), '', where, *inside, fence]

def module_page(module, titles:dict)->str:
    lines = [f'# {module.name}', '', f':::{{py:module}} {module.name}', ':::', '', plain(module.summary)]
    for symbol in module.symbols:
        page, cell = module.cell(symbol)
        href = f'../{page}.html' + (f'#cell-{cell}' if cell else '')
        where = link(href, html.escape(titles.get(page, page)))
        lines += entry(symbol, f'Explained in {where}.' if page else '')
    return '\n'.join(lines) + '\n'

def anchor(module, symbol)->str: return f'{module.name}.html#{module.name}.{symbol.name}'

def index_page(modules:list)->str:
    lines = ['# All names', '', 'Every public name of the package, in reading order. Each leads to its '
             'signature and its parameters, and from there to the page that explains it.', '',
             '```{toctree}', ':hidden:', '', *(m.name for m in modules), '```']
    for m in modules:
        lines += ['', f'## {m.name}', '', plain(m.summary), '']
        if m.symbols: lines += ['| name | |', '|---|---|']
        for s in m.symbols:
            name = link(anchor(m, s), f'<code>{s.name}</code>')
            lines.append(f'| {name} | {plain(s.summary.partition(chr(10))[0])} |')
    return '\n'.join(lines) + '\n'

def write_api(root:Path, folder:Path, titles:dict):
    "Write the pages of the index into a folder; `titles` are those of the notebooks, by file name"
    modules = [m for m in read_modules(root) if m.cells]
    folder.mkdir(parents=True, exist_ok=True)
    for m in modules: (folder/f'{m.name}.md').write_text(module_page(m, titles), encoding='utf-8')
    (folder/'index.md').write_text(index_page(modules), encoding='utf-8')
