"""Runs that begin where another ended: initialised, forked, prolonged; on one process and on two; moved to
another place; and folders of an older version."""
import json, re, shutil
from pathlib import Path
import pytest
import torch
from safetensors.torch import load_file, save_file
from llama_nb.cli import main
from llama_nb.files import file_digest
from llama_nb.run_file import load_run
from conftest import metrics, numbers, variant

WSD = ('--optim.schedule', 'wsd', '--optim.decay_fraction', .25)

def steps(folder): return [int(p.name[5:]) for p in sorted((folder/'checkpoints').glob('step-*'))]

def weights(folder, step):
    "The tensors of a checkpoint that one process has written"
    place = folder/'checkpoints'/f'step-{step:08}'
    return {(part, name): t for part in ('model', 'optimizer')
            for name, t in load_file(place/f'{part}-00000.safetensors').items()}

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def refused(result, *words):
    "Exit code 2 and one line that says it"
    status, shown, err = result
    said = [line for line in err.splitlines() if line.startswith('llama-nb: error: ')]
    assert status == 2 and len(said) == 1 and 'Traceback' not in err, err
    for word in words: assert word in said[0], said[0]
    return said[0]

@pytest.fixture
def parent(trained, run_file, tmp_path):
    "A finished run of 8 steps with checkpoints at 4 and 8, and parent.toml, its file"
    run_file(8, save_every=4, name='parent')
    return shutil.copytree(trained, tmp_path/'parent')

# --- more steps -----------------------------------------------------------------------------------

def test_a_prolonged_run_is_one_that_was_longer_from_the_beginning(run_file, llama_nb, tmp_path):
    whole, path, out = run_file(16, save_every=16, name='whole'), run_file(8, name='grown'), tmp_path/'grown'
    assert llama_nb('train', whole, *WSD)[0] == 0
    assert llama_nb('train', path, *WSD, '--train.keep', 1)[0] == 0
    assert steps(out) == [6, 8]                             # where the decay begins, and the end
    longer = ('train', out, '--train.steps', 16, '--train.save_every', 16)
    fork = f'--fork {out}@6 --out NEW --train.steps 16'
    text = refused(llama_nb(*longer), 'began to decay after step 6', fork)
    advice = re.search(r'`llama-nb (.*)`', text)[1].replace('NEW', f'{tmp_path}/branch')
    status, _, err = llama_nb(*advice.split())
    assert status == 0, err
    shutil.rmtree(out/'checkpoints'/'step-00000008')        # as if it had been stopped there
    status, shown, err = llama_nb(*longer)
    assert status == 0 and 'train.steps: 8 -> 16' in shown, err
    for folder in (out, tmp_path/'branch'):
        assert numbers(folder) == numbers(tmp_path/'whole')
        assert same(weights(folder, 16), weights(tmp_path/'whole', 16))
    assert load_run(out).train.steps == 16
    assert 'is finished: 16 of 16' in llama_nb('train', out)[1]

def test_a_cosine_is_not_prolonged(parent, llama_nb):
    before = (parent/'config.toml').read_bytes()
    refused(llama_nb('train', parent, '--train.steps', 16), 'another configuration (train.steps: 8 -> 16)',
            'a cosine depends on the number of steps', f'--fork {parent} --out NEW --train.steps 16',
            f'--train.init {parent}')
    refused(llama_nb('train', parent, '--model.dim', 32), 'choose another --out')
    assert (parent/'config.toml').read_bytes() == before

# --- fork -----------------------------------------------------------------------------------------

def test_a_fork_with_nothing_changed_is_its_parent(parent, llama_nb, tmp_path):
    out = tmp_path/'fork'
    for _ in range(2):                                      # the same command goes on
        status, shown, err = llama_nb('train', '--fork', f'{parent}@4', '--out', out)
        assert status == 0, err
        assert numbers(out) == numbers(parent) and same(weights(out, 8), weights(parent, 8))
        held_out = [[row.get('held_out_loss') for row in metrics(folder)] for folder in (out, parent)]
        assert held_out[0] == held_out[1]
    assert 'is finished: 8 of 8' in shown
    assert [row.get('run') for row in metrics(out)] == [str(parent)]*4 + [None]*4
    told = json.loads((out/'results.json').read_text())['parent']
    digest = file_digest(parent/'checkpoints'/'step-00000004'/'manifest.json')
    assert told == {'kind': 'fork', 'run': str(parent), 'step': 4, 'sha256': digest, 'changed': []}
    assert f'Forked from {parent} after step 4' in (out/'README.md').read_text()
    last = 'checkpoints/step-00000008/state.json'
    assert json.loads((out/last).read_text()) == json.loads((parent/last).read_text())

def test_a_fork_leaves_out_what_it_is_told_to(parent, llama_nb, tmp_path):
    "As PaLM did after a spike: go back, and skip batches. The same command goes on, another shift does not"
    from llama_nb.train.run import open_data
    out = tmp_path/'fork'
    command = ('train', '--fork', f'{parent}@4', '--out', out, '--data.shift')
    status, shown, err = llama_nb(*command, 16)
    assert status == 0 and '16 sequences left out' in shown, err
    ours, theirs = open_data(load_run(out))[0], open_data(load_run(parent))[0]
    assert ours.batch_size == 8 and torch.equal(ours.batch(4)[0], theirs.batch(6)[0])
    assert '16 sequences left out' in (out/'README.md').read_text()
    for again in (command[:-1], (*command, 16), ('train', out)): assert 'is finished' in llama_nb(*again)[1]
    refused(llama_nb(*command, 24), 'another configuration', 'data.shift')
    shutil.rmtree(out/'checkpoints')                        # as if killed before the first one
    assert llama_nb(*command, 16)[0] == 0
    assert load_run(out).data.shift == ours.shift and steps(out) == [8]
    status, shown, err = llama_nb('train', '--fork', f'{out}@8', '--out', tmp_path/'next', '--train.steps', 9)
    assert status == 0 and 'left out' not in shown, err
    assert torch.equal(open_data(load_run(tmp_path/'next'))[0].batch(8)[0], theirs.batch(10)[0])

def test_a_fork_has_settings_of_its_own(parent, llama_nb, tmp_path, tokens):
    out = tmp_path/'fork'
    more = ('--train.steps', 12, '--optim.lr', 1e-3, '--data.batch_size', 12)
    status, shown, err = llama_nb('train', '--fork', f'{parent}@4', '--out', out, *more)
    assert status == 0, err
    assert 'optim.lr: 0.003 -> 0.001' in shown and 'learning rate there' in shown
    assert [row['tokens']//64 for row in metrics(out)[2:7]] == [24, 32, 44, 56, 68]
    from llama_nb.train.run import open_data
    ours, theirs = open_data(load_run(out))[0], open_data(load_run(parent))[0]
    def read(loader, *batches): return torch.cat([loader.batch(i)[0] for i in batches])
    assert torch.equal(read(ours, 4, 5), read(theirs, 4, 5, 6))         # none twice, none left out
    other = ('--data.train', tokens/'held_out', '--data.held_out', '')
    status, shown, err = llama_nb('train', '--fork', f'{parent}@4', '--out', tmp_path/'text', *other)
    assert status == 0 and 'the text from its beginning' in shown, err
    assert open_data(load_run(tmp_path/'text'))[0].first(4) == 0

@pytest.mark.parametrize('args, words',
    [(('--fork', 'PARENT', '--out', 'NEW'), ('all of its 8 steps',)),
     (('--fork', 'PARENT@5', '--out', 'NEW'), ('no checkpoint of step 5; there are 4, 8',)),
     (('--fork', 'PARENT@4', '--out', 'NEW', '--model.dim', 32), ('another network', 'model.dim: 64 -> 32')),
     (('--fork', 'PARENT@4', '--out', 'NEW', '--model.n_heads', 8), ('model.n_heads: 4 -> 8',)),
     (('--fork', 'PARENT@4', '--out', 'PARENT'), ('another configuration',)),
     (('--fork', 'PARENT@4'), ('--out NEW',)),
     (('--fork', '--out', 'NEW'), ('--fork needs a run',)),
     (('--fork', 'NEW', '--out', 'OTHER'), ('cannot read', 'No such file')),
     (('PARENT', '--out', 'NEW', '--train.init', 'PARENT', '--model.multiple_of', 64),
      ('model.ffn_dim: 176 -> 192',)),
     (('PARENT', '--out', 'NEW', '--train.init', 'TOKENS'), ('no config.toml',)),
     (('PARENT', '--out', 'NEW', '--train.init', 'none.safetensors'), ('there is no file',)),
     (('PARENT', '--out', 'NEW', '--train.init', 'PARENT', '--train.fork', 'PARENT'), ('give one',))])
def test_what_cannot_be(parent, llama_nb, tmp_path, tokens, args, words):
    place = {'PARENT': parent, 'NEW': tmp_path/'new', 'TOKENS': tokens, 'OTHER': tmp_path/'other'}
    written = [re.sub('|'.join(place), lambda m: str(place[m[0]]), str(a)) for a in args]
    refused(llama_nb('train', *written), *words)
    assert not (tmp_path/'new').exists()

def test_another_tokenizer_is_refused(parent, llama_nb, tmp_path):
    from llama_nb.data.documents import topic_documents
    from llama_nb.data.shards import write_shards
    from llama_nb.data.tokenizer import train_tokenizer
    docs = list(topic_documents())[:20]
    write_shards(docs, train_tokenizer((d.text for d in docs), tmp_path/'other.model', 380), tmp_path/'other')
    text = ('--data.train', tmp_path/'other', '--data.held_out', '', '--out', tmp_path/'new')
    refused(llama_nb('train', parent, *text, '--train.init', parent), 'another tokenizer')
    refused(llama_nb('train', parent, *text, '--train.init', parent, '--check'), 'another tokenizer')
    assert not (tmp_path/'new').exists()

# --- weights --------------------------------------------------------------------------------------

def logits(folder):
    from llama_nb.infer.load import open_run
    with torch.no_grad(): return open_run(folder, 'cpu')[0](torch.arange(64)[None])

@pytest.mark.parametrize('how', ['run', variant('step'), variant('checkpoint'), 'file', variant('half')])
def test_a_run_begins_with_weights(parent, run_file, llama_nb, tmp_path, how):
    "A learning rate of almost nothing: after a step the logits are still those of the parent"
    file, newest = tmp_path/'w.safetensors', parent/'checkpoints'/'step-00000008'
    assert llama_nb('convert', parent, file)[0] == 0
    if how == 'half': save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file)
    start = {'run': parent, 'step': f'{parent}@8', 'checkpoint': newest}.get(how, file)
    path, out = run_file(1, name='child'), tmp_path/'child'
    args = ('--optim.lr', 1e-12, '--optim.warmup_steps', 0)
    status, shown, err = llama_nb('train', path, '--train.init', start, *args)
    assert status == 0 and 'begins     with the weights of' in shown, err
    tolerance = .1 if how == 'half' else 1e-6               # eight bits of a bfloat16; or a step of 1e-12
    torch.testing.assert_close(logits(out), logits(parent), rtol=0, atol=tolerance)
    assert [row['step'] for row in metrics(out)] == [1]
    assert load_run(out).train.init == (f'{parent}@8' if start != file else str(file))
    assert json.loads((out/'origin.json').read_text())['parent']['kind'] == 'init'
    shutil.rmtree(parent)                                   # it has a checkpoint of its own now
    file.unlink()
    for line in (('train', out), ('train', path, *args), ('train', path, '--train.init', start, *args)):
        status, shown, err = llama_nb(*line)
        assert status == 0 and 'is finished: 1 of 1' in shown, err

@pytest.mark.parametrize('layout', [(), ('--parallel.tensor', 2)])
def test_ranks_take_their_part(parent, run_file, llama_nb, start_ranks, tmp_path, layout):
    "Weights of a run, weights of a file and whole states, on two ranks, with the losses of one process"
    file = tmp_path/'w.safetensors'
    assert llama_nb('convert', parent, file)[0] == 0
    for name, how in (('run', ('--train.init', parent)), ('file', ('--train.init', file)),
                      ('fork', ('--train.fork', f'{parent}@4', '--train.steps', 7))):
        args = (run_file(3, name=f'two-{name}'), '--train.micro_batch_size', 2, *how)
        ranks = start_ranks(2, 'train', *args, *layout)
        assert ranks.wait() == [0, 0], ranks.log()
        run_file(3, name=f'one-{name}')
        status, _, err = llama_nb('train', tmp_path/f'one-{name}.toml', *args[1:])
        assert status == 0, err
        ours, right = numbers(tmp_path/f'two-{name}'), numbers(tmp_path/f'one-{name}')
        for got, wanted in zip(ours, right, strict=True):   # float32 sums in another order
            assert got[1] == pytest.approx(wanted[1], rel=1e-6)
            assert got[0] == wanted[0] and got[3:] == wanted[3:]

def test_a_mistake_is_one_line_of_each_rank(parent, run_file, start_ranks, tmp_path):
    init = '--train.init', f'{parent}@5', '--train.micro_batch_size', 2
    ranks = start_ranks(2, 'train', run_file(3, name='new'), *init)
    assert ranks.wait() == [2, 2], ranks.log()
    for rank in range(2):
        said = [line for line in ranks.log(rank).splitlines() if 'error: ' in line]
        assert len(said) == 1 and 'no checkpoint of step 5' in said[0], ranks.log(rank)
    assert not (tmp_path/'new').exists()

# --- places ---------------------------------------------------------------------------------------

@pytest.fixture
def project(tmp_path, tokens, run_file, monkeypatch, capsys):
    "A folder with tokens and a run, begun there with relative paths"
    home = tmp_path/'project'
    home.mkdir()
    for name in ('train', 'held_out'): shutil.copytree(tokens/name, home/'tokens'/name)
    text = run_file(3).read_text().replace(tokens.as_posix(), 'tokens')
    (home/'mine.toml').write_text(text.replace(f'{tmp_path.as_posix()}/run', 'runs/mine'))
    monkeypatch.chdir(home)
    assert main(['train', 'mine.toml']) == 0
    return home

def works(folder, capsys):
    "What needs the text of a run, given its folder"
    for line in ('data show RUN', 'data show RUN --batch 0 --sequence 0', 'eval RUN --device cpu',
                 'train RUN', 'train RUN/config.toml'):
        capsys.readouterr()
        code = main([word.replace('RUN', str(folder)) for word in line.split()])
        assert code == 0, capsys.readouterr().err
    return capsys.readouterr().out

def test_a_run_is_found_from_anywhere(project, tmp_path, monkeypatch, capsys):
    (tmp_path/'else').mkdir()
    for here in (project, project/'runs', tmp_path/'else'):
        monkeypatch.chdir(here)
        assert 'is finished: 3 of 3' in works(project/'runs'/'mine', capsys)
    works(Path('../project/runs/mine'), capsys)
    assert not list((tmp_path/'else').iterdir())            # nothing was begun there

def all_of_it(project, to): return project.rename(to)/'runs'/'mine'
def the_run_alone(project, to): return (project/'runs'/'mine').rename(to.parent/'away')
def a_new_name(project, to): return (project/'runs'/'mine').rename(project/'runs'/'renamed')

@pytest.mark.parametrize('move', [all_of_it, the_run_alone, a_new_name])
def test_what_is_moved_works(project, tmp_path, monkeypatch, capsys, move):
    folder = move(project, tmp_path/'moved')
    monkeypatch.chdir(tmp_path)
    works(folder, capsys)
    assert not (tmp_path/'runs').exists()

def test_text_that_moved_with_its_run_comes_first(project, tmp_path, monkeypatch):
    "A copy reads the copied text, though the old one is still there"
    shutil.copytree(project, tmp_path/'copy')
    monkeypatch.chdir(tmp_path)
    assert load_run('copy/runs/mine').data.train == str(tmp_path/'copy'/'tokens'/'train')
    assert load_run('project/runs/mine').data.train == str(project/'tokens'/'train')
    monkeypatch.chdir(tmp_path/'copy')
    assert load_run('runs/mine').data.train == 'tokens/train'
    shutil.rmtree('tokens')
    assert load_run('runs/mine').data.train == str(project/'tokens'/'train')

def test_a_folder_in_the_place_of_a_run_file(project, capsys):
    folder = str(project/'runs'/'mine')
    for line in (['train', folder, '--dry-run'], ['train', '--dry-run', folder]):
        assert main(line) == 0
    assert 'parameters in float32' in capsys.readouterr().out
    file = project/'runs'/'mine'/'config.toml'
    file.write_text(file.read_text().replace('float32', 'bfloat16'))     # the only type that plan knows
    assert main(['plan', folder, '--gpus', '1']) == 0
    assert main(['train', str(project/'tokens')]) == 2
    assert 'tokens is not the folder of a run' in capsys.readouterr().err

# --- an older version -----------------------------------------------------------------------------

def aged(folder):
    "As a folder was written before there were origins, forks and schedules"
    (folder/'origin.json').unlink()
    text = (folder/'config.toml').read_text()
    new = 'shift', 'init', 'fork', 'schedule', 'decay_fraction'
    (folder/'config.toml').write_text(re.sub(rf'^({"|".join(new)}) = .*\n', '', text, flags=re.M))
    for place in (folder/'checkpoints').iterdir():
        state, manifest = (json.loads((place/f'{name}.json').read_text()) for name in ('state', 'manifest'))
        state.pop('tokens', 0)
        state['data'].pop('shift', 0)
        (place/'state.json').write_text(json.dumps(state))
        made = manifest['files']['state.json']
        made |= {'bytes': (place/'state.json').stat().st_size, 'sha256': file_digest(place/'state.json')}
        (place/'manifest.json').write_text(json.dumps(manifest))

def test_an_older_folder_goes_on(parent, run_file, llama_nb, tmp_path):
    right, path = weights(parent, 8), tmp_path/'parent.toml'
    shutil.rmtree(parent/'checkpoints'/'step-00000008')
    aged(parent)
    assert 'schedule' not in (parent/'config.toml').read_text()
    status, shown, err = llama_nb('train', path)
    assert status == 0 and 'continuing' in shown, err
    assert same(weights(parent, 8), right) and [row['step'] for row in metrics(parent)] == list(range(1, 9))
    assert json.loads((parent/'origin.json').read_text())['folder'] == str(parent)
    aged(parent)
    status, _, err = llama_nb('train', '--fork', f'{parent}@4', '--out', tmp_path/'fork')
    assert status == 0, err
    assert same(weights(tmp_path/'fork', 8), right) and numbers(tmp_path/'fork') == numbers(parent)
