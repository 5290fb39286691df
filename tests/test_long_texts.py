"""Long texts are encoded part by part: the ids must be those that SentencePiece gives for the whole, for any
text and any vocabulary."""
import random, re, subprocess, sys
from pathlib import Path
import pytest
from conftest import ENV
from llama_nb.data.documents import Document
from llama_nb.data.long_texts import PartEncoder, parts
from llama_nb.data.shards import document_tokens
from llama_nb.data.tokenizer import SHORT, Tokenizer, train_tokenizer

LIBRARY = Path(random.__file__).parent

def code(): return [p.read_text(encoding='utf-8') for p in sorted(LIBRARY.glob('*.py'))[:60]]

@pytest.fixture(scope='module', params=[400, 2000, 8000])
def tokenizer(request, tmp_path_factory):
    return train_tokenizer(code(), tmp_path_factory.mktemp('model')/'tokenizer.model', request.param)

def whole(tokenizer, text): return tokenizer._sp.encode(text)

def test_program_code_has_the_ids_of_the_whole(tokenizer):
    texts = code()
    assert sum(len(text) > SHORT for text in texts) > 20
    for text in texts: assert tokenizer.encode(text, bos=False) == whole(tokenizer, text)
    text = '\n'.join(texts[:8])
    encode = PartEncoder(tokenizer._sp)
    for length in (1, 3, 64, 1000): assert sum(encode(text, length), []) == whole(tokenizer, text)

def test_any_characters_have_the_ids_of_the_whole(tokenizer):
    "Pieces of real code, torn and mixed with characters of all planes"
    draw, encode = random.Random(1), PartEncoder(tokenizer._sp)
    words = re.findall(r'\S+|\s+', ''.join(code()[:10]))
    codes = [*range(1, 0xd800), *range(0xe000, 0x110000)]
    planes = [chr(i) for i in draw.choices(codes, k=300)]
    marks = [' ', '▁', '\n', '\t', '0']
    for _ in range(300):
        found = draw.choices(words, k=30) + draw.choices(planes, k=6) + draw.choices(marks, k=8)
        draw.shuffle(found)
        text = ''.join(found)
        assert sum(encode(text, draw.randint(1, 40)), []) == whole(tokenizer, text)

def test_cutting_where_a_piece_reaches_across_would_be_another_text(tokenizer):
    "What the rule forbids does change ids, or it would forbid too much"
    encode = PartEncoder(tokenizer._sp)
    encode.pairs = set()                        # every place may be cut
    texts = code()[:20]
    assert any(sum(encode(text, 5), []) != whole(tokenizer, text) for text in texts)

def test_a_text_without_a_place_is_cut_all_the_same(tokenizer):
    encode, text = PartEncoder(tokenizer._sp), 'e'*(2**18 + 2**17)
    pairs = encode.pairs | {'ee'}
    assert [len(part) for part in parts(text, pairs)] == [2**18 + SHORT, 2**17 - SHORT]
    encode.pairs = pairs
    assert tokenizer.decode(sum(encode(text), [])) == text

def test_a_model_with_a_piece_that_is_no_text_encodes_as_before(tokenizer, tmp_path):
    model = tokenizer.path.read_bytes()
    assert model.count('▁the'.encode()) > 0
    (tmp_path/'damaged.model').write_bytes(model.replace('▁the'.encode(), b'\xe2\x96\xffthe'))
    damaged, text = Tokenizer(tmp_path/'damaged.model'), 'other words '*2000
    assert damaged.encode(text, bos=False) == whole(damaged, text)

def test_parts_are_the_text():
    for text in ('', 'a', 'ab'*50, 'a b\n'*1000):
        for length in (1, 2, 7, 5000):
            found = list(parts(text, {'ab', 'a '}, length))
            assert ''.join(found) == text and all(found)
            assert not any(a[-1] + b[0] in ('ab', 'a ') for a, b in zip(found, found[1:]))

def test_shards_and_lists_have_the_same_ids(tokenizer):
    text = '\n'.join(code()[:5])
    ids = [tokenizer.bos_id, *whole(tokenizer, text), tokenizer.eos_id]
    assert document_tokens(Document(text, 'a'), tokenizer).tolist() == ids == tokenizer.encode(text, eos=True)

@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_does_not_grow_with_the_text(tokenizer):
    "SentencePiece takes some 40 MB per million of these characters, 400 MB here"
    # VmHWM and not ru_maxrss, which begins with what the parent held
    program = ('import sys\nfrom llama_nb.data.tokenizer import Tokenizer\n'
               'tokenizer, text = Tokenizer(sys.argv[1]), "a line of text, "*640_000\n'
               'def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])\n'
               'before = peak()\nfor _ in tokenizer.ids(text): pass\nprint(peak() - before)')
    done = subprocess.run([sys.executable, '-c', program, str(tokenizer.path)], env=ENV, capture_output=True,
                          text=True, timeout=120)
    assert int(done.stdout) < 80*1024, done.stderr  # kB; the check for surrogates encodes the text once
