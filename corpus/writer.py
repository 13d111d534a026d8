"""Write the files of a dataset into the .packing folder below it, and publish them all at once."""
import json
import os
import re
import shutil
import sqlite3
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from files import lock, read_json, sync_folder, write_atomically

IDX_DTYPE = np.dtype('<i8')
UNFINISHED = b'{"format": 1, "unfinished": true}'
DATASET_FILE = re.compile(r'(train|val)(_\d+)?\.(bin|mask|idx)|meta\.pkl')


class Unusable(Exception):
    """Raised for the files of an unfinished run that are not as it wrote them."""


class SplitFiles:
    """The files of one split while they are written: .bin files one after the other, .idx, perhaps .mask.

    entry   the split's entry in meta.json; given one, its files are continued where it says that they end
    raises  Unusable for a file that ends before
    """

    def __init__(self, work, name, dtype, *, shard_tokens=None, masked=False, entry=None):
        self.work, self.name, self.dtype, self.shard_tokens = work, name, np.dtype(dtype), shard_tokens
        self.entry = entry or {'tokens': 0, 'bytes': 0, 'documents': 0, 'shards': []}
        self.idx = self.open(f'{name}.idx', self.entry['documents'] * IDX_DTYPE.itemsize * 2)
        self.mask = self.open(f'{name}.mask', self.entry['tokens']) if masked else None
        self.bin = None
        for shard in self.entry['shards']:
            file = self.open(shard['file'], shard['tokens'] * self.dtype.itemsize)
            if shard['tokens'] == shard_tokens:
                file.close()
            else:
                self.bin = file

    def open(self, name, size):
        """Open a file to be written from `size` on; what lies beyond is cut off."""
        path = self.work / name
        if size and (not path.exists() or path.stat().st_size < size):
            raise Unusable(f'{name} is shorter than the {size:,} bytes that were written')
        file = open(path, 'r+b' if size else 'wb')
        file.truncate(size)
        file.seek(size)
        return file

    def write_documents(self, documents, eot):
        """Write documents of corpus/encode.py; eot stands between those that take it."""
        if not documents:
            return
        pieces, masks, index, n_tokens = [], [], [], 0
        for document in documents:
            length = len(document.ids)
            if eot is not None and document.takes_eot and (n_tokens or self.entry['tokens']):
                pieces.append([eot])
                masks.append([1])
                n_tokens += 1
            index.append((n_tokens, length))
            pieces.append(document.ids)
            masks.append(np.ones(length, dtype=np.uint8) if document.mask is None else document.mask)
            n_tokens += length
        ids = np.concatenate(pieces, dtype=self.dtype, casting='unsafe')
        mask = np.concatenate(masks, dtype=np.uint8, casting='unsafe')
        self.write(ids, np.array(index), sum(document.n_bytes for document in documents), mask)

    def write(self, ids, index, n_bytes, mask):
        """Append tokens and the documents in them. A document may continue in the next shard.

        index    (D, 2) offset in ids and length of each document
        n_bytes  of the text
        mask     (n,) uint8, 1 where a token is a target
        """
        self.idx.write((index + [self.entry['tokens'], 0]).astype(IDX_DTYPE).tobytes())
        if self.mask is not None:
            self.mask.write(mask.tobytes())
        self.entry['tokens'] += len(ids)
        self.entry['bytes'] += n_bytes
        self.entry['documents'] += len(index)
        while len(ids):
            ids = ids[self.write_to_shard(ids):]

    def write_to_shard(self, ids):
        """Write as many ids as the current shard holds; return their number."""
        shards = self.entry['shards']
        if self.bin is None:
            name = f'{self.name}_{len(shards):06d}.bin' if self.shard_tokens else f'{self.name}.bin'
            shards.append({'file': name, 'tokens': 0, 'crc32': 0})
            self.bin = self.open(name, 0)
        shard = shards[-1]
        if self.shard_tokens:
            ids = ids[:self.shard_tokens - shard['tokens']]
        data = ids.astype(self.dtype).tobytes()
        self.bin.write(data)
        shard['crc32'] = zlib.crc32(data, shard['crc32'])
        shard['tokens'] += len(ids)
        if shard['tokens'] == self.shard_tokens:
            sync(self.bin)
            self.bin.close()
            self.bin = None
        return len(ids)

    def sync(self, close=False):
        for file in (self.idx, self.mask, self.bin):
            if file is not None:
                sync(file)
                if close:
                    file.close()


def sync(file):
    file.flush()
    os.fsync(file.fileno())


class Seen:
    """The hashes of all documents taken so far, on disk. Memory holds at most 64 MB of them.

    path         of the SQLite database; '' is a temporary one
    n_documents  taken so far; documents recorded after these are forgotten
    raises       Unusable for a database that does not hold these documents
    """

    def __init__(self, path, n_documents=0):
        self.database = sqlite3.connect(path)
        try:
            for pragma in ('cache_size=-64000', 'synchronous=off', 'locking_mode=exclusive'):
                self.database.execute(f'pragma {pragma}')
            columns = 'hash integer primary key, document integer'
            self.database.execute(f'create table if not exists seen ({columns})')
            self.database.execute('delete from seen where document >= ?', (n_documents,))
            self.database.commit()
            n_hashes = self.database.execute('select count(*) from seen').fetchone()[0]
        except sqlite3.DatabaseError as error:
            if 'full' in str(error):
                raise
            raise Unusable(f'{os.path.basename(path)}: {error}') from None
        if n_hashes != n_documents:
            raise Unusable(f'{os.path.basename(path)} holds {n_hashes:,} of {n_documents:,} hashes')

    def add(self, value, n_documents):
        """Return whether a hash is new, and remember it as that of document number n_documents."""
        row = (value - 2**64 if value >= 2**63 else value, n_documents)  # SQLite's integers are signed
        return self.database.execute('insert or ignore into seen values (?, ?)', row).rowcount == 1


# -----------------------------------------------------------------------------
# publishing


@contextmanager
def packing_folder(folder):
    """Lock the .packing folder of a dataset and yield its path; first undo an interrupted publication."""
    work = Path(folder) / '.packing'
    work.mkdir(parents=True, exist_ok=True)
    with lock(work):
        undo_publishing(work, Path(folder))
        yield work


def clear(work):
    """Delete all files of a .packing folder but its lock."""
    for path in work.iterdir():
        if path.name == 'replaced':
            shutil.rmtree(path)
        elif path.name != '.lock':
            path.unlink()


def publish(work, folder, meta, masked):
    """Put the files in work in place of the dataset in folder; if that fails, put the old dataset back.

    All bytes are on the disk before the first file is renamed. Until the last rename meta.json says that the
    dataset is unfinished, so that no reader takes a mixture of old and new files for a dataset.
    """
    replaced = work / 'replaced'
    shutil.rmtree(replaced, ignore_errors=True)
    replaced.mkdir()
    if (folder / 'meta.json').exists():
        write_bytes(replaced / 'meta.json', (folder / 'meta.json').read_bytes())
    endings = ['.idx', '.mask'] if masked else ['.idx']
    names = [f'{split}{ending}' for split in meta['splits'] for ending in endings]
    names += [shard['file'] for entry in meta['splits'].values() for shard in entry['shards']]
    write_bytes(work / 'unfinished.json', UNFINISHED)
    write_bytes(work / 'meta.json', json.dumps(meta, indent=1, ensure_ascii=False).encode('utf-8'))
    write_bytes(work / 'publishing.json', json.dumps(names).encode())
    try:
        os.replace(work / 'unfinished.json', folder / 'meta.json')
        for path in list(folder.iterdir()):
            if DATASET_FILE.fullmatch(path.name):
                os.replace(path, replaced / path.name)
        for name in names:
            os.replace(work / name, folder / name)
        sync_folder(folder)
        os.replace(work / 'meta.json', folder / 'meta.json')
    except BaseException:
        undo_publishing(work, folder)
        raise
    sync_folder(folder)


def undo_publishing(work, folder):
    """Bring back the state before publish(), if that was interrupted. This may be interrupted as well."""
    if not (work / 'publishing.json').exists():
        return
    if not (work / 'meta.json').exists():  # it was not interrupted before its end
        clear(work)
        return
    for name in filter(DATASET_FILE.fullmatch, read_json(work / 'publishing.json')):
        if (folder / name).exists() and not (work / name).exists():
            os.replace(folder / name, work / name)
    replaced = work / 'replaced'
    for path in list(replaced.iterdir()):
        if path.name != 'meta.json':
            os.replace(path, folder / path.name)
    meta = folder / 'meta.json'
    if (replaced / 'meta.json').exists():
        os.replace(replaced / 'meta.json', meta)
    elif meta.exists() and meta.read_bytes() == UNFINISHED:
        meta.unlink()
    (work / 'meta.json').unlink()
    (work / 'publishing.json').unlink()


def write_bytes(path, data):
    write_atomically(path, lambda file: file.write(data))
