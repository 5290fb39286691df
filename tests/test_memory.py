"Memory is what we say: what blocks keep; and a judge of the dry run."
import subprocess, sys
from pathlib import Path
import pytest
from conftest import ENV, ask
from llama_nb.run_file import load_run
from llama_nb.scale.dryrun import dry_run

def worker(name, *arguments, **options): return ask('memory_worker.py', name, arguments, **options)

# --- what blocks keep where ranks share the products --------------------------------------------

RANKS = 4
CASES = [(sequence, mode, compiled) for sequence in (True, False)
         for mode, compiled in (('linear', False), ('linear', True), ('full', False), ('none', False))]

@pytest.fixture(scope='module')
def kept(): return worker('kept_cases', RANKS, CASES)

def formula(mode, n, sequence, compiled=False, rows=2*64, d=256, f=704, heads=8):
    """Bytes of bfloat16: the stream is cut by positions if `sequence`; q k v o and the feed-forward width
    always; what is gathered for a product never; a float32 a row and head"""
    stream, gathered, inner, wide = {'linear': (3, 0, 4, 2), 'none': (2, 2, 4, 4), 'full': (1, 0, 0, 0)}[mode]
    if compiled: stream = 2                      # nothing asks for the output of w2
    return rows*(2*gathered*d + 2*stream*d//(n if sequence else 1)
                 + (2*(inner*d + wide*f) + (4*heads if inner else 0))//n)

@pytest.mark.parametrize('sequence, mode, compiled', CASES)
def test_kept_bytes(kept, sequence, mode, compiled):
    """A row-parallel product and its sum are kept once: (14d + 4f)/n bytes for `linear` under tensor and
    sequence parallelism, (12d + 4f)/n where it is compiled"""
    assert kept[CASES.index((sequence, mode, compiled))] == formula(mode, RANKS, sequence, compiled)

# --- the peak of a step: tests/test_dryrun.py, and here its judge ---------------------------------

CONFIGS = Path(__file__).resolve().parent.parent/'configs'

def test_the_dry_run_agrees_with_pytorchs_tracker():
    "PyTorch's takes time that grows with the square of the layers; at two layers of 7B both count the same"
    settings = '--model.n_layers', '2', '--train.compile', 'off'
    torchs = worker('peak', str(CONFIGS/'7B.toml'), 512, settings)
    ours = dry_run(load_run(CONFIGS/'7B.toml', settings), world_size=512).peak
    assert ours == pytest.approx(torchs, rel=.01)

def test_the_formula_needs_no_training_code():
    "Memory is arithmetic on a configuration; what trains may ask for it"
    code = ('import sys, llama_nb.scale.memory\n'
            "print([m for m in sys.modules if m.startswith(('llama_nb.train', 'llama_nb.parallel'))])")
    assert subprocess.run([sys.executable, '-c', code], env=ENV, capture_output=True, text=True,
                          timeout=120).stdout.strip() == '[]'
