"Books: frames in all their styles, files that are no text, verdicts that agree with counting all pairs."
import codecs, io, itertools, lzma, os, random, tracemalloc
from functools import partial
import pytest
from llama_nb.core import UserError
from llama_nb.data import books
from llama_nb.data.books import (BookRules, Copy, clean_book, drop_copy, find_book, overlapping_books,
                                 read_books, simhash)
from llama_nb.data.dedup import containment, jaccard, shingles
from llama_nb.data.documents import Document
from llama_nb.data.stage import Stage, n_bytes, preset

def read(data, report=None): return [*read_books(io.BytesIO(data), *([report] if report else []))]

def cut(text, **settings):
    "(what is left, {rule: bytes}) of a text; the bytes balance"
    after, decisions = clean_book(Document(text, 'x'), BookRules(**settings))
    removed = {d.rule.removeprefix('books.'): d.removed for d in decisions if d.removed}
    assert n_bytes(text) == n_bytes(after.text) + sum(removed.values())
    return after.text, removed

def novel(seed, n=400):
    "Lines of made-up words"
    draw = random.Random(seed)
    words = [''.join(draw.choices('abcdefgh', k=4)) for _ in range(n)]
    return '\n'.join(' '.join(words[i:i + 10]) for i in range(0, n, 10)) + '\n'

# --- the frame -----------------------------------------------------------------------------------

STARTS = ['*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***',
          '*** START OF THIS PROJECT GUTENBERG EBOOK EMMA ***',
          '***START OF THE PROJECT GUTENBERG EBOOK EMMA***',
          '*** START OF THE PROJECT GUTENBERG EBOOK 158 ***  ',
          '*** START OF THIS PROJECT GUTENBERG EBOOK A BOOK WITH A LONG\nTITLE OF\nSEVERAL LINES ***',
          '*** START OF THIS PROJECT GUTENBERG ETEXT EMMA',
          '** START OF THE PROJECT GUTENBERG EBOOK EMMA ***',
          '***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nlawyers\n\n'
          '*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*',
          '*END THE SMALL PRINT! FOR PUBLIC DOMAIN EBOOKS*Ver.02/11/02*END*',
          '*END* THE SMALL PRINT! FOR COPYRIGHT PROTECTED ETEXTS*END*', '']
ENDS = ['*** END OF THE PROJECT GUTENBERG EBOOK EMMA ***', '***END OF THE PROJECT GUTENBERG EBOOK EMMA***',
        'End of the Project Gutenberg EBook of Emma, by Jane Austen\n\n'
        '*** END OF THIS PROJECT GUTENBERG EBOOK EMMA ***',
        'End of Project Gutenberg\'s Emma, by Jane Austen', 'The End of Project Gutenberg etext of Emma',
        'End of The Project Gutenberg Etext of Emma\n\n***START**THE SMALL PRINT!**START***\nlawyers\n'
        '*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*',
        '*** START: FULL LICENSE ***', '']

@pytest.mark.parametrize('start, end', itertools.product(STARTS, ENDS))
def test_every_style_of_start_with_every_style_of_end(start, end):
    head = 'The Project Gutenberg EBook of Emma\n\nTitle: Emma\n\n' if start else ''
    tail = '\n\nUpdated editions will replace the previous one.\n' if end else ''
    book = novel(1)
    left, removed = cut(f'{head}{start}\n\n\n{book}\n\n{end}{tail}')
    assert left == book
    assert ('header' in removed, 'licence' in removed) >= (bool(start), bool(end))

def test_credits_are_cut_with_the_empty_lines_after_them():
    start = '*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***\n\n\n'
    for credit in ('Produced by Anonymous Volunteers', 'E-text prepared by A and B\nand the team\nhttp://x.net',
                   'This etext was prepared by C <c@d.e>', 'Transcribed from the 1900 edition by F'):
        left, removed = cut(f'{start}{credit}\n\n\n\n{novel(1)}')
        assert left == novel(1) and removed['credits'] == n_bytes(credit) + 4
    left, removed = cut(f'{start}Produced by X\n\n{novel(1)}', credits=False)
    assert left.startswith('Produced by X') and 'credits' not in removed
    assert cut('Produced by hand, the cloth\n' + novel(1))[0].startswith('Produced')    # a long paragraph

def test_a_small_print_after_the_book_does_not_take_the_book_away():
    small = '*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n'
    assert cut(f'{novel(1)}\nEnd of Project Gutenberg Etext\n{small}')[0] == novel(1)
    assert cut(f'{novel(1)}\n{small}')[0].startswith(novel(1))          # nothing says where it began

def test_markers_far_inside_are_text():
    inside = "End of Project Gutenberg's first volume\n*** START OF THE PROJECT GUTENBERG EBOOK II ***\n"
    long = novel(1, 20_000)
    text = f'{STARTS[0]}\n{long}{inside}{long}{ENDS[0]}\n'
    after, decisions = clean_book(Document(text, 'x'))
    assert after.text == long + inside + long
    assert [d.value for d in decisions if d.rule == 'books.inner_markers'] == [2]

def test_words_about_gutenberg_are_no_marker():
    text = ('He spoke of the end of Project Gutenberg.\nSTART OF THE PROJECT GUTENBERG EBOOK\n'
            '* * * START\n*** START ***\n*** END ***\nThe End\nEnd of the Project\n')*3
    assert cut(text) == (text, {})

@pytest.mark.parametrize('seed', range(40))
def test_any_order_of_markers_keeps_the_bytes_in_balance(seed):
    draw = random.Random(seed)
    parts = [*STARTS, *ENDS, novel(2, 30), '', '\n\n', 'Produced by X\n', '\u202eשלום e\u0301\0\ud800', '\r']
    parts.append('*'*99)
    text = '\n'.join(draw.choices(parts, k=draw.randrange(30)))
    frame = draw.choice([1, 5, 1000])
    left, _ = cut(text, max_frame=frame)
    assert left in text or not left or 'Produced' in text
    assert cut(text, frame=False, credits=False) == (text, {})

def test_a_frame_without_a_book_is_counted_as_empty():
    text = f'{STARTS[0]}\n\n\n{ENDS[0]}\n'
    stage = Stage('books', clean_book)
    assert [*stage([Document(text, 'x')])] == [] and stage.tally.kept == 0
    assert 'books.empty' in stage.tally.rules

def test_copyrighted_books_go():
    data = b'**This is a COPYRIGHTED Project Gutenberg Etext, Details Below**\n\nTitle: A\n\nbook'
    [doc] = read(data)
    assert doc.metadata['copyrighted'] and clean_book(doc)[0] is None
    assert clean_book(doc)[1][0].removed == len(data)
    assert clean_book(doc, preset(BookRules, 'redpajama'))[0] is not None
    assert clean_book(read(b'they said: This is a COPYRIGHTED Project Gutenberg\n')[0])[0] is not None

def test_markers_by_the_hundred_thousand_take_no_time():
    text = (STARTS[4] + '\n' + ENDS[2] + '\n')*40_000
    after, _ = clean_book(Document(text, 'x'))
    assert n_bytes(after.text) < n_bytes(text)
    assert find_book(['*** START OF THE PROJECT GUTENBERG' + ' a'*10**6 + '\n']) == (1, 1, 0)
    cut('*'*10**6 + '\n' + ' '*10**6 + '\n' + 'Title:'*10**5)

# --- reading -------------------------------------------------------------------------------------

def test_line_ends_and_byte_order_marks_do_not_matter():
    for encoding in ('utf-8', 'utf-8-sig', 'utf-16'):
        for end in ('\n', '\r\n', '\r'):
            [doc] = read(f'Käthe{end}{end}b'.encode(encoding))
            assert doc.text == 'Käthe\n\nb'
    [doc] = read('שלום e\u0301 \u202e\u2028x\x85y'.encode())
    assert doc.text == 'שלום e\u0301 \u202e\u2028x\x85y'

@pytest.mark.parametrize('data', [b'a\0b', 'Käthe'.encode('utf-16-le'), b'\xff\xfea', b'\x81\x8d',
                                  codecs.BOM_UTF16_LE + b'\0\xd8', codecs.BOM_UTF8 + b'\xe4',
                                  bytes(range(256)), b'\0'*1000])
def test_what_is_no_text_is_reported(data):
    told = []
    assert read(data, lambda place, why: told.append(why)) == []
    assert len(told) == 1 and 'is no text' in told[0]
    with pytest.raises(UserError, match='is no text'): read(data)

@pytest.mark.parametrize('name', ['rot13', 'hex', 'zlib', 'none', 'utf-16', 'utf-7', 'cp037',
                                  'unicode_escape'])
def test_a_header_cannot_choose_any_codec(name):
    [doc] = read(f'Character set encoding: {name}\n\\u0041 '.encode() + b'\xe4\n')
    assert doc.text.endswith('\n\\u0041 ä\n') and doc.metadata['encoding'] == 'cp1252, guessed'

def test_facts_of_the_header():
    head = 'Title: Emma\nAuthor: Jane Austen\nRelease Date: 1994 [EBook #158]\nLanguage: English\n'
    [doc] = read(head.encode())
    assert doc.metadata == {'encoding': 'utf-8', 'title': 'Emma', 'author': 'Jane Austen', 'number': 158}
    assert (doc.url, doc.language) == ('https://www.gutenberg.org/ebooks/158', 'en')
    [doc] = read(b'Title:\nAuthor: \n[eBook #99999999999999]\nLanguage: Klingon\n')
    assert (doc.metadata, doc.url, doc.language) == ({'encoding': 'utf-8'}, '', '')

def test_a_folder_with_everything_in_it(tmp_path):
    "Good files are read, bad ones named, a FIFO and a loop of links among them; all else is left alone"
    (tmp_path/'sub').mkdir()
    good = {'a.txt': b'one', 'sub/b.TXT.txt': b'two', 'c.txt.xz': lzma.compress(b'three'), 'e.txt': b''}
    for name, data in good.items(): (tmp_path/name).write_bytes(data)
    (tmp_path/'d.txt.xz').write_bytes(lzma.compress(os.urandom(1000))[:-20])
    (tmp_path/'f.txt').write_bytes(b'\0')
    (tmp_path/'picture.jpg').write_bytes(b'\xff')
    os.mkfifo(tmp_path/'g.txt')
    (tmp_path/'sub'/'loop').symlink_to(tmp_path)
    (tmp_path/'h.txt').symlink_to(tmp_path/'nowhere')
    told = []
    found = [*read_books(tmp_path, lambda place, why: told.append(place))]
    texts = {doc.id: doc.text for doc in found}
    assert texts == {'a.txt': 'one', 'sub/b.TXT.txt': 'two', 'c.txt.xz': 'three', 'e.txt': ''}
    assert sorted(os.path.basename(p) for p in told) == ['d.txt.xz', 'f.txt', 'g.txt', 'h.txt', 'loop']
    with pytest.raises(UserError): [*read_books(tmp_path)]
    (tmp_path/'none').mkdir()
    with pytest.raises(UserError, match='has no books'): [*read_books(tmp_path/'none')]
    with pytest.raises(UserError, match='there is no file'): [*read_books(tmp_path/'x.txt')]

class Endless(io.RawIOBase):
    "A single line without end; counts what was taken"
    taken = 0
    def readable(self): return True
    def readinto(self, buffer):
        buffer[:] = b'x'*len(buffer)
        self.taken += len(buffer)
        return len(buffer)

def test_a_line_without_end_is_not_held(monkeypatch):
    monkeypatch.setattr(books, 'MAX_LINE', 2**20)
    stream, told = Endless(), []
    assert [*read_books(io.BufferedReader(stream), lambda place, why: told.append(why))] == []
    assert told == ['is longer than 1,048,576 bytes; no book is'] and stream.taken < 2**21

# --- copies --------------------------------------------------------------------------------------

def shelf_of(seed):
    "Books, later editions, parts, collections, copies and empty ones, in any order"
    draw = random.Random(seed)
    texts = [novel(f'{seed} {i}', draw.choice([30, 300, 1000])) for i in range(4)]
    def edited(text, share): return ' '.join('new' if draw.random() < share else w for w in text.split(' '))
    texts += [edited(draw.choice(texts), share) for share in (.003, .01, .02, .1)]
    texts += [''.join(draw.sample(texts[:4], 3)), draw.choice(texts).upper(), texts[0][:len(texts[0])*2//3]]
    texts += ['', '...']
    names = draw.sample([f'{i:02}' for i in range(len(texts))], len(texts))
    return [Document(text, name, 'books') for text, name in zip(texts, names)]

def slowly(docs, rules):
    "All pairs, with plain sets"
    sets = {doc.id: set(shingles(doc.text, rules.words).tolist()) for doc in docs}
    def overlap(a, b):
        both = len(sets[a] & sets[b])
        of = len(sets[a] | sets[b]) if rules.measure == 'jaccard' else min(len(sets[a]), len(sets[b]))
        return both/max(of, 1)
    kept, removed = [], []
    for name in sorted(sets, key=lambda n: (-len(sets[n]) if rules.keep == 'longest' else 0, n)):
        is_copy = any(overlap(name, other) > rules.overlap for other in kept)
        (removed if is_copy else kept).append(name)
    return set(removed)

@pytest.mark.parametrize('settings', [{}, {'measure': 'jaccard'}, {'keep': 'first'}, {'overlap': .5},
                                      {'words': 2}])
def test_verdicts_are_those_of_all_pairs(settings, tmp_path):
    rules = BookRules(candidates='sampled', every=1, **settings)        # every pair is a candidate
    for seed in range(2):
        docs = shelf_of(seed)
        removed = overlapping_books(docs, rules)
        assert set(removed) == slowly(docs, rules), seed
        for name, copy in removed.items():
            assert copy.of not in removed and copy.measured > rules.overlap
        assert overlapping_books(docs[::-1], rules, tmp_path/str(seed), memory=5000) == removed
        stage = Stage('books', partial(drop_copy, removed=removed, rules=rules))
        left = [doc.id for doc in docs if doc.id not in removed and doc.text]
        assert [doc.id for doc in stage(docs)] == left
        gone = stage.tally.rules['books.overlap'].removed
        assert stage.tally.bytes_in == stage.tally.bytes_out + gone

def test_minhash_misses_only_small_books_in_much_larger_ones():
    for seed in range(6):
        docs = shelf_of(seed)
        removed = overlapping_books(docs)
        assert removed.keys() <= slowly(docs, BookRules()) and len(removed) > 2
        sets = [shingles(doc.text) for doc in docs if doc.id not in removed]
        for a, b in itertools.combinations(sets, 2):
            if jaccard(a, b) > .45: assert containment(*sorted((a, b), key=len)) <= .9

def test_more_than_ninety_percent_is_more():
    "Eleven shingles, of which ten are shared: 0.909; ten of which nine are: 0.9, which is not more"
    words = [f'w{i}' for i in range(15)]
    for n, goes in ((11, True), (10, False)):
        one = words[:n + 4]
        other = ['x', *one[1:], 'y', 'z', 'v', 'w', 'u']
        docs = [Document(' '.join(one), 'a'), Document(' '.join(other), 'b')]
        assert (overlapping_books(docs, BookRules(candidates='sampled', every=1)).keys() == {'a'}) == goes

def test_a_thousand_copies_leave_one():
    docs = [Document(novel(1), f'{i:04}') for i in range(1000)]
    removed = overlapping_books(docs)
    assert len(removed) == 999 and set(removed.values()) == {Copy('0000', 1.)}

def test_memory_with_a_folder_does_not_grow_with_the_books(tmp_path):
    def peak(n, folder):
        docs = (Document(novel(i, 1500), f'{i:04}') for i in range(n))
        tracemalloc.start()
        overlapping_books(docs, folder=folder, memory=2**17)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found
    overlapping_books([Document(novel(0), 'a')])
    assert peak(45, tmp_path/'b') < peak(15, tmp_path/'a') + 30*3000

def test_settings_that_mean_nothing_are_named():
    for name in ('measure', 'candidates', 'keep'):
        with pytest.raises(UserError, match=f'{name} must be one of'):
            overlapping_books([], BookRules(**{name: 'nothing'}))
    with pytest.raises(UserError, match="two books have the id 'a'"):
        overlapping_books([Document('x', 'a'), Document('y', 'a')])
    assert overlapping_books([]) == {}

# --- RedPajama -----------------------------------------------------------------------------------

@pytest.mark.parametrize('text, value', [                # from simhash 2.1.2 with RedPajama's features
    ('Hello, world', 3508193006778617737), ('', 16825458760271544958), (' ab', 3404963397999061920),
    ('x'*1000 + 'Die Würde des Menschen'*3, 13048465893485279982)])
def test_simhash_is_that_of_the_package(text, value): assert simhash(text) == value

@pytest.mark.parametrize('distance', [0, 1, 5, 9])
def test_near_hashes_are_those_of_all_pairs(distance):
    draw = random.Random(distance)
    hashes = {}
    for i in range(60):
        value = draw.choice([*hashes.values()] or [0])
        for _ in range(draw.randrange(8)): value ^= 1 << draw.randrange(64)
        hashes[f'{i:02}'] = value
    wanted = [(a, b) for a, b in itertools.combinations(hashes, 2)
              if bin(hashes[a] ^ hashes[b]).count('1') <= distance]
    assert [*books._near(hashes, distance)] == wanted

def test_chains_go_as_a_whole_with_simhash_only(monkeypatch):
    "c is near b and b near a: RedPajama removes both, although c is not near a"
    monkeypatch.setattr(books, 'simhash', {'a': 0, 'b': 0b11111, 'c': 0b1111111111}.__getitem__)
    docs = [Document(name, name, 'x') for name in 'abc']
    assert sorted(overlapping_books(docs, preset(BookRules, 'redpajama'))) == ['b', 'c']

def test_measures_disagree_and_in_which_direction():
    "Of a later edition: containment is never below Jaccard, so it never removes less"
    for seed in range(6):
        docs = [doc for doc in shelf_of(seed) if doc.text.strip('.')]
        for a, b in itertools.combinations([shingles(doc.text) for doc in docs], 2):
            assert containment(*sorted((a, b), key=len)) >= jaccard(a, b)
        by_jaccard = overlapping_books(docs, BookRules(measure='jaccard'))
        assert len(by_jaccard) <= len(overlapping_books(docs)), seed
