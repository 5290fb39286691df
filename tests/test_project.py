"""What stands around the book: changelog, citation, forms, hooks and the guide for contributors say what is
so."""
import ast, re
from configparser import ConfigParser
from pathlib import Path
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FORMS = sorted((ROOT/'.github'/'ISSUE_TEMPLATE').glob('*.yml'))
TEXTS = [*ROOT.glob('*.md'), *(ROOT/'.github').glob('*.md')]

def read(name): return (ROOT/name).read_text(encoding='utf-8')

def setting(name):
    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    return settings['DEFAULT'][name]

# --- one version, told three times --------------------------------------------------------------

def releases(changelog):
    "[(version, day)] of the headings, newest first; 'Unreleased' has no day"
    return re.findall(r'^## \[([\w.]+)\](?: - (\d{4}-\d{2}-\d{2}))?$', changelog, re.M)

def disagreements(changelog, citation, version):
    "What changelog, citation and settings.ini do not agree on"
    found, released = [], releases(changelog)
    headings = re.findall(r'^## .*$', changelog, re.M)
    if len(headings) != len(released): found.append('a heading that is no version with its day')
    if released[:1] != [('Unreleased', '')]: found.append('the first heading is not [Unreleased]')
    if any(not day for _, day in released[1:]): found.append('a version without a day')
    if citation['version'] != version: found.append('CITATION.cff has another version')
    last = released[1] if len(released) > 1 else (None, None)
    if 'date-released' in citation and last != (version, str(citation['date-released'])):
        found.append('date-released is not the day of this version in the changelog')
    if last[0] == version and 'date-released' not in citation: found.append('no date-released')
    return found

def defined(source):
    "Names that a module defines at its top"
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): found.add(node.name)
        targets = getattr(node, 'targets', [getattr(node, 'target', None)])
        found |= {n.id for target in targets if target for n in ast.walk(target) if isinstance(n, ast.Name)}
    return found

MODULES = {'.'.join(p.relative_to(ROOT/'llama_nb').with_suffix('').parts): p.read_text(encoding='utf-8')
           for p in (ROOT/'llama_nb').rglob('*.py')}
DEFINED = {name: defined(source) for name, source in MODULES.items()}

def quoted(cell): return re.findall(r'`([\w.]+)', cell)

def renamed(changelog):
    "(modules, names) of each row of the table of what was renamed: where one looks now, and for what"
    table = changelog.split('| was | is |')[1].split('\n\n')[0]
    for row in table.splitlines()[2:]:
        was, now = row.strip().strip('|').split(' | ')
        names = quoted(was if 'same name' in now else now)
        modules = [n for n in quoted(now) if n in MODULES]
        yield modules, [n for n in names if n not in MODULES and '.' not in n]

def not_there(changelog):
    "Names that are not where the table sends those who look for them"
    everything = '\n'.join(MODULES.values())
    for modules, names in renamed(changelog):
        there = set().union(*(DEFINED[m] for m in modules))
        for name in names:
            if name in there if modules else re.search(rf'\b{name}\b', everything): continue
            yield name, modules

def test_what_was_renamed_is_where_the_changelog_says():
    text = read('CHANGELOG.md')
    assert sum(len(names) for _, names in renamed(text)) > 80
    assert list(not_there(text)) == []
    wrong = text.replace('in `model.backends` |', '|').replace('`settings`: `degrees`', '`config`: `degrees`')
    assert {name for name, _ in not_there(wrong)} >= {'attend', 'pick_backend', 'degrees'}

def test_changelog_citation_and_settings_agree():
    citation = yaml.safe_load(read('CITATION.cff'))
    assert disagreements(read('CHANGELOG.md'), citation, setting('version')) == []

@pytest.mark.parametrize('changelog, citation, found', [
    ('## [Unreleased]\n', {'version': '0.1.0'}, []),
    ('## [Unreleased]\n', {'version': '0.2.0'}, ['CITATION.cff has another version']),
    ('## [0.1.0] - 2026-12-01\n', {'version': '0.1.0'}, ['the first heading is not [Unreleased]']),
    ('## [Unreleased]\n## 0.1.0\n', {'version': '0.1.0'}, ['a heading that is no version with its day']),
    ('## [Unreleased]\n## [0.1.0]\n', {'version': '0.1.0'}, ['a version without a day', 'no date-released']),
    ('## [Unreleased]\n## [0.1.0] - 2026-12-01\n', {'version': '0.1.0', 'date-released': '2026-12-01'}, []),
    ('## [Unreleased]\n## [0.1.0] - 2026-12-01\n', {'version': '0.1.0', 'date-released': '2026-12-02'},
     ['date-released is not the day of this version in the changelog'])])
def test_a_disagreement_is_seen(changelog, citation, found):
    assert disagreements(changelog, citation, '0.1.0') == found

def test_the_citation_names_the_paper():
    citation = yaml.safe_load(read('CITATION.cff'))
    assert {'cff-version', 'message', 'title', 'authors', 'license'} <= citation.keys()
    paper = citation['references'][0]
    names = [a['family-names'] for a in paper['authors']]
    assert (names[0], names[-1], len(names), paper['year']) == ('Touvron', 'Lample', 14, 2023)
    assert paper['url'].removeprefix('https://arxiv.org/abs/') in paper['journal']

# --- forms for issues ---------------------------------------------------------------------------

@pytest.mark.parametrize('form', [f for f in FORMS if f.stem != 'config'], ids=lambda f: f.stem)
def test_a_form_is_complete(form):
    "What GitHub demands of one: it shows nothing at all instead of a form with a mistake"
    told = yaml.safe_load(form.read_text(encoding='utf-8'))
    assert told['name'] and told['description'] and told['body']
    fields = [f for f in told['body'] if f['type'] != 'markdown']
    assert len({f['id'] for f in fields}) == len({f['attributes']['label'] for f in fields}) == len(fields)
    assert {f['type'] for f in fields} <= {'input', 'textarea', 'dropdown', 'checkboxes'}
    assert any(f.get('validations', {}).get('required') for f in fields)

# --- the guide ----------------------------------------------------------------------------------

def missing_links(text, folder):
    "Links of a Markdown text to files that are not there"
    links = re.findall(r'\]\(([^)#\s]+)', re.sub(r'`[^`]*`', '', text))
    return [link for link in links if '://' not in link and not (folder/link).exists()]

@pytest.mark.parametrize('path', TEXTS, ids=lambda p: p.name)
def test_links_between_documents_lead_somewhere(path):
    assert missing_links(path.read_text(encoding='utf-8'), path.parent) == []

def test_a_dead_link_is_seen():
    assert missing_links('[a](README.md) [b](no.md#x) [c](https://example.org) `[d](e)`', ROOT) == ['no.md']

def parts():
    "[(first, last)] number of each part in the guide; 7A follows 79"
    return re.findall(r'^\| [^|]+ \| (\d\w)-(\d\w) \|', read('CONTRIBUTING.md'), re.M)

def test_every_page_has_a_place_in_the_order():
    pages = [p.stem for p in (ROOT/'nbs').glob('*.ipynb') if p.stem != 'index']
    numbers = [p[:2] for p in pages]
    assert len(parts()) > 5 and all(sum(a <= n <= b for a, b in parts()) == 1 for n in numbers)
    assert len(set(numbers)) == len(numbers), 'two pages share a number'

def targets(): return set(re.findall(r'^([\w-]+):', read('Makefile'), re.M))

@pytest.mark.parametrize('name',
                         ['CONTRIBUTING.md', '.pre-commit-config.yaml', 'CHANGELOG.md',
                          '.github/pull_request_template.md'])
def test_what_is_to_be_typed_exists(name):
    text = read(name)
    commands = set(re.findall(r'(?:`|entry: )make ([a-z][\w-]*)', text))
    assert commands <= targets(), f'no such target: {commands - targets()}'
    files = re.findall(r'(?:pytest|--path) ((?:tests|nbs)/\S+?)`', text)
    assert [f for f in files if not (ROOT/f).exists()] == []

def test_hooks_use_what_is_installed():
    "What a hook takes from .venv comes with the package's own tools, so that `make` has put it there"
    hooks = yaml.safe_load(read('.pre-commit-config.yaml'))['repos'][0]['hooks']
    entries = ' '.join(h['entry'] for h in hooks)
    tools = set(re.findall(r'\.venv/bin/([\w-]+)', entries))
    assert tools and tools <= {re.match(r'[\w-]+', r)[0] for r in setting('test_requirements').split()}
