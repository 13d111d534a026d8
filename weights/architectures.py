"""The model classes of transformers that GPT can be: settings in config.json, names and layouts of weights.

One more architecture is one more entry of ARCHITECTURES: a table {our name: their names} and two functions.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from weights.foreign import CONV1D, ROPE_SCALING, are_positive

# theirs: ours; the first name of each of ours is written
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu': 'gelu', 'relu2': 'relu2', 'gelu_pytorch_tanh': 'gelu_tanh',
               'silu': 'silu', 'swish': 'silu'}
ACTIVATION_NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
ROPE = {'rope_theta': 10_000.0, 'rope_type': 'default'}


@dataclass(frozen=True)
class ConfigReader:
    """The settings of a config.json. ValueError for a value that model.py has no switch for."""

    settings: dict
    path: Path  # for messages

    def need(self, name, default, *accepted):
        """Return the value of a setting, which must be one of those accepted."""
        value = self.settings.get(name, default)
        if value not in accepted:
            raise ValueError(f'{self.path}: {name} = {value!r} is not supported, '
                             f'accepted is {" or ".join(map(repr, accepted))}')
        return value

    def counts(self, **names) -> dict:
        """Return arguments of GPTConfig. names: argument = (their name, default)."""
        counts = {}
        for argument, (name, default) in names.items():
            counts[argument] = value = self.settings.get(name, default)
            if type(value) is not int or value < 1:
                raise ValueError(f'{self.path}: {name} = {value!r} must be a whole number, 1 or more')
        return counts


@dataclass(frozen=True)
class Architecture:
    """One model class of transformers."""

    arch: str  # of GPTConfig
    model_type: str  # in config.json
    class_name: str
    prefix: str  # of all names but the head's; a file saved without the head has none
    block: str  # what stands before the names in a block, {} = its number
    outside: dict  # our name: their names, outside the blocks
    inside: dict  # our name in a block: their names there; several = our rows are split among them
    fixed: dict  # settings that model.py has no switch for; a config.json that lacks one means the same
    read: Callable  # ConfigReader -> arguments of GPTConfig
    write: Callable  # GPTConfig -> settings
    transposed: tuple = ()  # ends of our names of matrices stored as inputs x outputs
    switches: tuple = ()  # (argument of GPTConfig, value) that tell classes of one arch apart
    biased: tuple = ()  # ends of our names of weights that have a bias there in any case; zeros if not ours

    def with_biases(self, tensors: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
        """Return our tensors, and zeros for the biases that the class has in any case."""
        tensors = dict(tensors)
        if self.biased and not config.bias:
            for name in [name for name in tensors if name.endswith(self.biased)]:
                bias = name.removesuffix('weight') + 'bias'
                tensors[bias] = tensors[name].new_zeros(len(tensors[name]))
        return tensors

    def parts(self, tensors: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
        """Return views of our tensors by their names: parts of them, in their layout."""
        parts, n_kv_rows = {}, config.n_kv_head * config.head_size
        for name, tensor in tensors.items():
            match = re.fullmatch(r'transformer\.h\.(\d+)\.(.+)', name)
            if match is None:
                names = self.outside[name]
            else:
                names = [self.block.format(match[1]) + part for part in self.inside[match[2]]]
            if name.endswith(self.transposed):
                tensor = tensor.t()
            rows = [len(tensor) // len(names)] * len(names)
            if len(names) == 3:  # queries, keys and values
                rows = [len(tensor) - 2 * n_kv_rows, n_kv_rows, n_kv_rows]
            parts.update(zip(names, tensor.split(rows), strict=True))
        return parts


def read_gpt2(config):
    args = config.counts(block_size=('n_positions', 1024), vocab_size=('vocab_size', 50257),
                         n_layer=('n_layer', 12), n_head=('n_head', 12), n_embd=('n_embd', 768))
    config.need('n_inner', None, None, 4 * args['n_embd'])
    activation = ACTIVATIONS[config.need('activation_function', 'gelu_new', *ACTIVATIONS)]
    return dict(args, bias=config.settings.get('bias', True) is not False, activation=activation)


def write_gpt2(c):
    # llama.cpp's converter reads n_ctx, the name of n_positions in the first GPT-2 files
    return dict(n_positions=c.block_size, n_ctx=c.block_size, n_embd=c.n_embd, n_inner=None,
                n_layer=c.n_layer, n_head=c.n_head, bias=c.bias,
                activation_function=ACTIVATION_NAMES[c.activation],
                attn_pdrop=c.dropout, embd_pdrop=c.dropout, resid_pdrop=c.dropout)


def read_nanochat(config):
    args = config.counts(
        block_size=('max_position_embeddings', 2048), vocab_size=('vocab_size', 50304),
        n_layer=('num_hidden_layers', 12), n_head=('num_attention_heads', 6), n_embd=('hidden_size', 768))
    C, H = args['n_embd'], args['n_head']
    config.need('num_key_value_heads', None, None, H)
    config.need('intermediate_size', 8192, 4 * C)
    config.need('head_dim', None, None, C // H)
    # transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling
    config.need('rope_parameters', None, None, ROPE)
    config.need('rope_theta', ROPE['rope_theta'], ROPE['rope_theta'])
    config.need('rope_scaling', None, None)
    return dict(args, bias=False, activation=ACTIVATIONS[config.need('hidden_act', 'relu2', *ACTIVATIONS)])


def write_nanochat(c):
    return dict(max_position_embeddings=c.block_size, hidden_size=c.n_embd, intermediate_size=4 * c.n_embd,
                num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_head,
                hidden_act=ACTIVATION_NAMES[c.activation], attention_dropout=c.dropout, rope_parameters=ROPE)


def read_llama(config):
    args = config.counts(
        block_size=('max_position_embeddings', 2048), vocab_size=('vocab_size', 32000),
        n_layer=('num_hidden_layers', 32), n_head=('num_attention_heads', 32), n_embd=('hidden_size', 4096),
        n_hidden=('intermediate_size', 11008))
    settings = config.settings
    defaults = dict(num_key_value_heads=args['n_head'], head_dim=args['n_embd'] // args['n_head'])
    settings |= {name: value for name, value in defaults.items() if settings.get(name) is None}
    args |= config.counts(n_kv_head=('num_key_value_heads', None), head_size=('head_dim', None))
    for kind in settings.get('layer_types') or []:
        if kind != 'full_attention':
            raise ValueError(f'{config.path}: layer_types has {kind!r}, accepted is full_attention')
    # transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling
    rope = {'rope_theta': settings.get('rope_theta', 10_000.0)}
    rope |= (settings.get('rope_parameters') or {}) | (settings.get('rope_scaling') or {})
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind not in ('default', 'llama3'):
        raise ValueError(f'{config.path}: rope_type = {kind!r} is not supported, '
                         'accepted are default, llama3')
    scaling = {name: rope[name] for name in ROPE_SCALING} if kind == 'llama3' else None
    numbers = [settings.get('rms_norm_eps', 1e-6), rope['rope_theta'], *(scaling or {}).values()]
    if not are_positive(numbers):
        raise ValueError(f'{config.path}: rms_norm_eps and the numbers of its rotary positions are '
                         f'{numbers}, accepted are numbers above 0')
    return dict(args, bias=False, rope_theta=float(rope['rope_theta']), rope_scaling=scaling,
                norm_eps=settings.get('rms_norm_eps', 1e-6), tied=settings.get('tie_word_embeddings', False),
                activation=ACTIVATIONS[config.need('hidden_act', 'silu', *ACTIVATIONS)])


def read_mistral(config):
    args = read_llama(config)
    window = config.settings.get('sliding_window', 4096)  # of positions; transformers' default
    if window is not None and not window >= args['block_size']:
        raise ValueError(f'{config.path}: sliding_window = {window} is below max_position_embeddings = '
                         f'{args["block_size"]}, which is not supported: lower the second to the first')
    return args


def write_llama(c):
    rope = {'rope_type': 'llama3', **c.rope_scaling} if c.rope_scaling else {'rope_type': 'default'}
    return dict(max_position_embeddings=c.block_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden,
                num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
                head_dim=c.head_size, hidden_act=ACTIVATION_NAMES[c.activation], rms_norm_eps=c.norm_eps,
                attention_dropout=c.dropout, tie_word_embeddings=c.tied,
                rope_parameters={'rope_theta': c.rope_theta, **rope})


def same(*names):
    """Return a table of names that are ours, too, with weight and bias."""
    return {f'{name}.{kind}': [f'{name}.{kind}'] for name in names for kind in ('weight', 'bias')}


ARCHITECTURES = [
    Architecture(
        arch='gpt2', model_type='gpt2', class_name='GPT2LMHeadModel',
        prefix='transformer.', block='transformer.h.{}.',
        outside=same('transformer.wte', 'transformer.wpe', 'transformer.ln_f'),
        inside=same('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj'),
        fixed=dict(layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
                   add_cross_attention=False, tie_word_embeddings=True),
        read=read_gpt2, write=write_gpt2, transposed=CONV1D,
        biased=(*CONV1D, 'ln_1.weight', 'ln_2.weight', 'ln_f.weight')),
    Architecture(
        arch='modern', model_type='nanochat', class_name='NanoChatForCausalLM',
        prefix='model.', block='model.layers.{}.',
        outside={
            'transformer.wte.weight': ['model.embed_tokens.weight'],
            'lm_head.weight': ['lm_head.weight'],
        },
        inside={
            'attn.c_attn.weight': [f'self_attn.{part}_proj.weight' for part in 'qkv'],
            'attn.c_proj.weight': ['self_attn.o_proj.weight'],
            'mlp.c_fc.weight': ['mlp.fc1.weight'],
            'mlp.c_proj.weight': ['mlp.fc2.weight'],
        },
        fixed=dict(rms_norm_eps=1e-6, final_logit_softcapping=15.0, attention_bias=False,
                   tie_word_embeddings=False),
        read=read_nanochat, write=write_nanochat),
]
LLAMA = Architecture(
    arch='llama', model_type='llama', class_name='LlamaForCausalLM',
    prefix='model.', block='model.layers.{}.',
    outside={
        'transformer.wte.weight': ['model.embed_tokens.weight'],
        'transformer.ln_f.weight': ['model.norm.weight'],
        'lm_head.weight': ['lm_head.weight'],
    },
    inside={
        'ln_1.weight': ['input_layernorm.weight'],
        'attn.c_attn.weight': [f'self_attn.{part}_proj.weight' for part in 'qkv'],
        'attn.c_attn.bias': [f'self_attn.{part}_proj.bias' for part in 'qkv'],
        'attn.q_norm.weight': ['self_attn.q_norm.weight'],
        'attn.k_norm.weight': ['self_attn.k_norm.weight'],
        'attn.c_proj.weight': ['self_attn.o_proj.weight'],
        'ln_2.weight': ['post_attention_layernorm.weight'],
        'mlp.c_fc.weight': ['mlp.gate_proj.weight', 'mlp.up_proj.weight'],
        'mlp.c_proj.weight': ['mlp.down_proj.weight'],
    },
    fixed=dict(attention_bias=False, mlp_bias=False), read=read_llama, write=write_llama,
    switches=(('qk_norm', False), ('qkv_bias', False)))
ARCHITECTURES += [
    LLAMA,
    replace(LLAMA, model_type='mistral', class_name='MistralForCausalLM', fixed={},
            read=read_mistral),
    replace(LLAMA, model_type='qwen2', class_name='Qwen2ForCausalLM', fixed=dict(use_sliding_window=False),
            switches=(('qk_norm', False), ('qkv_bias', True))),
    replace(LLAMA, model_type='qwen3', class_name='Qwen3ForCausalLM',
            fixed=dict(attention_bias=False, use_sliding_window=False),
            switches=(('qk_norm', True), ('qkv_bias', False))),
]


def architecture_of(config) -> Architecture:
    """Return the class that a GPTConfig amounts to."""
    for each in ARCHITECTURES:
        switches_fit = all(getattr(config, name) == value for name, value in each.switches)
        if each.arch == config.arch and switches_fit:
            return each
    raise ValueError(f'transformers has no class for arch={config.arch} with qk_norm={config.qk_norm} and '
                     f'qkv_bias={config.qkv_bias}')
