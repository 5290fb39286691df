"""Downloads against a server that cuts, lies, changes and dawdles: the exact bytes or one line, and a second
call goes on.

The server runs in a thread on the loopback; what it does to each request is a list of acts, and nobody really
sleeps."""
import bz2, errno, functools, gzip, hashlib, io, json, os, random, signal, socket, ssl, tarfile, threading
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest
from llama_nb.core import TemporaryError, UserError, is_temporary
from llama_nb.cli import main
from llama_nb.data import download, fetch
from llama_nb.data.download import Fetcher, Remote

pytest.importorskip('urllib3')
DATA = random.Random(0).randbytes(200_000)

# --- the server ---------------------------------------------------------------------------------

class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args): pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True                    # the client has had enough

    def do_GET(self):
        site = self.server.site
        site.asked.append((self.path, dict(self.headers.items())))
        act = site.acts.pop(0) if site.acts else normal
        act(self, site)

    def head(self, status, **headers):
        self.send_response(status)
        for name, value in headers.items():
            if value is not None: self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()

class Site:
    "Files of a server by path, what it does next, and what it was asked"
    def __init__(self):
        self.files, self.acts, self.asked, self.sent = {}, [], [], 0
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads, self.server.site = True, self
        threading.Thread(target=self.server.serve_forever, kwargs={'poll_interval': .02}, daemon=True).start()
        self.base = f'http://127.0.0.1:{self.server.server_port}'

    def put(self, path, data, etag='"1"', **headers):
        self.files[path] = data, {'ETag': etag, **headers}
        return f'{self.base}{path}'

    def ranges(self): return [headers.get('Range', '') for _, headers in self.asked]

def part_of(handler, site):
    "(status, data, headers) as an honest server would answer"
    if handler.path not in site.files: return 404, b'', {}
    data, headers = site.files[handler.path]
    asked, when = handler.headers.get('Range'), handler.headers.get('If-Range')
    versions = None, headers.get('ETag'), headers.get('Last-Modified')
    if not asked or when not in versions: return 200, data, headers
    start = int(asked[6:-1])
    if start >= len(data): return 416, b'', {'Content-Range': f'bytes */{len(data)}'}
    return 206, data[start:], {**headers, 'Content-Range': f'bytes {start}-{len(data) - 1}/{len(data)}'}

def send(handler, site, data):
    site.sent += len(data)            # before the reader has it, who asks for the number
    handler.wfile.write(data)

def normal(handler, site):
    status, data, headers = part_of(handler, site)
    handler.head(status, Content_Length=len(data), **headers)
    send(handler, site, data)

def cut(n):
    "The connection ends after `n` bytes"
    def act(handler, site):
        status, data, headers = part_of(handler, site)
        handler.head(status, Content_Length=len(data), **headers)
        send(handler, site, data[:n])
        handler.close_connection = True
    return act

def reset(handler, site):
    "The connection is torn"
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
    handler.connection.close()
    handler.close_connection = True

def nonsense(handler, site):
    handler.wfile.write(b'this is not HTTP\r\n\r\n')
    handler.close_connection = True

def refuse(status, **headers):
    return lambda handler, site: handler.head(status, Content_Length=0, **headers)

def change(data, etag):
    "From now on it is another file"
    def act(handler, site):
        site.put(handler.path, data, etag)
        normal(handler, site)
    return act

def deaf(act=normal):
    "`If-Range` is ignored: the rest comes, of whichever version"
    def deaf_act(handler, site):
        del handler.headers['If-Range']
        act(handler, site)
    return deaf_act

def answer(status, body=b'', close=False, **headers):
    def act(handler, site):
        handler.head(status, **headers)
        send(handler, site, body)
        handler.close_connection = handler.close_connection or close
    return act

def chunked(n=2**40, end=True):
    def act(handler, site):
        status, data, headers = part_of(handler, site)
        handler.head(status, Transfer_Encoding='chunked', **headers)
        data = data[:n]
        for i in range(0, len(data), 5000):
            piece = data[i:i + 5000]
            send(handler, site, b'%x\r\n%s\r\n' % (len(piece), piece))
        if end: handler.wfile.write(b'0\r\n\r\n')
        handler.close_connection = True
    return act

def endless(**headers):
    def act(handler, site):
        handler.head(200, **headers)
        try:
            while True:
                send(handler, site, bytes(2**16))
        except OSError:
            handler.close_connection = True
    return act

@pytest.fixture
def site(monkeypatch):
    for name in ('http_proxy', 'https_proxy', 'all_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)
    made = Site()
    yield made
    made.server.shutdown()
    made.server.server_close()

@pytest.fixture
def patient():
    "A fetcher that does not sleep, and what it said and slept"
    slept, said = [], []
    web = Fetcher(sleep=slept.append, report=said.append)
    web.slept, web.said = slept, said
    return web

def remote(address, **more):
    return Remote(**{'address': address, 'name': 'a.bin', 'licence': 'CC0-1.0', 'limit': 10**7, **more})

def get(fetcher, site, tmp_path, data=DATA, to='out', **known):
    "Fetch `data`, which lies at /a, into the folder `to`"
    return fetcher.fetch(remote(site.put('/a', data), **known), tmp_path/to, tmp_path/'parts')

def one_line(error):
    text = str(error)
    assert text and '\n' not in text and len(text) < 600
    return text

# --- a file comes whole -------------------------------------------------------------------------

def test_a_file_its_account_and_nothing_else(site, patient, tmp_path):
    address = site.put('/a', DATA)
    row = patient.fetch(remote(address), tmp_path/'out', tmp_path/'parts')
    assert (tmp_path/'out'/'a.bin').read_bytes() == DATA
    assert row['sha256'] == hashlib.sha256(DATA).hexdigest() and row['bytes'] == len(DATA)
    assert (row['etag'], row['licence'], row['from']) == ('"1"', 'CC0-1.0', address)
    assert row['date'].endswith('+00:00')
    assert [*(tmp_path/'parts').iterdir()] == [] and [*(tmp_path/'out').iterdir()] == [tmp_path/'out'/'a.bin']
    agent = site.asked[0][1]['User-Agent']
    assert agent.startswith('llama_nb/') and '+https://' in agent
    assert site.asked[0][1]['Accept-Encoding'] == 'identity' and patient.slept == []

@pytest.mark.parametrize('at', [0, 1, 777, 65_536, 199_999])
def test_a_cut_connection_goes_on_where_it_broke(site, patient, tmp_path, at):
    site.acts = [cut(at)]
    get(patient, site, tmp_path)
    assert (tmp_path/'out'/'a.bin').read_bytes() == DATA
    assert site.ranges() == ['', f'bytes={at}-' if at else ''] and site.sent == len(DATA)

def test_each_byte_is_sent_once_over_many_cuts_and_a_second_call(site, patient, tmp_path):
    patient.retries = 4
    site.acts = [cut(10_000)]*7
    with pytest.raises(TemporaryError, match='50,000 bytes are kept'):
        get(patient, site, tmp_path)
    assert not (tmp_path/'out').exists() and site.sent == 50_000
    get(patient, site, tmp_path)
    assert (tmp_path/'out'/'a.bin').read_bytes() == DATA and site.sent == len(DATA)
    assert site.ranges()[5] == 'bytes=50000-'

def test_another_run_goes_on(site, tmp_path):
    site.acts = [cut(70_000)]
    with pytest.raises(TemporaryError):
        get(Fetcher(retries=0), site, tmp_path)
    get(Fetcher(), site, tmp_path)
    assert site.ranges() == ['', 'bytes=70000-'] and site.sent == len(DATA)

@pytest.mark.parametrize('etag, more, resumes', [
    ('"1"', {}, True), ('W/"1"', {}, False), (None, {}, False), ('"1\u00e9"', {}, False),
    (None, {'Last-Modified': 'Thu, 01 Jan 2026 00:00:00 GMT'}, True)])
def test_it_goes_on_only_with_a_version_to_rely_on(site, patient, tmp_path, etag, more, resumes):
    site.acts = [cut(70_000)]
    patient.fetch(remote(site.put('/a', DATA, etag, **more)), tmp_path/'out', tmp_path/'parts')
    assert (tmp_path/'out'/'a.bin').read_bytes() == DATA
    assert site.ranges()[1] == ('bytes=70000-' if resumes else '')

def test_a_whole_part_only_needs_its_name(site, patient, tmp_path):
    "As after a crash between the last byte and the rename"
    address = site.put('/a', DATA)
    part = download._Part(tmp_path/'parts', 'a.bin')
    part.begin(address, '"1"', len(DATA))
    part.path.write_bytes(DATA)
    patient.fetch(remote(address), tmp_path/'out', tmp_path/'parts')
    assert site.asked == [] and (tmp_path/'out'/'a.bin').read_bytes() == DATA

@pytest.mark.parametrize('said', [
    b'', b'{', b'[]', b'\xff', b'{"address": 1, "validator": 2, "total": "x"}',
    b'{"validator": "a\\r\\nX: y"}', b'null'])
def test_a_damaged_note_begins_anew(site, patient, tmp_path, said):
    (tmp_path/'parts').mkdir()
    (tmp_path/'parts'/'a.bin.part').write_bytes(b'old bytes')
    (tmp_path/'parts'/'a.bin.version').write_bytes(said)
    get(patient, site, tmp_path)
    assert (tmp_path/'out'/'a.bin').read_bytes() == DATA and site.ranges() == ['']

def test_a_part_longer_than_the_file_begins_anew(site, patient, tmp_path):
    address = site.put('/a', DATA[:100])
    part = download._Part(tmp_path/'parts', 'a.bin')
    part.begin(address, '"1"', 0)
    part.path.write_bytes(DATA)
    patient.fetch(remote(address), tmp_path/'out', tmp_path/'parts')
    assert (tmp_path/'out'/'a.bin').read_bytes() == DATA[:100]

# --- never a mix --------------------------------------------------------------------------------

OTHER = random.Random(1).randbytes(len(DATA))

@pytest.mark.parametrize('new', [OTHER, OTHER[:1000], OTHER*2, DATA],
                         ids=['other', 'shorter', 'longer', 'same'])
@pytest.mark.parametrize('wrap', [lambda act: act, deaf], ids=['standard', 'deaf'])
def test_a_file_that_changed_begins_anew(site, patient, tmp_path, new, wrap):
    site.acts = [cut(500), wrap(change(new, '"2"'))]
    get(patient, site, tmp_path)
    assert (tmp_path/'out'/'a.bin').read_bytes() == new

LIES = {'another beginning': f'bytes 99-{len(DATA) - 1}/{len(DATA)}',
        'another total': f'bytes 500-{len(DATA)}/{len(DATA) + 1}', 'a piece': f'bytes 500-600/{len(DATA)}',
        'no total': f'bytes 500-{len(DATA) - 1}/*', 'nothing': None, 'words': 'bytes five hundred'}

@pytest.mark.parametrize('name', LIES)
def test_an_answer_that_does_not_fit_is_not_appended(site, patient, tmp_path, name):
    lie = answer(206, OTHER[:1000], Content_Length=1000, ETag='"1"', Content_Range=LIES[name])
    site.acts = [cut(500), lie]
    get(patient, site, tmp_path)
    assert (tmp_path/'out'/'a.bin').read_bytes() == DATA

def test_a_rest_of_no_version_is_not_appended(site, patient, tmp_path):
    span = f'bytes 500-{len(DATA) - 1}/{len(DATA)}'
    site.acts = [cut(500), answer(206, OTHER[500:], Content_Length=len(DATA) - 500, Content_Range=span)]
    get(patient, site, tmp_path)
    assert (tmp_path/'out'/'a.bin').read_bytes() == DATA

def test_a_rest_that_nobody_asked_for(site, patient, tmp_path):
    span = f'bytes 5-{len(DATA) - 1}/{len(DATA)}'
    site.acts = [answer(206, DATA[5:], Content_Length=len(DATA) - 5, ETag='"1"', Content_Range=span)]
    get(patient, site, tmp_path)
    assert (tmp_path/'out'/'a.bin').read_bytes() == DATA

def test_parts_of_another_address_are_not_used(site, patient, tmp_path):
    patient.retries = 0
    site.acts = [cut(500)]
    with pytest.raises(TemporaryError):
        get(patient, site, tmp_path, OTHER)
    patient.fetch(remote(site.put('/b', DATA)), tmp_path/'out', tmp_path/'parts')
    assert (tmp_path/'out'/'a.bin').read_bytes() == DATA

# --- lengths and encodings ----------------------------------------------------------------------

def test_chunks_without_a_length(site, patient, tmp_path):
    site.acts = [chunked(60_000, end=False), chunked()]
    get(patient, site, tmp_path)
    assert (tmp_path/'out'/'a.bin').read_bytes() == DATA

def test_a_length_that_is_too_long_is_a_cut_connection(site, patient, tmp_path):
    patient.retries = 2
    site.acts = [answer(200, DATA, True, Content_Length=len(DATA) + 5)]*3
    with pytest.raises(TemporaryError, match='broke off'):
        get(patient, site, tmp_path)
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('known', [{'size': len(DATA)}, {'digest': f'sha1:{hashlib.sha1(DATA).hexdigest()}'}])
def test_a_length_that_is_too_short_is_seen_where_anything_is_known(site, patient, tmp_path, known):
    site.acts = [answer(200, DATA, True, Content_Length=len(DATA) - 5)]
    with pytest.raises(UserError) as e:
        get(patient, site, tmp_path, **known)
    assert one_line(e.value) and not is_temporary(e.value) and not (tmp_path/'out').exists()

def test_without_any_length_the_end_is_not_believed(site, patient, tmp_path):
    site.acts = [answer(200, DATA[:500], True)]
    with pytest.raises(UserError, match='does not say how long'):
        get(patient, site, tmp_path)
    site.acts = [answer(200, DATA, True)]
    get(patient, site, tmp_path, size=len(DATA))
    assert (tmp_path/'out'/'a.bin').read_bytes() == DATA

@pytest.mark.parametrize('act', [
    endless(), endless(Content_Length=10**12), endless(Content_Length=200),
    endless(Transfer_Encoding='chunked')])
def test_a_body_without_end(site, patient, tmp_path, act):
    site.acts, patient.retries = [act]*9, 3
    address = site.put('/a', DATA)
    try:
        patient.fetch(remote(address, limit=10**6), tmp_path/'out', tmp_path/'parts')
    except UserError as e:
        one_line(e)
    else:
        assert (tmp_path/'out'/'a.bin').stat().st_size == 200             # all that was announced
    assert sum(p.stat().st_size for p in tmp_path.rglob('*') if p.is_file()) <= 10**6 + 1000

def test_an_empty_file_is_none(site, patient, tmp_path):
    with pytest.raises(UserError):
        get(patient, site, tmp_path, b'')

def test_gzip_is_kept_as_it_was_sent(site, patient, tmp_path):
    "The trap of arXiv: `Content-Encoding: x-gzip` on a file that is a .gz"
    packed = gzip.compress(DATA)
    def get_encoded(coding, name, to='out'):
        address = site.put('/a', packed, Content_Encoding=coding)
        patient.fetch(remote(address, name=name), tmp_path/to, tmp_path/'parts')
    for coding in ('x-gzip', 'gzip'):
        get_encoded(coding, 'a.gz', coding)
        assert (tmp_path/coding/'a.gz').read_bytes() == packed
    with pytest.raises(UserError, match="comes encoded as 'gzip'"):
        get_encoded('gzip', 'a.txt')
    with pytest.raises(UserError, match='encoded'):
        get_encoded('br', 'a.gz')

@pytest.mark.parametrize('name', ['a.gz', 'a.bz2', 'a.7z'])
def test_a_page_about_the_file_is_not_the_file(site, patient, tmp_path, name):
    with pytest.raises(UserError, match='does not begin like'):
        get(patient, site, tmp_path, b'<html>Please prove that you are human', name=name)
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('kind', ['md5', 'sha1', 'sha256'])
def test_digests(site, patient, tmp_path, kind):
    right = hashlib.new(kind, DATA).hexdigest()
    address = site.put('/a', DATA)
    patient.fetch(remote(address, digest=f'{kind}:{right.upper()}'), tmp_path/'out', tmp_path/'parts')
    wrong = right.translate(str.maketrans('0123456789abcdef', '123456789abcdef0'))
    with pytest.raises(UserError, match=f'{kind} {right}') as e:
        patient.fetch(remote(address, digest=f'{kind}:{wrong}'), tmp_path/'no', tmp_path/'parts')
    assert one_line(e.value) and not is_temporary(e.value)
    assert not (tmp_path/'no').exists() and [*(tmp_path/'parts').iterdir()] == []

# --- redirects, refusals, time ------------------------------------------------------------------

def test_redirects_are_followed_ten_times(site, patient, tmp_path):
    address = site.put('/a', DATA)
    codes, places = [301, 302, 303, 307, 308], ['/x', 'y', '?z', address, '//' + address[7:]]
    site.acts = [refuse(code, Location=to) for code, to in zip(codes*2, places*2)]
    patient.fetch(remote(f'{site.base}/b'), tmp_path/'out', tmp_path/'parts')
    assert (tmp_path/'out'/'a.bin').read_bytes() == DATA and len(site.asked) == 11

def test_a_loop_of_redirects_ends(site, patient, tmp_path):
    site.acts = [refuse(302, Location='/a')]*50
    with pytest.raises(UserError, match='redirected more than 10 times') as e:
        get(patient, site, tmp_path)
    assert len(site.asked) == 11 and not is_temporary(e.value)

@pytest.mark.parametrize('to', [
    'file:///etc/passwd', 'ftp://127.0.0.1/a', 'javascript:1', 'http://[', '', 'gopher://x', 'data:,x'])
def test_a_redirect_leads_to_the_web_only(site, patient, tmp_path, to):
    site.acts = [refuse(302, Location=to)]
    with pytest.raises(UserError, match='is not followed') as e:
        get(patient, site, tmp_path)
    assert one_line(e.value) and len(site.asked) == 1

def test_a_redirect_does_not_leave_the_secure_web():
    with pytest.raises(UserError):
        download._follow('https://example.org/a', 'http://example.org/a')
    assert download._follow('https://example.org/a', '/b') == 'https://example.org/b'
    assert download._follow('http://example.org/a', 'https://example.org/b') == 'https://example.org/b'

@pytest.mark.parametrize('status', [429, 500, 502, 503, 504, 408])
def test_a_server_that_asks_for_time_gets_it(site, patient, tmp_path, status):
    times = '77', 'Fri, 01 Jan 2010 00:00:00 GMT', 'soon'
    site.acts = [*(refuse(status, Retry_After=after) for after in times), refuse(status)]
    get(patient, site, tmp_path)
    assert (tmp_path/'out'/'a.bin').read_bytes() == DATA
    assert patient.slept[0] == 77 and all(0 < s <= 60 for s in patient.slept[1:]) and len(patient.said) == 4

@pytest.mark.parametrize('after', ['3600', '9'*30, '9'*6000, 'Fri, 01 Jan 2100 00:00:00 GMT'])
def test_who_asks_for_an_hour_gets_the_end(site, patient, tmp_path, after):
    site.acts = [refuse(503, Retry_After=after)]*20
    with pytest.raises(TemporaryError) as e:
        get(patient, site, tmp_path)
    one_line(e.value)
    assert sum(patient.slept) < 600

@pytest.mark.parametrize('status', [400, 401, 403, 404, 410, 418, 451, 999])
def test_what_will_not_pass_is_not_tried_again(site, patient, tmp_path, status):
    site.acts = [refuse(status)]
    with pytest.raises(UserError, match=str(status)) as e:
        get(patient, site, tmp_path)
    assert one_line(e.value) and not is_temporary(e.value) and patient.slept == [] and len(site.asked) == 1

def test_a_server_that_trickles(site, tmp_path):
    "A byte now and then; the clock of the fetcher runs fast"
    done = threading.Event()
    def trickle(handler, site):
        handler.head(200, Content_Length=len(DATA), ETag='"1"')
        for i in range(200):
            if done.wait(.002): break
            handler.wfile.write(DATA[i:i + 1])
            handler.wfile.flush()
        handler.close_connection = True
    clock = iter(range(0, 10**6, 30))
    site.acts = [trickle]*5
    web = Fetcher(retries=1, sleep=lambda s: None, now=lambda: next(clock), report=lambda line: None)
    with pytest.raises(TemporaryError, match='less than 1,024 bytes per second'):
        get(web, site, tmp_path)
    done.set()

def test_a_server_that_is_silent(site, patient, tmp_path, monkeypatch):
    done = threading.Event()
    def silent(handler, site):
        handler.head(200, Content_Length=len(DATA), ETag='"1"')
        done.wait(10)
    monkeypatch.setattr(download, '_SILENCE', .05)
    site.acts, patient.retries = [silent]*2, 1
    with pytest.raises(TemporaryError, match='does not answer in time'):
        get(patient, site, tmp_path)
    done.set()

def test_pauses_between_requests(site, tmp_path, monkeypatch):
    "What a host asks for lies between the beginnings of its requests, also those that follow a failure"
    monkeypatch.setitem(download.DELAYS, '127.0.0.1', 100)
    now, begins = [0.], []
    def sleep(s): now[0] += s
    web = Fetcher(sleep=sleep, now=lambda: now[0], report=lambda line: None)
    request = web._pool
    monkeypatch.setattr(web, '_pool', lambda address: begins.append(now[0]) or request(address))
    site.acts = [refuse(302, Location='/a'), cut(10), normal, normal]
    for name in ('a.bin', 'b.bin'): get(web, site, tmp_path, name=name)
    assert len(begins) == 4 and all(b - a >= 100 for a, b in zip(begins, begins[1:]))

def test_one_connection_serves_all_requests(site, patient, tmp_path):
    ports = []
    def noting(handler, site):
        ports.append(handler.client_address[1])
        normal(handler, site)
    site.acts = [noting]*4
    for i in range(4): get(patient, site, tmp_path, name=f'{i}.bin')
    assert len(set(ports)) == 1

def test_pauses_grow_and_differ(site, patient, tmp_path):
    site.acts = [refuse(503)]*6
    get(patient, site, tmp_path)
    for i, pause in enumerate(patient.slept, 1): assert min(2**i, 60)/2 <= pause <= min(2**i, 60)

def test_progress_resets_the_count_but_a_server_that_starts_over_does_not(site, patient, tmp_path,
                                                                          monkeypatch):
    monkeypatch.setattr(download, '_PROGRESS', 10_000)
    site.acts = [cut(10_000)]*19
    get(patient, site, tmp_path)       # 19 failures, each with progress
    assert (tmp_path/'out'/'a.bin').read_bytes() == DATA
    def restarts(handler, site):
        site.put('/a', DATA, f'"{len(site.asked)}"')
        cut(10_000 if len(site.asked) % 2 else 0)(handler, site)
    site.acts, site.asked = [restarts]*1000, []
    with pytest.raises(TemporaryError):
        get(patient, site, tmp_path, to='no')
    assert len(site.asked) < 20

# --- the world ----------------------------------------------------------------------------------

def test_nobody_listens(patient, tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        address = f'http://127.0.0.1:{s.getsockname()[1]}/a'
    with pytest.raises(TemporaryError) as e:
        patient.fetch(remote(address), tmp_path/'out', tmp_path/'parts')
    assert 'refused' in one_line(e.value) and len(patient.slept) == patient.retries

@pytest.mark.parametrize('number, passing', [(socket.EAI_NONAME, False), (socket.EAI_AGAIN, True)])
def test_a_host_that_is_not_known(patient, tmp_path, monkeypatch, number, passing):
    def unknown(*args, **kw): raise socket.gaierror(number, 'no')
    monkeypatch.setattr(socket, 'getaddrinfo', unknown)
    with pytest.raises(UserError) as e:
        patient.fetch(remote('http://example.org/a'), tmp_path/'out', tmp_path/'parts')
    assert 'example.org' in one_line(e.value) and is_temporary(e.value) == passing

def test_a_certificate_that_is_not_valid(site, patient, tmp_path, monkeypatch):
    why = '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate'
    def bad(*args, **kw): raise ssl.SSLCertVerificationError(1, why)
    monkeypatch.setattr(ssl.SSLContext, 'wrap_socket', bad)
    address = site.base.replace('http', 'https') + '/a'
    with pytest.raises(UserError, match='certificate') as e:
        patient.fetch(remote(address), tmp_path/'out', tmp_path/'parts')
    assert one_line(e.value) and not is_temporary(e.value) and site.asked == []

def test_a_server_that_does_not_speak_tls(site, patient, tmp_path):
    patient.retries = 1
    address = site.base.replace('http', 'https') + '/a'
    with pytest.raises(TemporaryError, match='secure connection') as e:
        patient.fetch(remote(address), tmp_path/'out', tmp_path/'parts')
    one_line(e.value)

@pytest.mark.parametrize('address', [
    '', 'a', 'ftp://127.0.0.1/a', 'file:///etc/passwd', 'http://', 'http://' + 'a'*300 + '.org/',
    'http://127.0.0.1:99999/'])
def test_what_is_no_address(patient, tmp_path, address):
    with pytest.raises(UserError) as e:
        patient.fetch(remote(address), tmp_path/'out', tmp_path/'parts')
    one_line(e.value)

def test_a_proxy_of_the_environment(site, patient, tmp_path, monkeypatch):
    site.files['http://example.org/a'] = DATA, {}
    monkeypatch.setenv('http_proxy', site.base.replace('//', '//me:secret@'))
    monkeypatch.delenv('no_proxy', raising=False)
    monkeypatch.delenv('NO_PROXY', raising=False)
    patient.fetch(remote('http://example.org/a'), tmp_path/'out', tmp_path/'parts')
    path, headers = site.asked[0]
    assert path == 'http://example.org/a' and headers['proxy-authorization'].startswith('Basic ')

class Full(io.FileIO):
    def write(self, data):
        if self.tell() > 50_000: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)

def test_a_disk_that_is_full(site, patient, tmp_path, monkeypatch):
    def narrow(path, mode='r', **kw): return Full(path, 'a') if mode == 'ab' else open(path, mode, **kw)
    monkeypatch.setattr(download, 'open', narrow, raising=False)
    with pytest.raises(TemporaryError, match='No space left') as e:
        get(patient, site, tmp_path)
    assert 'a.bin' in one_line(e.value) and not (tmp_path/'out').exists()
    monkeypatch.undo()
    get(patient, site, tmp_path)
    assert (tmp_path/'out'/'a.bin').read_bytes() == DATA and site.ranges()[1].startswith('bytes=')

def test_a_disk_without_room_is_told_before_anything_comes(site, patient, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, 'disk_usage', lambda path: type('', (), {'free': 1000}))
    with pytest.raises(TemporaryError, match='has room for 1,000 bytes'):
        get(patient, site, tmp_path)
    assert [*tmp_path.rglob('*.part')] == []

def test_a_file_where_a_folder_should_be(site, patient, tmp_path):
    (tmp_path/'out').write_text('')
    with pytest.raises(UserError) as e:
        patient.fetch(remote(site.put('/a', DATA)), tmp_path/'out'/'in', tmp_path/'parts')
    assert str(tmp_path/'out') in one_line(e.value) and not is_temporary(e.value)

# --- any sequence of failures -------------------------------------------------------------------

def some_act(rng):
    def span(): return f'bytes {rng.randrange(200)}-{len(DATA) - 1}/{len(DATA)}'
    kinds = [lambda: cut(rng.choice([0, 1, 100, rng.randrange(len(DATA)), len(DATA) - 1])), lambda: reset,
             lambda: nonsense,
             lambda: refuse(rng.choice([429, 500, 503]), Retry_After=rng.choice([None, '3', 'x'])),
             lambda: refuse(rng.choice([404, 403])),
             lambda: change(rng.choice([OTHER, DATA, OTHER[:9999]]), f'"{rng.randrange(3)}x"'),
             lambda: deaf(change(OTHER, '"9"')), lambda: chunked(rng.randrange(len(DATA)), end=False),
             lambda: chunked(), lambda: refuse(302, Location='/a'), lambda: refuse(416),
             lambda: answer(206, OTHER[:50], Content_Length=50, ETag='"1"', Content_Range=span()),
             lambda: answer(200, DATA[:77], True, Content_Length=len(DATA), ETag='"1"')]
    return rng.choice(kinds)()

@pytest.mark.parametrize('seed', range(80))
def test_any_sequence_of_failures_ends_in_the_bytes_or_in_one_line(site, patient, tmp_path, seed):
    "... and a second call, by another process, goes on from what is kept"
    rng = random.Random(seed)
    address = site.put('/a', DATA)
    site.acts = [some_act(rng) for _ in range(rng.randrange(1, 9))]
    patient.retries = rng.randrange(4)
    if rng.random() < .3: site.acts.insert(0, cut(rng.randrange(1, len(DATA))))
    out, parts = tmp_path/'out', tmp_path/'parts'
    whole = {DATA, OTHER, OTHER[:9999]}
    try:
        patient.fetch(remote(address), out, parts)
    except UserError as e:
        one_line(e)
        assert not out.exists()
    else:
        assert (out/'a.bin').read_bytes() in whole and [*parts.iterdir()] == []
    site.acts, site.sent, asked = [], 0, len(site.asked)
    part = download._Part(parts, 'a.bin')
    kept, same = part.size, part.version().get('validator') == site.files['/a'][1]['ETag']
    now = site.files['/a'][0]
    if kept and same: assert part.path.read_bytes() == now[:kept]       # the beginning of that version
    again = Fetcher(sleep=lambda s: None, report=lambda line: None)
    again.fetch(remote(address), out, parts)
    assert (out/'a.bin').read_bytes() == now
    if kept and same: assert site.sent == len(now) - kept and len(site.asked) == asked + (kept < len(now))

def test_a_process_that_is_killed(site, start, wait_for, tmp_path):
    "kill -9 in the middle: the next call goes on"
    done = threading.Event()
    book = b'A book. '*20_000
    for i in fetch.BOOKS:
        site.put(f'/gutenberg.pglaf.org/cache/epub/{i}/pg{i}.txt', book + bytes([48 + i % 10]))
    def stall(handler, site):
        status, data, headers = part_of(handler, site)
        handler.head(status, Content_Length=len(data), **headers)
        send(handler, site, data[:100_000])
        handler.wfile.flush()
        done.wait(60)
        handler.close_connection = True
    site.acts = [normal, stall]
    process = start('data', 'fetch', 'books', tmp_path, '--mirror', site.base)
    part = tmp_path/'.parts'/'books'/f'pg{fetch.BOOKS[1]}.txt.part'
    wait_for(lambda: part.exists() and part.stat().st_size > 60_000, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done.set()
    assert [p.name for p in (tmp_path/'books').iterdir()] == [f'pg{fetch.BOOKS[0]}.txt']
    kept = part.stat().st_size
    site.asked.clear()
    fetch.fetch_source('books', tmp_path, Fetcher(site.base, report=lambda line: None))
    assert site.ranges()[0] == f'bytes={kept}-' and len(site.asked) == 3
    for i in fetch.BOOKS: assert (tmp_path/'books'/f'pg{i}.txt').read_bytes() == book + bytes([48 + i % 10])

# --- sources, lists, the account ----------------------------------------------------------------

SEGMENT = f'crawl-data/{fetch.CRAWL}/segments/1550247479101.30/wet'
PATHS = f'{fetch._CRAWLS}/crawl-data/{fetch.CRAWL}/wet.paths.gz'
SUMS = f'{fetch._DUMPS}/{fetch.WIKI}/latest/{fetch.WIKI}-latest-sha1sums.txt'
POINTER = f'{fetch._C4}/raw/{fetch._C4_VERSION}/en/c4-train.00000-of-01024.json.gz'
FILES = f'{fetch._ITEM}/stackexchange_files.xml'

def packed(data): return gzip.compress(data, mtime=0)

@dataclass
class World:
    "The seven places as folders of one server"
    site: Site
    def put(self, address, data): return self.site.put('/' + address.removeprefix('https://'), data)

@pytest.fixture
def world(site):
    it = World(site)
    paths = [f'{SEGMENT}/CC-MAIN-0000{i}.warc.wet.gz' for i in range(5)]
    it.put(PATHS, packed('\n'.join(paths).encode() + b'\n'))
    for p in paths: it.put(f'{fetch._CRAWLS}/{p}', packed(p.encode()))
    for i in range(3):
        name, data = f'c4-train.{i:05}-of-01024.json.gz', packed(b'{"text": "%d"}\n' % i)
        pointer = ('version https://git-lfs.github.com/spec/v1\n'
                   f'oid sha256:{hashlib.sha256(data).hexdigest()}\nsize {len(data)}\n')
        it.put(f'{fetch._C4}/raw/{fetch._C4_VERSION}/en/{name}', pointer.encode())
        it.put(f'{fetch._C4}/resolve/{fetch._C4_VERSION}/en/{name}', data)
    dump(it, '20261101', b'BZh9 november')
    site_7z = b"7z\xbc\xaf'\x1c posts"
    it.put(f'{fetch._ITEM}/{fetch.SITE}.7z', site_7z)
    it.put(FILES, files_xml(hashlib.sha1(site_7z).hexdigest(), len(site_7z)))
    for name in ('github', 'books', 'arxiv'):
        for r in fetch.SOURCES[name].find(None, 1):
            it.put(r.address, packed(r.name.encode()) if r.name.endswith('gz') else r.name.encode())
    return it

def dump(world, day, data):
    name = f'{fetch.WIKI}-{day}-pages-articles.xml.bz2'
    other = f'{"0"*40}  {fetch.WIKI}-{day}-pages-articles-multistream.xml.bz2\n'
    world.put(SUMS, f'{other}{hashlib.sha1(data).hexdigest()}  {name}\n'.encode())
    world.put(f'{fetch._DUMPS}/{fetch.WIKI}/{day}/{name}', data)

def files_xml(sha1, size, name=f'{fetch.SITE}.7z'):
    return ('<files><file name="x.7z"><size>1</size></file>'
            f'<file name="{name}"><size>{size}</size><md5>0</md5><sha1>{sha1}</sha1></file></files>').encode()

@pytest.fixture
def quick(world, monkeypatch):
    "`llama-nb data fetch ...` in this process, from the mirror, without sleeping: exit code"
    monkeypatch.setattr(fetch, 'Fetcher', functools.partial(Fetcher, sleep=lambda s: None))
    return lambda *args: main(['data', 'fetch', *map(str, args), '--mirror', world.site.base])

def files_of(folder):
    found = (p for p in folder.rglob('*') if p.is_file() and '.parts' not in p.parts)
    return sorted(p.relative_to(folder).as_posix() for p in found)

def test_all_seven(quick, world, tmp_path, capsys):
    assert quick('all', tmp_path/'o') == 0
    names = files_of(tmp_path/'o')
    assert {n.split('/')[0] for n in names} == {*fetch.SOURCES, 'fetched.json'} and len(names) == 16
    account = json.loads((tmp_path/'o'/'fetched.json').read_text())
    assert sorted(account['files']) == [n for n in names if n != 'fetched.json']
    for name, row in account['files'].items():
        data = (tmp_path/'o'/name).read_bytes()
        assert row['sha256'] == hashlib.sha256(data).hexdigest() and row['bytes'] == len(data)
        assert row['address'].startswith('https://') and row['from'].startswith('http://127.')
        assert row['licence'] and row['etag'] == '"1"'
    assert sum(bool(row['stated']) for row in account['files'].values()) == 3
    world.site.asked.clear()
    capsys.readouterr()
    assert quick('all', tmp_path/'o') == 0 and world.site.asked == []
    assert capsys.readouterr().out.count('was there') == 15

def test_listing_asks_nobody_and_makes_nothing(quick, world, tmp_path, capsys):
    assert quick('all', tmp_path/'o', '--list') == 0
    out = capsys.readouterr().out
    assert all(f'{name}: ' in out for name in fetch.SOURCES)
    assert out.count('licence: ') == 7 and out.count('https://') >= 7
    assert world.site.asked == [] and not (tmp_path/'o').exists()

def test_more_files(quick, tmp_path):
    assert quick('commoncrawl', tmp_path, '--files', 3) == 0 and quick('c4', tmp_path, '--files', 2) == 0
    assert len(files_of(tmp_path/'commoncrawl')) == 3 and len(files_of(tmp_path/'c4')) == 2
    assert quick('commoncrawl', tmp_path, '--files', 6) == 2                    # the list has five
    assert quick('books', tmp_path, '--files', 0) == 2

def test_the_plan_stays_when_the_world_moves_on(quick, world, tmp_path):
    world.site.acts = [normal, refuse(404)]
    assert quick('wikipedia', tmp_path) == 2
    dump(world, '20261201', b'BZh9 december')
    assert quick('wikipedia', tmp_path) == 0
    assert files_of(tmp_path/'wikipedia') == [f'{fetch.WIKI}-20261101-pages-articles.xml.bz2']

def test_a_file_that_was_changed_or_removed_here_comes_again(quick, world, tmp_path):
    assert quick('books', tmp_path) == 0
    first, second = (tmp_path/'books'/f'pg{i}.txt' for i in fetch.BOOKS[:2])
    was = first.read_bytes()
    first.write_bytes(was[::-1])
    second.unlink()
    world.site.asked.clear()
    assert quick('books', tmp_path) == 0 and len(world.site.asked) == 2
    assert first.read_bytes() == was and second.exists()

def test_exit_codes_and_lines(quick, world, tmp_path, capsys):
    cases = [(['wikipdia', tmp_path], 2, "did you mean 'wikipedia'"), (['books'], 2, ''),
             (['books', tmp_path, '--mirorr', 'x'], 2, '')]
    for args, code, text in cases:
        assert quick(*args) == code
        err = capsys.readouterr().err
        assert text in err and err.count('\n') == 1
    world.site.acts = [refuse(503)]*100
    assert quick('books', tmp_path) == 75 and capsys.readouterr().err.count('\n') == 1
    world.site.acts = [refuse(404)]
    assert quick('books', tmp_path) == 2 and '404 Not Found' in capsys.readouterr().err
    (tmp_path/'file').write_text('')
    assert quick('books', tmp_path/'file') == 2 and capsys.readouterr().err.count('\n') == 1
    assert quick('books', tmp_path/'file'/'in') == 2 and capsys.readouterr().err.count('\n') == 1
    assert main(['data', 'fetch', 'books', str(tmp_path/'m'), '--mirror', 'nowhere']) == 2

def test_one_source_that_fails_does_not_stop_the_others(quick, world, tmp_path, capsys):
    del world.site.files['/export.arxiv.org/e-print/' + fetch.PAPERS[1]]
    assert quick('all', tmp_path) == 2
    said = capsys.readouterr()
    assert '1 of 7 sources are not complete: arxiv' in said.err and said.err.count('\n') == 1
    assert '404' in said.out
    assert len(files_of(tmp_path/'stackexchange')) == 1 and len(files_of(tmp_path/'arxiv')) == 1

def test_two_at_once(quick, tmp_path, capsys):
    with fetch._alone(tmp_path/'.parts'): assert quick('books', tmp_path) == 2
    assert 'another fetch works in' in capsys.readouterr().err
    assert quick('books', tmp_path) == 0

@pytest.mark.parametrize('text', [
    '', '{', '[]', '3', 'null', '{"plans": 3}', '{"plans": {"books": [{}]}}', '{"plans": {"books": 3}}',
    '{"files": [1]}', '{"files": {"books/pg11.txt": [1]}}',
    '{"plans": {"books": [{"address": 1, "name": "a", "licence": "", "limit": 1}]}}',
    '{"plans": {"books": [{"address": "a", "name": "a", "licence": "", "limit": "1"}]}}',
    '{"plans": {"books": [3]}}', '\udc80'])
def test_a_damaged_account(quick, tmp_path, capsys, text):
    (tmp_path/'fetched.json').write_bytes(text.encode('utf-8', 'surrogateescape'))
    assert quick('books', tmp_path) == 2
    err = capsys.readouterr().err
    assert 'fetched.json is damaged: ' in err and '; remove it' in err and err.count('\n') == 1

def test_an_account_that_names_a_way_out(quick, world, tmp_path, capsys):
    row = {'address': 'https://gutenberg.pglaf.org/cache/epub/11/pg11.txt', 'name': '../../evil',
           'licence': '', 'limit': 10**6, 'digest': '', 'size': 0}
    (tmp_path/'o').mkdir()
    (tmp_path/'o'/'fetched.json').write_text(json.dumps({'plans': {'books': [row]}}))
    assert quick('books', tmp_path/'o') == 2 and not [*tmp_path.rglob('evil')]

BAD_LISTS = {'html': b'<html>Sign in to the network</html>', 'empty': b'',
             'noise': random.Random(3).randbytes(3000), 'nul': bytes(100),
             'half': packed(b'crawl-data/x')[:15]}

@pytest.mark.parametrize('source, address', [
    ('commoncrawl', PATHS), ('wikipedia', SUMS), ('c4', POINTER), ('stackexchange', FILES)],
    ids=['commoncrawl', 'wikipedia', 'c4', 'stackexchange'])
@pytest.mark.parametrize('name', BAD_LISTS)
def test_a_list_that_is_none(quick, world, tmp_path, capsys, source, address, name):
    world.put(address, BAD_LISTS[name])
    assert quick(source, tmp_path) == 2
    assert 'is not the list that was expected' in capsys.readouterr().err
    assert files_of(tmp_path) == []

@pytest.mark.parametrize('path', [
    'crawl-data/../../x.warc.wet.gz', '/etc/passwd', 'https://evil.example/x.warc.wet.gz', 'crawl-data/x.exe',
    'crawl-data/a b.warc.wet.gz', 'crawl-data/.warc.wet.gz', 'crawl-data/x?.warc.wet.gz', ''])
def test_a_list_whose_names_go_up(quick, world, tmp_path, path):
    world.put(PATHS, packed(f'{path}\n'.encode()))
    world.put(f'{fetch._CRAWLS}/{path}', packed(b'x'))
    assert quick('commoncrawl', tmp_path/'o') == 2
    assert files_of(tmp_path) == [] and len(world.site.asked) == 1

def test_a_list_that_is_a_bomb(quick, world, tmp_path):
    world.put(PATHS, packed(bytes(2*10**7)))
    assert quick('commoncrawl', tmp_path) == 2
    entities = ''.join(f'<!ENTITY {b} "{f"&{a};"*10}">' for a, b in zip('abcdefgh', 'bcdefghi'))
    laughs = f'<!DOCTYPE x [<!ENTITY a "ha">{entities}]><files><file name="&i;"/></files>'
    world.put(FILES, laughs.encode())
    assert quick('stackexchange', tmp_path) == 2

def test_a_list_without_end(quick, world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch, '_LIST', 2**20)
    world.site.acts = [endless()]
    assert quick('wikipedia', tmp_path) == 2 and 'has more than 1,048,576 bytes' in capsys.readouterr().err

def test_digests_of_the_lists_are_compared(quick, world, tmp_path, capsys):
    dump(world, '20261101', b'BZh9 november')
    name = f'{fetch.WIKI}-20261101-pages-articles.xml.bz2'
    world.put(f'{fetch._DUMPS}/{fetch.WIKI}/20261101/{name}', b'BZh9 nOvember')
    assert quick('wikipedia', tmp_path) == 2 and 'sha1' in capsys.readouterr().err
    assert files_of(tmp_path) == ['fetched.json']

def tarred(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz') as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()

def test_the_readers_take_what_was_fetched(quick, world, tmp_path):
    "Names and bytes as the pages of the sources want them"
    pytest.importorskip('warcio')
    from llama_nb.data.archive import read_warc
    from llama_nb.data.arxiv import read_arxiv
    from llama_nb.data.books import read_books
    from llama_nb.data.github import read_project
    from llama_nb.data.stackexchange import site_of
    from llama_nb.data.mediawiki import read_wikipedia, write_export
    from llama_nb.data.documents import Document
    body = b'A title\nA page of the web.\n'
    record = (b'WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: https://example.org/\r\n'
              b'WARC-Record-ID: <urn:uuid:1>\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n' % (len(body), body))
    world.put(f'{fetch._CRAWLS}/{SEGMENT}/CC-MAIN-00000.warc.wet.gz', packed(record))
    page = Document('A page of a wiki.', 'Page', 'x')
    dump(world, '20261101', bz2.compress(b''.join(write_export([page], 'sl'))))
    project = {'p-1/LICENSE': 'MIT License\n',
               'p-1/pyproject.toml': '[project]\nname = "p"\nlicense = "MIT"\n', 'p-1/a.py': 'x = 1\n'}
    paper = {'main.tex': '\\documentclass{article}\n\\begin{document}\\section{A}Text\\end{document}'}
    for name, files in (('github', project), ('arxiv', paper)):
        for remote in fetch.SOURCES[name].find(None, 1): world.put(remote.address, tarred(files))
    for name in ('commoncrawl', 'github', 'wikipedia', 'books', 'arxiv'): assert quick(name, tmp_path) == 0
    readers = {'commoncrawl': read_warc, 'github': read_project, 'wikipedia': read_wikipedia,
               'books': read_books, 'arxiv': read_arxiv}
    docs = {name: [doc for p in sorted((tmp_path/name).iterdir()) for doc in read(p)]
            for name, read in readers.items()}
    numbers = {'commoncrawl': 1, 'github': 3, 'wikipedia': 1, 'books': 4, 'arxiv': 4}
    assert {name: len(found) for name, found in docs.items()} == numbers
    assert all(doc.text for found in docs.values() for doc in found) and docs['github'][0].licence == 'MIT'
    assert site_of(f'{fetch.SITE}.7z') == fetch.SITE

def test_a_package_that_is_missing(tmp_path, monkeypatch, capsys):
    def missing(name, needs): raise UserError(f"{needs} the {name} package: pip install 'llama_nb[data]'")
    monkeypatch.setattr(download, 'extra_module', missing)
    assert main(['data', 'fetch', 'books', str(tmp_path)]) == 2
    assert 'fetching needs the urllib3 package' in capsys.readouterr().err

def test_figures_of_the_whole_say_what_they_are():
    figures = [f for whole in fetch.WHOLE.values() for f in (whole.raw, whole.text, whole.clean)]
    assert {f.kind for f in figures} == {'published', 'assumed'} and all(f.origin for f in figures)
    shown = [str(fetch.Figure(1234.5, kind)) for kind in ('published', 'measured', 'assumed', 'computed')]
    assert len(set(shown)) == 4 and shown[0] == '1,234'
    with pytest.raises(KeyError):
        str(fetch.Figure(1, 'guessed'))
    assert replace(fetch.Figure(1, 'published'), value=2).value == 2
