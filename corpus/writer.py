"""Write a dataset. Its files are written to .packing in its folder, and moved into place at the end.

An error leaves the old dataset as it was. With a recipe, a killed run continues where it last called save():
what it wrote later is cut off and written again.
"""
import contextlib
import hashlib
import json
import os
import re
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files import lock, read_json, sync_folder, write_atomically, write_json
from tokens.dataset import id_dtype

UNFINISHED = b'{"format": 1, "unfinished": true}'  # is meta.json while files are moved
DATASET_FILE = re.compile(r'(train|val)(_\d+)?\.(bin|mask|idx)|meta\.pkl')
MERGE_SEEN = 1 << 20  # hashes in a set, 100 bytes each; the others are in a sorted array, 8 bytes each


class Piece(NamedTuple):
    """Token ids to append: a document, or tokens between documents, such as end-of-text and padding."""

    ids: np.ndarray  # (n,)
    mask: np.ndarray | None = None  # (n,) 1 where a token is a target; None: all are
    n_bytes: int | None = None  # of the document's text; None: this is no document


@dataclass
class Progress:
    recipe: dict | None
    splits: dict  # name -> its entry in meta.json
    sizes: dict  # file -> bytes on the disk
    n_read: int = 0  # documents read so far
    documents: int = 0  # written so far
    last_taken: int = 0  # number of the last one that was read and written


class Unusable(Exception):
    """Raised for an unfinished run whose files are not as it wrote them."""


@contextlib.contextmanager
def writing(folder, tokenizer, splits, **options):
    """Lock a dataset folder and yield its Writer, which takes the same arguments."""
    folder = Path(folder)
    work = folder / '.packing'
    work.mkdir(parents=True, exist_ok=True)
    with lock(work):
        undo_publishing(folder)
        try:
            with contextlib.closing(Writer(folder, tokenizer, splits, **options)) as writer:
                yield writer
        except OSError as error:
            if error.errno is None or error.filename:
                raise  # its message says where
            raise OSError(f'{folder} cannot be written ({error.strerror}): '
                          'make room and run this again') from error


class Writer:
    """A dataset while it is written.

    shard_tokens  tokens of a .bin file; None: one file per split
    masked        whether to write .mask files
    recipe        plain values that the contents depend on; None: the run cannot be continued
    """

    def __init__(self, folder, tokenizer, splits, *, shard_tokens=None, masked=False, recipe=None):
        self.folder, self.work, self.name = folder, folder / '.packing', folder.resolve().name
        self.tokenizer, self.dtype = tokenizer, id_dtype(tokenizer.vocab_size)
        self.splits, self.shard_tokens, self.masked = splits, shard_tokens, masked
        self.recipe = json.loads(json.dumps(recipe))  # as it is read from the file progress
        self.files = {}
        self.seen, self.more_seen = np.array([], dtype='<u8'), set()
        try:
            is_resumed = recipe is not None and self.resume()
        except Unusable as error:
            print(f'{self.name}: the unfinished run cannot be continued ({error}): starting over', flush=True)
            is_resumed = False
        if not is_resumed:
            self.start_over()

    def start_over(self):
        self.close_files()
        clear(self.work)
        entries = {name: {'tokens': 0, 'bytes': 0, 'documents': 0, 'shards': []} for name in self.splits}
        self.progress = Progress(self.recipe, entries, sizes={})
        self.seen, self.more_seen = np.array([], dtype='<u8'), set()

    def resume(self):
        """Continue an unfinished run, if there is one. Raises ValueError if it has another recipe."""
        if not (self.work / 'progress').exists():
            return False
        text = (self.work / 'progress').read_text(encoding='utf-8', errors='replace')
        digest, _, values = text.partition('\n')
        if digest != digest_of(values):
            raise Unusable('progress was altered or cut short')
        try:
            self.progress = Progress(**json.loads(values))
        except TypeError:
            raise Unusable('progress is of another version') from None
        old = self.progress.recipe
        changed = [f'{key}={str(old[key])[:60]}' for key in old if old[key] != self.recipe.get(key)]
        if changed:
            raise ValueError(f'{self.work} holds an unfinished run with {", ".join(changed)}: '
                             'continue it with the same, or delete that folder to start over')
        for name, size in self.progress.sizes.items():
            with open(self.work / name, 'ab') as file:
                if file.tell() < size:
                    raise Unusable(f'{name} is shorter than the {size:,} bytes that were written')
                file.truncate(size)
        if 'seen' in self.progress.sizes:
            self.seen = np.unique(np.fromfile(self.work / 'seen', dtype='<u8'))
            if len(self.seen) < self.progress.documents:
                raise Unusable('seen was altered')
        print(f'{self.name}: continuing after {self.progress.documents:,} documents', flush=True)
        return True

    def append(self, split, pieces):
        """Append Pieces to a split. A document may continue in the next shard."""
        entry = self.progress.splits[split]
        index, offset = [], entry['tokens']
        for piece in pieces:
            if piece.n_bytes is not None:
                index.append((offset, len(piece.ids)))
                entry['bytes'] += piece.n_bytes
            offset += len(piece.ids)
        self.file(f'{split}.idx').write(np.array(index, dtype='<i8').tobytes())
        entry['documents'] += len(index)
        entry['tokens'] = offset
        if self.masked:
            masks = [np.ones(len(piece.ids)) if piece.mask is None else piece.mask for piece in pieces]
            mask = np.concatenate(masks, dtype=np.uint8, casting='unsafe')
            self.file(f'{split}.mask').write(mask.tobytes())

        ids = np.concatenate([piece.ids for piece in pieces], dtype=self.dtype, casting='unsafe')
        shards = entry['shards']
        while len(ids):
            if not shards or shards[-1]['tokens'] == self.shard_tokens:
                self.close_files()  # so that few are open at a time
                name = f'{split}.bin'
                if self.shard_tokens:
                    name = f'{split}_{len(shards):06d}.bin'
                shards.append({'file': name, 'tokens': 0, 'crc32': 0})
            shard, part = shards[-1], ids
            if self.shard_tokens:
                part = ids[:self.shard_tokens - shard['tokens']]
            ids = ids[len(part):]
            self.file(shard['file']).write(part.tobytes())
            shard['crc32'] = zlib.crc32(part, shard['crc32'])
            shard['tokens'] += len(part)

    def is_new(self, value):
        """Tell whether a document's hash is new, and note it."""
        at = np.searchsorted(self.seen, np.uint64(value))
        if value in self.seen[at:at + 1] or value in self.more_seen:
            return False
        self.more_seen.add(value)
        self.file('seen').write(value.to_bytes(8, 'little'))
        if len(self.more_seen) == MERGE_SEEN:
            self.seen = np.union1d(self.seen, np.fromiter(self.more_seen, dtype='<u8'))
            self.more_seen.clear()
        return True

    def empty_split(self):
        """Return the name of a split without tokens, or None."""
        return next((name for name, entry in self.progress.splits.items() if not entry['tokens']), None)

    def save(self):
        """Record the state from which a killed run continues."""
        if self.recipe is not None:
            self.close_files()
            values = json.dumps(asdict(self.progress))
            write_bytes(self.work / 'progress', f'{digest_of(values)}\n{values}'.encode())

    def file(self, name):
        """Open a file to append to it. What a killed run left of an unknown one is overwritten."""
        if name not in self.files:
            mode = 'wb'
            if name in self.progress.sizes:
                mode = 'ab'
            self.files[name] = open(self.work / name, mode)
        return self.files[name]

    def close_files(self):
        """Flush all files to the disk and close them. file() opens them again."""
        for name, file in self.files.items():
            with file:
                file.flush()
                os.fsync(file.fileno())
                self.progress.sizes[name] = file.tell()
        self.files.clear()

    def close(self):
        try:
            self.close_files()
        finally:
            if self.recipe is None:
                shutil.rmtree(self.work, ignore_errors=True)

    def publish(self, source, **more) -> dict:
        """Put the dataset into its folder, or the old one back if that fails. Returns the dict in meta.json.

        While files are moved, meta.json is UNFINISHED, so that no reader takes a mixture for a dataset.
        """
        self.close_files()
        meta = {'format': 1, 'dtype': self.dtype.name, 'vocab_size': self.tokenizer.vocab_size,
                'tokenizer': self.tokenizer.meta(), 'source': source, **more, 'splits': self.progress.splits}
        folder, work, old_meta = self.folder, self.work, self.folder / 'meta.json'
        (work / 'replaced').mkdir(exist_ok=True)
        old = [path.name for path in folder.iterdir() if DATASET_FILE.fullmatch(path.name)]
        moves = [(name, f'.packing/replaced/{name}') for name in old]
        moves += [(f'.packing/{name}', name) for name in self.progress.sizes if name != 'seen']
        if old_meta.exists():
            write_bytes(work / 'old_meta.json', old_meta.read_bytes())
        write_json(work / 'meta.json', meta)
        write_json(work / 'moves.json', moves)
        write_bytes(work / 'unfinished.json', UNFINISHED)
        try:
            os.replace(work / 'unfinished.json', folder / 'meta.json')
            for name, new_name in moves:
                os.replace(folder / name, folder / new_name)
            sync_folder(folder)
            os.replace(work / 'meta.json', folder / 'meta.json')
        except BaseException:
            undo_publishing(folder)
            raise
        sync_folder(folder)
        self.recipe = None  # nothing is left to continue
        return meta


def undo_publishing(folder):
    """Restore the state before an interrupted publish(). This may be interrupted as well."""
    work, meta = folder / '.packing', folder / 'meta.json'
    if not (work / 'moves.json').exists():
        return
    if not meta.exists() or meta.read_bytes() != UNFINISHED:
        if not (work / 'meta.json').exists():  # published: only the cleaning was interrupted
            clear(work)
        return
    for name, new_name in reversed(read_json(work / 'moves.json')):
        if (folder / new_name).exists() and not (folder / name).exists():
            os.replace(folder / new_name, folder / name)
    if (work / 'old_meta.json').exists():
        os.replace(work / 'old_meta.json', meta)
    else:
        meta.unlink()


def clear(work):
    """Delete all files of a .packing folder but its lock."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != '.lock':
            path.unlink()


def write_bytes(path, data):
    write_atomically(path, lambda file: file.write(data))


def digest_of(text):
    return hashlib.sha256(text.encode()).hexdigest()
