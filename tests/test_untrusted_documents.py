"Documents that lie: each is written or reported with its place; nothing hangs, grows or is lost in silence."
import gzip, json, os
import pytest
from hostile import DEEP, HUGE, refused
from llama_nb.cli import main
from llama_nb.data.corpus import clean_source
from llama_nb.data.documents import MAX_LINE
from llama_nb.data.pipeline import Models, find_files
from llama_nb.data.sources import Reading, read_documents, text_files
from llama_nb.data.tokenize import tokenise
from llama_nb.data.tokenizer import Tokenizer

pytestmark = [pytest.mark.timeout(60), pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no FIFOs')]

@pytest.fixture(scope='module')
def tokenizer(tokens): return Tokenizer(tokens/'tokenizer.model')

GOOD = {'good.jsonl': '\n'.join(json.dumps({'text': f'a llama of {i} years'}) for i in range(40)),
        'good.txt': 'a llama'}
N_GOOD = 41

def fill(byte, size):
    def write(path):
        with open(path, 'wb') as f:
            for _ in range(size//2**20): f.write(byte*2**20)
    return write

def sparse(path):
    with open(path, 'wb') as f: f.truncate(2**40)

def bomb(path):
    "A thousandfold: 200 kB that are 200 MB"
    with gzip.open(path, 'wb') as f:
        for _ in range(200): f.write(bytes(2**20))

# name -> (content or what makes it, what is said of it)
BAD = {
    'fifo.txt': (os.mkfifo, 'is no plain file'), 'fifo.jsonl.gz': (os.mkfifo, 'is no plain file'),
    'zero.txt': (lambda p: p.symlink_to('/dev/zero'), 'is no plain file'),
    'zero.jsonl': (lambda p: p.symlink_to('/dev/zero'), 'is no plain file'),
    'null.csv': (lambda p: p.symlink_to('/dev/null'), 'is no plain file'),
    'dangling.txt': (lambda p: p.symlink_to('nowhere'), 'is a link to nothing'),
    'loop.md': (lambda p: p.symlink_to('loop.md'), 'is a link to nothing'),
    'folder-link': (lambda p: p.symlink_to(p.parent.parent), 'is a link to a folder'),
    'round': (lambda p: p.symlink_to('.'), 'is a link to a folder'),
    'latin.txt': (b'caf\xe9', 'is not UTF-8: byte 3'),
    'utf16.txt': ('llama'.encode('utf-16'), 'is not UTF-8'),
    'surrogate.txt': (b'\xed\xa0\x80', 'is not UTF-8'), 'overlong.txt': (b'\xc0\x80', 'is not UTF-8'),
    'terabyte.txt': (sparse, 'is almost all holes'), 'terabyte.jsonl': (sparse, 'is almost all holes'),
    'terabyte.csv.gz': (sparse, 'is almost all holes'),
    'long.txt': (fill(b'x', MAX_LINE + 2**20), 'is longer than'),
    'line.jsonl': (fill(b'{', 100*2**20), 'line 1, is longer than'), 'bomb.txt.gz': (bomb, 'grows more than'),
    'nested.jsonl': ('{"text": "a", "b": ' + 300*'[' + 300*']' + '}', 'is nested more than 64 deep'),
    'none.txt.gz': (b'no gzip', 'is cut off or damaged'), 'cut.txt.bz2': (b'BZh9', 'is cut off or damaged'),
    'none.txt.zst': (b'(\xb5/\xfd', 'is cut off or damaged'),
    'deep.jsonl': (DEEP, 'line 1, is not JSON'), 'open.jsonl': ('{"text": "a', 'line 1, is not JSON'),
    'objects.jsonl': (200_000*'{"a":', 'line 1, is not JSON'), 'digits.jsonl': (HUGE, 'line 1, is not JSON'),
    'list.jsonl': ('["text"]', 'is no JSON object'), 'null.jsonl': ('null', 'is no JSON object'),
    'number.jsonl': ('{"text": 3}', 'has no "text"'), 'nothing.jsonl': ('{"text": null}', 'has no "text"'),
    'other.jsonl': ('{"content": "a"}', 'has no "text"'),
    'half.jsonl': ('{"text": "\\ud800"}', 'surrogate pair'),
    'nul.jsonl': (bytes(100), 'line 1, is not JSON'), 'latin.jsonl': (b'{"text": "caf\xe9"}', 'is not JSON'),
    'crowd.jsonl': ('{"text": "a", "b": [' + '{},'*5_000_000 + '{}]}', 'beside its text'),
    'fields.csv': ('text,b\na,b,c', 'line 2, has more or fewer fields'),
    'twice.csv': ('text,text\na,b', 'has several columns "text"'),
    'tags.html': ('<p>'*2_097_152, 'has 2,097,152 tags'),
    'attributes.html': ('<p ' + ' '.join(f'a{i}=1' for i in range(80_000)) + '>', 'more than 500 attributes'),
    'latin.csv': (b'text\ncaf\xe9', 'not UTF-8'),
    'head.csv': ('a,b\n1,2', 'has no column "text"'), 'empty.tsv': ('', 'has no column "text"'),
    'field.csv': (lambda p: p.write_bytes(b'text\n"' + (b'x'*2**20 + b'\n')*64), 'is no row of a table'),
    'deep.html': ('<div>'*100_000, 'cannot be parsed'), 'format.docx': ('PK', 'cannot be read (.docx)'),
    'no-format': ('a', 'without an ending'), os.fsdecode(b'caf\xe9.txt'): (b'\xff', 'is not UTF-8')}

def put(folder, name):
    "Write a bad file; what is said of it"
    what, words = BAD[name]
    if callable(what):
        what(folder/name)
    else:
        (folder/name).write_bytes(what if isinstance(what, bytes) else what.encode())
    return words

@pytest.fixture
def folder(tmp_path):
    (tmp_path/'in').mkdir()
    for name, text in GOOD.items(): (tmp_path/'in'/name).write_text(text)
    return tmp_path/'in'

@pytest.mark.parametrize('name', BAD)
def test_a_bad_file_beside_good_ones(folder, tokenizer, name):
    "Reported with its place, once; the others are written. Without --skip-bad it is refused in one line"
    words, read = put(folder, name), Reading(skip_bad=True)
    files = text_files(folder, read.problem, read.left_out)
    made, reading = tokenise(files, tokenizer, folder.parent/'out', .2, workers=1, skip_bad=True)
    reading.add(read.left_out, read.problems)
    assert sum(s.n_documents for s in made.values()) == reading.documents == N_GOOD
    [problem] = reading.problems
    assert problem.startswith(f'{folder/name}') and words in problem and '\n' not in problem
    refused(lambda: [*read_documents(folder)])

def test_all_of_them_at_once(folder, tokenizer, capsys):
    "The command counts them, and its two lines can be printed"
    for name in BAD: put(folder, name)
    args = ['data', folder.parent/'out', folder, '--tokenizer', tokenizer.path, '--workers', 1, '--skip-bad']
    assert main([str(a) for a in args]) == 0
    out, err = capsys.readouterr()
    assert f'read      {N_GOOD} documents' in out and 'and 10 other kinds' in out
    assert err.count('\n- ') == 19                          # the first twenty of them

# --- raw files of a source ------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['fifo.txt', 'zero.txt', 'dangling.txt', 'folder-link', 'terabyte.txt'])
@pytest.mark.parametrize('source', ['books', 'documents'])
def test_nothing_of_a_source_is_left_out_in_silence(folder, name, source):
    words = put(folder, name)
    assert words in refused(lambda: find_files(source, [folder]))
    assert [*find_files(source, [folder/'*.txt'])] == ['good.txt'] or name == 'terabyte.txt'

@pytest.mark.parametrize('name', [n for n in BAD if n.endswith(('.jsonl', '.txt', '.gz')) and n[:4] not in
                                  ('fifo', 'zero', 'dang', 'tera')])
def test_a_bad_file_among_those_that_are_cleaned(folder, name):
    "It is counted among what could not be read; the others are cleaned"
    words = put(folder, name)
    inputs = find_files('documents', [folder])
    total = clean_source('documents', inputs, folder.parent/'out', models=Models('none', 'none', 'none'))
    assert (total['equal'].kept, total['read'].unread) == (N_GOOD, 1)
    assert words in total['read'].problems[0]
