"""nanoGPT's meta.pkl, read without running the code that a pickle can name."""

import io
import pickle
import pickletools
import re
from itertools import pairwise
from pathlib import Path

import numpy as np

from tokens.tokenizer import vocab_size_of
from tokens.tokenizer_json import one_line


def read_meta_pkl(path) -> dict:
    """Return the tokenizer meta of nanoGPT's meta.pkl, a dict of vocab_size and perhaps itos and stoi."""
    data = Path(path).read_bytes()
    with one_line(f'{path}: not a meta.pkl of nanoGPT'):
        check_opcodes(data)
        return tokenizer_of(PlainUnpickler(io.BytesIO(data)).load())


def tokenizer_of(meta):
    vocab_size, itos, stoi = meta.get('vocab_size'), meta.get('itos'), meta.get('stoi')
    if itos is None:
        tokenizer = {'kind': 'ids', 'vocab_size': vocab_size}
    else:
        if type(itos) is dict:
            need(set(map(type, itos)) == {int} and sorted(itos) == list(range(len(itos))), 'itos',
                 'a dict from the ids 0, 1, 2 and so on to strings')
            itos = [itos[i] for i in range(len(itos))]
        need(stoi in (None, {token: i for i, token in enumerate(itos)}), 'stoi', 'the inverse of itos')
        tokenizer = {'kind': 'itos', 'itos': itos}
        if all(type(token) is str and len(token) == 1 for token in itos):
            tokenizer = {'kind': 'char', 'chars': ''.join(itos)}
    size = vocab_size_of(tokenizer)
    need(vocab_size in (None, size), 'vocab_size', f'{size}, the number of strings in itos')
    return tokenizer


class PlainUnpickler(pickle.Unpickler):
    """Read dict, list, str, numbers and NumPy integers. A pickle runs code only by the names it imports."""

    def find_class(self, module, name):
        if (module, name) == ('numpy', 'dtype'):
            return IntegerDtype
        if module in ('numpy._core.multiarray', 'numpy.core.multiarray') and name == 'scalar':
            return read_integer
        raise pickle.UnpicklingError(f'it asks for {f"{module}.{name}"!r}, and only plain values are read')


class IntegerDtype:
    """Stand in for numpy.dtype. Arguments and state hold no tuples, as check_opcodes relies on."""

    def __init__(self, code, *flags):
        plain = type(code) is str and set(map(type, flags)) <= {bool}
        if not plain or not re.fullmatch('[iu][1248]', code):
            raise pickle.UnpicklingError('only integers of NumPy are read')
        self.code, self.order = code, '<'

    def __setstate__(self, state):
        if any(type(value) is tuple for value in state) or state[1] not in ('<', '>', '|'):
            raise pickle.UnpicklingError('only integers of NumPy are read')
        self.order = state[1]


def read_integer(dtype, data):
    """Stand in for numpy._core.multiarray.scalar."""
    if type(dtype) is not IntegerDtype or type(data) is not bytes:
        raise pickle.UnpicklingError('only integers of NumPy are read')
    return int(np.frombuffer(data, dtype.order + dtype.code)[0])


def check_opcodes(data):
    """Refuse a pickle that takes forever to read.

    Hashing a dict key of tuples nested 60 deep visits 2**60 leaves. Here a tuple is only an argument of one
    of the names above. A memo index beyond the file's length would make the unpickler allocate that much.
    """
    names = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ('PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE'):
            if argument is not None and int(argument) > len(data):
                raise ValueError(f'memo index {argument}')
        else:
            names.append(opcode.name)
    for name, following in pairwise(names):
        if 'TUPLE' in name and following not in ('REDUCE', 'BUILD'):
            raise ValueError('it holds tuples, and only plain values are read')


def need(condition, where, requirement):
    if not condition:
        raise ValueError(f'{where} must be {requirement}')
