"""GGUF files: read back by the gguf package, and run by llama.cpp where llama-cpp-python is installed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, run_here, sentences, train_here

from corpus.pack import write_dataset
from corpus.template import Template
from corpus.train_tokenizer import train_bpe
from model import GPT, GPTConfig
from tokens.tokenizer import CharTokenizer, GPT2Tokenizer, load_tokenizer
from tokens.tokenizer_json import BPE_PATTERN, GPT2_PATTERN, bpe_json, byte_level, read_tokenizer_json
from weights.gguf import LLAMA3_PATTERN, QWEN2_PATTERN, SMOLLM

gguf = pytest.importorskip('gguf')
MERGES = Path(__file__).resolve().parents[2] / 'shared/data/gpt2_bpe/vocab.bpe'
CHINESE = '天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。寒来暑往，秋收冬藏。\n'
SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
KINDS = {
    'gpt2': dict(),
    'gpt2-without-bias': dict(bias=False),
    'llama': dict(arch='llama', n_kv_head=2, rope_theta=5e5, rope_scaling=SCALING),
    'llama-tied': dict(arch='llama', tied=True, head_size=24),
    'qwen2': dict(arch='llama', n_kv_head=1, qkv_bias=True, tied=True),
    'qwen3': dict(arch='llama', n_kv_head=2, qk_norm=True, head_size=16),
}
NAMES = {  # ours: llama.cpp's
    'transformer.wte.weight': 'token_embd.weight', 'transformer.wpe.weight': 'position_embd.weight', 'transformer.ln_f': 'output_norm',
    'lm_head.weight': 'output.weight', 'ln_1': 'attn_norm', 'ln_2': 'ffn_norm', 'attn.c_proj': 'attn_output',
    'attn.q_norm': 'attn_q_norm', 'attn.k_norm': 'attn_k_norm', 'mlp.c_proj': 'ffn_down',
}


def make(kind='gpt2', **changes):
    """A model none of whose weights are at their start of 0 or 1."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(block_size=64, vocab_size=640, n_layer=2, n_head=4, n_embd=64) | KINDS[kind] | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.normal_(1.0, 0.3)
            else:
                p.normal_(0.0, 0.2)
    return model


@pytest.fixture(scope='session')
def bpe():
    return train_bpe([sentences(6000, 1) + CHINESE * 20], 360)


@pytest.fixture(scope='session')
def gpt2():
    if not MERGES.exists():
        pytest.skip(f'{MERGES} is absent')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('FLATGPT_CACHE', str(MERGES.parent))
        return GPT2Tokenizer()


def read(path):
    """(values by key, tensors by name as float32, types by name) by gguf's own reader."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    for t in reader.tensors:
        assert list(tensors[t.name].shape) == list(reversed(t.shape.tolist())), t.name
    return {key: field.contents() for key, field in reader.fields.items()}, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


def neighbors_to_halves(tensor, n_heads):
    """Undo the order of rows in which llama.cpp rotates neighbors."""
    return tensor.view(n_heads, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def ours_from(tensors, config):
    """Put what a file holds back under our names."""
    H, G, back = config.n_head, config.n_kv_head, {}
    is_llama = config.arch == 'llama' and not config.qk_norm and not config.qkv_bias
    for ours, theirs in NAMES.items():
        for name, tensor in tensors.items():
            block, _, part = name.removeprefix('blk.').partition('.')
            if ours.startswith(('transformer', 'lm_head')):
                block, part, prefix = '', name, ''
            else:
                prefix = f'transformer.h.{block}.'
            if part == theirs or part.rpartition('.')[0] == theirs:
                back[prefix + ours + part.removeprefix(theirs)] = tensor
    for i in range(config.n_layer):
        for kind in ('weight', 'bias'):
            here = {name.removeprefix(f'blk.{i}.').removesuffix(f'.{kind}'): tensor for name, tensor in tensors.items()
                    if name.startswith(f'blk.{i}.') and name.endswith(kind)}
            if 'attn_q' in here:
                q, k = here['attn_q'], here['attn_k']
                if is_llama:
                    q, k = neighbors_to_halves(q, H), neighbors_to_halves(k, G)
                here['attn_qkv'] = torch.cat((q, k, here['attn_v']))
            if 'ffn_gate' in here:
                here['ffn_up'] = torch.cat((here['ffn_gate'], here['ffn_up']))
            for theirs, ours in (('attn_qkv', 'attn.c_attn'), ('ffn_up', 'mlp.c_fc')):
                if theirs in here:
                    back[f'transformer.h.{i}.{ours}.{kind}'] = here[theirs]
    return back


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_tensor_comes_back(kind, dtype, bpe, tmp_path):
    model, path = make(kind).to(dtype), tmp_path / 'model.gguf'
    assert model.save_pretrained(path, bpe) == [path] and [file.name for file in tmp_path.iterdir()] == ['model.gguf']
    keys, tensors, types = read(path)
    back = ours_from(tensors, model.config)
    for name, p in model.named_parameters():
        rows = bpe.vocab_size if name in ('transformer.wte.weight', 'lm_head.weight') else len(p)
        assert torch.equal(back.pop(name), p[:rows].float()), name
    assert all(not tensor.any() for tensor in back.values()) and (not back or model.config.bias is False)
    expected = {torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16'}[dtype]
    for name, stored in types.items():
        assert stored == ('F32' if tensors[name].dim() == 1 or name == 'position_embd.weight' else expected), name


@pytest.mark.parametrize('kind', KINDS)
def test_keys(kind, bpe, tmp_path):
    config = make(kind).config
    make(kind).save_pretrained(tmp_path / 'model.gguf', bpe, 'chat')
    keys, tensors, _ = read(tmp_path / 'model.gguf')
    arch = kind.partition('-')[0]
    expected = {'context_length': 64, 'embedding_length': 64, 'block_count': 2, 'feed_forward_length': config.n_hidden, 'vocab_size': 360,
                'attention.head_count': 4, 'attention.head_count_kv': config.n_kv_head}
    if arch == 'gpt2':
        expected['attention.layer_norm_epsilon'] = pytest.approx(1e-5)
    else:
        size = dict.fromkeys(('attention.key_length', 'attention.value_length', 'rope.dimension_count'), config.head_size)
        expected |= {'attention.layer_norm_rms_epsilon': pytest.approx(1e-5), 'rope.freq_base': config.rope_theta, **size}
    assert keys['general.architecture'] == arch and keys['general.name'] == 'model' and keys['general.file_type'] == 0
    assert {name: keys[f'{arch}.{name}'] for name in expected} == expected
    assert keys['tokenizer.chat_template'] == Template(bpe, 'chat').jinja()
    assert ('rope_freqs.weight' in tensors) == (kind == 'llama') and ('output.weight' in tensors) == (kind in ('llama', 'qwen3'))


def test_heads_that_do_not_divide_the_width_are_a_llama(bpe, tmp_path):
    """Their class in transformers is Mistral, which llama.cpp has as a llama."""
    model = make('llama', n_embd=66, head_size=16)
    model.save_pretrained(tmp_path / 'model.gguf', bpe)
    keys, tensors, _ = read(tmp_path / 'model.gguf')
    assert keys['general.architecture'] == 'llama'
    for name in ('attn.c_attn.weight', 'attn.c_proj.weight'):
        assert torch.equal(ours_from(tensors, model.config)[f'transformer.h.1.{name}'], model.get_parameter(f'transformer.h.1.{name}'))


def test_rope_freqs_are_those_of_llama_cpp(bpe, tmp_path):
    """Against the loop of its converter, conversion/llama.py."""
    old = 256
    make('llama', rope_scaling=SCALING | {'original_max_position_embeddings': old}).save_pretrained(tmp_path / 'model.gguf', bpe)
    expected = []
    for freq in 1.0 / (5e5 ** (np.arange(0, 16, 2) / 16)):
        wavelen = 2 * np.pi / freq
        if wavelen < old / SCALING['high_freq_factor']:
            expected.append(1.0)
        elif wavelen > old / SCALING['low_freq_factor']:
            expected.append(8.0)
        else:
            smooth = (old / wavelen - SCALING['low_freq_factor']) / (SCALING['high_freq_factor'] - SCALING['low_freq_factor'])
            expected.append(1 / ((1 - smooth) / 8.0 + smooth))
    np.testing.assert_allclose(read(tmp_path / 'model.gguf')[1]['rope_freqs.weight'], expected, rtol=1e-6)
    assert len(set(expected)) > 2


def test_q8_0(bpe, tmp_path):
    """The widths are multiples of 32, but for one: its rows are float16."""
    model = make('qwen3', n_hidden=72)
    model.save_pretrained(tmp_path / 'model.gguf', bpe, quantize='int8')
    keys, tensors, types = read(tmp_path / 'model.gguf')
    back = ours_from(tensors, model.config)
    for name, p in model.named_parameters():
        p = p[:len(back[name])]
        step = p.abs().max() / 127 if p.dim() == 2 else 0
        assert (back[name] - p).abs().max() <= 0.6 * step, name
    assert keys['general.file_type'] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert {name: kind for name, kind in types.items() if tensors[name].dim() == 2 and kind != 'Q8_0'} == {f'blk.{i}.ffn_down.weight': 'F16' for i in range(2)}


# -----------------------------------------------------------------------------
# tokenizers


def test_the_tokenizer_trained_here(bpe, tmp_path):
    make().save_pretrained(tmp_path / 'model.gguf', bpe)
    keys = read(tmp_path / 'model.gguf')[0]
    vocab = bpe.tokenizer_json()['model']['vocab']
    assert {token: i for i, token in enumerate(keys['tokenizer.ggml.tokens'])} == vocab
    assert keys['tokenizer.ggml.merges'] == bpe.arguments['merges'].splitlines()
    assert keys['tokenizer.ggml.model'] == 'gpt2' and keys['tokenizer.ggml.pre'] == 'gpt-2'
    kinds = [gguf.TokenType.NORMAL] * (len(vocab) - 7) + [gguf.TokenType.CONTROL] * 7
    assert keys['tokenizer.ggml.token_type'] == kinds
    ids = [keys[f'tokenizer.ggml.{name}_token_id'] for name in ('bos', 'eos', 'padding')]
    assert ids == [bpe.bos, bpe.eot, bpe.pad] and not keys['tokenizer.ggml.add_bos_token']


def test_gpt2s_tokenizer(gpt2, tmp_path):
    make(vocab_size=50304, n_embd=4).save_pretrained(tmp_path / 'model.gguf', gpt2)
    keys, tensors, _ = read(tmp_path / 'model.gguf')
    assert keys['tokenizer.ggml.pre'] == 'gpt-2' and len(keys['tokenizer.ggml.tokens']) == len(tensors['token_embd.weight']) == 50257
    assert keys['tokenizer.ggml.bos_token_id'] == keys['tokenizer.ggml.eos_token_id'] == 50256


def json_tokenizer(bpe, folder, pre, normalizer=None, model=None, **more):
    """A tokenizer.json from elsewhere: the merges of bpe, cut by another pre-tokenizer."""
    content = bpe_json(bpe.arguments['merges'], special=['<|im_end|>', '<|bos|>'])
    content |= {'pre_tokenizer': pre, 'normalizer': normalizer, **more}
    content['model'] |= model or {}
    content['added_tokens'].append({**content['added_tokens'][0], 'content': '<think>', 'id': 355, 'special': False})
    folder.mkdir(exist_ok=True)
    (folder / 'tokenizer.json').write_text(json.dumps(content), encoding='utf-8')
    config = {'eos_token': '<|im_end|>', 'bos_token': '<|bos|>', 'chat_template': '{{ theirs }}'}
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    return load_tokenizer(read_tokenizer_json(folder))


def template(token, number):
    single = [{'SpecialToken': {'id': token, 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}]
    return {'type': 'TemplateProcessing', 'single': single, 'pair': [*single, single[1]],
            'special_tokens': {token: {'id': token, 'ids': [number], 'tokens': [token]}}}


@pytest.mark.parametrize('name, pre, normalizer', [
    ('llama-bpe', byte_level(LLAMA3_PATTERN), None),
    ('qwen2', byte_level(QWEN2_PATTERN), {'type': 'NFC'}),
    ('smollm', SMOLLM, None),
    ('gpt-2', byte_level(), None),
])
def test_tokenizers_from_elsewhere(name, pre, normalizer, bpe, tmp_path):
    pre = json.loads(json.dumps(pre).replace('"trim_offsets": true', '"trim_offsets": false'))  # as Qwen has it
    tokenizer = json_tokenizer(bpe, tmp_path / 'theirs', pre, normalizer, post_processor=template('<|bos|>', 354) if name == 'llama-bpe' else None)
    make().save_pretrained(tmp_path / 'model.gguf', tokenizer)
    keys = read(tmp_path / 'model.gguf')[0]
    assert keys['tokenizer.ggml.pre'] == name and keys['tokenizer.ggml.add_bos_token'] == (name == 'llama-bpe')
    assert keys['tokenizer.ggml.tokens'][353:] == ['<|im_end|>', '<|bos|>', '<think>']
    assert keys['tokenizer.ggml.token_type'][352:] == [1, 3, 3, 4]
    assert (keys['tokenizer.ggml.eos_token_id'], keys['tokenizer.ggml.bos_token_id']) == (353, 354)
    assert keys['tokenizer.chat_template'] == '{{ theirs }}'


def pieces(pattern, text):
    """A text as the `tokenizers` library cuts it."""
    from tokenizers import Regex, pre_tokenizers
    return [piece for piece, _ in pre_tokenizers.Split(Regex(pattern), 'isolated').pre_tokenize_str(text)]


@pytest.mark.parametrize('text, ours, theirs', [
    (' in 1905 ', [' in', ' 190', '5', ' '], [' in', ' 1905', ' ']),
    ('x' * 40, ['x' * 32, 'x' * 8], ['x' * 40]),
    ('天' * 20, ['天' * 16, '天' * 4], ['天' * 20]),
    ('GPT模型', ['GPT', '模型'], ['GPT模型']),
])
def test_where_the_pattern_of_trained_tokenizers_and_gpt2s_differ(text, ours, theirs):
    assert pieces(BPE_PATTERN, text) == ours and pieces(GPT2_PATTERN, text) == theirs
    plain = CHINESE + "It's  fine,\n\n we'll see: 12 of 345 (naïve) 你好 \U0001f600"
    assert pieces(BPE_PATTERN, plain) == pieces(GPT2_PATTERN, plain)


# -----------------------------------------------------------------------------
# from the command line, and bad input


@pytest.fixture(scope='module')
def run(bpe, tmp_path_factory):
    """The folder of a short run on a tokenizer trained here."""
    root = tmp_path_factory.mktemp('run')
    write_dataset(root / 'data', bpe, {'train': [sentences(9000, 1)], 'val': [sentences(1000, 2)]}, 'a test')
    code, _, stderr, _ = train_here(*TINY, f'--dataset={root / "data"}', '--max_iters=2', out_dir=root / 'out')
    assert code == 0, stderr
    return root / 'out'


def test_sample_exports_a_run_and_a_folder(run, tmp_path):
    code, stdout, stderr = run_here('sample.py', f'--out_dir={run}', f'--export={tmp_path / "new" / "model.gguf"}', '--dtype=bfloat16')
    assert code == 0 and f'run it with llama-cli -m {tmp_path / "new" / "model.gguf"}' in stdout, stderr
    run_here('sample.py', f'--out_dir={run}', f'--export={tmp_path / "folder"}')
    code, _, stderr = run_here('sample.py', f'--init_from={tmp_path / "folder"}', f'--export={tmp_path / "again.gguf"}', '--dtype=bfloat16')
    assert code == 0, stderr
    (keys, a, types), (_, b, _) = read(tmp_path / 'new/model.gguf'), read(tmp_path / 'again.gguf')
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) and 'BF16' in types.values()


@pytest.mark.parametrize('flags, text', [
    (['--export=folder', '--quantize=int8'], '--quantize=int8: accepted is none, or an export to a .gguf file'),
    (['--export=model.gguf'], 'import of gguf halted; None in sys.modules: pip install -r requirements.txt'),
])
def test_bad_flags_are_one_line(flags, text, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'gguf', None)
    code, _, stderr = run_here('sample.py', f'--out_dir={run}', *flags)
    assert code == 2 and text in stderr and stderr.count('\n') == 1
    assert not list(tmp_path.iterdir())


def test_the_end_of_a_turn_is_named(bpe, tmp_path):
    tokenizer = json_tokenizer(bpe, tmp_path / 'theirs', byte_level(), None)
    (tmp_path / 'theirs/tokenizer_config.json').write_text(json.dumps({'eos_token': '<|bos|>'}))
    tokenizer = load_tokenizer(read_tokenizer_json(tmp_path / 'theirs'))
    make().save_pretrained(tmp_path / 'model.gguf', tokenizer, style='chatml')
    keys = read(tmp_path / 'model.gguf')[0]
    assert (keys['tokenizer.ggml.eos_token_id'], keys['tokenizer.ggml.eot_token_id']) == (354, 353)


def test_a_file_without_a_tokenizer_is_one_line(tmp_path):
    with pytest.raises(ValueError, match='a .gguf file holds a tokenizer, none was given'):
        make().save_pretrained(tmp_path / 'x.gguf')


@pytest.mark.parametrize('changes, text', [
    (dict(arch='modern'), 'arch=modern: llama.cpp has no counterpart, train with --arch=llama'),
    (dict(activation='relu2'), 'activation=relu2: llama.cpp has gelu_tanh and gelu there'),
    (dict(arch='llama', activation='gelu'), 'activation=gelu: llama.cpp has silu there'),
])
def test_models_that_llama_cpp_cannot_run(changes, text, bpe, tmp_path):
    with pytest.raises(ValueError) as error:
        make(**changes).save_pretrained(tmp_path / 'model.gguf', bpe)
    assert str(error.value) == text and not list(tmp_path.iterdir())


def others(bpe, folder):
    yield CharTokenizer('abc')
    yield load_tokenizer({'kind': 'byte'})
    yield json_tokenizer(bpe, folder, byte_level(GPT2_PATTERN.replace("'(", "['’](")))
    yield json_tokenizer(bpe, folder, byte_level(), {'type': 'Lowercase'})
    yield json_tokenizer(bpe, folder, {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'first', 'split': False})


def test_tokenizers_that_llama_cpp_does_not_know(bpe, tmp_path):
    for tokenizer in others(bpe, tmp_path / 'theirs'):
        with pytest.raises(ValueError) as error:
            make().save_pretrained(tmp_path / 'model.gguf', tokenizer)
        message = str(error.value)
        assert message.startswith(f'llama.cpp cannot cut a text as this {tokenizer.kind} tokenizer does') and '\n' not in message
        assert '--export=FOLDER' in message and not (tmp_path / 'model.gguf').exists()


# -----------------------------------------------------------------------------
# llama.cpp itself

PROMPTS = ["the cat sat here.\nIt's", '天地玄黄，宇宙', ' a dog  ran\n\nby the sea, 345']


@pytest.fixture(scope='session')
def llama_cpp():
    return pytest.importorskip('llama_cpp', reason='llama-cpp-python is not installed: pip install llama-cpp-python')


def compare(llama_cpp, path, model, tokenizer, prompt, atol):
    """Let both write a text. llama.cpp may choose another token only where ours is not ahead by more than atol."""
    llama = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, type_k=0, type_v=0, verbose=False)  # a float32 cache
    ids, V = tokenizer.encode(prompt), tokenizer.vocab_size
    assert llama.tokenize(prompt.encode(), add_bos=True, special=False) == ids
    text = model.generate(torch.tensor([ids]), 40, temperature=0, vocab_size=V)[0, :-1]
    with torch.no_grad():
        logits = model.head(model.hidden(text[None]))[0, :, :V]
    llama.eval(text.tolist())
    scores = torch.from_numpy(llama.scores[:len(text)])
    torch.testing.assert_close(scores, logits, atol=atol, rtol=0)
    ahead = logits.max(-1).values - logits.gather(1, scores.argmax(-1, keepdim=True))[:, 0]
    assert ahead.max() <= atol


@pytest.mark.full
@pytest.mark.parametrize('name', ['bpe', 'gpt2'])
@pytest.mark.parametrize('kind', KINDS)
def test_llama_cpp_writes_the_same_text(kind, name, llama_cpp, request, tmp_path):
    """Measured: 4e-5 for arch=llama, 3e-3 for gpt2, because ggml's GELU is a table in float16."""
    tokenizer = request.getfixturevalue(name)
    model = make(kind, vocab_size=-(-tokenizer.vocab_size // 64) * 64)
    model.save_pretrained(tmp_path / 'model.gguf', tokenizer)
    for prompt in PROMPTS:
        compare(llama_cpp, tmp_path / 'model.gguf', model, tokenizer, prompt, atol=0.01 if model.config.arch == 'gpt2' else 1e-4)


@pytest.mark.full
@pytest.mark.parametrize('dtype, quantize, atol', [(torch.float16, None, 0.1), (torch.bfloat16, None, 0.4), (torch.float32, 'int8', 1.0)])
@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'qwen3'])
def test_llama_cpp_runs_smaller_types(kind, dtype, quantize, atol, bpe, llama_cpp, tmp_path):
    """It rounds the inputs of each matrix, too, here in a model whose logits reach 7."""
    model = make(kind).to(dtype)
    model.save_pretrained(tmp_path / 'model.gguf', bpe, quantize=quantize)
    compare(llama_cpp, tmp_path / 'model.gguf', model.float(), bpe, PROMPTS[0], atol)


@pytest.mark.full
@pytest.mark.parametrize('name, pre', [('llama-bpe', byte_level(LLAMA3_PATTERN)), ('qwen2', byte_level(QWEN2_PATTERN)), ('smollm', SMOLLM), ('gpt-2', byte_level())])
def test_llama_cpp_cuts_text_as_tokenizers_does(name, pre, bpe, llama_cpp, tmp_path):
    tokenizer = json_tokenizer(bpe, tmp_path / 'theirs', pre, post_processor=template('<|bos|>', 354) if name == 'llama-bpe' else None)
    make(vocab_size=384).save_pretrained(tmp_path / 'model.gguf', tokenizer)
    llama = llama_cpp.Llama(str(tmp_path / 'model.gguf'), vocab_only=True, verbose=False)
    start = [354] if name == 'llama-bpe' else []
    for text in [*PROMPTS, "It's 1905,\r\n\r\n\tDON'T  \n x = 12345;;\n", 'naïve Ⅳ\u3000全角１２３ \U0001f600', '  the cat\n ']:
        assert llama.tokenize(text.encode(), add_bos=True, special=False) == start + tokenizer.encode(text), text
    ids = llama.tokenize(b'the<|im_end|>cat<think>', add_bos=False, special=True)
    assert ids == [*tokenizer.encode('the'), 353, *tokenizer.encode('cat'), 355]
