"""Checkpoints: never half-written, never silently wrong, the same for one process, DDP and FSDP2.

A checkpoint is one dict of tensors and plain values:

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
from pathlib import Path

from torch.distributed.checkpoint import state_dict as dcp

import distributed
from files import print0, remove_leftovers, write_atomically
from weights import foreign, lora, torchfile

FORMAT = 1
NUMBERED = re.compile(r'ckpt_(\d{8,})\.pt')


# -----------------------------------------------------------------------------
# writing


class CheckpointFolder:
    """The checkpoint files of the run that holds the lock of out_dir, resumed from '' or a file."""

    def __init__(self, out_dir, resumed_from='', iter_num=0):
        self.out_dir = Path(out_dir)
        self.newest, self.best = self.out_dir / 'ckpt.pt', self.out_dir / 'best.pt'
        resumed_from = Path(resumed_from)
        is_own = resumed_from.parent.resolve() == self.out_dir.resolve()
        self.last_own = iter_num if is_own else -1  # numbered checkpoints up to here are this run's
        is_newest = resumed_from.resolve() == self.newest.resolve()
        self.saved_iter = iter_num if is_newest else None  # of ckpt.pt if it is this run's
        self.best_iter = None  # of best.pt if this process wrote it
        self.has_saved = False

    def save_or_warn(self, state, progress, *, keep_last_n: int, is_best: bool, must_succeed: bool):
        """Save on the first rank. A full disk ends the run only if must_succeed. The last good checkpoint
        stays if weights or validation loss are not finite."""
        problem, self.saved_iter, self.best_iter = distributed.on_first_rank(
            lambda: self.try_to_save(state, progress, keep_last_n, is_best))
        if is_best and self.best_iter != state['iter_num']:
            progress.forget_best()
        if isinstance(problem, OSError):
            if must_succeed:
                raise problem
            problem = f'{problem.filename}: {problem.strerror}'
        if problem:
            print0(f'NOT SAVED at iteration {state["iter_num"]}, {problem}: {self.what_is_saved()}')

    def try_to_save(self, state, progress, keep_last_n, is_best):
        """Return the problem or None, and the iterations of ckpt.pt and best.pt."""
        problem = None
        finite = all(tensor.isfinite().all() for tensor in state['model'].values())
        if not finite or not math.isfinite(progress.val_loss):
            problem = 'the weights or the validation loss are not finite'
        else:
            try:
                self.save(state, keep_last_n, is_best)
            except OSError as error:
                problem = error
        return problem, self.saved_iter, self.best_iter

    def what_is_saved(self) -> str:
        best = ' (best.pt: the lowest validation loss)' if self.best.is_file() else ''
        if self.saved_iter is None:
            return f'no checkpoint has been saved yet{best}'
        return f'the last good checkpoint is {self.newest} of iteration {self.saved_iter}{best}'

    def save(self, state: dict, keep_last_n: int = 0, is_best: bool = False):
        """Publish state as ckpt.pt, and its weights as best.pt if they are the best so far.

        keep_last_n  older checkpoints to keep, as ckpt_<iter_num>.pt; -1 = all
        raises       OSError: ckpt.pt and the older ones are then unchanged
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
            write_atomically(self.best, lambda f: torchfile.write(weights, f))
            self.best_iter = state['iter_num']
        write_atomically(self.newest, lambda f: torchfile.write(state, f))
        self.saved_iter, self.has_saved = state['iter_num'], True
        if keep_last_n >= 0:
            for old in list(numbered(self.out_dir).values())[keep_last_n:]:
                old.unlink(missing_ok=True)


def numbered(out_dir) -> dict[int, Path]:
    """Return the older checkpoints of a folder by iter_num, newest first."""
    matches = [NUMBERED.fullmatch(name) for name in os.listdir(out_dir)]
    paths = {int(match[1]): Path(out_dir, match[0]) for match in matches if match}
    return dict(sorted(paths.items(), reverse=True))


def run_files(out_dir):
    """Return the files of a run, ckpt.pt last: until it is moved, the run is still in place."""
    names = ['best.pt', 'metrics.jsonl', 'run.json', 'samples.md', 'eval.json', 'report.md', 'report.html',
             'tensorboard', *(path.name for path in numbered(out_dir).values()), 'ckpt.pt']
    return [path for name in names if os.path.lexists(path := Path(out_dir, name))]


def set_aside(out_dir, paths):
    """Move files of another run, or later states of this one, to a new folder out_dir/old-N."""
    if not paths:
        return
    n = 1
    while (folder := Path(out_dir, f'old-{n}')).exists():
        n += 1
    folder.mkdir()
    for path in paths:
        os.replace(path, folder / path.name)
    print0(f'{out_dir}: {", ".join(path.name for path in paths)} moved to {folder}')


# -----------------------------------------------------------------------------
# reading


def load_newest(out_dir, rename_damaged: bool = False):
    """Return (state, path) of the newest sound checkpoint of out_dir, or (None, None) if it has none.

    rename_damaged  rename damaged files to *.corrupt: only for the run that owns the folder
    raises          ValueError if all are damaged
    """
    if not os.path.lexists(out_dir):
        return None, None
    newest = Path(out_dir, 'ckpt.pt')
    paths = [path for path in (newest, *numbered(out_dir).values()) if os.path.lexists(path)]
    for path in paths:
        try:
            state = load(path)
        except torchfile.Damaged as error:
            action = 'trying an older one'
            if rename_damaged:
                os.replace(path, f'{path}.corrupt')
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
    """
    state = torchfile.read(path)
    if not isinstance(state, dict):
        raise ValueError(f'{path} holds a {type(state).__name__}, not a checkpoint dict')
    if 'format' not in state:
        state = foreign.from_foreign(state, path, n_head)
    elif str(state['format']) != str(FORMAT):
        raise ValueError(f'{path} has format {state["format"]}, this version reads {FORMAT}: '
                         'use a newer flatGPT')
    foreign.check_state(state, path)
    return state | dict(config=state.get('config') or {})


# -----------------------------------------------------------------------------
# model and optimizers <-> plain dicts


def gather(model, optimizers) -> dict:
    """Return the whole tensors of 'model' and 'optimizer', on the first rank. Every rank must call it."""
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
        keys = {'momentum_buffer'}
        if 'momentum' not in group:
            keys = {'step', 'exp_avg', 'exp_avg_sq'}
        elif group['normuon']:
            keys.add('variances')
        for name in group['params']:
            own, shape = moments.get(name, {}), shapes[name]
            if own.keys() != keys or shape not in [value.shape for value in own.values()]:
                raise ValueError(f'the checkpoint has no {", ".join(sorted(keys))} of {name} with shape '
                                 f'{tuple(shape)}: resume it with its --optimizer and --lr_groups')
            copies[name] = {key: value.clone() for key, value in own.items()}
    dcp.set_state_dict(model, optimizers, model_state_dict=state['model'],
                       optim_state_dict=dict(state=copies, param_groups=groups),
                       options=dcp.StateDictOptions(full_state_dict=True))
