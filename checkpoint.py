"""Checkpoints: never half-written, never silently wrong, the same for one process, DDP and FSDP2.

    folder = CheckpointFolder('out')             # of one run, written under its lock
    folder.save(state, keep_last_n=1)            # out/ckpt.pt; its predecessor stays as out/ckpt_00001000.pt
    state, path = load_newest('out')             # verified; the next older file if the newest is damaged

A checkpoint is one dict of tensors and plain values in torch's zip format, loadable with weights_only=True:

    model         trained parameters by name
    lora          settings and base model of an adapter; None without one
    optimizer     state and param_groups by parameter name (not in best.pt)
    scaler        state of the float16 loss scaler (not in best.pt)
    model_args    arguments of GPTConfig
    config        all settings of the run
    history       optim.StepJudge.state()
    iter_num, best_val_loss, ...                  the fields of training.progress.Progress
    tokenizer, vocab_size (without padding), data (fingerprint), position, style, format
"""

import math
import os
import re
import shutil
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint import state_dict as dcp

import distributed
from files import print0, remove_leftovers, write_atomically
from weights import foreign, lora

FORMAT = 1
NUMBERED = re.compile(r'ckpt_(\d{8,})\.pt')
# the parts of a NumPy scalar, such as best_val_loss = np.float64(1.9), which weights_only=True would refuse
_SCALAR = np.float64(0).__reduce__()[0]  # under two names: NumPy 2's and NumPy 1's
NUMPY_SCALARS = [(_SCALAR, 'numpy.core.multiarray.scalar'), (_SCALAR, 'numpy._core.multiarray.scalar')]
NUMPY_SCALARS += [np.dtype, *(type(np.dtype(kind)) for kind in 'bBhHiIlLefd?')]


# -----------------------------------------------------------------------------
# writing


class CheckpointFolder:
    """The checkpoint files of the run that holds the lock of out_dir.

    resumed_from, iter_num  the checkpoint that the run was resumed from; '' = it was not
    """

    def __init__(self, out_dir, resumed_from='', iter_num=0):
        self.out_dir = Path(out_dir)
        self.newest, self.best = self.out_dir / 'ckpt.pt', self.out_dir / 'best.pt'
        resumed_from = Path(resumed_from)
        is_own = resumed_from.parent.resolve() == self.out_dir.resolve()
        self.last_own = iter_num if is_own else -1  # numbered checkpoints up to here are this run's
        is_newest = resumed_from.resolve() == self.newest.resolve()
        self.saved_iter = iter_num if is_newest else None  # of ckpt.pt if it is this run's
        self.has_saved = False

    def save_or_warn(self, state, progress, *, keep_last_n: int, is_best: bool, must_succeed: bool):
        """Save on the first rank. On a full disk go on without this checkpoint, unless must_succeed.

        If weights or validation loss are not finite, the last good checkpoint stays.
        """
        problem = 'the weights or the validation loss are not finite'
        try:
            saved = distributed.on_first_rank(
                lambda: is_finite(state, progress) and self.save(state, keep_last_n, is_best))
        except OSError as error:
            saved, problem = False, f'{error.filename}: {error.strerror}'
            if is_best and 'ckpt.pt' not in Path(error.filename or '').name:  # best.pt is not written yet
                progress.forget_best()
            if must_succeed:
                raise
        if saved:
            self.saved_iter = state['iter_num']
        else:
            print0(f'NOT SAVED at iteration {state["iter_num"]}, {problem}: {self.what_is_saved()}')

    def what_is_saved(self) -> str:
        best = ' (best.pt: the lowest validation loss)' if self.best.is_file() else ''
        if self.saved_iter is None:
            return f'no checkpoint has been saved yet{best}'
        return f'the last good checkpoint is {self.newest} of iteration {self.saved_iter}{best}'

    def too_many_skipped(self, n: int, iter_num: int) -> str:
        return (f'{n} steps in a row were skipped, up to iteration {iter_num}: {self.what_is_saved()}, '
                'continue from it with a lower --learning_rate or other data')

    def save(self, state: dict, keep_last_n: int = 0, is_best: bool = False) -> bool:
        """Publish state as ckpt.pt, and its weights as best.pt if they are the best so far.

        keep_last_n  older checkpoints to keep, as ckpt_<iter_num>.pt; -1 = all
        raises       OSError, on a full disk for example: ckpt.pt and the older ones are then unchanged
        """
        remove_leftovers(self.out_dir)
        if not self.has_saved:
            # move checkpoints away that are not earlier states of this run
            others = [path for iter_num, path in numbered(self.out_dir).items() if iter_num > self.last_own]
            if self.saved_iter is None and os.path.lexists(self.newest):
                others.append(self.newest)
            set_aside(self.out_dir, others)
        is_older = self.saved_iter not in (None, state['iter_num']) and self.newest.exists()
        if keep_last_n and is_older:
            # keep the previous state under a numbered name before ckpt.pt is replaced
            older = self.out_dir / f'ckpt_{self.saved_iter:08d}.pt'
            older.unlink(missing_ok=True)
            try:
                os.link(self.newest, older)
            except OSError:  # no hard links on this file system
                with open(self.newest, 'rb') as f:
                    write_atomically(older, lambda copy: shutil.copyfileobj(f, copy))
        if is_best:
            weights = {key: value for key, value in state.items() if key not in ('optimizer', 'scaler')}
            write_atomically(self.best, lambda f: write_zip(weights, f))
        write_atomically(self.newest, lambda f: write_zip(state, f))
        self.saved_iter, self.has_saved = state['iter_num'], True
        if keep_last_n >= 0:
            for old in list(numbered(self.out_dir).values())[keep_last_n:]:
                old.unlink(missing_ok=True)
        return True


def is_finite(state, progress):
    finite = all(tensor.isfinite().all() for tensor in state['model'].values())
    return finite and math.isfinite(progress.val_loss)


def numbered(out_dir) -> dict[int, Path]:
    """Return the older checkpoints of a folder by iter_num, newest first."""
    paths = {}
    for path in Path(out_dir).iterdir():
        if match := NUMBERED.fullmatch(path.name):
            paths[int(match[1])] = path
    return dict(sorted(paths.items(), reverse=True))


def run_files(out_dir):
    """Return the files of a run in out_dir, ckpt.pt last: an interrupted move leaves the run in place."""
    names = ('best.pt', 'metrics.jsonl', 'run.json', 'samples.md', 'eval.json', 'report.md', 'report.html',
             'tensorboard')
    out_dir = Path(out_dir)
    paths = [*(out_dir / name for name in names), *numbered(out_dir).values(), out_dir / 'ckpt.pt']
    return [path for path in paths if os.path.lexists(path)]


def set_aside(out_dir, paths):
    """Move files of another run, or later states of this one, to a new folder out_dir/old-N."""
    if not paths:
        return
    n = 1
    while (Path(out_dir) / f'old-{n}').exists():
        n += 1
    folder = Path(out_dir) / f'old-{n}'
    folder.mkdir()
    for path in paths:
        os.replace(path, folder / path.name)
    print0(f'{out_dir}: {", ".join(path.name for path in paths)} moved to {folder}')


def write_zip(state, f):
    """Save with a checksum of the whole file as zip comment, because zip's own do not cover its headers."""
    try:
        torch.save(state, f)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # a failed write, which torch hides
            raise error.__context__ from None
        raise
    ending = checksum_ending(f, f.tell() - 2)
    f.seek(-2, os.SEEK_END)  # the length of the comment, zero so far
    f.write(ending)


def checksum_ending(f, size):
    """Return the zip comment, after its length in two bytes, for the first `size` bytes of a file."""
    crc, chunk_bytes = 0, 1 << 24
    f.seek(0)
    for start in range(0, size, chunk_bytes):
        crc = zlib.crc32(f.read(min(chunk_bytes, size - start)), crc)
    comment = b'crc32 %08x' % crc
    return len(comment).to_bytes(2, 'little') + comment


# -----------------------------------------------------------------------------
# reading


class Damaged(ValueError):
    """A checkpoint file whose bytes differ from those that were written."""


def load_newest(out_dir, rename_damaged: bool = False):
    """Return (state, path) of the newest sound checkpoint of out_dir, or (None, None) if it has none.

    rename_damaged  rename damaged files to *.corrupt: only for the run that owns the folder
    raises          ValueError if all are damaged, or the newest sound file is no checkpoint; OSError
    """
    if not os.path.lexists(out_dir):
        return None, None
    newest = Path(out_dir) / 'ckpt.pt'
    paths = [path for path in (newest, *numbered(out_dir).values()) if os.path.lexists(path)]
    for path in paths:
        try:
            state = load(path)
        except Damaged as error:
            action = 'trying an older one'
            if rename_damaged:
                os.replace(path, path.with_name(path.name + '.corrupt'))
                action = f'renamed to {path.name}.corrupt, {action}'
            print0(f'{error}: {action}')
            continue
        print0(f'checkpoint: {path} (iteration {state["iter_num"]})')
        return state, path
    if paths or any(Path(out_dir).glob('ckpt*.pt.corrupt')):
        # *.corrupt files count, so that auto_resume does not begin from scratch at the next start
        raise ValueError(f'{out_dir} has no readable checkpoint left: see the damaged files there, '
                         'or start again with another --out_dir')
    return None, None


def load(path, n_head: int | None = None) -> dict:
    """Return the verified checkpoint at path, converted if nanoGPT or another trainer wrote it.

    n_head  for a file of weights alone, whose shapes do not show it
    raises  as read() does
    """
    state = read(path)
    if not isinstance(state, dict):
        raise ValueError(f'{path} holds a {type(state).__name__}, not a checkpoint dict')
    if 'format' not in state:
        state = foreign.from_foreign(state, path, n_head)
    elif str(state['format']) != str(FORMAT):
        raise ValueError(f'{path} has format {state["format"]}, this version reads {FORMAT}: '
                         'use a newer flatGPT')
    foreign.check_state(state, path)
    return state | dict(config=state.get('config') or {})


def read(path):
    """Return what was saved at path, verified. The tensors are mapped from the file, not copied.

    raises  Damaged; ValueError for a sound file that is not ours; OSError, MemoryError
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f'{path} is a link to {os.readlink(path)}, which does not exist')
    with open(path, 'rb') as f:
        check_bytes(f, path)
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            # torch maps only files whose names are UTF-8; half a surrogate pair is not printable
            return torch.load(path, map_location='cpu', weights_only=True, mmap=str(path).isprintable())
    except (OSError, MemoryError):
        raise
    except Exception as error:  # pickle and torch raise many types for other files
        if 'allocate memory' in str(error):
            raise MemoryError(f'{path} does not fit into memory') from None
        reason = short(error)
        if name := re.search(r'GLOBAL (\S+)', str(error)):
            reason = f'it asks for {name[1]}, and only tensors and plain values are read'
        raise ValueError(f'{path} is not a readable checkpoint ({reason})') from None


def check_bytes(f, path):
    """Verify the checksums of a checkpoint file, which torch.load ignores. Raises as read() does."""
    head, pickle = f.read(1), b''
    try:
        with zipfile.ZipFile(f) as archive:
            # one flipped bit turns a record into a folder, which torch.load skips silently
            is_sound = not any(record.external_attr for record in archive.infolist())
            size = f.seek(-2 - len(archive.comment), os.SEEK_END)
            ending = f.read()
            if ending == b'\0\0':  # no comment: nanoGPT's, or another trainer's
                is_sound = is_sound and archive.testzip() is None
            elif ending != checksum_ending(f, size):
                is_sound = False
            if not is_sound:
                raise Damaged(f'{path} is damaged: its checksum does not match')
            for name in archive.namelist():
                if name.endswith('data.pkl'):
                    pickle = archive.read(name)
    except (OSError, MemoryError, Damaged):
        raise
    except Exception as error:  # zipfile raises a dozen types
        if head == b'\x80':
            raise ValueError(f'{path} is in the format of torch before 1.6, or a plain pickle, which is not '
                             'read: save it anew with torch.save where it was written') from None
        raise Damaged(f'{path} is not a readable checkpoint ({short(error)})') from None
    foreign.check_pickle(pickle, path)


def short(error):
    """Return the informative part of an error of zipfile or torch.load."""
    words = ' '.join(str(error).split()).rpartition('WeightsUnpickler error: ')[2]
    return words[:150] or type(error).__name__


# -----------------------------------------------------------------------------
# model and optimizers <-> plain dicts


def gather(model, optimizers) -> dict:
    """Return the whole tensors of 'model' and 'optimizer', on the first rank. Every rank must call it."""
    fresh = [optimizer for optimizer in optimizers if not optimizer.state]
    if fresh:  # torch creates their state by a step at rate 0, which must not count
        dcp.get_optimizer_state_dict(model, fresh)
        for optimizer in fresh:
            for moments in optimizer.state.values():
                if 'step' in moments:
                    moments['step'].zero_()
    trained = lora.trained_weights(model)
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True,
                                   ignore_frozen_params=lora.is_adapter(model))  # the base
    model_state, optimizer_state = dcp.get_state_dict(model, optimizers, options=options)
    model_state = {name: tensor for name, tensor in model_state.items() if name in trained}
    return dict(model=model_state, optimizer=optimizer_state)


def restore(state, model, optimizers, scaler, loader):
    """Restore the model, optimizers, scaler and position of the loader from a checkpoint."""
    if state.get('scaler'):
        scaler.load_state_dict(state['scaler'])
    scatter(state, model, optimizers)
    if state.get('data', loader.fingerprint()) != loader.fingerprint():
        print0('the dataset is not the one that the checkpoint was trained on: the run continues, '
               'but not exactly as an uninterrupted one would')
    loader.seek(state.get('position'), state['iter_num'])


def scatter(state, model, optimizers):
    """Load the dict of gather(). The optimizers keep their own rates, decay and betas."""
    names, shapes = {}, {}
    for name, p in model.named_parameters():
        names[p], shapes[name] = name, p.shape
    groups = [{**group, 'params': [names[p] for p in group['params']]}
              for optimizer in optimizers for group in optimizer.param_groups]
    moments = state['optimizer'].get('state', {})
    if 'format' not in state:  # nanoGPT numbers the parameters in the order of its two groups
        order = [name for group in groups for name in group['params']]
        moments = {order[i]: moments[i] for i in moments if i in range(len(order))}
    foreign.check_weights(model, state['model'], 'the checkpoint')

    # the optimizer keeps these tensors, so copy them out of the mapped file
    copies = {}
    for group in groups:
        keys = {'momentum_buffer'} if 'momentum' in group else {'step', 'exp_avg', 'exp_avg_sq'}
        like_p = sorted(keys - {'step'})
        if group.get('normuon'):
            keys.add('variances')
        listed = ' and '.join(sorted(keys - {'step'}))
        for name in group['params']:
            own, shape = moments.get(name, {}), shapes[name]
            if own.keys() != keys or any(own[key].shape != shape for key in like_p):
                raise ValueError(f'the checkpoint has no {listed} of {name} with shape '
                                 f'{tuple(shape)}: resume it with the optimizer that it was written with, '
                                 'and with its lr_groups')
            copies[name] = {key: value.clone() for key, value in own.items()}
    dcp.set_state_dict(model, optimizers, model_state_dict=state['model'],
                       optim_state_dict=dict(state=copies, param_groups=groups),
                       options=dcp.StateDictOptions(full_state_dict=True))
