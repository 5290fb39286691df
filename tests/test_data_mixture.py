"""The mixture of Table 1: exact proportions and epochs, under kills and changes of world size; files that are
wrong; and a run over three sources that is stopped, killed and resumed."""
import json, os, pickle, random, signal, subprocess, sys
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from conftest import ENV, metrics, run_ranks
from llama_nb import untrusted
from llama_nb.cli import main
from llama_nb.core import UserError, is_temporary
from llama_nb.data.documents import Document
from llama_nb.data.loader import Loader, check_loader_state, loader_state
from llama_nb.data.mixture import TABLE_1, Mixture, MixtureLoader, MixtureRules, Source, draw
from llama_nb.data.mixture import largest_remainder, make_loader, open_tokens, write_mixture
from llama_nb.data.shards import TokenShards, write_shards
from llama_nb.data.tokenizer import Tokenizer
from llama_nb.files import bytes_digest

# --- shards whose tokens say where they stand ---------------------------------------------------------

class Numbers:
    "A tokenizer of texts such as '5 9': the ids of the stream are the numbers from 5 to 8"
    vocab_size, digest = 2**20, bytes_digest(b'numbers')

    def __init__(self, folder):
        self.path = folder/'numbers.model'
        self.path.write_bytes(b'numbers')

    def ids(self, text, bos=True, eos=False): return range(*map(int, text.split()))

def numbered(folder, n, first=0, per_shard=1000):
    "A folder of the `n` tokens from `first` on"
    folder.parent.mkdir(parents=True, exist_ok=True)
    docs = (Document(f'{first + i} {first + min(i + 97, n)}', str(i)) for i in range(0, n, 97))
    return write_shards(docs, Numbers(folder.parent), folder, per_shard)

def sized(sizes, counts, block=200, new_cuts=True):
    "A loader of sources of which only the sizes are known; no text of 1.4T tokens is at hand"
    parts = [Source(name, SimpleNamespace(n_tokens=n), 1, c) for (name, n), c in zip(sizes.items(), counts)]
    mixture = SimpleNamespace(sources=parts, rules=MixtureRules(block, new_cuts), folder='sized',
                              n_tokens=sum(sizes.values()))
    return lambda t, b, seed=0: MixtureLoader(mixture, t, b, seed)

PERCENTS = [row[0] for row in TABLE_1.values()]
UNIQUE = {name: percent/100*1.4e12/epochs for name, (percent, epochs, _) in TABLE_1.items()}

@pytest.fixture(scope='module')
def three(tmp_path_factory):
    "Sources of 1,000, 650 and 131 tokens with weights 5, 3 and 2"
    folder = tmp_path_factory.mktemp('three')
    sizes = {'a': (1000, 5), 'b': (650, 3), 'c': (131, 2)}
    for i, (name, (n, _)) in enumerate(sizes.items()): numbered(folder/name, n, 10_000*i)
    return write_mixture(folder/'mixture.toml', {name: (folder/name, w) for name, (_, w) in sizes.items()})

# --- Table 1 ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('scale, t', [(1e-6, 50), (1e-3, 2048), (1, 2048)])
def test_table_1_after_a_whole_run(scale, t):
    "Proportions to the sequence and epochs in every printed digit, at any size"
    sizes = {name: round(n*scale) for name, n in UNIQUE.items()}
    loader = sized(sizes, largest_remainder(PERCENTS, 200))(t, 200)
    for total, factor in ((1.4e12, 1), (1.0e12, 1/1.4)):
        n = round(total*scale/t)
        for found, (_, published, _) in zip(loader.epochs(n), TABLE_1.values()):
            assert abs(found - published*factor) < .0051
    for block in (0, 1, n//200 - 1):
        source, *_ = loader.where(block)
        assert np.bincount(source).tolist() == [134, 30, 9, 9, 9, 5, 4]
    source, epoch, _ = loader.where(round(1.4e12*scale/t)//200 - 1)
    assert [epoch[source == s].max() for s in range(7)] == [1, 1, 0, 2, 2, 1, 1]

def test_every_prefix_is_within_a_block(three):
    loader = MixtureLoader(three, 10, 1)
    source, *_ = loader.locate(np.arange(2000))
    for s, share in enumerate((.5, .3, .2)):
        excess = np.cumsum(source == s) - share*np.arange(1, 2001)
        assert abs(excess).max() <= loader.counts[s] and (abs(excess[199::200]) < 1e-6).all()
    for n in (0, 1, 199, 200, 333, 1999):
        wanted = np.bincount(source[:n], minlength=3)/[100, 65, 13]
        assert loader.epochs(n) == pytest.approx(wanted.tolist())

@pytest.mark.parametrize('n', [1, 2, 7, 100, 200, 997])
def test_largest_remainder(n):
    rng = random.Random(n)
    for _ in range(100):
        weights = [rng.choice((.1, .2, 1, 3, 67, 1e-6, 1e9, rng.random())) for _ in range(rng.randint(1, 12))]
        places, due = largest_remainder(weights, n), [n*w/sum(weights) for w in weights]
        assert sum(places) == n and all(abs(p - d) < 1 + 1e-6 for p, d in zip(places, due))
        assert largest_remainder([w*2 for w in weights], n) == places
        for v, p in zip(weights, places):               # who weighs more has at least as many
            assert all(p <= q for w, q in zip(weights, places) if v < w)

# --- epochs -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n_tokens, t', [(1000, 10), (131, 10), (11, 10), (12, 1), (100, 50), (99, 50)])
def test_an_epoch_is_every_token_once(n_tokens, t):
    n, orders, cuts = n_tokens//t, set(), []
    for epoch in range(2*t):
        e, start = draw(np.arange(n*epoch, n*(epoch + 1)), n_tokens, t, (1, b'x'))
        assert (e == epoch).all() and ((start >= 0) & (start < n_tokens)).all()
        targets = (start[:, None] + np.arange(1, t + 1)) % n_tokens
        seen = np.bincount(targets.ravel(), minlength=n_tokens)
        assert seen.max() == 1 and seen.sum() == n*t
        orders.add(tuple(start - start.min()))
        cuts.append(int(start.min()))
        assert len(set((start - start.min()) % t)) == 1
    assert len(set(cuts[:t])) == t == len(set(cuts[t:]))
    assert n < 6 or len(orders) == 2*t

def test_another_name_or_seed_is_another_order():
    orders = [draw(np.arange(90), 1000, 10, key)[1].tolist() for key in ((0, b'a'), (0, b'b'), (1, b'a'))]
    assert len(set(map(tuple, orders))) == 3

# --- a pure function ----------------------------------------------------------------------------------

def test_batches_hold_what_the_spans_say(three):
    "The tokens themselves, over the end of the ring and over borders of shards"
    loader, wrapped = MixtureLoader(three, 10, 40, seed=3), 0
    sizes = {s.name: s.shards.n_tokens for s in three.sources}
    for i in range(30):
        inputs, targets = loader.batch(i)
        for x, y, span in zip(inputs.tolist(), targets.tolist(), loader.spans(i)):
            first, n = 10_000*'abc'.index(span.source), sizes[span.source]
            wanted = [first + (span.start + j) % n for j in range(11)]
            assert x == wanted[:-1] and y == wanted[1:]
            wrapped += wanted[-1] < wanted[0]
    assert wrapped > 3

def test_any_world_size_after_any_kill(three):
    """A run goes on with another number of ranks and other batch sizes, after kills at random sequences.
    Whatever happens, sequence i is sequence i"""
    whole = [tuple(x) for x in zip(*MixtureLoader(three, 10, 1, seed=7).locate(np.arange(6000)))]
    rng, done = random.Random(0), 0
    while done < 6000:
        world, share = rng.choice((1, 2, 3, 8)), rng.choice((1, 5, 20))
        batch = world*share
        loader = pickle.loads(pickle.dumps(MixtureLoader(Mixture(three.folder), 10, batch, seed=7)))
        done -= done % batch                            # the newest checkpoint ends a batch
        for i in range(done//batch, done//batch + rng.randint(1, 40)):
            rows = [torch.cat(x) for x in zip(*(loader.batch(i, r, world) for r in range(world)))]
            for k, row in enumerate(rows[0][:, 0].tolist()):
                n = i*batch + k
                if n >= 6000: break
                source, _, start = whole[n]
                assert row == 10_000*source + start
            done = max(done, i*batch + batch)

WHERE = '''
import sys
from llama_nb.data.loader import prefetch
from llama_nb.data.mixture import make_loader, open_tokens
loader = make_loader(open_tokens(sys.argv[1]), 10, 12, 7)
for x, y in prefetch(loader, 40, 44): print(x[:, 0].tolist())
'''

def test_another_process_and_its_reader_find_the_same(three):
    "With other hashes of texts, too"
    loader = make_loader(three, 10, 12, 7)
    wanted = [str(loader.batch(i)[0][:, 0].tolist()) for i in range(40, 44)]
    for seed in '12':
        done = subprocess.run([sys.executable, '-c', WHERE, three.folder], capture_output=True, text=True,
                              env={**ENV, 'PYTHONHASHSEED': seed})
        assert done.stdout.splitlines() == wanted, done.stderr

FOREVER = [[0, 0, 1, 1, 0, 1, 1, 0], [2]*8, [105, 585, 632, 492, 455, 722, 562, 465]]

def test_the_order_may_never_change():
    "A run that goes on with a later version trusts these numbers"
    loader = sized({'Wikipedia': 1003, 'B\u00fccher': 777}, [3, 2], block=5)(10, 8, seed=5)
    assert [x.tolist() for x in loader.where(50)] == FOREVER


# --- what it is called, and what it is read as --------------------------------------------------------

def test_the_digest_covers_what_a_run_reads(three, tmp_path):
    folder = three.folder.parent
    rows = {s.name: (folder/s.name, s.weight) for s in three.sources}
    def digest(rows, **rules): return write_mixture(tmp_path/'m.toml', rows, **rules).digest
    assert digest(rows) == digest({k: (f, w/10) for k, (f, w) in rows.items()}) == three.digest
    numbered(tmp_path/'more', 1001)
    others = [dict(reversed(rows.items())), rows | {'c': (folder/'c', 2.2)},
              rows | {'a': (tmp_path/'more', 5)}, {'x': rows['a'], 'b': rows['b'], 'c': rows['c']}]
    found = [digest(other) for other in others] + [digest(rows, block=100), digest(rows, new_cuts=False)]
    assert len({three.digest, *found}) == 7

def test_resuming_with_another_mixture_is_refused(three, tmp_path):
    state = loader_state(MixtureLoader(three, 10, 8), 3)
    check_loader_state(MixtureLoader(Mixture(three.folder), 10, 8), json.loads(json.dumps(state)))
    rows = {s.name: (three.folder.parent/s.name, 1) for s in three.sources}
    with pytest.raises(UserError, match='manifest'):
        check_loader_state(MixtureLoader(write_mixture(tmp_path/'m.toml', rows), 10, 8), state)
    with pytest.raises(UserError, match='manifest'):
        check_loader_state(Loader(TokenShards(three.folder.parent/'a'), 10, 8), state)

def open_files(): return len(os.listdir('/proc/self/fd'))

@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='needs Linux to count the open files')
def test_many_shards_of_many_sources_hold_no_file_open(tmp_path):
    rows = {}
    for i in range(40):
        numbered(tmp_path/f's{i}', 2000, 5000*i, per_shard=97)
        rows[f's{i}'] = tmp_path/f's{i}', 1
    mixture = write_mixture(tmp_path/'m.toml', rows)
    loader, before = MixtureLoader(mixture, 10, 200), open_files()
    for i in range(10): loader.batch(i)
    assert open_files() == before
    wanted = np.concatenate([np.arange(2000) + 5000*i for i in range(40)])
    assert np.array_equal(mixture.read(0, mixture.n_tokens), wanted)

# --- files that are wrong -----------------------------------------------------------------------------

def row(name='a', tokens='a', weight='1', more=''):
    return f'[[source]]\nname = "{name}"\ntokens = "{tokens}"\nweight = {weight}\n{more}'

B = row('b', 'b')
WRONG = {'': 'has no [[source]]', 'source = []': 'has no [[source]]', 'source = 3': 'has no [[source]]',
         'source = [1]': 'has no [[source]]', '[source]\nname = "a"': 'has no [[source]]',
         '[[source]\n': 'is not a TOML file', '\0': 'is not a TOML file',
         row(tokens='gone') + B: "source 'a': ", row(tokens='a/manifest.json') + B: 'holds no token shards',
         row(weight='0') + B: 'above 0', row(weight='-0.0') + B: 'above 0', row(weight='-3') + B: 'above 0',
         row(weight='nan') + B: 'above 0', row(weight='inf') + B: 'above 0',
         row(weight='"1"') + B: 'a number', row(weight='true') + B: 'a number',
         row(weight='[1]') + B: 'a number',
         row(name='') + B: 'has no name', row(tokens='') + B: 'has no tokens',
         '[[source]]\nname = "a"\n' + B: 'has no tokens', row(more='wieght = 2\n') + B: "'wieght'",
         row() + B + B: "two sources are called 'b'", row() + row('b'): "'a' and 'b' are the same tokens",
         row() + row('b', './b/../a'): "'a' and 'b' are the same tokens",
         row() + row('b', 'foreign'): 'different tokenizers', row() + row('b', 'empty'): 'of length >= 1',
         row() + row('b', 'damaged'): 'is damaged', row() + row('b', 'cut'): 'instead of',
         row(weight='1000') + B: "'b' gets no sequence in a block of 200",
         row(weight='1e308') + row('b', 'b', '1e-308'): "'b' gets no sequence",
         'block = 0\n' + row(): 'block must be', 'block = true\n' + row(): 'block must be',
         'block = 2.5\n' + row(): 'block must be', 'block = 99999999999\n' + row(): 'block must be',
         'new_cuts = 1\n' + row(): 'new_cuts must be', 'blocks = 3\n' + row(): "did you mean 'block'"}

@pytest.fixture(scope='module')
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bad')
    for i, name in enumerate(('a', 'b', 'foreign', 'empty', 'damaged', 'cut')):
        numbered(folder/name, 300, 1000*i)
    def change(name, to):
        path = folder/name/'manifest.json'
        path.write_text(to(path.read_text()))
    change('foreign', lambda text: text.replace(Numbers.digest, bytes_digest(b'letters')))
    change('empty', lambda text: json.dumps(json.loads(text) | {'shards': []}))
    change('damaged', lambda text: text[:-20])
    (folder/'cut'/'00000.ds').write_bytes(b'x')
    return folder

@pytest.mark.parametrize('text', WRONG, ids=range(len(WRONG)))
def test_a_wrong_file_is_one_line(bad, text):
    (bad/'m.toml').write_text(text)
    with pytest.raises(UserError) as raised: open_tokens(bad/'m.toml')
    said = str(raised.value)
    assert WRONG[text] in said and 'm.toml' in said and '\n' not in said, said
    assert not is_temporary(raised.value)

def test_a_file_that_is_not_there_or_not_read(bad, tmp_path, monkeypatch):
    with pytest.raises(UserError, match='cannot read'): open_tokens(tmp_path/'none.toml')
    (tmp_path/'latin.toml').write_bytes(b'name = "\xff"')
    with pytest.raises(UserError, match='cannot read'): open_tokens(tmp_path/'latin.toml')
    (bad/'m.toml').write_text(row() + B)
    assert open_tokens(bad/'m.toml').n_tokens == 600
    real = untrusted.open_regular
    def fails(path, *args):
        if path.name == 'manifest.json': raise OSError(5, 'Input/output error')
        return real(path, *args)
    monkeypatch.setattr(untrusted, 'open_regular', fails)
    with pytest.raises(UserError, match="source 'a': cannot read") as raised: open_tokens(bad/'m.toml')
    assert is_temporary(raised.value)                   # a file server may come back

def test_a_source_shorter_than_a_sequence(three):
    assert MixtureLoader(three, 130, 8).batch(0)[0].shape == (8, 130)
    with pytest.raises(UserError, match="'c' of .* has 131 tokens, one sequence needs 132"):
        MixtureLoader(three, 131, 8)

# --- a run --------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def sources(tokens, tmp_path_factory):
    "A mixture of three small sources of Python's help texts"
    from llama_nb.data.documents import topic_documents
    folder, docs = tmp_path_factory.mktemp('sources'), [*topic_documents()]
    tokenizer = Tokenizer(tokens/'tokenizer.model')
    for i, (name, n) in enumerate({'long': 12, 'middle': 4, 'short': 1}.items()):
        write_shards(docs[20*i:20*i + n], tokenizer, folder/name)
    rows = {'long': (folder/'long', 5), 'middle': (folder/'middle', 3), 'short': (folder/'short', 2)}
    write_mixture(folder/'mixture.toml', rows, block=10)
    return folder

@pytest.fixture
def mixed(run_file, tokens, sources):
    "Write a run file that reads the mixture, for training and for validation"
    def write(*args, **named):
        path = run_file(*args, **named)
        text = path.read_text().replace(f'{tokens.as_posix()}/train', (sources/'mixture.toml').as_posix())
        path.write_text(text.replace(f'{tokens.as_posix()}/held_out', (sources/'mixture.toml').as_posix()))
        return path
    return write

def lines(folder): return len(metrics(folder))

def weights(folder): return load_file(sorted((folder/'checkpoints').iterdir())[-1]/'model-00000.safetensors')

def test_a_run_stopped_and_killed_ends_with_the_same_weights(tmp_path, mixed, sources, start,
                                                                    wait_for, capsys):
    "Bit for bit; and with other weights it does not go on"
    alone = start('train', mixed(30, save_every=5, name='whole'))
    path, out = mixed(30, save_every=5, name='broken'), tmp_path/'broken'
    for wanted, number in ((7, signal.SIGKILL), (16, signal.SIGTERM), (30, None)):
        process = start('train', path)
        wait_for(lambda: lines(out) >= wanted, process)
        if number: process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 128 + 15, None: 0}[number], err
    _, err = alone.communicate(timeout=60)
    assert alone.returncode == 0, err
    whole, broken = weights(tmp_path/'whole'), weights(out)
    assert whole.keys() == broken.keys() and all(torch.equal(whole[k], broken[k]) for k in whole)
    kept = 'step', 'loss', 'grad_norm', 'lr', 'held_out_loss'
    picked = [[{k: m.get(k) for k in kept} for m in metrics(folder)] for folder in (tmp_path/'whole', out)]
    assert picked[0] == picked[1] and picked[0][-1]['held_out_loss'] > 0
    before = (sources/'mixture.toml').read_text()
    try:
        (sources/'mixture.toml').write_text(before.replace('weight = 3', 'weight = 4'))
        assert main(['train', str(path)]) == 2
        assert 'made with other data (manifest' in capsys.readouterr().err.splitlines()[-1]
    finally:
        (sources/'mixture.toml').write_text(before)

def shown(capsys, *args):
    "What `llama-nb data show` prints"
    assert main(['data', 'show', *map(str, args)]) == 0
    return capsys.readouterr().out.splitlines()

def test_data_show_says_what_a_mixture_holds(mixed, sources, capsys):
    rows = [line.split() for line in shown(capsys, sources/'mixture.toml')[1:]]
    assert [r[:3] for r in rows] == [['long', '5', '5'], ['middle', '3', '3'], ['short', '2', '2']]
    path, loader = mixed(30), make_loader(Mixture(sources/'mixture.toml'), 64, 8)
    last = [line.split()[-1] for line in shown(capsys, path)[1:]]
    assert last == [f'{e:.2f}' for e in loader.epochs(240)]
    heads = [line for line in shown(capsys, path, '--batch', 3) if line.startswith('--- batch 3')]
    names = [line.split(': ')[1].split(',')[0] for line in heads]
    assert names == [span.source for span in loader.spans(3)] and len(set(names)) > 1

def mixture_worker(path):
    "The first tokens of this rank's part of a batch, opened as the trainer does"
    from llama_nb.parallel.mesh import on_all_ranks, rank_and_size
    from llama_nb.run_file import load_run
    from llama_nb.train.trainer import open_data
    loader, _ = on_all_ranks(lambda: open_data(load_run(path)))
    return {'rows': loader.batch(5, *rank_and_size())[0].tolist()}

def test_ranks_share_a_batch(mixed, sources):
    found = run_ranks('test_data_mixture:mixture_worker', 2, {'path': str(mixed(10))})
    whole = make_loader(open_tokens(sources/'mixture.toml'), 64, 8).batch(5)[0].tolist()
    assert found[0]['rows'] + found[1]['rows'] == whole
