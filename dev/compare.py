"""Compare training and decoding with plain reference code on one machine, for the table in docs/RESULTS.md.

    python -m dev.compare
    python -m dev.compare --llama    # decoding, with llama.cpp: pip install llama-cpp-python

The reference is float32 and eager. It updates tensor by tensor, opens a new memmap for each batch, and
decodes without a cache. It runs in this process, which distributed.start() has not prepared, and takes turns
with bench.py, so that both meet the same load of the machine. The last line is a JSON object.
"""

import json
import subprocess
import sys
import tempfile
import time
from itertools import count, islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn import functional as F

import devices
from bench import now_s, timed
from configurator import config_of, configure
from files import one_line_errors
from model import GPT, GPTConfig
from tokens.dataset import dataset_folders
from tokens.loader import Loader
from tokens.tokenizer import load_tokenizer

# -----------------------------------------------------------------------------
dataset = 'shakespeare_char'
rounds = 3  # turns of each case
warmup_steps = 5  # of training, in each turn; not measured
prompt_tokens = 512
max_new_tokens = 128
llama = False  # compare decoding with llama.cpp instead, in 16 bits and int8
seed = 1337
device = 'auto'  # cpu, cuda, cuda:1, mps
# -----------------------------------------------------------------------------

# name: model, windows in a step, steps in a turn
TRAINING = {
    '10.7M': (dict(n_layer=6, n_head=6, n_embd=384, block_size=256), 16, 10),
    '0.8M': (dict(n_layer=4, n_head=4, n_embd=128, block_size=64), 12, 40),
}
GPT2_TOKENS = 50257
DECODING = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304)


def main():
    other = 'llama.cpp' if llama else 'reference'
    print(f'| | {other} | here | ratio |\n| --- | --- | --- | --- |')
    if llama:
        result = dict(llama=compare_llama())
    else:
        result = dict(training={name: compare_training(name) for name in TRAINING})
        result['decoding'] = compare_decoding()
    print(json.dumps(dict(result, settings=config_of(globals()))))


def bench(**flags) -> dict:
    """Run bench.py in a process of its own. Return the JSON object in its last line."""
    flags |= dict(device=device, seed=seed, json=True)
    command = [sys.executable, Path(__file__).parent.parent / 'bench.py']
    command += [f'--{name}={value}' for name, value in flags.items()]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding='utf-8')
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


# -----------------------------------------------------------------------------
# training


def compare_training(name) -> dict:
    """Train a model of TRAINING in turns. Print its rows of the table."""
    shape, batch_size, steps = TRAINING[name]
    folders, weights = dataset_folders(dataset)
    loader = Loader(folders, 'train', block_size=shape['block_size'], batch_size=batch_size, seed=seed,
                    weights=weights)
    shape = dict(shape, vocab_size=loader.vocab_size)
    chosen, ms, reference_ms = devices.choose_device(device), [], []
    for _ in range(rounds):
        here = bench(**shape, batch_size=batch_size, dataset=dataset, steps=steps, warmup_steps=warmup_steps)
        ms.append(here['step_ms']['median'])
        updates = islice(train_plainly(shape, loader, chosen), warmup_steps + steps)
        losses, times_ms = zip(*timed(updates, chosen), strict=True)
        reference_ms.append(median(times_ms[warmup_steps:]))
    ms, reference_ms, loss = median(ms), median(reference_ms), losses[-1].item()
    ratio = reference_ms / ms
    print(f'| training, {name}, {batch_size} x {shape["block_size"]} tokens, {here["dtype"]}: a step | '
          f'{reference_ms:.1f} ms | {ms:.1f} ms | {ratio:.2f} |')
    print(f'| its loss at step {warmup_steps + steps} | {loss:.4f} | {here["loss"]:.4f} | |', flush=True)
    return dict(ms=ms, reference_ms=reference_ms, ratio=ratio, loss=here['loss'], reference_loss=loss,
                dtype=here['dtype'], compiled=here['compiled'], machine=here['machine'])


def train_plainly(shape, loader, chosen):
    """Train as bench.py does. Yield the loss of each step."""
    torch.manual_seed(seed)  # the weights that bench.py begins with
    model = GPT(GPTConfig(**shape, bias=False)).to(chosen)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=1e-2), dict(params=vectors, weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), foreach=False, fused=False)
    for step in count():
        x, y = plain_batch(loader, step)
        logits = plain_logits(model, x.to(chosen))
        loss = F.cross_entropy(logits.flatten(0, 1), y.to(chosen).flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        yield loss.detach()


def plain_batch(loader, step):
    """Read the loader's windows of a step one by one, through a memmap of each shard opened for this step."""
    numbers = np.arange(loader.batch_size) + step * loader.batch_size
    rows = [split.find(start) for split, start, _ in loader.locate(numbers)]
    data = {shard: np.memmap(shard.path, shard.dtype, 'r', shard.header_bytes) for shard, _ in rows}
    windows = [data[shard][i:i + loader.block_size + 1].astype(np.int64) for shard, i in rows]
    windows = torch.from_numpy(np.stack(windows))  # (B, T + 1)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


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


def compare_decoding() -> dict:
    """Continue a prompt in turns. The reference draws 2 tokens."""
    chosen = devices.choose_device(device)
    model = GPT(GPTConfig(**DECODING, bias=False)).to(chosen).eval()
    prompt = torch.randint(DECODING['vocab_size'], (1, prompt_tokens), device=chosen)
    rates, reference = [], []  # tokens/s
    for _ in range(rounds):
        begun_s = now_s(chosen)
        plain_next(model, plain_next(model, prompt))
        reference.append(2 / (now_s(chosen) - begun_s))
        here = bench(mode='decode', rounds=1, prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens,
                     **DECODING)
        rates.append(here['decode_tok_per_s'])
    reference, rate = median(reference), median(rates)
    print(f'| decoding, {model.get_num_params() / 1e6:.0f}M: tokens/s | {reference:.1f} | {rate:.1f} | '
          f'{rate / reference:.1f} |')
    return dict(reference_tok_per_s=reference, tok_per_s=rate)


@torch.no_grad()
def plain_next(model, idx, temperature=0.8, top_k=200):
    """Append one token to the row, drawn after a forward pass over all of it."""
    logits = plain_logits(model, idx, [-1])[:, 0] / temperature  # nanoGPT too computes the last position only
    logits[logits < logits.topk(top_k).values[:, [-1]]] = -float('inf')
    return torch.cat((idx, torch.multinomial(logits.softmax(dim=-1), 1)), dim=1)


def compare_llama() -> dict:
    """Continue a prompt in turns with llama.cpp on the CPU, in 16 bits and in int8 (q8_0)."""
    tokenizer, results = load_tokenizer({'kind': 'gpt2'}), {}
    dtype = devices.choose_dtype('auto', torch.device('cpu'), packs=True)
    model = GPT(GPTConfig(**DECODING, bias=False)).to(dtype)
    flags = dict(DECODING, mode='decode', prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens)
    for quantize, kind in (('none', str(dtype).removeprefix('torch.')), ('int8', 'int8')):
        llama_ms, ms = [], []
        with tempfile.TemporaryDirectory() as folder:
            path = f'{folder}/model.gguf'
            model.save_pretrained(path, tokenizer, quantize=quantize)
            for _ in range(rounds):
                llama_ms.append(time_llama(path))
                ms.append(bench(**flags, rounds=1, quantize=quantize)['decode_ms']['median'])
        llama_ms, ms = median(llama_ms), median(ms)
        results[kind] = dict(llama_ms=llama_ms, ms=ms, ratio=llama_ms / ms)
        print(f'| a token, {kind} | {llama_ms:.1f} ms | {ms:.1f} ms | {llama_ms / ms:.2f} |', flush=True)
    return results


def time_llama(path) -> float:
    """Return the median of the milliseconds that llama.cpp takes for a token."""
    import llama_cpp
    n_threads, times_ms = torch.get_num_threads(), []
    engine = llama_cpp.Llama(path, n_ctx=prompt_tokens + max_new_tokens, n_threads=n_threads,
                             n_threads_batch=n_threads, verbose=False)
    new = torch.randint(GPT2_TOKENS, (prompt_tokens,)).tolist()
    for _ in range(max_new_tokens):
        begun_s = time.perf_counter()
        engine.eval(new)
        new = [engine.sample(top_k=200, top_p=1.0, min_p=0.0, temp=0.8)]
        times_ms.append(1000 * (time.perf_counter() - begun_s))
    engine.close()
    return median(times_ms[1:])  # without the prompt


if __name__ == '__main__':
    with one_line_errors():
        configure(globals())
        main()
