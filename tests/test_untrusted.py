"Files that lie: each ends in one line, in time, or is passed over; nothing hangs, grows or reaches outside."
import json, os, random, shutil
from pathlib import Path
import numpy as np
import pytest
import safetensors.torch
import torch
from hostile import DEEP, HUGE, IN_PLACE, one_line, refused
from llama_nb.config import PRESETS
from llama_nb.core import UserError
from llama_nb.data.documents import Document
from llama_nb.data.loader import Loader
from llama_nb.data.shards import TokenShards, write_shards
from llama_nb.data.tokenizer import Tokenizer, train_tokenizer
from llama_nb.files import file_digest
from llama_nb.run_file import load_run
from llama_nb.train.checkpoint import save_checkpoint
from llama_nb.train.state import random_state, run_state, set_random_state
from llama_nb.train.stored import consolidate, latest_checkpoint, load_checkpoint

pytestmark = [pytest.mark.timeout(20), pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no FIFOs')]

# --- checkpoints ----------------------------------------------------------------------------------

def saved(folder, step=20):
    state = {'step': step, 'data': {'batch': step}, 'random': random_state(), 'skipped': 0}
    tensors = {'model': {'w': torch.arange(12.).reshape(3, 4), 'b': torch.ones(4)},
               'optimizer': {'w.step': torch.tensor(1.)}}
    return save_checkpoint(folder, step, tensors, state)

def lie(path, name, text):
    "Write a file of a checkpoint, and its true size and digest into the manifest"
    (path/name).write_bytes(text if isinstance(text, bytes) else text.encode())
    manifest = json.loads((path/'manifest.json').read_text())
    manifest['files'][name] = {'bytes': (path/name).stat().st_size, 'sha256': file_digest(path/name)}
    (path/'manifest.json').write_text(json.dumps(manifest))

@pytest.mark.parametrize('how', IN_PLACE)
@pytest.mark.parametrize('name', ['manifest.json', 'index.json', 'state.json', 'model-00000.safetensors'])
def test_what_stands_for_a_file_of_a_checkpoint(tmp_path, name, how):
    "It is named, and the checkpoint before it is taken"
    saved(tmp_path/'run', 10)
    path = saved(tmp_path/'run', 20)
    IN_PLACE[how](path/name)
    assert name in refused(lambda: load_checkpoint(path))
    lines = []
    assert latest_checkpoint(tmp_path/'run', lines.append).name == 'step-00000010' and len(lines) == 1

def entry(**changes):
    "An index whose first tensor says something else"
    def change(index):
        index['tensors']['model/w'].update(changes)
        return json.dumps(index)
    return change

def box(*pieces): return entry(pieces=[list(p) for p in pieces])

INDEXES = {'deep': lambda i: '{"tensors": ' + DEEP, 'a list': lambda i: '[]', 'empty': lambda i: '',
           'zeros': lambda i: 500*'\0', 'a number': lambda i: '{"tensors": 3}',
           'many digits': lambda i: f'{{"tensors": {{"model/w": {{"dtype": "float32", "shape": {HUGE}}}}}}}',
           'exabytes': entry(shape=[2**40, 2**40]), 'below zero': entry(shape=[-3, -4]),
           'true': entry(shape=[True, 12]), 'a float': entry(shape=[3.0, 4.0]),
           'nan': entry(shape=[float('nan')]),
           'nine axes': entry(shape=9*[1]), 'another type': entry(dtype='float64'),
           'no type': entry(dtype='save'),
           'a null': entry(dtype=None), 'no pieces': entry(pieces=[]), 'null pieces': entry(pieces=None),
           'a hole': box((0, [0, 0], [2, 4])), 'twice': box((0, [0, 0], [3, 4]), (0, [0, 0], [3, 4])),
           'overlap': box((0, [0, 0], [2, 4]), (0, [1, 0], [2, 4])), 'outside': box((0, [1, 0], [3, 4])),
           'rank below zero': box((-1, [0, 0], [3, 4])), 'rank 10^9': box((10**9, [0, 0], [3, 4])),
           'rank 7': box((7, [0, 0], [3, 4])), 'a short box': box((0, [0], [12])), 'a text': box('0ab')}

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_not_exported(tmp_path, value):
    path = saved(tmp_path/'run')
    weights = {'w': torch.full((3, 4), value), 'b': torch.ones(4)}
    lie(path, 'model-00000.safetensors', safetensors.torch.save(weights))
    assert 'w has numbers that are not finite' in refused(lambda: consolidate(path, tmp_path/'out'))
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('how', INDEXES)
def test_an_index_that_lies(tmp_path, how):
    path = saved(tmp_path)
    lie(path, 'index.json', INDEXES[how](json.loads((path/'index.json').read_text())))
    refused(lambda: load_checkpoint(path))

FILES = '{"state.json": {"bytes": 1, "sha256": "%s"}, "index.json": %s}'
MANIFESTS = ['', '\0\0', '[]', '3', '{}', DEEP, '{"files": ' + DEEP, '{"files": {}}', '{"files": [1]}',
             '{"files": null}', '{"files": {"../x": {"bytes": 1, "sha256": ""}}}', f'{{"files": {HUGE}}}',
             *(f'{{"files": {FILES % (64*"0", what)}}}' for what in (
                 '1', 'null', '{}', '{"bytes": -1, "sha256": ""}', '{"bytes": true, "sha256": ""}',
                 '{"bytes": NaN, "sha256": ""}', '{"bytes": 1e400, "sha256": ""}', '{"bytes": 1}',
                 '{"bytes": "1"}'))]

@pytest.mark.parametrize('text', MANIFESTS, ids=lambda t: t[:60])
def test_a_manifest_of_a_checkpoint_that_lies(tmp_path, text):
    path = saved(tmp_path)
    (path/'manifest.json').write_text(text)
    assert 'manifest.json' in refused(lambda: load_checkpoint(path))

STEPS = [-1, 19, 2**31, True, False, None, '20', 20.0, 1e300, [20], {}, int(HUGE[:400])]

@pytest.mark.parametrize('step', STEPS, ids=str)
def test_a_state_of_another_step(tmp_path, step):
    "The checkpoint before it is taken, and nothing is removed"
    first = saved(tmp_path, 10)
    path = saved(tmp_path, 20)
    state = json.loads((path/'state.json').read_text())
    lie(path, 'state.json', json.dumps(state | {'step': step}))
    refused(lambda: load_checkpoint(path))
    assert latest_checkpoint(tmp_path, lambda line: None) == first and path.exists()

@pytest.mark.parametrize('changes', [{'step': -1}, {'data': None}, {'data': {}}, {'data': {'batch': 19}},
                                     {'random': 3},
                                     {'data': {'batch': True}}, {'skipped': -1}, {'skipped': 1e9},
                                     {'random': None}],
                         ids=str)
def test_a_state_that_does_not_agree_with_itself(changes):
    data = {'batch': 20, 'manifest': 'x', 'seed': 0, 'seq_len': 64, 'batch_size': 4, 'shift': 0}
    state = {'step': 20, 'data': data, 'random': random_state(), 'skipped': 0}
    assert run_state(dict(state)) == state
    refused(lambda: run_state(state | changes))

def randoms():
    "States of generators that are none"
    good = random_state()
    version, words, gauss = good['python']
    kind, keys, *rest = good['numpy']
    yield from ({}, good | {'torch': ''}, good | {'torch': good['torch'][:-2]}, good | {'torch': 'zz'},
                good | {'torch': good['torch'] + '00'}, good | {'torch': 3}, good | {'cuda': 3})
    yield from (good | {'python': p} for p in ([version, words[:-1], gauss], [2, words, gauss], [version,
                                                                                                 words],
                                               [version, [-1, *words[1:]], gauss], [version, words, 'x'],
                                               [version, [2**32, *words[1:]], gauss], None))
    yield from (good | {'numpy': n} for n in (['PCG64', keys, *rest], [kind, keys[:-1], *rest], [kind, keys,
                                                                                                 625, 0, 0.],
                                              [kind, keys, -1, 0, 0.], [kind, keys, 1, 9, 0.], [kind],
                                              'MT19937'))

@pytest.mark.parametrize('n', range(21))
def test_a_random_state_that_is_none(n):
    "A position beyond the words of NumPy's generator is taken, and crashes the interpreter at the next draw"
    states = list(randoms())
    assert len(states) == 21
    refused(lambda: set_random_state(states[n]))
    torch.rand(3), random.random(), np.random.rand()

# --- token shards ---------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokens')
    texts = [f'a llama of {i} years and {7*i % 11} friends ' for i in range(200)]
    tokenizer = train_tokenizer(texts, folder/'tokenizer.model', 300)
    write_shards((Document(t, str(i)) for i, t in enumerate(texts)), tokenizer, folder/'train', 2_000)
    return folder

@pytest.fixture
def folder(tokens, tmp_path):
    "A copy to break"
    return Path(shutil.copytree(tokens/'train', tmp_path/'train'))

@pytest.mark.parametrize('how', IN_PLACE)
@pytest.mark.parametrize('name', ['manifest.json', '00000.ds', '00000.ds.index', 'tokenizer.model'])
def test_what_stands_for_a_file_of_shards(folder, name, how):
    IN_PLACE[how](folder/name)
    refused(lambda: TokenShards(folder))

def shard(**changes):
    def change(made): made['shards'][0].update(changes)
    return change

def top(**changes):
    def change(made): made.update(changes)
    return change

def renamed(name):
    "The first shard under another name, in all places"
    def change(made):
        old = made['shards'][0]['name']
        for ending in ('', '.index', '.ids', '.metadata'):
            made['files'][name + ending] = made['files'].pop(old + ending)
        made['shards'][0]['name'] = name
    return change

def twice(made): made['shards'].append(made['shards'][0])
def no_tokenizer(made): made['files'].pop('tokenizer.model')
def longer(made): made['files']['00000.ds']['bytes'] += 2

SHARDS = {'no vocabulary': top(vocab_size=0), 'vocabulary true': top(vocab_size=True),
          'a text': top(shards='x'),
          'vocabulary 2^40': top(vocab_size=2**40), 'no shards': top(shards=[]), 'null': top(shards=None),
          'a list of files': top(files=[]), 'another digest': top(tokenizer_sha256=64*'0'), 'twice': twice,
          'no digest': top(tokenizer_sha256='no'), 'below zero': shard(tokens=-5),
          'no tokens': shard(tokens=0),
          'more tokens': shard(tokens=10**9), 'fewer tokens': shard(tokens=3),
          'nan': shard(tokens=float('nan')),
          '2^62 tokens': shard(tokens=2**62), 'a float': shard(tokens=1e3),
          'infinite': shard(bytes=float('inf')),
          'more documents': shard(documents=10**6), 'no documents': shard(documents=0),
          'no name': shard(name=''),
          'a name that is no text': shard(name=3), 'dots': renamed('..'), 'up': renamed('../secret.ds'),
          'absolute': renamed('/etc/passwd'), 'a folder': renamed('a/b.ds'),
          'backslashes': renamed('..\\x.ds'),
          'no tokenizer': no_tokenizer, 'longer': longer}

@pytest.mark.parametrize('how', SHARDS)
def test_a_manifest_of_shards_that_lies(folder, how):
    shutil.copy(folder/'00000.ds', folder.parent/'secret.ds')
    made = json.loads((folder/'manifest.json').read_text())
    SHARDS[how](made)
    (folder/'manifest.json').write_text(json.dumps(made))
    refused(lambda: TokenShards(folder).read(0, 10))

@pytest.mark.parametrize('text', ['', '\0\0\0', '[]', '3', 'null', DEEP, '{"shards": ' + DEEP,
                                  f'{{"vocab_size": {HUGE}}}'],
                         ids=lambda t: t[:20])
def test_a_manifest_of_shards_that_is_none(folder, text):
    (folder/'manifest.json').write_text(text)
    assert 'manifest.json' in refused(lambda: TokenShards(folder))

def test_ids_beyond_the_vocabulary(folder):
    "Seen when they are read: a GPU would stop the whole process"
    with open(folder/'00000.ds', 'r+b') as f:
        f.seek(2*100)
        f.write(b'\xff\xff')
    shards = TokenShards(folder)
    loader = Loader(shards, 64, 4, 0)
    batches = range(loader.n_sequences//4 + 1)
    assert 'token 100 is 65535' in refused(lambda: [loader.batch(i) for i in batches])

def test_ends_and_names_of_documents_that_lie(folder):
    shards = TokenShards(folder)
    (folder/'00000.ds.index').write_bytes(b'\0'*(folder/'00000.ds.index').stat().st_size)
    refused(lambda: shards.document_of(50))

def test_names_of_documents_that_are_none(folder):
    shards = TokenShards(folder)
    for text in (b'', b'\0\0\n', b'[1]\n', DEEP.encode() + b'\n'):
        (folder/'00000.ds.ids').write_bytes(text)
        refused(lambda: shards.document_of(0))

# --- tokenizers -----------------------------------------------------------------------------------

@pytest.mark.parametrize('how', [h for h in IN_PLACE if h != 'a link that leads out'])
def test_what_stands_for_a_tokenizer(tokens, tmp_path, how):
    shutil.copy(tokens/'tokenizer.model', tmp_path/'t.model')
    IN_PLACE[how](tmp_path/'t.model')
    refused(lambda: Tokenizer(tmp_path/'t.model'))

@pytest.mark.parametrize('n', range(24))
def test_a_tokenizer_with_bytes_changed(tokens, tmp_path, n):
    "It is refused, or encodes and decodes within its vocabulary"
    data, draw = bytearray((tokens/'tokenizer.model').read_bytes()), random.Random(n)
    if n % 3 == 0: data = data[:draw.randrange(len(data))]
    for _ in range(1 + n % 5):
        if data: data[draw.randrange(len(data))] = draw.randrange(256)
    (tmp_path/'t.model').write_bytes(data)
    try:
        tokenizer = Tokenizer(tmp_path/'t.model')
        ids = tokenizer.encode('a llama of 7 years')
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        tokenizer.decode(ids)
    except UserError as e:
        one_line(e)

@pytest.mark.parametrize('settings', [{'bos_id': -1}, {'eos_id': -1}, {'bos_id': -1, 'eos_id': -1}], ids=str)
def test_a_tokenizer_without_begin_or_end(tmp_path, settings):
    import io
    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(['a llama of 7 years']*50), vocab_size=13,
                                             model_writer=model, minloglevel=5, **settings)
    (tmp_path/'t.model').write_bytes(model.getvalue())
    assert '<s> and </s>' in refused(lambda: Tokenizer(tmp_path/'t.model'))

# --- run files ------------------------------------------------------------------------------------

RUN = '''out = "runs/x"
[model]
dim = 64
n_layers = 2
n_heads = 4
max_seq_len = 64
[data]
train = "tokens/train"
seq_len = 64
batch_size = 4
[train]
steps = 100
[optim]
warmup_steps = 10
'''

@pytest.mark.parametrize('how', [h for h in IN_PLACE if h != 'a link that leads out'])
def test_what_stands_for_a_run_file(tmp_path, how):
    (tmp_path/'run.toml').write_text(RUN)
    IN_PLACE[how](tmp_path/'run.toml')
    refused(lambda: load_run(tmp_path/'run.toml'))

def with_line(old, new): return RUN.replace(old, new)

RUNS = ['\0', DEEP, f'x = {DEEP}', RUN + f'x = {DEEP}', 'a.'*100_000 + 'a = 1',
        RUN.encode('utf-16').decode('latin-1'),
        'out = 3', '[out]\nx = 1', RUN + '[model]\ndim = 3', RUN + '[[train]]\n', 'model = 3\n' + RUN,
        *(with_line('dim = 64', f'dim = {x}') for x in (
            '0', '-64', 'nan', 'inf', '1e400', '64.5', 'true', '"64"', '[64]', '{}', HUGE, '1979-05-27',
            str(2**62))),
        *(with_line('n_layers = 2', f'n_layers = {x}') for x in ('10**9', '1_000_000_000', '0', '-1')),
        *(with_line('batch_size = 4', f'batch_size = {x}') for x in ('2_000_000_000', '0', '-4', 'inf')),
        *(with_line('steps = 100', f'steps = 100\n{x}') for x in (
            'prefetch = 1_000_000_000', 'keep = 0', 'seed = -1', 'dtype = 3', 'attention = []',
            'hang_minutes = nan'))]

@pytest.mark.parametrize('text', RUNS, ids=lambda t: repr(t[-60:]))
def test_a_run_file_that_lies(tmp_path, text):
    (tmp_path/'run.toml').write_text(text)
    refused(lambda: load_run(tmp_path/'run.toml'))

def test_a_model_that_this_machine_cannot_hold():
    "Said before anything is allocated"
    from dataclasses import replace
    from llama_nb.settings import DataConfig, RunConfig, TrainConfig
    from llama_nb.train.run import check_memory
    cpu = torch.device('cpu')
    config = RunConfig('x', PRESETS['65B'], DataConfig('x', batch_size=64), TrainConfig(steps=9000))
    assert 'needs 1,045 GB per rank' in refused(lambda: check_memory(config, cpu, 1, 1))
    check_memory(config, cpu, 2048, 2048)
    batches = replace(config, model=PRESETS['toy'], data=DataConfig('x', seq_len=256, batch_size=2**23),
                      train=TrainConfig(steps=9000, prefetch=1000))
    assert 'lower train.prefetch' in refused(lambda: check_memory(batches, cpu, 1, 1))
