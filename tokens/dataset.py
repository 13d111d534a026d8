"""A dataset on disk, and the folders that the setting `dataset` names.

    train.bin     or train_000000.bin and so on: little-endian ids, also with llm.c's header; the same for val
    train.mask    one uint8 per token, 0 = not a target; optional
    train.idx     (offset, length) of each document, in tokens of the split, int64; optional
    meta.json     {"format": 1, "dtype": "uint16", "vocab_size": 65, "tokenizer": its meta(), "source": "x",
                  "splits": {"train": {"tokens": 9, "bytes": 9, "documents": 1, "shards":
                  [{"file": "train.bin", "tokens": 9, "crc32": 7}]}, "val": ...}}; of conversations also
                  "row_tokens", the tokens of a row, and "style", their template
"""

import bisect
import difflib
import os
import re
import threading
import zlib
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from files import one_line, read_json
from tokens.metapkl import read_meta_pkl
from tokens.tokenizer import GPT2_META, fingerprint, vocab_size_of

HEADER_BYTES = 1024  # of llm.c
LLMC_DTYPES = {(20240520, 1): 'uint16', (20240801, 7): 'uint32'}  # by magic number and version
# llm.c writes uint32 for Llama 3 only
META_OF_DTYPE = {'uint16': GPT2_META, 'uint32': {'kind': 'ids', 'vocab_size': 128256}}
REMEDY = 'it was cut short or altered, prepare the dataset again'


def id_dtype(vocab_size: int) -> np.dtype:
    """Return the little-endian dtype in which ids below vocab_size are stored."""
    return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


# -----------------------------------------------------------------------------
# metadata


def read_meta(folder) -> dict:
    """Return the contents of meta.json and their origin: 'meta.json', 'meta.pkl' of nanoGPT, or 'none'."""
    folder = Path(folder)
    path = folder / 'meta.json'
    if path.exists():
        meta = read_json(path)
        with one_line(path):
            check_meta(meta)
        meta['origin'] = 'meta.json'
    else:
        meta = meta_of_nanogpt(folder)
    files = [shard['file'] for split in meta['splits'].values() for shard in split['shards']]
    missing = [name for name in files or ['train.bin'] if not (folder / name).is_file()]
    if not missing:
        return meta
    if (folder / 'prepare.py').is_file():
        raise FileNotFoundError(f'{folder} is not prepared: run python {folder / "prepare.py"}')
    message = f'{folder / missing[0]} is missing: a dataset is a folder with train.bin and val.bin'
    if not folder.exists():
        others = [path.name for path in folder.parent.glob('*/')]
        for name in difflib.get_close_matches(folder.name, others, 1):
            message += f', did you mean {folder.parent / name}?'
    raise FileNotFoundError(message)


def check_meta(meta):
    """Raise ValueError for a meta.json that was edited or left unfinished."""
    if meta.get('unfinished'):
        raise ValueError('packing this dataset was interrupted: prepare it again')
    with one_line('tokenizer'):
        size = vocab_size_of(meta.get('tokenizer'))
    wanted = {'format': [1], 'vocab_size': [size], 'dtype': [id_dtype(size).name, 'uint32']}
    for key, accepted in wanted.items():
        if meta.get(key) not in accepted:
            raise ValueError(f'{key} must be {accepted[0]!r}, not {meta.get(key)!r}')
    if 'train' not in meta['splits']:
        raise ValueError('splits must hold train')
    row = meta.get('row_tokens')
    for split in meta['splits'].values():
        if not split['shards']:
            raise ValueError('shards must be a list of one or more')
        for shard in split['shards']:
            if not re.fullmatch(r'[\w-]+\.bin', str(shard['file'])):
                raise ValueError(f'file must be a name such as train.bin, not {shard["file"]!r}')
            if type(shard['tokens']) is not int:
                raise ValueError(f'tokens must be a count, not {shard["tokens"]!r}')
            if row is not None and (type(row) is not int or row < 2 or shard['tokens'] % row):
                raise ValueError(f'row_tokens must be a divisor of {shard["tokens"]}, not {row!r}')


def meta_of_nanogpt(folder):
    """Return what meta.json would hold for a folder of nanoGPT or llm.c."""
    splits, dtype = {}, 'uint16'
    for name in ('train', 'val'):
        # llm.c names its files fineweb_train_000001.bin and TinyStories_train.bin
        patterns = [f'{name}.bin', f'{name}_*.bin', f'*_{name}_*.bin', f'*_{name}.bin']
        paths = next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), [])
        shards = []
        for path in paths:
            dtype, n_tokens = read_header(path) or ('uint16', count_uint16(path))
            shards.append({'file': path.name, 'tokens': n_tokens, 'crc32': None})
        if shards or name == 'train':
            n_tokens = sum(shard['tokens'] for shard in shards)
            splits[name] = {'tokens': n_tokens, 'bytes': None, 'documents': None, 'shards': shards}

    tokenizer_meta, origin = META_OF_DTYPE[dtype], 'none'
    if (folder / 'meta.pkl').exists():
        tokenizer_meta, origin = read_meta_pkl(folder / 'meta.pkl'), 'meta.pkl'
    return {'format': 1, 'dtype': dtype, 'vocab_size': vocab_size_of(tokenizer_meta),
            'tokenizer': tokenizer_meta, 'source': None, 'origin': origin, 'splits': splits}


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


def count_uint16(path):
    """Return the number of tokens of a shard without a header. Raise ValueError if it holds wider numbers."""
    n_bytes = path.stat().st_size
    if n_bytes % 2:
        raise ValueError(f'{path}: {n_bytes} bytes is no whole number of uint16 tokens')
    ids = np.fromfile(path, '<u2', 4096)
    low, high = ids[::2], ids[1::2]
    if len(ids) >= 16 and low.any() and (not high.any() or low.max() > 255 and high.max() < 4):
        raise ValueError(f'{path}: every second number is zero or next to it, so these are ids of 4 or '
                         '8 bytes: save them as uint16, or prepare the dataset with a meta.json')
    return n_bytes // 2


# -----------------------------------------------------------------------------
# shards


READING = threading.Lock()  # a prefetching thread reads from the same open files


class DiskArray:
    """An array in a file. A slice raises if the file has changed; a memmap of a shorter file would crash."""

    def __init__(self, path, dtype, size: int, header_bytes: int = 0):
        self.path, self.dtype, self.size, self.header_bytes = path, np.dtype(dtype), size, header_bytes
        self.identity = identity(os.stat(path))
        n_bytes, expected = self.identity[0], header_bytes + size * self.dtype.itemsize
        if n_bytes != expected:
            raise ValueError(f'{path} has {n_bytes} bytes, expected {expected}: {REMEDY}')

    def __getitem__(self, part: slice) -> np.ndarray:
        start, end, _ = part.indices(self.size)
        with READING:
            file = open_array(self)
            if identity(os.fstat(file.fileno())) != self.identity:
                raise ValueError(f'{self.path} was replaced or changed since the dataset was opened: '
                                 'restore it and resume, or start a new run')
            file.seek(self.header_bytes + start * self.dtype.itemsize)
            return np.frombuffer(file.read((end - start) * self.dtype.itemsize), self.dtype)


def identity(stat):
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


@lru_cache(maxsize=128)  # macOS allows a process 256 open files
def open_array(array):
    return open(array.path, 'rb', buffering=0)


class Split:
    """One split of one dataset. Its tokens are numbered through all of its shards."""

    def __init__(self, folder, split: str):
        self.folder, self.split, self.meta = Path(folder), split, read_meta(folder)
        self.vocab_size, self.tokenizer_meta = self.meta['vocab_size'], self.meta['tokenizer']
        entry = self.meta['splits'].get(split)
        if entry is None:
            names = ', '.join(self.meta['splits'])
            raise ValueError(f'{folder} has no {split} split, only {names}: prepare it with one')
        self.checksums = [shard.get('crc32') for shard in entry['shards']]
        dtype = np.dtype(self.meta['dtype']).newbyteorder('<')
        self.shards, self.borders = [], [0]  # borders: first token of each shard, and the end
        for shard in entry['shards']:
            path, n_tokens = self.folder / shard['file'], shard['tokens']
            header_bytes = HEADER_BYTES if read_header(path) else 0
            self.shards.append(DiskArray(path, dtype, n_tokens, header_bytes))
            self.borders.append(self.borders[-1] + n_tokens)
        self.n_tokens, self.row_tokens = self.borders[-1], self.meta.get('row_tokens')
        self.index, mask = self.folder / f'{split}.idx', self.folder / f'{split}.mask'
        self.mask = None
        if mask.exists() or self.row_tokens:  # rows need a mask: it tells answers from questions and padding
            self.mask = DiskArray(mask, np.uint8, self.n_tokens)

    def find(self, start: int):
        """Return the shard that holds a token, and the token's number in it."""
        i = bisect.bisect(self.borders, start) - 1
        return self.shards[i], start - self.borders[i]

    def read(self, start: int, length: int) -> np.ndarray:
        """Return token ids of one shard, (length,). Raise ValueError for one beyond the vocabulary."""
        shard, offset = self.find(start)
        ids = shard[offset:offset + length]
        if ids.max(initial=0) >= self.vocab_size:
            i = int(ids.argmax())
            raise ValueError(f'{shard.path} offset {offset + i}: token id {ids[i]} is beyond vocab_size '
                             f'{self.vocab_size}: the shard was made with another tokenizer or altered, '
                             'prepare the dataset again')
        return ids

    def is_target(self, start: int, length: int) -> np.ndarray:
        """Tell which tokens are targets, (length,) bool."""
        if self.mask is None:
            return np.ones(length, dtype=bool)
        return self.mask[start:start + length].astype(bool)

    def document_numbers(self, start: int, length: int) -> np.ndarray:
        """Return the number of each token's document, (length,) int64."""
        return np.searchsorted(self.document_starts, start + np.arange(length), side='right')

    @cached_property
    def document_starts(self):
        return self.documents()[0]

    def documents(self):
        """Return offset and length in tokens of each document, ascending, (M,) int64 each.

        The end-of-text after a document belongs to it, so that a model learns where to stop.
        """
        if not self.index.exists():
            raise FileNotFoundError(f'{self.index} is missing: rows that begin with documents need it, '
                                    'prepare the dataset with one')
        n_rows = self.index.stat().st_size // 16
        table = DiskArray(self.index, '<i8', 2 * n_rows)[:].reshape(-1, 2)
        offset, length = table[np.lexsort((table[:, 1], table[:, 0]))].T
        room = np.append(offset[1:], self.n_tokens) - offset
        misfit = (offset < 0) | (length < 0) | (length > room)
        if misfit.any():
            i = int(np.argmax(misfit))
            raise ValueError(f'{self.index}: the document of length {length[i]} at token {offset[i]} '
                             f'overlaps the next one or the end of the split at {self.n_tokens}: {REMEDY}')
        is_end_of_text = np.append(room[:-1] == length[:-1] + 1, False)
        return offset, length + is_end_of_text

    def fingerprint(self) -> dict:
        """Return what a checkpoint stores about its data, as plain values."""
        return dict(tokens=[shard.size for shard in self.shards], crc32=self.checksums,
                    vocab_size=self.vocab_size, tokenizer=fingerprint(self.tokenizer_meta))

    def describe_checksums(self) -> str:
        if None in self.checksums:
            return f'{self.folder}, {self.split}: not verified, its shards have no checksum in meta.json'
        return f'{self.folder}, {self.split}: verifying {self.n_tokens:,} tokens'

    def verify(self):
        """Raise ValueError at the first shard that does not match its checksum."""
        for shard, expected in zip(self.shards, self.checksums, strict=True):
            if expected is None:
                continue
            crc = 0
            for start in range(0, shard.size, 1 << 22):
                crc = zlib.crc32(shard[start:start + (1 << 22)], crc)
            if crc != expected:
                raise ValueError(f'{shard.path} does not match its checksum in meta.json: {REMEDY}')


# -----------------------------------------------------------------------------
# the dataset setting


def parse_mixture(dataset: str):
    """Split 'a:0.7,b:0.3' into names and shares that sum to 1. A missing weight is 1."""
    names, weights = [], []
    for part in map(str.strip, dataset.split(',')):
        # C:\texts is a name without a weight
        name, weight = re.fullmatch(r'(.*?)(?::([^:/\\]*))?', part, re.DOTALL).groups('1')
        try:
            weight = float(weight)
        except ValueError:
            weight = 0.0
        if not name or not 0 < weight < float('inf'):
            raise ValueError(f'dataset={dataset}: {part!r} is no NAME or NAME:WEIGHT '
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
