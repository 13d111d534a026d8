"""Which tokens window g of a run shows: a pure function of g, the seed and the data.

Each epoch cuts the data into windows of block_size, beginning at a random phase, and visits each once in a
random order. Phase and order are functions of (seed, epoch).

Example: 10 tokens, block_size 3, an epoch of phase 1. The windows start at 1 and 4 (x = tokens 1-3,
y = tokens 2-4; then 4-6 and 5-7); the order may visit them as 4, 1.

T block_size, K any number of windows
"""

from functools import lru_cache

import numpy as np

ORDERS = ('shuffle', 'random', 'sequential', 'documents')


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
        counts.append(np.floor(left * (weight / sum(weights[i:])) + 0.5).astype(np.int64))
        left = left - counts[-1]
    return np.stack([*counts, left])


class Windows:
    """The windows of some splits, which count as one dataset.

    order  'shuffle'     each epoch in a random order, from a random phase
           'sequential'  from the first token on; the last window of a shard may be short; for evaluation
           'random'      nanoGPT's draws with replacement
           'documents'   as 'shuffle', but each window begins with a document, or T, 2T ... tokens after
                         its beginning; the rest of a row after a document's end is no target
    seed   a tuple
    Datasets of conversations are packed in rows; these are their windows in any order.
    """

    def __init__(self, splits, T, order, seed):
        if order not in ORDERS:
            raise ValueError(f'sampling={order}: accepted are {", ".join(ORDERS)}')
        self.order, self.seed, self.T = order, seed, T
        self.shards = [shard for split in splits for shard in split.shards]
        self.sizes = np.array([shard.n_tokens for shard in self.shards], dtype=np.int64)
        name = f'{", ".join(str(split.folder) for split in splits)}: the {splits[0].split} split'
        self.table = None
        if order == 'documents' or any(split.meta.get('row_tokens') for split in splits):
            self.table = self.cut_all(splits)
            self.n = len(self.table)
            if not self.n:
                raise ValueError(f'{name} has no document of 2 tokens or more, '
                                 'so there is nothing to predict: add text')
            return

        longest = int(self.sizes.max(initial=0))
        if longest < T + 1:
            size = f'{longest} tokens' + ' in its longest shard' * (len(self.shards) > 1)
            remedy = f'--block_size={longest - 1} or less, or more text' if longest > 1 else 'more text'
            raise ValueError(f'{name} has {size}, too few for one window of block_size {T} and the token '
                             f'after it: use {remedy}')
        self.stride, n_phases = T, np.ones_like(self.sizes)
        if order == 'random':  # every start, as in nanoGPT
            self.stride, per_shard = 1, np.maximum(self.sizes - T, 0)
        elif order == 'sequential':
            per_shard = -(-np.maximum(self.sizes - 1, 0) // T)
        else:
            # One window less than fits at phase 0. It fits at every phase, so each epoch has the same number.
            per_shard = np.where(self.sizes > T, np.maximum(self.sizes // T - 1, 1), 0)
            # From the last phase, the last window ends with the shard.
            n_phases = np.maximum(self.sizes - per_shard * T, 1)
        self.n_phases = tuple(n_phases.tolist())
        self.firsts = np.concatenate(([0], np.cumsum(per_shard)))  # number of the first window of each shard
        self.n = int(self.firsts[-1])

    def cut_all(self, splits):
        tables, n_shards = [], 0
        for split in splits:
            for shard, table in enumerate(cut(split, self.T, self.order), n_shards):
                table[:, 0] = shard
                tables.append(table)
            n_shards += len(split.shards)
        return np.concatenate(tables)

    def locate(self, g: np.ndarray) -> np.ndarray:
        """Return (shard number, first token in it, tokens) of the windows g: (K,) int64 -> (K, 3) int64."""
        if self.order == 'random':
            n = scramble(g.astype(np.uint64) + draws(self.seed, 1)) % np.uint64(self.n)
            return self.spans(n.astype(np.int64), 0)
        epochs, n = np.divmod(g, self.n)
        spans = np.empty((len(g), 3), dtype=np.int64)
        for epoch in set(epochs.tolist()):
            rows = epochs == epoch
            index = n[rows]
            if self.order != 'sequential':
                index = permute(index, self.n, draws((*self.seed, epoch), 12))
            spans[rows] = self.spans(index, epoch)
        return spans

    def spans(self, n, epoch):
        """Locate the windows numbered n from the first token on."""
        if self.table is not None:
            return self.table[n]
        shard = np.searchsorted(self.firsts, n, side='right') - 1
        phases = draws((*self.seed, epoch, 1), len(self.n_phases), self.n_phases).astype(np.int64)
        start = phases[shard] + self.stride * (n - self.firsts[shard])
        return np.stack([shard, start, np.minimum(self.T + 1, self.sizes[shard] - start)], axis=1)


def cut(split, T: int, order: str):
    """Yield the windows of each shard of a split, (n, 3) int64 as locate() gives them; shard is left 0.

    A document is cut into windows of 2 to T + 1 tokens. A window begins with the last token of the one
    before, so that every token except a document's first is a target once. A document that continues in the
    next shard is cut there. In other orders the rows of a dataset, or else its shards, are cut as documents.
    """
    row = split.meta.get('row_tokens')
    if row not in (None, T + 1):
        raise ValueError(f'{split.folder} was packed in rows for block_size {row - 1}: '
                         f'use --block_size={row - 1}, or pack it again with --block_size {T}')
    if row:
        begin = np.arange(0, split.n_tokens, row)
        end = begin + row
    elif order == 'documents':
        begin, length = split.documents()
        order = np.lexsort((length, begin))
        begin, end = begin[order], (begin + length)[order]
    else:
        begin = np.array([shard.first for shard in split.shards])
        end = np.append(begin[1:], split.n_tokens)

    for shard in split.shards:
        last = shard.first + shard.n_tokens
        inside = slice(np.searchsorted(end, shard.first, side='right'), np.searchsorted(begin, last))
        start = np.maximum(begin[inside], shard.first) - shard.first
        length = np.minimum(end[inside], last) - shard.first - start
        n_windows = np.maximum(-(-(length - 1) // T), 0)  # one token alone has no target
        document = np.repeat(np.arange(len(start)), n_windows)
        # 0, 1, 2 ... within each document
        nth = np.arange(len(document)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
        tokens = np.minimum(length[document] - nth * T, T + 1)
        yield np.stack([np.zeros_like(nth), start[document] + nth * T, tokens], axis=1)
