"Saving is stopped at every single call that touches the disk; afterwards the old checkpoint or the new one is there, whole."
import os, signal, time
from pathlib import Path
import pytest, torch
from llama_nb.train.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint

CALLS = ('fsync', 'replace', 'rename', 'mkdir', 'rmdir', 'unlink', 'open')

def tensors(value): return {'model': {'w': torch.full((50, 40), float(value))}, 'optimizer': {'w.exp_avg': torch.full((50, 40), -float(value))}}

def save(folder, step): return save_checkpoint(folder, step, tensors(step), {'step': step})

def whole(path, step):
    "Whether checkpoint `path` holds exactly what `save(folder, step)` wrote"
    got, state = load_checkpoint(path)
    return state == {'step': step} and all(torch.equal(got[part][k], v) for part, named in tensors(step).items() for k, v in named.items())

def in_a_process(work, seconds=60):
    "Fork, run `work`, and wait; its exit code (negative for a signal)"
    pid = os.fork()
    if pid == 0:
        try: work(); os._exit(0)
        except BaseException: os._exit(1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(.001)
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    raise TimeoutError

def dies_at(call, number, folder, step):
    "Save, and die at the `number`-th use of os.`call`"
    real, count = getattr(os, call), 0
    def counting(*args, **kwargs):
        nonlocal count
        count += 1
        if count == number: os._exit(7)
        return real(*args, **kwargs)
    setattr(os, call, counting)
    save(folder, step)

@pytest.mark.parametrize('call', CALLS)
def test_death_at_every_call(tmp_path, call):
    deaths = 0
    for number in range(1, 200):
        folder = tmp_path/str(number)
        save(folder, 10); save(folder, 20)                              # the next save also removes step 10
        code = in_a_process(lambda: dies_at(call, number, folder, 30))
        assert code in (0, 7)
        found = latest_checkpoint(folder, report=lambda line: pytest.fail(line))     # nothing damaged is ever visible
        step = int(found.name[5:])
        assert step in ((30,) if code == 0 else (20, 30)) and whole(found, step)
        save(folder, 40)                                                # and the next save works and sweeps up
        assert whole(latest_checkpoint(folder), 40)
        assert all(p.name.startswith('step-') for p in folder.iterdir()) and len(list_checkpoints(folder)) == 2
        if code == 0: break
        deaths += 1
    assert code == 0
    if call in ('fsync', 'replace', 'mkdir'): assert deaths > 0         # these are certainly used

def test_killed_at_random_instants(tmp_path):
    "SIGKILL, 20 times, while a process saves as fast as it can"
    save(tmp_path, 0)
    last = 0
    for i in range(20):
        pid = os.fork()
        if pid == 0:
            for step in range(last + 1, last + 10_000): save(tmp_path, step)
            os._exit(0)
        time.sleep(.02 + .013*i); os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        found = latest_checkpoint(tmp_path, report=lambda line: pytest.fail(line))
        step = int(found.name[5:])
        assert step >= last and whole(found, step)
        last = step
    assert last > 20

def test_a_read_only_folder_says_so(tmp_path, monkeypatch):
    from llama_nb.train.checkpoint import CheckpointError
    save(tmp_path, 1)
    def refuse(*args, **kwargs): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(os, 'fsync', refuse)
    with pytest.raises(CheckpointError, match='could not save.*earlier checkpoints are intact'): save(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ['step-00000001'] and whole(latest_checkpoint(tmp_path), 1)
