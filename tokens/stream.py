"""Raw text -> batches, encoded while the model trains. Nothing is packed first, and nothing is written.

    python train.py config/train_gpt2.py --dataset=stream:shards/ --tokenizer=gpt2 --stream_val=held_out.jsonl
    python train.py config/quickstart.py --dataset=stream:a.txt,b.parquet --tokenizer=data/tokenizers/bpe

The documents of all files (whatever corpus/readers.py reads) form one row of tokens, with an end-of-text
before each. After the last document the row continues with the first. Window w shows the tokens w * T to (w
+ 1) * T of the row. Windows come in groups of shuffle_window: the groups in order, the windows of a group
in a random order. So the global batch of a step is the same for any number of ranks, and each rank takes
its rows of it.

A checkpoint holds where the group begins that the next step needs. A resumed run reads on from there and
sees the batches of an unbroken run. Every rank encodes the whole row, in threads, because only the tokens
tell where a window begins.

T block_size
"""

import os
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from types import SimpleNamespace

import numpy as np
import torch

from corpus.readers import find_files, n_bytes_of, read_documents
from files import print0
from kernels import IGNORE
from tokens.loader import Batch, Batches
from tokens.tokenizer import fingerprint, load_tokenizer, tokenizer_meta
from tokens.windows import draws, permute

N_THREADS = 2  # each encodes about 10 MB/s; GPT-2 (124M) trains on 2 MB/s on one H100
CHUNK_CHARS = 1 << 18  # text that a thread encodes at a time
BEGINNING = (0, 0, 0, 0)  # epoch, file, document in the file, token in the document
FIRST_EDITION = 6  # numbers in its positions, which counted bytes of a file


class Text:
    """The documents of some files as one row of tokens without end.

    files           as corpus.readers.find_files returns them
    tokenizer       one with an end-of-text
    fields, errors  as in corpus.readers
    """

    def __init__(self, files, tokenizer, fields=('text',), errors: str = 'strict'):
        for path, format in files:
            if format == 'blocks':
                raise ValueError(f'{path} holds token ids, not text: pack it with corpus.pack, '
                                 'and name the dataset')
        self.files, self.tokenizer, self.fields, self.errors = files, tokenizer, tuple(fields), errors
        self.paths = [path for path, _ in files]

    def documents(self, epoch, file, document):
        """Yield (text, beginning) of every document with text from one on, epoch after epoch."""
        any_text = (file, document) != (0, 0)
        while True:
            for number in range(file, len(self.files)):
                reader = read_documents(self.files[number:number + 1], fields=self.fields, errors=self.errors,
                                        start=document)
                for n, (text, *_) in enumerate(reader, document):
                    if text:
                        any_text = True
                        yield text, (epoch, number, n)
                document = 0
            if not any_text:
                raise ValueError(f'{", ".join(self.paths)}: no text in there')
            epoch, file, any_text = epoch + 1, 0, False

    def encoded(self, *position):
        """Yield (ids, beginning) of every document from one on."""
        with ThreadPoolExecutor(N_THREADS, 'tokenizer') as pool:
            pending, chunk, n_chars = deque(), [], 0
            for text, begin in self.documents(*position):
                is_new_epoch = chunk and begin[0] != chunk[0][1][0]
                if n_chars > CHUNK_CHARS or is_new_epoch:
                    pending.append(pool.submit(self.encode, chunk))
                    chunk, n_chars = [], 0
                    if len(pending) > N_THREADS:
                        yield from pending.popleft().result()
                chunk.append((text, begin))
                n_chars += len(text)

    def encode(self, chunk):
        texts, begins = zip(*chunk, strict=True)
        rows = [np.concatenate(([self.tokenizer.eot], ids), dtype=np.int32)
                for ids in self.tokenizer.encode_batch(texts)]
        return zip(rows, begins, strict=True)

    def pieces(self, start, size):
        """Yield (size + 1 tokens, start of the next piece). A piece repeats the last token before it."""
        *position, skip = start
        documents, n_tokens = deque(), 0  # documents not used up, and their tokens
        for ids, begin in self.encoded(*position):
            documents.append((ids, begin))
            n_tokens += len(ids)
            while n_tokens - skip > size:
                piece = np.concatenate([ids for ids, _ in documents])[skip:skip + size + 1]
                skip += size
                while skip >= len(documents[0][0]):
                    n_used = len(documents.popleft()[0])
                    skip, n_tokens = skip - n_used, n_tokens - n_used
                yield piece, (*documents[0][1], skip)


@dataclass(eq=False)
class Stream(Batches):
    """Batches of a Text, by step, as Loader gives those of a packed dataset.

    shuffle_window   shuffle windows within consecutive groups of this size; 1 = do not shuffle
    """
    text: Text
    _: KW_ONLY
    shuffle_window: int = 1024
    n_tokens = None  # unknown before everything is read

    def __post_init__(self):
        super().__post_init__()
        tokenizer = self.text.tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.splits = [SimpleNamespace(tokenizer=tokenizer.meta(), vocab_size=self.vocab_size, meta={})]
        self.starts = {0: BEGINNING}  # where groups begin, by number
        self.groups = {}  # (shuffle_window, T + 1) tokens of the last two groups, by number
        self.following = None  # number, iterator and future of the group that is being made
        self.lock, self.reader = threading.Lock(), ThreadPoolExecutor(1, 'stream')

    def windows(self, g) -> Batch:
        """Return the windows numbered g, (K,) int64, counted over the whole run."""
        tokens = np.empty((len(g), self.block_size + 1), dtype=np.int64)
        numbers, index = np.divmod(g, self.shuffle_window)
        with self.lock:  # against the prefetching thread
            for number in sorted(set(numbers.tolist())):
                rows = numbers == number
                order = permute(index[rows], self.shuffle_window, draws((self.seed, number), 12))
                tokens[rows] = self.group(number)[order]
        tokens = torch.from_numpy(tokens)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def group(self, number):
        """Return the tokens of a group, and start to make the next one in a thread."""
        T, size = self.block_size, self.shuffle_window * self.block_size
        while number not in self.groups:
            nearest = max(n for n in self.starts if n <= number)
            if self.following is None or not nearest <= self.following[0] <= number:
                iterator = self.text.pieces(self.starts[nearest], size)
                self.following = nearest, iterator, self.reader.submit(next, iterator)
            n, iterator, future = self.following
            self.following = None
            piece, self.starts[n + 1] = future.result()
            self.following = n + 1, iterator, self.reader.submit(next, iterator)
            windows = np.lib.stride_tricks.sliding_window_view(piece, T + 1)[::T]
            self.groups = {m: tokens for m, tokens in self.groups.items() if m == n - 1} | {n: windows}
            for old in sorted(self.starts)[1:-100]:
                del self.starts[old]
        return self.groups[number]

    def position(self, step: int) -> dict:
        window = step * self.rows_per_step + self.shift
        with self.lock:
            group = max(n for n in self.starts if n * self.shuffle_window <= window)
            start = list(self.starts[group])
        return dict(window=window, shuffle_window=self.shuffle_window, group=group, start=start)

    def seek(self, position, step: int):
        """Continue from a position at this step. No window is seen twice if the global batch is another now.

        position  None begins with the first window, for a run that was on other data before
        """
        if position is None:
            position = dict(window=0, shuffle_window=self.shuffle_window, group=0, start=BEGINNING)
        if position['shuffle_window'] != self.shuffle_window:
            raise ValueError(f'shuffle_window={self.shuffle_window}: the checkpoint has '
                             f'shuffle_window={position["shuffle_window"]}, which cannot change')
        if len(position['start']) == FIRST_EDITION:
            print0('the checkpoint is of the first edition: reading the stream again from its first file')
        else:
            self.starts[position['group']] = tuple(position['start'])
        self.shift = position['window'] - step * self.rows_per_step

    def fingerprint(self) -> list[dict]:
        text, names = self.text, [os.path.basename(path) for path in self.text.paths]
        sizes = [None if path.startswith('hf://') else n_bytes_of(path) for path in text.paths]
        return [dict(files=names, bytes=sizes, fields=list(text.fields), vocab_size=self.vocab_size,
                     tokenizer=fingerprint(text.tokenizer.meta()))]


class Head:
    """The first windows of a Text in order, held in memory, for evaluation.

    batch_size  windows that an evaluation takes at a time
    n_windows   fewer if the text ends before; None = all
    """

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
        """Return the windows numbered g, (K,) int64. After the end of the text there is no target."""
        index = g[:, None] * self.block_size + np.arange(self.block_size + 1)  # (K, T + 1)
        tokens = self.tokens[np.minimum(index, len(self.tokens) - 1)].astype(np.int64)
        y = np.where(index[:, 1:] < len(self.tokens), tokens[:, 1:], IGNORE)
        return Batch(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(y))


def open_stream(dataset: str, tokenizer, *, stream_val: str, fields: str, errors: str, n_eval: int,
                **settings):
    """Return the Stream of the training text, a Head of it, and a Head of the validation text.

    dataset      'stream:PATH,PATH...'
    tokenizer    its meta(), or the name that tokenizer_meta takes
    stream_val   files and folders for validation, separated by commas; '' takes the first file of the stream
    fields       of corpus.readers, separated by commas
    n_eval       windows in each Head; 0 = the whole validation text, and as many of the other
    settings     of Stream
    """
    tokenizer = load_tokenizer(tokenizer if isinstance(tokenizer, dict) else tokenizer_meta(tokenizer))
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
