"""One process or many: which device, which dtype, who talks to whom.

Under torchrun (RANK, WORLD_SIZE and LOCAL_RANK set) every process is one rank; otherwise there is one rank, 0 of 1.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from files import print0


@dataclass(frozen=True)
class Place:
    """Where this process stands: its rank among world_size, and its device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_master(self):
        return self.rank == 0


# -----------------------------------------------------------------------------
# processes


def start(device='auto', backend='auto', timeout_s=600):
    """Finds the device, joins the process group where torchrun made one, and says where this process stands.

    device     'auto' (CUDA, other accelerators, MPS, else CPU), or a torch device such as 'cpu', 'cuda', 'cuda:1', 'mps'
    backend    'auto' (nccl on CUDA, else gloo) or a torch.distributed backend
    timeout_s  how long a rank waits for the others before it gives up, with an error
    returns    Place
    raises     ValueError for a device or a backend that is not there
    """
    rank, local_rank, world_size = (int(os.environ.get(k, v)) for k, v in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
    device = choose_device(device, local_rank if world_size > 1 else None)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TensorFloat32 where the product stays in float32
    if device.type == 'cpu':
        keep_freed_memory()
    if world_size > 1:
        if backend in ('auto', 'nccl'):  # nanoGPT's configs say nccl everywhere
            backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'  # gloo beside it: what hosts agree on makes no GPU wait
        if backend == 'mpi' and not dist.is_mpi_available():
            raise ValueError('backend=mpi: this PyTorch was built without MPI: use --backend=auto')
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return Place(rank, local_rank, world_size, device)


def keep_freed_memory():
    """Tells glibc to hand freed memory out again instead of returning it, for each step wants the same, and Linux to make it of large pages.

    Of a step of 10.7M parameters fresh pages cost 10 to 25%; small pages cost another 20%, and a third of decoding with 124M.
    """
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if not hasattr(libc, 'mallopt'):
        return
    libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: and stay there
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    page, n_bytes = os.sysconf('SC_PAGE_SIZE'), os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2
    addresses = libc.malloc(ctypes.c_size_t(n_bytes))  # the heap grows by so many; memory comes with the first use
    if addresses:
        libc.madvise(ctypes.c_void_p(-(-addresses // page) * page), ctypes.c_size_t(n_bytes - page), 14)  # MADV_HUGEPAGE
        libc.free(addresses)


def stop():
    """Leaves the process group; to be called when the wrapped model is gone.

    DistributedDataParallel holds the group too. Were it the last to let go, it would wait for the group's threads with Python's lock
    in hand, which one of them may want: about 1 of 60 runs on two CPU ranks then never ended (torch 2.13, gloo).
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor):
    """The sum over all ranks, in place; the tensor itself where there is one rank."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast(value):
    """The first rank's value (plain data) on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first_rank(function):
    """What function() returns on the first rank (plain data), on every rank; the ValueError or OSError that it raises, too."""
    value = error = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            value = function()
        except (ValueError, OSError) as raised:
            error = raised
    value, error = broadcast((value, error))
    if error is not None:
        raise error
    return value


def once_a_node(function, place):
    """function() on the first rank of each node; the ValueError or OSError that it raises on any of them, on every rank."""
    error = None
    if place.local_rank == 0:
        try:
            function()
        except (ValueError, OSError) as raised:
            error = raised
    errors = [error] * place.world_size
    if dist.is_initialized():
        dist.all_gather_object(errors, error)
    for error in filter(None, errors):
        raise error


# -----------------------------------------------------------------------------
# signals


STOP_SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGUSR1') if hasattr(signal, name)]  # Windows has no SIGUSR1
received = dict(signal=0)


@contextlib.contextmanager
def signals_noted():
    """Within it SIGTERM, SIGINT and SIGUSR1 are only written down, for signal_to_stop() to tell; a second SIGINT ends the process at once."""
    def note(number, frame):
        received['signal'] = received['signal'] or int(number)

    def exit_at_second_sigint():  # in a thread: Python calls note() only when the wait for other ranks, which may never end, is over
        first = None
        while number := ear.recv(1):
            if number[0] == signal.SIGINT:
                # under torchrun a Ctrl-C may come twice: from the terminal, and passed on by torchrun
                if first is not None and time.monotonic() - first > (3.0 if 'TORCHELASTIC_RUN_ID' in os.environ else 0.0):
                    os._exit(130)  # nothing is tidied up that could make it wait: what was being written stays a temporary file
                first = first or time.monotonic()

    received['signal'] = 0
    ear, mouth = socket.socketpair()
    mouth.setblocking(False)
    threading.Thread(target=exit_at_second_sigint, daemon=True).start()
    earlier = signal.set_wakeup_fd(mouth.fileno())
    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(earlier)
        mouth.close()  # which ends the thread


def signal_to_stop():
    """The name of a signal that any rank has received, the same on all ranks, or None; no accelerator waits for it."""
    number = torch.tensor(received['signal'])
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return signal.Signals(int(number)).name if number else None


# -----------------------------------------------------------------------------
# device and dtype


def choose_device(name, local_rank=None):
    """torch.device for a setting; local_rank numbers the devices where every process has one of its own."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == 'auto':
        name = accelerator.type if accelerator else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'device={name}: accepted are auto, cpu, cuda, cuda:N, mps') from None
    if device.type == 'cpu':
        return device
    if accelerator is None or accelerator.type != device.type:
        there = f'{accelerator.type} and cpu are' if accelerator else 'only cpu is'
        raise ValueError(f'device={name} is not available here, {there}: use --device=auto')
    index = local_rank if local_rank is not None else device.index
    if index is not None and index >= torch.accelerator.device_count():
        raise ValueError(f'device {device.type}:{index} does not exist, {torch.accelerator.device_count()} do: '
                         'use as many processes as devices')
    return torch.device(device.type, index) if device.type == 'cuda' else torch.device(device.type)


@lru_cache
def multiplies_bfloat16(device):
    """Whether the device has instructions for bfloat16 products; without them (a CPU lacking AVX512-BF16 and AMX) they are several times slower."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            flags = next((line.split() for line in f if line.startswith(('flags', 'Features'))), [])
    except OSError:
        return False
    return device.type == 'cpu' and not {'avx512_bf16', 'amx_bf16', 'bf16'}.isdisjoint(flags)


def choose_dtype(name, device):
    """The dtype of the matrix products: 'auto' is bfloat16 where the device multiplies it, else float16 on CUDA and float32 elsewhere.

    On such CPUs bfloat16 won at every size measured: a step of 0.8M parameters took 0.6 to 0.75 of float32's time, one of 10.7M 0.36.
    """
    if name != 'auto':
        return getattr(torch, name)
    if multiplies_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == 'cuda' else torch.float32


def choose_compile(choice, device):
    """Whether to compile: 'auto' does where it pays (CUDA) and works; a compiler that fails costs one line, not the run.

    On a CPU it takes 20 to 40 s, and then a step of 10.7M parameters 476 ms instead of 437, one of 0.8M 19.5 ms instead of 21.7.
    """
    if choice is False or (choice == 'auto' and device.type != 'cuda'):
        return False
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
        return True
    except Exception as error:  # whatever the missing compiler raises: it differs by platform
        reason = str(error).strip().splitlines()[0][:120]
        print0(f'compile={choice}: no working compiler here ({type(error).__name__}: {reason}), running eagerly')
        return False


# dense bfloat16 or float16 matrix rates in FLOP/s from the vendors' datasheets; the first name found in the device's wins
PEAK_FLOPS = (('H200', 989e12), ('H100 PCIe', 756e12), ('H100', 989e12), ('GH200', 989e12), ('B200', 2250e12), ('A100', 312e12),
              ('A800', 312e12), ('H800', 989e12), ('H20', 148e12), ('L40S', 362e12), ('L40', 181e12), ('L4', 121e12), ('A10G', 70e12),
              ('A10', 125e12), ('A6000', 155e12), ('V100', 125e12), ('T4', 65e12), ('4090', 165e12), ('3090', 71e12))


def peak_flops(device):
    """FLOP/s this device could reach in half precision, or None where that is not known."""
    if device.type != 'cuda':
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS if part in name), None)


def device_name(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{device.type}, {torch.get_num_threads()} threads' if device.type == 'cpu' else device.type


def peak_memory_bytes(device):
    """The most memory this process has held: allocated on the accelerator, resident on the CPU; None where unknown."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)  # kilobytes on Linux


def synchronize(device):
    """Waits until the accelerator has done all it was given, so that a clock means something."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


# -----------------------------------------------------------------------------
# one step over many ranks


def divide_batch(gradient_accumulation_steps, batch_size, world_size):
    """Shares the windows of one step out over the ranks, so that every world size does the same step.

    gradient_accumulation_steps  micro-batches of batch_size windows in one step, over all ranks
    returns                      (micro-steps of each rank, windows in each of them): batch_size windows where that divides, else fewer
    raises                       ValueError with the nearest numbers of windows that do
    """
    total = gradient_accumulation_steps * batch_size
    per_rank, rest = divmod(total, world_size)
    if total < 1 or rest or not per_rank:
        near = [n for n in (total - rest, total - rest + world_size) if n > 0]
        raise ValueError(f'{total} sequences (gradient_accumulation_steps={gradient_accumulation_steps} x batch_size={batch_size}) do not divide '
                         f'over {world_size} ranks: use {" or ".join(map(str, near))}')
    micro_steps = next(n for n in range(-(-per_rank // batch_size), per_rank + 1) if per_rank % n == 0)
    return micro_steps, per_rank // micro_steps


def wrap(model, place, parallel='ddp', shard_ranks=0, dtype=torch.float32):
    """The model as training calls it, on its device: itself, or made to work over several ranks. To be called before optimizers are made.

    parallel     'ddp': DistributedDataParallel, every rank has all weights. 'fsdp': every rank has a part of each weight (FSDP2), and
                 they are gathered for a block when it is its turn
    shard_ranks  with fsdp, how many ranks hold one copy of the weights between them; 0 = all
    dtype        of the matrix products: with fsdp in bfloat16 the blocks' weights travel in it, and their gradients in float32
    raises       ValueError for a number of ranks that does not divide
    """
    if place.world_size == 1:
        return model.to(place.device)
    if parallel == 'ddp':
        return DistributedDataParallel(model.to(place.device), device_ids=[place.device.index] if place.device.type == 'cuda' else None,
                                       gradient_as_bucket_view=True)
    shards = shard_ranks or place.world_size
    if place.world_size % shards:
        near = [n for n in range(1, place.world_size + 1) if place.world_size % n == 0]
        raise ValueError(f'shard_ranks={shard_ranks} does not divide {place.world_size} ranks: use {" or ".join(map(str, near))}, or 0 for all')
    if shards == place.world_size:
        mesh = init_device_mesh(place.device.type, (shards,), mesh_dim_names=('shard',))
    else:
        mesh = init_device_mesh(place.device.type, (place.world_size // shards, shards), mesh_dim_names=('replicate', 'shard'))
    policy = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:  # autocast stays on: it casts what goes in, and leaves the sum over blocks in float32
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard([block.attn, block.mlp], mesh=mesh, mp_policy=policy)  # the norms, in float32, go with the root
    fully_shard(model, mesh=mesh)
    warnings.filterwarnings('ignore', message='FSDP2-wrapped module .* returned a view')  # which nothing here changes in place
    model = model.to(place.device)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # FSDP keeps the tensors of its first pass: made under inference mode, they could not be trained on
            module.unshard()
            module.reshard()
    return model


def sync_gradients(model, last):
    """Gradients travel between ranks in the last micro-step only: the sums of the others wait for it."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def whole(tensor):
    """All of a tensor of which FSDP gives each rank a part; every rank takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor, like):
    """The part of a whole tensor that this rank has of `like`: whole() turned round, without a word between the ranks."""
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None) if isinstance(like, DTensor) else tensor


def share_out(function, rows):
    """function(rows), each rank doing its share of them: for what is the same on all ranks and would else be done by each.

    rows      (K, ...), the same on every rank
    function  (k, ...) -> (k, ...) for any k, each row by itself
    """
    if not dist.is_initialized():
        return function(rows)
    n = -(-len(rows) // dist.get_world_size())
    share = rows[dist.get_rank() * n:][:n]
    done = torch.zeros(n, *rows.shape[1:], dtype=rows.dtype, device=rows.device)  # the last ranks may have less to do, or nothing
    if len(share):
        done[:len(share)] = function(share)
    result = torch.empty(n * dist.get_world_size(), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    dist.all_gather(list(result.split(n)), done)
    return result[:len(rows)]
