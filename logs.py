"""The log of a run: metrics.jsonl, run.json, samples.md, TensorBoard, wandb, events and the terminal."""

import contextlib
import errno
import json
import math
import os
import platform
import re
import socket
import subprocess
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import torch

import checkpoint
import devices
import distributed
import files
from files import print0, printable
from report import read_record, read_text, sound_lines, table_row, write_report
from training.events import Hook


class Log:
    """The files, the lock and the training clock of one run. Only the first rank writes.

    out_dir          None = print only
    tokens_per_step  over all ranks
    """

    def __init__(self, out_dir, place, progress, tokens_per_step: int, max_iters: int, on_event: str = ''):
        self.out_dir = None  # no files
        if out_dir and place.is_master:
            self.out_dir = Path(out_dir)
        self.place, self.progress = place, progress
        self.tokens_per_step, self.max_iters = tokens_per_step, max_iters
        self.lock = self.wandb = self.tensorboard = self.hook = None
        if on_event and self.out_dir:
            self.hook = Hook(on_event)
        self.skipped_in_a_row = 0  # at the latest logged step
        self.mfu_per_tok_per_s = math.nan  # where the device's peak is unknown
        self.logged_at = progress.iter_num  # iter_num after the last logged step
        self.has_sampled = False  # this process has written to samples.md
        self.last_line_s = time.perf_counter()  # paused() adds its duration

    # starting

    def open(self, is_new: bool, facts: dict):
        """Claim out_dir, and write facts about the run to run.json.

        is_new  the run was not resumed
        raises  ValueError if another process trains there; OSError if it cannot be written
        """
        peak_flops = devices.peak_flops(self.place.device)
        if peak_flops and facts['dtype'] != 'float32':
            self.mfu_per_tok_per_s = facts['flops_per_token'] / (peak_flops * self.place.world_size)
        distributed.on_first_rank(lambda: self.claim(is_new, facts))
        if self.out_dir is None:
            return
        settings = facts['settings']
        if settings['tensorboard_log']:
            from torch.utils.tensorboard import SummaryWriter
            # readers drop the points from purge_step on, which this start repeats
            self.tensorboard = SummaryWriter(str(self.out_dir / 'tensorboard'), flush_secs=10,
                                             purge_step=self.progress.iter_num)
        if settings['wandb_log']:
            self.start_wandb(settings)

    def claim(self, is_new, facts):
        """Lock out_dir, set another run aside, drop the metrics of steps that will be repeated."""
        if self.out_dir is None:
            return
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.lock = files.lock(self.out_dir)
        files.remove_leftovers(self.out_dir)
        if is_new:
            checkpoint.set_aside(self.out_dir, checkpoint.run_files(self.out_dir))
        keep_earlier_lines(self.out_dir / 'metrics.jsonl', self.progress.iter_num)

        # run.json: the facts of this start, and a record of every start
        path = self.out_dir / 'run.json'
        earlier, now = read_record(path, settings=dict, starts=list), facts['settings']
        changed = {name: [value, now[name]] for name, value in earlier['settings'].items()
                   if name in now and value != now[name]}
        versions = dict(git=git_commit(), torch=torch.__version__, python=platform.python_version())
        start = dict(time=time.strftime('%Y-%m-%dT%H:%M:%S%z'), iter_num=self.progress.iter_num,
                     changed=changed, host=socket.gethostname(), argv=sys.argv, **versions)
        environment = {name: facts.pop(name) for name in ('device', 'dtype', 'compiled')}
        environment |= dict(processes=self.place.world_size, system=platform.platform(), **versions)
        files.write_json(path, dict(**facts, environment=environment, starts=[*earlier['starts'], start]))

    def start_wandb(self, settings):
        """Start or resume the wandb run, offline if there is no key."""
        import wandb
        mode, run_id = 'offline', self.progress.wandb_id
        if wandb.api.api_key:
            mode = 'online'
        mode = os.environ.get('WANDB_MODE') or mode
        if mode == 'offline':
            print0('wandb: offline, for lack of a key or by WANDB_MODE: upload with `wandb sync`')
        self.wandb = wandb.init(id=run_id, resume=run_id and 'allow', mode=mode,
                                project=settings['wandb_project'], name=settings['wandb_run_name'],
                                config=settings, dir=str(self.out_dir))
        self.progress.wandb_id = self.wandb.id

    # while training

    @contextlib.contextmanager
    def paused(self, anything_due):
        """Exclude the time spent inside from the training clock."""
        if anything_due:  # pending updates count as training
            devices.synchronize(self.place.device)
        begun_s = time.perf_counter()
        yield
        self.last_line_s += time.perf_counter() - begun_s

    def step(self, lr: float, loss, grad_norm, judge):
        """Log step iter_num. The numbers of the device are read in one transfer."""
        numbers = loss, grad_norm, judge.skipped, judge.skipped_in_a_row, judge.smoothed_loss
        loss, grad_norm, skipped, skipped_in_a_row, smoothed_loss = torch.stack(numbers).tolist()
        it, now_s = self.progress.iter_num, time.perf_counter()
        if grad_norm == 0.0 and loss > 0.0 and self.logged_at == self.progress.started_at:
            raise ValueError(f'the gradient of step {it} is exactly zero, as from a fault of the compiler: '
                             'use --compile=False, or another version of torch')
        n_steps = it + 1 - self.logged_at
        dt_s = (now_s - self.last_line_s) / n_steps
        self.last_line_s, self.logged_at = now_s, it + 1
        tok_per_s, eta_s = self.tokens_per_step / dt_s, (self.max_iters - it - 1) * dt_s
        mfu = tok_per_s * self.mfu_per_tok_per_s

        utilisation = f'mfu {mfu:.1%}, ' if mfu > 0 else ''
        warning = ''
        if skipped_in_a_row:
            problem = 'SPIKE' if math.isfinite(loss + grad_norm) else 'NOT FINITE'
            warning = f' {problem}, step skipped ({skipped:.0f} so far)'
        print0(f'iter {it}: loss {loss:.4f}, lr {lr:.2e}, norm {grad_norm:.3f}, {dt_s * 1000:.1f}ms, '
               f'{tok_per_s:,.0f} tok/s, {utilisation}eta {timedelta(seconds=round(eta_s))}, '
               f'{time.strftime("%H:%M:%S")}{warning}')
        self.write(loss=loss, loss_smoothed=smoothed_loss, lr=lr, grad_norm=grad_norm, tok_per_s=tok_per_s,
                   mfu=mfu, eta_s=eta_s, dt_s=dt_s, n_steps=n_steps, skipped=int(skipped),
                   peak_memory_bytes=devices.peak_memory_bytes(self.place.device))
        if skipped_in_a_row and not self.skipped_in_a_row:
            self.event('skipped_steps', skipped=int(skipped), loss=loss, grad_norm=grad_norm)
        self.skipped_in_a_row = int(skipped_in_a_row)

    def check_skipped(self, max_skipped_steps: int, folder):
        """Raise ValueError if the latest steps, max_skipped_steps or more in a row, were skipped."""
        if self.skipped_in_a_row >= max_skipped_steps:
            message = (f'{max_skipped_steps} steps in a row were skipped, up to iteration '
                       f'{self.progress.iter_num}: {folder.what_is_saved()}, '
                       'continue from it with a lower --learning_rate or other data')
            self.end('nan_limit', message)
            raise ValueError(message)

    def evaluation(self, losses):
        train_loss, val_loss = losses.train.nats_per_target, losses.val.nats_per_target
        bits_per_byte = losses.val.bits_per_byte
        bits = f', {bits_per_byte:.4f} bits per byte' if bits_per_byte else ''
        print0(f'step {self.progress.iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}{bits}')
        self.write(train_loss=train_loss, val_loss=val_loss, val_bpb=bits_per_byte)

    def benchmark(self, name: str, numbers: dict | None):
        if numbers is not None:
            print0(f'step {self.progress.iter_num}: {table_row(name, numbers)}')
            columns = dict(core='core', acc=f'{name}_acc', acc_norm=f'{name}_acc_norm',
                           perplexity=f'{name}_perplexity')
            self.write(**{columns[key]: value for key, value in numbers.items() if key in columns})

    def samples(self, samples):
        if self.out_dir is None:
            return
        it = self.progress.iter_num
        with loss_printed(self.out_dir / 'samples.md', f'the samples of iteration {it} are lost'):
            write_samples(self.out_dir, it, samples, is_first=not self.has_sampled)
            self.has_sampled = True
        for i, (prompt, text) in enumerate(samples, 1):
            self.send('tensorboard', 'add_text', f'samples/{i}', sample_text(prompt, text), it)

    def saved(self, folder, is_best: bool):
        """Report what save_or_warn() has just written."""
        self.send('tensorboard', 'flush')
        if folder.saved_iter == self.progress.iter_num:
            self.event('saved', path=str(folder.newest))
        if is_best and folder.best_iter == self.progress.iter_num:
            self.event('new_best', path=str(folder.best), val_loss=self.progress.best_val_loss)

    def event(self, name: str, **facts):
        if self.hook is not None:
            general = dict(event=name, out_dir=str(self.out_dir.absolute()), iter=self.progress.iter_num,
                           max_iters=self.max_iters, best_val_loss=self.progress.best_val_loss,
                           time=round(time.time(), 1), host=socket.gethostname())
            self.hook.send(name, finite(general | facts))

    def write(self, **numbers):
        """Append a line to metrics.jsonl, and send it to TensorBoard and wandb."""
        if self.out_dir is None:
            return
        it, path = self.progress.iter_num, self.out_dir / 'metrics.jsonl'
        line = finite(dict(iter=it, **numbers, time=round(time.time(), 1)))
        with loss_printed(path, f'the line of iteration {it} is lost'):
            append(path, json.dumps(line) + '\n')
        self.send('wandb', 'log', line, step=it)
        for name in numbers:
            if line[name] is not None:
                self.send('tensorboard', 'add_scalar', name, line[name], it, walltime=line['time'])

    def send(self, service: str, method: str, *args, **kwargs):
        """Call a method of 'tensorboard' or 'wandb', which is dropped after an error such as a full disk."""
        if getattr(self, service) is None:
            return
        try:
            getattr(getattr(self, service), method)(*args, **kwargs)
        except Exception as error:  # raised by its thread or process
            setattr(self, service, None)
            print0(printable(f'{service}: {error}: nothing more is written there by this process'))

    # at the end

    def end(self, event: str, reason: str):
        """Close TensorBoard, and wait for the commands of on_event."""
        self.send('tensorboard', 'close')
        if self.hook is not None:
            self.event(event, reason=reason)
            self.hook.close()

    def close(self, stop: str | None, folder, report: bool):
        """Write the report, and print what is saved and what to do next."""
        if self.out_dir is None:
            return
        if report and not stop:
            try:
                print0(printable(f'report: {write_report([self.out_dir])}'))
            except Exception as error:  # the run itself is saved
                print0(printable(f'no report: {type(error).__name__}: {error}'))
        it, out_dir = self.progress.iter_num, printable(str(self.out_dir))
        if stop and not self.progress.advanced:
            print0(f'stopped by {stop} at iteration {it}, where this run began: nothing new to save')
        elif self.progress.advanced and folder.saved_iter != it:
            print0(f'ended at iteration {it}, which is not saved: {folder.what_is_saved()}')
        elif stop:
            print0(f'stopped by {stop}: {out_dir}/ckpt.pt has iteration {it}; '
                   f'python train.py --init_from=resume --out_dir={out_dir} continues')
        else:
            print0(f'done: {out_dir}/ckpt.pt after {it} iterations, best val loss '
                   f'{self.progress.best_val_loss:.4f} in best.pt; python sample.py --out_dir={out_dir}')
        if stop:
            self.end('stopped', stop)
        elif it >= self.max_iters:
            self.end('finished', 'max_iters')
        else:
            self.end('finished', 'patience')


@contextlib.contextmanager
def loss_printed(path, loss: str):
    """Print an OSError of writing path, and what it costs: a full disk does not end the run."""
    try:
        yield
    except OSError as error:
        print0(f'{path}: {error.strerror}: {loss}')


def finite(numbers: dict) -> dict:
    """Replace inf and nan, which JSON lacks, by None."""
    floats = {name: value for name, value in numbers.items() if isinstance(value, float)}
    return numbers | {name: None for name, value in floats.items() if not math.isfinite(value)}


def git_commit() -> str | None:
    """Return the commit of this code, with -dirty if files were changed; None without git."""
    command = ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
    try:
        done = subprocess.run(command, cwd=Path(__file__).resolve().parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def keep_earlier_lines(path, iter_num: int):
    """Rewrite metrics.jsonl with its sound lines before iter_num, one at a time."""
    def write(f):
        for text, line in sound_lines(path):
            if line['iter'] < iter_num:
                f.write(f'{text}\n'.encode())
    files.write_atomically(path, write)


def append(path, text: str):
    """Append a text to a file, or raise OSError and leave the file as it was."""
    data = text.encode('utf-8', 'backslashreplace')
    with open(path, 'ab', buffering=0) as f:
        size = f.tell()
        if f.write(data) < len(data):  # the disk is full now: leave no torn line
            f.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_samples(folder, iter_num: int, samples: list[tuple[str, str]], *, is_first: bool):
    """Append the samples of an iteration to samples.md.

    is_first  of this process: an earlier one may have left samples of this and later iterations, to drop
    """
    path = Path(folder) / 'samples.md'
    if is_first:
        sections = re.split(r'^(?=## Iteration [0-9]+\n)', read_text(path), flags=re.MULTILINE)
        files.write_text(path, ''.join(each for each in sections[1:] if int(each.split()[2]) < iter_num))
    page = f'## Iteration {iter_num}\n\n'
    for i, (prompt, text) in enumerate(samples, 1):
        page += f'**{i}.** after the prompt\n\n{sample_text(prompt, text)}\n\n'
    append(path, page)


def sample_text(prompt, text):
    """Format a sample as two blocks of code in Markdown, which its text cannot close."""
    prompt, text = (textwrap.indent(printable(part), '    ', lambda line: True) for part in (prompt, text))
    return f'{prompt}\n\ncomes\n\n{text}'
