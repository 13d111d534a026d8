"""A dataset on disk: its metadata, its shards of token ids, and the folders that the setting `dataset` names.

    meta.json     what read_meta returns; datasets of nanoGPT have meta.pkl, those of llm.c nothing
    train.bin     or train_000000.bin and so on: little-endian ids, also with llm.c's header; the same for val
    train.mask    one uint8 per token, 0 = not a target; optional
    train.idx     (offset, length) of each document, in tokens of the split, int64; optional
"""

import difflib
import os
import re
import threading
import zlib
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from files import read_json
from tokens.metapkl import read_meta_pkl
from tokens.tokenizer import GPT2_META, fingerprint, vocab_size_of
from tokens.tokenizer_json import one_line

HEADER_BYTES = 1024  # of llm.c
LLMC_DTYPES = {(20240520, 1): 'uint16', (20240801, 7): 'uint32'}  # by magic number and version
LLAMA3_VOCAB_SIZE = 128256  # llm.c writes uint32 for Llama 3 only
REMEDY = 'it was cut short or altered, prepare the dataset again'


def id_dtype(vocab_size: int) -> np.dtype:
    """Return the little-endian dtype in which ids below vocab_size are stored."""
    return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


# -----------------------------------------------------------------------------
# metadata


def read_meta(folder) -> dict:
    """Read and check what a data folder says about itself. Without meta.json it is read as nanoGPT does.

    returns   {'format': 1, 'dtype': 'uint16' | 'uint32', 'vocab_size', 'tokenizer': its meta(), 'source',
              'origin': 'meta.json' | 'meta.pkl' | 'none', 'splits': {'train': {'tokens', 'bytes',
              'documents', 'shards': [{'file', 'tokens', 'crc32'}, ...]}, 'val': ...}}. Conversations also
              have 'row_tokens', the tokens of a row, and 'style', their template
    raises    FileNotFoundError if nothing was prepared, ValueError for contents that do not fit
    """
    folder = Path(folder)
    path = folder / 'meta.json'
    if path.exists():
        meta = read_json(path)
        with one_line(path):
            for key, fits, requirement in rules_of(meta):
                if not fits:
                    raise ValueError(f'{key} must be {requirement}')
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
    others = [] if folder.exists() else [path.name for path in folder.parent.glob('*/')]
    for name in difflib.get_close_matches(folder.name, others, 1):
        message += f', did you mean {folder.parent / name}?'
    raise FileNotFoundError(message)


def rules_of(meta):
    """Yield (key, whether its value fits, what it must be) of a meta.json, which may have been edited."""
    if meta.get('unfinished'):
        raise ValueError('packing this dataset was interrupted: prepare it again')
    dtype, row = meta.get('dtype'), meta.get('row_tokens')
    yield 'format', meta.get('format') == 1, '1'
    yield 'dtype', dtype in ('uint16', 'uint32'), "'uint16' or 'uint32'"
    with one_line('tokenizer'):
        vocab_size = vocab_size_of(meta.get('tokenizer'))
    yield 'vocab_size', meta.get('vocab_size') == vocab_size, f'{vocab_size}, the size of its tokenizer'
    yield 'dtype', vocab_size <= 2**16 or dtype == 'uint32', f"'uint32' for {vocab_size} tokens"
    yield 'splits', {'train'} <= set(meta['splits']) <= {'train', 'val'}, "an object with 'train' and 'val'"
    for name, split in meta['splits'].items():
        yield f'splits.{name}.shards', split['shards'], 'a list of one or more'
        for shard in split['shards']:
            size, is_name = shard['tokens'], re.fullmatch(r'[\w-]+\.bin', str(shard['file']))
            yield 'file', is_name, f'the name of a .bin file in this folder, not {shard["file"]!r}'
            yield 'tokens', type(size) is int and size >= 0, f'a count, not {size!r}'
            yield 'row_tokens', row is None or row > 1 and size % row == 0, f'a divisor of {size}'
        n_tokens = sum(shard['tokens'] for shard in split['shards'])
        yield f'splits.{name}.tokens', split['tokens'] == n_tokens, f'{n_tokens}, the sum of its shards'


def meta_of_nanogpt(folder):
    """Return the meta of a folder of nanoGPT or llm.c from file sizes and headers."""
    splits, dtype = {}, 'uint16'
    for name in ('train', 'val'):
        # train.bin; train_000000.bin; as llm.c names them: fineweb_train_000001.bin, TinyStories_train.bin
        patterns = [f'{name}.bin', f'{name}_*.bin', f'*_{name}_*.bin', f'*_{name}.bin']
        paths = next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), [])
        shards = []
        for path in paths:
            dtype, n_tokens = read_header(path) or ('uint16', count_uint16(path))
            shards.append({'file': path.name, 'tokens': n_tokens, 'crc32': None})
        if shards or name == 'train':
            n_tokens = sum(shard['tokens'] for shard in shards)
            splits[name] = {'tokens': n_tokens, 'bytes': None, 'documents': None, 'shards': shards}

    tokenizer, origin = GPT2_META, 'none'
    if dtype == 'uint32':
        tokenizer = {'kind': 'ids', 'vocab_size': LLAMA3_VOCAB_SIZE}
    if (folder / 'meta.pkl').exists():
        tokenizer, origin = read_meta_pkl(folder / 'meta.pkl'), 'meta.pkl'
    return {'format': 1, 'dtype': dtype, 'vocab_size': vocab_size_of(tokenizer), 'tokenizer': tokenizer,
            'source': None, 'origin': origin, 'splits': splits}


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


READING = threading.Lock()  # the training loop and a prefetching thread share the open files


class DiskArray:
    """A one-dimensional array in a file. Reading it raises if the file has changed; a memmap could crash."""

    def __init__(self, path, dtype, size: int, header_bytes: int = 0):
        self.path, self.dtype, self.size, self.header_bytes = path, np.dtype(dtype), size, header_bytes
        self.identity = identify(os.stat(path))
        n_bytes = self.identity[0]
        if n_bytes != header_bytes + size * self.dtype.itemsize:
            header = f'a header of {header_bytes} and ' if header_bytes else ''
            raise ValueError(f'{path} has {n_bytes} bytes, expected {header}{size} values of '
                             f'{self.dtype.itemsize} bytes: {REMEDY}')

    def __getitem__(self, part):
        start, end, _ = part.indices(self.size)
        return self.read(start, max(end - start, 0))

    def __array__(self, dtype=None, copy=None):
        return np.fromfile(self.path, self.dtype, self.size, offset=self.header_bytes)

    def read(self, start: int, size: int) -> np.ndarray:
        with READING:
            file = open_array(self)
            if identify(os.fstat(file.fileno())) != self.identity:
                raise ValueError(f'{self.path} was replaced or changed since the dataset was opened: '
                                 'restore it and resume, or start a new run')
            file.seek(self.header_bytes + start * self.dtype.itemsize)
            return np.frombuffer(file.read(size * self.dtype.itemsize), self.dtype)


def identify(stat):
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


@lru_cache(maxsize=128)  # macOS allows a process 256 open files
def open_array(array):
    return open(array.path, 'rb', buffering=0)


class Shard:
    """One .bin file. It begins at token `first` of its split."""

    def __init__(self, path, dtype, n_tokens, first, split):
        self.path, self.n_tokens, self.first, self.split = path, n_tokens, first, split
        self.tokens = DiskArray(path, dtype, n_tokens, HEADER_BYTES if read_header(path) else 0)

    def read(self, start: int, length: int) -> np.ndarray:
        """Return token ids, (length,). Raise ValueError if one is beyond the vocabulary."""
        ids = self.tokens.read(start, length)
        if ids.max(initial=0) >= self.split.vocab_size:
            i = int(ids.argmax())
            raise ValueError(f'{self.path} offset {start + i}: token id {ids[i]} is beyond vocab_size '
                             f'{self.split.vocab_size}: the shard was made with another tokenizer or '
                             'altered, prepare the dataset again')
        return ids

    def is_target(self, start: int, length: int) -> np.ndarray:
        """Tell which tokens are targets, (length,) bool."""
        if self.split.mask is None:
            return np.ones(length, dtype=bool)
        return self.split.mask.read(self.first + start, length).astype(bool)

    def document_numbers(self, start: int, length: int) -> np.ndarray:
        """Return the number of each token's document, (length,) int64."""
        positions = self.first + start + np.arange(length)
        return np.searchsorted(self.split.document_starts, positions, side='right')


class Split:
    """One split of one dataset: its shards, and the .mask and .idx beside them."""

    def __init__(self, folder, split: str):
        self.folder, self.split, self.meta = Path(folder), split, read_meta(folder)
        self.vocab_size, self.tokenizer = self.meta['vocab_size'], self.meta['tokenizer']
        entry = self.meta['splits'].get(split)
        if entry is None:
            names = ', '.join(self.meta['splits'])
            raise ValueError(f'{folder} has no {split} split, only {names}: prepare it with one')
        self.n_tokens, self.row_tokens = entry['tokens'], self.meta.get('row_tokens')
        self.checksums = [shard.get('crc32') for shard in entry['shards']]
        dtype, first = np.dtype(self.meta['dtype']).newbyteorder('<'), 0
        self.shards = []
        for shard in entry['shards']:
            self.shards.append(Shard(self.folder / shard['file'], dtype, shard['tokens'], first, self))
            first += shard['tokens']
        self.index, mask = self.folder / f'{split}.idx', self.folder / f'{split}.mask'
        self.mask = None
        if mask.exists() or self.row_tokens:  # rows need a mask: it tells answers from questions and padding
            self.mask = DiskArray(mask, np.uint8, self.n_tokens)

    def documents(self):
        """Return offset and length of each document in tokens of the split, ascending, (M,) int64 each.

        The end-of-text after a document belongs to it, so that a model learns where to stop.
        """
        if not self.index.exists():
            raise FileNotFoundError(f'{self.index} is missing: rows that begin with documents need it, '
                                    'prepare the dataset with one')
        n_rows = self.index.stat().st_size // 16
        table = np.asarray(DiskArray(self.index, '<i8', 2 * n_rows)).reshape(-1, 2)
        offset, length = table[np.lexsort((table[:, 1], table[:, 0]))].T
        room = np.append(offset[1:], self.n_tokens) - offset
        misfit = (offset < 0) | (length < 0) | (length > room)
        if misfit.any():
            i = int(np.argmax(misfit))
            raise ValueError(f'{self.index}: the document of length {length[i]} at token {offset[i]} '
                             f'overlaps the next one or the end of the split at {self.n_tokens}: {REMEDY}')
        is_end_of_text = np.append(room[:-1] == length[:-1] + 1, False)
        return offset, length + is_end_of_text

    @cached_property
    def document_starts(self):
        return self.documents()[0]

    def spans(self, order: str, T: int) -> np.ndarray:
        """Return begins and ends that windows keep to, of rows, documents or shards: (2, M) int64."""
        row = self.row_tokens
        if row not in (None, T + 1):
            raise ValueError(f'{self.folder} was packed in rows for block_size {row - 1}: '
                             f'use --block_size={row - 1}, or pack it again with --block_size {T}')
        if row:
            begin, length = np.arange(0, self.n_tokens, row), row
        elif order == 'documents':
            begin, length = self.documents()
        else:
            begin, length = np.array([(shard.first, shard.n_tokens) for shard in self.shards]).T
        return np.stack([begin, begin + length])

    def fingerprint(self) -> dict:
        """Return what a checkpoint remembers of its data, as plain values."""
        return dict(tokens=[shard.n_tokens for shard in self.shards], crc32=self.checksums,
                    vocab_size=self.vocab_size, tokenizer=fingerprint(self.tokenizer))

    def describe_checksums(self) -> str:
        n_shards = len(self.shards)
        n_known = n_shards - self.checksums.count(None)
        report = f'verifying {self.n_tokens:,} tokens, {n_known} of {n_shards} shards have a checksum'
        if not n_known:
            report = ('no checksums are known, so nothing is verified: prepare the dataset with corpus.pack, '
                      'which writes them to meta.json')
        return f'{self.folder}, {self.split}: {report}'

    def verify(self):
        """Raise ValueError at the first shard that does not match its checksum."""
        for shard, expected in zip(self.shards, self.checksums, strict=True):
            if expected is None:
                continue
            crc = 0
            for start in range(0, shard.n_tokens, 1 << 22):
                crc = zlib.crc32(shard.tokens[start:start + (1 << 22)], crc)
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
