"""Measures training or generation on this machine, with the pieces that train.py and sample.py use. Settings: see --help.

    python bench.py                                   # a training step of GPT-2 (124M), 12 rows of 1024 tokens: made for a GPU
    python bench.py --batch_size=16 --block_size=256 --n_layer=6 --n_head=6 --n_embd=384 --vocab_size=65    # 10.7M: for a CPU
    python bench.py --mode=decode --prompt_tokens=512 --max_new_tokens=128
    python bench.py --mode=data --dataset=shakespeare_char    # the loader alone
    python bench.py --mode=compare                            # against a plain reference, turn by turn: a table of ratios

Weights are random and so are the tokens, unless a dataset is named: the numbers are about speed, not about the model. The last line is
one JSON object with every number, the settings, the machine and the versions; with --json it comes without the words before it.
"""

import copy
import multiprocessing
import platform
import time
from contextlib import contextmanager, nullcontext, suppress
from json import dumps
from statistics import median
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

import distributed
from configurator import config_of, configure
from files import one_line_errors
from model import GPT, GPTConfig
from optim import OptimizerSettings, Schedule, StepJudge, configure_optimizers, lr_scale, set_lr, step_unless
from tokens.dataset import dataset_folders
from tokens.loader import Loader

# -----------------------------------------------------------------------------
mode: Literal['step', 'decode', 'data', 'compare'] = 'step'  # step = forward, backward, update; decode = read a prompt, write on; see above
json = False  # no words, only the closing line
profile = False  # also the five operations that take most of the time, warm-up included; slows what is measured
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
# mode=step, and what the other modes take of it
dataset = ''  # windows of this dataset, read anew each step; '' = random tokens, made once (data, compare: shakespeare_char)
loss_chunks: int | Literal['auto'] = 'auto'  # parts of the rows whose logits are in memory at a time; auto = one where they are small
optimizer: Literal['adamw', 'muon'] = 'adamw'
warmup_steps = 5  # not counted: compilation, first allocations
steps: int | None = None  # None = 20, in compare 100
# mode=decode
prompt_tokens = 512
max_new_tokens = 128
rounds = 3  # the prompt is read and written on so many times
quantize: Literal['none', 'int8'] = 'none'  # int8 = a byte a weight (CPU)
# system
seed = 1337
device = 'auto'  # cpu, cuda, cuda:1, mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
compile: bool | Literal['auto'] = 'auto'  # auto = as in train.py (step), as in sample.py (decode)
# -----------------------------------------------------------------------------

PEAK_LR = 1e-3  # mode=compare: reached over 100 steps, as in nanoGPT's config/train_shakespeare_char.py
CACHE_BYTES = 128 << 20  # weights smaller than this may stay in a processor's caches, and memory then sets no limit


COMPARED = dict(  # training: what GPTConfig takes, rows and how many steps of ours and of the reference take turns; decoding: the model
    training={'10.7M': (dict(n_layer=6, n_head=6, n_embd=384, block_size=256), 16, 5), '0.8M': (dict(n_layer=4, n_head=4, n_embd=128, block_size=64), 12, 20)},
    decoding=dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304))


def main():
    global batch_size, steps
    batch_size = batch_size if batch_size is not None else 1 if mode == 'decode' else 12
    steps = steps if steps is not None else 100 if mode == 'compare' else 20
    check_settings()
    place = distributed.start(device)
    torch.manual_seed(seed)
    precision = distributed.choose_dtype(dtype, place.device)
    use_compile = distributed.choose_compile(compile if mode in ('step', 'compare') else compile is True and quantize == 'none', place.device)
    say(f'device: {distributed.device_name(place.device)}, {name_of(precision)}, {"compiled" if use_compile else "eager"}')
    if profile and mode not in ('step', 'decode'):
        raise ValueError(f'profile=True is for mode=step and mode=decode, not mode={mode}')
    if mode in ('step', 'decode'):
        model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, arch)).to(place.device)
        n_parameters = model.get_num_params()  # now: weights packed for decoding are no parameters
        say(f'model: {arch}, {n_parameters / 1e6:.2f}M parameters')
        with torch.profiler.profile() if profile else nullcontext() as profiler:
            result = (measure_step if mode == 'step' else measure_decode)(model, place.device, precision, use_compile)
        result['parameters'] = n_parameters
    else:
        result = measure_data() if mode == 'data' else measure_compare(place.device, precision, use_compile)
    if profile:
        result['top_costs'] = top_costs(profiler, place.device)
        for name, ms, share in result['top_costs']:
            say(f'{share:6.1%} {ms:10.1f} ms  {name}')
    peak_bytes = distributed.peak_memory_bytes(place.device)
    say(f'peak memory: {gigabytes(peak_bytes)} {"of this process" if place.device.type == "cpu" else "allocated on the device"}'
        if peak_bytes else 'peak memory: not known here')
    machine = dict(device=distributed.device_name(place.device), processor=processor_name(), system=platform.platform(),
                   python=platform.python_version(), torch=torch.__version__)
    print(dumps(dict(mode=mode, **result, peak_memory_bytes=peak_bytes, dtype=name_of(precision),
                     compiled=use_compile, machine=machine, settings=config_of(globals()))))
    distributed.stop()


# -----------------------------------------------------------------------------
# a training step


def measure_step(model, device, precision, use_compile):
    """Times forward, backward, clipping and update, as train.py does them, with one micro-step in a step."""
    next_batch = open_batches(device)
    train_step = make_step(model, device, precision, use_compile)
    times_s, t_last = [], now(device)
    for step in range(warmup_steps + steps):
        loss = train_step(*next_batch(step))
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


def make_step(model, device, precision, use_compile, learning_rate=1e-4):
    """A function that trains the model on x and y, (B, T) int64 each, at a rate of scale times learning_rate, and returns the loss, as a
    tensor: nothing waits for the device."""
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    optimizers = configure_optimizers(model, OptimizerSettings(optimizer, learning_rate, weight_decay=1e-2), precision)
    parameters, judge = list(model.parameters()), StepJudge(device)
    model.loss_chunks = loss_chunks
    model.train()
    if use_compile:
        model.compile()

    def train_step(x, y, scale=1.0):
        set_lr(optimizers, scale)
        with autocast:
            _, loss = model(x, y)
        scaler.scale(loss).backward()
        for each in optimizers:
            scaler.unscale_(each)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, grad_norm)
        skip = judge.judge(grad_norm, loss.detach())
        for each in optimizers:
            step_unless(each, skip)
            each.zero_grad(set_to_none=True)
        scaler.update()
        return loss.detach()

    return train_step


def open_batches(device):
    """A function of the step that returns x and y, (B, T) int64 each, on the device."""
    if not dataset:
        tokens = torch.randint(vocab_size, (batch_size, block_size + 1)).to(device)
        return lambda step: (tokens[:, :-1], tokens[:, 1:])
    loader = open_loader(prefetch=device.type != 'cpu')
    if loader.vocab_size > vocab_size:
        raise ValueError(f'vocab_size={vocab_size}: dataset {dataset} has {loader.vocab_size} tokens: use --vocab_size={loader.vocab_size} or more')
    return lambda step: loader.batch(step).to(device)[:2]


def open_loader(**arguments):
    folders, weights = dataset_folders(dataset or 'shakespeare_char')
    return Loader(folders, 'train', **{**dict(block_size=block_size, batch_size=batch_size, seed=seed, weights=weights), **arguments})


def measure_data():
    """Times the loader alone, from the opening of the dataset: windows from a warm cache to tensors of int64."""
    t_start = time.perf_counter()
    loader = open_loader()
    loader.batch(0)
    open_s, times_s = time.perf_counter() - t_start, []
    for step in range(warmup_steps + steps):
        t_start = time.perf_counter()
        loader.batch(step)
        times_s.append(time.perf_counter() - t_start)
    batch_ms = spread_ms(times_s[warmup_steps:])
    tok_per_s = batch_size * block_size / batch_ms['median'] * 1000
    say(f'first batch: {open_s * 1000:.1f} ms after the loader is asked for')
    say(f'loader: {described(batch_ms)}, {tok_per_s:,.0f} tok/s in batches of {batch_size} x {block_size}')
    return dict(open_s=open_s, batch_ms=batch_ms, tok_per_s=tok_per_s)


# -----------------------------------------------------------------------------
# generation


def measure_decode(model, device, precision, use_compile):
    """Times the first token (all of the prompt goes through the model) and those after it (one token a row does), as sample.py draws them."""
    # a token cannot come sooner than the weights (not the rows of the embeddings) and the keys and values of its row are read
    matrices = {id(p) for m in model.modules() if isinstance(m, torch.nn.Linear) for p in [m.weight]}
    weight_bytes = sum(p.numel() * (1 if quantize == 'int8' and id(p) in matrices else precision.itemsize)
                       for m in model.modules() if not isinstance(m, torch.nn.Embedding) for p in m.parameters(recurse=False))
    model.to(precision).eval()
    if use_compile:
        model.compile_blocks()
    else:
        model.pack(None if quantize == 'none' else quantize)
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


def top_costs(profiler, device, n=5):
    """[(name, ms, share of all)] of the n kernels (on a CPU: operations) that took most of the time, without what they call."""
    if device.type == 'cuda':
        costs = [(e.key, e.self_device_time_total / 1000) for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    else:
        costs = [(e.key, e.self_cpu_time_total / 1000) for e in profiler.key_averages()]
    total = sum(ms for _, ms in costs)
    return [(name, ms, ms / total) for name, ms in sorted(costs, key=lambda cost: -cost[1])[:n]]


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
# against a plain reference: float32, eager, an optimizer that goes from tensor to tensor, a new memmap for each batch, no cache; in a
# process of its own, which distributed.start() has not prepared


def measure_compare(device, precision, use_compile):
    """Ours and the reference take turns, so that whatever else the machine does hits both; what counts is the median of each."""
    result = dict(training={}, decoding={})
    say('| | reference | here | ratio |\n| --- | --- | --- | --- |')
    for name, (shape, rows, turn) in COMPARED['training'].items():
        result['training'][name] = each = compare_training(shape, rows, turn, device, precision, use_compile)
        say(f'| training, {name}, {rows} x {shape["block_size"]} tokens: a step | {each["reference_ms"]["median"]:.1f} ms | '
            f'{each["ms"]["median"]:.1f} ms | {each["ratio"]:.2f} |')
        say(f'| the same: loss of step {steps} | {each["reference_loss"]:.4f} | {each["loss"]:.4f} | |')
        say(f'| the same: furthest from the reference\'s loss on the way | plain code in {name_of(precision)}: {each["plain_deviation"]:.2%} | '
            f'{each["deviation"]:.2%} | |')
    result['decoding'] = compare_decoding(device, precision)
    for name, tok_per_s in result['decoding']['tok_per_s'].items():
        say(f'| decoding, {result["decoding"]["parameters"] / 1e6:.0f}M, {name}: tokens/s | {result["decoding"]["reference_tok_per_s"]:.1f} | '
            f'{tok_per_s:.1f} | {tok_per_s / result["decoding"]["reference_tok_per_s"]:.1f} |')
    return result


def compare_training(shape, rows, turn, device, precision, use_compile):
    """`steps` steps of each from the same weights on the same windows, in turns of `turn` steps.

    The plain code runs twice: in float32, as the reference, and under torch's autocast to our precision. How far the losses of the
    second stray from those of the first is the noise of that precision, which ours are to be held against.
    """
    loader = open_loader(block_size=shape['block_size'], batch_size=rows)
    train_step = make_step(compared_model(shape, loader, device), device, precision, use_compile, PEAK_LR)

    def ours(first, last):
        return timed_steps(lambda step: train_step(*loader.batch(step).to(device)[:2], warmup(step)), first, last, device)

    times_s, losses = ([], [], []), ([], [], [])
    with in_its_process(plain_trainer, shape, rows, device, torch.float32) as reference, \
            in_its_process(plain_trainer, shape, rows, device, precision) as plain:
        for first in range(0, steps, turn):
            for run, times, values in zip((ours, reference, plain), times_s, losses, strict=True):
                for dt_s, loss in run(first, min(first + turn, steps)):
                    times.append(dt_s)
                    values.append(loss)
    ms, reference_ms, plain_ms = (spread_ms(times[min(warmup_steps, steps - 1):]) for times in times_s)
    losses = np.array(losses)
    deviation, _, plain_deviation = abs(losses / losses[1] - 1).max(axis=1).tolist()
    return dict(ms=ms, reference_ms=reference_ms, plain_ms=plain_ms, ratio=reference_ms['median'] / ms['median'], loss=losses[0, -1],
                reference_loss=losses[1, -1], deviation=deviation, plain_deviation=plain_deviation, losses=losses.round(4).tolist())


def compared_model(shape, loader, device):
    """The same weights in every process."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(**shape, vocab_size=loader.vocab_size, bias=False)).to(device)


def warmup(step):
    """The part of PEAK_LR at a step."""
    return lr_scale(step, Schedule('constant', warmup_iters=100, max_iters=steps))


def timed_steps(train_step, first, last, device):
    """[(seconds, loss)] of train_step(first), ..., train_step(last - 1)."""
    done, t_last = [], now(device)
    for step in range(first, last):
        loss = train_step(step)
        t_last, t_before = now(device), t_last
        done.append((t_last - t_before, loss.item()))
    return done


def compare_decoding(device, precision):
    """Tokens per second behind a prompt of prompt_tokens: each round the reference writes 2, we write max_new_tokens, in each of our ways."""
    model = GPT(GPTConfig(**COMPARED['decoding'], bias=False)).to(device).eval()
    fast = copy.deepcopy(model).to(precision).pack()
    ways = {f'{name_of(precision)}, 1 row': (fast, 1), f'{name_of(precision)}, 8 rows': (fast, 8)}
    if device.type == 'cpu':
        ways['int8, 1 row'] = copy.deepcopy(model).to(precision).pack('int8'), 1
    prompt = torch.randint(model.config.vocab_size, (8, prompt_tokens), device=device)
    rates, reference_s = {name: [] for name in ways}, []
    with in_its_process(plain_writer, COMPARED['decoding'], device) as reference:
        for round_number in range(1 + rounds):  # round 0 warms up
            reference_s += reference(2) * bool(round_number)
            for name, (packed, rows) in ways.items():
                t_last = now(device)
                for i, _ in enumerate(packed.stream(prompt[:rows], max_new_tokens, temperature=0.8, top_k=200)):
                    t_last, t_before = now(device), t_last
                    rates[name] += [rows / (t_last - t_before)] * bool(round_number and i)  # the first token is the prompt's
    return dict(parameters=model.get_num_params(), reference_tok_per_s=1 / median(reference_s),
                tok_per_s={name: median(values) for name, values in rates.items()})


@contextmanager
def in_its_process(make, *arguments):
    """The function that make(*arguments) returns, in a new process that has these settings: each call waits for what it returns there."""
    context = multiprocessing.get_context('spawn')
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, config_of(globals()), make, arguments), daemon=True)
    process.start()
    there.close()

    def call(*arguments):
        here.send(arguments)
        return here.recv()

    try:
        yield call
    finally:
        here.close()
        process.join()


def serve(pipe, settings, make, arguments):
    globals().update(settings)
    function = make(*arguments)
    with suppress(EOFError):  # the other end is closed
        while True:
            pipe.send(function(*pipe.recv()))


def plain_trainer(shape, rows, device, precision):
    """A function of the first and the last step, less one, as timed_steps() returns it: of plain code, in float32 or under autocast."""
    loader = open_loader(block_size=shape['block_size'], batch_size=rows)
    model = compared_model(shape, loader, device)
    decay = [[p for p in model.parameters() if (p.dim() >= 2) == matrices] for matrices in (True, False)]
    adamw = torch.optim.AdamW([dict(params=decay[0], weight_decay=1e-2), dict(params=decay[1], weight_decay=0.0)], lr=PEAK_LR, betas=(0.9, 0.95),
                              foreach=False, fused=False)

    def train_step(step):
        for group in adamw.param_groups:
            group['lr'] = PEAK_LR * warmup(step)
        x, y = (t.to(device) for t in plain_batch(loader, step))
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = plain_logits(model, x)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.detach()

    return lambda first, last: timed_steps(train_step, first, last, device)


def plain_writer(shape, device):
    """A function of n: the seconds that each of n tokens takes plain code behind a prompt of prompt_tokens."""
    model = GPT(GPTConfig(**shape, bias=False)).to(device).eval()
    prompt = torch.randint(model.config.vocab_size, (1, prompt_tokens), device=device)

    def write(n):
        idx, times_s, t_last = prompt, [], now(device)
        for _ in range(n):
            idx = plain_next(model, idx)
            t_last, t_before = now(device), t_last
            times_s.append(t_last - t_before)
        return times_s

    return write


def plain_batch(loader, step):
    """The loader's windows of a step, read one by one through a memmap of each shard opened for it."""
    rows = [(shard, start) for _, shard, start, _ in loader._locate(np.arange(loader.batch_size) + step * loader.batch_size)]
    data, T = {shard: np.memmap(shard.path, shard.dtype, 'r', shard.header) for shard, _ in rows}, loader.block_size
    x = torch.stack([torch.from_numpy(data[shard][i:i + T].astype(np.int64)) for shard, i in rows])
    y = torch.stack([torch.from_numpy(data[shard][i + 1:i + 1 + T].astype(np.int64)) for shard, i in rows])
    return x, y


def plain_logits(model, idx, positions=slice(None)):
    """GPT-2's forward pass as a textbook has it, with the weights of an arch=gpt2 model: (B, T) -> (B, T, V), or fewer positions of T."""
    B, T = idx.shape
    parts, C = model.transformer, model.config.n_embd
    x = parts.wte(idx) + parts.wpe(torch.arange(T, device=idx.device))
    for block in parts.h:
        q, k, v = block.attn.c_attn(block.ln_1(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, model.config.n_head, -1).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(B, T, C)
        x = x + block.attn.c_proj(y)
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
    return model.lm_head(parts.ln_f(x)[:, positions])


@torch.no_grad()
def plain_next(model, idx, temperature=0.8, top_k=200):
    """The row with one more token drawn behind it, from a pass over all of it."""
    logits = plain_logits(model, idx, [-1])[:, 0] / temperature  # nanoGPT, too, spares itself the others
    logits[logits < logits.topk(top_k).values[:, [-1]]] = -float('inf')
    return torch.cat((idx, torch.multinomial(logits.softmax(dim=-1), 1)), dim=1)


# -----------------------------------------------------------------------------


def check_settings():
    for name, least in (('batch_size', 1), ('steps', 1), ('warmup_steps', 0), ('prompt_tokens', 1), ('max_new_tokens', 2), ('rounds', 1), ('seed', 0)):
        if globals()[name] < least:
            raise ValueError(f'--{name}={globals()[name]}: accepted is {least} or more')
    if loss_chunks != 'auto' and loss_chunks < 0:
        raise ValueError(f'--loss_chunks={loss_chunks}: accepted is 0 or more, or auto')
    if mode == 'compare' and prompt_tokens + max_new_tokens > COMPARED['decoding']['block_size']:
        raise ValueError(f'prompt_tokens={prompt_tokens} and max_new_tokens={max_new_tokens}: accepted are {COMPARED["decoding"]["block_size"]} together or less')
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
