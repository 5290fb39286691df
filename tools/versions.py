"Run all pages and tests with this Python and this torch, note what happened, and write benchmarks/versions.md; --table only writes."
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
    "Run a command in the checkout and show what it prints; its exit code (124 after the time limit) and its output"
    env = {**os.environ, 'PYTHONPATH': str(ROOT), **env}
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, timeout=LIMIT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        code, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as e: code, text = 124, (e.stdout or b'').decode(errors='replace')
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
        code, _ = run(sys.executable, '-m', 'pytest', 'tests', '-n', '2', '--dist', 'loadfile',
                      '--no-loadscope-reorder', f'--junitxml={report}', OMP_NUM_THREADS='1')
        cases = list(ElementTree.parse(report).iter('testcase')) if report.exists() else []
    names = lambda *kinds: [c.get('name') for c in cases if any(c.find(k) is not None for k in kinds)]
    failed, skipped = names('failure', 'error'), len(names('skipped'))
    if code and not failed: failed = [f'pytest (exit code {code})']
    return {'run': len(cases) - skipped, 'failed': failed, 'skipped': skipped}

def git(*command): return subprocess.run(['git', *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()

def here():
    "What runs here: versions and the commit"
    try: xformers = version('xformers')
    except PackageNotFoundError: xformers = None
    changed = git('status', '--porcelain', '--', '.', ':!benchmarks/versions.*')
    commit = git('rev-parse', '--short', 'HEAD') + (' and changes' if changed else '')
    return {'python': platform.python_version(), 'torch': version('torch'), 'xformers': xformers, 'transformers': version('transformers'),
            'commit': commit, 'date': str(datetime.date.today()), 'machine': f'{platform.system()} {platform.machine()}'}

def minor(full): return '.'.join(full.split('.')[:2])

def torches():
    "Minor versions of torch that settings.ini admits, oldest first"
    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    low, high = re.search(r'torch>=2\.(\d+),<2\.(\d+)', settings['DEFAULT']['requirements']).groups()
    return [f'2.{i}' for i in range(int(low), int(high))]

def said(part, name):
    failed = len(part['failed'])
    return f'{part["run"]} {name}' if not failed else f'**{failed} of {part["run"]} {name} failed**'

def cell(notes, torch, python):
    "What is known of one pair of versions"
    found = [n for n in notes if (minor(n['torch']), minor(n['python'])) == (torch, python)]
    return '<br>'.join(f'{said(n["pages"], "pages")}, {said(n["tests"], "tests")} ({n["torch"]})' for n in found) or 'not run'

def table(notes):
    "The notes as Markdown"
    lines = ['# What ran on which version', '', HEAD, '', '| torch | ' + ' | '.join(f'Python {p}' for p in PYTHONS) + ' |', '|---'*(len(PYTHONS) + 1) + '|']
    for torch in torches(): lines.append(f'| {torch} | ' + ' | '.join(cell(notes, torch, p) for p in PYTHONS) + ' |')
    lines += ['', '| torch | Python | xformers | transformers | commit | day | skipped tests | failed |', '|---'*8 + '|']
    for n in notes:
        failed = ', '.join(n['pages']['failed'] + n['tests']['failed']) or 'nothing'
        lines.append(f'| {n["torch"]} | {n["python"]} | {n["xformers"] or "not installed"} | {n["transformers"]} | {n["commit"]} | {n["date"]} | {n["tests"]["skipped"]} | {failed} |')
    return '\n'.join(lines) + '\n'

HEAD = '''Every page was executed and every test was run, on a CPU, by `make versions PYTHON=... TORCH=...`, which notes the outcome in
`versions.json` and writes this table. A build named `+cpu` has no CUDA; the others are builds for CUDA that ran on a machine without a GPU.'''

def in_order(n): return [int(i) for i in re.findall(r'\d+', minor(n['torch']) + '.' + n['torch'].split('+')[0].split('.')[-1] + '.' + n['python'])]

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--table', action='store_true', help='only write the table from the notes')
    only_table = parser.parse_args().table
    notes = json.loads(NOTES.read_text(encoding='utf-8')) if NOTES.exists() else []
    if not only_table:
        new = {**here(), 'pages': run_pages(), 'tests': run_tests()}
        notes = [n for n in notes if (n['torch'], n['python']) != (new['torch'], new['python'])] + [new]
        notes.sort(key=in_order)
        NOTES.write_text(json.dumps(notes, indent=1) + '\n', encoding='utf-8')
    NOTES.with_suffix('.md').write_text(table(notes), encoding='utf-8')
    if not only_table: sys.exit(bool(new['pages']['failed'] or new['tests']['failed']))

if __name__ == '__main__': main()
