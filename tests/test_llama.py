"""arch='llama': folders of Llama, Mistral, Qwen2 and Qwen3 that transformers wrote, in, out and in training."""

import contextlib
import json

import pytest
import torch
from conftest import TINY, read_checkpoint, train_here

from model import GPT, GPTConfig

transformers = pytest.importorskip('transformers')
SCALING = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
KINDS = {  # class and settings of transformers
    'llama': ('Llama', dict(rope_parameters=dict(rope_theta=5e5, **SCALING), rms_norm_eps=1e-5)),
    'smollm2': ('Llama', dict(num_attention_heads=9, num_key_value_heads=3, hidden_size=54, tie_word_embeddings=True)),
    'tinyllama': ('Llama', dict(num_key_value_heads=2, tie_word_embeddings=False)),
    'mistral': ('Mistral', dict(sliding_window=None, rope_parameters=dict(rope_type='default', rope_theta=1e6))),
    'qwen2': ('Qwen2', dict(tie_word_embeddings=True)),
    'qwen3': ('Qwen3', dict(head_dim=18, tie_word_embeddings=True)),
}
SHAPE = dict(vocab_size=131, hidden_size=48, intermediate_size=104, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
             max_position_embeddings=80, initializer_range=0.2, bos_token_id=None, eos_token_id=None)


def make(kind, **changes):
    """transformers' model of random weights, none of them at their start of 0 or 1."""
    name, settings = KINDS[kind]
    torch.manual_seed(0)
    theirs = getattr(transformers, f'{name}ForCausalLM')(getattr(transformers, f'{name}Config')(**{**SHAPE, **settings, **changes})).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() == 1:
                p.normal_(1.0, 0.3)
    return theirs


@pytest.fixture(params=KINDS)
def pair(request, tmp_path):
    """transformers' model and ours with its weights."""
    theirs = make(request.param)
    theirs.save_pretrained(tmp_path / 'theirs')
    return theirs, GPT.from_pretrained(tmp_path / 'theirs').eval()


def test_logits_loss_gradients_and_greedy_text(pair):
    theirs, ours = pair
    idx = torch.randint(131, (3, 61))
    expected = theirs(idx, labels=idx)
    logits, loss = ours(idx, torch.cat((idx[:, 1:], torch.full((3, 1), -100)), dim=1))
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)
    expected.loss.backward()
    loss.backward()
    from weights.architectures import architecture_of
    grads = architecture_of(ours.config).parts({name: p.grad for name, p in ours.named_parameters()}, ours.config)
    assert grads.keys() == dict(theirs.named_parameters()).keys()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, atol=1e-5, rtol=1e-4)
    text = theirs.generate(idx[:1, :7], max_new_tokens=64, do_sample=False)
    assert torch.equal(ours.generate(idx[:1, :7], 64, temperature=0), text)


def test_left_padding(pair):
    theirs, ours = pair
    idx = torch.randint(1, 131, (1, 20))
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.int64), idx), dim=1)
    documents = torch.ones_like(padded)
    documents[:, :5] = 0
    expected = theirs(idx).logits[:, -1]
    torch.testing.assert_close(ours(padded, documents=documents)[0][:, -1], expected, atol=1e-4, rtol=0)


def test_weights_come_back_bit_for_bit(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / 'ours')
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours')
    assert type(back).__name__ in (type(theirs).__name__, 'LlamaForCausalLM')  # Mistral without a window is a Llama
    for (name, p), (other, q) in zip(sorted(theirs.named_parameters()), sorted(back.named_parameters()), strict=True):
        assert name == other and torch.equal(p, q), name
    idx = torch.randint(131, (2, 30))
    torch.testing.assert_close(back.eval()(idx).logits, theirs(idx).logits, atol=0, rtol=0)


def test_heads_that_do_not_divide_the_width_come_back(tmp_path):
    """LlamaConfig refuses them, so the export of a Mistral could not be read."""
    theirs = make('mistral', hidden_size=16, num_attention_heads=3, num_key_value_heads=1, head_dim=6)
    theirs.save_pretrained(tmp_path / 'theirs')
    GPT.from_pretrained(tmp_path / 'theirs').save_pretrained(tmp_path / 'ours')
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours').eval()
    idx = torch.randint(131, (2, 30))
    torch.testing.assert_close(back(idx).logits, theirs(idx).logits, atol=0, rtol=0)


def test_shards_and_bfloat16(tmp_path):
    theirs = make('qwen2').bfloat16()
    theirs.save_pretrained(tmp_path, max_shard_size='30KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 2
    ours = GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(ours.transformer.wte.weight, theirs.model.embed_tokens.weight)


@pytest.mark.parametrize('kind, changes, text', [
    ('mistral', dict(sliding_window=16), 'sliding_window = 16 is below max_position_embeddings = '),
    ('qwen3', dict(quantization_config=dict(quant_method='fp8')), "quantization_config = {'quant_method': 'fp8'} is not supported, accepted is None"),
    ('qwen3', dict(use_sliding_window=True, sliding_window=16), 'use_sliding_window = True is not supported, accepted is False'),
    ('llama', dict(attention_bias=True), 'attention_bias = True is not supported, accepted is False'),
    ('llama', dict(hidden_act='tanh'), "hidden_act = 'tanh' is not supported"),
    ('llama', dict(rope_parameters='x'), "unsupported operand type"),
    ('llama', dict(rope_parameters=dict(rope_type='llama3', rope_theta=1e4)), "factor of rope_scaling = None, accepted is a number above 0"),
    ('llama', dict(rope_parameters=dict(rope_type='default', rope_theta=0.0)), 'rope_theta = 0.0, accepted is a number above 0'),
    ('llama', dict(rope_parameters=dict(rope_type='yarn', rope_theta=1e4, factor=2.0)), "rope_type = 'yarn' is not supported, accepted is 'default' or 'llama3'"),
])
def test_what_model_py_cannot_be_is_one_line(kind, changes, text, tmp_path):
    make(kind).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(settings | changes))
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(tmp_path)
    assert text in str(error.value)


@pytest.mark.parametrize('window, accepted', [(None, True), (4096, True), ('absent', False)])
def test_mistral_without_an_effective_window(window, accepted, tmp_path):
    make('mistral').save_pretrained(tmp_path)
    settings = json.loads((tmp_path / 'config.json').read_text()) | dict(sliding_window=window, max_position_embeddings=4096)
    if window == 'absent':  # transformers takes 4096 then
        settings = {name: value for name, value in settings.items() if name != 'sliding_window'} | dict(max_position_embeddings=4097)
    (tmp_path / 'config.json').write_text(json.dumps(settings))
    with contextlib.nullcontext() if accepted else pytest.raises(ValueError, match='sliding_window = 4096 is below'):
        GPT.from_pretrained(tmp_path)


def test_swish_is_silu(tmp_path):
    make('qwen2').save_pretrained(tmp_path)
    settings = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(settings | dict(hidden_act='swish')))
    assert GPT.from_pretrained(tmp_path).config.activation == 'silu'


def test_the_config_of_transformers_4(tmp_path):
    """rope_theta and rope_scaling beside each other, and no head_dim."""
    make('llama').save_pretrained(tmp_path)
    expected = GPT.from_pretrained(tmp_path).config
    settings = json.loads((tmp_path / 'config.json').read_text())
    rope = settings.pop('rope_parameters')
    settings |= dict(rope_theta=rope.pop('rope_theta'), rope_scaling=rope, head_dim=None)
    (tmp_path / 'config.json').write_text(json.dumps(settings))
    assert GPT.from_pretrained(tmp_path).config == expected


@pytest.mark.parametrize('key', ['type', 'rope_type'])
def test_rope_scaling_beside_rope_parameters_counts_as_in_transformers(tmp_path, key):
    make('llama').save_pretrained(tmp_path)
    settings = json.loads((tmp_path / 'config.json').read_text()) | dict(rope_theta=5e5, rope_parameters=dict(rope_type='default', rope_theta=1e4))
    scaling = dict(SCALING)
    scaling[key] = scaling.pop('rope_type')
    (tmp_path / 'config.json').write_text(json.dumps(settings | dict(rope_scaling=scaling)))
    theirs, ours = transformers.LlamaForCausalLM.from_pretrained(tmp_path), GPT.from_pretrained(tmp_path)
    assert ours.config.rope_theta == 5e5 and ours.config.rope_scaling == {name: value for name, value in SCALING.items() if name != 'rope_type'}
    idx = torch.randint(131, (1, 61))
    torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_training_from_scratch_resumes_exactly(tiny, tmp_path, optimizer):
    flags = [*TINY, f'--dataset={tiny}', '--arch=llama', '--n_head=4', '--n_kv_head=2', '--n_embd=16', f'--optimizer={optimizer}', '--qk_norm=True']
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    for out_dir, more in ((whole, ['--max_iters=6']), (parts, ['--max_iters=3']), (parts, ['--max_iters=6', '--init_from=resume'])):
        code, _, stderr, _ = train_here(*flags, '--lr_decay_iters=6', *more, out_dir=out_dir)
        assert code == 0, stderr
    a, b = (read_checkpoint(path / 'ckpt.pt') for path in (whole, parts))
    assert all(torch.equal(a['model'][name], b['model'][name]) for name in a['model'])
    assert a['model_args']['n_kv_head'] == 2 and a['model_args']['n_hidden'] == 64


def test_tuning_a_folder_keeps_its_shape(tiny, tmp_path):
    make('qwen3').save_pretrained(tmp_path / 'theirs')
    flags = [flag for flag in TINY if not flag.startswith('--n_')]
    code, _, stderr, _ = train_here(*flags, f'--dataset={tiny}', f'--init_from={tmp_path / "theirs"}', '--max_iters=1', out_dir=tmp_path / 'out')
    assert code == 0, stderr
    args = read_checkpoint(tmp_path / 'out' / 'ckpt.pt')['model_args']
    assert (args['head_size'], args['qk_norm'], args['tied'], args['block_size']) == (18, True, True, 16)


def test_muon_orthogonalizes_each_group_of_heads_by_itself():
    from optim import OptimizerSettings, configure_optimizers
    model = GPT(GPTConfig(arch='llama', n_layer=1, n_head=4, n_kv_head=2, n_embd=16, block_size=8, vocab_size=10))
    groups = [group for optimizer in configure_optimizers(model, OptimizerSettings('muon')) for group in optimizer.param_groups]
    n_matrices = {tuple(p.shape): group['n_matrices'] for group in groups if 'n_matrices' in group for p in group['params']}
    assert n_matrices == {(32, 16): 4, (16, 16): 1, (128, 16): 2, (16, 64): 1}  # q, q, k, v; output; gate, value; output
