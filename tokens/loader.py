"""Token shards -> batches, as a pure function of the step, so that a run resumes without loader state.

    loader = Loader('data/shakespeare_char', 'train', block_size=64, batch_size=12)
    x, y, documents = loader.batch(step=1000, micro_step=0)     # x and y are (12, 64) int64

The windows of a run are numbered 0, 1, 2 ... without end, and tokens/windows.py tells which tokens each one
shows. A micro-step takes the next batch_size * world_size windows, of which rank r gets the r-th batch_size.

T block_size, K any number of windows
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from kernels import IGNORE
from tokens.dataset import Split
from tokens.tokenizer import fingerprint
from tokens.windows import Windows, choose_source


class Batch(NamedTuple):
    """Inputs, targets, and with isolate=True the document number of each input, (K, T) int64 each."""
    x: torch.Tensor
    y: torch.Tensor  # IGNORE where there is no target
    documents: torch.Tensor | None = None

    def to(self, device):
        """Copy to a device; to CUDA from pinned memory, without waiting."""
        tensors = [tensor for tensor in self if tensor is not None]
        is_cuda = torch.device(device).type == 'cuda'
        if is_cuda:
            tensors = [tensor.pin_memory() for tensor in tensors]
        return Batch(*(tensor.to(device, non_blocking=is_cuda) for tensor in tensors))


def pad(rows, T: int) -> Batch:
    """Return the Batch of K rows of up to T + 1 tokens, padded with 0 and IGNORE."""
    x = np.zeros((len(rows), T), dtype=np.int64)
    y = np.full_like(x, IGNORE)
    for i, tokens in enumerate(rows):
        x[i, :len(tokens)] = tokens[:T]
        y[i, :len(tokens) - 1] = tokens[1:]
    return Batch(torch.from_numpy(x), torch.from_numpy(y))


class Batches:
    """Shared by packed data and streams. A subclass defines windows(), count_targets() and fingerprint().

    prefetch   make the next batch in a thread while the model works on this one
    """

    def __init__(self, *, block_size: int, batch_size: int, grad_accum: int = 1, rank: int = 0,
                 world_size: int = 1, seed: int = 0, prefetch: bool = False):
        self.block_size, self.batch_size, self.grad_accum = block_size, batch_size, grad_accum
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.rows_per_step = batch_size * grad_accum * world_size
        self.worker = ThreadPoolExecutor(1, 'loader') if prefetch else None
        self.prefetched = {}  # micro-step, counted over the run -> future batch

    def first_window(self, step: int) -> int:
        return step * self.rows_per_step

    def batch(self, step: int, micro_step: int = 0) -> Batch:
        """Return the batch of this rank, (batch_size, T) each."""
        n = step * self.grad_accum + micro_step
        if self.worker is None:
            return self.make(n)
        future = self.prefetched.pop(n, None) or self.worker.submit(self.make, n)
        self.prefetched = {n + 1: self.worker.submit(self.make, n + 1)}
        return future.result()

    def make(self, n):
        step, micro_step = divmod(n, self.grad_accum)
        first = self.first_window(step) + (micro_step * self.world_size + self.rank) * self.batch_size
        return self.windows(first + np.arange(self.batch_size))

    def position(self, step: int):
        """Return what a checkpoint needs besides the step. Only streams need anything."""

    def seek(self, position, step: int):
        """Continue with this step at a position() of a checkpoint."""


class Loader(Batches):
    """Batches of one split ('train' or 'val') of a dataset, or of a mixture of several.

    order     as in Windows; 'sequential' reads all folders one after another, whatever their weights
    weights   shares of the folders, summing to 1; None = all count as one dataset
    isolate   give each token the number of its document
    """

    def __init__(self, folders, split: str, *, order: str = 'shuffle', weights: list | None = None,
                 isolate: bool = False, **shape):
        super().__init__(**shape)
        if not isinstance(folders, list):
            folders = [folders]
        self.splits = splits = [Split(folder, split) for folder in folders]
        if len({fingerprint(each.tokenizer_meta) for each in splits}) > 1:
            raise ValueError(f'{", ".join(map(str, folders))} were packed with different tokenizers: '
                             'pack them with one')
        self.tokenizer_meta, self.vocab_size = splits[0].tokenizer_meta, splits[0].vocab_size
        self.n_tokens, self.isolate = sum(each.n_tokens for each in splits), isolate
        # without a mask or short windows every position has a target
        self.all_are_targets = order in ('shuffle', 'random') and all(each.mask is None for each in splits)
        # A part of a mixture is a source with an order of its own.
        groups, self.weights = [splits], [1.0]
        if weights is not None and order != 'sequential':
            groups, self.weights = [[each] for each in splits], weights
        self.sources = [Windows(group, self.block_size, order, (self.seed, k))
                        for k, group in enumerate(groups)]
        self.n_windows = sum(source.n for source in self.sources)  # in one pass

    def locate(self, g: np.ndarray) -> list:
        """Return (split, first token in it, number of tokens) of each window numbered g, (K,) int64."""
        located = [None] * len(g)
        source_of, number = choose_source(self.weights, g)
        for k, source in enumerate(self.sources):
            rows = np.flatnonzero(source_of == k)
            for row, (i, start, size) in zip(rows, source.locate(number[rows]).tolist(), strict=True):
                located[row] = source.splits[i], start, size
        return located

    def windows(self, g: np.ndarray) -> Batch:
        """Return the windows numbered g, (K,) int64."""
        located = self.locate(g)
        batch = pad([split.read(start, size) for split, start, size in located], self.block_size)
        if not self.all_are_targets:
            for y, (split, start, size) in zip(batch.y.numpy(), located, strict=True):
                y[:size - 1][~split.is_target(start + 1, size - 1)] = IGNORE
        if self.isolate:
            numbers = [split.document_numbers(start, self.block_size) for split, start, _ in located]
            batch = batch._replace(documents=torch.from_numpy(np.stack(numbers)))
        return batch

    def count_targets(self, step: int) -> int:
        """Count the targets in a step, over all ranks and micro-steps."""
        if self.all_are_targets:
            return self.rows_per_step * self.block_size
        located = self.locate(self.first_window(step) + np.arange(self.rows_per_step))
        return int(sum(split.is_target(start + 1, size - 1).sum() for split, start, size in located))

    def fingerprint(self) -> list[dict]:
        """Return what a checkpoint stores about its data."""
        return [split.fingerprint() for split in self.splits]
