"What may stand in the place of a good file: pipes, devices, links, JSON that is none, untrue facts."
import json, os, random, shutil
from pathlib import Path
import pytest
from llama_nb.core import UserError

DEEP = 200_000*'['
HUGE = 5_000*'9'

def one_line(error):
    "What a user reads"
    assert '\n' not in str(error) and len(str(error)) < 1_000
    if isinstance(error, OSError): return                   # the command line says what and where
    assert isinstance(error, UserError)

def refused(call):
    with pytest.raises(UserError) as e: call()
    one_line(e.value)
    return str(e.value)

def outcome(call):
    "What it gives, or None after it was refused in one line"
    try:
        return call()
    except (UserError, OSError) as e:
        one_line(e)

# --- things in the place of a file ----------------------------------------------------------------

def no_link(path):
    "A link to a file elsewhere, which has the very bytes"
    elsewhere = path.parent.parent/f'elsewhere-{path.name}'
    shutil.copy(path, elsewhere)
    path.unlink()
    path.symlink_to(elsewhere)

def put(make):
    def replace(path):
        path.unlink()
        make(path)
    return replace

def long(path):
    with open(path, 'r+b') as f: f.truncate(2**40)              # a terabyte that takes no room

IN_PLACE = {'a FIFO': put(os.mkfifo), 'an endless device': put(lambda p: p.symlink_to('/dev/zero')),
            'a folder': put(Path.mkdir), 'a link to itself': put(lambda p: p.symlink_to(p.name)),
            'a link to nothing': put(lambda p: p.symlink_to('nothing')), 'a link that leads out': no_link,
            'a terabyte': long, 'nothing': Path.unlink}

# --- JSON that is none, or untrue -------------------------------------------------------------------

JSON = {'empty': '', 'zeros': 300*'\0', 'a list': '[]', 'a number': '3', 'null': 'null', 'an object': '{}',
        'deep': DEEP, 'deep objects': 200_000*'{"a":', 'many digits': f'{{"a": {HUGE}}}',
        'cut off': '{"a": [1', 'no UTF-8': '{"\udcff": 1}', 'not a number': '{"a": NaN}'}

def write(text):
    return lambda path: path.write_bytes(text.encode('utf-8', 'surrogateescape'))

DAMAGES = {**IN_PLACE, **{name: write(text) for name, text in JSON.items()}}

ODD = [-1, True, None, 'x', [], {}, 2**62 + 1, 10**30, 1e300, 0, '../x', '\ud800']

def places(value, path=()):
    "Where the values of JSON stand"
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in parts: yield from places(inner, (*path, key))

def lies(text, n, seed=0):
    "`n` texts, each with another value in one place"
    draw, found = random.Random(seed), json.loads(text)
    there = [path for path in places(found) if path]
    for _ in range(n):
        changed, (*outer, last) = json.loads(text), draw.choice(there)
        holder = changed
        for key in outer: holder = holder[key]
        holder[last] = draw.choice(ODD)
        yield json.dumps(changed)

# --- memory ---------------------------------------------------------------------------------------

def peak_bytes(call):
    "Most resident memory of a child of this process while it calls `call`, which may be refused"
    get, give = os.pipe()
    child = os.fork()
    if not child:
        try:
            Path('/proc/self/clear_refs').write_text('5')       # or the peak would be the parent's
            outcome(call)
            os.write(give, Path('/proc/self/status').read_bytes())
        finally:
            os._exit(0)
    os.close(give)
    with os.fdopen(get, 'rb') as f: said = f.read().decode()
    assert os.waitpid(child, 0)[1] == 0
    return 1024*int(said.split('VmHWM:')[1].split()[0])
