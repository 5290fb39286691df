"Text of one's own: formats, compressed or not; sources; and no document that is neither read nor counted."
import bz2, csv, gzip, io, json, lzma, os, random, sys
import pytest
from llama_nb.cli import main
from llama_nb.commands.run import read_prompts
from llama_nb.core import UserError
from llama_nb.data.documents import zstd_module
from llama_nb.data.formats import read_file
from llama_nb.data.sources import Reading, read_documents, text_files
from llama_nb.data.tokenize import tokenise
from llama_nb.data.tokenizer import Tokenizer
from llama_nb.run_file import read_toml

PACKERS = {'': bytes, '.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress,
           '.zst': lambda data: zstd_module().compress(data)}

@pytest.fixture(scope='module')
def tokenizer(tokens): return Tokenizer(tokens/'tokenizer.model')

# --- any mixture: documents in = documents written + documents left out --------------------------

WORDS = ['sheep', 'Wörter', '日本語', '"', ',', '\t', '\n', "'", '🐑', ' ', '<b>', '&amp;', '\r\n']

def some_text(rng): return ''.join(rng.choices(WORDS, k=rng.randint(1, 30))) + str(rng.random())

def json_file(rng, texts):
    rows = [json.dumps({'text': text, 'n': 1}, ensure_ascii=rng.random() < .5) for text in texts]
    return '\n'.join(rows).encode()

def table_file(delimiter):
    "As Python's `csv` writes it"
    def write(rng, texts):
        out = io.StringIO(newline='')
        rows = csv.writer(out, delimiter=delimiter, lineterminator=rng.choice(('\n', '\r\n')))
        rows.writerows([('id', 'text'), *((rng.random(), text) for text in texts)])
        return out.getvalue().encode()
    return write

BAD_LINES = {'.jsonl': [b'{"text": ', b'[]', b'{"id": "x"}', b'{"text": "\\ud800"}', b'{"text": "\xff"}'],
             '.csv': [b'1,2,3', b'1', b'1,caf\xe9', b'1,"a"b'], '.tsv': [b'1\t2\t3', b'1', b'1\tcaf\xe9']}
LINES = {'.jsonl': json_file, '.csv': table_file(','), '.tsv': table_file('\t')}
WHOLE = {'.txt': b'caf\xe9', '.rst': b'\xff', '.html': b'<div>'*4000}

def lines_file(rng, kind):
    "(content, good texts, bad ones) of a file of many documents, the bad ones at its end"
    texts = [some_text(rng) for _ in range(rng.randint(0, 6))]
    bad = rng.choices(BAD_LINES[kind], k=rng.choice((0, 0, 1, 3)))
    data = LINES[kind](rng, texts).rstrip(b'\r\n')
    return b'\n'.join([data, *bad]), texts, len(bad)

def some_file(rng, folder):
    "Write a file; (good texts, how many documents of it must be reported)"
    kind, pack = rng.choice([*LINES, *WHOLE, '.docx']), rng.choice([*PACKERS])
    path = folder/rng.choice('ab')/f'{rng.random()}{kind}{pack}'
    path.parent.mkdir(exist_ok=True)
    if kind in LINES:
        data, texts, bad = lines_file(rng, kind)
    else:
        bad, texts = rng.choice((0, 1)), [f'{rng.random()}']
        data = WHOLE.get(kind, b'') if bad else texts[0].encode()
        if bad or kind == '.docx': bad, texts = 1, []
    path.write_bytes(PACKERS[pack](data))
    return texts, bad

@pytest.mark.parametrize('seed', range(12))
def test_every_document_is_written_or_reported(tmp_path, tokenizer, seed):
    rng = random.Random(seed)
    made = [some_file(rng, tmp_path) for _ in range(30)]
    texts, bad = [text for found, _ in made for text in found], sum(n for _, n in made)
    read = Reading(skip_bad=True)
    files = text_files(sorted(tmp_path.iterdir()), read.problem, read.left_out)
    workers = rng.choice((1, 2))
    shards, reading = tokenise(files, tokenizer, tmp_path/'out', .5, 200, workers, 500, skip_bad=True)
    reading.add(read.left_out, read.problems)
    assert sum(s.n_documents for s in shards.values()) == reading.documents == len(texts)
    assert (reading.unread, reading.left_out.total()) == (bad, bad) and len(reading.problems) == min(bad, 20)
    assert sorted(d.text for d in read_documents(files_of(files), lambda place, why: None)) == sorted(texts)
    if bad:
        with pytest.raises(UserError): [*read_documents([tmp_path/'a', tmp_path/'b'])]

def files_of(files): return [path for _, path in files]

@pytest.mark.parametrize('pack', ['.gz', '.bz2', '.xz', '.zst'])
@pytest.mark.parametrize('kind', [*LINES])
def test_of_a_file_that_is_cut_off_the_beginning_is_read_and_the_rest_is_named(tmp_path, kind, pack):
    rng = random.Random(kind)
    texts = [f'{rng.random()}'*3 for _ in range(20_000)]
    whole = PACKERS[pack](LINES[kind](rng, texts))
    path = tmp_path/f'cut{kind}{pack}'
    path.write_bytes(whole[:len(whole)*3//4])
    told = []
    found = [d.text for d in read_file(path, path.name, lambda place, why: told.append(f'{place} {why}'))]
    lost = found != texts[:len(found)]                       # the last row may have been cut, too
    assert len(found) - lost < len(texts) and found[:len(found) - 1] == texts[:len(found) - 1]
    assert f'{path.name} was not read to its end' in told[-1] and '(damaged after line ' in told[-1]
    with pytest.raises(UserError, match=f'{path.name} is cut off or damaged'): [*read_file(path, path.name)]

MARK = '\ufeff'.encode()

@pytest.mark.parametrize('kind, data', [
    ('.txt', 'Wörter\r\n'), ('.py', '# é\n'), ('.html', '<p>Wörter</p>'), ('.csv', 'text\nWörter\n'),
    ('.csv', '"text","id"\n"Wörter","1"\n'), ('.tsv', 'n\ttext\n1\tWörter\n'),
    ('.jsonl', '{"text": "Wörter"}\n{"text": "é"}\n')])
def test_a_byte_order_mark_is_no_text(tmp_path, kind, data):
    "Nor is a file that has one and is damaged told of a wrong place"
    (tmp_path/f'plain{kind}').write_bytes(data.encode())
    (tmp_path/f'marked{kind}').write_bytes(MARK + data.encode())
    plain, marked = ([*read_file(tmp_path/f'{name}{kind}', f'x{kind}')] for name in ('plain', 'marked'))
    assert plain == marked and plain
    (tmp_path/'bad.txt').write_bytes(MARK + b'caf\xe9')
    with pytest.raises(UserError, match='byte 6, in line 1, is 0xe9'): [*read_documents(tmp_path/'bad.txt')]

def test_files_with_byte_order_marks_may_be_joined_and_cut(tmp_path, tokenizer):
    "What a worker sees as its first line may be any"
    rows = [json.dumps({'text': f'text {i}'}).encode() + b'\n' for i in range(40)]
    (tmp_path/'a.jsonl').write_bytes(MARK + MARK.join(rows) + MARK)
    for unit in (100, 10**6):
        out = tmp_path/f'{unit}'
        made, reading = tokenise(tmp_path/'a.jsonl', tokenizer, out, .3, workers=1, unit_bytes=unit)
        assert (reading.documents, reading.unread) == (40, 0)
        assert sum(s.n_bytes for s in made.values()) == sum(len(f'text {i}') for i in range(40))

def test_a_byte_order_mark_hides_no_long_line(tmp_path):
    row = b'{"x": [' + b'{},'*2**21 + b'{}], "text": ""}\n'
    (tmp_path/'a.jsonl').write_bytes(MARK + row)
    with pytest.raises(UserError, match='bytes beside its text'): [*read_documents(tmp_path/'a.jsonl')]

def test_prompts_and_run_files_with_a_byte_order_mark(tmp_path):
    (tmp_path/'prompts.txt').write_bytes(MARK + b'The\r\nA\n')
    (tmp_path/'run.toml').write_bytes(MARK + b'out = "runs/x"\n')
    assert read_prompts(tmp_path/'prompts.txt') == ['The', 'A']
    assert read_toml(tmp_path/'run.toml') == {'out': 'runs/x'}

# --- Parquet --------------------------------------------------------------------------------------

def write_parquet(path, columns, **settings):
    pq, pa = pytest.importorskip('pyarrow.parquet'), pytest.importorskip('pyarrow')
    pq.write_table(pa.table(columns), path, **settings)

@pytest.mark.parametrize('settings', [{}, {'row_group_size': 7}, {'compression': 'gzip'}])
def test_parquet_is_what_pyarrow_has_written(tmp_path, tokenizer, settings):
    texts = [f'text {i} 🐑' for i in range(200)]
    columns = {'n': [*range(200)], 'body': [*texts[:-1], None], 'url': [f'http://x/{i}' for i in range(200)]}
    write_parquet(tmp_path/'a.parquet', columns, **settings)
    told = []
    docs = [*read_file(tmp_path/'a.parquet', 'a.parquet', lambda *said: told.append(said), 'body')]
    assert [d.text for d in docs] == texts[:-1] and docs[3].url == 'http://x/3' and not docs[3].metadata
    [(place, why)] = told
    assert place.endswith('a.parquet, row 200,') and why.startswith('has no "body"')
    made, reading = tokenise(tmp_path/'a.parquet', tokenizer, tmp_path/'out', workers=1, text_key='body',
                             skip_bad=True)
    assert sum(s.n_documents for s in made.values()) == 199 and reading.unread == 1
    with pytest.raises(UserError, match=r'no column "text"; .*\(n, body, url\)'):
        [*read_documents(tmp_path/'a.parquet')]
    data = (tmp_path/'a.parquet').read_bytes()
    for damaged in (data[:-20], data[:100] + bytes(200) + data[300:], b'PAR1'):
        (tmp_path/'a.parquet').write_bytes(damaged)
        with pytest.raises(UserError) as e: [*read_documents(tmp_path/'a.parquet', text_key='body')]
        assert 'a.parquet' in str(e.value) and '\n' not in str(e.value)

def test_parquet_without_pyarrow_is_one_line_and_no_bad_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    (tmp_path/'a.parquet').write_bytes(b'PAR1')
    with pytest.raises(UserError, match=r"pip install 'llama_nb\[parquet\]'"):
        text_files(tmp_path, lambda place, why: None)

# --- sources ---------------------------------------------------------------------------------------

@pytest.fixture
def folders(tmp_path):
    for name in ('a/1.txt', 'a/2.md', 'b/1.txt', 'b/c/3.txt', 'b/.git/config', '.hidden.txt'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text(name)
    return tmp_path

def names(*args, **more): return [name for name, _ in text_files(*args, **more)]

def test_a_name_does_not_depend_on_where_the_folder_lies(folders):
    assert names(folders/'b') == ['1.txt', 'c/3.txt']
    assert names(folders) == ['a/1.txt', 'a/2.md', 'b/1.txt', 'b/c/3.txt']
    (folders/'b').rename(folders/'moved')
    assert names([folders/'moved', folders/'a'/'2.md']) == ['1.txt', 'c/3.txt', '2.md']

def test_equal_names_of_two_sources_are_told_apart_and_no_file_is_read_twice(folders, monkeypatch):
    monkeypatch.chdir(folders)
    assert names(['b', 'a']) == ['1.txt', 'c/3.txt', 'a/1.txt', '2.md']
    assert names(['a', 'a/1.txt', './a', str(folders/'a')]) == ['1.txt', '2.md']
    (folders/'a'/'link.txt').symlink_to(folders/'a'/'1.txt')
    assert len(names('a')) == 2

def test_no_two_files_have_a_name_and_a_source_behind_changes_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('a/x/b.txt', 'x/b.txt', 'y/b.txt', 'y/x/b.txt', 'z/stdin.jsonl'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text(name)
    for sources in ('a x y', 'x y a', 'y a x z -', '- z */*.txt a y'):
        sources = sources.split()
        found = text_files(sources)
        assert len({name for name, _ in found}) == len({path for _, path in found}) == len(found)
        for n in range(1, len(sources)):
            before = text_files(sources[:n])
            if '-' not in sources[n:]: assert before == found[:len(before)]
    assert names(['a', 'x', 'y']) == ['x/b.txt', 'b.txt', 'y/b.txt', 'y/x/b.txt']
    assert names(['z', '-']) == ['z/stdin.jsonl', 'stdin.jsonl']

@pytest.mark.parametrize('pattern, wanted', [
    ('**/*.txt', ['a/1.txt', 'b/1.txt', 'b/c/3.txt']), ('b/*', ['1.txt', 'c/3.txt']), ('[ab]/2*', ['a/2.md']),
    ('b/c/?.txt', ['3.txt'])])
def test_patterns(folders, monkeypatch, pattern, wanted):
    monkeypatch.chdir(folders)
    assert names(pattern) == wanted

def test_what_cannot_be_looked_into_is_reported(folders, monkeypatch):
    (folders/'gone.txt').symlink_to(folders/'nowhere')
    (folders/'round').symlink_to(folders)
    os.mkfifo(folders/'pipe.txt')
    locked, closed = str(folders/'b'/'c'), str(folders/'a'/'1.txt')
    real = os.scandir
    def scandir(path):
        if str(path) == locked: raise PermissionError(13, 'Permission denied', str(path))
        return real(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    monkeypatch.setattr(os, 'access', lambda path, mode: str(path) != closed)
    reading = Reading(skip_bad=True)
    assert names(folders, reading.problem, reading.left_out) == ['a/2.md', 'b/1.txt']
    why = {'is a link to nothing': 1, 'is a link to a folder': 1, 'is no plain file': 1, 'cannot be read': 2,
           'is hidden': 2}
    assert reading.left_out == why
    for place in (locked, closed, str(folders/'gone.txt'), str(folders/'round'), str(folders/'pipe.txt')):
        assert any(problem.startswith(place + ' ') for problem in reading.problems)
    with pytest.raises(UserError, match='--skip-bad'): text_files(folders, Reading().problem)

# --- the commands ----------------------------------------------------------------------------------

@pytest.fixture
def texts(tmp_path):
    (tmp_path/'texts').mkdir()
    for i in range(40): (tmp_path/'texts'/f'{i}.txt').write_text(f'text number {i} of forty')
    return tmp_path/'texts'

def said(capsys, *args):
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err

def test_formats_that_are_not_known_are_counted_before_anything_is_read(texts, tokens, tmp_path, capsys):
    for name in ('a.docx', 'b.docx', 'c'): (texts/name).touch()
    args = 'data', tmp_path/'out', texts, '--tokenizer', tokens/'tokenizer.model', '--workers', 1
    code, _, err = said(capsys, *args)
    assert code == 2 and 'no reader for 3 of 43 files (2 .docx, 1 without an ending)' in err
    assert err.count('\n') == 1 and not (tmp_path/'out').exists()
    code, out, err = said(capsys, *args, '--skip-bad')
    assert code == 0 and 'read      40 documents in 40 files' in out
    assert '2 x is of a format that cannot be read (.docx)' in out
    assert f'- {texts/"a.docx"} is of a format' in err

def test_skip_bad_decides_nothing_where_all_can_be_read(texts, tokens, tmp_path, capsys):
    "So a job that was refused goes on with it; and what it has left out does not pass without it"
    args = 'data', tmp_path/'out', texts, '--tokenizer', tokens/'tokenizer.model', '--workers', 1
    assert said(capsys, *args)[0] == said(capsys, *args, '--skip-bad')[0] == 0
    (texts/'x.txt').write_bytes(b'\xff')
    other = 'data', tmp_path/'other', *args[2:]
    assert said(capsys, *other, '--skip-bad')[0] == 0
    code, _, err = said(capsys, *other)
    assert code == 2 and 'x.txt is not UTF-8' in err and '--skip-bad' in err
    assert said(capsys, *other, '--skip-bad')[0] == 0

def test_another_column_is_another_job(tmp_path, tokens, capsys):
    (tmp_path/'a.csv').write_text('a,b\n' + ''.join(f'one {i},two {i}\n' for i in range(60)))
    args = ('data', tmp_path/'out', tmp_path/'a.csv', '--tokenizer', tokens/'tokenizer.model', '--workers', 1,
            '--held-out', .2)
    code, _, err = said(capsys, *args)
    assert code == 2 and 'a.csv has no column "text"' in err and '(a, b)' in err
    assert not (tmp_path/'out').exists()                    # so the next try needs no other folder
    assert said(capsys, *args, '--text-key', 'b')[0] == 0
    code, _, err = said(capsys, *args, '--text-key', 'a')
    assert code == 2 and 'text_key' in err and 'another job' in err

@pytest.mark.parametrize('sources', [['.'], ['texts'], ['texts/**/*'], ['text*', 'texts/1.txt']])
def test_a_result_within_a_source_is_no_text(texts, tokens, monkeypatch, capsys, sources):
    "So the same command goes on, wherever its folder lies"
    monkeypatch.chdir(texts.parent)
    args = 'data', 'texts/out', *sources, '--tokenizer', tokens/'tokenizer.model', '--workers', 1
    first, again = said(capsys, *args), said(capsys, *args)
    assert first == again and first[0] == 0 and 'read      40 documents in 40 files' in first[1]
    for out in ('.', 'texts'):
        code, _, err = said(capsys, 'data', out, out, *args[-4:])
        assert code == 2 and f'{out} is the folder of the result, and a source' in err
    assert {p.name for p in texts.iterdir()} == {f'{i}.txt' for i in range(40)} | {'out'}

def test_text_in_the_folder_of_the_result_is_not_passed_over(texts, tokens, monkeypatch, capsys):
    monkeypatch.chdir(texts.parent)
    tail = '--tokenizer', tokens/'tokenizer.model', '--workers', 1
    code, _, err = said(capsys, 'data', 'texts', '.', *tail)
    assert code == 2 and 'choose a new folder for the result' in err and err.count('\n') == 1
    (texts/'a').mkdir()
    (texts/'1.txt').rename(texts/'a'/'1.txt')
    inner = 'data', 'texts', 'texts/a', 'texts/2*', *tail, '--held-out', .5     # all of it lies in there
    assert said(capsys, *inner) == said(capsys, *inner) and said(capsys, *inner)[0] == 0

def test_standard_input_gives_the_shards_of_a_file_and_leaves_no_copy(texts, tokens, tmp_path, capsys,
                                                                      monkeypatch):
    lines = ''.join(json.dumps({'body': p.read_text(), 'id': p.name}) + '\n' for p in sorted(texts.iterdir()))
    (tmp_path/'file').mkdir()
    (tmp_path/'file'/'stdin.jsonl').write_text(lines)
    tail = '--tokenizer', tokens/'tokenizer.model', '--workers', 1, '--text-key', 'body'
    outs = []
    for out, source in (('one', '-'), ('two', tmp_path/'file'), ('one', '-')):
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(lines.encode())))
        assert said(capsys, 'data', tmp_path/out, source, *tail)[0] == 0
        outs.append({p.name: p.read_bytes() for p in (tmp_path/out/'train').iterdir()})
    assert outs[0] == outs[1] == outs[2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'one', 'texts', 'two']
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'text\n' + b'some text\n'*50)))
    assert said(capsys, 'tokenizer', tmp_path/'new.model', '-', '--stdin', 'csv', '--vocab-size', 270)[0] == 0
    assert Tokenizer(tmp_path/'new.model').vocab_size == 270

@pytest.mark.parametrize('args, words', [
    (('tokenizer', 'new.model'), 'name the text: llama-nb tokenizer new.model SOURCES'),
    (('data', 'new', '--tokenizer', 'TOK'), 'name the text: llama-nb data new SOURCES'),
    (('tokenizer', 'texts', 'new.model'), 'llama-nb tokenizer new.model texts'),
    (('data', 'texts', 'new', '--tokenizer', 'TOK'), 'llama-nb data new texts'),
    (('tokenizer', 'new.model', 'python', 'texts'), 'is read alone'),
    (('tokenizer', 'new.model', 'texts', 'nowhere'), 'there is no file or folder nowhere'),
    (('tokenizer', 'new.model', 'texts', '--documents', 'texts'), "unknown setting 'documents'"),
    (('data', 'new', '-', '--stdin', 'docx', '--tokenizer', 'TOK'), 'no reader for 1 of 1 files (1 .docx)')])
def test_mistakes_are_one_line(texts, tokens, monkeypatch, capsys, args, words):
    monkeypatch.chdir(texts.parent)
    code, _, err = said(capsys, *(tokens/'tokenizer.model' if a == 'TOK' else a for a in args))
    assert code == 2 and words in err and err.count('\n') == 1, err
    assert [p.name for p in texts.parent.iterdir()] == ['texts']

def test_behind_a_quotation_mark_that_is_never_closed_nothing_is_taken_for_rows(tmp_path, monkeypatch):
    monkeypatch.setattr('llama_nb.data.formats.MAX_LINE', 1000)
    (tmp_path/'open.csv').write_text('text\na llama\n"' + 'and a sheep\n'*500)
    told = []
    docs = [*read_file(tmp_path/'open.csv', 'open.csv', lambda *said: told.append(said))]
    assert [d.text for d in docs] == ['a llama'] and len(told) == 1
    assert 'line 3,' in told[0][0] and 'never closed' in told[0][1]

def test_parquet_that_grows_or_has_a_long_text(tmp_path):
    "A megabyte that 100,000 rows share would be 100 GB of tokens"
    pa = pytest.importorskip('pyarrow')
    shared = pa.DictionaryArray.from_arrays(pa.array([0]*100_000, pa.int32()), pa.array(['x'*10**6]))
    write_parquet(tmp_path/'shared.parquet', {'text': shared})
    with pytest.raises(UserError, match='grows more than'): [*read_documents(tmp_path/'shared.parquet')]
    write_parquet(tmp_path/'zeros.parquet', {'text': ['0'*2**25]}, compression='zstd', use_dictionary=False)
    with pytest.raises(UserError, match='grows more than'): [*read_documents(tmp_path/'zeros.parquet')]
    write_parquet(tmp_path/'long.parquet', {'text': ['y'*(2**26 + 1), 'a llama']}, compression='none')
    told = []
    docs = [*read_file(tmp_path/'long.parquet', 'long.parquet', lambda *said: told.append(said))]
    assert [d.text for d in docs] == ['a llama'] and 'longer than' in told[0][1]
    write_parquet(tmp_path/'longer.parquet', {'text': ['y'*(2**26 + 2**10)]}, compression='none')
    with pytest.raises(UserError, match='texts of 67,1'): [*read_documents(tmp_path/'longer.parquet')]
    write_parquet(tmp_path/'lists.parquet', {'text': ['a llama'], 'id': [[1]*1000]})
    assert len([*read_documents(tmp_path/'lists.parquet')][0].id) == 32

def test_parquet_with_bad_text_or_two_columns(tmp_path):
    "What `pyarrow` raises, which is no error of its own, is a line too; the other rows are read"
    pa = pytest.importorskip('pyarrow')
    texts = pa.array([b'\xff\xfe', b'a llama'], pa.binary()).view(pa.string())
    write_parquet(tmp_path/'bad.parquet', {'text': texts})
    told = []
    docs = [*read_file(tmp_path/'bad.parquet', 'bad.parquet', lambda *said: told.append(said))]
    assert [d.text for d in docs] == ['a llama'] and len(told) == 1 and 'row 1' in told[0][0]
    pq = pytest.importorskip('pyarrow.parquet')
    pq.write_table(pa.table([['a'], ['b']], ['text', 'text']), tmp_path/'two.parquet')
    with pytest.raises(UserError, match='several columns "text"'): [*read_documents(tmp_path/'two.parquet')]
    pq.write_table(pa.table([['a'], ['b'], ['c']], ['text', 'id', 'id']), tmp_path/'ids.parquet')
    assert [d.text for d in read_documents(tmp_path/'ids.parquet')] == ['a']
    pq.write_table(pa.table({'text': pa.nulls(14_000_000, pa.string())}), tmp_path/'nulls.parquet')
    with pytest.raises(UserError, match='grows more than'): [*read_documents(tmp_path/'nulls.parquet')]
