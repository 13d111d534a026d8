"""The two file formats of weights: .safetensors, and .npz for NumPy.

Both read a tensor when it is asked for, so that loading takes little more memory than the model. The
safetensors package maps a file whole, and pages that were read stay resident: three times a bfloat16 model.
"""

import json
import math
import re
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from files import read_json
from tokens.tokenizer import vocab_size_of
from weights.foreign import BUFFERS, check_model_args

# -----------------------------------------------------------------------------
# safetensors: the length of a JSON header in 8 bytes, the header, then the tensors' bytes, little-endian

DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
MAX_SIZE = 2**48  # of one dimension


class Entry(NamedTuple):
    """Where a tensor is stored."""

    path: Path
    dtype: str
    shape: tuple
    start: int  # first byte in the file
    n_bytes: int


class Safetensors:
    """The tensors of .safetensors files by name. A tensor is in the page cache until it is copied."""

    def __init__(self, paths):
        self.entries = {}
        for path in paths:
            self.entries.update(read_header(path))
        # a tensor without dimensions is a counter or a constant, not a weight
        self.names = {name for name, entry in self.entries.items()
                      if entry.shape and not BUFFERS.search(name)}

    def __getitem__(self, name: str) -> torch.Tensor:
        path, dtype, shape, start, n_bytes = self.entries[name]
        if dtype not in DTYPES:
            raise ValueError(f'{path}: {name} is {dtype}, accepted are {", ".join(DTYPES)}')
        if n_bytes == 0:
            return torch.empty(shape, dtype=DTYPES[dtype])
        # mode c, copy on write: torch warns of arrays that are read-only
        mapped = np.memmap(path, np.uint8, mode='c', offset=start, shape=(n_bytes,))
        return torch.from_numpy(mapped).view(DTYPES[dtype]).view(shape)


def open_folder(folder: Path) -> Safetensors:
    """Open model.safetensors of a folder, or the files that model.safetensors.index.json lists."""
    whole, index = folder / 'model.safetensors', folder / 'model.safetensors.index.json'
    if whole.is_file():
        return Safetensors([whole])
    if not index.is_file():
        has_pickle = (folder / 'pytorch_model.bin').exists()
        reason = ', pytorch_model.bin would run code when read' if has_pickle else ''
        raise FileNotFoundError(f'{folder} has neither model.safetensors nor {index.name}{reason}: '
                                "save it with transformers' save_pretrained")
    content = read_json(index)
    weight_map = content.get('weight_map') if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f'{index}: not an index of shards: it has no weight_map')
    names = sorted(set(weight_map.values()))
    if not all(re.fullmatch(r'[\w.-]+\.safetensors', name) for name in names):
        raise ValueError(f'{index}: names a file that is no .safetensors file of this folder')
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f'{folder / name} is missing though {index.name} names it')
    return Safetensors([folder / name for name in names])


def read_header(path: Path) -> dict[str, Entry]:
    """Return the entries of a .safetensors file, checked against its size: mapping past its end is SIGBUS."""
    size = path.stat().st_size
    with open(path, 'rb') as f:
        length = int.from_bytes(f.read(8), 'little')
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f'{path} is not a whole .safetensors file: '
                             f'it has {size:,} bytes, its header alone would take {8 + length:,}')
        header = f.read(length)
    try:
        stored = json.loads(header.decode('utf-8'), object_pairs_hook=refuse_repeats)
        stored.pop('__metadata__', None)
        entries = {name: read_entry(path, name, entry, 8 + length) for name, entry in stored.items()}
        end = 8 + length
        for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.n_bytes)):
            if entry.start != end:
                raise ValueError('its tensors overlap or leave gaps')
            end += entry.n_bytes
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is not a .safetensors file: {error or type(error).__name__}') from None
    if end > size:
        raise ValueError(f'{path} has {size:,} bytes, its header says {end:,}: '
                         'it was cut short, download or copy it again')
    return entries


def read_entry(path, name, entry, data_start):
    """Check one entry of a header. A dtype that is not in DTYPES is refused when its tensor is read."""
    dtype, shape, (start, end) = entry['dtype'], tuple(entry['shape']), entry['data_offsets']
    is_sound = all(type(number) is int and number >= 0 for number in (start, end - start, *shape))
    if not is_sound or max(shape, default=0) >= MAX_SIZE:
        raise ValueError(f'{name} has shape {shape} and bytes {start} to {end}')
    if dtype in DTYPES and end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f'{name} does not fill its place')
    return Entry(path, dtype, shape, data_start + start, end - start)


def refuse_repeats(pairs):
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError('a name stands in its header twice')
    return entries


def write_safetensors(f, tensors: dict[str, torch.Tensor]):
    """Write tensors into an open file. Each is made contiguous when its turn comes."""
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    header, start = {'__metadata__': {'format': 'pt'}}, 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        header[name] = dict(dtype=dtype_names[tensor.dtype], shape=list(tensor.shape),
                            data_offsets=[start, end])
        start = end
    text = json.dumps(header, separators=(',', ':')).encode('utf-8')
    text += b' ' * (-len(text) % 8)  # tensors begin at multiples of 8
    f.write(struct.pack('<Q', len(text)) + text)
    for tensor in tensors.values():
        f.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())


# -----------------------------------------------------------------------------
# .npz: our names and layouts, matrices as outputs x inputs, a tied head once as transformer.wte.weight

SETTINGS = 'settings'  # the name of the JSON text beside the weights


def write_npz(f, settings: dict, tensors: dict[str, torch.Tensor]):
    """Write tensors and settings that np.load() reads."""
    with zipfile.ZipFile(f, 'w') as archive:
        for name in (SETTINGS, *tensors):
            if name == SETTINGS:
                array = np.array(json.dumps(settings))
            else:
                is_bfloat16 = tensors[name].dtype == torch.bfloat16  # NumPy has none
                array = (tensors[name].float() if is_bfloat16 else tensors[name]).cpu().numpy()
            with archive.open(name + '.npy', 'w', force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


class Npz:
    """The weights of an .npz file by name. Reading one checks its checksum in the zip archive."""

    def __init__(self, path):
        self.path = path
        try:
            self.arrays = np.load(path, allow_pickle=False)
            self.names = set(self.arrays.files) - {SETTINGS}  # a lone array has no files
        except Exception as error:  # zipfile and NumPy raise a dozen kinds for broken bytes
            raise ValueError(f'{path} is not an .npz file: {error}') from None

    def read_array(self, name):
        try:
            array = self.arrays[name]
        except Exception as error:
            raise ValueError(f'{self.path}: {name} is unreadable: {error}') from None
        if not isinstance(array, np.ndarray):
            raise ValueError(f'{self.path}: {name} is no array')
        return array

    def __getitem__(self, name: str) -> torch.Tensor:
        array = self.read_array(name)
        if array.dtype not in (np.float64, np.float32, np.float16):
            raise ValueError(f'{self.path}: {name} is {array.dtype}, accepted are float64, float32, float16')
        return torch.from_numpy(array)

    def settings(self) -> dict:
        """Return {'model_args', 'tokenizer'} as save() wrote them."""
        try:
            settings = json.loads(str(self.read_array(SETTINGS)))
            args, tokenizer = dict(settings['model_args']), settings['tokenizer']
            check_model_args(args, self.path, len(self.names))
            if tokenizer is not None:
                vocab_size_of(tokenizer)  # raises if it is none
            return dict(model_args=args, tokenizer=tokenizer)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{self.path} was not written by save_pretrained: {error}') from None
