"""Read folders of token blocks: token_float32.npy, label_float32.npy and loss_mask.npy, each (rows, T)."""

import os
from typing import NamedTuple

import numpy as np

TOKENS, LABELS, MASK = NAMES = ('token_float32.npy', 'label_float32.npy', 'loss_mask.npy')  # MASK is optional
MAX_ID = 2**24  # larger whole numbers may have been rounded by float32
NOT_A_TARGET = -100
CHUNK_BYTES = 1 << 20  # tokens in memory at a time


class Row(NamedTuple):
    ids: np.ndarray  # (n,) int64
    mask: np.ndarray  # (n,) uint8, 1 where a token is a target


def map_blocks(path):
    """Map the arrays beside a file of tokens, {name: array}."""
    paths = {name: os.path.join(os.path.dirname(path), name) for name in NAMES}
    return {name: np.load(path, mmap_mode='r', allow_pickle=False) for name, path in paths.items()
            if name != MASK or os.path.exists(path)}


def check_blocks(path, first):
    """Raise ValueError unless the arrays fit together, in rows as long as those of a first folder."""
    arrays = map_blocks(path)
    shape, first_shape = arrays[TOKENS].shape, map_blocks(first)[TOKENS].shape
    are_good = [array.shape == shape and array.dtype.kind in 'fiub' for array in arrays.values()]
    if len(shape) != 2 or not all(are_good):
        listed = ', '.join(f'{name} is {array.dtype} {array.shape}' for name, array in arrays.items())
        raise ValueError(f'{path}: {listed}: numbers in equal shapes (rows, T) are needed')
    if shape[1:] != first_shape[1:]:
        raise ValueError(f'{path} has rows of {shape[1]} tokens, {first} of {first_shape[1]}: '
                         'pack them one by one')


def read_rows(path, reading):
    tokens = map_blocks(path)[TOKENS]
    (n_rows, n_tokens), n_bytes = tokens.shape, tokens.nbytes
    del tokens
    step = max(1, CHUNK_BYTES // (4 * max(n_tokens, 1)))
    for begin in range(0, n_rows, step):
        # map the arrays anew for each chunk, because an open map keeps in memory what was read
        chunk = {name: np.array(array[begin:begin + step]) for name, array in map_blocks(path).items()}
        for number, row in enumerate(rows_of_chunk(chunk, path, begin), begin):
            reading.n_read = n_bytes * (number + 1) // n_rows
            yield row, f'{path}, row {number}'


def rows_of_chunk(chunk, path, first_row):
    """Make Rows of some rows of the arrays.

    They have T ids where the labels are the tokens themselves, and T + 1 where the labels are the following
    tokens, so that a window of T tokens shows the same x and y again.
    """
    tokens, labels, mask = chunk[TOKENS], chunk[LABELS], chunk.get(MASK, np.ones_like(chunk[TOKENS]))
    is_target = (labels != NOT_A_TARGET) & (mask != 0)
    follows = (labels[:, :-1] == tokens[:, 1:]) | ~is_target[:, :-1]
    fits = is_same = (labels == tokens) | ~is_target
    is_shifted = follows.all() or follows.mean() >= is_same.mean()
    if is_shifted:
        fits = np.pad(follows, ((0, 0), (0, 1)), constant_values=True)
    for is_right in (is_id(tokens) & is_id(labels) & np.isin(mask, (0, 1)), fits):
        for row, position in np.argwhere(~is_right):
            values = ', '.join(f'{name} {array[row, position]}' for name, array in chunk.items())
            raise ValueError(f'{path}, row {first_row + row}, position {position}: {values}: needed are '
                             f'whole numbers below {MAX_ID:,}, labels that are the tokens or the following '
                             'ones, and a mask of 0 or 1')

    ids, masks = tokens.astype(np.int64), is_target.astype(np.uint8)
    lengths = np.full(len(ids), ids.shape[1])
    if is_shifted:
        ids = np.append(ids, labels[:, -1:].astype(np.int64), axis=1)  # (rows, T + 1)
        masks = np.pad(masks, ((0, 0), (1, 0)))
        lengths += masks[:, -1]  # drop the last id if it is not a target
    return [Row(row[:n], row_mask[:n]) for row, row_mask, n in zip(ids, masks, lengths, strict=True)]


def is_id(values):
    return (values == np.rint(values)) & (abs(values.astype(np.float64)) < MAX_ID)
