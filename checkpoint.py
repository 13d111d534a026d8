"""Checkpoints that are never half-written, never silently wrong, and independent of what wrapped the model.

    save('out', state, keep_last_n=1)      # out/ckpt.pt, the one before it kept as out/ckpt_00001000.pt
    state = load_newest('out')             # verified; a damaged file is set aside and the next older one taken

A checkpoint is one dict of tensors and plain values in torch's zip format, loadable with weights_only=True:

    model           parameters by name, without module. or _orig_mod. prefixes
    optimizer       state and param_groups by parameter name (absent in best.pt, which holds weights only)
    scaler          the float16 loss scaler's state
    model_args      what GPTConfig takes
    iter_num        updates done
    run_id          the run that wrote it: a folder's checkpoints are one run's, each an earlier state of the next
    history         what optim.judge remembers: steps skipped and taken, running means
    to_evaluate     whether the run was stopped where an evaluation was due, which the resumed run then does
    best_val_loss, config (all settings), tokenizer, vocab_size (without padding), data (fingerprint), format, and what train.py adds
"""

import os
import re
import shutil
import zipfile
import zlib
from pathlib import Path

import torch
from torch.distributed.checkpoint import state_dict as dcp

from files import print0, write_atomically

FORMAT = 1
MODEL_ARGS = dict.fromkeys(('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'), int) | dict(
    dropout=float | int, bias=bool | None, arch=str, activation=str | None)  # what GPTConfig takes
PREFIXES = ('module.', '_orig_mod.')


# -----------------------------------------------------------------------------
# writing


def save(out_dir, state, keep_last_n=0, best=False):
    """Publishes state as ckpt.pt, and its weights as best.pt if they are the best so far.

    keep_last_n  how many older checkpoints stay, as ckpt_00001000.pt by their iter_num; -1 = all of them
    raises       OSError, a full disk say: ckpt.pt and the older ones are as they were
    """
    out_dir = Path(out_dir)
    for leftover in out_dir.glob('.*.pt.tmp*'):  # of a process that was killed while it wrote
        leftover.unlink(missing_ok=True)
    if keep_last_n or numbered(out_dir):
        make_way(out_dir, state, keep_last_n != 0)
    if best:
        weights = {k: v for k, v in state.items() if k not in ('optimizer', 'scaler')}
        write_atomically(out_dir / 'best.pt', lambda f: write_zip(weights, f))
    write_atomically(out_dir / 'ckpt.pt', lambda f: write_zip(state, f))
    for old in numbered(out_dir)[keep_last_n:] if keep_last_n >= 0 else []:
        old.unlink(missing_ok=True)


def write_zip(state, f):
    """torch.save, and the checksum of the whole file at its end, as the zip's comment: the zip's own leave its headers and directory out."""
    try:
        torch.save(state, f)
    except RuntimeError as error:  # torch's own words for a file that did not take what was written hide the reason
        raise error.__context__ if isinstance(error.__context__, OSError) else error
    ending = seal(f, f.tell() - 2)
    f.seek(-2, os.SEEK_END)  # the length of a comment, 0 so far
    f.write(ending)


def seal(f, size):
    """What ends a zip file behind its first size bytes: the length of a comment, and the comment."""
    crc, step = 0, 1 << 24
    f.seek(0)
    for start in range(0, size, step):
        crc = zlib.crc32(f.read(min(step, size - start)), crc)
    comment = b'crc32 %08x' % crc
    return len(comment).to_bytes(2, 'little') + comment


def make_way(out_dir, state, keep):
    """Gives the present ckpt.pt its number as a second name, since its first is about to become the name of state.

    What is not an earlier state of the same run (another run was here, or this one went back) gets .old behind its name: resuming
    and pruning go by numbers, which say nothing between runs. A damaged file gets no second name, and so pushes no good one out.
    """
    newest, before = out_dir / 'ckpt.pt', None
    for path in candidates(out_dir):  # the first that can be read tells whose they all are
        try:
            before = modernize(read(path, mmap=True), path)
            break
        except ValueError as error:
            print0(f'{error}: not kept as an older checkpoint')
    same_run = before is not None and before.get('run_id') == state.get('run_id')
    for old in numbered(out_dir):
        if not same_run or number(old) >= state['iter_num']:
            aside = old.with_name(old.name + '.old')
            os.replace(old, aside)
            print0(f'{old} is no earlier state of this run: renamed to {aside.name}')
    if keep and before is not None and path == newest and not (same_run and before['iter_num'] == state['iter_num']):
        earlier = same_run and before['iter_num'] < state['iter_num']
        add_name(newest, out_dir / f'ckpt_{before["iter_num"]:08d}.pt{"" if earlier else ".old"}')


def set_aside(out_dir):
    """Renames the checkpoints that another run left in out_dir to *.old, so that a run from scratch is never resumed as that one."""
    out_dir = Path(out_dir)
    # ckpt.pt is the last: until then the other run is as it was
    found = [path for path in (out_dir / 'best.pt', *reversed(numbered(out_dir)), out_dir / 'ckpt.pt') if path.is_file()]
    for path in found:
        os.replace(path, path.with_name(path.name + '.old'))
    if found:
        print0(f'{out_dir}: {", ".join(path.name for path in found)} of the run before renamed to *.old')


def add_name(path, name):
    """A second name for a file: a hard link, or a copy where the file system has none."""
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:
        with open(path, 'rb') as source:
            write_atomically(name, lambda f: shutil.copyfileobj(source, f))


def numbered(out_dir):
    """The older checkpoints of a folder, newest first."""
    return sorted((p for p in Path(out_dir).glob('ckpt_*.pt') if re.fullmatch(r'ckpt_\d{8,}\.pt', p.name)), key=number, reverse=True)


def number(path):
    return int(path.stem[len('ckpt_'):])


def candidates(out_dir):
    """What resuming may take, in the order in which it tries."""
    return [p for p in (Path(out_dir) / 'ckpt.pt', *numbered(out_dir)) if p.is_file()]


# -----------------------------------------------------------------------------
# reading


def load(path, n_head=None):
    """The verified checkpoint at path, in today's form; ValueError or FileNotFoundError in one line if it cannot be had.

    n_head  for a file of weights alone that does not say it: the shapes of weights do not show heads
    """
    return modernize(read(path), path, n_head)


def read(path, mmap=False):
    """What was saved at path, verified.

    mmap    map the tensors instead of reading them, for a look at the rest
    raises  FileNotFoundError, ValueError for a damaged file or one that holds more than tensors and plain values
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} is a folder, a checkpoint is a file such as ckpt.pt' if path.is_dir() else f'{path} does not exist')
    with open(path, 'rb') as f:  # an OSError here is not the file's fault
        try:
            damage = find_damage(f)
            state = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap) if damage is None else None
        except MemoryError:
            raise
        except Exception as error:  # zipfile, pickle and torch each have their own for a file that is not what it should be
            raise ValueError(f'{path} is not a readable checkpoint ({reason(error)})') from None
    if damage is not None:
        raise ValueError(f'{path} is damaged: {damage}')
    return state


def find_damage(f):
    """What is wrong with the bytes of an open checkpoint, or None. torch.load does not look at the checksums of its zip format, so
    a flipped bit would become a weight. One bit in the directory makes a record a folder, which torch.load reads as nothing at all
    and leaves the memory of its tensor as it was."""
    with zipfile.ZipFile(f) as archive:
        for record in archive.infolist():
            if record.external_attr:
                return f'the attributes of {record.filename} are {record.external_attr:#x}, expected 0'
        size = f.seek(-2 - len(archive.comment), os.SEEK_END)
        ending = f.read()
        if ending != b'\0\0':  # no comment at all; a comment that was cut off leaves its length
            return None if ending == seal(f, size) else 'the checksum of the file does not match'
        damaged = archive.testzip()  # of another trainer, or an older version
        return None if damaged is None else f'the checksum of {damaged} does not match'


def reason(error):
    """The part of an error of zipfile or torch.load that tells something, in one line."""
    words = ' '.join(str(error).split()).rpartition('WeightsUnpickler error: ')[2] or type(error).__name__
    name = re.search(r'GLOBAL (\S+)', words)
    return f'it asks for {name[1]}, and only tensors and plain values are read' if name else words[:150]


def load_newest(out_dir):
    """(state, path) of the newest readable checkpoint of out_dir, or (None, None) where there is none at all.

    A damaged file is renamed to *.corrupt, said aloud, and the next older one is taken; ValueError if none is left, or if the
    newest is sound but no checkpoint of ours.
    """
    for path in candidates(out_dir):
        try:
            state = read(path)
        except ValueError as error:
            aside = path.with_name(path.name + '.corrupt')
            os.replace(path, aside)
            print0(f'{error}: renamed to {aside.name}, looking for an older one')
            continue
        state = modernize(state, path)
        print0(f'checkpoint: {path} (iteration {state["iter_num"]})')
        return state, path
    if any(Path(out_dir).glob('ckpt*.pt.corrupt')):  # also the next time: a run that resumes by itself must not begin again unasked
        raise ValueError(f'{out_dir} has no readable checkpoint left: see the *.corrupt files there, or start again with another --out_dir')
    return None, None


def strip_prefixes(weights):
    def bare(name):
        while name.startswith(PREFIXES):
            name = name.split('.', 1)[1]
        return name
    stripped = {bare(name): tensor for name, tensor in weights.items()}
    if len(stripped) != len(weights):
        raise ValueError(f'{len(weights) - len(stripped)} weights stand there twice, with a prefix such as module. and without: keep one of each')
    return stripped


def modernize(state, path, n_head=None):
    """A checkpoint as this file describes it, from ours, nanoGPT's, or another trainer's."""
    if not isinstance(state, dict):
        raise ValueError(f'{path} holds a {type(state).__name__}, not a checkpoint dict')
    if type(state.get('format', FORMAT)) is not int or state.get('format', FORMAT) != FORMAT:
        raise ValueError(f'{path} has format {state["format"]}, this version reads {FORMAT}: use a newer flatGPT')
    if 'format' not in state:
        state = of_another_trainer(state, path, n_head)
    if not is_weights(state.get('model')) or not isinstance(state.get('model_args'), dict):
        raise ValueError(f'{path} has no model and model_args: it is not a checkpoint of flatGPT or nanoGPT')
    for name, tensor in state['model'].items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise ValueError(f'{path}: {name} is {tensor.dtype}, {tensor.layout}: accepted are dense floating-point weights')
    for name, value in state['model_args'].items():
        if not isinstance(value, MODEL_ARGS.get(name, ())):
            raise ValueError(f'{path}: {name} = {value!r} in its model_args is none that this version knows')
    for key, kind in (('iter_num', int), ('best_val_loss', float | int | None), ('config', dict | None), ('optimizer', dict | None)):
        if not isinstance(state.get(key), kind):
            raise ValueError(f'{path} is not a checkpoint of flatGPT or nanoGPT: {key} is a {type(state.get(key)).__name__}')
    return state | dict(config=state.get('config') or {})


def of_another_trainer(state, path, n_head):
    """A checkpoint from nanoGPT's dict, or from weights in any dict, under any prefix: model_state_dict, state_dict, or bare."""
    weights = next((state[key] for key in ('model', 'model_state_dict', 'state_dict') if isinstance(state.get(key), dict)), state)
    if not weights or not is_weights(weights):
        raise ValueError(f'{path} has no weights by name, itself or under model, model_state_dict or state_dict: it is not a checkpoint')
    weights = {k: v for k, v in strip_prefixes(weights).items() if not re.search(r'\.attn\.(masked_)?bias$', k)}  # causal masks of old files
    args = state.get('model_args')
    if 'model' not in state or not isinstance(args, dict):
        weights, args = adopt(weights, state, path, n_head)
        return dict(model=weights, model_args=args, iter_num=0, best_val_loss=None, config={})
    # nanoGPT, which uses the exact GELU
    known = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
    args = {k: v for k, v in args.items() if k in known} | dict(arch='gpt2', activation='gelu')
    loss = state.get('best_val_loss', float('inf'))
    loss = loss.item() if isinstance(loss, torch.Tensor) and loss.numel() == 1 else loss
    return dict(iter_num=0, config={}) | state | dict(model=weights, model_args=args, best_val_loss=loss)


def adopt(weights, state, path, n_head):
    """Weights that another trainer saved under GPT-2's names, in our layout, and their model_args, read off the shapes.

    What shapes do not show is said aloud: n_head is taken from a dict in the file, else from the argument.
    """
    if 'wte.weight' in weights:  # as transformers' GPT2Model names them
        weights = {k if k == 'lm_head.weight' else 'transformer.' + k: v for k, v in weights.items()}
    wte, wpe, c_attn = (weights.get(f'transformer.{name}.weight') for name in ('wte', 'wpe', 'h.0.attn.c_attn'))
    wte = weights.get('lm_head.weight') if wte is None else wte
    if any(tensor is None or tensor.dim() != 2 for tensor in (wte, wpe, c_attn)):
        raise ValueError(f'{path} does not name its weights as nanoGPT or transformers name a GPT-2\'s (transformer.wte.weight and so on, '
                         f'found {", ".join(sorted(weights)[:3])}): rename them where it was written')
    if not torch.equal(wte, weights.get('lm_head.weight', wte)):
        raise ValueError(f'{path}: lm_head.weight is not transformer.wte.weight: GPT-2 has one matrix for both')
    C = wte.size(1)
    weights = {'transformer.wte.weight': wte, 'lm_head.weight': wte, **weights}
    transposed = c_attn.shape == (C, 3 * C)
    if transposed:  # transformers' Conv1D
        weights = {k: v.t() if re.search(r'(c_attn|c_proj|c_fc)\.weight$', k) and v.dim() == 2 else v for k, v in weights.items()}
    dicts = [v for v in state.values() if isinstance(v, dict)]
    said = next((d[name] for name in ('n_head', 'n_heads', 'num_heads', 'num_attention_heads') for d in dicts if type(d.get(name)) is int), None)
    if said is None and n_head is None:
        raise ValueError(f'{path} does not say its number of heads, and weights do not show it: give --n_head '
                         f'({max(C // 64, 1)} if its heads are 64 wide, as GPT-2\'s)')
    args = dict(arch='gpt2', activation='gelu_tanh' if transposed else 'gelu', vocab_size=wte.size(0), block_size=wpe.size(0), n_embd=C,
                n_head=said or n_head, n_layer=len({k.split('.')[2] for k in weights if k.startswith('transformer.h.')}),
                bias=any(k.endswith('.bias') for k in weights), dropout=0.0)
    print0(f'{path}: sizes from its weights, n_head = {args["n_head"]} from {"a setting in it" if said else "--n_head"}, '
           + ('transposed matrices and tanh GELU, as transformers has them' if transposed else 'exact GELU, as nanoGPT has it'))
    return weights, args


def is_weights(value):
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())


# -----------------------------------------------------------------------------
# model and optimizers <-> plain dicts, the same for one process, DDP and FSDP2


def gather(model, optimizers):
    """{'model': …, 'optimizer': …} with whole tensors by parameter name, on the first rank; every rank takes part."""
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    fresh = [optimizer for optimizer in optimizers if not optimizer.state]
    if fresh:  # what has no state yet is given one by a step at rate 0, which must not count as a step
        dcp.get_optimizer_state_dict(model, fresh)
        for steps in (moments['step'] for optimizer in fresh for moments in optimizer.state.values() if 'step' in moments):
            steps.zero_()
    model_state, optimizer_state = dcp.get_state_dict(model, optimizers, options=options)
    return dict(model=model_state, optimizer=optimizer_state)


def scatter(state, model, optimizers):
    """Puts what gather() took back in. Rates, decay and betas stay as the optimizers have them now.

    raises  ValueError where weights or moments do not fit the model
    """
    names = {p: name for name, p in model.named_parameters()}
    groups = [{**group, 'params': [names[p] for p in group['params']]} for optimizer in optimizers for group in optimizer.param_groups]
    moments = state['optimizer'].get('state', {})
    if 'format' not in state:  # nanoGPT numbers the parameters in the order of its two groups
        order = [name for group in groups for name in group['params']]
        moments = {order[i]: of_one for i, of_one in moments.items() if i in range(len(order))}
    check_weights(model, state['model'], 'the checkpoint')
    check_moments(model, moments, groups)
    dcp.set_state_dict(model, optimizers, model_state_dict=state['model'], optim_state_dict=dict(state=moments, param_groups=groups),
                       options=dcp.StateDictOptions(full_state_dict=True))


def check_moments(model, moments, groups):
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for group in groups:
        keys = {'momentum_buffer'} if 'momentum' in group else {'step', 'exp_avg', 'exp_avg_sq'}
        for name in group['params']:
            own = moments.get(name, {})
            if own.keys() != keys or any(own[key].shape != shapes[name] for key in keys - {'step'}):
                raise ValueError(f'the checkpoint has no {" and ".join(sorted(keys - {"step"}))} of {name} with shape {tuple(shapes[name])}: '
                                 'it was written with another optimizer, resume it with that one')


def load_weights(model, weights, path, strict=True):
    """Loads weights by name. ValueError for one of another shape, and for names that are missing or unexpected.

    strict  False: the latter are listed instead, and what is missing stays as it is in the model
    """
    missing, unexpected = check_weights(model, weights, path, strict, '; --strict=False takes those that fit')
    if missing:
        print0(f'{path}: {len(missing)} weights missing, left as a new model has them: {", ".join(missing)}')
    if unexpected:
        print0(f'{path}: {len(unexpected)} weights unexpected, not used: {", ".join(unexpected)}')
    model.load_state_dict({k: v for k, v in weights.items() if k not in unexpected}, strict=False)


def check_weights(model, weights, path, strict=True, remedy=''):
    """The names that weights lack and those that the model lacks, both none if strict."""
    own = model.state_dict()
    for name, tensor in weights.items():
        if name in own and own[name].shape != tensor.shape:
            raise ValueError(f'{path}: {name} has shape {tuple(tensor.shape)}, the model expects {tuple(own[name].shape)}')
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if (missing or unexpected) and strict:
        raise ValueError(f'{path} does not fit the model: {len(missing)} weights missing ({", ".join(missing[:3])}), '
                         f'{len(unexpected)} unexpected ({", ".join(unexpected[:3])}){remedy}')
    return missing, unexpected
