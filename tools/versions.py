"""Run all pages and tests with this Python and this torch, note what happened, and write
benchmarks/versions.md. `--only pages` or `--only tests` renews one half of the note; `--table` only writes.
"""
import argparse, datetime, json, os, platform, re, subprocess, sys, tempfile
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
NOTES = ROOT/'benchmarks'/'versions.json'
PYTHONS = ('3.11', '3.12', '3.13')
LIMIT = 45*60                                                   # seconds for the pages, and for the tests

def run(*command, **env):
    "Run a command in the checkout, show what it prints: its exit code (124 after the time limit) and output"
    env = {**os.environ, 'PYTHONPATH': str(ROOT), **env}
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, timeout=LIMIT, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        code, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as e:
        code, text = 124, (e.stdout or b'').decode(errors='replace')
    print(text, flush=True)
    return code, text

def run_pages():
    "All pages, two at a time as `make test` does: how many, and which failed"
    code, text = run(sys.executable, 'tools/pages.py', '--n_workers', '2', OMP_NUM_THREADS='1')
    failed = re.findall(r'^\s+(\S+)\.ipynb$', text, re.M)
    if code and not failed: failed = [f'tools/pages.py (exit code {code})']
    return {'run': len(list((ROOT/'nbs').glob('*.ipynb'))), 'failed': failed, 'skipped': 0}

def run_tests():
    "All tests: how many ran, which failed, how many were skipped"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder)/'report.xml'
        code, _ = run(sys.executable, '-m', 'pytest', 'tests', '-m', '', '-n', '2', '--dist', 'loadfile',
                      '--no-loadscope-reorder', f'--junitxml={report}', OMP_NUM_THREADS='1')
        cases = list(ElementTree.parse(report).iter('testcase')) if report.exists() else []
    names = lambda *kinds: [c.get('name') for c in cases if any(c.find(k) is not None for k in kinds)]
    failed, skipped = names('failure', 'error'), len(names('skipped'))
    if code and not failed: failed = [f'pytest (exit code {code})']
    return {'run': len(cases) - skipped, 'failed': failed, 'skipped': skipped}

def git(*command):
    return subprocess.run(['git', *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()

def here():
    "What runs here"
    try:
        xformers = version('xformers')
    except PackageNotFoundError:
        xformers = None
    return {'python': platform.python_version(), 'torch': version('torch'), 'xformers': xformers,
            'transformers': version('transformers'), 'machine': f'{platform.system()} {platform.machine()}'}

def now():
    "When a half of a note was made, and of what"
    changed = git('status', '--porcelain', '--', '.', ':!benchmarks/versions.*')
    commit = git('rev-parse', '--short', 'HEAD') + (' and changes' if changed else '')
    return {'commit': commit, 'date': str(datetime.date.today())}

def minor(full): return '.'.join(full.split('.')[:2])

def torches():
    "Minor versions of torch that settings.ini admits, oldest first"
    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    low, high = re.search(r'torch>=2\.(\d+),<2\.(\d+)', settings['DEFAULT']['requirements']).groups()
    return [f'2.{i}' for i in range(int(low), int(high))]

def said(note, name):
    "'37 pages', or how many of them failed"
    part = note.get(name)
    if part is None: return f'{name} not run'
    failed = len(part['failed'])
    return f'{part["run"]} {name}' if not failed else f'**{failed} of {part["run"]} {name} failed**'

def cell(notes, torch, python):
    "What is known of one pair of versions"
    found = [n for n in notes if (minor(n['torch']), minor(n['python'])) == (torch, python)]
    return '<br>'.join(f'{said(n, "pages")}, {said(n, "tests")} ({n["torch"]})' for n in found) or 'not run'

def row(note):
    "A note as a row of the second table"
    parts = [note[name] for name in PARTS if name in note]
    commits = ', '.join(f'{name} {part["commit"]} on {part["date"]}'
                        for name in PARTS if (part := note.get(name)) is not None)
    failed = ', '.join(name for part in parts for name in part['failed']) or 'nothing'
    skipped = note['tests']['skipped'] if 'tests' in note else ''
    cells = [note['torch'], note['python'], note['xformers'] or 'not installed', note['transformers'],
             commits, skipped, failed]
    return '| ' + ' | '.join(map(str, cells)) + ' |'

def table(notes):
    "The notes as Markdown"
    lines = ['# What ran on which version', '', HEAD, '']
    lines += ['| torch | ' + ' | '.join(f'Python {p}' for p in PYTHONS) + ' |',
              '|---'*(len(PYTHONS) + 1) + '|']
    for torch in torches():
        lines.append(f'| {torch} | ' + ' | '.join(cell(notes, torch, p) for p in PYTHONS) + ' |')
    lines += ['', '| torch | Python | xformers | transformers | commit | skipped tests | failed |',
              '|---'*7 + '|']
    return '\n'.join([*lines, *map(row, notes)]) + '\n'

HEAD = '''Every page was executed and every test was run, on a CPU, by `make versions PYTHON=... TORCH=...`,
which notes the outcome in `versions.json` and writes this table. A build named `+cpu` has no CUDA; the others
are builds for CUDA that ran on a machine without a GPU.'''

def in_order(note):
    "By minor version of torch, its patch, and Python"
    minor_and_patch = f'{minor(note["torch"])}.{note["torch"].split("+")[0].split(".")[-1]}'
    return [int(i) for i in re.findall(r'\d+', f'{minor_and_patch}.{note["python"]}')]

PARTS = {'pages': run_pages, 'tests': run_tests}

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--table', action='store_true', help='only write the table from the notes')
    parser.add_argument('--only', choices=PARTS, help='renew one half of the note')
    chosen = parser.parse_args()
    notes = json.loads(NOTES.read_text(encoding='utf-8')) if NOTES.exists() else []
    failed = not chosen.table and renew(notes, [chosen.only] if chosen.only else list(PARTS))
    NOTES.with_suffix('.md').write_text(table(notes), encoding='utf-8')
    sys.exit(failed)

def renew(notes, names):
    "Run these parts and put what happened into the note of these versions; did any fail?"
    about = here()
    note = next((n for n in notes if (n['torch'], n['python']) == (about['torch'], about['python'])), None)
    if note is None: notes.append(note := {})
    note |= about
    for name in names: note[name] = PARTS[name]() | now()
    notes.sort(key=in_order)
    NOTES.write_text(json.dumps(notes, indent=1) + '\n', encoding='utf-8')
    return any(note[name]['failed'] for name in names)

if __name__ == '__main__': main()
