"""Memory-mapped token shards -> batches, as a pure function of the step.

    loader = Loader('data/shakespeare_char', 'train', block_size=64, batch_size=12)
    x, y, documents = loader.batch(step=1000, micro_step=0)     # (12, 64) int64 each, the same whoever asks and whenever

A run needs no loader state to resume: the step says it all. Windows are numbered without end; window g of the run belongs
to row g % G of step g // G, where G is the global batch. Each pass over the data (an epoch) cuts it into windows of
block_size from a phase of its own and visits each once in an order of its own; phase and order are functions of (seed,
epoch). With two ranks, each takes every other micro-batch of the same global batch.

Example: 10 tokens, block_size 3, epoch of phase 1. The windows start at 1 and 4 (x = tokens 1-3, y = tokens 2-4; then 4-6 and
5-7); the order visits them as 4, 1.

B rows, T block_size, K any number of windows
"""

from concurrent.futures import ThreadPoolExecutor
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


def mix(x):
    """Scrambles the bits of each uint64 (the finaliser of splitmix64, Steele, Lea and Flood 2014); products wrap, as they should."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=64)
def draws(seed, count, high=1 << 63):
    """`count` seeded random integers below high (one bound, or a tuple of count bounds): (count,) uint64."""
    return np.random.default_rng(seed).integers(high, size=count, dtype=np.uint64)


def permute(index, n, keys):
    """Where the permutation of range(n) that keys stand for puts each index: (K,) int64 -> (K,) int64, without holding it.

    Adding, multiplying by an odd number and folding the upper half onto the lower all permute the numbers of so many bits.
    What lands at n or past it is sent through again (cycle walking, Black and Rogaway 2002): one image below n for each index.
    """
    bits = max(1, (n - 1).bit_length())
    low, half = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)
    result, todo = index.astype(np.uint64), np.arange(index.size)
    while todo.size:
        x = result[todo]
        for add, factor in zip(keys[::2], keys[1::2]):
            x = (x + add) * (factor | np.uint64(1)) & low
            x ^= x >> half
        result[todo] = x
        todo = todo[x >= n]
    return result.astype(np.int64)


def spread(counts):
    """Lists (i, 0), (i, 1) ... (i, counts[i] - 1) for every i: two arrays. spread([2, 0, 1]) = [0, 0, 2], [0, 1, 0]"""
    i = np.repeat(np.arange(len(counts)), counts)
    return i, np.arange(len(i)) - np.repeat(np.cumsum(counts) - counts, counts)


class Windows:
    """The windows of one split, or of several as if they were one: which tokens window g shows, g counted over all epochs.

    order  'shuffle': each epoch in a seeded order, from a seeded phase; 'sequential': from the first token, in order, the last
           window short where need be, for evaluation; 'random': nanoGPT's draws with replacement; 'documents': as 'shuffle', but
           each window begins where a document begins (or a multiple of T after that), and what a document leaves of its row is
           no target. Where a dataset was packed in rows (of conversations), these are its windows, in any order
    """

    def __init__(self, splits, block_size, order, seed):
        assert order in ORDERS, order
        self.block_size, self.order, self.seed = block_size, order, seed
        self.shards = [shard for split in splits for shard in split.shards]
        self.sizes = np.array([shard.n_tokens for shard in self.shards], dtype=np.int64)
        where = f'{", ".join(str(split.folder) for split in splits)}: the {splits[0].split} split'
        T, most, self.table = block_size, int(self.sizes.max(initial=0)), None
        in_rows = any(split.meta.get('row_tokens') for split in splits)
        if order == 'documents' or in_rows:
            pieces = [cut_rows(split, T) if split.meta.get('row_tokens') or order != 'documents' else cut_documents(split, T) for split in splits]
            before = np.cumsum([0] + [len(split.shards) for split in splits])  # shards of the splits before each
            self.table = np.concatenate([piece + [[n], [0], [0]] for piece, n in zip(pieces, before)], axis=1)  # (3, n)
            self.n = self.table.shape[1]
            if not self.n:
                raise ValueError(f'{where} has no document of 2 tokens or more, so there is nothing to predict: add text')
            return
        if most < T + 1:
            longest = ' in its longest shard' if len(self.shards) > 1 else ''
            raise ValueError(f'{where} has {most} tokens{longest}, too few for one window of block_size {T} and the token after it: '
                             f'use {f"--block_size={most - 1} or less, or " if most > 1 else ""}more text')
        if order == 'random':
            per_shard = np.maximum(self.sizes - T, 0)  # every start, as in nanoGPT
        elif order == 'sequential':
            per_shard = -(-np.maximum(self.sizes - 1, 0) // T)
        else:
            # one window less than fits from phase 0: so many fit from every phase, and each epoch has the same number
            per_shard = np.where(self.sizes > T, np.maximum(self.sizes // T - 1, 1), 0)
            self.n_phases = tuple(np.maximum(self.sizes - per_shard * T, 1).tolist())  # the last one reaches the last token
        self.firsts = np.concatenate(([0], np.cumsum(per_shard)))  # number of the first window of each shard
        self.n = int(self.firsts[-1])

    def locate(self, g):
        """Shard number, start in the shard and length in tokens of the windows numbered g: (K,) int64 -> three (K,) int64."""
        T = self.block_size
        if self.order == 'random':
            n = (mix(g.astype(np.uint64) + draws(self.seed, 1)) % np.uint64(self.n)).astype(np.int64)
            if self.table is not None:
                return self.table[:, n]
            shard = np.searchsorted(self.firsts, n, side='right') - 1
            return shard, n - self.firsts[shard], np.full_like(n, T + 1)
        epoch, n = np.divmod(g, self.n)
        epochs = [(e, epoch == e) for e in set(epoch.tolist())]  # mostly one
        if self.order != 'sequential':
            for e, rows in epochs:
                n[rows] = permute(n[rows], self.n, draws((*self.seed, e), 12))
        if self.table is not None:
            return self.table[:, n]
        shard = np.searchsorted(self.firsts, n, side='right') - 1
        start = (n - self.firsts[shard]) * T
        if self.order == 'sequential':
            return shard, start, np.minimum(T + 1, self.sizes[shard] - start)
        for e, rows in epochs:
            phases = draws((*self.seed, e, 1), len(self.n_phases), self.n_phases).astype(np.int64)  # one a shard
            start[rows] += phases[shard[rows]]
        return shard, start, np.full_like(start, T + 1)


def cut_documents(split, T):
    """The windows of 2 to T + 1 tokens into which the documents of a split fall: shard number, start and length, (3, n) int64.

    A window begins at the last token of the one before, so that every token but a document's first is a target once. No window
    goes from one shard to the next.
    """
    offset, length = split.documents()
    border = np.array([shard.first for shard in split.shards] + [split.n_tokens])
    home = np.searchsorted(border[:-1], offset, side='right') - 1
    end_home = np.searchsorted(border[:-1], offset + length - 1, side='right') - 1
    document, part = spread(np.where(length > 0, end_home - home + 1, 0))
    shard = home[document] + part
    start = np.maximum(offset[document], border[shard])
    end = np.minimum((offset + length)[document], border[shard + 1])
    stretch, piece = spread(np.maximum(-(-(end - start - 1) // T), 0))  # one token alone has no target
    begin = start[stretch] + piece * T
    return np.stack((shard[stretch], begin - border[shard[stretch]], np.minimum(end[stretch] - begin, T + 1)))


def cut_rows(split, T):
    """The rows in which a split was packed; or the windows of T + 1 tokens of another split, in order, the last of each shard short:
    shard number, start and length, (3, n) int64."""
    row = split.meta.get('row_tokens')
    if row not in (None, T + 1):
        raise ValueError(f'{split.folder} was packed in rows for block_size {row - 1}: use --block_size={row - 1}, '
                         f'or pack it again with --block_size {T}')
    step, sizes = row or T, np.array([shard.n_tokens for shard in split.shards], dtype=np.int64)
    shard, nth = spread(sizes // step if row else -(-np.maximum(sizes - 1, 0) // T))
    return np.stack((shard, nth * step, np.minimum(T + 1, sizes[shard] - nth * step)))


def interleave(weights, slots):
    """Which source each of `slots` consecutive windows comes from, as evenly as the weights allow: (slots,) int64.

    Each slot goes to the source furthest behind its share, so any run of windows holds each source's share to within one or two.
    """
    weights = np.asarray(weights)
    pattern, count = np.empty(slots, dtype=np.int64), np.zeros(len(weights))
    for i in range(slots):
        k = int(np.argmax(weights * (i + 1) - count))
        pattern[i], count[k] = k, count[k] + 1
    return pattern


# -----------------------------------------------------------------------------
# batches


class Batch(NamedTuple):
    """Some windows: tokens, targets, and with isolate=True the document number of each token, (K, T) int64 each."""
    x: torch.Tensor
    y: torch.Tensor
    documents: torch.Tensor | None = None

    def to(self, device):
        """The batch on a device. A copy to CUDA comes from pinned memory and does not wait."""
        if torch.device(device).type != 'cuda':
            return Batch(*(None if each is None else each.to(device) for each in self))
        return Batch(*(None if each is None else each.pin_memory().to(device, non_blocking=True) for each in self))


class Loader:
    """Batches of one split of a dataset (or a mixture of several), by step.

    folders      one folder or several
    split        'train' | 'val'
    batch_size   rows of one micro-batch of one rank
    grad_accum   micro-steps of one rank; the global batch is batch_size * grad_accum * world_size rows
    order        as in Windows; 'sequential' goes through all folders one after another, whatever their weights
    weights      share of each folder, summing to 1; None = all as one dataset
    isolate      batches hold a third tensor, (B, T) int64: the number of the document that each token of x belongs to
    prefetch     whether a thread makes the batch after the one asked for
    raises       ValueError, FileNotFoundError where the data do not fit
    """

    SLOTS = 1000  # a mixture repeats its pattern of sources after so many windows

    def __init__(self, folders, split, *, block_size, batch_size, grad_accum=1, rank=0, world_size=1, order='shuffle', seed=0,
                 weights=None, prefetch=False, isolate=False):
        assert block_size > 0 and batch_size > 0 and seed >= 0 and rank < world_size
        folders = folders if isinstance(folders, list) else [folders]
        self.splits = [Split(folder, split) for folder in folders]
        first = self.splits[0]
        for other in self.splits[1:]:
            if fingerprint(other.tokenizer) != fingerprint(first.tokenizer):
                raise ValueError(f'{other.folder} and {first.folder} were packed with different tokenizers: pack them with one')
        self.block_size, self.batch_size, self.grad_accum = block_size, batch_size, grad_accum
        self.rank, self.world_size = rank, world_size
        self.vocab_size = first.vocab_size  # an id beyond it stops the batch, naming shard and offset
        self.n_tokens = sum(s.n_tokens for s in self.splits)
        # where the documents of each shard's split begin; what parts two of them belongs to the first
        self.begins = {} if isolate else None
        for split in self.splits if isolate else ():
            self.begins.update(dict.fromkeys(split.shards, np.sort(split.documents()[0])))
        self.all_targets = order in ('shuffle', 'random') and all(s.mask is None for s in self.splits)

        separate = weights is not None and order != 'sequential'
        groups = [[s] for s in self.splits] if separate else [self.splits]
        self.sources = [Windows(group, block_size, order, (seed, k)) for k, group in enumerate(groups)]
        self.pattern = interleave(weights if separate else [1.0], self.SLOTS if len(groups) > 1 else 1)
        is_from = self.pattern == np.arange(len(groups))[:, None]  # (sources, slots)
        self.before = np.cumsum(is_from, axis=1) - is_from  # windows of each source before each slot
        self.per_period = is_from.sum(axis=1)
        if not self.per_period.all():
            k = int(np.argmin(self.per_period))
            raise ValueError(f'the share {weights[k]:.6f} of {self.splits[k].folder} is less than one window in {self.SLOTS}: '
                             'give it a larger weight or leave it out')
        self.worker = ThreadPoolExecutor(1, 'loader') if prefetch else None
        self.ahead = {}  # (step, micro_step) -> the batch being made; may be dropped at any time, nothing depends on it

    @property
    def n_windows(self):
        """Windows in one pass over everything."""
        return sum(source.n for source in self.sources)

    def batch(self, step, micro_step=0):
        """The Batch of one micro-step of this rank, (B, T) each. y is -100 where there is nothing to predict."""
        if self.worker is None:
            return self._make(step, micro_step)
        future = self.ahead.pop((step, micro_step), None)
        following = (step, micro_step + 1) if micro_step + 1 < self.grad_accum else (step + 1, 0)
        self.ahead = {following: self.worker.submit(self._make, *following)}
        return future.result() if future is not None else self._make(step, micro_step)

    def _make(self, step, micro_step):
        first = ((step * self.grad_accum + micro_step) * self.world_size + self.rank) * self.batch_size
        return self.windows(np.arange(first, first + self.batch_size))

    def windows(self, g):
        """The Batch of the windows numbered g, (K,) int64, counted over the whole run."""
        tokens = np.zeros((len(g), self.block_size + 1), dtype=np.int64)
        documents = None if self.begins is None else np.zeros_like(tokens[:, 1:])
        target = None if self.all_targets else np.zeros(tokens.shape, dtype=bool)
        for row, shard, start, length in self._locate(g):
            tokens[row, :length] = shard.tokens[start:start + length]
            if target is not None:
                target[row, :length] = True if shard.mask is None else shard.mask[start:start + length]
            if documents is not None:
                documents[row] = np.searchsorted(self.begins[shard], shard.first + start + np.arange(self.block_size), side='right')
        if tokens.max() >= self.vocab_size:
            self._name_foreign_id(g)
        x, y = tokens[:, :-1], tokens[:, 1:]
        if target is not None:
            y = np.where(target[:, 1:], y, IGNORE)
        return Batch(*(None if each is None else torch.from_numpy(np.ascontiguousarray(each)) for each in (x, y, documents)))

    def count_targets(self, step):
        """Targets in the global batch of a step, all ranks and micro-steps counted: no rank needs to ask another."""
        G = self.batch_size * self.grad_accum * self.world_size
        if self.all_targets:
            return G * self.block_size
        n = 0
        for _, shard, start, length in self._locate(np.arange(step * G, (step + 1) * G)):
            n += length - 1 if shard.mask is None else int(np.count_nonzero(shard.mask[start + 1:start + length]))
        return n

    def _locate(self, g):
        """(row, shard, start, length) of each window numbered g."""
        period, slot = np.divmod(g, len(self.pattern))
        source = self.pattern[slot]
        for k, windows in enumerate(self.sources):
            rows = np.flatnonzero(source == k)
            if rows.size:
                nth = period[rows] * self.per_period[k] + self.before[k, slot[rows]]
                shard, start, length = windows.locate(nth)
                for row, s, first, n in zip(rows.tolist(), shard.tolist(), start.tolist(), length.tolist()):
                    yield row, windows.shards[s], first, n

    def _name_foreign_id(self, g):
        for _, shard, start, length in self._locate(g):
            beyond = np.flatnonzero(shard.tokens[start:start + length] >= self.vocab_size)
            if beyond.size:
                at = start + int(beyond[0])
                raise ValueError(f'{shard.path} offset {at}: token id {int(shard.tokens[at])} is beyond vocab_size {self.vocab_size}: '
                                 'the shard was made with another tokenizer or altered, prepare the dataset again')

    def fingerprint(self):
        return [split.fingerprint() for split in self.splits]

    def position(self, step):
        """What a checkpoint holds besides the step, so that seek() goes on there: nothing. It differs in tokens/stream.py."""

    def seek(self, position, step):
        pass
