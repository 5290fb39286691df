"Traffic is what the trainer sends; the model of time keeps its promises; mistakes are one line."
import csv, math
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
import pytest
from conftest import ask
from llama_nb.core import UserError
from llama_nb.run_file import load_run
from llama_nb.scale.cluster import (CONSTANTS, GPUS, Cluster, Collective, Constants, StepJob, Layout, Shape,
                                    collectives, job_of, job_time, matmul_seconds, step_time, tokens_to_hide)
from llama_nb.scale.flops import flops_per_token
from llama_nb.scale.published import published_rows

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT/'benchmarks'
A100, H100 = GPUS['A100-80GB'], GPUS['H100-80GB']
SHAPE = Shape(4096, 32, 32, 32, 11008, 32000)

def run_of(name, *settings): return load_run(ROOT/f'configs/{name}.toml', settings)
def eager(name, *settings): return run_of(name, '--train.compile', 'off', *settings)

# --- bytes: the collectives of the real model ---------------------------------------------------

SMALL = Shape(64, 5, 4, 4, 192, 256)               # cluster_worker.MODEL
CASES = [((1, 4, 1), 'none', 2, 1), ((1, 4, 1), 'full', 2, 3), ((2, 4, 1), 'linear', 2, 2),
         ((1, 1, 4), 'none', 2, 1), ((1, 1, 4), 'linear', 2, 2), ((1, 1, 4), 'full', 2, 1),
         ((2, 2, 2), 'linear', 2, 2),
         ((1, 1, 4), 'none', 2, 1, False), ((1, 2, 2), 'full', 1, 2, False)]

@pytest.fixture(scope='module')
def issued():
    return ask('cluster_worker.py', CASES, timeout=120)

def formula(degrees, mode, micro, passes, sequence=True):
    "{collective: (count, bytes)} by the page's formulas"
    replicate, shard, tensor = degrees
    job = StepJob(SMALL, Layout(replicate, shard, tensor, sequence), 32, micro, passes, mode)
    counts, sizes = Counter(), Counter()
    for group in collectives(job, Cluster(A100, replicate*shard*tensor)):
        for call in group.calls:
            counts[call.kind] += group.times
            sizes[call.kind] += group.times*call.size
    return counts, sizes

@pytest.mark.parametrize('case', CASES, ids=str)
def test_the_trainer_sends_what_the_formula_says(case, issued):
    """Counts and bytes of a whole step on a fake process group. Left out by the formula: norm weights in a
    rank's share, and all-reduces of the loss and of norms, below a kilobyte each. Of 33 transfers of the
    stream in each pass of these five layers the model makes one less"""
    counts, sizes = Counter(), Counter()
    for kind, size in issued[CASES.index(case)]:
        if size <= 1024: continue
        counts[kind] += 1
        sizes[kind] += size
    count, size = formula(*case)
    assert set(sizes) == set(size)
    alone = case[0][2] == 1                           # no tensor ranks, so no stream between them
    for kind in sizes: assert sizes[kind] == pytest.approx(size[kind], rel=.005 if alone else .035), kind
    if alone: assert counts == count

# --- collectives --------------------------------------------------------------------------------

GROUPS = [(1, 1), (2, 1), (8, 1), (16, 1), (2048, 1), (32, 8), (4, 2), (256, 8)]

@pytest.mark.parametrize('kind', ['all_gather', 'reduce_scatter', 'all_reduce'])
@pytest.mark.parametrize('ranks, apart', GROUPS)
def test_a_rank_sends_all_but_its_own_part(kind, ranks, apart):
    call = Collective('', kind, 1e9, ranks, apart)
    whole = 2 if kind == 'all_reduce' else 1
    assert sum(call.sent(8).values()) == pytest.approx(whole*1e9*(ranks - 1)/ranks)
    assert ('network' in call.sent(8)) == (ranks*apart > 8)
    if apart >= 8 and ranks > 1: assert call.sent(8)['NVLink'] == 0

def test_an_all_reduce_takes_two_rounds():
    assert [Collective('', kind, 1., 2048).hops for kind in ('all_gather', 'all_reduce')] == [2047, 4094]

# --- compute ------------------------------------------------------------------------------------

@pytest.mark.parametrize('gpu', GPUS.values(), ids=GPUS)
def test_a_matrix_is_never_faster_than_the_roofline(gpu):
    cluster = Cluster(gpu, 8)
    for m in (1, 100, 4096, 100_000):
        for k, c in ((128, 128), (4096, 11008), (8192, 1024)):
            seconds = matmul_seconds(m, k, c, cluster)
            assert seconds >= 2*m*k*c/gpu.flops and seconds >= 2*(m*k + k*c + m*c)/gpu.bandwidth
            assert seconds < matmul_seconds(m + 1, k, c, cluster)
    rates = [2*m*4096*4096/matmul_seconds(m, 4096, 4096, cluster) for m in (16, 256, 4096, 65536)]
    assert rates == sorted(rates)                   # larger is more efficient

@pytest.mark.parametrize('name', ['7B', '13B', '33B', '65B'])
def test_flops_are_those_of_the_page_of_flops(name):
    run = eager(name)
    step = step_time(run, Cluster(A100, {'7B': 512, '13B': 1024}.get(name, 2048)))
    flops = flops_per_token(run.model, run.data.seq_len)
    assert step.mfu == pytest.approx(step.tokens_per_second_per_gpu*flops/A100.flops, rel=1e-3)
    assert step.hfu == step.mfu                     # linear repeats no multiplication

# --- the step -----------------------------------------------------------------------------------

SHARDED = Layout(shard=8)
def job(layout=SHARDED, micro=4, passes=1, **more): return StepJob(SHAPE, layout, 2048, micro, passes, **more)
def speed(job, gpu=A100, **cluster):
    return job_time(job, Cluster(gpu, job.layout.ranks, **cluster)).tokens_per_second_per_gpu

def test_parts_add_up_and_none_is_negative():
    for row in published_rows(BENCHMARKS/'published_throughput.csv'):
        step = job_time(row.job, row.cluster)
        assert sum(step.parts.values()) == pytest.approx(step.seconds)
        assert step.compute + step.exposed == pytest.approx(step.seconds)
        assert all(seconds >= 0 and math.isfinite(seconds) for seconds in step.parts.values())
        assert 0 < step.mfu <= step.hfu < 1
        assert all(t.bytes > 0 for t in step.traffic)

def test_better_machines_are_not_slower():
    for layout in (Layout(1, 64), Layout(8, 8), Layout(1, 8, 8), Layout(8, 8, zero=1), Layout(1, 64, zero=2)):
        for recompute in ('none', 'linear', 'selective', 'full'):
            one = job(layout, recompute=recompute)
            base = speed(one)
            for change in ({'flops': 400e12}, {'bandwidth': 3e12}, {'link': 450e9}, {'watts': 450.}):
                assert speed(one, replace(A100, **change)) >= base, change
            assert speed(one, network=50e9) >= base >= speed(one, network=5e9)
            assert speed(replace(one, kernels='compiled')) > base
            assert speed(replace(one, passes=4)) >= base*(1 - 1e-9)
    modes = [speed(job(recompute=mode)) for mode in ('none', 'linear', 'selective', 'full')]
    assert modes == sorted(modes, reverse=True)

def test_more_gpus_never_help_each_of_them():
    for zero in (1, 2, 3):
        over_all = [speed(job(Layout(shard=n, zero=zero))) for n in (8, 16, 64, 256, 1024)]
        within = [speed(job(Layout(n//8, 8, zero=zero))) for n in (8, 16, 64, 256, 1024)]
        assert over_all == sorted(over_all, reverse=True) and within == sorted(within, reverse=True)
        assert within[-1] > over_all[-1]

def test_asynchronous_tensor_parallelism_hides_some():
    plain, hidden = (speed(job(Layout(1, 1, 8, async_tensor=a))) for a in (False, True))
    assert plain < hidden < speed(job(Layout(1, 1, 8), micro=4), replace(A100, link=1e15))

def test_one_gpu_sends_nothing():
    step = job_time(job(Layout()), Cluster(A100, 1))
    assert step.exposed == 0 and step.traffic == []

def test_a_pipeline_waits():
    cluster = Cluster(H100, 4, stack='megatron')
    shallow, deep = (job_time(job(Layout(pipeline=4, virtual=v, zero=1), 1, 8), cluster) for v in (4, 1))
    assert deep.parts['bubble'] == pytest.approx(4*shallow.parts['bubble'])
    assert deep.parts['bubble']/(deep.compute - deep.parts['optimizer']) == pytest.approx(3/8)

def test_threshold_is_where_sending_is_as_long_as_computing():
    cluster = Cluster(A100, 1024)
    tokens = tokens_to_hide(cluster, 1024)
    assert tokens_to_hide(replace(cluster, network=50e9), 1024) == pytest.approx(tokens/2)
    assert tokens_to_hide(replace(cluster, gpus_per_node=4), 1024) == pytest.approx(2*tokens, rel=1e-2)
    assert tokens_to_hide(cluster, 8) < tokens

# --- the fit ------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def rows(): return published_rows(BENCHMARKS/'published_throughput.csv')

@pytest.mark.parametrize('stack', ['pytorch', 'megatron'])
def test_published_rows_are_met(stack, rows):
    with open(BENCHMARKS/'published_fit.csv', newline='') as f:
        left_out = [float(line['without_the_row']) for line in csv.DictReader(f)]
    mine = [(row, out) for row, out in zip(rows, left_out, strict=True) if row.cluster.stack == stack]
    fitted = [abs(row.predict()/row.published - 1) for row, _ in mine]
    assert median(fitted) <= .08 and max(fitted) <= .25
    assert median(abs(out/row.published - 1) for row, out in mine) <= .10

def test_the_paper_is_met(rows):
    hours = {'7B': (82_432, 1e12), '13B': (135_168, 1e12),
             '33B': (530_432, 1.4e12), '65B': (1_022_362, 1.4e12)}
    for row in rows:
        name = row.model.removeprefix('LLaMA-')
        if name == row.model: continue
        published, tokens = hours[name]
        assert tokens/row.predict()/3600 == pytest.approx(published, rel=.1), name
    assert row_of(rows, 'LLaMA-65B').predict() == pytest.approx(380, rel=.1)
    days = 1.4e12/row_of(rows, 'LLaMA-65B').predict()/2048/86400
    assert days == pytest.approx(21, rel=.1)

def row_of(rows, model): return next(row for row in rows if row.model == model)

def test_the_papers_rows_are_the_run_files(rows):
    for name, gpus in {'7B': 512, '13B': 1024, '33B': 2048, '65B': 2048}.items():
        row = row_of(rows, f'LLaMA-{name}')
        mine = job_of(eager(name, '--parallel.async_tensor', str(row.job.layout.async_tensor)), gpus)
        assert row.job == mine and row.cluster == Cluster(A100, gpus)

def test_names_do_not_matter(rows):
    "The prediction is a function of job, cluster and constants alone"
    assert all(replace(row, model='', source='').predict() == row.predict() for row in rows[::7])

def test_constants_are_in_a_physical_range():
    k = CONSTANTS
    for name in ('ampere', 'hopper', 'megatron', 'stream', 'link', 'network', 'overlap', 'overlap_tensor'):
        assert .3 < getattr(k, name) <= 1, name
    assert 1e-6 < k.latency < 2e-5 and 0 < k.power < 1
    assert len(fields(Constants)) == 10

def test_every_row_has_a_source_and_says_what_was_assumed():
    with open(BENCHMARKS/'published_throughput.csv', newline='') as f: lines = [*csv.DictReader(f)]
    assert len(lines) == 77 and all(line['source'] and line['status'] for line in lines)
    unsaid = 'LLaMA-', 'InternLM', 'Llama3.1-405B'
    assert all(line['assumed'] for line in lines if line['model'].startswith(unsaid))

# --- mistakes -----------------------------------------------------------------------------------

def step_of(gpus, *settings): return step_time(run_of('7B', *settings), Cluster(A100, gpus))

MISTAKES = [(lambda: Cluster(A100, 0), 'cluster.gpus'),
            (lambda: Cluster(A100, 8, network=-1), 'cluster.network'),
            (lambda: Cluster(A100, 8, network=math.inf), 'cluster.network'),
            (lambda: Cluster(A100, 8, network=math.nan), 'cluster.network'),
            (lambda: Cluster(A100, 8, stack='jax'), 'stack'),
            (lambda: job(recompute='some'), 'recompute mode'),
            (lambda: job(kernels='fast'), 'kind of kernels'),
            (lambda: job_time(job(), Cluster(A100, 16)), 'for 8 GPUs'),
            (lambda: step_of(100), '100 ranks'),
            (lambda: step_of(512, '--train.recompute', 'budget', '--train.compile', 'blocks'), 'budget'),
            (lambda: step_of(512, '--train.dtype', 'float32'), 'bfloat16'),
            (lambda: step_of(24, '--parallel.replicate', '3'), 'data.batch_size'),
            (lambda: published_rows(ROOT/'nothing.csv'), 'nothing.csv'),
            (lambda: published_rows(ROOT/'README.md'), 'README.md')]

@pytest.mark.parametrize('action, words', MISTAKES, ids=[words for _, words in MISTAKES])
def test_a_mistake_is_one_line(action, words):
    with pytest.raises(UserError) as error: action()
    assert words in str(error.value) and '\n' not in str(error.value)
