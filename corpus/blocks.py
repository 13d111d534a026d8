"""Read folders of token blocks: token_float32.npy, label_float32.npy and loss_mask.npy, each (rows, T)."""

import os
from typing import NamedTuple

import numpy as np

MAX_IN_FLOAT32 = 2**24  # larger whole numbers may have been rounded
NOT_A_TARGET = -100
CHUNK_BYTES = 1 << 20  # the tokens that are in memory at a time


class Row(NamedTuple):
    """ids is (n,) int64. mask is (n,) uint8, 1 where a token is a target."""
    ids: np.ndarray
    mask: np.ndarray


def map_blocks(folder):
    """Map the arrays of a folder, {file name: array}. loss_mask.npy is optional."""
    names = ['token_float32.npy', 'label_float32.npy']
    if os.path.exists(os.path.join(folder, 'loss_mask.npy')):
        names.append('loss_mask.npy')
    return {name: np.load(os.path.join(folder, name), mmap_mode='r', allow_pickle=False) for name in names}


def check_blocks(folder, first=None):
    """Check a folder, and that its rows are as long as those of a first folder. Returns their length."""
    arrays = map_blocks(folder)
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or len(shapes['token_float32.npy']) != 2:
        listed = ', '.join(f'{name} is {shape}' for name, shape in shapes.items())
        raise ValueError(f'{folder}: {listed}: equal shapes (rows, T) are needed')
    for name, array in arrays.items():
        if array.dtype.kind not in 'fiub':
            raise ValueError(f'{folder}: {name} holds {array.dtype}: numbers are needed')
    n_tokens = shapes['token_float32.npy'][1]
    if first is not None and check_blocks(first) != n_tokens:
        raise ValueError(f'{folder} has rows of {n_tokens} tokens, {first} of {check_blocks(first)}: '
                         'pack them one by one')
    return n_tokens


def read_rows(folder, reading):
    """Yield (Row, where) of every row."""
    arrays = map_blocks(folder)
    n_rows, n_tokens = arrays['token_float32.npy'].shape
    n_bytes = sum(array.nbytes for array in arrays.values())
    step = max(1, CHUNK_BYTES // (4 * max(n_tokens, 1)))
    for begin in range(0, n_rows, step):
        # the arrays are mapped anew for each chunk, because a map that stays open holds what was read of it
        chunk = {name: np.array(array[begin:begin + step]) for name, array in map_blocks(folder).items()}
        for row, tokens in enumerate(rows_of_chunk(chunk, folder, begin), begin):
            reading.n_read = n_bytes * (row + 1) // n_rows
            yield tokens, f'{folder}, row {row}'


def rows_of_chunk(chunk, folder, first_row):
    """Make Rows of some rows of the arrays.

    Where the labels are the following tokens, a Row has T + 1 ids, so that the window of T tokens that begins
    with it shows the same x and y again. Where the labels are the tokens themselves, it has T.
    """
    for name, array in chunk.items():
        is_good = (array == np.rint(array)) & (abs(array.astype(np.float64)) < MAX_IN_FLOAT32)
        meaning = 'a token id that float32 can hold'
        if name == 'loss_mask.npy':
            is_good, meaning = (array == 0) | (array == 1), '0 or 1'
        check_rows(is_good, array, folder, first_row, complaint=f'{name} holds {{}}, which is not {meaning}')
    tokens, labels = chunk['token_float32.npy'], chunk['label_float32.npy']
    is_target = labels != NOT_A_TARGET
    if 'loss_mask.npy' in chunk:
        is_target &= chunk['loss_mask.npy'] != 0

    follows = (labels[:, :-1] == tokens[:, 1:]) | ~is_target[:, :-1]
    if not follows.all():
        is_same = (labels == tokens) | ~is_target
        if not is_same.all():
            nearest = follows if follows.mean() > is_same[:, :-1].mean() else is_same
            check_rows(nearest, labels, folder, first_row,
                       complaint='label {} is neither the token there nor the following one')
        return [Row(*row) for row in zip(tokens.astype(np.int64), is_target.astype(np.uint8), strict=True)]
    ids = np.concatenate((tokens, labels[:, -1:]), axis=1).astype(np.int64)  # (rows, T + 1)
    mask = np.concatenate((np.zeros_like(is_target[:, :1]), is_target), axis=1).astype(np.uint8)
    lengths = ids.shape[1] - (mask[:, -1] == 0)  # the last id is left out where it is not a target
    return [Row(row[:n], row_mask[:n]) for row, row_mask, n in zip(ids, mask, lengths, strict=True)]


def check_rows(is_good, array, folder, first_row, *, complaint):
    if not is_good.all():
        row, position = np.argwhere(~is_good)[0].tolist()
        complaint = complaint.format(array[row, position])
        raise ValueError(f'{folder}, row {first_row + row}, position {position}: {complaint}')
