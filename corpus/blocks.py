"""Read folders of token blocks: token_float32.npy, label_float32.npy and loss_mask.npy, each (rows, T)."""

import os
from typing import NamedTuple

import numpy as np

TOKENS, LABELS, MASK = NAMES = ('token_float32.npy', 'label_float32.npy', 'loss_mask.npy')  # MASK is optional
MAX_IN_FLOAT32 = 2**24  # larger whole numbers may have been rounded
NOT_A_TARGET = -100
CHUNK_BYTES = 1 << 20  # the tokens that are in memory at a time


class Row(NamedTuple):
    """ids is (n,) int64. mask is (n,) uint8, 1 where a token is a target."""
    ids: np.ndarray
    mask: np.ndarray


def map_blocks(folder):
    """Map the arrays of a folder, {file name: array}."""
    paths = {name: os.path.join(folder, name) for name in NAMES}
    return {name: np.load(path, mmap_mode='r', allow_pickle=False) for name, path in paths.items()
            if name != MASK or os.path.exists(path)}


def check_blocks(folder, first):
    """Check a folder, and that its rows are as long as those of a first folder."""
    arrays = map_blocks(folder)
    shape, first_shape = arrays[TOKENS].shape, map_blocks(first)[TOKENS].shape
    is_good = [array.shape == shape and array.dtype.kind in 'fiub' for array in arrays.values()]
    if len(shape) != 2 or not all(is_good):
        listed = ', '.join(f'{name} is {array.dtype} {array.shape}' for name, array in arrays.items())
        raise ValueError(f'{folder}: {listed}: numbers in equal shapes (rows, T) are needed')
    if shape[1:] != first_shape[1:]:
        raise ValueError(f'{folder} has rows of {shape[1]} tokens, {first} of {first_shape[1]}: '
                         'pack them one by one')


def read_rows(folder, reading):
    """Yield (Row, where) of every row."""
    arrays = map_blocks(folder)
    n_rows, n_tokens = arrays[TOKENS].shape
    n_bytes = sum(array.nbytes for array in arrays.values())
    step = max(1, CHUNK_BYTES // (4 * max(n_tokens, 1)))
    for begin in range(0, n_rows, step):
        # the arrays are mapped anew for each chunk, because a map that stays open holds what was read of it
        chunk = {name: np.array(array[begin:begin + step]) for name, array in map_blocks(folder).items()}
        for number, row in enumerate(rows_of_chunk(chunk, folder, begin), begin):
            reading.n_read = n_bytes * (number + 1) // n_rows
            yield row, f'{folder}, row {number}'


def rows_of_chunk(chunk, folder, first_row):
    """Make Rows of some rows of the arrays.

    Where the labels are the following tokens, a Row has T + 1 ids, so that the window of T tokens that begins
    with it shows the same x and y again. Where the labels are the tokens themselves, it has T.
    """
    tokens, labels, mask = chunk[TOKENS], chunk[LABELS], chunk.get(MASK, np.ones((1, 1)))
    is_target = (labels != NOT_A_TARGET) & (mask != 0)
    follows = (labels[:, :-1] == tokens[:, 1:]) | ~is_target[:, :-1]
    is_same = (labels == tokens) | ~is_target
    is_shifted = follows.all() or follows.mean() >= is_same.mean()
    is_fitting = follows if is_shifted else is_same
    for name, is_good, complaint in (
            (TOKENS, is_id(tokens), 'not a token id that float32 can hold'),
            (LABELS, is_id(labels), 'not a token id that float32 can hold'),
            (MASK, (mask == 0) | (mask == 1), 'not 0 or 1'),
            (LABELS, is_fitting, 'neither the token there nor the following one')):
        if not is_good.all():
            row, position = np.argwhere(~is_good)[0].tolist()
            raise ValueError(f'{folder}, row {first_row + row}, position {position}: '
                             f'{name} holds {chunk[name][row, position]}, which is {complaint}')

    if not is_shifted:
        ids, masks = tokens.astype(np.int64), is_target.astype(np.uint8)
        return [Row(*row) for row in zip(ids, masks, strict=True)]
    ids = np.concatenate((tokens, labels[:, -1:]), axis=1).astype(np.int64)  # (rows, T + 1)
    masks = np.pad(is_target, ((0, 0), (1, 0))).astype(np.uint8)
    lengths = ids.shape[1] - (masks[:, -1] == 0)  # the last id is left out where it is not a target
    return [Row(row[:n], row_mask[:n]) for row, row_mask, n in zip(ids, masks, lengths, strict=True)]


def is_id(values):
    return (values == np.rint(values)) & (abs(values.astype(np.float64)) < MAX_IN_FLOAT32)
