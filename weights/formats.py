"""The file formats of weights, .safetensors and .npz, read one tensor at a time."""

import json
import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from files import one_line, read_json
from tokens.tokenizer import vocab_size_of
from weights.foreign import BUFFERS, check_model_args

DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}


def read_settings(path) -> dict:
    """Return the settings in a JSON file."""
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f'{path} holds no settings: accepted is a JSON object')
    return settings


# -----------------------------------------------------------------------------
# safetensors


class StoredTensor(NamedTuple):
    """A tensor in a .safetensors file, read by slicing its rows.

    The safetensors package would parse the header for each slice, or map the file, where pages stay resident:
    GPT-2 (124M) as bfloat16 took 3.0 times its memory in one mapping.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple
    offset: int  # bytes of the file before it

    def __getitem__(self, rows: slice) -> torch.Tensor:
        if self.dtype not in DTYPES:
            raise ValueError(f'{self.path}: {self.name} is {self.dtype}, accepted are {", ".join(DTYPES)}')
        start, end, _ = rows.indices(self.shape[0])
        dtype, row_shape = DTYPES[self.dtype], self.shape[1:]
        # a model is built on the device meta, which must not get these tensors
        part = torch.empty(max(end - start, 0), *row_shape, dtype=dtype, device='cpu')
        with open(self.path, 'rb') as f:
            f.seek(self.offset + start * math.prod(row_shape) * dtype.itemsize)
            if f.readinto(part.view(-1).view(torch.uint8).numpy()) < part.nbytes:
                raise ValueError(f'{self.path} was cut short while it was read: copy it again')
        return part


def read_header(path):
    """Return (name, dtype, shape, offset in the file) of each tensor in a .safetensors file."""
    import safetensors
    try:
        safetensors.safe_open(path, 'pt')  # checks the header and the length of the file
    except safetensors.SafetensorError as error:
        reason = str(error).removeprefix('Error while deserializing header: ')
        raise ValueError(f'{path} is not a complete .safetensors file ({reason}): '
                         'download or copy it again') from None
    with open(path, 'rb') as f:
        [n_bytes] = struct.unpack('<Q', f.read(8))
        header = json.loads(f.read(n_bytes))
    header.pop('__metadata__', None)
    return [(name, entry['dtype'], tuple(entry['shape']), 8 + n_bytes + entry['data_offsets'][0])
            for name, entry in header.items()]


def read_folder(folder: Path, stem: str = 'model') -> dict[str, StoredTensor]:
    """Return the weights in model.safetensors, or in the files of model.safetensors.index.json, by name."""
    folder = Path(folder)
    paths, index = [folder / f'{stem}.safetensors'], folder / f'{stem}.safetensors.index.json'
    if not paths[0].is_file():
        if not index.is_file():
            raise FileNotFoundError(f'{folder} has neither {paths[0].name} nor {index.name}: '
                                    "save it with transformers' save_pretrained")
        shards = read_json(index)
        with one_line(f'{index} has no weight_map of names to .safetensors files'):
            paths = {folder / Path(name).name for name in shards['weight_map'].values()}
    weights = {}
    for path in paths:
        for name, dtype, shape, offset in read_header(path):
            # a tensor without dimensions is a counter or a constant
            if shape and not BUFFERS.search(name):
                weights[name] = StoredTensor(path, name, dtype, shape, offset)
    return weights


def write_safetensors(f, tensors: dict[str, torch.Tensor]):
    """Write tensors into an open file, one at a time.

    The safetensors package copies them all, or replaces the file by one that its owner alone can read.
    """
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    header, offset = {'__metadata__': {'format': 'pt'}}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = dict(dtype=dtype_names[tensor.dtype], shape=list(tensor.shape),
                            data_offsets=[offset, end])
        offset = end
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # tensors begin at multiples of 8
    f.write(struct.pack('<Q', len(text)) + text)
    for tensor in tensors.values():
        f.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())


# -----------------------------------------------------------------------------
# .npz: our names and layouts, matrices as outputs x inputs, a tied head once as transformer.wte.weight


class Npz:
    """The weights of an .npz file by name, and its settings."""

    def __init__(self, path):
        self.where = f'{path} was not written by save_pretrained, or is damaged'
        with one_line(self.where):
            self.arrays = np.load(path, allow_pickle=False)
            self.settings = json.loads(str(self.arrays['settings']))
            check_model_args(self.settings['model_args'], len(self.keys()))
            if self.settings['tokenizer'] is not None:
                vocab_size_of(self.settings['tokenizer'])  # raises if it is none

    def keys(self):
        return self.arrays.keys() - {'settings'}

    def __getitem__(self, name: str) -> torch.Tensor:
        with one_line(self.where):
            array = self.arrays[name]  # verifies the checksum in the zip archive
            if array.dtype not in (np.float64, np.float32, np.float16):
                raise ValueError(f'{name} is {array.dtype}, accepted are float64, float32, float16')
            return torch.from_numpy(array)


def write_npz(f, settings: dict, tensors: dict[str, torch.Tensor]):
    arrays = {'settings': np.array(json.dumps(settings))}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:  # NumPy has none
            tensor = tensor.float()
        arrays[name] = tensor.detach().cpu().numpy()
    np.savez(f, **arrays)
