"""The mini corpus: no source is empty after cleaning; its formats are accepted by other readers; made again,
also after kills, it is the same; what is held out is not trained on; Hugging Face's tokenizers gives the same
tokens."""
import bz2, gzip, json, os, signal, subprocess, sys, tarfile, time
import py7zr
import pytest
from lxml import etree
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, normalizers
from warcio.archiveiterator import ArchiveIterator
from conftest import ENV
from llama_nb.cli import main
from llama_nb.core import UserError
from llama_nb.data import dress, found
from llama_nb.data.pipeline import SOURCES
from llama_nb.data.documents import Document
from llama_nb.data.dress import BUILDERS, framed, site_page
from llama_nb.data.found import docstrings, passages, roff_text
from llama_nb.data.mediawiki import write_export
from llama_nb.data.mini import MiniSettings, build_mini, clean_documents, held_out_documents, inventory, split
from llama_nb.data.mixture import TABLE_1, Mixture, make_loader
from llama_nb.data.shards import TokenShards
from llama_nb.data.tokenizer import Tokenizer
from llama_nb.toy import mini_config, toy_config

SMALL = MiniSettings(.5)

@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp('corpus')/'mini'
    build_mini(out, SMALL, report=lambda line: None)
    return out

def files(folder, *parts):
    "Content of the files in these parts of a corpus that do not name the folder or the time"
    found = {}
    for part in parts:
        for path in sorted((folder/part).rglob('*')) if (folder/part).is_dir() else [folder/part]:
            if path.is_file(): found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found

# --- sources ------------------------------------------------------------------------------------

@pytest.mark.parametrize('source', SOURCES)
def test_no_source_is_empty(corpus, source):
    docs = clean_documents(corpus, source)
    assert len(docs) > 1 and all(doc.text.strip() for doc in docs)
    assert len({doc.id for doc in docs}) == len(docs)

def test_archives_are_read_by_warcio(corpus):
    kinds = set()
    for path in (corpus/'raw'/'commoncrawl').glob('*.gz'):
        with open(path, 'rb') as f:
            found = {record.rec_type for record in ArchiveIterator(f, check_digests='raise')}
        assert found == ({'conversion'} if '.wet.' in path.name else {'request', 'response', 'revisit'})
        kinds |= found
    assert len(kinds) == 4

def test_lines_are_json(corpus):
    for path in (corpus/'raw'/'c4').glob('*.json.gz'):
        for line in gzip.decompress(path.read_bytes()).splitlines():
            assert set(json.loads(line)) == {'text', 'timestamp', 'url'}

def test_projects_are_tars_with_a_licence(corpus):
    tars = [*(corpus/'raw'/'github').glob('*.tar.gz')]
    for path in tars:
        with tarfile.open(path) as tar: names = tar.getnames()
        assert any(name.endswith('PKG-INFO') or 'LICEN' in name.upper() for name in names), path
    assert len(tars) > 1

def test_papers_are_tars_in_gzip_in_a_tar(corpus):
    with tarfile.open(corpus/'raw'/'arxiv'/'arXiv_src_2207_001.tar') as month:
        names = [n for n in month.getnames() if n.startswith('2207/2207.0')]
        inner = gzip.open(month.extractfile(names[0]))
        with tarfile.open(fileobj=inner, mode='r|') as paper: assert 'main.tex' in paper.getnames()

def test_dumps_are_xml(corpus):
    dumps = [*(corpus/'raw'/'wikipedia').glob('*.xml.bz2')]
    assert len(dumps) >= 20
    for path in dumps:
        tree = etree.fromstring(bz2.decompress(path.read_bytes()))
        assert etree.QName(tree).localname == 'mediawiki' and len(tree.findall('.//{*}page')) > 2

def test_posts_are_xml_and_7z(corpus):
    folder = corpus/'raw'/'stackexchange'
    rows = [row for path in folder.rglob('Posts.xml') for row in etree.parse(path).getroot()]
    assert {row.get('PostTypeId') for row in rows} == {'1', '2'}
    with py7zr.SevenZipFile(next(folder.glob('*.7z'))) as archive: assert archive.getnames() == ['Posts.xml']

def test_books_have_three_styles_of_frame():
    heads = {framed(f'A book {i}', 'Text.')[:200] for i in range(30)}
    said = b' '.join(heads)
    assert b'SMALL PRINT' in said and b'*** START OF THIS' in said and b'***START OF THE PROJECT' in said

def test_what_is_dressed_is_removed_again(corpus):
    texts = {source: ' '.join(d.text for d in clean_documents(corpus, source)) for source in SOURCES}
    gone = {'commoncrawl': ('accept our cookie policy', 'Previous page'), 'github': (),
            'c4': ('We use cookies on', 'Read more...'), 'books': ('PROJECT GUTENBERG', 'SMALL PRINT'),
            'wikipedia': ('{{reflist', '[[Category', '#REDIRECT', '<ref>'), 'stackexchange': ('<pre><code>',),
            'arxiv': ('\\newcommand', '% TODO', '\\bibitem')}
    for source, words in gone.items():
        assert not [word for word in words if word in texts[source]], source

def test_a_licence_that_the_paper_does_not_take_is_left_out(corpus):
    sources = {doc.source for doc in clean_documents(corpus, 'github')}
    assert any(p.name.startswith('python-3') for p in (corpus/'raw'/'github').iterdir())
    assert not any(source.startswith('python-3') for source in sources)

# --- the same again -----------------------------------------------------------------------------

@pytest.mark.parametrize('source', ('github', 'wikipedia', 'books', 'arxiv', 'stackexchange', 'c4'))
def test_equal_machines_make_equal_files(corpus, source, tmp_path):
    BUILDERS[source](tmp_path, SMALL.raw_size(source))
    made = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    there = files(corpus/'raw'/source, '.')
    del there['origins.toml']
    assert made == there

def test_a_real_dump_is_counted_by_its_text(monkeypatch, tmp_path):
    "Not by the bytes of the file, which is compressed; one that is cut off, as far as it can be read"
    titles = [f'Page {i}' for i in range(3)]
    docs = [Document(f'Text of {title}. '*9, title, metadata={'title': title}) for title in titles]
    data = b''.join(write_export(docs, 'en'))
    paths = [tmp_path/'enwiki-whole.bz2', tmp_path/'enwiki-cut.bz2']
    for path, part in zip(paths, (data, data[:-300])): path.write_bytes(bz2.compress(part))
    monkeypatch.setattr(dress, 'installed', lambda pattern: paths)
    (tmp_path/'raw').mkdir()
    *_, whole, cut = BUILDERS['wikipedia'](tmp_path/'raw', 20_000)
    assert (whole.documents, whole.size) == (3, sum(len(doc.text) for doc in docs))
    assert (cut.documents, cut.size) == (2, sum(len(doc.text) for doc in docs[:2]))

def test_no_page_shows_the_environment(monkeypatch):
    "The manual of `os` prints `os.environ`, where secrets may stand; and each shell would make another text"
    monkeypatch.setattr(sys, 'stdlib_module_names', frozenset({'os', 'posix', 'csv'}))
    monkeypatch.setenv('SECRET_OF_THIS_TEST', 'do-not-tell')
    pages = dress.pydoc_pages(10**6)
    assert {page.url.rpartition('/')[2] for page in pages} == {'os', 'posix', 'csv'}
    assert not [page.url for page in pages if 'SECRET' in page.text or 'do-not-tell' in page.text]

def test_a_killed_command_goes_on(corpus, tmp_path):
    "Killed as soon as something of a step is there, and started again; at last as if nothing had happened"
    out = tmp_path/'mini'
    command = [sys.executable, '-m', 'llama_nb', 'data', 'mini', str(out), '--megabytes=0.5', '--workers=1']
    for appears in ('raw/.tmp-*', 'clean/wikipedia/documents', 'clean/github'):
        process = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True)
        while process.poll() is None and not [*out.glob(appears)]:
            time.sleep(.02)
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, appears
    build_mini(out, SMALL, report=lambda line: None)
    parts = ('raw', 'models/language.bin', 'models/en.arpa', 'models/en.json', 'models/reference.bin',
             'tokenizer.model', 'tokens', 'mixture.toml', 'held_out.toml')
    assert files(out, *parts) == files(corpus, *parts)
    assert not [p for p in out.rglob('*') if p.name.startswith('.')]

def test_a_second_start_changes_nothing(corpus):
    before = {p: p.stat().st_mtime_ns for p in corpus.rglob('*')}
    build_mini(corpus, SMALL, report=lambda line: None)
    assert {p: p.stat().st_mtime_ns for p in corpus.rglob('*')} == before

def test_mistakes_are_one_line(corpus, tmp_path, capsys):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('x')
    new = str(tmp_path/'x')
    for args in ([str(corpus), '--megabytes', '0.6'], [str(tmp_path/'mine')], [new, '--megabytes', '0']):
        assert main(['data', 'mini', *args]) == 2
        assert capsys.readouterr().err.count('\n') == 1
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['mine', 'thesis.txt']

# --- tokens -------------------------------------------------------------------------------------

def test_the_mixture_has_the_proportions_of_table_1(corpus):
    mixture = Mixture(corpus/'mixture.toml')
    assert {s.name: s.per_block for s in mixture.sources} == {n: round(2*p[0]) for n, p in TABLE_1.items()}
    loader = make_loader(mixture, 64, 8)
    drawn = [span.source for i in range(25) for span in loader.spans(i)]
    assert [drawn.count(name) for name in TABLE_1] == [134, 30, 9, 9, 9, 5, 4]

def test_what_is_held_out_is_not_trained_on(corpus):
    held_out = held_out_documents(corpus)
    for source, kind in SOURCES.items():
        shards = {part: TokenShards(corpus/'tokens'/source/part) for part in ('train', 'held_out')}
        docs = clean_documents(corpus, source)
        assert sum(s.n_documents for s in shards.values()) == len(docs)
        assert shards['held_out'].n_documents == len(held_out[kind.title]) > 0
        first = shards['held_out'].document_of(0)
        assert first in {d.id for d in held_out[kind.title]}

def test_no_text_is_in_two_sources():
    names = [p.name for role in SOURCES if role != 'github' for p, _ in zip(passages(role), range(15))]
    assert len(set(names)) == len(names)

def test_the_inventory_adds_up(corpus):
    rows = inventory(corpus)
    said = (corpus/'README.md').read_text(encoding='utf-8')
    for row in rows:
        assert f'{row["tokens"]:,}' in said and all(o.text in said for o in row['origins'])
        assert row['tokens'] > 256 and row['raw'] > 0

def hugging_face(path): # a SentencePiece model as Hugging Face's `tokenizers` has it
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    vocab = {p.piece: i for i, p in enumerate(proto.pieces)}
    merges = []
    for p in proto.pieces:
        halves = [(p.piece[:i], p.piece[i:]) for i in range(1, len(p.piece))] if p.type == p.NORMAL else []
        merges += [(-p.score, -len(a), -len(b), a, b) for a, b in halves if a in vocab and b in vocab]
    pairs = [(a, b) for *_, a, b in sorted(merges)]
    made = HfTokenizer(models.BPE(vocab, pairs, unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    space = '\u2581'
    made.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(' ', space)])
    back = decoders.Replace(space, ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)
    made.decoder = decoders.Sequence([*back])
    return made

def test_hugging_face_gives_the_same_tokens(corpus):
    ours, theirs = Tokenizer(corpus/'tokenizer.model'), hugging_face(corpus/'tokenizer.model')
    texts = [doc.text for source in SOURCES for doc in clean_documents(corpus, source)]
    differ = [t for t in texts if ours.encode(t, bos=False) != theirs.encode(t, add_special_tokens=False).ids]
    assert len(texts) > 100 and differ == []
    assert theirs.decode(ours.encode(texts[0], bos=False)) == texts[0]

def test_the_toy_reads_the_corpus_beside_its_folder(tmp_path):
    config = mini_config(toy_config(tmp_path/'run', 10))
    assert config.data.train == str(tmp_path/'mini'/'mixture.toml')

# --- small parts --------------------------------------------------------------------------------

def test_odd_code_gives_no_docstring_and_takes_no_time():
    start = time.monotonic()
    assert docstrings('def f():\n    """' + 'x\\'*200_000) == []
    assert docstrings('class A: pass\n'*20_000) == []
    assert docstrings('add_docs(' + '('*100_000) == []
    assert docstrings('def f():\n    """\\N{no such}' + ' x'*200 + '"""') == []
    assert time.monotonic() - start < 20

def test_roff_without_sense_gives_text():
    for odd in ('', '.', '\\', '\\(', '\\[', '.SH', '.B', '\\f', '\\[u12]', "'", '.\\"'): roff_text(odd)
    assert roff_text('a\\\\[:o]b \\[u20AC] \\(co') .endswith('€')

def test_a_title_cannot_break_a_page():
    page = site_page('</title><script>alert(1)</script>', 'a < b & c')
    assert '<script>alert' not in page.text and 'a &lt; b &amp; c' in page.text

def test_split_is_never_empty():
    for n in range(2, 30):
        docs = [Document('x', f'{n} {i}') for i in range(n)]
        train, held_out = split(docs, .05)
        assert train and held_out and sorted(d.id for d in train + held_out) == sorted(d.id for d in docs)
    with pytest.raises(UserError, match='larger'): split([], .05)

def test_a_machine_with_nothing_but_python(monkeypatch, tmp_path):
    "No manuals, messages, documentation or licences of a system: twenty languages and books all the same"
    for name in ('MANUALS', 'MESSAGES', 'DOCUMENTATION', 'LICENCES', 'INFO'):
        monkeypatch.setattr(found if name in ('MANUALS', 'MESSAGES') else dress, name, tmp_path/'missing')
    for source in ('commoncrawl', 'wikipedia', 'books'):
        (tmp_path/source).mkdir()
        assert all(o.documents > 0 for o in BUILDERS[source](tmp_path/source, 40_000))
    dumps = [*(tmp_path/'wikipedia').iterdir()]
    assert len(dumps) == 20 and all(b'<ns>0</ns>' in bz2.decompress(p.read_bytes()) for p in dumps)
    assert len([*(tmp_path/'books').iterdir()]) > 2
