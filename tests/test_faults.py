"""Faults made on purpose: kills, damage, lost ranks, wrong settings, hostile files, no network. docs/RELIABILITY.md has the counts.

    python -m pytest tests/test_faults.py                # the reduced size, part of every run
    python -m pytest -m full tests/test_faults.py        # the full one, some 20 minutes; ends with a table of what it counted
"""

import collections
import contextlib
import importlib.util
import json
import mmap
import os
import pickle
import random
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    differences,
    last_iter,
    read_checkpoint,
    read_metrics,
    run_here,
    survives,
    train_here,
    train_settings,
    wait_for,
)
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ranks import read_heard, start_ranks, wait
from test_resume import trajectory, without_times

import checkpoint
from configurator import accepted_by, config_of
from training.checks import LIMITS

pytestmark = [pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks and kills processes'),
              pytest.mark.filterwarnings('ignore:This process')]  # torch has threads, the children use none of them


def sized(reduced, full):
    """Runs a test at two sizes: the first in every run, the second with -m full."""
    return pytest.mark.parametrize('n', [reduced, pytest.param(full, marks=pytest.mark.full)])


@pytest.fixture(scope='module')
def rows(request):
    """The rows of the table that a full run ends with."""
    rows, started = [], time.monotonic()
    yield rows
    if 'full' in (request.config.option.markexpr or '').split():
        lines = ['', '', '| fault | what was counted | time |', '| --- | --- | --- |', *rows, f'whole suite: {time.monotonic() - started:.0f} s']
        with request.config.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled():
            print('\n'.join(lines))


@pytest.fixture
def tally(rows):
    """Takes the fault and what was counted, at the end of a test."""
    started = time.monotonic()
    return lambda fault, counted: rows.append(f'| {fault} | {counted} | {time.monotonic() - started:.0f} s |')


# -----------------------------------------------------------------------------
# saving: kill -9, and the order of what reaches the disk

PHASES = ('between saves', 'write', 'fsync', 'replace', 'fsync of the folder')


def state_of(iter_num):
    """A checkpoint of 2 MB whose every number follows from iter_num."""
    return dict(model={name: torch.full((150_000,), float(iter_num + i)) for i, name in enumerate('abc')}, optimizer={'state': {}, 'param_groups': []},
                scaler={}, model_args=dict(block_size=8, vocab_size=13, n_layer=1, n_head=2, n_embd=8), iter_num=iter_num, best_val_loss=2.5, config={},
                run_id='a', format=checkpoint.FORMAT)


def resumed(folder):
    """The CheckpointFolder of a process that resumes the newest checkpoint of a folder, or begins where there is none."""
    newest = folder / 'ckpt.pt'
    if not newest.exists():
        return checkpoint.CheckpointFolder(folder)
    return checkpoint.CheckpointFolder(folder, newest, read_checkpoint(newest)['iter_num'])


def save(folder, state, **settings):
    resumed(folder).save(state, **settings)


def save_without_end(folder, iter_num, note):
    """Saves state after state; note[0] tells the phase, note[1] whether iter_num is being saved for the first time, note[2:10] iter_num."""
    def during(phase, work):
        def wrapped(*args, **kwargs):
            note[0] = PHASES.index(phase) if phase != 'fsync' or not stat.S_ISDIR(os.fstat(args[0]).st_mode) else PHASES.index('fsync of the folder')
            try:
                return work(*args, **kwargs)
            finally:
                note[0] = 0
        return wrapped
    torch.save, os.fsync, os.replace = during('write', torch.save), during('fsync', os.fsync), during('replace', os.replace)
    checkpoints = resumed(folder)
    while True:
        iter_num += 10
        note[2:10] = iter_num.to_bytes(8, 'little')
        note[1] = 1
        checkpoints.save(state_of(iter_num), keep_last_n=1, is_best=iter_num % 20 == 0)


@sized(40, 2000)
def test_kill_9_at_random_moments_of_saving_loses_no_checkpoint(n, tmp_path, tally):
    draw, landed, note = random.Random(n), collections.Counter(), mmap.mmap(-1, 10)
    started = time.perf_counter()
    for iter_num in range(10, 60, 10):
        save(tmp_path, state_of(iter_num), keep_last_n=1, is_best=True)
    one_save_s = (time.perf_counter() - started) / 5
    for _ in range(n):
        note[:] = bytes(10)
        child = os.fork()
        if child == 0:
            try:
                save_without_end(tmp_path, iter_num, note)
            finally:
                os._exit(1)
        while not note[1]:
            time.sleep(0.0002)
        time.sleep(draw.uniform(0, 2.5 * one_save_s))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        begun = int.from_bytes(note[2:10], 'little')
        landed[PHASES[note[0]]] += 1
        state, path = checkpoint.load_newest(tmp_path)
        assert path.name == 'ckpt.pt' and state['iter_num'] in (begun - 10, begun)
        assert not differences(state, state_of(state['iter_num']))
        assert checkpoint.load(tmp_path / 'best.pt')['iter_num'] <= begun
        iter_num = state['iter_num']
    assert not list(tmp_path.glob('*.corrupt'))
    save(tmp_path, state_of(iter_num + 10), keep_last_n=1)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ['best.pt', 'ckpt.pt', f'ckpt_{iter_num:08d}.pt']
    tally('kill -9 at random moments of saving', f'{n} kills, 0 checkpoints lost; landed in: '
          + ', '.join(f'{phase} {landed[phase]}' for phase in PHASES))


@sized(3, 30)
def test_kill_9_before_each_change_that_saving_makes(n, tmp_path, tally):
    kills = 0
    for i in range(n):  # saves that find different folders
        folder = tmp_path / str(i)
        folder.mkdir()
        for k in range(i % 5):
            save(folder, state_of(10 * k), keep_last_n=i % 3, is_best=k == 1)
        before = 10 * (i % 5) - 10
        for change in range(100):
            trial = shutil.copytree(folder, tmp_path / 'trial')
            whole = survives(change, lambda: save(trial, state_of(before + 10), keep_last_n=2 - i % 3, is_best=True))
            state, _ = checkpoint.load_newest(trial)
            assert (state or {'iter_num': -10})['iter_num'] in ([before + 10] if whole else [before, before + 10])
            assert not list(trial.glob('*.corrupt'))
            shutil.rmtree(trial)
            if whole:
                break
            kills += 1
        assert whole
    tally('kill -9 before each change that a save makes to the folder', f'{kills} kills, 0 checkpoints lost')


def test_the_order_in_which_a_save_reaches_the_disk(tmp_path):
    """Recorded by the interpreter's audit events: each file is whole and on the disk before its name, the name before what it makes superfluous."""
    for iter_num in (10, 20, 30):
        save(tmp_path, state_of(iter_num), keep_last_n=1)
    events, name, fsync = [], os.path.basename, os.fsync

    def record(event, args):
        if events is None or (event == 'open' and not (isinstance(args[1], str) and args[1].startswith('w'))):
            return
        if event in ('open', 'os.remove'):
            events.append(f'{event} {name(args[0])}')
        if event in ('os.rename', 'os.link'):
            events.append(f'{event} {name(args[0])} {name(args[1])}')

    def recorded_fsync(descriptor):
        known = os.fstat(descriptor)
        events.append('fsync folder' if stat.S_ISDIR(known.st_mode) else f'fsync {known.st_size}')
        fsync(descriptor)

    child = os.fork()  # an audit hook stays for good
    if child == 0:
        try:
            os.fsync = recorded_fsync
            sys.addaudithook(record)
            save(tmp_path, state_of(40), keep_last_n=1, is_best=True)
            found, events = events, None
            (tmp_path / 'events').write_text(json.dumps(found), encoding='utf-8')
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    sizes = {file: (tmp_path / file).stat().st_size for file in ('ckpt.pt', 'best.pt')}
    published = [[f'open .{file}.tmp{child}', f'fsync {sizes[file]}', f'os.rename .{file}.tmp{child} {file}', 'fsync folder'] for file in ('best.pt', 'ckpt.pt')]
    assert json.loads((tmp_path / 'events').read_text(encoding='utf-8')) == [
        'os.remove ckpt_00000030.pt', 'os.link ckpt.pt ckpt_00000030.pt', *published[0], *published[1], 'os.remove ckpt_00000020.pt']


# -----------------------------------------------------------------------------
# a damaged checkpoint


@pytest.fixture(scope='module')
def trained(tiny, tmp_path_factory):
    """out_dir of a run with ckpt.pt of iteration 10 and ckpt_00000005.pt. Not to be changed."""
    out_dir = tmp_path_factory.mktemp('trained')
    code, _, stderr, _ = train_here(*TINY, '--max_iters=10', f'--dataset={tiny}', out_dir=out_dir)
    assert code == 0, stderr
    return out_dir


def flip(data, draw):
    bit = draw.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8


def truncate(data, draw):
    del data[draw.choice([draw.randrange(len(data)), len(data) - 1 - draw.randrange(100)]):]


def zero_page(data, draw):
    start = draw.randrange(0, len(data), 4096)
    data[start:start + 4096] = bytes(len(data[start:start + 4096]))


@sized(1, 20)
def test_every_damage_is_noticed_and_the_older_checkpoint_taken(n, trained, tmp_path, tally):
    whole, older, draw = (trained / 'ckpt.pt').read_bytes(), trained / 'ckpt_00000005.pt', random.Random(0)
    expected = checkpoint.load(older)
    shutil.copy(older, tmp_path)
    for damage, times in ((flip, 20 * n), (truncate, 10 * n), (zero_page, 3 * n)):
        for _ in range(times):
            data = bytearray(whole)
            damage(data, draw)
            if data == whole:  # a page of zeros
                continue
            (tmp_path / 'ckpt.pt').write_bytes(data)
            state, path = checkpoint.load_newest(tmp_path, rename_damaged=True)
            assert path.name == older.name and not (tmp_path / 'ckpt.pt').exists(), damage.__name__
        assert not differences(state, expected)
    tally('flipped bits, truncations, zeroed pages in a checkpoint', f'{20 * n} + {10 * n} + {3 * n}: all noticed, the older checkpoint taken, 0 silent')


# -----------------------------------------------------------------------------
# resuming


@pytest.mark.parametrize('flags', ['', '--optimizer=muon --arch=modern'])
@sized([1, 8, 39], range(1, 40))
def test_resuming_at_any_step_is_bit_equal(n, flags, tiny, tmp_path, tally):
    flags = [*TINY, f'--dataset={tiny}', '--dropout=0.1', '--max_iters=40', '--eval_interval=40', *flags.split()]
    assert train_here(*flags, out_dir=tmp_path / 'unbroken')[0] == 0
    assert train_here(*flags, '--checkpoint_interval=1', '--keep_last_n_checkpoints=-1', out_dir=tmp_path / 'saved')[0] == 0
    weights, lines = read_checkpoint(tmp_path / 'unbroken' / 'ckpt.pt')['model'], trajectory(read_metrics(tmp_path / 'unbroken'))
    for k in n:
        out_dir = tmp_path / str(k)
        code, _, stderr, found = train_here('--init_from=resume', f'--checkpoint_path={tmp_path}/saved/ckpt_{k:08d}.pt', '--checkpoint_interval=0',
                                            '--device=cpu', out_dir=out_dir)
        assert code == 0, stderr
        assert trajectory(found) == lines[k:]
        assert not differences(read_checkpoint(out_dir / 'ckpt.pt')['model'], weights)
    tally(f'resume at every k of 1..39, dropout on, {flags[-1].removeprefix("--")}', f'{len(n)} resumed runs: losses and weights bit-equal')


# -----------------------------------------------------------------------------
# many ranks: small rates, so that rounding does not grow into the comparison

STEADY = *TINY, '--learning_rate=1e-4', '--min_lr=1e-5', '--warmup_iters=2', '--eval_interval=1000'


def run_ranks(*flags, out_dir, n_ranks, folder, listen=''):
    log = folder / 'ranks.txt'
    codes = wait(start_ranks(*flags, out_dir=out_dir, n_ranks=n_ranks, log=log, listen=listen))
    assert codes == [0] * n_ranks, log.read_text(encoding='utf-8')


@sized(8, 50)
def test_any_world_size_sees_the_same_tokens_and_losses(n, tiny, tmp_path, tally):
    flags = [*STEADY, f'--dataset={tiny}', f'--lr_decay_iters={n}']
    first, second = n // 3, 2 * n // 3
    plans = {'1': [(1, n)], '2': [(2, n)], '4': [(4, n)], '2 to 1 to 4': [(2, first), (1, second), (4, n)]}
    losses, heard = {}, {}
    for name, plan in plans.items():
        (tmp_path / name).mkdir()
        for world_size, until in plan:
            run_ranks(*flags, '--auto_resume=True', f'--max_iters={until}', out_dir=tmp_path / name / 'out', n_ranks=world_size,
                      folder=tmp_path, listen=tmp_path / name)
        losses[name] = [line['loss'] for line in read_metrics(tmp_path / name / 'out') if 'loss' in line]
        heard[name] = read_heard(tmp_path / name)
        assert len(losses[name]) == n
    assert len(heard['1']) == n and all(heard[name] == heard['1'] for name in plans)
    worst = max(abs(a / b - 1) for name in plans for a, b in zip(losses[name], losses['1'], strict=True))
    assert worst < 1e-6
    tally('world sizes 1, 2, 4, and 2 to 1 to 4 in one run', f'{n} steps each: the same tokens in every step, losses within {worst:.1e} relative')


def pids_of_ranks(torchrun):
    """The processes that a torchrun has started and that have not ended."""
    found = []
    for entry in Path('/proc').iterdir():
        if entry.name.isdigit():
            try:
                parts = (entry / 'stat').read_text(encoding='utf-8').rpartition(')')[2].split()
                if int(parts[1]) == torchrun and parts[0] != 'Z' and b'train.py' in (entry / 'cmdline').read_bytes():
                    found.append(int(entry.name))
            except OSError:  # it has just gone
                pass
    return found


def torchrun(*flags, out_dir, log, max_restarts=0, n_ranks=2, script=ROOT / 'train.py', **env):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n_ranks}', f'--max_restarts={max_restarts}',
               '--signals_to_handle=SIGTERM,SIGINT,SIGUSR1', str(script), *flags, f'--out_dir={out_dir}']
    with open(log, 'a', encoding='utf-8') as output:
        return subprocess.Popen(command, stdout=output, stderr=output,
                                env={**os.environ, 'OMP_NUM_THREADS': '1', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1', **env})


# train.py, whose ranks wait for a file before a step: the kills come at any moment, and never too late
WAITING_TRAIN = '''
import runpy, sys, time
from pathlib import Path
train, go, last = {!r}, Path({!r}), {}
sys.path.insert(0, str(Path(train).parent))
from tokens.loader import Loader
batch = Loader.batch
def wait_and_batch(self, step, micro_step=0):
    while step == last and not go.exists():
        time.sleep(0.01)
    return batch(self, step, micro_step)
Loader.batch, sys.argv[0] = wait_and_batch, train
runpy.run_path(train, run_name='__main__')
'''


@pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='finds the ranks in /proc')
@pytest.mark.parametrize('kills, n_iters', [(1, 60), pytest.param(10, 600, marks=pytest.mark.full)])
def test_torchrun_rides_through_kill_9_of_random_ranks(kills, n_iters, tiny, tmp_path, tally):
    flags = [*TINY, f'--dataset={tiny}', '--dropout=0.1', f'--max_iters={n_iters}', '--checkpoint_interval=10', '--eval_interval=100', '--auto_resume=True']
    run_ranks(*flags, out_dir=tmp_path / 'unbroken', n_ranks=2, folder=tmp_path)
    draw, out_dir, log = random.Random(kills), tmp_path / 'out', tmp_path / 'log.txt'
    at = sorted(draw.randrange(n_iters // 10, n_iters * 8 // 10) for _ in range(kills))
    script, go = tmp_path / 'waiting_train.py', tmp_path / 'go'
    script.write_text(WAITING_TRAIN.format(str(ROOT / 'train.py'), str(go), n_iters - 1), encoding='utf-8')
    launched = torchrun(*flags, out_dir=out_dir, log=log, max_restarts=3 * kills, script=script)
    hit, ends_at = [], time.monotonic() + 600 + 60 * kills  # the ranks that were there at each kill: what comes after is a restart
    try:
        while launched.poll() is None and time.monotonic() < ends_at:
            ranks = pids_of_ranks(launched.pid)
            if len(hit) < kills and last_iter(out_dir) >= at[len(hit)] and len(ranks) == 2 and not any(set(ranks) & set(before) for before in hit):
                os.kill(draw.choice(ranks), signal.SIGKILL)
                hit.append(ranks)
            if len(hit) == kills:
                go.touch()
            time.sleep(0.02)
        assert launched.poll() == 0 and len(hit) == kills, log.read_text(encoding='utf-8')[-3000:]
    finally:
        launched.kill()
    assert pids_of_ranks(launched.pid) == []
    assert without_times(read_metrics(out_dir)) == without_times(read_metrics(tmp_path / 'unbroken'))
    assert not differences(*(read_checkpoint(folder / 'ckpt.pt')['model'] for folder in (out_dir, tmp_path / 'unbroken')))
    tally('two ranks under torchrun, kill -9 of random ranks, restarts', f'{kills} kills in {n_iters} steps: every loss and the weights bit-equal')


# -----------------------------------------------------------------------------
# wrong settings

DEFAULTS = config_of(train_settings())
ACCEPTED = accepted_by(train_settings())
BOUNDS = {name: (least, below) for least, below, names in LIMITS for name in names.split()}
NOT_A_NUMBER = st.one_of(st.sampled_from(['nan', '', '1e', '0x10', '--5', '1,5', 'None1', '1 000', 'many']), st.text(
    st.characters(exclude_categories=['Cs', 'Nd', 'Cc']), min_size=1).filter(lambda text: text.strip().lower() not in ('nan', 'inf', 'infinity', 'none')))
MISSPELT = st.sampled_from(sorted(DEFAULTS)).flatmap(lambda name: st.sampled_from(
    [name + 's', name[:-1], 'x_' + name, name.upper(), name.replace('_', '') + 'q', name[::-1]])).filter(lambda name: name and name not in DEFAULTS)


def wrong_value(name):
    """Texts that a setting cannot have, whatever the others are."""
    options, wrong = ACCEPTED[name], []
    words = [option for option in options if isinstance(option, str)]
    if int in options or float in options:
        wrong += [NOT_A_NUMBER.filter(lambda text: text not in ('None', *words))]
        least, below = BOUNDS.get(name, (None, None))
        if name in ('n_layer', 'n_head', 'n_embd'):
            least, below = 1, float('inf')
        if name in ('dropout', 'decay_fraction'):
            least, below = 0, 1.0000001
        if name == 'loss_chunks':
            least = 0
        if least is not None:
            wrong += [st.integers(-10 ** 6, least - 1).map(str), st.just('-inf')]
        if below not in (None, float('inf')):
            wrong += [st.integers(int(below) + 1, 2 ** 70).map(str), st.just('inf')]
        if int in options and float not in options:
            wrong += [st.sampled_from(['1.5', '-0.5', 'inf', '1e400', 'True'])]
    elif bool in options or words:
        wrong += [st.one_of(st.sampled_from(['2', 'yes', 'AUTO', 'none', 'tru', '']), st.text(
            st.characters(exclude_categories=['Cs', 'Cc']))).filter(lambda text: text not in (*words, 'True', 'true', '1', 'False', 'false', '0'))]
    if name in ('device', 'init_from'):
        wrong += [st.text('abcdefghij', min_size=4, max_size=9).filter(lambda text: text not in DEFAULTS)]
    if name == 'dataset':
        wrong += [st.sampled_from(['', 'a:', ':1', 'a:0', 'a:-1', 'a:nan', 'a,,b', 'no_such_data', 'no/such/data', 'a\0b'.replace('\0', '?')])]
    if name == 'out_dir':
        wrong += [st.just('')]
    if name == 'checkpoint_path':
        wrong += [st.sampled_from(['no_such.pt', '.', 'x' * 3000])]
    return st.one_of(wrong) if wrong else None


CAN_BE_WRONG = {name: values for name in DEFAULTS if (values := wrong_value(name)) is not None}
WRONG = st.one_of(MISSPELT.flatmap(lambda name: st.tuples(st.just(name), st.text(st.characters(exclude_categories=['Cs', 'Cc']), max_size=5))),
                  *(st.tuples(st.just(name), values) for name, values in CAN_BE_WRONG.items()))


@sized(40, 500)
def test_a_wrong_setting_ends_in_one_line_that_names_it(n, tiny, tmp_path, tally):
    seen = collections.Counter()

    @hypothesis_settings(max_examples=n, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=WRONG, where=st.sampled_from(['--key=value', '--key value', 'file']))
    def check(case, where):
        (name, value), out_dir = case, tmp_path / 'out'
        config = tmp_path / 'config.py'
        config.write_text(f'{name} = {value!r}\n', encoding='utf-8')
        given = {'--key=value': [f'--{name}={value}'], '--key value': [f'--{name}', value], 'file': [config]}[where]
        if where == '--key value' and (value.startswith('--') or bool in ACCEPTED.get(name, ())):  # a flag alone is true, what follows a config file
            given = [f'--{name}={value}']
        right = [flag for flag in (*TINY, f'--dataset={tiny}', f'--out_dir={out_dir}') if not flag.startswith(f'--{name}=')]
        code, stdout, stderr = run_here('train.py', *right, *given)
        assert code == 2 and stderr.count('\n') == 1 and 'Traceback' not in stderr, (given, stdout, stderr)
        assert name in stderr, (given, stderr)
        assert not out_dir.exists(), given
        seen[name if name in DEFAULTS else 'unknown'] += 1
    check()
    tally('wrong settings, generated', f'{sum(seen.values())} ({len(seen) - 1} settings, {seen["unknown"]} names that are none): exit code 2, one line that names it')


# -----------------------------------------------------------------------------
# no network

NO_NETWORK = '''
import runpy, socket, sys
try:
    socket.create_connection(('1.1.1.1', 53), timeout=5)
except OSError:
    pass
else:
    sys.exit('there is a network')
root, *scripts = sys.argv[1:]
for words in scripts:
    sys.argv = [root + '/' + words.split()[0], *words.split()[1:]]
    runpy.run_path(sys.argv[0], run_name='__main__')
'''


def without_network(*command, env):
    """Runs a command with the loopback as its only network; what it prints."""
    done = subprocess.run(['unshare', '-rn', 'sh', '-c', 'ip link set lo up; exec "$@"', 'sh', *command], env=env, capture_output=True, text=True,
                          encoding='utf-8', timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not shutil.which('unshare') or subprocess.run(['unshare', '-rn', 'true'], capture_output=True).returncode != 0, reason='needs unshare -rn')
@pytest.mark.parametrize('full', [False, pytest.param(True, marks=pytest.mark.full)])
def test_train_resume_and_sample_need_no_network(full, tiny, tmp_path, tally):
    out_dir, wandb = tmp_path / 'out', full and importlib.util.find_spec('wandb') is not None
    scripts = [f'train.py {" ".join(TINY)} --dataset={tiny} --max_iters=4 --eval_interval=2 --out_dir={out_dir}' + ' --wandb_log=True' * wandb,
               f'train.py --init_from=resume --device=cpu --max_iters=6 --out_dir={out_dir}',
               f'sample.py --device=cpu --num_samples=1 --max_new_tokens=20 --out_dir={out_dir}']
    env = {k: v for k, v in os.environ.items() if not k.startswith('WANDB')}
    env |= {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'HOME': str(tmp_path)}
    for group in [[script] for script in scripts] if full else [scripts]:
        stdout = without_network(sys.executable, '-c', NO_NETWORK, str(ROOT), *group, env=env)
    assert [line['iter'] for line in read_metrics(out_dir) if 'loss' in line] == list(range(6)) and stdout.endswith('---------------\n')
    if wandb:
        assert len(list(out_dir.glob('wandb/offline-run-*/*.wandb'))) == 2
    if full:
        without_network(sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(ROOT / 'train.py'), *TINY,
                        f'--dataset={tiny}', f'--out_dir={tmp_path / "two"}', env=env)
        assert last_iter(tmp_path / 'two') == 20
    tally('no network at all (unshare -n)', 'train, resume, sample' + ', wandb offline' * wandb + ', two ranks under torchrun' * full)


# -----------------------------------------------------------------------------
# stopping, ranks that hang, numbers that go wrong


@sized(4, 50)
def test_a_signal_at_a_random_moment_loses_no_step(n, tiny, tmp_path, tally):
    flags = [*TINY, f'--dataset={tiny}', '--dropout=0.1', '--eval_interval=100000', '--auto_resume=True']
    draw, out_dir, got = random.Random(n), tmp_path / 'out', collections.Counter()
    for trial in range(n):
        log = tmp_path / f'{trial}.txt'
        ranks = start_ranks(*flags, '--max_iters=100000', out_dir=out_dir, n_ranks=2, log=log)
        before = last_iter(out_dir)
        wait_for(lambda: last_iter(out_dir) > before or not all(each.is_alive() for each in ranks))
        time.sleep(draw.uniform(0, 0.2))
        number = draw.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        for each in draw.choice([ranks, ranks[:1], ranks[1:]]):
            os.kill(each.pid, number)
        codes = wait(ranks)
        assert codes == [0, 0], log.read_text(encoding='utf-8')
        assert read_checkpoint(out_dir / 'ckpt.pt')['iter_num'] == last_iter(out_dir) + 1 > before + 1
        got[number.name] += 1
    end = last_iter(out_dir) + 4
    for folder in (out_dir, tmp_path / 'unbroken'):
        run_ranks(*flags, f'--max_iters={end}', out_dir=folder, n_ranks=2, folder=tmp_path)
    assert trajectory(read_metrics(out_dir)) == trajectory(read_metrics(tmp_path / 'unbroken'))
    assert not differences(*(read_checkpoint(folder / 'ckpt.pt')['model'] for folder in (out_dir, tmp_path / 'unbroken')))
    tally('signals at random moments', f'{n} ({", ".join(f"{name} {times}" for name, times in sorted(got.items()))}) in a run of {end} steps on two ranks: '
          'each time exit 0, checkpoint of the last step, no process left; losses and weights bit-equal')


@pytest.mark.full
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_torchrun_loses_no_step(number, tiny, tmp_path, tally):
    out_dir, log = tmp_path / 'out', tmp_path / 'log.txt'
    launched = torchrun(*TINY, f'--dataset={tiny}', '--max_iters=100000', '--eval_interval=100000', out_dir=out_dir, log=log)
    try:
        wait_for(lambda: last_iter(out_dir) > 5 or launched.poll() is not None)
        ranks = pids_of_ranks(launched.pid)
        launched.send_signal(number)
        launched.wait(600)
    finally:
        launched.kill()
    assert len(ranks) == 2 and not any(os.path.exists(f'/proc/{pid}') for pid in ranks), log.read_text(encoding='utf-8')
    assert read_checkpoint(out_dir / 'ckpt.pt')['iter_num'] == last_iter(out_dir) + 1
    tally(f'{number.name} to torchrun', f'checkpoint of the last step, no process left (torchrun itself exits with {launched.returncode})')


@pytest.mark.parametrize('under_torchrun', [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_stopped_rank_ends_the_job_and_it_resumes_bit_equal(under_torchrun, tiny, tmp_path, tally):
    flags = [*TINY, f'--dataset={tiny}', '--dropout=0.1', '--checkpoint_interval=5', '--eval_interval=100000', '--auto_resume=True']
    out_dir, log, timeout_s = tmp_path / 'out', tmp_path / 'log.txt', 10
    if under_torchrun:
        launched = torchrun(*flags, '--max_iters=100000', f'--timeout_s={timeout_s}', out_dir=out_dir, log=log)
        wait_for(lambda: last_iter(out_dir) >= 12 or launched.poll() is not None)
        pids = pids_of_ranks(launched.pid)
    else:
        ranks = start_ranks(*flags, '--max_iters=100000', f'--timeout_s={timeout_s}', out_dir=out_dir, n_ranks=2, log=log)
        wait_for(lambda: last_iter(out_dir) >= 12 or not all(each.is_alive() for each in ranks))
        pids = [each.pid for each in ranks]
    os.kill(pids[1], signal.SIGSTOP)
    stopped_at = time.monotonic()
    try:
        if under_torchrun:
            assert launched.wait(timeout_s + 300) != 0
        else:
            ranks[0].join(timeout_s + 300)
            assert ranks[0].exitcode not in (0, None), log.read_text(encoding='utf-8')
        took = time.monotonic() - stopped_at
    finally:
        if under_torchrun:
            launched.kill()
        else:
            wait(ranks, 0)
    assert not (under_torchrun and [pid for pid in pids if os.path.exists(f'/proc/{pid}')])
    end = last_iter(out_dir) + 4
    for folder in (out_dir, tmp_path / 'unbroken'):
        run_ranks(*flags, f'--max_iters={end}', '--timeout_s=600', out_dir=folder, n_ranks=2, folder=tmp_path)
    assert trajectory(read_metrics(out_dir)) == trajectory(read_metrics(tmp_path / 'unbroken'))
    assert not differences(*(read_checkpoint(folder / 'ckpt.pt')['model'] for folder in (out_dir, tmp_path / 'unbroken')))
    tally(f'a rank stopped (SIGSTOP){" under torchrun" * under_torchrun}, timeout_s={timeout_s}', f'the job ended {took:.0f} s later, and resumed bit-equal')


def test_a_gradient_that_is_not_a_number_on_one_rank_skips_the_step_on_all(tiny, tmp_path, tally):
    flags = [*STEADY, f'--dataset={tiny}', '--max_iters=10']
    for n_ranks in (1, 2):
        ranks = start_ranks(*flags, out_dir=tmp_path / str(n_ranks), n_ranks=n_ranks, log=tmp_path / 'log.txt', spoil=(3, 7))
        assert wait(ranks) == [0] * n_ranks, (tmp_path / 'log.txt').read_text(encoding='utf-8')
    one, two = (read_metrics(tmp_path / str(n_ranks)) for n_ranks in (1, 2))
    losses = [[line['loss'] for line in lines if 'loss' in line] for lines in (one, two)]
    assert [i for i, loss in enumerate(losses[1]) if loss is None] == [3, 7]
    assert [a for a in losses[0] if a] == pytest.approx([b for b in losses[1] if b], rel=1e-5)
    assert [line['skipped'] for line in two if 'loss' in line] == [0] * 3 + [1] * 4 + [2] * 3
    a, b = (read_checkpoint(tmp_path / str(n_ranks) / 'ckpt.pt')['model'] for n_ranks in (1, 2))
    assert all(torch.allclose(a[name], b[name], rtol=0, atol=1e-5) for name in a)
    tally('a gradient that is not a number on one of two ranks', '2 steps skipped on both alike, the run went on')


def test_too_many_skipped_steps_end_the_run_and_leave_the_last_good_checkpoint(tiny, tmp_path, tally):
    flags = [*STEADY, f'--dataset={tiny}', '--max_iters=30', '--checkpoint_interval=5', '--max_skipped_steps=4']
    log = tmp_path / 'log.txt'
    assert wait(start_ranks(*flags, out_dir=tmp_path / 'out', n_ranks=2, log=log, spoil=range(12, 100))) == [2, 2], log.read_text(encoding='utf-8')
    assert 'the last good checkpoint is' in log.read_text(encoding='utf-8')
    state = read_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    assert state['iter_num'] <= 15 and all(tensor.isfinite().all() for tensor in state['model'].values())
    tally('every gradient not a number from step 12 on', 'both ranks ended with 2 after 4 skipped steps, the checkpoint is good')


# -----------------------------------------------------------------------------
# disks and data

# Runs train.py in a file system of 1 MB that is full from the second save to the fourth, and then in one that is read-only.
SMALL_DISK = '''
import runpy, subprocess, sys
from pathlib import Path
root, folder, *flags = sys.argv[1:]
disk, read_only = Path(folder, 'disk'), Path(folder, 'read-only')
for path, how in (disk, 'size=1m'), (read_only, 'ro'):
    path.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', how, 'none', path], check=True)
sys.path.insert(0, root)
import torch, checkpoint
torch.set_num_threads(1)
save, saves, filler, out = checkpoint.CheckpointFolder.save, 0, disk / 'filler', disk / 'out'

def counted(*args, **kwargs):
    global saves
    saves += 1
    if saves == 2:
        with open(filler, 'wb', buffering=0) as f:
            try:
                while f.write(bytes(4096)):
                    pass
            except OSError as error:
                print('full:', error.strerror)
    if saves == 5:
        filler.unlink()
    try:
        return save(*args, **kwargs)
    finally:
        print('after save', saves, sorted(p.name for p in out.glob('*.pt*')), [p.name for p in out.glob('.*tmp*')],
              checkpoint.load(out / 'ckpt.pt')['iter_num'], flush=True)
checkpoint.CheckpointFolder.save = counted
for out in (out, read_only / 'out'):
    sys.argv = [root + '/train.py', *flags, f'--out_dir={out}']
    runpy.run_path(sys.argv[0], run_name='__main__')
'''


@pytest.mark.skipif(not shutil.which('unshare') or subprocess.run(['unshare', '-rm', 'mount', '-t', 'tmpfs', 'none', '/mnt'], capture_output=True).returncode != 0,
                    reason='needs unshare -rm')
def test_a_full_disk_costs_no_checkpoint_and_a_read_only_one_is_named_at_start(tiny, tmp_path, tally):
    # a full disk still fills the last page of a file, so each sample is longer than one
    done = subprocess.run(['unshare', '-rm', sys.executable, '-c', SMALL_DISK, str(ROOT), str(tmp_path), *TINY, f'--dataset={tiny}', '--checkpoint_interval=2',
                           '--keep_last_n_checkpoints=0', '--max_iters=20', '--eval_interval=1000', '--generate_interval=2', f'--generate_prompts={"a" * 5000}'], capture_output=True, text=True, encoding='utf-8',
                          timeout=600, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    said = done.stdout
    assert 'full: No space left on device' in said and said.count('NOT SAVED') == 3 and said.count('No space left on device: the last good checkpoint') == 3, said + done.stderr
    assert [f'samples.md: No space left on device: the samples of iteration {i} are lost' in said for i in range(0, 22, 2)] == [i in (4, 6, 8) for i in range(0, 22, 2)]
    after = [line.split(' ', 3)[3] for line in said.splitlines() if line.startswith('after save')]
    assert after == ["['ckpt.pt'] [] 2"] * 4 + [f"['ckpt.pt'] [] {2 * i}" for i in range(5, 10)] + ["['best.pt', 'ckpt.pt'] [] 20"], said
    assert said.count('done: ') == 1 and done.returncode == 2 and done.stderr.count('\n') == 1 and 'Read-only file system' in done.stderr, done.stderr
    tally('full disk, then read-only', '3 saves failed, the checkpoint before stayed, no temporary file, training went on and saved again; '
          'at a read-only out_dir it did not start')


def test_a_second_trainer_in_one_out_dir_is_refused(tiny, tmp_path, tally):
    flags = [*TINY, f'--dataset={tiny}', '--max_iters=100000', '--eval_interval=100000']
    [first] = ranks = start_ranks(*flags, out_dir=tmp_path / 'out', log=tmp_path / 'log.txt')
    try:
        wait_for(lambda: last_iter(tmp_path / 'out') > 3 or not first.is_alive())
        for more in ([], ['--auto_resume=True']):
            code, _, stderr, _ = train_here(*flags, *more, out_dir=tmp_path / 'out')
            assert code == 2 and stderr.count('\n') == 1 and 'another process is writing there' in stderr and str(first.pid) in stderr
        first.terminate()
    finally:
        codes = wait(ranks)
    assert codes == [0] and [line['iter'] for line in read_metrics(tmp_path / 'out') if 'loss' in line] == list(range(last_iter(tmp_path / 'out') + 1))
    tally('a second trainer in one out_dir', 'refused, the first unharmed')


@sized(5, 100)
def test_a_shard_that_was_cut_or_altered_is_named(n, tiny, tmp_path, tally):
    draw, counted = random.Random(n), collections.Counter()
    for i in range(n):
        for damage in (truncate, flip):
            data = shutil.copytree(tiny, tmp_path / f'{damage.__name__}{i}')
            shard = data / draw.choice(['train.bin', 'val.bin'])
            contents = bytearray(shard.read_bytes())
            damage(contents, draw)
            shard.write_bytes(contents)
            flags = [*TINY, f'--dataset={data}', '--max_iters=1', *(['--verify_data=True'] if damage is flip else [])]
            code, _, stderr, _ = train_here(*flags, out_dir=tmp_path / 'out')
            assert code == 2 and stderr.count('\n') == 1 and str(shard) in stderr and not (tmp_path / 'out').exists(), stderr
            counted[damage.__name__] += 1
    tally('bad shards', f'{counted["truncate"]} cut short (by size), {counted["flip"]} with one bit flipped (verify_data): each named before the first step')


def test_an_altered_shard_is_one_line_of_each_rank(tiny, tmp_path):
    data, log = shutil.copytree(tiny, tmp_path / 'data'), tmp_path / 'log.txt'
    contents = bytearray((data / 'val.bin').read_bytes())
    contents[10] ^= 1
    (data / 'val.bin').write_bytes(contents)
    assert wait(start_ranks(*TINY, f'--dataset={data}', '--verify_data=True', out_dir=tmp_path / 'out', n_ranks=2, log=log)) == [2, 2]
    said = log.read_text(encoding='utf-8')
    assert 'Traceback' not in said and all(f'rank {rank}: {data / "val.bin"} does not match its checksum' in said for rank in range(2)), said


# -----------------------------------------------------------------------------
# hostile files: each would leave a mark

CALLS = {'os.mkdir': lambda mark: (os.mkdir, (mark,)), 'os.system': lambda mark: (os.system, (f'mkdir {mark}',)),
         'eval': lambda mark: (eval, (f'__import__("os").mkdir({mark!r})',)), 'exec': lambda mark: (exec, (f'import os; os.mkdir({mark!r})',)),
         'subprocess': lambda mark: (subprocess.call, (['mkdir', mark],)), 'open': lambda mark: (open, (mark, 'w')),
         'runpy': lambda mark: (runpy.run_path, (mark + '.py',)),
         'numpy': lambda mark: (np.save, (mark, 1)), 'torch': lambda mark: (torch.save, ({}, mark)), 'Path': lambda mark: (Path.mkdir, (Path(mark),))}


class Hostile:
    """Pickles as a call."""

    def __init__(self, call, mark):
        self.call = CALLS[call](str(mark))

    def __reduce__(self):
        return self.call


def raw_pickles(mark):
    """Pickles by hand, of the opcodes that import and call: GLOBAL, INST, OBJ, STACK_GLOBAL, NEWOBJ, EXT1, PERSID."""
    name = str(mark).encode()
    return [b'cos\nmkdir\n(V' + name + b'\ntR.', b'(V' + name + b'\nios\nmkdir\n.', b'(cos\nmkdir\nV' + name + b'\no.',
            b'\x80\x04\x8c\x02os\x8c\x05mkdir\x93X' + len(name).to_bytes(4, 'little') + name + b'\x85R.',
            b'\x80\x02cos\nmkdir\nX' + len(name).to_bytes(4, 'little') + name + b'\x85\x81.', b'\x80\x02\x82\x01.', b'Pos.mkdir\n.']


WATCHED = []


@contextlib.contextmanager
def opened():
    """The paths that this process opens meanwhile."""
    if not WATCHED:
        WATCHED.append([])
        sys.addaudithook(lambda event, args: WATCHED[-1].append(str(args[0])) if event == 'open' and len(WATCHED) > 1 else None)
    WATCHED.append([])
    yield WATCHED[-1]
    WATCHED.pop()


def assert_refused(result, mark, *words):
    code, stdout, stderr = result[:3]
    assert code == 2 and stderr.count('\n') == 1 and 'Traceback' not in stderr and all(word in stderr for word in words), (stdout, stderr)
    assert not list(mark.parent.glob(mark.name + '*'))


def test_a_checkpoint_that_asks_for_code_is_refused_by_all_that_open_it(tiny, trained, tmp_path, tally):
    mark, out_dir, state, n = tmp_path / 'mark', tmp_path / 'out', read_checkpoint(trained / 'ckpt.pt'), 0
    out_dir.mkdir()

    def tried():
        nonlocal n
        n += 1
        path = out_dir / 'ckpt.pt'
        contents = path.read_bytes()
        for flags in (['train.py', '--init_from=resume', '--device=cpu', f'--out_dir={out_dir}'],
                      ['train.py', *TINY, f'--dataset={tiny}', '--init_from=checkpoint', f'--checkpoint_path={path}', f'--out_dir={tmp_path / "new"}'],
                      ['sample.py', '--device=cpu', f'--checkpoint_path={path}'], ['sample.py', '--device=cpu', f'--out_dir={out_dir}']):
            assert_refused(run_here(*flags), mark)
            for leftover in out_dir.iterdir():
                leftover.unlink()
            path.write_bytes(contents)

    for i, call in enumerate(CALLS):  # in turn at several places of the dict, and as the whole
        torch.save([state | {'model': Hostile(call, mark)}, state | {'config': {'dataset': Hostile(call, mark)}}, Hostile(call, mark)][i % 3], out_dir / 'ckpt.pt')
        tried()
    torch.save(state | {'x': Hostile('os.mkdir', mark)}, out_dir / 'ckpt.pt', _use_new_zipfile_serialization=False)  # the older formats of torch
    tried()
    for raw in raw_pickles(mark):
        (out_dir / 'ckpt.pt').write_bytes(raw)
        tried()
        with zipfile.ZipFile(out_dir / 'ckpt.pt', 'w') as archive:
            archive.writestr('archive/data.pkl', raw)
            archive.writestr('archive/version', '3\n')
            archive.writestr('../mark', b'')  # a name outside its folder
        tried()
    with zipfile.ZipFile(out_dir / 'ckpt.pt', 'w') as archive:  # a TorchScript program
        for name in ('archive/data.pkl', 'archive/constants.pkl', 'archive/code/__torch__.py'):
            archive.writestr(name, raw_pickles(mark)[0])
    tried()
    tally('checkpoints that ask for code', f'{n} x resume, init_from=checkpoint and sample: all refused, nothing ran')


def test_what_a_checkpoint_says_of_other_folders_is_not_followed(tiny, trained, tmp_path):
    """Its config may name an out_dir, a file to resume from, a dataset for its tokenizer: it gets what the user named."""
    outside = shutil.copytree(tiny, tmp_path / 'outside')
    state = read_checkpoint(trained / 'ckpt.pt')
    state['config'] |= dict(out_dir=str(tmp_path / 'mark'), checkpoint_path=str(tmp_path / 'mark' / 'x.pt'), init_from=str(tmp_path / 'mark'))
    (tmp_path / 'out').mkdir()
    torch.save(state, tmp_path / 'out' / 'ckpt.pt')
    code, _, stderr, _ = train_here('--init_from=resume', '--device=cpu', '--max_iters=12', out_dir=tmp_path / 'out')
    assert code == 0 and not (tmp_path / 'mark').exists(), stderr
    # one of nanoGPT's, whose tokenizer is that of its dataset: a folder of data/, no other
    del state['format'], state['tokenizer']
    for dataset in (str(outside), os.path.relpath(outside), os.path.relpath(outside, ROOT / 'data')):
        state['config']['dataset'] = dataset
        torch.save(state, tmp_path / 'theirs.pt')
        with opened() as paths:
            run_here('sample.py', '--device=cpu', '--max_new_tokens=1', f'--checkpoint_path={tmp_path / "theirs.pt"}')
        assert not [path for path in paths if 'outside' in path]


def test_a_meta_pkl_that_asks_for_code_is_refused(tiny, tmp_path, tally):
    mark, data = tmp_path / 'mark', tmp_path / 'data'
    data.mkdir()
    for split in ('train', 'val'):
        shutil.copy(tiny / f'{split}.bin', data)
    contents = [pickle.dumps(x, protocol) for call in CALLS for protocol in range(6)
                for x in (Hostile(call, mark), {'vocab_size': 65, 'itos': {0: Hostile(call, mark)}, 'stoi': {}})] + raw_pickles(mark)
    for raw in contents:
        (data / 'meta.pkl').write_bytes(raw)
        assert_refused(run_here('train.py', *TINY, f'--dataset={data}', f'--out_dir={tmp_path / "out"}'), mark, str(data / 'meta.pkl'))
    tally('meta.pkl that asks for code', f'{len(contents)}: all refused, nothing ran')


def test_a_meta_json_that_names_a_path_outside_its_folder_is_refused_before_anything_is_opened(tiny, tmp_path, tally):
    outside, data = shutil.copytree(tiny, tmp_path / 'outside'), shutil.copytree(tiny, tmp_path / 'data')
    meta, n = json.loads((data / 'meta.json').read_text(encoding='utf-8')), 0
    for file in ('../outside/train.bin', str(outside / 'train.bin'), './../outside/train.bin', 'x/../../outside/train.bin', '..\\outside\\train.bin',
                 '~/train.bin', '$HOME/train.bin', 'train.bin\n', 'train.bin\0', 'file:train.bin', '\\\\host\\train.bin', '', '.bin', '/dev/zero', 7, None, ['train.bin']):
        for split in ('train', 'val'):
            changed = json.loads(json.dumps(meta))
            changed['splits'][split]['shards'][0]['file'] = file
            (data / 'meta.json').write_text(json.dumps(changed), encoding='utf-8')
            with opened() as paths:
                assert_refused(run_here('train.py', *TINY, f'--dataset={data}', f'--out_dir={tmp_path / "out"}'), tmp_path / 'mark', str(data / 'meta.json'), 'file')
            assert not [path for path in paths if 'outside' in path or path.startswith('/dev') or path.endswith('.bin')]
            n += 1
    for tokenizer in ({'kind': '../../outside'}, {'kind': 'os.system'}, {'kind': 'gpt2', 'sha256': '../x'}, {'kind': 'char', 'chars': '../outside'}, ['char']):
        (data / 'meta.json').write_text(json.dumps(meta | {'tokenizer': tokenizer}), encoding='utf-8')
        assert_refused(run_here('train.py', *TINY, f'--dataset={data}', f'--out_dir={tmp_path / "out"}'), tmp_path / 'mark', str(data / 'meta.json'))
        n += 1
    tally('meta.json that names paths outside its folder, or odd tokenizers', f'{n}: all refused before a file was opened')


def test_a_folder_of_weights_and_tokenizer_is_read_and_never_run(tiny, trained, tmp_path, tally):
    """transformers' files may name Python code, other files, or a pickle; .npz may hold pickled objects."""
    code, _, stderr = run_here('sample.py', '--device=cpu', f'--out_dir={trained}', f'--export={tmp_path / "good"}')
    assert code == 0, stderr
    shutil.copytree(tiny, tmp_path / 'outside')
    mark, n = tmp_path / 'mark', 0
    (tmp_path / 'outside' / 'x.safetensors').write_bytes((tmp_path / 'good' / 'model.safetensors').read_bytes())

    def tried(name, change, *words):
        nonlocal n
        n += 1
        folder = shutil.copytree(tmp_path / 'good', tmp_path / f'{n}')
        change(folder / name)
        with opened() as paths:
            result = run_here('sample.py', '--device=cpu', '--num_samples=1', '--max_new_tokens=2', f'--init_from={folder}')
        assert not mark.exists() and not [path for path in paths if 'outside' in path]
        if words:
            assert_refused(result, mark, *words)
        else:
            assert result[0] == 0, result[2]

    def edited(**changes):
        return lambda path: path.write_text(json.dumps(json.loads(path.read_text(encoding='utf-8')) | changes), encoding='utf-8')

    runs = {'AutoModelForCausalLM': 'code.Model', 'AutoTokenizer': ['code.Tokenizer', None]}
    (tmp_path / 'good' / 'code.py').write_text(f'import os\nos.mkdir({str(mark)!r})\n', encoding='utf-8')
    tried('config.json', edited(auto_map=runs))  # not followed
    tried('config.json', edited(tokenizer_class='../outside', _name_or_path=str(tmp_path / 'outside')))
    tried('tokenizer_config.json', lambda path: path.write_text(json.dumps({'auto_map': runs, 'tokenizer_file': '../outside/meta.json'}), encoding='utf-8'))
    for wrong in ({'model': {'type': 'BPE', 'vocab': '../outside/vocab.json', 'merges': '../outside/merges.txt'}}, {'model': {'type': 'os.system', 'vocab': {}}},
                  {'model': f'__import__("os").mkdir({str(mark)!r})'}, {'model': {'type': 'WordLevel', 'vocab': {'a': '../outside'}}}):
        tried('tokenizer.json', edited(**wrong), 'tokenizer.json')
    for raw in raw_pickles(mark):
        tried('tokenizer.json', lambda path: path.write_bytes(raw), 'tokenizer.json')
        tried('model.safetensors', lambda path: path.write_bytes(raw), 'model.safetensors')
    for file in ('../outside/x.safetensors', str(tmp_path / 'outside' / 'x.safetensors'), '..\\outside\\x.safetensors', 'y/../../outside/x.safetensors'):
        def index(path):
            path.with_name('model.safetensors').unlink()
            path.write_text(json.dumps({'weight_map': {'transformer.wte.weight': file}}), encoding='utf-8')
        tried('model.safetensors.index.json', index, 'safetensors')
    for call in CALLS:
        np.savez(tmp_path / f'{call}.npz', **{'transformer.wte.weight': np.array([Hostile(call, mark)], dtype=object)})
        assert_refused(run_here('sample.py', '--device=cpu', f'--init_from={tmp_path / f"{call}.npz"}'), mark, f'{call}.npz')
        n += 1
    tally('folders of transformers and .npz files', f'{n}: what names code, a pickle or a path outside is not followed')
