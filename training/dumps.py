"""Dumps: what flows through a model, a .npy file for each tensor. Written while it computes, read, measured.

    recorder = Recorder(folder)
    recorder.watch(block.mlp.c_fc, 'h.00.mlp.c_fc')   # h.00.mlp.c_fc.in, .out, .in.grad and .out.grad
    ... forward, backward ...
    recorder.write('h.00.mlp.c_fc.weight', weight)
    recorder.finish(dtype='float32')                  # index.json, without which a folder is no dump

The hooks call one custom operator, which torch.compile keeps in its graph. Compiled code is fused between
the recorded tensors, not across them.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import distributed
from files import read_json, write_atomically, write_json

INDEX = 'index.json'
# relative errors up to which tensors count as equal, by the dtype of matrix products; docs/RESULTS.md has
# those of 12 layers: 2e-6, and 2e-2 in bfloat16
RTOL = {'float32': 1e-4, 'float16': 1e-2, 'bfloat16': 5e-2}
CHUNK = 1 << 22  # numbers compared at a time
recorders = {}  # by folder, for the operator: operators take no objects


class Recorder:
    """The writer of one dump. With several ranks, each has some rows of the batch, and the first writes all.

    raises  OSError if the folder cannot be written
    """

    def __init__(self, folder: str):
        self.folder, self.key = Path(folder), str(folder)
        self.facts = {}  # of each tensor, by name
        self.parts = {}  # of tensors that the model computes in several parts
        self.writes = not dist.is_initialized() or dist.get_rank() == 0
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / INDEX).unlink(missing_ok=True)
        recorders[self.key] = self

    def watch(self, module, name: str, part: int = 0, n_parts: int = 1):
        """Record the first input and output of a module, and their gradients.

        part, n_parts  of a tensor that this project has in one and the module's model in several pieces
        """
        note = partial(record, self.key, name, part, n_parts)
        module.register_forward_pre_hook(partial(before, note))
        module.register_forward_hook(partial(after, note))

    def add(self, name, tensor, part, n_parts):
        """Write an activation or its gradient once all of its parts and rows are there."""
        if n_parts > 1:
            parts = self.parts.setdefault(name, {})
            parts[part] = tensor.detach()
            if len(parts) < n_parts:
                return
            parts = [self.parts[name][i] for i in range(n_parts)]
            del self.parts[name]
            if name.endswith('.in'):  # which they share
                tensor = parts[0]
            elif name.endswith('.in.grad'):
                tensor = sum(parts)
            else:
                tensor = torch.cat(parts, dim=-1)
        self.write(name, all_rows(tensor))

    def write(self, name: str, tensor: torch.Tensor):
        """Write one tensor. NumPy has no bfloat16, so the file has float32, and the index names the dtype."""
        if not self.writes:
            return
        values = tensor.detach().cpu()
        if values.is_floating_point():
            values = values.float()
        path = self.folder / f'{name}.npy'
        write_atomically(path, lambda f: np.save(f, values.numpy(), allow_pickle=False))
        finite = values[values.isfinite()].float()
        if not finite.numel():
            finite = torch.zeros(1)
        self.facts[name] = dict(
            name=name, shape=list(values.shape), dtype=str(tensor.dtype).removeprefix('torch.'),
            mean=finite.mean(dtype=torch.float64).item(), deviation=finite.std(correction=0).item(),
            largest=finite.abs().max().item(), zeros=(values == 0).float().mean().item(),
            non_finite=int((~values.isfinite()).sum()))

    def finish(self, **about):
        """Write index.json. about: facts of the whole dump; dtype is that of its matrix products."""
        if self.writes:
            tensors = [self.facts[name] for name in order_of(list(self.facts))]
            write_json(self.folder / INDEX, dict(format=1, **about, tensors=tensors))
        del recorders[self.key]


def order_of(names: list[str]) -> list[str]:
    """Return names in the order of execution: a module's weights before its output, then backward in reverse.

    names  as written; activations in the order of the forward pass
    """
    given = set(names)
    weights = [name for name in names if name.endswith(('.weight', '.bias'))]
    forward = []
    for name in names:
        module, _, kind = name.rpartition('.')
        if kind in ('weight', 'bias', 'grad'):
            continue
        if kind == 'out':
            forward += [weight for weight in weights if weight.rpartition('.')[0] == module]
        forward.append(name)
    forward = [weight for weight in weights if weight not in forward] + forward  # wpe is not called
    return forward + [f'{name}.grad' for name in reversed(forward) if f'{name}.grad' in given]


def all_rows(tensor):
    """Return the rows of all ranks, in their order."""
    if not dist.is_initialized():
        return tensor
    own = tensor.detach().contiguous()
    whole = own.new_empty(dist.get_world_size() * len(own), *own.shape[1:])
    distributed.all_gather(whole, own)
    return whole


# -----------------------------------------------------------------------------
# hooks and their operator


def before(note, module, inputs):
    return (note('in', inputs[0]), *inputs[1:])


def after(note, module, inputs, output):
    if isinstance(output, tuple):  # blocks of transformers' GPT-2
        return (note('out', output[0]), *output[1:])
    return note('out', output)


def record(key, name, part, n_parts, end, tensor):
    return torch.ops.flatgpt.record(tensor, key, f'{name}.{end}', part, n_parts)


@torch.library.custom_op('flatgpt::record', mutates_args=())
def record_op(x: torch.Tensor, key: str, name: str, part: int, n_parts: int) -> torch.Tensor:
    recorders[key].add(name, x, part, n_parts)
    return x.clone()


@record_op.register_fake
def _(x, key, name, part, n_parts):
    return torch.empty_like(x)


def keep_arguments(ctx, inputs, output):
    ctx.arguments = inputs[1:]


def record_gradient(ctx, grad):
    key, name, part, n_parts = ctx.arguments
    return torch.ops.flatgpt.record(grad, key, f'{name}.grad', part, n_parts), None, None, None, None


record_op.register_autograd(record_gradient, setup_context=keep_arguments)


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
    """Return (names in order, dtype) of a dump."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f'{folder} has no {INDEX}: it is no dump, or one that did not finish: '
                                'write it with numerics.py dump, or as docs/NUMERICS.md shows')
    index = read_json(path)
    try:
        names = [str(tensor['name']) for tensor in index['tensors']]
        return names, RTOL[index.get('dtype', 'float32')]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f'{path}: {error!r} is missing or unknown: accepted are "tensors", a list of '
                         f'{{"name": ...}}, and "dtype", one of {", ".join(RTOL)}') from None


def read_array(folder, name):
    path = Path(folder) / f'{name}.npy'
    try:
        array = np.load(path, mmap_mode='r', allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f'{path}: {error}: write the dump again') from None
    if array.dtype.kind not in 'iuf':
        raise ValueError(f'{path}: its dtype is {array.dtype}, accepted are whole numbers and floats')
    return array


def measure(name: str, a, b, tolerance: float, *, atol: float) -> Row:
    """Compare two arrays, a chunk at a time in float64. A number that is not finite is never equal."""
    a, b = a.reshape(-1), b.reshape(-1)
    dot = a_squared = b_squared = squared = largest = 0.0
    for start in range(0, a.size, CHUNK):
        x, y = a[start:start + CHUNK].astype(np.float64), b[start:start + CHUNK].astype(np.float64)
        difference = x - y
        dot, squared = dot + x @ y, squared + difference @ difference
        a_squared, b_squared = a_squared + x @ x, b_squared + y @ y
        largest = np.maximum(largest, np.abs(difference).max())
    error, cosine = 0.0, 1.0
    if squared != 0:
        error = float(np.sqrt(squared / b_squared)) if b_squared else np.inf
        cosine = dot / np.sqrt(a_squared * b_squared) if a_squared and b_squared else 0.0
    return Row(name, error, float(largest), float(cosine), bool(error <= tolerance or largest <= atol))
