"""Token shards under the limits of a real machine: a full disk, more shards than files may be open, and a
file system that all ranks ask at once."""
import json, os, pickle, resource, shutil, signal, subprocess, sys
from pathlib import Path
from unittest import mock
import pytest
from conftest import ENV, run_ranks

ME = Path(__file__).stem

def limit(kind, n):
    def apply():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(kind, (n, n))
    return apply

def test_a_full_disk_leaves_no_shards_and_the_same_command_goes_on(tmp_path, tokens, llama_nb):
    texts, out = tmp_path/'texts', tmp_path/'out'
    texts.mkdir()
    for i in range(40): (texts/f'{i}.txt').write_text(f'Page {i} of the book. '*400)
    args = ('data', out, texts, '--tokenizer', tokens/'tokenizer.model')
    status, _, err = llama_nb(*args, preexec_fn=limit(resource.RLIMIT_FSIZE, 50_000))
    assert (status == 75 and len(err.strip().splitlines()) == 1 and 'no room for' in err
            and 'Traceback' not in err), err
    assert not (out/'train').exists() and not (out/'held_out').exists()
    assert llama_nb(*args)[0] == 0 and (out/'train').exists()  # the same command, once there is room
    assert not (out/'work').exists()

READ_ALL = '''
import sys
from llama_nb.data.shards import TokenShards
shards = TokenShards(sys.argv[1])
print(len(shards.manifest['shards']), len(shards.read(0, shards.n_tokens)) == shards.n_tokens)
'''

def test_more_shards_than_open_files(tmp_path, tokens):
    from llama_nb.data.documents import Document
    from llama_nb.data.shards import write_shards
    from llama_nb.data.tokenizer import Tokenizer
    write_shards((Document(f'text {i}', str(i)) for i in range(200)), Tokenizer(tokens/'tokenizer.model'),
                 tmp_path/'many', tokens_per_shard=1)
    done = subprocess.run([sys.executable, '-c', READ_ALL, tmp_path/'many'], env=ENV, capture_output=True,
                          text=True,
                          preexec_fn=limit(resource.RLIMIT_NOFILE, 120))
    assert done.stdout.split() == ['200', 'True'], done.stderr

# --- many ranks ----------------------------------------------------------------------------------

def looks_at(folder, call):
    "What `call` returns, and how often it asked the system about a file below `folder`"
    found = []
    def counted(look):
        def counting(path, *args, **kwargs):
            if str(path).startswith(str(folder)): found.append(path)
            return look(path, *args, **kwargs)
        return counting
    with mock.patch('os.stat', counted(os.stat)), mock.patch('os.lstat', counted(os.lstat)):
        return call(), len(found)

def opening_worker(path, folder):
    "Open the data of a run as the trainer does; looks at files, and what was said"
    from llama_nb.core import UserError
    from llama_nb.parallel.mesh import on_all_ranks
    from llama_nb.run_file import load_run
    from llama_nb.train.trainer import open_data
    def opened():
        try:
            return on_all_ranks(lambda: open_data(load_run(path))) and 'well'
        except UserError as e:
            return str(e)
    said, looks = looks_at(folder, opened)
    return {'looks': looks, 'said': said}

def many_shards(folder, tokens, n=60):
    from llama_nb.data.documents import Document
    from llama_nb.data.shards import write_shards
    from llama_nb.data.tokenizer import Tokenizer
    for name in ('train', 'held_out'):
        shards = write_shards((Document(f'text {i} of the book', str(i)) for i in range(n)),
                              Tokenizer(tokens/'tokenizer.model'), folder/name, tokens_per_shard=1)
    return shards

def test_opening_costs_one_look_a_file_however_many_ranks(tmp_path, tokens, run_file):
    shards = many_shards(tmp_path/'many', tokens)
    path = run_file(10)
    path.write_text(path.read_text().replace(str(tokens), str(tmp_path/'many')))
    files = 2*len(shards.manifest['files'])
    arguments = {'path': str(path), 'folder': str(tmp_path/'many')}
    found = run_ranks(f'{ME}:opening_worker', 3, arguments)
    assert [f['said'] for f in found] == ['well']*3
    assert files <= sum(f['looks'] for f in found) <= files + 3*20  # a few more: folders, manifests
    (tmp_path/'many'/'train'/'00031.ds').write_bytes(b'x')
    found = run_ranks(f'{ME}:opening_worker', 3, arguments)                 # one rank sees it, all are told
    assert (len({f['said'] for f in found}) == 1 and '00031.ds has 1 bytes instead of' in found[0]['said']
            and 'rank' in found[0]['said'])

def test_a_reader_process_does_not_look_again(tmp_path, tokens):
    shards = many_shards(tmp_path, tokens)
    sent = pickle.dumps(shards)
    again, looks = looks_at(tmp_path, lambda: pickle.loads(sent))
    assert looks <= 5 and (again.read(0, again.n_tokens) == shards.read(0, shards.n_tokens)).all()
    assert again.digest == shards.digest

def test_a_shard_of_the_wrong_length_is_not_read(tmp_path, tokens):
    "Where ranks have copies of their own, a rank may not have looked at its own copy of a file"
    from llama_nb.core import UserError
    sent = pickle.dumps(many_shards(tmp_path, tokens))
    file = tmp_path/'held_out'/'00031.ds'
    before = file.read_bytes()
    for damaged in (before[:-2], before[:-1], before + b'xx', b''):
        file.write_bytes(damaged)
        again = pickle.loads(sent)
        with pytest.raises(UserError, match='00031.ds does not hold'): again.read(0, again.n_tokens)
    file.unlink()
    with pytest.raises(UserError, match='00031.ds is missing'): pickle.loads(sent).read(0, 900)

def test_the_size_of_a_shard_is_a_setting(tmp_path, tokens, llama_nb):
    texts = tmp_path/'texts'
    texts.mkdir()
    for i in range(40): (texts/f'{i}.txt').write_text(f'Page {i} of the book. '*40)
    args = (texts, '--tokenizer', tokens/'tokenizer.model')
    shards = lambda out: json.loads((out/'train'/'manifest.json').read_text())['shards']
    assert llama_nb('data', tmp_path/'one', *args)[0] == 0 and len(shards(tmp_path/'one')) == 1
    assert (llama_nb('data', tmp_path/'many', *args, '--tokens_per_shard', '1000')[0] == 0
            and len(shards(tmp_path/'many')) > 5)
    status, _, err = llama_nb('data', tmp_path/'none', *args, '--tokens_per_shard', '0')
    assert status == 2 and len(err.strip().splitlines()) == 1
    assert 'tokens_per_shard must be a whole number from 1 to 2,147,483,647, not 0' in err

def test_a_file_server_that_fails_is_temporary(tmp_path, monkeypatch):
    "Exit codes follow the cause of what is raised: an input/output error may pass, a missing file not"
    from llama_nb.core import UserError, is_temporary
    from llama_nb.data.shards import TokenShards
    from llama_nb.data.tokenizer import Tokenizer
    from llama_nb.run_file import load_run
    openers = TokenShards, Tokenizer, load_run
    for opener in openers:
        with pytest.raises(UserError) as missing: opener(tmp_path/'nothing')
        assert not is_temporary(missing.value), opener
    def fail(*args, **kwargs): raise OSError(5, 'Input/output error')
    monkeypatch.setattr('llama_nb.untrusted.open_regular', fail)
    for opener in openers:
        with pytest.raises(UserError, match='Input/output error') as failed: opener(tmp_path/'nothing')
        assert is_temporary(failed.value), opener

def test_a_file_server_that_fails_while_a_run_reads_is_temporary(tmp_path, tokens, monkeypatch):
    from llama_nb.core import UserError, is_temporary
    shards = many_shards(tmp_path, tokens)
    def fail(*args, **kwargs): raise OSError(5, 'Input/output error')
    monkeypatch.setattr('llama_nb.data.shards.open_descriptor', fail)
    with pytest.raises(UserError, match='00000.ds: Input/output error') as failed: shards.read(0, 10)
    assert is_temporary(failed.value)

def test_a_shard_that_is_cut_while_it_is_read_is_an_error_and_no_signal(tmp_path, tokens):
    from llama_nb.core import UserError
    shards = many_shards(tmp_path, tokens)
    assert len(shards.read(0, 10)) == 10
    (shards.folder/shards.manifest['shards'][0]['name']).write_bytes(b'')
    with pytest.raises(UserError, match='does not hold'): shards.read(0, 10)

def test_names_that_lead_out_are_refused_however_a_folder_is_opened(tmp_path, tokens):
    from llama_nb.core import UserError
    from llama_nb.data.shards import TokenShards
    shards = many_shards(tmp_path, tokens)
    path, first = shards.folder/'manifest.json', shards.manifest['shards'][0]['name']
    made = json.loads(path.read_text())
    for entry in made['shards'][:1]: entry['name'] = f'../{first}'
    for ending in ('', '.index', '.ids', '.metadata'):
        made['files'][f'../{first}{ending}'] = made['files'].pop(first + ending)
    path.write_text(json.dumps(made))
    for share in ((0, 1), (3, 4), None):
        with pytest.raises(UserError): TokenShards(shards.folder, share)

def test_a_name_that_is_too_long_is_not_taken_for_two(tmp_path, tokens):
    "A line of `.ids` longer than a name may be, and the names behind it"
    from llama_nb.core import UserError
    from llama_nb.data.shards import TokenShards
    shards = TokenShards(shutil.copytree(tokens/'train', tmp_path/'train'))
    shard = shards.manifest['shards'][0]
    names, last = shards.folder/f'{shard["name"]}.ids', shard['tokens'] - 1
    assert shard['documents'] > 2 and shards.document_of(last)
    _, *others = names.read_text().splitlines()
    names.write_text('\n'.join(['"' + 'x'*2**23 + '"', *others]) + '\n')
    with pytest.raises(UserError, match='damaged'): shards.document_of(last)
