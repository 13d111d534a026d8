"""nanoGPT's meta.pkl, read without running the code that a pickle can name."""

import io
import pickle
import pickletools
from pathlib import Path

import numpy as np

from tokens.tokenizer import vocab_size_of
from tokens.tokenizer_json import one_line

CODES = [kind + size for kind in 'iu' for size in '1248']  # NumPy's integers


def read_meta_pkl(path) -> dict:
    """Return the tokenizer meta of nanoGPT's meta.pkl, a dict of vocab_size and perhaps itos and stoi."""
    data = Path(path).read_bytes()
    with one_line(f'{path}: not a meta.pkl of nanoGPT'):
        check_opcodes(data)
        meta = PlainUnpickler(io.BytesIO(data)).load()
        itos, tokenizer = meta.get('itos'), {'kind': 'ids', 'vocab_size': meta.get('vocab_size')}
        if itos is not None:
            if isinstance(itos, dict):
                itos = [itos[i] for i in range(len(itos))]
            if meta.get('stoi') not in (None, {token: i for i, token in enumerate(itos)}):
                raise ValueError('stoi must be the inverse of itos')
            tokenizer = {'kind': 'itos', 'itos': itos}
            if all(len(token) == 1 for token in itos):
                tokenizer = {'kind': 'char', 'chars': ''.join(itos)}
        size = vocab_size_of(tokenizer)
        if meta.get('vocab_size') not in (None, size):
            raise ValueError(f'vocab_size must be {size}, the number of strings in itos')
        return tokenizer


class PlainUnpickler(pickle.Unpickler):
    """Read dict, list, str, numbers and NumPy integers. A pickle runs code only by the names it imports."""

    def find_class(self, module, name):
        if (module, name) == ('numpy', 'dtype'):
            return IntegerDtype
        if module in ('numpy._core.multiarray', 'numpy.core.multiarray') and name == 'scalar':
            return IntegerDtype.read
        raise pickle.UnpicklingError(f'it asks for {f"{module}.{name}"!r}, and only plain values are read')


class IntegerDtype:
    """Stand in for numpy.dtype. Its arguments and its state hold no tuples, as check_opcodes relies on."""

    def __init__(self, code, *flags):
        if code not in CODES or not set(flags) <= {False, True}:
            raise ValueError('only integers of NumPy are read')
        self.code = code

    def __setstate__(self, state):
        if state[1] not in list('<>|') or any(type(value) is tuple for value in state):
            raise ValueError('only integers of NumPy are read')
        self.code = state[1] + self.code

    def read(self, data):
        """Stand in for numpy._core.multiarray.scalar."""
        return int(np.frombuffer(data, self.code)[0])


def check_opcodes(data):
    """Refuse a pickle that takes forever to read.

    Hashing a dict key of tuples nested 60 deep visits 2**60 leaves, so a tuple may only be the argument of a
    name above. A memo index beyond the file's length would make the unpickler allocate that much.
    """
    before = ''
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name.endswith(('PUT', 'MEMOIZE')):
            if int(argument or 0) > len(data):
                raise ValueError(f'memo index {argument}')
            continue
        if 'TUPLE' in before and opcode.name not in ('REDUCE', 'BUILD'):
            raise ValueError('it holds tuples, and only plain values are read')
        before = opcode.name
