"""Measure training steps, decoding or data loading on this machine. --help lists the settings.

    python bench.py                                          # GPT-2 (124M), 12 windows of 1024 tokens
    python bench.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --vocab_size=65 --batch_size=16
    python bench.py --mode=decode --prompt_tokens=512 --max_new_tokens=128
    python bench.py --mode=data --dataset=shakespeare_char

Weights are random, and so are the tokens unless a dataset is named. The last line is a JSON object of all
numbers, the settings and the machine; --json prints it alone.
dev/compare.py compares with plain reference code.
"""

import itertools
import os
import platform
import time
from contextlib import nullcontext
from json import dumps
from statistics import median
from typing import Literal

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # as in train.py

import torch

import devices
import distributed
from configurator import config_of, configure
from files import one_line_errors
from model import GPT, GPTConfig
from optim import OptimizerSettings, StepJudge, configure_optimizers, muon_momentum, set_lr, step_unless
from tokens.dataset import dataset_folders
from tokens.loader import Batch, Loader

# -----------------------------------------------------------------------------
mode: Literal['step', 'decode', 'data'] = 'step'  # train; read and continue a prompt; load batches
json = False  # print the JSON object alone
profile = False  # also print the five costliest operations, warm-up included; slows what is measured
# model
arch: Literal['gpt2', 'modern'] = 'gpt2'
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304
dropout = 0.0
bias = False
# mode=step and mode=data
batch_size: int | None = None  # windows in a step, or rows to decode; None = 12 windows, 1 row
dataset = ''  # windows of this dataset; '' = random tokens, in mode=data shakespeare_char
bf16_residual = False  # as in train.py
loss_chunks: int | Literal['auto'] = 'auto'  # compute the loss in this many chunks; auto = by size
optimizer: Literal['adamw', 'muon'] = 'adamw'
warmup_steps = 5  # not measured: they compile, and allocate memory for the first time
steps = 20
# mode=decode
prompt_tokens = 512
max_new_tokens = 128
rounds = 3  # times to read the prompt and continue it, after one round of warm-up
quantize: Literal['none', 'int8'] = 'none'  # int8 = one byte per weight, on the CPU
# system
seed = 1337
device = 'auto'  # cpu, cuda, cuda:1, mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
compile: bool | Literal['auto'] = 'auto'  # auto = as in train.py (step) and in sample.py (decode)
# -----------------------------------------------------------------------------

CACHE_BYTES = 128 << 20  # smaller weights may stay in a processor's caches, so memory does not limit decoding


def main():
    global batch_size
    if batch_size is None:
        batch_size = 1 if mode == 'decode' else 12
    check_settings()
    place = distributed.start(device)
    torch.manual_seed(seed)
    precision = devices.choose_dtype(dtype, place.device)
    wants_compile = compile
    if mode == 'decode':
        wants_compile = compile is True and quantize == 'none'
    use_compile = devices.choose_compile(wants_compile, place.device)
    machine = describe_machine(place.device)
    say(f'device: {machine["device"]}, {name_of(precision)}, {"compiled" if use_compile else "eager"}')
    say(f'machine: {machine["processor"]}, Python {machine["python"]}, torch {machine["torch"]}')

    if mode == 'data':
        result = measure_data()
    else:
        model = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head,
                              n_embd=n_embd, dropout=dropout, bias=bias, arch=arch)).to(place.device)
        n_parameters = model.get_num_params()  # later, packed weights are no parameters
        say(f'model: {arch}, {n_parameters / 1e6:.2f}M parameters')
        measure = measure_step if mode == 'step' else measure_decode
        with torch.profiler.profile() if profile else nullcontext() as profiler:
            result = measure(model, place.device, precision, use_compile)
        result['parameters'] = n_parameters
        if profile:
            result['top_costs'] = top_costs(profiler, place.device)
            for name, ms, share in result['top_costs']:
                say(f'{share:6.1%} {ms:10.1f} ms  {name}')

    peak_bytes = devices.peak_memory_bytes(place.device)
    if peak_bytes:
        of = 'of this process' if place.device.type == 'cpu' else 'allocated on the device'
        say(f'peak memory: {gigabytes(peak_bytes)} {of}')
    print(dumps(dict(mode=mode, **result, peak_memory_bytes=peak_bytes, dtype=name_of(precision),
                     compiled=use_compile, machine=machine, settings=config_of(globals()))))
    distributed.stop()


# -----------------------------------------------------------------------------
# training steps


class TrainingStep:
    """The update of train.py with one micro-step. Nothing in it waits for the device."""

    def __init__(self, model, device, precision, use_compile, *, settings: OptimizerSettings):
        self.autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        self.optimizers = configure_optimizers(model, settings, precision)
        self.parameters = list(model.parameters())
        self.judge = StepJudge(device)
        self.training_loss = distributed.compiled_loss(model) if use_compile else model.loss
        self.iter_num = 0
        model.train()

    def __call__(self, batch: Batch, n_targets: int, scale: float = 1.0) -> torch.Tensor:
        """Take a step at a learning rate of scale times the peak. Return the mean loss, 0-d."""
        set_lr(self.optimizers, scale, muon_momentum(self.iter_num))
        with self.autocast:
            loss = self.training_loss(*batch) / n_targets
        self.scaler.scale(loss).backward()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(self.parameters, 1.0, grad_norm)
        skip = self.judge.judge(grad_norm, loss.detach())
        for optimizer in self.optimizers:
            step_unless(optimizer, skip)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.iter_num += 1
        return loss.detach()


def measure_step(model, device, precision, use_compile):
    model.loss_chunks, model.bf16_residual = loss_chunks, bf16_residual
    settings = OptimizerSettings(optimizer, learning_rate=1e-4, weight_decay=1e-2)
    train_step = TrainingStep(model, device, precision, use_compile, settings=settings)
    n_steps, times_s = warmup_steps + steps, []
    t_last_s = now_s(device)
    for step, (batch, n_targets) in zip(range(n_steps), read_batches(device), strict=False):
        loss = train_step(batch, n_targets)
        t_s = now_s(device)
        times_s.append(t_s - t_last_s)
        t_last_s = t_s
        if step in (0, warmup_steps - 1):
            left = f'at this rate {times_s[-1] * (n_steps - step - 1):.0f} s to go'
            if use_compile and step == 0:
                left = 'including compilation'
            say(f'step {step + 1} of {n_steps}: {times_s[-1]:.2f} s, {left}')

    step_ms = spread_ms(times_s[warmup_steps:])
    tok_per_s = batch_size * block_size / step_ms['median'] * 1000
    flops_per_token = model.flops_per_token(block_size)
    flop_per_s = tok_per_s * flops_per_token
    say(f'step: {described(step_ms)}, loss {loss.item():.4f}')
    say(f'speed: {tok_per_s:,.0f} tok/s at {flops_per_token / 1e6:,.1f} MFLOP a token: '
        f'{flop_per_s / 1e12:.3g} TFLOP/s')
    mfu, peak = None, devices.peak_flops(device)
    if peak and precision != torch.float32:
        mfu = flop_per_s / peak
        say(f'MFU: {mfu:.1%} of the peak of {peak / 1e12:,.0f} TFLOP/s')
    return dict(step_ms=step_ms, tok_per_s=tok_per_s, flops_per_token=flops_per_token, flop_per_s=flop_per_s,
                mfu=mfu, loss=loss.item())


def read_batches(device):
    """Yield (Batch on the device, number of its targets) for each step."""
    if not dataset:
        tokens = torch.randint(vocab_size, (batch_size, block_size + 1)).to(device)
        yield from itertools.repeat((Batch(tokens[:, :-1], tokens[:, 1:]), batch_size * block_size))
    loader = open_loader(prefetch=device.type != 'cpu')
    if loader.vocab_size > vocab_size:
        raise ValueError(f'vocab_size={vocab_size}: dataset {dataset} has {loader.vocab_size} tokens: '
                         f'use --vocab_size={loader.vocab_size} or more')
    for step in itertools.count():
        yield loader.batch(step).to(device), max(1, loader.count_targets(step))


def open_loader(prefetch=False):
    folders, weights = dataset_folders(dataset or 'shakespeare_char')
    return Loader(folders, 'train', block_size=block_size, batch_size=batch_size, seed=seed, weights=weights,
                  prefetch=prefetch)


def measure_data():
    """Time the loader alone: the first batch with opening the dataset, then batches from a warm cache."""
    t_start_s = time.perf_counter()
    loader = open_loader()
    loader.batch(0)
    open_s, times_s = time.perf_counter() - t_start_s, []
    for step in range(warmup_steps + steps):
        t_start_s = time.perf_counter()
        loader.batch(step)
        times_s.append(time.perf_counter() - t_start_s)
    batch_ms = spread_ms(times_s[warmup_steps:])
    tok_per_s = batch_size * block_size / batch_ms['median'] * 1000
    say(f'first batch: {open_s * 1000:.1f} ms after opening the dataset')
    say(f'loader: {described(batch_ms)}, {tok_per_s:,.0f} tok/s in batches of {batch_size} x {block_size}')
    return dict(open_s=open_s, batch_ms=batch_ms, tok_per_s=tok_per_s)


# -----------------------------------------------------------------------------
# decoding


def measure_decode(model, device, precision, use_compile):
    """Time the first token, for which the prompt is read (prefill), and the later ones."""
    weight_bytes = bytes_read_per_token(model, precision)
    model.to(precision).eval()
    if use_compile:
        model.compile_blocks()
    else:
        model.pack(None if quantize == 'none' else quantize)
    prompt = torch.randint(vocab_size, (batch_size, prompt_tokens), device=device)
    t_start_s = time.perf_counter()
    time_tokens(model, prompt, max_new_tokens)
    say(f'warm-up: {time.perf_counter() - t_start_s:.2f} s')
    times_s = [time_tokens(model, prompt, max_new_tokens) for _ in range(rounds)]
    prefill_ms = spread_ms([each[0] for each in times_s])
    decode_ms = spread_ms([t_s for each in times_s for t_s in each[1:]])
    prefill_tok_per_s = 1000 * batch_size * prompt_tokens / prefill_ms['median']
    decode_tok_per_s = 1000 * batch_size / decode_ms['median']
    say(f'prefill: {described(prefill_ms)}, {prefill_tok_per_s:,.0f} tok/s')
    say(f'decode: {described(decode_ms)}, {decode_tok_per_s:,.1f} tok/s, {batch_size} at a time')

    # a token takes at least as long as reading the weights, and the keys and values of its row
    mean_context = prompt_tokens + max_new_tokens / 2
    cache_bytes = int(2 * n_layer * n_embd * mean_context * batch_size) * precision.itemsize
    read_bytes_per_s = limit_ms = None
    if weight_bytes < CACHE_BYTES:
        say(f'weights: {gigabytes(weight_bytes)}, which may stay in the caches: no memory limit')
    else:
        read_bytes_per_s = read_bandwidth(device)
        limit_ms = (weight_bytes + cache_bytes) / read_bytes_per_s * 1000
        say(f'memory limit: {limit_ms:.2f} ms to read {gigabytes(weight_bytes)} of weights and '
            f'{gigabytes(cache_bytes)} of keys and values at the {read_bytes_per_s / 1e9:,.1f} GB/s measured '
            f'here; decoding reaches {limit_ms / decode_ms["median"]:.0%} of this rate')
    return dict(prefill_ms=prefill_ms, prefill_tok_per_s=prefill_tok_per_s, decode_ms=decode_ms,
                decode_tok_per_s=decode_tok_per_s, weight_bytes=weight_bytes, cache_bytes=cache_bytes,
                read_bytes_per_s=read_bytes_per_s, memory_limit_ms=limit_ms)


def time_tokens(model, prompt, n_tokens):
    """Return the seconds of each token drawn after a prompt (B, T). The first include reading the prompt."""
    times_s, t_last_s = [], now_s(prompt.device)
    for _ in model.stream(prompt, n_tokens, temperature=0.8, top_k=200):
        t_s = now_s(prompt.device)
        times_s.append(t_s - t_last_s)
        t_last_s = t_s
    return times_s


def bytes_read_per_token(model, precision):
    """Count the bytes of the weights that decoding reads for each token: all but the embeddings."""
    n_bytes = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        for name, p in module.named_parameters(recurse=False):
            is_matrix = isinstance(module, torch.nn.Linear) and name == 'weight'
            n_bytes += p.numel() * (1 if is_matrix and quantize == 'int8' else precision.itemsize)
    return n_bytes


def read_bandwidth(device, n_bytes=512 << 20):
    """Measure how many bytes per second the device reads, by the best of ten passes over n_bytes."""
    x = torch.ones(n_bytes // 4, device=device)
    times_s = []
    for _ in range(10):
        t_start_s = now_s(device)
        x.max()
        times_s.append(now_s(device) - t_start_s)
    return x.nbytes / min(times_s)


# -----------------------------------------------------------------------------


def top_costs(profiler, device, n=5):
    """Return [(name, ms, share)] of the n costliest kernels, or operations of a CPU without those they call.

    Annotations such as Optimizer.step are left out, because their time is that of what they enclose.
    """
    events = [event for event in profiler.key_averages() if not event.is_user_annotation]
    if device.type == 'cuda':
        kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        costs = [(event.key, event.self_device_time_total / 1000) for event in kernels]
    else:
        costs = [(event.key, event.self_cpu_time_total / 1000) for event in events]
    total_ms = sum(ms for _, ms in costs)
    costs.sort(key=lambda cost: -cost[1])
    return [(name, ms, ms / total_ms) for name, ms in costs[:n]]


def check_settings():
    for name, least in (('batch_size', 1), ('steps', 1), ('warmup_steps', 0), ('prompt_tokens', 1),
                        ('max_new_tokens', 2), ('rounds', 1), ('seed', 0)):
        if globals()[name] < least:
            raise ValueError(f'--{name}={globals()[name]}: accepted is {least} or more')
    if loss_chunks != 'auto' and loss_chunks < 0:
        raise ValueError(f'--loss_chunks={loss_chunks}: accepted is 0 or more, or auto')
    if profile and mode == 'data':
        raise ValueError('--profile=True is for mode=step and mode=decode, not mode=data')
    n_context = prompt_tokens + max_new_tokens
    if mode == 'decode' and n_context > block_size:
        raise ValueError(f'prompt_tokens={prompt_tokens} and max_new_tokens={max_new_tokens} do not fit into '
                         f'block_size={block_size}: use --block_size={n_context} or more')


def say(text):
    if not json:
        print(text, flush=True)


def now_s(device):
    """Return the time once the device has finished its queue."""
    devices.synchronize(device)
    return time.perf_counter()


def spread_ms(times_s):
    times_ms = [t_s * 1000 for t_s in times_s]
    return dict(median=median(times_ms), min=min(times_ms), max=max(times_ms), n=len(times_ms))


def described(ms):
    return f'{ms["median"]:.2f} ms (median of {ms["n"]}, {ms["min"]:.2f} to {ms["max"]:.2f})'


def gigabytes(n_bytes):
    return f'{n_bytes / 1e9:.2f} GB' if n_bytes >= 1e9 else f'{n_bytes / 1e6:.1f} MB'


def name_of(precision):
    return str(precision).removeprefix('torch.')


def describe_machine(device):
    processor = platform.processor() or platform.machine()
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:  # Linux names the model only here
            models = [line.partition(':')[2].strip() for line in f if line.startswith('model name')]
        processor = models[0] if models else processor
    except OSError:
        pass
    return dict(device=devices.device_name(device), processor=processor, system=platform.platform(),
                python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda)


if __name__ == '__main__':
    with one_line_errors():
        configure(globals())
        main()
