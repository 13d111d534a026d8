"""Measure training steps, decoding or data loading on this machine. --help lists the settings.

    python bench.py                                          # GPT-2 (124M), 12 windows of 1024 tokens
    python bench.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --vocab_size=65 --batch_size=16
    python bench.py --mode=decode --quantize=both            # 16 bits and int8, 1 and 8 rows
    python bench.py --mode=data --dataset=shakespeare_char

Weights are random, and so are the tokens unless a dataset is named.
"""

import contextlib
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import count, islice, starmap
from json import dumps, loads
from pathlib import Path
from statistics import median
from typing import Literal

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # as in train.py

import torch

import devices
import distributed
from chat import check, prepare_decoding
from configurator import config_of, configure
from files import one_line_errors, print0
from kernels import loss_chunk_rows
from model import GPT, GPTConfig
from optim import OptimizerSettings, StepJudge, configure_optimizers, muon_momentum, set_lr, step_unless
from tokens.dataset import dataset_folders
from tokens.loader import Batch, Loader

# -----------------------------------------------------------------------------
mode: Literal['step', 'decode', 'data'] = 'step'  # train; read and continue a prompt; load batches
json = False  # end with all numbers as a JSON object
profile = False  # also print the five costliest operations, warm-up included
# model
arch: Literal['gpt2', 'modern', 'llama'] = 'gpt2'
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304
bias = False
# model, for arch=llama only; as in train.py
n_kv_head: int | None = None
head_size: int | None = None
n_hidden: int | None = None
# mode=step and mode=data
batch_size: int | None = None  # windows in a step, or rows to decode; None = 12 windows, 1 row
dataset = ''  # windows of this dataset; '' = random tokens, in mode=data shakespeare_char
bf16_residual = False  # as in train.py
loss_chunks: int | Literal['auto'] = 'auto'  # compute the loss in this many chunks; auto = by size
optimizer: Literal['adamw', 'muon'] = 'adamw'
warmup_steps = 5  # not measured
steps = 20
# mode=decode
prompt_tokens = 512
max_new_tokens = 128
rounds = 3  # times to read the prompt and continue it, after one round of warm-up
quantize: Literal['none', 'int8', 'both'] = 'none'  # int8: on the CPU; both: compare
# system
seed = 1337
device = 'auto'  # cpu, cuda, cuda:1, mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
compile: bool | Literal['auto'] = 'auto'  # auto = as in train.py (step) and in sample.py (decode)
# -----------------------------------------------------------------------------

LEAST = dict(batch_size=1, loss_chunks=0, steps=1, warmup_steps=0, prompt_tokens=1, max_new_tokens=2,
             rounds=1, seed=0)
COMPARED = 'decode_tok_per_s', 'memory_share', 'prefill_tok_per_s', 'process_bytes'
CACHE_BYTES = 64 << 20  # smaller weights may stay in a processor's caches: no memory limit is measured


def main():
    global batch_size
    if batch_size is None:
        batch_size = 1 if mode == 'decode' else 12
    for name, least in LEAST.items():
        value = globals()[name]
        check(name, value, value == 'auto' or value >= least, f'{least} or more')
    n_context = prompt_tokens + max_new_tokens
    if mode == 'decode' and n_context > block_size:
        raise ValueError(f'prompt_tokens={prompt_tokens} and max_new_tokens={max_new_tokens} do not fit into '
                         f'block_size={block_size}: use --block_size={n_context} or more')
    result = compare_quantized() if mode == 'decode' and quantize == 'both' else measure()
    if json:
        print(dumps(result))
    distributed.stop()


def measure() -> dict:
    """Measure and print. Return the JSON object."""
    place = distributed.start(device)
    torch.manual_seed(seed)
    decodes = mode == 'decode'
    wanted = compile is True if decodes else compile  # auto decodes eagerly, as in sample.py
    compiles = devices.choose_compile(wanted, place.device)
    precision = devices.choose_dtype(dtype, place.device, packs=decodes and not compiles)
    settings, machine = config_of(globals()), describe_machine(place.device)
    facts = dict(mode=mode, dtype=str(precision).removeprefix('torch.'), compiled=compiles)
    print0(', '.join(f'{name} {value}' for name, value in {**facts, **machine}.items()))

    with torch.profiler.profile() if profile else contextlib.nullcontext() as profiler:
        if mode == 'data':
            result = measure_data()
        else:
            sizes = {name: settings[name] for name in settings if name in GPTConfig.__dataclass_fields__}
            torch.set_default_dtype(precision if decodes else torch.float32)
            model = GPT(GPTConfig(**sizes)).to(place.device)
            torch.set_default_dtype(torch.float32)
            n_parameters = model.get_num_params()  # before packing: packed weights are no parameters
            measure_model = measure_decode if decodes else measure_step
            result = measure_model(model, place.device, precision, compiles)
            result['parameters'] = n_parameters
    result['peak_memory_bytes'] = devices.peak_memory_bytes(place.device)
    print_numbers(result)
    if profile:
        result['top_costs'] = top_costs(profiler, place.device)
        for name, ms, share in result['top_costs']:
            print0(f'{share:6.1%} {ms:10.1f} ms  {name}')
    return dict(result, **facts, machine=machine, settings=settings)


# -----------------------------------------------------------------------------
# training and loading


def train(model, batches, device, precision, *, settings: OptimizerSettings, use_compile=False):
    """Yield the mean loss, 0-d, of an update for each (batch, number of its targets).

    It is the update of train.py with one micro-step. Nothing in it waits for the device.
    """
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    optimizers, judge = configure_optimizers(model.train(), settings, precision), StepJudge(device)
    loss_of = distributed.compiled_loss(model) if use_compile else model.loss_sum
    for iter_num, (batch, n_targets) in enumerate(batches):
        set_lr(optimizers, 1.0, muon_momentum(iter_num))
        with autocast:
            loss = loss_of(*batch) / n_targets
        scaler.scale(loss).backward()
        for each in optimizers:
            scaler.unscale_(each)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, grad_norm)
        skip = judge.judge(grad_norm, loss.detach())
        for each in optimizers:
            step_unless(each, skip)
        scaler.update()
        for each in optimizers:
            each.zero_grad(set_to_none=True)
        yield loss.detach()


def measure_step(model, device, precision, use_compile):
    model.loss_chunks, model.bf16_residual = loss_chunks, bf16_residual
    settings = OptimizerSettings(optimizer, learning_rate=1e-4, weight_decay=1e-2)
    batches, losses, times_ms = islice(read_batches(device), warmup_steps + steps), [], []
    updates = train(model, batches, device, precision, settings=settings, use_compile=use_compile)
    for loss, ms in timed(updates, device):
        losses.append(loss)
        times_ms.append(ms)
        if len(times_ms) in (1, warmup_steps):
            print0(f'step {len(times_ms)} of {warmup_steps + steps}: {ms:.0f} ms')

    step_ms, peak = spread(times_ms[warmup_steps:]), devices.peak_flops(device)
    tok_per_s = batch_size * block_size / step_ms['median'] * 1000
    flop_per_s = tok_per_s * model.flops_per_token(block_size)
    matmul_rate = matmul_flop_per_s(model, device, precision)
    mfu = flop_per_s / peak if peak and precision != torch.float32 else None
    print0(f'the step reaches {flop_per_s / matmul_rate:.0%} of the rate of its matrix products alone')
    return dict(step_ms=step_ms, tok_per_s=tok_per_s, flops_per_token=model.flops_per_token(block_size),
                flop_per_s=flop_per_s, matmul_flop_per_s=matmul_rate, matmul_share=flop_per_s / matmul_rate,
                mfu=mfu, loss=losses[-1].item())


def matmul_flop_per_s(model, device, precision):
    """Measure the rate of the linear layers' products alone: one forward, two in the backward pass."""
    n_rows, shapes = batch_size * block_size, Counter()  # {(rows, outputs, inputs): times in a step}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            is_head = module is model.lm_head
            rows = loss_chunk_rows(n_rows, loss_chunks, module.weight) if is_head else n_rows
            shapes[(rows, *module.weight.shape)] += n_rows / rows
    flops = total_ms = 0
    for (rows, n_out, n_in), n_times in shapes.items():
        x, grad, weight = (torch.randn(shape, device=device, dtype=precision)
                           for shape in ((rows, n_in), (rows, n_out), (n_out, n_in)))
        for a, b in ((x, weight.mT), (grad, weight), (grad.mT, x)):
            total_ms += n_times * median(ms for _, ms in timed(starmap(torch.mm, [(a, b)] * 5), device))
            flops += n_times * 2 * rows * n_out * n_in
    return flops / total_ms * 1000


def measure_data():
    """Time the loader alone: the first batch, which opens the dataset, then batches from a warm cache."""
    cpu = torch.device('cpu')
    times_ms = [ms for _, ms in timed(islice(read_batches(cpu), 1 + warmup_steps + steps), cpu)]
    batch_ms = spread(times_ms[1 + warmup_steps:])
    return dict(open_s=times_ms[0] / 1000, batch_ms=batch_ms,
                tok_per_s=batch_size * block_size / batch_ms['median'] * 1000)


def read_batches(device):
    """Yield (Batch on the device, number of its targets)."""
    if mode == 'step' and not dataset:
        tokens = torch.randint(vocab_size, (batch_size, block_size + 1)).to(device)
        while True:
            yield Batch(tokens[:, :-1], tokens[:, 1:]), batch_size * block_size
    folders, weights = dataset_folders(dataset or 'shakespeare_char')
    loader = Loader(folders, 'train', block_size=block_size, batch_size=batch_size, seed=seed,
                    weights=weights, prefetch=device.type != 'cpu')
    if mode == 'step' and loader.vocab_size > vocab_size:
        raise ValueError(f'vocab_size={vocab_size}: dataset {dataset} has {loader.vocab_size} tokens: '
                         f'use --vocab_size={loader.vocab_size} or more')
    for step in count():
        yield loader.batch(step).to(device), max(1, loader.count_targets(step))


# -----------------------------------------------------------------------------
# decoding


def measure_decode(model, device, precision, use_compile):
    """Time the first token, for which the prompt is read (prefill), and the later ones."""
    n_matrix = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    n_vector = sum(p.numel() for p in model.parameters() if p.dim() < 2)  # norms and biases
    prepare_decoding(model.eval(), device, use_compile, quantize, batch_size)
    prompt = torch.randint(vocab_size, (batch_size, prompt_tokens), device=device)
    prefill_ms, decode_ms = [], []
    for i in range(1 + rounds):
        new_tokens = model.stream(prompt, max_new_tokens, temperature=0.8, top_k=200)
        first_ms, *later_ms = [ms for _, ms in timed(new_tokens, device)]
        if i > 0:  # not the warm-up
            prefill_ms.append(first_ms)
            decode_ms += later_ms
    prefill_ms, decode_ms = spread(prefill_ms), spread(decode_ms)
    prefill_tok_per_s = 1000 * batch_size * prompt_tokens / prefill_ms['median']
    decode_tok_per_s = 1000 * batch_size / decode_ms['median']
    result = dict(prefill_ms=prefill_ms, prefill_tok_per_s=prefill_tok_per_s, decode_ms=decode_ms,
                  decode_tok_per_s=decode_tok_per_s, process_bytes=devices.anonymous_bytes())

    # a token takes at least as long as reading the weights, keys and values
    item_bytes = model.transformer.wte(prompt[:, :1]).itemsize
    n_cached = batch_size * (prompt_tokens + max_new_tokens / 2)  # tokens, on average
    matrix_bytes = 1 if quantize == 'int8' else precision.itemsize
    weight_bytes = n_matrix * matrix_bytes + n_vector * item_bytes
    cache_bytes = int(2 * n_layer * model.config.n_kv_head * model.config.head_size * n_cached) * item_bytes
    read_rate = limit_ms = share = None
    if weight_bytes >= CACHE_BYTES:
        x = torch.ones(128 << 20, device=device)
        read_rate = 1000 * x.nbytes / min(ms for _, ms in timed((x.max() for _ in range(10)), device))
        limit_ms = 1000 * (weight_bytes + cache_bytes) / read_rate
        share = limit_ms / decode_ms['median']
    return dict(result, weight_bytes=weight_bytes, cache_bytes=cache_bytes, read_bytes_per_s=read_rate,
                memory_limit_ms=limit_ms, memory_share=share)


def compare_quantized() -> dict:
    """Measure 16 bits and int8 with 1 and 8 rows, each in a process of its own. Print the ratios."""
    runs, ratios, settings = {}, {}, dict(config_of(globals()), json=True)
    print0('| rows, unit | 16 bits | int8 | ratio |\n| --- | --- | --- | --- |')
    for n_rows in (1, 8):
        for kind in ('none', 'int8'):
            flags = dict(settings, quantize=kind, batch_size=n_rows)
            command = [sys.executable, __file__, *(f'--{name}={value}' for name, value in flags.items())]
            done = subprocess.run(command, stdout=subprocess.PIPE, encoding='utf-8')
            if done.returncode:
                sys.exit(done.returncode)
            runs[f'{kind}_{n_rows}'] = loads(done.stdout.splitlines()[-1])
        for name in COMPARED:
            half, int8 = runs[f'none_{n_rows}'][name], runs[f'int8_{n_rows}'][name]
            if half and int8:
                ratios[f'{name}_{n_rows}'] = int8 / half
                print0(f'| {n_rows}, {name} | {half:,.6g} | {int8:,.6g} | {int8 / half:.2f} |')
    return dict(ratios=ratios, runs=runs)


# -----------------------------------------------------------------------------
# numbers


def now_s(device):
    """Return the time once the device has finished its queue."""
    devices.synchronize(device)
    return time.perf_counter()


def timed(results, device):
    """Yield each item of an iterator with the milliseconds that the device took for it."""
    t_last_s = now_s(device)
    for result in results:
        t_s = now_s(device)
        yield result, (t_s - t_last_s) * 1000
        t_last_s = t_s


def spread(values):
    return dict(median=median(values), min=min(values), max=max(values), n=len(values))


def print_numbers(result):
    for name, value in result.items():
        if isinstance(value, dict):
            value = '{median:.2f} (median of {n}, {min:.2f} to {max:.2f})'.format(**value)
        elif isinstance(value, float):
            value = f'{value:,.6g}'
        elif isinstance(value, int):
            value = f'{value:,}'
        if value is not None:
            print0(f'{name:22} {value}')


def top_costs(profiler, device, n=5):
    """Return [(name, ms, share)] of the n costliest kernels of a GPU, or operations of a CPU."""
    kind, time_of = torch.autograd.DeviceType.CPU, 'self_cpu_time_total'
    if device.type == 'cuda':
        kind, time_of = torch.autograd.DeviceType.CUDA, 'self_device_time_total'
    # an annotation such as Optimizer.step repeats the time of the operations in it
    costs = [(getattr(event, time_of) / 1000, event.key) for event in profiler.key_averages()
             if event.device_type == kind and not event.is_user_annotation]
    total_ms = sum(ms for ms, _ in costs)
    return [(name, ms, ms / total_ms) for ms, name in sorted(costs, reverse=True)[:n]]


def describe_machine(device):
    cpu_info = Path('/proc/cpuinfo')  # Linux names the processor's model only here
    text = cpu_info.read_text(encoding='utf-8') if cpu_info.exists() else ''
    model_name = re.search(r'model name\s*: (.+)', text)
    processor = model_name[1] if model_name else platform.processor() or platform.machine()
    return dict(device=devices.device_name(device), processor=processor, system=platform.platform(),
                python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda)


if __name__ == '__main__':
    with one_line_errors():
        configure(globals())
        main()
