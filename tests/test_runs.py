"Runs as processes: stopped, killed, resumed, with damaged checkpoints and a full disk."
import json, resource, signal, subprocess
import pytest
from safetensors.torch import load_file
import torch
from conftest import ENV, command, metrics, variant

def lines(folder):
    path = folder/'metrics.jsonl'
    return path.read_text().count('\n') if path.exists() else 0

def weights(folder): return load_file(sorted((folder/'checkpoints').iterdir())[-1]/'model-00000.safetensors')

def one_line(err): return [line for line in err.splitlines() if line.startswith('llama-nb: error: ')]

@pytest.mark.parametrize('number', [variant(signal.SIGINT), signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, run_file, start, wait_for, number):
    path, out = run_file(100_000), tmp_path/'run'
    for _ in range(2):
        before = lines(out)
        process = start('train', path)
        wait_for(lambda: lines(out) >= before + 3, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number, err
        last = metrics(out)[-1]['step']
        assert f'stopped after step {last} of 100000' in err + _
        assert sorted((out/'checkpoints').iterdir())[-1].name == f'step-{last:08}'
    assert [m['step'] for m in metrics(out)] == list(range(1, last + 1))

def test_killed_anywhere_it_ends_with_the_same_weights(tmp_path, run_file, llama_nb, start, wait_for):
    "A run that is killed three times equals one that is not, bit for bit"
    status, _, err = llama_nb('train', run_file(40, save_every=5, name='whole'))
    assert status == 0, err
    path, out = run_file(40, save_every=5, name='killed'), tmp_path/'killed'
    for wanted in (7, 13, 29):
        process = start('train', path)
        wait_for(lambda: lines(out) >= wanted, process)
        process.kill()
        process.communicate(timeout=60)
    status, _, err = llama_nb('train', path)
    assert status == 0, err
    whole, killed = weights(tmp_path/'whole'), weights(out)
    assert whole.keys() == killed.keys() and all(torch.equal(whole[k], killed[k]) for k in whole)
    pick = lambda folder: [(m['step'], m['loss'], m['grad_norm'], m['lr']) for m in metrics(folder)]
    assert pick(tmp_path/'whole') == pick(out)

def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, run_file, llama_nb):
    path, out = run_file(20, save_every=10), tmp_path/'run'
    assert llama_nb('train', path)[0] == 0
    right, file = weights(out), out/'checkpoints'/'step-00000020'/'optimizer-00000.safetensors'
    file.write_bytes(file.read_bytes()[:-100])
    status, shown, err = llama_nb('train', path)
    assert (status == 0 and 'step-00000020' in shown + err and 'optimizer-00000.safetensors' in shown + err
            and 'step-00000010 instead' in shown + err)
    again = weights(out)
    assert all(torch.equal(right[k], again[k]) for k in right)          # ten steps made again, the same
    for p in (out/'checkpoints').iterdir(): (p/'model-00000.safetensors').write_bytes(b'')
    status, _, err = llama_nb('train', path)
    assert status == 2 and len(one_line(err)) == 1 and 'are damaged' in err
    status, _, err = llama_nb('generate', out)
    assert status == 2 and 'are damaged' in err

def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, run_file, llama_nb):
    path, out = run_file(20, save_every=10), tmp_path/'run'
    assert llama_nb('train', path)[0] == 0
    later = path.read_text().replace('save_every = 10', 'save_every = 15')
    newest = out/'checkpoints'/'step-00000020'
    (newest/'manifest.json').unlink()  # so that steps 11 to 20 are made and saved again
    path.write_text(later)
    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    status, shown, err = llama_nb('train', path, preexec_fn=small_files)
    # the disk may have room again later
    assert status == 75 and len(one_line(err)) == 1 and 'could not save' in err and 'free' in err, err
    assert not [p for p in (out/'checkpoints').iterdir() if p.name.startswith('.tmp')]
    status, shown, err = llama_nb('train', path)
    assert status == 0 and 'step-00000010' in shown + err

def test_the_toy_from_end_to_end(tmp_path, llama_nb):
    out = tmp_path/'toy'
    status, shown, err = llama_nb('toy', '--out', out, '--steps', 2, '--device', 'cpu')
    assert status == 0, err
    results = json.loads((out/'results.json').read_text())
    # two steps: it knows almost nothing
    assert results['tokens'] > 0 and 1 < results['zlib -9'] < 3 < results['llama'] < 6
    assert (out/'loss.png').read_bytes()[:4] == b'\x89PNG' and "'def'" in (out/'samples.txt').read_text()
    for word in ('llama', 'trigram', 'zlib -9', 'loss.png', 'samples.txt'): assert word in shown
    assert 'tokens/s' in err                                             # the lines
    status, shown, err = llama_nb('toy', '--out', out, '--steps', 3)
    assert status == 2 and len(one_line(err)) == 1 and 'another configuration' in err
    status, shown, _ = llama_nb('generate', out, '--prompt', 'import', '--max-new-tokens', 5, '--seed', 3)
    assert status == 0 and shown.startswith('import')

def test_output_may_be_closed_early():
    process = subprocess.Popen(command('--help'), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    process.stdout.close()
    assert process.wait(60) in (0, 120, 141) and 'Traceback' not in process.stderr.read()

def test_compiled_blocks_train_the_same(tmp_path, run_file, llama_nb):
    plain, compiled = run_file(4, name='plain'), run_file(4, name='compiled')
    assert llama_nb('train', plain)[0] == 0
    status, _, err = llama_nb('train', compiled, '--train.compile', 'blocks', '--train.recompute', 'linear')
    assert status == 0, err
    assert 'context_fn' not in err and 'complex' not in err, err    # the compiler's advice
    for a, b in zip(metrics(tmp_path/'plain'), metrics(tmp_path/'compiled')):
        # other kernels round otherwise
        assert abs(a['loss']/b['loss'] - 1) < 1e-4 and abs(a['grad_norm']/b['grad_norm'] - 1) < 1e-3
    status, _, err = llama_nb('train', compiled, '--train.compile', 'all')
    assert status == 2 and "(there are: off, blocks)" in err

def short_documents(tokens, folder):
    "Shards of documents that end several times in every 64 tokens, whatever text this Python ships"
    from llama_nb.data.documents import Document
    from llama_nb.data.shards import write_shards
    from llama_nb.data.tokenizer import Tokenizer
    texts = (Document(' '.join(f'{i*j % 101}' for j in range(1, 9)), str(i)) for i in range(400))
    return write_shards(texts, Tokenizer(tokens/'tokenizer.model'), folder)

def test_separate_documents_train_and_resume(tmp_path, tokens, run_file, llama_nb):
    short_documents(tokens, tmp_path/'short')
    path, other = run_file(4, name='separate'), run_file(4, name='cross')
    for p in (path, other):
        p.write_text(p.read_text().replace(f'{tokens.as_posix()}/train', (tmp_path/'short').as_posix()))
    path.write_text(path.read_text().replace('batch_size = 8\n', 'batch_size = 8\ndocuments = "separate"\n',
                                             1))
    assert llama_nb('train', path)[0] == 0
    assert llama_nb('train', other)[0] == 0
    assert metrics(tmp_path/'separate')[-1]['loss'] != metrics(tmp_path/'cross')[-1]['loss']
    status, _, err = llama_nb('train', path, '--data.documents', 'cross')
    assert status == 2 and 'data.documents' in err
