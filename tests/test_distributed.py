"""Several ranks take the steps that one takes, under DDP and FSDP, whichever of them wrote the checkpoint. CPU and gloo."""

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, differences, last_iter, read_checkpoint, read_metrics, run_train, train_here
from ranks import free_ports, start_ranks, wait

import devices
import distributed
import files
from training import signals as training_signals
from training.signals import signal_to_stop, signals_noted

# Runs of train.py one after the other, each on so many ranks, which are children of one process that has imported everything but used
# nothing. Every rank writes to a file of its own, and says how many matrices it has orthogonalised.
RANKS = """
import faulthandler, json, os, runpy, sys
import torch
import checkpoint, tokens.loader, optim
torch.set_num_threads(1)
train, folder, runs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for port, world_size, argv in runs:
    children = []
    for rank in range(world_size):
        children.append(os.fork())
        if children[-1] == 0:
            for output in (1, 2):
                os.dup2(os.open(f'{folder}/rank{rank}.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND), output)
            faulthandler.dump_traceback_later(600, exit=True)  # one that waits for ever says where
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
            orthogonalize, count = optim.orthogonalize, 0
            def counted(G, **kwargs):
                global count
                count += len(G)
                return orthogonalize(G, **kwargs)
            optim.orthogonalize = counted
            sys.argv = [train, *argv]
            runpy.run_path(train, run_name='__main__')
            print('orthogonalised', count, flush=True)
            os._exit(0)
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit(f'{argv} on {world_size} ranks failed')
"""


def train_on_ranks(runs, folder):
    """Several runs of train.py, given as (ranks, out_dir, flags), without the seconds that torchrun takes for each; folder gets what they print."""
    if not hasattr(os, 'fork'):
        pytest.skip('needs os.fork')
    work = [(port, n, [*map(str, flags), f'--out_dir={out_dir}']) for port, (n, out_dir, flags) in zip(free_ports(len(runs)), runs)]
    done = subprocess.run([sys.executable, '-c', RANKS, str(ROOT / 'train.py'), str(folder), json.dumps(work)],
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + ''.join(path.read_text(encoding='utf-8') for path in sorted(folder.glob('rank*.txt')))


def said(folder, rank):
    """What a rank has printed, without what torch itself says in brackets: [Gloo] has connected, a warning [W1126 ...]."""
    return [line for line in (folder / f'rank{rank}.txt').read_text(encoding='utf-8').splitlines() if not line.startswith('[')]


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


# 8 steps at small rates, each gradient clipped: rounding errors grow with each
FLAGS = *TINY, '--max_iters=8', '--learning_rate=1e-3', '--min_lr=1e-4', '--matrix_lr=1e-3', '--grad_clip=0.1'
# what both do, and what several ranks do
CASES = [
    ('--gradient_accumulation_steps=1 --batch_size=8 --generate_interval=8', '--backend=nccl'),
    ('--gradient_accumulation_steps=1 --batch_size=6 --arch=modern', ''),
    ('--optimizer=muon --gradient_accumulation_steps=3 --batch_size=2', ''),
    ('--optimizer=muon --normuon=True --arch=modern --gradient_accumulation_steps=4 --eval_iters=3', ''),  # 12 windows: the last batch is one rank's
    ('--gradient_accumulation_steps=4 --dropout=0.0', '--parallel=fsdp --shard_gradients=True'),
    ('--arch=llama --n_kv_head=1 --qk_norm=True --qkv_bias=True', '--parallel=fsdp --activation_checkpointing=True'),
    ('--optimizer=muon --gradient_accumulation_steps=3 --batch_size=2', '--parallel=fsdp'),
    ('--optimizer=muon --normuon=True --arch=modern --gradient_accumulation_steps=4 --eval_iters=3', '--parallel=fsdp'),
]
HALF = {dtype: [*FLAGS, f'--dtype={dtype}', '--optimizer=muon', '--max_iters=4'] for dtype in ('bfloat16', 'float16')}
PAIRS = FLAGS + ('--optimizer=muon', '--normuon=True', '--max_iters=3')  # the tied weights of gpt2; AdamW and Muon with all of its state side by side
WAYS = {'one': (1, ''), 'ddp': (2, ''), 'fsdp': (2, '--parallel=fsdp')}


@pytest.fixture(scope='module')
def runs(tiny, tmp_path_factory):
    """A folder with every run that the tests compare."""
    folder = tmp_path_factory.mktemp('runs')
    data = f'--dataset={tiny}'
    for case, flags in [*((case, FLAGS + tuple(case.split())) for case in dict(CASES)), *HALF.items()]:
        code, _, stderr, _ = train_here(*flags, data, out_dir=folder / f'one {case}')
        assert code == 0, stderr
    straight = folder / 'straight'
    first = [(n, folder / way, [*PAIRS, data, *flags.split()]) for way, (n, flags) in WAYS.items()]
    train_on_ranks([
        *((2, folder / f'two {i}', [*FLAGS, data, *case.split(), *flags.split()]) for i, (case, flags) in enumerate(CASES)),
        *((2, folder / f'two {dtype}', [*flags, data, '--parallel=fsdp']) for dtype, flags in HALF.items()),
        (4, folder / 'four', [*FLAGS, data, *CASES[3][0].split(), '--parallel=fsdp', '--shard_ranks=2']),
        (1, folder / 'alone', [*FLAGS, data, *CASES[4][0].split(), '--parallel=fsdp']),
        (1, straight, [*PAIRS, data, '--max_iters=5']), *first], folder)
    for source in WAYS:
        for target in WAYS:
            shutil.copytree(folder / source, folder / f'{source} to {target}')
    # where they go on they write samples first: what FSDP gathers for those is trained on later
    again = ['--init_from=resume', '--device=cpu', '--max_iters=5', '--generate_interval=3', '--generate_prompts=a']
    train_on_ranks([(n, folder / f'{source} to {target}', [*again, flags or '--parallel=ddp']) for source in WAYS for target, (n, flags) in WAYS.items()], folder)
    return folder


@pytest.mark.parametrize('i', range(len(CASES)), ids=[' '.join(case) for case in CASES])
def test_two_ranks_train_as_one(runs, i):
    assert_same_run(runs / f'two {i}', runs / f'one {CASES[i][0]}')


def test_four_ranks_in_two_copies_of_two_shards_train_as_one(runs):
    assert_same_run(runs / 'four', runs / f'one {CASES[3][0]}')


def test_one_rank_in_a_group_of_its_own_shards_and_trains_as_one_process(runs):
    assert_same_run(runs / 'alone', runs / f'one {CASES[4][0]}')


@pytest.mark.parametrize('source', WAYS)
@pytest.mark.parametrize('target', WAYS)
def test_a_run_goes_on_from_any_wrapping_under_any_other(runs, source, target):
    assert_same_run(runs / f'{source} to {target}', runs / 'straight')
    assert [line['iter'] for line in read_metrics(runs / f'{source} to {target}') if 'loss' in line] == list(range(5))


def test_ranks_share_what_muon_orthogonalises(runs):
    counts = [[int(line.split()[1]) for line in said(runs, rank) if line.startswith('orthogonalised ')] for rank in range(2)]
    # a step of 2 layers: 8 matrices of one shape (Q, K, V and output), 2 of each of the MLP's two; ranks of several do half of each
    assert counts[0][2] == counts[1][2] == counts[0][6] == counts[1][6] == 8 * (8 + 2 + 2) / 2


def test_two_ranks_write_the_samples_that_one_writes(runs):
    pages = [(runs / name / 'samples.md').read_text(encoding='utf-8') for name in (f'one {CASES[0][0]}', 'two 0')]
    (one, _), (two, _) = (page.split('## Iteration 8\n') for page in pages)
    assert one == two and one.startswith('## Iteration 0\n')  # before rounding errors of 8 steps


def test_only_the_first_rank_speaks(runs):
    first = said(runs, 0)
    assert sum(line.startswith('done: ') for line in first) == len(CASES) + len(HALF) + 1 + 1 + 1 + 3 + 9
    assert any('(2 ranks x 1 micro-steps x 4 windows x 16)' in line for line in first)
    assert {line.split()[0] for line in said(runs, 1)} == {'orthogonalised'}


@pytest.mark.full
@pytest.mark.parametrize('flags', ['', '--arch=modern', '--optimizer=muon', '--optimizer=muon --arch=modern'])
def test_every_checkpoint_resumes_on_1_2_and_4_ranks(tiny, tmp_path, flags):
    ways = {'one': (1, []), **{f'{parallel} {n}': (n, [f'--parallel={parallel}']) for parallel in ('ddp', 'fsdp') for n in (2, 4)},
            'fsdp 2 of 4': (4, ['--parallel=fsdp', '--shard_ranks=2'])}
    settings = *FLAGS, *flags.split(), f'--dataset={tiny}'
    train_on_ranks([(1, tmp_path / 'straight', [*settings, '--max_iters=5']),
                    *((n, tmp_path / way, [*settings, '--max_iters=3', *own]) for way, (n, own) in ways.items())], tmp_path)
    for source in ways:
        for target in ways:
            shutil.copytree(tmp_path / source, tmp_path / f'{source} to {target}')
    train_on_ranks([(n, tmp_path / f'{source} to {target}', ['--init_from=resume', '--device=cpu', '--max_iters=5', '--shard_ranks=0', *own])
                    for source in ways for target, (n, own) in ways.items()], tmp_path)
    for source in ways:
        for target in ways:
            assert_same_run(tmp_path / f'{source} to {target}', tmp_path / 'straight')


@pytest.mark.parametrize('dtype', HALF)
def test_fsdp_in_half_precision_is_near_the_single_process(runs, dtype):
    for a, b in zip(read_metrics(runs / f'one {dtype}'), read_metrics(runs / f'two {dtype}'), strict=True):
        for key in {'loss', 'grad_norm', 'val_loss'} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=0.01)
    a, b = (read_checkpoint(runs / f'{n} {dtype}' / 'ckpt.pt') for n in ('one', 'two'))
    assert a['scaler'] == b['scaler'] and all(tensor.dtype == torch.float32 for tensor in b['model'].values())


def test_torchrun(runs, tiny, tmp_path):
    device = '--device=cpu' if torch.accelerator.is_available() else '--device=auto'
    code, _, stderr, _ = run_train(*FLAGS, f'--dataset={tiny}', *CASES[0][0].split(), '--backend=nccl', device, n_proc=2, out_dir=tmp_path / 'out')
    assert code == 0, stderr
    assert_same_run(tmp_path / 'out', runs / f'one {CASES[0][0]}')


def test_a_mistake_under_torchrun_is_one_line_and_closes_its_report(tiny, tmp_path):
    code, stdout, stderr, _ = run_train(*TINY, '--batch_size=3', '--gradient_accumulation_steps=1', f'--dataset={tiny}', n_proc=2, out_dir=tmp_path / 'out')
    assert code != 0 and not (tmp_path / 'out').exists()
    problem = ': 3 sequences (gradient_accumulation_steps=1 x batch_size=3) do not divide over 2 ranks: use a multiple of 2 for --gradient_accumulation_steps'
    lines = [line for line in stderr.splitlines() if '3 sequences' in line]
    # rank 1 gives rank 0 six seconds to be the first
    assert lines in [[f'rank {rank}{problem}', f'  traceback : rank {rank}{problem}'] for rank in range(2)], stderr
    assert 'train.py", line' not in stderr  # no traceback into our files


def test_shards_that_do_not_divide_the_ranks():
    place = distributed.Place(0, 0, 6, torch.device('cpu'))
    with pytest.raises(ValueError, match='^shard_ranks=4 does not divide 6 ranks: use a number that does, or 0 for all$'):
        distributed.shard(torch.nn.Linear(1, 1), place, 4, torch.float32)


@pytest.mark.parametrize('flag, problem', [('timeout_s=0', 'accepted is 1 or more, below 2147483648'), (f'timeout_s={10**20}', 'accepted is 1 or more, below 2147483648')])
def test_a_setting_that_the_ranks_cannot_meet_with_is_one_line(tiny, tmp_path, monkeypatch, flag, problem):
    for name, value in dict(RANK='1', LOCAL_RANK='0', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='1').items():
        monkeypatch.setenv(name, value)
    code, _, stderr, _ = train_here(*TINY, f'--dataset={tiny}', f'--{flag}', out_dir=tmp_path / 'out')
    assert (code, stderr) == (2, f'rank 1: {flag}: {problem}\n')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_log_on_a_full_disk_does_not_end_the_run():
    full = open('/dev/full', 'w', encoding='utf-8')
    with contextlib.redirect_stdout(full):
        for _ in range(2):
            files.print0('a line')
    with pytest.raises(OSError):
        full.close()


@pytest.mark.parametrize('n_ranks', [3, *(pytest.param(n, marks=pytest.mark.full) for n in (4, 8))])
def test_a_killed_run_of_several_ranks_resumes_bit_for_bit(n_ranks, tiny, tmp_path):
    """DistributedDataParallel fills its buckets anew after its first backward pass, so it added in another order."""
    flags = [*TINY, '--batch_size=24', '--gradient_accumulation_steps=1', '--checkpoint_interval=4', '--eval_interval=1000',
             f'--dataset={tiny}']
    log, killed = tmp_path / 'log.txt', tmp_path / 'killed'
    ranks = start_ranks(*flags, '--max_iters=100000', out_dir=killed, n_ranks=n_ranks, log=log)
    while all(rank.is_alive() for rank in ranks) and last_iter(killed) < 5:
        time.sleep(0.01)
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: none sees another one die
        for rank in ranks:
            os.kill(rank.pid, number)
    assert wait(ranks) == [-signal.SIGKILL] * n_ranks, log.read_text()
    n_iters = read_checkpoint(killed / 'ckpt.pt')['iter_num'] + 4
    again = '--init_from=resume', '--device=cpu', f'--max_iters={n_iters}'
    assert wait(start_ranks(*again, out_dir=killed, n_ranks=n_ranks, log=log)) == [0] * n_ranks, log.read_text()
    assert wait(start_ranks(*flags, f'--max_iters={n_iters}', out_dir=tmp_path / 'whole', n_ranks=n_ranks, log=log)) == [0] * n_ranks
    unbroken, resumed = (read_checkpoint(folder / 'ckpt.pt') for folder in (tmp_path / 'whole', killed))
    assert not differences([unbroken[key] for key in ('model', 'optimizer', 'history')],
                           [resumed[key] for key in ('model', 'optimizer', 'history')])


def test_gradients_are_summed_in_buckets_of_parameters_in_order(monkeypatch):
    sizes = []
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda flat: (sizes.append(flat.numel()), flat.mul_(3)))
    monkeypatch.setattr(distributed, 'BUCKET_BYTES', 4 * 20)
    model = torch.nn.ParameterList(torch.zeros(n) for n in (30, 10, 5, 5, 1, 20))
    for i, p in enumerate(model):
        p.grad = torch.full(p.shape, float(i)) if i != 3 else None  # a frozen one has none
    distributed.sum_gradients(model)
    assert sizes == [30, 16, 20]
    assert all(p.grad is None or torch.equal(p.grad, torch.full(p.shape, 3.0 * i)) for i, p in enumerate(model))


FSDP_COMPILED = """
import copy, sys
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
import distributed
from model import GPT, Block, GPTConfig
counter, compile_block = CompileCounterWithBackend('aot_eager'), Block.compile
Block.compile = lambda self, **kwargs: compile_block(self, backend=counter, **kwargs)
place = distributed.start('cpu')
torch.manual_seed(0)
for arch in ('gpt2', 'modern'):
    torch._dynamo.reset()
    counter.clear()
    model = GPT(GPTConfig(arch=arch, block_size=16, vocab_size=50, n_layer=4, n_head=2, n_embd=16))
    torch.nn.init.normal_(model.lm_head.weight)
    whole = copy.deepcopy(model)
    loss_of = distributed.compiled_loss(distributed.prepare(model, place, parallel='fsdp'))
    idx = torch.randint(50, (2, 16))
    for _ in range(2):
        loss_of(idx, idx).backward()
        whole.loss_sum(idx, idx).backward()
    for p, q in zip(model.parameters(), whole.parameters()):
        torch.testing.assert_close(distributed.whole(p.grad), q.grad)
    print(arch, counter.frame_count, len(counters['graph_break']))
distributed.stop()
"""


def test_under_fsdp_one_graph_without_a_break_serves_all_blocks():
    (port,) = free_ports(1)
    env = dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, '-c', FSDP_COMPILED], env={**os.environ, **env}, capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ['gpt2 1 0', 'modern 1 0'], done.stderr


FSDP_SAMPLES = """
import torch
import distributed, kernels
from model import GPT, Block, GPTConfig
Block.compile = lambda self, **kwargs: None  # it takes long, and the caches are the same
caches, make_cache = [], kernels.KVCache
kernels.KVCache = lambda *args, **kwargs: caches.append(make_cache(*args, **kwargs)) or caches[-1]
place = distributed.start('cpu')
torch.manual_seed(0)
model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16))
torch.nn.init.normal_(model.lm_head.weight)
idx = torch.randint(50, (1, 4))
expected = model.generate(idx, 8, temperature=0)
distributed.compiled_loss(distributed.prepare(model, place, parallel='fsdp'))
assert torch.equal(model.generate(idx, 8, temperature=0), expected)
distributed.stop()
print([(cache.static, cache.max_tokens) for cache in caches])
"""


def test_samples_under_fsdp_with_a_compiled_loss_keep_the_cache_of_eager_blocks():
    (port,) = free_ports(1)
    env = dict(os.environ, WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    ranks = [subprocess.Popen([sys.executable, '-c', FSDP_SAMPLES], env=dict(env, RANK=rank, LOCAL_RANK=rank), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in '01']
    for rank in ranks:
        stdout, stderr = rank.communicate(timeout=100)
        assert stdout.splitlines()[-1:] == ['[(False, 12), (False, 12)]'], stderr


# -----------------------------------------------------------------------------
# where a process stands


@pytest.mark.parametrize('env, given', [({'RANK': '1'}, 'RANK=1'), ({'RANK': ''}, 'RANK='), ({'WORLD_SIZE': 'two', 'RANK': '0'}, 'RANK=0, WORLD_SIZE=two')])
def test_ranks_are_set_all_or_not_at_all(tiny, tmp_path, monkeypatch, env, given):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    code, _, stderr, _ = train_here(*TINY, f'--dataset={tiny}', out_dir=tmp_path / 'out')
    assert code == 2 and len(stderr.splitlines()) == 1
    assert stderr.endswith('set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT as torchrun does, or unset them all\n')
    assert f'{given} in the environment' in stderr


@pytest.fixture
def played_cuda(monkeypatch):
    """Two GPUs, as far as choosing one goes; torch.cuda.set_device() checks its argument as it does with a real one."""
    chosen = []
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda check_available=False: torch.device('cuda'))
    monkeypatch.setattr(torch.accelerator, 'device_count', lambda: 2)
    monkeypatch.setattr(torch._C, '_cuda_setDevice', chosen.append, raising=False)
    precision = torch.get_float32_matmul_precision()
    yield chosen
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize('setting, index', [('auto', 0), ('cuda', 0), ('cuda:1', 1)])
def test_one_gpu_is_chosen_by_its_index(played_cuda, setting, index):
    """torch.cuda.set_device() refuses a device without one."""
    assert distributed.start(setting).device == torch.device('cuda', index)
    assert played_cuda == [index]
    with pytest.raises(ValueError, match='^device cuda:2 does not exist, 2 do: '):
        devices.choose_device('cuda', local_rank=2)


def test_a_cuda_build_that_finds_no_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda check_available=False: None)
    assert devices.choose_device('auto') == devices.choose_device('cpu') == torch.device('cpu')
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith('this PyTorch was built for CUDA 13.0 and finds no GPU') and line.endswith('; using the CPU')
    with pytest.raises(ValueError, match='not available here: this PyTorch was built for CUDA 13.0 and finds no GPU'):
        devices.choose_device('cuda')


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
def test_a_worker_ends_when_its_parent_is_killed():
    """An orphan of torchrun's would train on and hold the lock of out_dir."""
    read_end, write_end = os.pipe()
    agent = os.fork()
    if agent == 0:
        if os.fork() == 0:
            threading.Thread(target=distributed.end_with_parent, args=[os.getppid()], daemon=True).start()
            os.write(write_end, b'started')
        time.sleep(600)
        os.write(write_end, b'alive')
        os._exit(0)
    os.close(write_end)
    assert os.read(read_end, 7) == b'started'
    os.kill(agent, signal.SIGKILL)
    os.waitpid(agent, 0)
    assert os.read(read_end, 1) == b''  # the end of the file: the worker held the other end open
    os.close(read_end)


def mapped_bytes():
    with open('/proc/self/statm', encoding='ascii') as f:
        return int(f.read().split()[0]) * os.sysconf('SC_PAGE_SIZE')


@pytest.mark.skipif(sys.platform != 'linux' or not hasattr(ctypes.CDLL(None), 'mallopt'), reason='needs glibc')
@pytest.mark.parametrize('limited', [False, True])
def test_reserved_address_space_is_a_share_or_nothing_where_it_is_limited(limited, monkeypatch):
    import resource
    ram = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')

    def work():
        before = mapped_bytes()
        if limited:
            resource.setrlimit(resource.RLIMIT_AS, (before + ram, before + ram))
        devices.keep_freed_memory()
        assert mapped_bytes() - before <= (1 << 20 if limited else ram / 16 + (1 << 20))
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')
    assert in_a_child(work) == 0


# -----------------------------------------------------------------------------
# signals


def in_a_child(work):
    """The exit code of a child that does work(), negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# in a new process: a forked one would inherit a heap in pieces
REUSE = '''
import os, re, resource, torch, devices
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
devices.keep_freed_memory()
torch.ones(16 << 20)
before = faults()
# 16,384 small pages; the first may be shared with the block before, which was not advised
address = torch.ones(16 << 20).data_ptr() + (32 << 20)
assert faults() - before < 1000
within = False
for line in open('/proc/self/smaps', encoding='utf-8'):
    if re.match('[0-9a-f]+-', line):
        first, end = (int(x, 16) for x in line.split()[0].split('-'))
        within = first <= address < end
    elif within and line.startswith('VmFlags:'):
        assert ' hg' in line or not os.path.exists('/sys/kernel/mm/transparent_hugepage')
'''


@pytest.mark.skipif(sys.platform != 'linux' or not hasattr(ctypes.CDLL(None), 'mallopt'), reason='needs glibc')
def test_freed_memory_is_handed_out_again_in_large_pages():
    done = subprocess.run([sys.executable, '-c', REUSE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
@pytest.mark.parametrize('signals, code', [(['SIGTERM', 'SIGTERM', 'SIGUSR1', 'SIGINT'], 0), (['SIGINT'], 0), (['SIGINT', 'SIGINT'], 130)])
def test_signals_are_noted_and_a_second_sigint_ends_the_process(signals, code, monkeypatch):
    def work():
        with signals_noted():
            assert signal_to_stop() is None
            for name in signals:
                os.kill(os.getpid(), getattr(signal, name))
            assert signal_to_stop() == signals[0]
            time.sleep(600 if code else 0)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
    assert in_a_child(work) == code


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
def test_the_first_signal_is_acknowledged_before_the_step_ends(tmp_path, monkeypatch):
    def work():
        monkeypatch.setattr(sys, 'stdout', open(tmp_path / 'said', 'w', encoding='utf-8'))
        with signals_noted():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            end_s = time.monotonic() + 600
            while not (tmp_path / 'said').read_text(encoding='utf-8').endswith('\n') and time.monotonic() < end_s:
                time.sleep(0.01)
    assert in_a_child(work) == 0
    assert (tmp_path / 'said').read_text(encoding='utf-8') == 'SIGTERM: stopping after this step or batch\n'


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
def test_a_second_sigint_ends_a_process_that_waits_for_other_ranks(monkeypatch):
    """In such a wait, in C++, Python calls no handler of signals."""
    def ctrl_c_twice():
        for _ in range(2):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)

    def work():
        with signals_noted():
            threading.Thread(target=ctrl_c_twice, daemon=True).start()
            torch.distributed.TCPStore('127.0.0.1', 0, 2, is_master=True, timeout=timedelta(seconds=600))  # for the other, which never comes
    monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
    assert in_a_child(work) == 130


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
@pytest.mark.parametrize('later_s, code', [(2.9, 0), (3.1, 130)])
def test_a_ctrl_c_that_torchrun_passes_on_is_the_same_one(monkeypatch, later_s, code):
    def work():
        times_s, both = [10.0 + later_s, 10.0], threading.Event()

        def monotonic():
            if len(times_s) == 1:
                both.set()
            return times_s.pop()
        monkeypatch.setattr(training_signals, 'time', SimpleNamespace(monotonic=monotonic))
        with signals_noted():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            assert both.wait(600) and signal_to_stop() == 'SIGINT'
            time.sleep(600 if code else 0)
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    assert in_a_child(work) == code


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
    (40, 12, 7, '480 sequences (gradient_accumulation_steps=40 x batch_size=12) do not divide over 7 ranks: use a multiple of 7 for --gradient_accumulation_steps'),
    (1, 1, 2, '1 sequences (gradient_accumulation_steps=1 x batch_size=1) do not divide over 2 ranks: use a multiple of 2 for --gradient_accumulation_steps'),
])
def test_divide_batch_names_the_nearest_that_divide(accum, batch, world, problem):
    with pytest.raises(ValueError, match=f'^{re.escape(problem)}$'):
        distributed.divide_batch(accum, batch, world)
    for steps in re.findall(r'\d+', problem.partition(': use ')[2]):
        distributed.divide_batch(int(steps), batch, world)
