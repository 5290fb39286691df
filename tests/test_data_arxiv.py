"ArXiv's sources: damaged and hostile tars, encodings, noise and bombs, what is cut."
import gzip, io, random, tarfile, time, tracemalloc
from functools import partial
import pytest
from llama_nb.core import UserError
from llama_nb.data import arxiv
from llama_nb.data.arxiv import MAX_PAPER, ArxivRules, clean_arxiv, read_arxiv, tar_members
from llama_nb.data.documents import Document
from llama_nb.data.latex import tokenise
from llama_nb.data.stage import PRESETS, Stage, n_bytes, preset

def member(name, data=b'', kind=tarfile.REGTYPE, link=''):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, io.BytesIO(data)

def tar_of(*members, form=tarfile.PAX_FORMAT):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w', format=form) as tar:
        for info, data in members: tar.addfile(info, data)
    return out.getvalue()

def submission(**files):
    return gzip.compress(tar_of(*(member(f'{n}.tex', t.encode()) for n, t in files.items())), mtime=0)

def month_of(tmp_path, *papers):
    path = tmp_path/'month.tar'
    path.write_bytes(tar_of(*(member(f'2212/2212.{i:05}.gz', data) for i, data in enumerate(papers))))
    return path

def read(path):
    "(documents, reports)"
    said = []
    return [*read_arxiv(path, lambda *why: said.append(why))], said

def document(**files):
    about = [[f'{name}.tex', len(text), 'utf-8'] for name, text in files.items()]
    return Document(''.join(files.values()), 'x', metadata={'files': about})

RULES = ArxivRules()

def cleaned(doc, rules=RULES):
    after, _ = clean_arxiv(doc, rules)
    return after.text.strip() if after else ''

PAPER = '\\documentclass{a}\\begin{document}\\section{A} text\\end{document}'

# --- reading ------------------------------------------------------------------------------------

def test_a_tar_that_is_cut_off_gives_what_comes_before(tmp_path):
    path = month_of(tmp_path, *(submission(main=PAPER + '%' + str(i)*99) for i in range(4)))
    whole, wanted = path.read_bytes(), [*read_arxiv(path)]
    assert len(wanted) == 4
    end = max(i for i in range(0, len(whole), 512) if whole[i:i + 512].strip(b'\0')) + 512
    for at in [*range(0, end, 97), end]:
        path.write_bytes(whole[:at])
        docs, said = read(path)
        assert docs == wanted[:len(docs)] and said, at
        assert len(docs) >= sum(at >= 512 + k*1024 + 512 for k in range(4)) - 1
        with pytest.raises(UserError): [*read_arxiv(path)]

def test_one_broken_paper_is_reported_and_the_others_are_read(tmp_path):
    good = submission(main=PAPER)
    flipped = bytearray(good)
    flipped[len(good)//2] ^= 255
    inner = gzip.compress(tar_of(member('a.tex', b'x'*2000))[:1500], mtime=0)
    path = month_of(tmp_path, good, bytes(flipped), good[:-9], inner, b'', good)
    docs, said = read(path)
    assert [d.id for d in docs] == ['2212.00000', '2212.00004', '2212.00005']
    assert [why[0].split(', ')[1].strip(',') for why in said] == [f'2212/2212.0000{i}.gz' for i in (1, 2, 3)]

@pytest.mark.parametrize('form', [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_traversal_links_and_devices_are_harmless(tmp_path, form):
    secret = tmp_path/'secret.tex'
    secret.write_text('secret')
    text = PAPER.replace('text', f'\\input{{{secret}}}\\input{{../secret}}\\input{{link}}\\input{{up}} end')
    data = tar_of(member('main.tex', text.encode()), member('link.tex', kind=tarfile.SYMTYPE,
        link=str(secret)),
                  member('hard.tex', kind=tarfile.LNKTYPE, link='main.tex'), member('pipe',
                      kind=tarfile.FIFOTYPE),
                  member('dev', kind=tarfile.CHRTYPE), member('../../up.tex', b'up'),
                      member('d/'*40 + 'a.tex', b'y'),
                  form=form)
    docs, said = read(month_of(tmp_path, gzip.compress(data)))
    assert not said and [name for name, *_ in docs[0].metadata['files']] == ['main.tex', '../../up.tex',
                                                                             'd/'*40 + 'a.tex']
    text = cleaned(docs[0])
    assert 'secret}' in text and text.count('secret') == 2 and text.endswith('end')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['month.tar', 'secret.tex']

class Generated(io.RawIOBase):
    "A stream that makes its bytes when they are asked for"
    def __init__(self, *parts): self.parts = [[part, n] for part, n in parts]     # (bytes, how often)
    def readable(self): return True
    def readinto(self, buffer):
        while self.parts and not self.parts[0][1]:
            self.parts.pop(0)
        if not self.parts: return 0
        part, n = self.parts[0]
        times = min(n, max(len(buffer)//len(part), 1))
        self.parts[0][1] -= times
        data = part*times
        buffer[:len(data)] = data
        return len(data)

def test_a_line_of_100_megabytes_is_not_held():
    info, _ = member('2212/2212.00001.gz')
    info.size = 100*2**20
    good = tar_of(member('2212/2212.00002.gz', submission(main=PAPER)))
    stream = io.BufferedReader(Generated((info.tobuf(), 1), (b'x'*512, info.size//512),
                                         *((good[i:i + 512], 1) for i in range(0, len(good), 512))))
    said = []
    tracemalloc.start()
    docs = [*arxiv._month(stream, 'month', lambda *why: said.append(why))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [d.id for d in docs] == ['2212.00002'] and 'bytes of TeX' in said[0][1]
    assert peak < 5*MAX_PAPER

def test_bombs_in_gzip_and_in_headers(tmp_path):
    bomb = gzip.compress(tar_of(member('a.tex', bytes(30*2**20))))
    info, _ = member('././@LongLink', kind=tarfile.GNUTYPE_LONGNAME)
    info.size = 2**33
    said = read(month_of(tmp_path, bomb, gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(2**20))))[1]
    assert len(said) == 2 and 'cut off' in said[1][1]
    many = [(f'{i:0200}.tex', b'') for i in range(3)]
    assert len([*tar_members(io.BytesIO(tar_of(*(member(*m) for m in many))), 'x')]) == 3

def test_empty_inputs(tmp_path):
    path = month_of(tmp_path)
    assert read(path) == ([], [])
    path.write_bytes(b'')
    assert 'empty block' in read(path)[1][0][1]
    docs, said = read(month_of(tmp_path, gzip.compress(b''), gzip.compress(b'%PDF-1.4'), submission(),
        b'%!PS'))
    assert len(docs) == 4 and not said and not any(d.text for d in docs)
    for doc in docs: assert clean_arxiv(doc)[0] is None
    with pytest.raises(UserError, match='no file'): [*read_arxiv(tmp_path/'none.tar')]

@pytest.mark.parametrize('text, encoding, declared', [
    ('Müller', 'latin-1', 'latin1'), ('Żółw', 'latin2', 'latin2'), ('Привет', 'cp1251', 'cp1251'),
    ('Привет', 'koi8-r', 'koi8-r'), ('é', 'mac_roman', 'applemac'), ('“x”', 'cp1252', ''),
    ('שלום e\u0301 العربية', 'utf-8', 'latin1')])
def test_encodings(tmp_path, text, encoding, declared):
    head = f'\\usepackage[{declared}]{{inputenc}}\r\n' if declared else ''
    data = tar_of(member('main.tex', (head + '\\section{A}\0\r').encode()), member('b.tex',
        text.encode(encoding)))
    docs, said = read(month_of(tmp_path, gzip.compress(data)))
    assert not said and docs[0].text == head.replace('\r\n', '\n') + '\\section{A}\n' + text
    assert cleaned(docs[0], preset(ArxivRules,
        'redpajama')) == ('' if encoding != 'utf-8' else '\\section{A}')

# --- noise, bombs, files ------------------------------------------------------------------------

PIECES = [*'\\{}#%[]12=*~@ \n', '\\a', '\\b', '\\def', '\\newcommand', '\\let', '\\a{', '#1', '\\input{a}',
    '\\fi',
          '\\iffalse', '\\begin{verbatim}', '\\end{verbatim}', '\\verb|', '\\section',
          '\\begin{thebibliography}',
          '\\end', 'ש', 'e\u0301', '\0', '\ud800', '\\makeatletter', '\\xspace', '\\endinput',
          '\\begin{document}', '\\url{']

def test_noise_is_read_without_harm():
    rng, presets = random.Random(1), [preset(ArxivRules, p) for p in PRESETS]
    for _ in range(1500):
        text = ''.join(rng.choices(PIECES, k=rng.randrange(60)))
        tokens, dropped = tokenise(text, hidden=False)
        assert n_bytes(''.join(tokens)) + dropped >= n_bytes(text) - 2*text.count('\ud800')
        for rules in presets:
            first = clean_arxiv(document(a=text, b='\\section{B}' + text[::-1]), rules)
            assert first == clean_arxiv(document(a=text, b='\\section{B}' + text[::-1]), rules)

def test_text_without_macros_stays(tmp_path):
    text = '\\section{שלום}\n\n \\textbf{e\u0301} 5\\% \\\\ [x] {y} $a_{1}^2$ \u202eabc\u202c\n'
    text += '\\begin{x}\n  \\item z\n\\end{x}'
    assert cleaned(Document(text, 'x')) == text

BOMBS = {'itself': r'\def\a{\a}\a', 'grows': r'\def\a{\a\a}\a', 'around': r'\def\a{\b x}\def\b{\a y}\a\b',
         'argument': r'\def\a#1{\a{#1#1}}\a{x}', 'halves': r'\def\a#1{#1#1}' + r'\a{'*80 + 'x' + '}'*80,
         'laughs': ''.join(f'\\def\\a{a}{{\\a{b}\\a{b}}}' for a, b in zip('abcdefghijklmnopqrstuvwxy',
                                                                     'bcdefghijklmnopqrstuvwxyz')) + r'\aa',
         'large': r'\def\a{' + 'x '*5000 + '}' + r'\a,'*5000, 'eats': r'\def\a#1{\a}\a ' + 'x'*5000,
         'open': r'\def\a#1{#1}' + r'\a{'*20000, 'verbatim': r'\begin{verbatim}'*20000,
         'verb': r'\verb|'*20000 + 'x',
         'percent': '%'*100000, 'braces': '{'*100000, 'defs': r'\def\a{'*20000,
         'bib': r'\begin{thebibliography}'*20000,
         'iffalse': r'\iffalse '*20000, 'brackets': r'\newcommand{\a}[1][x]{#1}' + r'\a['*20000,
         'sections': r'\section['*20000, 'newcommands': '\\newcommand{\\a}{'*20000,
         'makes': r'\def\a{\def\b{\a}\b}\a'}

@pytest.mark.parametrize('name', BOMBS)
def test_bombs_end_and_stay_small(name):
    bomb = '\\section{A} ' + BOMBS[name] + ' the end'
    for rules in (ArxivRules(), preset(ArxivRules, 'redpajama')):
        start = time.monotonic()
        after, decisions = clean_arxiv(Document(bomb, 'x'), rules)
        assert time.monotonic() - start < 100
        assert after is None or len(after.text) < 25*len(bomb) + 2*10**5

def test_files_that_ask_for_each_other():
    loop = document(main='\\documentclass{a}\\section{A}\\input{b} end', b='b \\input{main}\\input{b}')
    assert cleaned(loop) == '\\section{A}b \\input{main}\\input{b} end'
    names = 'abcdefghijklmnopqrstuvwxyz'
    files = {n: f'\\input{{{m}}}\\input{{{m}}}' for n, m in zip(names, names[1:])}
    doubling = document(main='\\documentclass{a}\\section{A}\\input{a}', **files, z='x')
    assert len(cleaned(doubling)) < 10**6

@pytest.mark.parametrize('ask', ['\\subfile{parts/a}', '\\input{parts/a}', '\\import{parts/}{a}',
                                 '\\subimport{parts}{a.tex}'])
@pytest.mark.parametrize('kind', ['[../main]{subfiles}', '{standalone}', '{article}'])
def test_a_file_that_could_stand_alone_does_not_end_the_paper(ask, kind):
    inner = f'\\documentclass{kind}\\usepackage{{x}}\\begin{{document}}inner\\end{{document}}'
    main = f'\\documentclass{{a}}\\begin{{document}}\\section{{A}}{ask} outer\\end{{document}}'
    assert cleaned(document(**{'main': main, 'parts/a': inner})) == '\\section{A}inner outer'

def test_a_file_that_ends_in_an_argument():
    doc = document(main='\\documentclass{a}\\def\\w#1{<#1>}\\section{A}\\input{b} c} d', b='\\w{b')
    assert cleaned(doc) == '\\section{A}\\w{b c} d'
    assert cleaned(document(main='\\documentclass{a}\\section{A}\\input{b} c',
        b='b\\endinput x')) == '\\section{A}b c'

# --- what is cut --------------------------------------------------------------------------------

@pytest.mark.parametrize('cited', ['\\bibliography{x}', '\\printbibliography[heading=none]',
                                   '\\begin{references}R\\end{references}',
                                   '\\begin{thebibliography}{9}R\\end{thebibliography}',
                                   '\\nocite{*}\\bibliography{a,b}'])
def test_only_the_bibliography_goes(cited):
    doc = Document(f'front\\section{{A}} one {cited}\\section{{B}} two', 'x')
    assert cleaned(doc).split() == ['\\section{A}', 'one', '\\section{B}', 'two']
    assert cleaned(doc, ArxivRules(after_bibliography=False)).startswith('\\section{A} one')

def test_headings_in_comments_verbatim_and_preamble_are_none():
    text = ('%\\section{x}\n\\begin{verbatim}\\section{y}\\end{verbatim}\\titleformat{\\section}{}'
            '\\begin{document}front\\verb|\\section|\\section{A} text')
    assert cleaned(Document(text, 'x')) == '\\section{A} text'

def test_unused_files_are_counted_and_mains_joined():
    doc = document(b='\\documentclass{x}\\section{B}', old='\\section{old}',
        a='\\documentclass{x}\\section{A}')
    after, decisions = clean_arxiv(doc)
    assert after.text == '\\section{A}\n\n\\section{B}\n'
    assert [d.removed for d in decisions if d.rule == 'arxiv.unused_files'] == [len('\\section{old}')]

def test_documents_in_are_documents_out_removed_or_reported(tmp_path):
    papers = [submission(main=PAPER + str(i)) for i in range(20)]
    papers[3], papers[7] = papers[3][:50], gzip.compress(b'%PDF')
    papers[9] = gzip.compress('über'.encode('latin-1'))
    for name in PRESETS:
        stage = Stage('arxiv', partial(clean_arxiv, rules=preset(ArxivRules, name)))
        path = month_of(tmp_path, *papers)
        kept = [*stage(read_arxiv(path, stage.tally.problem))]
        t = stage.tally
        assert t.unread == 1 and t.documents == 19
        assert t.kept == len(kept) == (17 if name in ('redpajama', 'strict') else 18)
        for doc in kept: assert 'files' not in doc.metadata and doc.metadata['decisions']
