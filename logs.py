"""What a run writes about itself while it trains: run.json once, metrics.jsonl line by line, and wandb where it is asked for."""

import contextlib
import json
import math
import os
from pathlib import Path

import checkpoint
import distributed
import files
from files import print0
from report import parse


def open_logs(out_dir, place, iter_num, from_scratch, facts, wandb_id=None, wandb_run=None):
    """Makes out_dir this run's own, with the facts of the run in run.json.

    out_dir       None: nothing is written anywhere
    iter_num      lines of metrics.jsonl at or behind it are dropped, for these iterations are about to be done again
    from_scratch  whether what another run left in out_dir is set aside
    facts         of plain values, with the settings under 'settings'
    wandb_id      of the wandb run to go on with, None = a new one
    wandb_run     dict(project, name); None = no wandb
    returns       write_metrics(line), write_table(name, columns, rows, step), and the id of the wandb run
    raises        ValueError where another trainer has out_dir; OSError where it cannot be written
    """
    if out_dir is None:
        return lambda line: None, lambda *_: None, wandb_id
    path, run, lock = Path(out_dir) / 'metrics.jsonl', None, None

    def claim():
        nonlocal lock
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = files.lock(out_dir)
        if from_scratch:
            checkpoint.set_aside(out_dir)
            for old in filter(Path.exists, (path, path.with_name('samples.md'), path.with_name('eval.json'))):  # of the run that was here before
                os.replace(old, old.with_name(old.name + '.old'))
        lines = path.read_text(encoding='utf-8', errors='replace').splitlines() if iter_num and path.exists() else []
        kept = ''.join(line + '\n' for line in lines if (known := parse(line)) and known['iter'] < iter_num)
        files.write_atomically(path, lambda f: f.write(kept.encode('utf-8')))
        files.write_atomically(path.with_name('run.json'), lambda f: f.write(json.dumps(facts, indent=1).encode('utf-8')))

    distributed.on_first_rank(claim)
    if not place.is_master:
        return lambda line: None, lambda *_: None, wandb_id
    if wandb_run:
        run = start_wandb(wandb_id, **wandb_run, config=facts['settings'], dir=out_dir)
        wandb_id = run.id

    def write_metrics(line):
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}  # JSON has no NaN
        size = None
        try:
            with open(path, 'a', encoding='utf-8') as f:
                size = f.tell()
                f.write(json.dumps(line) + '\n')
        except OSError as error:  # a full disk need not end the run, nor a file that was moved away
            print0(f'{path}: {error.strerror}: the line of iteration {line["iter"]} is lost')
            if size is not None:
                with contextlib.suppress(OSError):  # a torn line is passed over when it is read
                    os.truncate(path, size)
        if run is not None:
            run.log(line, step=line['iter'])

    def write_table(name, columns, rows, step):
        if run is not None:
            import wandb
            run.log({name: wandb.Table(columns=columns, data=rows)}, step=step)

    write_metrics.lock = lock  # held as long as there is something that writes
    return write_metrics, write_table, wandb_id


def start_wandb(wandb_id, **options):
    """The wandb run, resumed under its id; offline where there is no key, since training needs no network."""
    import wandb
    mode = os.environ.get('WANDB_MODE') or ('online' if wandb.api.api_key else 'offline')
    if mode == 'offline':
        print0('wandb: no key, or offline asked for: writing to out_dir, upload with `wandb sync`')
    return wandb.init(id=wandb_id, resume='allow' if wandb_id else None, mode=mode, **options)


def farewell(out_dir, stop, iter_num, has_saved, best_val_loss):
    """The last line of a run: what is saved, and what to do next."""
    if not stop:
        return f'done: {out_dir}/ckpt.pt after {iter_num} iterations, best val loss {best_val_loss:.4f}; python sample.py --out_dir={out_dir}'
    if not has_saved:
        return f'stopped by {stop} at iteration {iter_num}, where this run began: nothing new to save'
    return f'stopped by {stop}: {out_dir}/ckpt.pt has iteration {iter_num}; python train.py --init_from=resume --out_dir={out_dir} goes on'


def clock(seconds):
    """83.2 -> '1m23s'"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}h{minutes:02}m' if hours else f'{minutes}m{seconds:02}s' if minutes else f'{seconds}s'
