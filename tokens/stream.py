"""Raw text -> batches, encoded while the model trains. Nothing is packed first, and nothing is written.

    python train.py config/train_gpt2.py --dataset=stream:shards/ --tokenizer=gpt2 --stream_val=held_out.jsonl

The documents of all files form one row of tokens, with an end-of-text before each, and then begin again.
Window w shows the tokens w * T to (w + 1) * T of the row. Windows come in groups of shuffle_window: the
groups in order, the windows of a group in a random order. Every rank encodes the whole row, because only the
tokens tell where a window begins.
"""

import math
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from corpus.encode import Encoder
from corpus.readers import find_files, n_bytes_of, read_documents
from files import print0
from tokens.loader import Batch, Batches, pad
from tokens.tokenizer import fingerprint
from tokens.windows import permute

N_THREADS = 2  # each encodes about 10 MB/s; GPT-2 (124M) trains on 2 MB/s on one H100
BEGINNING = (0, 0, 0, 0)  # epoch, file, document in the file, token in the document
KEPT_STARTS = 100  # groups of which the start is known


class Text:
    """The documents of some files as one row of tokens without end. The tokenizer needs an end-of-text."""

    def __init__(self, files, tokenizer, fields=('text',), errors: str = 'strict'):
        self.files, self.tokenizer, self.fields, self.errors = files, tokenizer, list(fields), errors
        self.paths = [path for path, _ in files]
        for path, format in files:
            if format == 'blocks':
                raise ValueError(f'{path} holds token ids, not text: pack it with corpus.pack')

    def documents(self, epoch, file, document):
        """Yield each Document from a given one to the end of its epoch, with (epoch, file, document)."""
        for i in range(file, len(self.files)):
            texts = read_documents(self.files[i:i + 1], fields=self.fields, errors=self.errors,
                                   start=document)
            for n, text in enumerate(texts, document):
                yield text._replace(where=(epoch, i, n))
            document = 0

    def encoded(self, epoch, file, document):
        """Yield (ids, (epoch, file, document)) of each document from a given one on, without end."""
        encoder, has_text = Encoder(self.tokenizer, n_threads=N_THREADS), True
        while has_text:
            has_text = False
            for batch in encoder.encode_all(self.documents(epoch, file, document)):
                for text, piece, _ in batch:
                    if len(piece.ids):
                        has_text = True
                        yield np.append(self.tokenizer.eot, piece.ids), text.where
            epoch, file, document = epoch + 1, 0, 0
        raise ValueError(f'{", ".join(self.paths)}: no text in there')

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


class Stream(Batches):
    """Batches of a Text by step. Windows are shuffled within consecutive groups of shuffle_window."""

    n_tokens = None  # unknown before everything is read

    def __init__(self, text: Text, *, shuffle_window: int = 1024, **shape):
        super().__init__(**shape)
        self.text, self.shuffle_window, self.shift = text, shuffle_window, 0
        self.tokenizer_meta, self.vocab_size = text.tokenizer.meta(), text.tokenizer.vocab_size
        self.starts = {0: BEGINNING}  # of groups, by number
        self.groups = {}  # tokens of the last two groups, by number
        self.reader = ThreadPoolExecutor(1, 'stream')
        self.pieces, self.next_group, self.next_piece = None, math.inf, None  # the next piece is read ahead
        self.lock = threading.Lock()  # against the prefetching thread

    def first_window(self, step: int) -> int:
        return step * self.rows_per_step + self.shift

    def windows(self, g) -> Batch:
        """Return the windows numbered g, ascending (K,) int64."""
        rows = []
        numbers, index = np.divmod(g, self.shuffle_window)
        with self.lock:
            for number in np.unique(numbers).tolist():
                shuffled = permute(index[numbers == number], self.shuffle_window, (self.seed, number))
                rows += windows_of(self.group(number), shuffled, self.block_size)
        return pad(rows, self.block_size)

    def count_targets(self, step: int) -> int:
        return self.rows_per_step * self.block_size

    def group(self, number):
        """Return the tokens of a group. Reading continues, or begins again at the last start before it."""
        if number not in self.groups and number < self.next_group:
            self.next_group = max(n for n in self.starts if n <= number)
            size = self.shuffle_window * self.block_size
            self.pieces = self.text.pieces(self.starts[self.next_group], size)
            self.next_piece = self.reader.submit(next, self.pieces)
        while number not in self.groups:
            self.groups[self.next_group], start = self.next_piece.result()
            self.next_piece = self.reader.submit(next, self.pieces)
            self.groups.pop(self.next_group - 2, None)
            self.next_group += 1
            self.starts[self.next_group] = start
            self.starts.pop(self.next_group - KEPT_STARTS, None)
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


def windows_of(tokens, numbers, T):
    return [tokens[i * T:(i + 1) * T + 1] for i in numbers.tolist()]


class Head:
    """The first windows of a Text in order, in memory, for evaluation. n_windows=0 takes all."""

    def __init__(self, text: Text, block_size: int, n_windows: int = 0, *, batch_size: int = 1):
        self.block_size, self.batch_size = block_size, batch_size
        documents, n_tokens = [], 0
        for ids, (epoch, *_) in text.encoded(*BEGINNING[:3]):
            if epoch or (n_windows and n_tokens > n_windows * block_size):
                break
            documents.append(ids)
            n_tokens += len(ids)
        self.tokens = np.concatenate(documents)
        n_there = -(-(n_tokens - 1) // block_size)
        self.n_windows = min(n_windows or n_there, n_there)

    def windows(self, g: np.ndarray) -> Batch:
        """Return the windows numbered g, (K,) int64. After the end of the text there is no target."""
        return pad(windows_of(self.tokens, g, self.block_size), self.block_size)


def open_stream(dataset: str, tokenizer, *, stream_val: str, fields: str, errors: str, n_eval: int,
                **settings):
    """Return the Stream of the training text, a Head of it, and a Head of the validation text.

    n_eval    windows in each Head; 0 = the whole validation text, and as many windows of the training text
    settings  of Stream
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
    val_head = Head(val, n_windows=n_eval, **size)
    return Stream(train, **settings), Head(train, n_windows=n_eval or val_head.n_windows, **size), val_head
