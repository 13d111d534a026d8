"""The model classes of transformers that GPT can be: their settings, names and layouts of weights."""

import re
from dataclasses import dataclass, field, replace

import torch

from model import GPTConfig
from weights.foreign import CONV1D, ROPE_SCALING, check_model_args

VOCABULARY = {'transformer.wte.weight', 'lm_head.weight'}  # a row for each token
# {their name of an activation: ours}; of two names for one activation the first is written
READ_ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu': 'gelu', 'relu2': 'relu2',
                    'gelu_pytorch_tanh': 'gelu_tanh', 'silu': 'silu', 'swish': 'silu'}
WRITTEN_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(READ_ACTIVATIONS.items())}


@dataclass(frozen=True)
class Architecture:
    """One model class of transformers."""

    arch: str  # of GPTConfig
    model_type: str  # in config.json
    class_name: str
    block: str  # prefix of the names in a block, {} = its number
    outside: dict  # our name: their names, outside the blocks
    inside: dict  # our name in a block: their names there; several = our rows are split among them
    arguments: dict  # argument of GPTConfig: its name in config.json
    dropouts: tuple  # names of dropout there
    fixed: dict  # other settings; a config.json that lacks one means the same
    switches: dict = field(default_factory=dict)  # arguments of GPTConfig that tell classes of one arch apart
    transposed: tuple = ()  # ends of our names of matrices stored as inputs x outputs
    biased: tuple = ()  # ends of our names of weights that always have a bias there

    def read(self, settings: dict, n_weights: int) -> dict:
        """Return the arguments of GPTConfig in a config.json. ValueError for a model that it cannot be."""
        for name, value in (self.fixed | {'quantization_config': None}).items():
            need(name, settings.get(name, value), [value])
        args = dict(arch=self.arch, **self.switches)
        for argument, name in self.arguments.items():
            if settings.get(name) is not None:
                args[argument] = settings[name]
        if 'activation' in args:
            need(self.arguments['activation'], args['activation'], READ_ACTIVATIONS)
            args['activation'] = READ_ACTIVATIONS[args['activation']]
        if self.arch != 'gpt2':
            for layer_type in settings.get('layer_types') or []:
                need('layer_types', layer_type, ['full_attention'])
            args = dict(norm_eps=1e-6) | args | rope_arguments(settings)
        try:
            check_model_args(args, n_weights)
            GPTConfig(**args)
        except ValueError as error:  # in the names of config.json
            message = re.sub(r'\w+', lambda word: self.arguments.get(word[0], word[0]), str(error))
            raise ValueError(message) from None
        window = settings.get('sliding_window', 4096)  # of positions; transformers' default
        if self.model_type == 'mistral' and window is not None and window < args['block_size']:
            raise ValueError(f'sliding_window = {window} is below max_position_embeddings = '
                             f'{args["block_size"]}, which is not supported: lower the second to the first')
        return args

    def write(self, config) -> dict:
        """Return the content of config.json for a GPTConfig, without the tokenizer's ids."""
        settings = dict(architectures=[self.class_name], model_type=self.model_type, **self.fixed)
        settings |= {name: getattr(config, argument) for argument, name in self.arguments.items()}
        settings[self.arguments['activation']] = WRITTEN_ACTIVATIONS[config.activation]
        settings |= dict.fromkeys(self.dropouts, config.dropout)
        if self.arch == 'gpt2':  # llama.cpp's converter reads the name in the first GPT-2 files
            return dict(settings, n_ctx=config.block_size)
        if self.model_type == 'mistral':
            settings['sliding_window'] = None
        rope = dict(rope_type='default', rope_theta=config.rope_theta)
        if config.rope_scaling:
            rope |= dict(config.rope_scaling, rope_type='llama3')
        return dict(settings, rope_parameters=rope)

    def weights_of(self, model, n_tokens: int) -> dict[str, torch.Tensor]:
        """Return the weights of a GPT by their names, with n_tokens rows in embedding and head.

        Biases that the class always has, and the model has not, are zeros.
        """
        tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for name in tensors.keys() & VOCABULARY:
            tensors[name] = tensors[name][:n_tokens]
        if not model.config.bias:
            tensors |= {name.removesuffix('weight') + 'bias': tensor.new_zeros(len(tensor))
                        for name, tensor in tensors.items() if name.endswith(self.biased)}
        return self.parts(tensors, model.config)

    def parts(self, tensors: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
        """Return views of our tensors by their names: parts of them, in their layout."""
        parts, n_kv_rows = {}, config.n_kv_head * config.head_size
        for name, tensor in tensors.items():
            number, _, inside = name.removeprefix('transformer.h.').partition('.')
            names = self.outside.get(name)
            if names is None:
                names = [self.block.format(number) + part for part in self.inside[inside]]
            if name.endswith(self.transposed):
                tensor = tensor.t()
            rows = [len(tensor) // len(names)] * len(names)
            if len(names) == 3:  # queries, keys and values
                rows = [len(tensor) - 2 * n_kv_rows, n_kv_rows, n_kv_rows]
            parts.update(zip(names, tensor.split(rows), strict=True))
        return parts


def rope_arguments(settings):
    """Return rope_theta and rope_scaling of GPTConfig for a config.json."""
    # transformers 5 writes rope_parameters, but prefers the rope_scaling of older versions
    stored = settings.get('rope_scaling') or settings.get('rope_parameters') or {}
    rope = {'rope_theta': settings.get('rope_theta', 10_000.0)} | stored
    rope_type, scaling = rope.get('rope_type', rope.get('type', 'default')), None
    need('rope_type', rope_type, ['default', 'llama3'])
    if rope_type == 'llama3':
        scaling = {name: rope.get(name) for name in ROPE_SCALING}
    return dict(rope_theta=float(rope['rope_theta']), rope_scaling=scaling)  # 1000000 and 1e6 are one model


def need(name, value, accepted):
    if value not in list(accepted):
        raise ValueError(f'{name} = {value!r} is not supported, '
                         f'accepted is {" or ".join(map(repr, accepted))}')


def same(*names):
    """Return a table of names that are ours, too, with weight and bias."""
    return {f'{name}.{kind}': [f'{name}.{kind}'] for name in names for kind in ('weight', 'bias')}


GPT2 = Architecture(
    arch='gpt2', model_type='gpt2', class_name='GPT2LMHeadModel',
    block='transformer.h.{}.',
    outside=same('transformer.wte', 'transformer.wpe', 'transformer.ln_f'),
    inside=same('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj'),
    arguments=dict(block_size='n_positions', vocab_size='vocab_size', n_layer='n_layer', n_head='n_head',
                   n_embd='n_embd', n_hidden='n_inner', activation='activation_function', bias='bias',
                   norm_eps='layer_norm_epsilon', tied='tie_word_embeddings'),
    dropouts=('attn_pdrop', 'embd_pdrop', 'resid_pdrop'),
    fixed=dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
    transposed=CONV1D, biased=(*CONV1D, 'ln_1.weight', 'ln_2.weight', 'ln_f.weight'))
LLAMA = Architecture(
    arch='llama', model_type='llama', class_name='LlamaForCausalLM',
    block='model.layers.{}.',
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
    arguments=dict(block_size='max_position_embeddings', vocab_size='vocab_size', n_layer='num_hidden_layers',
                   n_head='num_attention_heads', n_kv_head='num_key_value_heads', head_size='head_dim',
                   n_embd='hidden_size', n_hidden='intermediate_size', activation='hidden_act',
                   norm_eps='rms_norm_eps', tied='tie_word_embeddings'),
    dropouts=('attention_dropout',), fixed=dict(attention_bias=False, mlp_bias=False),
    switches=dict(qk_norm=False, qkv_bias=False))
NANOCHAT = replace(
    LLAMA, arch='modern', model_type='nanochat', class_name='NanoChatForCausalLM', switches={},
    inside=LLAMA.inside | {'mlp.c_fc.weight': ['mlp.fc1.weight'], 'mlp.c_proj.weight': ['mlp.fc2.weight']},
    fixed=dict(final_logit_softcapping=15.0, attention_bias=False))
ARCHITECTURES = [
    GPT2,
    NANOCHAT,
    LLAMA,
    replace(LLAMA, model_type='mistral', class_name='MistralForCausalLM', fixed={}),
    replace(LLAMA, model_type='qwen2', class_name='Qwen2ForCausalLM', fixed=dict(use_sliding_window=False),
            switches=dict(qk_norm=False, qkv_bias=True)),
    replace(LLAMA, model_type='qwen3', class_name='Qwen3ForCausalLM',
            fixed=dict(attention_bias=False, use_sliding_window=False),
            switches=dict(qk_norm=True, qkv_bias=False)),
]


def architecture_of(config) -> Architecture:
    """Return the class that matches a GPTConfig."""
    for each in ARCHITECTURES:
        fits = all(getattr(config, name) == value for name, value in each.switches.items())
        if each is LLAMA and config.n_embd % config.n_head:  # refused by transformers, but not in Mistral
            fits = False
        if each.arch == config.arch and fits:
            return each
    raise ValueError(f'transformers has no class for arch={config.arch} with qk_norm={config.qk_norm} and '
                     f'qkv_bias={config.qkv_bias}')
