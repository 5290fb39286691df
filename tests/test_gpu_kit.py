"""The GPU kit on a machine without a GPU: its miniature, and parts that are broken on purpose. What it shows
of a GPU needs one."""
import itertools, json, os, signal, subprocess, sys, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
import pytest, torch
from fork_server import Forked

KIT = Path(__file__).resolve().parent.parent/'benchmarks'
sys.path.insert(0, str(KIT))
import gpu, gpu_parts, gpu_ranks, gpu_runs, gpu_step
from gpu import PARTS, Part, Results, cell, run_parts
from llama_nb.config import ModelConfig
from llama_nb.run_file import load_run
from llama_nb.settings import degrees
from llama_nb.train.run import check_settings

pytestmark = pytest.mark.timeout(900)                            # the miniature is made by whoever asks first
HALVES = [('environment', 'tests', 'graphs', 'sync', 'memory', 'documents'),
          ('parity', 'step', 'step_7B', 'profile', 'nccl', 'layouts', 'kernels', 'ranks', 'ranks_speed')]

# --- the miniature --------------------------------------------------------------------------------

LEAD = f'import os, runpy; os.setsid(); runpy.run_path({str(KIT/"gpu.py")!r}, run_name="__main__")'

class ForkedPart(Forked):
    "Stands in for `subprocess.Popen` of a part: the same program in a group of its own, forked"
    def __init__(self, command, env, stdout, stderr, text, errors, start_new_session):
        assert command[1] == str(KIT/'gpu.py') and start_new_session
        reading, writing = os.pipe()
        with open(writing, 'w') as out:
            super().__init__([sys.executable, '-c', LEAD, *command[2:]], env, out, stderr)
        self.stdout = open(reading, errors=errors)

@pytest.fixture(scope='module')
def miniature(tmp_path_factory):
    """All parts in the CPU form, one half beside the other, put together afterwards: part -> its record; and
    the tables"""
    folder, parts = tmp_path_factory.mktemp('gpu'), dict.fromkeys(sum(HALVES, ()))
    assert parts.keys() == PARTS.keys()
    about = gpu.look('cpu', folder)
    def half(i):
        results = Results(folder/str(i), about)
        run_parts({name: PARTS[name] for name in HALVES[i]}, results, 'cpu', folder/f'work-{i}')
    popen = ForkedPart if sys.platform == 'linux' else subprocess.Popen
    starter = SimpleNamespace(**{**vars(subprocess), 'Popen': popen})
    with mock.patch.object(gpu, 'subprocess', starter), ThreadPoolExecutor() as pool:
        list(pool.map(half, range(2)))
    merge = [sys.executable, KIT/'gpu.py', '--out', folder/'all', '--merge', folder/'0', folder/'1']
    where = Path(subprocess.run(merge, check=True, capture_output=True, text=True, timeout=60).stdout.strip())
    return json.loads((where/'results.json').read_text())['parts'], (where/'results.md').read_text()

def rows(part, table): return {r['name']: r for r in part['rows'] if r['table'] == table}

@pytest.mark.parametrize('name', PARTS)
def test_a_part_in_miniature(miniature, name):
    part = miniature[0][name]
    assert part['status'] == 'done', [r for r in part['rows'] if r['ok'] is False] or part['tail']
    assert part['rows'] and f'## {name}' in miniature[1]

LEFT_OUT = {'environment': 'xformers beside a torch for CUDA 13', 'tests': 'gpu_cuda', 'graphs': 'Inductor',
            'sync': 'host synchronisation', 'step_7B': '7B', 'nccl': 'a second device by its number',
            'documents': 'compiled blocks', 'ranks': 'each layout', 'ranks_speed': 'speed'}

@pytest.mark.parametrize('name', LEFT_OUT)
def test_what_was_skipped_is_said(miniature, name):
    found = [r for n, r in rows(miniature[0][name], 'skipped').items() if LEFT_OUT[name] in n]
    assert found and found[0]['why'] and 'No GPU' in miniature[1]

def test_bytes_that_blocks_keep(miniature):
    "Section 2.4: block input and linear outputs, 12d + 4f bytes in bfloat16; counted in the CPU's allocator"
    kept = rows(miniature[0]['memory'], 'bytes that a block keeps for a token')
    none, linear, full = (kept[f'sdpa, {mode}'] for mode in ('none', 'linear', 'full'))
    assert abs(linear['ratio'] - 1) < .1 and none['kept'] > linear['kept'] > full['kept']

def test_garbage_of_before_is_not_counted():
    """The profiler knows a block by its address, also one that was given back while nobody counted; so
    garbage of an earlier model at that address, collected while bytes are counted, lowered the count"""
    class Cycle:
        def __init__(self, n): self.me, self.kept = self, torch.empty(n)
    counted = lambda: gpu_parts.counted_bytes(SimpleNamespace(gpu=False))
    with counted(): known = [torch.empty(1000) for _ in range(100)]
    del known
    garbage = [Cycle(1000) for _ in range(100)]
    del garbage
    with counted() as got:
        kept = torch.empty(500)
        for _ in range(10**5): Cycle(0)
    assert got[0] == kept.nbytes

def test_what_auto_picks_is_said_for_both_packings(miniature):
    names = rows(miniature[0]['environment'], 'attention that auto picks')
    assert {n.rsplit(', ', 1)[1] for n in names} == {'whole sequences', 'packed documents'}
    assert len(names) == 8

def test_a_contest_of_one_set_of_weights(miniature):
    "Both codes take part; tokens are drawn at random, so all losses stay near ln 512 = 6.24"
    contest = rows(miniature[0]['step'], 'toy')
    assert {name.split(',')[0] for name in contest} == {'llama_nb', 'transformers'}
    for r in contest.values(): assert r['tokens_per_second'] > 0 and 6 < r['loss'] < 6.5

def test_stopped_in_the_middle(miniature):
    assert rows(miniature[0]['nccl'], 'resumed bit for bit')['plain attention']['stopped_after'] < 30

def test_two_ranks_agree_with_one_in_either_layout(miniature):
    "float32 rounds at 6e-8; a few of these in each of some thirty steps"
    [found] = rows(miniature[0]['ranks'], 'another layout in the middle').values()
    assert max(found['loss'], found['grad_norm']) < 1e-5 and 0 < found['stopped_after'] < 30

def test_the_batch_has_borders(miniature):
    losses = rows(miniature[0]['parity'], 'the batch has borders of documents')['loss']
    assert losses['cross'] != losses['separate']

# --- parts that are broken on purpose -------------------------------------------------------------

BROKEN = '''
import os, signal, subprocess, sys, time
def raises(desk):
    desk.row('t', 'before', True)
    raise KeyError('on purpose')
def hangs(desk):
    desk.row('t', 'before', True)
    sleeps = [sys.executable, '-c', 'import time; time.sleep(600)']
    for own in (False, True): print('child', subprocess.Popen(sleeps, start_new_session=own).pid, flush=True)
    time.sleep(600)
def killed(desk): os.kill(os.getpid(), signal.SIGKILL)
def wrong(desk):
    desk.row('t', 'a number', False)
    desk.row('t', 'a number', False, twice=2)
def fine(desk):
    print('a bar', end='')
    desk.row('t', 'a number', True, x=1.5)
    desk.skip('much', 'no GPU')
'''

@pytest.fixture
def bench(tmp_path, monkeypatch):
    "Run parts of a module of broken ones: (all fine?, their records)"
    (tmp_path/'broken.py').write_text(BROKEN)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    about = {'device': 'test', 'form': 'cpu', 'torch': '0', 'cuda': None, 'python': '3', 'cores': 1,
             'date': 'today'}
    def run(*names, seconds=20., **settings):
        results = Results(tmp_path/'out', about)
        fine = run_parts({n: Part('', seconds, f'broken:{n}') for n in names}, results, 'cpu', tmp_path,
                         **settings)
        path = tmp_path/'out'/'results.json'
        return fine, json.loads(path.read_text())['parts'] if path.exists() else {}
    return run

def test_a_broken_part_is_recorded_and_the_next_goes_on(bench, tmp_path):
    fine, parts = bench('raises', 'killed', 'wrong', 'fine')
    found = [parts[n]['status'] for n in parts]
    assert not fine and found == ['failed with exit code 1', 'killed by signal 9', 'problems', 'done']
    raised = parts['raises']
    assert "KeyError: 'on purpose'" in raised['tail'] and raised['rows'][0]['name'] == 'before'
    assert len(parts['wrong']['rows']) == 1 and parts['wrong']['rows'][0]['twice'] == 2
    text = (tmp_path/'out'/'results.md').read_text()
    assert 'on purpose' in text and '| wrong | problems | a number |' in text and '1.5' in text

def test_a_part_that_hangs_is_ended_with_what_it_started(bench):
    fine, parts = bench('hangs', 'fine', seconds=4.)
    assert not fine and parts['hangs']['status'].startswith('over its limit')
    assert parts['fine']['status'] == 'done'
    children = [line.split()[1] for line in parts['hangs']['tail'] if line.startswith('child')]
    assert len(children) == 2                               # the second in a session of its own, as a rank is
    for child in map(Path('/proc').joinpath, children):
        assert not child.exists() or 'Z' in (child/'stat').read_text().split()[2]

def test_it_goes_on_where_it_was_stopped(bench, tmp_path):
    """A part that is done stays; one that was under way when everything was killed, or had a problem, is run
    again"""
    bench('fine', 'wrong')
    path = tmp_path/'out'/'results.json'
    data = json.loads(path.read_text())
    data['parts']['fine']['rows'][0]['x'] = 'from the first call'
    data['parts']['raises'] = {'status': 'running', 'rows': []}
    path.write_text(json.dumps(data))
    _, parts = bench('fine', 'wrong', 'raises')
    assert parts['fine']['rows'][0]['x'] == 'from the first call' and parts['wrong']['status'] == 'problems'
    assert parts['raises']['status'].startswith('failed')
    _, parts = bench('fine', again=True)
    # the others' records stay
    assert parts['fine']['rows'][0]['x'] == 1.5 and 'wrong' in parts

def test_stopped_by_a_signal(tmp_path):
    "Ctrl-C ends the part, keeps the rows, and says how to go on; nothing is left in the temporary folder"
    temporary = tmp_path/'tmp'
    temporary.mkdir()
    command = [sys.executable, str(KIT/'gpu.py'), '--form', 'cpu', '--out', str(tmp_path/'out'),
               '--parts', 'sync']
    # a shell's background jobs ignore it
    def as_in_a_terminal(): signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal,
                               stderr=subprocess.STDOUT, env={**os.environ, 'TMPDIR': str(temporary)})
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith('sync:'): break
    time.sleep(1)                                                    # it is on its way
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and 'stopped; the same command goes on' in rest, seen + [rest]
    folder = next((tmp_path/'out').iterdir())
    record = json.loads((folder/'results.json').read_text())['parts']['sync']
    assert record['status'] == 'stopped' and not list(temporary.glob('llama_nb_gpu_*'))

def test_time_that_is_given_is_kept(bench):
    begun = time.monotonic()
    fine, parts = bench('fine', 'hangs', seconds=100., minutes=.05)
    assert not fine and not parts and time.monotonic() - begun < 60

def test_limits_fit_into_half_an_hour():
    "On one GPU, where the parts for several end at once"
    one = sum(p.seconds for name, p in PARTS.items() if not name.startswith('ranks'))
    assert one <= 1800 and max(p.seconds for p in PARTS.values()) <= 600

@pytest.mark.parametrize('form, limit', [('gpu', 300), ('cpu', 900)])
def test_patience_multiplies_the_limits(tmp_path, monkeypatch, form, limit):
    about = {'date': '', 'torch': '', 'device': '', 'form': form, 'cuda': '', 'python': '', 'cores': 1}
    limits = []
    def run_part(part, form, work, limit, take):
        limits.append(limit)
        return {'status': 'over its limit', 'seconds': 0, 'tail': []}
    monkeypatch.setattr(gpu, 'run_part', run_part)
    parts, results = {'a': Part('', 100, 'x:y')}, Results(tmp_path, about)
    for settings in ({'patience': 3}, {'patience': 3, 'minutes': 4}, {'patience': 3, 'minutes': 2}, {}):
        run_parts(parts, results, form, tmp_path, **settings)
    # four minutes are less than the limit, two less than half of it
    assert limits == [limit, pytest.approx(240, abs=5), limit/3]

# --- what is computed, not measured ---------------------------------------------------------------

def test_folder_of_a_device():
    about = {'device': 'NVIDIA H100 80GB HBM3'}
    assert gpu.folder_name(about) == gpu.folder_name(about | {'gpus': 1}) == 'NVIDIA-H100-80GB-HBM3'
    assert gpu.folder_name(about | {'gpus': 8}) == 'NVIDIA-H100-80GB-HBM3-x8'

def test_layers_of_7B_that_fit():
    """An H200 of 141 GB holds all of 7B with its float32 states (16 bytes for each of 6.74e9 parameters), an
    H100 of 80 GB does not"""
    def fit(memory): return gpu_step.fitting_layers(memory, gpu_step.SEVEN_B, 2048)
    assert fit(150e9) == 32 and 12 < fit(84e9) < 20 and fit(8e9) == 0

@pytest.mark.parametrize('memory, layers', [(150e9, 24), (80e9, 24), (40e9, 19), (24e9, 10), (15e9, 4),
                                            (5e9, 0)])
def test_layers_of_1_3B_that_fit(tmp_path, monkeypatch, memory, layers):
    "transformers took 50.9 GB of an H200 for all 24 layers; a card of 24 GB gets a table, too"
    desk = Desk(tmp_path)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: (memory, memory))
    size, name = gpu_step.fitting(desk, gpu_step.ONE_B, 4*2048, '1.3B')
    assert (size.n_layers if size else 0) == layers
    assert name == ('1.3B' if layers in (0, 24) else f'{layers} of the 24 layers of 1.3B')
    assert [r['name'] for r in desk.rows] == ['1.3B']*(not size)

KERNELS = {
    'nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT': 'matrix multiplications',
    'sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64': 'matrix multiplications',
    'void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 128, 64, 4>>':
        'attention',
    'fmha_cutlassF_bf16_aligned_64x128_rf_sm80': 'attention',
    'void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>': 'optimiser and clipping',
    'triton_poi_fused_mul_silu_3': 'fused by the compiler',
    'triton_poi_fused__scaled_dot_product_cudnn_attention__to_copy_add_mul_2': 'fused by the compiler',
    'cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128': 'attention',
    'void at::native::vectorized_elementwise_kernel<4, at::native::MulFunctor<float>>':
        'elementwise, sums, indexing',
    'Memcpy DtoD (Device -> Device)': 'copies'}

@pytest.mark.parametrize('kernel', KERNELS)
def test_kinds_of_kernels(kernel): assert gpu_step.kind_of(kernel) == KERNELS[kernel]

def test_transformers_with_our_parameters_is_our_model():
    """Rotary pairs: side by side in ours, halves apart in theirs. With the rows of wq and wk in their order,
    the same loss and gradient"""
    c = ModelConfig(64, 2, 2, vocab_size=128, multiple_of=32, max_seq_len=32)
    torch.manual_seed(0)
    base = gpu_step.LLaMA(c)
    for p in base.parameters(): p.data.mul_(5 if p.ndim > 1 else 1)
    x, y = torch.randint(128, (4, 32)), torch.randint(128, (4, 32))
    mine, them = (gpu_step.Contestant(code, attention='sdpa', micro=2)
                  for code in ('llama_nb', 'transformers'))
    loss = gpu_step.ours(base, mine, torch.float32)(x, y)
    gradient = base.layers[0].feed_forward.w1.weight.grad.clone()
    base.zero_grad()
    for layer in base.layers:
        for w in (layer.attention.wq, layer.attention.wk):
            w.weight.data.copy_(w.weight.data.view(2, 16, 2, 64).transpose(1, 2).reshape(64, 64))
    other = gpu_step.theirs(base, them, torch.float32)(x, y)
    assert loss.item() == pytest.approx(other.item(), rel=1e-5) and len(list(base.parameters())) == 21
    # float32, sums in another order
    torch.testing.assert_close(base.layers[0].feed_forward.w1.weight.grad, gradient, rtol=1e-3, atol=1e-6)

def test_numbers_in_cells():
    values = (None, True, False, 0., .00123, 12345.6, 'a|b')
    assert [cell(x) for x in values] == ['', 'yes', '**no**', '0', '0.00123', '12,346', 'a/b']

def test_a_profile_counts_kernels_not_spans():
    "On a GPU the profiler draws the user's spans over the kernels; a made-up profile of both"
    class Event:
        def __init__(self, name, us, span=False):
            self.name, self.is_user_annotation, self.device_type = name, span, torch.autograd.DeviceType.CUDA
            self.us = us
        @property
        def time_range(self): return self
        def elapsed_us(self): return self.us
    class Profile:
        def events(self):
            return [Event('gemm', 5), Event('gemm', 7), Event('Optimizer.step#AdamW.step', 100),
                    Event('my span', 100, True)]
    assert gpu_step.kernels(Profile()) == Counter({'gemm': 12})

RECORDS = sorted((KIT/'gpu').glob('*/results.json'))

@pytest.mark.parametrize('path', RECORDS, ids=[p.parent.name for p in RECORDS])
def test_tables_are_those_of_the_record(path):
    "Notes that were written into it, too"
    assert gpu.render(json.loads(path.read_text())) == path.with_suffix('.md').read_text()

# --- what cannot be had without a GPU, with a part of torch.cuda mocked ---------------------------

class Desk(gpu.Desk):
    "Keeps the rows"
    def __init__(self, folder):
        super().__init__('cpu', folder, 600)
        self.rows = []
    def row(self, table, name, ok=None, **values):
        self.rows.append({'table': table, 'name': name, 'ok': ok, **values})

def test_a_synchronisation_is_named(tmp_path, monkeypatch):
    """`synchronize` and `set_sync_debug_mode` are mocked: what raises in a step is reported with its place in
    the package"""
    modes, desk = [], Desk(tmp_path)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    monkeypatch.setattr(torch.cuda, 'set_sync_debug_mode', modes.append)
    monkeypatch.setattr(gpu_parts, 'train_step', lambda run: gpu_step.clip_grad_norm([], -1.))
    gpu_parts.no_synchronisation(desk, None, 'x')
    monkeypatch.setattr(gpu_parts, 'train_step', lambda run: None)
    gpu_parts.no_synchronisation(desk, None, 'y')
    assert modes == ['error', 'default']*2 and [r['ok'] for r in desk.rows] == [False, True]
    assert desk.rows[0]['place'].startswith('optim.py:') and 'max_grad_norm' in desk.rows[0]['why']

def test_a_contestant_that_does_not_fit_leaves_and_the_others_go_on(tmp_path, monkeypatch):
    "The error of a GPU without memory is raised by hand"
    def full(*args): raise torch.cuda.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(gpu_step, 'theirs', full)
    desk = Desk(tmp_path)
    contest = gpu_step.Contest(desk, 'toy', gpu_step.MINI, 2)
    mine, them = (gpu_step.Contestant(code, attention='sdpa', micro=1)
                  for code in ('llama_nb', 'transformers'))
    for who in (them, mine): contest.enter(who, 1, 1)
    contest.turns(2)
    gpu_step.goals(desk, contest, 'toy')
    assert desk.rows[0]['why'] == 'out of memory' and desk.rows[0]['ok'] is None
    third = desk.rows[2]
    assert third['how'] == 'taking turns' and third['steps'] == 2 and third['of_transformers'] is None
    assert [r['got'] for r in desk.rows if r['table'] == 'goals'][1] is None

def test_memory_that_ends_while_states_are_made_spoils_nobody_else(tmp_path, monkeypatch):
    "AdamW makes its moments in its first step; the error comes in the third tensor of them"
    desk, made, zeros = Desk(tmp_path), [], torch.zeros_like
    contest = gpu_step.Contest(desk, 'toy', gpu_step.MINI, 2)
    def scarce(*args, **kwargs):
        made.append(1)
        if len(made) == 4: raise torch.cuda.OutOfMemoryError('CUDA out of memory')
        return zeros(*args, **kwargs)
    monkeypatch.setattr(torch, 'zeros_like', scarce)
    large, small = (gpu_step.Contestant('llama_nb', attention='sdpa', micro=n) for n in (2, 1))
    for who in (large, small): contest.enter(who, 1, 1)
    assert [r.get('why') for r in desk.rows] == ['out of memory', None] and desk.rows[1]['steps'] == 1
    assert all(len(state) == 3 for state in contest.optimizer.state.values())

class OnGpu(Desk):
    "... and says that it has a GPU"
    def __init__(self, folder):
        super().__init__(folder)
        self.gpu, self.form = True, 'gpu'

# --- several GPUs -----------------------------------------------------------------------------------

@pytest.mark.parametrize('n, at_least', [(2, 1), (4, 2), (8, 3)])
def test_layouts_of_several_gpus(n, at_least):
    "All use all; every kind of group is in one, and with eight all three are in the same"
    found = gpu_ranks.layouts(n).values()
    assert {replicate*shard*tensor for replicate, shard, tensor in found} == {n}
    assert all(max(sizes) > 1 for sizes in zip(*found))
    assert max(sum(k > 1 for k in layout) for layout in found) == at_least

@pytest.fixture
def gpus(tmp_path, monkeypatch):
    "A desk that says it has so many GPUs, joined or not; no run is started, its tokens are short"
    monkeypatch.setattr(gpu_parts, 'shards', lambda desk, longest: 'tokens')
    def make(n, joined=True):
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: n)
        monkeypatch.setattr(torch.cuda, 'can_device_access_peer', lambda a, b: joined)
        monkeypatch.setattr(sys, 'argv', ['gpu.py', '--worker', 'gpu_ranks:ranks'])
        return OnGpu(tmp_path)
    return make

@pytest.mark.parametrize('n, ranks', [(1, []), (2, [2]), (3, [2]), (6, [4]), (8, [8])])
def test_as_many_gpus_as_a_power_of_two(gpus, monkeypatch, n, ranks):
    asked, desk = [], gpus(n)
    for name in ('changes', 'agree', 'raises'):
        monkeypatch.setattr(gpu_ranks, name, lambda desk, n, *how: asked.append(n))
    gpu_ranks.ranks(desk)
    assert sorted({*asked}) == ranks and [r['why'] for r in desk.rows] == ['there is one']*(n == 1)

@pytest.mark.parametrize('n', [2, 4, 8, 16])
def test_every_run_on_several_gpus_can_begin(gpus, monkeypatch, n):
    "The settings of each command that the parts would give are asked, with its number of ranks"
    desk, asked = gpus(n), []
    def torchrun(*program, ranks=1):
        path = next(p for p in program if str(p).endswith('.toml'))
        flags = itertools.dropwhile(lambda word: not word.startswith('--'), map(str, program))
        config = load_run(path, [*flags])
        layout = degrees(config.parallel, config.model, ranks)
        asked.append((layout, config.parallel.async_tensor))
        plain = replace(config, parallel=replace(config.parallel, async_tensor=False))
        plain = replace(plain, train=replace(plain.train, compile='off', device='cpu'))
        check_settings(plain, torch.device('cpu'), layout[0]*layout[1], layout[2])
        return SimpleNamespace(returncode=0, poll=lambda: 0)
    def finish(process, seconds): return ''
    for module in (gpu_runs, gpu_ranks):
        monkeypatch.setattr(module, 'torchrun', torchrun)
        monkeypatch.setattr(module, 'finish', finish)
    monkeypatch.setattr(gpu_ranks, 'fitting', lambda *args: (gpu_ranks.ONE_B, '1.3B'))
    def alone(desk, table, settings): return gpu_runs.write_run(desk, **settings)[1]
    monkeypatch.setattr(gpu_ranks, 'alone', alone)
    gpu_ranks.ranks(desk)
    gpu_ranks.speed(desk)
    layouts = {*gpu_ranks.layouts(n).values()}
    assert layouts <= {layout for layout, _ in asked} and ((1, n//2, 2), True) in asked

def test_gpus_that_are_not_joined_are_not_asked_to_send_while_they_multiply(gpus):
    desk = gpus(4, joined=False)
    assert not any(together for _, _, together in gpu_ranks.cases(desk, 4))
    assert [r['name'] for r in desk.rows] == ['asynchronous tensor parallelism']

STEPS = [{'step': i, 'loss': 6. - i, 'grad_norm': 1.} for i in range(3)]
OTHERS = [({}, 0, None), ({'loss': 5.05}, .01, None), ({'grad_norm': .9}, .1, None),
          ({'step': 7}, 0, 'steps'), ({'loss': None}, 0, 'step 1 is not finite')]

@pytest.mark.parametrize('changed, far, why', OTHERS)
def test_a_layout_that_differs_is_seen(tmp_path, changed, far, why):
    for name, step in (('one', {}), ('many', changed)):
        (tmp_path/name).mkdir()
        (tmp_path/name/'results.json').touch()
        steps = [STEPS[0], STEPS[1] | step, STEPS[2]]
        (tmp_path/name/'metrics.jsonl').write_text(''.join(json.dumps(s) + '\n' for s in steps))
    found, said = gpu_ranks.difference(tmp_path/'many', tmp_path/'one')
    assert max(found.values(), default=0) == pytest.approx(far)
    assert said is None if why is None else why in said
    (tmp_path/'many'/'results.json').unlink()
    assert gpu_ranks.difference(tmp_path/'many', tmp_path/'one')[1]

@pytest.mark.parametrize('steps, said, fine', [(2, 'continuing runs/x after step 2 of 100', True),
                                               (2, 'training from the beginning', False),
                                               (100, 'runs/x is finished', False)])
def test_a_run_that_was_not_resumed_proves_nothing(gpus, tmp_path, monkeypatch, steps, said, fine):
    desk = gpus(2)
    monkeypatch.setattr(gpu_ranks, 'alone', lambda *args: tmp_path)
    monkeypatch.setattr(gpu_ranks, 'stop_in_the_middle', lambda *args, **settings: '')
    monkeypatch.setattr(gpu_ranks, 'metrics', lambda out: [STEPS[0]]*steps)
    monkeypatch.setattr(gpu_ranks, 'difference', lambda out, right: ({'loss': 1e-7, 'grad_norm': 0.}, None))
    monkeypatch.setattr(gpu_ranks, 'train', lambda *args: said)
    gpu_ranks.changes(desk, 2)
    assert [r['ok'] for r in desk.rows] == [fine]

def test_speed_is_that_of_one_gpu_or_nothing(gpus, monkeypatch):
    "Memory that ends is no mistake; without the first row nothing is compared with it"
    monkeypatch.setattr(gpu_ranks, 'fitting', lambda *args: (gpu_ranks.ONE_B, '1.3B'))
    def measured(first):
        desk, found = gpus(2), iter([first, {'tokens_per_second': 180.}, {'why': 'ValueError: on purpose'},
                                     *[{'tokens_per_second': 150.}]*2])
        monkeypatch.setattr(gpu_ranks, 'timed', lambda *args: next(found))
        gpu_ranks.speed(desk)
        return [(r['ok'], r['of_one']) for r in desk.rows]
    rest = [(False, None), (None, .75), (None, .75)]
    assert measured({'tokens_per_second': 100.}) == [(None, 1), (None, .9), *rest]
    assert measured({'why': 'OutOfMemoryError: CUDA'}) == [(None, None), (None, None), (False, None),
                                                           (None, None), (None, None)]

def test_what_no_time_is_left_for_is_said(gpus, monkeypatch):
    desk = gpus(2)
    desk.end = time.monotonic()
    monkeypatch.setattr(gpu_ranks, 'fitting', lambda *args: (gpu_ranks.ONE_B, '1.3B'))
    gpu_ranks.speed(desk)
    assert len(desk.rows) == 5 and {r['table'] for r in desk.rows} == {'skipped'}

def test_a_rank_is_quoted_and_not_torchrun():
    said = ("[rank1]: ValueError: on purpose\nE1128 torch/distributed/elastic/multiprocessing/api.py:988] "
            "failed (exitcode: 1)\nTraceback (most recent call last):\n")
    assert gpu_ranks.last_words(said) == '[rank1]: ValueError: on purpose'

AS_ON_HOPPER = {('sdpa', 'cross'), ('xformers', 'separate')}

@pytest.fixture
def hopper(tmp_path, monkeypatch):
    "A desk that says it has a GPU, on which `auto` takes sdpa for whole sequences; nothing is computed"
    def pick(name, device, dtype, k, packed=False): return 'xformers' if packed else 'sdpa'
    monkeypatch.setattr(gpu_parts, 'pick_backend', pick)
    for module in (gpu_parts, gpu_runs):
        monkeypatch.setattr(module, 'backends', lambda desk, *names, **_: [*names])
    return OnGpu(tmp_path)

def test_steps_are_compiled_with_the_attention_that_auto_takes(hopper, monkeypatch):
    asked = []
    def trainer(desk, model, documents, attention, compile, **settings):
        if compile == 'blocks': asked.append((attention, documents))
        return SimpleNamespace()
    monkeypatch.setattr(gpu_parts, 'trainer', trainer)
    for name in ('train_step', 'no_synchronisation', 'skipped_step', 'free'):
        monkeypatch.setattr(gpu_parts, name, lambda *args: None)
    gpu_parts.sync(hopper)
    assert len(asked) == 2 and {*asked} == AS_ON_HOPPER

def test_gradients_are_compiled_with_the_attention_that_auto_takes(hopper, monkeypatch):
    asked = []
    def gradients(desk, right, documents, attention, dtype, compile='off', **settings):
        if compile == 'blocks': asked.append((attention, documents, dtype))
        return {'loss': len(documents)}
    monkeypatch.setattr(gpu_parts, 'gradients', gradients)
    monkeypatch.setattr(gpu_parts, 'compare', lambda *args: None)
    gpu_parts.parity(hopper)
    assert len(asked) == 4 and {*asked} == {(*case, 'bfloat16') for case in AS_ON_HOPPER}

def test_memory_of_compiled_blocks_is_that_of_the_default(hopper, monkeypatch):
    asked = set()
    def kept_bytes(desk, wide, n_layers, backend, mode, compiled):
        if compiled: asked.add(backend)
        return n_layers
    monkeypatch.setattr(gpu_parts, 'kept_bytes', kept_bytes)
    monkeypatch.setattr(gpu_parts, 'peaks', lambda desk: None)
    monkeypatch.setattr(gpu_parts, 'free', lambda desk: None)
    gpu_parts.memory(hopper)
    assert asked == {'sdpa'}

def test_document_masking_is_timed_with_every_attention_compiled(hopper, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_runs, 'open_run', lambda desk, *case: asked.append(case))
    gpu_runs.documents(hopper)
    every = [(b, c) for b in ('sdpa', 'xformers') for c in ('blocks', 'off')]
    assert sorted({case[:2] for case in asked}) == every
    assert len(asked) == 8
