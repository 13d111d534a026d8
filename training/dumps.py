"""Dumps: what flows through a model, a .npy file for each tensor and at last index.json."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import distributed
from files import one_line, read_json, write_atomically, write_json

INDEX = 'index.json'
# relative errors of equal tensors, by the dtype of matrix products; 12 layers have 2e-6, and 2e-2 in bfloat16
RTOL = {'float32': 1e-4, 'float16': 1e-2, 'bfloat16': 5e-2}
CHUNK = 1 << 22  # numbers compared at a time
active = []  # the recorder at work: an operator takes no objects


class Recorder:
    """The writer of one dump. Each rank has some rows of the batch, and the first writes all."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.facts = {}  # of each tensor, by name
        self.parts = {}  # of tensors that the model computes in several parts
        self.writes = not dist.is_initialized() or dist.get_rank() == 0
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / INDEX).unlink(missing_ok=True)
        active[:] = [self]

    def watch(self, module, name: str, part: int = 0, n_parts: int = 1):
        """Record input and output of a module, and their gradients, as one of n_parts of our tensor."""
        note = partial(torch.ops.flatgpt.record, part=part, n_parts=n_parts)
        module.register_forward_pre_hook(partial(before, partial(note, name=f'{name}.in')))
        module.register_forward_hook(partial(after, partial(note, name=f'{name}.out')))

    def add(self, name, tensor, part, n_parts):
        """Write an activation or its gradient once all of its parts and rows are there."""
        parts = self.parts.setdefault(name, {})
        parts[part] = tensor.detach()
        if len(parts) < n_parts:
            return
        parts = [parts[i] for i in range(n_parts)]
        del self.parts[name]
        if name.endswith('.in'):  # which they share
            tensor = parts[0]
        elif name.endswith('.in.grad'):
            tensor = sum(parts)
        else:
            tensor = torch.cat(parts, dim=-1)
        if dist.is_initialized():  # the rows of all ranks, in their order
            own = tensor.contiguous()
            tensor = own.new_empty(dist.get_world_size() * len(own), *own.shape[1:])
            distributed.all_gather(tensor, own)
        self.write(name, tensor)

    def write(self, name: str, tensor: torch.Tensor):
        """Write one tensor: bfloat16, which NumPy lacks, as float32. The index names the dtype."""
        if not self.writes:
            return
        values = tensor.detach().cpu()
        if values.is_floating_point():
            values = values.float()
        values = values.numpy()
        write_atomically(self.folder / f'{name}.npy', lambda f: np.save(f, values, allow_pickle=False))
        is_finite = np.isfinite(values)
        finite = values[is_finite] if is_finite.any() else np.zeros(1)
        self.facts[name] = dict(
            name=name, shape=values.shape, dtype=str(tensor.dtype).removeprefix('torch.'),
            mean=float(finite.mean(dtype=np.float64)), deviation=float(finite.std(dtype=np.float64)),
            largest=float(np.abs(finite).max()), zeros=float((values == 0).mean()),
            non_finite=int((~is_finite).sum()))

    def finish(self, **about):
        """Write index.json. about: facts of the whole dump, with the dtype of its matrix products."""
        if self.writes:
            tensors = [self.facts[name] for name in order_of(list(self.facts))]
            write_json(self.folder / INDEX, dict(format=1, **about, tensors=tensors))


def order_of(names: list[str]) -> list[str]:
    """Return the names written in order of execution: weights before outputs, then backward in reverse."""
    written, forward = set(names), []
    for name in names:
        module, _, kind = name.rpartition('.')
        if kind == 'out':
            forward += [f'{module}.{kind}' for kind in ('weight', 'bias') if f'{module}.{kind}' in written]
        if kind not in ('weight', 'bias', 'grad'):
            forward.append(name)
    called, weights = set(forward), [name for name in names if name.endswith(('.weight', '.bias'))]
    forward = [weight for weight in weights if weight not in called] + forward  # wpe is not called
    return forward + [f'{name}.grad' for name in reversed(forward) if f'{name}.grad' in written]


# -----------------------------------------------------------------------------
# Hooks call one custom operator, which torch.compile keeps in its graph


def before(note, module, inputs):
    return (note(inputs[0]), *inputs[1:])


def after(note, module, inputs, output):
    if isinstance(output, tuple):  # blocks of transformers' GPT-2
        return (note(output[0]), *output[1:])
    return note(output)


@torch.library.custom_op('flatgpt::record', mutates_args=())
def record(x: torch.Tensor, name: str, part: int, n_parts: int) -> torch.Tensor:
    active[0].add(name, x, part, n_parts)
    return x.clone()


@record.register_fake
def _(x, name, part, n_parts):
    return torch.empty_like(x)


def keep_arguments(ctx, inputs, output):
    ctx.arguments = inputs[1:]


def record_gradient(ctx, grad):
    name, part, n_parts = ctx.arguments
    return torch.ops.flatgpt.record(grad, f'{name}.grad', part, n_parts), None, None, None


record.register_autograd(record_gradient, setup_context=keep_arguments)


# -----------------------------------------------------------------------------
# reading and measuring


class Row(NamedTuple):
    """The difference of one tensor in two dumps."""

    name: str
    error: float  # norm of the difference / norm of the second
    largest: float  # difference
    cosine: float
    is_equal: bool  # within the tolerance


def read_index(folder):
    """Return (names in order, relative tolerance) of a dump."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f'{folder} has no {INDEX}: it is no dump, or one that did not finish: '
                                'write it with numerics.py dump, or as docs/NUMERICS.md shows')
    index = read_json(path)
    with one_line(f'{path}: accepted are "tensors", a list of {{"name": ...}}, and "dtype", one of '
                  f'{", ".join(RTOL)}, missing or unknown is'):
        return [str(tensor['name']) for tensor in index['tensors']], RTOL[index.get('dtype', 'float32')]


def read_array(folder, name):
    path = Path(folder) / f'{name}.npy'
    with one_line(f'{path}: write the dump again'):
        array = np.load(path, mmap_mode='r', allow_pickle=False)
    if array.dtype.kind not in 'iuf':
        raise ValueError(f'{path}: its dtype is {array.dtype}, accepted are whole numbers and floats')
    return array


def measure(name: str, a, b, tolerance: float, *, atol: float) -> Row:
    """Compare two arrays, a chunk at a time in float64. A number that is not finite is never equal."""
    a, b = a.reshape(-1), b.reshape(-1)
    dot = a_squared = b_squared = squared = largest = np.float64(0)
    with np.errstate(all='ignore'):  # of numbers that are not finite, and of zeros
        for start in range(0, a.size, CHUNK):
            x, y = a[start:start + CHUNK].astype(np.float64), b[start:start + CHUNK].astype(np.float64)
            difference = x - y
            dot, squared = dot + x @ y, squared + difference @ difference
            a_squared, b_squared = a_squared + x @ x, b_squared + y @ y
            largest = np.maximum(largest, np.abs(difference).max())
        error, cosine = np.sqrt(squared / b_squared), dot / np.sqrt(a_squared * b_squared)
    if squared == 0:
        error, cosine = 0.0, 1.0
    return Row(name, float(error), float(largest), float(cosine), bool(error <= tolerance or largest <= atol))
