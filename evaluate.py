"""Evaluate a model: bits per byte, multiple choice, LAMBADA, CORE. Settings are the names below, see --help.

    python evaluate.py --out_dir=out-quickstart --tasks=bpb
    python evaluate.py --init_from=gpt2 --tasks=hellaswag,lambada --max_examples=1000
    torchrun --standalone --nproc_per_node=8 evaluate.py --out_dir=out --core=eval_bundle

It prints a table and writes out_dir/eval.json. Prompts, choices and scores are those of
lm-evaluation-harness 0.4.13 without examples in the prompt. docs/EVALUATE.md explains the numbers.
"""

import os
import time
from functools import partial
from pathlib import Path
from typing import Literal

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # as in train.py

import torch

import devices
import distributed
from configurator import config_of, configure
from files import one_line_errors, print0, printable, write_json
from report import table_row
from tasks.items import TASKS
from tokens.dataset import dataset_folders
from tokens.loader import Loader
from tokens.tokenizer import fingerprint
from training.benchmarks import open_tasks
from training.scoring import score_rows, spread_windows, text_loss
from weights.begin import build_model, find_start

# -----------------------------------------------------------------------------
# model
init_from = 'resume'  # the checkpoint in out_dir; or gpt2 ... gpt2-xl, a transformers folder, an .npz file
out_dir = 'out'
checkpoint_path = ''  # this file instead of the checkpoint in out_dir; may be another trainer's
n_head: int | None = None  # for a checkpoint_path that does not store it
tokenizer = ''  # gpt2, byte, or a folder with tokenizer.json, for a model that has none
# tasks
tasks = 'bpb,hellaswag,lambada,arc_easy,piqa,winogrande,copa,openbookqa'  # also arc_challenge; empty = none
core = ''  # folder of the CORE bundle: core.yaml, eval_meta_data.csv, eval_data/
max_examples = 0  # items of each task, or windows of block_size tokens for bpb; 0 = all
dataset = ''  # dataset for bpb; empty = the one that the checkpoint was trained on
eval_dir = ''  # read TASK.jsonl or TASK_*.jsonl in this folder instead of downloading
results = ''  # JSON file to write; empty = out_dir/eval.json if the model is out_dir's or out_dir is given
# system
batch_tokens = 8192  # tokens of one forward pass at most; a longer row is a batch of its own
device = 'auto'  # cpu, cuda, cuda:1, mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
# -----------------------------------------------------------------------------


def open_text(trained, block_size: int) -> Loader:
    """Open the validation split for bpb, cut into windows as in training if it is the same dataset."""
    training = trained.settings
    name = dataset or training.get('dataset', '')
    if not name or name.startswith('stream:'):
        raise ValueError(f'bpb needs a packed text, the model was trained on {name or "an unknown one"}: '
                         'name one packed with its tokenizer by --dataset, or leave bpb out of --tasks')
    order, isolate = 'sequential', False
    if name == training.get('dataset'):
        isolate = training.get('isolate_documents', False)
        if training.get('sampling') == 'documents':
            order = 'documents'
    loader = Loader(dataset_folders(name)[0], 'val', block_size=block_size,
                    batch_size=max(1, batch_tokens // block_size), order=order, isolate=isolate)
    if fingerprint(loader.tokenizer_meta) != fingerprint(trained.tokenizer_meta):
        raise ValueError(f'dataset {name} was packed with another tokenizer than that of the model: '
                         'name one that fits by --dataset')
    return loader


if __name__ == '__main__':
    with one_line_errors():
        explicit = configure(globals())
        settings = config_of(globals())
        names = [name.strip() for name in tasks.split(',') if name.strip()]
        for name in names:
            if name not in ('bpb', *TASKS):
                raise ValueError(f'--tasks={tasks}: {name!r} is not a task, '
                                 f'accepted are bpb, {", ".join(TASKS)}')
        if core:
            names.append('core')
        if not names:
            raise ValueError('--tasks is empty and there is no --core: nothing to evaluate')
        if max_examples < 0 or batch_tokens < 1:
            raise ValueError(f'--max_examples={max_examples} --batch_tokens={batch_tokens}: '
                             'accepted are 0 or more, and 1 or more')

        # the model, its tokenizer and the items
        place = distributed.start(device)
        started_s = time.perf_counter()
        precision = devices.choose_dtype(dtype, place.device)
        autocast = torch.autocast(place.device.type, precision, enabled=precision != torch.float32)
        trained = find_start(init_from, out_dir, checkpoint_path, n_head, tokenizer)
        model = build_model(trained).to(place.device)
        block_size, text = model.config.block_size, None
        if 'bpb' in names:
            text = open_text(trained, block_size)
        benchmarks = open_tasks([name for name in names if name != 'bpb'], settings, trained.tokenizer,
                                block_size, skip_unwritable='tasks' not in explicit)

        # evaluate
        numbers = {}
        score = partial(score_rows, model, batch_tokens=batch_tokens, place=place, autocast=autocast)
        if text is not None:
            windows = spread_windows(text, max_examples)
            token_bytes = torch.from_numpy(trained.tokenizer.token_bytes()).to(place.device)
            loss = text_loss(model, text, windows, token_bytes=token_bytes, place=place, autocast=autocast)
            numbers['bpb'] = dict(
                n=len(windows), loss=loss.nats_per_target, bpb=loss.bits_per_byte, tokens=loss.n_targets,
                bytes=loss.n_bytes, source=', '.join(str(split.folder) for split in text.splits))
            print0(table_row('bpb', numbers['bpb']))
        for name, measure in benchmarks.items():
            numbers[name] = measure(score)
            for label, task_numbers in numbers[name].get('tasks', {}).items():
                print0(table_row(label, task_numbers))
            print0(table_row(name, numbers[name]))

        # write the results: not to the default out_dir if the model is another one
        is_of_out_dir = init_from == 'resume' and not checkpoint_path
        if not results and (is_of_out_dir or 'out_dir' in explicit):
            results = f'{out_dir}/eval.json'
        if results and place.is_master:
            Path(results).parent.mkdir(parents=True, exist_ok=True)
            write_json(results, dict(
                model=trained.path, iter=trained.weights and trained.progress.iter_num,
                parameters=model.get_num_params(False), dtype=str(precision).removeprefix('torch.'),
                device=devices.device_name(place.device), torch=torch.__version__,
                tokenizer=fingerprint(trained.tokenizer_meta),
                seconds=round(time.perf_counter() - started_s, 1), settings=settings, results=numbers))
        if results:
            print0(f'{printable(results)}: written')
        else:
            print0('to keep these numbers as JSON, name a file with --results=FILE')
        distributed.stop()
