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
    sizes: dict  # file -> its bytes
    n_read: int = 0  # documents read so far
    documents: int = 0  # written so far


@contextlib.contextmanager
def writing(folder, tokenizer, splits, **options):
    """Lock a dataset folder and yield its Writer, which takes the same arguments."""
    folder = Path(folder)
    work = folder / '.packing'
    work.mkdir(parents=True, exist_ok=True)
    with lock(work):
        undo_publishing(folder)
        try:
            yield Writer(folder, tokenizer, splits, **options)
        except OSError as error:
            if error.errno is None or error.filename:
                raise  # its message says where
            raise OSError(f'{folder} cannot be written ({error.strerror}): '
                          'make room and run this again') from error
        finally:
            if not (work / 'progress').exists():  # nothing is left to continue
                shutil.rmtree(work, ignore_errors=True)


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
        self.more_seen, self.unsaved_seen = set(), []
        if recipe is None or not self.resume():
            self.start_over()

    def start_over(self):
        for path in self.work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != '.lock':
                path.unlink()
        self.seen = np.array([], dtype='<u8')
        entries = {name: {'tokens': 0, 'bytes': 0, 'documents': 0, 'shards': []} for name in self.splits}
        self.progress = Progress(self.recipe, entries, sizes={})

    def resume(self):
        """Continue an unfinished run, if there is one. Raises ValueError if it has another recipe."""
        if not (self.work / 'progress').exists():
            return False
        damage = self.read_progress()
        if damage:
            print(f'{self.name}: the unfinished run cannot be continued ({damage}): starting over')
            return False
        print(f'{self.name}: continuing after {self.progress.documents:,} documents', flush=True)
        return True

    def read_progress(self):
        """Read the state of an unfinished run, and cut off what it wrote later. Returns what is damaged."""
        text = (self.work / 'progress').read_text(encoding='utf-8', errors='replace')
        digest, _, values = text.partition('\n')
        if digest != digest_of(values):
            return 'progress was altered or cut short'
        try:
            self.progress = Progress(**json.loads(values))
        except TypeError:
            return 'progress is of another version'
        old = self.progress.recipe
        changed = [f'{key}={str(old[key])[:60]}' for key in old if old[key] != self.recipe.get(key)]
        if changed:
            raise ValueError(f'{self.work} holds an unfinished run with {", ".join(changed)}: '
                             'continue it with the same, or delete that folder to start over')
        for name, size in self.progress.sizes.items():
            with open(self.work / name, 'ab') as file:
                if file.tell() < size:
                    return f'{name} is shorter than the {size:,} bytes that were written'
                file.truncate(size)
        if 'seen' in self.progress.sizes:
            self.seen = np.unique(np.fromfile(self.work / 'seen', dtype='<u8'))
            if len(self.seen) < self.progress.documents:
                return 'seen was altered'
        return None

    def append(self, split, pieces):
        """Append Pieces to a split. A document may continue in the next shard."""
        entry = self.progress.splits[split]
        ids = np.concatenate([piece.ids for piece in pieces], dtype=self.dtype, casting='unsafe')
        mask, index, end = np.ones(len(ids), dtype=np.uint8), [], 0
        for piece in pieces:
            begin, end = end, end + len(piece.ids)
            if piece.mask is not None:
                mask[begin:end] = piece.mask
            if piece.n_bytes is not None:
                index.append((entry['tokens'] + begin, end - begin))
                entry['bytes'] += piece.n_bytes
        entry['documents'] += len(index)
        entry['tokens'] += end
        self.write(f'{split}.idx', np.array(index, dtype='<i8'))
        if self.masked:
            self.write(f'{split}.mask', mask)

        shards = entry['shards']
        while len(ids):
            if not shards or shards[-1]['tokens'] == self.shard_tokens:
                name = f'{split}.bin'
                if self.shard_tokens:
                    name = f'{split}_{len(shards):06d}.bin'
                shards.append({'file': name, 'tokens': 0, 'crc32': 0})
            shard, part = shards[-1], ids
            if self.shard_tokens:
                part = ids[:self.shard_tokens - shard['tokens']]
            ids = ids[len(part):]
            self.write(shard['file'], part)
            shard['crc32'] = zlib.crc32(part, shard['crc32'])
            shard['tokens'] += len(part)

    def write(self, name, array):
        """Append an array to a file. What a killed run left of an unknown file is cut off."""
        sizes = self.progress.sizes
        with open(self.work / name, 'ab') as file:
            file.truncate(sizes.setdefault(name, 0))
            file.write(array.tobytes())
        sizes[name] += array.nbytes

    def is_new(self, value):
        """Tell whether a document's hash is new, and note it. The document is written next."""
        at = np.searchsorted(self.seen, np.uint64(value))
        if value in self.seen[at:at + 1] or value in self.more_seen:
            return False
        self.more_seen.add(value)
        self.unsaved_seen.append(value)
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
            if self.unsaved_seen:
                self.write('seen', np.array(self.unsaved_seen, dtype='<u8'))
                self.unsaved_seen.clear()
            self.sync()
            values = json.dumps(asdict(self.progress))
            write_bytes(self.work / 'progress', f'{digest_of(values)}\n{values}'.encode())

    def sync(self):
        for name in self.progress.sizes:
            with open(self.work / name, 'rb+') as file:
                os.fsync(file.fileno())

    def publish(self, source, **more) -> dict:
        """Put the dataset into its folder, or the old one back if that fails. Returns the dict in meta.json.

        While files are moved, meta.json is UNFINISHED, so that no reader takes a mixture for a dataset.
        """
        self.sync()
        meta = {'format': 1, 'dtype': self.dtype.name, 'vocab_size': self.tokenizer.vocab_size,
                'tokenizer': self.tokenizer.meta(), 'source': source, **more, 'splits': self.progress.splits}
        folder, work, old_meta = self.folder, self.work, None
        (work / 'replaced').mkdir(exist_ok=True)
        old = [path.name for path in folder.iterdir() if DATASET_FILE.fullmatch(path.name)]
        moves = [(name, f'.packing/replaced/{name}') for name in old]
        moves += [(f'.packing/{name}', name) for name in self.progress.sizes if name != 'seen']
        if (folder / 'meta.json').exists():
            old_meta = (folder / 'meta.json').read_text(encoding='utf-8', errors='replace')
        write_json(work / 'meta.json', meta)
        write_json(work / 'undo.json', {'moves': moves, 'meta': old_meta})
        try:
            replace_meta(folder, UNFINISHED)
            for name, new_name in moves:
                os.replace(folder / name, folder / new_name)
            sync_folder(folder)
            os.replace(work / 'meta.json', folder / 'meta.json')
        except BaseException:
            undo_publishing(folder)
            raise
        sync_folder(folder)
        for name in ('undo.json', 'progress'):
            (work / name).unlink(missing_ok=True)
        return meta


def undo_publishing(folder):
    """Restore the state before an interrupted publish(). This may be interrupted as well."""
    undo, meta = folder / '.packing' / 'undo.json', folder / 'meta.json'
    if not undo.exists():
        return
    before = read_json(undo)
    for name, new_name in reversed(before['moves']):
        if (folder / new_name).exists() and not (folder / name).exists():
            os.replace(folder / new_name, folder / name)
    if before['meta'] is None:
        meta.unlink(missing_ok=True)
    else:
        replace_meta(folder, before['meta'].encode('utf-8'))
    undo.unlink()


def replace_meta(folder, data):
    """Replace meta.json. A killed run leaves its temporary file in .packing."""
    write_bytes(folder / '.packing' / 'part', data)
    os.replace(folder / '.packing' / 'part', folder / 'meta.json')


def write_bytes(path, data):
    write_atomically(path, lambda file: file.write(data))


def digest_of(text):
    return hashlib.sha256(text.encode()).hexdigest()
