"What a run says: into a file, on a terminal of 50 columns, when Ctrl-C is pressed, and in its folder."
import json, os, re, signal, struct, subprocess, sys
from types import SimpleNamespace
import pytest
from conftest import ENV, command, metrics
from llama_nb.data.shards import TokenShards
from llama_nb.infer.evaluate import Score
from llama_nb.train.console import per_byte

TIME = r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d '

def test_in_a_file_there_are_lines_with_their_time(tmp_path, run_file, llama_nb):
    path = run_file(12)
    status, shown, err = llama_nb('train', path, '--train.eval_every', 5)
    assert status == 0 and '\r' not in err, err
    lines = err.splitlines()
    assert all(re.match(TIME, line) for line in lines if 'step' in line)
    said = [re.sub(TIME, '', line).strip() for line in lines if re.match(TIME, line)]
    measured = [re.match(r'step +(\d+)/12', line)[1] for line in said if 'validation' in line]
    assert measured == ['5', '10', '12']
    trained = [line for line in said if '  loss' in line]
    first, last = trained[0], trained[-1]
    assert first.startswith('step  1/12 ')
    for word in ('lr', 'grad norm', 'tokens/s', 'GB', 'left'): assert word in first, word
    assert last.endswith('0:00 left')
    for word in ('model  ', 'data  ', ' epochs', 'device     cpu, float32', 'finished   12 steps',
                 'validation ', 'bits per byte', f'llama-nb generate {tmp_path/"run"}'):
        assert word in shown, word

def test_a_folder_says_what_lies_in_it(tmp_path, tokens, run_file, llama_nb):
    path, out = run_file(3), tmp_path/'run'
    assert llama_nb('train', path)[0] == 0
    found, row = json.loads((out/'results.json').read_text()), metrics(out)[-1]
    assert (found['steps'], found['tokens']) == (3, row['tokens'])
    assert found['validation_loss'] == row['held_out_loss']
    assert found['epochs'] == row['epoch'] and 2 < found['bits_per_byte'] < 9
    n = TokenShards(tokens/'held_out').n_tokens
    assert (found['validation_sequences'], found['held_out_sequences']) == (64, len(range(0, n - 1, 64)))
    assert row['peak_bytes'] > 1e7 and 0 <= row['data_seconds'] < row['seconds']
    note = (out/'README.md').read_text()
    there = {p.name for p in out.iterdir() if not p.name.startswith('.')}
    told = {name.rstrip('/') for name in re.findall(r'^\| `([^`]*)`', note, re.M)}
    assert there - {'README.md'} == told
    again = re.search(r'llama-nb (train \S+)', note)[1].split()
    assert 'is finished: 3 of 3' in llama_nb(*again)[1]

needs_terminal = pytest.mark.skipif(sys.platform == 'win32', reason='needs a pseudo-terminal')

def on_a_terminal(*words, stop:bytes=b'')->tuple[int, str]: # exit code, what was said
    "Run a command on a terminal of 50 columns; Ctrl-C is pressed once it has said `stop`"
    import fcntl, pty, termios
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 50, 0, 0))
    def of_this_terminal(): fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    process = subprocess.Popen(command(*words), env=ENV, stdin=slave, stdout=slave, stderr=slave,
                               start_new_session=True, preexec_fn=of_this_terminal)
    os.close(slave)
    said = b''
    try:
        while chunk := read(master):
            said += chunk
            if stop and stop in said:
                os.write(master, b'\x03')                                    # as a keyboard sends it
                stop = b''
        return process.wait(60), said.decode()
    finally:
        process.kill()
        os.close(master)

@needs_terminal
def test_on_a_terminal_of_50_columns(run_file):
    words = 'train', run_file(100_000), '--train.eval_every', '10'
    code, text = on_a_terminal(*words, stop=b'validation loss')
    assert code == 128 + signal.SIGINT
    parts = re.split(r'[\r\n]+', text.replace('^C', ''))                      # the terminal's own echo
    bars = [part for part in parts if '|' in part and 'loss' in part]
    assert bars and max(map(len, bars)) <= 50 and 'loss' in bars[-1] and 'tok/s' in bars[-1]
    assert 'validation loss' in text and 'SIGINT: this step is finished' in text
    assert text.index('SIGINT: this step') < text.index('stopped after step')

@needs_terminal
def test_a_finished_run_ends_with_the_next_command_and_not_with_its_bar(run_file):
    code, text = on_a_terminal('train', run_file(3))
    assert code == 0 and text.rindex('tok/s') < text.index('finished   3 steps')

def read(master):
    try:
        return os.read(master, 4096)
    except OSError:                                                           # the other end was closed
        return b''

def test_bits_per_byte_are_those_of_eval():
    "The first token of a text is nobody's target"
    shards = SimpleNamespace(n_tokens=11, n_bytes=25)
    assert per_byte(3., shards) == Score(30., 10, 25).bits_per_byte
