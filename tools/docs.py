"All notebooks as static HTML pages in _docs, each with links to its neighbours. Needs nbconvert only."
import html, re, shutil
from configparser import ConfigParser
from pathlib import Path
import nbformat
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT/'_docs'
SETTINGS = ConfigParser(delimiters=['=']); SETTINGS.read(ROOT/'settings.ini', encoding='utf-8')
SOURCE = SETTINGS['DEFAULT']['git_url'] + '/blob/main/'

def without_machinery(nb):
    "Drop hidden cells, and the directive lines of the others"
    nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*(hide|default_exp)\b', c.source)]
    for c in nb.cells: c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
    return nb

def navigation(pages, i):
    link = lambda j, text: f'<a href="{pages[j].stem}.html">{html.escape(text)}</a>' if 0 <= j < len(pages) else ''
    parts = (link(i - 1, '← ' + pages[i-1].stem) if i else '', '<a href="index.html">all pages</a>', link(i + 1, pages[i+1].stem + ' →') if i + 1 < len(pages) else '')
    return '<nav style="display:flex;justify-content:space-between;padding:.6em 2em;font-family:sans-serif">' + ''.join(f'<span>{p}</span>' for p in parts) + '</nav>'

def main():
    pages = [ROOT/'nbs'/'index.ipynb', *(p for p in sorted((ROOT/'nbs').glob('*.ipynb')) if p.stem != 'index')]
    shutil.rmtree(OUT, ignore_errors=True); OUT.mkdir()
    exporter = HTMLExporter()
    for i, page in enumerate(pages):
        body, _ = exporter.from_notebook_node(without_machinery(nbformat.read(page, as_version=4)))
        body = re.sub(r'href="([\w.]+)\.ipynb', r'href="\1.html', body).replace('src="../', 'src="').replace('href="../', f'href="{SOURCE}')
        nav = navigation(pages, i)
        (OUT/f'{page.stem}.html').write_text(re.sub(r'(<body[^>]*>)', lambda m: m[1] + nav, body, count=1).replace('</body>', nav + '</body>'), encoding='utf-8')
        print(f'_docs/{page.stem}.html')
    shutil.copytree(ROOT/'benchmarks', OUT/'benchmarks', ignore=shutil.ignore_patterns('*.py', '__pycache__'))

if __name__ == '__main__': main()
