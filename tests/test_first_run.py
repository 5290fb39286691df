"A first run: the file that `llama-nb init` writes is taken as it is, and defaults follow what they should."
import csv, gzip, json, re, shlex
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from unittest import mock
import pytest
import torch
from conftest import ROOT, metrics
from llama_nb import cli
from llama_nb.config import PRESETS
from llama_nb.core import UserError
from llama_nb.data.mixture import text_facts, write_mixture
from llama_nb.data.shards import TokenShards
from llama_nb.flags import parse_flags, take_flag
from llama_nb.run_file import batch_for, load_run
from llama_nb.settings import RunConfig, setting_names
from llama_nb.train import first_run, run
from llama_nb.train.first_run import SIZES, Text, choose_size, draft, find_text

# --- the compiler -------------------------------------------------------------------------------

@pytest.mark.parametrize('device, variable, name', [('cuda', 'CC', 'clang'), ('cpu', 'CXX', 'g++')])
def test_what_compiles_is_looked_for(device, variable, name, monkeypatch):
    "Under a usual name, or the one that the variable has; then under no other"
    there = set()
    monkeypatch.setattr(run, 'find_spec', lambda package: package == 'triton')
    monkeypatch.setattr(run.sys, 'platform', 'linux')
    monkeypatch.setattr(run.shutil, 'which', lambda name: name if name in there else None)
    monkeypatch.delenv(variable, raising=False)
    device = torch.device(device)
    assert f'{name}, or {variable}' in run.compiler_missing(device)
    assert not first_run._compiles(device)
    there.add(name)
    assert not run.compiler_missing(device) and first_run._compiles(device) == (device.type == 'cuda')
    monkeypatch.setenv(variable, 'mine')
    assert run.compiler_missing(device)
    there.add('mine')
    assert not run.compiler_missing(device)
    monkeypatch.setattr(run, 'find_spec', lambda package: None)
    assert bool(run.compiler_missing(device)) == (device.type == 'cuda')

def test_a_run_without_a_compiler_is_refused_in_a_line(run_file, tmp_path, monkeypatch, capsys):
    "Before its folder is made; one that compiles nothing needs none"
    monkeypatch.setattr(run.shutil, 'which', lambda name: None)
    monkeypatch.delenv('CXX', raising=False)
    assert cli.main(['train', str(run_file(4)), '--train.compile', 'blocks']) == 2
    said = capsys.readouterr().err
    assert 'train.compile needs a C++ compiler' in said and said.count('\n') == 1
    assert not (tmp_path/'run').exists()
    run.check_compiler(load_run(run_file(4)), torch.device('cpu'))

# --- the file ---------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def made(tokens, tmp_path_factory, llama_nb):
    "A run file for the toy and a few seconds, and what the command said"
    folder = tmp_path_factory.mktemp('first')
    path, out = folder/'mine.toml', folder/'out'
    code, shown, err = llama_nb('init', tokens, path, '--size', 'toy', '--minutes', .1, '--device', 'cpu',
                                '--out', out)
    assert code == 0, err
    return SimpleNamespace(path=path, out=out, shown=shown)

def test_a_first_run_trains_as_it_is(made, tokens, llama_nb):
    "Its steps, tokens and epochs are those that were said; the folder holds plain numbers"
    config = load_run(made.path)
    assert config.data.train == str(tokens/'train') and config.data.held_out == str(tokens/'held_out')
    assert config.model.vocab_size == TokenShards(tokens/'train').vocab_size
    said = re.search(r'steps      ([\d,]+) of ([\d,]+) x 256 tokens', made.shown)
    assert [int(n.replace(',', '')) for n in said.groups()] == [config.train.steps, config.data.batch_size]
    code, shown, err = llama_nb('train', made.path, '--train.steps', 12)       # enough of them
    assert code == 0, err
    rows = metrics(made.out)
    assert len(rows) == 12 and rows[-1]['held_out_loss'] < 10
    assert rows[0]['tokens'] == config.data.batch_size*256 and 'epochs' in shown

def test_each_setting_has_a_reason_and_lines_are_short(made):
    lines = made.path.read_text().splitlines()
    settings = [line for line in lines if ' = ' in line]
    assert 14 <= len(settings) <= 20 and all(' # ' in line for line in settings)
    assert max(len(re.sub(r'"[^"]*"', '""', line)) for line in lines) < 110
    for name in ('preset', 'vocab_size', 'seq_len', 'batch_size', 'steps', 'micro_batch_size', 'dtype', 'lr',
                 'warmup_steps'):
        assert any(line.startswith(f'{name} = ') for line in settings), name

def test_ten_steps_are_the_least(tokens, tmp_path, llama_nb):
    "However little time and text there is; and the file does not say that these bound them"
    code, shown, err = llama_nb('init', tokens, tmp_path/'a.toml', '--size', 'toy', '--minutes', .01,
                                '--device', 'cpu', '--out', tmp_path/'out')
    assert code == 0, err
    assert 'steps      10 of' in shown and '(bounded by 10 steps, the least)' in shown

def test_a_second_one_is_refused(made, tokens, llama_nb):
    before = made.path.read_bytes()
    code, _, err = llama_nb('init', tokens, made.path)
    assert code == 2 and 'exists already' in err and err.count('\n') == 1
    assert made.path.read_bytes() == before

@pytest.mark.parametrize('args, words',
                         [(('none', 'new.toml'), 'holds no token shards'),
                          (('.', 'new.toml'), 'holds no token shards'),
                          (('TOKENS', 'new.json'), 'must end in .toml'),
                          (('TOKENS', 'new.toml', '--size', '2M'), "unknown size '2M'"),
                          (('TOKENS', 'new.toml', '--minutes=-1'), 'minutes must be 0, or a number'),
                          (('TOKENS', 'new.toml', '--device', 'tpu'), "unknown device 'tpu'"),
                          (('TOKENS', 'new.toml', '--out', '.'), 'choose another run folder')])
def test_mistakes_are_one_line_and_make_nothing(args, words, tokens, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['init', *(str(tokens) if a == 'TOKENS' else a for a in args)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count('\n') == 1, said
    assert list(tmp_path.iterdir()) == []

def test_a_mixture_is_found_with_its_held_out_text(tokens, tmp_path):
    for name in ('mixture', 'held_out'):
        write_mixture(tmp_path/f'{name}.toml', {'help': (tokens/'train', 1)})
    found = find_text(tmp_path)
    assert found == find_text(tmp_path/'mixture.toml')
    assert [Path(p).name for p in (found.train, found.held_out)] == ['mixture.toml', 'held_out.toml']
    assert (found.vocabulary, found.tokens) == text_facts(tokens/'train')

# --- the rule -----------------------------------------------------------------------------------

def on_a_device(call, flops=1e15, memory=80e9):
    with (mock.patch.object(first_run, 'measure_matmul_peak', return_value=SimpleNamespace(flops=flops)),
          mock.patch.object(first_run, 'device_bytes', return_value=memory)):
        return call()

@pytest.mark.parametrize('tokens', [10**5, 10**7, 10**8, 10**9, 10**10, 10**12])
def test_the_largest_size_that_text_and_time_feed(tokens):
    "Twenty tokens per parameter within four epochs (Hoffmann et al. 2022, Muennighoff et al. 2023)"
    text, cpu = Text('tokens/train', '', tokens, 32000, 4.), torch.device('cpu')
    chosen, _ = on_a_device(lambda: choose_size(text, cpu, 1e9))
    fed = [size for size in SIZES if 20*draft_parameters(size) <= 4*tokens and size != '7B']
    assert chosen == (fed[-1] if fed else 'toy')                        # 7B does not fit into 80 GB

def draft_parameters(size):
    c = PRESETS[size]
    return c.n_params + 2*(32000 - c.vocab_size)*c.dim

def test_a_slow_device_and_a_small_one_get_a_smaller_model():
    text, cpu = Text('tokens/train', '', 10**12, 32000, 4.), torch.device('cpu')
    sizes = list(SIZES)
    def chosen(seconds=3600., **device):
        return on_a_device(lambda: choose_size(text, cpu, seconds)[0], **device)
    slow, middle, fast = (sizes.index(chosen(flops=flops)) for flops in (1e12, 1e14, 1e17))
    assert slow < middle < fast
    assert chosen(1e12, memory=8e9) == '350M' and chosen(1e12, memory=1e12) == '7B'
    assert on_a_device(lambda: draft('1.3B', text, cpu, 'run'), memory=16e9) is None

# --- defaults that follow -----------------------------------------------------------------------

SHORT = 'out = "{out}"\nmodel.preset = "toy"\ndata.train = "{tokens}/train"\ntrain.steps = 30\n'

@pytest.fixture
def short(tokens, tmp_path):
    (tmp_path/'short.toml').write_text(SHORT.format(out=tmp_path/'run', tokens=tokens))
    return tmp_path/'short.toml'

def test_four_lines_are_a_run(short, tokens, tmp_path, llama_nb):
    "What follows is settled in the folder, and a run that goes on keeps it"
    code, shown, err = llama_nb('train', short, '--train.device', 'cpu')
    assert code == 0, err
    settled = load_run(tmp_path/'run'/'config.toml')
    vocabulary, n = text_facts(tokens/'train')
    assert (settled.model.vocab_size, settled.data.seq_len) == (vocabulary, 256)
    assert settled.optim.warmup_steps == 3
    assert settled.data.batch_size == batch_for(4*n, 256) and '3 warm-up' in shown
    written = re.findall(r'^\w+ = ', (tmp_path/'run'/'config.toml').read_text(), re.M)
    assert len(written) == len(setting_names()) - 1                     # all but the preset
    code, shown, err = llama_nb('train', short, '--train.device', 'cpu')
    assert code == 0 and 'is finished' in shown, err

def test_a_folder_from_before_keeps_its_numbers(short, tokens, tmp_path):
    "A warm-up of 2,000 and 2,048 sequences were the defaults of a run that was begun without them"
    (tmp_path/'run').mkdir()
    text = short.read_text() + 'train.steps = 5000\ndata.batch_size = 2048\noptim.warmup_steps = 2000\n'
    (tmp_path/'run'/'config.toml').write_text(text.replace('train.steps = 30\n', ''))
    found = load_run(short, ['--train.steps', '5000'], text_facts)
    assert (found.optim.warmup_steps, found.data.batch_size) == (2000, 2048)

def test_a_preset_is_a_setting(short, capsys):
    assert load_run(short, ['--model.preset', '25M']).model == PRESETS['25M']
    flags = ['--model.preset=7B', '--out', 'x', '--data.train', 'x', '--train.steps', '5']
    assert load_run('', flags).model == PRESETS['7B']
    with pytest.raises(UserError, match="unknown preset '24M'; did you mean '25M'"):
        load_run(short, ['--model.preset', '24M'])
    with pytest.raises(SystemExit): load_run('', ['--help'])
    shown = re.sub(r'[\s│]+', ' ', capsys.readouterr().out)
    for words in ('--model.preset STR all sizes by a name: toy, 10M, 25M', '(default: model.max_seq_len)',
                  'd, model width (required without preset)', '(default: that of the text)',
                  'linear rise of the learning rate (default: a tenth of train.steps, at most 2000)'):
        assert words in shown, shown

def test_the_help_has_every_setting(capsys):
    "It is made from classes of its own. Settings stand in boxes, the words of `train` above them"
    def settings(): return set(re.findall(r'^\W*--(\w[\w.-]*) ', capsys.readouterr().out, re.M))
    with pytest.raises(SystemExit): load_run('', ['--help'])
    shown = settings() - {'fork', 'check', 'dry-run', 'nproc'}
    with pytest.raises(SystemExit): parse_flags(RunConfig, ['--help'])
    plain = settings()
    assert shown == plain | {'model.preset'} and len(plain) > 45

def test_the_files_of_the_paper_leave_nothing_to_follow():
    for path in (Path(__file__).parent.parent/'configs').glob('*.toml'):
        assert load_run(path) == load_run(path, read_text=lambda folder: (7, 7))

# --- flags that take several words --------------------------------------------------------------

def test_a_prompt_given_twice_is_two_prompts(monkeypatch):
    "And not the last one; words without a flag stay where they are"
    asked = []
    monkeypatch.setattr(cli.Generate, 'run', lambda self: asked.append(self) or 0)
    for words in ('RUN --prompt a b', 'RUN --prompt a --n 1 --prompt=b'):
        assert cli.main(['generate', *words.split()]) == 0
    assert [(g.folder, g.prompt) for g in asked] == [('RUN', ('a', 'b'))]*2

def test_a_prompt_may_begin_with_dashes(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(cli.Generate, 'run', lambda self: asked.append(self.prompt) or 0)
    for words in (['--prompt=--foo', '--n', '1'], ['--prompt=--- a'], ['--prompt', 'b', '--prompt=--n=1'],
                  ['--prompt', '- c', '-d']):
        assert cli.main(['generate', 'RUN', *words]) == 0
    assert asked == [('--foo',), ('--- a',), ('b', '--n=1'), ('- c', '-d')]
    capsys.readouterr()
    assert cli.main(['generate', 'RUN', '--prompt', '--- a']) == 2
    assert 'begins with dashes is written --prompt=TEXT' in capsys.readouterr().err
    assert cli.main(['generate', 'RUN', '--n', '1', '--prompd', 'a']) == 2
    assert 'TEXT' not in capsys.readouterr().err

@pytest.mark.parametrize('flag, word, number', [('--dry-run', '8', 8), ('--nproc', '2', 2),
                                                ('--gpu-memory', '7.5', 7.5)])
def test_a_folder_with_a_number_for_a_name_is_no_run_behind_a_flag(tmp_path, monkeypatch, flag, word, number):
    monkeypatch.chdir(tmp_path)
    for name in (word, 'run'): (tmp_path/name).mkdir()
    kind = type(number)
    assert take_flag([flag, word, 't.toml'], flag, kind) == (True, number, ['t.toml'])
    assert take_flag([flag, f'./{word}'], flag, kind) == (True, None, [f'./{word}'])
    assert take_flag([flag, 'run'], flag, kind) == (True, None, ['run'])

def test_a_usage_line_names_what_it_wants(capsys):
    for line, words in (('convert', 'RUN FILE'), ('generate', 'RUN'), ('data clean', 'SOURCE PATH ...'),
                        ('init', 'TOKENS FILE')):
        with pytest.raises(SystemExit): cli.main([*line.split(), '--help'])
        usage = capsys.readouterr().out.split('\n\n')[0]
        assert words in ' '.join(usage.split()) and ' STR STR' not in usage

# --- the commands of the front page ---------------------------------------------------------------

def readme_commands()->list[list[str]]:
    "The words of each line of the README's section on text of one's own"
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    section = readme.partition('\n## Text of your own\n')[2].partition('\n## ')[0]
    block = section.split('```')[1].strip()
    return [shlex.split(line)[1:] for line in block.split('\n')]

def mixed_texts(folder:Path):
    "What the README's commands read: a folder, a table, and compressed lines at any depth"
    texts = list(topics.values())
    (folder/'texts').mkdir()
    for i, text in enumerate(texts[::2]):
        (folder/'texts'/f'{i}.{("txt", "md", "rst", "py")[i % 4]}').write_text(text, encoding='utf-8')
    (folder/'texts'/'page.html').write_text('<p>A llama is <b>no</b> camel.</p>')
    with open(folder/'mails.csv', 'w', newline='', encoding='utf-8') as f:
        csv.writer(f).writerows([('from', 'text'), *(('a@b.org', text) for text in texts[1::4])])
    deep = folder/'more'/'a'/'b'
    deep.mkdir(parents=True)
    lines = ''.join(json.dumps({'text': text}) + '\n' for text in texts[3::4])
    (deep/'x.jsonl.gz').write_bytes(gzip.compress(lines.encode()))

def test_the_commands_of_the_readme(tmp_path, monkeypatch, capsys):
    "From a folder of mixed files to a sample, as they stand there; only the minutes are fewer"
    mixed_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = readme_commands()
    assert [words[0] for words in commands] == ['tokenizer', 'data', 'init', 'train']
    for words in commands:
        more = {'init': ['--minutes', '.1', '--device', 'cpu'], 'data': ['--workers', '1']}.get(words[0], [])
        assert cli.main([*words, *more]) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert f'{len(topics) + 1:,} documents' in said.out + said.err
    assert cli.main(['generate', 'runs/run', '--prompt', 'The', '--max-new-tokens', '5']) == 0
    assert capsys.readouterr().out.startswith('The')
