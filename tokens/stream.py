"""Raw text -> batches, tokenized while the model trains: nothing is packed first, and nothing is written.

    python train.py config/train_gpt2.py --dataset=stream:shards/ --tokenizer=gpt2 --stream_val=held_out.jsonl
    python train.py config/quickstart.py --dataset=stream:a.txt,b.parquet,more/ --tokenizer=data/tokenizers/bytebpe_zh

The documents of all files (text, JSONL, Parquet and whatever else corpus/readers.py reads) stand in a row, an end-of-text before each,
and begin again behind the last. Window w shows the tokens w * T to (w + 1) * T of that row. Windows come in groups of shuffle_window: the
groups in order, those of one group in a seeded order of their own. Thus the same global batch follows at any world size; each
rank takes its rows of it.

A checkpoint holds where the group began that the next step needs: epoch, position in the files, and how many tokens of the document
there are past. A resumed run reads on from that point and sees the batches that an unbroken one would.

Every rank tokenizes the whole row, in threads, since only the tokens tell where a window begins.

T block_size
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch

from corpus.old_readers import documents, find_files, n_bytes_of
from kernels import IGNORE
from tokens.loader import Batch, Loader, draws, permute
from tokens.tokenizer import fingerprint, load_tokenizer, tokenizer_meta

ENCODERS = 2  # threads that tokenize, at some 10 MB/s each: GPT-2 (124M) eats 2 MB/s on one H100
BATCH_CHARS = 1 << 19  # what they are given at a time
BEGINNING = (0, 0, 0, 0, 0, 0)  # epoch; file, place, lines, documents: a position of corpus.readers; tokens of that document


class Text:
    """The documents of some files as one row of tokens without end.

    files      as corpus.readers.find_files returns them
    tokenizer  of tokens.tokenizer, with an end-of-text
    fields, errors   as in corpus.readers
    """

    def __init__(self, files, tokenizer, fields=('text',), errors='strict'):
        rows = [path for path, format in files if format == 'blocks']
        if rows:
            raise ValueError(f'{rows[0]} holds token ids, not text: pack it with python -m corpus.pack build, and name the dataset')
        self.paths, self.tokenizer, self.fields, self.errors = [path for path, _ in files], tokenizer, tuple(fields), errors

    def encoded(self, epoch, *position):
        """(ids, where it begins) of every document from a position on; the last one of an epoch is followed by the first."""
        with ThreadPoolExecutor(ENCODERS, 'tokenizer') as pool:
            while True:
                texts, begins, size, beginning, any_text = [], [], 0, position, False
                for text, after in documents(self.paths, fields=self.fields, errors=self.errors, start=position):
                    texts.append(text)
                    begins.append((epoch, *position))
                    position, size, any_text = after, size + len(text), True
                    if size > BATCH_CHARS:
                        yield from zip(pool.map(self.encode, texts), begins)
                        texts, begins, size = [], [], 0
                yield from zip(pool.map(self.encode, texts), begins)
                if not any_text and beginning == BEGINNING[1:5]:
                    raise ValueError(f'{", ".join(self.paths)}: no text in there')
                epoch, position = epoch + 1, BEGINNING[1:5]

    def encode(self, text):
        return np.concatenate(([self.tokenizer.eot], self.tokenizer.encode_array(text)), dtype=np.int32)

    def pieces(self, start, size):
        """(size + 1 tokens, where the next piece begins) over and over; a piece begins with the last token of the one before."""
        *position, skip = start
        held, n_held = [], 0  # documents that are not all past, the tokens in them
        for ids, begin in self.encoded(*position):
            held.append((ids, begin))
            n_held += len(ids)
            while n_held - skip > size:
                piece = np.concatenate([ids for ids, _ in held])[skip:skip + size + 1]
                skip += size
                while skip >= len(held[0][0]):
                    past = len(held.pop(0)[0])
                    skip, n_held = skip - past, n_held - past
                yield piece, (*held[0][1], skip)

    def fingerprint(self):
        """What a checkpoint remembers of its data, as plain values."""
        sizes = [None if path.startswith('hf://') else n_bytes_of(path) for path in self.paths]
        return dict(files=[os.path.basename(path) for path in self.paths], bytes=sizes, fields=list(self.fields),
                    vocab_size=self.tokenizer.vocab_size, tokenizer=fingerprint(self.tokenizer.meta()))


class Stream(Loader):
    """Batches of a Text, by step, as Loader gives those of a packed dataset.

    shuffle_window   how many windows change places with each other; 1 = none
    the rest         as in Loader
    """

    def __init__(self, text, *, block_size, batch_size, grad_accum=1, rank=0, world_size=1, seed=0, shuffle_window=1024, prefetch=False):
        assert block_size > 0 and batch_size > 0 and seed >= 0 and rank < world_size
        self.text, self.block_size, self.batch_size, self.grad_accum, self.seed = text, block_size, batch_size, grad_accum, seed
        self.rank, self.world_size, self.shuffle_window = rank, world_size, shuffle_window
        self.vocab_size, self.n_tokens, self.all_targets = text.tokenizer.vocab_size, None, True
        self.splits = [SimpleNamespace(tokenizer=text.tokenizer.meta(), vocab_size=self.vocab_size, meta={})]
        self.starts, self.groups = {0: BEGINNING}, {}  # by number: where a group begins; (shuffle_window, T + 1) tokens of the last two
        self.next, self.shift = None, 0  # (number, iterator, future) of the group in the making; see seek()
        self.lock, self.reader = threading.Lock(), ThreadPoolExecutor(1, 'stream')
        self.worker, self.ahead = ThreadPoolExecutor(1, 'loader') if prefetch else None, {}

    def _make(self, step, micro_step):
        first = ((step * self.grad_accum + micro_step) * self.world_size + self.rank) * self.batch_size + self.shift
        return self.windows(np.arange(first, first + self.batch_size))

    def windows(self, g):
        """The windows numbered g, (K,) int64, counted over the whole run: x, y (K, T) int64."""
        tokens = np.empty((len(g), self.block_size + 1), dtype=np.int64)
        number, place = np.divmod(g, self.shuffle_window)
        with self.lock:  # the prefetching thread comes here too
            for k in sorted(set(number.tolist())):
                rows = number == k
                tokens[rows] = self._group(k)[permute(place[rows], self.shuffle_window, draws((self.seed, k), 12))]
        tokens = torch.from_numpy(tokens)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def _group(self, k):
        """The tokens of group k; from now on the one after it is in the making."""
        while k not in self.groups:
            known = max(n for n in self.starts if n <= k)
            if self.next is None or not known <= self.next[0] <= k:
                iterator = self.text.pieces(self.starts[known], self.shuffle_window * self.block_size)
                self.next = known, iterator, self.reader.submit(next, iterator)
            n, iterator, future = self.next
            self.next = None
            piece, self.starts[n + 1] = future.result()
            self.next = n + 1, iterator, self.reader.submit(next, iterator)
            self.groups = {m: group for m, group in self.groups.items() if m == n - 1}
            self.groups[n] = np.lib.stride_tricks.as_strided(piece, (self.shuffle_window, self.block_size + 1),
                                                             (piece.itemsize * self.block_size, piece.itemsize), writeable=False)
            for old in sorted(self.starts)[1:-100]:
                del self.starts[old]
        return self.groups[k]

    def position(self, step):
        """What seek() needs to go on with this step, as plain values."""
        window = step * self.batch_size * self.grad_accum * self.world_size + self.shift
        with self.lock:
            known = max(n for n in self.starts if n * self.shuffle_window <= window)
            return dict(window=window, shuffle_window=self.shuffle_window, group=known, start=list(self.starts[known]))

    def seek(self, position, step):
        """Go on from a position at this step. The global batch may have another size than before: what was seen stays seen."""
        position = position or dict(window=0, shuffle_window=self.shuffle_window, group=0, start=BEGINNING)  # the data were others before
        if position['shuffle_window'] != self.shuffle_window:
            raise ValueError(f'shuffle_window={self.shuffle_window}: the checkpoint has shuffle_window={position["shuffle_window"]}, which cannot change')
        self.starts[position['group']] = tuple(position['start'])
        self.shift = position['window'] - step * self.batch_size * self.grad_accum * self.world_size

    def fingerprint(self):
        return [self.text.fingerprint()]


class Head:
    """The first windows of a Text in their order, held in memory, for evaluation.

    n_windows   so many of them, or what the files hold if that is less; None: all
    """

    def __init__(self, text, block_size, n_windows=None):
        parts, size, wanted = [], 0, np.inf if n_windows is None else n_windows * block_size + 1
        for ids, (epoch, *_) in text.encoded(*BEGINNING[:5]):
            if epoch or size >= wanted:
                break
            parts.append(ids)
            size += len(ids)
        self.block_size, self.tokens = block_size, np.concatenate(parts)[:None if n_windows is None else wanted]
        self.n_windows = -(-(len(self.tokens) - 1) // block_size)

    def windows(self, g):
        """The windows numbered g, (K,) int64: x, y (K, T) int64; what the last one lacks is no target."""
        tokens = np.zeros((len(g), self.block_size + 1), dtype=np.int64)
        target = np.zeros(tokens.shape, dtype=bool)
        for row, n in enumerate(g.tolist()):
            found = self.tokens[n * self.block_size:(n + 1) * self.block_size + 1]
            tokens[row, :len(found)], target[row, :len(found)] = found, True
        return Batch(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(np.where(target[:, 1:], tokens[:, 1:], IGNORE)))


def open_stream(dataset, tokenizer, *, stream_val, fields, errors, n_eval, block_size, **settings):
    """(Stream of the training text, Head of it, Head of the validation text) of a dataset 'stream:PATH,PATH...'.

    tokenizer    its meta(), or the name that tokenizer_meta takes
    stream_val   files and folders for validation, by commas; '' = the first file of the stream, which is then not trained on
    fields       of corpus.readers, by commas
    n_eval       windows in each Head; 0 = all of the validation text, and as many of the other
    the rest     as in Stream
    raises       FileNotFoundError, ValueError
    """
    tokenizer = load_tokenizer(tokenizer if isinstance(tokenizer, dict) else tokenizer_meta(tokenizer))
    if tokenizer.eot is None:
        raise ValueError(f'a {tokenizer.kind} tokenizer has no end-of-text to put between the documents of a stream')
    files = find_files(dataset.removeprefix('stream:').split(','))
    held_out = find_files(stream_val.split(',')) if stream_val else files[:1]
    if not stream_val and len(files) < 2:
        raise ValueError(f'dataset={dataset} is one file, which leaves none for validation: name text for that with --stream_val=PATH')
    train, val = (Text(part, tokenizer, fields.split(','), errors) for part in (files if stream_val else files[1:], held_out))
    val_head = Head(val, block_size, n_eval or None)
    return Stream(train, block_size=block_size, **settings), Head(train, block_size, n_eval or val_head.n_windows), val_head
