"""nanoGPT's meta.pkl, read without running the code that a pickle can name."""

import io
import pickle
from pathlib import Path

from tokens.tokenizer import vocab_size_of
from tokens.tokenizer_json import one_line


def read_meta_pkl(path) -> dict:
    """Return the tokenizer meta of nanoGPT's meta.pkl, a dict of vocab_size and perhaps itos and stoi."""
    with one_line(f'{path}: not a meta.pkl of nanoGPT'):
        meta = PlainUnpickler(io.BytesIO(Path(path).read_bytes())).load()
        itos, tokenizer_meta = meta.get('itos'), {'kind': 'ids', 'vocab_size': meta.get('vocab_size')}
        if itos is not None:
            if isinstance(itos, dict):
                itos = [itos[i] for i in range(len(itos))]
            if meta.get('stoi') not in (None, {token: i for i, token in enumerate(itos)}):
                raise ValueError('stoi must be the inverse of itos')
            tokenizer_meta = {'kind': 'itos', 'itos': itos}
            if all(len(token) == 1 for token in itos):
                tokenizer_meta = {'kind': 'char', 'chars': ''.join(itos)}
        vocab_size_of(tokenizer_meta)  # raises if it describes none
        return tokenizer_meta


class PlainUnpickler(pickle._Unpickler):
    """Read dict, list, str, numbers and NumPy integers. A pickle runs code only by the names it imports.

    This uses the pure Python class, which can read tuples as lists: as keys of a dict, tuples nested 60
    deep would take years to hash. It also allocates no more than a damaged file holds.
    """

    def find_class(self, module, name):
        if (module, name) == ('numpy', 'dtype'):
            return IntegerType
        if module in ('numpy._core.multiarray', 'numpy.core.multiarray') and name == 'scalar':
            return IntegerType.read
        raise pickle.UnpicklingError(f'it asks for {f"{module}.{name}"!r}, and only plain values are read')

    def load_marked(self):
        items = self.pop_mark()
        self.append(items)

    def load_last(self, n):
        self.stack[-n:] = [self.stack[-n:]]

    dispatch = pickle._Unpickler.dispatch | {
        pickle.TUPLE[0]: load_marked, pickle.TUPLE1[0]: lambda self: self.load_last(1),
        pickle.TUPLE2[0]: lambda self: self.load_last(2), pickle.TUPLE3[0]: lambda self: self.load_last(3)}
    del dispatch[pickle.BYTEARRAY8[0]]  # it would allocate as much as the file claims


class IntegerType:
    """Stand in for numpy.dtype."""

    def __init__(self, code, *flags):
        if code not in [kind + size for kind in 'iu' for size in '1248']:
            raise ValueError('only integers of NumPy are read')
        self.is_signed, self.byte_order = code[0] == 'i', 'little'

    def __setstate__(self, state):
        self.byte_order = 'big' if state[1] == '>' else 'little'

    def read(self, data):
        """Stand in for numpy._core.multiarray.scalar."""
        return int.from_bytes(data, self.byte_order, signed=self.is_signed)
