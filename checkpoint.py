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


def load(path):
    """The verified checkpoint at path, in today's form; ValueError or FileNotFoundError in one line if it cannot be had.

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
        raise ValueError(f'{path} is not a readable checkpoint ({reason[0][:150]})') from None
    if damaged is not None:
        raise ValueError(f'{path} is damaged: the checksum of {damaged} does not match')
    return modernize(state, path)


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


def modernize(state, path):
    """A checkpoint as this file describes it, from ours, nanoGPT's, or one that holds its weights under model_state_dict."""
    if not isinstance(state, dict):
        raise ValueError(f'{path} holds a {type(state).__name__}, not a checkpoint dict')
    if state.get('format', FORMAT) != FORMAT:
        raise ValueError(f'{path} has format {state["format"]}, this version reads {FORMAT}: use a newer flatGPT')
    if 'model' not in state and 'model_state_dict' in state:
        state['model'] = state.pop('model_state_dict')
    if not isinstance(state.get('model'), dict) or not isinstance(state.get('model_args'), dict):
        raise ValueError(f'{path} has no model and model_args: it is not a checkpoint of flatGPT or nanoGPT')
    if 'format' in state:
        return state
    # nanoGPT: exact GELU, prefixes of torch.compile, and in old files a causal mask per layer
    state['model'] = {k: v for k, v in strip_prefixes(state['model']).items() if not k.endswith('.attn.bias')}
    known = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
    state['model_args'] = {k: v for k, v in state['model_args'].items() if k in known} | dict(arch='gpt2', activation='gelu')
    state['iter_num'] = int(state.get('iter_num', 0))
    state['best_val_loss'] = float(state.get('best_val_loss', float('inf')))
    return state


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


def load_weights(model, weights, path):
    """Loads weights by name; ValueError naming the first that is missing, unexpected, or of another shape."""
    own = model.state_dict()
    for name, tensor in weights.items():
        if name in own and own[name].shape != tensor.shape:
            raise ValueError(f'{path}: {name} has shape {tuple(tensor.shape)}, the model expects {tuple(own[name].shape)}')
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(f'{path} does not fit the model: {len(missing)} weights missing ({", ".join(missing[:3])}), '
                         f'{len(unexpected)} unexpected ({", ".join(unexpected[:3])})')
    model.load_state_dict(weights)
