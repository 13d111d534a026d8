"""numerics.py: dumps against transformers, planted faults at the right operator, dumps of other programs, bad input."""

import json
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, run_here
from torch.nn import functional as F

import kernels
import model as model_py
from model import GPT, GPTConfig
from training.dumps import measure, order_of

ARCHS = {
    'gpt2': dict(arch='gpt2', bias=True),
    'modern': dict(arch='modern'),
    'llama': dict(arch='llama', n_kv_head=2, n_hidden=40),
    'qwen2': dict(arch='llama', n_kv_head=2, qkv_bias=True, tied=True),
    'qwen3': dict(arch='llama', n_kv_head=2, head_size=6, qk_norm=True, tied=True),
}


def dump(out, *flags):
    code, stdout, stderr = run_here('numerics.py', 'dump', f'--out={out}', '--device=cpu', *flags)
    assert code == 0, stderr
    return out


def compare(a, b, *flags):
    """(exit code, lines of the output)"""
    code, stdout, stderr = run_here('numerics.py', 'compare', a, b, *flags)
    assert code < 2, stderr
    return code, stdout.splitlines()


def names(folder):
    return [tensor['name'] for tensor in json.loads((folder / 'index.json').read_text())['tensors']]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """An .npz of each architecture, none of whose weights are zero, and a dump of each."""
    folder = tmp_path_factory.mktemp('numerics')
    for name, settings in ARCHS.items():
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=24, vocab_size=37, n_layer=2, n_head=4, n_embd=16, **settings))
        for p in model.parameters():
            torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
        model.save_pretrained(folder / f'{name}.npz')
        dump(folder / name, f'--init_from={folder / name}.npz')
    return folder


# -----------------------------------------------------------------------------
# what a dump holds


def test_gradients_and_values_are_those_of_the_model(folder):
    model = GPT.from_pretrained(folder / 'gpt2.npz')
    ids = torch.from_numpy(np.load(folder / 'gpt2' / 'ids.npy'))
    logits, loss = model(ids[:, :-1], ids[:, 1:])
    logits.retain_grad()
    loss.backward()
    expected = {'lm_head.out': logits, 'lm_head.out.grad': logits.grad, 'loss': loss, 'wpe.weight.grad': model.transformer.wpe.weight.grad,
                'h.01.mlp.c_fc.bias': model.transformer.h[1].mlp.c_fc.bias}
    for name, tensor in expected.items():
        torch.testing.assert_close(torch.from_numpy(np.load(folder / 'gpt2' / f'{name}.npy')), tensor.detach(), rtol=1e-5, atol=1e-8)


class Unsearched(list):
    """A list of names that is not searched for each of them: 12,000 names took 0.7 s, 16 times as long as 3,000."""

    def __contains__(self, name):
        raise AssertionError


def test_names_are_ordered_without_a_search_for_each():
    names = Unsearched(['a.weight', 'b.weight', 'a.in', 'a.out', 'loss', 'a.out.grad', 'a.in.grad', 'a.weight.grad', 'b.weight.grad'])
    assert order_of(names) == ['b.weight', 'a.in', 'a.weight', 'a.out', 'loss', 'a.out.grad', 'a.weight.grad', 'a.in.grad', 'b.weight.grad']


def test_names_are_in_the_order_of_execution_and_facts_are_numpys(folder):
    every = names(folder / 'llama')
    block = ['h.01.' + name for name in (
        'in ln_1.in ln_1.weight ln_1.out attn.c_attn.in attn.c_attn.weight attn.c_attn.out attn.c_proj.in attn.c_proj.weight attn.c_proj.out '
        'ln_2.in ln_2.weight ln_2.out mlp.c_fc.in mlp.c_fc.weight mlp.c_fc.out mlp.c_proj.in mlp.c_proj.weight mlp.c_proj.out out').split()]
    assert [name for name in every if name.startswith('h.01.') and not name.endswith('.grad')] == block
    assert [name for name in every if name.startswith('h.01.') and name.endswith('.grad')] == [f'{name}.grad' for name in reversed(block)]
    index = json.loads((folder / 'llama' / 'index.json').read_text())
    facts = {tensor['name']: tensor for tensor in index['tensors']}['h.01.mlp.c_fc.out']
    values = np.load(folder / 'llama' / 'h.01.mlp.c_fc.out.npy')
    assert facts['shape'] == list(values.shape) == [2, 24, 80] and facts['dtype'] == 'float32'
    np.testing.assert_allclose([facts['mean'], facts['deviation'], facts['largest']], [values.mean(), values.std(), abs(values).max()], rtol=1e-4)


def test_bfloat16_is_named_in_the_index_and_float32_on_disk(folder, tmp_path):
    dump(tmp_path / 'b', f'--init_from={folder}/llama.npz', '--dtype=bfloat16')
    index = json.loads((tmp_path / 'b' / 'index.json').read_text())
    facts = {tensor['name']: tensor for tensor in index['tensors']}
    assert index['dtype'] == facts['h.00.mlp.c_fc.out']['dtype'] == 'bfloat16' and facts['h.00.mlp.c_fc.weight']['dtype'] == 'float32'
    assert np.load(tmp_path / 'b' / 'h.00.mlp.c_fc.out.npy').dtype == np.float32
    code, lines = compare(tmp_path / 'b', folder / 'llama')
    assert code == 0 and compare(tmp_path / 'b', folder / 'llama', '--rtol=1e-4')[0] == 1


# -----------------------------------------------------------------------------
# against transformers, compiled code and several ranks


@pytest.mark.parametrize('name', ARCHS)
def test_transformers_computes_the_same_under_the_same_names(folder, tmp_path, name):
    pytest.importorskip('transformers')
    reference = dump(tmp_path / 'r', f'--init_from={folder / name}.npz', '--reference=transformers')
    left_out = [each for each in names(folder / name) if each not in names(reference)]
    assert all(name == 'modern' and each.startswith('ln_f.') for each in left_out)
    code, lines = compare(folder / name, reference, '--rtol=1e-5')
    assert code == 0 and lines[-1].endswith('tensors, all within 1e-05'), lines[-1]


@pytest.mark.full
def test_compiled_code_records_the_same(folder, tmp_path):
    dump(tmp_path / 'c', f'--init_from={folder}/llama.npz', '--compile')
    assert names(tmp_path / 'c') == names(folder / 'llama')
    assert compare(tmp_path / 'c', folder / 'llama', '--rtol=1e-5')[0] == 0


def test_two_ranks_with_shards_record_what_one_does(folder, tmp_path):
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(ROOT / 'numerics.py'), 'dump']
    flags = [f'--out={tmp_path}/two', f'--init_from={folder}/llama.npz', '--device=cpu', '--parallel=fsdp']
    done = subprocess.run([*launch, *flags], capture_output=True, text=True, timeout=600, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / 'two') == names(folder / 'llama')
    assert compare(tmp_path / 'two', folder / 'llama', '--rtol=1e-5')[0] == 0


# -----------------------------------------------------------------------------
# planted faults


def transposed_projection(monkeypatch):
    forward = torch.nn.Linear.forward

    def wrong(self, x):
        square = self.in_features == self.out_features
        return F.linear(x, self.weight.t(), self.bias) if square else forward(self, x)
    monkeypatch.setattr(torch.nn.Linear, 'forward', wrong)


def unscaled_attention(monkeypatch):
    attention = kernels.attention
    monkeypatch.setattr(kernels, 'attention', lambda q, *rest: attention(q * q.size(-1) ** 0.5, *rest))


def stale_rotary_table(monkeypatch):
    table = model_py.rotary_table
    monkeypatch.setattr(model_py, 'rotary_table', lambda config: table(GPTConfig(**vars(config) | dict(rope_theta=500.0))))


def detached_value(monkeypatch):
    attention = kernels.attention
    monkeypatch.setattr(kernels, 'attention', lambda q, k, v, *rest: attention(q, k, v.detach() * 0.5 + v * 0.5, *rest))


@pytest.mark.parametrize('plant, first, before', [
    (transposed_projection, 'h.00.attn.c_proj.out', 'h.00.attn.c_proj.weight'),
    (unscaled_attention, 'h.00.attn.c_proj.in', 'h.00.attn.c_attn.out'),
    (stale_rotary_table, 'h.00.attn.c_proj.in', 'h.00.attn.c_attn.out'),
    (detached_value, 'h.01.attn.c_attn.out.grad', 'h.01.attn.c_proj.in.grad'),
])
def test_a_planted_fault_is_located(folder, tmp_path, monkeypatch, plant, first, before):
    plant(monkeypatch)
    dump(tmp_path / 'faulty', f'--init_from={folder}/llama.npz')
    monkeypatch.undo()
    code, lines = compare(tmp_path / 'faulty', folder / 'llama')
    assert code == 1 and f'First {first}:' in lines[-1] and f'before it {before} is equal' in lines[-1], lines[-1]


def test_a_wrong_weight_and_a_number_that_is_not_finite_are_named(folder, tmp_path):
    model = GPT.from_pretrained(folder / 'gpt2.npz')
    with torch.no_grad():
        model.transformer.h[1].ln_2.bias[3] = float('nan')
    model.save_pretrained(tmp_path / 'nan.npz')
    code, lines = compare(dump(tmp_path / 'nan', f'--init_from={tmp_path}/nan.npz'), folder / 'gpt2')
    assert code == 1 and 'First h.01.ln_2.bias:' in lines[-1]


@pytest.mark.parametrize('value', [np.inf, np.nan])
def test_numbers_that_are_not_finite_are_compared_without_a_warning(value):
    array = np.array([value, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for a, b in ((array, np.ones(2)), (np.ones(2), array), (array, array), (np.zeros(2), np.ones(2))):
            assert not measure('x', a, b, 1e-4, atol=1e-12).is_equal


def test_a_picture_is_drawn(folder, tmp_path):
    pytest.importorskip('matplotlib')
    compare(folder / 'gpt2', folder / 'gpt2', f'--picture={tmp_path}/error.png')
    assert (tmp_path / 'error.png').read_bytes().startswith(b'\x89PNG')


# -----------------------------------------------------------------------------
# tokens, other programs, bad input


def test_ids_from_a_file(folder, tmp_path):
    (tmp_path / 'ids.txt').write_text('1 2 3 4\n5 6 7 36\n')
    dump(tmp_path / 'a', f'--init_from={folder}/gpt2.npz', f'--ids={tmp_path}/ids.txt')
    assert np.load(tmp_path / 'a' / 'wte.in.npy').tolist() == [[1, 2, 3], [5, 6, 7]]
    dump(tmp_path / 'b', f'--init_from={folder}/gpt2.npz', f'--ids={tmp_path}/a/ids.npy')
    assert compare(tmp_path / 'a', tmp_path / 'b', '--rtol=0')[0] == 0


def test_windows_of_a_dataset(folder, tmp_path, tiny):
    dump(tmp_path / 'a', f'--init_from={folder}/gpt2.npz', f'--dataset={tiny}', '--block_size=9')
    assert np.load(tmp_path / 'a' / 'ids.npy').ravel().tolist() == np.fromfile(tiny / 'val.bin', np.uint16)[:20].tolist()


@pytest.mark.parametrize('page', ['docs/NUMERICS.md', 'docs/zh/NUMERICS.md'])
def test_the_example_in_numpy_alone_compares(folder, tmp_path, page):
    (example,) = re.findall(r'```python\n(.*?)```', (ROOT / page).read_text(encoding='utf-8'), re.DOTALL)
    dump(tmp_path / 'a', f'--init_from={folder}/llama.npz')
    (tmp_path / 'example.py').write_text(example, encoding='utf-8')
    subprocess.run([sys.executable, 'example.py'], cwd=tmp_path, check=True)
    assert 'torch' not in example and len(names(tmp_path / 'mine')) > 3
    code, lines = compare(tmp_path / 'mine', tmp_path / 'a')
    assert code == 0, lines


@pytest.mark.parametrize('argv, message', [
    (['compare', '{}/llama', '{}/nowhere'], 'nowhere has no index.json'),
    (['compare', '{}/llama', '{}/gpt2'], 'h.00.attn.c_attn.weight has shape (32, 16) in'),
    (['compare', '{}/llama', '{}/half'], 'half/index.json: not JSON'),
    (['compare', '{}/llama', '{}/strange'], 'accepted are "tensors"'),
    (['compare', '{}/llama', '{}/cut'], 'write the dump again'),
    (['compare', '{}/llama'], 'accepted are dump --out=FOLDER, compare FOLDER FOLDER'),
    (['dump', '--init_from={}/llama.npz'], '--out is empty'),
    (['dump', '--out={}/x', '--init_from={}/llama.npz', '--ids={}/words.txt'], 'accepted is a file of whole numbers'),
    (['dump', '--out={}/x', '--init_from={}/llama.npz', '--ids={}/big.txt'], 'has ids from 1 to 99'),
    (['dump', '--out={}/x', '--init_from={}/llama.npz', '--block_size=-5'], '--block_size=-5: accepted are sizes of 1 or more'),
    (['dump', '--out={}/x', '--init_from={}/llama.npz', '--batch_size=0'], '--batch_size=0, --block_size=64: accepted are sizes of 1 or more'),
])
def test_bad_input_is_one_line(folder, argv, message):
    for name, text in (('half', '{"tensors": ['), ('strange', '{"tensors": 3}'), ('cut', '{"tensors": [{"name": "loss"}]}')):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / 'index.json').write_text(text)
    (folder / 'cut' / 'loss.npy').write_bytes(b'\x93NUMPY')
    (folder / 'words.txt').write_text('one two\n')
    (folder / 'big.txt').write_text('1 99\n')
    code, _, stderr = run_here('numerics.py', *(each.format(folder) for each in argv))
    assert code == 2 and message in stderr and stderr.count('\n') == 1, stderr
