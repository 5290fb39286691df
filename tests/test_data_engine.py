"Jobs over many files: killed, interrupted, no room, a worker lost, another job's folder, addresses."
import functools, json, os, random, re, signal, subprocess, sys, threading, time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from llama_nb.core import TemporaryError, UserError
from llama_nb.data.documents import Document, write_jsonl
from llama_nb.data.engine import Job, describe, fingerprint, run_job, run_share, summary
from llama_nb.data.formats import read_file
from llama_nb.data.sources import read_documents
from llama_nb.data.stage import Decision, Stage

MODULE = '''
import os, resource, signal, sys, time
from dataclasses import replace
from functools import partial
from llama_nb.core import UserError
from llama_nb.data.sources import read_documents
from llama_nb.data.engine import Job, run_job
from llama_nb.data.stage import Decision

def shout(doc, slow=0.):
    time.sleep(slow)
    if doc.id == 'deadly': os.kill(os.getpid(), signal.SIGKILL)
    return replace(doc, text=doc.text.upper()), [Decision('shout', 0)]

def job(slow=0.): return Job(read_documents, (('shout', partial(shout, slow=slow)),))

if __name__ == '__main__':
    source, out, workers, slow, room = sys.argv[1:6]
    names = sorted(os.listdir(source))
    if int(room): resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), int(room)))
    try:
        run_job(job(float(slow)), {n: f'{source}/{n}' for n in names}, out, workers=int(workers))
    except (UserError, OSError) as e:
        print(type(e).__name__, e, file=sys.stderr)
        sys.exit(75)
    except KeyboardInterrupt:
        sys.exit(130)
'''
N_FILES, N_DOCS = 16, 40

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('engine')
    (folder/'shouting.py').write_text(MODULE)
    for i in range(N_FILES):
        docs = (Document(f'text {i} {j} ' * 20, f'{i}/{j}') for j in range(N_DOCS))
        write_jsonl(docs, folder/'in'/f'{i:02}.jsonl')
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))

def inputs(place): return {p.name: str(p) for p in sorted((place/'in').iterdir())}

def start(place, out, workers, slow=.002, room=0):
    "The job as a program; slow: seconds per document; room: bytes that a file may have, if not 0"
    path = os.pathsep.join([str(place), str(Path(__file__).resolve().parent.parent)])
    command = [sys.executable, place/'shouting.py', place/'in', place/out, workers, slow, room]
    return subprocess.Popen(list(map(str, command)), start_new_session=True, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, 'PYTHONPATH': path})

def children(process): # ids
    found = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    return list(map(int, found))

def running(pid):
    stat = Path(f'/proc/{pid}/stat')
    return stat.exists() and stat.read_text().split()[2] != 'Z'

def until(true, seconds=100):
    "Wait until `true()`; whether it was, in the end"
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(.005)
    return bool(true())

linux = pytest.mark.skipif(not Path('/proc/self').exists(), reason='asks Linux for its processes')

def contents(folder): return {p.name: p.read_bytes() for p in sorted(folder.rglob('[!.]*.zst'))}

@pytest.fixture(scope='module')
def calm(place):
    "What an undisturbed run leaves"
    process = start(place, 'calm', 1)
    assert process.wait(120) == 0, process.stderr.read()
    found = contents(place/'calm')
    assert len(found) == N_FILES
    return found, (place/'calm'/'manifest.json').read_bytes()

@pytest.mark.parametrize('workers', [1, 2, 4])
def test_killed_at_random_instants_it_ends_with_the_same_bytes(place, calm, workers):
    out, rng = place/f'killed-{workers}', random.Random(workers)
    for wanted in sorted(rng.sample(range(1, N_FILES), 2 if workers == 2 else 1)):
        process, end = start(place, out.name, workers), time.monotonic() + 100
        while process.poll() is None and len([*out.rglob('*.zst*')]) < wanted and time.monotonic() < end:
            time.sleep(.002)
        time.sleep(rng.random()*.05)
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (out/'manifest.json').exists()                # it was killed before its end
    process = start(place, out.name, 4 if workers == 1 else 1)
    assert process.wait(120) == 0, process.stderr.read()
    assert (contents(out), (out/'manifest.json').read_bytes()) == calm
    assert [*out.rglob('.*.tmp')] == []

def killed_so_often(place, calm, workers, times, slow=.01):
    "Kill the job at random instants; each folder that is finished is as `calm`. The number of folders"
    rng, kills, folder = random.Random(workers), 0, 0
    while True:
        out = place/f'tortured-{workers}-{folder}'
        process = start(place, out.name, workers, slow)
        try:
            code = process.wait(rng.uniform(.3, 3) if kills < times else 300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert code == 0, process.stderr.read()
        assert (contents(out), (out/'manifest.json').read_bytes()) == calm and not [*out.rglob('.*.tmp')]
        folder += 1
        if kills == times: return folder

def test_a_worker_that_is_killed_ends_the_run_with_one_line(place, tmp_path):
    import shouting
    for i in range(3): write_jsonl([Document('text', f'{i}')], tmp_path/'in'/f'{i}.jsonl')
    write_jsonl([Document('text', 'deadly')], tmp_path/'in'/'9.jsonl')
    files = {p.name: str(p) for p in (tmp_path/'in').iterdir()}
    with pytest.raises(TemporaryError, match='a worker was killed'):
        run_job(shouting.job(), files, tmp_path/'out', workers=2)
    write_jsonl([Document('text', 'mended')], tmp_path/'in'/'9.jsonl')
    run_job(shouting.job(), files, tmp_path/'out', workers=2)
    assert sorted(d.text for d in read_documents(tmp_path/'out'/'documents')) == ['TEXT']*4

@linux
def test_no_worker_outlives_the_program(place):
    process = start(place, 'orphans', 2, .02)
    assert until(lambda: [*(place/'orphans').rglob('*.zst*')])
    team = children(process)
    process.kill()                                           # it alone, not its group
    process.wait()
    assert len(team) >= 2 and until(lambda: not any(map(running, team)), 20)

@linux
@pytest.mark.parametrize('workers', [1, 2])
@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_ends_it_with_one_line_and_nothing_half(place, calm, number, code, workers):
    out = f'signal-{number}-{workers}'
    process = start(place, out, workers, .015)
    assert until(lambda: [*(place/out).rglob('.*.zst.*.tmp')])
    team = children(process)
    send = os.killpg if number == signal.SIGINT else os.kill        # a terminal asks all of them
    send(process.pid, number)
    asked = time.monotonic()
    assert process.wait(30) == code and time.monotonic() - asked < 20
    said = process.stderr.read()
    assert said.count('\n') == (number == signal.SIGTERM) and ('SIGTERM' in said) == (code == 75), said
    assert until(lambda: not any(map(running, team)), 20) and [*(place/out).rglob('*.tmp')] == []
    process = start(place, out, 2, .015)
    assert process.wait(120) == 0, process.stderr.read()
    assert contents(place/out) == calm[0]

@linux
@pytest.mark.parametrize('workers', [1, 2])
def test_without_room_it_says_so_and_goes_on_when_there_is_some(place, calm, workers):
    "A limit on the size of a file: the first three fit, being smaller"
    sizes = sorted(len(data) for data in calm[0].values())
    out, room = f'full-{workers}', sizes[-1] - 1
    process = start(place, out, workers, 0, room)
    assert process.wait(60) == 75
    said = process.stderr.read()
    assert said.startswith('TemporaryError cannot write to') and 'make room' in said and said.count('\n') == 1
    assert [*(place/out).rglob('*.tmp')] == [] and not (place/out/'manifest.json').exists()
    process = start(place, out, workers, 0)
    assert process.wait(60) == 0, process.stderr.read()
    assert contents(place/out) == calm[0]

def test_another_jobs_folder_is_refused_and_can_be_redone(place, tmp_path):
    import shouting
    run_job(shouting.job(), inputs(place), tmp_path)
    with pytest.raises(UserError, match=r'another job \(.*slow: 0.0 -> 0.001'):
        run_job(shouting.job(.001), inputs(place), tmp_path)
    fewer = dict(list(inputs(place).items())[:3])
    with pytest.raises(UserError, match='another job .*files'): run_job(shouting.job(), fewer, tmp_path)
    run_job(shouting.job(), fewer, tmp_path, redo=True)
    assert len(contents(tmp_path)) == 3

def test_what_cannot_be_read_is_counted_and_nothing_else_is_lost(tmp_path):
    lines = ['{"text": "one", "id": "1"}', '{"text": ', '{"text": "two", "id": "2"}', '[]', '{"id": "x"}']
    (tmp_path/'a.jsonl').write_text('\n'.join(lines))
    total = run_job(Job(read_documents), {'a.jsonl': str(tmp_path/'a.jsonl')}, tmp_path/'out')
    assert total['read'].unread == 3 and len(total['read'].problems) == 3
    assert [d.id for d in read_documents(tmp_path/'out'/'documents')] == ['1', '2']
    assert 'line 2, is not JSON' in (tmp_path/'out'/'report.md').read_text()

@pytest.mark.parametrize('own', ['we keep this', {'a': 1}, None, 3, ['kept']])
def test_a_users_own_field_of_the_name_decisions(own):
    stage = Stage('keep', lambda doc: (doc, [Decision('keep.all', 0, 1, 2)]))
    (doc,) = stage([Document('a text', 'a', metadata={'decisions': own, 'other': 5})])
    earlier = own if isinstance(own, list) else []
    assert doc.metadata == {'decisions': [*earlier, ['keep.all', 0, 1, 2]], 'other': 5}

def test_the_reader_of_a_source_fits(tmp_path):
    from llama_nb.data.mediawiki import read_wikipedia, write_export
    from llama_nb.data.wikipedia import clean_wikipedia
    pages = [Document("'''Bold''' and [[link|linked]] words.", 'One'),
             Document('#REDIRECT [[One]]', 'Two', metadata={'redirect': 'One'})]
    (tmp_path/'dump.xml').write_bytes(b''.join(write_export(pages)))
    job = Job(read_wikipedia, (('wikipedia', clean_wikipedia),))
    total = run_job(job, {'dump.xml': str(tmp_path/'dump.xml')}, tmp_path/'out')
    assert [d.text.strip() for d in read_documents(tmp_path/'out'/'documents')] == ['Bold and linked words.']
    assert (total['wikipedia'].documents, total['wikipedia'].kept) == (2, 1)

def test_an_output_that_was_cut_off_is_done_again(place, tmp_path):
    run_job(Job(read_documents), inputs(place), tmp_path)
    before, victim = contents(tmp_path), tmp_path/'documents'/'03.jsonl.jsonl.zst'
    victim.write_bytes(victim.read_bytes()[:-10])
    run_job(Job(read_documents), inputs(place), tmp_path)
    assert contents(tmp_path) == before

def test_shares_of_ranks_are_the_whole(place, calm, tmp_path):
    "As an executor of datatrove calls them; the digest of the job is that of `run_job`"
    import shouting
    step = run_share(shouting.job(.002), inputs(place), tmp_path)
    for rank in reversed(range(3)): assert list(step(None, rank, 3)) == []
    written = {p: p.stat().st_mtime_ns for p in (tmp_path/'documents').iterdir()}
    run_job(shouting.job(.002), inputs(place), tmp_path)
    assert {p: p.stat().st_mtime_ns for p in written} == written and contents(tmp_path) == calm[0]

def test_datatroves_executor_runs_it(place, calm, tmp_path):
    local = pytest.importorskip('datatrove.executor.local')
    import shouting
    step = run_share(shouting.job(.002), inputs(place), tmp_path/'out')
    local.LocalPipelineExecutor([step], tasks=3, workers=1, logging_dir=str(tmp_path/'logs')).run()
    assert contents(tmp_path/'out') == calm[0]

class Server(SimpleHTTPRequestHandler):
    "Files of a folder with or without an ETag; `broken` answers end early"
    tag, broken = True, False
    def log_message(self, *args): pass
    def send_header(self, name, value):
        if name != 'Last-Modified': super().send_header(name, value)
    def end_headers(self):
        path = Path(self.translate_path(self.path))
        if self.tag and path.is_file(): super().send_header('ETag', f'"{path.stat().st_mtime_ns}"')
        super().end_headers()
    def copyfile(self, source, output):
        output.write(source.read()[:-20 if self.broken else None])

@pytest.fixture
def served(tmp_path):
    "(folder, its address)"
    pytest.importorskip('aiohttp', reason='fsspec reads http addresses with aiohttp')
    (tmp_path/'web').mkdir()
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Server, directory=tmp_path/'web'))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path/'web', f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()
    Server.tag, Server.broken = True, False

def read_address(path, report): return read_file(path, path.rpartition('/')[2], report)

def test_an_address_is_read_once_and_again_when_its_etag_changes(served, tmp_path):
    web, address = served
    write_jsonl([Document('one', '1')], web/'a.jsonl.gz')
    job, inputs = Job(read_address), {'a': f'{address}/a.jsonl.gz'}
    run_job(job, inputs, tmp_path/'out')
    record = (tmp_path/'out'/'records'/'a.json').read_bytes()
    run_job(job, inputs, tmp_path/'out')
    assert (tmp_path/'out'/'records'/'a.json').read_bytes() == record
    assert json.loads(record)['input'].keys() == {'bytes', 'ETag'}
    write_jsonl([Document('two', '1')], web/'a.jsonl.gz')
    run_job(job, inputs, tmp_path/'out', workers=1)
    assert [d.text for d in read_documents(tmp_path/'out'/'documents')] == ['two']

def test_an_address_that_nobody_could_tell_from_another_is_refused(served, tmp_path):
    web, address = served
    write_jsonl([Document('one', '1')], web/'a.jsonl')
    Server.tag = False
    with pytest.raises(UserError, match='has neither checksum'):
        run_job(Job(read_address), {'a': f'{address}/a.jsonl'}, tmp_path/'out')
    with pytest.raises(UserError, match='there is no file'): fingerprint(f'{address}/b.jsonl')
    with pytest.raises(TemporaryError, match='does not answer'): fingerprint('http://127.0.0.1:9/a.jsonl')
    assert not (tmp_path/'out').exists()

def test_a_connection_that_breaks_is_no_damaged_file(served, tmp_path):
    web, address = served
    rng = random.Random(0)
    write_jsonl((Document(rng.randbytes(300).hex(), str(i)) for i in range(99)), web/'a.jsonl.gz')
    job, inputs = Job(read_address), {'a': f'{address}/a.jsonl.gz'}
    Server.broken = True
    with pytest.raises(TemporaryError): run_job(job, inputs, tmp_path/'out')
    Server.broken = False
    assert run_job(job, inputs, tmp_path/'out')['read'].unread == 0
    assert len([*read_documents(tmp_path/'out'/'documents')]) == 99

@pytest.mark.parametrize('address', ['s4://bucket/name', 'memory://nothing/here'])
def test_an_address_that_cannot_be_asked_is_one_line(address):
    with pytest.raises(UserError): fingerprint(address)

def test_a_disk_that_fails_is_no_damaged_file(tmp_path):
    "An error with a number comes from the system; one without from the decompressor"
    from llama_nb.data.documents import Decompressed
    class Failing:
        def __init__(self, error): self.error = error
        def read1(self, n): raise self.error
        def tell(self): return 0
    for error, kind in (OSError(5, 'Input/output error'), OSError), (OSError('Not a gzip'), UserError):
        stream = Decompressed(Failing(error), Failing(error), 'a.gz')
        with pytest.raises(kind): stream.readinto(bytearray(9))

def changing(path, report):
    for doc in read_documents(path, report):
        write_jsonl([Document('other', '1')], path)
        yield doc

def test_an_input_that_changes_under_the_reader_is_seen(tmp_path):
    write_jsonl([Document('text', '1')], tmp_path/'a.jsonl')
    inputs = {'a': str(tmp_path/'a.jsonl')}
    with pytest.raises(TemporaryError, match='has changed while it was read'):
        run_job(Job(changing), inputs, tmp_path/'out')
    assert not (tmp_path/'out'/'records'/'a').exists()

def test_the_bar_counts_bytes_and_the_summary_comes_at_the_end(place, tmp_path, capsys):
    import shouting
    some = dict(list(inputs(place).items())[:3])
    total = run_job(shouting.job(), some, tmp_path, progress=True)
    said = capsys.readouterr()
    assert said.out == summary(total) + '\n'
    assert re.search(r'^shout +120 +', said.out, re.M)
    assert '3 of 3 files' in said.err and 'B/s' in said.err

def test_the_records_hold_digests(place, calm):
    record = json.loads((place/'calm'/'records'/'00.jsonl.json').read_text())
    assert len(record['input']['sha256']) == len(record['output']['sha256']) == len(record['job']) == 64
    assert record['tallies']['shout']['documents'] == record['output']['documents'] == N_DOCS

def test_code_of_a_module_that_a_cleaner_uses_makes_another_job(tmp_path, monkeypatch):
    "Of the same package only: what else is installed is for the version of the package to say"
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path/'cleaners_of_a_test'
    package.mkdir()
    sources = {'__init__': '', 'used': 'def strip(text): return text.strip()\n', 'unused': 'x = 1\n',
               'clean': 'import os\nfrom .used import strip\ndef clean(doc): return strip(doc)\n'}
    for name, text in sources.items(): (package/f'{name}.py').write_text(text)
    clean = __import__('cleaners_of_a_test.clean', fromlist=['clean']).clean
    first = describe(clean)
    assert first['function'] == 'cleaners_of_a_test.clean.clean'
    (package/'unused.py').write_text('x = 2\n')
    assert describe(clean) == first
    (package/'used.py').write_text('def strip(text): return text.lower()\n')
    assert describe(clean)['code'] != first['code']

def test_arxiv_depends_on_the_expansion_of_macros(monkeypatch):
    from llama_nb.data import engine, latex
    from llama_nb.data.arxiv import clean_arxiv
    read = []
    monkeypatch.setattr(engine, 'file_digest', lambda path: read.append(str(path)) or 'x')
    describe(clean_arxiv)
    assert latex.__file__ in read
