"""The device of a run: which one, its dtype, its compiler, its memory and its rates."""

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path

import torch

from files import print0

try:
    import resource
except ImportError:  # Windows
    resource = None

# dense bfloat16 or float16 TFLOP/s by the vendors' datasheets; the first name in the device's name counts
PEAK_TFLOPS = {
    'H200': 989, 'H100 PCIe': 756, 'H100': 989, 'GH200': 989, 'B200': 2250, 'A100': 312, 'A800': 312,
    'H800': 989, 'H20': 148, 'L40S': 362, 'L40': 181, 'L4': 121, 'A10G': 70, 'A10': 125, 'A6000': 155,
    'V100': 125, 'T4': 65, '4090': 165, '3090': 71,
}


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device for a setting. A CUDA device always has an index, which torch requires.

    local_rank  of this process in a process group, which is the index of its device
    """
    accelerator, problem = torch.accelerator.current_accelerator(check_available=True), ''
    if accelerator is None and torch.version.cuda:
        problem = f'this PyTorch was built for CUDA {torch.version.cuda} and finds no GPU (driver too old?)'
    if name == 'auto':
        name = accelerator.type if accelerator else 'cpu'
        if problem:
            print0(f'{problem}; using the CPU')
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'device={name}: accepted are auto, cpu, cuda, cuda:N, mps') from None
    if device.type == 'cpu':
        return device
    if accelerator is None or accelerator.type != device.type:
        raise ValueError(f'device={name} is not available here: {problem or "use --device=auto"}')
    index = local_rank
    if index is None:
        index = device.index or 0
    n_devices = torch.accelerator.device_count()
    if index >= n_devices:
        raise ValueError(f'device {device.type}:{index} does not exist, {n_devices} do: '
                         'use as many processes as devices')
    return torch.device('cuda', index) if device.type == 'cuda' else device


@lru_cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products. Other CPUs are slow at them."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu_info = Path('/proc/cpuinfo')
    if device.type != 'cpu' or not cpu_info.exists():
        return False
    return not {'avx512_bf16', 'amx_bf16', 'bf16'}.isdisjoint(cpu_info.read_text(encoding='utf-8').split())


def choose_dtype(name: str, device: torch.device, packs: bool = False) -> torch.dtype:
    """Return the dtype of matrix products.

    'auto' is bfloat16 if the device multiplies it natively, else float16 on CUDA and float32 elsewhere. On
    CPUs with bfloat16 instructions, a step took 0.36 (10.7M) to 0.75 (0.8M) of float32's time.
    packs  for GPT.pack(): 'auto' is float16 on x86, too
    """
    if name != 'auto':
        return getattr(torch, name)
    if multiplies_bfloat16(device):
        return torch.bfloat16
    on_x86 = device.type == 'cpu' and 'fbgemm' in torch.backends.quantized.supported_engines
    if device.type == 'cuda' or (packs and on_x86):
        return torch.float16
    return torch.float32


def choose_compile(choice: bool | str, device: torch.device) -> bool:
    """Whether to compile: 'auto' does on CUDA only. If the compiler fails, print a line and run eagerly.

    On a CPU, compiling takes 20 to 40 s. A step then took 476 ms instead of 437 (10.7M), and 19.5 instead
    of 21.7 (0.8M).
    """
    if choice is False or (choice == 'auto' and device.type != 'cuda'):
        return False
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
        return True
    except Exception as error:  # which one a missing compiler raises depends on the platform
        print0(f'compile={choice}: no working compiler here, running eagerly ({str(error).strip()[:120]!r})')
        return False


def peak_flops(device: torch.device) -> float | None:
    """Return the device's peak rate in half precision in FLOP/s; None if unknown."""
    for name, tflops in PEAK_TFLOPS.items():
        if device.type == 'cuda' and name in device_name(device):
            return tflops * 1e12
    return None


def device_name(device: torch.device) -> str:
    if device.type == 'cpu':
        return f'cpu, {torch.get_num_threads()} threads'
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the most memory that this process has allocated on a GPU, or held in RAM; None if unknown."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    unit = 1 if sys.platform == 'darwin' else 1024  # Linux counts kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def anonymous_bytes() -> int | None:
    """Return the RAM that this process holds without mapped files, on Linux; else None."""
    status = Path('/proc/self/status')
    if status.exists():
        for line in status.read_text(encoding='ascii').splitlines():
            if line.startswith('RssAnon:'):
                return int(line.split()[1]) * 1024
    return None


def synchronize(device: torch.device):
    """Wait until the accelerator has finished its queue. Call it before reading a clock."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def keep_freed_memory():
    """Make glibc reuse freed memory instead of returning it, and Linux back it with large pages.

    Each step allocates the same sizes. Fresh pages cost 10 to 25% of a step of 10.7M parameters, small pages
    another 20%, and a third of decoding with 124M.
    """
    if sys.platform != 'linux' or not hasattr(libc := ctypes.CDLL(None), 'mallopt'):
        return
    libc.mallopt(-4, 0)  # M_MMAP_MAX: allocate large blocks from the heap too
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
    policy = Path('/proc/sys/vm/overcommit_memory')
    is_strict = policy.exists() and policy.read_text(encoding='ascii').strip() == '2'
    if is_strict or resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return  # reserved address space is not free here
    # grow the heap by half of this rank's share of the RAM; pages are allocated on first use
    n_ranks = int(os.environ.get('LOCAL_WORLD_SIZE') or 1)
    page = os.sysconf('SC_PAGE_SIZE')
    n_bytes = page * (os.sysconf('SC_PHYS_PAGES') // (2 * n_ranks))
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    address = libc.malloc(ctypes.c_size_t(n_bytes))
    if address:
        first_page = -(-address // page) * page
        libc.madvise(ctypes.c_void_p(first_page), ctypes.c_size_t(n_bytes - page), 14)  # MADV_HUGEPAGE
        libc.free(address)
