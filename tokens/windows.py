"""The order in which a run visits the windows of its data: a pure function of the seed and the sizes.

A window is up to T + 1 tokens in a row: T inputs, and the target of the last one. With 10 tokens and T = 3,
an epoch of phase 1 has the windows 1-4 and 4-7, and may visit the second one first.

T block_size, K any number of windows, M any number of rows or documents
"""

from functools import lru_cache

import numpy as np


def scramble(x):
    """Scramble the bits of uint64 numbers as splitmix64 does (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=64)
def draws(seed, count: int, high=1 << 63) -> np.ndarray:
    """Draw random integers below high, one bound or a tuple of `count` bounds: (count,) uint64."""
    return np.random.default_rng(seed).integers(high, size=count, dtype=np.uint64)


def permute(index: np.ndarray, n: int, seed) -> np.ndarray:
    """Map indexes by a pseudorandom permutation of range(n): (K,) int64 -> (K,) int64.

    Each step permutes the numbers of `bits` bits. A result of n or more is mapped again (cycle walking, Black
    and Rogaway 2002).
    """
    keys, bits = draws(seed, 12), max(1, (n - 1).bit_length())
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

    Each source takes its share of what the sources before it leave, rounded. So a count stays within two
    windows of its exact share, and never decreases.
    """
    counts, left = [], g
    for i, weight in enumerate(weights[:-1]):
        counts.append(np.floor(left * (weight / sum(weights[i:])) + 0.5).astype(np.int64))
        left = left - counts[-1]
    return np.stack([*counts, left])


def choose_source(weights, g: np.ndarray):
    """Return the source of each window g of a mixture, and its number within that source: (K,) int64 each."""
    counts = count_of_each(weights, g)
    source = np.argmax(count_of_each(weights, g + 1) > counts, axis=0)
    return source, counts[source, np.arange(len(g))]


class Windows:
    """The windows of some splits treated as one, numbered without end in the order of a run.

    order   'shuffle'     each epoch in a random order, from a random phase in each shard
            'sequential'  from the first token on, for evaluation; the last window of a shard may be short
            'random'      nanoGPT's draws with replacement
            'documents'   as 'shuffle', but a document is cut into windows on its own
    Conversations are packed in rows; these are their windows in any order.
    """

    def __init__(self, splits, T, order, seed):
        self.splits, self.T, self.order, self.seed = splits, T, order, seed
        # The tokens of all splits are numbered through. Borders are the first token of each, and the end.
        sizes = [shard.size for split in splits for shard in split.shards]
        self.split_borders = np.cumsum([0, *(split.n_tokens for split in splits)], dtype=np.int64)
        shard_borders = np.cumsum([0, *sizes], dtype=np.int64)  # NumPy 1 counts in 32 bits on Windows

        # Windows are cut from units, which none of them leaves: shards, or documents and rows.
        unit, least = 'shard', T + 1  # tokens that a unit needs
        self.begin, self.end = shard_borders[:-1], shard_borders[1:]
        if order == 'documents' or any(split.row_tokens for split in splits):
            unit, least = 'document', 2
            self.begin, self.end = self.cut(self.spans(), shard_borders)
        size = self.end - self.begin
        if not (size >= least).any():
            folders = ', '.join(str(split.folder) for split in splits)
            raise ValueError(f'{folders}: the {splits[0].split} split has no {unit} of {least} tokens or '
                             'more: use a smaller --block_size or more text')

        # A window begins with the last token of the one before, so that each token is a target once.
        n_windows = -(-np.maximum(size - 1, 0) // T)  # one token alone has no target
        self.stride, self.n_phases = T, ()
        if order == 'random' and unit == 'shard':
            self.stride, n_windows = 1, np.maximum(size - T, 0)
        elif order == 'shuffle' and unit == 'shard':
            # One window less than fits at phase 0 fits at every phase, so all epochs have the same number.
            n_windows = np.where(size > T, np.maximum(size // T - 1, 1), 0)
            # From the last phase, the last window ends with the shard.
            self.n_phases = tuple(np.maximum(size - n_windows * T, 1).tolist())
        self.first_windows = np.cumsum([0, *n_windows])  # number of the first window of each unit
        self.n = int(self.first_windows[-1])  # windows in an epoch

    def spans(self):
        """Return begin and end of each row or document: (2, M) int64."""
        spans = []
        for split, first in zip(self.splits, self.split_borders[:-1], strict=True):
            row = split.row_tokens
            if row not in (None, self.T + 1):
                raise ValueError(f'{split.folder} was packed in rows for block_size {row - 1}: use '
                                 f'--block_size={row - 1}, or pack it again with --block_size {self.T}')
            begin, size = np.array([0]), split.n_tokens
            if row:
                begin, size = np.arange(0, split.n_tokens, row), row
            elif self.order == 'documents':
                begin, size = split.documents()
            spans.append(np.stack([begin, begin + size]) + first)
        return np.concatenate(spans, axis=1)

    def cut(self, spans, borders):
        """Cut spans at the borders of shards: (2, M) int64 -> (2, M or more) int64."""
        begin, end = spans
        # a border lies inside a span if more spans have begun there than have ended
        n_begun, n_ended = np.searchsorted(begin, borders), np.searchsorted(end, borders, side='right')
        inside = np.unique(borders[n_begun > n_ended])
        return np.sort(np.append(begin, inside)), np.sort(np.append(end, inside))

    def locate(self, g: np.ndarray) -> np.ndarray:
        """Return (number of the split, first token in it, tokens) of the windows g: (K,) -> (K, 3) int64."""
        if self.order == 'random':
            n = scramble(g.astype(np.uint64) + draws(self.seed, 1)) % np.uint64(self.n)
            return self.in_order(n.astype(np.int64), 0)
        epochs, index = np.divmod(g, self.n)
        located = np.empty((len(g), 3), dtype=np.int64)
        for epoch in set(epochs.tolist()):
            rows = epochs == epoch
            n = index[rows]
            if self.order != 'sequential':
                n = permute(n, self.n, (*self.seed, epoch))
            located[rows] = self.in_order(n, epoch)
        return located

    def in_order(self, n, epoch):
        """Locate windows by their number in the order of the data."""
        i = np.searchsorted(self.first_windows, n, side='right') - 1  # units
        start = self.begin[i] + self.stride * (n - self.first_windows[i])
        if self.n_phases:
            phases = draws((*self.seed, epoch, 1), len(self.n_phases), self.n_phases)
            start += phases.astype(np.int64)[i]
        size = np.minimum(self.T + 1, self.end[i] - start)
        split = np.searchsorted(self.split_borders, start, side='right') - 1
        return np.stack([split, start - self.split_borders[split], size], axis=1)
