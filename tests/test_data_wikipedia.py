"The cleaner of Wikipedia on text that nobody meant to be wikitext."
import random, time
import pytest
from llama_nb.core import UserError
from llama_nb.data.documents import Document
from llama_nb.data.stage import Stage, n_bytes, preset
from llama_nb.data.wikipedia import LANGUAGES, WikipediaRules, clean_wikipedia, unmatched_marks

pytest.importorskip('mwparserfromhell')

def clean(text, language='en', rules=None):
    return clean_wikipedia(Document(text, 'x', language=language), rules or WikipediaRules())

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

@pytest.mark.parametrize('wikitext, text', [
    ('{{val|2.99792458|e=8|u=m/s}}', '2.99792458×10^8 m/s'), ('{{val|5|ul=km}}', '5 km'), ('{{val|5}}', '5'),
    ('{{convert|6|ft|2|in|m}}', '6 ft 2 in'), ('{{convert|5|km|mi|0}}', '5 km'),
    ('{{convert|5|km|0}}', '5 km'),
    ('{{convert|1|to|2|km}}', '1 to 2 km'), ('{{formatnum:1234567}}', '1234567'),
    ('{{formatnum: {{nowrap|12}} }}', '12'), ('{{formatnum|12}}', '12'),
    ('[[mw:Manual|the manual]]', 'the manual'), ('[[rfc:2616|RFC 2616]]', 'RFC 2616'),
    ('[[doi:10.1/x|this paper]]', 'this paper'), ('[[de:Haus]]', ''), ('[[zh-min-nan:X]]', ''),
    ('[[CSI: Miami]]', 'CSI: Miami'), ('[[doh:X]]', ''), ('[[mwl:X]]', '')])
def test_numbers_and_links_that_are_written_out(wikitext, text):
    assert clean(f'a {wikitext} b')[0].text.split() == ['a', *text.split(), 'b']

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
