"""Token shards -> batches, as a pure function of the step.

    loader = Loader('data/shakespeare_char', 'train', block_size=64, batch_size=12)
    x, y, documents = loader.batch(step=1000, micro_step=0)     # (12, 64) int64, whoever asks and whenever

A run needs no loader state to resume. Windows are numbered without end: window g of the run is row g % G of
step g // G, where G is the global batch. Each epoch cuts the data into windows of block_size, beginning at
a random phase, and visits each once in a random order. Phase and order are functions of (seed, epoch).
Ranks take turns at the micro-batches of one global batch.

Example: 10 tokens, block_size 3, an epoch of phase 1. The windows start at 1 and 4 (x = tokens 1-3,
y = tokens 2-4; then 4-6 and 5-7); the order may visit them as 4, 1.

B rows, T block_size, K any number of windows
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from kernels import IGNORE
from tokens.dataset import Split
from tokens.tokenizer import fingerprint

ORDERS = ('shuffle', 'random', 'sequential', 'documents')

# -----------------------------------------------------------------------------
# orders


def scramble(x):
    """Scramble the bits of uint64 numbers with the finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=64)
def draws(seed, count: int, high=1 << 63) -> np.ndarray:
    """Draw random integers below high, one bound or a tuple of `count` bounds: (count,) uint64."""
    return np.random.default_rng(seed).integers(high, size=count, dtype=np.uint64)


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Map indexes by a pseudorandom permutation of range(n), without holding it: (K,) int64 -> (K,) int64.

    Adding, multiplying by an odd number, and folding the upper half onto the lower permute the numbers of a
    given number of bits. A result of n or more is mapped again (cycle walking, Black and Rogaway 2002).
    """
    bits = max(1, (n - 1).bit_length())
    low, half = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)
    result, todo = index.astype(np.uint64), np.arange(index.size)
    while todo.size:
        x = result[todo]
        for add, factor in zip(keys[::2], keys[1::2], strict=True):
            x = (x + add) * (factor | np.uint64(1)) & low
            x ^= x >> half
        result[todo] = x
        todo = todo[x >= n]
    return result.astype(np.int64)


def count_of_each(weights, g: np.ndarray) -> np.ndarray:
    """Count the windows of each source among the first g of a mixture: (K,) int64 -> (n_sources, K) int64.

    One source after another takes its share of what is left, rounded to the nearest. So every count is within
    two windows of its exact share at any g, never decreases with g, and needs no table.
    """
    counts, left = [], g
    for i, weight in enumerate(weights[:-1]):
        count = np.floor(left * (weight / sum(weights[i:])) + 0.5).astype(np.int64)
        counts.append(count)
        left = left - count
    return np.stack([*counts, left])


# -----------------------------------------------------------------------------
# windows

# where a window lies: number of the shard, first token in it, tokens
SPAN = np.dtype([('shard', np.int64), ('start', np.int64), ('length', np.int64)])


def make_spans(shard, start, length) -> np.ndarray:
    spans = np.empty(len(shard), SPAN)
    spans['shard'], spans['start'], spans['length'] = shard, start, length
    return spans


class Windows:
    """The windows of some splits, which count as one: where window g lies, with g counted over all epochs.

    order  'shuffle'     each epoch in a random order, from a random phase
           'sequential'  from the first token on, the last window of a shard short if need be; for evaluation
           'random'      nanoGPT's draws with replacement
           'documents'   as 'shuffle', but each window begins with a document, or T, 2T ... tokens after
                         its beginning; the rest of a row after a document's end is no target
    Datasets of conversations are packed in rows; these are their windows in any order.
    """

    def __init__(self, splits, block_size, order, seed):
        if order not in ORDERS:
            raise ValueError(f'sampling={order}: accepted are {", ".join(ORDERS)}')
        self.block_size, self.order, self.seed = block_size, order, seed
        self.shards = [shard for split in splits for shard in split.shards]
        self.sizes = np.array([shard.n_tokens for shard in self.shards], dtype=np.int64)
        self.table = None  # (n,) SPAN where a rule does not say them
        name = f'{", ".join(str(split.folder) for split in splits)}: the {splits[0].split} split'
        if order == 'documents' or any(split.meta.get('row_tokens') for split in splits):
            self.table = self.cut(splits)
            self.n = len(self.table)
            if not self.n:
                raise ValueError(f'{name} has no document of 2 tokens or more, '
                                 'so there is nothing to predict: add text')
            return

        T, longest = block_size, int(self.sizes.max(initial=0))
        if longest < T + 1:
            size = f'{longest} tokens in its longest shard' if len(self.shards) > 1 else f'{longest} tokens'
            remedy = f'--block_size={longest - 1} or less, or more text' if longest > 1 else 'more text'
            raise ValueError(f'{name} has {size}, too few for one window of block_size {T} and the token '
                             f'after it: use {remedy}')
        if order == 'random':
            per_shard = np.maximum(self.sizes - T, 0)  # every start, as in nanoGPT
        elif order == 'sequential':
            per_shard = -(-np.maximum(self.sizes - 1, 0) // T)
        else:
            # One window less than fits at phase 0. It fits at every phase, so each epoch has the same number.
            per_shard = np.where(self.sizes > T, np.maximum(self.sizes // T - 1, 1), 0)
            # From the last phase, the last window ends with the shard.
            self.n_phases = tuple(np.maximum(self.sizes - per_shard * T, 1).tolist())
        self.firsts = np.concatenate(([0], np.cumsum(per_shard)))  # number of the first window of each shard
        self.n = int(self.firsts[-1])

    def cut(self, splits):
        """Return the spans of all splits, one after another."""
        tables, n_shards = [], 0
        for split in splits:
            in_rows = split.meta.get('row_tokens') or self.order != 'documents'
            table = (cut_rows if in_rows else cut_documents)(split, self.block_size)
            table['shard'] += n_shards
            n_shards += len(split.shards)
            tables.append(table)
        return np.concatenate(tables)

    def locate(self, g: np.ndarray) -> np.ndarray:
        """Return where the windows numbered g lie: (K,) int64 -> (K,) SPAN."""
        if self.order == 'random':
            n = scramble(g.astype(np.uint64) + draws(self.seed, 1)) % np.uint64(self.n)
            return self.spans(n.astype(np.int64), epoch=None)
        epochs, n = np.divmod(g, self.n)
        spans = np.empty(len(g), SPAN)
        for epoch in set(epochs.tolist()):  # mostly one
            rows = epochs == epoch
            index = n[rows]
            if self.order != 'sequential':
                index = permute(index, self.n, draws((*self.seed, epoch), 12))
            spans[rows] = self.spans(index, epoch)
        return spans

    def spans(self, n, epoch):
        """Return where the windows lie that are numbered n from the first token on."""
        if self.table is not None:
            return self.table[n]
        shard = np.searchsorted(self.firsts, n, side='right') - 1
        start = n - self.firsts[shard]
        if self.order != 'random':
            start *= self.block_size
        if self.order == 'shuffle':
            phases = draws((*self.seed, epoch, 1), len(self.n_phases), self.n_phases).astype(np.int64)
            start += phases[shard]
        return make_spans(shard, start, np.minimum(self.block_size + 1, self.sizes[shard] - start))


def enumerate_parts(counts):
    """Return the pairs (i, 0) ... (i, counts[i] - 1) of every i: [2, 0, 1] gives [0, 0, 2], [0, 1, 0]."""
    i = np.repeat(np.arange(len(counts)), counts)
    return i, np.arange(len(i)) - np.repeat(np.cumsum(counts) - counts, counts)


def cut_documents(split: Split, T: int) -> np.ndarray:
    """Cut the documents of a split into windows of 2 to T + 1 tokens: (n,) SPAN.

    A window begins with the last token of the one before, so that every token except a document's first is a
    target once. A document that continues in the next shard is cut there.
    """
    offset, length = split.documents()
    border = np.array([shard.first for shard in split.shards] + [split.n_tokens])
    first_shard = np.searchsorted(border[:-1], offset, side='right') - 1
    last_shard = np.searchsorted(border[:-1], offset + length - 1, side='right') - 1
    document, part = enumerate_parts(np.where(length > 0, last_shard - first_shard + 1, 0))
    shard = first_shard[document] + part
    start = np.maximum(offset[document], border[shard])
    end = np.minimum((offset + length)[document], border[shard + 1])
    n_windows = np.maximum(-(-(end - start - 1) // T), 0)  # one token alone has no target
    stretch, piece = enumerate_parts(n_windows)
    begin = start[stretch] + piece * T
    return make_spans(shard[stretch], begin - border[shard[stretch]], np.minimum(end[stretch] - begin, T + 1))


def cut_rows(split: Split, T: int) -> np.ndarray:
    """Return the rows in which a split was packed; of another split, its windows in order: (n,) SPAN."""
    row = split.meta.get('row_tokens')
    if row not in (None, T + 1):
        raise ValueError(f'{split.folder} was packed in rows for block_size {row - 1}: '
                         f'use --block_size={row - 1}, or pack it again with --block_size {T}')
    sizes = np.array([shard.n_tokens for shard in split.shards], dtype=np.int64)
    stride, per_shard = T, -(-np.maximum(sizes - 1, 0) // T)
    if row:
        stride, per_shard = row, sizes // row
    shard, nth = enumerate_parts(per_shard)
    return make_spans(shard, nth * stride, np.minimum(T + 1, sizes[shard] - nth * stride))


# -----------------------------------------------------------------------------
# batches


class Batch(NamedTuple):
    """Tokens, targets, and with isolate=True the document number of each token, (K, T) int64 each."""
    x: torch.Tensor
    y: torch.Tensor
    documents: torch.Tensor | None = None

    def to(self, device):
        """Copy the batch to a device. A copy to CUDA comes from pinned memory and does not wait."""
        tensors = [tensor for tensor in self if tensor is not None]
        if torch.device(device).type == 'cuda':
            tensors = [tensor.pin_memory() for tensor in tensors]
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


@dataclass(eq=False, kw_only=True)
class Batches:
    """What the batches of packed data and of a stream share. A subclass defines windows(g).

    batch_size   rows of one micro-batch of one rank
    grad_accum   micro-steps of one rank; the global batch is batch_size * grad_accum * world_size rows
    prefetch     whether a thread makes the batch after the requested one
    """
    block_size: int
    batch_size: int
    grad_accum: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    prefetch: bool = False

    def __post_init__(self):
        self.rows_per_step = self.batch_size * self.grad_accum * self.world_size
        self.shift = 0  # windows numbered from here on belong to step 0; see Stream.seek
        self.worker = ThreadPoolExecutor(1, 'loader') if self.prefetch else None
        self.ahead = {}  # (step, micro_step) -> future batch; may be dropped at any time

    def batch(self, step: int, micro_step: int = 0) -> Batch:
        """Return the batch of a micro-step of this rank, (B, T) each. y is -100 where there is no target."""
        if self.worker is None:
            return self.make(step, micro_step)
        future = self.ahead.pop((step, micro_step), None)
        following = (step, micro_step + 1) if micro_step + 1 < self.grad_accum else (step + 1, 0)
        self.ahead = {following: self.worker.submit(self.make, *following)}
        return future.result() if future is not None else self.make(step, micro_step)

    def make(self, step, micro_step):
        micro_batch = (step * self.grad_accum + micro_step) * self.world_size + self.rank
        first = micro_batch * self.batch_size + self.shift
        return self.windows(np.arange(first, first + self.batch_size))

    def count_targets(self, step: int) -> int:
        """Count the targets in the global batch of a step, of all ranks and micro-steps."""
        return self.rows_per_step * self.block_size


@dataclass(eq=False)
class Loader(Batches):
    """Batches of one split of a dataset, or of a mixture of several, by step.

    folders      one folder or several
    split        'train' | 'val'
    order        as in Windows; 'sequential' reads all folders one after another, whatever their weights
    weights      share of each folder, summing to 1; None = all count as one dataset
    isolate      whether batches hold the number of each token's document
    raises       ValueError, FileNotFoundError if the data do not fit
    """
    folders: list
    split: str
    _: KW_ONLY
    order: str = 'shuffle'
    weights: list | None = None
    isolate: bool = False

    def __post_init__(self):
        super().__post_init__()
        folders = self.folders if isinstance(self.folders, list) else [self.folders]
        self.splits = [Split(folder, self.split) for folder in folders]
        first = self.splits[0]
        for other in self.splits[1:]:
            if fingerprint(other.tokenizer) != fingerprint(first.tokenizer):
                raise ValueError(f'{other.folder} and {first.folder} were packed with different tokenizers: '
                                 'pack them with one')
            if other.meta['dtype'] != first.meta['dtype']:
                dtypes = f'{other.meta["dtype"]}, {first.folder} {first.meta["dtype"]}'
                raise ValueError(f'{other.folder} holds {dtypes}: pack them alike')
        self.vocab_size, self.dtype = first.vocab_size, first.shards[0].tokens.dtype
        self.n_tokens = sum(split.n_tokens for split in self.splits)
        no_mask = all(split.mask is None for split in self.splits)
        self.all_are_targets = no_mask and self.order in ('shuffle', 'random')
        groups, self.shares = [self.splits], [1.0]
        if self.weights is not None and self.order != 'sequential':
            groups, self.shares = [[split] for split in self.splits], self.weights
        self.sources = [Windows(group, self.block_size, self.order, (self.seed, k))
                        for k, group in enumerate(groups)]
        for split in self.splits if self.isolate else ():
            assert split.begins is not None  # a missing or broken .idx ends the run here

    @property
    def n_windows(self) -> int:
        """The number of windows in one pass over everything."""
        return sum(source.n for source in self.sources)

    def locate(self, g):
        """Yield (row, shard, start, length) of each window numbered g, (K,) int64."""
        counts = count_of_each(self.shares, np.asarray(g))
        is_from = count_of_each(self.shares, np.asarray(g) + 1) > counts  # (n_sources, K)
        for source, count, is_row in zip(self.sources, counts, is_from, strict=True):
            rows = np.flatnonzero(is_row)
            spans = source.locate(count[rows]).tolist()
            for row, (shard, start, length) in zip(rows.tolist(), spans, strict=True):
                yield row, source.shards[shard], start, length

    def windows(self, g) -> Batch:
        """Return the windows numbered g, (K,) int64, counted over the whole run."""
        T = self.block_size
        rows = [b''] * len(g)  # converting all at once is faster than row by row
        n_bytes = (T + 1) * self.dtype.itemsize
        is_target = None if self.all_are_targets else np.zeros((len(g), T + 1), dtype=bool)
        documents = np.zeros((len(g), T), dtype=np.int64) if self.isolate else None
        for row, shard, start, length in self.locate(g):
            rows[row] = shard.tokens.read_bytes(start, length).ljust(n_bytes, b'\0')
            if is_target is not None:
                is_target[row, :length] = shard.is_target(start, length)
            if documents is not None:
                positions = shard.first + start + np.arange(T)
                documents[row] = np.searchsorted(shard.split.begins, positions, side='right')
        tokens = np.frombuffer(b''.join(rows), self.dtype).reshape(len(g), T + 1).astype(np.int64)
        if tokens.max() >= self.vocab_size:
            self.name_foreign_id(g)
        x, y = tokens[:, :-1], tokens[:, 1:]
        if is_target is not None:
            y = np.where(is_target[:, 1:], y, IGNORE)
        arrays = [array for array in (x, y, documents) if array is not None]
        return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))

    def count_targets(self, step: int) -> int:
        if self.all_are_targets:
            return super().count_targets(step)
        n = 0
        first = step * self.rows_per_step
        for _, shard, start, length in self.locate(np.arange(first, first + self.rows_per_step)):
            n += np.sum(np.broadcast_to(shard.is_target(start + 1, length - 1), length - 1))
        return int(n)

    def name_foreign_id(self, g):
        for _, shard, start, length in self.locate(g):
            ids = shard.tokens.read(start, length)
            beyond = np.flatnonzero(ids >= self.vocab_size)
            if beyond.size:
                i = int(beyond[0])
                raise ValueError(f'{shard.path} offset {start + i}: token id {ids[i]} is beyond vocab_size '
                                 f'{self.vocab_size}: the shard was made with another tokenizer or altered, '
                                 'prepare the dataset again')

    def fingerprint(self) -> list[dict]:
        return [split.fingerprint() for split in self.splits]

    def position(self, step: int):
        """Return what a checkpoint needs besides the step: nothing. Streams need more."""

    def seek(self, position, step: int):
        """Do nothing: the step says it all."""
