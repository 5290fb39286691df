"Deduplication: the answer depends on the pairs alone; damage is seen; overlaps agree with plain sets."
import itertools, multiprocessing, os, pickle, random, re, struct, sys, time, tracemalloc
from pathlib import Path
import numpy as np, pytest
from llama_nb.core import UserError
from llama_nb.data import dedup
from llama_nb.data.dedup import (FirstOnDisk, band_keys, band_probability, candidate_pairs, containment,
                                 first_seen, grouped, jaccard, merge_pairs, minhash, n_common, sampled,
                                 shingles, spill_pairs, text_key)
from llama_nb.data.loader import mix64

def pairs_of(seed, n=400):
    "Keys that repeat, of any length and with any bytes; places with any characters, some of them twice"
    draw = random.Random(seed)
    keys = [draw.randbytes(draw.choice([0, 1, 8, 16, 300])) for _ in range(n//4 + 1)]
    letters = 'ab\0\n"é\u0301\u202eש\ud800\U0001f600'
    places = [''.join(draw.choices(letters, k=draw.randrange(9))) for _ in range(n//2 + 1)]
    return [(draw.choice(keys), draw.choice(places)) for _ in range(n)]

def plainly(pairs):
    "{key: its places, sorted}"
    found = {}
    for key, place in pairs: found.setdefault(key, set()).add(place)
    return {key: sorted(places) for key, places in found.items()}

def answer(folder): return b''.join(p.read_bytes() for p in sorted(Path(folder).glob('first-*')))

# --- grouping ------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('partitions', [2, 5, 64])
def test_groups_are_those_of_a_dictionary(tmp_path, seed, partitions):
    pairs, most = pairs_of(seed), seed % 4 + 1
    random.Random(seed + 1).shuffle(pairs)
    found = [*grouped(pairs, most, tmp_path, 2000, partitions)]
    assert dict(found) == {key: places[:most] for key, places in plainly(pairs).items()}
    assert found == [*grouped(pairs[::-1], most)]                   # in memory, in another order: the same
    assert os.listdir(tmp_path) == []

def test_nothing_in_nothing_out(tmp_path):
    assert [*grouped([], folder=tmp_path)] == []
    is_first = first_seen([], tmp_path)
    assert not is_first(b'a', 'b') and not first_seen([])(b'a', 'b')

def test_any_memory_ends(tmp_path):
    "Even no memory at all, and a single key with a place longer than the memory"
    pairs = [(b'k', 'x'*10_000), (b'k', 'y'), (b'l', 'z')]*3
    assert dict(grouped(pairs, 2, tmp_path, 0, 2)) == {b'k': ['x'*10_000, 'y'], b'l': ['z']}
    assert dict(grouped([(b'k', str(i)) for i in range(1000)], 1, tmp_path, 0)) == {b'k': ['0']}

def test_a_key_that_occurs_everywhere_takes_no_memory(tmp_path):
    "No file is written for it: the smallest place is all that is kept"
    pairs = ((b'all rights reserved', f'{i:07}') for i in range(50_000, 0, -1))
    assert [*grouped(pairs, 1, tmp_path/'never made', 2000)] == [(b'all rights reserved', ['0000001'])]
    assert not (tmp_path/'never made').exists()

def peak_of(n, folder):
    "Bytes at the worst moment, for n different keys with 1 MB allowed"
    def many():
        for i in range(n): yield text_key(str(i)), f'{i:09}'
    tracemalloc.start()
    first_seen(many(), folder, memory=2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak

def test_memory_stays_within_the_setting(tmp_path):
    "And within the buffers of 64 files, 64 kB each, at two levels"
    small, large = (peak_of(n, tmp_path/str(n)) for n in (6_000, 30_000))
    assert large < 1.5*small + 2**20
    assert large < 2**20 + 2*64*2**16 + 2**21

# --- the first of equals -------------------------------------------------------------------------

@pytest.mark.parametrize('tasks, partitions', [(1, 2), (1, 9), (2, 3), (4, 64), (5, 2)])
def test_answers_are_the_same_bytes_for_any_number_of_tasks_and_partitions(tmp_path, tasks, partitions):
    pairs, whole, parts = pairs_of(3, 2000), tmp_path/'whole', tmp_path/'parts'
    is_first = first_seen(pairs, whole, memory=5000)
    for rank in random.Random(0).sample(range(tasks), tasks):
        spill_pairs(pairs[rank::tasks], parts, rank, partitions)
    for p in random.Random(1).sample(range(partitions), partitions):
        merge_pairs(parts, p, tasks, partitions, memory=3000)
    assert answer(whole) == answer(parts) and len(answer(whole)) == 16*len(plainly(pairs))
    first = {key: places[0] for key, places in plainly(pairs).items()}
    by_tasks, in_memory = FirstOnDisk(parts), first_seen(pairs)
    for key, place in pairs:
        expected = first[key] == place
        assert is_first(key, place) == by_tasks(key, place) == in_memory(key, place) == expected
    assert not is_first(b'never', 'seen') and not by_tasks(b'never', 'seen')

def test_one_place_keeps_each_key():
    pairs = pairs_of(5, 3000)
    is_first = first_seen(pairs)
    kept = {pair for pair in pairs if is_first(*pair)}
    assert sorted(key for key, _ in kept) == sorted(plainly(pairs))

def test_keys_of_texts():
    texts = ['', ' ', 'a', 'a\0', '\ud800', '\udfff', 'é', 'e\u0301', 'A', 'a\n', 'x'*10**6]
    assert len({text_key(t) for t in texts}) == len(texts)
    assert {len(text_key(t)) for t in texts} == {16}

def test_hashes_that_collide_are_told_apart(tmp_path, monkeypatch):
    "Were all keys at one spot of the hash, the places would still decide"
    monkeypatch.setattr(dedup, '_spot', lambda key: 2**63)
    pairs = [(b'a', 'x'), (b'a', 'y'), (b'b', 'z'), (b'c', 'v')]
    is_first = first_seen(pairs, tmp_path, memory=0)
    assert [is_first(*pair) for pair in pairs] == [True, False, True, True]

def ask(is_first, pairs, queue): queue.put([is_first(*pair) for pair in pairs])

def test_the_answer_travels_to_other_processes(tmp_path):
    pairs = pairs_of(1)
    is_first = first_seen(pairs, tmp_path)
    wanted = [is_first(*pair) for pair in pairs]
    copy = pickle.loads(pickle.dumps(is_first))
    assert [copy(*pair) for pair in pairs] == wanted
    context = multiprocessing.get_context('fork')                   # four that share one open file
    queue = context.Queue()
    processes = [context.Process(target=ask, args=(is_first, pairs, queue)) for _ in range(4)]
    for p in processes: p.start()
    assert [queue.get(timeout=60) for _ in processes] == [wanted]*4
    for p in processes: p.join()

# --- damage --------------------------------------------------------------------------------------

def test_files_that_were_cut_off_are_named(tmp_path):
    spill_pairs([(b'key', 'place')]*9, tmp_path, 0, 2)
    path = max((tmp_path/'pairs-00000').iterdir(), key=lambda p: p.stat().st_size)
    data = path.read_bytes()
    for size in range(1, len(data)):
        path.write_bytes(data[:size])
        if size % (8 + 8) == 0: continue                            # between two pairs
        with pytest.raises(UserError, match='is cut off'): merge_pairs(tmp_path, int(path.name), 1, 2)
    path.write_bytes(struct.pack('<II', 2**31, 2**31))              # lengths that are not there
    with pytest.raises(UserError, match='is cut off'): merge_pairs(tmp_path, int(path.name), 1, 2)

def test_missing_tasks_and_partitions_are_named(tmp_path):
    spill_pairs([(b'a', 'b')], tmp_path, 1, 3)
    with pytest.raises(UserError, match='pairs-00000 is missing'): merge_pairs(tmp_path, 0, 2, 3)
    spill_pairs([(b'a', 'b')], tmp_path, 0, 3)
    for p in (0, 2): merge_pairs(tmp_path, p, 2, 3)
    with pytest.raises(UserError, match='2 of 3 answers'): FirstOnDisk(tmp_path)
    merge_pairs(tmp_path, 1, 2, 3)
    assert FirstOnDisk(tmp_path)(b'a', 'b')

def test_a_task_that_fails_leaves_nothing_that_could_be_merged(tmp_path):
    def failing():
        yield b'a', 'b'
        raise OSError('no space left on device')
    with pytest.raises(OSError, match='no space'): spill_pairs(failing(), tmp_path, 0, 2)
    with pytest.raises(UserError, match='is missing'): merge_pairs(tmp_path, 0, 1, 2)
    with pytest.raises(OSError, match='no space'): first_seen(failing(), tmp_path/'first')
    with pytest.raises(UserError, match='0 of 1'): FirstOnDisk(tmp_path/'first')
    spill_pairs([(b'a', 'b')], tmp_path, 0, 2)                      # and it may be run again
    spill_pairs([(b'c', 'b')], tmp_path, 0, 2)
    for p in range(2): merge_pairs(tmp_path, p, 1, 2)
    assert FirstOnDisk(tmp_path)(b'c', 'b') and not FirstOnDisk(tmp_path)(b'a', 'b')

def work(folder):
    pairs = [(text_key(str(i % 3000)), f'{i:06}') for i in range(9000)]
    for rank in range(2): spill_pairs(pairs[rank::2], folder, rank, 4)
    for p in range(4): merge_pairs(folder, p, 2, 4, 2**16)

def test_killed_at_any_instant_and_run_again_it_gives_the_same_bytes(tmp_path):
    work(tmp_path/'whole')
    for delay in (.005, .03, .06, .1, .2):
        process = multiprocessing.get_context('fork').Process(target=work, args=(tmp_path/'killed',))
        process.start()
        time.sleep(delay)
        process.kill()
        process.join()
    work(tmp_path/'killed')
    assert answer(tmp_path/'killed') == answer(tmp_path/'whole')

# --- shingles ------------------------------------------------------------------------------------

WORDS = ['a', 'b', 'Ab', 'ß', 'שלום', 'עולם', 'नमस्ते', '東京', '\u202e', 'x\0y', '1', '_', "don't", '\ud800',
         '\n']

@pytest.mark.parametrize('seed', range(12))
def test_overlaps_are_those_of_plain_sets(seed):
    draw = random.Random(seed)
    n = seed % 5 + 1
    texts = [' '.join(draw.choices(WORDS, k=draw.choice([0, 3, 30, 200]))) for _ in range(2)]
    slow = []
    for text in texts:
        words = re.findall(r'\w+', text.lower())
        size = min(n, len(words))
        slow.append({(*words[i:i + size],) for i in range(len(words) - size + 1)} if words else set())
    a, b = (shingles(text, n) for text in texts)
    (x, y), both = slow, len(slow[0] & slow[1])
    assert (len(a), len(b), n_common(a, b)) == (len(x), len(y), both)
    assert containment(a, b) == both/max(len(x), 1) and jaccard(a, b) == both/max(len(x | y), 1)
    assert n_common(a, b) == len(np.intersect1d(a, b))

def test_the_order_of_words_counts_and_their_dress_does_not():
    assert len(set(shingles('a b c')) | set(shingles('c b a')) | set(shingles('b a c'))) == 3
    assert (shingles('“The—END”,\r\n of it') == shingles('the end... of IT')).all()
    assert (shingles('a a a a a a a') == shingles('a a a a a')).all()
    assert shingles('a a a a') != shingles('a a a a a')

def test_no_two_of_many_shingles_have_one_hash():
    "10,000 runs of five out of eleven words; one collision has probability 1e-12"
    runs = list(itertools.islice(itertools.product('abcdefghijk', repeat=5), 0, None, 16))
    assert len({int(shingles(' '.join(run))[0]) for run in runs}) == len(runs)

def test_a_hash_of_yesterday_is_that_of_today():
    "Signatures may lie on a disk for years"
    found = shingles('it is a truth universally acknowledged')
    assert [hex(x) for x in found] == ['0x6a3e88854d9703c1', '0xa6a5a13aa496793e']
    assert [hex(x) for x in minhash(found, 2)] == ['0x4a23ac8fa595e02f', '0x65da89831b2f5b4']

def test_without_xxhash_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'xxhash', None)
    with pytest.raises(UserError, match=r"pip install 'llama_nb\[data\]'"): shingles('a')

def test_a_long_line_of_one_word():
    assert len(shingles('x'*10**7)) == 1

# --- MinHash and bands ---------------------------------------------------------------------------

def test_signatures_estimate_jaccard():
    "The mean over 300 pairs with J = 1/3: standard error of 300*256 draws, 0.0017"
    rng, shares = np.random.default_rng(7), []
    for _ in range(300):
        x = np.unique(rng.integers(2**64, size=300, dtype=np.uint64))
        shares.append((minhash(x[:200], 256) == minhash(x[100:], 256)).mean())
    assert abs(np.mean(shares) - 1/3) < 4*.0017
    assert .8 < np.std(shares)/np.sqrt(2/9/256) < 1.2

def test_numbers_in_a_row_are_no_worse():
    "Structured elements, which a linear function might not scatter, once they were hashed as shingles are"
    x = mix64(np.arange(3000, dtype=np.uint64))
    shares = [(minhash(x[:2000], 128, s) == minhash(x[1000:], 128, s)).mean() for s in range(40)]
    assert abs(np.mean(shares) - 1/3) < .03

def test_the_mixer_is_a_permutation():
    x = np.unique(np.random.default_rng(0).integers(2**64, size=10**5, dtype=np.uint64))
    assert len(np.unique(mix64(x))) == len(x)
    assert hex(mix64(np.array([0x9e3779b97f4a7c15], np.uint64))[0]) == '0xe220a8397b1dcdaf'

def test_bands():
    signature = np.arange(12, dtype=np.uint64)
    keys = band_keys(signature, 4)
    assert len({*keys}) == 4 and len(keys[0]) == 2 + 3*8
    other = signature.copy()
    other[4] = 99
    assert [a == b for a, b in zip(keys, band_keys(other, 4))] == [True, False, True, True]
    assert len({*band_keys(np.zeros(12, np.uint64), 4)}) == 4       # band 1 of one is not band 2 of another
    assert band_probability(1, 3, 2) == 1 and band_probability(0, 3, 2) == 0

def test_samples_agree_between_texts():
    a, b = (shingles(' '.join(map(str, range(start, start + 5000)))) for start in (0, 1000))
    both = set(sampled(a, 16)) & set(sampled(b, 16))
    assert both == set(sampled(np.intersect1d(a, b), 16)) and 150 < len(both) < 350

def test_candidates_are_all_pairs_that_share_enough_keys(tmp_path):
    pairs = [(key, place) for key, place in pairs_of(2, 300) if len(place) < 4]
    shared = {}
    for places in plainly(pairs).values():
        for two in itertools.combinations(places, 2): shared[two] = shared.get(two, 0) + 1
    for least in (1, 2):
        wanted = {two for two, n in shared.items() if n >= least}
        found = [*candidate_pairs(pairs, least)]
        assert len(found) == len(wanted) and set(found) == wanted
        assert [*candidate_pairs(pairs[::-1], least, folder=tmp_path, memory=4000)] == found
    assert os.listdir(tmp_path) == []

def test_a_key_of_thousands_makes_few_pairs():
    pairs = [(b'common', f'{i:05}') for i in range(3000)]
    assert len([*candidate_pairs(pairs, most=20)]) == 20*19//2
