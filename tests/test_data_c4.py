"""C4's rules beside a second writing of them, in one pass; odd texts."""

import random
from dataclasses import replace
from functools import partial
import pytest
from llama_nb.core import UserError
from llama_nb.data.c4 import (
    ARTICLE,
    C4Rules,
    c4_lines,
    c4_sentences,
    clean_c4,
    clean_c4_duplicates,
    clean_c4_url,
    normal_url,
    page_places,
    unit_places,
)
from llama_nb.data.dedup import first_seen
from llama_nb.data.documents import Document
from llama_nb.data.stage import Stage, preset

LINES = [
    'The quick brown fox jumps over it.',
    'Home | About',
    'Read more.',
    'He said "yes, of course I do"',
    'Wait ...',
    'Please enable JavaScript to see this.',
    'Use JavaScript { now or never.',
    'We use cookies { on this site.',
    'A line with { in its middle.',
    'A brace { without an end',
    'Lorem ipsum dolor sit amet now.',
    'lorem ipsum',
    'A llama[1] is an animal indeed.[citation needed]',
    'Is it so? It is! And how it is.',
    '',
    '   ',
    '[12]',
    'w' * 1001 + ' and four more words.',
    'A darn good line it was.',
    'Darn it all to the end.',
    'darn',
    'שלום לכם כולם היום טוב.',
]


def in_turn(text, rules, bad=None):
    "One pass over the lines that stops at the first reason, as the published code does; None or the text"
    left, n = [], 0
    for line in text.splitlines():
        line = line.strip()
        if any(len(word) > rules.max_word for word in line.split()):
            continue
        for mark in ('[1]', '[12]', '[citation needed]', '[edit]'):
            line = line.replace(mark, '')
        if not line.endswith(('.', '?', '!', '"')) or line.endswith('...'):
            continue
        if len(line.split()) < rules.min_words:
            continue
        if 'lorem ipsum' in line.lower():
            return None
        if 'javascript' in line.lower():
            continue
        if '{' in line:
            return None
        if 'use cookies' in line.lower():
            continue
        if bad and f' {bad} ' in line.lower():
            return None
        n += len(c4_sentences(line))
        left.append(line)
    return '\n'.join(left) if n >= rules.min_sentences else None


@pytest.mark.parametrize('rules', [C4Rules(), C4Rules(min_words=3, min_sentences=5)])
@pytest.mark.parametrize('listed', [False, True])
def test_the_same_pages_stay_as_in_one_pass(rules, listed, tmp_path):
    (tmp_path / 'bad').write_text('darn\n')
    if listed:
        rules = replace(rules, bad_words=str(tmp_path / 'bad'))
    rng, kept = random.Random(0), 0
    for _ in range(1500):
        text = rng.choice(['\n', '\r\n']).join(rng.choices(LINES, k=rng.randrange(8)))
        after, done = clean_c4(Document(text, 'x'), rules)
        expected = in_turn(text, rules, 'darn' if listed else None)
        assert (after.text if after else None) == expected, text
        kept += after is not None
        n_lines = sum(
            d.value
            for d in done
            if d.rule in ('c4.max_word', 'c4.end_mark', 'c4.min_words', 'c4.javascript', 'c4.policy')
        )
        if after:
            assert n_lines + len(after.text.split('\n')) == len(c4_lines(text))
    assert 30 < kept < 1400


def test_the_presets_are_the_published_numbers():
    assert (C4Rules().min_words, C4Rules().min_sentences) == (5, 3) and (
        ARTICLE.min_words,
        ARTICLE.min_sentences,
    ) == (3, 5)
    assert preset(C4Rules, 'redpajama') == preset(C4Rules, 'paper') == C4Rules()
    strict = preset(C4Rules, 'strict')
    assert (strict.min_words, strict.min_sentences, strict.whole_page, strict.word_at_start) == (
        5,
        5,
        True,
        True,
    )


ODD = [
    '',
    '\x00',
    '\n' * 10_000,
    ' ',
    'x' * 10**6,
    'x ' * 10**5,
    '.' * 10**5,
    '?!' * 1000,
    '[1]' * 1000,
    '\ud83d is half a pair of two.',
    'שלום לכם כולם היום טוב. ושוב שלום לכם. ועוד.',
    'e\u0301 ' * 20 + '.',
    '\u2028'.join(LINES),
    '{' * 1000,
    '"\'”)]' * 10_000,
]


@pytest.mark.parametrize('rules', [C4Rules(), ARTICLE, preset(C4Rules, 'strict')])
def test_odd_texts_are_kept_or_removed_and_counted(rules):
    docs = [Document(text, str(i), url=f'http://x/{i}') for i, text in enumerate(ODD)]
    stage = Stage('c4', partial(clean_c4, rules=rules))
    left = [*stage(docs)]
    assert stage.errors == 0 and stage.tally.documents == len(docs) and stage.tally.kept == len(left)
    second = Stage(
        'c4', partial(clean_c4_duplicates, is_first=first_seen(unit_places(left, rules)), rules=rules)
    )
    assert len([*second(left)]) == second.tally.kept and second.errors == 0
    for doc in left:
        assert len(c4_sentences(doc.text)) >= rules.min_sentences
        again, _ = clean_c4(doc, rules)
        assert again and again.text == doc.text  # what was cleaned is clean


def test_sentences_lose_nothing():
    rng = random.Random(2)
    for _ in range(500):
        text = ''.join(rng.choices('ab .?!"\'”)\n', k=rng.randrange(60)))
        assert ''.join(''.join(c4_sentences(text)).split()) == ''.join(text.split())


@pytest.mark.parametrize('line', ['He said: darn', 'darn', 'Darn it all', 'oh darn it', 'darn-it', '(darn)'])
@pytest.mark.parametrize('rules', [ARTICLE, replace(preset(C4Rules, 'strict'), min_sentences=1)])
def test_a_bad_word_anywhere_in_a_line(rules, line, tmp_path):
    (tmp_path / 'bad').write_text('darn\n')
    rules = replace(rules, bad_words=str(tmp_path / 'bad'))
    text = 'This is a line with words. ' * 5
    assert clean_c4(Document(text + '\nMy socks need darning', 'x'), rules)[0]
    assert clean_c4(Document(f'{text}\n{line}\n{text}', 'x'), rules)[0] is None


def test_a_word_list_that_cannot_be_read_stops_the_stage(tmp_path):
    (tmp_path / 'empty').write_text('\n \n')
    (tmp_path / 'latin').write_bytes(b'\xe9\n')
    for name in ('none', 'empty', 'latin'):
        rules = C4Rules(bad_words=str(tmp_path / name))
        with pytest.raises(UserError, match='list of bad words'):
            [
                *Stage('c4', partial(clean_c4, rules=rules))(
                    [Document('A line of five words. Two. Three.', 'x')]
                )
            ]


@pytest.mark.parametrize('unit', ['lines', 'spans'])
def test_one_copy_of_each_unit_stays_in_any_order(unit):
    rules = replace(C4Rules(), unit=unit, min_sentences=0)
    rng = random.Random(3)
    docs = [
        Document(
            '\n'.join(f'Line {rng.randrange(40)} is here now.' for _ in range(6)),
            str(i),
            url=f'http://{i}.org',
        )
        for i in range(40)
    ]
    docs += [replace(doc, id=doc.id + 'b', url=doc.url + '/b') for doc in docs[:10]]

    def clean(docs):
        is_first = first_seen(unit_places(docs, rules))
        return {doc.id: clean_c4_duplicates(doc, is_first, rules)[0].text for doc in docs}

    found = clean(docs)
    assert found == clean(rng.sample(docs, len(docs)))
    if unit == 'lines':
        left = [line for text in found.values() for line in text.split('\n') if line]
        assert sorted(left) == sorted({line for doc in docs for line in doc.text.split('\n')})
    else:
        spans = [
            tuple(x[i : i + 3])
            for x in (text.split('\n') for text in found.values())
            for i in range(len(x) - 2)
        ]
        assert (
            sum(not (found[doc.id] and found[doc.id + 'b']) for doc in docs[:10]) == 10
        )  # of a copy one goes
        assert len(spans) > 50


def test_addresses():
    for a, b in (
        ('http://www.x.org/', 'https://x.org'),
        ('http://x.org/a?utm_medium=1&b=2', 'http://x.org/a'),
    ):
        assert normal_url(a) == normal_url(b)
    assert normal_url('http://x.org/a?b=1') != normal_url('http://x.org/a') and normal_url('') == ''
    docs = [
        Document('t', str(i), url=url) for i, url in enumerate(['http://a', 'https://a/', 'http://b', '', ''])
    ]
    is_first = first_seen(page_places(docs))
    left = [doc.url for doc in docs if clean_c4_url(doc, is_first)[0]]
    assert len(left) == 4 and left[1:] == ['http://b', '', '']
