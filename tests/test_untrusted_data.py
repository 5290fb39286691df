"The files of a data job, half written or of a stranger: made again, or refused in one line."
import json, os, random, shutil
from pathlib import Path
import pytest
from hostile import DAMAGES, JSON, lies, outcome, refused, write
from llama_nb.data import corpus, pipeline, tokenize
from llama_nb.data.corpus import clean_source
from llama_nb.data.documents import Document, write_jsonl
from llama_nb.data.fetch import Account
from llama_nb.data.ngram import PerplexityRules
from llama_nb.data.pipeline import Models
from llama_nb.data.provenance import provenance, verify_provenance
from llama_nb.data.shards import TokenShards
from llama_nb.data.sources import read_documents
from llama_nb.data.tokenize import tokenise
from llama_nb.data.tokenizer import Tokenizer
from llama_nb.data.units import SIDES

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no FIFOs')]

@pytest.fixture(scope='module')
def tokenizer(tokens): return Tokenizer(tokens/'tokenizer.model')

@pytest.fixture(scope='module')
def texts(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp('texts'), random.Random(0)
    for k in range(3):
        docs = [Document(f'{k} {i} sheep {draw.random()}\n'*3, f'{k}/{i}') for i in range(30)]
        write_jsonl([*docs, Document('the same everywhere', f'{k}/same')], folder/f'{k}.jsonl')
    return folder

def contents(folder):
    files = sorted(p for p in folder.rglob('*') if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}

# --- token shards in the making -------------------------------------------------------------------

def make(texts, tokenizer, out): return tokenise(texts, tokenizer, out, .2, 500, 1, 2_000)

@pytest.fixture(scope='module')
def good(texts, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp('good')/'out'
    make(texts, tokenizer, out)
    return {side: contents(out/side) for side in SIDES}

class Killed(BaseException): "As by a power cut"

def killed(texts, tokenizer, out, where):
    def kill(*args): raise Killed
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tokenize, where, kill)
        make(texts, tokenizer, out)
    return out

@pytest.fixture(scope='module')
def half(texts, tokenizer, tmp_path_factory):
    "Where a job was killed: before shards are packed, and when all are packed"
    home = tmp_path_factory.mktemp('half')
    return {where: killed(texts, tokenizer, home/where, where) for where in ('pack_shard', '_publish')}

WHERE = [('_publish', 'records/000000.json'), ('_publish', 'work/plan.json'), ('_publish', 'job.json'),
         ('_publish', 'work/packed/train-00000.json'), ('pack_shard', 'records/000001.json'),
         ('pack_shard', 'work/plan.json'), ('pack_shard', 'work/parts/000000')]

def goes_on(half, where, damage, texts, tokenizer, good, tmp_path):
    "The shards of a job that goes on after `damage` are those of any other, or it was refused"
    out = Path(shutil.copytree(half[where], tmp_path/'out'))
    damage(out)
    done = outcome(lambda: make(texts, tokenizer, out))
    if done: assert {side: contents(out/side) for side in SIDES} == good
    return bool(done)

@pytest.mark.parametrize('how', DAMAGES)
@pytest.mark.parametrize('where, name', WHERE)
def test_a_file_of_a_job_that_goes_on(half, where, name, how, texts, tokenizer, good, tmp_path):
    "What can be made again is; only the description of the job cannot"
    done = goes_on(half, where, lambda out: DAMAGES[how](out/name), texts, tokenizer, good, tmp_path)
    if how == 'a folder': return                            # nothing that is in the way is removed
    as_if_new = how in ('empty', 'nothing', 'a link to nothing', 'a link to itself', 'a link that leads out')
    assert done == (name != 'job.json' or as_if_new)

@pytest.mark.parametrize('where, name', [w for w in WHERE if w[1].endswith('json')])
def test_facts_of_a_job_that_are_untrue(half, where, name, texts, tokenizer, good, tmp_path):
    "Made again, refused, or without effect on the shards"
    for i, text in enumerate(lies((half[where]/name).read_text(), 12)):
        def damage(out): (out/name).write_text(text)
        goes_on(half, where, damage, texts, tokenizer, good, tmp_path/f'{i}')

@pytest.mark.parametrize('seed', range(6))
def test_a_part_with_other_bytes(half, seed, texts, tokenizer, good, tmp_path):
    "Beside the tokens themselves, which have no second witness"
    record = json.loads((half['pack_shard']/'records/000000.json').read_text())
    draw = random.Random(seed)
    def damage(out):
        part = out/'work/parts/000000'
        data = bytearray(part.read_bytes())
        _, start, stop = record['sides'][draw.choice(SIDES)]['at']
        for _ in range(3): data[draw.randrange(start, stop)] = draw.randrange(256)
        part.write_bytes(data)
    assert not goes_on(half, 'pack_shard', damage, texts, tokenizer, good, tmp_path)

# --- clean documents ------------------------------------------------------------------------------

NONE = Models('none', 'none', 'none')

@pytest.fixture(scope='module')
def cleaned(texts, tmp_path_factory):
    "A finished folder, and one that was killed before its end"
    home = tmp_path_factory.mktemp('cleaned')
    inputs = {p.name: str(p) for p in sorted(texts.iterdir())}
    clean_source('documents', inputs, home/'whole', models=NONE)
    def kill(*args): raise Killed
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(corpus, '_finish', kill)
        clean_source('documents', inputs, home/'half', models=NONE)
    return home, inputs, contents(home/'whole'/'documents')

def names_of(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*.json'))

def test_which_files_there_are(cleaned):
    assert {'corpus.json', 'finished.json', 'manifest.json', 'job.json', 'records/0.jsonl.json',
            'passes/0-documents/records/000000.json', 'passes/1-equal/pass.json'
            } <= {*names_of(cleaned[0]/'whole')}

@pytest.mark.parametrize('state', ['whole', 'half'])
def test_files_of_a_cleaned_folder(cleaned, tmp_path, state):
    "Some damages of each file: the documents stay as they are, or one line says why not"
    home, inputs, wanted = cleaned
    draw = random.Random(state)
    for i, name in enumerate(names_of(home/state)):
        text = (home/state/name).read_text()
        damages = [*draw.sample([*DAMAGES.values()], 6), *map(write, lies(text, 4, i))]
        for j, damage in enumerate(damages):
            out = Path(shutil.copytree(home/state, tmp_path/f'{i}-{j}'))
            damage(out/name)
            if outcome(lambda: clean_source('documents', inputs, out, models=NONE)):
                assert contents(out/'documents') == wanted
            shutil.rmtree(out)

@pytest.mark.parametrize('how', DAMAGES)
def test_documents_of_a_cleaned_folder_are_all_read_or_none(cleaned, tmp_path, how):
    home, _, _ = cleaned
    out = Path(shutil.copytree(home/'whole', tmp_path/'out'))
    DAMAGES[how](out/'manifest.json')
    refused(lambda: [*read_documents(out)])

@pytest.mark.parametrize('change', [
    lambda files: {'../out/' + n: about for n, about in files.items()},
    lambda files: {'/etc/' + n: about for n, about in files.items()},
    lambda files: {n: about | {'bytes': about['bytes'] + 1} for n, about in files.items()},
    lambda files: {n: about | {'bytes': -1} for n, about in files.items()},
    lambda files: files | {'documents/none.jsonl.zst': {'documents': 1, 'bytes': 9, 'sha256': 64*'0'}}])
def test_a_manifest_of_documents_that_lies(cleaned, tmp_path, change):
    out = Path(shutil.copytree(cleaned[0]/'whole', tmp_path/'out'))
    made = json.loads((out/'manifest.json').read_text())
    (out/'manifest.json').write_text(json.dumps(made | {'files': change(made['files'])}))
    refused(lambda: [*read_documents(out)])

def test_documents_that_lead_out_of_their_folder(cleaned, tmp_path):
    out = Path(shutil.copytree(cleaned[0]/'whole', tmp_path/'out'))
    path = next((out/'documents').iterdir())
    shutil.move(path, tmp_path/'secret')
    path.symlink_to(tmp_path/'secret')
    assert 'leads out' in refused(lambda: [*read_documents(out)])

# --- smaller ones ---------------------------------------------------------------------------------

@pytest.mark.parametrize('how', [h for h in DAMAGES if h not in ('nothing', 'a link to nothing')])
def test_the_cut_offs_beside_a_model(tmp_path, how):
    (tmp_path/'en.json').write_text('{"head": 1, "tail": 2.5}')
    rules = PerplexityRules()
    assert pipeline._cutoffs(rules, f'{tmp_path}/en.arpa', 1, 'paper').tail == 2.5
    DAMAGES[how](tmp_path/'en.json')
    changed = outcome(lambda: pipeline._cutoffs(rules, f'{tmp_path}/en.arpa', 1, 'paper'))
    assert changed is None or changed in (rules, pipeline.replace(rules, head=1., tail=2.5))

@pytest.mark.parametrize('how', DAMAGES)
def test_the_account_of_what_was_fetched(tmp_path, how):
    account = Account(tmp_path/'fetched.json')
    account.add('books/a.txt', {'address': 'http://x.org', 'bytes': 3})
    DAMAGES[how](tmp_path/'fetched.json')
    found = outcome(lambda: Account(tmp_path/'fetched.json'))
    assert found is None or found.files in ({}, account.files)

@pytest.mark.parametrize('name', ['../a', '/etc/passwd', 'a/b', '', '.', 'a\n', '-x'])
def test_an_account_that_names_other_files(tmp_path, name):
    remote = {'address': 'http://x.org', 'name': name, 'licence': '', 'limit': 9, 'digest': '', 'size': 0}
    (tmp_path/'fetched.json').write_text(json.dumps({'plans': {'books': [remote]}}))
    refused(lambda: Account(tmp_path/'fetched.json').plan('books', list))

# --- provenance -----------------------------------------------------------------------------------

@pytest.fixture
def shards(texts, tokenizer, tmp_path):
    make(texts, tokenizer, tmp_path/'out')
    return TokenShards(tmp_path/'out'/'train')

@pytest.mark.parametrize('how', [h for h in DAMAGES if h not in JSON])
def test_what_stands_for_provenance(shards, how):
    assert provenance(shards, 0).file == '0.jsonl'
    DAMAGES[how](shards.folder/'00000.ds.provenance')
    refused(lambda: provenance(shards, 0))
    refused(lambda: verify_provenance(shards))

def rewritten(shards, change):
    manifest = json.loads((shards.folder/'manifest.json').read_text())
    change(manifest['provenance'])
    (shards.folder/'manifest.json').write_text(json.dumps(manifest))

@pytest.mark.parametrize('change', [
    lambda told: told.update({'../../secret': told['00000.ds.provenance']}),
    lambda told: told.update({'../train/00000.ds.provenance': told['00000.ds.provenance']}),
    lambda told: told['00000.ds.provenance'].update(documents=1), lambda told: told.update({'': {}}),
    lambda told: told['00000.ds.provenance'].update(sha256='x')])
def test_a_manifest_whose_provenance_lies(shards, change):
    rewritten(shards, change)
    refused(lambda: TokenShards(shards.folder))

@pytest.mark.parametrize('rows', [b'', b'[]\n', b'[1,2,3,4,5,6]\n', 200_000*b'[' + b'\n', b'\0'*2**29,
                                  b'{"a": 1}\n', b'["a","","","","",3]\n'], ids=lambda r: repr(r[:20]))
def test_rows_of_provenance_that_are_none(shards, rows):
    "The larger one unpacks to half a gigabyte"
    import zlib
    import numpy as np
    data = zlib.compress(rows)
    ends = np.array([0, len(data), 2], '<u8').tobytes()
    n = shards.manifest['shards'][0]['documents']
    assert n <= 256
    (shards.folder/'00000.ds.provenance').write_bytes(data + ends)
    refused(lambda: provenance(shards, 0))

# --- names that are no UTF-8 -----------------------------------------------------------------------

def test_names_with_halves_of_surrogate_pairs_come_back(texts, tokenizer, tmp_path):
    "From file names that are not UTF-8, and from JSON; records and shards with them are read again"
    folder = tmp_path/'in'
    folder.mkdir()
    rows = [{'text': f'a llama of {i} years', 'id': f'\ud800{i}', 'url': '\udfff'} for i in range(60)]
    (folder/os.fsdecode(b'caf\xe9.jsonl')).write_text('\n'.join(map(json.dumps, rows)))
    made, _ = tokenise(folder, tokenizer, tmp_path/'out', .2, workers=1)
    found = provenance(made['train'], 0)
    assert found.document.startswith('\ud800') and found.file == 'caf\udce9.jsonl' and found.url == '\udfff'
    before = contents(tmp_path/'out')
    tokenise(folder, tokenizer, tmp_path/'out', .2, workers=1)
    assert contents(tmp_path/'out') == before
    inputs = {'a': str(next(folder.iterdir()))}
    for _ in range(2):
        total = clean_source('documents', inputs, tmp_path/'clean', models=NONE)
        assert total['equal'].kept == 60
