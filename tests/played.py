"""Run scripts as on one CUDA GPU, with tensors on the CPU: `python played.py FACTS '[[SCRIPT, FLAG, ...]]'`.

Python sees device cuda:0 and takes its branches; every device argument of a torch call becomes the CPU.
Not played: tensor.device is the CPU, so code that asks a tensor takes the CPU branch: attention backends and the
size of loss chunks. There is no compiling, no CUDA stream, and no mix of devices to refuse.
"""

import contextlib
import io
import json
import runpy
import sys
import types
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parent.parent
calls = {}  # of the script that runs


def on_cpu(value):
    is_cuda = isinstance(value, (str, torch.device)) and str(value).startswith('cuda')
    return torch.device('cpu') if is_cuda else value


class CudaOnCpu(TorchFunctionMode):
    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        if function is torch.Tensor.pin_memory:
            calls['pin_memory'] += 1
            return args[0]
        if function is torch.device:  # the scripts see 'cuda'
            return function(*args, **(kwargs or {}))
        return function(*map(on_cpu, args), **{name: on_cpu(value) for name, value in (kwargs or {}).items()})


def set_device(device):
    """The argument check of torch.cuda.set_device()."""
    if torch.device(device).index is None:
        raise ValueError(f'Expected a torch.device with a specified index or an integer, but got: {device}')
    calls['set_device'].append(str(device))


def synchronize(device=None):
    calls['synchronize'] += 1


def with_cpu(function):
    """Call a class or function whose first argument is a type of device with the CPU's."""
    return lambda device, *args, **kwargs: function('cpu', *args, **kwargs)


def play():
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device('cuda')
    torch.accelerator.is_available = torch.cuda.is_available = lambda: True
    torch.accelerator.device_count = torch.cuda.device_count = lambda: 1
    stream = types.SimpleNamespace(is_capturing=lambda: False)
    torch.accelerator.current_stream = lambda device=None: stream  # optimizers ask it
    torch.accelerator.synchronize = synchronize
    torch.cuda.set_device = set_device
    torch.cuda.get_device_name = lambda device=None: 'NVIDIA H200'
    torch.cuda.max_memory_allocated = lambda device=None: 123 << 20
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.autocast = with_cpu(torch.autocast)
    torch.amp.GradScaler = with_cpu(torch.amp.GradScaler)
    import tokens.loader
    init = tokens.loader.Loader.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        calls['prefetch'].append(kwargs.get('prefetch', False))
    tokens.loader.Loader.__init__ = noted


def run(script, *flags):
    """Return a script's standard output and what it called."""
    calls.update(set_device=[], pin_memory=0, synchronize=0, prefetch=[])
    sys.argv = [str(ROOT / script), *flags]
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), CudaOnCpu():
        try:
            runpy.run_path(sys.argv[0], run_name='__main__')
        except SystemExit as stop:
            if stop.code:
                raise
    return dict(calls, stdout=stdout.getvalue())


if __name__ == '__main__':
    path, commands = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    play()
    facts = [run(*command) for command in json.loads(commands)]
    Path(path).write_text(json.dumps(facts), encoding='utf-8')
