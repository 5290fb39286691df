"""What a GPU would be told, recorded where there is none. Each test here fails if the mend of a finding of
the audit in LOG.md is taken back."""
import re
from datetime import timedelta
from types import SimpleNamespace
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from conftest import run_ranks
from test_attention import WHEEL, on_cpu                           # noqa: F401, a fixture is used by name
from llama_nb.commands.data import Data, Ids
from llama_nb.model import backends, kernels
from llama_nb.parallel import processes
from llama_nb.run_file import load_run
from llama_nb.train import checkpoint, recompute, run
from llama_nb.train.guards import collective_seconds

BF16, CPU = torch.bfloat16, torch.device('cpu')

class Enough(Exception):
    "What was asked for has been seen"

# --- the attention backend ------------------------------------------------------------------------

def test_the_cuda_runtime_comes_before_xformers(monkeypatch):
    "Its extension looks for the runtime when it is imported"
    told = []
    monkeypatch.setattr(backends, 'load_cuda_12_runtime', lambda: told.append('runtime'))
    monkeypatch.setattr(backends.importlib, 'import_module', told.append)
    monkeypatch.setattr(torch.version, 'cuda', None)
    monkeypatch.setattr(backends, 'LOADED', {})
    backends._load_xformers()
    assert told == ['runtime', 'xformers.ops.fmha']

@WHEEL
def test_a_wheel_that_cannot_load_is_one_line_of_advice(on_cpu, monkeypatch):      # noqa: F811
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(backends, 'xformers_has_kernels', lambda: False)
    monkeypatch.setattr(backends, 'TRIALS', {})
    assert backends.pick_backend('auto', CPU, BF16, 16) == 'sdpa'
    line = backends.backend_report('auto', CPU, BF16, 16)
    assert 'pip install nvidia-cuda-runtime-cu12' in line and '\n' not in line

@pytest.mark.parametrize('documents', ['cross', 'separate'])
def test_the_trial_is_of_the_runs_own_heads(run_file, monkeypatch, documents):
    "Type, head width and packing of the run, when settings are checked and when the model is built"
    config = load_run(run_file(4), ('--data.documents', documents, '--train.dtype', 'bfloat16'))
    asked = []
    monkeypatch.setattr(run, 'pick_backend', lambda *model: asked.append(model[2:]))
    run.check_settings(config, CPU, 1, 1)
    run.build_model(config, CPU)
    assert asked == [(BF16, config.model.head_dim, documents == 'separate')]*2

def test_the_trial_is_on_the_gpu_that_was_asked_about(monkeypatch):
    "A thread begins on GPU 0, whatever the thread that started it has made current"
    taken = []
    def set_device(device):
        taken.append(device)
        raise Enough
    monkeypatch.setattr(torch.cuda, 'set_device', set_device)
    with pytest.raises(Enough):
        backends._by_itself(backends._try, kernels.attend_sdpa, torch.device('cuda:1'), BF16, 16, ['plain'])
    assert taken == [torch.device('cuda:1')]

@WHEEL
def test_xformers_is_told_of_documents_without_reading_them(on_cpu):               # noqa: F811
    "Tensors on the device meta have no numbers: whoever reads one raises"
    backends._load_xformers()
    borders = torch.empty(9, dtype=torch.int32, device='meta')
    with pytest.raises((RuntimeError, NotImplementedError)): borders.tolist()
    rows, mask = kernels._for_xformers(borders, *torch.empty(3, 2, 64, 4, 16, device='meta'))
    assert mask.q_seqinfo.seqstart is borders and mask.q_seqinfo.max_seqlen == 64
    assert [x.shape for x in rows] == [(1, 128, 4, 16)]*3

def test_the_line_of_a_run_says_why_it_is_not_xformers(monkeypatch):
    "On Hopper `auto` takes PyTorch's attention although xformers has passed its trial"
    monkeypatch.setattr(backends, 'backend_problem', lambda *asked: '')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    line = backends.backend_report('auto', torch.device('cuda:0'), BF16, 128)
    assert line.startswith('attention: sdpa (') and 'compute capability 9' in line
    packed = backends.backend_report('auto', torch.device('cuda:0'), BF16, 128, True)
    assert packed.startswith('attention: xformers (')
    named = backends.backend_report('sdpa', torch.device('cuda:0'), BF16, 128)
    assert named.startswith('attention: sdpa (') and 'compute capability' not in named

def attention_taken(path, odd:bool):
    "What a run on several ranks takes and says; if `odd`, xformers passes its trial on rank 0 alone"
    config, lines = load_run(path), []
    key = 'xformers', 'cpu', torch.float32, config.model.head_dim, False
    if odd and dist.get_rank() == 0: backends.TRIALS[key] = ''
    opened = run.start_run(config, lines.append)
    written = load_run(opened.out/'config.toml').train.attention
    return {layer.attention.backend for layer in opened.model.layers}.pop(), written, lines

@pytest.mark.parametrize('odd', [False, True])
def test_all_ranks_take_the_same_attention(run_file, odd):
    "Where `auto` would be two backends, all take PyTorch's own and the run says who stood out"
    (first, written, lines), (other, _, silent) = run_ranks(
        'test_gpu_wiring:attention_taken', 2, {'path': str(run_file(4)), 'odd': odd})
    line, = (x for x in lines if x.startswith('attention: '))
    assert first == other == ('sdpa' if odd else 'auto') and written == 'auto' and not silent
    told = r'sdpa on all ranks; .*xformers .* on rank 0, sdpa .* on rank 1$' if odd else r'sdpa \(xformers'
    assert re.match('attention: ' + told, line), line

# --- what is kept ---------------------------------------------------------------------------------

class Calls(TorchDispatchMode):
    "Counts the operators that run"
    def __init__(self):
        super().__init__()
        self.names = []
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))

def by_documents(q, k, v):
    kernels.load_varlen()
    borders = torch.empty(9, dtype=torch.int32, device='meta')
    return kernels.attend_varlen(q, k, v, None, borders)

ATEN = torch.ops.aten
GPU_KERNELS = {
    'aten::_scaled_dot_product_flash_attention':
        lambda *qkv: ATEN._scaled_dot_product_flash_attention(*qkv)[0],
    'aten::_scaled_dot_product_efficient_attention':
        lambda *qkv: ATEN._scaled_dot_product_efficient_attention(*qkv, None, True)[0],
    'aten::_scaled_dot_product_cudnn_attention':
        lambda *qkv: ATEN._scaled_dot_product_cudnn_attention(*qkv, None, True)[0],
    'torch_attn::_varlen_attn': by_documents}

@pytest.mark.parametrize('name', GPU_KERNELS)
def test_attention_of_a_gpu_is_not_repeated(name):
    "`linear` keeps what each of PyTorch's GPU kernels gives, and repeats the product of two numbers"
    qkv = [torch.empty(2, 64, 4, 16, dtype=BF16, device='meta', requires_grad=True) for _ in range(3)]
    def block(*rows): return GPU_KERNELS[name](*rows).sin().sin()
    with Calls() as seen: recompute._selectively(None, block, *qkv).sum().backward()
    assert [x.partition('.')[0] for x in seen.names].count(name) == 1
    assert [x.partition('.')[0] for x in seen.names].count('aten::sin') > 2

# --- ranks, saves, shards -------------------------------------------------------------------------

def test_the_world_has_the_time_limit_of_the_run(monkeypatch, run_file):
    "Over NCCL the world's group is the one that sums losses, and the saver's"
    made, told = [], []
    for name, value in (('WORLD_SIZE', '2'), ('RANK', '1'), ('LOCAL_RANK', '1')):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, 'init_process_group', lambda *group: made.append(group))
    processes.start_ranks('cpu', 77.)
    assert made == [('gloo', 'env://', timedelta(seconds=77), 2, 1)]
    def start_ranks(*asked):
        told.append(asked)
        raise Enough
    monkeypatch.setattr(run, 'start_ranks', start_ranks)
    with pytest.raises(Enough): run.start_run(load_run(run_file(4), ('--train.hang-minutes', '8')))
    assert told == [('cpu', collective_seconds(8.))]

def test_losses_are_summed_over_the_devices_own_group(monkeypatch):
    "The gloo of the world belongs to the saver, which may be at work"
    seen = []
    monkeypatch.setattr(run, 'total', lambda x: seen.append(x.device.type) or x)
    there = SimpleNamespace(device=torch.device('meta'), mesh={'tensor': SimpleNamespace(size=lambda: 1)})
    run.Trainer.total(there, torch.ones(2))
    assert seen == ['meta']

@pytest.mark.parametrize('is_cuda', [False, True])
def test_a_save_copies_from_a_gpu_into_pinned_memory(monkeypatch, tmp_path, is_cuda):
    "Else the copy does not run beside the training"
    host, asked, empty = checkpoint.Saver(tmp_path).host, [], torch.empty
    def recorded(size, dtype, pin_memory):
        asked.append(pin_memory)
        return empty(size, dtype=dtype)
    monkeypatch.setattr(checkpoint.torch, 'empty', recorded)
    there = SimpleNamespace(is_cuda=is_cuda, nbytes=8, dtype=torch.float32, shape=(2,))
    host._make_room({'a': there, 'b': there}, [])
    assert asked == [is_cuda]

@pytest.mark.parametrize('command', [Data, Ids])
def test_a_cluster_opens_few_files(command):
    "1.4T tokens in the shards that the commands write unless told otherwise"
    assert 1.4e12/command.tokens_per_shard < 1500
