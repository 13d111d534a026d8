"""Measures training or generation on this machine, with the pieces that train.py and sample.py use. Settings: see --help.

    python bench.py                                   # a training step of GPT-2 (124M), 12 rows of 1024 tokens: made for a GPU
    python bench.py --batch_size=16 --block_size=256 --n_layer=6 --n_head=6 --n_embd=384 --vocab_size=65    # 10.7M: for a CPU
    python bench.py --mode=decode --prompt_tokens=512 --max_new_tokens=128

Weights are random and so are the tokens, unless a dataset is named: the numbers are about speed, not about the model. The last line is
one JSON object with every number, the settings, the machine and the versions; with --json it comes without the words before it.
"""

import platform
import time
from json import dumps
from statistics import median
from typing import Literal

import torch

import distributed
from configurator import config_of, configure, one_line_errors
from data.loader import Loader, dataset_folders
from model import GPT, GPTConfig
from optim import configure_optimizers

# -----------------------------------------------------------------------------
mode: Literal['step', 'decode'] = 'step'  # step = forward, backward and update; decode = read a prompt and write on from it
json = False  # no words, only the closing line
# model
arch: Literal['gpt2', 'modern'] = 'gpt2'
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024  # step: tokens in a row
vocab_size = 50304
dropout = 0.0
bias = False
batch_size: int | None = None  # rows at once; None = 12 in a step, 1 to decode
# mode=step
dataset = ''  # windows of this dataset, read anew each step; '' = random tokens, made once
optimizer: Literal['adamw', 'muon'] = 'adamw'
warmup_steps = 5  # not counted: compilation, first allocations
steps = 20
# mode=decode
prompt_tokens = 512
max_new_tokens = 128
rounds = 3  # the prompt is read and written on so many times
# system
seed = 1337
device = 'auto'  # cpu, cuda, cuda:1, mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
compile: bool | Literal['auto'] = 'auto'  # auto = as in train.py (step), as in sample.py (decode)
# -----------------------------------------------------------------------------

CACHE_BYTES = 128 << 20  # weights smaller than this may stay in a processor's caches, and memory then sets no limit


def main():
    global batch_size
    batch_size = batch_size if batch_size is not None else 12 if mode == 'step' else 1
    check_settings()
    place = distributed.start(device)
    torch.manual_seed(seed)
    precision = distributed.choose_dtype(dtype, place.device)
    use_compile = distributed.choose_compile(compile if mode == 'step' else compile is True, place.device)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, arch)).to(place.device)
    say(f'model: {arch}, {model.get_num_params() / 1e6:.2f}M parameters')
    say(f'device: {distributed.device_name(place.device)}, {name_of(precision)}, {"compiled" if use_compile else "eager"}')

    measure = measure_step if mode == 'step' else measure_decode
    result = measure(model, place.device, precision, use_compile)
    peak_bytes = distributed.peak_memory_bytes(place.device)
    say(f'peak memory: {gigabytes(peak_bytes)} {"of this process" if place.device.type == "cpu" else "allocated on the device"}'
        if peak_bytes else 'peak memory: not known here')
    machine = dict(device=distributed.device_name(place.device), processor=processor_name(), system=platform.platform(),
                   python=platform.python_version(), torch=torch.__version__)
    print(dumps(dict(mode=mode, **result, peak_memory_bytes=peak_bytes, parameters=model.get_num_params(), dtype=name_of(precision),
                     compiled=use_compile, machine=machine, settings=config_of(globals()))))
    distributed.stop()


# -----------------------------------------------------------------------------
# a training step


def measure_step(model, device, precision, use_compile):
    """Times forward, backward, clipping and update, as train.py does them, with one micro-step in a step."""
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    optimizers = configure_optimizers(model, optimizer=optimizer, learning_rate=1e-4, weight_decay=1e-2, dtype=precision)
    next_batch = open_batches(device)
    if use_compile:
        model.compile()
    model.train()
    times_s, t_last = [], now(device)
    for step in range(warmup_steps + steps):
        x, y = next_batch(step)
        with autocast:
            _, loss = model(x, y)
        scaler.scale(loss).backward()
        for each in optimizers:
            scaler.unscale_(each)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in optimizers:
            scaler.step(each)
            each.zero_grad(set_to_none=True)
        scaler.update()
        t_last, t_before = now(device), t_last
        times_s.append(t_last - t_before)
        if step in (0, warmup_steps - 1):
            say(f'step {step + 1} of {warmup_steps + steps}: ' + time_left(times_s[-1], warmup_steps + steps - step - 1, use_compile and not step))

    step_ms = spread_ms(times_s[warmup_steps:])
    tok_per_s = batch_size * block_size / step_ms['median'] * 1000
    flops_per_token = model.flops_per_token(block_size)
    flop_per_s = tok_per_s * flops_per_token
    peak = distributed.peak_flops(device) if precision != torch.float32 else None
    say(f'step: {described(step_ms)}, loss {loss.item():.4f}')
    say(f'speed: {tok_per_s:,.0f} tok/s at {flops_per_token / 1e6:,.1f} MFLOP a token: {flop_per_s / 1e12:.3g} TFLOP/s'
        + (f', {flop_per_s / peak:.1%} of the peak of {peak / 1e12:,.0f} (MFU)' if peak else ''))
    return dict(step_ms=step_ms, tok_per_s=tok_per_s, flops_per_token=flops_per_token, flop_per_s=flop_per_s,
                mfu=flop_per_s / peak if peak else None, loss=loss.item())


def open_batches(device):
    """A function of the step that returns x and y, (B, T) int64 each, on the device."""
    if not dataset:
        tokens = torch.randint(vocab_size, (batch_size, block_size + 1)).to(device)
        return lambda step: (tokens[:, :-1], tokens[:, 1:])
    folders, weights = dataset_folders(dataset)
    loader = Loader(folders, 'train', block_size, batch_size, seed=seed, weights=weights, prefetch=device.type != 'cpu')
    if loader.vocab_size > vocab_size:
        raise ValueError(f'vocab_size={vocab_size}: dataset {dataset} has {loader.vocab_size} tokens: use --vocab_size={loader.vocab_size} or more')
    return lambda step: loader.to(device, loader.batch(step))


# -----------------------------------------------------------------------------
# generation


def measure_decode(model, device, precision, use_compile):
    """Times the first token (all of the prompt goes through the model) and those after it (one token a row does), as sample.py draws them."""
    model.to(precision).eval()
    if use_compile:
        model.compile(dynamic=True)
    prompt = torch.randint(vocab_size, (batch_size, prompt_tokens), device=device)
    first_s, next_s = [], []
    for round_number in range(1 + rounds):  # round 0 warms up
        t_start = t_last = now(device)
        for i, _ in enumerate(model.stream(prompt, max_new_tokens, temperature=0.8, top_k=200)):
            t_last, t_before = now(device), t_last
            if round_number:
                (next_s if i else first_s).append(t_last - t_before)
        if not round_number:
            say('warm-up: ' + time_left(t_last - t_start, rounds, use_compile))

    first_ms, next_ms = spread_ms(first_s), spread_ms(next_s)
    prefill_tok_per_s, decode_tok_per_s = (1000 * n / ms['median'] for n, ms in ((batch_size * prompt_tokens, first_ms), (batch_size, next_ms)))
    say(f'prefill: {described(first_ms)}, {prefill_tok_per_s:,.0f} tok/s')
    say(f'decode: {described(next_ms)}, {decode_tok_per_s:,.1f} tok/s in {batch_size} row{"s" * (batch_size > 1)}')

    # a token cannot come sooner than the weights (not the rows of the embeddings) and the keys and values of its row are read
    weight_bytes = sum(p.nbytes for m in model.modules() if not isinstance(m, torch.nn.Embedding) for p in m.parameters(recurse=False))
    mean_context = prompt_tokens + max_new_tokens / 2
    cache_bytes = int(2 * n_layer * n_embd * mean_context * batch_size) * precision.itemsize
    read_bytes_per_s = limit_ms = None
    if weight_bytes < CACHE_BYTES:
        say(f'weights: {gigabytes(weight_bytes)}, which may stay in the caches: no memory limit to compare with')
    else:
        read_bytes_per_s = read_bandwidth(device)
        limit_ms = (weight_bytes + cache_bytes) / read_bytes_per_s * 1000
        say(f'memory limit: {limit_ms:.2f} ms to read {gigabytes(weight_bytes)} of weights and {gigabytes(cache_bytes)} of keys and values at '
            f'the {read_bytes_per_s / 1e9:,.1f} GB/s measured here; decoding is at {limit_ms / next_ms["median"]:.0%} of it')
    return dict(prefill_ms=first_ms, prefill_tok_per_s=prefill_tok_per_s, decode_ms=next_ms, decode_tok_per_s=decode_tok_per_s,
                weight_bytes=weight_bytes, cache_bytes=cache_bytes, read_bytes_per_s=read_bytes_per_s, memory_limit_ms=limit_ms)


def read_bandwidth(device, n_bytes=512 << 20):
    """Bytes per second at which the device reads memory: the best of several passes over more than its caches hold."""
    x = torch.ones(n_bytes // 4, device=device)
    times_s = []
    for _ in range(10):
        t_start = now(device)
        x.max()
        times_s.append(now(device) - t_start)
    return x.nbytes / min(times_s)


# -----------------------------------------------------------------------------


def check_settings():
    for name, least in (('batch_size', 1), ('steps', 1), ('warmup_steps', 0), ('prompt_tokens', 1), ('max_new_tokens', 2), ('rounds', 1), ('seed', 0)):
        if globals()[name] < least:
            raise ValueError(f'--{name}={globals()[name]}: accepted is {least} or more')
    if mode == 'decode' and prompt_tokens + max_new_tokens > block_size:
        raise ValueError(f'prompt_tokens={prompt_tokens} and max_new_tokens={max_new_tokens} do not fit into block_size={block_size}: '
                         f'use --block_size={prompt_tokens + max_new_tokens} or more')


def say(text):
    if not json:
        print(text, flush=True)


def now(device):
    """The time in seconds, once the device has done all that it was given."""
    distributed.synchronize(device)
    return time.perf_counter()


def time_left(last_s, more, compiling):
    return f'{last_s:.2f} s, ' + ('compilation included' if compiling else f'at this rate {last_s * more:.0f} s to go')


def spread_ms(times_s):
    return dict(median=median(times_s) * 1000, min=min(times_s) * 1000, max=max(times_s) * 1000, n=len(times_s))


def described(ms):
    return f'{ms["median"]:.2f} ms (median of {ms["n"]}, {ms["min"]:.2f} to {ms["max"]:.2f})'


def gigabytes(n_bytes):
    return f'{n_bytes / 1e9:.2f} GB' if n_bytes >= 1e9 else f'{n_bytes / 1e6:.1f} MB'


def name_of(precision):
    return str(precision).removeprefix('torch.')


def processor_name():
    """As the system tells it; Linux does in a file."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            return next(line.split(':', 1)[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == '__main__':
    with one_line_errors():
        configure(globals())
        main()
