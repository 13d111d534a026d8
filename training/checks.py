"""Checks of train.py's settings, alone and in combination."""

import importlib.util
import math

# minimum, upper bound (excluded), and names of the settings; GPTConfig checks those of the model
LIMITS = (
    (1, math.inf, 'eval_interval log_interval gradient_accumulation_steps batch_size block_size max_iters'),
    (1, math.inf, 'restart_iters restart_mult shuffle_window max_skipped_steps'),
    (1, 2**31, 'timeout_s'),
    (0, math.inf, 'eval_iters generate_interval checkpoint_interval warmup_iters muon_warmup_iters'),
    (0, math.inf, 'learning_rate matrix_lr embedding_lr head_lr min_lr weight_decay grad_clip skip_spikes'),
    (0, math.inf, 'lr_decay_iters shard_ranks patience hellaswag_interval lambada_interval core_interval'),
    (0, math.inf, 'max_examples'),
    (0, 1, 'beta1 beta2'),
    (0, 2**63, 'seed'),
    (-1, math.inf, 'keep_last_n_checkpoints'),
)


def check_limits(settings: dict):
    """Raise ValueError for a setting that is out of range."""
    for least, bound, names in LIMITS:
        for name in names.split():
            value = settings[name]
            if value is not None and not least <= value < bound:
                limit = f', below {bound}' if bound < math.inf or value == math.inf else ''
                raise ValueError(f'{name}={value}: accepted is {least} or more{limit}')


def check_settings(settings: dict):
    """Raise ValueError for a setting that is invalid, alone or with another."""
    check_limits(settings)
    check_optimization(settings)
    check_files(settings)
    is_stream = settings['dataset'].startswith('stream:')
    if settings['isolate_documents'] and is_stream:
        raise ValueError('isolate_documents=True is for packed datasets, a stream does not keep documents '
                         'apart: pack the text, or leave isolate_documents out')
    for name in ('shard_ranks', 'shard_gradients'):
        if settings[name] and settings['parallel'] != 'fsdp':
            raise ValueError(f'{name}={settings[name]} is for --parallel=fsdp: add it, or use --{name}=0')
    if bool(settings['core_interval']) != bool(settings['core']):
        raise ValueError(f'core_interval={settings["core_interval"]} and core={settings["core"]!r} '
                         'go together: the interval, and the folder of the CORE bundle')
    if settings['wandb_log'] and importlib.util.find_spec('wandb') is None:
        raise ValueError('wandb_log=True: wandb is not installed: pip install wandb, '
                         'or use --wandb_log=False')


def check_optimization(settings):
    learning_rate, min_lr = settings['learning_rate'], settings['min_lr']
    decays = settings['decay_lr'] and settings['lr_schedule'] != 'constant'
    if decays and min_lr > learning_rate:
        raise ValueError(f'min_lr={min_lr} is above learning_rate={learning_rate}, which decays to it: '
                         f'use --min_lr={learning_rate / 10:g}, or --decay_lr=False')
    loss_chunks = settings['loss_chunks']
    if loss_chunks != 'auto' and loss_chunks < 0:
        raise ValueError(f'loss_chunks={loss_chunks}: accepted is 0 or more, or auto')
    if not 0 <= settings['decay_fraction'] <= 1:
        raise ValueError(f'decay_fraction={settings["decay_fraction"]}: accepted is 0 to 1, '
                         'the part of max_iters')
    if 0 < settings['skip_spikes'] <= 1:
        raise ValueError(f'skip_spikes={settings["skip_spikes"]} would skip steps below the running mean: '
                         'accepted is 0 (off) or more than 1, such as 3')


def check_files(settings):
    path, init_from = settings['checkpoint_path'], settings['init_from']
    if not settings['out_dir']:
        raise ValueError('out_dir is empty: name the folder for checkpoints and logs')
    is_used = init_from in ('resume', 'checkpoint') or init_from.endswith('.pt') or settings['auto_resume']
    if path and not is_used:
        raise ValueError(f'checkpoint_path={path} is for resuming: add --init_from=resume, or leave it out')


def check_unused(settings: dict, explicit: set):
    """Raise ValueError for a flag that the chosen data would ignore."""
    is_stream = settings['dataset'].startswith('stream:')
    for_streams = {'tokenizer', 'stream_val', 'field', 'errors', 'shuffle_window'}
    for_packed = {'sampling', 'verify_data'}
    unused = explicit & (for_packed if is_stream else for_streams)
    if unused:
        name = sorted(unused)[0]
        kind = 'a packed dataset' if is_stream else 'dataset=stream:PATH'
        raise ValueError(f'{name}={settings[name]!r} is for {kind}, the dataset is {settings["dataset"]}: '
                         'leave it out')
