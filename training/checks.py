"""Checks of train.py's settings, alone and in combination. Each raises ValueError."""

import importlib.util
import math
import subprocess
from types import SimpleNamespace

# minimum, upper bound (excluded), and names of the settings; GPTConfig checks those of the model
LIMITS = (
    (1, math.inf, 'eval_interval log_interval gradient_accumulation_steps batch_size block_size max_iters '
                  'restart_iters restart_mult shuffle_window max_skipped_steps'),
    (0, math.inf, 'eval_iters generate_interval checkpoint_interval warmup_iters muon_warmup_iters '
                  'learning_rate matrix_lr embedding_lr head_lr min_lr weight_decay grad_clip skip_spikes '
                  'lr_decay_iters shard_ranks patience hellaswag_interval lambada_interval core_interval '
                  'max_examples lora_alpha checkpoint_minutes'),
    (1, 2**31, 'timeout_s'),
    (0, 1e6, 'max_hours'),
    (0, 2**31, 'lora_rank'),
    (0, 1, 'beta1 beta2'),
    (0, 2**63, 'seed'),
    (-1, math.inf, 'keep_last_n_checkpoints'),
)
# settings that the other kind of data would ignore
FOR_STREAMS = ('tokenizer', 'stream_val', 'field', 'errors', 'shuffle_window')
FOR_PACKED = ('sampling', 'verify_data')


def check_limits(settings: dict):
    for least, bound, names in LIMITS:
        for name in names.split():
            value = settings[name]
            if value is not None and not least <= value < bound:
                limit = ''
                if bound < math.inf or value == math.inf:
                    limit = f', below {bound}'
                raise ValueError(f'{name}={value}: accepted is {least} or more{limit}')


def check_settings(settings: dict):
    check_limits(settings)
    s = SimpleNamespace(**settings)
    reads_file = s.init_from in ('resume', 'checkpoint') or s.init_from.endswith('.pt') or s.auto_resume
    is_stream, is_fsdp = s.dataset.startswith('stream:'), s.parallel == 'fsdp'
    problems = {  # message: whether it applies
        f'loss_chunks={s.loss_chunks}: accepted is 0 or more, or auto':
            s.loss_chunks != 'auto' and s.loss_chunks < 0,
        f'decay_fraction={s.decay_fraction}: accepted is 0 to 1': not 0 <= s.decay_fraction <= 1,
        f'skip_spikes={s.skip_spikes} would skip steps below the running mean: '
        'accepted is 0 (off) or more than 1, such as 3': 0 < s.skip_spikes <= 1,
        'out_dir is empty: name a folder': not s.out_dir,
        f'checkpoint_path={s.checkpoint_path} is not used by init_from={s.init_from}: add --init_from=resume '
        'to resume from it, or --init_from=checkpoint to begin with its weights':
            s.checkpoint_path and not reads_file,
        'isolate_documents=True is for packed datasets, a stream does not keep documents apart: '
        'pack the text, or leave isolate_documents out': s.isolate_documents and is_stream,
        f'lora_rank={s.lora_rank} is for --parallel=ddp: leave --parallel=fsdp out': s.lora_rank and is_fsdp,
        f'shard_ranks={s.shard_ranks} is for --parallel=fsdp: add it, or use --shard_ranks=0':
            s.shard_ranks and not is_fsdp,
        'shard_gradients=True is for --parallel=fsdp: add it': s.shard_gradients and not is_fsdp,
        f'core_interval={s.core_interval} and core={s.core!r} go together: the interval, '
        'and the folder of the CORE bundle': bool(s.core_interval) != bool(s.core),
    }
    for package in ('wandb', 'tensorboard'):
        name = f'{package}_log'
        problems[f'{name}=True: {package} is not installed: pip install {package}, or use --{name}=False'] = (
            settings[name] and importlib.util.find_spec(package) is None)
    for message, applies in problems.items():
        if applies:
            raise ValueError(message)
    if s.on_event:
        # check the syntax alone: what the command calls may come to exist later
        checked = subprocess.run(['sh', '-n', '-c', f'{s.on_event} "$@"'], capture_output=True, text=True)
        if checked.returncode:
            raise ValueError(f'on_event={s.on_event!r}: sh cannot read it ({checked.stderr.strip()}): '
                             'give a command line of sh')


def check_unused(settings: dict, explicit: set):
    """Refuse a flag that the chosen data would ignore."""
    names, kind = FOR_STREAMS, 'dataset=stream:PATH'
    if settings['dataset'].startswith('stream:'):
        names, kind = FOR_PACKED, 'a packed dataset'
    if settings['init_from'] not in ('scratch', 'resume'):
        explicit = explicit - {'tokenizer'}  # which is that of the model
    for name in names:
        if name in explicit:
            raise ValueError(f'{name}={settings[name]!r} is for {kind}, the dataset is '
                             f'{settings["dataset"]}: leave it out')
