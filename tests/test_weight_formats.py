"""formats.py: what the safetensors package and NumPy write is read, and damaged files are refused in one line."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from model import GPT, GPTConfig
from weights import formats


def ours():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=101, vocab_size=83, n_layer=3, n_head=3, n_embd=42))


def error_of(call, *arguments):
    with pytest.raises((ValueError, OSError)) as error:
        call(*arguments)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_safetensors_package_reads_what_is_written(tmp_path):
    from safetensors.torch import load_file
    torch.manual_seed(0)
    tensors = {'a': torch.randn(3, 5), 'bé': torch.randn(7).bfloat16(), 'c': torch.randn(2, 3, 4).half().transpose(0, 2), 'd': torch.randn(1).double()}
    with open(tmp_path / 'model.safetensors', 'wb') as f:
        formats.write_safetensors(f, tensors)
    here, there = formats.read_folder(tmp_path), load_file(tmp_path / 'model.safetensors')
    for name, tensor in tensors.items():
        assert here[name].shape == tensor.shape and torch.equal(here[name][1:3], tensor[1:3])
        assert torch.equal(there[name], tensor) and there[name].dtype == here[name][:].dtype == tensor.dtype


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    resource = pytest.importorskip('resource')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match='File too large') as error:
            ours().save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(tmp_path / 'model.safetensors') and '\n' not in error.value.strerror
    assert not list(tmp_path.iterdir())


def test_the_header_of_safetensors_is_parsed_once_for_all_tensors(tmp_path, monkeypatch):
    """Once for each slice took 0.4 s for 500 tensors and 9 s for 2,000."""
    tensors = {f'w{i}': torch.randn(3, 2).to(dtype) for i, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16, torch.float64])}
    tensors |= {'vector': torch.randn(5), 'empty': torch.empty(0, 2)}
    safetensors.torch.save_file(tensors, tmp_path / 'model.safetensors')
    opened, safe_open = [], safetensors.safe_open
    monkeypatch.setattr(safetensors, 'safe_open', lambda *args: opened.append(args) or safe_open(*args))
    weights = formats.read_folder(tmp_path)
    for name, tensor in tensors.items():
        for rows in (slice(None), slice(1, 2), slice(2, 99)):
            with torch.device('meta'):
                part = weights[name][rows]
            assert part.dtype == tensor.dtype and torch.equal(part, tensor[rows])
    assert len(opened) == 1
    (tmp_path / 'model.safetensors').write_bytes((tmp_path / 'model.safetensors').read_bytes()[:-100])
    with pytest.raises(ValueError, match='was cut short while it was read'):
        [weights[name][:] for name in tensors]


def test_damaged_safetensors(tmp_path):
    ours().save_pretrained(tmp_path)
    path = tmp_path / 'model.safetensors'
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], 'little')
    for broken in (b'', b'1234567', whole[:100], whole[:-1], whole[:8] + b'[' * (header - 8) + whole[header:], b'\xff' * 8 + whole[8:],
                   whole.replace(b'[83,42]', b'[83,43]'), whole.replace(b'[83,42]', b'[-3,42]'), whole[:8] + whole[8:].replace(b'"F32"', b'"F33"', 1)):
        path.write_bytes(broken)
        message = error_of(GPT.from_pretrained, tmp_path)
        assert message.startswith(f'{path} is not a complete .safetensors file (') and message.endswith('): download or copy it again')
    path.write_bytes(whole.replace(b'[83,42]', b'[42,83]'))
    assert error_of(GPT.from_pretrained, tmp_path) == f'{tmp_path}: transformer.wte.weight has shape (42, 83), the model expects (83, 42)'


def test_damaged_npz(tmp_path):
    path = tmp_path / 'x.npz'
    ours().save_pretrained(path)
    whole = path.read_bytes()
    for broken in (b'', whole[:-100], whole[:5000] + b'\xff' + whole[5001:]):
        path.write_bytes(broken)
        assert error_of(GPT.from_pretrained, path).startswith(f'{path}')
    np.savez(path, settings=np.array({'a': 1}, dtype=object))  # a pickle
    assert error_of(GPT.from_pretrained, path).startswith(f'{path} was not written by save_pretrained, or is damaged: Object arrays')
    for settings in ({'a': 1}, {'model_args': {**vars(GPTConfig()), 'n_layer': '3'}, 'tokenizer': None}, {'model_args': vars(GPTConfig()), 'tokenizer': 3}):
        np.savez(path, settings=np.array(json.dumps(settings)))
        assert error_of(GPT.from_pretrained, path).startswith(f'{path} was not written by save_pretrained, or is damaged: ')
    np.savez(path, settings=np.array(json.dumps({'model_args': dict(block_size=8, n_layer=1, n_head=1, n_embd=8), 'tokenizer': None})))
    assert error_of(GPT.from_pretrained, path) == f'{path} was not written by save_pretrained, or is damaged: vocab_size is missing'
    np.savez(path, a=np.ones(3))
    assert error_of(GPT.from_pretrained, path).startswith(f'{path} was not written by save_pretrained, or is damaged: ')
