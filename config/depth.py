# One dial: depth (the number of layers) and the horizon (the number of tokens to train on) set everything
# else.
#   python train.py config/depth.py --depth=4 --block_size=512 --batch_size=1 --max_iters=20  # CPU: minutes
#   torchrun --standalone --nproc_per_node=8 train.py config/depth.py --depth=20 --dataset=fineweb
#   python train.py config/depth.py --depth=12 --dataset=fineweb --target_flops=1e19
# The horizon is max_iters, or else target_flops, or else target_param_data_ratio. Any setting you
# pass overrides the derived one.
#
# Rules and reference values are those of nanochat (https://github.com/karpathy/nanochat,
# scripts/base_train.py), which tuned them at depth 12 with batches of 2**19 tokens. None was tuned here.

import math

import torch
import torch.nn as nn

from model import GPT, GPTConfig
from tokens.dataset import dataset_folders, read_meta

out_dir = 'out-depth'
dataset = 'shakespeare_char'  # easy to get; too small beyond a depth of 4 at the ratio below
arch = 'modern'
optimizer = 'muon'
block_size = 1024
batch_size = 16  # windows in a micro-batch: as many as fit into memory
beta1 = 0.8
beta2 = 0.95
grad_clip = 0.0
lr_schedule = 'wsd'
eval_iters = 20

_WIDTH = 64  # per layer
_TOKENS = 1.32e9  # of the reference run: 12 per weight, 110M weights at depth 12 with a vocabulary of 32768
_BATCH_TOKENS = 2**19
_MATRIX_LR, _EMBEDDING_LR, _HEAD_LR, _WEIGHT_DECAY = 0.02, 0.3, 0.008, 0.28


def derive(depth: int = 12, head_dim: int = 128, target_flops: float | None = None,
           target_param_data_ratio: float = 12.0, max_iters=None, gradient_accumulation_steps=None,
           *, dataset, block_size, batch_size):
    for name, value in list(locals().items()):
        if isinstance(value, (int, float)) and value <= 0:
            raise ValueError(f'{name}={value}: accepted is more than 0')

    # 1. Size: the width is 64 per layer, as in GPT-2 (12 layers, 768), rounded up to a multiple of head_dim.
    n_head = -(-_WIDTH * depth // head_dim)
    n_embd = n_head * head_dim
    vocab_size = max(read_meta(folder)['vocab_size'] for folder in dataset_folders(dataset)[0])
    with torch.device('meta'):
        model = GPT(GPTConfig(block_size, vocab_size, depth, n_head, n_embd, arch='modern'))
    # weights of blocks and head: with this count the ratio scales best (nanochat's log)
    n_weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))

    # 2. Horizon, in tokens D. max_iters fixes the steps, not the tokens: D then solves the two rules
    #    D = max_iters * B and B = B_ref * (D / D_ref)**0.383.
    if max_iters is not None:
        tokens = max_iters * (_BATCH_TOKENS * (max_iters / _TOKENS) ** 0.383) ** (1 / (1 - 0.383))
    elif target_flops is not None:
        tokens = target_flops / model.flops_per_token()
    else:
        tokens = target_param_data_ratio * n_weights

    # 3. Batch, in tokens: B = B_ref * (D / D_ref)**0.383 (arXiv:2505.13738), to the nearest power of two of
    # micro-batches.
    micro_batch = batch_size * block_size
    if gradient_accumulation_steps is None:
        wanted = _BATCH_TOKENS * (tokens / _TOKENS) ** 0.383
        gradient_accumulation_steps = 2 ** max(0, round(math.log2(wanted / micro_batch)))
    batch = gradient_accumulation_steps * micro_batch
    if max_iters is None:
        max_iters = max(1, round(tokens / batch))
    tokens = max_iters * batch

    # 4. Learning rates scale with sqrt(B / B_ref), which is known for AdamW (arXiv:2205.10287) and assumed
    #    for Muon. AdamW's also scale with 1 / sqrt(width).
    by_batch = math.sqrt(batch / _BATCH_TOKENS)
    by_width = math.sqrt(768 / n_embd)

    # 5. Weight decay keeps B / (lr * decay * D), the fraction of the run that weights remember, constant
    #    (arXiv:2405.13698, also for AdamW). In a short run this would decay weights too fast, so a step
    #    removes at most a fiftieth of a weight.
    matrix_lr = _MATRIX_LR * by_batch
    weight_decay = min(_WEIGHT_DECAY * by_batch * _TOKENS / tokens, 0.02 / matrix_lr)

    # 6. Schedules, as fractions of the run.
    return dict(
        n_layer=depth, n_head=n_head, n_embd=n_embd, max_iters=max_iters,
        gradient_accumulation_steps=gradient_accumulation_steps, matrix_lr=matrix_lr,
        embedding_lr=_EMBEDDING_LR * by_batch * by_width, head_lr=_HEAD_LR * by_batch * by_width,
        learning_rate=_HEAD_LR * by_batch * by_width, min_lr=0.05 * _HEAD_LR * by_batch * by_width,
        weight_decay=weight_decay, warmup_iters=max_iters // 50, decay_fraction=0.65,
        lr_decay_iters=max_iters, muon_warmup_iters=max_iters // 10,
        eval_interval=max(1, max_iters // 10), log_interval=max(1, max_iters // 1000))
