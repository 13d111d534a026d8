"""The order in which a run visits the windows of its data: a pure function of the seed and the sizes.

A window is up to T + 1 tokens in a row: T inputs, and the target of the last one. With 10 tokens and T = 3,
an epoch of phase 1 has the windows 1-4 and 4-7, and may visit the second one first.

T block_size, K any number of windows
"""

from functools import lru_cache

import numpy as np


def scramble(x):
    """Scramble the bits of uint64 numbers with the finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=64)
def draws(seed, count: int, high=1 << 63) -> np.ndarray:
    """Draw random integers below high, one bound or a tuple of `count` bounds: (count,) uint64."""
    return np.random.default_rng(seed).integers(high, size=count, dtype=np.uint64)


def permute(index: np.ndarray, n: int, seed) -> np.ndarray:
    """Map indexes by a pseudorandom permutation of range(n): (K,) int64 -> (K,) int64.

    Adding, multiplying by an odd number, and folding the upper half onto the lower permute the numbers of a
    given number of bits. A result of n or more is mapped again (cycle walking, Black and Rogaway 2002).
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

    One source after another takes its share of what is left, rounded to the nearest. So every count stays
    within two windows of its exact share, and never decreases.
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
    """The windows of some splits that count as one, numbered without end in the order of a run.

    order   'shuffle'     each epoch in a random order, from a random phase
            'sequential'  from the first token on, for evaluation; the last window of a shard may be short
            'random'      nanoGPT's draws with replacement
            'documents'   as 'shuffle', but a document is cut into windows on its own
    Conversations are packed in rows; these are their windows in any order.
    """

    def __init__(self, splits, T, order, seed):
        self.order, self.seed, self.T, self.table = order, seed, T, None
        self.shards = [shard for split in splits for shard in split.shards]
        sizes = self.sizes = np.array([shard.n_tokens for shard in self.shards], dtype=np.int64)
        self.borders = np.cumsum([0, *sizes])  # first token of each shard, and the end
        name = f'{", ".join(str(split.folder) for split in splits)}: the {splits[0].split} split'
        if order == 'documents' or any(split.row_tokens for split in splits):
            self.table = self.cut(splits)  # first token and number of tokens of each window
            self.n = len(self.table)
            if not self.n:
                raise ValueError(f'{name} has no document of 2 tokens or more, '
                                 'so there is nothing to predict: add text')
            return
        if sizes.max() <= T:
            raise ValueError(f'{name} has at most {sizes.max()} tokens in a shard, too few for a window of '
                             f'block_size {T} and its last target: use a smaller --block_size or more text')
        self.stride, n_phases = T, np.ones_like(sizes)
        if order == 'random':  # every start, as in nanoGPT
            self.stride, per_shard = 1, np.maximum(sizes - T, 0)
        elif order == 'sequential':
            per_shard = -(-np.maximum(sizes - 1, 0) // T)
        else:
            # One window less than fits at phase 0 fits at every phase, so all epochs have the same number.
            per_shard = np.where(sizes > T, np.maximum(sizes // T - 1, 1), 0)
            # From the last phase, the last window ends with the shard.
            n_phases = np.maximum(sizes - per_shard * T, 1)
        self.n_phases = tuple(n_phases.tolist())
        self.firsts = np.cumsum([0, *per_shard])  # number of the first window of each shard
        self.n = int(self.firsts[-1])  # windows in an epoch

    def cut(self, splits):
        """Cut documents or rows into windows of 2 to T + 1 tokens: (n, 2) int64.

        A window begins with the last token of the one before, so that every token except a document's first
        is a target once.
        """
        spans, first = [], 0
        for split in splits:
            spans.append(split.spans(self.order, self.T) + first)
            first += split.n_tokens
        begin, end = np.concatenate(spans, axis=1)
        begin, end = begin[end > begin], end[end > begin]
        # also cut where a shard ends inside a span: more spans have begun there than have ended
        n_begun = np.searchsorted(begin, self.borders)
        n_ended = np.searchsorted(end, self.borders, side='right')
        borders = np.unique(self.borders[n_begun > n_ended])
        begin, end = np.sort(np.append(begin, borders)), np.sort(np.append(end, borders))

        n_windows = -(-(end - begin - 1) // self.T)  # one token alone has no target
        span = np.repeat(np.arange(len(begin)), n_windows)
        nth = np.arange(len(span)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)  # in its span
        start = begin[span] + nth * self.T
        return np.stack([start, np.minimum(end[span] - start, self.T + 1)], axis=1)

    def locate(self, g: np.ndarray) -> np.ndarray:
        """Return (number of the shard, first token in it, tokens) of the windows g: (K,) -> (K, 3) int64."""
        if self.order == 'random':
            n = scramble(g.astype(np.uint64) + draws(self.seed, 1)) % np.uint64(self.n)
            return self.in_order(n.astype(np.int64), 0)
        epochs, index = np.divmod(g, self.n)
        spans = np.empty((len(g), 3), dtype=np.int64)
        for epoch in set(epochs.tolist()):
            rows = epochs == epoch
            n = index[rows]
            if self.order != 'sequential':
                n = permute(n, self.n, (*self.seed, epoch))
            spans[rows] = self.in_order(n, epoch)
        return spans

    def in_order(self, n, epoch):
        """Locate windows by their number in the order of the data."""
        if self.table is not None:
            start, length = self.table[n].T
            shard = np.searchsorted(self.borders, start, side='right') - 1
            return np.stack([shard, start - self.borders[shard], length], axis=1)
        shard = np.searchsorted(self.firsts, n, side='right') - 1
        phases = draws((*self.seed, epoch, 1), len(self.n_phases), self.n_phases).astype(np.int64)
        start = phases[shard] + self.stride * (n - self.firsts[shard])
        length = np.minimum(self.T + 1, self.sizes[shard] - start)
        return np.stack([shard, start, length], axis=1)
