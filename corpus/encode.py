"""Turn documents into token ids, in threads: tiktoken and tokenizers release Python's global lock."""
import hashlib
import re
import unicodedata
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from corpus.readers import Document
from corpus.textfile import with_line_feeds
from corpus.writer import Piece

BATCH_DOCUMENTS, BATCH_CHARS = 250, 1 << 20  # one task of a thread, large enough to keep its overhead small
CONTROL = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]')  # and the byte order mark; not tab and line feed


class Encoded(NamedTuple):
    document: Document
    piece: Piece = Piece(())  # empty: the document is left out
    hash: int = 0


def cleaned(text: str) -> str:
    """Normalize to NFC with line feeds as line ends; drop control characters and surrounding white space."""
    return unicodedata.normalize('NFC', CONTROL.sub('', with_line_feeds(text))).strip()


def hash_of(data, purpose=b''):
    """Return a hash of 64 bits of bytes or of a text."""
    if isinstance(data, str):
        data = data.encode('utf-8', 'surrogatepass')
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=purpose).digest(), 'big')


def split_by_hash(data, val_fraction: float) -> str:
    """Return 'train' or 'val' for a text or its hash. Equal texts are never in both splits."""
    if isinstance(data, str):
        data = hash_of(data)
    if data < val_fraction * 2**64:
        return 'val'
    return 'train'


@dataclass
class Encoder:
    """Choose documents, and encode them to token ids."""

    tokenizer: Any
    val_fraction: float = 0.0  # share for validation, chosen by hash
    clean: bool = False  # normalize texts, see cleaned(), and keep one copy of each
    min_chars: int = 1
    sample: float = 1.0  # share of the texts to take, chosen by hash
    eot_in_rows: bool = False  # put end-of-text between rows of ids as well
    n_threads: int = 1  # the ids do not depend on it

    def choose(self, text):
        """Return the text to encode, '' to leave it out."""
        if not isinstance(text, str):
            return ''
        if self.clean:
            text = cleaned(text)
        if self.sample < 1 and hash_of(text, b'sample') >= self.sample * 2**64:
            return ''
        if len(text) < self.min_chars:
            return ''
        return text

    def encode(self, documents):
        """Return an Encoded for each document of a batch."""
        texts = [self.choose(document.text) for document in documents]
        ids = iter(self.tokenizer.encode_batch([text for text in texts if text]))
        batch = []
        for document, text in zip(documents, texts, strict=True):
            if text:
                data = text.encode('utf-8', 'surrogatepass')
                batch.append(Encoded(document, Piece(next(ids), n_bytes=len(data)), hash_of(data)))
            elif isinstance(document.text, str):
                batch.append(Encoded(document))
            else:
                piece = self.row_piece(document)
                batch.append(Encoded(document, piece, hash_of(piece.ids.tobytes())))
        return batch

    def row_piece(self, row):
        ids, mask = row.text, None
        if isinstance(ids, tuple):
            ids, mask = ids
        ids = np.asarray(ids)
        if ids.size and (ids.ndim != 1 or ids.dtype.kind not in 'iu'):
            raise ValueError(f'{row.where} has shape {ids.shape} and dtype {ids.dtype}: '
                             'a row of integer token ids is needed')
        ids, vocab_size = ids.astype(np.int64), self.tokenizer.vocab_size
        outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if outside.size:
            raise ValueError(f'{row.where} holds token id {ids[outside[0]]} at position {outside[0]}, '
                             f'outside the vocabulary of {vocab_size} tokens')
        return Piece(ids, mask, int(self.token_bytes[ids].sum()))

    @cached_property
    def token_bytes(self):
        return self.tokenizer.token_bytes()

    def encode_all(self, documents):
        """Yield the lists of encode(), in order. At most two batches per thread are in memory."""
        pool, pending = ThreadPoolExecutor(self.n_threads, 'encoder'), deque()
        try:
            for batch in in_batches(documents):
                pending.append(pool.submit(self.encode, batch))
                if len(pending) > 2 * self.n_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def in_batches(documents):
    batch, n_chars = [], 0
    for document in documents:
        batch.append(document)
        n_chars += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch
