"What a command does not load: a help text must not wait for the trainer."
import subprocess, sys
import pytest
from conftest import ENV

# What no help text needs and what is costly: DTensor and the distributed checkpoint bring sympy with them
COSTLY = {'torch.distributed.tensor', 'torch.distributed.checkpoint', 'torch.distributed.fsdp', 'sympy',
          'sentencepiece', 'safetensors', 'llama_nb.model', 'llama_nb.data', 'llama_nb.train'}
TORCH = 'import sys, torch.distributed.device_mesh'
COMMAND = '''
import sys
from llama_nb.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as e:
    code = e.code
assert not code, code
'''

def loaded(program, *args):
    "Names of the modules that a program has loaded when it ends"
    program += '\nprint(*sys.modules, file=sys.stderr)'
    done = subprocess.run([sys.executable, '-c', program, *args], env=ENV, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())

@pytest.fixture(scope='module')
def costly():
    "What is costly and not loaded by PyTorch itself, whatever its version"
    return COSTLY - loaded(TORCH)

@pytest.mark.parametrize('args', [('--help',), ('data', '--help'), ('train', '--help')])
def test_a_help_text_loads_neither_pytorch_nor_trainer(args, costly):
    found = loaded(COMMAND, *args)
    assert {'llama_nb.cli', 'llama_nb.commands.run', 'tyro'} <= found and 'torch' not in found
    assert 'llama_nb.train' in costly and not found & costly

def test_the_package_offers_its_names_without_pytorch():
    "`import llama_nb` and `dir` load nothing; one star takes all that is offered"
    found = loaded('import sys, llama_nb\nassert {"LLaMA", "PRESETS", "generate"} <= set(dir(llama_nb))\n'
                   'llama_nb.PRESETS["7B"]')
    assert 'llama_nb.config' in found and 'torch' not in found
    found = loaded('import sys\nfrom llama_nb import *\nfit, LLaMA(PRESETS["toy"])')
    assert 'llama_nb.train.trainer' in found

def test_a_process_that_cleans_text_starts_without_pytorch():
    "A hundred of them may start at once, and each would wait for it"
    names = 'archive arxiv books c4 classify commoncrawl engine github ngram stackexchange wikipedia'.split()
    found = loaded('import sys\n' + '\n'.join(f'import llama_nb.data.{name}' for name in names))
    assert 'llama_nb.data.engine' in found and 'torch' not in found

def test_text_becomes_shards_without_them(tmp_path, costly):
    "Neither a model nor a trainer nor DTensor is needed"
    texts = tmp_path/'texts'
    texts.mkdir()
    (texts/'text.txt').write_text('\n'.join(f'{i} sheep and {i*i} stars' for i in range(400)))
    for part in 'abcd': (texts/f'{part}.txt').write_text(f'{part} says what it says, {part} times')
    made, text, out = str(tmp_path/'tok.model'), str(texts), tmp_path/'out'
    found = loaded(COMMAND, 'tokenizer', made, text, '--vocab-size', '300')
    found |= loaded(COMMAND, 'data', str(out), text, '--tokenizer', made, '--held-out', '0.5')
    assert 'llama_nb.data.shards' in found and (out/'train'/'manifest.json').exists()
    assert not found & (costly - {'llama_nb.data', 'sentencepiece'})
