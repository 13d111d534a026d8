"""The model classes of transformers that GPT can be: settings in config.json, names and layouts of weights.

One more architecture is one more entry of ARCHITECTURES: a table {our name: their names} and two functions.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from weights.foreign import CONV1D

ACTIVATION_NAMES = {'gelu_tanh': 'gelu_new', 'gelu': 'gelu', 'relu2': 'relu2'}  # ours: transformers'
SYNONYMS = {'gelu_pytorch_tanh': 'gelu_new'}
ROPE = {'rope_theta': 10_000.0, 'rope_type': 'default'}


class ConfigReader:
    """Reads the settings of a config.json. ValueError for a value that model.py has no switch for."""

    def __init__(self, settings: dict, path):
        self.settings, self.path = settings, path

    def need(self, name, default, *accepted):
        """The value of a setting, which must be one of those accepted. True is not 1 here."""
        value = self.settings.get(name, default)
        if value not in accepted or isinstance(value, bool) != isinstance(accepted[0], bool):
            raise ValueError(f'{self.path}: {name} = {value!r} is not supported, '
                             f'accepted is {" or ".join(map(repr, accepted))}')
        return value

    def count(self, name, default):
        value = self.settings.get(name, default)
        if type(value) is not int or value < 1:
            raise ValueError(f'{self.path}: {name} = {value!r} must be a whole number, 1 or more')
        return value

    def activation(self, name, default):
        value = self.need(name, default, *ACTIVATION_NAMES.values(), *SYNONYMS)
        value = SYNONYMS.get(value, value)
        return next(ours for ours, theirs in ACTIVATION_NAMES.items() if theirs == value)


@dataclass(frozen=True)
class Architecture:
    """One model class of transformers."""

    arch: str  # of GPTConfig
    class_name: str
    prefix: str  # of all names but the head's; a file saved without the head has none
    block: str  # what stands before the names in a block, {} = its number
    outside: dict  # our name: their names, outside the blocks
    inside: dict  # our name in a block: their names there; several = split our rows among them
    fixed: dict  # settings that model.py has no switch for; a config.json that lacks one means the same
    read: Callable  # ConfigReader -> arguments of GPTConfig
    write: Callable  # GPTConfig -> settings
    transposed: tuple = ()  # ends of our names of matrices that are stored as inputs x outputs
    split: Callable = lambda config, tensor, n: tensor.chunk(n)  # our rows, for n weights of theirs
    fits: Callable = lambda config: True  # GPTConfig of this arch -> whether this class has its switches
    biased: re.Pattern | None = None  # our weights that always have a bias there: zeros if ours have none

    def parts(self, name: str, tensor: torch.Tensor, config) -> list[tuple[str, torch.Tensor]]:
        """Return their names of our weight, each with a view of its part of the tensor, in their layout."""
        match = re.fullmatch(r'transformer\.h\.(\d+)\.(.+)', name)
        if match is None:
            names = self.outside[name]
        else:
            names = [self.block.format(match[1]) + part for part in self.inside[match[2]]]
        if name.endswith(self.transposed):
            tensor = tensor.t()
        views = [tensor] if len(names) == 1 else self.split(config, tensor, len(names))
        return list(zip(names, views, strict=True))


def read_gpt2(config):
    C = config.count('n_embd', 768)
    config.need('n_inner', None, None, 4 * C)
    return dict(block_size=config.count('n_positions', 1024), vocab_size=config.count('vocab_size', 50257),
                n_layer=config.count('n_layer', 12), n_head=config.count('n_head', 12), n_embd=C,
                bias=config.settings.get('bias', True) is not False,
                activation=config.activation('activation_function', 'gelu_new'))


def write_gpt2(c):
    # llama.cpp's converter reads n_ctx, the name of n_positions in the first GPT-2 files
    return dict(n_positions=c.block_size, n_ctx=c.block_size, n_embd=c.n_embd, n_inner=None,
                n_layer=c.n_layer, n_head=c.n_head, bias=c.bias,
                activation_function=ACTIVATION_NAMES[c.activation],
                attn_pdrop=c.dropout, embd_pdrop=c.dropout, resid_pdrop=c.dropout)


def read_nanochat(config):
    C, H = config.count('hidden_size', 768), config.count('num_attention_heads', 6)
    config.need('num_key_value_heads', None, None, H)
    config.need('intermediate_size', 8192, 4 * C)
    config.need('head_dim', None, None, C // H)
    # transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling
    stored = config.settings.get('rope_parameters') or config.settings.get('rope_scaling') or {}
    if not isinstance(stored, dict):
        stored = {'rope_type': stored}
    rope = ROPE | {'rope_theta': config.settings.get('rope_theta', ROPE['rope_theta'])} | stored
    if rope != ROPE:
        raise ValueError(f'{config.path}: rope_parameters = {rope} are not supported, '
                         'accepted is rope_theta 10000 of rope_type default')
    return dict(block_size=config.count('max_position_embeddings', 2048), n_embd=C, n_head=H, bias=False,
                vocab_size=config.count('vocab_size', 50304), n_layer=config.count('num_hidden_layers', 12),
                activation=config.activation('hidden_act', 'relu2'))


def write_nanochat(c):
    return dict(max_position_embeddings=c.block_size, hidden_size=c.n_embd, intermediate_size=4 * c.n_embd,
                num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_head,
                hidden_act=ACTIVATION_NAMES[c.activation], attention_dropout=c.dropout, rope_parameters=ROPE)


def same(*names):
    """A table for names that are ours, too, with weight and bias."""
    return {f'{name}.{kind}': [f'{name}.{kind}'] for name in names for kind in ('weight', 'bias')}


# by model_type in config.json
ARCHITECTURES = {
    'gpt2': Architecture(
        arch='gpt2', class_name='GPT2LMHeadModel', prefix='transformer.', block='transformer.h.{}.',
        outside=same('transformer.wte', 'transformer.wpe', 'transformer.ln_f'),
        inside=same('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj'),
        fixed=dict(layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
                   add_cross_attention=False, tie_word_embeddings=True),
        read=read_gpt2, write=write_gpt2, transposed=CONV1D,
        biased=re.compile(r'(ln_[12f]|c_attn|c_proj|c_fc)\.weight$')),
    'nanochat': Architecture(
        arch='modern', class_name='NanoChatForCausalLM', prefix='model.', block='model.layers.{}.',
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
}


def model_type_of(config) -> str:
    """Return the model_type of the class that a GPTConfig amounts to."""
    for name, architecture in ARCHITECTURES.items():
        if architecture.arch == config.arch and architecture.fits(config):
            return name
    raise ValueError(f'arch={config.arch} has no model class in transformers')
