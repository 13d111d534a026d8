"""A dataset on disk: its metadata, its shards of token ids, and the folders that a dataset setting names."""

import json
import pickle
import re
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from tokens.tokenizer import GPT2_META, CharTokenizer, fingerprint, vocab_size_of

# -----------------------------------------------------------------------------
# what a data folder holds

DTYPE_LIMIT = {'uint16': 2 ** 16, 'uint32': 2 ** 32}
LLMC_MAGIC = (20240520).to_bytes(4, 'little')  # opens a header of 1024 bytes in a shard of llm.c
LLMC_HEADER_BYTES = 1024


def id_dtype(vocab_size):
    """The little-endian dtype in which ids below vocab_size are stored."""
    return np.dtype('<u2' if vocab_size <= DTYPE_LIMIT['uint16'] else '<u4')


def read_meta(folder):
    """What a data folder says about itself, checked.

    Without meta.json nanoGPT's rules hold: uint16 ids, of the characters in meta.pkl if there is one, else of GPT-2.

    folder    holds train.bin, or train_000000.bin and so on, and the like for val
    returns   {'format': 1, 'dtype': 'uint16' | 'uint32', 'vocab_size': V, 'tokenizer': its meta(), 'source': str | None,
               'splits': {'train': {'tokens', 'bytes', 'documents', 'shards': [{'file', 'tokens', 'crc32'}, ...]}, 'val': ...},
               'origin': 'meta.json' | 'meta.pkl' | 'none'}; bytes, documents and crc32 are None where unknown. A dataset of
               conversations has 'row_tokens', the tokens of a row, and 'style', their template, besides
    raises    FileNotFoundError if nothing was prepared here, ValueError for contents that do not fit
    """
    folder = Path(folder)
    meta = read_meta_json(folder) if (folder / 'meta.json').exists() else meta_of_nanogpt(folder)
    files = [shard['file'] for split in meta['splits'].values() for shard in split['shards']]
    missing = [name for name in files or ['train.bin'] if not (folder / name).is_file()]
    if missing and (folder / 'prepare.py').is_file():
        raise FileNotFoundError(f'{folder} is not prepared: run python {folder / "prepare.py"}')
    if missing:
        raise FileNotFoundError(f'{folder / missing[0]} is missing: a dataset is a folder with train.bin and val.bin')
    return meta


def read_meta_json(folder):
    """meta.json as pack.write_dataset wrote it. Anybody may have edited it since, so every value is looked at."""
    path = folder / 'meta.json'
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: not JSON: {error}') from None
    need(isinstance(meta, dict), path, 'an object')
    if meta.get('unfinished'):
        raise ValueError(f'{path}: packing this dataset was interrupted: prepare it again')
    need(meta.get('format') == 1, f'{path}: format', '1')
    need(meta.get('dtype') in list(DTYPE_LIMIT), f'{path}: dtype', "'uint16' or 'uint32'")
    try:
        vocab_size = vocab_size_of(meta.get('tokenizer'))
    except ValueError as error:
        raise ValueError(f'{path}: tokenizer: {error}') from None
    need(meta.get('vocab_size') == vocab_size, f'{path}: vocab_size', f'{vocab_size}, the size of its tokenizer')
    need(vocab_size <= DTYPE_LIMIT[meta['dtype']], f'{path}: dtype', f"'uint32' for a vocabulary of {vocab_size}")
    need(isinstance(meta.get('source'), str | None), f'{path}: source', 'a string')
    splits = meta.get('splits')
    need(isinstance(splits, dict) and {'train'} <= set(splits) <= {'train', 'val'}, f'{path}: splits',
         "an object with 'train' and 'val'")
    splits = {name: checked_split(split, f'{path}: splits.{name}') for name, split in splits.items()}
    row, style = meta.get('row_tokens'), meta.get('style')
    whole_rows = is_count(row) and row > 1 and not any(shard['tokens'] % row for split in splits.values() for shard in split['shards'])
    need(row is None or whole_rows, f'{path}: row_tokens', 'a count of 2 or more that divides the tokens of each shard')
    need(isinstance(style, str | None), f'{path}: style', 'a string')
    return {'format': 1, 'dtype': meta['dtype'], 'vocab_size': vocab_size, 'tokenizer': meta['tokenizer'],
            'source': meta.get('source'), 'origin': 'meta.json', 'splits': splits,
            **{key: meta[key] for key in ('row_tokens', 'style') if meta.get(key) is not None}}


def checked_split(split, where):
    need(isinstance(split, dict), where, 'an object')
    shards = split.get('shards')
    need(isinstance(shards, list) and shards, f'{where}.shards', 'a list of one or more')
    for i, shard in enumerate(shards):
        need(isinstance(shard, dict), f'{where}.shards[{i}]', 'an object')
        file, crc32 = shard.get('file'), shard.get('crc32')
        need(isinstance(file, str) and re.fullmatch(r'[\w-]+\.bin', file), f'{where}.shards[{i}].file',
             'the name of a .bin file in this folder')
        need(is_count(shard.get('tokens')), f'{where}.shards[{i}].tokens', 'a count')
        need(crc32 is None or is_count(crc32) and crc32 < 2 ** 32, f'{where}.shards[{i}].crc32', 'below 2**32')
    for key in ('bytes', 'documents'):
        need(split.get(key) is None or is_count(split[key]), f'{where}.{key}', 'a count')
    tokens = sum(shard['tokens'] for shard in shards)
    need(split.get('tokens') == tokens, f'{where}.tokens', f'{tokens}, the sum of its shards')
    return {'tokens': tokens, 'bytes': split.get('bytes'), 'documents': split.get('documents'),
            'shards': [{key: shard.get(key) for key in ('file', 'tokens', 'crc32')} for shard in shards]}


def need(condition, where, what):
    if not condition:
        raise ValueError(f'{where} must be {what}')


def is_count(value):
    return type(value) is int and value >= 0


def meta_of_nanogpt(folder):
    """The same for a folder that nanoGPT or llm.c wrote, where file sizes say all there is to know."""
    with_chars = (folder / 'meta.pkl').exists()
    tokenizer = read_meta_pkl(folder / 'meta.pkl') if with_chars else GPT2_META
    splits = {}
    for name in ('train', 'val'):
        # train.bin; train_000000.bin; as llm.c names them: fineweb_train_000001.bin, TinyStories_train.bin
        patterns = [f'{name}.bin', f'{name}_*.bin', f'*_{name}_*.bin', f'*_{name}.bin']
        paths = next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), [])
        shards = [{'file': path.name, 'tokens': count_uint16(path), 'crc32': None} for path in paths]
        if shards or name == 'train':
            tokens = sum(shard['tokens'] for shard in shards)
            splits[name] = {'tokens': tokens, 'bytes': None, 'documents': None, 'shards': shards}
    return {'format': 1, 'dtype': 'uint16', 'vocab_size': vocab_size_of(tokenizer), 'tokenizer': tokenizer,
            'source': None, 'origin': 'meta.pkl' if with_chars else 'none', 'splits': splits}


def count_uint16(path):
    n_bytes = path.stat().st_size
    with open(path, 'rb') as file:
        if file.read(len(LLMC_MAGIC)) == LLMC_MAGIC:
            n_bytes -= LLMC_HEADER_BYTES
    if n_bytes < 0 or n_bytes % 2:
        raise ValueError(f'{path}: {path.stat().st_size} bytes is no whole number of uint16 tokens')
    return n_bytes // 2


class PlainUnpickler(pickle.Unpickler):
    """Reads dict, list, str and numbers. A pickle runs code only through a name that it imports, and none is."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {f"{module}.{name}"!r}, and only plain values are read')


def read_meta_pkl(path):
    """nanoGPT's meta.pkl, {'vocab_size', 'itos', 'stoi'}, as the meta() of a CharTokenizer."""
    try:
        with open(path, 'rb') as file:
            meta = PlainUnpickler(file).load()
    except OSError:
        raise
    except Exception as error:  # broken bytes raise nearly any exception in there
        raise ValueError(f'{path}: not a meta.pkl of nanoGPT: {error or type(error).__name__}') from None
    itos = meta.get('itos') if type(meta) is dict else None
    need(type(itos) is dict and set(map(type, itos)) == {int} and sorted(itos) == list(range(len(itos))),
         f'{path}: itos', 'a dict from the ids 0, 1, 2 and so on to characters')
    chars = [itos[i] for i in range(len(itos))]
    need(all(type(char) is str and len(char) == 1 for char in chars), f'{path}: itos', 'a dict from ids to one character each')
    need(meta.get('stoi') == {char: i for i, char in enumerate(chars)}, f'{path}: stoi', 'the inverse of itos')
    try:
        return CharTokenizer(''.join(chars)).meta()
    except ValueError as error:
        raise ValueError(f'{path}: itos: {error}') from None


# -----------------------------------------------------------------------------
# shards on disk


class Shard:
    """One .bin file of token ids, mapped when used.

    first  where in its split it begins, in tokens
    mask   (n_tokens,) uint8, 0 = not a target; None = all are
    """

    def __init__(self, path, dtype, n_tokens, first, mask):
        self.path, self.dtype, self.n_tokens, self.first, self.mask = path, dtype, n_tokens, first, mask
        # a map of a file that is too short would end in SIGBUS, which Python cannot catch
        size = path.stat().st_size
        self.header = size - n_tokens * dtype.itemsize
        if self.header not in (0, LLMC_HEADER_BYTES):
            raise ValueError(f'{path} has {size} bytes, expected {n_tokens} tokens of {dtype.itemsize} bytes: it was cut short '
                             'or altered, prepare the dataset again')
        if self.header:
            with open(path, 'rb') as f:
                magic, version, count = (f.read(4) for _ in range(3))
            expected = 1 if dtype.itemsize == 2 else 7  # llm.c's numbers for uint16 and uint32
            version, count = int.from_bytes(version, 'little'), int.from_bytes(count, 'little')
            if magic != LLMC_MAGIC or (version, count) != (expected, n_tokens):
                raise ValueError(f'{path} begins with 1024 bytes that are no header of llm.c for {n_tokens} tokens of {dtype.itemsize} '
                                 f'bytes (it says version {version}, {count} tokens): it was cut short or altered, prepare the dataset again')

    @property
    def tokens(self):
        return map_tokens(self)


@lru_cache(maxsize=256)  # every map holds a file open, and many systems allow a process 1024
def map_tokens(shard):
    """The ids of a shard, (n_tokens,) of its dtype."""
    if not shard.n_tokens:
        return np.empty(0, shard.dtype)
    return np.asarray(np.memmap(shard.path, shard.dtype, 'r', shard.header, (shard.n_tokens,)))


class Split:
    """One split of one dataset: its shards, the .mask and .idx beside them, and what meta.json says of it."""

    def __init__(self, folder, split):
        self.folder, self.split, self.meta = Path(folder), split, read_meta(folder)
        self.vocab_size, self.tokenizer = self.meta['vocab_size'], self.meta['tokenizer']
        known = self.meta['splits'].get(split)
        if known is None:
            raise ValueError(f'{folder} has no {split} split, only {", ".join(self.meta["splits"])}: prepare it with one')
        dtype, first = np.dtype(self.meta['dtype']).newbyteorder('<'), 0
        self.n_tokens = known['tokens']
        self.mask = self.beside('.mask', np.uint8, (self.n_tokens,))
        if self.mask is None and self.meta.get('row_tokens'):
            raise FileNotFoundError(f'{self.folder / split}.mask is missing: it tells answers from questions and padding, prepare the dataset again')
        self.checksums = [shard['crc32'] for shard in known['shards']]
        self.shards = []
        for shard in known['shards']:
            end = first + shard['tokens']
            mask = None if self.mask is None else self.mask[first:end]
            self.shards.append(Shard(self.folder / shard['file'], dtype, shard['tokens'], first, mask))
            first = end

    def beside(self, suffix, dtype, shape):
        """The array in train.mask or train.idx, or None where there is no such file. One dimension may be -1."""
        path, dtype = self.folder / f'{self.split}{suffix}', np.dtype(dtype)
        if not path.exists():
            return None
        size, unit = path.stat().st_size, abs(int(np.prod(shape))) * dtype.itemsize
        if size % unit if -1 in shape else size != unit:
            raise ValueError(f'{path} has {size} bytes, which does not fit the {self.n_tokens} tokens of the {self.split} split: '
                             'it was cut short or altered, prepare the dataset again')
        return np.asarray(np.memmap(path, dtype, 'r')).reshape(shape) if size else np.empty(0, dtype).reshape(shape)

    def documents(self):
        """Where each document lies in the split: offset and length in tokens, (M,) int64 each.

        The one token that parts a document from the next (end-of-text) ends it, so that a model learns where to stop.
        """
        table, path = self.beside('.idx', '<i8', (-1, 2)), self.folder / f'{self.split}.idx'
        if table is None:
            raise FileNotFoundError(f'{path} is missing: rows that begin with documents need it, prepare the dataset with one')
        offset, length = table.T
        outside = (offset < 0) | (length < 0) | (offset > self.n_tokens - length)
        if outside.any():
            at = int(np.argmax(outside))
            raise ValueError(f'{path}: document {at} has offset {offset[at]} and length {length[at]}, the split has {self.n_tokens} tokens: '
                             'it was altered, prepare the dataset again')
        return offset, length + np.append(offset[1:] == (offset + length)[:-1] + 1, False)

    def fingerprint(self):
        """What a checkpoint remembers of its data: sizes, checksums and tokenizer, as plain values."""
        return dict(tokens=[shard.n_tokens for shard in self.shards], crc32=list(self.checksums), vocab_size=self.vocab_size,
                    tokenizer=fingerprint(self.tokenizer))

    def verify(self):
        """Reads every shard against its checksum; ValueError names the one that was altered."""
        for shard, known in zip(self.shards, self.checksums):
            if known is None:
                continue
            crc = 0
            for start in range(0, shard.n_tokens, 1 << 22):
                crc = zlib.crc32(shard.tokens[start:start + (1 << 22)], crc)
            if crc != known:
                raise ValueError(f'{shard.path} does not match its checksum in meta.json: it was altered, prepare the dataset again')


# -----------------------------------------------------------------------------
# the dataset setting


def parse_mixture(dataset):
    """'a:0.7,b:0.3' -> (['a', 'b'], [0.7, 0.3]); a weight left out is 1, and all are scaled to sum to 1."""
    names, weights = [], []
    for part in dataset.split(','):
        name, weight = re.fullmatch(r'(.*?)(?::([^:/\\]*))?', part.strip(), re.DOTALL).groups()  # C:\texts is a name
        try:
            weight = 1.0 if weight is None else float(weight)
        except ValueError:
            weight = 0.0
        if not name or not 0 < weight < float('inf'):
            raise ValueError(f'dataset={dataset}: {part.strip()!r} is no NAME or NAME:WEIGHT with a weight above 0, such as zhwiki:0.7')
        names.append(name)
        weights.append(weight)
    return names, [weight / sum(weights) for weight in weights]


def dataset_folders(dataset):
    """Folder and share of each part of a dataset setting: data/NAME beside this file, else the folder NAME as it stands."""
    names, weights = parse_mixture(dataset)
    here, folders = Path(__file__).resolve().parents[1] / 'data', []
    for name in names:
        folder = Path(name) if Path(name).is_dir() and not (here / name).is_dir() else here / name
        folders.append(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)  # shorter in messages
    return folders, weights
