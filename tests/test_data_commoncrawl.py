"""Web archives that are damaged, and CCNet's deduplication of lines. `warcio` writes what is read,
and is the judge where nothing is damaged."""

import gzip, io, random, tracemalloc
from collections import Counter
from functools import partial
import pytest

pytest.importorskip('warcio')
pytest.importorskip('selectolax')
from warcio.archiveiterator import ArchiveIterator
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter
from llama_nb.core import UserError
from llama_nb.data.archive import MAX_RECORD, decode_html, html_text, read_warc
from llama_nb.data.commoncrawl import CCNetRules, clean_ccnet, keep_lines, line_keys, normal_line
from llama_nb.data.documents import Document
from llama_nb.data.stage import Stage, preset


def record(i, body, kind='response', sent=(), status='200 OK', packed=True):
    "One record, as a gzip member or plain"
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=packed)
    http = StatusAndHeaders(status, [('Content-Type', 'text/html'), *sent], 'HTTP/1.1')
    http = http if kind in ('response', 'revisit') else None
    url = f'http://localhost/{i}'
    writer.write_record(writer.create_warc_record(url, kind, io.BytesIO(body), len(body), http_headers=http))
    return out.getvalue()


def page(i):
    return f'<title>{i}</title><p>Page {i} has {random.Random(i).getrandbits(4000)} in it.'.encode()


def read(data):
    "Numbers of the pages, and what was reported"
    told = []
    docs = [*read_warc(io.BytesIO(data), lambda place, why: told.append(f'{place} {why}'))]
    numbers = [doc.url.removeprefix('http://localhost/') for doc in docs]
    return [int(n) if n.isdigit() else -1 for n in numbers], told


@pytest.mark.parametrize('packed', [True, False])
def test_every_kind_of_damage_takes_its_record_and_no_other(packed):
    rng, records = random.Random(0), [record(i, page(i), packed=packed) for i in range(12)]
    assert read(b''.join(records)) == ([*range(12)], [])
    for _ in range(150):
        i, bad = rng.randrange(12), None
        whole = records[i]
        at = rng.randrange(len(whole))
        kind = rng.choice(
            ['flip', 'cut out', 'cut off', 'junk'] if packed else ['cut out', 'cut off', 'junk']
        )
        if kind == 'flip':
            bad = whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
        if kind == 'cut out':
            bad = whole[:at] + whole[at + rng.randrange(1, 60) :]
        if kind == 'cut off':
            bad = whole[:at]
        if kind == 'junk':
            bad = whole[:at] + rng.randbytes(rng.randrange(1, 60)) + whole[at:]
        found, told = read(b''.join([*records[:i], bad, *records[i + 1 :]]))
        # in a plain file a cut may leave its neighbours without the line break between them
        missing = set(range(12)) - {i} - set(found)
        assert len(missing) <= (0 if packed else 1), (kind, at, found, told)
        if not packed:
            continue  # nothing but the lengths can tell
        assert told or i in found or not bad, (kind, at, found, told)


def test_all_that_came_in_is_given_or_skipped_or_reported(tmp_path):
    parts = [record(i, page(i)) for i in range(4)]
    parts += [
        record(4, b'', 'revisit'),
        record(5, b'GET / HTTP/1.1\r\n\r\n', 'request'),
        record(6, b'x', 'metadata'),
    ]
    parts += [
        record(7, page(7), status='404 Not Found'),
        record(8, b'\x89PNG', sent=[('Content-Type', 'image/png')]),
    ]
    parts += [record(9, b'', status='200 OK')]
    path = tmp_path / 'a.warc.gz'
    path.write_bytes(b''.join(parts))
    with open(path, 'rb') as f:
        kinds = Counter(r.rec_type for r in ArchiveIterator(f))
    assert sum(kinds.values()) == len(parts)
    docs = [*read_warc(path)]
    assert [doc.url[-1] for doc in docs] == ['0', '1', '2', '3', '8', '9']  # 8 says first that it is HTML
    assert len({doc.id for doc in docs}) == 6 and {doc.source for doc in docs} == {'a.warc.gz'}
    assert [doc.id for doc in docs] == [doc.id for doc in read_warc(path)]


@pytest.mark.parametrize(
    'data',
    [
        b'',
        b'\n\n',
        b'no archive',
        b'\x1f\x8b\x08',
        gzip.compress(b'', mtime=0),
        bytes(10**5),
        b'WARC/1.0',
        b'WARC/1.0\r\n\r\n',
        b'WARC/1.0\r\nContent-Length: 5\r\n\r\nab',
        b'WARC/1.0\r\nContent-Length: -5\r\n\r\n',
        gzip.compress(gzip.compress(b'WARC/', mtime=0), mtime=0),
    ],
)
def test_what_is_no_archive_gives_nothing_and_at_most_one_report(data):
    found, told = read(data)
    assert found == [] and len(told) == (0 if data in (b'', b'\n\n', gzip.compress(b'', mtime=0)) else 1)


def test_the_strict_report_stops_and_names_the_place(tmp_path):
    path = tmp_path / 'a.warc.gz'
    path.write_bytes(record(0, page(0)) + record(1, page(1))[:-9])
    with pytest.raises(UserError, match='a.warc.gz, record 2,'):
        [*read_warc(path)]
    with pytest.raises(UserError, match='there is no file'):
        [*read_warc(tmp_path / 'none.warc.gz')]


class Endless(io.RawIOBase):
    "A head, as many bytes as it is told, and a tail, made as they are read"

    def __init__(self, head, n, tail):
        self.parts, self.left, self.tail, self.name = head, n, tail, 'endless'

    def read(self, n=-1):
        if self.parts:
            given, self.parts = self.parts, b''
            return given
        if self.left:
            given = min(n, self.left)
            self.left -= given
            return b'x' * given
        given, self.tail = self.tail, b''
        return given


@pytest.mark.parametrize('length', ['110000000', '9' * 18, 'x'])
def test_a_line_of_a_hundred_megabytes_is_never_held(length):
    tail = b'\r\n\r\n' + record(1, page(1), packed=False)
    head = f'WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: {length}\r\n\r\n'.encode()
    told = []
    tracemalloc.start()
    docs = [*read_warc(Endless(head, 110_000_000, tail), lambda place, why: told.append(why))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [doc.url for doc in docs] == ['http://localhost/1'] and len(told) == 1 and peak < 5e6


def test_bombs_are_refused_within_bounded_memory():
    inner = b'WARC/1.0\r\nWARC-Type: response\r\nContent-Length: 60000000\r\n\r\n' + bytes(60_000_000)
    outer = gzip.compress(inner)
    coded = gzip.compress(bytes(10**8))  # the server's own compression
    data = (
        outer
        + record(1, page(1))
        + record(2, coded, sent=[('Content-Encoding', 'gzip')])
        + record(3, page(3))
    )
    del inner
    tracemalloc.start()
    found, told = read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [1, 3] and len(told) == 2 and '200-fold' in told[0] and peak < 4 * MAX_RECORD


def test_bodies_that_were_sent_compressed_or_in_chunks():
    zipped = [('Content-Encoding', 'gzip')]
    chunked = b'5\r\n<p>Pa\r\n6\r\nge one\r\n0\r\n\r\n'
    data = (
        record(0, gzip.compress(b'<p>Page one'), sent=zipped)
        + record(1, b'<p>Page one', sent=zipped)
        + record(2, chunked, sent=[('Transfer-Encoding', 'chunked')])
        + record(3, b'\x1b\x03', sent=[('Content-Encoding', 'br')])
        + record(4, gzip.compress(page(4))[:100] + bytes(50), sent=zipped)
    )
    told = []
    docs = [*read_warc(io.BytesIO(data), lambda place, why: told.append(why))]
    assert [doc.text for doc in docs[:3]] == ['Page one'] * 3
    assert any('encoded as br' in why for why in told)


def test_wet_keeps_its_text_and_gives_the_title_apart():
    text = 'Title\n\n אבג e\u0301 \x00\nWARC/1.0\nlast'
    data = (
        record(0, text.encode(), 'conversion')
        + record(1, b'\xff\xfe', 'conversion')
        + record(2, b'', 'conversion')
    )
    told = []
    docs = [*read_warc(io.BytesIO(data), lambda place, why: told.append(why))]
    assert [(doc.text, doc.metadata['title']) for doc in docs] == [
        ('אבג e\u0301 \x00\nWARC/1.0\nlast', 'Title'),
        ('', ''),
    ]
    assert len(told) == 1 and 'utf-8' in told[0]


def test_any_bytes_are_a_page():
    rng = random.Random(1)
    for _ in range(300):
        data = bytes(rng.choices(b'<>/abp &;="\'!-\x00\xe9\xff\n', k=rng.randrange(200)))
        for charset in ('', 'utf-8', 'utf-16', 'shift_jis', 'no-such', 'idna'):
            text, title = html_text(decode_html(data, charset))
            assert '' not in text.split('\n') or not text


# --- CCNet --------------------------------------------------------------------------------------


def pages(seed, n=30):
    "Pages of lines that are partly shared"
    rng = random.Random(seed)
    lines = [f'Line {chr(97 + i % 26)}{"z" * (i // 26)}.' for i in range(60)] + ['', '…', '  ']
    return [
        Document('\n'.join(rng.choices(lines, k=rng.randrange(1, 20))), f'{i:03}', f'{rng.randrange(4)}')
        for i in range(n)
    ]


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('keep_first', [False, True])
@pytest.mark.parametrize('scopes', [1, 3])
def test_which_lines_stay(seed, keep_first, scopes):
    "Beside a count of lines; in no order of reading does the result change"
    docs = pages(seed)
    rules = CCNetRules(min_length=5, keep_first=keep_first, scopes=scopes)

    def clean(docs):
        keeps = keep_lines(lambda: iter(docs), rules)
        return {doc.id: after.text for doc in docs if (after := clean_ccnet(doc, keeps, rules)[0])}

    found = clean(docs)
    assert found == clean(docs[::-1])
    scope = {doc.id: line_keys(Document('x', '', doc.source), rules)[0][:2] for doc in docs}
    holders = {}
    for doc in docs:
        if len(doc.text) < 5:
            continue
        for line in {normal_line(x) for x in doc.text.split('\n')}:
            holders.setdefault((scope[doc.id], line), []).append(doc.id)
    for doc in docs:
        left = []
        for line in doc.text.split('\n') if len(doc.text) >= 5 else []:
            who = holders[scope[doc.id], normal_line(line)]
            mine = min(who) == doc.id if keep_first else who == [doc.id]
            if normal_line(line) and mine and normal_line(line) not in map(normal_line, left):
                left.append(line)
        assert found.get(doc.id, '') == '\n'.join(left)


def test_documents_are_kept_or_removed_and_counted():
    docs = pages(7) + [
        Document('', 'empty'),
        Document('\x00', 'nul'),
        Document('\ud83d' * 400, 'half a pair'),
        Document('x' * 10**6, 'long'),
        Document('\n' * 1000, 'blank'),
    ]
    for rules in (CCNetRules(), CCNetRules(min_length=0), preset(CCNetRules, 'strict')):
        keeps = keep_lines(lambda: docs, rules)
        stage = Stage('ccnet', partial(clean_ccnet, keeps=keeps, rules=rules))
        kept = [*stage(docs)]
        assert stage.errors == 0 and stage.tally.documents == len(docs) and stage.tally.kept == len(kept)
        assert all(doc.text.strip() for doc in kept)


def test_normalising_is_stable_and_as_in_cc_net():
    assert normal_line(' ABC 123, １2\t“x”… ') == 'abc 000, 00x'
    assert normal_line('…»') == '' and normal_line('a.') != normal_line('a')
    strict = preset(CCNetRules, 'strict')
    assert normal_line('É.', strict) == normal_line('E\u0301', strict) == 'e'
    for line in ('שלום 12', 'e\u0301\u202e', '٣', 'İ'):
        assert normal_line(normal_line(line)) == normal_line(line)


def test_a_copy_of_a_page_takes_both_with_it_or_one():
    docs = [Document('A page of some length.\nAnd more.', i) for i in 'ab']
    for keep_first, left in ((False, []), (True, ['a'])):
        rules = CCNetRules(min_length=1, keep_first=keep_first)
        keeps = keep_lines(lambda: docs, rules)
        assert [doc.id for doc in docs if clean_ccnet(doc, keeps, rules)[0]] == left
