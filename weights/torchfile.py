"""torch's .pt files: written with a checksum, verified when read, without running code that they hold.

torch.load ignores zip's checksums: it loaded 398 of 400 files with a flipped bit.
"""

import os
import re
import zipfile
import zlib

import numpy as np
import torch

from weights import foreign

# the parts of a NumPy scalar, such as best_val_loss = np.float64(1.9), which weights_only=True would refuse
_SCALAR = np.float64(0).__reduce__()[0]  # under two names: NumPy 2's and NumPy 1's
NUMPY_SCALARS = [(_SCALAR, 'numpy.core.multiarray.scalar'), (_SCALAR, 'numpy._core.multiarray.scalar')]
NUMPY_SCALARS += [np.dtype, *(type(np.dtype(kind)) for kind in 'bBhHiIlLefd?')]


class Damaged(ValueError):
    """A file whose bytes differ from those that were written."""


def write(state, f):
    """Save with a checksum of the whole file as zip comment, because zip's own do not cover its headers."""
    try:
        torch.save(state, f)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # a failed write, which torch hides
            raise error.__context__ from None
        raise
    ending = checksum_ending(f, f.tell() - 2)
    f.seek(-2, os.SEEK_END)  # the length of the comment, zero so far
    f.write(ending)


def checksum_ending(f, size):
    """Return the zip comment, after its length in two bytes, for the first `size` bytes of a file."""
    crc, chunk_bytes = 0, 1 << 24
    f.seek(0)
    for start in range(0, size, chunk_bytes):
        crc = zlib.crc32(f.read(min(chunk_bytes, size - start)), crc)
    comment = b'crc32 %08x' % crc
    return len(comment).to_bytes(2, 'little') + comment


def read(path):
    """Return what was saved at path, verified. The tensors are mapped from the file, not copied.

    raises  Damaged; ValueError for a sound file that is not read; OSError, MemoryError
    """
    if os.path.islink(path) and not os.path.exists(path):
        raise FileNotFoundError(f'{path} is a link to {os.readlink(path)}, which does not exist: '
                                'put that file back')
    with open(path, 'rb') as f:
        verify(f, path)
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            # torch maps only files whose names are UTF-8; half a surrogate pair is not printable
            return torch.load(path, map_location='cpu', weights_only=True, mmap=str(path).isprintable())
    except (OSError, MemoryError):
        raise
    except Exception as error:  # pickle and torch raise many types
        if 'allocate memory' in str(error):
            raise MemoryError(f'{path} does not fit into memory') from None
        reason = short(error)
        if name := re.search(r'GLOBAL (\S+)', str(error)):
            reason = f'it asks for {name[1]}, and only tensors and plain values are read'
        raise ValueError(f'{path} is not a readable checkpoint ({reason})') from None


def verify(f, path):
    head, pickle = f.read(1), b''
    try:
        with zipfile.ZipFile(f) as archive:
            # one flipped bit turns a record into a folder, which torch.load skips silently
            is_sound = not any(record.external_attr for record in archive.infolist())
            size = f.seek(-2 - len(archive.comment), os.SEEK_END)
            ending = f.read()
            if ending == b'\0\0':  # no comment: nanoGPT's, or another trainer's
                is_sound = is_sound and archive.testzip() is None
            elif ending != checksum_ending(f, size):
                is_sound = False
            if not is_sound:
                raise Damaged(f'{path} is damaged: its checksum does not match')
            for name in archive.namelist():
                if name.endswith('data.pkl'):
                    pickle = archive.read(name)
    except (OSError, MemoryError, Damaged):
        raise
    except Exception as error:  # zipfile raises a dozen types
        if head == b'\x80':
            raise ValueError(f'{path} is in the format of torch before 1.6, or a plain pickle, which is not '
                             'read: save it anew with torch.save where it was written') from None
        raise Damaged(f'{path} is not a readable checkpoint ({short(error)})') from None
    foreign.check_pickle(pickle, path)


def short(error):
    """Return the informative part of an error of zipfile or torch.load."""
    words = ' '.join(str(error).split()).rpartition('WeightsUnpickler error: ')[2]
    return words[:150] or type(error).__name__
