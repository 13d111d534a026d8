"""Checkpoints of nanoGPT and of other trainers, and the checks that every checkpoint has to pass.

A file that cannot be loaded is refused in one line. It never ends in a hang, a traceback, or a model that
computes something else.
"""

import pickletools
import re
import typing

import torch

from files import one_line, print0, printable
from model import GPTConfig
from weights.lora import trained_weights

CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # transformers' GPT-2 stores these transposed
# of DistributedDataParallel and torch.compile
PREFIXES = re.compile(r'^((module|_orig_mod)\.)+')
# causal masks and tables, which old versions of nanoGPT and transformers saved beside the weights
BUFFERS = re.compile(r'\.attn\.(bias|masked_bias)$|rotary_emb\.')
ROPE_SCALING = 'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'
# parts of a checkpoint and their types
PARTS = dict(model=dict, model_args=dict, iter_num=int, best_val_loss=float | int | None, style=str | None)
PARTS |= dict.fromkeys(('config', 'optimizer', 'scaler', 'tokenizer', 'lora', 'position'), dict | None)
PARTS |= dict(history=list | None, since_best=int | None, wandb_id=str | None)
SIZES = {'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'}  # in the model_args of any model
N_HEAD_NAMES = 'n_head', 'n_heads', 'num_heads', 'num_attention_heads'
LORA = dict(base=str, lora_rank=int, lora_alpha=float, lora_targets=str, checksum=int)
MAX_LEAVES = 10_000  # of one tuple in a pickle


# -----------------------------------------------------------------------------
# other trainers' dicts


def from_foreign(state: dict, path, n_head: int | None = None) -> dict:
    """Convert the checkpoint of nanoGPT or another trainer to our format. Sizes come from the weights.

    state   nanoGPT's dict, or a dict of weights: bare, or under model, model_state_dict or state_dict
    n_head  for a file that does not say it
    """
    keys = ('model', 'model_state_dict', 'state_dict')
    stored = next((state[key] for key in keys if isinstance(state.get(key), dict)), state)
    weights = {}
    for name, tensor in stored.items():
        name = PREFIXES.sub('', str(name))
        if name in weights:
            raise ValueError(f'{path}: {name} is there twice, with and without a prefix: keep one')
        if isinstance(tensor, torch.Tensor) and not BUFFERS.search(name):
            weights[name] = tensor
    if not weights:
        raise ValueError(f'{path} has no weights by name, itself or under {", ".join(keys)}')
    if 'wte.weight' in weights:  # transformers' GPT2Model, which has no head
        weights = {f'transformer.{name}': tensor for name, tensor in weights.items()}
    check_dense(weights, path)
    weights, args = as_gpt2(weights, path)

    # the number of heads: nanoGPT's model_args come before its config, which may hold an unused default
    dicts = [value for value in state.values() if isinstance(value, dict)]
    numbers = [settings[name] for settings in dicts for name in N_HEAD_NAMES if name in settings]
    args['n_head'] = python_value([*numbers, n_head][0])
    if args['n_head'] is None:
        raise ValueError(f'{path} does not say its number of heads, and weights do not show it: '
                         'give --n_head')
    print0(f'{path}: sizes from its weights, n_head = {args["n_head"]}, activation = {args["activation"]}')

    converted = dict(iter_num=0, best_val_loss=None, config={})
    if 'model' in state and 'model_args' in state:  # nanoGPT's own, which can be resumed
        converted |= {name: python_value(value) for name, value in state.items()}
    return converted | dict(model=weights, model_args=args)


def python_value(value):
    """Turn a number of NumPy, or a tensor without dimensions, into Python's."""
    return value.item() if getattr(value, 'ndim', None) == 0 else value


def as_gpt2(weights, path):
    """Return (weights, model_args but for n_head) of weights that have GPT-2's names."""
    wte = weights.get('transformer.wte.weight', weights.get('lm_head.weight'))
    wpe, c_attn = weights.get('transformer.wpe.weight'), weights.get('transformer.h.0.attn.c_attn.weight')
    if any(tensor is None or tensor.dim() != 2 for tensor in (wte, wpe, c_attn)):
        raise ValueError(f"{path}: its weights ({first(weights)}) lack GPT-2's names, "
                         'transformer.wte.weight and so on: rename them where it was written')
    head = weights.get('lm_head.weight', wte)
    if wte.dtype != head.dtype or not torch.equal(wte, head):
        raise ValueError(f'{path}: lm_head.weight is not transformer.wte.weight: '
                         'GPT-2 has one matrix for both')
    C, activation = wte.size(1), 'gelu'  # nanoGPT uses the exact one
    weights = {**weights, 'transformer.wte.weight': wte, 'lm_head.weight': wte}
    if c_attn.shape == (C, 3 * C):  # transformers' layout, and its tanh GELU
        activation = 'gelu_tanh'
        weights |= {name: tensor.t() for name, tensor in weights.items()
                    if name.endswith(CONV1D) and tensor.dim() == 2}
    blocks = {name.split('.')[2] for name in weights if name.startswith('transformer.h.')}
    return weights, dict(arch='gpt2', activation=activation, vocab_size=wte.size(0), block_size=wpe.size(0),
                         n_embd=C, n_layer=len(blocks), dropout=0.0,
                         bias=any(name.endswith('.bias') for name in weights))


# -----------------------------------------------------------------------------
# checks


def check_state(state: dict, path):
    """Refuse a checkpoint with parts of a wrong type, or sizes that its weights contradict."""
    for key, accepted in PARTS.items():
        if not isinstance(state.get(key), accepted):
            raise ValueError(f'{path} is not a checkpoint of flatGPT or nanoGPT: '
                             f'{key} is a {type(state.get(key)).__name__}')
    adapter = state.get('lora')
    if adapter and {name: type(value) for name, value in adapter.items()} != LORA:
        raise ValueError(f'{path}: its adapter is {adapter!r:.100}, accepted are {", ".join(LORA)}')
    args, weights = state['model_args'], state['model']
    check_dense(weights, path)
    with one_line(path):
        check_model_args(args, len(weights))
    # 10**9 tokens or positions would be allocated before their weights turn out to be missing
    for name, size in (('transformer.wte.weight', 'vocab_size'), ('transformer.wpe.weight', 'block_size')):
        expected = args[size], args['n_embd']
        if name in weights and (shape := tuple(weights[name].shape)) != expected:
            raise ValueError(f'{path}: {name} has shape {shape}, its model_args say {expected}')
    try:
        moments = (state.get('optimizer') or {}).get('state', {})
        is_sound = all(isinstance(each, torch.Tensor) for own in moments.values() for each in own.values())
    except AttributeError:
        is_sound = False
    if not is_sound:
        raise ValueError(f'{path}: the state of its optimizer is not a dict of tensors for each parameter')
    history = state.get('history') or [0.0] * 5
    if len(history) != 5 or not all(isinstance(value, float | int) for value in history):
        raise ValueError(f'{path}: its history is {history!r:.60}, accepted are five numbers')


def check_dense(weights, path):
    for name, tensor in weights.items():
        description = type(tensor).__name__
        if isinstance(name, str) and isinstance(tensor, torch.Tensor):
            if tensor.is_floating_point() and tensor.layout == torch.strided:
                continue
            description = f'{tensor.dtype}, {tensor.layout}'
        raise ValueError(f'{path}: {name} is {description}: accepted are dense floating-point weights')


def check_model_args(args: dict, n_weights: int):
    """Refuse arguments of GPTConfig that are unknown, of a wrong type, or that the weights contradict."""
    hints = typing.get_type_hints(GPTConfig)
    for name, value in args.items():
        hint = hints.get(name, ())
        types = typing.get_args(hint) or (hint,)
        is_whole_float = float in types and type(value) is int
        if type(value) not in types and not is_whole_float:
            raise ValueError(f'{name} = {value!r:.60} is none that this version knows')
    numbers = {name: args[name] for name in ('rope_theta', 'norm_eps') if args.get(name) is not None}
    if args.get('rope_scaling') is not None:
        numbers |= {f'{name} of rope_scaling': args['rope_scaling'].get(name) for name in ROPE_SCALING}
    for name, number in numbers.items():
        if type(number) not in (int, float) or not 0 < number < 1e30:
            raise ValueError(f'{name} = {number!r:.60}, accepted is a number above 0')
    if missing := SIZES - args.keys():
        raise ValueError(f'{min(missing)} is missing')
    # a model of 10**9 layers would be built for hours before its weights turn out to be missing
    if args['n_layer'] > n_weights:
        raise ValueError(f'n_layer = {args["n_layer"]} does not fit its {n_weights} weights')


def check_pickle(data: bytes, path):
    """Refuse a pickle of tuples such as ((a, a), (a, a)) nested so deep that reading it never ends.

    Hashing a tuple, as a key of a dict, visits all its leaves, 2**60 in 60 levels of pairs. This function
    counts them by following the opcodes.
    """
    stack, memo = [], {}  # the number of leaves of each object on the unpickler's stack; None = a mark
    with one_line(f'{path} is not a readable checkpoint, in its pickle'):
        for opcode, argument, _ in pickletools.genops(data):
            if 'PUT' in opcode.name:
                memo[argument] = stack[-1]
            elif 'GET' in opcode.name:
                stack.append(memo[argument])
            elif opcode.name == 'MARK':
                stack.append(None)
            else:
                taken = list(opcode.stack_before)  # for each of them pop one, for a mark all above it
                n_leaves = 0
                if pickletools.markobject in taken:
                    del taken[taken.index(pickletools.markobject):]
                    while (leaves := stack.pop()) is not None:
                        n_leaves += leaves
                n_leaves += sum(stack.pop() for _ in taken)
                if not opcode.name.startswith('TUPLE'):
                    n_leaves = 1
                if n_leaves > MAX_LEAVES:
                    raise ValueError(f'tuples of more than {MAX_LEAVES:,} values')
                stack += [n_leaves] * len(opcode.stack_after)


# -----------------------------------------------------------------------------
# weights -> model


def load_weights(model, weights: dict, path, strict: bool = True):
    """Load weights by name into a model. strict=False prints the names that do not fit, unless none fits."""
    missing, unexpected = check_weights(model, weights, path, strict, '; --strict=False takes those that fit')
    if len(unexpected) == len(weights):
        raise ValueError(f'{path}: no weight fits the model, which has {first(missing)}; '
                         f'the file has {first(unexpected)}: it belongs to another model')
    if missing:
        print0(f'{path}: {len(missing)} weights missing, left as a new model has them: {", ".join(missing)}')
    if unexpected:
        print0(f'{path}: {len(unexpected)} weights unexpected, not used: {printable(", ".join(unexpected))}')
    model.load_state_dict(weights, strict=False)


def check_weights(model, weights: dict, path, strict: bool = True, remedy: str = ''):
    """Return the names that weights lack and those that the model lacks. If strict, any is a ValueError."""
    expected = trained_weights(model)
    for name, tensor in weights.items():
        if name in expected:
            check_shape(name, tensor, expected[name], path)
    return check_names(expected, weights, path, strict, remedy)


def check_names(expected, stored, path, strict: bool = True, remedy: str = ''):
    missing, unexpected = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if strict and (missing or unexpected):
        raise ValueError(f'{path} does not fit the model: {len(missing)} weights missing ({first(missing)}), '
                         f'{len(unexpected)} unexpected ({first(unexpected)}){remedy}')
    return missing, unexpected


def check_shape(name, stored, expected, path):
    if stored.shape != expected.shape:
        raise ValueError(f'{path}: {name} has shape {tuple(stored.shape)}, '
                         f'the model expects {tuple(expected.shape)}')


def first(names):
    return ', '.join(sorted(names)[:3])
