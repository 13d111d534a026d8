"""Trains a GPT: on one CPU or GPU, or on many under torchrun. Settings are the names below, see --help.

    python train.py config/quickstart.py
    python train.py config/train_shakespeare_char.py --batch_size=32 --compile=False
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    python train.py --init_from=resume --out_dir=out-quickstart --max_iters=2000
    python train.py config/finetune_shakespeare.py --init_from=gpt2

out_dir gets ckpt.pt (the newest state), best.pt (the best weights) and metrics.jsonl (a line per logged step and evaluation).
"""

import importlib.util
import json
import math
import os
import secrets
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import checkpoint
import distributed
import pretrained
from configurator import config_of, configure, one_line_errors
from data.loader import IGNORE, Loader, dataset_folders
from data.tokenizer import fingerprint, vocab_size_of
from distributed import print0
from model import GPT, GPTConfig
from optim import configure_optimizers, lr_scale, muon_momentum, set_lr

# -----------------------------------------------------------------------------
# The defaults train a GPT-2 (124M) on OpenWebText, as nanoGPT's do.
# output
out_dir = 'out'
eval_interval = 2000
log_interval = 1
eval_iters = 200  # batches of batch_size windows of each split, the same ones each time; 0 = the whole validation split
eval_only = False  # evaluate once, write nothing
always_save_checkpoint = True  # False: what sample.py takes is best.pt, not the newest
checkpoint_interval = 0  # save every so many iterations; 0 = with each evaluation
keep_last_n_checkpoints = 1  # older ones kept beside ckpt.pt; -1 = all
init_from = 'scratch'  # resume; checkpoint: only the weights of checkpoint_path; gpt2, gpt2-medium, gpt2-large, gpt2-xl; a folder for transformers
auto_resume = False  # resume where out_dir has a checkpoint, start from scratch where it has none
checkpoint_path = ''  # resume from this file instead of the newest in out_dir
strict = True  # False: with init_from=checkpoint the file may lack weights or have others, which are listed
# wandb
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'  # a folder in data/, or a mixture: a:0.7,b:0.3
gradient_accumulation_steps = 5 * 8  # the total over all ranks
batch_size = 12  # windows in one micro-batch
block_size = 1024
sampling: Literal['shuffle', 'random', 'documents'] = 'shuffle'  # each window once an epoch; with replacement (nanoGPT); aligned to documents
# model
arch: Literal['gpt2', 'modern'] = 'gpt2'
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # for pretraining 0 is good, for finetuning try 0.1+
bias = False  # biases in linear and LayerNorm layers (gpt2 only)
# optimizer
optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: for the blocks' matrices, AdamW for the rest
learning_rate = 6e-4  # peak, AdamW
matrix_lr = 0.02  # peak, Muon
embedding_lr: float | None = None  # peak with muon, None = learning_rate
head_lr: float | None = None  # peak with muon, None = learning_rate
max_iters = 600000
weight_decay = 1e-1
decay_groups: Literal['matrices', 'all'] = 'matrices'
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # 0.0 = off
# learning rate
decay_lr = True  # False = constant, without warm-up
lr_schedule: Literal['cosine', 'wsd', 'cosine_restarts', 'constant'] = 'cosine'
warmup_iters = 2000
lr_decay_iters = 600000  # cosine: where min_lr is reached
min_lr = 6e-5  # for learning_rate; the other rates end at the same fraction of their peak
decay_fraction = 0.4  # wsd: the last part of max_iters falls linearly to min_lr
restart_iters = 1000  # cosine_restarts: length of the first period
restart_mult = 1  # cosine_restarts: each period is so many times as long as the one before
# system
seed = 1337
device = 'auto'  # cpu, cuda, cuda:1, mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
compile: bool | Literal['auto'] = 'auto'
backend: Literal['auto', 'nccl', 'gloo', 'mpi'] = 'auto'
# -----------------------------------------------------------------------------

FIXED = ('arch', 'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'optimizer')  # cannot change when a run is resumed
# what a checkpoint does not bring back
THIS_RUN = ('out_dir', 'init_from', 'auto_resume', 'checkpoint_path', 'strict', 'eval_only', 'device', 'backend')
LIMITS = (  # least, below, and the settings that this holds for; GPTConfig knows those of the model
    (1, math.inf, 'eval_interval log_interval gradient_accumulation_steps batch_size block_size max_iters restart_iters restart_mult'),
    (0, math.inf, 'eval_iters checkpoint_interval warmup_iters lr_decay_iters learning_rate matrix_lr embedding_lr head_lr min_lr'),
    (0, math.inf, 'weight_decay grad_clip'),
    (0, 1, 'beta1 beta2'),
    (0, 2**63, 'seed'),
    (-1, math.inf, 'keep_last_n_checkpoints'),
)
SMOOTHING = 0.95


def main(explicit):
    """One run, from the settings above; explicit names those that the user gave."""
    place = distributed.start(device, backend)
    state = find_checkpoint(place)
    if state is not None:
        restore_settings(state, explicit)
    check_settings()
    start = find_weights(explicit) if state is None and init_from not in ('scratch', 'resume') else None

    # data, model and optimizers: everything that can be wrong is found here, before a file is written
    grad_accum, rows = distributed.divide_batch(gradient_accumulation_steps, batch_size, place.world_size)
    train_loader, eval_sets = open_data(grad_accum, rows, place)
    tokenizer_meta, vocab_size = train_loader.splits[0].tokenizer, train_loader.splits[0].vocab_size
    torch.manual_seed(seed)
    model = make_model(state, start, vocab_size, tokenizer_meta)
    model.to(place.device)
    precision = distributed.choose_dtype(dtype, place.device)
    autocast = torch.autocast(place.device.type, precision, enabled=precision != torch.float32)
    scaler = torch.amp.GradScaler(place.device.type, enabled=precision == torch.float16)
    optimizers = configure_optimizers(
        model, optimizer=optimizer, learning_rate=learning_rate, matrix_lr=matrix_lr, embedding_lr=embedding_lr, head_lr=head_lr,
        betas=(beta1, beta2), weight_decay=weight_decay, decay_groups=decay_groups)
    past = dict(iter_num=0, best_val_loss=math.inf, smoothed=[0.0, 0], skipped=0, run_id=None, wandb_id=None) | (state or {})
    iter_num, best_val_loss, skipped, wandb_id = (past[k] for k in ('iter_num', 'best_val_loss', 'skipped', 'wandb_id'))
    smoothed = past['smoothed']  # decayed sum of logged losses, and how many
    run_id = past['run_id'] or secrets.token_hex(4)  # tells checkpoint.save which files in out_dir are earlier states of this run
    if state is not None:
        if state.get('scaler'):
            scaler.load_state_dict(state['scaler'])
        checkpoint.scatter(state, model, optimizers)
        if state.get('data', train_loader.fingerprint()) != train_loader.fingerprint():
            print0(f'{dataset} is not the data that the checkpoint saw: the run goes on, but not as an unbroken one would')
    state = past = None  # the tensors now live in the model
    for loader in (train_loader, *(loader for loader, _ in eval_sets)):
        loader.windows(np.arange(batch_size))  # ids of another tokenizer stop the run here

    use_compile = distributed.choose_compile(compile, place.device)
    describe(model, place, precision, use_compile, train_loader, grad_accum, rows)
    if use_compile:
        model.compile()
    wrapped = distributed.wrap(model, place)
    parameters = list(model.parameters())
    write_metrics, wandb_id = open_logs(place, iter_num, wandb_id)
    bytes_per_token = eval_sets[1][0].bytes_per_token

    def evaluate():
        train_loss, val_loss = (mean_loss(model, loader, windows, place, autocast) for loader, windows in eval_sets)
        val_bpb = val_loss / math.log(2) / bytes_per_token if bytes_per_token else None
        print0(f'step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}' + (f', {val_bpb:.4f} bits per byte' if val_bpb else ''))
        write_metrics(dict(iter=iter_num, train_loss=train_loss, val_loss=val_loss, val_bpb=val_bpb))
        return val_loss

    def save(is_best):
        weights = checkpoint.gather(model, optimizers)
        if place.is_master:
            checkpoint.save(out_dir, dict(
                **weights, scaler=scaler.state_dict(), model_args=vars(model.config), iter_num=iter_num, best_val_loss=best_val_loss,
                smoothed=smoothed, skipped=skipped, config=config_of(globals()), tokenizer=tokenizer_meta, vocab_size=vocab_size,
                data=train_loader.fingerprint(), wandb_id=wandb_id, run_id=run_id, format=checkpoint.FORMAT), keep_last_n_checkpoints, is_best)

    if iter_num >= max_iters and not eval_only:
        print0(f'nothing to train: the checkpoint is at iteration {iter_num}, max_iters is {max_iters}, give a larger --max_iters')
    resumed_at, t_log, logged_at = iter_num, time.perf_counter(), iter_num
    model.train()
    while True:
        # the state after iter_num updates: the last one is always evaluated and saved
        finished = iter_num >= max_iters
        evaluate_now = finished or eval_only or iter_num % eval_interval == 0
        save_now = finished or iter_num % (checkpoint_interval or eval_interval) == 0
        if evaluate_now or save_now:
            t_pause, is_best = time.perf_counter(), False
            if evaluate_now:
                val_loss = evaluate()
                is_best = val_loss < best_val_loss and iter_num > resumed_at  # what is not saved is not the best: best.pt has this loss
                best_val_loss = val_loss if is_best else best_val_loss
            if (save_now or is_best) and iter_num > resumed_at and not eval_only:
                save(is_best)
            t_log += time.perf_counter() - t_pause
        if finished or eval_only:
            break

        # one update
        scale = lr_at(iter_num)
        set_lr(optimizers, scale, muon_momentum(iter_num))
        torch.manual_seed(((seed * 1_000_003 + iter_num) * 1_000_003 + place.rank) % 2**63)  # dropout: as in an unbroken run
        n_targets = max(1, train_loader.count_targets(iter_num))
        step_loss = torch.zeros((), device=place.device)
        for micro_step in range(grad_accum):
            x, y = train_loader.to(place.device, train_loader.batch(iter_num, micro_step))
            distributed.sync_gradients(wrapped, last=micro_step == grad_accum - 1)
            with autocast:
                loss = wrapped(x, y, reduction='sum')[1] / n_targets
            scaler.scale(loss * place.world_size).backward()  # DDP takes the mean over ranks
            step_loss += loss.detach()
        for each in optimizers:
            scaler.unscale_(each)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if grad_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, grad_norm)
        finite = bool(grad_norm.isfinite())  # the same on all ranks; one bad gradient would make every weight NaN
        skipped += not finite
        for each in optimizers if finite else []:
            scaler.step(each)
        scaler.update()
        for each in optimizers:
            each.zero_grad(set_to_none=True)

        if iter_num % log_interval == 0 or not finite:
            loss_value = distributed.all_reduce_sum(step_loss).item()
            if finite:
                smoothed = [SMOOTHING * smoothed[0] + (1 - SMOOTHING) * loss_value, smoothed[1] + 1]
            now, steps = time.perf_counter(), iter_num + 1 - logged_at
            dt_s = (now - t_log) / steps
            t_log, logged_at = now, iter_num + 1
            tok_per_s = grad_accum * rows * place.world_size * block_size / dt_s
            peak = distributed.peak_flops(place.device)
            mfu = tok_per_s * model.flops_per_token() / (peak * place.world_size) if peak and precision != torch.float32 else None
            eta_s = (max_iters - iter_num - 1) * dt_s
            print0(f'iter {iter_num}: loss {loss_value:.4f}, lr {scale * peak_lr():.2e}, norm {grad_norm.item():.3f}, {dt_s * 1000:.1f}ms, '
                   f'{tok_per_s:,.0f} tok/s, ' + (f'mfu {mfu:.1%}, ' if mfu else '') + f'eta {clock(eta_s)}'
                   + ('' if finite else f' NOT FINITE, step skipped ({skipped} so far)'))
            write_metrics(dict(
                iter=iter_num, loss=loss_value, loss_smoothed=smoothed[0] / (1 - SMOOTHING ** smoothed[1]) if smoothed[1] else None,
                lr=scale * peak_lr(), grad_norm=grad_norm.item(), tok_per_s=tok_per_s, mfu=mfu, eta_s=eta_s, dt_s=dt_s, skipped=skipped,
                peak_memory_bytes=distributed.peak_memory_bytes(place.device)))
        iter_num += 1

    if place.is_master and not eval_only:
        print0(f'done: {out_dir}/ckpt.pt after {iter_num} iterations, best val loss {best_val_loss:.4f}; '
               f'python sample.py --out_dir={out_dir}')


# -----------------------------------------------------------------------------
# before the first step


def find_checkpoint(place):
    """The checkpoint to go on from, or None for a run from scratch; the first rank chooses for all."""
    if init_from != 'resume' and not auto_resume:
        if (Path(out_dir) / 'ckpt.pt').exists() and not eval_only:
            print0(f'{out_dir} holds a checkpoint, which this run from scratch will replace: --init_from=resume goes on with it')
        return None
    state, path = None, None
    if place.is_master and (auto_resume or not checkpoint_path):
        state, path = checkpoint.load_newest(out_dir)
    path = distributed.broadcast(path) or (checkpoint_path if init_from != 'checkpoint' else '') or None
    if path is None and not auto_resume:
        raise FileNotFoundError(f'{out_dir} has no checkpoint to resume: use --init_from=scratch, or another --out_dir')
    return checkpoint.load(path) if state is None and path is not None else state


def restore_settings(state, explicit):
    """Goes on with the settings the checkpoint was trained with, except those given now, which are named."""
    if 'optimizer' not in state:
        raise ValueError('the checkpoint holds weights only (best.pt?): resume from ckpt.pt or a numbered one, '
                         'or begin with its weights by --init_from=checkpoint --checkpoint_path=FILE')
    stored = {k: v for k, v in state['config'].items() if k not in THIS_RUN} if 'format' in state else {}
    stored = {'optimizer': 'adamw', **stored, **{k: v for k, v in state['model_args'].items() if k in FIXED}}
    stored = {k: v for k, v in stored.items() if k in config_of(globals())}
    for name in sorted(explicit & stored.keys()):
        if globals()[name] == stored[name]:
            continue
        if name in FIXED:
            raise ValueError(f'{name}={globals()[name]}: the checkpoint in {out_dir} has {name}={stored[name]}, which cannot change: '
                             f'give --{name}={stored[name]}, or use another --out_dir')
        print0(f'{name} = {globals()[name]!r} from now on, was {stored[name]!r}')
    globals().update({k: v for k, v in stored.items() if k not in explicit})


def find_weights(explicit):
    """What a new run begins with: {'name', 'model_args', 'tokenizer' or None, 'model' where a checkpoint holds the weights}.

    The architecture becomes that of the weights; block_size may be given smaller.
    """
    if init_from == 'checkpoint':
        if not checkpoint_path:
            raise ValueError('init_from=checkpoint: name the file with --checkpoint_path')
        start = checkpoint.load(checkpoint_path, n_head if 'n_head' in explicit else None)
        start = dict(name=checkpoint_path, **{k: start.get(k) for k in ('model', 'model_args', 'tokenizer')})
    else:
        path = pretrained.find(init_from, also=['scratch', 'resume', 'checkpoint'])
        start = dict(name=init_from, model_args=pretrained.read_model_args(path), tokenizer=pretrained.read_tokenizer(init_from))
    for name, theirs in start['model_args'].items():
        ours = globals().get(name)
        if name not in FIXED or (name in explicit and name == 'block_size' and ours < theirs):
            continue
        if name in explicit and ours != theirs:
            raise ValueError(f'{name}={ours}: {start["name"]} has {name}={theirs}: ' + (
                'use that or less' if name == 'block_size' else f'give --{name}={theirs}'))
        globals()[name] = theirs
    return start


def check_settings():
    """ValueError for a setting that makes no sense, by itself or beside another."""
    for least, below, names in LIMITS:
        for name in names.split():
            value = globals()[name]
            if value is not None and not least <= value < below:
                limit = f', below {below}' if below < math.inf or value == math.inf else ''
                raise ValueError(f'{name}={value}: accepted is {least} or more{limit}')
    if decay_lr and lr_schedule != 'constant' and min_lr > learning_rate:
        raise ValueError(f'min_lr={min_lr} is above learning_rate={learning_rate}, which falls to it: '
                         f'use --min_lr={learning_rate / 10:g}, or --decay_lr=False')
    if not 0 <= decay_fraction <= 1:
        raise ValueError(f'decay_fraction={decay_fraction}: accepted is 0 up to 1, the part of max_iters')
    if not out_dir:
        raise ValueError('out_dir is empty: name the folder for checkpoints and logs')
    if checkpoint_path and init_from not in ('resume', 'checkpoint') and not auto_resume:
        raise ValueError(f'checkpoint_path={checkpoint_path} is for resuming: add --init_from=resume, or leave it out')
    if wandb_log and importlib.util.find_spec('wandb') is None:
        raise ValueError('wandb_log=True: wandb is not installed: pip install wandb, or use --wandb_log=False')


def open_data(grad_accum, rows, place):
    """The training loader, and what is evaluated: (loader, numbers of its windows) of the training and of the validation split."""
    folders, weights = dataset_folders(dataset)
    train = Loader(folders, 'train', block_size, rows, grad_accum, place.rank, place.world_size, sampling, seed, weights,
                   prefetch=place.device.type != 'cpu')
    in_order = 'documents' if sampling == 'documents' else 'sequential'
    train_eval, val = (Loader(folders, split, block_size, batch_size, order=in_order) for split in ('train', 'val'))
    for split in train.splits:
        if split.meta['origin'] != 'meta.json':
            rule = 'characters from meta.pkl' if split.meta['origin'] == 'meta.pkl' else "GPT-2's ids"
            print0(f'{split.folder} has no meta.json: taking its shards for uint16, {rule}, as nanoGPT does')
    wanted = [(loader, min(eval_iters * batch_size or val.n_windows, loader.n_windows)) for loader in (train_eval, val)]
    return train, [(loader, np.arange(n) * loader.n_windows // n) for loader, n in wanted]  # evenly spread


def make_model(state, start, vocab_size, tokenizer_meta):
    """A new GPT; or one as the checkpoint's, whose weights scatter() brings; or one with the weights to start from."""
    known = state or start
    if known is None:
        # GPT-2's 50257 become 50304: a multiple of 64 suits the matrix kernels, and costs a small vocabulary more than it gains
        padded = vocab_size if vocab_size < 1024 else -(-vocab_size // 64) * 64
        return GPT(GPTConfig(block_size, padded, n_layer, n_head, n_embd, dropout, bias, arch))
    name = out_dir if state else start['name']
    stored = known.get('tokenizer')
    if stored and fingerprint(stored) != fingerprint(tokenizer_meta):
        raise ValueError(f'{name}: the checkpoint was trained with tokenizer {fingerprint(stored)} of {vocab_size_of(stored)} tokens, dataset '
                         f'{dataset} was packed with {fingerprint(tokenizer_meta)} of {vocab_size}: use the dataset it was trained on, or pack with its tokenizer')
    if vocab_size > known['model_args']['vocab_size']:
        raise ValueError(f'{name}: the checkpoint knows {known["model_args"]["vocab_size"]} tokens, dataset {dataset} has {vocab_size}: '
                         'use the dataset it was trained on')
    if not stored and not state:
        print0(f'{name} does not say its tokenizer: taking it for that of {dataset}')
    if state is None and 'model' not in start:
        return GPT.from_pretrained(init_from, dropout, block_size)
    model = GPT(GPTConfig(**{**known['model_args'], 'dropout': dropout}))
    if state is None:
        checkpoint.load_weights(model, start.pop('model'), checkpoint_path, strict)
        model.crop_block_size(block_size)
    return model


def describe(model, place, precision, use_compile, loader, grad_accum, rows):
    tokens = grad_accum * rows * place.world_size * block_size
    print0(f'model: {arch}, {model.get_num_params() / 1e6:.2f}M parameters, vocabulary {model.config.vocab_size:,}')
    print0(f'device: {distributed.device_name(place.device)}, {str(precision).split(".")[1]}, {"compiled" if use_compile else "eager"}')
    print0(f'data: {dataset}, {loader.n_tokens:,} tokens, {tokens:,} a step ({place.world_size} ranks x {grad_accum} micro-steps x {rows} '
           f'windows x {block_size}), {max_iters * tokens / loader.n_tokens:.2f} epochs in {max_iters:,} steps')


def peak_lr():
    return matrix_lr if optimizer == 'muon' else learning_rate


def lr_at(it):
    """The factor of every peak learning rate at iteration it."""
    if not decay_lr:
        return 1.0
    return lr_scale(it, schedule=lr_schedule, warmup_iters=warmup_iters, max_iters=max_iters, lr_decay_iters=lr_decay_iters,
                    min_lr_ratio=min_lr / (learning_rate or 1.0), decay_fraction=decay_fraction, restart_iters=restart_iters, restart_mult=restart_mult)


# -----------------------------------------------------------------------------
# evaluation


@torch.inference_mode()
def mean_loss(model, loader, windows, place, autocast):
    """Nats per target over the windows numbered so, the same at any world size; each rank does its share."""
    exact = torch.float32 if place.device.type == 'mps' else torch.float64  # MPS has no float64
    sums = torch.zeros(2, dtype=exact, device=place.device)  # nats, targets
    model.eval()
    for start in range(place.rank * batch_size, len(windows), place.world_size * batch_size):
        x, y = loader.to(place.device, loader.windows(windows[start:start + batch_size]))
        with autocast:
            nats = model(x, y, reduction='sum')[1]
        sums += torch.stack((nats.to(exact), (y != IGNORE).sum()))
    model.train()
    nats, targets = distributed.all_reduce_sum(sums).tolist()
    return nats / max(targets, 1)


# -----------------------------------------------------------------------------
# logs


def open_logs(place, iter_num, wandb_id):
    """Makes out_dir, and returns what writes a line of metrics.jsonl (and to wandb), with the id of the wandb run."""
    path = Path(out_dir) / 'metrics.jsonl'
    if eval_only or not place.is_master:
        return lambda line: None, wandb_id
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if iter_num and path.exists():
        for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
            try:
                if json.loads(line)['iter'] < iter_num:  # what follows is about to be done again
                    kept.append(line + '\n')
            except (ValueError, KeyError, TypeError):
                pass  # torn by a crash
    checkpoint.write_atomically(path, lambda f: f.write(''.join(kept).encode('utf-8')))
    run = None
    if wandb_log:
        run = start_wandb(wandb_id)
        wandb_id = run.id

    def write_metrics(line):
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}  # JSON has no NaN
        with open(path, 'a', encoding='utf-8') as f:
            f.write(json.dumps(line) + '\n')
        if run is not None:
            run.log(line, step=line['iter'])

    return write_metrics, wandb_id


def start_wandb(wandb_id):
    """The wandb run, resumed under its id; offline where there is no key, since training needs no network."""
    import wandb
    mode = os.environ.get('WANDB_MODE') or ('online' if wandb.api.api_key else 'offline')
    if mode == 'offline':
        print0('wandb: no key, or offline asked for: writing to out_dir, upload with `wandb sync`')
    return wandb.init(project=wandb_project, name=wandb_run_name, id=wandb_id, resume='allow' if wandb_id else None, mode=mode,
                      config=config_of(globals()), dir=out_dir)


def clock(seconds):
    """83.2 -> '1m23s'"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}h{minutes:02}m' if hours else f'{minutes}m{seconds:02}s' if minutes else f'{seconds}s'


if __name__ == '__main__':
    with one_line_errors():
        main(configure(globals()))
        distributed.stop()  # after main() has let go of the model: see there
