"""Memory-mapped token shards -> batches, as a pure function of the step.

    loader = Loader('data/shakespeare_char', 'train', block_size=64, batch_size=12)
    x, y = loader.batch(step=1000, micro_step=0)     # (12, 64) int64 each, the same whoever asks and whenever

A run needs no loader state to resume: the step says it all. Windows are numbered without end; window g of the run belongs
to row g % G of step g // G, where G is the global batch. Each pass over the data (an epoch) cuts it into windows of
block_size from a phase of its own and visits each once in an order of its own; phase and order are functions of (seed,
epoch). With two ranks, each takes every other micro-batch of the same global batch.

Example: 10 tokens, block_size 3, epoch of phase 1. The windows start at 1 and 4 (x = tokens 1-3, y = tokens 2-4; then 4-6 and
5-7); the order visits them as 4, 1.
"""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from data.tokenizer import LLMC_HEADER_BYTES, LLMC_MAGIC, fingerprint, read_meta

IGNORE = -100  # the target that is not one


# -----------------------------------------------------------------------------
# shards on disk


class Shard:
    """One .bin with its optional .mask and .idx, mapped, not read."""

    def __init__(self, path, dtype, n_tokens=None):
        size = path.stat().st_size
        with open(path, 'rb') as f:
            header = LLMC_HEADER_BYTES if f.read(len(LLMC_MAGIC)) == LLMC_MAGIC else 0
        whole, rest = divmod(size - header, dtype.itemsize)
        if rest or (n_tokens is not None and whole != n_tokens):
            # a map of a file that is too short would end in SIGBUS, which Python cannot catch
            expected = f'{n_tokens} tokens of {dtype.itemsize} bytes' if n_tokens is not None else f'whole tokens of {dtype.itemsize} bytes'
            raise ValueError(f'{path} has {size} bytes, expected {expected}: it was cut short or altered, prepare the dataset again')
        self.path, self.n_tokens = path, whole
        self.tokens = np.memmap(path, dtype=dtype, mode='r', offset=header, shape=(whole,)) if whole else np.empty(0, dtype)
        self.mask = self._beside('.mask', np.uint8, (whole,))
        self.documents = self._beside('.idx', np.dtype('<i8'), (-1, 2))

    def _beside(self, suffix, dtype, shape):
        path = self.path.with_suffix(suffix)
        if not path.exists():
            return None
        size, width = path.stat().st_size, np.dtype(dtype).itemsize
        if size % (width * 2) if shape[0] == -1 else size != shape[0] * width:
            raise ValueError(f'{path} has {size} bytes, which does not fit {self.path.name}: prepare the dataset again')
        return np.memmap(path, dtype=dtype, mode='r').reshape(shape) if size else None


class Split:
    """The shards of one split of one dataset, and what its meta.json says of them."""

    def __init__(self, folder, split):
        folder = Path(folder)
        self.folder, self.split, self.meta = folder, split, read_meta(folder)
        dtype = np.dtype(self.meta['dtype']).newbyteorder('<')
        known = self.meta['splits'].get(split)
        if known is None:
            raise ValueError(f'{folder} has no {split} split, only {", ".join(self.meta["splits"])}: prepare it with one')
        self.checksums = [shard.get('crc32') for shard in known['shards']]
        self.shards = []
        for shard in known['shards']:
            path = folder / shard['file']
            if not path.exists():
                raise FileNotFoundError(f'{path} is missing though {folder / "meta.json"} names it: prepare the dataset again')
            self.shards.append(Shard(path, dtype, shard.get('tokens')))
        self.n_tokens = sum(shard.n_tokens for shard in self.shards)
        self.vocab_size, self.tokenizer = self.meta['vocab_size'], self.meta['tokenizer']

    def fingerprint(self):
        """What a checkpoint remembers of its data: sizes, checksums and tokenizer, as plain values."""
        return dict(tokens=[shard.n_tokens for shard in self.shards], crc32=list(self.checksums), vocab_size=self.vocab_size,
                    tokenizer=fingerprint(self.tokenizer))

    def verify(self):
        """Reads every shard against its checksum; ValueError names the one that was altered."""
        for shard, known in zip(self.shards, self.checksums):
            if known is None:
                continue
            crc = 0
            for start in range(0, shard.n_tokens, 1 << 22):
                crc = zlib.crc32(shard.tokens[start:start + (1 << 22)], crc)
            if crc != known:
                raise ValueError(f'{shard.path} does not match its checksum in meta.json: it was altered, prepare the dataset again')


# -----------------------------------------------------------------------------
# orders


def mix(x):
    """Scrambles the bits of each uint64 (the finaliser of splitmix64, Steele, Lea and Flood 2014); products wrap, as they should."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=64)
def draws(seed, count, high=1 << 63):
    """`count` seeded random integers below high (one bound, or a tuple of count bounds)."""
    return np.random.default_rng(seed).integers(high, size=count, dtype=np.uint64)


def permute(index, n, keys):
    """Where the permutation of range(n) that keys stand for puts each index: (K,) int64 -> (K,) int64, without holding it.

    A Feistel network over the smallest square of a power of two that holds n; what lands at n or past it is sent through again
    (cycle walking, Black and Rogaway 2002), so each index has one image below n and each image one index.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    result = index.astype(np.uint64)
    todo = np.arange(result.size)
    while todo.size:
        left, right = result[todo] >> half, result[todo] & low
        for key in keys:
            left, right = right, left ^ (mix(right + key) & low)
        result[todo] = left << half | right
        todo = todo[result[todo] >= n]
    return result.astype(np.int64)


class Windows:
    """The windows of one split: the pass over the data that window g falls in, and which tokens it shows.

    order  'shuffle': each pass in a seeded order, from a seeded phase; 'sequential': from the first token, in order, for
           evaluation; 'random': nanoGPT's draws with replacement; 'documents': as 'shuffle', but each window begins where a
           document begins (or block_size after that), and what a short document leaves of its row is no target
    """

    def __init__(self, split, block_size, order, seed):
        self.split, self.block_size, self.order, self.seed = split, block_size, order, seed
        T, sizes = block_size, np.array([shard.n_tokens for shard in split.shards], dtype=np.int64)
        if sizes.max(initial=0) < T + 1 and order != 'documents':
            raise ValueError(f'{split.folder}: the {split.split} split has {split.n_tokens} tokens, too few for one window of '
                             f'block_size {T} and the token after it: use --block_size={max(split.n_tokens - 1, 1)} or less, or more text')
        if order == 'documents':
            self._cut_documents()
        elif order == 'random':
            self.per_shard = np.maximum(sizes - T, 0)  # every start, as in nanoGPT
        elif order == 'sequential':
            self.per_shard = -(-np.maximum(sizes - 1, 0) // T)  # the last one may be short, so that every token is scored
        else:
            # one window less than fits from phase 0: so many fit from every phase, and each epoch has the same number
            self.per_shard = np.where(sizes > T, np.maximum((sizes - T) // T, 1), 0)
            self.phases = tuple(np.clip(sizes - self.per_shard * T, 1, T).tolist())  # how many each shard may begin at
        self.firsts = np.concatenate(([0], np.cumsum(self.per_shard)))  # number of the first window of each shard
        self.n = int(self.firsts[-1])

    def _cut_documents(self):
        starts, lengths, counts, T = [], [], [], self.block_size
        for shard in self.split.shards:
            if shard.documents is None:
                raise ValueError(f'{shard.path.with_suffix(".idx")} is missing: rows aligned to documents need it, prepare the dataset with one')
            offset, length = shard.documents[:, 0], shard.documents[:, 1]
            if shard.n_tokens < (offset + length).max() or offset.min() < 0:
                raise ValueError(f'{shard.path.with_suffix(".idx")} points past the {shard.n_tokens} tokens of {shard.path.name}')
            pieces = np.maximum(-(-(length - 1) // T), 0)  # a document of one token has no target
            piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            starts.append(np.repeat(offset, pieces) + piece * T)
            lengths.append(np.minimum(np.repeat(length, pieces) - piece * T, T + 1))
            counts.append(int(pieces.sum()))
        self.per_shard, self.starts, self.lengths = np.array(counts), np.concatenate(starts), np.concatenate(lengths)

    def locate(self, g):
        """Shard, start and length in tokens of the windows numbered g: (K,) int64 -> three (K,) int64."""
        T = self.block_size
        if self.order == 'random':
            n = (mix(g.astype(np.uint64) + draws(self.seed, 1)) % np.uint64(self.n)).astype(np.int64)
        else:
            epoch, n = np.divmod(g, self.n)
            if self.order != 'sequential':
                for e in np.unique(epoch):
                    n[epoch == e] = permute(n[epoch == e], self.n, draws((*self.seed, int(e)), 6))
        shard = np.searchsorted(self.firsts, n, side='right') - 1
        nth = n - self.firsts[shard]
        if self.order == 'documents':
            return shard, self.starts[n], self.lengths[n]
        if self.order == 'random':
            return shard, nth, np.full_like(nth, T + 1)
        start = nth * T
        if self.order == 'sequential':
            sizes = np.array([s.n_tokens for s in self.split.shards])[shard]
            return shard, start, np.minimum(T + 1, sizes - start)
        for e in np.unique(epoch):
            phase = draws((*self.seed, int(e), 1), len(self.phases), self.phases).astype(np.int64)  # one a shard
            start[epoch == e] += phase[shard[epoch == e]]
        return shard, start, np.full_like(start, T + 1)


def parse_mixture(dataset):
    """'a:0.7,b:0.3' -> (['a', 'b'], [0.7, 0.3]); weights may be left out, and are scaled to sum to 1."""
    names, weights = [], []
    for part in dataset.split(','):
        name, colon, weight = part.strip().rpartition(':')
        if not colon or not _is_number(weight):
            name, weight = part.strip(), '1'
        if not name or not 0 < float(weight) < float('inf'):
            raise ValueError(f'dataset={dataset}: {part!r} is no NAME:WEIGHT with a weight above 0, such as zhwiki:0.7')
        names.append(name)
        weights.append(float(weight))
    return names, [w / sum(weights) for w in weights]


def _is_number(text):
    try:
        float(text)
        return True
    except ValueError:
        return False


def dataset_folders(dataset):
    """Folder and share of each part of a dataset setting: a folder as it stands, else data/NAME beside this file."""
    names, weights = parse_mixture(dataset)
    here = Path(__file__).resolve().parent
    folders = [Path(name) if os.sep in name and Path(name).is_dir() else here / name for name in names]
    inside = [folder.is_relative_to(Path.cwd()) for folder in folders]  # shorter in messages
    return [folder.relative_to(Path.cwd()) if short else folder for folder, short in zip(folders, inside)], weights


# -----------------------------------------------------------------------------
# batches


class Loader:
    """Batches of one split of a dataset (or a mixture of several), by step.

    folders      one folder or several
    split        'train' | 'val'
    batch_size   rows of one micro-batch of one rank
    grad_accum   micro-steps of one rank; the global batch is batch_size * grad_accum * world_size rows
    order        as in Windows
    weights      share of each folder, None = one folder
    vocab_size   ids the model has; a larger one stops the batch, naming shard and offset; None = as the dataset says
    raises       ValueError, FileNotFoundError where the data do not fit
    """

    SLOTS = 1000  # a mixture repeats its pattern of sources after so many windows

    def __init__(self, folders, split, block_size, batch_size, grad_accum=1, rank=0, world_size=1, order='shuffle', seed=0,
                 weights=None, vocab_size=None, prefetch=False):
        folders = folders if isinstance(folders, list) else [folders]
        self.splits = [Split(folder, split) for folder in folders]
        for other in self.splits[1:]:
            first = self.splits[0]
            if fingerprint(other.tokenizer) != fingerprint(first.tokenizer):
                raise ValueError(f'{other.folder} and {first.folder} were packed with different tokenizers: pack them with one')
        self.sources = [Windows(s, block_size, order, (seed, i)) for i, s in enumerate(self.splits)]
        self.block_size, self.batch_size, self.grad_accum = block_size, batch_size, grad_accum
        self.rank, self.world_size = rank, world_size
        self.vocab_size = vocab_size or self.splits[0].vocab_size
        self.n_tokens = sum(s.n_tokens for s in self.splits)
        self.has_mask = order in ('documents', 'sequential') or any(shard.mask is not None for s in self.splits for shard in s.shards)
        self.pattern = interleave(weights or [1.0], self.SLOTS if len(folders) > 1 else 1)
        self.worker = ThreadPoolExecutor(1, 'loader') if prefetch else None
        self.ahead = {}  # (step, micro_step) -> the batch being made; may be dropped at any time, nothing depends on it

    @property
    def bytes_per_token(self):
        """UTF-8 bytes in the mean token of this split, None where its meta.json does not say."""
        known = [s.meta['splits'][s.split]['bytes'] for s in self.splits]
        return sum(known) / self.n_tokens if all(known) else None

    @property
    def n_windows(self):
        """Windows in one pass over everything."""
        return sum(windows.n for windows in self.sources)

    def batch(self, step, micro_step=0):
        """x and y of one micro-batch of this rank: (B, T) int64 each, y is -100 where there is nothing to predict."""
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
        """The windows numbered g, (K,) int64, counted over the whole run: x, y (K, T) int64."""
        tokens = np.zeros((len(g), self.block_size + 1), dtype=np.int64)
        target = np.ones(tokens.shape, dtype=bool) if self.has_mask else None
        for row, shard, start, length in self._locate(g):
            tokens[row, :length] = shard.tokens[start:start + length]
            if target is not None:
                target[row, length:] = False
                if shard.mask is not None:
                    target[row, :length] = shard.mask[start:start + length] != 0
        if tokens.max() >= self.vocab_size:
            self._name_foreign_id(g)
        x, y = tokens[:, :-1], tokens[:, 1:]
        if target is not None:
            y = np.where(target[:, 1:], y, IGNORE)
        return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(np.ascontiguousarray(y))

    def count_targets(self, step):
        """Targets in the global batch of a step, all ranks and micro-steps counted: no rank needs to ask another."""
        G = self.batch_size * self.grad_accum * self.world_size
        if not self.has_mask:
            return G * self.block_size
        return int((self.windows(np.arange(step * G, (step + 1) * G))[1] != IGNORE).sum())

    def _locate(self, g):
        """(row, shard, start, length) of each window numbered g."""
        period = len(self.pattern)
        source = self.pattern[g % period]
        for k, windows in enumerate(self.sources):
            rows = np.flatnonzero(source == k)
            if not rows.size:
                continue
            before = np.concatenate(([0], np.cumsum(self.pattern == k)))  # windows of source k before each slot
            shard, start, length = windows.locate(g[rows] // period * before[-1] + before[g[rows] % period])
            for row, s, first, n in zip(rows.tolist(), shard.tolist(), start.tolist(), length.tolist()):
                yield row, windows.split.shards[s], first, n

    def _name_foreign_id(self, g):
        for _, shard, start, length in self._locate(g):
            beyond = np.flatnonzero(shard.tokens[start:start + length] >= self.vocab_size)
            if beyond.size:
                at = start + int(beyond[0])
                raise ValueError(f'{shard.path} offset {at}: token id {int(shard.tokens[at])} is beyond vocab_size {self.vocab_size}: '
                                 'the shard was made with another tokenizer or altered, prepare the dataset again')

    def fingerprint(self):
        return [split.fingerprint() for split in self.splits]

    def to(self, device, batch):
        """A batch on the device; from pinned memory, without waiting, where the device is CUDA."""
        if device.type == 'cuda':
            return tuple(t.pin_memory().to(device, non_blocking=True) for t in batch)
        return tuple(t.to(device) for t in batch)


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
