"""Checkpoints of nanoGPT and other trainers: converted to our format, or refused in one line."""

import io
import pickle
import re
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
from model import GPT, GPTConfig
from weights import foreign

SIZES = dict(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=8)


def new_model(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SIZES, **changes}))


def nanogpt(model, **changes):
    """The dict that nanoGPT's train.py saves."""
    args = dict(SIZES, bias=model.config.bias, dropout=0.0)
    return dict(model=model.state_dict(), model_args=args, iter_num=2000, best_val_loss=torch.tensor(1.5),
                config=dict(dataset='shakespeare_char')) | changes


def error_of(call, *arguments, **named):
    with pytest.raises((ValueError, OSError)) as error:
        call(*arguments, **named)
    assert '\n' not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def ours(**changes):
    """A model of odd sizes with random values in all weights."""
    model = new_model(**dict(block_size=101, vocab_size=83, n_layer=3, n_head=3, n_embd=42) | changes)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def nest(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


def assert_same(model, other):
    a, b = model.state_dict(), other.state_dict()
    assert model.config == other.config and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def pickle_of(value):
    """The pickle inside the zip archive of torch.save."""
    file = io.BytesIO()
    torch.save(value, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith('data.pkl')))


def test_numbers_of_numpy_and_tensors_become_plain():
    state = nanogpt(new_model(), best_val_loss=np.float64(1.5), config=dict(lr=np.float32(0.5), x=np.int64(3)))
    state['model_args'] = {name: np.int64(value) if name == 'n_layer' else value
                           for name, value in state['model_args'].items()}
    converted = foreign.from_foreign(state, 'x.pt')
    assert type(converted['best_val_loss']) is float and type(converted['model_args']['n_layer']) is int
    foreign.check_state(converted, 'x.pt')
    assert foreign.from_foreign(nanogpt(new_model()), 'x.pt')['best_val_loss'] == 1.5


@pytest.mark.parametrize('bare', [False, True])
def test_a_head_of_its_own_is_refused(bare):
    """The embedding of a dict with two matrices was overwritten by its head."""
    weights = dict(new_model().state_dict())
    weights['lm_head.weight'] = weights['lm_head.weight'] + 1
    state = dict(model_state_dict=weights) if bare else nanogpt(new_model()) | dict(model=weights)
    assert error_of(foreign.from_foreign, state, 'x.pt', 2) == (
        'x.pt: lm_head.weight is not transformer.wte.weight: GPT-2 has one matrix for both')


@pytest.mark.parametrize('change, message', [
    (torch.Tensor.half, 'lm_head.weight is not transformer.wte.weight: GPT-2 has one matrix for both'),
    (torch.Tensor.int, 'lm_head.weight is torch.int32, torch.strided: accepted are dense floating-point weights'),
    (torch.Tensor.to_sparse, 'lm_head.weight is torch.float32, torch.sparse_coo: accepted are dense floating-point weights'),
])
def test_a_head_of_another_type(change, message):
    weights = dict(new_model().state_dict())
    weights['lm_head.weight'] = change(weights['lm_head.weight'])
    assert error_of(foreign.from_foreign, dict(state_dict=weights), 'x.pt', 2) == f'x.pt: {message}'


@pytest.mark.parametrize('sizes', [dict(n_layer=10**9), dict(n_layer=True), dict(block_size=10**9), dict(vocab_size=[2])])
def test_sizes_come_from_the_weights(sizes):
    """A model of 10**9 layers was built until memory ran out."""
    state = foreign.from_foreign(nanogpt(new_model(), model_args=dict(SIZES, **sizes)), 'x.pt')
    foreign.check_state(state, 'x.pt')
    assert GPTConfig(**state['model_args']) == GPTConfig(**SIZES, activation='gelu')


@pytest.mark.parametrize('sizes, message', [
    (dict(n_layer=10**9), 'n_layer = 1000000000 does not fit its 29 weights'),
    (dict(n_layer=10**5), 'n_layer = 100000 does not fit its 29 weights'),
    (dict(n_layer=True), 'n_layer = True is none that this version knows'),
    (dict(n_head=[2]), 'n_head = [2] is none that this version knows'),
    (dict(vocab_size=10**9), 'transformer.wte.weight has shape (13, 8), its model_args say (1000000000, 8)'),
    (dict(block_size=10**9), 'transformer.wpe.weight has shape (8, 8), its model_args say (1000000000, 8)'),
])
def test_sizes_that_the_weights_contradict(sizes, message):
    state = dict(nanogpt(new_model(), model_args=dict(SIZES, **sizes)), format=1, best_val_loss=1.5)
    assert error_of(foreign.check_state, state, 'x.pt') == f'x.pt: {message}'


@pytest.mark.parametrize('part, message', [
    (dict(optimizer=3), 'x.pt is not a checkpoint of flatGPT or nanoGPT: optimizer is a int'),
    (dict(optimizer=dict(state=[1])), 'x.pt: the state of its optimizer is not a dict of tensors for each parameter'),
    (dict(optimizer=dict(state={0: [1]})), 'x.pt: the state of its optimizer is not a dict of tensors for each parameter'),
    (dict(optimizer=dict(state={0: dict(exp_avg=1)})),
     'x.pt: the state of its optimizer is not a dict of tensors for each parameter'),
    (dict(iter_num='3'), 'x.pt is not a checkpoint of flatGPT or nanoGPT: iter_num is a str'),
    (dict(tokenizer='gpt2'), 'x.pt is not a checkpoint of flatGPT or nanoGPT: tokenizer is a str'),
    (dict(scaler=[1]), 'x.pt is not a checkpoint of flatGPT or nanoGPT: scaler is a list'),
    (dict(style=3), 'x.pt is not a checkpoint of flatGPT or nanoGPT: style is a int'),
])
def test_parts_of_the_wrong_type(part, message):
    state = foreign.from_foreign(nanogpt(new_model()), 'x.pt') | part
    assert error_of(foreign.check_state, state, 'x.pt') == message


def test_weights_of_another_model_are_an_error_even_if_lax():
    """A model of random weights was sampled with exit code 0."""
    other = {f'layers.{i}.weight': torch.ones(2) for i in range(4)}
    assert error_of(foreign.load_weights, new_model(), other, 'x.pt', strict=False) == (
        'x.pt: no weight fits the model, which has lm_head.weight, transformer.h.0.attn.c_attn.bias, '
        'transformer.h.0.attn.c_attn.weight; the file has layers.0.weight, layers.1.weight, layers.2.weight: '
        'it belongs to another model')


def test_names_of_weights_cannot_steer_the_terminal(capsys):
    weights = new_model().state_dict() | {'a\x1b[31m': torch.ones(2)}
    foreign.load_weights(new_model(), weights, 'x.pt', strict=False)
    assert capsys.readouterr().out == 'x.pt: 1 weights unexpected, not used: a\\x1b[31m\n'


def nested(depth):
    pair = (1, 2)
    for _ in range(depth):
        pair = (pair, pair)
    return pair


def test_a_pickle_whose_tuples_never_end_is_refused():
    """Reading a dict hashes its keys; the hash of 60 nested pairs has 2**60 parts."""
    state = {'k': [(1, 2), [], {}, None, b'x', 4.5, 'abc', nested(5)], 3: (nested(8),)}
    foreign.check_pickle(pickle.dumps(state, 2), 'x.pt')  # the protocol that torch reads
    hostile = pickle.dumps([nested(60)], 2)
    assert error_of(foreign.check_pickle, hostile, 'x.pt') == (
        'x.pt is not a readable checkpoint, in its pickle: tuples of more than 10,000 values')


def test_the_pickles_of_checkpoints_pass():
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4).long(), torch.zeros(1, 4).long())[1].backward()
    optimizer.step()
    foreign.check_pickle(pickle_of(nanogpt(model, optimizer=optimizer.state_dict(), args=Namespace(x=1))), 'x.pt')
    hostile = pickle_of(nanogpt(model, config=[nested(60)]))
    assert 'tuples of more than 10,000 values' in error_of(foreign.check_pickle, hostile, 'x.pt')


# -----------------------------------------------------------------------------
# files of other trainers


@pytest.mark.parametrize('key, prefix', [
    *[('model_state_dict', prefix) for prefix in ('', 'module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.')],
    ('model', '_orig_mod.'), ('state_dict', ''), (None, ''), (None, 'module.')])
def test_weights_under_any_of_these_names(tmp_path, capsys, key, prefix):
    model = ours(activation='gelu')
    weights = nest(model.state_dict(), prefix)
    torch.save({key: weights, 'epoch': 3} if key else weights, tmp_path / 'x.pt')
    state = checkpoint.load(tmp_path / 'x.pt', n_head=3)
    assert capsys.readouterr().out == f'{tmp_path / "x.pt"}: sizes from its weights, n_head = 3, activation = gelu\n'
    loaded = GPT(GPTConfig(**state['model_args']))
    foreign.load_weights(loaded, state['model'], tmp_path / 'x.pt')
    assert_same(model, loaded)


def test_heads_are_read_from_the_file_or_asked_for(tmp_path, capsys):
    path = tmp_path / 'x.pt'
    torch.save({'model_state_dict': ours().state_dict()}, path)
    assert error_of(checkpoint.load, path) == f'{path} does not say its number of heads, and weights do not show it: give --n_head'
    torch.save({'model_state_dict': ours().state_dict(), 'config': {'n_head': 3, 'lr': 0.1}}, path)
    assert checkpoint.load(path, n_head=7)['model_args']['n_head'] == 3
    assert 'n_head = 3, ' in capsys.readouterr().out


def test_strict_names_what_does_not_fit_and_lax_lists_it(tmp_path, capsys):
    model, path = ours(), tmp_path / 'x.pt'
    weights = model.state_dict() | {'value_head.weight': torch.ones(3)}
    for name in ('transformer.h.1.ln_2.weight', 'transformer.h.2.mlp.c_fc.bias'):
        del weights[name]
    torch.save({'model_state_dict': weights}, path)
    state = checkpoint.load(path, n_head=3)
    fresh = GPT(model.config)
    assert error_of(foreign.load_weights, fresh, state['model'], path) == (
        f'{path} does not fit the model: 2 weights missing (transformer.h.1.ln_2.weight, transformer.h.2.mlp.c_fc.bias), '
        '1 unexpected (value_head.weight); --strict=False takes those that fit')
    capsys.readouterr()
    foreign.load_weights(fresh, state['model'], path, strict=False)
    assert capsys.readouterr().out == (
        f'{path}: 2 weights missing, left as a new model has them: transformer.h.1.ln_2.weight, transformer.h.2.mlp.c_fc.bias\n'
        f'{path}: 1 weights unexpected, not used: value_head.weight\n')
    assert torch.equal(fresh.transformer.wte.weight, model.transformer.wte.weight)
    assert torch.equal(fresh.transformer.h[1].ln_2.weight, torch.ones(42))


def test_files_that_are_no_checkpoint(tmp_path):
    path = tmp_path / 'x.pt'
    torch.save({'epoch': 3}, path)
    assert error_of(checkpoint.load, path) == (
        f'{path} has no weights by name, itself or under model, model_state_dict, state_dict')
    torch.save({'model_state_dict': {'layers.0.weight': torch.ones(3)}}, path)
    assert error_of(checkpoint.load, path) == (
        f"{path}: its weights (layers.0.weight) lack GPT-2's names, transformer.wte.weight and so on: rename them where it was written")
    torch.save({'model_state_dict': ours().state_dict(), 'args': pytest.MonkeyPatch()}, path)  # any object will do
    assert error_of(checkpoint.load, path) == (f'{path} is not a readable checkpoint (it asks for _pytest.monkeypatch.MonkeyPatch, and only tensors '
                                               'and plain values are read)')
    untied = ours().state_dict()
    untied['lm_head.weight'] = untied['lm_head.weight'] + 1
    torch.save(untied, path)
    assert error_of(checkpoint.load, path, n_head=3) == f'{path}: lm_head.weight is not transformer.wte.weight: GPT-2 has one matrix for both'


def test_old_causal_masks_of_nanogpt_and_other_keys_for_the_weights(tmp_path):
    weights = {f'module.{k}': v for k, v in new_model().state_dict().items()} | {'transformer.h.0.attn.bias': torch.ones(1, 1, 8, 8)}
    torch.save(dict(model_state_dict=weights, model_args=dict(SIZES)), tmp_path / 'ckpt.pt')
    state = checkpoint.load(tmp_path / 'ckpt.pt')
    foreign.load_weights(GPT(GPTConfig(**state['model_args'])), state['model'], tmp_path / 'ckpt.pt')
    assert state['iter_num'] == 0


def test_load_weights_names_what_does_not_fit():
    weights = new_model().state_dict()
    extra = {'spare': weights.pop('transformer.wpe.weight'), **weights}
    with pytest.raises(ValueError, match=re.escape('x.pt does not fit the model: 1 weights missing (transformer.wpe.weight), 1 unexpected (spare)')):
        foreign.load_weights(new_model(), extra, 'x.pt')


def test_a_weight_that_is_there_twice_is_refused():
    weights = new_model().state_dict()
    weights['module.transformer.wpe.weight'] = weights['transformer.wpe.weight'] + 1
    assert error_of(foreign.from_foreign, dict(state_dict=weights), 'x.pt', 2) == (
        'x.pt: transformer.wpe.weight is there twice, with and without a prefix: keep one')


# -----------------------------------------------------------------------------
# whole files, through checkpoint.load()


def test_numbers_of_numpy_in_a_file_are_read(tmp_path):
    """np.float64 was refused, and the file renamed to .corrupt."""
    path = tmp_path / 'ckpt.pt'
    torch.save(nanogpt(new_model(), best_val_loss=np.float64(1.5), config=dict(learning_rate=np.float32(0.5))), path)
    state = checkpoint.load(path)
    assert (state['best_val_loss'], type(state['best_val_loss'])) == (1.5, float)
    assert state['config'] == dict(learning_rate=0.5)


@pytest.mark.parametrize('value, name', [
    (Path('x'), r'pathlib\S*\.PosixPath'), (Namespace(x=1), r'argparse\.Namespace'),
    (np.arange(3), r'numpy\S*')])
def test_objects_in_a_file_are_refused_with_the_reason(tmp_path, value, name):
    torch.save(nanogpt(new_model(), config=dict(x=value)), tmp_path / 'ckpt.pt')
    message = error_of(checkpoint.load, tmp_path / 'ckpt.pt')
    assert re.search(rf'it asks for {name}, and only tensors and plain values are read', message), message
    with pytest.raises(ValueError, match='it asks for'):
        checkpoint.load_newest(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['ckpt.pt'], 'a sound file keeps its name'


def test_files_of_torch_before_1_6_are_refused_with_the_reason(tmp_path):
    torch.save(nanogpt(new_model()), tmp_path / 'ckpt.pt', _use_new_zipfile_serialization=False)
    message = error_of(checkpoint.load, tmp_path / 'ckpt.pt')
    assert 'is in the format of torch before 1.6' in message and 'save it anew with torch.save' in message
    with pytest.raises(ValueError, match='before 1.6'):
        checkpoint.load_newest(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['ckpt.pt'], 'a sound file keeps its name'


def test_a_file_whose_tuples_never_end_is_refused(tmp_path):
    torch.save(nanogpt(new_model(), config=[nested(60)]), tmp_path / 'ckpt.pt')
    assert 'tuples of more than 10,000 values' in error_of(checkpoint.load, tmp_path / 'ckpt.pt')


@pytest.mark.parametrize('scaling', [{}, dict(factor='8'), dict(factor=0.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)])
def test_a_rope_scaling_without_its_numbers_is_one_line(scaling):
    with pytest.raises(ValueError, match='^factor of rope_scaling = .*, accepted is a number above 0$'):
        foreign.check_model_args(dict(rope_scaling=scaling), 10)
