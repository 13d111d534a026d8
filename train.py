"""Train a GPT: on one CPU or GPU, or on many under torchrun. The settings are the names below, see --help.

    python train.py config/quickstart.py
    python train.py config/train_shakespeare_char.py --batch_size=32 --compile=False
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    python train.py --init_from=resume --out_dir=out-quickstart --max_iters=2000
    python train.py config/finetune_shakespeare.py --init_from=gpt2

out_dir gets ckpt.pt (the newest state), best.pt (the best weights), metrics.jsonl, run.json (settings and
environment), samples.md with generate_interval, and report.md with curves.
"""

import dataclasses
import os
from typing import Literal

# Let waiting OpenMP threads sleep soon: on two busy cores a step then took 2 s instead of 10. It costs 4% of
# a small step on an idle machine.
os.environ.setdefault('GOMP_SPINCOUNT', '10000')

import torch

import checkpoint
import devices
import distributed
import optim
from configurator import accepted_by, config_of, configure
from files import one_line_errors, print0
from logs import Log
from optim import OptimizerSettings, Schedule, StepJudge
from tokens.tokenizer import load_tokenizer
from training.benchmarks import open_benchmarks
from training.checks import check_limits, check_settings, check_unused
from training.data import count_bytes, evaluate, open_data
from training.groups import LrGroups
from training.progress import SaveTimes, limit_hours
from training.samples import generate, read_prompts
from training.signals import signal_to_stop, signals_noted
from weights.begin import adopted_settings, begin, make_model

# -----------------------------------------------------------------------------
# The defaults train a GPT-2 (124M) on OpenWebText, as nanoGPT's do.
# output
out_dir = 'out'
eval_interval = 2000
log_interval = 1
eval_iters = 200  # batches of each split, the same ones each time; 0 = the whole validation split
eval_at_start = True  # False: not before the first step
eval_only = False  # evaluate once, write nothing
generate_interval = 0  # iterations between samples for out_dir/samples.md; 0 = none
generate_prompts = ''  # one a line; '' = the beginnings of four validation windows
report = True  # write report.md and its curves at the end
max_hours = 0.0  # save and stop after this many hours; 0 = never
on_event = ''  # shell command called at events, see docs/TRAIN.md
patience = 0  # stop after this many evaluations without a new best validation loss; 0 = never
always_save_checkpoint = True  # False: sample.py loads best.pt, not ckpt.pt
checkpoint_interval = 0  # iterations between checkpoints; 0 = save with each evaluation
checkpoint_minutes = 0.0  # save after this many minutes, too; 0 = never
keep_last_n_checkpoints = 1  # older checkpoints to keep; -1 = all
init_from = 'scratch'  # resume; x.pt (weights only); gpt2 to gpt2-xl; a folder in transformers' format
auto_resume = False  # resume if out_dir has a checkpoint, else start from scratch
checkpoint_path = ''  # resume this file; with init_from=checkpoint, load its weights only
strict = True  # False: accept and list missing or unexpected weights
# benchmarks during training, as in evaluate.py
hellaswag_interval = 0  # iterations between scores on HellaSwag; 0 = never
lambada_interval = 0
core_interval = 0
core = ''  # folder of the CORE bundle
eval_dir = ''  # folder with hellaswag.jsonl and lambada.jsonl; '' = download them
max_examples = 0  # per benchmark; 0 = all
# wandb and TensorBoard
tensorboard_log = False  # write out_dir/tensorboard
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'  # a folder in data/; a mixture a:0.7,b:0.3; stream:PATH,PATH for raw text
gradient_accumulation_steps = 5 * 8  # micro-batches in a step, over all ranks
batch_size = 12  # windows in a micro-batch
block_size = 1024
# shuffle: each window once an epoch; random: with replacement, as in nanoGPT; documents: aligned to documents
sampling: Literal['shuffle', 'random', 'documents'] = 'shuffle'
isolate_documents = False  # tokens attend within their document only; needs the .idx files
verify_data = False  # check the checksum of each shard before the first step
# raw text: dataset=stream:PATH,PATH
tokenizer = 'gpt2'  # byte; a folder or file with tokenizer.json
stream_val = ''  # files and folders of validation text; '' = hold out the first training file
field = 'text'  # fields of JSONL, CSV and Parquet to read; several: title,text
errors: Literal['strict', 'replace', 'replace_all'] = 'strict'  # replace: up to 1% may become U+FFFD
shuffle_window = 1024  # shuffle windows within consecutive groups of this size
# model
arch: Literal['gpt2', 'modern', 'llama'] = 'gpt2'
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining, 0.1 or more for finetuning
bias = False  # biases in linear and LayerNorm layers (gpt2 only)
# model, for arch=llama only
n_kv_head: int | None = None  # heads of keys and values; None = n_head
head_size: int | None = None  # None = n_embd / n_head
n_hidden: int | None = None  # width of the MLP; None = 8/3 n_embd, rounded up to a multiple of 64
rope_theta = 10000.0
qk_norm: bool | None = None  # normalize queries and keys, as Qwen3 does
qkv_bias = False  # biases of queries, keys and values, as in Qwen2
tied: bool | None = None  # one matrix for embedding and head
# LoRA: freeze the model of init_from, and train two thin matrices beside each of lora_targets
lora_rank = 0  # 0 = train all weights
lora_alpha = 32.0  # the output of the adapter is multiplied by lora_alpha / lora_rank
lora_targets = 'c_attn,c_proj,c_fc'
# optimizer
optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: Muon for the blocks' matrices, AdamW for the rest
learning_rate = 6e-4  # peak, AdamW
matrix_lr = 0.02  # peak, Muon
embedding_lr: float | None = None  # peak with muon; None = learning_rate
head_lr: float | None = None  # peak with muon; None = learning_rate
max_iters = 600000
weight_decay = 1e-1
decay_groups: Literal['matrices', 'all'] = 'matrices'
normuon = False  # with muon: even out the rows of its updates; 5% fewer tokens to a loss
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # clip the gradient to this norm; 0.0 = off
skip_spikes = 0.0  # skip a step whose loss or norm exceeds this many running means; 0 = if not finite
max_skipped_steps = 100  # stop the run after this many in a row
lr_groups = ''  # factors of the rates by parameter name, such as mlp:1,attn:0.1,*:0; 0 = frozen
# learning rate
decay_lr = True  # False = constant, without warm-up
lr_schedule: Literal['cosine', 'wsd', 'cosine_restarts', 'constant'] = 'cosine'
warmup_iters = 2000
muon_warmup_iters = 300  # Muon's momentum rises from 0.85 to 0.95
lr_decay_iters = 600000  # cosine: reach min_lr here
min_lr = 6e-5  # final learning_rate; the other rates end at the same fraction of their peak
decay_fraction = 0.4  # wsd: decay linearly to min_lr over this last fraction of max_iters
restart_iters = 1000  # cosine_restarts: length of the first period
restart_mult = 1  # cosine_restarts: length of each period relative to the last
# system
seed = 1337
device = 'auto'  # cpu, cuda, cuda:1, mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
bf16_residual = False  # with bfloat16: sum the blocks' outputs in bfloat16, not float32; faster on a GPU
loss_chunks: int | Literal['auto'] = 'auto'  # compute the loss in this many chunks to save memory; 0 = one
compile: bool | Literal['auto'] = 'auto'
activation_checkpointing = False  # recompute blocks in the backward pass: less memory, 1/3 more work
backend: Literal['auto', 'nccl', 'gloo'] = 'auto'
# several ranks, under torchrun
parallel: Literal['ddp', 'fsdp'] = 'ddp'  # ddp: all weights on each rank; fsdp: a shard of each weight
shard_ranks = 0  # fsdp: how many ranks share one copy of the weights; 0 = all
shard_gradients = False  # fsdp: reduce gradients in every micro-step, for less memory and more traffic
timeout_s = 600  # a rank fails after waiting this long for others, for example during a save
# -----------------------------------------------------------------------------

DEFAULTS, ACCEPTED = config_of(globals()), accepted_by(globals())

with one_line_errors(), signals_noted():
    explicit = configure(globals())  # names of the settings given
    settings = config_of(globals())
    check_limits(settings)  # before the ranks meet, which may take timeout_s
    place = distributed.start(device, backend, timeout_s)

    # what this run starts from: nothing, a run to resume, or weights
    start = begin(settings, explicit)
    settings.update(adopted_settings(start, settings, explicit, ACCEPTED))
    globals().update(settings)
    check_settings(settings)
    check_unused(settings, explicit)
    progress, is_new = start.progress, start.state is None
    limit_hours(max_hours)

    # data: any number of ranks takes the same steps
    grad_accum, micro_batch_size = distributed.divide_batch(
        gradient_accumulation_steps, batch_size, place.world_size)
    tokens_per_step = grad_accum * micro_batch_size * place.world_size * block_size
    stored_meta = None if 'tokenizer' in explicit else start.tokenizer_meta
    data = open_data(settings, place, grad_accum, micro_batch_size, stored_meta)
    tokenizer_meta, vocab_size = data.train.tokenizer_meta, data.train.vocab_size

    # model
    torch.manual_seed(seed)
    compute_dtype = devices.choose_dtype(dtype, place.device)
    model = make_model(start, settings, vocab_size, tokenizer_meta, compute_dtype)
    model.activation_checkpointing, model.loss_chunks = activation_checkpointing, loss_chunks
    model.bf16_residual = bf16_residual
    groups = LrGroups(model, lr_groups)  # freezes parameters of factor 0
    model = distributed.prepare(model, place, parallel=parallel, shard_ranks=shard_ranks, dtype=compute_dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    autocast = torch.autocast(place.device.type, compute_dtype, enabled=compute_dtype != torch.float32)
    use_compile = devices.choose_compile(compile, place.device)
    loss_sum, mode = model.loss_sum, 'eager'
    if use_compile:
        loss_sum, mode = distributed.compiled_loss(model), 'compiled'

    # optimizers and learning rate
    scaler = torch.amp.GradScaler(place.device.type, enabled=compute_dtype == torch.float16)
    optimizers = optim.configure_optimizers(model, OptimizerSettings(
        optimizer, learning_rate, matrix_lr, embedding_lr, head_lr, betas=(beta1, beta2),
        weight_decay=weight_decay, decay_groups=decay_groups, normuon=normuon), compute_dtype, groups.factors)
    schedule = Schedule(
        lr_schedule, warmup_iters, max_iters, lr_decay_iters, min_lr_ratio=min_lr / (learning_rate or 1.0),
        decay_fraction=decay_fraction, restart_iters=restart_iters, restart_mult=restart_mult)
    if not decay_lr:
        schedule = Schedule('constant', warmup_iters=0, max_iters=max_iters)
    judge = StepJudge(place.device, skip_spikes, start.history)

    # resume
    if not is_new:
        checkpoint.restore(start.state, model, optimizers, scaler, data.train)
    folder = checkpoint.CheckpointFolder(out_dir, start.resumed_from, progress.iter_num)
    start.state = start.weights = None  # the tensors now live in the model

    # evaluations, benchmarks and samples
    token_bytes = count_bytes(tokenizer_meta, place)
    needs_text = generate_interval or hellaswag_interval or lambada_interval or core_interval
    text_tokenizer = load_tokenizer(tokenizer_meta) if needs_text else None
    benchmarks = open_benchmarks(settings, text_tokenizer)
    prompts = []
    if generate_interval and not eval_only:
        prompts = read_prompts(generate_prompts, text_tokenizer, data.eval_val.loader)

    # print the set-up, and open the log
    precision = str(compute_dtype).removeprefix('torch.')
    print0(f'model: {arch}, {model.get_num_params() / 1e6:.2f}M parameters, '
           f'vocabulary {model.config.vocab_size:,}')
    if lr_groups:
        print0(groups.describe())
    device_name = devices.device_name(place.device)
    print0(f'device: {device_name}, {precision}, {mode}')
    print0(f'data: {data.describe(max_iters * tokens_per_step)}, {tokens_per_step:,} tokens a step '
           f'({place.world_size} ranks x {grad_accum} micro-steps x {micro_batch_size} windows '
           f'x {block_size}), {max_iters:,} steps')
    if progress.iter_num >= max_iters and not eval_only:
        print0(f'nothing to train: the checkpoint is at iteration {progress.iter_num}, '
               f'max_iters is {max_iters}, give a larger --max_iters')
    log = Log(None if eval_only else out_dir, place, progress, tokens_per_step, max_iters, on_event)
    log.open(is_new, dict(settings=settings, defaults=DEFAULTS, parameters=model.get_num_params(),
                          flops_per_token=model.flops_per_token(), dataset_tokens=data.train.n_tokens,
                          device=device_name, dtype=precision, compiled=use_compile))
    logged_lr = matrix_lr if optimizer == 'muon' else learning_rate  # peak
    save_times = SaveTimes(checkpoint_interval or eval_interval, checkpoint_minutes)
    intervals = [eval_interval, *(benchmark.interval for benchmark in benchmarks)]
    intervals += [generate_interval] if prompts else []
    # the constant part of each checkpoint
    facts = dict(model_args=vars(model.config), config=settings, tokenizer=tokenizer_meta,
                 vocab_size=vocab_size, lora=start.lora, style=data.style, data=data.train.fingerprint(),
                 format=checkpoint.FORMAT)

    model.train()
    while True:
        signal = signal_to_stop()  # None or its name, the same on all ranks
        finished = progress.iter_num >= max_iters or eval_only  # no update follows
        save_due = save_times.due(progress.iter_num)
        with log.paused(save_due or finished or signal or any(progress.iter_num % n == 0 for n in intervals)):
            # evaluate
            evaluation_due = finished or progress.iter_num % eval_interval == 0
            losses, is_best = None, False
            if evaluation_due and not signal and (progress.iter_num or eval_at_start or eval_only):
                losses = evaluate(model, data, token_bytes, place, autocast)  # None after a signal
                signal = signal_to_stop()
            if losses is not None:
                log.evaluation(losses)
                is_best = progress.note_evaluation(losses.val.nats_per_target)
                finished = finished or progress.out_of_patience(patience)

            # save
            save_due = save_due or finished or signal or is_best
            if save_due and progress.advanced and not eval_only:
                progress.to_evaluate = evaluation_due and losses is None  # when it is resumed
                tensors = checkpoint.gather(model, optimizers)
                state = dict(**tensors, **dataclasses.asdict(progress), **facts, scaler=scaler.state_dict(),
                             history=judge.state(), position=data.train.position(progress.iter_num))
                folder.save_or_warn(state, progress, keep_last_n=keep_last_n_checkpoints, is_best=is_best,
                                    must_succeed=finished or signal)
                log.saved(folder, is_best)

            # benchmarks and samples, which take long
            for benchmark in benchmarks:
                if not signal and (finished or progress.iter_num % benchmark.interval == 0):
                    numbers = benchmark.run(model, place, autocast, batch_size * block_size)
                    log.benchmark(benchmark.name, numbers)
            if prompts and not signal and (finished or progress.iter_num % generate_interval == 0):
                log.samples(generate(model, text_tokenizer, prompts, seed, place, autocast))
        if finished or signal:
            break

        # one update: forward, backward, clip, step, zero_grad
        lr_scale = optim.lr_scale(progress.iter_num, schedule)
        optim.set_lr(optimizers, lr_scale, optim.muon_momentum(progress.iter_num, muon_warmup_iters))
        # dropout depends on step and rank alone, so a resumed run draws the same
        torch.manual_seed(((seed * 1_000_003 + progress.iter_num) * 1_000_003 + place.rank) % 2**63)
        n_targets = max(1, data.train.count_targets(progress.iter_num))  # over all ranks
        step_loss = torch.zeros((), device=place.device)
        for micro_step in range(grad_accum):
            x, y, documents = data.train.batch(progress.iter_num, micro_step).to(place.device)
            distributed.sync_gradients(model, shard_gradients or micro_step == grad_accum - 1)
            with autocast:
                loss = loss_sum(x, y, documents) / n_targets
            scaler.scale(loss).backward()
            step_loss += loss.detach()
        distributed.sum_gradients(model)
        distributed.all_reduce_sum(step_loss)
        for each in optimizers:
            scaler.unscale_(each)
        grad_norm = distributed.whole(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        if grad_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, grad_norm)
        skip = judge.judge(grad_norm, step_loss)  # 0 or 1, the same on all ranks
        for each in optimizers:
            optim.step_unless(each, skip)
            each.zero_grad(set_to_none=True)
        scaler.update()

        # log; on a GPU, reading `skip` would wait for the step to end
        if progress.iter_num % log_interval == 0 or (place.device.type == 'cpu' and skip):
            log.step(lr_scale * logged_lr, step_loss, grad_norm, judge)
            log.check_skipped(max_skipped_steps, folder)
        progress.iter_num += 1

    log.close(signal, folder, report)
    distributed.stop()
