"""Write every layer's numbers to disk, and compare two such dumps. docs/NUMERICS.md explains both.

    python numerics.py dump --out=a --out_dir=out-quickstart
    python numerics.py dump --out=b --out_dir=out-quickstart --dtype=bfloat16
    python numerics.py dump --out=c --out_dir=out-quickstart --reference=transformers
    python numerics.py compare a b --picture=error.png

dump runs one forward and one backward pass on fixed tokens. compare exits with 1 if a tensor differs.
"""

import re
import sys
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

import devices
import distributed
from configurator import configure
from files import one_line, one_line_errors, print0, printable
from model import GPT, Block
from tokens.dataset import dataset_folders
from tokens.loader import Loader
from training.dumps import Recorder, measure, read_array, read_index
from training.pictures import draw_errors
from weights import reference as transformers_model
from weights.begin import build_model, find_start

# -----------------------------------------------------------------------------
# dump: the model
out = ''  # folder to write
init_from = 'resume'  # the checkpoint in out_dir; or gpt2 ... gpt2-xl, a transformers folder, an .npz file
out_dir = 'out'
checkpoint_path = ''  # this file instead of the checkpoint in out_dir; may be another trainer's
n_head: int | None = None  # for a checkpoint_path that does not store it
reference: Literal['', 'transformers'] = ''  # run the same weights by transformers, under the same names
# dump: the tokens; by default random ids
dataset = ''  # the first windows of the validation split of this folder in data/
ids = ''  # a file of whole numbers, a row of them per line, or .npy; each row has one more than the inputs
batch_size = 2
block_size = 64  # inputs in a row; no more than the model's
seed = 1337
# dump: the system
device = 'auto'  # cpu, cuda, cuda:1, mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'float32'  # of matrix products, as in train.py
compile = False
parallel: Literal['ddp', 'fsdp'] = 'ddp'  # of several ranks under torchrun
# compare: relative error, or largest difference, up to which a tensor counts as equal
rtol: float | None = None  # None = by the coarser dtype of the two dumps
atol = 1e-12
picture = ''  # draw the errors into this .png file
# -----------------------------------------------------------------------------

RECORDED = Block, nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm


# -----------------------------------------------------------------------------
# dump


def short(name):
    """'transformer.h.3.mlp.c_fc' -> 'h.03.mlp.c_fc'"""
    return re.sub(r'[.](\d)(?=[.]|$)', r'.0\1', name.removeprefix('transformer.'))


def read_ids(vocab_size: int, most: int) -> torch.Tensor:
    """Return the tokens to run on, (batch_size, T + 1) int64. `most` is the block_size of the model."""
    T = min(block_size, most)
    source = f'--ids={ids}, --dataset={dataset}, --batch_size={batch_size}, --block_size={block_size}'
    if min(batch_size, block_size) < 1:
        raise ValueError(f'{source}: accepted are sizes of 1 or more')
    if ids:
        with one_line(f'--ids={ids}: accepted is a file of whole numbers, as many on each line, or .npy'):
            if ids.endswith('.npy'):
                rows = np.load(ids, allow_pickle=False)
            else:
                rows = np.loadtxt(ids, np.int64)
            rows = torch.from_numpy(np.atleast_2d(rows).astype(np.int64, casting='safe'))
    elif dataset:
        loader = Loader(dataset_folders(dataset)[0], 'val', block_size=T + 1, batch_size=batch_size,
                        order='sequential')
        rows = loader.windows(np.arange(batch_size)).x
    else:
        rows = torch.randint(vocab_size, (batch_size, T + 1), generator=torch.Generator().manual_seed(seed))
    if rows.dim() != 2 or not rows.numel() or not 1 < rows.size(1) <= most + 1:
        raise ValueError(f'{source}: has shape {tuple(rows.shape)}, accepted are rows of 2 to {most + 1} ids')
    if not 0 <= rows.min() <= rows.max() < vocab_size:
        raise ValueError(f'{source}: has ids from {rows.min()} to {rows.max()}, the vocabulary of the model '
                         f'has 0 to {vocab_size - 1}')
    return rows


def dump(place):
    """Run one forward and backward pass, and write every tensor of it."""
    if not out:
        raise ValueError('--out is empty: name the folder to write')
    if init_from == 'resume':
        model = build_model(find_start(init_from, out_dir, checkpoint_path, n_head))
    else:
        model = GPT.from_pretrained(init_from).eval()
    rows, n_ranks = read_ids(model.config.vocab_size, model.config.block_size), place.world_size
    if reference and n_ranks > 1:
        raise ValueError('--reference runs in one process: leave torchrun out')
    if len(rows) % n_ranks:
        raise ValueError(f'{n_ranks} ranks do not divide {len(rows)} rows of tokens: change --batch_size')
    precision = devices.choose_dtype(dtype, place.device)
    recorder = Recorder(out)
    recorder.write('ids', rows)
    run(model, rows, recorder, precision, place)
    recorder.finish(dtype=str(precision).removeprefix('torch.'), device=devices.device_name(place.device),
                    torch=torch.__version__, compiled=compile, ranks=n_ranks, reference=reference)
    print0(f'{out}: {len(recorder.facts)} tensors')


def run(model, rows, recorder, precision, place):
    """Run a model, or that of transformers with its weights, and record its tensors under our names."""
    whole = whole_tensors
    names = {name: [name] for name, module in model.named_modules() if isinstance(module, RECORDED)}
    if reference:
        names = transformers_model.names_of(model)
        shapes = {name: p.to('meta') for name, p in model.named_parameters()}
        whole = partial(transformers_model.in_our_layout, model.config, shapes)
        model = transformers_model.reference_of(model).to(place.device)
    else:
        model = distributed.prepare(model, place, parallel=parallel, dtype=precision)
    weights, modules = dict(model.named_parameters()), dict(model.named_modules())
    for name, weight in whole(weights):
        recorder.write(short(name), weight)
    for name, parts in names.items():
        for i, part in enumerate(parts):
            recorder.watch(modules[part], short(name), i, len(parts))
    if compile:
        parts = [model]
        if isinstance(model, FSDPModule):
            parts = model.transformer.h
        for part in parts:
            part.compile(dynamic=False)

    # each rank takes its share of the rows; gradients and losses are sums over the ranks
    own = rows.chunk(place.world_size)[place.rank].to(place.device)
    inputs, targets = own[:, :-1], own[:, 1:]
    with torch.autocast(place.device.type, precision, enabled=precision != torch.float32):
        if reference:
            logits = model(inputs, use_cache=False).logits.float()
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        else:
            loss = model(inputs, targets)[1] / place.world_size
    loss.backward()
    distributed.sum_gradients(model)
    recorder.write('loss', distributed.all_reduce_sum(loss.detach()))
    for name, grad in whole({name: p.grad for name, p in weights.items()}):
        recorder.write(f'{short(name)}.grad', grad)


def whole_tensors(tensors):
    for name, tensor in tensors.items():
        yield name, distributed.whole(tensor)


# -----------------------------------------------------------------------------
# compare


def compare(folder_a, folder_b) -> bool:
    """Print the differences of two dumps. Return whether all are within the tolerance."""
    (names_a, rtol_a), (names_b, rtol_b) = read_index(folder_a), read_index(folder_b)
    tolerance = rtol
    if rtol is None:
        tolerance = max(rtol_a, rtol_b)
    common = set(names_a) & set(names_b)
    names = [name for name in names_a if name in common]
    if not names:
        raise ValueError(f'{folder_a} and {folder_b} have no tensor of the same name')
    for folder, own in ((folder_a, names_a), (folder_b, names_b)):
        if alone := [name for name in own if name not in common]:
            print(f'only in {folder}: {len(alone)} tensors ({printable(", ".join(alone[:3]))} ...)')
    width = max(map(len, names))
    print(f'{"tensor":{width}}  relative error  largest difference    cosine')
    rows = []
    for name in names:
        a, b = read_array(folder_a, name), read_array(folder_b, name)
        if a.shape != b.shape:
            raise ValueError(f'{name} has shape {a.shape} in {folder_a} and {b.shape} in {folder_b}: '
                             'the dumps are of different models or tokens')
        row = measure(name, a, b, tolerance, atol=atol)
        print(f'{printable(name):{width}}  {row.error:14.2e}  {row.largest:18.2e}  {row.cosine:8.6f}'
              + '  *' * (not row.is_equal))
        rows.append(row)
    if picture:
        draw_errors(rows, tolerance, Path(picture))
    bad = [row for row in rows if not row.is_equal]
    if not bad:
        print(f'{len(rows)} tensors, all within {tolerance:g}')
        return True
    first = rows.index(bad[0])
    before = rows[first - 1].name if first else 'nothing'
    print(f'{len(bad)} of {len(rows)} tensors differ by more than {tolerance:g} (*). First {bad[0].name}: '
          f'relative error {bad[0].error:.2e}; before it {before} is equal')
    return False


if __name__ == '__main__':
    with one_line_errors():
        command, folders = sys.argv[1:2], sys.argv[2:4]
        if command == ['dump']:
            configure(globals(), sys.argv[2:])
            place = distributed.start(device)
            torch.set_float32_matmul_precision('highest')  # no TensorFloat32
            dump(place)
            distributed.stop()
        elif command == ['compare'] and len(folders) == 2 and not any(f.startswith('-') for f in folders):
            configure(globals(), sys.argv[4:])
            if not compare(*folders):
                sys.exit(1)
        else:
            configure(globals(), [flag for flag in sys.argv[1:] if flag in ('--help', '-h')])
            raise ValueError(f'{" ".join(sys.argv[1:]) or "no command"}: accepted are dump --out=FOLDER, '
                             'compare FOLDER FOLDER, and --help')
