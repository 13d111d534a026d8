"""Token shards -> batches, as a pure function of the step.

    loader = Loader('data/shakespeare_char', 'train', block_size=64, batch_size=12)
    x, y, documents = loader.batch(step=1000, micro_step=0)     # (12, 64) int64, whoever asks and whenever

A run needs no loader state to resume. Windows are numbered without end: window g of the run is row g % G of
step g // G, where G is the global batch, and tokens/windows.py says which tokens it shows. Ranks take turns
at the micro-batches of one global batch.

T block_size, K any number of windows
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import numpy as np
import torch

from kernels import IGNORE
from tokens.dataset import Split
from tokens.tokenizer import fingerprint
from tokens.windows import Windows, count_of_each


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
    """Shared by packed data and streams. A subclass defines windows(g).

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
        self.ahead = {}  # number of a micro-step -> future batch

    def batch(self, step: int, micro_step: int = 0) -> Batch:
        """Return the batch of a micro-step of this rank, (B, T) each. y is -100 where there is no target."""
        n = step * self.grad_accum + micro_step
        if self.worker is None:
            return self.make(n)
        future = self.ahead.pop(n, None) or self.worker.submit(self.make, n)
        self.ahead = {n + 1: self.worker.submit(self.make, n + 1)}
        return future.result()

    def make(self, n):
        first = (n * self.world_size + self.rank) * self.batch_size + self.shift
        return self.windows(np.arange(first, first + self.batch_size))

    def count_targets(self, step: int) -> int:
        """Count the targets in the global batch of a step, of all ranks and micro-steps."""
        return self.rows_per_step * self.block_size

    def position(self, step: int):
        """Return what a checkpoint needs besides the step to continue there. Only streams need anything."""

    def seek(self, position, step: int):
        """Continue with this step, at a position that position() returned."""


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
        self.vocab_size = first.vocab_size
        self.n_tokens = sum(split.n_tokens for split in self.splits)
        no_mask = all(split.mask is None for split in self.splits)
        self.all_are_targets = no_mask and self.order in ('shuffle', 'random')
        groups, self.shares = [self.splits], [1.0]
        if self.weights is not None and self.order != 'sequential':
            groups, self.shares = [[split] for split in self.splits], self.weights
        self.sources = [Windows(group, self.block_size, self.order, (self.seed, k))
                        for k, group in enumerate(groups)]
        self.n_windows = sum(source.n for source in self.sources)  # in one pass over everything
        self.begins = {}  # split -> first tokens of its documents, ascending
        if self.isolate:
            self.begins = {split: np.sort(split.documents()[0]) for split in self.splits}

    def locate(self, g: np.ndarray) -> list:
        """Return (shard, first token in it, number of tokens) of each window numbered g, (K,) int64."""
        spans = [None] * len(g)
        counts = count_of_each(self.shares, g)
        is_from = count_of_each(self.shares, g + 1) > counts  # (n_sources, K)
        for source, count, is_row in zip(self.sources, counts, is_from, strict=True):
            rows = np.flatnonzero(is_row)
            for row, (shard, *span) in zip(rows, source.locate(count[rows]).tolist(), strict=True):
                spans[row] = source.shards[shard], *span
        return spans

    def windows(self, g: np.ndarray) -> Batch:
        """Return the windows numbered g, (K,) int64, counted over the whole run."""
        T = self.block_size
        tokens = np.zeros((len(g), T + 1), dtype=np.int64)
        is_target = np.full(tokens.shape, self.all_are_targets)
        documents = np.zeros((len(g), T), dtype=np.int64)
        spans = self.locate(g)
        for row, (shard, start, length) in enumerate(spans):
            tokens[row, :length] = shard.tokens.read(start, length)
            if not self.all_are_targets:
                is_target[row, :length] = shard.is_target(start, length)
            if self.isolate:
                positions = shard.first + start + np.arange(T)
                documents[row] = np.searchsorted(self.begins[shard.split], positions, side='right')
        if tokens.max() >= self.vocab_size:
            row, i = np.argwhere(tokens >= self.vocab_size)[0]
            shard, start, _ = spans[row]
            raise ValueError(f'{shard.path} offset {start + i}: token id {tokens[row, i]} is beyond '
                             f'vocab_size {self.vocab_size}: the shard was made with another tokenizer '
                             'or altered, prepare the dataset again')
        x, y = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        y[~is_target[:, 1:]] = IGNORE
        arrays = (x, y, documents) if self.isolate else (x, y)
        return Batch(*map(torch.from_numpy, arrays))

    def count_targets(self, step: int) -> int:
        if self.all_are_targets:
            return super().count_targets(step)
        g = step * self.rows_per_step + np.arange(self.rows_per_step)
        spans = self.locate(g)
        return int(sum(shard.is_target(start + 1, length - 1).sum() for shard, start, length in spans))

    def fingerprint(self) -> list[dict]:
        return [split.fingerprint() for split in self.splits]
