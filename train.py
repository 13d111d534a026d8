"""Trains a GPT: on one CPU or GPU, or on many under torchrun. Settings are the names below, see --help.

    python train.py config/quickstart.py
    python train.py config/train_shakespeare_char.py --batch_size=32 --compile=False
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    python train.py --init_from=resume --out_dir=out-quickstart --max_iters=2000
    python train.py config/finetune_shakespeare.py --init_from=gpt2

out_dir gets ckpt.pt (the newest state), best.pt (the best weights), metrics.jsonl (a line per logged step and evaluation), run.json
(settings and environment), samples.md with generate_interval, and at the end report.md with curves.
"""

import importlib.util
import math
import platform
import secrets
import time
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import checkpoint
import distributed
from configurator import config_of, configure
from corpus.fetch import cache_folder
from files import one_line_errors, print0
from kernels import IGNORE
from logs import clock, farewell, open_logs
from model import GPT, GPTConfig
from optim import (
    OptimizerSettings,
    Schedule,
    StepJudge,
    configure_optimizers,
    lr_scale,
    muon_momentum,
    set_lr,
    step_unless,
)
from report import environment, write_report, write_samples
from scoring import score_rows, spread_windows, table_row, text_loss
from tokens.dataset import dataset_folders
from tokens.loader import Loader
from tokens.stream import open_stream
from tokens.tokenizer import fingerprint, load_tokenizer, vocab_size_of
from weights import pretrained

# -----------------------------------------------------------------------------
# The defaults train a GPT-2 (124M) on OpenWebText, as nanoGPT's do.
# output
out_dir = 'out'
eval_interval = 2000
log_interval = 1
eval_iters = 200  # batches of batch_size windows of each split, the same ones each time; 0 = the whole validation split
eval_only = False  # evaluate once, write nothing
generate_interval = 0  # iterations between samples from the same prompts, added to out_dir/samples.md; 0 = none
generate_prompts = ''  # one a line; '' = the beginnings of four validation windows
report = True  # at the end, report.md and its curves in out_dir; report.py writes them at any time
patience = 0  # stop after so many evaluations in a row without a new best validation loss; 0 = never
always_save_checkpoint = True  # False: what sample.py takes is best.pt, not the newest
checkpoint_interval = 0  # save every so many iterations; 0 = with each evaluation
keep_last_n_checkpoints = 1  # older ones kept beside ckpt.pt; -1 = all
init_from = 'scratch'  # resume; x.pt, or checkpoint: only the weights of x.pt or checkpoint_path; gpt2, gpt2-medium, gpt2-large, gpt2-xl; a folder for transformers
auto_resume = False  # resume where out_dir has a checkpoint, start from scratch where it has none
checkpoint_path = ''  # resume from this file instead of the newest in out_dir
strict = True  # False: with init_from=checkpoint the file may lack weights or have others, which are listed
# benchmarks while training, as evaluate.py has them
hellaswag_interval = 0  # iterations between scores on HellaSwag; 0 = never
lambada_interval = 0
core_interval = 0
core = ''  # folder of the CORE bundle
eval_dir = ''  # folder with hellaswag.jsonl and lambada.jsonl to read instead of downloading
max_examples = 0  # of each task; 0 = all
# wandb
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'  # a folder in data/, or a mixture: a:0.7,b:0.3; or stream:PATH,PATH: files and folders of raw text
gradient_accumulation_steps = 5 * 8  # the total over all ranks
batch_size = 12  # windows in one micro-batch
block_size = 1024
sampling: Literal['shuffle', 'random', 'documents'] = 'shuffle'  # each window once an epoch; with replacement (nanoGPT); aligned to documents
isolate_documents = False  # True: no token attends to another document of its row; needs the .idx files
verify_data = False  # read every shard against its checksum before the first step; sizes are always looked at
# raw text: dataset=stream:PATH,PATH
tokenizer = 'gpt2'  # or byte, or a folder that tokens/tokenizer.py train wrote
stream_val = ''  # files and folders of text for validation, by commas; empty = the first file of the stream, which is then not trained on
field = 'text'  # what to take of JSONL, CSV and Parquet; several: title,text
errors: Literal['strict', 'replace'] = 'strict'  # replace: U+FFFD stands for what is not UTF-8
shuffle_window = 1024  # so many windows in a row change places with each other
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
skip_spikes = 0.0  # skip a step whose loss or gradient norm is above so many times its running mean; 0.0 = only what is not finite
max_skipped_steps = 100  # in a row; then the run stops
# learning rate
decay_lr = True  # False = constant, without warm-up
lr_schedule: Literal['cosine', 'wsd', 'cosine_restarts', 'constant'] = 'cosine'
warmup_iters = 2000
muon_warmup_iters = 300  # Muon's momentum rises from 0.85 to 0.95
lr_decay_iters = 600000  # cosine: where min_lr is reached
min_lr = 6e-5  # for learning_rate; the other rates end at the same fraction of their peak
decay_fraction = 0.4  # wsd: the last part of max_iters falls linearly to min_lr
restart_iters = 1000  # cosine_restarts: length of the first period
restart_mult = 1  # cosine_restarts: each period is so many times as long as the one before
# system
seed = 1337
device = 'auto'  # cpu, cuda, cuda:1, mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
loss_chunks: int | Literal['auto'] = 'auto'  # parts of the rows whose logits are in memory at a time; auto = one where they are small; 0 = one
compile: bool | Literal['auto'] = 'auto'
activation_checkpointing = False  # less memory: blocks are computed again for the backward pass, a third more work
backend: Literal['auto', 'nccl', 'gloo', 'mpi'] = 'auto'
# many ranks, under torchrun
parallel: Literal['ddp', 'fsdp'] = 'ddp'  # all weights on each rank, or a part of each weight
shard_ranks = 0  # fsdp: how many ranks hold one copy of the weights between them; 0 = all
timeout_s = 600  # a rank that waits so long for the others gives up; more than saving takes
# -----------------------------------------------------------------------------

FIXED = ('arch', 'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'optimizer')  # cannot change when a run is resumed
# what a checkpoint does not bring back
THIS_RUN = ('out_dir', 'init_from', 'auto_resume', 'checkpoint_path', 'strict', 'eval_only', 'verify_data', 'device', 'backend', 'timeout_s')
LIMITS = (  # least, below, and the settings that this holds for; GPTConfig knows those of the model
    (1, math.inf, 'eval_interval log_interval gradient_accumulation_steps batch_size block_size max_iters restart_iters restart_mult'),
    (1, math.inf, 'shuffle_window max_skipped_steps'),
    (1, 2**31, 'timeout_s'),
    (0, math.inf, 'eval_iters generate_interval checkpoint_interval warmup_iters muon_warmup_iters lr_decay_iters'),
    (0, math.inf, 'learning_rate matrix_lr embedding_lr head_lr min_lr weight_decay grad_clip skip_spikes shard_ranks'),
    (0, math.inf, 'patience hellaswag_interval lambada_interval core_interval max_examples'),
    (0, 1, 'beta1 beta2'),
    (0, 2**63, 'seed'),
    (-1, math.inf, 'keep_last_n_checkpoints'),
)
IN_METRICS = ('acc', 'acc_norm', 'perplexity', 'core')  # of a benchmark's numbers
SAMPLE_TOKENS = 100
DEFAULTS = config_of(globals())


def main(explicit):
    """One run, from the settings above; explicit names those that the user gave."""
    if init_from.endswith('.pt') and checkpoint_path:
        raise ValueError(f'init_from={init_from} and checkpoint_path={checkpoint_path}: two files to begin with, give one')
    if init_from.endswith('.pt'):
        globals().update(init_from='checkpoint', checkpoint_path=init_from)
    check_limits()  # before the ranks meet, which takes timeout_s
    place = distributed.start(device, backend, timeout_s)
    state = find_checkpoint()
    if state is not None:
        restore_settings(state, explicit)
    check_settings()
    start = find_weights(explicit) if state is None and init_from not in ('scratch', 'resume') else None

    # data, model and optimizers: everything that can be wrong is found here, before a file is written
    grad_accum, rows = distributed.divide_batch(gradient_accumulation_steps, batch_size, place.world_size)
    known_tokenizer = None if 'tokenizer' in explicit else (state or start or {}).get('tokenizer')
    train_loader, eval_sets = open_data(grad_accum, rows, place, known_tokenizer or tokenizer)
    tokenizer_meta, vocab_size = train_loader.splits[0].tokenizer, train_loader.splits[0].vocab_size
    style, *others = sorted({split.meta['style'] for split in train_loader.splits if 'style' in split.meta}) or [None]  # how sample.py --chat asks
    if others:
        raise ValueError(f'dataset={dataset} has conversations in the styles {style} and {others[0]}: pack them in one')
    torch.manual_seed(seed)
    model = make_model(state, start, vocab_size, tokenizer_meta)
    model.activation_checkpointing, model.loss_chunks = activation_checkpointing, loss_chunks
    precision = distributed.choose_dtype(dtype, place.device)
    distributed.prepare(model, place, parallel=parallel, shard_ranks=shard_ranks, dtype=precision)
    parameters = list(model.parameters())
    autocast = torch.autocast(place.device.type, precision, enabled=precision != torch.float32)
    scaler = torch.amp.GradScaler(place.device.type, enabled=precision == torch.float16)
    optimizers = configure_optimizers(
        model, OptimizerSettings(optimizer, learning_rate, matrix_lr, embedding_lr, head_lr, (beta1, beta2), weight_decay, decay_groups), precision)
    past = dict(iter_num=0, best_val_loss=math.inf, since_best=0, history=None, to_evaluate=False, run_id=None, wandb_id=None) | (state or {})
    judge = StepJudge(place.device, skip_spikes, past['history'] or [0.0] * 5)
    iter_num, best_val_loss, wandb_id = past['iter_num'], past['best_val_loss'], past['wandb_id']
    since_best = past['since_best']  # evaluations without a new best
    run_id = past['run_id'] or secrets.token_hex(4)  # tells checkpoint.save which files in out_dir are earlier states of this run
    done_at = iter_num - past['to_evaluate']  # what is saved and evaluated already
    if state is not None:
        if state.get('scaler'):
            scaler.load_state_dict(state['scaler'])
        checkpoint.scatter(state, model, optimizers)
        if state.get('data', train_loader.fingerprint()) != train_loader.fingerprint():
            print0(f'{dataset} is not the data that the checkpoint saw: the run goes on, but not as an unbroken one would')
        train_loader.seek(state.get('position'), iter_num)
    from_scratch, state, past = state is None, None, None  # the tensors now live in the model
    for loader in (train_loader, *(loader for loader, _ in eval_sets)):
        loader.windows(np.arange(batch_size))  # ids of another tokenizer stop the run here

    byte_counts = count_bytes(tokenizer_meta, place)
    wants_samples = generate_interval and not eval_only
    text_tokenizer = load_tokenizer(tokenizer_meta) if wants_samples or hellaswag_interval or lambada_interval or core_interval else None
    benchmarks = open_benchmarks(text_tokenizer)

    use_compile = distributed.choose_compile(compile, place.device)
    describe(model, place, precision, use_compile, train_loader, grad_accum, rows)
    training_loss = distributed.compiled_loss(model) if use_compile else model.loss
    prompts = read_prompts(text_tokenizer, eval_sets[1][0]) if wants_samples else []
    write_metrics, write_table, wandb_id = open_logs(None if eval_only else out_dir, place, iter_num, from_scratch, dict(
        settings=config_of(globals()), defaults=DEFAULTS, parameters=model.get_num_params(), flops_per_token=model.flops_per_token(),
        dataset_tokens=train_loader.n_tokens, environment=environment() | dict(
            device=distributed.device_name(place.device), processes=place.world_size, dtype=str(precision).removeprefix('torch.'),
            compiled=use_compile, python=platform.python_version(), torch=torch.__version__, system=platform.platform())),
        wandb_id, dict(project=wandb_project, name=wandb_run_name) if wandb_log else None)

    def evaluate():
        losses = [text_loss(model, loader, windows, token_bytes=byte_counts, place=place, autocast=autocast) for loader, windows in eval_sets]
        (train_loss, *_), (val_loss, val_bpb, *_) = losses
        print0(f'step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}' + (f', {val_bpb:.4f} bits per byte' if val_bpb else ''))
        write_metrics(dict(iter=iter_num, train_loss=train_loss, val_loss=val_loss, val_bpb=val_bpb))
        return val_loss

    def run_benchmark(name, evaluate_it):
        numbers = evaluate_it(partial(score_rows, model, batch_tokens=batch_size * block_size, place=place, autocast=autocast))
        print0(f'step {iter_num}: {table_row(name, numbers)}')
        write_metrics(dict(iter=iter_num) | {name if key == name else f'{name}_{key}': numbers[key] for key in IN_METRICS if key in numbers})
        rows = [dict(iter=iter_num, task=task) | each for task, each in numbers.get('tasks', {name: numbers}).items()]  # CORE's are many
        columns = list(dict.fromkeys(key for row in rows for key in row))
        write_table(f'{name}_table', columns, [[row.get(key) for key in columns] for row in rows], iter_num)

    def save(is_best, to_evaluate):
        newest = dict(
            **checkpoint.gather(model, optimizers), scaler=scaler.state_dict(), model_args=vars(model.config), iter_num=iter_num,
            best_val_loss=best_val_loss, since_best=since_best, to_evaluate=to_evaluate, history=judge.state(), config=config_of(globals()),
            tokenizer=tokenizer_meta, vocab_size=vocab_size, style=style, data=train_loader.fingerprint(), position=train_loader.position(iter_num),
            wandb_id=wandb_id, run_id=run_id, format=checkpoint.FORMAT)
        distributed.on_first_rank(lambda: checkpoint.save(out_dir, newest, keep_last_n_checkpoints, is_best))

    def log_step():
        nonlocal t_log, logged_at
        skipped, in_a_row, taken, *_ = judge.state()
        now, steps = time.perf_counter(), iter_num + 1 - logged_at
        dt_s = (now - t_log) / steps
        t_log, logged_at = now, iter_num + 1
        tok_per_s = grad_accum * rows * place.world_size * block_size / dt_s
        peak = distributed.peak_flops(place.device)
        mfu = tok_per_s * model.flops_per_token() / (peak * place.world_size) if peak and precision != torch.float32 else None
        line = dict(iter=iter_num, loss=step_loss.item(), loss_smoothed=judge.smoothed_loss.item() if taken else None, lr=scale * peak_lr(),
                    grad_norm=grad_norm.item(), tok_per_s=tok_per_s, mfu=mfu, eta_s=(max_iters - iter_num - 1) * dt_s, dt_s=dt_s, n_steps=steps,
                    skipped=int(skipped), peak_memory_bytes=distributed.peak_memory_bytes(place.device))
        problem = 'SPIKE' if math.isfinite(line['loss'] + line['grad_norm']) else 'NOT FINITE'
        print0(f'iter {iter_num}: loss {line["loss"]:.4f}, lr {line["lr"]:.2e}, norm {line["grad_norm"]:.3f}, {dt_s * 1000:.1f}ms, '
               f'{tok_per_s:,.0f} tok/s, ' + (f'mfu {mfu:.1%}, ' if mfu else '') + f'eta {clock(line["eta_s"])}'
               + (f' {problem}, step skipped ({skipped:.0f} so far)' if in_a_row else ''))
        write_metrics(line)
        return in_a_row

    if iter_num >= max_iters and not eval_only:
        print0(f'nothing to train: the checkpoint is at iteration {iter_num}, max_iters is {max_iters}, give a larger --max_iters')
    t_log, logged_at, saved_at = time.perf_counter(), iter_num, iter_num

    def between_updates(stop):
        """Evaluates, scores, saves and samples where it is due. Returns whether the run is finished."""
        nonlocal best_val_loss, since_best, saved_at, t_log
        finished = iter_num >= max_iters
        last = finished or eval_only  # the state after the last update is always evaluated and saved
        evaluate_now = last or iter_num % eval_interval == 0
        save_now = finished or stop or iter_num % (checkpoint_interval or eval_interval) == 0
        if evaluate_now or save_now:
            distributed.synchronize(place.device)  # steps that an accelerator still has to do are not time of evaluation
        begun, before, is_best = time.perf_counter(), (best_val_loss, since_best), False
        if evaluate_now and not stop:
            val_loss = evaluate()
            is_best = val_loss < best_val_loss and iter_num > done_at  # what is not saved is not the best: best.pt has this loss
            best_val_loss = val_loss if is_best else best_val_loss
            since_best = 0 if is_best else since_best + (iter_num > done_at)
            if 0 < patience <= since_best and not last:
                print0(f'no new best validation loss in {since_best} evaluations: stopping here (patience={patience})')
                finished = last = save_now = True
        if (save_now or is_best) and iter_num > done_at and not eval_only:
            try:
                save(is_best, to_evaluate=evaluate_now and stop is not None)
                saved_at = iter_num
            except OSError as error:  # a full disk; the same on all ranks
                if 'ckpt.pt' not in str(error.filename):  # else best.pt was written before it, and holds the new best
                    best_val_loss, since_best = before
                if finished or stop:
                    raise
                print0(f'NOT SAVED, {error.filename}: {error.strerror}: the checkpoint of iteration {saved_at} is still there, training goes on and tries again')
        for interval, name, evaluate_it in benchmarks:  # after saving: they take long, and a signal waits for them
            if not stop and (last or iter_num % interval == 0):
                run_benchmark(name, evaluate_it)
        if prompts and not stop and (finished or iter_num % generate_interval == 0):
            texts = generate(model, text_tokenizer, prompts, place, autocast)
            if place.is_master:
                try:
                    write_samples(out_dir, iter_num, texts)
                except OSError as error:
                    print0(f'{error.filename}: {error.strerror}: the samples of iteration {iter_num} are lost')
                write_table('samples', ['iter', 'prompt', 'text'], [(iter_num, *pair) for pair in texts], iter_num)
        t_log += time.perf_counter() - begun
        return last

    model.train()
    while True:
        stop = distributed.signal_to_stop()  # the same on all ranks
        if between_updates(stop) or stop:
            break

        # one update
        scale = lr_at(iter_num)
        set_lr(optimizers, scale, muon_momentum(iter_num, muon_warmup_iters))
        torch.manual_seed(((seed * 1_000_003 + iter_num) * 1_000_003 + place.rank) % 2**63)  # dropout: as in an unbroken run
        n_targets = max(1, train_loader.count_targets(iter_num))
        step_loss = torch.zeros((), device=place.device)
        for micro_step in range(grad_accum):
            x, y, documents = train_loader.batch(iter_num, micro_step).to(place.device)
            distributed.sync_gradients(model, last=micro_step == grad_accum - 1)
            with autocast:
                loss = training_loss(x, y, documents) / n_targets
            scaler.scale(loss).backward()
            step_loss += loss.detach()
        distributed.sum_gradients(model)
        for each in optimizers:
            scaler.unscale_(each)
        grad_norm = distributed.whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if grad_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, grad_norm)
        distributed.all_reduce_sum(step_loss)
        skip = judge.judge(grad_norm, step_loss)  # the same on all ranks; one bad gradient would make every weight NaN
        for each in optimizers:
            step_unless(each, skip)
        scaler.update()
        for each in optimizers:
            each.zero_grad(set_to_none=True)

        if iter_num % log_interval == 0 or (place.device.type == 'cpu' and skip):  # elsewhere a look would make the host wait
            if log_step() >= max_skipped_steps:
                raise ValueError(f'{max_skipped_steps} steps in a row were skipped, up to iteration {iter_num}: ' + (
                    f'the last good checkpoint is {out_dir}/ckpt.pt of iteration {saved_at}, go on from it' if saved_at else 'begin again')
                    + ' with a lower --learning_rate or other data')
        iter_num += 1

    if not eval_only:
        if place.is_master and report and not stop:
            try:
                print0(f'report: {write_report([out_dir])}')
            except Exception as error:  # the run is done and saved: a picture that fails must not make it look otherwise
                print0(f'no report: {type(error).__name__}: {error}')
        print0(farewell(out_dir, stop, iter_num, iter_num > done_at, best_val_loss))


# -----------------------------------------------------------------------------
# before the first step


def find_checkpoint():
    """The checkpoint to go on from, or None for a run from scratch; the first rank chooses for all."""
    if init_from != 'resume' and not auto_resume:
        if (Path(out_dir) / 'ckpt.pt').exists() and not eval_only:
            print0(f'{out_dir} holds a checkpoint, which this run from scratch does not go on with: for that, stop it and use --init_from=resume')
        return None
    state = None

    def newest():
        nonlocal state
        state, path = checkpoint.load_newest(out_dir)
        return path

    path = distributed.on_first_rank(newest) if auto_resume or not checkpoint_path else None
    path = path or (checkpoint_path if init_from != 'checkpoint' else '') or None
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


def check_limits():
    """ValueError for a setting that makes no sense by itself."""
    for least, below, names in LIMITS:
        for name in names.split():
            value = globals()[name]
            if value is not None and not least <= value < below:
                limit = f', below {below}' if below < math.inf or value == math.inf else ''
                raise ValueError(f'{name}={value}: accepted is {least} or more{limit}')


def check_settings():
    """ValueError for a setting that makes no sense, by itself or beside another."""
    check_limits()
    if decay_lr and lr_schedule != 'constant' and min_lr > learning_rate:
        raise ValueError(f'min_lr={min_lr} is above learning_rate={learning_rate}, which falls to it: '
                         f'use --min_lr={learning_rate / 10:g}, or --decay_lr=False')
    if loss_chunks != 'auto' and loss_chunks < 0:
        raise ValueError(f'loss_chunks={loss_chunks}: accepted is 0 or more, or auto')
    if not 0 <= decay_fraction <= 1:
        raise ValueError(f'decay_fraction={decay_fraction}: accepted is 0 up to 1, the part of max_iters')
    if 0 < skip_spikes <= 1:
        raise ValueError(f'skip_spikes={skip_spikes} would skip steps that are below the running mean: accepted is 0 (off) or more than 1, such as 3')
    if isolate_documents and dataset.startswith('stream:'):
        raise ValueError('isolate_documents=True is for packed datasets, a stream does not tell its documents apart: pack it, or leave it out')
    if shard_ranks and parallel != 'fsdp':
        raise ValueError(f'shard_ranks={shard_ranks} is for --parallel=fsdp: add it, or give --shard_ranks=0')
    if not out_dir:
        raise ValueError('out_dir is empty: name the folder for checkpoints and logs')
    if checkpoint_path and init_from not in ('resume', 'checkpoint') and not auto_resume:
        raise ValueError(f'checkpoint_path={checkpoint_path} is for resuming: add --init_from=resume, or leave it out')
    if bool(core_interval) != bool(core):
        raise ValueError(f'core_interval={core_interval} and core={core!r} go together: the interval, and the folder of the CORE bundle')
    if wandb_log and importlib.util.find_spec('wandb') is None:
        raise ValueError('wandb_log=True: wandb is not installed: pip install wandb, or use --wandb_log=False')


def open_data(grad_accum, rows, place, tokenizer):
    """The training loader, and what is evaluated: (loader, numbers of its windows) of the training and of the validation split."""
    if dataset.startswith('stream:'):
        train, *heads = open_stream(
            dataset, tokenizer, stream_val=stream_val, fields=field, errors=errors, n_eval=eval_iters * batch_size, block_size=block_size,
            batch_size=rows, grad_accum=grad_accum, rank=place.rank, world_size=place.world_size, seed=seed, shuffle_window=shuffle_window,
            prefetch=place.device.type != 'cpu')
        for head in heads:
            head.batch_size = batch_size
        return train, [(head, np.arange(head.n_windows)) for head in heads]
    folders, weights = dataset_folders(dataset)
    train = Loader(folders, 'train', block_size=block_size, batch_size=rows, grad_accum=grad_accum, rank=place.rank,
                   world_size=place.world_size, order=sampling, seed=seed, weights=weights, prefetch=place.device.type != 'cpu', isolate=isolate_documents)
    in_order = 'documents' if sampling == 'documents' else 'sequential'
    train_eval, val = (Loader(folders, split, block_size=block_size, batch_size=batch_size, order=in_order, isolate=isolate_documents) for split in ('train', 'val'))
    for split in train.splits:
        if split.meta['origin'] != 'meta.json':
            rule = 'characters from meta.pkl' if split.meta['origin'] == 'meta.pkl' else "GPT-2's ids"
            print0(f'{split.folder} has no meta.json: taking its shards for uint16, {rule}, as nanoGPT does')
    for split in (*train.splits, *val.splits) if verify_data else ():
        print0(f'reading {split.folder}, {split.split}: {split.n_tokens:,} tokens, against their checksums')
        distributed.once_a_node(split.verify, place)
    return train, [(loader, spread_windows(loader, eval_iters * batch_size or val.n_windows)) for loader in (train_eval, val)]


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
    n = loader.n_tokens
    print0(f'data: {dataset}, {f"{n:,} tokens" if n else "tokens made on the way"}, {tokens:,} a step ({place.world_size} ranks x {grad_accum} '
           f'micro-steps x {rows} windows x {block_size}), {f"{max_iters * tokens / n:.2f} epochs in " if n else ""}{max_iters:,} steps')


def peak_lr():
    return matrix_lr if optimizer == 'muon' else learning_rate


def lr_at(it):
    """The factor of every peak learning rate at iteration it."""
    if not decay_lr:
        return 1.0
    return lr_scale(it, Schedule(lr_schedule, warmup_iters, max_iters, lr_decay_iters, min_lr / (learning_rate or 1.0), decay_fraction,
                                 restart_iters, restart_mult))


# -----------------------------------------------------------------------------
# evaluation


def count_bytes(tokenizer_meta, place):
    """(V,) int64 bytes of each token, on the device; None, said aloud, for GPT-2's where vocab.bpe is not here: training downloads nothing for it."""
    def read():
        if tokenizer_meta['kind'] != 'gpt2' or (cache_folder() / 'vocab.bpe').is_file():
            return torch.from_numpy(load_tokenizer(tokenizer_meta).token_bytes())
        print0(f'no bits per byte: the bytes of GPT-2\'s tokens follow from {cache_folder() / "vocab.bpe"}, which a prepare script puts there')
        return None
    table = distributed.on_first_rank(read)
    return table if table is None else table.to(place.device)


def open_benchmarks(tokenizer):
    """What is scored beside the losses: [(interval, name, what gives its numbers)]; what can be wrong with it shows before the first step."""
    from tasks.core import evaluate_core, read_core
    from tasks.items import evaluate_task, read_benchmarks
    intervals = {name: interval for name, interval in (('hellaswag', hellaswag_interval), ('lambada', lambada_interval)) if interval}
    read = read_benchmarks(list(intervals), eval_dir, max_examples, tokenizer)
    found = [(interval, name, partial(evaluate_task, name=name, benchmark=read[name])) for name, interval in intervals.items()]
    if core_interval:
        found.append((core_interval, 'core', partial(evaluate_core, tokenizer=tokenizer, bundle=read_core(core, tokenizer, max_examples), block_size=block_size)))
    return found


# -----------------------------------------------------------------------------
# samples


def read_prompts(tokenizer, loader):
    """The prompts of generate_prompts, or 16 tokens (all before the first target where there is a mask) of four validation windows: lists of ids."""
    if generate_prompts:
        return [tokenizer.encode(line) for line in generate_prompts.splitlines() if line]
    rows = zip(*loader.windows(np.arange(4) * loader.n_windows // 4)[:2])
    first_targets = [(x, int((y != IGNORE).int().argmax())) for x, y in rows]
    return [x[:first + 1 if first else 16].tolist() for x, first in first_targets]


def generate(model, tokenizer, prompts, place, autocast):
    """What the model writes on from each prompt, up to the end of the document: [(prompt, text)]. Every rank draws the same."""
    pairs = []
    torch.manual_seed(seed)
    model.eval()
    for prompt in prompts:
        with autocast, torch.compiler.set_stance('force_eager'):  # each length would be compiled anew
            drawn = list(model.stream(torch.tensor([prompt], device=place.device), SAMPLE_TOKENS, temperature=0.8, top_k=200, vocab_size=tokenizer.vocab_size))
        ids = torch.cat(drawn).tolist()
        ids = ids[:ids.index(tokenizer.eot)] if tokenizer.eot in ids else ids
        pairs.append((tokenizer.decode(prompt), tokenizer.decode(ids)))
    model.train()
    return pairs


if __name__ == '__main__':
    with one_line_errors(), distributed.signals_noted():
        main(configure(globals()))
        distributed.stop()  # after main() has let go of the model: see there
