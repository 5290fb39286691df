"The reader of MediaWiki dumps under damage and attack."
import bz2, io, random, time, tracemalloc
import pytest
from llama_nb.core import UserError
from llama_nb.data.documents import Document
from llama_nb.data.mediawiki import MAX_PAGE, read_wikipedia, write_export

def dump(*texts, **options):
    return b''.join(write_export([Document(t, f'Title {i}') for i, t in enumerate(texts)], **options))

def read(data, **options):
    "Texts of the pages, and the reports"
    told = []
    stream = data if hasattr(data, 'read') else io.BytesIO(data)
    docs = [*read_wikipedia(stream, lambda place, why: told.append(f'{place} {why}'), **options)]
    return [d.text for d in docs], told

SOME = 'plain', 'tabs\tand\nlines', \
    '<b>&amp; "quotes"</b>', 'עברית مرحبا', 'e\u0301a\u030a', '🦙'*9, '</page><page>', ''

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be'])
def test_every_text_comes_back_in_every_encoding(encoding):
    assert read(dump(*SOME).decode().encode(encoding)) == ([*SOME], [])

def test_what_is_written_is_what_an_xml_parser_reads():
    "lxml reads the whole file as one document"
    etree = pytest.importorskip('lxml.etree')
    root = etree.fromstring(dump(*SOME))
    space = '{' + root.nsmap[None] + '}'
    assert [t.text or '' for t in root.iter(f'{space}text')] == [*SOME]

@pytest.mark.parametrize('size', [1, 7, 64, 4096])
def test_any_size_of_pieces_gives_the_same(size):
    class Slow(io.BytesIO):
        def read1(self, n=-1): return super().read1(size)
    assert read(Slow(dump(*SOME).decode().encode('utf-16'))) == ([*SOME], [])

def test_one_byte_costs_one_page_at_most():
    "Wherever a byte is spoilt, at most one page is missing, and then it is reported"
    whole, rng = dump(*(f'text number {i}' for i in range(6))), random.Random(0)
    first = whole.index(b'<page>')
    for _ in range(400):
        place = rng.randrange(first, len(whole) - len(b'</mediawiki>'))
        spoilt = whole[:place] + bytes([rng.choice([0, 1, 60, 38, 255])]) + whole[place + 1:]
        texts, told = read(spoilt)
        assert len(texts) >= 4, (place, texts)              # two, if it stood in the mark between them
        assert len(texts) == 6 or told, place

def test_cut_anywhere_gives_what_is_whole_and_says_so():
    whole = dump(*(f'text {i}' for i in range(4)))
    ends = [i + 7 for i in range(len(whole)) if whole.startswith(b'</page>', i)]
    for cut in range(whole.index(b'<page>'), len(whole) - 12, 5):
        texts, told = read(whole[:cut])
        assert (len(texts), len(told)) == (sum(end <= cut for end in ends), 1)

def test_damaged_bz2_gives_the_pages_before_it(tmp_path):
    rng = random.Random(1)
    texts = [''.join(rng.choices('abcdefgh ', k=3000)) for _ in range(900)]
    data = bytearray(bz2.compress(dump(*texts)))
    data[-2000] ^= 255
    path = tmp_path/'x.xml.bz2'
    path.write_bytes(data)
    told = []
    kept = [d.text for d in read_wikipedia(path, lambda *t: told.append(t))]
    assert kept == texts[:len(kept)] and len(kept) > 500
    assert len(told) == 1 and 'damaged' in told[0][1]
    with pytest.raises(UserError, match='damaged'): [*read_wikipedia(path)]

def test_entities_are_never_expanded():
    "Billion laughs in the head, quadratic blow-up, and an external file"
    levels = ''.join(f'<!ENTITY a{i} "{f"&a{i - 1};"*10}">' for i in range(1, 10))
    head = f'<!DOCTYPE x [<!ENTITY a0 "ha">{levels}<!ENTITY f SYSTEM "file:///etc/passwd">]>'.encode()
    pages = dump('fine', 'LAUGH', 'FILE', 'fine too')
    data = head + pages.replace(b'LAUGH', b'&a9;').replace(b'FILE', b'&f;')
    start = time.perf_counter()
    texts, told = read(data)
    assert texts == ['fine', 'fine too'] and len(told) == 2
    assert time.perf_counter() - start < 100

class Endless:
    "A stream of which only a piece exists at a time"
    def __init__(self, before, filler, times, after): self.parts = self.make(before, filler, times, after)

    def make(self, before, filler, times, after):
        yield before
        for _ in range(times): yield filler
        yield after
        while True:
            yield b''

    def read(self, n=-1): return next(self.parts)

    def __enter__(self): return self

    def __exit__(self, *error): pass

@pytest.mark.parametrize('filler', [b'x'*2**20, b'<a>'*2**18, b'&lt;'*2**18],
                         ids=['line', 'elements', 'entities'])
def test_a_page_of_100_megabytes_is_passed_over_in_little_memory(filler):
    whole = dump('before', 'LONG', 'after')
    before, after = whole.split(b'LONG')
    tracemalloc.start()
    try:
        texts, told = read(Endless(before, filler, 10**8//len(filler), after))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert texts == ['before', 'after'] and len(told) == 1 and 'page 2, is longer' in told[0]
    assert peak < 6*MAX_PAGE

def test_100_megabytes_of_something_else_are_refused():
    for filler in (b'x'*2**20, b'<a>'*2**18):
        assert 'is no MediaWiki export' in read(Endless(b'', filler, 100, b''))[1][0]

def test_a_page_of_too_many_elements_and_pages_without_parts_are_reported():
    many = dump('a').replace(b'<ns>', b'<x/>'*20_000 + b'<ns>')
    assert 'thousands of elements' in read(many)[1][0]
    for part in (b'title', b'id'):
        data = dump('a').replace(b'<' + part + b'>', b'<other>').replace(b'</' + part + b'>', b'</other>')
        assert read(data)[0] == [] and 'has no title' in read(data)[1][0]

@pytest.mark.parametrize('data', [b'', b'\0', b'\xff\xfe', b'<', b'<mediawiki', b'{"text": 1}', bytes(2**16)])
def test_what_is_no_dump_is_one_report(data):
    texts, told = read(data)
    assert texts == [] and len(told) == 1

def test_the_last_revision_counts():
    old = b'<revision><id>0</id><text>old</text></revision>'
    assert read(dump('new').replace(b'<revision>', old + b'<revision>', 1))[0] == ['new']
