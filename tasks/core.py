"""CORE (DCLM, arXiv:2406.11794): the mean centred accuracy over the tasks of a bundle, as in nanochat.

    bundle = read_core('eval_bundle', tokenizer, max_examples=500)
    numbers = evaluate_core(score, tokenizer, bundle, block_size=block_size)

A bundle is a folder with core.yaml, eval_meta_data.csv and eval_data/. `score` is scoring.score_rows for a
model.
"""

import csv
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from files import json_lines
from scoring import Row, RowScore
from tasks.items import check_gold, mean_stderr
from tokens.tokenizer import opening

KINDS = ('multiple_choice', 'schema', 'language_modeling')
# raised by values of an unexpected form
WRONG_TYPES = (KeyError, TypeError, ValueError, AttributeError, IndexError)


@dataclass
class CoreTask:
    label: str
    kind: str  # one of KINDS
    n_shots: int  # examples with their answers before each item
    delimiter: str  # between a question and its answer
    baseline: float  # accuracy of guessing
    path: Path
    items: list[dict] = field(default_factory=list)


# -----------------------------------------------------------------------------
# reading


def read_core(folder: str, tokenizer, max_examples: int = 0) -> list[CoreTask]:
    """Read the tasks of a bundle, and check that each item can be scored.

    max_examples  of each task, the first ones of its seeded order; 0 = all
    raises        OSError, ValueError in one line
    """
    tasks = read_tasks(Path(folder))
    for task in tasks:
        if task.kind not in KINDS:
            raise ValueError(f'{Path(folder) / "core.yaml"}: {task.label} is {task.kind}, '
                             f'accepted are {", ".join(KINDS)}')
        with open(task.path, 'rb') as f:
            items = [item for _, item in json_lines(f, task.path)]
        if not items:
            raise ValueError(f'{task.path} has no items')
        random.Random(1337).shuffle(items)
        task.items = items[:max_examples or None]
        for item in task.items:
            check_item(task, item, tokenizer)
        if task.n_shots >= len(task.items):
            raise ValueError(f'{task.path}: {task.n_shots} examples are shown before each of '
                             f'{len(task.items)} items: give a larger --max_examples')
    return tasks


def read_tasks(folder):
    """Read core.yaml and the baselines in eval_meta_data.csv."""
    import yaml
    try:
        described = yaml.safe_load((folder / 'core.yaml').read_text(encoding='utf-8-sig'))['icl_tasks']
        with open(folder / 'eval_meta_data.csv', encoding='utf-8-sig', newline='') as f:
            baselines = {row['Eval Task']: float(row['Random baseline']) / 100 for row in csv.DictReader(f)}
        return [CoreTask(label=task['label'], kind=task['icl_task_type'], n_shots=task['num_fewshot'][0],
                         delimiter=task.get('continuation_delimiter', ' '), baseline=baselines[task['label']],
                         path=folder / 'eval_data' / task['dataset_uri']) for task in described]
    except (*WRONG_TYPES, yaml.YAMLError) as error:
        reason = ' '.join(str(error).split())
        raise ValueError(f'--core={folder} is not a CORE bundle ({type(error).__name__}: {reason})') from None


def check_item(task, item, tokenizer):
    """Raise ValueError for an item of another form, or with a character that the tokenizer lacks."""
    try:
        texts = texts_of(task, item, [item])
        if task.kind != 'language_modeling':
            check_gold(item['gold'], len(texts))
        for text in texts:
            tokenizer.encode(text)
    except WRONG_TYPES as error:
        raise ValueError(f'{task.path}: {str(item)[:100]} cannot be an item of {task.kind} '
                         f'({type(error).__name__}: {error})') from None


# -----------------------------------------------------------------------------
# scores


def evaluate_core(score, tokenizer, bundle: list[CoreTask], *, block_size: int) -> dict:
    """Score a bundle.

    returns  {'n': items, 'core': the metric, 'tasks': {label: numbers}}; the numbers of a task are n, acc,
             acc_stderr, centered and shots
    """
    tasks = {}
    for task in bundle:
        groups = [rows_of(task, i, tokenizer, block_size=block_size) for i in range(len(task.items))]
        scores = iter(score([row for rows in groups for row in rows], task.label))
        hits = []
        for item, rows in zip(task.items, groups, strict=True):
            hits.append(is_right(task, item, [next(scores) for _ in rows]))
        numbers = mean_stderr('acc', hits)
        centered = (numbers['acc'] - task.baseline) / (1 - task.baseline)
        tasks[task.label] = dict(n=len(task.items), **numbers, centered=centered, shots=task.n_shots)
    n_items = sum(numbers['n'] for numbers in tasks.values())
    core = float(np.mean([numbers['centered'] for numbers in tasks.values()]))
    return dict(n=n_items, core=core, tasks=tasks)


def rows_of(task: CoreTask, i: int, tokenizer, *, block_size: int) -> list[Row]:
    """The rows of item i, after examples drawn from the other items: one per text, one for language_modeling.

    Only the last block_size tokens of a text are kept, as nanochat does.
    """
    others = [n for n in range(len(task.items)) if n != i]
    shown = [task.items[n] for n in random.Random(1234 + i).sample(others, task.n_shots)]
    texts = [opening(tokenizer) + tokenizer.encode(text) for text in texts_of(task, task.items[i], shown)]
    if task.kind == 'schema':  # the contexts differ, and the end that they share is scored
        n_shared = shared_length([ids[::-1] for ids in texts])
        starts = [len(ids) - n_shared for ids in texts]
    else:
        starts = [shared_length(texts)] * len(texts)
    if task.kind == 'language_modeling':
        texts, starts = texts[1:], starts[1:]
    rows = []
    for ids, start in zip(texts, starts, strict=True):
        n_cut = max(len(ids) - block_size, 0)
        rows.append(Row(np.array(ids[n_cut:], dtype=np.int32), max(start - n_cut, 1)))
    return rows


def texts_of(task: CoreTask, item: dict, shown: list[dict]) -> list[str]:
    """The texts of an item, one per choice or context.

    For language_modeling: the prompt, and the prompt with its continuation.
    """
    end = task.delimiter
    if task.kind == 'multiple_choice':
        before = ''.join(f'{each["query"]}{end}{each["choices"][each["gold"]]}\n\n' for each in shown)
        return [f'{before}{item["query"]}{end}{choice}' for choice in item['choices']]
    if task.kind == 'schema':
        before = ''.join(f'{each["context_options"][each["gold"]]}{end}{each["continuation"]}\n\n'
                         for each in shown)
        return [f'{before}{context}{end}{item["continuation"]}' for context in item['context_options']]
    before = ''.join(f'{each["context"].strip()}{end}{each["continuation"]}\n\n' for each in shown)
    prompt = f'{before}{item["context"].strip()}{end}'
    return [prompt.strip(), prompt + item['continuation']]


def shared_length(sequences):
    """Number of tokens that all sequences share at their beginning."""
    shared = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return shared


def is_right(task: CoreTask, item: dict, scores: list[RowScore]) -> bool:
    """Whether the right text has the smallest loss per token; or each token is the most likely one."""
    if task.kind == 'language_modeling':
        return scores[0].is_greedy
    # a text without tokens of its own has no loss; min() then takes the first text, as in nanochat
    losses = [-row.log_likelihood / row.n_tokens if row.n_tokens else math.nan for row in scores]
    return losses.index(min(losses)) == item['gold']
