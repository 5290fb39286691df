"Tokenising at scale: the same bytes for any number of workers and after kills; provenance; joins; mistakes."
import gzip, json, os, random, signal, subprocess, sys, time
from collections import Counter
from functools import partial
from pathlib import Path
import numpy as np
import pytest
from conftest import ENV
from llama_nb.cli import main
from llama_nb.core import TemporaryError, UserError, is_temporary
from llama_nb.data import executors, tokenize, units
from llama_nb.data.documents import Document, is_held_out, split_documents, topic_documents, write_jsonl
from llama_nb.data.engine import Job, run_job
from llama_nb.data.join import join_data, join_shards
from llama_nb.data.provenance import BLOCK, provenance, provenance_text, verify_provenance
from llama_nb.data.shards import TokenShards, document_tokens, write_shards
from llama_nb.data.sources import read_documents, text_files
from llama_nb.data.tokenize import tokenise
from llama_nb.data.tokenizer import Tokenizer
from llama_nb.data.units import SIDES, work_units

@pytest.fixture(scope='module')
def tokenizer(tokens): return Tokenizer(tokens/'tokenizer.model')

LIMIT = 3000          # tokens of a shard
WORDS = ['the', 'sheep', 'Wörter', '日本語', 'x'*50, '\n\n', '\t', '1', 'and', '\x00', '🐑']

def some_text(rng, longest=40): return ' '.join(rng.choices(WORDS, k=rng.randint(1, longest)))

def some_doc(rng, name):
    decisions = [[f'rule.{k}', rng.choice((0, 12)), rng.random(), 'limit'] for k in range(rng.randint(0, 4))]
    return Document(some_text(rng), name, rng.choice(('', 'Wiki\tpedia')), f'https://x.org/{rng.random()}',
                    rng.choice(('', 'en')), rng.choice(('', 'MIT')), {'decisions': decisions, 'other': [1]})

def write_folder(folder, seed, n_docs=60):
    "Files of all kinds, some of them empty"
    rng = random.Random(seed)
    for i in range(6):
        ending = ('.jsonl', '.jsonl.gz', '.jsonl')[i % 3]
        docs = [some_doc(rng, f'{i}/{j} "ü"\n') for j in range(rng.choice((0, n_docs//4)) if i else n_docs)]
        write_jsonl(docs, folder/f'{i % 2}'/f'{i:02}{ending}')
    for i in range(8): (folder/f'{i}.txt').write_text(some_text(rng))
    (folder/'empty.txt').write_text('')
    return folder

@pytest.fixture(scope='module')
def texts(tmp_path_factory): return write_folder(tmp_path_factory.mktemp('texts'), 0)

def contents(folder):
    files = sorted(p for p in folder.rglob('*') if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}

def both(out): return {side: contents(out/side) for side in SIDES}

def reference(texts, tokenizer, folder, limit, fraction=.1):
    sides = split_documents(read_documents(texts), fraction)
    for side, docs in zip(SIDES, sides): write_shards(docs, tokenizer, folder/side, limit)
    return both(folder)

def assert_same(found, wanted):
    "All files, but for the provenance"
    for side in SIDES:
        mine, theirs = dict(found[side]), dict(wanted[side])
        more = mine.keys() - theirs.keys()
        assert more == {f'{name}.provenance' for name in theirs if name.endswith('.ds')}
        manifests = [json.loads(files.pop('manifest.json')) for files in (mine, theirs)]
        told = manifests[0].pop('provenance')
        assert manifests[0] == manifests[1] and set(told) == more
        assert {n: data for n, data in mine.items() if n not in more} == theirs

@pytest.mark.parametrize('seed', range(5))
def test_it_writes_what_one_process_writes(tmp_path, tokenizer, seed):
    rng = random.Random(seed)
    texts = write_folder(tmp_path/'in', seed, rng.choice((20, 60)))
    limit, unit = rng.choice((1, 50, 1000, 2**30)), rng.choice((300, 3000, 2**25))
    wanted = reference(texts, tokenizer, tmp_path/'plain', limit)
    made, reading = tokenise(texts, tokenizer, tmp_path/'out', .1, limit, 1, unit)
    assert_same(both(tmp_path/'out'), wanted)
    assert reading.unread == 0
    for shards in made.values():
        shards.verify()
        verify_provenance(shards)

def test_held_out_documents_follow_from_their_ids(texts, tokenizer, tmp_path):
    made, _ = tokenise(texts, tokenizer, tmp_path/'out', .3, workers=1)
    ids = {side: {s.document_of(p) for p in range(0, s.n_tokens, 3)} for side, s in made.items()}
    assert ids['train'] and ids['held_out'] and not ids['train'] & ids['held_out']
    assert all(is_held_out(i, .3) == (side == 'held_out') for side, found in ids.items() for i in found)

# --- killed and resumed --------------------------------------------------------------------------

PROGRAM = '''
import sys, time
from llama_nb.data import tokenize
from llama_nb.data.tokenizer import Tokenizer
if __name__ == '__main__':
    texts, model, out, workers = sys.argv[1:]
    tokenize.tokenise(texts, Tokenizer(model), out, .1, 3000, int(workers), 3000)
'''

def start(folder, texts, tokenizer, out, workers):
    (folder/'program.py').write_text(PROGRAM)
    return subprocess.Popen([sys.executable, folder/'program.py', texts, tokenizer.path, out, str(workers)],
                            env=ENV, start_new_session=True, stderr=subprocess.PIPE, text=True)

@pytest.fixture(scope='module')
def calm(texts, tokenizer, tmp_path_factory):
    "What an undisturbed run in one process leaves"
    folder = tmp_path_factory.mktemp('calm')
    tokenise(texts, tokenizer, folder/'out', .1, LIMIT, 1, 3000)
    return both(folder/'out')

@pytest.mark.parametrize('workers', [1, 2])
def test_killed_at_random_instants_it_ends_with_the_same_bytes(texts, tokenizer, calm, tmp_path, workers):
    out, rng = tmp_path/'out', random.Random(workers)
    def there(): return len([*out.glob('work/parts/*')]) + 100*len([*out.glob('work/packed/*')])
    wanted = 100*rng.randint(1, 6) if workers == 1 else rng.randint(1, 8)
    process = start(tmp_path, texts, tokenizer, out, workers)
    end = time.monotonic() + 100
    while process.poll() is None and there() < wanted and time.monotonic() < end:
        time.sleep(.005)
    time.sleep(rng.random()*.01)
    if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    tokenise(texts, tokenizer, out, .1, LIMIT, 1, 3000)
    assert both(out) == calm
    assert sorted(p.name for p in out.iterdir()) == ['held_out', 'job.json', 'records', 'train']

class Stop(BaseException): pass

@pytest.mark.parametrize('name', ['write_atomic', 'file_digest'])
def test_stopped_at_many_calls_it_ends_with_the_same_bytes(texts, tokenizer, calm, tmp_path, monkeypatch,
                                                           name):
    "The process ends before, or after, the n-th time that something becomes durable, many times"
    real, out, left = getattr(tokenize, name), tmp_path/'out', 0
    for n in range(1000):
        left = n % 9 + 1
        def broken(*args, late=n % 2, **kwargs):
            nonlocal left
            left -= 1
            if left == 0 and not late: raise Stop
            done = real(*args, **kwargs)
            if left == 0: raise Stop
            return done
        for module in (units, tokenize): monkeypatch.setattr(module, name, broken, raising=module is tokenize)
        try:
            tokenise(texts, tokenizer, out, .1, LIMIT, 1, 3000)
            break
        except Stop:
            continue
    assert n >= 1 and both(out) == calm

def test_four_workers_leave_the_same_bytes(texts, tokenizer, calm, tmp_path):
    tokenise(texts, tokenizer, tmp_path/'out', .1, LIMIT, 4, 3000)
    assert both(tmp_path/'out') == calm

def test_parts_go_as_soon_as_their_shards_are_there(texts, tokenizer, tmp_path, monkeypatch):
    real, seen, out = tokenize.pack_shard, [], tmp_path/'out'
    def watched(*args):
        seen.append(sum(p.stat().st_size for p in (out/'work'/'parts').iterdir()))
        return real(*args)
    monkeypatch.setattr(tokenize, 'pack_shard', watched)
    tokenise(texts, tokenizer, out, .1, LIMIT, 1, 3000)
    assert len(seen) > 5 and seen[-1] < seen[0]/3 and seen == sorted(seen, reverse=True)

def test_ctrl_c_is_one_line_and_the_same_command_goes_on(texts, tokenizer, tmp_path):
    command = [sys.executable, '-m', 'llama_nb', 'data', tmp_path/'out', tmp_path/'big',
               '--tokenizer', tokenizer.path, '--workers', '2']
    docs = [*topic_documents()]
    for i in range(4): write_jsonl(docs*6, tmp_path/'big'/f'{i}.jsonl.gz')
    process = subprocess.Popen(command, env=ENV, start_new_session=True, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 100
    while not [*tmp_path.glob('out/work/parts/*')] and time.monotonic() < end:
        time.sleep(.01)
    os.killpg(process.pid, signal.SIGINT)
    begin = time.monotonic()
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said.strip()) == (130, 'llama-nb: interrupted'), said
    assert time.monotonic() - begin < 30
    assert not (tmp_path/'out'/'train').exists() and (tmp_path/'out'/'job.json').exists()

# --- what changed --------------------------------------------------------------------------------

def times(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file() and p.name != 'job.json'}

def test_what_is_done_is_not_done_again_and_a_change_is_refused(tokenizer, tmp_path):
    texts, out = write_folder(tmp_path/'in', 5), tmp_path/'out'
    run = partial(tokenise, texts, tokenizer, out, tokens_per_shard=LIMIT, workers=1, unit_bytes=3000)
    run()
    before = times(out)
    run()
    (texts/'3.txt').touch()                                    # touched, and the same
    run()
    assert times(out) == before
    with pytest.raises(UserError, match=r'another job \(held_out: 0.05 -> 0.2'): run(held_out=.2)
    with pytest.raises(UserError, match='another job'): run(held_out=.2, redo=True)
    (texts/'more.txt').write_text('more')
    with pytest.raises(UserError, match='another job .*files'): run()
    (texts/'more.txt').unlink()
    (texts/'3.txt').write_text('another text')
    with pytest.raises(UserError, match='has changed since the shards'): run()
    assert times(out) == before

def interrupted(monkeypatch, name, at, run):
    "Call `run` until the `at`-th call of something in the module"
    real, left = getattr(tokenize, name), at
    def broken(*args, **kwargs):
        nonlocal left
        left -= 1
        if left < 0: raise Stop
        return real(*args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(tokenize, name, broken)
        with pytest.raises(Stop): run()

@pytest.mark.parametrize('name', ['tokenise_unit', 'pack_shard'])
def test_an_input_that_changes_before_the_end_is_read_again(tokenizer, tmp_path, monkeypatch, name):
    texts, out = write_folder(tmp_path/'in', 5), tmp_path/'out'
    run = partial(tokenise, texts, tokenizer, out, .1, LIMIT, 1, 1000)
    interrupted(monkeypatch, name, 3, run)
    for changed in ('0.txt', '3.txt'): (texts/changed).write_text('another text, and longer')
    run()
    assert_same(both(out), reference(texts, tokenizer, tmp_path/'plain', LIMIT))

def test_a_record_is_read_once(texts, tokenizer, calm, tmp_path, monkeypatch):
    "By a job that goes on in its second round, and by one that has nothing to do"
    out, real, seen = tmp_path/'out', units.read_json, Counter()
    run = partial(tokenise, texts, tokenizer, out, .1, LIMIT, 1, 3000)
    def counted(path, *args):
        seen[path.name] += 1
        return real(path, *args)
    interrupted(monkeypatch, 'pack_shard', 3, run)
    monkeypatch.setattr(units, 'read_json', counted)
    wanted = {p.name: 1 for p in (out/'records').iterdir()}
    for _ in range(2):
        seen.clear()
        run()
        assert seen == wanted and len(wanted) > 3 and both(out) == calm

def test_another_unfinished_job_is_refused_and_can_be_thrown_away(texts, tokenizer, calm, tmp_path,
                                                                  monkeypatch):
    out = tmp_path/'out'
    other, run = (partial(tokenise, texts, tokenizer, out, .1, limit, 1, 3000) for limit in (1000, LIMIT))
    interrupted(monkeypatch, 'pack_shard', 3, other)
    with pytest.raises(UserError, match='another job'): run()
    run(redo=True)
    assert both(out) == calm

def test_a_part_that_was_cut_off_is_done_again(texts, tokenizer, calm, tmp_path, monkeypatch):
    out = tmp_path/'out'
    run = partial(tokenise, texts, tokenizer, out, .1, LIMIT, 1, 3000)
    interrupted(monkeypatch, 'tokenise_unit', 4, run)
    parts = sorted((out/'work'/'parts').iterdir())
    parts[1].write_bytes(parts[1].read_bytes()[:-5])
    parts[2].unlink()
    run()
    assert both(out) == calm

def test_shards_of_another_hand_are_not_touched(texts, tokenizer, tmp_path):
    write_shards([Document('mine', 'mine')], tokenizer, tmp_path/'out'/'train')
    before = contents(tmp_path/'out')
    for redo in (False, True):
        with pytest.raises(UserError, match='train is there already'):
            tokenise(texts, tokenizer, tmp_path/'out', workers=1, redo=redo)
    assert contents(tmp_path/'out') == before

# --- inputs --------------------------------------------------------------------------------------

def test_units_hold_every_byte_once(tmp_path):
    rng = random.Random(1)
    for case in range(30):
        folder = tmp_path/str(case)
        folder.mkdir()
        for i in range(5):
            lines = ['y'*rng.choice((0, 3, 900)) for _ in range(rng.randint(0, 9))]
            (folder/f'{i}.jsonl').write_text('\n'.join(lines) + rng.choice(('', '\n')))
        size = rng.choice((1, 10, 100, 1000))
        units = work_units(text_files(folder), size)
        for i in range(5):
            whole = (folder/f'{i}.jsonl').read_bytes()
            pieces = [p for unit in units for p in unit if p.name == f'{i}.jsonl']
            assert b''.join(whole[p.start:p.stop] for p in pieces) == whole
            assert all(p.start == 0 or whole[p.start - 1:p.start] == b'\n' for p in pieces)
        assert all(len(unit) == 1 or sum(p.stop - p.start for p in unit) <= size for unit in units)

def test_bad_records_are_counted_and_nothing_else_is_lost(tokenizer, tmp_path, capsys):
    good = [json.dumps({'text': f'text number {i}', 'id': f'{i}'}) for i in range(40)]
    bad = ['{"text": ', '[]', '{"id": "x"}', '{"text": "\\ud800"}']
    (tmp_path/'in').mkdir()
    (tmp_path/'in'/'a.jsonl').write_text('\n'.join([*good[:20], *bad, *good[20:]]))
    (tmp_path/'in'/'b.txt').write_bytes(b'\xff\xfe')
    broken = gzip.compress('\n'.join(good[:3]).encode()*1000)
    (tmp_path/'in'/'c.jsonl.gz').write_bytes(broken[:-20])
    args = ['data', str(tmp_path/'out'), str(tmp_path/'in'), '--tokenizer', str(tokenizer.path),
            '--workers', '1']
    assert main(args) == 2 and 'a.jsonl, line 21, is not JSON' in capsys.readouterr().err
    assert not (tmp_path/'out').exists()                    # nothing was done yet
    args.append('--skip-bad')
    assert main(args) == 0
    said = capsys.readouterr()
    assert 'documents in 3 files' in said.out and '1 x was not read to its end' in said.out
    assert '2 x has no "text"' not in said.out and 'a.jsonl, line 21, is not JSON' in said.err
    assert 'b.txt is not UTF-8' in said.err and 'c.jsonl.gz was not read to its end' in said.err
    made = [TokenShards(tmp_path/'out'/side) for side in SIDES]
    ids = {s.document_of(p) for s in made for p in range(0, s.n_tokens, 2)}
    assert {str(i) for i in range(40)} <= ids
    assert main(args) == 0                                  # once more: nothing to do, and the same account
    assert capsys.readouterr() == said

@pytest.fixture
def cleaned(tmp_path):
    for i in range(3):
        write_jsonl([Document(f'text {i} {j}', f'{i}/{j}') for j in range(30)], tmp_path/f'{i}.jsonl')
    run_job(Job(read_documents), {f'{i}': str(tmp_path/f'{i}.jsonl') for i in range(3)}, tmp_path/'clean')
    return tmp_path/'clean'

def test_of_a_cleaned_folder_the_documents_are_read_and_not_its_report(cleaned, tokenizer, tmp_path):
    assert (cleaned/'report.md').exists() and len(text_files(cleaned)) == 3
    made, _ = tokenise(cleaned, tokenizer, tmp_path/'out', .2, workers=1)
    assert sum(s.n_documents for s in made.values()) == 90
    assert provenance(made['train'], 0).file == 'documents/0.jsonl.zst'

def test_a_cleaned_folder_that_is_not_complete_is_refused(cleaned):
    file = cleaned/'documents'/'1.jsonl.zst'
    before = file.read_bytes()
    file.write_bytes(before[:-3])
    with pytest.raises(UserError, match='1.jsonl.zst has .* bytes instead of'): text_files(cleaned)
    file.unlink()
    with pytest.raises(UserError, match='1.jsonl.zst has 0 bytes'): text_files(cleaned)
    file.write_bytes(before)
    (cleaned/'manifest.json').unlink()
    with pytest.raises(UserError, match='is not finished'): text_files(cleaned)

@pytest.mark.parametrize('settings, words', [
    ({'held_out': float('nan')}, 'between 0 and 1'), ({'held_out': 1}, 'between 0 and 1'),
    ({'tokens_per_shard': 0}, 'at least 1'), ({'held_out': 1e-9}, 'would be held out'),
    ({'documents': 'nowhere'}, 'no file or folder'), ({'documents': 'nothing'}, 'of 1 documents'),
    ({'documents': []}, 'no files')])
def test_mistakes_leave_nothing(texts, tokenizer, tmp_path, monkeypatch, settings, words):
    monkeypatch.chdir(tmp_path)
    Path('nothing').mkdir()
    Path('nothing/a.txt').write_text('')
    with pytest.raises(UserError, match=words) as e:
        tokenise(**{'documents': texts, 'tokenizer': tokenizer, 'out': 'out', 'workers': 1, **settings})
    assert '\n' not in str(e.value) and not [*tmp_path.glob('out/*')]

def test_a_full_disk_is_temporary_and_the_same_command_goes_on(texts, tokenizer, calm, tmp_path):
    program = PROGRAM.replace('    texts,', '    import resource, signal\n'
                              '    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
                              '    resource.setrlimit(resource.RLIMIT_FSIZE, (3500, 3500))\n    texts,')
    (tmp_path/'program.py').write_text(program)
    done = subprocess.run([sys.executable, tmp_path/'program.py', texts, tokenizer.path, tmp_path/'out', '1'],
                          env=ENV, capture_output=True, text=True, timeout=100)
    assert 'TemporaryError: no room for' in done.stderr and not (tmp_path/'out'/'train').exists(), done.stderr
    tokenise(texts, tokenizer, tmp_path/'out', .1, LIMIT, 1, 3000)
    assert both(tmp_path/'out') == calm

def test_two_programs_at_once_are_refused(texts, tokenizer, calm, tmp_path):
    (tmp_path/'out').mkdir()
    with tokenize._alone(tmp_path/'out'), pytest.raises(TemporaryError, match='another program is at work'):
        tokenise(texts, tokenizer, tmp_path/'out', workers=1)
    tokenise(texts, tokenizer, tmp_path/'out', .1, LIMIT, 1, 3000)
    assert both(tmp_path/'out') == calm

def test_a_tokenizer_that_changes_on_the_way_is_seen(texts, tokenizer, tmp_path):
    model = tmp_path/'tokenizer.model'
    model.write_bytes(tokenizer.path.read_bytes())
    mine = Tokenizer(model)
    model.write_bytes(b'x' + tokenizer.path.read_bytes())
    with pytest.raises(UserError): tokenise(texts, mine, tmp_path/'out', workers=1)

# --- provenance ----------------------------------------------------------------------------------

@pytest.mark.parametrize('limit', [1, 300, 2**30])
def test_every_token_leads_to_its_document(texts, tokenizer, tmp_path, limit):
    docs = {d.id: d for d in read_documents(texts)}
    made, _ = tokenise(texts, tokenizer, tmp_path/'out', .1, limit, 1, 2000)
    shards, n = made['held_out' if limit < 300 else 'train'], 0
    while n < min(shards.n_tokens, 4000):
        found = provenance(shards, n)
        doc = docs[found.document]
        wanted = doc.source, doc.url, doc.licence, doc.language, doc.metadata.get('decisions', [])
        assert tuple(found[4:]) == wanted and (texts/found.file).is_file() and found.start == n
        assert np.array_equal(shards.read(found.start, found.stop), document_tokens(doc, tokenizer))
        assert all(provenance(shards, p) == found for p in range(n, found.stop, 1 if limit == 300 else 5))
        n = found.stop
    for wrong in (-1, shards.n_tokens):
        with pytest.raises(IndexError): provenance(shards, wrong)

def test_many_documents_go_into_several_blocks(tokenizer, tmp_path):
    n = 3*BLOCK
    write_jsonl((Document('x', f'{i}', url=f'u{i}') for i in range(n)), tmp_path/'in.jsonl')
    made, _ = tokenise(tmp_path/'in.jsonl', tokenizer, tmp_path/'out', .01, workers=1)
    shards = made['train']
    assert shards.n_documents > 2*BLOCK
    for p in range(0, shards.n_tokens, 7):
        found = provenance(shards, p)
        assert found.url == f'u{found.document}'
    verify_provenance(shards)

@pytest.mark.parametrize('decisions', [None, 'text', {'a': 1}, [[]], [['rule']], [1, 'x'], [['a']*5]])
def test_decisions_of_a_user_may_be_anything(tokenizer, tmp_path, decisions, capsys):
    docs = [Document(f'text {i}', f'{i}', metadata={'decisions': decisions}) for i in range(40)]
    write_jsonl(docs, tmp_path/'in.jsonl')
    made, _ = tokenise(tmp_path/'in.jsonl', tokenizer, tmp_path/'out', .1, workers=1)
    assert '0' in provenance_text(provenance(made['train'], 0))

def test_names_of_documents_write_nothing_into_a_terminal(tokenizer, tmp_path):
    names = 'clear\x1b[2J', 'over\rwrite', 'two\nlines', 'csi\x9b31m'
    docs = [Document('a text', n, url=n, metadata={'decisions': [[n, 0, n, '']]}) for n in names]
    write_jsonl(docs, tmp_path/'in.jsonl')
    made, _ = tokenise(tmp_path/'in.jsonl', tokenizer, tmp_path/'out', .25, workers=1)
    shards = made['train']
    for place in range(shards.n_tokens):
        said = provenance_text(provenance(shards, place))
        assert len(said.split('\n')) == 2 and said.replace('\n', '').isprintable(), said

# --- joined --------------------------------------------------------------------------------------

@pytest.fixture
def machines(tmp_path, tokenizer):
    "Two folders of documents, tokenised apart and, with the same order, together"
    parts = []
    for name in 'ab':
        write_folder(tmp_path/'in'/name, name)
        parts.append(tmp_path/f'out-{name}')
        tokenise(tmp_path/'in'/name, tokenizer, parts[-1], tokens_per_shard=2000, workers=1)
    files = [file for name in 'ab' for file in text_files(tmp_path/'in'/name)]
    whole, _ = tokenise(files, tokenizer, tmp_path/'whole', tokens_per_shard=10**9, workers=1)
    return parts, whole

def test_joined_shards_are_one_stream(machines, tmp_path):
    parts, whole = machines
    for folders, out in ((parts, tmp_path/'far'/'away'), ([tmp_path/'far'/'away'], tmp_path/'again')):
        made = join_data(folders, out)
        for side, joined in made.items():
            n = whole[side].n_tokens
            assert joined.n_tokens == n and np.array_equal(joined.read(0, n), whole[side].read(0, n))
            joined.verify()
            verify_provenance(joined)
            for p in range(0, n, 37):
                a, b = provenance(joined, p), provenance(whole[side], p)
                assert (a[:3], a[4:]) == (b[:3], b[4:])
            assert sorted(p.name for p in joined.folder.iterdir()) == ['manifest.json', 'tokenizer.model']
    moved = tmp_path/'moved'
    moved.mkdir()
    for p in (*parts, tmp_path/'far'): p.rename(moved/p.name)
    assert TokenShards(moved/'far'/'away'/'train').read(0, 10).tolist() == whole['train'].read(0, 10).tolist()

def test_what_does_not_belong_together_is_refused_in_one_line(machines, tokenizer, tmp_path, capsys):
    from llama_nb.data.tokenizer import train_tokenizer
    (a, b), _ = machines
    other = train_tokenizer((d.text for d in topic_documents()), tmp_path/'other.model', 500)
    tokenise(tmp_path/'in'/'b', other, tmp_path/'other', workers=1)
    tokenise(tmp_path/'in'/'b', tokenizer, tmp_path/'more', .2, workers=1)
    cases = {'different tokenizers': (a, tmp_path/'other'), 'the same tokens': (a, b, a),
             'different shares of the documents (0.05, 0.2)': (a, tmp_path/'more'),
             'no token shards': (a, tmp_path)}
    for words, folders in cases.items():
        assert main(['data', 'join', str(tmp_path/'x'), *map(str, folders)]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count('\n') == 1, said
        assert not (tmp_path/'x').exists()
    assert main(['data', 'join', str(tmp_path/'ab'), str(a), str(b)]) == 0
    for folders in ((tmp_path/'ab', b), (b, tmp_path/'ab')): # a joined folder and one of its parts
        with pytest.raises(UserError, match='both hold .*out-b/train/00000.ds'):
            join_data(folders, tmp_path/'x')
        assert not (tmp_path/'x').exists()
    with pytest.raises(UserError, match='nothing to join'): join_shards([], tmp_path/'x')
    (b/'train'/'00000.ds').write_bytes(b'')
    with pytest.raises(UserError, match='00000.ds has 0 bytes'): join_data([a, b], tmp_path/'x')
    assert main(['data', 'join', str(tmp_path/'a'), str(a)]) == 0
    assert main(['data', 'join', str(tmp_path/'a'), str(a)]) == 2
    assert 'is there already' in capsys.readouterr().err

def test_a_joined_folder_notes_the_fraction_that_all_parts_say(machines, tmp_path):
    (a, b), _ = machines
    join_data([a, b], tmp_path/'known')
    assert json.loads((tmp_path/'known'/'joined.json').read_text()) == {'held_out': .05}
    (b/'job.json').unlink()
    for i, folders in enumerate(([a, b], [b, a], [b])):
        join_data(folders, tmp_path/f'{i}')
        assert not (tmp_path/f'{i}'/'joined.json').exists()

def test_provenance_that_was_never_written_and_that_is_missing(machines, tokens):
    (a, _), _ = machines
    shards, without = TokenShards(a/'train'), TokenShards(tokens/'train')
    with pytest.raises(UserError, match='written without provenance'): provenance(without, 0)
    (a/'train'/'00000.ds.provenance').unlink()
    with pytest.raises(UserError, match='ds.provenance is missing; copy it again'): provenance(shards, 0)

# --- read by others ------------------------------------------------------------------------------

def test_datatrove_reads_them(texts, tokenizer, tmp_path):
    dataset = pytest.importorskip('datatrove.utils.dataset')
    made, _ = tokenise(texts, tokenizer, tmp_path/'out', .1, LIMIT, 1, 3000)
    shards, found, start = made['train'], [], 0
    theirs = dataset.DatatroveFolderDataset(str(shards.folder), seq_len=99, token_size=2)
    for shard in shards.manifest['shards']:
        places = range(start, start + shard['tokens'] - 99, 100)
        found += [shards.read(place, place + 100).tolist() for place in places]
        start += shard['tokens']
    assert [theirs[i]['input_ids'].tolist() for i in range(len(theirs))] == found

def test_data_show_prints_where_a_sequence_comes_from(texts, tokenizer, run_file, tokens, tmp_path, capsys):
    tokenise(texts, tokenizer, tmp_path/'out', .1, workers=1)
    path = run_file(4)
    for folder, wanted in ((tmp_path/'out', None), (tokens, 'written without provenance')):
        path.write_text(path.read_text().replace(f'"{tokens}/', f'"{folder}/'))
        if wanted: path = run_file(4, name='old')
        assert main(['data', 'show', str(path), '--batch', '1', '--sequence', '2']) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith('--- batch 1, sequence 2: epoch 0, tokens ')
        if wanted:
            assert wanted in lines[1]
            continue
        told = [line for line in lines if ': tokens ' in line and ', from ' in line]
        assert told and 'https://x.org/' in told[0] and any('rule.0 0.' in line for line in lines)

def test_data_uses_all_cores_unless_told(tmp_path, texts, tokenizer, capsys, monkeypatch):
    args, asked = [str(texts), '--tokenizer', str(tokenizer.path)], []
    monkeypatch.setattr(tokenize, 'cores', lambda: asked.append('cores') or 1)
    assert main(['data', str(tmp_path/'all'), *args]) == 0 and asked == ['cores']
    said = capsys.readouterr().out
    assert main(['data', str(tmp_path/'one'), *args, '--workers', '1']) == 0 and asked == ['cores']
    assert capsys.readouterr().out == said.replace('/all/', '/one/')
    assert both(tmp_path/'all') == both(tmp_path/'one')
    assert main(['data', str(tmp_path/'no'), *args, '--workers=-1']) == 2 and not (tmp_path/'no').exists()

def test_a_lost_worker_is_temporary(texts, tokenizer, tmp_path, monkeypatch):
    def dies(*args, **kwargs):
        raise TemporaryError('a worker was killed')
        yield
    monkeypatch.setattr(executors, 'in_processes', dies)
    with pytest.raises(TemporaryError) as e: tokenise(texts, tokenizer, tmp_path/'out', .1, LIMIT, 2, 3000)
    assert is_temporary(e.value)
