"The files of a run after a power cut, or of a stranger; and the memory that untrue files take, of all kinds."
import json, os, shutil
from pathlib import Path
import numpy as np
import pytest
from conftest import RUN, metrics
from hostile import IN_PLACE, JSON, peak_bytes, write
from llama_nb.cli import main
from llama_nb.data.shards import TokenShards
from llama_nb.data.sources import read_documents
from llama_nb.data.tokenizer import Tokenizer
from llama_nb.run_file import load_run, read_origin
from llama_nb.train.stored import load_checkpoint

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no FIFOs')]

STEPS = 6

@pytest.fixture(scope='module')
def half(tokens, tmp_path_factory):
    "A run that was cut off after four steps of six, and its file"
    home = tmp_path_factory.mktemp('run')
    text = RUN.format(out=(home/'run').as_posix(), tokens=tokens.as_posix(), steps=STEPS, save_every=2)
    held_out = next(line for line in text.splitlines() if line.startswith('held_out'))
    (home/'run.toml').write_text(text.replace(held_out, '').replace('batch_size = 8', 'batch_size = 4'))
    assert main(['train', str(home/'run.toml')]) == 0
    shutil.rmtree(home/'run'/'checkpoints'/f'step-{STEPS:08}')
    return home

@pytest.fixture
def go_on(half, tmp_path, capsys):
    "Go on with a copy after some of its files were damaged: (exit code, what was said, its folder)"
    def go_on(damages):
        out = Path(shutil.copytree(half/'run', tmp_path/'run'))
        for name, damage in damages.items(): damage(out/name)
        code = main(['train', str(half/'run.toml'), '--out', str(out)])
        return code, capsys.readouterr().err, out
    return go_on

def steps(out): return sorted(int(p.name[5:]) for p in (out/'checkpoints').iterdir())

# --- what is only a record --------------------------------------------------------------------------

RECORDS = 'metrics.jsonl', 'loss.png', 'README.md', 'results.json', 'host.json'
TORN = {'zeros in the middle': b'\0'*300 + b'\n', 'half a line': b'{"step": 3, "lo',
        'another step': b'{"step": 1e300}\n', 'a list': b'[1]\n', 'no number': b'{"step": 4, "loss": NaN}\n',
        'deep': b'['*10**5 + b'\n',
        'bytes': bytes(range(256)), 'a line of 10 MB': b'x'*10**7 + b'\n'}

def torn(data):
    def write(path):
        first, *rest = path.read_bytes().splitlines(True)
        path.write_bytes(b''.join([first, data, *rest]))
    return write

@pytest.mark.parametrize('how', IN_PLACE)
def test_records_never_end_a_run(go_on, how):
    "All of them at once"
    code, err, out = go_on(dict.fromkeys(RECORDS, IN_PLACE[how]))
    assert code == 0 and steps(out)[-1] == STEPS, err

@pytest.mark.parametrize('how', TORN)
def test_a_torn_log(go_on, how):
    "What can be read of it stays, and the new steps follow"
    code, err, out = go_on({'metrics.jsonl': torn(TORN[how])})
    assert code == 0 and steps(out)[-1] == STEPS, err
    assert [row['step'] for row in metrics(out)][-2:] == [STEPS - 1, STEPS]

# --- what decides -----------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['config.toml', 'origin.json'])
@pytest.mark.parametrize('how', [*IN_PLACE, *JSON])
def test_what_decides_is_refused_before_the_first_step(go_on, name, how):
    "In one line, or it goes on where nothing is missing; the checkpoints are as they were"
    damage = IN_PLACE.get(how) or write(JSON[how])
    code, err, out = go_on({name: damage})
    assert code in (0, 2) and 'Traceback' not in err
    if not code: assert steps(out)[-1] == STEPS
    if code: assert steps(out) == [4] and err.count('llama-nb: error: ') == 1, err

@pytest.mark.parametrize('how', IN_PLACE)
def test_what_stands_for_the_lock(go_on, how):
    "It is never written through a link"
    code, err, out = go_on({'.lock': IN_PLACE[how]})
    elsewhere = out.parent/'elsewhere-.lock'
    assert code == (0 if how in ('nothing', 'a terabyte') else 2), err
    if elsewhere.exists(): assert elsewhere.read_bytes() == b'' or b'process' in elsewhere.read_bytes()
    if code: assert steps(out) == [4] and '.lock' in err

# --- memory -----------------------------------------------------------------------------------------

def crowd(path): path.write_bytes(b'{"text": "a", "b": [' + b'{},'*20_000_000 + b'{}]}')

def large(path):
    with open(path, 'wb') as f: f.truncate(2**34)

def long_line(path): path.write_bytes(b'{'*2**27)

def huge_shape(path):
    index = json.loads(path.read_text())
    next(iter(index['tensors'].values()))['shape'] = [2**20, 2**20]
    path.write_text(json.dumps(index))

def many_shards(path):
    made = json.loads(path.read_text())
    made['shards'] = made['shards']*100_000
    path.write_text(json.dumps(made))

def rows(path): path.write_bytes(np.full(2**24, ord('['), np.uint8).tobytes())

MEMORY = {'checkpoints': [('manifest.json', large), ('index.json', huge_shape), ('state.json', rows)],
          'token shards': [('manifest.json', large), ('manifest.json', many_shards), ('manifest.json', rows)],
          'tokenizers': [('tokenizer.model', large), ('tokenizer.model', rows)],
          'documents': [('a.jsonl', crowd), ('a.jsonl', large), ('a.jsonl', long_line), ('a.jsonl', rows)],
          'run files': [('run.toml', large), ('run.toml', rows)],
          'files of a run': [('origin.json', large), ('origin.json', rows)]}

@pytest.fixture
def kinds(half, tokens, tmp_path):
    "For each kind a folder with a good one, and what reads it"
    checkpoint = shutil.copytree(half/'run'/'checkpoints'/'step-00000004', tmp_path/'step-00000004')
    shards = shutil.copytree(tokens/'train', tmp_path/'train')
    (tmp_path/'texts').mkdir()
    (tmp_path/'texts'/'a.jsonl').write_text('{"text": "a llama"}\n'*1000)
    shutil.copy(half/'run.toml', tmp_path)
    shutil.copytree(half/'run', tmp_path/'run')
    return {'checkpoints': (checkpoint, lambda: load_checkpoint(checkpoint)),
            'token shards': (shards, lambda: TokenShards(shards).read(0, 1000)),
            'tokenizers': (shards, lambda: Tokenizer(shards/'tokenizer.model')),
            'documents': (tmp_path/'texts', lambda: [*read_documents(tmp_path/'texts')]),
            'run files': (tmp_path, lambda: load_run(tmp_path/'run.toml')),
            'files of a run': (tmp_path/'run', lambda: read_origin(tmp_path/'run'))}

@pytest.mark.timeout(20*6)
@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='no /proc')
@pytest.mark.parametrize('kind', MEMORY)
def test_untrue_files_take_at_most_twice_the_memory_of_good_ones(kinds, kind):
    folder, read = kinds[kind]
    good = peak_bytes(read)
    for name, damage in MEMORY[kind]:
        kept = (folder/name).read_bytes()
        damage(folder/name)
        assert peak_bytes(read) <= 2*good, (name, damage.__name__)
        (folder/name).write_bytes(kept)
