"""formats.py: what the safetensors package and NumPy write is read, and damaged files are refused in one line."""

import json

import numpy as np
import pytest
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


def test_safetensors_package_agrees(tmp_path):
    from safetensors.torch import load_file, save_file
    torch.manual_seed(0)
    tensors = {'a': torch.randn(3, 5), 'bé': torch.randn(7).bfloat16(), 'c': torch.randn(2, 3, 4).half().transpose(0, 2), 'd': torch.randn(1).double()}
    with open(tmp_path / 'ours.safetensors', 'wb') as f:
        formats.write_safetensors(f, tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / 'theirs.safetensors')
    here, there = formats.Safetensors([tmp_path / 'theirs.safetensors']), load_file(tmp_path / 'ours.safetensors')
    for name, tensor in tensors.items():
        assert torch.equal(here[name], tensor) and torch.equal(there[name], tensor) and there[name].dtype == here[name].dtype == tensor.dtype


def test_damaged_safetensors(tmp_path):
    ours().save_pretrained(tmp_path)
    path = tmp_path / 'model.safetensors'
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert error_of(GPT.from_pretrained, tmp_path) == (
        f'{path} has {len(whole) - 1:,} bytes, its header says {len(whole):,}: it was cut short, download or copy it again')
    header = 8 + int.from_bytes(whole[:8], 'little')
    path.write_bytes(whole[:100])
    assert error_of(GPT.from_pretrained, tmp_path) == (
        f'{path} is not a whole .safetensors file: it has 100 bytes, its header alone would take {header:,}')
    for broken in (b'', b'1234567', whole[:8] + b'[' * (header - 8) + whole[header:], whole[:8] + whole[8:].replace(b'"F32"', b'"F33"', 1),
                   whole.replace(b'[83,42]', b'[42,83]'), whole.replace(b'[83,42]', b'[83,43]'), whole.replace(b'[83,42]', b'[-3,42]'),
                   b'\xff' * 8 + whole[8:]):
        path.write_bytes(broken)
        assert str(path) in error_of(GPT.from_pretrained, tmp_path) or broken[header:] == whole[header:] and str(tmp_path) in error_of(
            GPT.from_pretrained, tmp_path)


def test_damaged_npz(tmp_path):
    path = tmp_path / 'x.npz'
    ours().save_pretrained(path)
    whole = path.read_bytes()
    for broken in (b'', whole[:-100], whole[:5000] + b'\xff' + whole[5001:]):
        path.write_bytes(broken)
        assert error_of(GPT.from_pretrained, path).startswith(f'{path}')
    np.savez(path, settings=np.array({'a': 1}, dtype=object))  # a pickle
    assert error_of(GPT.from_pretrained, path).startswith(f'{path} was not written by save_pretrained: {path}: settings is unreadable: Object arrays')
    for settings in ({'a': 1}, {'model_args': {**vars(GPTConfig()), 'n_layer': '3'}, 'tokenizer': None}, {'model_args': vars(GPTConfig()), 'tokenizer': 3}):
        np.savez(path, settings=np.array(json.dumps(settings)))
        assert error_of(GPT.from_pretrained, path).startswith(f'{path} was not written by save_pretrained: ')
    np.savez(path, a=np.ones(3))
    assert error_of(GPT.from_pretrained, path).startswith(f'{path} was not written by save_pretrained: ')


def test_safetensors_whose_tensors_overlap_or_repeat_are_refused(tmp_path):
    def refused(header, n_bytes):
        text = header.encode()
        (tmp_path / 'x.safetensors').write_bytes(len(text).to_bytes(8, 'little') + text + bytes(n_bytes))
        with pytest.raises(ValueError) as error:
            formats.read_header(tmp_path / 'x.safetensors')
        return str(error.value).partition('not a .safetensors file: ')[2]
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    assert refused(f'{{"a":{entry % (0, 4)},"b":{entry % (2, 6)}}}', 6) == 'its tensors overlap or leave gaps'
    assert refused(f'{{"a":{entry % (0, 4)},"a":{entry % (4, 8)}}}', 8) == 'a name stands in its header twice'
    assert refused('{"a":{"dtype":"F32","shape":[0,%d],"data_offsets":[0,0]}}' % 10**30, 0).startswith('a has shape (0, 1000')
