"Classifiers: determinism, damaged models, text that holds fastText's own signs, and the choice of examples."
import pickle, struct, subprocess, sys
from dataclasses import replace
from functools import partial
from pathlib import Path
import pytest
from conftest import ENV
from llama_nb.core import UserError
from llama_nb.data.documents import Document
from llama_nb.data.stage import Stage, preset
pytest.importorskip('fasttext')
from llama_nb.data.classify import (LANGUAGE_MODEL, MAX_CHARS, FastTextRules, LanguageRules, ReferenceRules,
                                    TextClassifier, clean_language, clean_reference, one_line,
                                    reference_examples, train_classifier)

EXAMPLES = [('en', 'the right of all to life and liberty'), ('de', 'das Recht auf Leben und Freiheit'),
            ('fr', 'le droit à la vie et à la liberté')]*40

@pytest.fixture(scope='module')
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp('lid')/'lid.bin'
    train_classifier(EXAMPLES, path, LANGUAGE_MODEL)
    return path

@pytest.fixture(scope='module')
def lid(path): return TextClassifier(path)

@pytest.mark.parametrize('rules', [LANGUAGE_MODEL, FastTextRules(), FastTextRules(dim=8, word_ngrams=2)])
def test_twice_the_same_file_whatever_the_memory_held(tmp_path, rules):
    files = []
    for name in 'ab':
        waste = [bytes([255])*n for n in range(10, 400_000, 999)]
        del waste
        train_classifier(EXAMPLES, tmp_path/name, rules)
        files.append((tmp_path/name).read_bytes())
    assert files[0] == files[1]

def test_languages_are_told_apart(lid):
    for text, label in (('all the right', 'en'), ('Freiheit und Recht', 'de'), ('la liberté', 'fr')):
        assert next(iter(lid.predict(text))) == label

@pytest.mark.parametrize('share', [0, 1e-7, 1e-6, 2e-6, 3e-6, .1, .5, .999999])
def test_a_cut_model_is_refused_and_does_not_hang(path, tmp_path, share):
    data = path.read_bytes()
    (tmp_path/'cut').write_bytes(data[:int(len(data)*share)])
    with pytest.raises(UserError, match='no fastText classifier'): TextClassifier(tmp_path/'cut')

def number(at, value): # of the settings, which begin at byte 8, and of the dictionary, at byte 64
    def change(data): struct.pack_into('<i', data, at, value)
    return change

def matrix(change):
    "Change the number of rows and of columns of the vectors, or the numbers"
    def found(data):
        at = 92
        for _ in range(struct.unpack_from('<i', data, 64)[0]): at = data.find(b'\0', at) + 10
        change(data, at + 1, *struct.unpack_from('<qq', data, at + 1))
    return found

def turned(data, at, rows, columns): struct.pack_into('<qq', data, at, columns, rows)

def shortened(data, at, rows, columns):
    struct.pack_into('<qq', data, at, 10, columns)
    del data[at + 16 + 40*columns:at + 16 + 4*rows*columns]

def no_numbers(data, at, rows, columns): data[at + 16:at + 16 + 4*columns] = b'\xff'*4*columns

UNTRUE = {'no width': number(8, 0), 'another width': number(8, 17), 'rows of words': number(28, 2**31 - 1),
          'no loss': number(32, 99), 'no bucket': number(40, 0), 'a larger bucket': number(40, 2**31 - 1),
          'long pieces': number(48, 2**31 - 1), 'more words': number(68, 10**9), 'no labels': number(72, 0),
          'rows for columns': matrix(turned), 'ten rows': matrix(shortened), 'NaN': matrix(no_numbers)}

@pytest.mark.timeout(60)
@pytest.mark.parametrize('how', UNTRUE)
def test_a_model_whose_parts_do_not_fit(path, tmp_path, how):
    "It was read beyond its end: a wrong probability, a stack trace, a process that dies or does not end"
    data = bytearray(path.read_bytes())
    UNTRUE[how](data)
    (tmp_path/'m').write_bytes(data)
    with pytest.raises(UserError, match='no fastText classifier|does not work'):
        TextClassifier(tmp_path/'m').predict('the right of all')

@pytest.mark.parametrize('data', [b'\0'*200, b'\xff'*5000, b'PK\3\4' + b'x'*500])
def test_other_files_are_refused(tmp_path, data):
    (tmp_path/'other').write_bytes(data)
    with pytest.raises(UserError): TextClassifier(tmp_path/'other')
    with pytest.raises(UserError, match='cannot read'): TextClassifier(tmp_path/'missing')

def test_a_quantised_model_is_a_model(lid, tmp_path):
    import fasttext
    lines = tmp_path/'lines.txt'
    lines.write_text(''.join(f'__label__{a} {t}\n' for a, t in EXAMPLES))
    model = fasttext.load_model(lid.path)
    model.quantize(input=str(lines), qnorm=True, cutoff=1000, verbose=0)
    model.save_model(str(tmp_path/'q.ftz'))
    assert next(iter(TextClassifier(tmp_path/'q.ftz').predict('the right of all'))) == 'en'

def test_it_travels_to_other_processes(lid):
    assert pickle.loads(pickle.dumps(lid)).predict('the right') == lid.predict('the right')

def test_signs_in_the_text_have_no_power(lid, tmp_path):
    assert lid.predict('</s> __label__de the right of all') == lid.predict('the right of all')
    votes = [(label, f'__label__xx {text} </s> more __label__yy') for label, text in EXAMPLES]
    assert sorted(train_classifier(votes, tmp_path/'m', LANGUAGE_MODEL).labels) == ['de', 'en', 'fr']

ODD = ['', '\n\n', '\0'*9, '\ud83d', 'א\u202eב', 'e\u0301', 'x'*10**7, '</s>', '\u2028']

@pytest.mark.parametrize('text', ODD, ids=range(len(ODD)))
def test_odd_text_gets_an_answer(lid, text):
    assert len(one_line(text).encode()) <= 4*MAX_CHARS
    assert all(0 <= p <= 1 for p in lid.predict(text).values())

def test_no_document_is_lost(lid):
    texts = ['the right of all', 'das Recht', '\ud83d', 'x'*10**5, '12']
    docs = [Document(t, str(i)) for i, t in enumerate(texts)]
    stage = Stage('language', partial(clean_language, classifier=lid))
    kept = [*stage(docs)]
    gone = {e[0] for r in stage.tally.rules.values() for e in r.examples}
    assert {d.id for d in kept} | gone == {d.id for d in docs} and not {d.id for d in kept} & gone
    assert kept[0].language == 'en' and kept[0].metadata['language_score'] > .5 and not docs[0].language

def test_one_label_is_no_choice(tmp_path):
    with pytest.raises(UserError, match='two labels'): train_classifier([('en', 'a')], tmp_path/'m')
    assert not (tmp_path/'m').exists()

def test_examples_of_references_and_redpajamas_four_defects():
    wiki = [Document('cited '*300, f'w{i}') for i in range(3)]
    wiki += [Document('other '*300, 'w9'), Document('stub', 's')]
    cc = [Document(f'page {i} '*300, f'c{i}') for i in range(9)]
    menu = Document('menu', 'm')
    assert [a for a, _ in sorted(reference_examples(wiki, [menu, *cc]))] == ['cc', 'cc', 'wiki', 'wiki']
    assert reference_examples(wiki, cc) == reference_examples(wiki, cc[::-1])   # a sample, not the first
    few = reference_examples(wiki[3:] + cc, wiki[:1])
    assert sorted(label for label, _ in few) == ['cc', 'wiki']  # one of each
    twice = reference_examples([*wiki, *wiki], [*cc, *cc])
    assert twice == reference_examples(wiki, cc)                # equal ids, too
    theirs = reference_examples(wiki, [menu, *cc], preset(ReferenceRules, 'redpajama'))
    assert [a for a, _ in theirs] == ['wiki']*4 + ['cc']*4 and theirs[4][1] == 'menu'

class Fixed:
    def __init__(self, **scores): self.scores = scores
    def predict(self, text, line_break=' '): return self.scores

def test_thresholds_of_the_presets():
    doc = Document('text', 'a')
    def stays(rules, p): return clean_reference(doc, Fixed(cc=1 - p, wiki=p), rules)[0] is not None
    found = [stays(preset(ReferenceRules, n), .3) for n in ('paper', 'redpajama', 'strict')]
    assert found == [False, True, False]
    rounded = [clean_language(doc, Fixed(en=.4951), preset(LanguageRules, n))[0]
               for n in ('paper', 'ccnet')]
    assert rounded[0] is None and rounded[1].language == 'en'
    assert clean_language(doc, Fixed(de=.9), replace(LanguageRules(), languages=('de',)))[0].language == 'de'

AS_IN_TRAINING = '''
import sys
from llama_nb.train.host import keep_freed_memory
from llama_nb.data.classify import FastTextRules, train_classifier
kept = keep_freed_memory()
waste = [b'\\xff'*2**20 for _ in range(80)] + [b'\\xff'*n for n in range(10, 400_000, 500)]
del waste
lines = [('de', 'der die das und ist'), ('en', 'the and of is a')]*50
rules = FastTextRules(dim=16, minn=2, maxn=4, lr=.5, epoch=20)
for name in sys.argv[1:]: train_classifier(lines, name, rules)
'''

def test_memory_that_was_used_before_teaches_nothing(tmp_path):
    "A program may have told the C library to keep what it freed: it holds ones, which are NaN"
    names = [str(tmp_path/n) for n in ('a.bin', 'b.bin')]
    done = subprocess.run([sys.executable, '-c', AS_IN_TRAINING, *names], env=ENV, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    a, b = (Path(name).read_bytes() for name in names)
    assert a == b
