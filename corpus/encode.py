"""Turn documents into token ids, in threads: tiktoken and tokenizers release Python's global lock.

    encoder = Encoder(tokenizer, val_fraction=0.01, n_threads=2)
    for batch in encoder.encode_all(records):
        ...                                     # a list with an Encoded for each Record
"""
import functools
import hashlib
import re
import unicodedata
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from corpus.writer import Piece

BATCH_DOCUMENTS, BATCH_CHARS = 250, 1 << 20  # one task of a thread, large enough to keep its overhead small
CONTROL = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]')  # and the byte order mark; not tab and line feed


class Record(NamedTuple):
    """A document to encode: a Document of corpus/readers.py, and the split it is for."""

    text: Any  # a text, a row of token ids, or a pair (ids, mask) where mask is 1 for targets
    where: str = ''  # names the document in errors
    n_read: int = 0  # bytes of the corpus on disk read so far
    split: str | None = None  # 'train' or 'val'; None: the hash of the document decides


class Encoded(NamedTuple):
    """A record as token ids. Without a piece, or with an empty one, it is left out."""

    record: Record
    piece: Piece | None = None
    hash: int = 0
    reason: str = ''  # why it is left out; empty records need none


def cleaned(text: str) -> str:
    """Normalize to NFC with line feeds as line ends; drop control characters and surrounding white space."""
    text = text.replace('\r\n', '\n').replace('\r', '\n')
    return unicodedata.normalize('NFC', CONTROL.sub('', text)).strip()


def hash_of(data, purpose=b''):
    """Return a hash of 64 bits. Texts are hashed as UTF-8."""
    if isinstance(data, str):
        data = data.encode('utf-8', 'surrogatepass')
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=purpose).digest(), 'big')


def split_of_hash(value, val_fraction):
    return 'val' if value < val_fraction * 2**64 else 'train'


def split_by_hash(text: str, val_fraction: float) -> str:
    """Return 'train' or 'val'. The text alone decides, so that equal texts are never in both splits."""
    return split_of_hash(hash_of(text), val_fraction)


@dataclass
class Encoder:
    """Which documents to take, and how they become token ids."""

    tokenizer: Any
    val_fraction: float = 0.0  # share for validation, chosen by hash
    clean: bool = False  # normalize texts, see cleaned(), and take each only once
    min_chars: int = 1
    sample: float = 1.0  # share of the texts to take, chosen by hash
    max_docs: int | None = None
    eot_in_rows: bool = False  # put end-of-text between rows of ids as well
    n_threads: int = 1  # the ids do not depend on it

    def recipe(self):
        """Return what the files depend on, as plain values."""
        return dict(val_fraction=self.val_fraction, clean=self.clean, min_chars=self.min_chars,
                    sample=self.sample, max_docs=self.max_docs, tokenizer=self.tokenizer.meta())

    def choose(self, text):
        """Return (text to encode, why it is left out). Rows of ids have no text."""
        if not isinstance(text, str):
            return '', ''
        text = cleaned(text) if self.clean else text
        if 0 < len(text) < self.min_chars:
            return '', 'too short'
        if self.sample < 1 and text and hash_of(text, b'sample') >= self.sample * 2**64:
            return '', 'not in the sample'
        return text, ''

    def encode(self, records):
        """Return an Encoded for each record of a batch."""
        chosen = [self.choose(record.text) for record in records]
        ids_of_texts = self.tokenizer.encode_batch([text for text, _ in chosen])
        batch = []
        for record, (text, reason), ids in zip(records, chosen, ids_of_texts, strict=True):
            if text:
                data = text.encode('utf-8', 'surrogatepass')
                batch.append(Encoded(record, Piece(ids, n_bytes=len(data)), hash_of(data)))
            elif isinstance(record.text, str):
                batch.append(Encoded(record, reason=reason))
            else:
                piece = self.row_piece(record)
                batch.append(Encoded(record, piece, hash_of(piece.ids.tobytes())))
        return batch

    def row_piece(self, record):
        ids, mask = record.text if isinstance(record.text, tuple) else (record.text, None)
        ids = np.asarray(ids)
        if ids.size and (ids.ndim != 1 or ids.dtype.kind not in 'iu'):
            raise ValueError(f'{record.where} has shape {ids.shape} and dtype {ids.dtype}: '
                             'a row of integer token ids is needed')
        ids, vocab_size = ids.astype(np.int64), self.tokenizer.vocab_size
        outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if outside.size:
            raise ValueError(f'{record.where} holds token id {ids[outside[0]]} at position {outside[0]}, '
                             f'outside the vocabulary of {vocab_size} tokens')
        return Piece(ids, mask, int(self.token_bytes[ids].sum()))

    @functools.cached_property
    def token_bytes(self):
        return self.tokenizer.token_bytes()

    def encode_all(self, records):
        """Yield the lists of encode(), in order. At most two batches per thread are in memory."""
        with ThreadPoolExecutor(self.n_threads, 'encoder') as pool:
            pending = deque()
            try:
                for batch in in_batches(records):
                    pending.append(pool.submit(self.encode, batch))
                    if len(pending) > 2 * self.n_threads:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)


def in_batches(records):
    batch, n_chars = [], 0
    for record in records:
        batch.append(record)
        n_chars += len(record.text)
        if len(batch) == BATCH_DOCUMENTS or n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch
