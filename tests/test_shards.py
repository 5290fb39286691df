"Token shards under the limits of a real machine: a full disk, and more shards than files may be open."
import resource, signal, subprocess, sys
from conftest import ENV

def limit(kind, n):
    def apply():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(kind, (n, n))
    return apply

def test_a_full_disk_leaves_nothing(tmp_path, tokens, llama_nb):
    texts, out = tmp_path/'texts', tmp_path/'out'
    texts.mkdir()
    for i in range(40): (texts/f'{i}.txt').write_text(f'Page {i} of the book. '*400)
    args = ('data', out, '--tokenizer', tokens/'tokenizer.model', '--documents', texts)
    status, _, err = llama_nb(*args, preexec_fn=limit(resource.RLIMIT_FSIZE, 50_000))
    assert status == 2 and len(err.strip().splitlines()) == 1 and 'no room for' in err and 'Traceback' not in err, err
    assert not list(out.iterdir())
    assert llama_nb(*args)[0] == 0                                       # the same command, once there is room

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
    write_shards((Document(f'text {i}', str(i)) for i in range(200)), Tokenizer(tokens/'tokenizer.model'), tmp_path/'many', tokens_per_shard=1)
    done = subprocess.run([sys.executable, '-c', READ_ALL, tmp_path/'many'], env=ENV, capture_output=True, text=True,
                          preexec_fn=limit(resource.RLIMIT_NOFILE, 120))
    assert done.stdout.split() == ['200', 'True'], done.stderr
