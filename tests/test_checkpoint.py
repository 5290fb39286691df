"""Saving is stopped, killed, starved of disk and damaged in every way we know; afterwards the old checkpoint
or the new one is there, whole."""
import errno, json, os, resource, shutil, signal, time
from pathlib import Path
import pytest, torch
from safetensors.torch import save_file
from torch import nn
import llama_nb.train.checkpoint as ckpt
from llama_nb.train import stored
from llama_nb import untrusted
from llama_nb.core import UserError, is_temporary
from llama_nb.train.checkpoint import load_into, save_checkpoint
from llama_nb.train.state import optimizer_tensors, prepare_optimizer, random_state, set_random_state
from llama_nb.train.stored import (CheckpointError, StorageError, latest_checkpoint, list_checkpoints,
                                   load_checkpoint, verify_checkpoint)

# pytest forgets the package's own filter
pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is')

CALLS = ('fsync', 'replace', 'rename', 'mkdir', 'rmdir', 'unlink', 'open')

def tensors(value):
    return {'model': {'w': torch.full((50, 40), float(value))},
            'optimizer': {'w.exp_avg': torch.full((50, 40), -float(value))}}

def save(folder, step, value=None, **kwargs):
    value = step if value is None else value
    return save_checkpoint(folder, step, tensors(value), {'value': value}, **kwargs)

def value_of(path):
    "What `save` wrote into checkpoint `path`; every number of it must belong to the same save"
    got, state = load_checkpoint(path)
    want = tensors(state['value'])
    assert {k: set(v) for k, v in got.items()} == {k: set(v) for k, v in want.items()}
    assert all(torch.equal(got[part][k], v) for part, named in want.items() for k, v in named.items())
    return state['value']

def silent(line): pytest.fail(f'a damaged checkpoint was visible: {line}')

def names(folder): return sorted(p.name for p in folder.iterdir())

def in_a_process(work, seconds=60):
    "Fork, run `work`, and wait; its exit code (negative for a signal)"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)                                          # never back into pytest
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError

def dies_at(call, number, work):
    "Run `work`, and die at the `number`-th use of os.`call`"
    real, count = getattr(os, call), 0
    def counting(*args, **kwargs):
        nonlocal count
        count += 1
        if count == number: os._exit(7)
        return real(*args, **kwargs)
    setattr(os, call, counting)
    work()

# --- death ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('call', CALLS)
def test_death_at_every_call(tmp_path, call):
    deaths = 0
    for number in range(1, 200):
        folder = tmp_path/str(number)
        save(folder, 10)  # the next save also removes step 10
        save(folder, 20)
        code = in_a_process(lambda: dies_at(call, number, lambda: save(folder, 30)))
        assert code in (0, 7)
        assert value_of(latest_checkpoint(folder, silent)) in ((30,) if code == 0 else (20, 30))
        for path in list_checkpoints(folder): value_of(path)  # the one being removed is whole or gone, too
        save(folder, 40)  # and the next save works and sweeps up
        assert value_of(latest_checkpoint(folder, silent)) == 40 and len(names(folder)) == 2
        assert all(name.startswith('step-') for name in names(folder))
        if code == 0: break
        deaths += 1
    assert code == 0
    if call in ('fsync', 'replace', 'rename', 'unlink', 'rmdir', 'mkdir'): assert deaths > 0

@pytest.mark.parametrize('call', CALLS)
def test_death_while_the_only_checkpoint_is_saved_again(tmp_path, call):
    for number in range(1, 200):
        folder = tmp_path/str(number)
        save(folder, 5, value=1)
        code = in_a_process(lambda: dies_at(call, number, lambda: save(folder, 5, value=2)))
        assert code in (0, 7)
        assert value_of(latest_checkpoint(folder, silent)) in ((2,) if code == 0 else (1, 2))
        # twice in a row
        assert in_a_process(lambda: dies_at(call, number, lambda: save(folder, 5, value=3))) in (0, 7)
        assert value_of(latest_checkpoint(folder, silent)) in (1, 2, 3)
        save(folder, 6)
        assert (names(folder) == ['step-00000005', 'step-00000006']
                and value_of(folder/'step-00000005') in (1, 2, 3))
        if code == 0: return
    pytest.fail('never came to an end')

def test_killed_at_random_instants(tmp_path):
    "SIGKILL, 10 times, while a process saves as fast as it can"
    save(tmp_path, 0)
    last = 0
    for i in range(10):
        def work():
            signal.setitimer(signal.ITIMER_REAL, 30)                     # its own time limit
            for step in range(last + 1, last + 10_000): save(tmp_path, step)
        pid = os.fork()
        if pid == 0:
            try:
                work()
            finally:
                os._exit(1)
        time.sleep(.06 + .03*i)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL      # it was still at work
        found = value_of(latest_checkpoint(tmp_path, silent))
        assert found >= last
        last = found
    assert last > 2

def test_everything_is_on_the_disk_before_it_has_a_name(tmp_path, monkeypatch):
    "A killed process loses nothing it wrote, a power cut does: so note what was forced to disk, and when"
    save(tmp_path, 10)
    save(tmp_path, 20)
    forced, events = {}, []
    real = {name: getattr(os, name) for name in ('fsync', 'replace', 'rename', 'unlink', 'rmdir')}
    def fsync(fd):
        s = os.fstat(fd)
        real['fsync'](fd)
        forced[s.st_ino] = (len(events), s.st_mtime_ns)
        events.append('fsync')
    def replace(a, b):
        for p in (Path(a), *Path(a).rglob('*')):
            s = p.stat()
            assert s.st_ino in forced, f'{p.name} was given its name before it was on the disk'
            assert forced[s.st_ino][1] == s.st_mtime_ns, f'{p.name} was changed after it was forced to disk'
        real['replace'](a, b)
        events.append('replace')
    def removing(name):
        def call(*args, **kwargs):
            published = events.index('replace')                          # fails if nothing was published yet
            at = forced[tmp_path.stat().st_ino][0]
            assert at > published, 'an old checkpoint went before the new name was on the disk'
            events.append(name)
            return real[name](*args, **kwargs)
        return call
    monkeypatch.setattr(os, 'fsync', fsync)
    monkeypatch.setattr(os, 'replace', replace)
    for name in ('rename', 'unlink', 'rmdir'): monkeypatch.setattr(os, name, removing(name))
    save(tmp_path, 30)
    monkeypatch.undo()
    # two files by who wrote them, and not again; the other three, their folder and the one above when
    # published
    assert events.count('replace') == 1 and events.count('fsync') == 7 and 'rmdir' in events
    assert names(tmp_path) == ['step-00000020', 'step-00000030']

def test_a_new_folder_is_durable_all_the_way_up(tmp_path, monkeypatch):
    forced, real = set(), os.fsync
    def fsync(fd):
        real(fd)
        forced.add(os.fstat(fd).st_ino)
    monkeypatch.setattr(os, 'fsync', fsync)
    save(tmp_path/'run'/'checkpoints', 1)
    assert {p.stat().st_ino for p in (tmp_path, tmp_path/'run', tmp_path/'run'/'checkpoints')} <= forced

# --- a full disk ---------------------------------------------------------------------------------

def starved(limit, work):
    "Run `work` in a process whose files may have `limit` bytes; (exit code, message of the CheckpointError)"
    out, into = os.pipe()
    def body():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead of a signal, as with a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            work()
        except CheckpointError as e:
            os.write(into, str(e).encode())     # a pipe has no limit
    code = in_a_process(body)
    os.close(into)
    with os.fdopen(out, encoding='utf-8') as f: return code, f.read()

SIZES = {'model': (10_000, 1, 0), 'optimizer': (1, 10_000, 0), 'state': (1, 1, 40_000), 'manifest': (1, 1, 0)}

@pytest.mark.parametrize('again', (False, True))
@pytest.mark.parametrize('file, sizes', SIZES.items())
def test_a_full_disk(tmp_path, file, sizes, again):
    "The named file is the only one that does not fit"
    save(tmp_path, 10)
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    m, o, s = sizes
    big = {'model': {'w': torch.ones(m)}, 'optimizer': {'w': torch.ones(o)}}
    code, message = starved(200, lambda: save_checkpoint(tmp_path, 10 if again else 20, big, {'x': 'x'*s}))
    assert code == 0 and 'could not save in' in message and str(tmp_path) in message and '\n' not in message
    for words in ('needed', 'free', 'earlier checkpoints are intact', 'start again'): assert words in message
    assert names(tmp_path) == ['step-00000010'] and value_of(latest_checkpoint(tmp_path, silent)) == 10
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == before
    # with room it works
    assert starved(10**6, lambda: save_checkpoint(tmp_path, 20, big, {'x': 'x'*s})) == (0, '')
    assert latest_checkpoint(tmp_path, silent).name == 'step-00000020'

@pytest.mark.parametrize('again', (False, True))
@pytest.mark.parametrize('call', ('fsync', 'replace', 'mkdir'))
def test_a_disk_that_refuses(tmp_path, monkeypatch, call, again):
    save(tmp_path, 1)
    real = getattr(os, call)
    for number in range(1, 20):
        left = [number]
        def refuse(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0: raise OSError(errno.ENOSPC, 'No space left on device')
            return real(*args, **kwargs)
        with monkeypatch.context() as m:
            m.setattr(os, call, refuse)
            try:
                save(tmp_path, 1 if again else 2)
            except CheckpointError as e:
                assert 'earlier checkpoints are intact' in str(e)
            else:
                break
        assert value_of(latest_checkpoint(tmp_path, silent)) in ((1,) if again else (1, 2))
        assert 'step-00000001' in names(tmp_path)                        # under its own name again
    assert 1 < number < 20 or call == 'mkdir'

def test_a_place_that_cannot_be(tmp_path):
    (tmp_path/'file').write_text('in the way')
    for folder in (tmp_path/'file', tmp_path/'file'/'below'):
        with pytest.raises(CheckpointError, match='could not save in'): save(folder, 1)
    assert (tmp_path/'file').read_text() == 'in the way'

def test_an_error_that_is_not_the_disks_is_passed_on(tmp_path, monkeypatch):
    save(tmp_path, 1)
    def broken(path): raise RuntimeError('a device is gone')
    with monkeypatch.context() as m:
        m.setattr(ckpt, 'file_digest', broken)
        with pytest.raises(RuntimeError, match='a device is gone'): save(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"state\['shape'\]"):
        save_checkpoint(tmp_path, 2, tensors(2), {'shape': (1, 2)})
    with pytest.raises(CheckpointError, match=r"state\['d'\]"):
        save_checkpoint(tmp_path, 2, tensors(2), {'d': {1: 'one'}})
    for odd in ('nan', 'inf'):  # Python writes them, JSON has no such numbers
        with pytest.raises(CheckpointError, match=r"state\['loss'\]"):
            save_checkpoint(tmp_path, 2, tensors(2), {'loss': float(odd)})
    with pytest.raises(CheckpointError, match=r"state\['t'\]"):
        save_checkpoint(tmp_path, 2, tensors(2), {'t': torch.ones(1)})
    for keep in (0, -1):
        with pytest.raises(CheckpointError, match='at least 1'): save(tmp_path, 2, keep=keep)
    assert names(tmp_path) == ['step-00000001']

# --- damage --------------------------------------------------------------------------------------

FILES = ('model-00000.safetensors', 'optimizer-00000.safetensors', 'index.json', 'state.json',
         'manifest.json')

def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data)//2] ^= 1
    file.write_bytes(bytes(data))

DAMAGE = {'truncated': lambda f: f.write_bytes(f.read_bytes()[:-1]), 'empty': lambda f: f.write_bytes(b''),
          'longer': lambda f: f.write_bytes(f.read_bytes() + b'x'), 'flipped': flip, 'missing': Path.unlink,
          'a folder': lambda f: (f.unlink(), f.mkdir())}

@pytest.mark.parametrize('how', DAMAGE)
@pytest.mark.parametrize('file', FILES)
def test_damage_is_named_and_the_one_before_used(tmp_path, file, how):
    if (file, how) == ('manifest.json', 'longer'): how = 'truncated'     # trailing rubbish: not JSON either
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    DAMAGE[how](newest/file)
    with pytest.raises(CheckpointError): load_checkpoint(newest)
    lines = []
    assert value_of(latest_checkpoint(tmp_path, lines.append)) == 10
    assert len(lines) == 1 and '\n' not in lines[0]
    for words in ('step-00000020', 'step-00000010 instead', *([file] if how != 'flipped' else [])):
        assert words in lines[0]
    if file != 'manifest.json' and how in ('truncated', 'empty', 'longer'):
        assert 'bytes instead of' in lines[0]
    save(tmp_path, 20)  # the run comes by again
    assert value_of(latest_checkpoint(tmp_path, silent)) == 20
    for path in list_checkpoints(tmp_path): DAMAGE[how](path/file)
    with pytest.raises(CheckpointError, match='all 2 checkpoints .* are damaged .*; restore one from a copy'):
        latest_checkpoint(tmp_path, silent)

@pytest.mark.parametrize('text',
                         ('{', '[]', 'null', '3', '{}', '{"files": {}}', '{"files": []}', '{"files": null}',
                          '{"files": "state.json"}',
                          '{"files": {"state.json": 3}}', '{"files": {"state.json": {}}}',
                          '{"files": {"../state.json": {"bytes": 1, "sha256": ""}}}', '\xff'))
def test_a_manifest_that_is_none(tmp_path, text):
    path = save(tmp_path, 1)
    (path/'manifest.json').write_text(text, encoding='latin-1')
    with pytest.raises(CheckpointError, match='manifest.json is missing or damaged'): verify_checkpoint(path)

def test_a_file_outside_the_folder_is_not_looked_at(tmp_path):
    path = save(tmp_path, 1)
    listed = json.loads((path/'manifest.json').read_text())
    listed['files']['../secret'] = {'bytes': 0, 'sha256': ''}
    (path/'manifest.json').write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match='manifest.json'): verify_checkpoint(path)

def test_a_file_that_nobody_verified_is_not_loaded(tmp_path):
    path = save(tmp_path, 1)
    save_file({'x': torch.ones(1)}, path/'stowaway.safetensors')
    assert set(load_checkpoint(path)[0]) == {'model', 'optimizer'}

def away(*args, **kwargs): raise OSError(errno.ESTALE, 'Stale file handle')

DIGEST = 'llama_nb.train.stored.file_digest'

@pytest.mark.parametrize('call', ['llama_nb.untrusted.open_regular', DIGEST, 'os.listdir'])
def test_storage_that_refuses_to_read_is_not_damage(tmp_path, monkeypatch, call):
    "The file server is away: nothing is passed over, nobody is told to remove anything, and it may pass"
    save(tmp_path, 10)
    save(tmp_path, 20)
    lines = []
    with monkeypatch.context() as m:
        m.setattr(call, away)
        with pytest.raises(StorageError, match='Stale file handle') as e:
            latest_checkpoint(tmp_path, lines.append)
        assert is_temporary(e.value) and 'damaged' not in str(e.value) and lines == []
    assert latest_checkpoint(tmp_path, lines.append).name == 'step-00000020' and lines == []

def test_one_file_that_fails_while_reading(tmp_path, monkeypatch):
    "It costs no interval either: the older checkpoint is not taken in silence"
    save(tmp_path, 10)
    save(tmp_path, 20)
    real = stored.file_digest
    def failing(path):
        if 'step-00000020/model' in str(path): raise OSError(errno.EIO, 'Input/output error')
        return real(path)
    monkeypatch.setattr(stored, 'file_digest', failing)
    with pytest.raises(StorageError, match='step-00000020/model-00000.* cannot be read: Input/output error'):
        latest_checkpoint(tmp_path, silent)

def test_nothing_more_is_removed_while_storage_refuses(tmp_path, monkeypatch):
    "A checkpoint whose manifest cannot be read now takes no place among those that are kept"
    for step in (10, 20): save(tmp_path, step)
    real = untrusted.open_regular
    def failing(path, *args, **kwargs):
        if 'step-00000020' in str(path): away()
        return real(path, *args, **kwargs)
    monkeypatch.setattr(untrusted, 'open_regular', failing)
    save(tmp_path, 30)
    assert names(tmp_path) == ['step-00000010', 'step-00000020', 'step-00000030']

# --- what stays ----------------------------------------------------------------------------------

def test_what_is_kept(tmp_path):
    for keep in (1, 2, 3):
        for step in range(5, 60, 5): save(tmp_path/str(keep), step, keep=keep)
        wanted = [f'step-{s:08}' for s in range(60 - 5*keep, 60, 5)]
        assert [p.name for p in list_checkpoints(tmp_path/str(keep))] == names(tmp_path/str(keep)) == wanted
    for step in (9, 10, 10**8, 10**9): save(tmp_path/'long', step, keep=9)  # sorted as numbers, not as text
    assert [int(p.name[5:]) for p in list_checkpoints(tmp_path/'long')] == [9, 10, 10**8, 10**9]

def test_a_damaged_one_takes_no_place(tmp_path):
    save(tmp_path, 10)
    DAMAGE['truncated'](save(tmp_path, 20)/'model-00000.safetensors')
    save(tmp_path, 30)
    # 10 is the second whole one
    assert names(tmp_path) == ['step-00000010', 'step-00000020', 'step-00000030']
    save(tmp_path, 40)
    assert names(tmp_path) == ['step-00000030', 'step-00000040']

def test_nothing_newer_is_removed(tmp_path):
    save(tmp_path, 20)
    save(tmp_path, 30)
    save(tmp_path, 5)
    assert names(tmp_path) == ['step-00000005', 'step-00000020', 'step-00000030']

def test_leftovers_go_and_other_peoples_folders_stay(tmp_path):
    save(tmp_path, 10)
    for name in ('.tmp-step-00000020-0123abcd', '.tmp-step-00000010-0123abcd'):
        shutil.copytree(tmp_path/'step-00000010', tmp_path/name)
    (tmp_path/'step-00000010').rename(tmp_path/'.old-step-00000010')  # a crash between two renames
    for name in ('step-best', 'step-00000010.backup', 'notes'): (tmp_path/name).mkdir()
    assert latest_checkpoint(tmp_path, silent).name == '.old-step-00000010'
    save(tmp_path, 20)
    assert names(tmp_path) == ['notes', 'step-00000010', 'step-00000010.backup', 'step-00000020', 'step-best']
    assert value_of(tmp_path/'step-00000010') == 10

def test_what_cannot_be_deleted_does_not_stop_the_run(tmp_path, monkeypatch):
    save(tmp_path, 10)
    save(tmp_path, 20)
    def no(*args, **kwargs): raise PermissionError(errno.EACCES, 'Permission denied')
    with monkeypatch.context() as m:
        m.setattr(shutil, 'rmtree', no)
        save(tmp_path, 30)
    assert [p.name for p in list_checkpoints(tmp_path)] == ['step-00000020', 'step-00000030']
    save(tmp_path, 40)
    assert names(tmp_path) == ['step-00000030', 'step-00000040']

# --- optimiser and random state ------------------------------------------------------------------

def net(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.Linear(3, 7, bias=False)).to(dtype)
    model[1].bias.requires_grad_(False)                                  # frozen: never has a state
    return (model,
            torch.optim.AdamW([{'params': list(model[1:].parameters()), 'lr': .1},
                               {'params': model[0].parameters(), 'lr': .01}], **kwargs))

def train(model, optimizer, steps):
    for i in steps:
        optimizer.zero_grad()
        model((torch.arange(5) + i) % 7).float().square().mean().backward()
        optimizer.step()

def whole(model, optimizer):
    return {'model': model.state_dict(), 'optimizer': optimizer_tensors(model, optimizer)}

@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
@pytest.mark.parametrize('kind', ({}, {'fused': True}, {'foreach': True}, {'amsgrad': True}))
def test_six_steps_are_three_and_three(tmp_path, kind, dtype):
    model, opt = net(dtype, **kind)
    train(model, opt, range(6))
    half, opt3 = net(dtype, **kind)
    train(half, opt3, range(3))
    path = save_checkpoint(tmp_path, 3, whole(half, opt3), {})
    again, opt6 = net(dtype, **kind)
    with torch.no_grad(): [p.fill_(7) for p in again.parameters()]
    prepare_optimizer(again, opt6)
    load_into(path, whole(again, opt6))
    train(again, opt6, range(3, 6))
    a, b = optimizer_tensors(model, opt), optimizer_tensors(again, opt6)
    assert (a.keys() == b.keys() and len(a) == 3*(3 + ('amsgrad' in kind))
            and all(torch.equal(a[k], b[k]) for k in a))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))

def test_each_lacking_name_is_named(tmp_path):
    "Between what is stored and what a new run has room for; refused means untouched"
    model, opt = net()
    train(model, opt, range(2))
    full = optimizer_tensors(model, opt)
    fresh, new = net()
    prepare_optimizer(fresh, new)
    room = optimizer_tensors(fresh, new)
    def refused(stored, match):
        with pytest.raises(CheckpointError, match=match):
            load_into(save_checkpoint(tmp_path, 1, {'optimizer': stored}, {}), {'optimizer': room})
    for name in full: refused({k: v for k, v in full.items() if k != name}, f'lacks optimizer/{name}')
    refused(full | {'x.step': torch.tensor(1.)}, 'has, but this run has not, optimizer/x.step')
    refused(full | {'1.weight.exp_avg': torch.zeros(4, 3)}, r'optimizer/1.weight.exp_avg in shape \(4, 3\)')
    # a number is not spread over a tensor
    refused(full | {'1.weight.exp_avg': torch.tensor(1.)},
            r'in shape \(\) and type float32, this run \(3, 4\)')
    refused(full | {'1.weight.exp_avg': torch.zeros(3, 4).bfloat16()}, 'bfloat16')
    assert not any(t.any() for t in room.values())
    load_into(save_checkpoint(tmp_path, 1, {'optimizer': full}, {}), {'optimizer': room})
    assert all(torch.equal(room[k], t) for k, t in full.items())

def test_an_optimizer_that_could_not_be_loaded_again():
    model, opt = net()
    train(model, opt, range(1))
    with pytest.raises(UserError, match='4 of 4'): optimizer_tensors(net()[0], opt)  # another model's
    opt.state[model[1].weight]['step'] = 1
    with pytest.raises(UserError, match="'1.weight.step' is 1 and not a tensor"):
        optimizer_tensors(model, opt)
    for key, wrong, words in (('exp_avg', torch.zeros(4, 3), r'shape \(4, 3\)'),
                              ('exp_avg', torch.tensor(1.), r'shape \(\)'),
                              ('exp_avg_sq', torch.zeros(3, 4).bfloat16(), 'bfloat16')):
        model, opt = net()
        train(model, opt, range(1))
        opt.state[model[1].weight][key] = wrong
        with pytest.raises(UserError, match=words): optimizer_tensors(model, opt)
    model, opt = net()
    train(model, opt, range(1))
    del opt.state[model[0].weight]
    with pytest.raises(UserError, match='lacks 0.weight.exp_avg, .*requires_grad_'):
        optimizer_tensors(model, opt)

def test_bit_for_bit(tmp_path):
    """Every pattern of 16 bits as bfloat16, NaNs and both zeros among them; views, a scalar, an empty tensor,
    tied and overlapping ones"""
    w, every = torch.randn(3, 4), torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16)
    odd = {'bf16': every.view(torch.bfloat16), 'view': w.T, 'scalar': torch.tensor(7),
           'none': torch.zeros(0, 3), 'tied': w, 'overlap': w[1:], 'one': torch.ones(1).expand(4)}
    path = save_checkpoint(tmp_path, 1, {'model': odd}, {})
    filled = {k: torch.empty(t.shape, dtype=t.dtype) for k, t in odd.items()}
    load_into(path, {'model': filled})
    for back in (filled, load_checkpoint(path)[0]['model']):
        assert back.keys() == odd.keys()
        assert torch.equal(back.pop('bf16').view(torch.int16), every)  # a NaN equals nothing, its bits do
        for k, t in back.items(): assert t.dtype == odd[k].dtype and torch.equal(t, odd[k])

def test_tied_weights_come_back_tied(tmp_path):
    model, _ = net()
    model[2].weight = nn.Parameter(torch.randn(7, 4))
    model[0].weight = model[2].weight
    got, _ = load_checkpoint(save_checkpoint(tmp_path, 1, {'model': model.state_dict()}, {}))
    other = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.Linear(4, 7, bias=False))
    other[2].weight = other[0].weight
    other.load_state_dict(got['model'])
    assert torch.equal(other[0].weight, model[0].weight) and other[0].weight is other[2].weight

def test_generators_of_gpus_are_stored_and_those_not_here_left_out(monkeypatch):
    "With a stand-in for CUDA: two generators are stored, one is there to be set"
    states, was_set = [torch.arange(16, dtype=torch.uint8), torch.arange(16, 32, dtype=torch.uint8)], []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_rng_state_all', lambda: states)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'set_rng_state', lambda s, i: was_set.append((i, s)))
    set_random_state(json.loads(json.dumps(random_state())))
    assert len(was_set) == 1 and was_set[0][0] == 0 and torch.equal(was_set[0][1], states[0])
