"""Checkpoints of nanoGPT and of other trainers, and the checks that every checkpoint has to pass.

    state = from_foreign(torch.load(path, weights_only=True), path, n_head=12)   # in our format
    check_state(state, path)
    load_weights(model, state['model'], path, strict=False)

A stranger's file that cannot be loaded is refused in one line. It never ends in a hang, a traceback, or a
model that computes something else.
"""

import pickletools
import re

import numpy as np
import torch

from files import print0, printable

CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # transformers' GPT-2 stores these transposed
# of DistributedDataParallel and torch.compile
PREFIXES = re.compile(r'^((module|_orig_mod)\.)+')
# causal masks and tables, which old versions of nanoGPT and transformers saved beside the weights
BUFFERS = re.compile(r'\.attn\.(bias|masked_bias)$|rotary_emb\.')

# arguments of GPTConfig and their types, wherever they are stored
MODEL_ARGS = dict.fromkeys(('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'), (int,))
MODEL_ARGS |= dict(dropout=(float, int), bias=(bool, type(None)), arch=(str,), activation=(str, type(None)))
MODEL_ARGS |= dict.fromkeys(('n_kv_head', 'head_size', 'n_hidden'), (int, type(None)))
MODEL_ARGS |= dict.fromkeys(('qk_norm', 'qkv_bias', 'tied'), (bool, type(None)))
MODEL_ARGS |= dict(rope_theta=(float, int), rope_scaling=(dict, type(None)), norm_eps=(float, type(None)))
# other parts of a checkpoint and their types; None = the part may be absent
PARTS = dict.fromkeys(('config', 'optimizer', 'scaler', 'tokenizer'), (dict, type(None)))
PARTS |= dict(iter_num=(int,), best_val_loss=(float, int, type(None)), style=(str, type(None)))

MAX_LEAVES = 10_000  # of one tuple in a pickle


# -----------------------------------------------------------------------------
# other trainers' dicts


def from_foreign(state: dict, path, n_head: int | None = None) -> dict:
    """Convert the checkpoint of nanoGPT or another trainer to our format.

    state   nanoGPT's dict, or a dict of weights: bare, or under model, model_state_dict or state_dict
    n_head  for a file that does not say it: the shapes of weights do not show heads
    raises  ValueError for a dict that is no checkpoint of GPT-2
    """
    keys = ('model', 'model_state_dict', 'state_dict')
    stored = next((state[key] for key in keys if isinstance(state.get(key), dict)), state)
    if not stored or not is_weights(stored):
        raise ValueError(f'{path} has no weights by name, itself or under '
                         'model, model_state_dict or state_dict: it is not a checkpoint')
    weights = {}
    for name, tensor in stored.items():
        name = PREFIXES.sub('', name)
        if name in weights:
            raise ValueError(f'{path}: {name} is there twice, with and without a prefix: keep one')
        if not BUFFERS.search(name):
            weights[name] = tensor
    if 'wte.weight' in weights:  # transformers' GPT2Model, which has no head
        weights = {f'transformer.{name}': tensor for name, tensor in weights.items()}
    check_dense(weights, path)
    wte = weights.get('transformer.wte.weight')
    head = weights.get('lm_head.weight', wte)
    if wte is not None and (wte.dtype != head.dtype or not torch.equal(wte, head)):
        raise ValueError(f'{path}: lm_head.weight is not transformer.wte.weight: '
                         'GPT-2 has one matrix for both')

    args = state.get('model_args')
    if 'model' not in state or not isinstance(args, dict):
        weights, args = adopt(weights, state, path, n_head)
        return dict(model=weights, model_args=args, iter_num=0, best_val_loss=None, config={})
    # nanoGPT's own format; nanoGPT uses the exact GELU
    args = {name: value for name, value in plain(args).items() if name in MODEL_ARGS}
    args |= dict(arch='gpt2', activation='gelu')
    converted = dict(iter_num=0, best_val_loss=None) | plain(state)
    if isinstance(converted.get('config'), dict):
        converted['config'] = plain(converted['config'])
    return converted | dict(model=weights, model_args=args)


def plain(values: dict) -> dict:
    """Turn numbers of NumPy, and tensors of one element, into Python's."""
    converted = {}
    for name, value in values.items():
        is_number = isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.numel() == 1)
        converted[name] = value.item() if is_number else value
    return converted


def adopt(weights, state, path, n_head):
    """Return (weights, model_args) for weights that another trainer saved under GPT-2's names.

    Sizes come from the shapes. The number of heads comes from a dict in the file, else from n_head.
    """
    wte = weights.get('transformer.wte.weight', weights.get('lm_head.weight'))
    wpe, c_attn = weights.get('transformer.wpe.weight'), weights.get('transformer.h.0.attn.c_attn.weight')
    if any(tensor is None or tensor.dim() != 2 for tensor in (wte, wpe, c_attn)):
        raise ValueError(f"{path} does not name its weights as nanoGPT or transformers name a GPT-2's "
                         f'(transformer.wte.weight and so on, found {first(weights)}): '
                         'rename them where it was written')
    C = wte.size(1)
    weights = {**weights, 'transformer.wte.weight': wte, 'lm_head.weight': wte}
    layout, activation = 'exact GELU, as nanoGPT has it', 'gelu'
    if c_attn.shape == (C, 3 * C):
        layout, activation = 'transposed matrices and tanh GELU, as transformers has them', 'gelu_tanh'
        weights |= {name: tensor.t() for name, tensor in weights.items()
                    if name.endswith(CONV1D) and tensor.dim() == 2}

    source = '--n_head'
    for settings in state.values():
        for name in ('n_head', 'n_heads', 'num_heads', 'num_attention_heads'):
            if isinstance(settings, dict) and type(settings.get(name)) is int:
                n_head, source = settings[name], 'a setting in it'
    if n_head is None:
        raise ValueError(f'{path} does not say its number of heads, and weights do not show it: '
                         f"give --n_head ({max(C // 64, 1)} if its heads are 64 wide, as GPT-2's)")
    blocks = {name.split('.')[2] for name in weights if name.startswith('transformer.h.')}
    args = dict(arch='gpt2', activation=activation, vocab_size=wte.size(0), block_size=wpe.size(0), n_embd=C,
                n_head=n_head, n_layer=len(blocks), dropout=0.0,
                bias=any(name.endswith('.bias') for name in weights))
    print0(f'{path}: sizes from its weights, n_head = {n_head} from {source}, {layout}')
    return weights, args


# -----------------------------------------------------------------------------
# checks


def check_state(state: dict, path):
    """Refuse a checkpoint in our format with parts of a wrong type or sizes that its weights contradict."""
    weights, args = state.get('model'), state.get('model_args')
    if not is_weights(weights) or not isinstance(args, dict):
        raise ValueError(f'{path} has no model and model_args: it is not a checkpoint of flatGPT or nanoGPT')
    check_dense(weights, path)
    check_model_args(args, path, len(weights))
    # the same for 10**9 positions or tokens
    for name, size in (('transformer.wte.weight', 'vocab_size'), ('transformer.wpe.weight', 'block_size')):
        expected = (args.get(size), args.get('n_embd'))
        if name in weights and None not in expected and (shape := tuple(weights[name].shape)) != expected:
            raise ValueError(f'{path}: {name} has shape {shape}, the model expects {expected}')
    for key, accepted in PARTS.items():
        if type(state.get(key)) not in accepted:
            raise ValueError(f'{path} is not a checkpoint of flatGPT or nanoGPT: '
                             f'{key} is a {type(state.get(key)).__name__}')
    moments = (state.get('optimizer') or {}).get('state', {})
    if not isinstance(moments, dict) or not all(map(is_weights, moments.values())):
        raise ValueError(f'{path}: the state of its optimizer is not a dict of tensors for each parameter')


def check_dense(weights, path):
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise ValueError(f'{path}: {name} is {tensor.dtype}, {tensor.layout}: '
                             'accepted are dense floating-point weights')


def check_model_args(args: dict, path, n_weights: int):
    """Refuse arguments of GPTConfig that are unknown, of a wrong type, or that the weights contradict."""
    for name, value in args.items():
        if type(value) not in MODEL_ARGS.get(name, ()):
            raise ValueError(f'{path}: {name} = {value!r:.60} in its model_args is none '
                             'that this version knows')
    # a model of 10**9 layers would be built for hours before its weights turn out to be missing
    if args.get('n_layer', 1) > n_weights:
        raise ValueError(f'{path}: n_layer = {args["n_layer"]} does not fit its {n_weights} weights')


def is_weights(value) -> bool:
    """Whether a value is a dict of tensors by name."""
    if not isinstance(value, dict):
        return False
    return all(isinstance(key, str) and isinstance(element, torch.Tensor) for key, element in value.items())


def check_pickle(data: bytes, path):
    """Refuse a pickle that holds tuples such as ((a, a), (a, a)) nested so deep that reading it never ends.

    A dict hashes its keys while it is read. Hashing a tuple visits all its leaves, 2**60 of them in 60 levels
    of pairs. This function counts the leaves by following the opcodes, without building an object.
    """
    stack, memo = [], {}  # the number of leaves of each object on the unpickler's stack; None = a mark
    mark = pickletools.markobject
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if 'PUT' in opcode.name:
                memo[argument] = stack[-1]
                continue
            # take the part above the mark, and the arguments below it
            taken, n_arguments = [], len(opcode.stack_before)
            if mark in opcode.stack_before:
                n_arguments = opcode.stack_before.index(mark)
                while (n_leaves := stack.pop()) is not None:
                    taken.append(n_leaves)
            taken += [stack.pop() for _ in range(n_arguments)]
            # put the result
            n_leaves = None if opcode.name == 'MARK' else 1
            if opcode.name.startswith('TUPLE'):
                n_leaves = sum(taken)
            elif 'GET' in opcode.name:
                n_leaves = memo[argument]
            if n_leaves is not None and n_leaves > MAX_LEAVES:
                raise ValueError(f'tuples of more than {MAX_LEAVES:,} values')
            stack += [n_leaves] * len(opcode.stack_after)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        reason = f'its pickle has {error or type(error).__name__}'
        raise ValueError(f'{path} is not a readable checkpoint ({reason})') from None


# -----------------------------------------------------------------------------
# weights -> model


def load_weights(model, weights: dict, path, strict: bool = True):
    """Load weights by name into a model.

    strict  False: print which weights are missing or unexpected instead of refusing them
    raises  ValueError for another shape, for names that do not fit if strict, and if no name fits
    """
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
    expected = model.state_dict()
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
