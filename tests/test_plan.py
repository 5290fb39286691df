"A plan: what divides, what is fastest, what is said of it; and one clear line for every mistake."
import itertools, json, random, re
from dataclasses import replace
from pathlib import Path
import pytest
from llama_nb.cli import main
from llama_nb.config import PRESETS, ModelConfig
from llama_nb.core import UserError
from llama_nb.data.mixture import text_facts
from llama_nb.run_file import load_run
from llama_nb.scale.cluster import GPUS, Cluster, step_time
from llama_nb.scale.layout import check_layout, fastest, fits, laid_out, layouts, peak_bytes, ways_out
from llama_nb.scale.memory import memory_per_rank
from llama_nb.scale.plan import PLACES, model_run, plan, report, sized, whole_number
from llama_nb.settings import degrees

ROOT = Path(__file__).resolve().parent.parent
A100 = GPUS['A100-80GB']

@pytest.fixture
def ask(capsys):
    "`llama-nb plan ...` in this process: (exit code, stdout, stderr)"
    def run(*args):
        code = main(['plan', *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return run

def small_run(batch=24, heads=6):
    "A model of few layouts, so large that many of them do not fit"
    c = ModelConfig(heads*1024, 15, heads, vocab_size=30_000, multiple_of=192)
    run = replace(model_run('7B', '1B'), model=c)
    return sized(run, batch_tokens=str(batch*2048))

# --- layouts ------------------------------------------------------------------------------------

def by_force(run, gpus):
    "Every layout out of all combinations of numbers, by the rules of the trainer"
    c, batch, t = run.model, run.data.batch_size, run.data.seq_len
    numbers = range(1, gpus + 1)
    for r, s, n in itertools.product(numbers, repeat=3):
        if r*s*n != gpus or c.n_heads % n or c.ffn_dim % n or c.vocab_size % n or t % n: continue
        for micro in range(1, batch + 1):
            if batch % (r*s*micro) == 0: yield from ((r, s, n, micro, m) for m in ('none', 'linear', 'full'))

def shape(run): return (run.parallel.replicate, run.parallel.shard, run.parallel.tensor,
                        run.train.micro_batch_size, run.train.recompute)

@pytest.mark.parametrize('gpus', [1, 2, 3, 6, 12])
def test_layouts_are_all_that_divide(gpus):
    run = small_run()
    found = [shape(r) for r in layouts(run, gpus)]
    assert len(found) == len(set(found)) and set(found) == set(by_force(run, gpus))

@pytest.mark.parametrize('gpu', ['A100-40GB', 'A100-80GB'])
@pytest.mark.parametrize('gpus, batch', [(4, 16), (6, 24), (8, 8)])
def test_the_search_is_no_worse_than_brute_force(gpu, gpus, batch):
    run, cluster = small_run(batch), Cluster(GPUS[gpu], gpus, gpus_per_node=4)
    tried = [laid_out(run, *sizes) for sizes in by_force(run, gpus)]
    fitting = [r for r in tried if sum(memory_per_rank(r, gpus).values()) <= .9*cluster.gpu.memory]
    best = fastest(run, cluster)
    assert 0 < len(fitting) < len(tried)                       # so that fitting matters
    assert best in fitting
    assert step_time(best, cluster).seconds == min(step_time(r, cluster).seconds for r in fitting)

def test_what_is_fixed_stays():
    run, cluster = small_run(), Cluster(A100, 12, gpus_per_node=4)
    for fixed in ({'tensor': 2}, {'micro_batch': 1, 'recompute': 'full'}, {'replicate': 3, 'shard': 4}):
        names = 'replicate', 'shard', 'tensor', 'micro_batch', 'recompute'
        for r in layouts(run, 12, **fixed): assert fixed.items() <= dict(zip(names, shape(r))).items()
        assert fastest(run, cluster, **fixed) is not None
    assert fastest(run, cluster, tensor=5) is None

def test_a_layout_is_refused_exactly_where_it_is_not_among_all():
    "Random numbers: the check and the search know the same rules"
    run, rng = small_run(), random.Random(0)
    among, refused = {shape(r) for r in layouts(run, 12)}, 0
    for _ in range(300):
        sizes = tuple(rng.choice((1, 2, 3, 4, 6, 12)) for _ in range(4))
        try:
            check_layout(laid_out(run, *sizes, 'full'), 12)
        except UserError as e:
            refused += 1
            assert '\n' not in str(e) and (*sizes, 'full') not in among
        else:
            assert (*sizes, 'full') in among
    assert 0 < refused < 300

# --- what does not fit --------------------------------------------------------------------------

@pytest.mark.parametrize('name, gpus', [('7B', 8), ('13B', 16), ('65B', 64)])
def test_what_would_fit_fits(name, gpus):
    "Each way out, applied as its words say, fits and costs what it says"
    run, cluster = model_run(name), Cluster(GPUS['A100-40GB'], gpus)
    largest = max(layouts(run, gpus), key=lambda r: peak_bytes(r, gpus))
    assert not fits(largest, cluster)
    for way in ways_out(largest, cluster, fastest(run, cluster)):
        if way['change'].startswith('--gpu '): continue
        r, _, n, micro, mode = shape(largest)
        now = {'parallel.replicate': r, 'parallel.tensor': n, 'train.micro_batch_size': micro,
               'train.recompute': mode}
        pairs = (part.split(' = ') for part in way['change'].split(', '))
        r, n, micro, mode = (now | {key: json.loads(value) for key, value in pairs}).values()
        other = laid_out(run, r, gpus//n//r, n, micro, mode)
        check_layout(other, gpus)
        assert fits(other, cluster)
        assert way['bytes'] == peak_bytes(other, gpus)
        assert way['seconds'] == step_time(other, cluster).seconds

def test_nothing_fits_on_one_gpu_and_the_answer_is_more_of_them(ask):
    code, out, err = ask('--model', '65B', '--gpus', '1', '--json')
    facts = json.loads(out)
    assert (code, err, facts['fastest'], facts['memory']['fits']) == (1, '', None, False)
    enough = next(w for w in facts['ways_out'] if w['change'].startswith('--gpus'))
    words = enough['change'].split()
    assert ask('--model', '65B', *words)[0] == 0
    assert ask('--model', '65B', '--gpus', int(words[1])//2)[0] == 1

def test_by_how_much_it_does_not_fit(ask):
    code, out, _ = ask(ROOT/'configs'/'13B.toml', '--gpu', 'A100-40GB')
    total = sum(memory_per_rank(load_run(ROOT/'configs'/'13B.toml'), 1024).values())
    line = next(line for line in out.splitlines() if 'DOES NOT FIT' in line)
    assert code == 1 and f'{(total - 36e9)/1e9:.2f} GB' in line
    assert 'would fit' in out

# --- the plan -----------------------------------------------------------------------------------

LAYOUT = 'replicate shard tensor micro_batch micro_batches recompute'
KEYS = {'model': 'parameters vocab_size seq_len batch_tokens text_not_here',
        'layout': LAYOUT, 'fastest': f'{LAYOUT} seconds',
        'cluster': 'gpu gpus gpus_per_node network stack watts',
        'memory': 'parts total limit card fits spare', 'step': 'seconds parts tokens_per_second_per_gpu mfu',
        'run': 'tokens steps days gpu_hours energy_mwh carbon_tons',
        'checkpoint': 'bytes pause_seconds write_seconds interval_steps interval_seconds save_every',
        'failures': 'hours_between expected goodput goodput_of_save_every days gpu_hours',
        'assumed': 'gpu_hours_per_failure restart_minutes storage host_copy pue carbon'}

def test_the_keys_of_the_json_are_stable(ask):
    code, out, err = ask(ROOT/'configs'/'65B.toml', '--json')
    facts = json.loads(out)
    assert (code, err) == (0, '')
    assert sorted(facts) == sorted([*KEYS, 'ways_out', 'formulas'])
    for name, keys in KEYS.items(): assert sorted(facts[name]) == sorted(keys.split())
    assert sorted(facts['formulas']) == sorted(PLACES)

def test_a_plan_agrees_with_itself():
    run, cluster = load_run(ROOT/'configs'/'65B.toml'), Cluster(A100, 2048)
    p = plan(run, cluster)
    assert p['memory']['total'] == sum(memory_per_rank(run, 2048).values())
    assert p['run']['gpu_hours'] == pytest.approx(run.train.steps*step_time(run, cluster).seconds*2048/3600)
    assert p['run']['energy_mwh'] == pytest.approx(p['run']['gpu_hours']*400*1.1/1e6)
    assert p['run']['carbon_tons'] == pytest.approx(p['run']['energy_mwh']*.385)
    assert p['failures']['expected'] == pytest.approx(p['failures']['gpu_hours']/45_000)
    assert p['run']['days'] < p['failures']['days'] < 1.05*p['run']['days']
    assert 0 < p['failures']['goodput_of_save_every'] < 1
    cool = plan(run, replace(cluster, gpu=replace(A100, watts=300)))
    assert cool['step']['seconds'] > p['step']['seconds']
    assert cool['run']['energy_mwh'] < p['run']['energy_mwh']

def test_replicas_share_the_writing_of_a_checkpoint():
    "What a save of all ranks copies is the state, once, at 10 GB per second from each"
    run, cluster = model_run('13B'), Cluster(A100, 1024)
    for replicate in (1, 8, 128):
        p = plan(laid_out(run, replicate, 1024//replicate, 1, 2, 'full'), cluster)
        copied = p['checkpoint']['pause_seconds']*1024*10e9
        assert copied == pytest.approx(p['checkpoint']['bytes']) == pytest.approx(12*run.model.n_params)
        assert 1710 < p['checkpoint']['interval_seconds'] < 1721

@pytest.mark.parametrize('tokens, gpus', [('20B', 1), ('20B', 8), ('400M', 1), ('5M', 8)])
def test_an_interval_is_hours_at_most_and_a_tenth_of_the_run(ask, tmp_path, tokens, gpus):
    "Failures are rare on one GPU: the longest interval that loses half a percent was longer than the run"
    path = tmp_path/'best.toml'
    cluster = ['--gpus', gpus, '--gpu', 'H200']
    code, out, _ = ask('--model', '1.3B', '--tokens', tokens, *cluster, '--suggest', path, '--json')
    facts = json.loads(out)
    steps, seconds = facts['checkpoint']['interval_steps'], facts['checkpoint']['interval_seconds']
    assert code == 0 and 1 <= steps <= max(1, facts['run']['steps']//10) and seconds <= 3*3600
    assert load_run(path).train.save_every == steps

def test_every_line_names_a_section_that_exists():
    p = plan(load_run(ROOT/'configs'/'7B.toml'), Cluster(A100, 512))
    lines = [line for line in report(p).splitlines() if line.startswith('  ')]
    named = {line.rsplit('  ', 1)[1] for line in lines}
    assert len(lines) > 25 and named <= {f'{page}, "{section}"' for page, section in PLACES.values()}
    for page, section in PLACES.values():
        cells = json.loads((ROOT/'nbs'/f'{page}.ipynb').read_text(encoding='utf-8'))['cells']
        lines = [line for c in cells if c['cell_type'] == 'markdown' for line in c['source']]
        heads = [line.strip('# \n') for line in lines if line.startswith('#')]
        assert section in heads, (page, section)

SAYS = {'batch': 'batch', 'weights': 'weights', "AdamW's moments": 'moments',
        'attention': 'attention', 'element-wise': 'reads and writes', 'loss': 'loss', 'optimizer': 'AdamW',
        'MFU': 'MFU', 'goodput': 'goodput', 'energy': 'power', 'carbon': 'tCO2eq'}

@pytest.mark.parametrize('label', SAYS)
def test_the_section_that_a_line_names_speaks_of_it(label):
    text = report(plan(load_run(ROOT/'configs'/'7B.toml'), Cluster(A100, 512)))
    line = next(line for line in text.splitlines() if line.startswith(f'  {label} '))
    page, section = line.rsplit('  ', 1)[1].strip('"').split(', "')
    cells = json.loads((ROOT/'nbs'/f'{page}.ipynb').read_text(encoding='utf-8'))['cells']
    prose = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    part = re.split(r'(?m)^##+ ', prose.split(f'# {section}\n')[1])[0]
    assert SAYS[label].lower() in part.lower()

def test_a_run_file_keeps_its_layout_and_flags_change_it(ask):
    path = ROOT/'configs'/'65B.toml'
    layout = json.loads(ask(path, '--json')[1])['layout']
    own = load_run(path)
    ranks = tuple(layout[k] for k in ('replicate', 'shard', 'tensor'))
    assert ranks == degrees(own.parallel, own.model, 2048)
    changed = json.loads(ask(path, '--micro-batch', 4, '--recompute', 'full', '--json')[1])['layout']
    assert changed == layout | {'micro_batch': 4, 'micro_batches': 2, 'recompute': 'full'}
    shorter = json.loads(ask(path, '--tokens', '700B', '--json')[1])['run']['steps']
    assert shorter == own.train.steps//2 == 7*10**11//2**22

SHORT = 'out = "run"\nmodel.preset = "25M"\ndata.train = "{}"\ntrain.steps = 1000\n'

def test_what_follows_the_text_follows_it_in_a_plan_or_is_said_to_be_a_default(ask, tokens, tmp_path):
    path, cluster = tmp_path/'run.toml', ['--gpus', 1, '--json']
    path.write_text(SHORT.format((tokens/'train').as_posix()))
    trained = load_run(path, read_text=text_facts)          # what `train` takes
    model = json.loads(ask(path, *cluster)[1])['model']
    assert (model['vocab_size'], model['text_not_here']) == (400, None) and trained.model.vocab_size == 400
    assert model['parameters'] == trained.model.n_params
    assert model['batch_tokens'] == trained.data.batch_size*trained.data.seq_len < 2**19
    assert 'not here' not in ask(path, *cluster[:2])[1]
    path.write_text(SHORT.format('tokens/far'))
    code, out, err = ask(path, *cluster, '--suggest', tmp_path/'best.toml')
    model = json.loads(out)['model']
    assert (code, err, model['text_not_here'], model['vocab_size']) == (0, '', 'tokens/far', 8192)
    assert model['batch_tokens'] == 2**19
    for said in (ask(path, *cluster[:2])[1], (tmp_path/'best.toml').read_text()):
        assert 'tokens/far; if not given, vocabulary 8,192 and batch are defaults' in said
    path.write_text(SHORT.format('tokens/far') + 'model.vocab_size = 500\ndata.batch_size = 8\n')
    assert json.loads(ask(path, *cluster)[1])['model']['text_not_here'] is None      # nothing is left open

# --- files --------------------------------------------------------------------------------------

@pytest.mark.parametrize('asked, cluster', [
    (['--model', '7B'], ['--gpus', '64']), (['--model', '33B'], ['--gpus', '128', '--gpu', 'H200']),
    ([str(ROOT/'configs'/'13B.toml')], ['--gpus', '1024', '--gpu', 'A100-40GB'])])
def test_a_suggestion_is_a_run_file_that_fits(ask, tmp_path, asked, cluster):
    path = tmp_path/'new'/'best.toml'
    ask(*asked, *cluster, '--suggest', path)
    run = load_run(path)
    code, out, _ = ask(path, *cluster, '--json')
    facts = json.loads(out)
    assert code == 0 and facts['memory']['fits']
    assert facts['fastest']['seconds'] == facts['step']['seconds']  # nothing is faster than the suggestion
    assert run.train.save_every == facts['checkpoint']['interval_steps']
    assert [p.name for p in path.parent.iterdir()] == ['best.toml']

@pytest.mark.parametrize('kind, start', [('png', b'\x89PNG'), ('svg', b'<?xml'), ('pdf', b'%PDF')])
def test_the_figure(ask, tmp_path, kind, start):
    path = tmp_path/f'plan.{kind}'
    assert ask('--model', '7B', '--gpus', '8', '--figure', path)[0] == 0
    assert path.read_bytes().startswith(start) and [p.name for p in tmp_path.iterdir()] == [path.name]

# --- wrong input --------------------------------------------------------------------------------

MODEL = ['--model', '7B', '--gpus', '8']
FILE = [str(ROOT/'configs'/'65B.toml')]
README, PROJECT = str(ROOT/'README.md'), str(ROOT/'pyproject.toml')
MISTAKES = {
    'nothing': ([], 'give a run file'),
    'both': ([*FILE, '--model', '7B'], 'one of the two'),
    'no GPUs': (['--model', '7B'], '--gpus'),
    'no tokens': (['--model', 'toy', '--gpus', '1'], '--tokens'),
    'unknown model': (['--model', '65b', '--gpus', '8'], "did you mean '65B'"),
    'unknown GPU': ([*MODEL, '--gpu', 'A100-80G'], "did you mean 'A100-80GB'"),
    'unknown stack': ([*MODEL, '--stack', 'megatron-core'], "did you mean 'megatron'"),
    'unknown mode': ([*MODEL, '--recompute', 'ful'], "did you mean 'full'"),
    'watts': ([*MODEL, '--watts', '401'], 'watts must be at most 400, as in the data sheet of A100-80GB'),
    'unknown flag': ([*MODEL, '--gpu-per-node', '8'], "did you mean 'gpus_per_node'"),
    'no run file': ([README], 'is not a TOML file'),
    'missing': (['none.toml'], 'cannot read none.toml'),
    'a folder': ([str(ROOT/'configs')], 'is not the folder of a run'),
    'no model file': (['--model', README, '--gpus', '8'], 'is not a TOML file'),
    'no model table': (['--model', PROJECT, '--gpus', '8'], 'has no [model] table'),
    'not a run': ([PROJECT], 'unknown setting'),
    'replicas': ([*FILE, '--replicate', '3'], 'replicate x shard can be'),
    'ranks': ([*FILE, '--gpus', '100'], 'must divide'),
    'tensor': ([*FILE, '--tensor', '3'], 'choose parallel.tensor from [1, 2, 4, 8'),
    'micro-batch': ([*FILE, '--micro-batch', '3'], 'must divide'),
    'micro-batch of a group': ([*FILE, '--micro-batch', '16'], 'choose from [1, 2, 4, 8]'),
    'three GPUs': (['--model', '7B', '--gpus', '3'], 'take 2 GPUs'),
    'a fixed layout': ([*MODEL, '--tensor', '3'], 'choose parallel.tensor'),
    'sequences': ([*MODEL, '--batch-tokens', '5000'], '4,096 are'),
    'less than a batch': ([*MODEL, '--tokens', '1M'], '0 steps'),
    'too many steps': ([*MODEL, '--tokens', '1e18', '--batch-tokens', '2k'], 'steps'),
    'figure': ([*MODEL, '--figure', 'x.gif'], 'kind of figure'),
    'nothing to suggest': (['--model', '65B', '--gpus', '1', '--suggest', 'x.toml'], 'no layout fits'),
    'file exists': ([*MODEL, '--suggest', README], 'exists already'),
    'never ends': ([*MODEL, '--gpu-hours-per-failure', '1e-9'], 'never ends')}
for option in ('tokens', 'batch-tokens'):
    for value in ('0', '-1', 'nan', 'inf', 'many', '4Q', '1.4.2T', '1e400', '9'*5000):
        MISTAKES[f'{option} {value[:8]}'] = ([*MODEL, f'--{option}', value], 'must be a whole number above 0')
for option in ('gpus', 'seq-len', 'gpus-per-node', 'tensor', 'micro-batch'):
    for value in ('-1', 'nan', '1.5', 'x', '1e3', str(2**40)):
        MISTAKES[f'{option} {value}'] = ([*MODEL, f'--{option}', value], option.replace('-', '_'))
POSITIVE = ('network', 'storage', 'host-copy', 'pue', 'carbon', 'watts', 'restart-minutes',
            'gpu-hours-per-failure')
for option in POSITIVE:
    for value in ('-1', 'nan', 'inf', 'x', '-0.0'):
        MISTAKES[f'{option} {value}'] = ([*MODEL, f'--{option}', value], option.replace('-', '_'))

@pytest.mark.parametrize('args, words', MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(ask, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = ask(*args)
    assert (code, out, err.count('\n')) == (2, '', 1), err
    assert err.startswith('llama-nb: error: ') and words in err and len(err) < 600
    assert not any(tmp_path.iterdir())

def test_a_folder_that_cannot_be_written(ask, tmp_path):
    (tmp_path/'file').write_text('')
    code, _, err = ask(*MODEL, '--suggest', tmp_path/'file'/'x.toml')
    assert code == 2 and err.count('\n') == 1 and [p.name for p in tmp_path.iterdir()] == ['file']

@pytest.mark.parametrize('text, number', [
    ('1.4T', 14*10**11), ('300B', 3*10**11), ('0.5k', 500), ('1e12', 10**12), ('2_048', 2048)])
def test_numbers(text, number): assert whole_number(text, 'tokens') == number

def test_numbers_of_a_batch_are_powers_of_two(): assert whole_number('4M', 'batch_tokens', 1024) == 2048*2048

def test_a_model_of_ones_own(ask, tmp_path):
    (tmp_path/'own.toml').write_text('[model]\npreset = "7B"\nn_layers = 16\n')
    run = model_run(str(tmp_path/'own.toml'), '300B')
    assert run.model == replace(PRESETS['7B'], n_layers=16) and run.optim.lr == 3e-4
    (tmp_path/'bad.toml').write_text('[model]\ndim = 4096\nn_layer = 16\nn_heads = 32\n')
    code, _, err = ask('--model', tmp_path/'bad.toml', '--gpus', 8, '--tokens', '1B')
    assert code == 2 and "did you mean 'n_layers'" in err and err.count('\n') == 1
