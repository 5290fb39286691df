"Jobs over many files: killed, a worker lost, another job's folder; the page shows the rest."
import json, os, random, signal, subprocess, sys, time
from pathlib import Path
import pytest
from llama_nb.core import TemporaryError, UserError
from llama_nb.data.documents import Document, read_documents, write_jsonl
from llama_nb.data.engine import Job, run_job, run_share

MODULE = '''
import os, signal, sys, time
from dataclasses import replace
from functools import partial
from llama_nb.data.documents import read_documents
from llama_nb.data.engine import Job, run_job
from llama_nb.data.stage import Decision

def shout(doc, slow=0.):
    time.sleep(slow)
    if doc.id == 'deadly': os.kill(os.getpid(), signal.SIGKILL)
    return replace(doc, text=doc.text.upper()), [Decision('shout', 0)]

def job(slow=0.): return Job(read_documents, (('shout', partial(shout, slow=slow)),))

if __name__ == '__main__':
    source, out, workers = sys.argv[1:4]
    names = sorted(os.listdir(source))
    run_job(job(.002), {n: f'{source}/{n}' for n in names}, out, workers=int(workers))
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

def start(place, out, workers):
    path = os.pathsep.join([str(place), str(Path(__file__).resolve().parent.parent)])
    return subprocess.Popen([sys.executable, place/'shouting.py', place/'in', place/out, str(workers)],
                            start_new_session=True, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, 'PYTHONPATH': path})

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

@pytest.mark.skipif(not Path('/proc/self').exists(), reason='asks Linux for its processes')
def test_no_worker_outlives_the_program(place):
    process, end = start(place, 'orphans', 2), time.monotonic() + 100
    while len([*(place/'orphans').rglob('*.zst')]) < 1 and time.monotonic() < end:
        time.sleep(.01)
    children = [int(p) for p in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]
    process.kill()                                           # it alone, not its group
    process.wait()
    def running(pid):
        stat = Path(f'/proc/{pid}/stat')
        return stat.exists() and stat.read_text().split()[2] != 'Z'
    end = time.monotonic() + 20
    while any(map(running, children)) and time.monotonic() < end:
        time.sleep(.05)
    assert len(children) >= 2 and not any(map(running, children))

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

def test_the_reader_of_a_source_fits(tmp_path):
    from llama_nb.data.wikipedia import clean_wikipedia, read_wikipedia, write_export
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

def test_the_records_hold_digests(place, calm):
    record = json.loads((place/'calm'/'records'/'00.jsonl.json').read_text())
    assert len(record['input']['sha256']) == len(record['output']['sha256']) == len(record['job']) == 64
    assert record['tallies']['shout']['documents'] == record['output']['documents'] == N_DOCS
