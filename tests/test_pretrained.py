"""pretrained.py against transformers: what it writes is loaded here, what is written here is loaded by it, bit for bit and token for token."""

import http.server
import json
import os
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, pack_chars, read_metrics, sentences, train_here, train_settings

import checkpoint
from configurator import config_of
from model import GPT, GPTConfig
from tokens.tokenizer import GPT2_META, CharTokenizer, GPT2Tokenizer, load_tokenizer, read_tokenizer_json
from training.checks import check_unused
from weights import foreign, formats, pretrained
from weights.begin import begin, find_start

transformers = pytest.importorskip('transformers')
transformers.logging.disable_progress_bar()

CHARS = '\n !\',-.:;?ABCabcdefghijklmnopqrstuvwxyz\t\r"\\<|>_€你\u0301\U0001f600'
TEXTS = ('a cab.', '\nBad  idea ,\n\n', '<|endoftext|>', ' 你€ \U0001f600e\u0301\r\n\t "x" \\')
ODD = dict(vocab_size=83, n_layer=3, n_head=3, n_embd=42)


def theirs(folder, arch, **changes):
    """A model of transformers with random weights of odd shapes, saved by it."""
    torch.manual_seed(0)
    if arch == 'gpt2':
        config = transformers.GPT2Config(**ODD, n_positions=101, bos_token_id=None, eos_token_id=None, **changes)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.NanoChatConfig(vocab_size=83, hidden_size=42, intermediate_size=168, num_hidden_layers=3, num_attention_heads=3,
                                             max_position_embeddings=101, bos_token_id=None, eos_token_id=None, pad_token_id=None, **changes)
        model = transformers.NanoChatForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    model.save_pretrained(folder)
    return model.eval()


def ours(**changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**ODD, 'block_size': 101, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def read_by_transformers(folder):
    return (transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder))


def assert_same(model, other):
    a, b = model.state_dict(), other.state_dict()
    assert model.config == other.config and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def read_whole(folder):
    return {name: tensor[:].clone() for name, tensor in formats.read_folder(folder).items()}


def assert_parity(model, reference, n_tokens=83):
    """Logits, loss and 64 greedy tokens from three prompts."""
    torch.manual_seed(1)
    idx = torch.randint(n_tokens, (3, 37))
    with torch.no_grad():
        logits, loss = model(idx, torch.cat((idx[:, 1:], torch.full((3, 1), -100)), dim=1))
        expected = reference(idx, labels=idx)
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)
    for prompt in (idx[:1, :1], idx[1:2, :7], idx[2:, :36]):
        mask = torch.ones_like(prompt)  # else generate() takes what looks like padding for padding
        greedy = reference.generate(prompt, attention_mask=mask, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(model.generate(prompt, 64, temperature=0, vocab_size=n_tokens), greedy)


# -----------------------------------------------------------------------------
# in


@pytest.mark.parametrize('arch, changes, activation', [
    ('gpt2', {}, 'gelu_tanh'), ('gpt2', dict(activation_function='gelu'), 'gelu'), ('gpt2', dict(n_inner=168), 'gelu_tanh'),
    ('modern', {}, 'relu2'), ('modern', dict(hidden_act='gelu'), 'gelu')])
def test_models_of_transformers_compute_the_same_here(tmp_path, arch, changes, activation):
    reference = theirs(tmp_path, arch, **changes)
    model = GPT.from_pretrained(tmp_path).eval()
    assert model.config == GPTConfig(block_size=101, **ODD, arch=arch, activation=activation)
    assert_parity(model, reference)


@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_shards_names_without_prefix_and_old_buffers(tmp_path, arch):
    reference = theirs(tmp_path / 'whole', arch)
    reference.save_pretrained(tmp_path / 'shards', max_shard_size='60KB')
    assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 3 and not (tmp_path / 'shards/model.safetensors').exists()
    bare = tmp_path / 'bare'
    (reference.transformer if arch == 'gpt2' else reference.model).save_pretrained(bare)
    tensors = read_whole(bare)
    if arch == 'gpt2':
        tensors |= {'h.0.attn.bias': torch.ones(1, 1, 101, 101), 'h.0.attn.masked_bias': torch.tensor([-1e4])}
    else:
        tensors |= {'lm_head.weight': reference.lm_head.weight.detach()}
    with open(bare / 'model.safetensors', 'wb') as f:
        formats.write_safetensors(f, tensors)
    whole = GPT.from_pretrained(tmp_path / 'whole')
    assert_same(whole, GPT.from_pretrained(tmp_path / 'shards'))
    assert_same(whole, GPT.from_pretrained(bare))


@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_fewer_positions_dropout_and_dtype(tmp_path, arch):
    theirs(tmp_path, arch)
    full, short = GPT.from_pretrained(tmp_path), GPT.from_pretrained(tmp_path, dropout=0.1, block_size=9, dtype=torch.bfloat16)
    assert short.config == GPTConfig(block_size=9, **ODD, arch=arch, dropout=0.1)
    for name, p in short.named_parameters():
        expected = dict(full.named_parameters())[name]
        assert p.dtype == torch.bfloat16 and p.requires_grad and torch.equal(p, expected[:p.size(0)].to(torch.bfloat16))
    logits = short.eval()(torch.arange(9)[None])[0]
    torch.testing.assert_close(logits, full.to(torch.bfloat16).eval()(torch.arange(9)[None])[0])
    with pytest.raises(ValueError, match='^block_size=102: the model has positions for 101 tokens: use 101 or less$'):
        GPT.from_pretrained(tmp_path, block_size=102)


def test_tied_weights_stay_one_and_train(tmp_path):
    theirs(tmp_path, 'gpt2')
    model = GPT.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.transformer.wte.weight
    model(torch.arange(9)[None], torch.arange(9)[None])[1].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


MEASURE = """
import sys, torch
def read(key):
    return int(next(line for line in open('/proc/self/status') if line.startswith(key)).split()[1]) * 1024
from model import GPT
GPT.from_pretrained(sys.argv[1], dtype=torch.bfloat16)  # what torch loads at its first use is no part of a model
open('/proc/self/clear_refs', 'w').write('5')  # the peak begins anew
before = read('VmRSS')
model = GPT.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
print((read('VmHWM') - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='the peak of the resident set is read from /proc')
def test_loading_takes_little_more_memory_than_the_model(tmp_path):
    # 50M parameters: 202 MB of float32 in the file, 101 MB of bfloat16 in memory
    ours(n_embd=512, n_head=8, n_layer=16, vocab_size=64).save_pretrained(tmp_path / 'large')
    ours().save_pretrained(tmp_path / 'small')
    done = subprocess.run([sys.executable, '-c', MEASURE, tmp_path / 'small', tmp_path / 'large'], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.3


# -----------------------------------------------------------------------------
# out


@pytest.mark.parametrize('changes', [
    dict(arch='gpt2'), dict(arch='gpt2', bias=False, activation='gelu'), dict(arch='gpt2', vocab_size=64), dict(arch='modern'),
    dict(arch='modern', vocab_size=64)], ids=str)
def test_transformers_loads_what_is_exported(tmp_path, changes):
    tokenizer = CharTokenizer(CHARS)
    V = tokenizer.vocab_size
    model = ours(**{'vocab_size': V, **changes})  # 64: some ids are padding, which must not be drawn
    paths = model.save_pretrained(tmp_path, tokenizer)
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in paths), 'nothing temporary stays'
    reference, their_tokenizer = read_by_transformers(tmp_path)
    assert type(reference).__name__ == {'gpt2': 'GPT2LMHeadModel', 'modern': 'NanoChatForCausalLM'}[changes['arch']]
    assert reference.dtype == torch.float32 and len(their_tokenizer) == V
    assert_parity(model, reference, n_tokens=V)
    for text in TEXTS:
        ids = their_tokenizer(text)['input_ids']
        assert ids == tokenizer.encode(text) and their_tokenizer.decode(ids) == text == tokenizer.decode(ids)
    assert read_tokenizer_json(tmp_path) == tokenizer.meta()
    with pytest.raises(Exception, match='Missing'):
        their_tokenizer('Z')
    assert_same(model, GPT.from_pretrained(tmp_path))


def test_a_model_that_transformers_trained_on_comes_back(tmp_path):
    """A GPT-2 without biases is exported with zeros for them; once they are trained they are there to stay."""
    ours(bias=False).save_pretrained(tmp_path / 'a')
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'a')
    reference.save_pretrained(tmp_path / 'b')
    assert GPT.from_pretrained(tmp_path / 'b').config.bias is False
    with torch.no_grad():
        reference.transformer.ln_f.bias += 1
    reference.save_pretrained(tmp_path / 'c')
    model = GPT.from_pretrained(tmp_path / 'c').eval()
    assert model.config.bias is True
    assert_parity(model, reference.eval())


@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_bfloat16_and_npz_round_trips(tmp_path, arch):
    model, tokenizer = ours(arch=arch, vocab_size=64), CharTokenizer(CHARS)
    assert model.save_pretrained(tmp_path / 'x.npz', tokenizer) == [tmp_path / 'x.npz']
    assert_same(model, GPT.from_pretrained(tmp_path / 'x.npz'))
    assert pretrained.read_tokenizer(str(tmp_path / 'x.npz')) == tokenizer.meta()
    with np.load(tmp_path / 'x.npz', allow_pickle=False) as arrays:
        assert set(arrays.files) == {'settings', *dict(model.named_parameters())}
        assert np.array_equal(arrays['transformer.h.1.mlp.c_fc.weight'], model.transformer.h[1].mlp.c_fc.weight.detach().numpy())
    model.to(torch.bfloat16)
    for name in ('folder', 'y.npz'):
        model.save_pretrained(tmp_path / name)
        back = GPT.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters()))
    assert read_by_transformers_dtype(tmp_path / 'folder') == torch.bfloat16


def read_by_transformers_dtype(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).dtype


@pytest.fixture(scope='module')
def gpt2_tokenizer():
    merges = ROOT.parent / 'shared/data/gpt2_bpe/vocab.bpe'
    if not merges.exists():
        pytest.skip(f'{merges} is absent')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('FLATGPT_CACHE', str(merges.parent))
        yield GPT2Tokenizer()


@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_gpt2_tokenizer_is_exported(tmp_path, arch, gpt2_tokenizer):
    text = "Hello  world, it's\n\n\tnaïve 你好 \U0001f600 12345 <|endoftext|>" + sentences(2000, 1)
    ours(arch=arch, vocab_size=50304, n_layer=1, n_head=1, n_embd=2).save_pretrained(tmp_path, gpt2_tokenizer)
    reference, their_tokenizer = read_by_transformers(tmp_path)
    ids = their_tokenizer(text)['input_ids']
    assert ids == gpt2_tokenizer.encode(text, allowed_special={'<|endoftext|>'}) and their_tokenizer.decode(ids) == text
    assert their_tokenizer.eos_token_id == reference.config.eos_token_id == reference.generation_config.eos_token_id == 50256
    assert reference.config.vocab_size == 50257 and reference.generation_config.suppress_tokens is None
    assert their_tokenizer.pad_token_id == their_tokenizer.unk_token_id == 50256
    assert read_tokenizer_json(tmp_path) == GPT2_META
    their_tokenizer.save_pretrained(tmp_path / 'again')
    assert read_tokenizer_json(tmp_path / 'again') == GPT2_META
    (tmp_path / 'merges').mkdir()
    (tmp_path / 'merges/merges.txt').write_bytes((ROOT.parent / 'shared/data/gpt2_bpe/vocab.bpe').read_bytes())
    assert read_tokenizer_json(tmp_path / 'merges') == GPT2_META
    content = json.loads((tmp_path / 'tokenizer.json').read_text(encoding='utf-8'))
    content['model']['merges'][7], content['model']['merges'][8] = content['model']['merges'][8], content['model']['merges'][7]
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content), encoding='utf-8')
    assert read_tokenizer_json(tmp_path)['kind'] == 'json'  # any other tokenizer is kept whole


# -----------------------------------------------------------------------------
# bad input


def error_of(call, *arguments, **named):
    with pytest.raises((ValueError, OSError)) as error:
        call(*arguments, **named)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('arch, wrong, text', [
    ('gpt2', dict(model_type='bert'), "model_type = 'bert' is not supported, accepted are gpt2 (GPT2LMHeadModel), nanochat (NanoChatForCausalLM), llama (LlamaForCausalLM), mistral (MistralForCausalLM), qwen2 (Qwen2ForCausalLM), qwen3 (Qwen3ForCausalLM)"),
    ('gpt2', dict(model_type=None), 'model_type = None is not supported, accepted are gpt2 (GPT2LMHeadModel), nanochat (NanoChatForCausalLM), llama (LlamaForCausalLM), mistral (MistralForCausalLM), qwen2 (Qwen2ForCausalLM), qwen3 (Qwen3ForCausalLM)'),
    ('gpt2', dict(activation_function='tanh'), "activation_function = 'tanh' is not supported, accepted is 'gelu_new' or 'gelu' or 'relu2' or 'gelu_pytorch_tanh' or 'silu' or 'swish'"),
    ('gpt2', dict(n_inner=100), 'n_inner=100: accepted with arch=gpt2 is 168'),
    ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx = True is not supported, accepted is False'),
    ('gpt2', dict(tie_word_embeddings=False), 'tie_word_embeddings=False: accepted with arch=gpt2 is True'),
    ('gpt2', dict(layer_norm_epsilon=1e-6), 'layer_norm_epsilon=1e-06: accepted with arch=gpt2 is 1e-05'),
    ('gpt2', dict(n_layer='3'), "n_layer = '3' is none that this version knows"),
    ('modern', dict(num_key_value_heads=1), 'num_key_value_heads=1: accepted with arch=modern is 3'),
    ('modern', dict(intermediate_size=42), 'intermediate_size=42: accepted with arch=modern is 168'),
    ('modern', dict(rope_parameters=dict(rope_theta=5e5, rope_type='default')),
     'rope_theta=500000.0: accepted with arch=modern is 10000.0'),
    ('modern', dict(rope_parameters=None, rope_theta=1e5), 'rope_theta=100000.0: accepted with arch=modern is 10000.0'),
    ('modern', dict(final_logit_softcapping=None), 'final_logit_softcapping = None is not supported, accepted is 15.0'),
    ('modern', dict(tie_word_embeddings=True), 'tie_word_embeddings=True: accepted with arch=modern is False'),
    ('modern', dict(attention_bias=True), 'attention_bias = True is not supported, accepted is False'),
    ('modern', dict(rms_norm_eps=1e-5), 'rms_norm_eps=1e-05: accepted with arch=modern is 1e-06'),
])
def test_configurations_that_model_py_cannot_be(tmp_path, arch, wrong, text):
    ours(arch=arch).save_pretrained(tmp_path)
    path = tmp_path / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text(encoding='utf-8')), **wrong}), encoding='utf-8')
    assert error_of(GPT.from_pretrained, tmp_path) == f'{path}: {text}'


def test_folders_that_lack_something(tmp_path):
    folder = tmp_path / 'x'
    assert error_of(GPT.from_pretrained, 'gpt3') == (
        'init_from=gpt3: no such model, accepted are scratch, resume, checkpoint, gpt2, gpt2-medium, gpt2-large, gpt2-xl, ORGANIZATION/NAME[@REVISION] on the hub, a folder with config.json and model.safetensors, '
        'or an .npz file that save_pretrained wrote')
    folder.mkdir()
    assert error_of(GPT.from_pretrained, folder).startswith(f'init_from={folder}: a folder without config.json, accepted are ')
    (folder / 'ckpt.pt').touch()
    assert error_of(GPT.from_pretrained, folder).startswith(f'init_from={folder}: a folder of a run, name {folder / "ckpt.pt"}, accepted are ')
    ours().save_pretrained(folder)
    (folder / 'model.safetensors').unlink()
    assert error_of(GPT.from_pretrained, folder) == (
        f"{folder} has neither model.safetensors nor model.safetensors.index.json: save it with transformers' save_pretrained")
    index = folder / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': {'a': 'a.safetensors'}}))
    assert error_of(GPT.from_pretrained, folder) == f'No such file or directory: {folder / "a.safetensors"}'
    index.write_text(json.dumps({'weight_map': {'a': '../b.safetensors'}}))  # files of this folder alone
    assert error_of(GPT.from_pretrained, folder) == f'No such file or directory: {folder / "b.safetensors"}'
    for content in ([], {}, {'weight_map': 3}, {'weight_map': {'a': 3}}):
        index.write_text(json.dumps(content))
        assert error_of(GPT.from_pretrained, folder).startswith(f'{index} has no weight_map of names to .safetensors files: ')
    (folder / 'config.json').write_text('{')
    assert error_of(GPT.from_pretrained, folder).startswith(f'{folder / "config.json"}: not JSON in UTF-8 (')
    (folder / 'config.json').write_text('[]')
    assert error_of(GPT.from_pretrained, folder)== f'{folder / "config.json"} holds no settings: accepted is a JSON object'


def test_weights_that_do_not_fit_the_configuration(tmp_path):
    ours().save_pretrained(tmp_path)
    config, path = tmp_path / 'config.json', tmp_path / 'model.safetensors'
    stored, tensors = json.loads(config.read_text(encoding='utf-8')), read_whole(tmp_path)
    config.write_text(json.dumps({**stored, 'vocab_size': 84}), encoding='utf-8')
    assert error_of(GPT.from_pretrained, tmp_path) == f'{tmp_path}: transformer.wte.weight has shape (83, 42), the model expects (84, 42)'
    config.write_text(json.dumps({**stored, 'n_layer': 4}), encoding='utf-8')
    assert error_of(GPT.from_pretrained, tmp_path) == (
        f'{tmp_path} does not fit the model: 12 weights missing (transformer.h.3.attn.c_attn.bias, transformer.h.3.attn.c_attn.weight, '
        'transformer.h.3.attn.c_proj.bias), 0 unexpected ()')
    config.write_text(json.dumps(stored), encoding='utf-8')
    for changed, text in ((tensors | {'score.weight': torch.ones(2)}, 'does not fit the model: 0 weights missing (), 1 unexpected (score.weight)'),
                          (tensors | {'transformer.h.0.attn.c_attn.weight': tensors['transformer.h.0.attn.c_attn.weight'].t()},
                           'transformer.h.0.attn.c_attn.weight has shape (126, 42), the model expects (42, 126)')):
        with open(path, 'wb') as f:
            formats.write_safetensors(f, changed)
        assert text in error_of(GPT.from_pretrained, tmp_path)


def rewrite(folder, **changes):
    """Changes tensors in the model.safetensors of a folder."""
    tensors = read_whole(folder) | changes
    with open(folder / 'model.safetensors', 'wb') as f:
        formats.write_safetensors(f, tensors)


def test_a_head_that_is_not_the_embedding_is_refused(tmp_path):
    """It was replaced by the embedding, and all logits were wrong."""
    reference = theirs(tmp_path, 'gpt2')
    embedding = reference.transformer.wte.weight.detach().clone()
    rewrite(tmp_path, **{'lm_head.weight': embedding})
    assert_parity(GPT.from_pretrained(tmp_path).eval(), reference)
    embedding[-1, -1] += 1
    rewrite(tmp_path, **{'lm_head.weight': embedding})
    assert error_of(GPT.from_pretrained, tmp_path) == (
        f'{tmp_path}: lm_head.weight is not the embedding: its architecture has one matrix for both')
    rewrite(tmp_path, **{'lm_head.weight': embedding[:-1]})
    assert 'lm_head.weight is not the embedding' in error_of(GPT.from_pretrained, tmp_path)


def test_tensors_without_dimensions_are_no_weights(tmp_path):
    """A file with one was refused as no .safetensors file."""
    from safetensors.torch import load_file, save_file
    reference = theirs(tmp_path, 'gpt2')
    file = tmp_path / 'model.safetensors'
    save_file(load_file(file) | {'transformer.h.0.attn.masked_bias': torch.tensor(-1e4), 'step': torch.tensor(7),
                                 'transformer.h.1.attn.bias': torch.ones(1, 1, 4, 4, dtype=torch.bool)}, file)
    assert_parity(GPT.from_pretrained(tmp_path).eval(), reference)
    save_file(load_file(file) | {'transformer.wpe.weight': torch.ones(101, 42, dtype=torch.int64)}, file)
    assert error_of(GPT.from_pretrained, tmp_path) == f'{file}: transformer.wpe.weight is I64, accepted are F64, F32, F16, BF16'


@pytest.mark.parametrize('name', ['folder', 'x.npz'])
def test_more_layers_than_weights_are_refused_before_a_model_is_built(tmp_path, name):
    path = tmp_path / name
    ours().save_pretrained(path)
    if path.is_dir():
        file = path / 'config.json'
        file.write_text(json.dumps({**json.loads(file.read_text(encoding='utf-8')), 'n_layer': 10**9}), encoding='utf-8')
        assert error_of(GPT.from_pretrained, path) == f'{file}: n_layer = 1000000000 does not fit its 40 weights'
    else:
        np.savez(path, settings=np.array(json.dumps(dict(model_args={**vars(ours().config), 'n_layer': 10**9}, tokenizer=None))))
        assert 'n_layer = 1000000000 does not fit its 0 weights' in error_of(GPT.from_pretrained, path)


@pytest.mark.parametrize('file', ['vocab.txt', 'spiece.model', 'tokenizer.model', 'vocab.json'])
def test_a_tokenizer_in_a_format_that_is_not_read_is_refused(tmp_path, file):
    """GPT-2's took its place, and every id meant something else."""
    ours().save_pretrained(tmp_path)
    assert pretrained.read_tokenizer(tmp_path) is None
    (tmp_path / file).write_bytes(b'x')
    assert error_of(pretrained.read_tokenizer, str(tmp_path)) == (
        f"{tmp_path / file} is a tokenizer in a format that is not read: save it as tokenizer.json with transformers' "
        'AutoTokenizer, or name the tokenizer with --tokenizer')
    settings = config_of(train_settings()) | dict(init_from=str(tmp_path), tokenizer='byte')
    check_unused(settings, {'init_from', 'tokenizer'})
    assert begin(settings, {'init_from', 'tokenizer'}).tokenizer_meta == find_start(str(tmp_path), tokenizer='byte').tokenizer_meta == {'kind': 'byte'}


def test_an_export_has_what_other_programs_ask_for(tmp_path):
    """llama.cpp's converter stopped at n_ctx, CTranslate2 at a missing id."""
    tokenizer = CharTokenizer(CHARS)
    tokenizer.eot = tokenizer.bos = 3
    tokenizer.pad, tokenizer.special = 5, {'<|pad|>': 5}
    ours(vocab_size=tokenizer.vocab_size).save_pretrained(tmp_path, tokenizer)
    for file in ('config.json', 'generation_config.json'):
        stored = json.loads((tmp_path / file).read_text(encoding='utf-8'))
        assert (stored['bos_token_id'], stored['eos_token_id'], stored['pad_token_id']) == (3, 3, 5)
    assert json.loads((tmp_path / 'config.json').read_text(encoding='utf-8'))['n_ctx'] == 101


# -----------------------------------------------------------------------------
# the hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub as a model needs: gpt2 at its pinned commit, and org/name at COMMIT."""

    COMMIT, GPT2 = 'c' * 40, '/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e'

    def do_HEAD(self):
        if self.path.startswith(('/api/models/org/name/', '/api/models/openai-community/gpt2/')):
            paths = sorted(self.server.folder.iterdir())
            commit = self.COMMIT if '/org/name/' in self.path else self.GPT2.rpartition('/')[2]
            answer = {'id': 'a model', 'sha': commit, 'siblings': [{'rfilename': path.name} for path in paths]}
            if '/tree/' in self.path:
                answer = [{'type': 'file', 'path': path.name, 'size': path.stat().st_size, 'oid': path.name} for path in paths]
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            return body
        asked, name = self.path.replace(f'/org/name/resolve/{self.COMMIT}', self.GPT2).rsplit('/', 1)
        found = asked == self.GPT2 and (self.server.folder / name).is_file()
        body = (self.server.folder / name).read_bytes() if found else b''
        self.send_response(200 if found else 404)
        headers = {'X-Repo-Commit': self.path.split('/')[4], 'ETag': f'"{name}"'} if found else {'X-Error-Code': 'RevisionNotFound'}
        for key, value in {**headers, 'Content-Length': len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        return body

    def do_GET(self):
        self.wfile.write(self.do_HEAD())

    def log_message(self, *arguments):
        pass


def run_with_hub(code, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith('HF_') and not k.lower().endswith('_proxy')}
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, env={
        **clean, 'OMP_NUM_THREADS': '1', 'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_DISABLE_XET': '1',
        'HF_HUB_ETAG_TIMEOUT': '300', 'HF_HUB_DOWNLOAD_TIMEOUT': '300', **environment})
    return done.returncode, done.stdout, done.stderr


LOAD = """
from model import GPT
for name in ('gpt2', 'gpt2', 'org/name@main'):
    print(GPT.from_pretrained(name).transformer.wte.weight.double().sum().item())
"""
MISSING = """
try:
    GPT.from_pretrained('gpt2-xl')
except OSError as error:
    print(error)
"""


def test_models_come_from_the_hub_that_hf_endpoint_names_and_are_kept(tmp_path):
    """Each at a revision that is said once. The copy in the cache is enough; what is not there is one line that names the way without a network."""
    theirs(tmp_path / 'hub', 'gpt2')
    (tmp_path / 'hub' / 'pytorch_model.bin').write_bytes(b'x')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.folder = tmp_path / 'hub'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = dict(HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}', HF_HOME=str(tmp_path / 'home'))
    try:
        code, out, err = run_with_hub(LOAD, **environment)
    finally:
        server.shutdown()
        server.server_close()
    assert code == 0, err
    total = str(GPT.from_pretrained(tmp_path / 'hub').transformer.wte.weight.double().sum().item())
    revision = 'gpt2: revision ' + Hub.GPT2.rpartition('/')[2]
    assert out.splitlines() == [revision, total, total, f'org/name@main: revision {Hub.COMMIT}', total]
    assert not list(tmp_path.rglob('home/**/pytorch_model.bin'))
    code, again, err = run_with_hub(LOAD + MISSING, HF_HUB_OFFLINE='1', **environment)
    assert code == 0, err
    assert again.startswith(f'{out}gpt2-xl is no folder here, and cannot be downloaded from {environment["HF_ENDPOINT"]} (')
    assert again.endswith('): put config.json and model.safetensors of openai-community/gpt2-xl into a folder and use --init_from=FOLDER\n')
    assert again.count('\n') == 6


@pytest.mark.parametrize('bare', [False, True])
def test_a_state_dict_of_transformers_gpt2(tmp_path, bare):
    reference = theirs(tmp_path, 'gpt2')
    weights = (reference.transformer if bare else reference).state_dict()
    torch.save({'model_state_dict': nest(weights, 'module.')}, tmp_path / 'x.pt')
    state = checkpoint.load(tmp_path / 'x.pt', n_head=3)
    model = GPT(GPTConfig(**state['model_args'])).eval()
    foreign.load_weights(model, state['model'], tmp_path / 'x.pt')
    assert_parity(model, reference)


# -----------------------------------------------------------------------------
# train.py

def nest(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}

FEW = ('--batch_size=4', '--gradient_accumulation_steps=1', '--learning_rate=1e-3', '--warmup_iters=0', '--max_iters=3', '--eval_interval=3',
       '--eval_iters=2', '--device=cpu', '--dtype=float32')


@pytest.fixture(scope='module')
def folder(tmp_path_factory, tiny):
    """A model exported with the tokenizer of the tiny dataset."""
    folder, meta = tmp_path_factory.mktemp('exported') / 'x', json.loads((tiny / 'meta.json').read_text(encoding='utf-8'))
    ours(vocab_size=32, block_size=16).save_pretrained(folder, load_tokenizer(meta['tokenizer']))
    return folder


def test_training_goes_on_from_a_folder(tmp_path, tiny, folder):
    code, out, err, metrics = train_here(f'--init_from={folder}', f'--dataset={tiny}', '--block_size=8', '--dropout=0.1', *FEW, out_dir=tmp_path)
    assert code == 0, err
    state = checkpoint.load(tmp_path / 'ckpt.pt')
    assert state['model_args'] == vars(GPTConfig(**{**ODD, 'vocab_size': 32}, block_size=8, dropout=0.1))
    assert state['config']['n_layer'] == 3 and state['config']['bias'] is True
    code, out, err, metrics = train_here('--init_from=resume', '--max_iters=4', out_dir=tmp_path)
    assert code == 0 and [line['iter'] for line in metrics if 'val_loss' in line] == [0, 3, 4], err


def test_evaluation_is_of_the_weights_given(tmp_path, tiny, folder):
    code, out, err, _ = train_here(f'--init_from={folder}', f'--dataset={tiny}', '--eval_only=True', *FEW, out_dir=tmp_path / 'x')
    assert code == 0 and not (tmp_path / 'x').exists(), err
    from tokens.loader import Loader
    loader, model = Loader([tiny], 'val', block_size=16, batch_size=8, order='sequential'), GPT.from_pretrained(folder).eval()
    windows = np.arange(8) * loader.n_windows // 8
    with torch.no_grad():
        expected = model(*loader.windows(windows)[:2])[1].item()
    assert f'val loss {expected:.4f}' in out


@pytest.mark.parametrize('flags, text', [
    (['--init_from=resum'], 'init_from=resum: no such model, accepted are scratch, resume, checkpoint, gpt2, gpt2-medium, gpt2-large, gpt2-xl, ORGANIZATION/NAME[@REVISION] on the hub, a folder with '
                            'config.json and model.safetensors, or an .npz file that save_pretrained wrote'),
    (['--init_from={folder}', '--n_layer=6'], 'n_layer=6: {folder} has n_layer=3: give --n_layer=3'),
    (['--init_from={folder}', '--block_size=17'], 'block_size=17: {folder} has block_size=16: give --block_size=16 or less'),
    (['--init_from=checkpoint'], 'init_from=checkpoint, checkpoint_path=: name one file to begin with, by --init_from=FILE.pt or by '
                                 '--init_from=checkpoint --checkpoint_path=FILE'),
])
def test_settings_that_the_weights_contradict(tmp_path, tiny, folder, flags, text):
    code, out, err, _ = train_here(*[flag.format(folder=folder) for flag in flags], f'--dataset={tiny}', *FEW, out_dir=tmp_path / 'x')
    assert (code, err) == (2, text.format(folder=folder) + '\n') and not (tmp_path / 'x').exists()


def test_the_dataset_must_be_in_the_tokens_of_the_weights(tmp_path, folder):
    other = pack_chars(tmp_path / 'other', sentences(400, 1), sentences(100, 2), chars='\n .abcdefghijklmnopqrstuvwxyz')
    code, out, err, _ = train_here(f'--init_from={folder}', f'--dataset={other}', *FEW, out_dir=tmp_path / 'x')
    assert code == 2 and err.startswith(f'{folder} was trained with tokenizer ') and err.count('\n') == 1
    assert err.endswith(': use the dataset it was trained on, or pack with its tokenizer\n')


def test_training_begins_with_the_weights_of_a_foreign_checkpoint(tmp_path, tiny):
    weights = ours(block_size=16).state_dict()
    del weights['transformer.h.2.mlp.c_fc.bias']
    torch.save({'model_state_dict': nest(weights, 'module.')}, tmp_path / 'x.pt')
    flags = '--init_from=checkpoint', f'--checkpoint_path={tmp_path / "x.pt"}', f'--dataset={tiny}', *FEW
    code, out, err, _ = train_here(*flags, '--n_head=3', out_dir=tmp_path / 'out')
    assert code == 2 and err.startswith(f'{tmp_path / "x.pt"} does not fit the model: 1 weights missing (transformer.h.2.mlp.c_fc.bias), 0 unexpected ()')
    code, out, err, metrics = train_here(*flags, '--n_head=3', '--strict=False', '--block_size=8', out_dir=tmp_path / 'out')
    assert code == 0 and '1 weights missing, left as a new model has them: transformer.h.2.mlp.c_fc.bias\n' in out, err
    assert 'does not say its tokenizer: taking that of' in out
    assert read_metrics(tmp_path / 'out') and checkpoint.load(tmp_path / 'out/ckpt.pt')['model_args']['block_size'] == 8
    # its own best.pt, weights without an optimizer, begins a new run too
    code, out, err, _ = train_here('--init_from=checkpoint', f'--checkpoint_path={tmp_path / "out/best.pt"}', f'--dataset={tiny}', *FEW, out_dir=tmp_path / 'b')
    assert code == 0 and 'iter 0: ' in out, err


# -----------------------------------------------------------------------------
# configurations


@pytest.mark.parametrize('path', sorted(Path(ROOT, 'config').glob('*.py')), ids=lambda path: path.stem)
def test_every_recipe_is_understood(path, tiny, capsys, monkeypatch):
    import configurator
    from distributed import divide_batch
    settings, configure = {}, configurator.configure

    def stop(script):
        settings.update(script)
        raise SystemExit
    monkeypatch.setattr(configurator, 'configure', stop)  # train.py is a straight script: stop where its settings are known
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / 'train.py'))
    configure(settings, [str(path)] + [f'--dataset={tiny}'] * (path.stem == 'depth'))  # whose vocabulary it asks for
    many = (1, 2, 5, 10) if path.stem in ('finetune_dolly', 'finetune_small') else (1, 2, 4, 8)  # of 10 rows a step
    for ranks in many if settings['gradient_accumulation_steps'] > 1 else [1]:
        divide_batch(settings['gradient_accumulation_steps'], settings['batch_size'], ranks)
    GPTConfig(**{name: settings[name] for name in ('arch', 'block_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')})
    assert settings['init_from'] in ('scratch', 'out-chinese/ckpt.pt', 'Qwen3-0.6B', *pretrained.HUB)
    tokens = settings['gradient_accumulation_steps'] * settings['batch_size'] * settings['block_size']
    expected = dict(train_gpt2=491_520, train_gpt2_modern=524_288, finetune_shakespeare=32_768)
    assert tokens == expected.get(path.stem, tokens)
