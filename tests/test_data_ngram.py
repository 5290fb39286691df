"The n-gram model: sums, order and damage, ARPA files that lie, and odd text in the cleaner."
import json, random
from fractions import Fraction
from functools import partial
import numpy as np
import pytest
from llama_nb.core import UserError
from llama_nb.data.documents import Document
from llama_nb.data.ngram import (BOS, NgramRules, PerplexityRules, clean_perplexity, fit_cutoffs, load_ngrams,
                                 normalise, perplexity, read_arpa, sentences_of, train_ngrams, write_arpa)
from llama_nb.data.stage import Stage

def noise(seed, lines=30):
    rng = random.Random(seed)
    return [[f'w{min(int(rng.expovariate(.5)), 9)}' for _ in range(rng.randrange(8))] for _ in range(lines)]

@pytest.fixture(scope='module')
def model(): return train_ngrams(noise(0), NgramRules(order=4))

@pytest.fixture
def arpa(model, tmp_path):
    write_arpa(model, tmp_path/'m.arpa')
    return tmp_path/'m.arpa'

@pytest.mark.parametrize('seed, order', [(seed, order) for seed in range(3) for order in (1, 2, 3, 5)])
def test_probabilities_add_up_to_one_after_every_context(seed, order):
    model, rng = train_ngrams(noise(seed), NgramRules(order=order)), random.Random(seed)
    words = [i for i in model.vocab.values() if i != BOS]
    for _ in range(25):
        context = [rng.choice([BOS, *words])] + [rng.choice(words) for _ in range(rng.randrange(4))]
        total = sum(10**model.token_scores(np.array([*context, w]))[-1] for w in words)
        assert total == pytest.approx(1, abs=1e-5)

def test_a_bigram_by_hand():
    "a b, a b, a c: by hand. Of the bigrams 2, 2, 1, 0 have counts 1 to 4, so Y = 1/3, D = 1/3, 3/2, 3"
    model = train_ngrams([['a', 'b'], ['a', 'b'], ['a', 'c']], NgramRules(order=2))
    got = 10**model.token_scores(model.encode([['a', 'b']]))[2]
    # adjusted: </s> 2, a 1, b 1, c 1, of 5, by the fallback 1 + 3/2 are taken; 5 tokens without <s>
    b = Fraction(1, 2)/5 + Fraction(5, 2)/5*Fraction(1, 5)
    assert got == pytest.approx(float(Fraction(1, 2)/3 + (Fraction(3, 2) + Fraction(1, 3))/3*b), rel=1e-6)

def test_sentences_do_not_touch(model):
    s = noise(7, 9)
    whole, n = model.total(s)
    assert whole == pytest.approx(sum(model.total([x])[0] for x in s)) and n == sum(len(x) + 1 for x in s)

def test_training_stops_at_the_limit():
    def endless():
        while True:
            yield ['a', 'b', 'c']
    assert train_ngrams(endless(), NgramRules(max_tokens=1000)).vocab.keys() >= {'a', 'b', 'c'}

def test_nothing_to_learn_from():
    with pytest.raises(UserError, match='no text'): train_ngrams([])

def test_special_tokens_in_the_text_are_no_signs():
    model = train_ngrams([['a', '<s>', 'b', '</s>', '<unk>']]*3, NgramRules(order=3))
    assert list(model.vocab) == ['<unk>', '<s>', '</s>', 'a', 'b']
    assert model.total([['</s>', 'a']])[1] == 3 and model.total([['<s>']])[0] < -.1

@pytest.mark.parametrize('seed', range(4))
def test_written_and_read_it_is_the_same(seed, tmp_path):
    odd = ['\u3000', '\x85x', 'שלום', 'e\u0301\u202e']
    model = train_ngrams([*noise(seed), odd], NgramRules(order=seed + 1))
    write_arpa(model, tmp_path/'m')
    back = read_arpa(tmp_path/'m')
    assert list(back.vocab) == list(model.vocab)
    for part in ('keys', 'logs', 'backoffs'):
        a, b = getattr(model, part), getattr(back, part)
        assert len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))

def test_a_file_that_is_cut_off_anywhere_is_refused(arpa):
    whole = arpa.read_bytes()
    for end in [*range(0, 60), *range(60, len(whole) - 2, 97), *range(len(whole) - 8, len(whole) - 1)]:
        arpa.write_bytes(whole[:end])
        with pytest.raises(UserError): read_arpa(arpa)

@pytest.mark.parametrize('old, new', [('ngram 1=', 'ngram 1=9'), ('\\3-grams:', '\\4-grams:'),
                                      ('\tw1\t', '\tw0\t'), ('\tw1', '\tw1 w2 w3 w4 w5'),
                                      ('\n-', '\nnan'), ('\tw1', '\t\udcff')])
def test_a_file_that_lies_is_refused(arpa, old, new):
    text = arpa.read_text()
    assert old in text
    arpa.write_text(text.replace(old, new, 1), errors='surrogateescape')
    with pytest.raises(UserError): read_arpa(arpa)

def test_a_file_without_unk_and_with_blanks_is_read_as_kenlm_does(tmp_path):
    lines = ['\\data\\', 'ngram 1=4', 'ngram 2=1', '', '\\1-grams:', '-99 <s> -0.5', '-1 </s>',
             '-0.5 a -0.25', '-2 b', '', '\\2-grams:', '-0.125 a b', '', '\\end\\', '']
    (tmp_path/'m').write_text('\n'.join(lines))
    model = read_arpa(tmp_path/'m')
    assert model.token_scores(model.encode([['a', 'b', 'zzz']])).tolist() == [0, -1, -.125, -100, -1]

def test_a_kenlm_binary_needs_kenlm(tmp_path):
    try:
        import kenlm  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match='pip install kenlm'): load_ngrams(tmp_path/'en.arpa.bin')

def test_kenlm_gives_the_same_scores(model, arpa):
    kenlm = pytest.importorskip('kenlm')
    judge = kenlm.Model(str(arpa))
    for s in [*noise(3), ['zzz', 'w1']]:
        assert judge.score(' '.join(s)) == pytest.approx(model.total([s])[0], abs=1e-4)

ODD = ['', ' \n ', '\0'*50, '\ud83d', 'אבג דהו', 'e\u0301'*40, '１２３', 'x'*10**6, '<s> </s> <unk>',
       '\u2028\x85']

def test_odd_documents_are_judged_and_none_is_lost(model):
    stage = Stage('perplexity', partial(clean_perplexity, model=model, tokenise=str.split))
    kept = [*stage(Document(t, str(i)) for i, t in enumerate(ODD))]
    removed = sum(r.documents for name, r in stage.tally.rules.items())
    assert stage.tally.documents == len(ODD) and not stage.tally.unread
    assert len(kept) + removed >= len(ODD) - 1              # the empty one has no bytes to remove

def test_no_document_has_a_perplexity_that_json_cannot_hold(model):
    every = PerplexityRules(keep=('head', 'middle', 'tail'))
    for text in ODD:
        doc, decisions = clean_perplexity(Document(text, 'odd'), model, str.split, every)
        json.dumps([d.value for d in decisions], allow_nan=False)
        if doc: json.dumps(doc.metadata, allow_nan=False)
    doc, (decision,) = clean_perplexity(Document('\u0301\u0301', 'accents'), model, str.split, every)
    assert doc is None and decision.rule == 'perplexity.no_tokens' and decision.removed == 4

def test_sentences_shorter_than_the_order():
    model, trigrams = (train_ngrams([['a'], ['b']], NgramRules(order=n)) for n in (5, 3))
    assert [len(keys) for keys in model.keys[3:]] == [0, 0]
    for sentence in (['a'], ['a', 'b'], ['b', 'b', 'a', 'c', 'a', 'b'], []):
        assert model.total([sentence]) == trigrams.total([sentence])
        assert np.isfinite(model.total([sentence])[0])

def test_normalising_what_cc_net_normalises():
    assert normalise('É１a\n「x」…') == 'e0a"x"...'
    assert sentences_of('a b\n\nc', str.split) == [['a', 'b'], ['c']]
    assert sentences_of('a b\nc', str.split, '') == [['a', 'bc']]

def test_cut_offs_are_percentiles(model):
    rules = fit_cutoffs(range(101))
    assert (rules.head, rules.tail) == (30, 60)
    with pytest.raises(UserError): fit_cutoffs([float('inf')])
    assert perplexity(model, []) == float('inf')
    low = clean_perplexity(Document('w0 w0', 'a'), model, str.split, PerplexityRules(keep=('tail',)))
    assert low[0] is None and low[1][0].rule == 'perplexity.head' and low[1][0].removed == 5
