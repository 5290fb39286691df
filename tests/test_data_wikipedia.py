"The reader of dumps under damage and attack, and the cleaner on text that nobody meant to be wikitext."
import bz2, io, random, time, tracemalloc
import pytest
from llama_nb.core import UserError
from llama_nb.data.documents import Document
from llama_nb.data.stage import Stage, n_bytes, preset
from llama_nb.data.wikipedia import (LANGUAGES, MAX_PAGE, WikipediaRules, clean_wikipedia, read_wikipedia,
                                     unmatched_marks, write_export)

pytest.importorskip('mwparserfromhell')

def dump(*texts, **options):
    return b''.join(write_export([Document(t, f'Title {i}') for i, t in enumerate(texts)], **options))

def read(data, **options):
    "Texts of the pages, and the reports"
    told = []
    stream = data if hasattr(data, 'read') else io.BytesIO(data)
    docs = [*read_wikipedia(stream, lambda place, why: told.append(f'{place} {why}'), **options)]
    return [d.text for d in docs], told

def clean(text, language='en', rules=None):
    return clean_wikipedia(Document(text, 'x', language=language), rules or WikipediaRules())

SOME = 'plain', 'tabs\tand\nlines', \
    '<b>&amp; "quotes"</b>', 'עברית مرحبا', 'e\u0301a\u030a', '🦙'*9, '</page><page>', ''

# --- the reader ---------------------------------------------------------------------------------

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

# --- the cleaner --------------------------------------------------------------------------------

TOKENS = ['{{', '}}', '[[', ']]', '{|', '|}', '<ref>', '</ref>', '<b>', '</b>', '<div a="', '"',
          '>', '|', '=',
          'a', 'ж', '\n', "''", "'''", '*', '#', ':', ';', '!', '[http://a ', ']', '<!--', '-->',
          '{{{', '}}}',
          '== ', '&amp;', '<nowiki>', '</nowiki>', '<math>', '|-\n', '-{', '}-', '----\n', ' ',
          '<', '(', 'é',
          '\0', '\ud83d', '\ufdd0', '[[File:', '[[Category:', '__TOC__', '<br>', '<li>', '<table>',
          '</table>']

def soups(n):
    rng = random.Random(2)
    for _ in range(n):
        some = rng.sample(TOKENS, rng.choice([1, 2, 4, 8, len(TOKENS)]))
        yield ''.join(rng.choices(some, k=rng.choice([5, 50, 500])))

def test_any_soup_of_marks_is_cleaned_or_removed_and_accounted_for():
    for text in soups(300):
        before = Document(text, 'x', language='en')
        after, decisions = clean_wikipedia(before)
        assert before.text == text
        assert all(d.removed >= 0 for d in decisions if d.rule != 'wikipedia.leftovers')
        if after is None:
            assert decisions[-1].removed == n_bytes(text)
            continue
        assert not set(after.text) & {chr(c) for c in range(0xfdd0, 0xfdf0)} and '\0' not in after.text
        assert n_bytes(text) - n_bytes(after.text) <= sum(d.removed for d in decisions)

def test_documents_in_are_documents_out_and_removed():
    docs = [Document(t, str(i), language='en') for i, t in enumerate(soups(200))]
    docs += [Document('#REDIRECT [[x]]', 'r', language='en'), Document('x', 'l', language='ja')]
    stage = Stage('wikipedia', clean_wikipedia)
    kept = [*stage(docs)]
    removed = [*{d.id for d in docs} - {d.id for d in kept}]
    assert stage.tally.documents == len(docs) == len(kept) + len(removed)
    assert not stage.tally.problems

@pytest.mark.parametrize('text', [
    '{{a|b='*50_000, '[[a|'*50_000, '{{a|'*20_000 + '}}'*20_000, '{|\n'*50_000, '<div a="'*50_000,
    '<b>'*50_000,
    '<!--'*50_000, '[http://a '*50_000, '{{[[<b>{|\n'*20_000, '{{[['*20_000 + '}}]]'*20_000, '<ref>[['*30_000,
    '\n'*300_000, ' '*10**6, '('*300_000, '( '*300_000, "'"*300_000, '='*300_000, '__A'*100_000, '-{'*100_000,
    '*'*5_000, '|'*300_000, '!a\n'*100_000, '[['*9 + 'a'*10**6], ids=lambda text: repr(text[:12]))
def test_time_is_bounded(text):
    start = time.perf_counter()
    clean(text)
    assert time.perf_counter() - start < 100

@pytest.mark.parametrize('text', ['Plain prose, with 3 < 4 and a > b.', 'f() and g(x); a[0] = {1}',
                                  'שלום (עולם)',
                                  'e\u0301 a\u030a', 'One.\n\nTwo.', 'a | b', "rock 'n' roll, it's",
                                  'x = 1', 'λ → ∞ 🦙'])
def test_prose_without_marks_is_left_alone(text): assert clean(text)[0].text == text

def test_cleaning_is_idempotent_on_what_it_made():
    text = "'''A''' [[b|c]] {{d}}\n* e\n== f ==\ng <code>x()</code><ref>h</ref> ({{i}})"
    once = clean(text)[0].text
    assert clean(once)[0].text == once

def test_agrees_with_the_parsers_own_stripping_where_that_is_right():
    "Links, styles, references of simple kind, templates and comments, at any nesting"
    parse = pytest.importorskip('mwparserfromhell').parse
    rng = random.Random(3)
    def some(depth):
        if not depth: return rng.choice(['one', 'two', 'three'])
        inner = some(depth - 1)
        return rng.choice([f'[[x|{inner}]]', f"''{inner}''", f'{inner} <!-- {inner} -->',
                           f'{inner} {{{{t|{inner}}}}}',
                           f'<small>{inner}</small>', f'{inner} {some(depth - 1)}',
                           f'[http://a.org {inner}]'])
    rules = preset(WikipediaRules, 'redpajama')
    for _ in range(300):
        text = some(5)
        assert clean(text, rules=rules)[0].text.split() == parse(text).strip_code().split(), text

@pytest.mark.parametrize('language', LANGUAGES)
def test_pictures_and_categories_in_every_language(language):
    names = LANGUAGES[language]
    for word in names.files | names.categories:
        for written in (word, word.upper(), f' {word} '):
            assert clean(f'a [[{written}:X y.jpg|thumb|the [[b]] c]] d', language)[0].text == 'a d'

def test_unmatched_marks_by_brute_force():
    "Against a search for the nearest partner, on short texts of two kinds of brackets"
    def slow(text):
        marks, removed = [text[i:i + 2] for i in range(0, len(text), 2)], 0
        stack = []
        for mark in marks:
            if mark in ('{{', '[['):
                stack.append(mark)
            elif (partner := {'}}': '{{', ']]': '[['}[mark]) in stack:
                last = len(stack) - 1 - stack[::-1].index(partner)
                removed += len(stack) - 1 - last
                del stack[last:]
        return removed + len(stack)
    rng = random.Random(4)
    for _ in range(500):
        text = ''.join(rng.choices(['{{', '}}', '[[', ']]'], k=12))
        if '{{{' in text or ']]]' in text: continue
        assert unmatched_marks(text) == slow(text), text

def test_a_missing_parser_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'mwparserfromhell', None)
    with pytest.raises(UserError, match=r"pip install 'llama_nb\[data\]'"): clean('a')

def test_a_parser_that_fails_is_reported_and_the_page_left_out(monkeypatch):
    import mwparserfromhell
    def fails(text): raise mwparserfromhell.parser.ParserError('broken')
    monkeypatch.setattr(mwparserfromhell, 'parse', fails)
    stage = Stage('wikipedia', clean_wikipedia)
    assert [*stage([Document('a', 'enwiki/1', language='en')])] == []
    assert stage.tally.unread == 1 and 'enwiki/1 ParserError' in stage.tally.problems[0]
