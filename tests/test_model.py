"""model.py against transformers, against torch's operation counter, and against itself without a cache."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import devices
from kernels import draw
from model import GPT, GPTConfig

ODD = dict(block_size=37, vocab_size=83, n_layer=3, n_head=3, n_embd=42)
SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
KINDS = {  # arguments of GPTConfig
    'gpt2': dict(arch='gpt2'),
    'modern': dict(arch='modern'),
    'llama': dict(arch='llama', n_kv_head=1, n_hidden=50, rope_theta=5e5, rope_scaling=SCALING),
    'smollm2': dict(arch='llama', n_kv_head=1, tied=True),
    'qwen2': dict(arch='llama', n_kv_head=1, qkv_bias=True, norm_eps=1e-6),
    'qwen3': dict(arch='llama', head_size=10, qk_norm=True, norm_eps=1e-6, tied=True),
}


def random_model(kind, **changes):
    """A small model none of whose weights are zero: a fresh modern one would hide every mistake behind its zero head."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**ODD, **KINDS[kind], **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def reference(model):
    """transformers' model with the same weights."""
    transformers = pytest.importorskip('transformers')
    c, ours = model.config, model.state_dict()
    if c.arch == 'gpt2':
        config = transformers.GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
                                         n_head=c.n_head, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        theirs = transformers.GPT2LMHeadModel(config)
        matrices = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # Conv1D keeps them transposed
        weights = {k: v.t() if k.endswith(matrices) else v for k, v in ours.items()}
    elif c.arch == 'llama':
        theirs, weights = llama_reference(transformers, c, ours)
    else:
        config = transformers.NanoChatConfig(vocab_size=c.vocab_size, max_position_embeddings=c.block_size, hidden_size=c.n_embd,
                                             intermediate_size=4 * c.n_embd, num_hidden_layers=c.n_layer,
                                             num_attention_heads=c.n_head, bos_token_id=0, eos_token_id=0, pad_token_id=0)
        theirs = transformers.NanoChatForCausalLM(config)
        weights = {'model.embed_tokens.weight': ours['transformer.wte.weight'], 'lm_head.weight': ours['lm_head.weight']}
        for i in range(c.n_layer):
            block, layer = f'transformer.h.{i}.', f'model.layers.{i}.'
            for name, part in zip('qkv', ours[block + 'attn.c_attn.weight'].chunk(3)):
                weights[f'{layer}self_attn.{name}_proj.weight'] = part
            weights[layer + 'self_attn.o_proj.weight'] = ours[block + 'attn.c_proj.weight']
            weights[layer + 'mlp.fc1.weight'] = ours[block + 'mlp.c_fc.weight']
            weights[layer + 'mlp.fc2.weight'] = ours[block + 'mlp.c_proj.weight']
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and all('rotary' in k or 'attn.bias' in k for k in missing)
    return theirs.eval()


def llama_reference(transformers, c, ours):
    name = 'Qwen3' if c.qk_norm else 'Qwen2' if c.qkv_bias else 'Llama'
    rope = dict(rope_type='default', rope_theta=c.rope_theta)
    if c.rope_scaling:
        rope |= dict(c.rope_scaling, rope_type='llama3')
    config = getattr(transformers, f'{name}Config')(
        vocab_size=c.vocab_size, max_position_embeddings=c.block_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_size,
        rms_norm_eps=c.norm_eps, rope_parameters=rope, tie_word_embeddings=c.tied, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    names = {'transformer.wte.weight': 'model.embed_tokens.weight', 'transformer.ln_f.weight': 'model.norm.weight',
             'ln_1.weight': 'input_layernorm.weight', 'ln_2.weight': 'post_attention_layernorm.weight',
             'attn.c_proj.weight': 'self_attn.o_proj.weight', 'mlp.c_proj.weight': 'mlp.down_proj.weight',
             'attn.q_norm.weight': 'self_attn.q_norm.weight', 'attn.k_norm.weight': 'self_attn.k_norm.weight'}
    weights, rows = {}, [n * c.head_size for n in (c.n_head, c.n_kv_head, c.n_kv_head)]
    for key, tensor in ours.items():
        layer, _, inner = key.removeprefix('transformer.h.').partition('.') if '.h.' in key else ('', '', key)
        layer = f'model.layers.{layer}.' if layer else ''
        if 'c_attn' in key:
            for part, value in zip('qkv', tensor.split(rows)):
                weights[f'{layer}self_attn.{part}_proj.{key.rpartition(".")[2]}'] = value
        elif 'c_fc' in key:
            weights[layer + 'mlp.gate_proj.weight'], weights[layer + 'mlp.up_proj.weight'] = tensor.chunk(2)
        else:
            weights[layer + names.get(inner, inner)] = tensor
    return getattr(transformers, f'{name}ForCausalLM')(config), weights


@pytest.mark.parametrize('arch', KINDS)
def test_logits_and_loss_equal_transformers(arch):
    model = random_model(arch)
    idx = torch.randint(model.config.vocab_size, (3, 37))
    with torch.no_grad():
        logits, loss = model(idx, torch.cat((idx[:, 1:], torch.full((3, 1), -100)), dim=1))
        theirs = reference(model)(idx, labels=idx)
    torch.testing.assert_close(logits, theirs.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, theirs.loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize('arch', KINDS)
def test_cached_greedy_equals_uncached_past_block_size(arch):
    model = random_model(arch)
    prompts = torch.randint(model.config.vocab_size, (2, 5))
    cached, plain = model.generate(prompts, 60, temperature=0), prompts
    with torch.no_grad():
        for _ in range(60):
            logits, _ = model(plain[:, -model.config.block_size:])
            plain = torch.cat((plain, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert cached.shape == (2, 65) and torch.equal(cached, plain)


@pytest.mark.parametrize('arch', KINDS)
def test_cache_takes_several_tokens_behind_others(arch):
    from kernels import KVCache
    model = random_model(arch)
    idx = torch.randint(model.config.vocab_size, (2, 20))
    cache = KVCache(model.config, 2, 20, 'cpu', torch.float32)
    with torch.no_grad():
        for part in idx.split([7, 9, 4], dim=1):
            logits, _ = model(part, cache=cache)
        torch.testing.assert_close(logits, model(idx)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize('arch', KINDS)
def test_flops_equal_torchs_counter(arch):
    model = random_model(arch)
    B, T = 2, 37
    idx = torch.randint(model.config.vocab_size, (B, T))
    # the fused kernels recompute the scores in the backward pass, which is their affair and not the model's
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.loss_sum(idx, idx).backward()
    assert counter.get_total_flops() == model.flops_per_token(T) * B * T


def test_losses_agree_and_skip_positions_without_a_target():
    model = random_model('gpt2')
    idx = torch.randint(model.config.vocab_size, (2, 10))
    targets = idx.roll(-1, dims=1)
    targets[0, :4] = -100
    nats, is_argmax = model.score(idx, targets)
    assert nats.shape == is_argmax.shape == (2, 10) and (nats[0, :4] == 0).all() and not is_argmax[0, :4].any()
    torch.testing.assert_close(nats.sum(), model.loss_sum(idx, targets))
    logits, loss = model(idx, targets)
    torch.testing.assert_close(nats.sum() / 16, loss)
    assert torch.equal(is_argmax, (logits.argmax(-1) == targets))
    assert model.score(idx, torch.full_like(idx, -100)).nats.sum() == 0


def test_tanh_gelu_is_gpt2s():
    # 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), arXiv:1606.08415, worked out at 1, -1 and 3 by hand
    from kernels import ACTIVATIONS
    x = torch.tensor([1.0, -1.0, 3.0])
    torch.testing.assert_close(ACTIVATIONS['gelu_tanh'](x), torch.tensor([0.8411920, -0.1588080, 2.9963627]), atol=1e-6, rtol=0)
    assert abs(ACTIVATIONS['gelu'](x)[0].item() - 0.8413447) < 1e-6


def test_fresh_model_predicts_evenly():
    torch.manual_seed(0)
    idx = torch.randint(83, (2, 37))
    for arch in ('gpt2', 'modern'):
        loss = GPT(GPTConfig(arch=arch, **ODD))(idx, idx.flip(1))[1]
        assert abs(loss.item() - torch.log(torch.tensor(83.0)).item()) < 0.05


def test_draw():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(2000, 1)
    torch.manual_seed(0)
    assert set(draw(logits, 0, None, None).tolist()) == {0}
    assert set(draw(logits, 1.0, 2, None).tolist()) == {0, 1}
    assert set(draw(logits, 1.0, 99, None).tolist()) == {0, 1, 2, 3}
    assert set(draw(logits, 1.0, None, 0.79).tolist()) == {0, 1}
    assert set(draw(logits, 1.0, None, 0.81).tolist()) == {0, 1, 2}
    assert set(draw(logits, 1.0, None, 1e-9).tolist()) == set(draw(logits, 1.0, None, 0.0).tolist()) == {0}
    share = (draw(logits, 1.0, 0, 1.0) == 0).float().mean().item()
    assert abs(share - 0.5) < 0.05


def test_padding_is_never_drawn():
    model = random_model('gpt2')
    out = model.generate(torch.zeros(8, 1, dtype=torch.long), 30, temperature=5.0, vocab_size=10)
    assert out.max() < 10


def test_crop_keeps_the_function_on_short_rows():
    for arch in ('gpt2', 'modern'):
        model = random_model(arch)
        idx = torch.randint(83, (1, 9))
        before = model(idx)[0]
        model.crop_block_size(9)
        torch.testing.assert_close(model(idx)[0], before)
        with pytest.raises(ValueError, match='10 tokens do not fit into block_size 9'):
            model(torch.zeros(1, 10, dtype=torch.long))


@pytest.mark.parametrize('wrong, text', [
    (dict(n_embd=43), 'n_embd=43, n_head=3: accepted is a multiple of 3'),
    (dict(arch='lama'), 'arch=lama is unknown: accepted are gpt2, modern, llama'),
    (dict(n_layer=0), 'n_layer=0: accepted is 1 or more, below 2**31'),
    (dict(dropout=1.0), 'dropout=1.0: accepted is 0.0 or more, below 1.0'),
    (dict(arch='modern', n_head=2, n_embd=6), 'n_embd=6, n_head=2: accepted is a multiple of 4'),
    (dict(arch='modern', bias=True), 'bias=True: accepted with arch=modern is False'),
    (dict(n_kv_head=1), 'n_kv_head=1: accepted with arch=gpt2 is 3'),
    (dict(arch='llama', n_kv_head=2, n_embd=42), 'n_head=3 is not divisible by n_kv_head=2'),
    (dict(arch='llama', head_size=5), 'head_size=5: accepted is an even number'),
])
def test_shapes_that_do_not_fit(wrong, text):
    with pytest.raises(ValueError) as error:
        GPTConfig(**{**ODD, **wrong})
    assert str(error.value) == text


def test_dropout_only_in_training():
    model = random_model('modern', dropout=0.5)
    idx = torch.randint(83, (2, 37))
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('arch', KINDS)
def test_loss_in_chunks_has_the_same_value_and_gradients(arch, compiled):
    # pytorch issue 180642: compiled by torch 2.11, an in-place sum in the chunked loss gave zero gradients
    model = random_model(arch, dropout=0.0)
    idx = torch.randint(83, (3, 37))
    targets = idx.roll(-1, dims=1)
    targets[0, :9] = -100
    results = []
    for model.loss_chunks in (0, 4):  # 28 rows in a chunk, 27 in the last
        model.zero_grad()
        loss_of = torch.compile(model.loss_sum, dynamic=False, backend='aot_eager') if compiled else model.loss_sum
        loss = loss_of(idx, targets)
        (3 * loss).backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
    for one, other in zip(*(model.score(idx, targets) for model.loss_chunks in (0, 4))):
        torch.testing.assert_close(one, other)


def test_loss_chunks_auto_asks_for_the_size_of_the_logits(monkeypatch):
    import kernels
    weight = torch.empty(1000, 8)
    assert kernels.loss_chunk_rows(500, 'auto', weight) == 500
    monkeypatch.setitem(kernels.CHUNK_BYTES, 'cpu', 4 * 1000 * 300)
    assert kernels.loss_chunk_rows(500, 'auto', weight) == 256  # a multiple of 128
    assert kernels.loss_chunk_rows(500, 3, weight) == 167
    assert kernels.loss_chunk_rows(800, 'auto', weight) == 256  # not 300, 300, 200


def test_bfloat16_attention_and_activation_are_within_its_rounding():
    model = random_model('gpt2', bias=True).bfloat16()
    for p in model.parameters():
        p.data.mul_(0.3)
    idx = torch.randint(83, (3, 37))
    logits = model(idx, idx)[0]  # with a gradient: as matrix products
    with torch.no_grad():
        torch.testing.assert_close(model(idx, idx)[0], logits, atol=0.02, rtol=0.02)
        torch.testing.assert_close(model.float()(idx, idx)[0], logits, atol=0.03, rtol=0.03)


def divergence(logits, exact):
    """The mean KL divergence of logits from exact ones, in nats."""
    logits, exact = logits.double().log_softmax(-1), exact.double().log_softmax(-1)
    return torch.nn.functional.kl_div(logits, exact, log_target=True, reduction='none').sum(-1).mean().item()


@pytest.mark.parametrize('n_rows', [1, 3])
@pytest.mark.parametrize('quantize, most', [(None, 2e-7), ('int8', 3e-4)])
@pytest.mark.parametrize('arch', KINDS)
def test_packed_logits_are_those_of_float32(arch, quantize, most, n_rows):
    """Widths of 42, 65 and 83: no multiples of 8. Logits of about 1, as a random model's."""
    model, idx = random_model(arch), torch.randint(83, (3, 7))
    for p in model.parameters():
        p.data.mul_(0.3)
    packed = copy.deepcopy(model).half().pack(quantize, n_rows)
    with torch.inference_mode():
        for rows in (idx, idx[:1], idx[:1, :1]):
            assert divergence(packed(rows)[0], model(rows)[0]) < most
        assert packed.generate(idx, 40).shape == (3, 47), 'beyond block_size'


@pytest.mark.parametrize('quantize', [None, 'int8'])
def test_a_packed_model_writes_the_same_text(quantize):
    """Of a model that was trained to count, and is sure of each token."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=65, n_layer=2, n_head=5, n_embd=65))
    optimizer, row = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.arange(33) * 7 % 65
    for i in range(60):
        x = (row + i) % 65
        model(x[None, :-1], x[None, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    idx = torch.stack([(row[:8] + i) % 65 for i in range(7)])
    expected = model.eval().generate(idx, 20, temperature=0)
    for n_rows in (1, 7):
        packed = copy.deepcopy(model).half().pack(quantize, n_rows)
        assert torch.equal(packed.generate(idx, 20, temperature=0), expected)
        assert torch.equal(packed.generate(idx[:1], 20, temperature=0), expected[:1])


def test_rows_of_an_int8_batch_have_scales_of_their_own():
    import kernels
    torch.manual_seed(0)
    linear = kernels.Int8Linear(torch.nn.Linear(64, 9).requires_grad_(False))
    x = torch.randn(2, 64)
    apart = linear(x[:1])
    loud = linear(torch.stack((x[0], 1e4 * x[1])))[:1]
    assert ((loud - apart).norm() / apart.norm()).item() < 0.05


def test_float32_stays_as_it_is_unless_quantized():
    model = random_model('gpt2')
    idx = torch.randint(83, (1, 5))
    with torch.inference_mode():
        before = model(idx)[0]
        assert torch.equal(model.pack()(idx)[0], before)
        quantized = model.pack('int8')(idx)[0]
    assert 0 < ((quantized - before).norm() / before.norm()).item() < 0.05


def test_a_torch_without_int8_tensors_generates_in_16_bits(monkeypatch, capsys):
    import kernels
    monkeypatch.setattr(kernels, 'HAS_INT8', False)
    model, idx = random_model('gpt2').half(), torch.randint(83, (1, 5))
    with torch.inference_mode():
        expected = copy.deepcopy(model).pack()(idx)[0]
        assert torch.equal(model.pack('int8')(idx)[0], expected)
    assert capsys.readouterr().out == f'quantize=int8: PyTorch {torch.__version__} has no int8 matrices, continuing without\n'


def test_bfloat16_rows_are_multiplied_as_linear_does():
    import kernels
    torch.manual_seed(0)
    linear = torch.nn.Linear(65, 7).bfloat16().requires_grad_(False)
    x = torch.randn(3, 65).bfloat16()
    for rows in (x, x[:1]):
        torch.testing.assert_close(kernels.RowLinear(linear)(rows), linear(rows), atol=0.02, rtol=0.02)
    assert torch._C._get_mkldnn_enabled()


def test_loading_for_generation_keeps_one_copy_of_each_weight(tmp_path):
    """In a process whose heap never shrinks: what it holds at the end was its peak."""
    sizes = dict(block_size=64, vocab_size=8192, n_layer=6, n_head=8, n_embd=512)
    GPT(GPTConfig(**sizes)).save_pretrained(tmp_path / 'model')
    random_model('gpt2').save_pretrained(tmp_path / 'tiny')  # loaded first: imports are not counted
    program = f'''
import torch, devices
from model import GPT
devices.keep_freed_memory()
for name in ('tiny', 'model'):
    before = devices.anonymous_bytes()
    model = GPT.from_pretrained({str(tmp_path)!r} + '/' + name, dtype=torch.float16).pack()
print(devices.anonymous_bytes() - before)'''
    if devices.anonymous_bytes() is None:
        pytest.skip('no /proc/self/status')
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    n_bytes = 2 * (8192 * 512 + 64 * 512 + 6 * 12 * 512 * 512)
    assert int(done.stdout) < 1.2 * n_bytes + 16e6, done.stderr  # 16 MB: a matrix on its way, whatever the model


# -----------------------------------------------------------------------------
# several documents in a row


@pytest.mark.parametrize('arch', KINDS)
def test_documents_of_one_row_are_as_if_each_were_a_row(arch):
    model, a, b = random_model(arch), torch.randint(83, (1, 9)), torch.randint(83, (1, 14))
    row, documents = torch.cat((a, b), 1), torch.tensor([[7] * 9 + [8] * 14])
    apart = torch.cat([model.score(x[:, :-1], x[:, 1:]).nats for x in (a, b)], 1)
    targets = row[:, 1:].clone()
    targets[:, 8] = -100  # where one document ends and the next begins
    together = model.score(row[:, :-1], targets, documents[:, :-1]).nats
    torch.testing.assert_close(together[targets != -100], apart[0], rtol=1e-5, atol=1e-5)
    plain = model.score(row[:, :-1], targets).nats
    assert (plain - together)[:, :8].abs().max() < 1e-5 and (plain - together)[:, 9:].abs().max() > 0.01
    torch.testing.assert_close(model.score(row[:, :-1], targets, torch.zeros_like(targets)).nats, plain, rtol=1e-5, atol=1e-5)


# -----------------------------------------------------------------------------
# compiled: what a GPU runs


def test_compiled_gradients_of_the_chunked_loss_equal_those_of_the_plain_one():
    """`loss +=` in the autograd function gave zero gradients in silence (torch 2.11)."""
    import kernels
    torch.manual_seed(0)
    start_x, start_weight = torch.randn(300, 16), torch.randn(100, 16)
    targets = torch.randint(100, (300,))
    targets[::7] = -100

    def chunked(x, weight):
        return kernels.cross_entropy(x, weight, targets, 128, 15.0)

    def plain(x, weight):
        logits = 15.0 * torch.tanh(x @ weight.T / 15.0)
        return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction='sum')

    results = []
    for loss_of in (plain, chunked, torch.compile(chunked, dynamic=False, backend='aot_eager')):
        x, weight = start_x.clone().requires_grad_(), start_weight.clone().requires_grad_()
        loss = loss_of(x, weight)
        (2 * loss).backward()
        results.append((loss.detach(), x.grad, weight.grad))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize('arch', KINDS)
def test_compiled_generation_is_one_graph_for_all_layers_and_tokens(arch, monkeypatch):
    """A number in the graph, such as the layer or the position, would compile it anew."""
    from torch._dynamo.testing import CompileCounter

    import devices
    from chat import prepare_decoding
    from model import Block
    torch._dynamo.reset()
    counter, compile_block = CompileCounter(), Block.compile
    monkeypatch.setattr(Block, 'compile', lambda self, **kwargs: compile_block(self, backend=counter, **kwargs))
    model = random_model(arch)
    prompts = torch.randint(model.config.vocab_size, (2, 5))
    plain = model.generate(prompts, 30, temperature=0)
    monkeypatch.setattr(devices, 'choose_compile', lambda choice, device: True)
    prepare_decoding(model, torch.device('cpu'), True, 'none')
    assert torch.equal(model.generate(prompts, 30, temperature=0), plain)
    assert counter.frame_count == 1
    model.generate(prompts[:, :3], 25, temperature=0)  # another prompt, the same cache
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_the_compiled_loss_compares_where_it_could_scatter():
    """A scatter makes inductor write the probabilities to memory in float32."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    import kernels
    operations = []

    def collect(graph, inputs):
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    x, weight = torch.randn(300, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
    loss_of = torch.compile(kernels.cross_entropy, backend=aot_autograd(fw_compiler=collect), dynamic=False)
    loss_of(x, weight, torch.randint(100, (300,)), 128, None).backward()
    assert any('eq' in name for name in operations) and not [name for name in operations if 'scatter' in name or 'gather' in name]


def test_the_last_position_is_a_view():
    """An index tensor would be made and copied to the device for each token."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    model, names = random_model('gpt2'), []
    with torch.no_grad(), Names():
        model(torch.randint(83, (1, 5)))
    assert len(names) > 20 and 'aten.index.Tensor' not in names


def test_the_residual_stream_in_bfloat16():
    """Rounded in every block, it moves the loss by less than 1%."""
    model, idx = random_model('gpt2', n_embd=48), torch.randint(83, (2, 37))
    seen, losses = [], []
    model.transformer.h[1].register_forward_hook(lambda block, inputs, output: seen.append(output.dtype))
    for model.bf16_residual in (False, True):
        with torch.autocast('cpu', torch.bfloat16):
            losses.append(model.loss_sum(idx, idx.flip(1)).item())
    model.loss_sum(idx, idx)  # in float32 the setting has no effect
    assert seen == [torch.float32, torch.bfloat16, torch.float32] and losses[0] != losses[1] == pytest.approx(losses[0], rel=0.01)
