"""Documents to token ids, in threads.

    encoder = Encoder(tokenizer, val_fraction=0.01)
    for batch in encode_in_order(encoder, in_batches(records), n_threads=2):
        ...

Threads are enough, because tiktoken and tokenizers release Python's global lock while they encode.
"""
import hashlib
import re
import sys
import unicodedata
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

BATCH_DOCUMENTS = 250
BATCH_CHARS = 1 << 20


class Record(NamedTuple):
    """A document to encode: a Document of corpus/readers.py, and the split it is for."""

    text: Any  # a text, a row of token ids, or a pair (ids, mask) where mask is 1 for targets
    where: str = ''  # names the document in errors
    n_read: int = 0  # bytes of the corpus on disk read so far
    split: str | None = None  # 'train' or 'val'; None: the hash of the document decides


class Encoded(NamedTuple):
    """A document as token ids."""

    ids: np.ndarray  # (n,) integers
    mask: np.ndarray | None  # (n,) 1 where a token is a target; None: all are
    n_bytes: int
    hash: int
    split: str
    takes_eot: bool  # whether end-of-text stands before it, unless it is the first of its split
    number: int  # its place in the batch


class EncodedBatch(NamedTuple):
    """The documents of consecutive records, without those that were left out."""

    documents: list
    left_out: Counter  # reason -> number of documents
    n_records: int
    n_read: int  # bytes of the corpus on disk read so far


# -----------------------------------------------------------------------------
# which documents, and for which split


def hash_of(data, purpose=b''):
    """Return 64 bits of a document's hash."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=purpose).digest(), 'big')


def utf8(text):
    return text.encode('utf-8', 'surrogatepass')


def split_by_hash(text: str, val_fraction: float) -> str:
    """Return 'train' or 'val'. The text alone decides, so that equal texts are never in both splits."""
    return split_of_hash(hash_of(utf8(text)), val_fraction)


def split_of_hash(value, val_fraction):
    return 'val' if value < val_fraction * 2**64 else 'train'


CONTROL = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]')  # and the byte order mark; not tab and line feed


def cleaned(text: str) -> str:
    """Normalize to NFC with line feeds as line ends; drop control characters and surrounding white space."""
    text = text.replace('\r\n', '\n').replace('\r', '\n')
    return unicodedata.normalize('NFC', CONTROL.sub('', text)).strip()


# -----------------------------------------------------------------------------
# documents to ids


class Encoder:
    """Turn records into token ids.

    clean        normalize texts, see cleaned(); pack() then takes each text once
    sample       share of the texts to keep, chosen by hash
    eot_in_rows  put end-of-text between rows of ids as well
    """

    def __init__(self, tokenizer, *, val_fraction=0.0, clean=False, min_chars=1, sample=1.0,
                 eot_in_rows=False):
        self.tokenizer, self.val_fraction, self.eot_in_rows = tokenizer, val_fraction, eot_in_rows
        self.clean, self.min_chars, self.sample = clean, min_chars, sample
        self.token_bytes = tokenizer.token_bytes()

    def recipe(self):
        return dict(val_fraction=self.val_fraction, clean=self.clean, min_chars=self.min_chars,
                    sample=self.sample, tokenizer=self.tokenizer.meta())

    def __call__(self, records):
        documents, left_out = [None] * len(records), Counter()
        texts = {}  # number of the record -> text to encode
        for number, record in enumerate(records):
            if not isinstance(record.text, str):
                documents[number] = self.encode_row(record, number)
                continue
            text = cleaned(record.text) if self.clean else record.text
            reason = self.reason_to_leave_out(text)
            if reason:
                left_out[reason] += 1
            elif text:
                texts[number] = text
        encoded = self.tokenizer.encode_batch(list(texts.values()))
        for (number, text), ids in zip(texts.items(), encoded, strict=True):
            data = utf8(text)
            value = hash_of(data)
            split = records[number].split or split_of_hash(value, self.val_fraction)
            documents[number] = Encoded(ids, None, len(data), value, split, takes_eot=True, number=number)
        documents = [document for document in documents if document is not None and len(document.ids)]
        return EncodedBatch(documents, left_out, len(records), records[-1].n_read)

    def reason_to_leave_out(self, text):
        if 0 < len(text) < self.min_chars:
            return 'too short'
        if self.sample < 1 and text and hash_of(utf8(text), b'sample') >= self.sample * 2**64:
            return 'not in the sample'
        return ''

    def encode_row(self, record, number):
        ids, mask = record.text if isinstance(record.text, tuple) else (record.text, None)
        ids = checked_row(ids, self.tokenizer, record.where)
        value, n_bytes = hash_of(ids.tobytes()), int(self.token_bytes[ids].sum())
        split = record.split or split_of_hash(value, self.val_fraction)
        return Encoded(ids, mask, n_bytes, value, split, takes_eot=self.eot_in_rows, number=number)


def checked_row(ids, tokenizer, where):
    """Return a row of ids as (n,) int64, all of them in the vocabulary."""
    ids = np.asarray(ids)
    if ids.size == 0:
        return np.zeros(0, dtype=np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in 'iu':
        raise ValueError(f'{where} has shape {ids.shape} and dtype {ids.dtype}: '
                         'a row of integer token ids is needed')
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        position = int(np.argmax((ids < 0) | (ids >= tokenizer.vocab_size)))
        raise ValueError(f'{where} holds token id {ids[position]} at position {position}, '
                         f'outside the vocabulary of {tokenizer.vocab_size} tokens')
    return ids.astype(np.int64)


class Characters:
    """Stand in for a tokenizer while a corpus' characters are collected: ids are code points, each once."""

    vocab_size, eot = sys.maxunicode + 1, None

    def encode_batch(self, texts):
        encoded = [text.encode('utf-32-le', 'surrogatepass') for text in texts]
        return [np.unique(np.frombuffer(codes, dtype='<u4')) for codes in encoded]

    def token_bytes(self):
        return np.zeros(0, dtype=np.int64)

    def meta(self):
        return {'kind': 'characters'}


# -----------------------------------------------------------------------------
# threads


def in_batches(records):
    """Yield lists of records, each for one task of a thread and large enough to keep its overhead small."""
    batch, n_chars = [], 0
    for record in records:
        batch.append(record)
        n_chars += len(record.text)
        if len(batch) == BATCH_DOCUMENTS or n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def encode_in_order(encoder, batches, n_threads):
    """Yield encoder(batch) for each batch, in order. At most two batches per thread are in memory."""
    with ThreadPoolExecutor(n_threads, 'encoder') as pool:
        pending = deque()
        try:
            for batch in batches:
                pending.append(pool.submit(encoder, batch))
                if len(pending) > 2 * n_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
