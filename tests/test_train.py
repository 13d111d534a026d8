"""train.py on one process: what it writes and prints, what nanoGPT's users have, and what bad input gets."""

import errno
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    differences,
    pack_chars,
    read_checkpoint,
    run_train,
    sentences,
    train_here,
    wait_for,
)

import checkpoint
import files
import model as model_file
from model import GPT, GPTConfig
from tokens.loader import Loader
from tokens.tokenizer import CharTokenizer
from training import data, scoring


def train(*flags, out_dir):
    code, stdout, stderr, lines = train_here(*flags, out_dir=out_dir)
    assert code == 0, stderr
    return stdout, lines


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# -----------------------------------------------------------------------------
# what a run leaves


def test_a_process_trains_with_nothing_but_torch_and_numpy(tiny, tmp_path):
    absent = tmp_path / 'absent'
    for package in ('wandb', 'tiktoken', 'tokenizers', 'transformers', 'datasets', 'safetensors', 'huggingface_hub', 'matplotlib'):
        (absent / package).mkdir(parents=True)
        (absent / package / '__init__.py').write_text(f'raise ImportError("{package} was imported")', encoding='utf-8')
    shutil.copytree(tiny, tmp_path / 'data')
    code, stdout, stderr, lines = run_train(*TINY, '--max_iters=3', '--report=True', '--dataset=./data', out_dir='out', cwd=tmp_path,
                                            env={'PYTHONPATH': str(absent)})
    assert (code, stderr) == (0, '')
    assert stdout.splitlines()[-1].endswith('python sample.py --out_dir=out')
    assert 'matplotlib cannot be imported (matplotlib was imported): pip install matplotlib' in (tmp_path / 'out/report.md').read_text()
    assert sorted(contents(tmp_path / 'out')) == ['.lock', 'best.pt', 'ckpt.pt', 'metrics.jsonl', 'report.md', 'run.json']
    assert not contents(tmp_path / 'data').keys() - contents(tiny).keys()


@pytest.mark.parametrize('script', ['train', 'sample', 'chat', 'evaluate', 'bench'])
def test_idle_threads_sleep_on_a_busy_machine(script):
    """Spinning threads made a step ten times as slow there. The OpenMP of torch reads the variable while it is loaded."""
    code = f"import os, sys\nsys.modules['torch'] = None\ntry:\n    import {script}\nexcept ImportError:\n    print(os.environ['GOMP_SPINCOUNT'])"
    env = {name: value for name, value in os.environ.items() if name != 'GOMP_SPINCOUNT'}
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True, text=True, encoding='utf-8')
    assert done.stdout == '10000\n', done.stderr


def test_lines_of_the_log_and_of_metrics(tiny, tmp_path):
    stdout, lines = train(*TINY, '--max_iters=4', f'--dataset={tiny}', out_dir=tmp_path)
    steps = [line for line in stdout.splitlines() if line.startswith('iter ')]
    number = r'\d+(\.\d+)?'
    for line in steps:
        assert re.fullmatch(rf'iter \d+: loss {number}, lr \d\.\d\de-\d\d, norm {number}, {number}ms, [\d,]+ tok/s, eta \d:\d\d:\d\d, \d\d:\d\d:\d\d', line), line
    evaluations = [line for line in stdout.splitlines() if line.startswith('step ')]
    for line in evaluations:
        assert re.fullmatch(rf'step \d+: train loss {number}, val loss {number}, {number} bits per byte', line), line
    assert (len(steps), len(evaluations)) == (4, 2)

    by_loss = [line for line in lines if 'loss' in line]
    assert [line['iter'] for line in by_loss] == [0, 1, 2, 3]
    assert {*by_loss[0]} == {'iter', 'loss', 'loss_smoothed', 'lr', 'grad_norm', 'tok_per_s', 'mfu', 'eta_s', 'dt_s', 'n_steps', 'skipped',
                             'peak_memory_bytes', 'time'}
    assert by_loss[0]['mfu'] is None and by_loss[0]['loss_smoothed'] == pytest.approx(by_loss[0]['loss'])
    assert [line['lr'] for line in by_loss[:3]] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    assert by_loss[-1]['eta_s'] == 0
    evaluated = [line for line in lines if 'val_loss' in line]
    assert [{*line} for line in evaluated] == [{'iter', 'train_loss', 'val_loss', 'val_bpb', 'time'}] * 2
    # one byte a token
    assert evaluated[0]['val_bpb'] == pytest.approx(evaluated[0]['val_loss'] / math.log(2))


def test_loss_is_what_the_model_has_on_the_batch_of_the_step(tiny, tmp_path):
    _, lines = train(*TINY, '--max_iters=4', '--eval_interval=3', '--keep_last_n_checkpoints=-1', f'--dataset={tiny}', out_dir=tmp_path)
    state = read_checkpoint(tmp_path / 'ckpt_00000003.pt')
    gpt = GPT(GPTConfig(**state['model_args']))
    gpt.load_state_dict(state['model'])
    x, y, _ = Loader(tiny, 'train', block_size=16, batch_size=8, seed=1337).batch(step=3)
    assert gpt(x, y)[1].item() == pytest.approx(next(line['loss'] for line in lines if line['iter'] == 3 and 'loss' in line), abs=1e-5)


def test_evaluation_of_the_whole_split_is_the_mean_over_every_token(tiny, tmp_path):
    _, lines = train(*TINY, '--max_iters=2', '--eval_iters=0', f'--dataset={tiny}', out_dir=tmp_path)
    state = read_checkpoint(tmp_path / 'ckpt.pt')
    gpt = GPT(GPTConfig(**state['model_args'])).eval()
    gpt.load_state_dict(state['model'])
    tokens = torch.from_numpy(np.fromfile(tiny / 'val.bin', dtype='<u2').astype(np.int64))
    nats = sum(gpt.loss_sum(x[None, :-1], x[None, 1:]).item() for x in tokens.unfold(0, 17, 16))
    rest = tokens[(len(tokens) - 1) // 16 * 16:]
    nats += gpt.loss_sum(rest[None, :-1], rest[None, 1:]).item()
    assert lines[-1]['val_loss'] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)


def test_gradient_accumulation_changes_nothing(tiny, tmp_path):
    for accum, batch in ((1, 8), (2, 4), (8, 1)):
        train(*TINY, '--max_iters=5', f'--gradient_accumulation_steps={accum}', f'--batch_size={batch}', f'--dataset={tiny}', out_dir=tmp_path / str(accum))
    one, *others = (read_checkpoint(tmp_path / accum / 'ckpt.pt')['model'] for accum in ('1', '2', '8'))
    for other in others:
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-5)


def test_the_last_iteration_is_always_evaluated_and_saved(tiny, tmp_path):
    _, lines = train(*TINY, '--max_iters=7', '--eval_interval=5', '--checkpoint_interval=100', f'--dataset={tiny}', out_dir=tmp_path)
    assert [line['iter'] for line in lines if 'val_loss' in line] == [0, 5, 7]
    assert read_checkpoint(tmp_path / 'ckpt.pt')['iter_num'] == 7


def test_evaluation_does_not_move_training(tiny, tmp_path):
    for i, flags in enumerate((['--eval_interval=2'], ['--eval_interval=100', '--eval_iters=0'])):
        train(*TINY, '--max_iters=6', '--dropout=0.2', *flags, f'--dataset={tiny}', out_dir=tmp_path / str(i))
    a, b = (read_checkpoint(tmp_path / i / 'ckpt.pt') for i in '01')
    assert not differences(a['model'], b['model'])


def test_eval_only_evaluates_once_and_writes_nothing(tiny, tmp_path):
    stdout, lines = train(*TINY, '--eval_only=True', f'--dataset={tiny}', out_dir=tmp_path / 'new')
    assert stdout.count('\nstep ') == 1 and '\niter ' not in stdout and not (tmp_path / 'new').exists()
    train(*TINY, '--max_iters=3', f'--dataset={tiny}', out_dir=tmp_path / 'old')
    before = contents(tmp_path / 'old')
    stdout, lines = train('--init_from=resume', '--device=cpu', '--eval_only=True', out_dir=tmp_path / 'old')
    assert f'step 3: train loss {lines[-1]["train_loss"]:.4f}, val loss {lines[-1]["val_loss"]:.4f}' in stdout
    assert contents(tmp_path / 'old') == before


def test_a_run_from_scratch_sets_the_checkpoints_of_another_aside(tiny, tmp_path):
    notice = f'{tmp_path} holds the checkpoint of another run, which is moved aside: to continue that run, stop this one and use --init_from=resume'
    flags = *TINY, '--eval_interval=2', f'--dataset={tiny}'
    assert notice not in train(*flags, '--max_iters=4', out_dir=tmp_path)[0]
    before = contents(tmp_path)
    with pytest.MonkeyPatch.context() as patch:  # a run that ends before it has saved anything
        patch.setattr(model_file.GPT, 'hidden', lambda *args, **kwargs: pytest.exit('killed'))
        with pytest.raises(pytest.exit.Exception):
            train_here(*flags, out_dir=tmp_path)
    aside = contents(tmp_path / 'old-1')
    assert [aside[name] for name in ('ckpt.pt', 'ckpt_00000002.pt', 'best.pt')] == [before[name] for name in ('ckpt.pt', 'ckpt_00000002.pt', 'best.pt')]
    assert refused('--init_from=resume', '--device=cpu', out_dir=tmp_path).startswith(f'{tmp_path} has no checkpoint to resume')
    (tmp_path / 'old-1' / 'ckpt.pt').rename(tmp_path / 'ckpt.pt')
    stdout, lines = train(*flags, '--max_iters=2', out_dir=tmp_path)
    assert notice in stdout and f'{tmp_path}: metrics.jsonl, run.json, ckpt.pt moved to {tmp_path / "old-2"}' in stdout
    assert [line['iter'] for line in lines] == [0, 0, 1, 2]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_every_dtype_learns(tiny, tmp_path, dtype):
    stdout, lines = train(*TINY, f'--dtype={dtype}', f'--dataset={tiny}', out_dir=tmp_path)
    assert f', {dtype}, eager' in stdout
    assert lines[-1]['val_loss'] < lines[0]['val_loss'] - 0.4
    assert bool(read_checkpoint(tmp_path / 'ckpt.pt')['scaler']) == (dtype == 'float16')


@pytest.mark.parametrize('flags', ['--optimizer=adamw --arch=gpt2 --bias=True', '--optimizer=adamw --arch=modern', '--optimizer=muon --arch=gpt2',
                                   '--optimizer=muon --arch=modern --lr_schedule=wsd'])
def test_every_architecture_learns_with_every_optimizer(tiny, tmp_path, flags):
    _, lines = train(*TINY, *flags.split(), f'--dataset={tiny}', out_dir=tmp_path)
    assert lines[-1]['val_loss'] < lines[0]['val_loss'] - 0.4


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_a_gradient_that_is_not_finite_skips_the_step(tiny, tmp_path, monkeypatch, dtype):
    loss_of, calls = GPT.loss_sum, []

    def broken(self, *args, **kwargs):
        loss = loss_of(self, *args, **kwargs)
        if self.training:
            calls.append(loss)
            if len(calls) == 7:  # the first of two micro-steps of iteration 3
                loss = loss * math.nan
        return loss

    monkeypatch.setattr(model_file.GPT, 'loss_sum', broken)
    stdout, lines = train(*TINY, '--max_iters=6', '--checkpoint_interval=1', '--keep_last_n_checkpoints=-1', '--log_interval=10', f'--dtype={dtype}',
                          f'--dataset={tiny}', out_dir=tmp_path)
    assert [line for line in stdout.splitlines() if 'NOT FINITE' in line][0].startswith('iter 3: loss nan')
    skipped = next(line for line in lines if line['iter'] == 3)
    assert (skipped['loss'], skipped['grad_norm'], skipped['skipped']) == (None, None, 1)
    assert 'NaN' not in (tmp_path / 'metrics.jsonl').read_text(encoding='utf-8')  # which is not JSON
    before, after, end = (read_checkpoint(tmp_path / f'{name}.pt') for name in ('ckpt_00000003', 'ckpt_00000004', 'ckpt'))
    assert not differences(before['model'], after['model']) and not differences(before['optimizer']['state'], after['optimizer']['state'])
    assert differences(after['model'], end['model']) and all(tensor.isfinite().all() for tensor in end['model'].values())
    if dtype == 'float16':
        assert after['scaler']['scale'] == before['scaler']['scale'] / 2
    assert end['history'][:3] == [1, 0, 5]


def spoil(monkeypatch, from_iter, factor, to_iter=math.inf):
    """Multiplies the training loss of these iterations, of two micro-steps each."""
    loss_of, calls = GPT.loss_sum, []

    def spoiled(self, *args, **kwargs):
        loss = loss_of(self, *args, **kwargs)
        if self.training:
            calls.append(loss)
            if from_iter <= (len(calls) - 1) // 2 < to_iter:
                loss = loss * factor
        return loss

    monkeypatch.setattr(model_file.GPT, 'loss_sum', spoiled)


def test_a_spike_is_skipped_where_that_is_asked_for(tiny, tmp_path, monkeypatch):
    flags = *TINY, '--max_iters=26', '--eval_interval=50', '--log_interval=100', f'--dataset={tiny}'
    for name, own in (('off', []), ('on', ['--skip_spikes=3'])):
        with monkeypatch.context() as patch:
            spoil(patch, 23, 10.0, 24)
            stdout, lines = train(*flags, *own, out_dir=tmp_path / name)
        assert [line['iter'] for line in lines if line.get('skipped')] == ([23] if own else [])
        assert ('SPIKE, step skipped (1 so far)' in stdout) == bool(own)
        assert read_checkpoint(tmp_path / name / 'ckpt.pt')['history'][:3] == ([1, 0, 25] if own else [0, 0, 26])


def test_too_many_skipped_steps_end_the_run_and_leave_the_checkpoint(tiny, tmp_path, monkeypatch):
    flags = *TINY, '--max_skipped_steps=3', '--log_interval=100', f'--dataset={tiny}'
    with monkeypatch.context() as patch:
        spoil(patch, 7, math.nan)
        code, stdout, stderr, lines = train_here(*flags, out_dir=tmp_path)
    assert (code, stderr) == (2, f'3 steps in a row were skipped, up to iteration 9: the last good checkpoint is {tmp_path}/ckpt.pt of iteration 5 '
                                 '(best.pt: the lowest validation loss), continue from it with a lower --learning_rate or other data\n')
    assert [line['skipped'] for line in lines if line['iter'] > 5] == [1, 2, 3]
    state = read_checkpoint(tmp_path / 'ckpt.pt')
    assert state['iter_num'] == 5 and all(tensor.isfinite().all() for tensor in state['model'].values())


@pytest.mark.parametrize('arch, dtype', [('gpt2', 'float32'), ('modern', 'bfloat16')])
def test_activation_checkpointing_changes_no_bit(tiny, tmp_path, arch, dtype):
    flags = *TINY, '--max_iters=4', '--dropout=0.2', f'--arch={arch}', f'--dtype={dtype}', f'--dataset={tiny}'
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        forward = model_file.Block.forward
        patch.setattr(model_file.Block, 'forward', lambda self, *args: calls.append(self.training) or forward(self, *args))
        runs = []
        for i, own in enumerate(([], ['--activation_checkpointing=True'])):
            train(*flags, *own, out_dir=tmp_path / str(i))
            runs.append((read_checkpoint(tmp_path / str(i) / 'ckpt.pt'), sum(calls)))
            calls.clear()
    (plain, n_plain), (recomputed, n_recomputed) = runs
    assert n_recomputed == 2 * n_plain
    assert not differences(plain['model'], recomputed['model']) and not differences(plain['optimizer']['state'], recomputed['optimizer']['state'])


# -----------------------------------------------------------------------------
# disks and folders


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tiny, tmp_path, monkeypatch):
    resource = pytest.importorskip('resource')
    limits, dumps = resource.getrlimit(resource.RLIMIT_FSIZE), json.dumps

    def fill(line, *args, **kwargs):  # no file can grow beyond so many bytes from iteration 6 up to 11
        if 'loss' in line and line['iter'] in (6, 11):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]) if line['iter'] == 6 else limits)
        return dumps(line, *args, **kwargs)

    monkeypatch.setattr(json, 'dumps', fill)
    try:
        stdout, lines = train(*TINY, '--dropout=0.1', '--checkpoint_interval=5', '--eval_interval=10', f'--dataset={tiny}', out_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f'NOT SAVED at iteration 10, {tmp_path}/best.pt: File too large: the last good checkpoint is {tmp_path}/ckpt.pt of iteration 5' in stdout
    assert stdout.count('metrics.jsonl: File too large: the line of iteration') == 6  # 6 to 10 and an evaluation; 11 is whole again
    assert [line['iter'] for line in lines if 'loss' in line] == [*range(6), *range(11, 20)]
    assert sorted(contents(tmp_path)) == ['.lock', 'best.pt', 'ckpt.pt', 'ckpt_00000015.pt', 'metrics.jsonl', 'run.json']
    state = read_checkpoint(tmp_path / 'ckpt.pt')
    assert state['iter_num'] == 20 and read_checkpoint(tmp_path / 'best.pt')['best_val_loss'] == state['best_val_loss']


def test_the_best_weights_stay_where_only_the_newest_checkpoint_found_no_room(tiny, tmp_path, monkeypatch):
    write, losses, saves = files.write_atomically, [4.0, 3.0, 1.0, 2.0, 2.0], []

    def full(path, fill):
        saves.append(path.name)
        if path.name == 'ckpt.pt' and saves.count('ckpt.pt') == 2:  # of iteration 10, behind its best.pt
            raise OSError(errno.ENOSPC, 'No space left on device', str(path))
        write(path, fill)

    monkeypatch.setattr(checkpoint, 'write_atomically', full)
    monkeypatch.setattr(data, 'text_loss', lambda _, loader, *rest, **settings: scoring.TextLoss(losses.pop(0) if loader.splits[0].split == 'val' else 9.0, None, 1, 1))
    stdout, _ = train(*TINY, f'--dataset={tiny}', out_dir=tmp_path)
    assert stdout.count('NOT SAVED') == 1 and losses == []
    assert read_checkpoint(tmp_path / 'best.pt')['best_val_loss'] == read_checkpoint(tmp_path / 'ckpt.pt')['best_val_loss'] == 1.0


def test_a_metrics_file_that_is_moved_away_begins_anew(tiny, tmp_path, monkeypatch):
    dumps = json.dumps

    def move(line, *args, **kwargs):
        if line.get('iter') == 3 and (tmp_path / 'metrics.jsonl').exists():
            os.rename(tmp_path / 'metrics.jsonl', tmp_path / 'moved.jsonl')
        return dumps(line, *args, **kwargs)

    monkeypatch.setattr(json, 'dumps', move)
    _, lines = train(*TINY, '--max_iters=6', f'--dataset={tiny}', out_dir=tmp_path)
    assert [line['iter'] for line in lines if 'loss' in line] == [3, 4, 5]


def test_a_last_checkpoint_that_cannot_be_saved_is_an_error(tiny, tmp_path, monkeypatch):
    resource = pytest.importorskip('resource')
    limits, dumps = resource.getrlimit(resource.RLIMIT_FSIZE), json.dumps

    def fill(line, *args, **kwargs):
        if 'loss' in line and line['iter'] == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        return dumps(line, *args, **kwargs)

    monkeypatch.setattr(json, 'dumps', fill)
    try:
        code, _, stderr, _ = train_here(*TINY, '--max_iters=8', f'--dataset={tiny}', out_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, stderr) == (2, f'{tmp_path}/best.pt: File too large\n')
    assert read_checkpoint(tmp_path / 'ckpt.pt')['iter_num'] == 5 and not list(tmp_path.glob('.*.tmp*'))


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
def test_two_trainers_in_one_folder(tiny, tmp_path):
    (tmp_path / 'out').mkdir()
    child = os.fork()
    if child == 0:
        claim = files.lock(tmp_path / 'out')
        (tmp_path / 'ready').touch()
        signal.pause()
    wait_for((tmp_path / 'ready').exists)
    flags = *TINY, '--max_iters=1', f'--dataset={tiny}'
    assert refused(*flags, out_dir=tmp_path / 'out') == (f'{tmp_path / "out"}: another process is writing there, process {child} on {socket.gethostname()}: '
                                                         'wait for it, stop it, or use another folder')
    train(*flags, '--eval_only=True', out_dir=tmp_path / 'out')  # which writes nothing
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    train(*flags, out_dir=tmp_path / 'out')


def test_what_a_killed_process_left_is_removed_at_the_next_start(tiny, tmp_path):
    for name in ('.run.json.tmp7', '.metrics.jsonl.tmp12', '.loss.png.tmp7'):
        (tmp_path / name).touch()
    (tmp_path / '.lock').write_bytes(b'process \xff\x80')  # in no encoding
    code, _, stderr, _ = train_here(*TINY, f'--dataset={tiny}', '--max_iters=1', out_dir=tmp_path)
    assert code == 0 and not list(tmp_path.glob('.*.tmp*')), stderr


def test_altered_data_are_noticed_where_that_is_asked_for(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / 'data')
    ids = np.fromfile(folder / 'val.bin', dtype='<u2')
    ids[100] ^= 1
    ids.tofile(folder / 'val.bin')
    flags = *TINY, '--max_iters=1', f'--dataset={folder}'
    problem = f'{folder / "val.bin"} does not match its checksum in meta.json: it was cut short or altered, prepare the dataset again'
    assert refused(*flags, '--verify_data=True', out_dir=tmp_path / 'out') == problem
    train(*flags, out_dir=tmp_path / 'out')
    train(*TINY, '--max_iters=1', '--verify_data=True', f'--dataset={tiny}', out_dir=tmp_path / 'sound')


# -----------------------------------------------------------------------------
# nanoGPT's users


NANOGPT_CHAR_CONFIG = """
# train a miniature character-level model
out_dir = 'out-x'
eval_interval = 250 # keep frequent because we'll overfit
eval_iters = 2
log_interval = 10 # don't print too too often
always_save_checkpoint = False
wandb_log = False # override via command line if you like
wandb_project = 'chars'
wandb_run_name = 'mini-gpt'
dataset = 'x'
gradient_accumulation_steps = 1
batch_size = 4
block_size = 16
n_layer = 2
n_head = 2
n_embd = 16
dropout = 0.2
learning_rate = 1e-3
max_iters = 3
lr_decay_iters = 3 # make equal to max_iters usually
min_lr = 1e-4 # learning_rate / 10 usually
beta2 = 0.99 # make a bit bigger because number of tokens per iter is small
warmup_iters = 1 # not super necessary potentially
# on macbook also add
# device = 'cpu'  # run on cpu only
# compile = False # do not torch compile the model
"""
NANOGPT_FINETUNE_CONFIG = """
import time

out_dir = 'out-x'
eval_interval = 5
eval_iters = 2
wandb_log = False # feel free to turn on
wandb_project = 'x'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'x'
init_from = 'resume'
always_save_checkpoint = False

batch_size = 1
gradient_accumulation_steps = 8
max_iters = 5

# finetune at constant LR
learning_rate = 3e-5
decay_lr = False
"""


def test_config_files_of_nanogpt_run_as_they_stand(tiny, tmp_path):
    (tmp_path / 'train_char.py').write_text(NANOGPT_CHAR_CONFIG, encoding='utf-8')
    (tmp_path / 'finetune.py').write_text(NANOGPT_FINETUNE_CONFIG, encoding='utf-8')
    flags = f'--dataset={tiny}', '--device=cpu', '--compile=False'
    stdout, lines = train(tmp_path / 'train_char.py', *flags, out_dir=tmp_path / 'out')
    assert [line['iter'] for line in lines] == [0, 0, 3]
    stdout, lines = train(tmp_path / 'finetune.py', *flags, '--log_interval=1', out_dir=tmp_path / 'out')
    assert [line['lr'] for line in lines[-3:-1]] == [3e-5, 3e-5] and lines[-1]['iter'] == 5
    config = read_checkpoint(tmp_path / 'out' / 'ckpt.pt')['config']
    assert config['wandb_run_name'].startswith('ft-') and 'time' not in config


@pytest.fixture
def nanogpt_data(tmp_path):
    """A data folder as nanoGPT's prepare.py leaves it, and its tokenizer."""
    folder, text = tmp_path / 'nanogpt_data', sentences(1500, 1)
    chars = ''.join(sorted(set(text)))
    folder.mkdir()
    for split, part in (('train', text[:1200]), ('val', text[1200:])):
        np.array([chars.index(char) for char in part], dtype=np.uint16).tofile(folder / f'{split}.bin')
    with open(folder / 'meta.pkl', 'wb') as f:
        pickle.dump({'vocab_size': len(chars), 'itos': dict(enumerate(chars)), 'stoi': {char: i for i, char in enumerate(chars)}}, f)
    return folder, CharTokenizer(chars)


def test_a_data_folder_of_nanogpt_is_understood(nanogpt_data, tmp_path):
    folder, tokenizer = nanogpt_data
    stdout, lines = train(*TINY, '--max_iters=3', f'--dataset={folder}', out_dir=tmp_path / 'out')
    assert f'{folder} has no meta.json: reading uint16 shards with characters from meta.pkl, as nanoGPT does' in stdout
    state = read_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    assert (state['tokenizer'], state['vocab_size']) == (tokenizer.meta(), tokenizer.vocab_size)


def test_a_data_folder_of_gpt2_tokens_needs_no_tokenizer(tmp_path, monkeypatch):
    import tokens.tokenizer
    monkeypatch.setattr(tokens.tokenizer, 'fetch', lambda *args: pytest.fail('training asked for a file'))
    monkeypatch.setenv('FLATGPT_CACHE', str(tmp_path / 'empty'))
    folder = tmp_path / 'data'
    folder.mkdir()
    for split in ('train', 'val'):
        np.arange(50257 - 2000, 50257, dtype=np.uint16).tofile(folder / f'{split}.bin')
    stdout, lines = train(*TINY, '--max_iters=1', f'--dataset={folder}', out_dir=tmp_path / 'out')
    assert "reading uint16 shards with GPT-2's ids, as nanoGPT does" in stdout and 'vocabulary 50,304' in stdout
    assert lines[-1]['val_bpb'] is None and 'no bits per byte: the bytes of GPT-2' in stdout


@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
def test_a_checkpoint_of_nanogpt_resumes(nanogpt_data, tmp_path, prefix):
    """The step after it is the one that plain torch takes from the same weights and moments."""
    folder, tokenizer = nanogpt_data
    torch.manual_seed(0)
    model_args = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, bias=False, vocab_size=tokenizer.vocab_size, dropout=0.0)
    gpt = GPT(GPTConfig(**model_args, activation='gelu'))
    decay, no_decay = [p for p in gpt.parameters() if p.dim() >= 2], [p for p in gpt.parameters() if p.dim() < 2]
    adamw = torch.optim.AdamW([{'params': decay, 'weight_decay': 0.1}, {'params': no_decay, 'weight_decay': 0.0}], lr=1e-3, betas=(0.9, 0.99))

    def step(x, y):
        adamw.zero_grad()
        loss = gpt(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        adamw.step()
        return loss.item()

    loader = Loader(folder, 'train', block_size=16, batch_size=4, seed=1337)
    for it in range(6):
        step(*loader.batch(it)[:2])
    (tmp_path / 'out').mkdir()
    torch.save({
        'model': {prefix + name: tensor for name, tensor in gpt.state_dict().items()}, 'optimizer': adamw.state_dict(), 'model_args': model_args,
        'iter_num': 6, 'best_val_loss': torch.tensor(2.5), 'config': {'dataset': 'x', 'learning_rate': 1e-3, 'compile': True, 'device': 'cuda'},
    }, tmp_path / 'out' / 'ckpt.pt')
    flags = '--learning_rate=1e-3', '--beta2=0.99', '--decay_lr=False', '--batch_size=4', '--gradient_accumulation_steps=1', '--eval_iters=1'
    _, lines = train('--init_from=resume', '--max_iters=7', *flags, f'--dataset={folder}', '--device=cpu', '--dtype=float32', out_dir=tmp_path / 'out')

    assert lines[0]['loss'] == pytest.approx(step(*loader.batch(6)[:2]), abs=1e-5)
    state = read_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    assert (state['iter_num'], state['model_args']['activation']) == (7, 'gelu')
    for name, tensor in gpt.state_dict().items():
        torch.testing.assert_close(state['model'][name], tensor, rtol=0, atol=1e-6)


# -----------------------------------------------------------------------------
# wandb


WANDB = '''
import json, types
calls = []
api = types.SimpleNamespace(api_key=None)
def init(**kwargs):
    calls.append(json.loads(json.dumps(kwargs, default=str)))
    return types.SimpleNamespace(id=kwargs['id'] or 'abc123', log=lambda line, step: calls.append((step, line)))
'''


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A package of that name that writes down how it is used: the real one is not among the test's requirements."""
    (tmp_path / 'packages' / 'wandb').mkdir(parents=True)
    (tmp_path / 'packages' / 'wandb' / '__init__.py').write_text(WANDB, encoding='utf-8')
    monkeypatch.syspath_prepend(tmp_path / 'packages')
    monkeypatch.delenv('WANDB_MODE', raising=False)
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    yield lambda: sys.modules['wandb']
    sys.modules.pop('wandb', None)


def test_wandb_gets_every_line_and_is_resumed_under_its_id(tiny, tmp_path, wandb):
    flags = *TINY, '--wandb_log=True', '--wandb_project=my', '--wandb_run_name=42', f'--dataset={tiny}'
    stdout, lines = train(*flags, '--max_iters=2', out_dir=tmp_path / 'out')
    assert 'wandb: offline, for lack of a key' in stdout
    (init, *logged), wandb().calls[:] = wandb().calls, []
    config = init.pop('config')
    assert init == dict(project='my', name='42', id=None, resume=None, mode='offline', dir=str(tmp_path / 'out'))
    assert (config['n_embd'], config['max_iters'], config['wandb_log']) == (16, 2, True)
    assert logged == [(line['iter'], line) for line in lines]

    wandb().api.api_key = 'secret'
    stdout, lines = train('--init_from=resume', '--max_iters=4', '--device=cpu', out_dir=tmp_path / 'out')
    init = wandb().calls[0]
    assert (init['id'], init['resume'], init['mode']) == ('abc123', 'allow', 'online')
    assert 'secret' not in stdout + (tmp_path / 'out' / 'metrics.jsonl').read_text(encoding='utf-8')


def test_a_wandb_whose_process_dies_ends_alone(tiny, tmp_path, wandb):
    dead = WANDB.replace('lambda line, step: calls.append((step, line))', 'dead') + 'def dead(line, step): raise BrokenPipeError("no service")\n'
    (tmp_path / 'packages' / 'wandb' / '__init__.py').write_text(dead, encoding='utf-8')
    stdout, lines = train(*TINY, '--wandb_log=True', '--max_iters=2', f'--dataset={tiny}', out_dir=tmp_path / 'out')
    assert stdout.count('wandb: no service: nothing more is written there by this process') == 1
    assert lines[-1]['iter'] == 2 and (tmp_path / 'out' / 'ckpt.pt').exists()


def test_wandb_is_not_started_where_nothing_is_to_be_written(tiny, tmp_path, wandb):
    train(*TINY, '--wandb_log=True', '--eval_only=True', f'--dataset={tiny}', out_dir=tmp_path / 'out')
    assert 'wandb' not in sys.modules


# -----------------------------------------------------------------------------
# what bad input gets: one line, exit code 2, nothing written


def refused(*flags, out_dir):
    """The line on stderr."""
    before = contents(out_dir) if out_dir.is_dir() else out_dir.exists()
    code, _, stderr, _ = train_here(*flags, out_dir=out_dir)
    assert code == 2 and stderr.endswith('\n') and stderr.count('\n') == 1, stderr
    assert (contents(out_dir) if out_dir.is_dir() else out_dir.exists()) == before
    return stderr[:-1]


@pytest.mark.parametrize('flag, problem', [
    ('--batch_size=0', 'batch_size=0: accepted is 1 or more'),
    ('--block_size=0', 'block_size=0: accepted is 1 or more'),
    ('--gradient_accumulation_steps=0', 'gradient_accumulation_steps=0: accepted is 1 or more'),
    ('--eval_interval=0', 'eval_interval=0: accepted is 1 or more'),
    ('--log_interval=0', 'log_interval=0: accepted is 1 or more'),
    ('--max_iters=0', 'max_iters=0: accepted is 1 or more'),
    ('--restart_mult=0', 'restart_mult=0: accepted is 1 or more'),
    ('--eval_iters=-1', 'eval_iters=-1: accepted is 0 or more'),
    ('--checkpoint_interval=-1', 'checkpoint_interval=-1: accepted is 0 or more'),
    ('--keep_last_n_checkpoints=-2', 'keep_last_n_checkpoints=-2: accepted is -1 or more'),
    ('--warmup_iters=-1', 'warmup_iters=-1: accepted is 0 or more'),
    ('--learning_rate=-1', 'learning_rate=-1.0: accepted is 0 or more'),
    ('--learning_rate=inf', 'learning_rate=inf: accepted is 0 or more, below inf'),
    ('--grad_clip=-1', 'grad_clip=-1.0: accepted is 0 or more'),
    ('--skip_spikes=0.5', 'skip_spikes=0.5 would skip steps below the running mean: accepted is 0 (off) or more than 1, such as 3'),
    ('--max_skipped_steps=0', 'max_skipped_steps=0: accepted is 1 or more'),
    ('--timeout_s=0', 'timeout_s=0: accepted is 1 or more, below 2147483648'),
    ('--shard_ranks=2', 'shard_ranks=2 is for --parallel=fsdp: add it, or use --shard_ranks=0'),
    ('--beta2=1', 'beta2=1.0: accepted is 0 or more, below 1'),
    ('--seed=-1', 'seed=-1: accepted is 0 or more, below 9223372036854775808'),
    ('--dropout=1.5', 'dropout=1.5: accepted is 0.0 or more, below 1.0'),
    ('--n_embd=15', 'n_embd=15, n_head=2: accepted is a multiple of 2'),
    ('--n_layer=0', 'n_layer=0: accepted is 1 or more, below 2**31'),
    ('--arch=modern --bias=True', 'bias=True: accepted with arch=modern is False'),
    ('--device=cudda', 'device=cudda: accepted are auto, cpu, cuda, cuda:N, mps'),
    ('--dtype=float64', "--dtype=float64: accepted are auto, float32, bfloat16, float16; did you mean float16?"),
    ('--learnin_rate=1', '--learnin_rate: unknown setting, did you mean --learning_rate?'),
    ('--init_from=gpt5', 'init_from=gpt5: no such model, accepted are scratch, resume, checkpoint, gpt2, gpt2-medium, gpt2-large, gpt2-xl, '
                         'ORGANIZATION/NAME[@REVISION] on the hub, a folder with config.json and model.safetensors, or an .npz file that save_pretrained wrote'),
])
def test_a_setting_that_makes_no_sense(tiny, tmp_path, flag, problem):
    assert refused(*TINY, f'--dataset={tiny}', *flag.split(), out_dir=tmp_path / 'out') == problem


@pytest.mark.parametrize('flags', [
    '--learning_rate=0', '--learning_rate=1e-5 --min_lr=6e-5', '--warmup_iters=50', '--lr_decay_iters=0', '--seed=9223372036854775807', '--seed=20240101', '--grad_clip=0',
    '--decay_lr=False --min_lr=1', '--optimizer=muon --matrix_lr=0', '--log_interval=99 --eval_interval=99',
    '--lr_schedule=wsd --decay_fraction=0', '--batch_size=400'])
def test_a_setting_that_makes_unusual_sense(tiny, tmp_path, flags):
    stdout, lines = train(*TINY, '--max_iters=3', f'--dataset={tiny}', *flags.split(), out_dir=tmp_path)
    assert math.isfinite(lines[-1]['val_loss']) and lines[-1]['iter'] == 3


def test_a_mistake_costs_a_process_one_line_and_exit_code_2(tmp_path):
    code, stdout, stderr, _ = run_train('--dataset=none_such', out_dir=tmp_path / 'out')
    assert code == 2 and stderr.count('\n') == 1 and 'Traceback' not in stdout + stderr
    assert 'none_such/train.bin is missing: a dataset is a folder with train.bin and val.bin' in stderr
    assert not (tmp_path / 'out').exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
def test_cuda_where_there_is_none(tiny, tmp_path):
    problem = refused(*TINY, '--device=cuda', f'--dataset={tiny}', out_dir=tmp_path / 'out')
    assert re.fullmatch('device=cuda is not available here: (use --device=auto|this PyTorch was built for CUDA .*)', problem)


def test_nothing_to_resume(tmp_path):
    out_dir = tmp_path / 'out'
    assert refused('--init_from=resume', '--device=cpu', out_dir=out_dir) == \
        f'{out_dir} has no checkpoint to resume: use --init_from=scratch, or another --out_dir'


def test_a_dataset_that_is_not_prepared(tmp_path):
    folder = tmp_path / 'mine'
    folder.mkdir()
    (folder / 'prepare.py').write_text('', encoding='utf-8')
    assert refused(*TINY, f'--dataset={folder}', out_dir=tmp_path / 'out') == f'{folder} is not prepared: run python {folder / "prepare.py"}'


def test_a_validation_split_that_is_too_short(tmp_path):
    folder = pack_chars(tmp_path / 'data', sentences(1000, 1), sentences(16, 1), ''.join(sorted(set(sentences(1000, 1)))))
    assert refused(*TINY, f'--dataset={folder}', out_dir=tmp_path / 'out') == \
        f'{folder}: the val split has no shard of 17 tokens or more: use a smaller --block_size or more text'


@pytest.mark.parametrize('split', ['train', 'val'])
def test_ids_of_another_tokenizer(tiny, tmp_path, split):
    folder = shutil.copytree(tiny, tmp_path / 'data')
    ids = np.fromfile(folder / f'{split}.bin', dtype='<u2')
    (ids + 21).tofile(folder / f'{split}.bin')
    problem = refused(*TINY, f'--dataset={folder}', out_dir=tmp_path / 'out')
    found = re.fullmatch(rf'{re.escape(str(folder / f"{split}.bin"))} offset (\d+): token id (\d+) is beyond vocab_size 21: '
                         'the shard was made with another tokenizer or altered, prepare the dataset again', problem)
    assert found and int(found[2]) == ids[int(found[1])] + 21


def test_one_foreign_id_stops_the_run_at_its_batch(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / 'data')
    ids = np.fromfile(folder / 'train.bin', dtype='<u2')
    ids[700] = 21
    ids.tofile(folder / 'train.bin')
    code, _, stderr, lines = train_here(*TINY, '--eval_iters=1', '--batch_size=1', '--gradient_accumulation_steps=1', '--max_iters=99',
                                        f'--dataset={folder}', out_dir=tmp_path / 'out')
    assert code == 2 and f'{folder / "train.bin"} offset 700: token id 21 is beyond vocab_size 21' in stderr and stderr.count('\n') == 1
    read_checkpoint(tmp_path / 'out' / 'ckpt.pt')


def test_a_shard_that_was_cut_short(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / 'data')
    data = (folder / 'train.bin').read_bytes()
    (folder / 'train.bin').write_bytes(data[:-3])
    assert refused(*TINY, f'--dataset={folder}', out_dir=tmp_path / 'out').startswith(f'{folder / "train.bin"} has {len(data) - 3} bytes, expected ')


def test_out_dir_that_cannot_be_made(tiny, tmp_path):
    (tmp_path / 'file').write_text('', encoding='utf-8')
    assert refused(*TINY, f'--dataset={tiny}', out_dir=tmp_path / 'file') == f'{tmp_path / "file"}: File exists'
    assert refused(*TINY, f'--dataset={tiny}', out_dir=tmp_path / 'file' / 'out') == f'{tmp_path / "file" / "out"}: Not a directory'


@pytest.mark.parametrize('package', ['wandb', 'tensorboard'])
def test_a_logger_that_is_not_installed(package, tiny, tmp_path, monkeypatch):
    import importlib.util
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *args: None if name == package else find_spec(name, *args))
    assert refused(*TINY, f'--{package}_log=True', f'--dataset={tiny}', out_dir=tmp_path / 'out') == \
        f'{package}_log=True: {package} is not installed: pip install {package}, or use --{package}_log=False'


def test_a_gradient_of_zero_in_the_first_step_ends_the_run(tiny, tmp_path, monkeypatch):
    loss_of = GPT.loss_sum
    monkeypatch.setattr(GPT, 'loss_sum', lambda self, *args: loss_of(self, *args) * 0.0 + 3.0)  # torch 2.11, compiled: norm 0.000
    code, _, stderr, _ = train_here(*TINY, '--max_iters=6', f'--dataset={tiny}', out_dir=tmp_path)
    assert code == 2 and stderr.startswith('the gradient of step 0 is exactly zero'), stderr


def test_a_short_last_batch_of_an_evaluation_compiles_nothing_anew(tiny, tmp_path, monkeypatch):
    graphs, compile = [], torch.compile
    torch._dynamo.reset()  # what other tests have compiled

    def backend(graph, inputs):
        graphs.append([tuple(each.shape) for each in inputs if isinstance(each, torch.Tensor) and each.dtype == torch.int64])
        return graph.forward

    monkeypatch.setattr(torch, 'compile', lambda function, **settings: compile(function, backend=backend, **settings))
    train(*TINY, '--compile=True', '--eval_iters=0', '--max_iters=6', '--eval_interval=3', f'--dataset={tiny}', out_dir=tmp_path)
    assert [shapes for shapes in graphs if shapes] == [[(4, 16), (4, 16)]]  # the training step, once; 500 tokens end in 3 windows


@pytest.mark.parametrize('flag, kind', [('--tokenizer=byte', 'dataset=stream:PATH'), ('--field=title', 'dataset=stream:PATH')])
def test_a_flag_that_the_data_would_ignore_is_refused(tiny, tmp_path, flag, kind):
    problem = refused(*TINY, flag, f'--dataset={tiny}', out_dir=tmp_path / 'out')
    assert problem.startswith(flag[2:].split('=')[0]) and f' is for {kind}, the dataset is {tiny}: leave it out' in problem


def test_the_whole_validation_split_is_evaluated_beside_as_many_training_windows(tiny, tmp_path, monkeypatch):
    counts, measure = [], data.text_loss
    monkeypatch.setattr(data, 'text_loss', lambda model, loader, windows, **settings: counts.append(len(windows)) or measure(model, loader, windows, **settings))
    train(*TINY, '--eval_iters=0', '--eval_only=True', f'--dataset={tiny}', out_dir=tmp_path)
    assert counts == [32, 32]  # 500 tokens in windows of 16; the training split has 65
