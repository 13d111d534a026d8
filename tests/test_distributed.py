"""Several ranks take the steps that one takes. CPU and gloo, two processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import distributed
import optim
from conftest import ROOT, TINY, read_checkpoint, read_metrics, run_train, train_here
from optim import orthogonalize

# One rank's part in several runs of train.py, one after the other, each with a port of its own to meet at. Muon in float32: in
# bfloat16 the last bit of a gradient can turn a direction that the gradient hardly has, by 1e-2 of the step.
RANK = '''
import json, os, runpy, sys
import torch
import optim
orthogonalize = optim.orthogonalize
optim.orthogonalize = lambda G, **_: orthogonalize(G)
torch.set_num_threads(1)
train = sys.argv[1]
for port, argv in json.loads(sys.argv[2]):
    os.environ['MASTER_PORT'] = str(port)
    sys.argv = [train, *argv]
    runpy.run_path(train, run_name='__main__')
'''


def free_ports(n):
    sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(n)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def train_on_two_ranks(runs, folder):
    """Several runs of train.py, given as (out_dir, flags), without the seconds that torchrun takes for each; folder gets what the ranks print."""
    argvs = [[*map(str, flags), f'--out_dir={out_dir}'] for out_dir, flags in runs]
    work = json.dumps(list(zip(free_ports(len(runs)), argvs)))
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1'}
    files = [open(folder / f'rank{i}.txt', 'w+', encoding='utf-8') for i in range(2)]
    ranks = [subprocess.Popen([sys.executable, '-X', 'faulthandler', '-c', RANK, str(ROOT / 'train.py'), work],
                              env={**env, 'RANK': str(i), 'LOCAL_RANK': str(i)}, stdout=file, stderr=file) for i, file in enumerate(files)]
    ends_at = time.monotonic() + 100
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks) and time.monotonic() < ends_at:
        time.sleep(0.05)
    for rank in ranks:
        rank.send_signal(signal.SIGABRT)  # one that still waits says where
    assert [rank.wait() for rank in ranks] == [0, 0], '\n'.join((folder / f'rank{i}.txt').read_text(encoding='utf-8') for i in range(2))


def assert_same_run(out_dir, other):
    """Losses and gradient norm of every step, evaluations, and the weights at the end, to 1e-5."""
    for a, b in zip(read_metrics(out_dir), read_metrics(other), strict=True):
        assert a.keys() == b.keys() and a['iter'] == b['iter']
        for key in {'loss', 'loss_smoothed', 'grad_norm', 'train_loss', 'val_loss', 'val_bpb', 'lr'} & a.keys():
            assert a[key] == pytest.approx(b[key], abs=1e-5), (a['iter'], key)
    a, b = read_checkpoint(out_dir / 'ckpt.pt'), read_checkpoint(other / 'ckpt.pt')
    assert a['model'].keys() == b['model'].keys() and a['iter_num'] == b['iter_num']
    for name, tensor in a['model'].items():
        torch.testing.assert_close(tensor, b['model'][name], rtol=0, atol=1e-5)


# 10 steps at small rates: rounding errors grow with each
FLAGS = *TINY, '--max_iters=10', '--learning_rate=1e-3', '--min_lr=1e-4', '--matrix_lr=1e-3'
CASES = ['--gradient_accumulation_steps=1 --batch_size=8', '--gradient_accumulation_steps=4',
         '--gradient_accumulation_steps=1 --batch_size=6 --arch=modern', '--optimizer=muon --arch=modern --gradient_accumulation_steps=4',
         '--optimizer=muon --gradient_accumulation_steps=3 --batch_size=2']


@pytest.fixture(scope='module')
def runs(tiny, tmp_path_factory):
    """A folder with a run of one process and one of two ranks for each case, and runs that change from one to the other after 5 steps."""
    folder = tmp_path_factory.mktemp('runs')
    data = f'--dataset={tiny}'

    def alone(out_dir, *flags):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optim, 'orthogonalize', lambda G, **_: orthogonalize(G))
            code, _, stderr, _ = train_here(*flags, out_dir=out_dir)
        assert code == 0, stderr

    for i, case in enumerate(CASES):
        alone(folder / f'one-{i}', *FLAGS, data, *case.split())
    alone(folder / 'one-then-two', *FLAGS, data, '--max_iters=5')
    alone(folder / 'straight', *FLAGS, data)
    train_on_two_ranks([
        *((folder / f'two-{i}', [*FLAGS, data, *case.split(), '--backend=nccl' if i else '--backend=auto']) for i, case in enumerate(CASES)),
        (folder / 'one-then-two', ['--init_from=resume', '--device=cpu', '--max_iters=10']),
        (folder / 'two-then-one', [*FLAGS, data, '--max_iters=5']),
    ], folder)
    alone(folder / 'two-then-one', '--init_from=resume', '--device=cpu', '--max_iters=10')
    return folder


@pytest.mark.parametrize('i', range(len(CASES)), ids=CASES)
def test_two_ranks_train_as_one(runs, i):
    assert_same_run(runs / f'two-{i}', runs / f'one-{i}')


@pytest.mark.parametrize('name', ['one-then-two', 'two-then-one'])
def test_a_run_goes_on_with_another_number_of_ranks(runs, name):
    assert_same_run(runs / name, runs / 'straight')
    assert [line['iter'] for line in read_metrics(runs / name) if 'loss' in line] == list(range(10))


def test_only_the_first_rank_speaks(runs):
    assert (runs / 'rank0.txt').read_text(encoding='utf-8').count('done: ') == len(CASES) + 2
    assert '(2 ranks x 1 micro-steps x 4 windows x 16)' in (runs / 'rank0.txt').read_text(encoding='utf-8')
    rest = [line for line in (runs / 'rank1.txt').read_text(encoding='utf-8').splitlines() if not line.startswith('[Gloo]')]
    assert rest == []


def test_torchrun(runs, tiny, tmp_path):
    device = '--device=cpu' if torch.accelerator.is_available() else '--device=auto'
    code, _, stderr, _ = run_train(*FLAGS, f'--dataset={tiny}', *CASES[0].split(), '--backend=nccl', device, n_proc=2, out_dir=tmp_path / 'out')
    assert code == 0, stderr
    assert_same_run(tmp_path / 'out', runs / 'one-0')


def test_a_mistake_under_torchrun_is_one_line_of_each_rank(tiny, tmp_path):
    code, stdout, stderr, _ = run_train(*TINY, '--batch_size=3', '--gradient_accumulation_steps=1', f'--dataset={tiny}', n_proc=2, out_dir=tmp_path / 'out')
    assert code != 0 and not (tmp_path / 'out').exists()
    problem = '3 sequences (gradient_accumulation_steps=1 x batch_size=3) do not divide over 2 ranks: use 2 or 4'
    lines = [line for line in stderr.splitlines() if problem in line]
    assert lines and all(re.search(r'rank \d: 3 seq', line) for line in lines)
    assert 'train.py", line' not in stderr  # no traceback into our files


# -----------------------------------------------------------------------------
# shares of the batch


@pytest.mark.parametrize('accum, batch, world, expected', [
    (40, 12, 1, (40, 12)),
    (40, 12, 8, (5, 12)),
    (1, 12, 1, (1, 12)),
    (1, 12, 2, (1, 6)),
    (1, 12, 12, (1, 1)),
    (5, 12, 2, (3, 10)),
    (5, 8, 4, (2, 5)),
    (2, 13, 26, (1, 1)),
    (3, 2, 2, (3, 1)),  # 3 windows a rank, but never more than 2 at once
])
def test_divide_batch(accum, batch, world, expected):
    assert distributed.divide_batch(accum, batch, world) == expected
    micro_steps, rows = expected
    assert micro_steps * rows * world == accum * batch and rows <= batch


@pytest.mark.parametrize('accum, batch, world, problem', [
    (40, 12, 7, '480 sequences (gradient_accumulation_steps=40 x batch_size=12) do not divide over 7 ranks: use 476 or 483'),
    (1, 1, 2, '1 sequences (gradient_accumulation_steps=1 x batch_size=1) do not divide over 2 ranks: use 2'),
])
def test_divide_batch_names_the_nearest_that_divide(accum, batch, world, problem):
    with pytest.raises(ValueError, match=f'^{re.escape(problem)}$'):
        distributed.divide_batch(accum, batch, world)
