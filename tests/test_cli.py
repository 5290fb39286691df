"What a command does not load: a help text must not wait for the trainer."
import subprocess, sys
import pytest
from conftest import ENV

# What none of the help texts needs, and what is costly: DTensor and the distributed checkpoint bring sympy
COSTLY = ('torch.distributed.tensor', 'torch.distributed.checkpoint', 'torch.distributed.fsdp', 'sympy',
          'sentencepiece', 'safetensors', 'tqdm', 'llama_nb.model', 'llama_nb.data', 'llama_nb.train')
ASK = '''
import sys
from llama_nb.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as e:
    code = e.code
assert not code, code
print(*sys.modules, file=sys.stderr)
'''

def loaded(*args):
    "Names of the modules that a command has loaded when it ends"
    done = subprocess.run([sys.executable, '-c', ASK, *args], env=ENV, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())

@pytest.mark.parametrize('args', [('--help',), ('data', '--help')])
def test_a_help_text_loads_neither_trainer_nor_distributed_tensors(args):
    found = loaded(*args)
    assert {'llama_nb.cli', 'llama_nb.config', 'torch', 'tyro'} <= found
    assert found.isdisjoint(COSTLY), sorted(found.intersection(COSTLY))

def test_data_and_tokenizer_work_without_them(tmp_path):
    "Text to shards needs no model, no trainer and no DTensor"
    (tmp_path/'text.txt').write_text('\n'.join(f'{i} sheep and {i*i} stars' for i in range(400)))
    for part in 'abcd': (tmp_path/f'{part}.txt').write_text(f'{part} says what it says, {part} times')
    made, text = str(tmp_path/'tok.model'), str(tmp_path)
    found = loaded('tokenizer', made, '--documents', text, '--vocab-size', '300')
    found |= loaded('data', str(tmp_path/'out'), '--tokenizer', made, '--documents', text,
                    '--held-out', '0.5', '--tokens-per-shard', '1000')
    assert 'llama_nb.data.shards' in found and (tmp_path/'out'/'train'/'manifest.json').exists()
    forbidden = set(COSTLY) - {'llama_nb.data', 'sentencepiece'}
    assert found.isdisjoint(forbidden), sorted(found & forbidden)
