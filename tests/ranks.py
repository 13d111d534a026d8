"""Ranks of train.py as children of one process that has imported torch: they start at once, and a test may kill, stop or listen to each."""

import contextlib
import functools
import json
import multiprocessing
import os
import random
import runpy
import socket
import sys
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_ports(n):
    """Ports below those that a system gives to outgoing connections, so that no other process gets one of them before it is used."""
    sockets = []
    while len(sockets) < n:
        with contextlib.suppress(OSError):  # taken
            sockets.append(socket.create_server(('127.0.0.1', random.SystemRandom().randrange(10_000, 16_000))))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@functools.cache
def forkserver():
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload(['numpy', 'torch', 'torch.distributed.checkpoint.state_dict', 'torch.nn.parallel', 'torch.distributed.fsdp'])
    return server


def start_ranks(*flags, out_dir, n_ranks=1, log, listen='', spoil=()):
    """Processes that run train.py as torchrun's would, without its watching over them; what they print goes to the file log.

    listen  folder that gets what each rank was shown, see read_heard()
    spoil   steps at which the last rank's loss and gradients are not numbers
    """
    [port] = free_ports(1)
    argv = [str(ROOT / 'train.py'), *map(str, flags), f'--out_dir={out_dir}']
    world = {'WORLD_SIZE': str(n_ranks), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    ranks = [forkserver().Process(target=rank, args=(argv, {**world, 'RANK': str(i), 'LOCAL_RANK': str(i)}, str(log), str(listen), spoil if i == n_ranks - 1 else ()))
             for i in range(n_ranks)]
    for each in ranks:
        each.start()
    return ranks


def wait(ranks, timeout_s=600):
    """The exit codes, -9 for one killed by SIGKILL; all that are still there after the time are killed, and count as None."""
    ends_at = time.monotonic() + timeout_s
    for each in ranks:
        each.join(max(0, ends_at - time.monotonic()))
    codes = [each.exitcode for each in ranks]
    for each in ranks:
        if each.is_alive():
            each.kill()
            each.join()
    return codes


def rank(argv, env, log, listen, spoil):
    import torch
    torch.set_num_threads(1)
    os.environ.update(env)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if listen:
        hear_windows(Path(listen) / f'{env["RANK"]}.jsonl')
    if spoil:
        spoil_losses(spoil)
    sys.argv = argv
    runpy.run_path(argv[0], run_name='__main__')


def hear_windows(path):
    """Writes down a checksum of each training window that this rank is given, by step."""
    from tokens.loader import Loader
    batch = Loader.batch

    def heard(self, step, micro_step=0):
        made = batch(self, step, micro_step)
        with open(path, 'a', encoding='utf-8') as f:
            f.write(json.dumps([step, [zlib.crc32(row.numpy().tobytes()) for row in made.x]]) + '\n')
        return made
    Loader.batch = heard


def spoil_losses(steps):
    """Makes the loss that this rank computes in training at these steps not a number, and with it each gradient."""
    from model import GPT
    from tokens.loader import Loader
    batch, loss_of, at = Loader.batch, GPT.loss_sum, [None]

    def remembered(self, step, micro_step=0):
        at[0] = step
        return batch(self, step, micro_step)

    def spoilt(self, *args, **kwargs):
        loss = loss_of(self, *args, **kwargs)
        return loss * float('nan') if at[0] in steps else loss
    Loader.batch, GPT.loss_sum = remembered, spoilt


def read_heard(folder):
    """{step: sorted checksums of the windows that all ranks were given}"""
    steps = {}
    for path in Path(folder).glob('*.jsonl'):
        for step, windows in map(json.loads, path.read_text(encoding='utf-8').splitlines()):
            steps[step] = sorted(steps.get(step, []) + windows)
    return steps
