"""Weights in Meta's and Hugging Face's format: transformers is the judge, files are split by other code,
damage is told in one line, and the command line leads from a run to both formats and back."""
import json, os, random, resource, shutil
from pathlib import Path
import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from llama_nb.config import PRESETS, ModelConfig
from llama_nb.core import UserError
from llama_nb.data.tokenizer import Tokenizer
from llama_nb.infer.load import open_run
from llama_nb.interop.gguf import save_gguf
from llama_nb.interop.hf import hf_config, hf_name, load_hf, model_config, save_hf, save_tokenizer
from llama_nb.interop.meta import load_meta, meta_config, save_meta, split_axis
from llama_nb.model.transformer import LLaMA, empty_model
from test_tokenizer_json import random_texts

SIZES = [ModelConfig(64, 2, 4, vocab_size=96, multiple_of=32, norm_eps=1e-5),
         ModelConfig(96, 3, 2, vocab_size=200, multiple_of=8, norm_eps=1e-2, rope_theta=300.),
         ModelConfig(32, 1, 4, vocab_size=64, multiple_of=256, max_seq_len=128)]

def drawn(config, seed=0):
    "A model whose attention is far from uniform, so that a wrong rotation shows"
    torch.manual_seed(seed)
    model = LLaMA(config)
    for p in model.parameters(): p.data = torch.randn(p.shape)*.2 + (p.ndim == 1)
    return model

@torch.no_grad()
def off(ours, theirs, vocab):
    "The largest difference of logits, of the largest logit"
    torch.manual_seed(1)
    tokens = torch.randint(vocab, (2, 60))
    a, b = ours(tokens), theirs(tokens).logits
    return ((a - b).abs().max()/b.abs().max()).item()

def read_by_transformers(folder): return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

def shapes_of(model): return {name: tuple(w.shape) for name, w in model.state_dict().items()}

def same(a, b): return all(torch.equal(w, b.state_dict()[name]) for name, w in a.state_dict().items())

# --- transformers judges -------------------------------------------------------------------------

@pytest.mark.parametrize('config', SIZES, ids=str)
def test_transformers_reads_what_is_written(config, tmp_path):
    "Through Meta's files, in as many as the heads allow, and through parts of 20 kB"
    model = drawn(config)
    save_meta(model, tmp_path/'meta', config.n_heads, dtype=torch.float32)
    save_hf(load_meta(tmp_path/'meta'), tmp_path/'hf', part_bytes=20_000)
    assert len([*(tmp_path/'hf').glob('*.safetensors')]) > 3
    theirs = read_by_transformers(tmp_path/'hf')
    assert off(model, theirs, config.vocab_size) < 1e-5           # float32 rounds at 6e-8, some hundred times
    assert theirs.config.rms_norm_eps == config.norm_eps
    assert sum(p.numel() for p in theirs.parameters()) == config.n_params

@pytest.mark.parametrize('config', SIZES, ids=str)
@pytest.mark.parametrize('kind', ['safetensors', 'parts', 'bin', 'bins', 'of 2023'])
def test_what_transformers_writes_is_read(config, kind, tmp_path):
    torch.manual_seed(2)
    theirs = LlamaForCausalLM(LlamaConfig(
        hidden_size=config.dim, intermediate_size=config.ffn_dim, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, vocab_size=config.vocab_size, rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_seq_len, rope_theta=config.rope_theta,
        initializer_range=.2)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size='30KB' if kind == 'parts' else '1GB')
    if kind not in ('safetensors', 'parts'): as_pickles(tmp_path, theirs.state_dict(), kind)
    if kind == 'of 2023': as_in_2023(tmp_path, config)
    model = load_hf(tmp_path)
    assert off(model, theirs, config.vocab_size) < 1e-5
    assert (model.config.norm_eps, model.config.rope_theta) == (config.norm_eps, config.rope_theta)
    assert model.config.max_seq_len == config.max_seq_len

def as_pickles(folder, state, kind):
    "pytorch_model.bin, or two of them with an index"
    (folder/'model.safetensors').unlink()
    if kind == 'bin': return torch.save(state, folder/'pytorch_model.bin')
    names = [*state]
    parts = {f'pytorch_model-0000{i + 1}-of-00002.bin': names[i::2] for i in range(2)}
    for file, part in parts.items(): torch.save({name: state[name] for name in part}, folder/file)
    index = {'metadata': {}, 'weight_map': {name: file for file, part in parts.items() for name in part}}
    (folder/'pytorch_model.bin.index.json').write_text(json.dumps(index))

def as_in_2023(folder, config):
    "The words of transformers 4.28, and the frequencies that were stored then"
    file = folder/'pytorch_model-00001-of-00002.bin'
    freqs = {f'model.layers.{i}.self_attn.rotary_emb.inv_freq': torch.ones(4) for i in range(config.n_layers)}
    torch.save(torch.load(file, weights_only=True) | freqs, file)
    words = json.loads((folder/'config.json').read_text())
    for name in ('rope_parameters', 'num_key_value_heads', 'head_dim', 'attention_bias', 'mlp_bias'):
        words.pop(name)
    words |= {'rope_theta': config.rope_theta, 'torch_dtype': 'float16', 'max_sequence_length': 2048}
    (folder/'config.json').write_text(json.dumps(words))

@pytest.mark.parametrize('name', PRESETS)
def test_every_preset_goes_through_both_configurations(name):
    config = PRESETS[name]
    again = model_config(json.loads(json.dumps(hf_config(config, torch.float16))))
    assert (again.n_params, again.ffn_dim) == (config.n_params, config.ffn_dim)
    assert again.norm_eps == config.norm_eps
    theirs = LlamaConfig(**hf_config(config, torch.float16))
    with torch.device('meta'): shapes = shapes_of(LlamaForCausalLM(theirs))
    assert {hf_name(name): shape for name, shape in shapes_of(empty_model(config)).items()} == shapes

# --- Meta's files, split by other code ------------------------------------------------------------

COLUMNS = 'wq', 'wk', 'wv', 'w1', 'w3', 'output'            # of the published layout: axis 0
ROWS = 'wo', 'w2', 'tok_embeddings'                         # axis 1

def split_by_hand(state, folder, n, dtype):
    "As a rank of the released code holds it: numpy slices, and the frequencies that it stored"
    for rank in range(n):
        part = {'rope.freqs': 10000**-(torch.arange(0, 16, 2)/16).to(dtype)}
        for name, w in state.items():
            kind, w = name.split('.')[-2], w.detach().numpy()
            if kind in COLUMNS: w = np.split(w, n, 0)[rank]
            if kind in ROWS: w = np.split(w, n, 1)[rank]
            part[name] = torch.from_numpy(w.copy()).to(dtype)
        torch.save(part, folder/f'consolidated.{rank:02d}.pth')

@pytest.mark.parametrize('n', [1, 2, 4])
def test_released_files(n, tmp_path):
    model = drawn(SIZES[0])
    split_by_hand(model.state_dict(), tmp_path, n, torch.float16)
    words = {'dim': 64, 'multiple_of': 32, 'n_heads': 4, 'n_layers': 2, 'norm_eps': 1e-05, 'vocab_size': -1}
    (tmp_path/'params.json').write_text(json.dumps(words))
    read = load_meta(tmp_path)
    assert read.config == SIZES[0]
    for name, w in read.state_dict().items(): assert torch.equal(w, model.state_dict()[name].half().float())
    assert {w.dtype for w in load_meta(tmp_path, None).state_dict().values()} == {torch.float16}

def test_axes_and_sizes_are_those_of_the_released_files():
    "One of the eight files of 65B, and the configurations with their epsilon"
    share = {name: [s//8 if i == split_axis(name) else s for i, s in enumerate(w.shape)]
             for name, w in empty_model(PRESETS['65B']).state_dict().items()}
    assert share['layers.79.attention.wk.weight'] == [1024, 8192] == share['layers.0.attention.wq.weight']
    assert share['layers.0.attention.wo.weight'] == [8192, 1024]
    assert share['layers.0.feed_forward.w1.weight'] == [2752, 8192]
    assert share['layers.0.feed_forward.w3.weight'] == [2752, 8192]
    assert share['layers.0.feed_forward.w2.weight'] == [8192, 2752]
    assert share['tok_embeddings.weight'] == [32000, 1024] and share['output.weight'] == [4000, 8192]
    assert share['norm.weight'] == share['layers.5.ffn_norm.weight'] == [8192]
    for name, dim, heads, layers, eps in (('7B', 4096, 32, 32, 1e-6), ('13B', 5120, 40, 40, 1e-6),
                                          ('33B', 6656, 52, 60, 1e-6), ('65B', 8192, 64, 80, 1e-5)):
        words = {'dim': dim, 'multiple_of': 256, 'n_heads': heads, 'n_layers': layers, 'norm_eps': eps}
        assert meta_config({**words, 'vocab_size': -1}, 32000) == PRESETS[name]

def test_an_embedding_as_wide_as_it_is_long(tmp_path):
    "No shape tells the two axes apart here; the values do"
    model = drawn(ModelConfig(64, 1, 4, vocab_size=64, multiple_of=16))
    split_by_hand(model.state_dict(), tmp_path, 2, torch.float32)
    words = {'dim': 64, 'multiple_of': 16, 'n_heads': 4, 'n_layers': 1}
    (tmp_path/'params.json').write_text(json.dumps(words))
    assert same(model, load_meta(tmp_path))

# --- damage ----------------------------------------------------------------------------------------

def saved(form, folder):
    model = drawn(SIZES[2])
    if form == 'meta':
        save_meta(model, folder, 2, dtype=torch.float32)
    else:
        save_hf(model, folder, part_bytes=30_000)
    return model, {'meta': load_meta, 'hf': load_hf}[form]

def spoil(file:Path, rng):
    "Bits turned over, bytes cut off, put in or exchanged"
    data = bytearray(file.read_bytes())
    at, length = rng.randrange(len(data)), rng.randint(1, 200)
    how = rng.choice(('bit', 'cut', 'hole', 'more', 'zeros', 'begin'))
    if how == 'bit': data[at] ^= 1 << rng.randrange(8)
    if how == 'cut': del data[at:]
    if how == 'hole': del data[at:at + length]
    if how == 'more': data[at:at] = rng.randbytes(length)
    if how == 'zeros': data[at:at + length] = bytes(len(data[at:at + length]))
    if how == 'begin': data[rng.randrange(min(400, len(data)))] = rng.randrange(256)
    file.write_bytes(data)

@pytest.mark.parametrize('form', ['meta', 'hf'])
def test_damage_is_an_error_of_one_line_or_other_numbers(form, tmp_path):
    "These formats have no digests, so a changed weight may pass; nothing else may"
    model, load = saved(form, tmp_path/'good')
    rng, refused = random.Random(0), 0
    for i in range(150):
        folder = tmp_path/f'{i}'
        shutil.copytree(tmp_path/'good', folder)
        spoil(rng.choice(sorted(folder.iterdir())), rng)
        try:
            read = load(folder)
            assert shapes_of(read) == shapes_of(model)
            assert all(w.isfinite().all() for w in read.state_dict().values())
        except (UserError, OSError) as e:
            assert '\n' not in str(e)
            refused += 1
        shutil.rmtree(folder)
    assert 40 < refused < 150

@pytest.mark.parametrize('form', ['meta', 'hf'])
def test_every_missing_file_is_named(form, tmp_path):
    _, load = saved(form, tmp_path/'good')
    for file in sorted(path.name for path in (tmp_path/'good').iterdir()):
        shutil.copytree(tmp_path/'good', tmp_path/file)
        (tmp_path/file/file).unlink()
        with pytest.raises((UserError, OSError)) as e: load(tmp_path/file)
        assert '\n' not in str(e.value)

@pytest.mark.parametrize('change, words', [
    (lambda part: part | {'norm.weight': part['norm.weight'] + 1}, 'not the same in all files'),
    (lambda part: part | {'output.weight': part['output.weight']*torch.nan}, 'not finite'),
    (lambda part: part | {'bias': torch.zeros(3)}, 'has bias, which is not of this network'),
    (lambda part: part | {'rope.freqs': torch.ones(4)}, 'rope.freqs are not those')])
def test_parts_that_do_not_belong_together(change, words, tmp_path):
    saved('meta', tmp_path/'meta')
    file = tmp_path/'meta'/'consolidated.01.pth'
    torch.save(change(torch.load(file, weights_only=True)), file)
    with pytest.raises(UserError, match=words): load_meta(tmp_path/'meta')

class Runs:
    "What is unpickled makes a file"
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)

@pytest.mark.parametrize('place', ['value', 'key', 'beside', 'all'])
def test_nothing_in_a_file_is_run(place, tmp_path):
    for form, file in (('meta', 'consolidated.00.pth'), ('hf', 'pytorch_model.bin')):
        folder = tmp_path/form
        folder.mkdir()
        evil = Runs(tmp_path/'ran')
        state = {hf_name(n) if form == 'hf' else n: w for n, w in drawn(SIZES[2]).state_dict().items()}
        first = next(iter(state))
        content = {'value': {**state, first: evil}, 'key': {**state, evil: state[first]},
                   'beside': {**state, 'extra': [evil]}, 'all': evil}[place]
        torch.save(content, folder/file)
        (folder/'config.json').write_text(json.dumps(hf_config(SIZES[2], torch.float32)))
        (folder/'params.json').write_text(json.dumps({'dim': 32, 'n_layers': 1, 'n_heads': 4}))
        with pytest.raises(UserError, match='nothing of it was run'):
            (load_hf if form == 'hf' else load_meta)(folder)
    assert not (tmp_path/'ran').exists()

@pytest.mark.parametrize('name', ['../w.safetensors', '/etc/passwd', 'a/w.safetensors', '..', '',
                                  'w\n.safetensors'])
def test_an_index_leads_nowhere_else(name, tmp_path):
    saved('hf', tmp_path/'hf')
    save_file({'lm_head.weight': torch.zeros(64, 32)}, tmp_path/'w.safetensors')
    index = tmp_path/'hf'/'model.safetensors.index.json'
    words = json.loads(index.read_text())
    words['weight_map']['lm_head.weight'] = name
    index.write_text(json.dumps(words))
    with pytest.raises(UserError, match='is damaged: Expected another text'): load_hf(tmp_path/'hf')

def test_weights_of_other_kinds(tmp_path):
    "Whole numbers, eight bits, twice the same name, a pipe; links are followed, as in a cache"
    model, _ = saved('hf', tmp_path/'hf')
    file = sorted((tmp_path/'hf').glob('*.safetensors'))[0]
    good, state = file.read_bytes(), load_file(file)
    name = [*state][0]
    w = state[name]
    for wrong in (w.int(), w.to(torch.float8_e4m3fn), w[1:], w*torch.inf):
        save_file(state | {name: wrong.contiguous()}, file)
        with pytest.raises(UserError): load_hf(tmp_path/'hf')
    other = sorted((tmp_path/'hf').glob('*.safetensors'))[1]
    file.write_bytes(good)
    more = load_file(other)
    save_file(more | {name: state[name]}, other)
    with pytest.raises(UserError, match='is there twice'): load_hf(tmp_path/'hf')
    save_file(more, other)
    assert same(model, load_hf(tmp_path/'hf'))
    file.rename(tmp_path/'elsewhere')
    file.symlink_to(tmp_path/'elsewhere')
    assert same(model, load_hf(tmp_path/'hf'))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match='a FIFO'): load_hf(tmp_path/'hf')

# --- tokenizers ------------------------------------------------------------------------------------

def test_the_ids_of_sentencepiece(tokens, tmp_path):
    "Also of texts that look like special tokens, and of runs of spaces; and back to the text"
    ours = Tokenizer(tokens/'tokenizer.model')
    save_tokenizer(ours, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*random_texts(3), 'def f(x):\n        return   x\n', '   ', ' a', 'a ', '\n', 'Ａé\u0301']
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids, text
        if '▁' not in text: assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)

def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(['some words of a text', 'and some more words']*50), vocab_size=19,
        model_prefix=str(tmp_path/'unigram'), model_type='unigram', minloglevel=2)
    unigram = Tokenizer(tmp_path/'unigram.model')
    with pytest.raises(UserError, match='which is BPE'): save_tokenizer(unigram, tmp_path)

# --- llama.cpp -------------------------------------------------------------------------------------

def next_by_llama_cpp(server, prompt):
    "id -> log probability of the next token, for its eight most likely ones; a prompt is ids or a text"
    said = server.handle_completions({'prompt': prompt, 'n_predict': 1, 'n_probs': 8, 'temperature': 0,
                                      'cache_prompt': False})
    return {row['id']: row['logprob'] for row in said['choices'][0]['logprobs']['content'][0]['top_logprobs']}

@pytest.mark.parametrize('dtype, most', [(torch.float32, 1e-4), (torch.float16, .1)], ids=str)
def test_llama_cpp_has_our_probabilities(tokens, tmp_path, dtype, most):
    "And our ids, of texts; float32 rounds at 6e-8, float16 at 5e-4 of each weight"
    cpp = pytest.importorskip('xllamacpp')
    tokenizer = Tokenizer(tokens/'tokenizer.model')
    model = drawn(ModelConfig(128, 3, 4, vocab_size=410, multiple_of=32, norm_eps=1e-3, rope_theta=300.))
    for p in model.parameters():
        if p.ndim > 1: p.data /= 2
    model.output.weight.data[:259] = 0      # its server reports nothing of a token that is half a character
    save_gguf(model, tmp_path/'model.gguf', tokenizer, dtype)
    asked = cpp.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_parallel = str(tmp_path/'model.gguf'), 256, 1
    asked.cpuparams.n_threads = 1
    asked.warmup, asked.flash_attn_type = False, cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    asked.cache_type_k = asked.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
    server = cpp.Server(asked)
    rng = random.Random(0)
    prompts = [[1, *(rng.randrange(3, 400) for _ in range(n))] for n in (1, 7, 40)]
    texts = ['def f(x):\n        return   x\n', '  two  spaces ', '2023', 'naïve 漢字 🦙', 'The class']
    for prompt in [*prompts, *texts]:
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        with torch.no_grad(): ours = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        for i, p in next_by_llama_cpp(server, prompt).items(): assert abs(p - ours[i].item()) < most, prompt

# --- the command line -----------------------------------------------------------------------------

def test_from_a_run_to_both_forms_and_back(trained, llama_nb, tmp_path):
    "The same text from each; the last file is the first one, byte for byte"
    chain = [(trained, 'a.safetensors', ()), (trained, 'hf', ('--format', 'hf')),
             (tmp_path/'hf', 'meta', ('--format', 'meta', '--dtype', 'float32', '--shards', 4)),
             (tmp_path/'meta', 'hf-2', ('--format', 'hf')), (tmp_path/'hf-2', 'b.safetensors', ())]
    for source, out, more in chain:
        status, shown, err = llama_nb('convert', source, tmp_path/out, *more)
        assert status == 0 and f'-> {tmp_path/out}: ' in shown, err
    assert (tmp_path/'a.safetensors').read_bytes() == (tmp_path/'b.safetensors').read_bytes()
    ask = '--prompt', 'The class', '--temperature', 0, '--max-new-tokens', 12, '--device', 'cpu'
    said = [llama_nb('generate', folder, *ask) for folder in (trained, tmp_path/'hf', tmp_path/'meta')]
    assert said[0][0] == 0 and said[0][:2] == said[1][:2] == said[2][:2]

def test_released_weights_are_evaluated(trained, tokens, llama_nb, tmp_path):
    "With the run's numbers, in windows of the same length; a text must be named"
    assert llama_nb('convert', trained, tmp_path/'hf', '--format', 'hf')[0] == 0
    on = '--tokens', tokens/'held_out', '--device', 'cpu', '--json'
    ran, released = (json.loads(llama_nb('eval', folder, *on)[1]) for folder in (trained, tmp_path/'hf'))
    assert released['checkpoints'][0].pop('step') is released['checkpoints'][0].pop('tokens_seen') is None
    for name, x in released['checkpoints'][0].items(): assert ran['checkpoints'][0][name] == x
    assert (released['window'], released['bytes']) == (64, ran['bytes'])
    assert 'released weights' in llama_nb('eval', tmp_path/'hf', '--text', __file__, '--device', 'cpu')[1]
    for more, words in (((), 'give --text or --tokens'), (('--all', *on), 'has one model')):
        status, _, err = llama_nb('eval', tmp_path/'hf', *more)
        assert status == 2 and words in err and err.count('\n') == 1, err

def test_training_begins_with_weights_of_others(trained, run_file, llama_nb, tmp_path):
    for args in ((trained, tmp_path/'hf', '--format', 'hf', '--dtype', 'bfloat16'),
                 (tmp_path/'hf', tmp_path/'w.safetensors')):
        assert llama_nb('convert', *args)[0] == 0
    start = '--train.init', tmp_path/'w.safetensors'
    status, shown, err = llama_nb('train', run_file(1), *start, '--optim.lr', 1e-12,
                                  '--optim.warmup_steps', 0)
    assert status == 0 and 'begins     with the weights of' in shown, err
    began, wanted = (open_run(path, 'cpu')[0].state_dict() for path in (tmp_path/'run', trained))
    for name, w in began.items(): torch.testing.assert_close(w, wanted[name], rtol=2**-8, atol=1e-7)

@pytest.mark.parametrize('args, words', [
    (('out', '--format', 'ggml'), 'safetensors'), (('out',), 'must end in .safetensors'),
    (('out', '--format', 'gguf'), 'must end in .gguf'),
    (('out', '--format', 'meta', '--shards', '3'), 'cannot share'),
    (('out', '--format', 'hf', '--shards', '2'), 'shards are of'),
    (('w.safetensors', '--dtype', 'float8'), 'dtype'), (('there', '--format', 'hf'), 'exists already')])
def test_a_wrong_conversion_is_one_line(trained, llama_nb, tmp_path, args, words):
    (tmp_path/'there').mkdir()
    status, _, err = llama_nb('convert', trained, tmp_path/args[0], *args[1:])
    assert status == 2 and words in err and 'Traceback' not in err and err.count('\n') == 1, err
    assert [path.name for path in tmp_path.iterdir()] == ['there']

def test_a_folder_of_another_network_is_one_line(trained, llama_nb, tmp_path):
    assert llama_nb('convert', trained, tmp_path/'hf', '--format', 'hf')[0] == 0
    file = tmp_path/'hf'/'config.json'
    file.write_text(file.read_text().replace('"num_key_value_heads": 4', '"num_key_value_heads": 2'))
    for line in (('generate', tmp_path/'hf'), ('convert', tmp_path/'hf', tmp_path/'w.safetensors')):
        status, _, err = llama_nb(*line)
        assert status == 2 and 'grouped-query attention' in err and err.count('\n') == 1, err

@pytest.mark.parametrize('more', [('hf', '--format', 'hf'), ('w.gguf', '--format', 'gguf'),
                                  ('meta', '--format', 'meta', '--dtype', 'float32')])
def test_a_full_disk_leaves_nothing(trained, llama_nb, tmp_path, more):
    "A limit of the file's size stands for it"
    def limit(): resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    status, _, err = llama_nb('convert', trained, tmp_path/more[0], *more[1:], preexec_fn=limit)
    assert status != 0 and 'Traceback' not in err, err
    assert [*tmp_path.iterdir()] == []
