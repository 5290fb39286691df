"Memory is what we say: what blocks keep, and what a rank of the full world needs at its peak."
import json, subprocess, sys
from pathlib import Path
import pytest
from conftest import ENV

WORKER = Path(__file__).with_name('memory_worker.py')

def worker(name, *arguments, timeout=600):
    "What a function of memory_worker.py returns in a process of its own"
    done = subprocess.run([sys.executable, WORKER, name, json.dumps(arguments)], env=ENV, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

# --- what blocks keep where ranks share the products --------------------------------------------

RANKS, CASES = 4, [(sequence, mode, compiled) for sequence in (True, False) for mode, compiled in (('linear', False), ('linear', True), ('full', False), ('none', False))]

@pytest.fixture(scope='module')
def kept(): return worker('kept_cases', RANKS, CASES)

def formula(mode, n, sequence, rows=2*64, d=256, f=704, heads=8):
    "Bytes of bfloat16: the stream is cut by positions if `sequence`; q k v o and the feed-forward width always; what is gathered for a product never; a float32 a row and head"
    stream, gathered, inner, wide = {'linear': (3, 0, 4, 2), 'none': (2, 2, 4, 4), 'full': (1, 0, 0, 0)}[mode]
    return rows*(2*gathered*d + 2*stream*d//(n if sequence else 1) + (2*(inner*d + wide*f) + (4*heads if inner else 0))//n)

@pytest.mark.parametrize('sequence, mode, compiled', CASES)
def test_kept_bytes(kept, sequence, mode, compiled):
    "A row-parallel product and its sum are kept once: (14d + 4f)/n bytes for `linear` under tensor and sequence parallelism"
    got, right = kept[CASES.index((sequence, mode, compiled))], formula(mode, RANKS, sequence)
    if compiled: assert .8*right < got <= right                          # the output of w2 is not asked for: 12d + 4f
    else: assert got == right
