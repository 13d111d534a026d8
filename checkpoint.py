"""Checkpoints that are never half-written, never silently wrong, and independent of what wrapped the model.

    save('out', state, keep_last_n=1)      # out/ckpt.pt, the one before it kept as out/ckpt_00001000.pt
    state = load_newest('out')             # verified; a damaged file is set aside and the next older one taken

A checkpoint is one dict of tensors and plain values in torch's zip format, loadable with weights_only=True:

    model           parameters by name, without module. or _orig_mod. prefixes
    optimizer       state and param_groups by parameter name (absent in best.pt, which holds weights only)
    scaler          the float16 loss scaler's state
    model_args      what GPTConfig takes
    iter_num        updates done
    best_val_loss, loss_ema, config (all settings), tokenizer, vocab_size (without padding), data (fingerprint), wandb_id, format
"""

import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import torch
from torch.distributed.checkpoint import state_dict as dcp

from distributed import print0

FORMAT = 1
PREFIXES = ('module.', '_orig_mod.')


# -----------------------------------------------------------------------------
# writing


def write_atomically(path, write):
    """write(f) fills the file, which appears complete under its name or not at all, whatever happens meanwhile."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.tmp{os.getpid()}')
    try:
        with open(temporary, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder):
    """Makes a rename in the folder survive a power cut, where the system lets a folder be opened (not on Windows)."""
    if os.name == 'posix':
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save(out_dir, state, keep_last_n=0, best=False):
    """Publishes state as ckpt.pt, and its weights as best.pt if they are the best so far.

    keep_last_n  how many older checkpoints stay, as ckpt_00001000.pt by their iter_num; -1 = all of them
    """
    out_dir = Path(out_dir)
    if best:
        weights = {k: v for k, v in state.items() if k not in ('optimizer', 'scaler')}
        write_atomically(out_dir / 'best.pt', lambda f: torch.save(weights, f))
    newest = out_dir / 'ckpt.pt'
    if keep_last_n and newest.exists():
        keep_under_number(newest)
    write_atomically(newest, lambda f: torch.save(state, f))
    for old in numbered(out_dir)[keep_last_n:] if keep_last_n >= 0 else []:
        old.unlink(missing_ok=True)


def keep_under_number(path):
    """A second name for ckpt.pt by its iter_num: a hard link, or a copy where the file system has none."""
    try:
        iter_num = torch.load(path, map_location='cpu', mmap=True, weights_only=True)['iter_num']
    except Exception:  # damaged or foreign: load_newest() deals with it, an older name would only hide it
        return
    kept = path.with_name(f'ckpt_{iter_num:08d}.pt')
    temporary = path.with_name(f'.{kept.name}.tmp{os.getpid()}')
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, kept)


def numbered(out_dir):
    """The older checkpoints of a folder, newest first."""
    return sorted((p for p in Path(out_dir).glob('ckpt_*.pt') if re.fullmatch(r'ckpt_\d{8,}\.pt', p.name)), reverse=True)


# -----------------------------------------------------------------------------
# reading


def load(path, n_head=None):
    """The verified checkpoint at path, in today's form; ValueError or FileNotFoundError in one line if it cannot be had.

    n_head  for a file of weights alone that does not say it: the shapes of weights do not show heads

    torch.load does not look at the checksums of its own zip format, so a flipped bit would become a weight: they are checked first.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist')
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # zipfile, pickle and torch each have their own for a file that is not what it should be
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error, pickle.UnpicklingError) and 'weights_only' in str(error):
            asked = re.search(r'GLOBAL (\S+)', str(error))
            raise ValueError(f'{path} holds more than tensors and plain values{f" ({asked[1]})" if asked else ""}, which could run code when read: '
                             'where it was written, save model.state_dict() alone') from None
        raise ValueError(f'{path} is not a readable checkpoint ({reason[0][:150]})') from None
    if damaged is not None:
        raise ValueError(f'{path} is damaged: the checksum of {damaged} does not match')
    return modernize(state, path, n_head)


def load_newest(out_dir):
    """(state, path) of the newest readable checkpoint of out_dir, or (None, None) where there is none at all.

    A damaged file is renamed to *.corrupt, said aloud, and the next older one is taken; ValueError if none is left.
    """
    candidates = [p for p in (Path(out_dir) / 'ckpt.pt', *numbered(out_dir)) if p.exists()]
    for path in candidates:
        try:
            state = load(path)
        except ValueError as error:
            aside = path.with_name(path.name + '.corrupt')
            os.replace(path, aside)
            print0(f'{error}: renamed to {aside.name}, looking for an older one')
            continue
        print0(f'checkpoint: {path} (iteration {state["iter_num"]})')
        return state, path
    if candidates:
        raise ValueError(f'{out_dir} has no readable checkpoint left: see the *.corrupt files there, or start again with --init_from=scratch')
    return None, None


def strip_prefixes(weights):
    def bare(name):
        while name.startswith(PREFIXES):
            name = name.split('.', 1)[1]
        return name
    return {bare(name): tensor for name, tensor in weights.items()}


def modernize(state, path, n_head=None):
    """A checkpoint as this file describes it, from ours, nanoGPT's, or another trainer's."""
    if not isinstance(state, dict):
        raise ValueError(f'{path} holds a {type(state).__name__}, not a checkpoint dict')
    if state.get('format', FORMAT) != FORMAT:
        raise ValueError(f'{path} has format {state["format"]}, this version reads {FORMAT}: use a newer flatGPT')
    if 'format' in state:
        if not isinstance(state.get('model'), dict) or not isinstance(state.get('model_args'), dict):
            raise ValueError(f'{path} has no model and model_args: it is not a checkpoint of flatGPT')
        return state
    weights = next((state[key] for key in ('model', 'model_state_dict', 'state_dict') if isinstance(state.get(key), dict)), state)
    weights = {k: v for k, v in strip_prefixes(weights).items() if not re.search(r'\.attn\.(masked_)?bias$', k)}  # causal masks of old files
    if not weights or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise ValueError(f'{path} has no weights by name, itself or under model, model_state_dict or state_dict: it is not a checkpoint')
    if isinstance(state.get('model_args'), dict) and 'model' in state:  # nanoGPT, which uses the exact GELU
        known = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
        args = {k: v for k, v in state['model_args'].items() if k in known} | dict(arch='gpt2', activation='gelu')
        return {**state, 'model': weights, 'model_args': args, 'iter_num': int(state.get('iter_num', 0)),
                'best_val_loss': float(state.get('best_val_loss', float('inf')))}
    weights, args = adopt(weights, state, path, n_head)
    return dict(model=weights, model_args=args, iter_num=0, config={})


def adopt(weights, state, path, n_head):
    """Weights that another trainer saved under GPT-2's names, in our layout, and their model_args, read off the shapes.

    What shapes do not show is said aloud: n_head is taken from a dict in the file, else from the argument.
    """
    if 'wte.weight' in weights:  # as transformers' GPT2Model names them
        weights = {k if k == 'lm_head.weight' else 'transformer.' + k: v for k, v in weights.items()}
    wte, wpe, c_attn = (weights.get(f'transformer.{name}.weight') for name in ('wte', 'wpe', 'h.0.attn.c_attn'))
    wte = weights.get('lm_head.weight') if wte is None else wte
    if wte is None or wpe is None or c_attn is None:
        raise ValueError(f'{path} does not name its weights as nanoGPT or transformers name a GPT-2\'s (transformer.wte.weight and so on, '
                         f'found {", ".join(sorted(weights)[:3])}): rename them where it was written')
    if not torch.equal(wte, weights.get('lm_head.weight', wte)):
        raise ValueError(f'{path}: lm_head.weight is not transformer.wte.weight: GPT-2 has one matrix for both')
    C = wte.size(1)
    weights = {'transformer.wte.weight': wte, 'lm_head.weight': wte, **weights}
    transposed = c_attn.shape == (C, 3 * C)
    if transposed:  # transformers' Conv1D
        weights = {k: v.t() if re.search(r'(c_attn|c_proj|c_fc)\.weight$', k) else v for k, v in weights.items()}
    dicts = [v for v in state.values() if isinstance(v, dict)]
    said = next((d[name] for name in ('n_head', 'n_heads', 'num_heads', 'num_attention_heads') for d in dicts if type(d.get(name)) is int), None)
    if said is None and n_head is None:
        raise ValueError(f'{path} does not say its number of heads, and weights do not show it: give --n_head '
                         f'({C // 64} if its heads are 64 wide, as GPT-2\'s)')
    args = dict(arch='gpt2', activation='gelu_tanh' if transposed else 'gelu', vocab_size=wte.size(0), block_size=wpe.size(0), n_embd=C,
                n_head=said or n_head, n_layer=len({k.split('.')[2] for k in weights if k.startswith('transformer.h.')}),
                bias=any(k.endswith('.bias') for k in weights), dropout=0.0)
    print0(f'{path}: sizes from its weights, n_head = {args["n_head"]} from {"a setting in it" if said else "--n_head"}, '
           + ('transposed matrices and tanh GELU, as transformers has them' if transposed else 'exact GELU, as nanoGPT has it'))
    return weights, args


# -----------------------------------------------------------------------------
# model and optimizers <-> plain dicts, the same for one process, DDP and FSDP2


def gather(model, optimizers):
    """{'model': …, 'optimizer': …} with whole tensors by parameter name, on the first rank; every rank takes part."""
    model_state, optimizer_state = dcp.get_state_dict(
        model, optimizers, options=dcp.StateDictOptions(full_state_dict=True, cpu_offload=True))
    return dict(model=model_state, optimizer=optimizer_state)


def scatter(state, model, optimizers):
    """Puts what gather() took back in. Rates, decay and betas stay as the optimizers have them now (optim.keep_settings)."""
    optimizer_state = state['optimizer']
    if 'format' not in state:
        optimizer_state = name_parameters(optimizer_state, model, optimizers)
    dcp.set_state_dict(model, optimizers, model_state_dict=state['model'], optim_state_dict=optimizer_state,
                       options=dcp.StateDictOptions(full_state_dict=True))


def name_parameters(optimizer_state, model, optimizers):
    """nanoGPT's optimizer state, which numbers the parameters in the order of its two groups, with their names instead."""
    names = {p: name for name, p in model.named_parameters()}
    order = [names[p] for o in optimizers for group in o.param_groups for p in group['params']]
    if len(order) != sum(len(g['params']) for g in optimizer_state['param_groups']):
        raise ValueError('the checkpoint holds another optimizer: resume it with --optimizer=adamw and --decay_groups=matrices')
    return dict(state={order[i]: s for i, s in optimizer_state['state'].items()},
                param_groups=[{**g, 'params': [order[i] for i in g['params']]} for g in optimizer_state['param_groups']])


def load_weights(model, weights, path, strict=True):
    """Loads weights by name. ValueError for one of another shape, and for names that are missing or unexpected.

    strict  False: the latter are listed instead, and what is missing stays as it is in the model
    """
    own = model.state_dict()
    for name, tensor in weights.items():
        if name in own and own[name].shape != tensor.shape:
            raise ValueError(f'{path}: {name} has shape {tuple(tensor.shape)}, the model expects {tuple(own[name].shape)}')
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if (missing or unexpected) and strict:
        raise ValueError(f'{path} does not fit the model: {len(missing)} weights missing ({", ".join(missing[:3])}), '
                         f'{len(unexpected)} unexpected ({", ".join(unexpected[:3])}); --strict=False takes those that fit')
    if missing:
        print0(f'{path}: {len(missing)} weights missing, left as a new model has them: {", ".join(missing)}')
    if unexpected:
        print0(f'{path}: {len(unexpected)} weights unexpected, not used: {", ".join(unexpected)}')
    model.load_state_dict({k: v for k, v in weights.items() if k in own}, strict=False)
