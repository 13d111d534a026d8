"""Raw text -> batches, encoded while the model trains, without packing.

    python train.py config/train_gpt2.py --dataset=stream:shards/ --tokenizer=gpt2 --stream_val=held_out.jsonl

The documents of all files form one row of tokens, with an end-of-text before each, and then begin again.
Window w shows the tokens w * T to (w + 1) * T of the row. Windows come in groups of shuffle_window: the
groups in order, the windows of a group in a random order. Every rank encodes the whole row, because only the
tokens tell where a window begins.
"""

import math
import os
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from corpus.readers import find_files, n_bytes_of, read_documents
from files import print0
from tokens.loader import Batch, Batches, pad
from tokens.tokenizer import fingerprint
from tokens.windows import permute

N_THREADS = 2  # each encodes about 10 MB/s; GPT-2 (124M) trains on 2 MB/s on one H100
CHUNK_CHARS = 1 << 18  # text that is read before the threads encode it
BEGINNING = (0, 0, 0, 0)  # epoch, file, document in the file, token in the document


class Text:
    """The documents of some files as one row of tokens without end. The tokenizer needs an end-of-text."""

    def __init__(self, files, tokenizer, fields=('text',), errors: str = 'strict'):
        self.files, self.tokenizer, self.fields, self.errors = files, tokenizer, list(fields), errors
        self.paths = [path for path, _ in files]
        for path, format in files:
            if format == 'blocks':
                raise ValueError(f'{path} holds token ids, not text: pack it with corpus.pack')

    def documents(self, epoch, file, document):
        """Yield (text, (epoch, file, document)) of each document from a given one on, without end."""
        has_text = True
        while has_text:
            has_text = False
            for i in range(file, len(self.files)):
                reader = read_documents(self.files[i:i + 1], fields=self.fields, errors=self.errors,
                                        start=document)
                for n, (text, *_) in enumerate(reader, document):
                    if text:
                        has_text = True
                        yield text, (epoch, i, n)
                document = 0
            epoch, file = epoch + 1, 0
        raise ValueError(f'{", ".join(self.paths)}: no text in there')

    def encoded(self, *position):
        """Yield (ids, (epoch, file, document)) of each document from a given one on."""
        chunk, n_chars = [], 0
        with ThreadPoolExecutor(N_THREADS, 'tokenizer') as pool:
            for text, begin in self.documents(*position):
                is_new_epoch = chunk and begin[0] != chunk[0][1][0]
                if n_chars > CHUNK_CHARS or is_new_epoch:
                    texts, begins = zip(*chunk, strict=True)
                    for ids, start in zip(pool.map(self.tokenizer.encode_array, texts), begins, strict=True):
                        yield np.append(self.tokenizer.eot, ids), start
                    chunk, n_chars = [], 0
                chunk.append((text, begin))
                n_chars += len(text)

    def pieces(self, start, size):
        """Yield (size + 1 tokens, start of the next piece). A piece repeats the last token before it."""
        *position, skip = start
        documents, n_tokens = deque(), -skip  # documents not used up, and their unused tokens
        for document in self.encoded(*position):
            documents.append(document)
            n_tokens += len(document[0])
            while n_tokens > size:
                row = documents[0][0]
                if len(row) <= skip + size:  # else a long document would be copied for each piece
                    row = np.concatenate([ids for ids, _ in documents])
                piece = row[skip:skip + size + 1]
                skip, n_tokens = skip + size, n_tokens - size
                while skip >= len(documents[0][0]):
                    skip -= len(documents.popleft()[0])
                yield piece, (*documents[0][1], skip)


def one_ahead(iterator):
    """Yield the items of an iterator. A thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1, 'stream') as reader:
        future = reader.submit(next, iterator)
        while True:
            item = future.result()
            future = reader.submit(next, iterator)
            yield item


class Stream(Batches):
    """Batches of a Text by step. Windows are shuffled within consecutive groups of shuffle_window."""

    n_tokens = None  # unknown before everything is read

    def __init__(self, text: Text, *, shuffle_window: int = 1024, **shape):
        super().__init__(**shape)
        self.text, self.shuffle_window, self.shift = text, shuffle_window, 0
        self.tokenizer_meta, self.vocab_size = text.tokenizer.meta(), text.tokenizer.vocab_size
        self.starts = {0: BEGINNING}  # where groups begin, by number: the first and the last n_starts
        self.n_starts = 100 + 2 * self.rows_per_step // shuffle_window
        self.groups = {}  # tokens of the last two groups, by number
        self.pieces, self.next_group = None, math.inf  # what is being read, and the group it yields next
        self.lock = threading.Lock()  # against the prefetching thread

    def first_window(self, step: int) -> int:
        return step * self.rows_per_step + self.shift

    def windows(self, g) -> Batch:
        """Return the windows numbered g, ascending (K,) int64."""
        rows = []
        numbers, index = np.divmod(g, self.shuffle_window)
        with self.lock:
            for number in np.unique(numbers).tolist():
                tokens = self.group(number)
                shuffled = permute(index[numbers == number], self.shuffle_window, (self.seed, number))
                rows += [window_of(tokens, i, self.block_size) for i in shuffled.tolist()]
        return pad(rows, self.block_size)

    def count_targets(self, step: int) -> int:
        return self.rows_per_step * self.block_size

    def group(self, number):
        """Return the tokens of a group."""
        if number not in self.groups and number < self.next_group:
            self.next_group = max(n for n in self.starts if n <= number)
            start = self.starts[self.next_group]
            self.pieces = one_ahead(self.text.pieces(start, self.shuffle_window * self.block_size))
        while number not in self.groups:
            current, self.next_group = self.next_group, math.inf  # after an error, read the group anew
            self.groups[current], start = next(self.pieces)
            self.groups.pop(current - 2, None)
            self.next_group = current + 1
            self.starts[self.next_group] = start
            for old in sorted(self.starts)[1:-self.n_starts]:
                del self.starts[old]
        return self.groups[number]

    def position(self, step: int) -> dict:
        window = self.first_window(step)
        with self.lock:
            group = max(n for n in self.starts if n * self.shuffle_window <= window)
            start = list(self.starts[group])
        return dict(window=window, shuffle_window=self.shuffle_window, group=group, start=start)

    def seek(self, position, step: int):
        """Continue from a position at this step, also with another global batch."""
        first = dict(window=0, shuffle_window=self.shuffle_window, group=0, start=BEGINNING)
        position = first | (position or {})  # None: the run was on other data before
        if position['shuffle_window'] != self.shuffle_window:
            raise ValueError(f'shuffle_window={self.shuffle_window}: the checkpoint has '
                             f'shuffle_window={position["shuffle_window"]}, which cannot change')
        if len(position['start']) == len(BEGINNING):
            self.starts[position['group']] = tuple(position['start'])
        else:  # it counted the bytes of a file
            print0('the checkpoint is of the first edition: reading the stream again from its first file')
        self.shift = position['window'] - step * self.rows_per_step

    def fingerprint(self) -> list[dict]:
        paths = self.text.paths
        sizes = [None if path.startswith('hf://') else n_bytes_of(path) for path in paths]
        return [dict(files=[os.path.basename(path) for path in paths], bytes=sizes, fields=self.text.fields,
                     vocab_size=self.vocab_size, tokenizer=fingerprint(self.tokenizer_meta))]


def window_of(tokens, i, T):
    return tokens[i * T:(i + 1) * T + 1]


class Head:
    """The first windows of a Text in order, in memory, for evaluation. n_windows=None takes all."""

    def __init__(self, text: Text, block_size: int, n_windows: int | None = None, *, batch_size: int = 1):
        self.block_size, self.batch_size = block_size, batch_size
        n_wanted = sys.maxsize if n_windows is None else n_windows * block_size + 1
        documents, n_tokens = [], 0
        for ids, (epoch, *_) in text.encoded(*BEGINNING[:3]):
            if epoch or n_tokens >= n_wanted:
                break
            documents.append(ids)
            n_tokens += len(ids)
        self.tokens = np.concatenate(documents)[:n_wanted]
        self.n_windows = -(-(len(self.tokens) - 1) // block_size)

    def windows(self, g: np.ndarray) -> Batch:
        """Return the windows numbered g, (K,) int64."""
        rows = [window_of(self.tokens, i, self.block_size) for i in g.tolist()]
        return pad(rows, self.block_size)


def open_stream(dataset: str, tokenizer, *, stream_val: str, fields: str, errors: str, n_eval: int,
                **settings):
    """Return the Stream of the training text, a Head of it, and a Head of the validation text.

    n_eval  windows in each Head; 0 = the whole validation text, and as many windows of the training text
    """
    if tokenizer.eot is None:
        raise ValueError(f'a {tokenizer.kind} tokenizer has no end-of-text to separate documents of a stream')
    files = find_files(dataset.removeprefix('stream:').split(','))
    if stream_val:
        held_out = find_files(stream_val.split(','))
    else:
        held_out, files = files[:1], files[1:]
    if not files:
        raise ValueError(f'dataset={dataset} is one file, which leaves none for validation: '
                         'name text for that with --stream_val=PATH')
    train, val = (Text(part, tokenizer, fields.split(','), errors) for part in (files, held_out))
    size = dict(block_size=settings['block_size'], batch_size=settings['batch_size'])
    val_head = Head(val, n_windows=n_eval or None, **size)
    return Stream(train, **settings), Head(train, n_windows=n_eval or val_head.n_windows, **size), val_head
