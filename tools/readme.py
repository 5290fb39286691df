"Write README.md from nbs/index.ipynb, and llms.txt from the titles of all notebooks; --check only compares."
import json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

def cells(path):
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        yield cell['cell_type'], ''.join(cell['source']), cell.get('outputs', [])

def from_root(text):
    "Links of a page in nbs/ as seen from the root"
    text = re.sub(r'\]\(\.\./', '](', text)
    return re.sub(r'\]\(([\w.]+\.ipynb|images/)', r'](nbs/\1', text)

def output_text(output):
    data = output.get('data', {}).get('text/plain', output.get('text', ''))
    return ''.join(data).rstrip()

def readme(index):
    "Markdown of the front page: prose, shown code, printed results"
    parts = []
    for kind, source, outputs in cells(index):
        if kind == 'markdown': parts.append(from_root(source))
        elif kind == 'code' and not source.startswith('#| hide'):
            parts.append(f'```python\n{source}\n```')
            shown = '\n'.join(filter(None, map(output_text, outputs)))
            if shown: parts.append(f'```\n{shown}\n```')
    return '<!-- Made from nbs/index.ipynb by `make prepare`; edit that. -->\n\n' + '\n\n'.join(parts) + '\n'

def head(notebook):
    "The lines of the first cell that is prose: the title, and one line below it"
    first = next(source for kind, source, _ in cells(notebook) if kind == 'markdown')
    return [line.lstrip('#> ') for line in first.splitlines() if line.strip()]

def title(notebook): return head(notebook)[0]

MORE = ('## More', '',
        '- [Front page](README.md): the two commands, results, what works and what does not yet',
        '- [How to contribute](CONTRIBUTING.md): how a page is written and tested',
        '- [Changelog](CHANGELOG.md): what a user must know about each version',
        '- [Log](LOG.md): dated measurements and negative results')

def llms(nbs):
    pages = [p for p in sorted(nbs.glob('*.ipynb')) if p.stem != 'index']
    name, line = head(nbs/'index.ipynb')
    return '\n'.join([f'# {name}', '', f'> {line}', '', '## Pages, in reading order', '',
                      *(f'- [{name}](nbs/{p.name}): {line}' for p in pages for name, line in [head(p)]),
                      '', *MORE, ''])

def main():
    wanted = {'README.md': readme(ROOT/'nbs'/'index.ipynb'), 'llms.txt': llms(ROOT/'nbs')}
    stale = [name for name, text in wanted.items() if not (ROOT/name).exists()
             or (ROOT/name).read_text(encoding='utf-8') != text]
    if '--check' in sys.argv[1:]: sys.exit(f'{", ".join(stale)} out of date: make prepare' if stale else 0)
    for name in stale:
        (ROOT/name).write_text(wanted[name], encoding='utf-8')
        print(f'{name} written')

if __name__ == '__main__': main()
