"A tokenizer.json: the ids of transformers and of SentencePiece, no forged borders, a run from text to text."
import json, random, sys
import numpy as np
import pytest
from test_data_mini import hugging_face
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from llama_nb.cli import main
from llama_nb.core import UserError
from llama_nb.data.documents import topic_documents
from llama_nb.data.shards import TokenShards
from llama_nb.data.tokenizer import Tokenizer

SIDES = 'train', 'held_out'
WORDS = ['the', 'Sheep', 'Wörter', '日本語', 'x'*50, '\n\n', '\t', '1234', ' ', '  ', '\x00', '🐑', '<s>',
         '</s>', '<|endoftext|>', '[SEP]', '[CLS]', '[UNK]', 'def f(x): return x']

def random_texts(seed, n=200):
    rng = random.Random(seed)
    return [rng.choice(('', ' ')).join(rng.choices(WORDS, k=rng.randint(0, 20))) for _ in range(n)]

def trained(library, trainer, *specials):
    settings = dict(vocab_size=400, special_tokens=[*specials], show_progress=False)
    library.train_from_iterator((d.text for d in topic_documents()), trainer(**settings))
    return library

def byte_level():
    "As GPT-2"
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    def trainer(**settings):
        return trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **settings)
    return trained(library, trainer, '<|endoftext|>')

def word_piece():
    "As BERT: small letters, a template, texts cut off and filled up"
    library = Library(models.WordPiece(unk_token='[UNK]'))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library = trained(library, trainers.WordPieceTrainer, '[UNK]', '[CLS]', '[SEP]')
    library.post_processor = processors.TemplateProcessing(single='[CLS] $A [SEP]', pair=None,
                                                           special_tokens=[('[CLS]', 1), ('[SEP]', 2)])
    library.enable_truncation(7)
    library.enable_padding(length=9)
    return library

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizers')
    for made in (byte_level, word_piece): made().save(str(folder/f'{made.__name__}.json'))
    return folder

@pytest.mark.parametrize('name, begin, end, unknown', [('byte_level', 0, 0, -1), ('word_piece', 1, 2, 0)])
def test_transformers_gives_the_same_ids(folder, name, begin, end, unknown):
    path = folder/f'{name}.json'
    ours = Tokenizer(path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path), split_special_tokens=True)
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (begin, end, unknown)
    assert ours.vocab_size == theirs.vocab_size
    for text in random_texts(0):
        wanted = theirs(text, add_special_tokens=False, truncation=False, padding=False)['input_ids']
        assert ours.encode(text, eos=True) == [begin, *wanted, end]
        assert ours.decode(ours.encode(text)) == theirs.decode(wanted, skip_special_tokens=True,
                                                               clean_up_tokenization_spaces=False)
        assert name == 'word_piece' or ours.decode(ours.encode(text, eos=True)) == text

def test_a_sentencepiece_model_in_the_other_form_is_the_same_tokenizer(tokens, tmp_path):
    library = hugging_face(tokens/'tokenizer.model')
    library.add_special_tokens(['<unk>', '<s>', '</s>'])
    library.save(str(tmp_path/'tokenizer.json'))
    ours, theirs = Tokenizer(tmp_path/'tokenizer.json'), Tokenizer(tokens/'tokenizer.model')
    for name in ('bos_id', 'eos_id', 'unk_id', 'pad_id', 'vocab_size'):
        assert getattr(ours, name) == getattr(theirs, name)
    for text in random_texts(1):
        if not text: continue           # of nothing, SentencePiece makes nothing, and the other form a space
        ids = theirs.encode(text, eos=True)
        assert ours.encode(text, eos=True) == ids and ours.decode(ids) == theirs.decode(ids)
        assert ours.pieces(text) == theirs.pieces(text)

@pytest.fixture(scope='module')
def made(folder):
    "Shards by the command, from texts that name special tokens"
    texts = random_texts(2)
    rows = [json.dumps({'text': text, 'id': str(i)}) for i, text in enumerate(texts)]
    (folder/'texts.jsonl').write_text('\n'.join(rows), encoding='utf-8')
    args = ['--tokenizer', folder/'byte_level.json', '--held-out', '.2', '--workers', '2']
    assert main([str(word) for word in ('data', folder/'out', folder/'texts.jsonl', *args)]) == 0
    return texts, {side: TokenShards(folder/'out'/side) for side in SIDES}

def documents(shards):
    "By what lies on the disk"
    [shard] = shards.manifest['shards']
    path = shards.folder/shard['name']
    ends = np.fromfile(f'{path}.index', '<u8').astype(int)
    return [part.tolist() for part in np.split(np.fromfile(path, '<u2'), ends[:-1])]

def test_shards_hold_the_ids_of_the_library_and_no_border_but_their_own(folder, made):
    texts, shards = made
    library = Library.from_file(str(folder/'byte_level.json'))
    library.encode_special_tokens = True
    wanted = [[0, *library.encode(text).ids, 0] for text in texts if text]
    found = [doc for side in SIDES for doc in documents(shards[side])]
    assert sorted(doc for doc in found if len(doc) > 2) == sorted(wanted)
    assert all(doc.count(0) == 2 for doc in found)
    assert sum(s.n_bytes for s in shards.values()) == sum(len(text.encode()) for text in texts)
    for side in SIDES: shards[side].verify()

def test_a_run_trains_on_them_and_writes_text(folder, made, run_file, tmp_path, capsys):
    path, tokens = run_file(3, name='own'), (folder/'out').as_posix()
    lines = path.read_text().splitlines()
    sides = {f'{name} = ': f'{name} = "{tokens}/{name}"' for name in SIDES}
    path.write_text('\n'.join(next((new for at, new in sides.items() if line.startswith(at)), line)
                              for line in lines))
    assert main(['train', str(path)]) == 0 and 'bits per byte' in capsys.readouterr().out
    asked = ['--prompt', 'the Wörter', '--max-new-tokens', '5', '--seed', '1']
    assert main(['generate', str(tmp_path/'own'), *asked]) == 0
    assert capsys.readouterr().out.startswith('the Wörter')
    assert main(['eval', str(tmp_path/'own'), '--json']) == 0
    assert 0 < json.loads(capsys.readouterr().out)['checkpoints'][0]['bits_per_byte'] < 30

def test_ids_of_its_own_bring_their_tokenizer(folder, tmp_path):
    np.save(tmp_path/'ids.npy', TokenShards(folder/'out'/'train').read(0, 3000))
    args = '--separator', 0, '--tokenizer', folder/'byte_level.json', '--held-out', .3
    assert main([*map(str, ('data', 'ids', tmp_path/'out', tmp_path/'ids.npy', *args))]) == 0
    digest = Tokenizer(folder/'byte_level.json').digest
    assert all(TokenShards(tmp_path/'out'/side).tokenizer_digest == digest for side in SIDES)

@pytest.mark.parametrize('data, words', [
    (b'{}', 'no tokenizer.json'), (b'{"model": {}}', 'no tokenizer.json'), (b'{"\xff"}', 'no tokenizer.json'),
    (b'{"a":'*10**5, 'no tokenizer.json'), (b'[1]', 'not a SentencePiece model'), (None, 'no special token'),
    ('cut', 'no tokenizer.json')])
def test_mistakes_are_one_line_and_make_nothing(folder, made, tmp_path, capsys, data, words):
    path = tmp_path/'tokenizer.json'
    if data == 'cut': data = (folder/'byte_level.json').read_bytes()[:3000]
    if data is None: data = Library(models.BPE({'a': 0}, [])).to_str().encode()
    path.write_bytes(data)
    code = main([*map(str, ('data', tmp_path/'out', folder/'texts.jsonl', '--tokenizer', path))])
    said = capsys.readouterr().err
    assert code == 2 and words in said and said.count('\n') == 1 and len(said) < 500, said
    assert [p.name for p in tmp_path.iterdir()] == ['tokenizer.json']

def test_without_the_library_the_way_out_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(UserError, match=r"pip install 'llama_nb\[huggingface\]'"):
        Tokenizer(folder/'byte_level.json')

ENDS = {'<|endoftext|>': 0, 'a': 1}

def model(**said): return lambda made: made.update(model=said)
def normalised(**said): return lambda made: made.update(normalizer=said)

BROKEN = {'words without unknown': model(type='WordLevel', vocab=ENDS, unk_token='[UNK]'),
          'unigrams without unknown': model(type='Unigram', unk_id=None, byte_fallback=False,
                                            vocab=[['<|endoftext|>', 0.], ['a', -1.]]),
          'an unknown that is none': lambda made: made['model'].update(vocab=ENDS, merges=[], unk_token='?'),
          'an id of 2^31': lambda made: made['model']['vocab'].update(zzz=2**31),
          'a table that is none': normalised(type='Precompiled', precompiled_charsmap=''),
          'a long beginning': normalised(type='Prepend', prepend='x'*10**6),
          'a text that grows': normalised(type='Sequence', normalizers=6*[
              {'type': 'Replace', 'pattern': {'String': 'e'}, 'content': 'e'*100}])}

@pytest.mark.parametrize('how', BROKEN)
def test_a_tokenizer_json_that_cannot_work(tmp_path, how):
    "The library raised something of its own, some of it no `Exception`, or took all memory"
    made = json.loads(byte_level().to_str())
    BROKEN[how](made)
    (tmp_path/'t.json').write_text(json.dumps(made))
    with pytest.raises(UserError) as e: Tokenizer(tmp_path/'t.json').encode('the sheep')
    assert '\n' not in str(e.value) and len(str(e.value)) < 400

def test_chance_and_templates_of_a_tokenizer_json_count_for_nothing(tmp_path):
    "A text has one row of ids, of the text alone: not with `dropout`, not where a template leaves it out"
    library = byte_level()
    library.save(str(tmp_path/'a.json'))
    made = json.loads(library.to_str())
    made['model']['dropout'] = .5
    made['post_processor'] = {'type': 'TemplateProcessing', 'pair': [], 'special_tokens': {},
                              'single': [{'SpecialToken': {'id': 'x', 'type_id': 0}}]}
    (tmp_path/'b.json').write_text(json.dumps(made))
    a, b = (Tokenizer(tmp_path/name) for name in ('a.json', 'b.json'))
    for text in random_texts(3, 20): assert a.encode(text) == b.encode(text)

def test_a_tokenizer_that_loses_text_is_named(folder, tokens, tmp_path, capsys):
    dropping = Library(models.BPE({'<s>': 0, '</s>': 1, 'a': 2, 'b': 3, 'ab': 4}, [('a', 'b')]))
    dropping.add_special_tokens(['<s>', '</s>'])
    dropping.save(str(tmp_path/'dropping.json'))
    (tmp_path/'text').mkdir()
    for i in range(40): (tmp_path/'text'/f'{i}.txt').write_text(f'ab {i} abba')
    def told(path, name):
        assert main(['data', str(tmp_path/name), str(tmp_path/'text'), '--tokenizer', str(path)]) == 0
        return [line for line in capsys.readouterr().err.splitlines() if 'hint' in line]
    lossless = folder/'byte_level.json', tokens/'tokenizer.model'
    assert [told(path, str(i)) for i, path in enumerate(lossless)] == [[], []]
    small, none = told(folder/'word_piece.json', 'small'), told(tmp_path/'dropping.json', 'none')
    assert len(small) == 1 and 'word_piece.json' in small[0] and "makes 'a" in small[0]
    assert len(none) == 1 and "makes '' of" in none[0]

def test_a_tokenizer_that_refuses_other_words_is_no_loss(tmp_path, capsys):
    "It knows the words of this text; neither the example nor a line break is asked of it"
    strict = Library(models.WordLevel({'<s>': 0, '</s>': 1, 'ab': 2, 'abba': 3}))
    strict.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    strict.add_special_tokens(['<s>', '</s>'])
    strict.save(str(tmp_path/'strict.json'))
    (tmp_path/'text').mkdir()
    for i in range(40): (tmp_path/'text'/f'{i}.txt').write_text('ab abba '*(2000 + i))
    args = 'data', tmp_path/'out', tmp_path/'text', '--tokenizer', tmp_path/'strict.json'
    assert main([*map(str, args)]) == 0 and 'hint' not in capsys.readouterr().err
