"`llama-nb eval` and `generate` on a run, beside transformers' LLaMA with the same weights."
import json, math, subprocess, zlib
import pytest, torch
from conftest import ENV, command
from safetensors.torch import load_file

TEXTS = ['The class statement', 'Names refer to objects.', 'ä € 🦙', '', 'x = 1\nif x: print(x)']
NAMES = {'tok_embeddings': 'model.embed_tokens', 'layers': 'model.layers', 'norm': 'model.norm',
         'output': 'lm_head', 'attention': 'self_attn', 'attention_norm': 'input_layernorm',
         'feed_forward': 'mlp', 'ffn_norm': 'post_attention_layernorm', 'wq': 'q_proj', 'wk': 'k_proj',
         'wv': 'v_proj', 'wo': 'o_proj', 'w1': 'gate_proj', 'w2': 'down_proj', 'w3': 'up_proj'}

@pytest.fixture(scope='module')
def run(tmp_path_factory, tokens, llama_nb):
    "A run of twelve steps with two checkpoints, whose documents are separate"
    from conftest import RUN
    folder = tmp_path_factory.mktemp('eval')
    text = RUN.format(out=(folder/'run').as_posix(), tokens=tokens.as_posix(), steps=12, save_every=6)
    (folder/'run.toml').write_text(text)
    code, _, err = llama_nb('train', folder/'run.toml', '--data.documents', 'separate')
    assert code == 0, err
    lines = [json.dumps({'text': text, 'id': str(i)}) for i, text in enumerate(TEXTS)]
    (folder/'texts.jsonl').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return folder/'run'

def halves(w, heads=4):
    "Rows of a query or key matrix, from neighbouring pairs to Hugging Face's two halves"
    return w.view(heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)

@pytest.fixture(scope='module')
def theirs(run, llama_nb):
    from transformers import LlamaConfig, LlamaForCausalLM
    assert llama_nb('convert', run, run.parent/'weights.safetensors')[0] == 0
    weights = load_file(run.parent/'weights.safetensors')
    f = weights['layers.0.feed_forward.w1.weight'].shape[0]
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=f, num_hidden_layers=2, num_attention_heads=4,
        rms_norm_eps=1e-6, max_position_embeddings=64, tie_word_embeddings=False))
    renamed = {'.'.join(NAMES.get(part, part) for part in name.split('.')):
               halves(w) if name.endswith(('wq.weight', 'wk.weight')) else w for name, w in weights.items()}
    model.load_state_dict(renamed)
    return model.eval()

@torch.no_grad()
def next_nats(model, before, token):
    "-ln p of a token, all that was before it in one pass"
    return -model(torch.tensor([before])).logits[0, -1].log_softmax(-1)[token].item()

def evaluate(llama_nb, *args):
    code, out, err = llama_nb('eval', *args, '--device', 'cpu', '--json')
    assert code == 0, err
    return json.loads(out)

def encoded(run):
    from llama_nb.data.tokenizer import Tokenizer
    tokenizer = Tokenizer(run/'tokenizer.model')
    return [tokenizer.encode(text, bos=True, eos=True) for text in TEXTS]

def test_own_documents_token_by_token(run, theirs, llama_nb):
    "Each document alone, each token after all tokens of its document, and the next document's first one too"
    documents, nats, n = encoded(run), 0., 0
    assert max(map(len, documents)) < 64                      # whole in every window that ends in it
    for ids, following in zip(documents, [*documents[1:], []]):
        ids = ids + following[:1]
        nats += sum(next_nats(theirs, ids[:i], ids[i]) for i in range(1, len(ids)))
        n += len(ids) - 1
    found = evaluate(llama_nb, run, '--text', run.parent/'texts.jsonl', '--stride', '1')
    row, size = found['checkpoints'][0], sum(len(text.encode()) for text in TEXTS)
    assert (found['documents'], found['bytes'], found['tokens']) == (len(TEXTS), size, n + 1)
    assert row['nats_per_token'] == pytest.approx(nats/n, rel=1e-5)
    assert row['perplexity'] == pytest.approx(math.exp(nats/n), rel=1e-5)
    assert row['bits_per_byte'] == pytest.approx(nats/math.log(2)/size, rel=1e-5)
    packed = sum(len(zlib.compress(text.encode(), 9)) for text in TEXTS)
    assert found['zlib_bits_per_byte'] == pytest.approx(8*packed/size)

def stream_nats(model, ids, stride, seq_len=64):
    "Across documents: each token after as many as its window has before it"
    nats = 0.
    for i in range(1, len(ids)):
        window = 0 if i <= seq_len else -(-(i - seq_len)//stride)
        nats += next_nats(model, ids[window*stride:i], ids[i])
    return nats

@pytest.mark.parametrize('stride', [64, 40, 16, 1])
def test_windows_across_documents(run, theirs, tmp_path, stride):
    from llama_nb.data.documents import Document
    from llama_nb.data.shards import write_shards
    from llama_nb.data.tokenizer import Tokenizer
    from llama_nb.infer.evaluate import score
    from llama_nb.infer.load import open_run
    shards = write_shards([Document(text, str(i)) for i, text in enumerate(3*TEXTS)],
                          Tokenizer(run/'tokenizer.model'), tmp_path/'shards')
    ids = shards.read(0, shards.n_tokens).tolist()
    assert len(ids) > 130                                     # several windows
    found = score(open_run(run, 'cpu')[0], shards, 64, stride)
    assert found.n_tokens == len(ids) - 1
    assert found.nats == pytest.approx(stream_nats(theirs, ids, stride), rel=1e-5)

def test_all_of_the_held_out_text_for_each_checkpoint(run, tokens, llama_nb):
    found = evaluate(llama_nb, run, '--all')
    from llama_nb.data.shards import TokenShards
    shards = TokenShards(tokens/'held_out')
    assert [row['step'] for row in found['checkpoints']] == [6, 12]
    assert (found['tokens'], found['bytes']) == (shards.n_tokens, shards.n_bytes)
    first = evaluate(llama_nb, run/'checkpoints'/'step-00000006')
    assert first['checkpoints'] == found['checkpoints'][:1]
    assert evaluate(llama_nb, run, '--tokens', tokens/'held_out')['checkpoints'] == found['checkpoints'][1:]
    code, table, _ = llama_nb('eval', run, '--device', 'cpu')
    row = found['checkpoints'][1]
    assert code == 0 and f'{row["nats_per_token"]:.3f}' in table and f'{row["bits_per_byte"]:.3f}' in table
    assert f'{found["zlib_bits_per_byte"]:.3f}' in table and f'{shards.n_tokens:,}' in table

def one_line(result, *words):
    code, out, err = result
    return code == 2 and out == '' and err.count('\n') == 1 and all(word in err for word in words)

def test_mistakes_are_one_line(run, tokens, llama_nb, tmp_path):
    from llama_nb.data.documents import topic_documents
    from llama_nb.data.shards import write_shards
    from llama_nb.data.tokenizer import train_tokenizer
    docs = list(topic_documents())[:8]
    write_shards(docs, train_tokenizer((d.text for d in docs), tmp_path/'other.model', 450), tmp_path/'other')
    (tmp_path/'latin.txt').write_bytes(b'caf\xe9')
    assert one_line(llama_nb('eval', run, '--tokens', tmp_path/'other'), 'another tokenizer', '--text')
    assert one_line(llama_nb('eval', run, '--tokens', tmp_path), 'no token shards')
    assert one_line(llama_nb('eval', run, '--text', tmp_path/'latin.txt'), 'latin.txt', 'not UTF-8')
    assert one_line(llama_nb('eval', run, '--text', tmp_path/'none'), 'none')
    assert one_line(llama_nb('eval', run, '--stride', '65'), 'from 1 to 64')
    assert one_line(llama_nb('eval', tokens/'train'), 'not the folder of a run')
    assert one_line(llama_nb('generate', run, '--n', '3', '--temperature', '0'), 'greedy')
    assert one_line(llama_nb('generate', run, '--prompts', tmp_path/'none'), 'No such file')

def test_samples_depend_on_seed_and_prompt_alone(run, llama_nb):
    def samples(*args):
        code, out, err = llama_nb('generate', run, '--max-new-tokens', '12', '--device', 'cpu', '--json',
                                  *args)
        assert code == 0, err
        assert ("hint: the prompt 'x = ' ends in a space" in err) == ('x = ' in args) and err.count('\n') <= 1
        return [json.loads(line) for line in out.splitlines()]
    many = samples('--seed', '1', '--prompt', 'class', 'x = ', '--n', '20')        # more than a batch
    assert [(row['prompt'], row['sample']) for row in many] == [(p, i) for p in ('class', 'x = ')
                                                                 for i in range(1, 21)]
    assert samples('--seed', '1', '--prompt', 'x = ', '--n', '3') == many[20:23]
    assert len({row['text'] for row in many[:20]}) == 20          # in the second batch, too
    assert samples('--seed', '2', '--prompt', 'class') != many[:1]
    code, text, _ = llama_nb('generate', run, '--max-new-tokens', '12', '--device', 'cpu', '--seed', '1',
                             '--prompt', 'class')
    printed = f'class{many[0]["text"]}\n'.replace('\r\n', '\n').replace('\r', '\n')  # as text files are read
    assert (code, text) == (0, printed)

def test_prompts_from_standard_input(run, llama_nb):
    args = ('generate', run, '--max-new-tokens', '8', '--device', 'cpu', '--seed', '1', '--json')
    done = subprocess.run(command(*args, '--prompts', '-'), input='class\n\nThe\n', env=ENV,
                          capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == llama_nb(*args, '--prompt', 'class', 'The')[:2], done.stderr
