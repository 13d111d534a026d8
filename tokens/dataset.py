"""A dataset on disk: its metadata, its shards of token ids, and the folders that the setting `dataset` names.

    folder/meta.json    what read_meta returns; datasets of nanoGPT have meta.pkl, those of llm.c nothing
    train.bin, or train_000000.bin and so on    little-endian ids, also with llm.c's header; the same for val
    train.mask          one uint8 per token, 0 = not a target; optional
    train.idx           (offset, length) of each document, in tokens of the split, int64; optional
"""

import difflib
import os
import re
import threading
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from files import read_json
from tokens.metapkl import need, read_meta_pkl
from tokens.tokenizer import GPT2_META, fingerprint, vocab_size_of
from tokens.tokenizer_json import one_line

DTYPE_LIMIT = {'uint16': 2**16, 'uint32': 2**32}
LLMC_HEADER_BYTES = 1024
LLMC_DTYPES = {(20240520, 1): 'uint16', (20240801, 7): 'uint32'}  # by magic number and version
LLAMA3_VOCAB_SIZE = 128256  # llm.c writes uint32 for Llama 3 only
REMEDY = 'it was cut short or altered, prepare the dataset again'


def id_dtype(vocab_size: int) -> np.dtype:
    """Return the little-endian dtype in which ids below vocab_size are stored."""
    return np.dtype('<u2' if vocab_size <= DTYPE_LIMIT['uint16'] else '<u4')


# -----------------------------------------------------------------------------
# metadata


def read_meta(folder) -> dict:
    """Read and check what a data folder says about itself.

    A folder without meta.json is read as nanoGPT does: uint16 ids of the tokens in meta.pkl, or of GPT-2.

    returns   {'format': 1, 'dtype': 'uint16' | 'uint32', 'vocab_size': V, 'tokenizer': its meta(),
              'source': str | None, 'origin': 'meta.json' | 'meta.pkl' | 'none', 'splits': {'train':
              {'tokens', 'bytes', 'documents', 'shards': [{'file', 'tokens', 'crc32'}, ...]}, 'val': ...}};
              bytes, documents and crc32 may be None. Conversations also have 'row_tokens', the tokens of a
              row, and 'style', their template
    raises    FileNotFoundError if nothing was prepared, ValueError for contents that do not fit
    """
    folder = Path(folder)
    meta = read_meta_json(folder) if (folder / 'meta.json').exists() else meta_of_nanogpt(folder)
    files = [shard['file'] for split in meta['splits'].values() for shard in split['shards']]
    missing = [name for name in files or ['train.bin'] if not (folder / name).is_file()]
    if not missing:
        return meta
    if (folder / 'prepare.py').is_file():
        raise FileNotFoundError(f'{folder} is not prepared: run python {folder / "prepare.py"}')
    message = f'{folder / missing[0]} is missing: a dataset is a folder with train.bin and val.bin'
    if not folder.exists():
        names = [path.name for path in folder.parent.glob('*/')]
        for name in difflib.get_close_matches(folder.name, names, 1):
            message += f', did you mean {folder.parent / name}?'
    raise FileNotFoundError(message)


def read_meta_json(folder):
    """Read meta.json. Every value is checked, because the file may have been edited."""
    meta = read_json(folder / 'meta.json')
    with one_line(folder / 'meta.json'):
        return checked_meta(meta)


def checked_meta(meta):
    if meta.get('unfinished'):
        raise ValueError('packing this dataset was interrupted: prepare it again')
    dtype, row, splits = meta.get('dtype'), meta.get('row_tokens'), meta.get('splits')
    need(meta.get('format') == 1, 'format', '1')
    need(dtype in list(DTYPE_LIMIT), 'dtype', "'uint16' or 'uint32'")
    with one_line('tokenizer'):
        vocab_size = vocab_size_of(meta.get('tokenizer'))
    need(meta.get('vocab_size') == vocab_size, 'vocab_size', f'{vocab_size}, the size of its tokenizer')
    need(vocab_size <= DTYPE_LIMIT[dtype], 'dtype', f"'uint32' for a vocabulary of {vocab_size}")
    for key in ('source', 'style'):
        need(isinstance(meta.get(key), str | None), key, 'a string')
    need(isinstance(splits, dict) and {'train'} <= set(splits) <= {'train', 'val'}, 'splits',
         "an object with 'train' and 'val'")
    splits = {name: checked_split(split, f'splits.{name}') for name, split in splits.items()}

    sizes = [shard['tokens'] for split in splits.values() for shard in split['shards']]
    whole_rows = is_count(row) and row > 1 and not any(size % row for size in sizes)
    need(row is None or whole_rows, 'row_tokens', 'a count of 2 or more that divides the tokens of a shard')
    optional = {key: meta[key] for key in ('row_tokens', 'style') if meta.get(key) is not None}
    return {'format': 1, 'dtype': dtype, 'vocab_size': vocab_size, 'tokenizer': meta['tokenizer'],
            'source': meta.get('source'), 'origin': 'meta.json', 'splits': splits, **optional}


def checked_split(split, where):
    shards = split.get('shards')
    need(isinstance(shards, list) and shards, f'{where}.shards', 'a list of one or more')
    for i, shard in enumerate(shards):
        file, crc32 = shard.get('file'), shard.get('crc32')
        need(isinstance(file, str) and re.fullmatch(r'[\w-]+\.bin', file), f'{where}.shards[{i}].file',
             'the name of a .bin file in this folder')
        need(is_count(shard.get('tokens')), f'{where}.shards[{i}].tokens', 'a count')
        need(crc32 is None or is_count(crc32) and crc32 < 2**32, f'{where}.shards[{i}].crc32', 'below 2**32')
    for key in ('bytes', 'documents'):
        need(split.get(key) is None or is_count(split[key]), f'{where}.{key}', 'a count')
    shards = [{key: shard.get(key) for key in ('file', 'tokens', 'crc32')} for shard in shards]
    entry = split_entry(shards, split.get('bytes'), split.get('documents'))
    n_tokens = entry['tokens']
    need(split.get('tokens') == n_tokens, f'{where}.tokens', f'{n_tokens}, the sum of its shards')
    return entry


def is_count(value):
    return type(value) is int and value >= 0


def split_entry(shards, n_bytes=None, n_documents=None):
    n_tokens = sum(shard['tokens'] for shard in shards)
    return {'tokens': n_tokens, 'bytes': n_bytes, 'documents': n_documents, 'shards': shards}


def meta_of_nanogpt(folder):
    """Return the meta of a folder of nanoGPT or llm.c from file sizes and headers."""
    splits, dtypes = {}, set()
    for name in ('train', 'val'):
        # train.bin; train_000000.bin; as llm.c names them: fineweb_train_000001.bin, TinyStories_train.bin
        patterns = [f'{name}.bin', f'{name}_*.bin', f'*_{name}_*.bin', f'*_{name}.bin']
        paths = next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), [])
        shards = []
        for path in paths:
            dtype, n_tokens = inspect_shard(path)
            dtypes.add(dtype)
            shards.append({'file': path.name, 'tokens': n_tokens, 'crc32': None})
        if shards or name == 'train':
            splits[name] = split_entry(shards)
    if len(dtypes) > 1:
        raise ValueError(f'{folder} holds shards of uint16 and of uint32: keep one kind in a folder')

    tokenizer, origin, dtype = GPT2_META, 'none', ''.join(dtypes) or 'uint16'
    if dtype == 'uint32':
        tokenizer = {'kind': 'ids', 'vocab_size': LLAMA3_VOCAB_SIZE}
    if (folder / 'meta.pkl').exists():
        tokenizer, origin = read_meta_pkl(folder / 'meta.pkl'), 'meta.pkl'
    return {'format': 1, 'dtype': dtype, 'vocab_size': vocab_size_of(tokenizer), 'tokenizer': tokenizer,
            'source': None, 'origin': origin, 'splits': splits}


def inspect_shard(path):
    """Return (dtype, number of tokens) of a shard without meta.json: as llm.c's header says, else uint16."""
    n_bytes = path.stat().st_size
    header = read_header(path)
    if header is not None:
        dtype, n_tokens = header
        if n_bytes != LLMC_HEADER_BYTES + n_tokens * np.dtype(dtype).itemsize:
            raise ValueError(f'{path} has {n_bytes} bytes, which does not fit {n_tokens} tokens of {dtype} '
                             f'after a header of llm.c: {REMEDY}')
        return header
    if n_bytes % 2:
        raise ValueError(f'{path}: {n_bytes} bytes is no whole number of uint16 tokens')
    ids = np.fromfile(path, '<u2', 4096)
    low, high = ids[::2], ids[1::2]
    if len(ids) >= 16 and low.any() and (not high.any() or low.max() > 255 and high.max() < 4):
        raise ValueError(f'{path}: every second number is zero or next to it, so these are ids of 4 or '
                         '8 bytes: save them as uint16, or prepare the dataset with a meta.json')
    return 'uint16', n_bytes // 2


def read_header(path):
    """Return (dtype, number of tokens) if a shard begins like one of llm.c, whose magic number is a date."""
    header = np.fromfile(path, '<i4', 256)
    if len(header) < 256 or not 20230000 < header[0] < 20400000 or header[3:].any():
        return None
    magic, version, n_tokens = header[:3].tolist()
    if (magic, version) not in LLMC_DTYPES:
        raise ValueError(f'{path} has an unknown header (magic number {magic}, version {version}): '
                         'supported are 20240520 version 1 and 20240801 version 7 of llm.c')
    return LLMC_DTYPES[magic, version], n_tokens


# -----------------------------------------------------------------------------
# shards


class DiskArray:
    """A one-dimensional array in a file. Reading a file cut short raises; a memmap would die of SIGBUS."""

    def __init__(self, path, dtype, size, header_bytes=0):
        self.path, self.dtype, self.size, self.header_bytes = path, np.dtype(dtype), size, header_bytes
        self.identity = identify(os.stat(path))

    def __getitem__(self, part):
        start, end, _ = part.indices(self.size)
        return self.read(start, max(end - start, 0))

    def __array__(self, dtype=None, copy=None):
        return np.fromfile(self.path, self.dtype, self.size, offset=self.header_bytes)

    def read(self, start: int, size: int) -> np.ndarray:
        n_bytes = size * self.dtype.itemsize
        file = open_array(self)  # held, because another thread's read may drop it from the cache
        data = pread(file.fileno(), n_bytes, self.header_bytes + start * self.dtype.itemsize)
        if len(data) < n_bytes:
            self.check(file)
        return np.frombuffer(data, self.dtype)

    def check(self, file):
        if identify(os.fstat(file.fileno())) != self.identity:
            raise ValueError(f'{self.path} was replaced or changed since the dataset was opened: '
                             'restore it and resume, or start a new run')


@lru_cache(maxsize=128)  # macOS allows a process 256 open files
def open_array(array):
    file = open(array.path, 'rb', buffering=0)
    array.check(file)
    return file


def identify(stat):
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def read_after_seek(descriptor, n_bytes, offset):
    with SEEK_LOCK:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, n_bytes)


SEEK_LOCK = threading.Lock()
pread = getattr(os, 'pread', read_after_seek)  # Windows has no pread


class Shard:
    """One .bin file. It begins at token `first` of its split."""

    def __init__(self, path, dtype, n_tokens, first, split):
        self.path, self.n_tokens, self.first, self.split = path, n_tokens, first, split
        n_bytes = path.stat().st_size
        header_bytes = n_bytes - n_tokens * dtype.itemsize
        if header_bytes not in (0, LLMC_HEADER_BYTES):
            raise ValueError(f'{path} has {n_bytes} bytes, expected {n_tokens} tokens '
                             f'of {dtype.itemsize} bytes: {REMEDY}')
        if header_bytes and read_header(path) != (dtype.name, n_tokens):
            raise ValueError(f'{path} begins with 1024 bytes that are no header of llm.c '
                             f'for {n_tokens} tokens of {dtype.itemsize} bytes: {REMEDY}')
        self.tokens = DiskArray(path, dtype, n_tokens, header_bytes)

    def is_target(self, start: int, length: int):
        """Tell which tokens are targets: (length,) bool."""
        if self.split.mask is None:
            return np.ones(length, dtype=bool)
        return self.split.mask.read(self.first + start, length).astype(bool)


class Split:
    """One split of one dataset: its shards, and the .mask and .idx beside them."""

    def __init__(self, folder, split: str):
        self.folder, self.split, self.meta = Path(folder), split, read_meta(folder)
        self.vocab_size, self.tokenizer = self.meta['vocab_size'], self.meta['tokenizer']
        entry = self.meta['splits'].get(split)
        if entry is None:
            names = ', '.join(self.meta['splits'])
            raise ValueError(f'{folder} has no {split} split, only {names}: prepare it with one')
        self.n_tokens = entry['tokens']
        mask, self.index = (self.folder / f'{split}{suffix}' for suffix in ('.mask', '.idx'))
        self.mask = None
        if mask.exists():
            self.check_size(mask, mask.stat().st_size == self.n_tokens)
            self.mask = DiskArray(mask, np.uint8, self.n_tokens)
        elif self.meta.get('row_tokens'):
            raise FileNotFoundError(f'{mask} is missing: it tells answers from questions and padding, '
                                    'prepare the dataset again')
        self.checksums = [shard['crc32'] for shard in entry['shards']]
        dtype, first = np.dtype(self.meta['dtype']).newbyteorder('<'), 0
        self.shards = []
        for shard in entry['shards']:
            self.shards.append(Shard(self.folder / shard['file'], dtype, shard['tokens'], first, self))
            first += shard['tokens']

    def check_size(self, path, fits):
        if not fits:
            raise ValueError(f'{path} has {path.stat().st_size} bytes, which does not fit '
                             f'the {self.n_tokens} tokens of the {self.split} split: {REMEDY}')

    def documents(self):
        """Return offset and length of each document in tokens of the split, (M,) int64 each.

        The end-of-text after a document belongs to it, so that a model learns where to stop.
        """
        path, altered = self.index, 'it was altered, prepare the dataset again'
        if not path.exists():
            raise FileNotFoundError(f'{path} is missing: rows that begin with documents need it, '
                                    'prepare the dataset with one')
        self.check_size(path, path.stat().st_size % 16 == 0)
        offset, length = np.fromfile(path, '<i8').reshape(-1, 2).T
        outside = (offset < 0) | (length < 0) | (offset > self.n_tokens - length)
        if outside.any():
            i = int(np.argmax(outside))
            raise ValueError(f'{path}: document {i} has offset {offset[i]} and length {length[i]}, '
                             f'the split has {self.n_tokens} tokens: {altered}')
        order = np.lexsort((length, offset))
        overlaps = (offset + length)[order[:-1]] > offset[order[1:]]
        if overlaps.any():
            first, second = order[int(np.argmax(overlaps)):][:2]
            raise ValueError(f'{path}: documents {first} and {second} overlap '
                             f'at token {offset[second]}: {altered}')
        return offset, length + np.append(offset[1:] == (offset + length)[:-1] + 1, False)

    def fingerprint(self) -> dict:
        """Return what a checkpoint remembers of its data, as plain values."""
        return dict(tokens=[shard.n_tokens for shard in self.shards], crc32=list(self.checksums),
                    vocab_size=self.vocab_size, tokenizer=fingerprint(self.tokenizer))

    def describe_checksums(self) -> str:
        n_known = sum(crc is not None for crc in self.checksums)
        if not n_known:
            return (f'{self.folder}, {self.split}: no checksums are known, so nothing is verified: '
                    'prepare the dataset with corpus.pack, which writes them to meta.json')
        return (f'{self.folder}, {self.split}: verifying {self.n_tokens:,} tokens, '
                f'{n_known} of {len(self.shards)} shards have a checksum')

    def verify(self):
        """Raise ValueError at the first shard that does not match its checksum."""
        for shard, expected in zip(self.shards, self.checksums, strict=True):
            if expected is None:
                continue
            crc = 0
            for start in range(0, shard.n_tokens, 1 << 22):
                crc = zlib.crc32(shard.tokens[start:start + (1 << 22)], crc)
            if crc != expected:
                raise ValueError(f'{shard.path} does not match its checksum in meta.json: it was altered, '
                                 'prepare the dataset again')


# -----------------------------------------------------------------------------
# the dataset setting


def parse_mixture(dataset: str):
    """Split 'a:0.7,b:0.3' into names and shares that sum to 1. A missing weight is 1."""
    names, weights = [], []
    for part in dataset.split(','):
        # C:\texts is a name without a weight
        name, weight = re.fullmatch(r'(.*?)(?::([^:/\\]*))?', part.strip(), re.DOTALL).groups('1')
        try:
            weight = float(weight)
        except ValueError:
            weight = 0.0
        if not name or not 0 < weight < float('inf'):
            raise ValueError(f'dataset={dataset}: {part.strip()!r} is no NAME or NAME:WEIGHT '
                             'with a weight above 0, such as zhwiki:0.7')
        names.append(name)
        weights.append(weight)
    return names, [weight / sum(weights) for weight in weights]


def dataset_folders(dataset: str):
    """Return the folder and the share of each part of a dataset setting.

    NAME is data/NAME beside this program if that exists, else the folder NAME. data/NAME means the same.
    """
    names, weights = parse_mixture(dataset)
    data, folders = Path(__file__).resolve().parents[1] / 'data', []
    for name in names:
        folder, parts = data / name, Path(name).parts
        if not folder.is_dir():
            folder = Path(name) if Path(name).is_dir() else data.joinpath(*parts[parts[0] == 'data':])
        if folder.is_relative_to(Path.cwd()):
            folder = folder.relative_to(Path.cwd())  # shorter in messages
        folders.append(folder)
    return folders, weights
