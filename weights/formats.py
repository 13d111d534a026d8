"""The file formats of weights, .safetensors and .npz, read one tensor at a time."""

import json
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

    Each slice maps the file anew, because pages stay resident in a mapping: GPT-2 (124M) as bfloat16 took 3.0
    times its memory in one mapping, 1.1 times by slices of 4096 rows.
    """

    path: Path
    name: str
    shape: tuple

    def __getitem__(self, rows: slice) -> torch.Tensor:
        # a model is built on the device meta, which must not get these tensors
        with open_safetensors(self.path) as f, torch.device('cpu'):
            stored = f.get_slice(self.name)
            if stored.get_dtype() not in DTYPES:
                raise ValueError(f'{self.path}: {self.name} is {stored.get_dtype()}, '
                                 f'accepted are {", ".join(DTYPES)}')
            return stored[rows]


def open_safetensors(path):
    import safetensors
    try:
        return safetensors.safe_open(path, 'pt')
    except safetensors.SafetensorError as error:
        reason = str(error).removeprefix('Error while deserializing header: ')
        raise ValueError(f'{path} is not a complete .safetensors file ({reason}): '
                         'download or copy it again') from None


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
        with open_safetensors(path) as f:
            for name in f.keys():
                shape = tuple(f.get_slice(name).get_shape())
                # a tensor without dimensions is a counter or a constant
                if shape and not BUFFERS.search(name):
                    weights[name] = StoredTensor(path, name, shape)
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
