"""nanoGPT's meta.pkl, read without running the code that a pickle can name."""

import io
import pickle
import pickletools
import re
from itertools import pairwise
from pathlib import Path

import numpy as np

from tokens.tokenizer import vocab_size_of


def read_meta_pkl(path) -> dict:
    """Return the tokenizer meta of nanoGPT's meta.pkl: {'vocab_size'} and perhaps 'itos' and 'stoi'."""
    try:
        data = Path(path).read_bytes()
        check_opcodes(data)
        meta = PlainUnpickler(io.BytesIO(data)).load()
    except OSError:
        raise
    except Exception as error:  # broken bytes raise nearly any exception in there
        raise ValueError(f'{path}: not a meta.pkl of nanoGPT: {error or type(error).__name__}') from None
    need(type(meta) is dict, f'{path}: its value', 'a dict')
    vocab_size, itos, stoi = meta.get('vocab_size'), meta.get('itos'), meta.get('stoi')
    need('vocab_size' not in meta or is_count(vocab_size) and 0 < vocab_size <= 2**32, f'{path}: vocab_size',
         'a number from 1 to 2**32')
    need(itos is not None or vocab_size, f'{path}: itos or vocab_size', 'there')
    if itos is None:
        return {'kind': 'ids', 'vocab_size': vocab_size}

    if type(itos) is dict:
        need(set(map(type, itos)) == {int} and sorted(itos) == list(range(len(itos))), f'{path}: itos',
             'a dict from the ids 0, 1, 2 and so on to strings')
        itos = [itos[i] for i in range(len(itos))]
    need(type(itos) is list and itos and all(type(token) is str for token in itos), f'{path}: itos',
         'a dict or a list of strings')
    id_of = {token: i for i, token in enumerate(itos)}
    need(stoi in (None, id_of) and len(id_of) == len(itos), f'{path}: stoi', 'the inverse of itos')
    need(vocab_size in (None, len(itos)), f'{path}: vocab_size',
         f'{len(itos)}, the number of strings in itos')
    if all(len(token) == 1 for token in itos):
        tokenizer = {'kind': 'char', 'chars': ''.join(itos)}
    else:
        tokenizer = {'kind': 'itos', 'itos': itos}
    try:
        vocab_size_of(tokenizer)
    except ValueError as error:
        raise ValueError(f'{path}: itos: {error}') from None
    return tokenizer


class PlainUnpickler(pickle.Unpickler):
    """Read dict, list, str, numbers and NumPy integers. A pickle runs code only by the names it imports."""

    def find_class(self, module, name):
        if (module, name) == ('numpy', 'dtype'):
            return IntegerDtype
        if (module, name) in (('numpy._core.multiarray', 'scalar'), ('numpy.core.multiarray', 'scalar')):
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


def is_count(value):
    return type(value) is int and value >= 0
