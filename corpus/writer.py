"""Write a dataset. Its files grow in .packing below its folder and take their places when all is written.

    with writing('data/mine', tokenizer, ['train', 'val']) as writer:
        writer.append('train', [Piece(ids, n_bytes=12), Piece([eot]), Piece(more_ids, n_bytes=34)])
        writer.publish('my notes')

An error leaves the old dataset as it was. With a recipe, save() notes in .packing/progress how many
documents were read and how much of each file they make. The next run with this recipe continues there; what a
killed run wrote after its last save() is cut off and written again.
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

from files import lock, read_json, sync_folder, write_atomically
from tokens.dataset import id_dtype

UNFINISHED = b'{"format": 1, "unfinished": true}'
DATASET_FILE = re.compile(r'(train|val)(_\d+)?\.(bin|mask|idx)|meta\.pkl')
MERGE_SEEN = 1 << 20  # hashes in a set, 100 bytes each; the others are in a sorted array, 8 bytes each


class Piece(NamedTuple):
    """Token ids to append: a document, or what stands between documents, such as end-of-text and padding."""

    ids: np.ndarray  # (n,)
    mask: np.ndarray | None = None  # (n,) 1 where a token is a target; None: all are
    n_bytes: int | None = None  # of the document's text; None: this is no document


@dataclass
class Progress:
    recipe: dict | None
    splits: dict  # name -> its entry in meta.json
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
        undo_publishing(work, folder)
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
    unique        whether is_new() will be asked
    recipe        plain values that the contents depend on; None: the run cannot be continued
    raises        ValueError for an unfinished run with another recipe
    """

    def __init__(self, folder, tokenizer, splits, *, shard_tokens=None, masked=False, unique=False,
                 recipe=None):
        self.folder, self.work, self.name = folder, folder / '.packing', folder.resolve().name
        self.tokenizer, self.dtype = tokenizer, id_dtype(tokenizer.vocab_size)
        self.splits, self.shard_tokens, self.masked, self.unique = splits, shard_tokens, masked, unique
        self.recipe = json.loads(json.dumps(recipe))  # as it is read from the file progress
        self.files = {}
        if recipe is None or not (self.work / 'progress').exists():
            return self.start_over()
        try:
            self.resume()
            print(f'{self.name}: continuing after {self.progress.documents:,} documents', flush=True)
        except Unusable as error:
            print(f'{self.name}: the unfinished run cannot be continued ({error}): starting over', flush=True)
            self.start_over()

    def start_over(self):
        self.close_files()
        clear(self.work)
        entries = {name: {'tokens': 0, 'bytes': 0, 'documents': 0, 'shards': []} for name in self.splits}
        self.progress = Progress(self.recipe, entries)
        self.seen, self.more_seen = np.array([], dtype='<u8'), set()

    def resume(self):
        """Take up the files where the file progress says that they end."""
        text = (self.work / 'progress').read_text(encoding='utf-8', errors='replace')
        digest, _, values = text.partition('\n')
        if digest != digest_of(values):
            raise Unusable('progress was altered or cut short')
        self.progress = Progress(**json.loads(values))
        old = self.progress.recipe
        changed = [f'{key}={str(old[key])[:60]}' for key in old if old[key] != self.recipe.get(key)]
        if changed:
            raise ValueError(f'{self.work} holds an unfinished run with {", ".join(changed)}: '
                             'continue it with the same, or delete that folder to start over')
        for name, size in self.sizes().items():
            with open(self.work / name, 'ab') as file:
                if file.tell() < size:
                    raise Unusable(f'{name} is shorter than the {size:,} bytes that were written')
                file.truncate(size)
        if self.unique:
            self.seen, self.more_seen = np.sort(np.fromfile(self.work / 'seen', dtype='<u8')), set()
            if (self.seen[1:] == self.seen[:-1]).any():
                raise Unusable('seen was altered')

    def sizes(self):
        """Return {file: bytes} of all files."""
        sizes = {'seen': 8 * self.progress.documents} if self.unique else {}
        for split, entry in self.progress.splits.items():
            sizes[f'{split}.idx'] = 16 * entry['documents']
            if self.masked:
                sizes[f'{split}.mask'] = entry['tokens']
            for shard in entry['shards']:
                sizes[shard['file']] = shard['tokens'] * self.dtype.itemsize
        return sizes

    def append(self, split, pieces):
        """Append Pieces to a split. A document may continue in the next shard."""
        entry = self.progress.splits[split]
        ids = np.concatenate([piece.ids for piece in pieces], dtype=self.dtype, casting='unsafe')
        index, offset = [], entry['tokens']
        for piece in pieces:
            if piece.n_bytes is not None:
                index.append((offset, len(piece.ids)))
                entry['bytes'] += piece.n_bytes
            offset += len(piece.ids)
        self.file(f'{split}.idx').write(np.array(index, dtype='<i8').tobytes())
        if self.masked:
            masks = [np.ones(len(piece.ids)) if piece.mask is None else piece.mask for piece in pieces]
            mask = np.concatenate(masks, dtype=np.uint8, casting='unsafe')
            self.file(f'{split}.mask').write(mask.tobytes())
        entry['documents'] += len(index)
        entry['tokens'] += len(ids)

        shards = entry['shards']
        while len(ids):
            if not shards or shards[-1]['tokens'] == self.shard_tokens:
                self.close_files()  # so that few are open at a time
                name = f'{split}_{len(shards):06d}.bin' if self.shard_tokens else f'{split}.bin'
                shards.append({'file': name, 'tokens': 0, 'crc32': 0})
                self.file(name, 'wb')
            shard, part = shards[-1], ids
            if self.shard_tokens:
                part = ids[:self.shard_tokens - shard['tokens']]
            ids = ids[len(part):]
            self.file(shard['file']).write(part.tobytes())
            shard['crc32'] = zlib.crc32(part, shard['crc32'])
            shard['tokens'] += len(part)

    def is_new(self, value):
        """Tell whether a document's hash is new, and note it. The document is written next."""
        at = np.searchsorted(self.seen, np.uint64(value))
        if value in self.seen[at:at + 1] or value in self.more_seen:
            return False
        self.more_seen.add(value)
        self.file('seen').write(value.to_bytes(8, 'little'))
        if len(self.more_seen) == MERGE_SEEN:
            new = np.sort(np.fromiter(self.more_seen, dtype='<u8'))
            self.seen = np.insert(self.seen, np.searchsorted(self.seen, new), new)
            self.more_seen.clear()
        return True

    def empty_split(self):
        """Return the name of a split without tokens, or None."""
        return next((name for name, entry in self.progress.splits.items() if not entry['tokens']), None)

    def save(self):
        """Make a killed run continue here."""
        if self.recipe is not None:
            self.close_files()
            values = json.dumps(asdict(self.progress))
            write_bytes(self.work / 'progress', f'{digest_of(values)}\n{values}'.encode())

    def file(self, name, mode='ab'):
        if name not in self.files:
            self.files[name] = open(self.work / name, mode)
        return self.files[name]

    def close_files(self):
        """Bring all bytes to the disk. file() opens the files again."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self.files.clear()

    def close(self):
        try:
            self.close_files()
        finally:
            if self.recipe is None:
                shutil.rmtree(self.work, ignore_errors=True)

    def publish(self, source, **more) -> dict:
        """Put the dataset into its folder; if that fails, put the old one back.

        All bytes are on the disk before the first file is renamed. Until the last rename meta.json says that
        the dataset is unfinished, so that no reader takes a mixture of old and new files for a dataset.
        Returns the dict in meta.json, to which `more` is added.
        """
        self.close_files()
        meta = {'format': 1, 'dtype': self.dtype.name, 'vocab_size': self.tokenizer.vocab_size,
                'tokenizer': self.tokenizer.meta(), 'source': source, **more, 'splits': self.progress.splits}
        names = [name for name in self.sizes() if name != 'seen']
        work, folder, replaced = self.work, self.folder, self.work / 'replaced'
        shutil.rmtree(replaced, ignore_errors=True)
        replaced.mkdir()
        if (folder / 'meta.json').exists():
            write_bytes(replaced / 'meta.json', (folder / 'meta.json').read_bytes())
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
        self.recipe = None  # nothing is left to continue
        return meta


def undo_publishing(work, folder):
    """Bring back the state before an interrupted publish(). This may be interrupted as well."""
    if not (work / 'publishing.json').exists():
        return
    if not (work / 'meta.json').exists():  # only the cleaning after it was interrupted
        return clear(work)
    for name in read_json(work / 'publishing.json'):
        if (folder / name).exists() and not (work / name).exists():
            os.replace(folder / name, work / name)
    replaced, meta = work / 'replaced', folder / 'meta.json'
    for path in list(replaced.iterdir()):
        if path.name != 'meta.json':
            os.replace(path, folder / path.name)
    if (replaced / 'meta.json').exists():
        os.replace(replaced / 'meta.json', meta)
    elif meta.exists() and meta.read_bytes() == UNFINISHED:
        meta.unlink()
    (work / 'meta.json').unlink()
    (work / 'publishing.json').unlink()


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
