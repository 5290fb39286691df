"Token ids of another program: the same ids in shards, every document once, and a run that trains on them."
import random
import numpy as np
import pytest
from llama_nb.cli import main
from llama_nb.data.join import join_shards
from llama_nb.data.shards import TokenShards

SIDES = 'train', 'held_out'
SEPARATOR = 7

def some_ids(rng, n=60, size=400):
    "Documents without the separator in them"
    return [[rng.choice([*range(SEPARATOR), *range(SEPARATOR + 1, size)]) for _ in range(rng.randint(0, 200))]
            for _ in range(n)]

def write(path, documents, first, kind):
    stream = [i for doc in documents for i in ([SEPARATOR, *doc] if first else [*doc, SEPARATOR])]
    array = np.array(stream, kind)
    np.save(path, array) if path.suffix == '.npy' else array.tofile(path)

def ids(*args): return main(['data', 'ids', *map(str, args)])

def documents(shards):
    "By what lies on the disk"
    found = []
    for shard in shards.manifest['shards']:
        path = shards.folder/shard['name']
        ends = np.fromfile(f'{path}.index', '<u8').astype(int)
        found += [part.tolist() for part in np.split(np.fromfile(path, '<u2'), ends[:-1])]
    return found

@pytest.mark.parametrize('first', [False, True])
@pytest.mark.parametrize('name, kind, more', [('a.npy', 'int64', []), ('a.npy', 'uint16', []),
                                              ('a.bin', '<u2', ['--dtype', 'uint16']),
                                              ('a.bin', '<i4', ['--dtype', 'int32'])])
def test_every_document_is_in_one_side_once(tmp_path, first, name, kind, more):
    parts = [some_ids(random.Random(seed)) for seed in (1, 2)]
    for part, path in zip(parts, (tmp_path/name, tmp_path/f'more-{name}')): write(path, part, first, kind)
    args = ['--separator', SEPARATOR, '--vocab-size', 400, '--bytes-per-token', 2.5, '--held-out', .2, *more]
    assert ids(tmp_path/'out', tmp_path/name, tmp_path/f'more-{name}', *args, '--tokens-per-shard', 1000) == 0
    made = {side: TokenShards(tmp_path/'out'/side) for side in SIDES}
    wanted = [[SEPARATOR, *doc] if first else [*doc, SEPARATOR] for part in parts for doc in part]
    assert sorted(documents(made['train']) + documents(made['held_out'])) == sorted(wanted)
    train = documents(made['train'])
    assert [doc for doc in wanted if doc in train] == train # in their order
    for shards in made.values(): shards.verify()
    assert ids(tmp_path/'again', tmp_path/f'more-{name}', *args) == 0
    assert all(doc in train for doc in documents(TokenShards(tmp_path/'again'/'train')))    # on the same side
    both = join_shards([tmp_path/'out'/'train', tmp_path/'again'/'train'], tmp_path/'joined')
    assert both.vocab_size == 400
    assert ids(tmp_path/'out', tmp_path/name, *args) == 2   # is there already

def test_a_file_under_two_names_is_one_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path/'a.npy', some_ids(random.Random(1)), False, 'uint16')
    for other in ('./a.npy', 'a.npy', tmp_path/'a.npy'):
        assert ids('out', 'a.npy', other, '--separator', SEPARATOR, '--vocab-size', 400,
                   '--bytes-per-token', 2) == 2
        assert 'is named 2 times' in capsys.readouterr().err and not (tmp_path/'out').exists()

@pytest.mark.parametrize('with_tokenizer', [False, True])
def test_a_run_trains_on_them(tmp_path, tokens, run_file, capsys, with_tokenizer):
    "The ids of shards, given as an array, give the same losses; generation says whose they are"
    shards = TokenShards(tokens/'train')
    np.save(tmp_path/'train.npy', shards.read(0, shards.n_tokens))
    known = (['--tokenizer', tokens/'tokenizer.model'] if with_tokenizer else
             ['--vocab-size', 400, '--bytes-per-token', 2])
    assert ids(tmp_path/'ids', tmp_path/'train.npy', '--separator', 2, '--held-out', .3, *known) == 0
    path = run_file(3, name='ids')
    path.write_text(path.read_text().replace(f'"{tokens}/', f'"{tmp_path}/ids/'))
    capsys.readouterr()
    assert main(['train', str(path)]) == 0
    assert 'bits per byte' in capsys.readouterr().out
    out = next(line.split('"')[1] for line in path.read_text().splitlines() if line.startswith('out'))
    code, said = main(['generate', out, '--max-new-tokens', '1']), capsys.readouterr().err
    assert code == 0 if with_tokenizer else (code == 2 and 'decode the ids with that one' in said)

def test_documents_without_a_begin_cannot_be_kept_apart(tmp_path, tokens, run_file, capsys):
    "Only a separator behind each: their borders would not be found, in silence"
    shards = TokenShards(tokens/'train')
    there = shards.read(0, shards.n_tokens)
    np.save(tmp_path/'train.npy', there[there != 1])
    assert ids(tmp_path/'ids', tmp_path/'train.npy', '--separator', 2, '--held-out', .3,
               '--tokenizer', tokens/'tokenizer.model') == 0
    path = run_file(3, name='ids')
    path.write_text(path.read_text().replace(f'"{tokens}/', f'"{tmp_path}/ids/'))
    capsys.readouterr()
    for more in ([], ['--check']):
        assert main(['train', str(path), '--data.documents', 'separate', *more]) == 2
        assert 'do not begin with <s> (id 1)' in capsys.readouterr().err
    assert main(['train', str(path)]) == 0

@pytest.mark.parametrize('args, words', [
    ((), 'there are no files'), (('a.npy',), 'outside a vocabulary of 300'),
    (('a.txt',), 'neither .npy nor .bin'), (('a.bin',), 'name the type of the numbers in a.bin'),
    (('a.bin', '--dtype', 'float32'), 'name the type'),
    (('none.npy',), 'No such file'), (('small.npy', '--separator', '299'), 'no separator 299'),
    (('small.npy', '--bytes-per-token', '0'), '--bytes-per-token'),
    (('small.npy', '--held-out', '2'), 'between 0')])
def test_mistakes_are_one_line_and_make_nothing(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    for name, size in (('a', 400), ('small', 290)):
        write(tmp_path/f'{name}.npy', some_ids(random.Random(3), size=size), False, 'int32')
    (tmp_path/'a.bin').write_bytes(bytes(100))
    before = sorted(tmp_path.iterdir())
    settings = {'--separator': SEPARATOR, '--vocab-size': 300, '--bytes-per-token': 2}
    settings = {k: v for k, v in settings.items() if k not in args}
    code = ids('out', *args, *(x for pair in settings.items() for x in pair))
    said = capsys.readouterr().err
    assert code == 2 and words in said and said.count('\n') == 1, said
    assert sorted(tmp_path.iterdir()) == before
