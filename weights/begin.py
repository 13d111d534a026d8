"""The start of a run or a script: from scratch, a checkpoint of a run, or a model from elsewhere."""

import re
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch

import checkpoint
import distributed
from configurator import checked
from files import print0, printable
from model import GPT, GPTConfig
from tokens.dataset import dataset_folders, read_meta, read_meta_pkl
from tokens.tokenizer import GPT2_META, Tokenizer, fingerprint, load_tokenizer, tokenizer_meta, vocab_size_of
from training.progress import Progress
from weights import foreign, lora, pretrained

# settings that define the model or the optimizer's state: they cannot change on resume
LLAMA_SETTINGS = ('n_kv_head', 'head_size', 'n_hidden', 'rope_theta', 'qk_norm', 'qkv_bias', 'tied')
SHAPE = ('arch', 'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', *LLAMA_SETTINGS)
LORA_SETTINGS = ('lora_rank', 'lora_alpha', 'lora_targets')
FIXED_ON_RESUME = (*SHAPE, 'optimizer', *LORA_SETTINGS)
# settings of one start of a run, which a checkpoint does not bring back
PER_START = ('out_dir', 'init_from', 'auto_resume', 'checkpoint_path', 'strict', 'eval_only', 'verify_data',
             'device', 'backend', 'timeout_s', 'max_hours', 'on_event')
# settings that decide which windows the validation loss is measured on
EVALUATION = ('dataset', 'batch_size', 'block_size', 'eval_iters', 'sampling', 'isolate_documents',
              'stream_val')


@dataclass
class Start:
    """The start of a run or a script. A run from scratch has the defaults."""

    path: str = ''  # file, folder or name of the model
    model_args: dict | None = None  # of GPTConfig; None = a new model
    weights: dict | None = None  # by name; None = read them from path with GPT.from_pretrained()
    tokenizer_meta: dict | None = None  # None = unknown
    lora: dict | None = None  # of a checkpoint that holds an adapter alone: its settings and its base model
    style: str | None = None  # conversation template that the model was tuned on
    settings: dict = field(default_factory=dict)  # of the run that wrote the checkpoint
    progress: Progress = field(default_factory=Progress)
    state: dict | None = None  # the checkpoint of a run to resume, until restore() has used it

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer_meta)

    @property
    def resumed_from(self) -> str:
        return self.path if self.state is not None else ''

    @property
    def history(self) -> list[float]:
        """The state of optim.StepJudge. The count of steps skipped in a row restarts at 0."""
        skipped, _, *rest = (self.state or {}).get('history') or [0.0] * 5
        return [skipped, 0.0, *rest]

    def take(self, state, path):
        """Take over a checkpoint. Return (path, iter_num), or ('', 0) if there is none."""
        if state is None:
            return '', 0
        self.path, self.state, self.settings = str(path), state, state['config']
        self.model_args, self.weights = state['model_args'], state['model']
        self.tokenizer_meta, self.style = state.get('tokenizer'), state.get('style')
        self.lora, self.progress = state.get('lora'), Progress.of(state)
        return self.path, state['iter_num']


def read_chosen(choose) -> Start:
    """Read the checkpoint that choose() returns on the first rank, as (state, path). Each rank reads once."""
    start = Start()
    path, iter_num = distributed.on_first_rank(lambda: start.take(*choose()))
    if path and not start.path:  # another rank
        if start.take(checkpoint.load(path), path) != (path, iter_num):
            raise ValueError(f'{path} has changed, its run is still training: name a copy with '
                             '--checkpoint_path')
    return start


# -----------------------------------------------------------------------------
# a training run


def begin(settings: dict, explicit: set) -> Start:
    """Find the start of a training run. explicit: names of the settings that the user gave."""
    out_dir, init_from, path = settings['out_dir'], settings['init_from'], settings['checkpoint_path']
    names_model = init_from not in ('scratch', 'resume')  # path is then no run to resume
    if settings['auto_resume'] or init_from == 'resume':
        start = find_run(out_dir, '' if names_model else path, settings['auto_resume'])
        if start.path:
            return start
        if not settings['auto_resume']:
            raise FileNotFoundError(f'{out_dir} has no checkpoint to resume: use --init_from=scratch, '
                                    'or another --out_dir')
    elif (Path(out_dir) / 'ckpt.pt').exists() and not settings['eval_only']:
        print0(f'{out_dir} holds the checkpoint of another run, which is moved aside: to continue that run, '
               'stop this one and use --init_from=resume')
    if not names_model:
        return Start()
    if init_from != 'checkpoint' and not init_from.endswith('.pt'):
        args = pretrained.read_model_args(pretrained.find(init_from))
        if 'tokenizer' in explicit:
            return Start(init_from, args, tokenizer_meta=tokenizer_meta(settings['tokenizer']))
        return Start(init_from, args, tokenizer_meta=pretrained.read_tokenizer(init_from))

    # only the weights and tokenizer of a checkpoint
    if (init_from == 'checkpoint') != bool(path):
        raise ValueError(f'init_from={init_from}, checkpoint_path={path}: name one file to begin with, by '
                         '--init_from=FILE.pt or by --init_from=checkpoint --checkpoint_path=FILE')
    path = path or init_from
    n_head = settings['n_head'] if 'n_head' in explicit else None
    state = checkpoint.load(path, n_head)
    if state.get('lora'):
        raise ValueError(f'{path} holds a LoRA adapter alone: resume its run, or begin with what sample.py '
                         '--export=FOLDER writes')
    return Start(path, state['model_args'], state['model'], state.get('tokenizer'))


def find_run(out_dir, checkpoint_path, auto_resume) -> Start:
    """Return the run to resume; path == '' if there is none. auto_resume prefers that of out_dir."""
    start = Start()
    if auto_resume or not checkpoint_path:
        start = read_chosen(partial(checkpoint.load_newest, out_dir, rename_damaged=True))
    if checkpoint_path and not start.path:
        start.take(checkpoint.load(checkpoint_path), checkpoint_path)
    if start.path and 'optimizer' not in start.state:
        raise ValueError(f'{start.path} holds weights only (best.pt?): resume from ckpt.pt or a numbered '
                         'one, or begin with its weights by --init_from=checkpoint --checkpoint_path=FILE')
    return start


def adopted_settings(start: Start, settings: dict, explicit: set, accepted: dict) -> dict:
    """Return the settings that a run takes over from its start. Flags win, and their changes are printed.

    accepted  values of each setting of train.py
    """
    resumes, args, progress = start.state is not None, start.model_args or {}, start.progress
    stored = {name: args[name] for name in SHAPE if name in args}
    if resumes:
        stored['optimizer'] = 'adamw'
        if 'format' in start.state:  # nanoGPT's settings mean other things
            stored |= start.settings
    stored = {name: checked(value, accepted[name], f'{start.path}: {name} = {value!r}')
              for name, value in stored.items() if name in settings and name not in PER_START}
    changed = [name for name in sorted(explicit & stored.keys()) if settings[name] != stored[name]]
    for name in changed:
        now, before, remedy = settings[name], stored[name], f'give --{name}={stored[name]}'
        if name == 'block_size' and not resumes:
            if now < before:
                continue
            remedy += ' or less'
        if name in FIXED_ON_RESUME:
            raise ValueError(f'{name}={now}: {printable(start.path)} has {name}={before}: {remedy}')
        print0(f'{name} = {now!r} from now on, was {before!r}')

    other_windows = ', '.join(name for name in changed if name in EVALUATION)
    if resumes and other_windows and progress.best_val_loss < float('inf'):
        print0(f'{other_windows} changed: the best validation loss of {progress.best_val_loss:.4f} was '
               'measured on other windows, a new best is kept from here on')
        progress.best_val_loss, progress.since_best = float('inf'), 0
    return {name: value for name, value in stored.items() if name not in explicit}


def make_model(start: Start, settings: dict, vocab_size: int, dataset_meta: dict, dtype) -> GPT:
    """Make the model to train: new, with the weights of the start, or in its shape for restore() to fill.

    vocab_size, dataset_meta  of the dataset's tokenizer
    dtype                     of the matrix products
    """
    dropout, block_size, path = settings['dropout'], settings['block_size'], start.path
    if start.model_args is None:
        if settings['lora_rank']:
            raise ValueError(f'lora_rank={settings["lora_rank"]}: an adapter needs a base model, name it by '
                             '--init_from')
        shape = {name: settings[name] for name in SHAPE}
        return GPT(GPTConfig(vocab_size=pretrained.padded(vocab_size), dropout=dropout, **shape))

    n_rows, packed_with = start.model_args['vocab_size'], fingerprint(dataset_meta)
    trained_with, size = 'unknown', f'at most {n_rows}'
    if start.tokenizer_meta:
        trained_with, size = fingerprint(start.tokenizer_meta), vocab_size_of(start.tokenizer_meta)
    elif start.state is None:
        print0(f'{path} does not say its tokenizer: taking that of {settings["dataset"]}')
    if vocab_size > n_rows or trained_with not in ('unknown', packed_with):
        raise ValueError(f'{path} was trained with tokenizer {trained_with} of {size} tokens, dataset '
                         f'{settings["dataset"]} was packed with {packed_with} of {vocab_size}: '
                         'use the dataset it was trained on, or pack with its tokenizer')

    if settings['lora_rank']:
        if start.lora is None:
            start.lora = dict(base=path, checksum=None, **{name: settings[name] for name in LORA_SETTINGS})
        if dtype != torch.bfloat16:
            dtype = torch.float32  # float16 has too little range to train on
        return load_adapted(start, dtype, block_size)
    if start.weights is None:
        return GPT.from_pretrained(path, dropout, block_size, vocab_size=pretrained.padded(n_rows))
    model = GPT(GPTConfig(**start.model_args | {'dropout': dropout}))
    if start.state is None:
        foreign.load_weights(model, start.weights, path, settings['strict'])
        model.crop_block_size(block_size)
    return model


def load_adapted(start: Start, dtype, block_size: int) -> GPT:
    """Load the base model of an adapter, frozen, and put a new adapter beside it."""
    adapter, path, read_dtype = start.lora, start.lora['base'], torch.float32
    if dtype == torch.bfloat16:  # float16 would change the checksum
        read_dtype = dtype
    base = Start(path)
    try:
        if path.endswith('.pt'):
            base.take(checkpoint.load(path, start.model_args['n_head']), path)
        model = load_plain(base, read_dtype)
    except FileNotFoundError:
        raise ValueError(f'{path}, the base model of the adapter, is missing: put it back') from None
    checksum = lora.checksum(model)
    if adapter['checksum'] not in (None, checksum):  # None: a new adapter
        raise ValueError(f'{path} is not the model that the adapter was trained beside: put that one there')
    adapter['checksum'] = checksum
    model.to(dtype).crop_block_size(block_size)
    lora.add(model, *(adapter[name] for name in LORA_SETTINGS))
    return model


def load_plain(start: Start, dtype, strict: bool = True) -> GPT:
    """Load a model that is no adapter."""
    if start.weights is None:
        return GPT.from_pretrained(start.path, dtype=dtype)
    model = GPT(GPTConfig(**start.model_args)).to(dtype)
    foreign.load_weights(model, start.weights, start.path, strict)
    return model


# -----------------------------------------------------------------------------
# a trained model for sampling, chat and evaluation


def find_start(init_from='resume', out_dir='out', checkpoint_path='', n_head=None, tokenizer='') -> Start:
    """Find a trained model and its tokenizer: init_from, or with 'resume' a checkpoint.

    checkpoint_path  '' = that of out_dir
    n_head           for a checkpoint_path of weights alone
    tokenizer        name or folder of the tokenizer to use; '' = the model's own
    """
    named = tokenizer_meta(tokenizer) if tokenizer else None
    if init_from != 'resume':
        meta = named or pretrained.read_tokenizer(init_from)
        if meta is None:
            print0(f"{init_from} has no tokenizer.json: using GPT-2's tokenizer")
        return Start(init_from, tokenizer_meta=meta or GPT2_META, style=pretrained.read_style(init_from))
    if checkpoint_path:
        start = Start()
        start.take(checkpoint.load(checkpoint_path, n_head), checkpoint_path)
    else:
        start = read_chosen(partial(choose_checkpoint, out_dir))
    start.state = None  # nothing is resumed
    dataset = start.settings.get('dataset', '')
    start.tokenizer_meta = named or start.tokenizer_meta or nanogpt_tokenizer(dataset)
    return start


def choose_checkpoint(out_dir):
    """Return (state, path) of the newest checkpoint; of the best with always_save_checkpoint=False."""
    state, path = checkpoint.load_newest(out_dir)
    best = Path(out_dir) / 'best.pt'
    wants_best = state is None or not state['config'].get('always_save_checkpoint', True)
    if wants_best and best.exists():
        return checkpoint.load(best), best
    if state is None:
        raise FileNotFoundError(f'{out_dir} has no checkpoint: train one with python train.py '
                                f'--out_dir={out_dir}, or name another --out_dir')
    return state, path


def nanogpt_tokenizer(dataset):
    """Return the tokenizer of the dataset of a checkpoint if data/ has it, else GPT-2's, as nanoGPT does."""
    # a checkpoint from elsewhere must not open folders outside data/
    if isinstance(dataset, str) and dataset and not re.search(r'[/\\]|\.\.', dataset):
        folder = dataset_folders(dataset)[0][0]
        for file in (folder / 'meta.pkl', folder / 'meta.json'):  # nanoGPT's, even without the tokens
            if file.exists():
                print0(f'no tokenizer in the checkpoint: using that of {file}')
                return read_meta_pkl(file) if file.suffix == '.pkl' else read_meta(folder)['tokenizer']
    print0("no tokenizer in the checkpoint: using GPT-2's, as nanoGPT does. If it was trained on characters, "
           f'copy the meta.pkl of dataset {printable(repr(dataset))} into data/NAME/')
    return GPT2_META


def build_model(start: Start, dtype=torch.float32, strict=True, merge=True) -> GPT:
    """Build a trained model on the CPU for inference, with parameters of a dtype.

    strict  False: accept and list missing or unexpected weights of a checkpoint
    merge   False: leave a LoRA adapter beside the weights of its base
    """
    tokenizer, iteration = start.tokenizer, ''  # a damaged tokenizer fails before the weights are read
    if start.lora:
        model = load_adapted(start, dtype, start.model_args['block_size'])
        foreign.load_weights(model, start.weights, start.path)
        if merge:
            lora.merge(model)
    else:
        model = load_plain(start, dtype, strict)
    if start.weights is not None:
        iteration = f'iteration {start.progress.iter_num:,}, '
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f'{start.path} has a vocabulary of {model.config.vocab_size}, its tokenizer '
                         f'{tokenizer.vocab_size} tokens: one belongs to another model')
    print0(f'{start.path}: {iteration}{model.get_num_params() / 1e6:.2f}M parameters, '
           f'{tokenizer.kind} tokenizer')
    return model.eval()
