"""Compare training and decoding with plain reference code on one machine, for the table in docs/RESULTS.md.

    python -m dev.compare
    python -m dev.compare --steps=20 --rounds=1

The reference is float32 and eager. It updates tensor by tensor, opens a new memmap for each batch, and
decodes without a cache. Both take turns, so they meet the same load of the machine, and their medians are
compared. Each reference runs in a process of its own, which distributed.start() has not prepared. A second
reference runs under autocast to our precision. Its losses show how far that precision strays from float32.
The last line of the output is a JSON object.
"""

import copy
import multiprocessing
from json import dumps
from multiprocessing.managers import BaseManager
from statistics import median
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

import devices
import distributed
from bench import TrainingStep, describe_machine, name_of, now_s, spread_ms, time_tokens
from configurator import config_of, configure
from files import one_line_errors
from model import GPT, GPTConfig
from optim import OptimizerSettings
from tokens.dataset import dataset_folders
from tokens.loader import Loader

# -----------------------------------------------------------------------------
dataset = 'shakespeare_char'
steps = 100  # of training
warmup_steps = 5  # not measured
prompt_tokens = 512
max_new_tokens = 128
rounds = 3  # of decoding, after one round of warm-up
seed = 1337
device = 'auto'  # cpu, cuda, cuda:1, mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
compile: bool | Literal['auto'] = 'auto'  # of training, as in train.py
# -----------------------------------------------------------------------------

PEAK_LR = 1e-3  # reached after 100 steps, as in nanoGPT's config/train_shakespeare_char.py
# name: model, windows in a step, steps in a turn
TRAINING = {
    '10.7M': (dict(n_layer=6, n_head=6, n_embd=384, block_size=256), 16, 5),
    '0.8M': (dict(n_layer=4, n_head=4, n_embd=128, block_size=64), 12, 20),
}
DECODING = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304)


def main():
    if steps < 1 or rounds < 1 or prompt_tokens < 1 or max_new_tokens < 2:
        raise ValueError('accepted are 1 or more --steps, --rounds and --prompt_tokens, '
                         '2 or more --max_new_tokens')
    if prompt_tokens + max_new_tokens > DECODING['block_size']:
        raise ValueError(f'prompt_tokens={prompt_tokens} and max_new_tokens={max_new_tokens}: accepted are '
                         f'{DECODING["block_size"]} together or less')
    place = distributed.start(device)
    precision = devices.choose_dtype(dtype, place.device)
    use_compile = devices.choose_compile(compile, place.device)
    print('| | reference | here | ratio |\n| --- | --- | --- | --- |')
    training = {}
    with References(ctx=multiprocessing.get_context('spawn')) as float32, \
            References(ctx=multiprocessing.get_context('spawn')) as autocast:
        for name in TRAINING:
            training[name] = compare_training(name, place.device, precision, use_compile, (float32, autocast))
        decoding = compare_decoding(place.device, precision, float32)
    print(dumps(dict(training=training, decoding=decoding, dtype=name_of(precision), compiled=use_compile,
                     machine=describe_machine(place.device), settings=config_of(globals()))))


# -----------------------------------------------------------------------------
# training


class Trainer:
    """A model to train for some steps at a time, on the windows of the dataset."""

    def __init__(self, shape, batch_size, dataset, seed, device, precision):
        folders, weights = dataset_folders(dataset)
        self.loader = Loader(folders, 'train', block_size=shape['block_size'], batch_size=batch_size,
                             seed=seed, weights=weights)
        self.device, self.precision = device, precision
        torch.manual_seed(seed)  # the same weights in every process
        self.model = GPT(GPTConfig(**shape, vocab_size=self.loader.vocab_size, bias=False)).to(device)

    def run(self, first, last):
        """Take the steps from first to last - 1. Return [(seconds, loss)]."""
        results, t_last_s = [], now_s(self.device)
        for step in range(first, last):
            loss = self.train_step(step, min(1.0, (step + 1) / 101))
            t_s = now_s(self.device)
            results.append((t_s - t_last_s, loss.item()))
            t_last_s = t_s
        return results


class OurTrainer(Trainer):
    def prepare(self, use_compile):
        settings = OptimizerSettings('adamw', PEAK_LR, weight_decay=1e-2)
        self.update = TrainingStep(self.model, self.device, self.precision, use_compile, settings=settings)

    def train_step(self, step, scale):
        return self.update(self.loader.batch(step).to(self.device), self.loader.count_targets(step), scale)


class PlainTrainer(Trainer):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [dict(params=matrices, weight_decay=1e-2), dict(params=vectors, weight_decay=0.0)]
        self.adamw = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), foreach=False, fused=False)

    def train_step(self, step, scale):
        for group in self.adamw.param_groups:
            group['lr'] = PEAK_LR * scale
        x, y = plain_batch(self.loader, step)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            logits = plain_logits(self.model, x.to(self.device))
            loss = F.cross_entropy(logits.flatten(0, 1), y.to(self.device).flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return loss.detach()


def compare_training(name, device, precision, use_compile, processes):
    """Train a model of TRAINING here, and plainly in both processes. Print its rows of the table."""
    shape, batch_size, n_turn = TRAINING[name]
    ours = OurTrainer(shape, batch_size, dataset, seed, device, precision)
    ours.prepare(use_compile)
    trainers = [ours]
    for process, reference_precision in zip(processes, (torch.float32, precision), strict=True):
        trainers.append(process.PlainTrainer(shape, batch_size, dataset, seed, device, reference_precision))
    results = [[] for _ in trainers]  # [(seconds, loss)] of each
    for first in range(0, steps, n_turn):
        for trainer, done in zip(trainers, results, strict=True):
            done.extend(trainer.run(first, min(first + n_turn, steps)))

    times_s = [[t_s for t_s, _ in done[min(warmup_steps, steps - 1):]] for done in results]
    ms, reference_ms, plain_ms = map(spread_ms, times_s)
    losses = np.array([[loss for _, loss in done] for done in results])
    deviation, _, plain_deviation = abs(losses / losses[1] - 1).max(axis=1).tolist()
    ratio = reference_ms['median'] / ms['median']
    print(f'| training, {name}, {batch_size} x {shape["block_size"]} tokens: a step | '
          f'{reference_ms["median"]:.1f} ms | {ms["median"]:.1f} ms | {ratio:.2f} |')
    print(f'| its loss at step {steps} | {losses[1, -1]:.4f} | {losses[0, -1]:.4f} | |')
    print(f'| its largest deviation from the loss of the reference | plain code in {name_of(precision)}: '
          f'{plain_deviation:.2%} | {deviation:.2%} | |', flush=True)
    return dict(ms=ms, reference_ms=reference_ms, plain_ms=plain_ms, ratio=ratio, loss=losses[0, -1],
                reference_loss=losses[1, -1], deviation=deviation, plain_deviation=plain_deviation,
                losses=losses.round(4).tolist())


def plain_batch(loader, step):
    """Read the loader's windows of a step one by one, through a memmap of each shard opened for this step."""
    numbers = np.arange(loader.batch_size) + step * loader.batch_size
    rows = [(shard.tokens, start) for shard, start, _ in loader.locate(numbers)]
    data = {shard: np.memmap(shard.path, shard.dtype, 'r', shard.header_bytes) for shard, _ in rows}
    T = loader.block_size
    x = torch.stack([torch.from_numpy(data[shard][i:i + T].astype(np.int64)) for shard, i in rows])
    y = torch.stack([torch.from_numpy(data[shard][i + 1:i + 1 + T].astype(np.int64)) for shard, i in rows])
    return x, y


def plain_logits(model, idx, positions=slice(None)):
    """Compute the logits of GPT-2 as a textbook does, with the weights of a model of arch=gpt2.

    idx        (B, T)
    positions  those whose logits to return; all = (B, T, V)
    """
    B, T = idx.shape
    parts, C = model.transformer, model.config.n_embd
    x = parts.wte(idx) + parts.wpe(torch.arange(T, device=idx.device))  # (B, T, C)
    for block in parts.h:
        qkv = block.attn.c_attn(block.ln_1(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, model.config.n_head, -1).transpose(1, 2) for t in qkv)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(B, T, C)
        x = x + block.attn.c_proj(y)
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
    return model.lm_head(parts.ln_f(x)[:, positions])


# -----------------------------------------------------------------------------
# decoding


class PlainWriter:
    def __init__(self, shape, n_prompt, device):
        self.model = GPT(GPTConfig(**shape, bias=False)).to(device).eval()
        self.prompt = torch.randint(self.model.config.vocab_size, (1, n_prompt), device=device)

    def run(self, n_tokens):
        """Return the seconds of each of n_tokens after the prompt."""
        idx, times_s, t_last_s = self.prompt, [], now_s(self.prompt.device)
        for _ in range(n_tokens):
            idx = plain_next(self.model, idx)
            t_s = now_s(idx.device)
            times_s.append(t_s - t_last_s)
            t_last_s = t_s
        return times_s


@torch.no_grad()
def plain_next(model, idx, temperature=0.8, top_k=200):
    """Append one token to the row, drawn after a forward pass over all of it."""
    logits = plain_logits(model, idx, [-1])[:, 0] / temperature  # nanoGPT too computes the last position only
    logits[logits < logits.topk(top_k).values[:, [-1]]] = -float('inf')
    return torch.cat((idx, torch.multinomial(logits.softmax(dim=-1), 1)), dim=1)


def compare_decoding(device, precision, process):
    """Decode after a prompt. In a round the reference draws 2 tokens, and each of our ways max_new_tokens."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**DECODING, bias=False)).to(device).eval()
    fast = copy.deepcopy(model).to(precision).pack()
    ways = {f'{name_of(precision)}, 1 row': (fast, 1), f'{name_of(precision)}, 8 rows': (fast, 8)}
    if device.type == 'cpu':
        ways['int8, 1 row'] = copy.deepcopy(model).to(precision).pack('int8'), 1
    prompt = torch.randint(DECODING['vocab_size'], (8, prompt_tokens), device=device)
    plain = process.PlainWriter(DECODING, prompt_tokens, device)
    times_s, reference_s = {name: [] for name in ways}, []
    for i in range(1 + rounds):
        reference = plain.run(2)
        ours = {name: time_tokens(packed, prompt[:n_rows], max_new_tokens)
                for name, (packed, n_rows) in ways.items()}
        if i > 0:  # round 0 warms up
            reference_s += reference
            for name in ways:
                times_s[name] += ours[name][1:]  # the first token reads the prompt
    n_parameters, reference_tok_per_s = model.get_num_params(), 1 / median(reference_s)
    tok_per_s = {name: n_rows / median(times_s[name]) for name, (_, n_rows) in ways.items()}
    for name, rate in tok_per_s.items():
        print(f'| decoding, {n_parameters / 1e6:.0f}M, {name}: tokens/s | {reference_tok_per_s:.1f} | '
              f'{rate:.1f} | {rate / reference_tok_per_s:.1f} |')
    return dict(parameters=n_parameters, reference_tok_per_s=reference_tok_per_s, tok_per_s=tok_per_s)


class References(BaseManager):
    """A process that holds reference models. Calls to them wait for the result."""


References.register('PlainTrainer', PlainTrainer)
References.register('PlainWriter', PlainWriter)

if __name__ == '__main__':
    with one_line_errors():
        configure(globals())
        main()
