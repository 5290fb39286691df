"Each of the seven sources from raw files to documents, killed and resumed, refused and redone."
import gzip, io, json, multiprocessing, os, random, shutil, signal, sys, tarfile, time
from dataclasses import dataclass, replace
from pathlib import Path
from xml.sax.saxutils import quoteattr
import pytest
from llama_nb.core import UserError
from llama_nb.data import corpus, pipeline, report
from llama_nb.data.corpus import clean_source
from llama_nb.data.documents import Document, text_id, write_jsonl
from llama_nb.data.engine import summary
from llama_nb.data.mediawiki import write_export
from llama_nb.data.pipeline import DOCUMENTS, SOURCES, Models, find_files, make_plan
from llama_nb.data.report import result_text
from llama_nb.data.sources import read_documents
from llama_nb.data.stage import PRESETS, choice

NONE = Models('none', 'none', 'none')
PROSE = ['The river rises in the hills and flows past the old mill.',
         'A bridge of stone was built there long ago.',
         'Every spring the water carries away some of the bank.',
         'Nobody has counted the fish that live in it.',
         'The miller told us that the wheel has not turned for years.']

def prose(seed, n=5):
    rng = random.Random(seed)
    def year(): return f'in the year {rng.randrange(1000, 2000)} of {text_id(str(rng.random()))}'
    return ' '.join(f'{rng.choice(PROSE)[:-1]} {year()}.' for _ in range(n))

def wet(pages):
    def record(i, text):
        body = text.encode()
        about = {'WARC-Type': 'conversion', 'WARC-Target-URI': f'http://example.org/{i}',
                 'WARC-Record-ID': f'<urn:uuid:{i}>', 'Content-Type': 'text/plain',
                 'Content-Length': len(body)}
        head = '\r\n'.join(['WARC/1.0', *(f'{k}: {v}' for k, v in about.items()), '', ''])
        return gzip.compress(head.encode() + body + b'\r\n\r\n', mtime=0)
    return b''.join(record(i, text) for i, text in pages.items())

def tar(files, mode='w'):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()

def lines(rows): return gzip.compress('\n'.join(map(json.dumps, rows)).encode(), mtime=0)

def posts(first):
    def row(**values):
        return '<row ' + ' '.join(f'{k}={quoteattr(str(v))}' for k, v in values.items()) + ' />\n'
    question = f'<p>{prose(first, 1)}</p>'
    rows = row(Id=first, PostTypeId=1, Score=3, Title=f'Question {first}', Body=question)
    rows += row(Id=first + 1, PostTypeId=2, ParentId=first, Score=9, Body='<p>Nine</p>')
    rows += row(Id=first + 2, PostTypeId=2, ParentId=first, Score=10, Body='<p>Ten</p>')
    return f'<?xml version="1.0" encoding="utf-8"?>\n<posts>\n{rows}</posts>'.encode()

MENU, BOOK = 'Home About Contact Imprint of this site', '\n\n'.join(prose(i, 8) for i in range(30))
FRAME = ('The Project Gutenberg eBook\n\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\n{}\n\n'
         '*** END OF THE PROJECT GUTENBERG EBOOK X ***\nlicence\n')
CODE = 'def increment(argument):\n    return argument + increase\n' * 3
MIT = b'[project]\nname = "x"\nlicense = "MIT"\n'
HEADER = '# Copyright 2020 {}. Licensed under the MIT License.\n\n'
PAPER = r'\documentclass{article}\begin{document}Front\section{One}Text %d. %% no' + '\n' + r'\end{document}'

def raw_commoncrawl(folder):
    for k in 'ab':
        pages = {f'{k}{i}': f'Title {k}{i}\n{MENU}\n{prose(k + str(i))}' for i in range(4)}
        write(folder/f'{k}.warc.wet.gz', wet(pages))

def raw_c4(folder):
    page = {i: {'url': f'http://example.org/{i}', 'text': '\n'.join(prose(i, 1) for i in range(9*i, 9*i + 6))}
            for i in range(4)}
    write(folder/'c4-train.00000-of-00002.json.gz', lines([page[0], page[1]]))
    shared = {'url': 'http://example.org/9', 'text': page[1]['text'] + '\nToo short.\n' + page[3]['text']}
    write(folder/'c4-train.00001-of-00002.json.gz', lines([page[0], page[2], shared]))

def raw_github(folder):
    for k, licence in {'a': MIT, 'b': MIT, 'c': MIT.replace(b'MIT', b'GPL-3.0-only')}.items():
        code = HEADER.format(k) + CODE
        write(folder/k/'x.tar.gz', tar({'x/pyproject.toml': licence, 'x/f.py': code.encode(),
                                        f'x/{k}.py': f'{CODE}\n{k} = "{text_id(k)}"\n'.encode()}, 'w:gz'))

def raw_wikipedia(folder):
    for k in 'ab':
        pages = [Document(f"'''{k}''' is a [[letter]]. {prose(k)}", k),
                 Document('#REDIRECT [[a]]', f'to {k}', metadata={'redirect': 'a'})]
        write(folder/f'{k}.xml', b''.join(write_export(pages)))

def raw_books(folder):
    write(folder/'1.txt', FRAME.format(BOOK).encode())
    write(folder/'more'/'1.txt', FRAME.format(BOOK[:-200]).encode())
    other = '\n\n'.join(prose(i, 8) for i in range(100, 120))
    write(folder/'more'/'2.txt', FRAME.format(other).encode())

def raw_arxiv(folder):
    papers = {f'2212/2212.0000{i}.gz': gzip.compress((PAPER % i).encode(), mtime=0) for i in range(3)}
    write(folder/'arXiv_src_2212_001.tar', tar(papers))

def raw_stackexchange(folder):
    for i, site in enumerate(['math.stackexchange.com', 'cooking.stackexchange.com']):
        write(folder/site/'Posts.xml', posts(10*i + 1))

def raw_documents(folder):
    for k in range(3):
        rows = [{'text': prose(100*k + i, 2)} for i in range(20)] + [{'text': 'equal'}]*2
        write(folder/f'{k}.jsonl.gz', lines(rows))

def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)

RAW = {name.removeprefix('raw_'): make for name, make in list(globals().items()) if name.startswith('raw_')}
KEPT = {'commoncrawl': 8, 'c4': 4, 'github': 3, 'wikipedia': 2, 'books': 2, 'arxiv': 3, 'stackexchange': 2,
        'documents': 61}                                    # documents that stay
TOOK = {'commoncrawl': 'ccnet.repeated', 'c4': 'c4.same_url', 'github': 'github.copy',
        'books': 'books.overlap', 'wikipedia': 'wikipedia.redirect',
        'documents': 'documents.equal'}                     # a rule that takes something

@pytest.fixture(scope='module')
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp('raw')
    for name, make in RAW.items(): make(folder/name)
    return folder

def run(raw, source, out, **more):
    return clean_source(source, find_files(source, [raw/source]), out, **{'models': NONE, **more})

def contents(out):
    reports = (out/name for name in ('manifest.json', 'report.md', 'report.html'))
    found = [*sorted((out/'documents').rglob('*.zst')), *reports]
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in found}

def texts(out): return {d.id: d.text for d in read_documents(out/'documents')}

def test_the_sources_are_those_of_table_1():
    assert [*SOURCES] == ['commoncrawl', 'c4', 'github', 'wikipedia', 'books', 'arxiv', 'stackexchange']
    assert {*RAW} == {*SOURCES, 'documents'}

@pytest.mark.parametrize('source', RAW)
def test_a_source_from_its_raw_files_to_documents(raw, tmp_path, source):
    total = run(raw, source, tmp_path/'out')
    names = [*total]
    assert names[0] == 'read' and total[names[-1]].kept == KEPT[source]
    for before, after in zip(names, names[1:]):             # nothing is lost between the stages
        assert total[before].kept == total[after].documents
        assert total[before].bytes_out == total[after].bytes_in
    for tally in total.values():
        assert tally.documents >= tally.kept and tally.unread == 0
    rules = {name: rule for tally in total.values() for name, rule in tally.rules.items()}
    if source in TOOK: assert rules[TOOK[source]].documents > 0
    written = [*read_documents(tmp_path/'out'/'documents')]
    assert len(written) == KEPT[source]
    assert not any(key.startswith(' ') for doc in written for key in doc.metadata)      # of the passes
    before = contents(tmp_path/'out'), corpus.is_finished(tmp_path/'out')
    assert run(raw, source, tmp_path/'out') == total        # and nothing is done again
    assert (contents(tmp_path/'out'), corpus.is_finished(tmp_path/'out')) == before
    assert SOURCES.get(source, DOCUMENTS).title in (tmp_path/'out'/'report.html').read_text()
    assert f'{KEPT[source]:,}' in summary(total)

def test_what_is_in_the_documents(raw, tmp_path):
    for source in RAW: run(raw, source, tmp_path/source)
    crawl, books, code = (texts(tmp_path/s) for s in ('commoncrawl', 'books', 'github'))
    assert not any(MENU in text for text in crawl.values())
    assert books.keys() == {'1.txt', '2.txt'} and not any('Gutenberg' in text for text in books.values())
    assert BOOK[:500] in books['1.txt']                     # the longer one stays
    assert code['x.tar.gz/x/f.py'] == CODE                  # two with other headers are one
    for text in texts(tmp_path/'stackexchange').values():
        assert 'Score' not in text and text.index('Ten') < text.index('Nine')
    for text in texts(tmp_path/'arxiv').values():
        assert text.startswith('\\section{One}') and '% no' not in text
    pages = [*read_documents(tmp_path/'c4'/'documents')]
    urls = [d.url for d in pages]
    assert sorted(urls) == [f'http://example.org/{i}' for i in (0, 1, 2, 9)]
    lines_of = [line for d in pages for line in d.text.split('\n')]
    assert len(lines_of) == len(set(lines_of)) and 'Too short.' not in lines_of

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    pytest.importorskip('fasttext')
    from llama_nb.data.classify import LANGUAGE_MODEL, FastTextRules, train_classifier
    from llama_nb.data.ngram import NgramRules, normalise, train_ngrams, write_arpa
    from llama_nb.data.tokenizer import train_tokenizer
    folder = tmp_path_factory.mktemp('models')
    german = 'Der Fluss kommt aus den Bergen und fließt an der alten Mühle vorbei, die niemand mehr benutzt.'
    def examples(a, b, other): return [e for i in range(30) for e in ((a, PROSE[i % 5]), (b, other))]
    train_classifier(examples('en', 'de', german), folder/'lid.bin', replace(LANGUAGE_MODEL, lr=1.))
    train_classifier(examples('wiki', 'cc', 'buy cheap now click here'), folder/'ref.bin',
                     FastTextRules(lr=.5, epoch=25))
    tokens = train_tokenizer((prose(i) for i in range(40)), folder/'en.model', 400)
    write_arpa(train_ngrams((tokens.pieces(normalise(p)) for i in range(20) for p in prose(i).split('. ')),
                            NgramRules(order=2)), folder/'en.arpa')
    (folder/'en.json').write_text('{"head": 1e6, "tail": 1e7}')
    return Models(str(folder/'lid.bin'), str(folder/'en.arpa'), str(folder/'ref.bin'))

def test_the_models_of_commoncrawl(raw, tmp_path, models):
    german = 'Der Fluss kommt aus den Bergen und fließt an der alten Mühle vorbei. ' * 8
    spam = 'buy cheap now click here ' * 20
    pages = {'de': german, 'spam': spam, 'en': prose('en')}
    write(tmp_path/'in'/'c.wet.gz', wet({k: f'Title\n{text}' for k, text in pages.items()}))
    files = find_files('commoncrawl', [raw/'commoncrawl', tmp_path/'in'])
    total = clean_source('commoncrawl', files, tmp_path/'out', models=models)
    assert [*total] == ['read', 'lines', 'language', 'perplexity', 'references']
    assert total['language'].rules['language.other'].documents >= 1
    kept = texts(tmp_path/'out')
    assert 'en' in kept and not {'de', 'spam'} & kept.keys()
    about = next(read_documents(tmp_path/'out'/'documents')).metadata
    assert {'language_score', 'perplexity', 'reference_score'} <= about.keys()
    moved = tmp_path/'models'
    moved.mkdir()
    for p in Path(models.language).parent.iterdir(): (moved/p.name).write_bytes(p.read_bytes())
    same = Models(*(str(moved/name) for name in ('lid.bin', 'en.arpa', 'ref.bin')))
    again = clean_source('commoncrawl', files, tmp_path/'out', models=same)
    assert again == total                                   # known by content, not by name
    (moved/'en.json').write_text('{"head": 2, "tail": 3}')
    with pytest.raises(UserError, match='another job .*head'):
        clean_source('commoncrawl', files, tmp_path/'out', models=same)

@pytest.mark.parametrize('preset', PRESETS)
def test_every_preset_of_every_source_has_a_plan(preset, models):
    for source in RAW:
        plan = make_plan(source, preset, models, 100)
        assert plan.steps and not plan.notes

def test_a_preset_may_say_how_many_files_are_compared(monkeypatch):
    @dataclass(frozen=True)
    class Smaller(pipeline.OrderRules): group:int = choice(50, 'files', 'ccnet', ccnet=10)
    def groups(preset):
        _, clean, _ = make_plan('commoncrawl', preset, NONE, 100).steps[0]
        return clean.keywords['rules'].scopes
    monkeypatch.setattr(pipeline, 'OrderRules', Smaller)
    assert (groups('paper'), groups('ccnet')) == (2, 10)

def test_the_report_shows_large_files_unless_they_must_be_read_as_a_whole(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(report, '_SMALL', 0)
    for source in RAW:
        run(raw, source, tmp_path/source)
        page = (tmp_path/source/'report.html').read_text()
        assert ('Nothing to show' in page) != ('<h3><code>' in page)
        assert ('of at most 0 MiB' in page) == (source == 'stackexchange')
        changed = source in ('commoncrawl', 'github', 'wikipedia', 'books', 'arxiv')
        assert ('<del>' in page) == changed

def test_a_dump_that_is_read_as_a_whole_may_be_an_address(raw, tmp_path):
    address = (raw/'stackexchange'/'math.stackexchange.com'/'Posts.xml').as_uri()
    clean_source('stackexchange', {'math.stackexchange.com': address}, tmp_path)
    assert '<h3><code>' in (tmp_path/'report.html').read_text()

def test_a_changed_preset_is_refused_and_redone(raw, tmp_path):
    run(raw, 'github', tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match='another job .*preset: "paper" -> "redpajama"'):
        run(raw, 'github', tmp_path, preset='redpajama')
    assert contents(tmp_path) == before
    total = run(raw, 'github', tmp_path, preset='redpajama', redo=True)
    assert [*total] == ['read', 'licence', 'copies', 'code']
    assert len([*read_documents(tmp_path/'documents')]) == 4    # headers differed: both stay
    run(raw, 'github', tmp_path, redo=True)
    assert contents(tmp_path) == before
    with pytest.raises(UserError, match='another job .*source'): run(raw, 'books', tmp_path)

def test_other_intervals_make_a_pass_anew(raw, tmp_path, monkeypatch):
    "What an interrupted pass has left with other intervals is not mixed with new ones"
    calm = run(raw, 'documents', tmp_path/'calm')
    monkeypatch.setattr(corpus, '_INTERVAL', 2000)
    def stopped(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(corpus, 'write_atomic', stopped)          # all is merged, and not yet called done
        run(raw, 'documents', tmp_path/'out')
    assert len([*(tmp_path/'out').rglob('first-*')]) > 1
    monkeypatch.setattr(corpus, '_INTERVAL', 2**24)
    assert run(raw, 'documents', tmp_path/'out') == calm
    assert contents(tmp_path/'out') == contents(tmp_path/'calm')

def test_a_changed_input_is_done_again_with_all_that_follows(tmp_path):
    raw_documents(tmp_path/'in')
    files = find_files('documents', [tmp_path/'in'])
    clean_source('documents', files, tmp_path/'out')
    write(tmp_path/'in'/'0.jsonl.gz', lines([{'text': 'new'}, {'text': 'equal'}]))
    total = clean_source('documents', files, tmp_path/'out')
    assert total['equal'].kept == 42
    clean_source('documents', files, tmp_path/'fresh')
    assert contents(tmp_path/'out') == contents(tmp_path/'fresh')

def test_the_passes_may_be_deleted_when_all_is_done(raw, tmp_path):
    total = run(raw, 'documents', tmp_path)
    before = contents(tmp_path)
    shutil.rmtree(tmp_path/'passes')
    assert run(raw, 'documents', tmp_path) == total and not (tmp_path/'passes').exists()
    next((tmp_path/'documents').iterdir()).unlink()
    assert run(raw, 'documents', tmp_path) == total and contents(tmp_path) == before

def test_the_memory_of_a_pass_does_not_change_its_result(raw, tmp_path):
    run(raw, 'documents', tmp_path/'a')
    run(raw, 'documents', tmp_path/'b', memory=2000)
    assert contents(tmp_path/'a') == contents(tmp_path/'b')

def test_equal_texts_without_ids_are_one(tmp_path):
    write_jsonl([Document('same', 'x')]*3 + [Document('other', 'x')], tmp_path/'a.jsonl')
    write_jsonl([Document('same', 'x', metadata={'place': 'mine'})], tmp_path/'b.jsonl')
    total = clean_source('documents', find_files('documents', [tmp_path]), tmp_path/'out')
    assert [d.text for d in read_documents(tmp_path/'out'/'documents')] == ['same', 'other']
    assert total['equal'].rules['documents.equal'].documents == 3

def test_what_cannot_be_read_is_counted_and_in_the_reports(tmp_path):
    evil = '<script>alert(1)</script>\x00\u202e'
    rows = [{'text': evil, 'id': evil}, {'text': evil, 'id': 'again'}, {'no': 'text'}]
    write(tmp_path/'a.jsonl', '\n'.join(map(json.dumps, rows)).encode() + b'\n{"text": "half')
    total = clean_source('documents', find_files('documents', [tmp_path/'a.jsonl']), tmp_path/'out')
    assert (total['read'].unread, total['equal'].documents, total['equal'].kept) == (2, 2, 1)
    assert 'line 3, has no "text"' in result_text(total, 'out', False)
    page = (tmp_path/'out'/'report.html').read_text()
    assert '<script' not in page and '&lt;script&gt;' in page and 'line 3' in page

@pytest.mark.skipif(sys.platform != 'linux', reason='names that are no UTF-8')
def test_names_of_files_from_all_over_the_world(tmp_path):
    names = ['plain', 'a b', '..x', '-rf', 'é\u202e', 'new\nline', '<b>&', "'", 'n'*240, 'n'*239 + 'm',
             'sub/plain', 'sub_plain', 'SUB_plain', 'plain.jsonl.zst', '000000', os.fsdecode(b'\xff\xfe'),
             '$HOME', '*', '[a]']
    for i, name in enumerate(names):
        write(tmp_path/'in'/f'{name}.jsonl', json.dumps({'text': f'{i}'}).encode())
    write(tmp_path/'in'/os.fsdecode(b'bad\xff.jsonl'), b'no JSON')
    pipe, loop = tmp_path/'in'/'pipe.jsonl', tmp_path/'in'/'loop'
    os.mkfifo(pipe)
    os.symlink(tmp_path/'in', loop)
    for odd in (loop, pipe):                                # the folders' turn comes first
        with pytest.raises(UserError, match=f'{odd} is [^;]*; take it out of the folder'):
            find_files('documents', [tmp_path/'in'])
        odd.unlink()
    os.symlink(tmp_path/'in'/'plain.jsonl', tmp_path/'in'/'twice.jsonl')
    files = find_files('documents', [tmp_path/'in', tmp_path/'in'/'*.jsonl', tmp_path/'in'/'[a].jsonl'])
    assert len({name.casefold() for name in files}) == len(files) == len(names) + 1
    total = clean_source('documents', files, tmp_path/'out')
    assert (total['equal'].kept, total['read'].unread) == (len(names), 1)
    assert {p.parent for p in (tmp_path/'out'/'documents').rglob('*.zst')} == {tmp_path/'out'/'documents'}
    assert 'is not JSON' in result_text(total, 'out', False)

def test_mistakes_are_one_line(raw, tmp_path):
    files = find_files('books', [raw/'books'])
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.tex').write_text('years of work')
    for words, call in {
            "unknown source 'book'; did you mean 'books'": lambda: find_files('book', [raw]),
            'holds no raw file of Books': lambda: find_files('books', [raw/'arxiv']),
            'no raw file of Books': lambda: find_files('books', [*(raw/'arxiv').iterdir()]),
            'holds something else': lambda: clean_source('books', files, tmp_path/'mine'),
            'is no name for an output': lambda: clean_source('books', {'../x': str(raw)}, tmp_path/'x'),
            'no files to work on': lambda: clean_source('books', {}, tmp_path/'x'),
            'needs a perplexity model': lambda: make_plan('commoncrawl', models=Models('none')),
            'is no fastText classifier': lambda: make_plan('c4', models=Models(files['1.txt'])),
            'no tokenizer beside': lambda: make_plan('commoncrawl', models=Models('none', files['1.txt'])),
            'there is no preset': lambda: clean_source('books', files, tmp_path/'x', 'papre')}.items():
        with pytest.raises(UserError, match=words) as e: call()
        assert '\n' not in str(e.value)
    assert not (tmp_path/'x').exists() and [p.name for p in (tmp_path/'mine').iterdir()] == ['thesis.tex']

def test_the_command(raw, tmp_path, capsys):
    from llama_nb.cli import main
    out = tmp_path/'out'
    args = ['data', 'clean', 'github', str(raw/'github'), '--workers', '1', '--out']
    assert main([*args, str(out)]) == 0
    said = capsys.readouterr().out
    assert 'github.licence' in said and f'{out}/report.html' in said and 'before' not in said
    assert main([*args, str(out)]) == 0
    assert 'nothing was left to do' in capsys.readouterr().out
    wrong = {"did you mean 'github'": ['data', 'clean', 'gitub', str(raw), '--out', str(out)],
             'name the raw files': ['data', 'clean', 'github', '--out', str(out)],
             'another job': [*args, str(out), '--preset', 'strict'],
             'all raw files lie in': [*args, str(raw)],
             'needs a language model': ['data', 'clean', 'commoncrawl', str(raw/'c4'), '--out', str(out/'x')],
             'there is no model nowhere': ['data', 'clean', 'c4', str(raw/'c4'), '--out', str(out/'x'),
                                           '--language-model', 'nowhere'],
             'unknown setting': [*args, str(out), '--presett', 'strict']}
    for words, line in wrong.items():
        assert main(line) == 2
        said = capsys.readouterr().err
        assert words in said and said.count('\n') == 1
    assert not (out/'x').exists()
    assert main([*args, str(out), '--preset', 'strict', '--redo']) == 0

def test_a_result_within_the_folder_that_it_cleans(tmp_path, capsys):
    from llama_nb.cli import main
    for i in range(3): write_jsonl([Document(f'text {i}', 'x')], tmp_path/f'{i}.jsonl')
    command = ['data', 'clean', 'documents', str(tmp_path), '--workers', '1', '--out', str(tmp_path/'out')]
    assert main(command) == 0
    before = contents(tmp_path/'out')
    capsys.readouterr()
    assert main(command) == 0 and 'nothing was left to do' in capsys.readouterr().out
    assert contents(tmp_path/'out') == before
    assert len([*read_documents(tmp_path/'out'/'documents')]) == 3

def count(folder): return sum(len(files) for _, _, files in os.walk(folder))

def _clean(source, files, out, workers, in_passes):
    "In a process of its own, which is the first of its group"
    os.setsid()
    if in_passes: corpus._SMALL_PASS, corpus._INTERVAL = 0, 2000        # workers merge several intervals, too
    clean_source(source, files, out, models=NONE, workers=workers)

def kills(files, source, folder, workers, times, in_passes=False, seed=0):
    "How often a run was killed before it was done; in the end its bytes are those of a calm run"
    assert corpus._SMALL_PASS and corpus._INTERVAL == 2**24
    context = multiprocessing.get_context('forkserver')     # which imports everything once
    context.set_forkserver_preload(['llama_nb.data.corpus'])
    clean_source(source, files, folder/'calm', models=NONE)
    calm, out, rng, killed = contents(folder/'calm'), folder/'out', random.Random(seed), 0
    n = count(folder/'calm')
    for _ in range(times):
        wanted, end = rng.randrange(n), time.monotonic() + 100
        process = context.Process(target=_clean, args=(source, files, out, workers, in_passes))
        process.start()
        while process.is_alive() and count(out) < wanted and time.monotonic() < end:
            time.sleep(.001)
        time.sleep(rng.random()*.02)
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:                          # it is no group yet, or has ended
            process.kill()
        process.join(100)
        killed += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:                           # it was faster: once more from the beginning
            assert contents(out) == calm
            shutil.rmtree(out)
    process = context.Process(target=_clean, args=(source, files, out, workers, in_passes))
    process.start()
    process.join(100)
    assert process.exitcode == 0 and contents(out) == calm
    assert [*out.rglob('.*.tmp')] == [] and [*out.rglob('pairs-*')] == []
    return killed

@pytest.mark.skipif(os.name == 'nt', reason='kills a group of processes')
@pytest.mark.parametrize('source, workers, times', [('c4', 1, 3), ('documents', 2, 1)])
def test_killed_at_random_instants_it_ends_with_the_same_bytes(raw, tmp_path, source, workers, times):
    kills(find_files(source, [raw/source]), source, tmp_path, workers, times)

class Apart:
    "An executor of a test: one task after the other, here"
    def __init__(self): self.done = []

    def __call__(self, step, files, tasks, out, is_done):
        for rank in range(tasks): list(step(None, rank, tasks))
        self.done += files
        yield from files

def test_on_a_cluster_it_is_the_same(tmp_path):
    RAW['c4'](tmp_path/'raw')
    files, apart = find_files('c4', [tmp_path/'raw']), Apart()
    clean_source('c4', files, tmp_path/'here', models=NONE)
    clean_source('c4', files, tmp_path/'there', models=NONE, workers=2, executor=apart)
    assert len(apart.done) >= len(files)
    for folder in ('here', 'there'): assert (tmp_path/folder/'finished.json').exists()
    here, there = (sorted((tmp_path/f/'documents').iterdir()) for f in ('here', 'there'))
    assert here and [p.read_bytes() for p in here] == [p.read_bytes() for p in there]

def test_an_executor_that_there_is_not(tmp_path):
    RAW['c4'](tmp_path/'raw')
    with pytest.raises(UserError, match="did you mean 'slurm'"):
        clean_source('c4', find_files('c4', [tmp_path/'raw']), tmp_path/'out', models=NONE, executor='slurn')
    assert not (tmp_path/'out').exists()
