"Facts that stand twice and disagree, and numbers that cannot be: one line, through the public doors."
import json, os, shutil, struct, tracemalloc
from pathlib import Path
import numpy as np
import pytest
import torch
from conftest import RUN
from hostile import refused
from safetensors.torch import save_file
from test_untrusted import lie, renamed, saved
from llama_nb.cli import main
from llama_nb.data.shards import TokenShards
from llama_nb.data.tokenizer import Tokenizer, check_tokenizer, train_tokenizer
from llama_nb.files import file_digest
from llama_nb.infer.evaluate import shard_texts
from llama_nb.run_file import load_run
from llama_nb.train.checkpoint import check_moments, save_checkpoint
from llama_nb.train.sharded import read_file
from llama_nb.train.state import random_state, run_state
from llama_nb.train.stored import file_index, load_checkpoint

pytestmark = [pytest.mark.timeout(60), pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no FIFOs')]

# --- checkpoints and weights ------------------------------------------------------------------------

TYPES = 'float8_e4m3fn', 'float8_e5m2', 'int64', 'int32', 'uint8', 'bool', 'complex64', 'uint16'

@pytest.mark.parametrize('name', TYPES)
def test_weights_of_a_type_that_is_none_of_weights(tmp_path, name):
    "It was looked up in torch under the name that safetensors has for it"
    save_file({'w': torch.zeros(3, 4).to(getattr(torch, name))}, tmp_path/'w.safetensors')
    said = refused(lambda: read_file(tmp_path/'w.safetensors', {'w': torch.zeros(3, 4)}))
    assert 'w in type' in said and 'F32' in said

def test_a_head_of_many_tensors(tmp_path):
    "It took 20 s, and four times the memory of a good one"
    empty = {'dtype': 'F32', 'shape': [0], 'data_offsets': [0, 0]}
    head = json.dumps({f't{i}': empty for i in range(150_000)})
    (tmp_path/'w.safetensors').write_bytes(struct.pack('<Q', len(head)) + head.encode())
    assert 'a header of' in refused(lambda: file_index(tmp_path/'w.safetensors'))

@pytest.mark.parametrize('name, text', [
    ('index.json', '{"tensors": {"model/x": {"dtype": "float32", "shape": [], "pieces": ['
                   + '[0,[],[]],'*200_000 + '[0,[],[]]]}}}'),
    ('state.json', '{"step": 20, "a": "' + 'x'*2**23 + '"}')])
def test_short_files_of_a_checkpoint_that_are_long(tmp_path, name, text):
    "Of 300 MB, such an index made 6 GB"
    path = saved(tmp_path)
    lie(path, name, text)
    assert 'such a file at most' in refused(lambda: load_checkpoint(path))

def test_a_state_that_could_not_be_read_again_is_not_written(tmp_path):
    state = {'step': 1, 'more': 2**23*'x'}
    assert '8,388,' in refused(lambda: save_checkpoint(tmp_path, 1, {'model': {'w': torch.ones(1)}}, state))

DATA = {'batch': 20, 'manifest': 'x', 'seed': 0, 'seq_len': 64, 'batch_size': 4, 'shift': 0}

@pytest.mark.parametrize('change', [{'manifest': None}, {'batch_size': 'x'}, {'batch_size': -1},
                                    {'seq_len': None}, {'shift': None}, {'seed': [1]}], ids=str)
def test_a_place_in_the_text_that_is_none(change):
    "A fork of such a run ended in a stack trace"
    state = {'step': 20, 'data': DATA, 'random': random_state(), 'skipped': 0}
    assert run_state(dict(state)) == state
    refused(lambda: run_state(state | {'data': DATA | change}))
    for key in {*DATA} - {'shift'}:
        refused(lambda: run_state(state | {'data': {k: v for k, v in DATA.items() if k != key}}))

@pytest.mark.parametrize('part, value', [('step', -5.), ('step', 21.), ('step', float('nan')),
                                         ('exp_avg_sq', -1.)])
def test_moments_that_adamw_cannot_have_written(part, value):
    "The run went on, and its weights were NaN at the end"
    assert f'w.{part}' in refused(lambda: check_moments('it', {f'w.{part}': torch.tensor(value)}, 20))

# --- token shards -----------------------------------------------------------------------------------

@pytest.fixture
def shards(tokens, tmp_path):
    return Path(shutil.copytree(tokens/'train', tmp_path/'train'))

def told(shards, name):
    "A file's true size and digest into the manifest"
    made = json.loads((shards/'manifest.json').read_text())
    made['files'][name] = {'bytes': (shards/name).stat().st_size, 'sha256': file_digest(shards/name)}
    (shards/'manifest.json').write_text(json.dumps(made))

@pytest.mark.parametrize('name', ['a\nllama-nb: error: fine', 'a\x1b[2J', 'a\0b', 'a\rb', '\ud800', ''])
def test_names_that_no_file_has(shards, name):
    "They were printed, or ended in a stack trace"
    made = json.loads((shards/'manifest.json').read_text())
    renamed(name)(made)
    (shards/'manifest.json').write_text(json.dumps(made))
    assert 'is damaged' in refused(lambda: TokenShards(shards))

@pytest.mark.parametrize('ends', [lambda a: a + 2**63, lambda a: a*2, lambda a: a + (a == a[-1])*10**6])
def test_documents_that_end_beyond_their_shard(shards, tokens, ends):
    found = np.fromfile(shards/'00000.ds.index', '<u8')
    ends(found).astype('<u8').tofile(shards/'00000.ds.index')
    told(shards, '00000.ds.index')
    tokenizer = Tokenizer(tokens/'tokenizer.model')
    assert '.index is damaged' in refused(lambda: [*shard_texts(TokenShards(shards), tokenizer)])

def test_a_name_without_an_end_is_not_held(shards):
    (shards/'00000.ds.ids').write_bytes(b'')
    os.truncate(shards/'00000.ds.ids', 2**26)
    told(shards, '00000.ds.ids')
    found = TokenShards(shards)
    tracemalloc.start()
    refused(lambda: found.document_of(100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25

def test_shards_without_a_byte_of_text(shards):
    "Bits per byte were a division by zero, after all steps"
    made = json.loads((shards/'manifest.json').read_text())
    for shard in made['shards']: shard['bytes'] = 0
    (shards/'manifest.json').write_text(json.dumps(made))
    assert 'no text' in refused(lambda: TokenShards(shards))

def test_another_tokenizer_beside_the_shards(tokens, tmp_path, capsys):
    "Its size and digest are in the manifest, but not the number of its tokens"
    home = shutil.copytree(tokens, tmp_path/'tokens')
    other = train_tokenizer([f'a llama of {i} years' for i in range(500)], tmp_path/'other.model', 290)
    assert 'has 290 tokens' in refused(lambda: check_tokenizer(other.path, other.digest, 400))
    for side in ('train', 'held_out'):
        shutil.copy(other.path, home/side/'tokenizer.model')
        told(home/side, 'tokenizer.model')
        made = json.loads((home/side/'manifest.json').read_text())
        (home/side/'manifest.json').write_text(json.dumps(made | {'tokenizer_sha256': other.digest}))
    run = tmp_path/'run.toml'
    run.write_text(RUN.format(out=(tmp_path/'run').as_posix(), tokens=home.as_posix(), steps=3, save_every=9))
    assert main(['train', str(run)]) == 2 and not (tmp_path/'run').exists()
    assert 'has 290 tokens' in capsys.readouterr().err

# --- run files, and what the command says --------------------------------------------------------------

@pytest.mark.parametrize('text', ['out = "a\\u0000b"', 'out = "x"\n[data]\ntrain = "a\\nb"',
                                  'wandb = "\\u001b[2J"', '"a\\u0000" = 1', 'x = [["\\u0007"]]'])
def test_control_characters_in_a_run_file(tmp_path, text):
    (tmp_path/'run.toml').write_text(text)
    assert 'control character' in refused(lambda: load_run(tmp_path/'run.toml'))

@pytest.mark.parametrize('name', [5000*'x', 'loop/run.toml', 'evil\n\x1b[2J\rname.toml', f'{3000*"é"}'])
def test_a_mistake_is_one_line_and_no_reason_to_try_again(tmp_path, monkeypatch, capfd, name):
    monkeypatch.chdir(tmp_path)
    os.symlink('loop', 'loop')
    assert main(['train', name]) == 2
    err = capfd.readouterr().err
    assert err.count('\n') == 1 and len(err) < 1100 and err[:-1].isprintable()
