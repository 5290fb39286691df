"Dumps that are damaged, hostile or strange, and answers far from their questions."
import io, json, os, random, subprocess, sys, tracemalloc
import xml.etree.ElementTree as ET
from xml.sax.saxutils import quoteattr
import pytest
from conftest import ENV
from llama_nb.core import UserError
from llama_nb.data import documents, stackexchange as se
from llama_nb.data.documents import Document
from llama_nb.data.stackexchange import (StackexchangeRules, best_first, block_text, clean_stackexchange,
                                         read_rows, read_stackexchange, redpajama_text, site_of)
from llama_nb.data.stage import Stage, Tally, preset

HEAD, TAIL = '\ufeff<?xml version="1.0" encoding="utf-8"?>\n<posts>\n', '</posts>'

def row(**post): return '  <row ' + ' '.join(f'{k}={quoteattr(str(v))}' for k, v in post.items()) + ' />\n'

def question(n, **more):
    return row(**{'Id': n, 'PostTypeId': 1, 'Score': 1, 'Title': f't{n}', 'Body': f'q{n}'} | more)

def answer(n, of, **more):
    return row(**{'Id': n, 'PostTypeId': 2, 'ParentId': of, 'Score': 0, 'Body': f'a{n}'} | more)

def dump(*rows): return (HEAD + ''.join(rows) + TAIL).encode()

def read(path, data=None):
    if data is not None: path.write_bytes(data)
    tally = Tally()
    return [*read_stackexchange(path, tally.problem)], tally

@pytest.fixture
def path(tmp_path): return tmp_path/'x.example.com.xml'

def test_a_whole_file_reads_as_by_a_parser_of_all_of_it():
    rows = [question(i, Body='<p>"\'&\n\té עברית e\u0301 🦙</p>', Tags='<a><b>') for i in range(50)]
    data = dump(*rows)
    ours = [r for _, r in read_rows(io.BytesIO(data), 'x')]
    assert ours == [e.attrib for e in ET.fromstring(data)]
    crlf = data.replace(b'\n', b'\r\n')
    assert [r for _, r in read_rows(io.BytesIO(crlf), 'x')] == ours

@pytest.mark.parametrize('bad', [
    '  <row Id="3" Body="\0" />\n', '  <row Id="3" Body="&#0;" />\n', '  <row Id="3"\n', 'nonsense\n',
    '  <row Id="3" />  <row Id="4" />\n', '<row Id="3" Body="&lol;" />\n', '<row Id="3" Id="4" />\n',
    '<row><row Id="3" /></row>\n', '\0\n', '<!-- x\n', '<!ENTITY a "b">\n', '<a>'*10_000 + '\n',
    '<?xml version="1.0" encoding="x"?><row />\n'])
def test_a_bad_row_costs_itself(path, bad):
    docs, tally = read(path, dump(question(1), answer(2, 1), bad, question(5), answer(6, 5)))
    assert [d.id[-1] for d in docs] == ['1', '5'] and tally.unread == 1, tally.problems

def test_bytes_that_are_not_utf8(path):
    docs, tally = read(path, dump(question(1), question(2)).replace(b'q1', b'\xff\xfe'))
    assert len(docs) == 1 and tally.unread == 1
    docs, tally = read(path, dump(question(1)).decode('utf-8-sig').encode('utf-16'))
    assert not docs and tally.unread

@pytest.mark.parametrize('data', [b'', b'\n', HEAD.encode(), dump(question(1))[:-10], dump(question(1))[:80]])
def test_cut_off(path, data):
    docs, tally = read(path, data)
    assert any('cut off' in p for p in tally.problems)
    with pytest.raises(UserError): [*read_stackexchange(path)]

def test_an_empty_site(path):
    docs, tally = read(path, dump())
    assert not docs and not tally.unread

def test_entity_bomb(path):
    levels = ''.join(f'<!ENTITY a{i} "{f"&a{i - 1};"*10}">\n' for i in range(1, 10))
    doctype = f'<!DOCTYPE p [\n<!ENTITY a0 "lol">\n{levels}]>'
    bomb = f'<?xml version="1.0"?>\n{doctype}\n<posts>\n<row Id="&a9;" />\n</posts>'
    inline = f'{doctype}<row Id="1" Body="&a9;" />'.replace('\n', '')
    outside = '<!DOCTYPE r [<!ENTITY x SYSTEM "file:///etc/passwd">]><row Id="&x;" />'
    for text in (bomb, inline, outside):
        docs, tally = read(path, text.encode())
        assert not docs and tally.unread

def test_a_line_of_100_mb_is_not_held():
    class Long(io.RawIOBase):
        left = 10**8
        def readable(self): return True
        def readinto(self, b):
            n = min(len(b), self.left)
            b[:n] = b'a'*n
            self.left -= n
            return n
    tally = Tally()
    tracemalloc.start()
    assert not [*read_rows(io.BufferedReader(Long()), 'x', tally.problem)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4*se.MAX_ROW and tally.unread == 2

# --- grouping -----------------------------------------------------------------------------------

def test_in_is_out_and_reported(path):
    rng = random.Random(0)
    rows = [question(i) for i in range(1, 100)]
    rows += [answer(1000 + i, rng.randint(1, 120)) for i in range(1000)]
    rows += [row(Id=5000 + i, PostTypeId=4) for i in range(7)] + [answer(1000, 1), question(1)]
    rng.shuffle(rows)
    docs, tally = read(path, dump(*rows))
    posts = sum(d.text.count('\n') + 1 for d in docs)
    assert posts + tally.unread == len(rows) - 7 and len(docs) == 99
    assert [int(d.id.split('/')[-1]) for d in docs] == list(range(1, 100))
    again, _ = read(path, dump(*sorted(rows)))
    assert [d.id for d in again] == [d.id for d in docs]

@pytest.mark.parametrize('post', [answer('x', 1), answer(7, ''), answer(7, '١'), answer(10**30, 1),
                                  answer(7, -1), answer(7, 1, Score='1e3'), answer(7, 1, Score='९'),
                                  answer(7, 1, Body=' '),
                                  answer(7, 99)])
def test_posts_that_are_reported(path, post):
    docs, tally = read(path, dump(question(1), post))
    assert len(docs) == 1 and docs[0].text.count('\n') == 0 and tally.unread == 1

def test_a_question_with_endless_answers(path, monkeypatch):
    monkeypatch.setattr(se, 'MAX_GROUP', 1000)
    docs, tally = read(path, dump(question(1), *(answer(i, 1) for i in range(2, 99)), question(100)))
    assert [d.id[-3:] for d in docs] == ['100'] and tally.unread == 1

@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='asks Linux for its memory')
def test_memory_does_not_grow_with_the_dump(tmp_path):
    # VmHWM and not ru_maxrss, which begins with what the parent held
    program = ('import sys; from llama_nb.data import stackexchange as se; se.SORT_MEMORY = 2\n'
               'n = sum(1 for _ in se.read_stackexchange(sys.argv[1]))\n'
               'status = open("/proc/self/status").read()\n'
               'print(n, status.split("VmHWM:")[1].split()[0])')
    peaks = []
    for n in (200, 4000):
        path = tmp_path/f'{n}.xml'
        body = 'x'*3000
        answers = [answer(n + i, i, Body=body) for i in range(1, n)]
        path.write_bytes(dump(*answers, *(question(i) for i in range(1, n))))
        done = subprocess.run([sys.executable, '-c', program, path], env=ENV, capture_output=True, text=True,
                              timeout=60)
        docs, peak = map(int, done.stdout.split())
        assert docs == n - 1
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 10_000, peaks              # kB, of a file of 12 MB

# --- archives -----------------------------------------------------------------------------------

def test_7z(tmp_path):
    py7zr = pytest.importorskip('py7zr')
    data = dump(question(1), answer(2, 1))
    with py7zr.SevenZipFile(tmp_path/'a.example.com.7z', 'w') as archive:
        archive.writestr('other', 'Users.xml')
        archive.writestr(data, 'Posts.xml')
    docs, tally = read(tmp_path/'a.example.com.7z')
    assert [d.id for d in docs] == ['a.example.com/questions/1'] and not tally.unread
    whole, rng = (tmp_path/'a.example.com.7z').read_bytes(), random.Random(3)
    for _ in range(30):
        bad = bytearray(whole)
        for _ in range(5): bad[rng.randrange(len(bad))] = rng.randrange(256)
        docs, tally = read(tmp_path/'bad.7z', bytes(bad))
        assert docs or tally.unread
    docs, tally = read(tmp_path/'bad.7z', b'')
    assert not docs and 'damaged' in tally.problems[0]

def test_7z_bomb(tmp_path, monkeypatch):
    py7zr = pytest.importorskip('py7zr')
    with py7zr.SevenZipFile(tmp_path/'b.7z', 'w') as archive: archive.writestr(b' '*5_000_000, 'Posts.xml')
    for module in (documents, se): monkeypatch.setattr(module, 'MAX_GROWTH', 20)
    docs, tally = read(tmp_path/'b.7z')
    assert not docs and '20-fold' in tally.problems[0]

def test_sites():
    for name in ('x.com/Posts.xml', 'x.com/Posts.xml.gz', 'x.com.7z', 'x.com.xml.zst', 'x.com-Posts.7z',
                 'x.com-Posts.xml'):
        assert site_of(name) == 'x.com', name

# --- text ---------------------------------------------------------------------------------------

def letters(text): return ''.join(c for c in text if c.isalpha())

def test_letters_as_by_a_real_parser():
    lexbor = pytest.importorskip('selectolax.lexbor')
    rng = random.Random(4)
    tags = ['<p>', '</p>', '<b>', '</b>', '<ul>', '<li>', '</li>', '</ul>', '<ol>', '</ol>', '<pre><code>',
            '<br>', '</code></pre>', '<!-- no -->', '&lt;', '&amp;amp;', '&eacute;', ' ', '\n', 'ab', 'עברית',
            'e\u0301', '🦙', 'a < b', '<a href="http://x" title="y">', '</a>', '<hr />', '<h1>', '</h1>',
            '<blockquote>', '</blockquote>']
    for _ in range(2000):
        body = ''.join(rng.choices(tags, k=20))
        wanted = letters(lexbor.LexborHTMLParser(f'<div>{body}</div>').body.text())
        assert letters(block_text(body)) == letters(redpajama_text(body)) == wanted, body

@pytest.mark.parametrize('body', ['<'*10**6, '<a '*300_000, '<!--'*250_000, '<div>'*200_000,
                                  '<ul><li>'*100_000, '&'*10**6, '<a "'*250_000, ' '*10**6,
                                  '</ul>'*200_000, '<pre>'*200_000])
def test_tags_take_linear_time(body):
    block_text(body)
    redpajama_text(body)

def test_code_keeps_every_blank():
    code = '  if x:\n\n\n\ty = 1   # é\n      z'
    assert block_text(f'<p>a</p><pre><code>{code}\n</code></pre><p>b</p>') == f'a\n\n{code}\n\nb'

@pytest.mark.parametrize('body, text', [
    ('<ul>\n<li>\n<p>a</p>\n</li>\n<li><p>b</p><p>c</p></li></ul>', '- a\n\n- b\n\nc'),
    ('<ul><li></li><li><p></p></li><li>a</li></ul>', '-\n-\n\n- a'),
    ('<ul><li><div><p>a</p></div></li><li><pre>b\nc</pre></li></ul>', '- a\n\n-\n\nb\nc'),
    ('<ol><li><blockquote><p>a</p></blockquote></li></ol>', '1. a'),
    ('<ul><li><ul><li>a</li></ul></li></ul>', '-\n   - a'),
    ('<ol start="5"><li>a</li><li>b<ol><li>c</li></ol></li></ol>', '5. a\n6. b\n   1. c'),
    ("<ol class=x START='0'><li>a</li></ol><ol start=x><li>b</li></ol>", '0. a\n\n1. b'),
    ('<table><tr><th>n</th><th>f(n)</th></tr><tr><td>1</td><td>25</td></tr></table>', 'n f(n)\n1 25'),
    ('<table><tr>\n<td> a </td>\n<td>b</td>\n</tr></table>', 'a b')])
def test_lists_and_tables(body, text): assert block_text(body) == text

# --- cleaning -----------------------------------------------------------------------------------

def document(*scores, title='t'):
    posts = [{'Id': '1', 'Title': title, 'Body': '<p>q</p>'}]
    posts += [{'Id': str(i), 'Score': s, 'Body': f'<p>{s}</p>'} for i, s in enumerate(scores, 2)]
    return Document('\n'.join(map(json.dumps, posts)), 'x')

def test_numeric_and_string_order():
    doc = document('9', '10', '100', '-1')
    assert clean_stackexchange(doc)[0].text == 'Q: t\n\nq\n\nA: 100\n\nA: 10\n\nA: 9\n\nA: -1'
    like = clean_stackexchange(doc, preset(StackexchangeRules, 'redpajama'))[0]
    assert like.text == 'Q: t q\nA: 9\nA: 100\nA: 10\nA: -1'

def test_scores_fall_and_equals_stay_in_their_order():
    rng = random.Random(5)
    answers = [{'Id': str(i), 'Score': str(rng.randint(-20, 120))} for i in range(500)]
    sorted_ = [(int(a['Score']), int(a['Id'])) for a in best_first(answers, True)]
    assert sorted_ == sorted(sorted_, key=lambda pair: (-pair[0], pair[1]))

def test_braces_and_titles_are_text():
    text = clean_stackexchange(document('1', title='{title} <T> {0}'))[0].text
    assert text == 'Q: {title} <T> {0}\n\nq\n\nA: 1'

def test_the_stage_counts():
    docs = [document(), document('-5'), document('3', '-5')]
    for name, kept in (('paper', 3), ('strict', 1), ('redpajama', 3)):
        stage = Stage('stackexchange', lambda d: clean_stackexchange(d, preset(StackexchangeRules, name)))
        out = [*stage(docs)]
        assert len(out) == kept == stage.tally.kept and stage.tally.documents == 3 and not stage.tally.unread
        lost = stage.tally.bytes_in - stage.tally.bytes_out
        assert lost <= sum(r.removed for r in stage.tally.rules.values())
