"""Score a model: the log-likelihood of the ends of rows, and the loss on a text.

Each rank scores its share of the batches, and every rank gets all results. Models run eagerly: each batch of
rows has a shape of its own. B rows of a batch, T tokens of a row, V vocabulary size.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch

import distributed
from files import print0
from kernels import IGNORE
from tokens.loader import Batch, pad

PROGRESS_S = 10.0  # seconds until the first line of progress; each later one comes after twice the time


class Row(NamedTuple):
    """ids[start:] is scored given ids[:start]; 1 <= start < len(ids)."""

    ids: np.ndarray  # (n,) integers
    start: int


class RowScore(NamedTuple):
    log_likelihood: float  # of the scored tokens, in nats
    is_greedy: bool  # each scored token is the most likely one
    n_tokens: int  # scored tokens


class TextLoss(NamedTuple):
    nats_per_target: float
    bits_per_byte: float | None  # None where no target has bytes
    n_targets: int
    n_bytes: int


class Interrupted(Exception):
    """A signal to stop arrived between two batches."""


def score_rows(model, rows: list[Row], title: str, *, batch_tokens: int, place, autocast,
               stop: Callable[[], object] | None = None) -> list[RowScore]:
    """Score the end of each row, cut from the left to block_size + 1 tokens.

    batch_tokens  padded tokens of one forward pass at most; a longer row is a batch of its own
    stop          called between batches on every rank; a true result raises Interrupted
    """
    rows = [cut_left(row, model.config.block_size + 1) for row in rows]
    # log-likelihood of each row, and its tokens that are not the most likely ones
    sums = torch.zeros(len(rows), 2, dtype=torch.float64)
    with evaluation(model):
        for batch, counts in share(batch_rows(rows, batch_tokens), title, place=place, stop=stop):
            x, y, _ = pad_rows([rows[i] for i in batch])  # (B, T) each
            with autocast:
                nats, is_argmax = model.score(x.to(place.device), y.to(place.device))
            if counts:
                sums[batch, 0] = -nats.cpu().double().sum(dim=1)
                sums[batch, 1] = (~is_argmax.cpu() & (y != IGNORE)).sum(dim=1).double()
    sums = distributed.all_reduce_sum(sums).tolist()
    return [RowScore(log_likelihood, n_others == 0, len(row.ids) - row.start)
            for row, (log_likelihood, n_others) in zip(rows, sums, strict=True)]


def cut_left(row: Row, max_tokens: int) -> Row:
    """Keep the last tokens of a row, as lm-evaluation-harness does."""
    n_cut = max(len(row.ids) - max_tokens, 0)
    return Row(row.ids[n_cut:], max(row.start - n_cut, 1))


def batch_rows(rows, batch_tokens):
    """Group row numbers by length. A lack of memory shows in the first batch, which has the longest rows."""
    batches = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].ids)):
        if not batches or (len(batches[-1]) + 1) * len(rows[batches[-1][0]].ids) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def pad_rows(rows) -> Batch:
    """Return a Batch of rows; y is IGNORE where nothing is scored."""
    batch = pad([row.ids for row in rows], max(len(row.ids) for row in rows) - 1)
    for y, row in zip(batch.y, rows, strict=True):
        y[:row.start - 1] = IGNORE
    return batch


def spread_windows(loader, count: int) -> np.ndarray:
    """Return the numbers of `count` windows spread evenly over a split; all windows if count is 0."""
    n = min(count or loader.n_windows, loader.n_windows)
    return np.arange(n) * loader.n_windows // n


def text_loss(model, loader, windows: np.ndarray, *, token_bytes, place, autocast,
              stop: Callable[[], object] | None = None) -> TextLoss:
    """Measure the loss on windows of a text, the same for any number of ranks and any batch size.

    Bits per byte compare models with different tokenizers (The Pile, arXiv:2101.00027). Targets without
    bytes, such as special tokens, count in neither bits nor bytes.

    windows      (K,) int64 numbers of the loader's windows
    token_bytes  (V,) int64 UTF-8 bytes of each token, 0 for special tokens; None = unknown
    stop         as in score_rows()
    """
    batches = [windows[i:i + loader.batch_size] for i in range(0, len(windows), loader.batch_size)]
    # nats, targets, nats of targets that have bytes, bytes; MPS has no float64
    exact = torch.float64
    if place.device.type == 'mps':
        exact = torch.float32
    sums = torch.zeros(4, dtype=exact, device=place.device)
    if token_bytes is None:
        token_bytes = torch.zeros(model.config.vocab_size, dtype=torch.int64, device=place.device)
    with evaluation(model):
        for batch, counts in share(batches, 'the loss', place=place, stop=stop):
            x, y, documents = loader.windows(batch).to(place.device)  # (B, T) each
            with autocast:
                nats = model.score(x, y, documents).nats.to(exact)  # (B, T), 0 where there is no target
            is_target = y != IGNORE
            n_bytes = token_bytes[y.clamp(min=0)] * is_target
            if counts:
                nats_with_bytes = (nats * (n_bytes > 0)).sum()
                sums += torch.stack((nats.sum(), is_target.sum(), nats_with_bytes, n_bytes.sum()))
    nats, n_targets, nats_with_bytes, n_bytes = distributed.all_reduce_sum(sums).tolist()
    bits_per_byte = nats_with_bytes / math.log(2) / n_bytes if n_bytes else None
    return TextLoss(nats / max(n_targets, 1), bits_per_byte, int(n_targets), int(n_bytes))


@contextlib.contextmanager
def evaluation(model):
    """Run the model eagerly, in evaluation mode and without gradients; restore its mode at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.compiler.set_stance('force_eager'):
            yield
    finally:
        model.train(was_training)


def share(batches, title, *, place, stop) -> Iterator:
    """Yield this rank's share of batches, as (batch, whether it counts).

    All ranks gather sharded weights together, so a rank without a batch of its own repeats the last one.
    """
    started_s = time.perf_counter()
    next_line_s = PROGRESS_S
    for first in range(0, len(batches), place.world_size):
        if stop is not None and stop():
            raise Interrupted
        passed_s = time.perf_counter() - started_s
        if first and passed_s >= next_line_s:
            left = timedelta(seconds=round(passed_s / first * (len(batches) - first)))
            print0(f'evaluating {title}: {first} of {len(batches)} batches, about {left} left')
            next_line_s = 2 * passed_s
        own = first + place.rank
        yield batches[min(own, len(batches) - 1)], own < len(batches)
