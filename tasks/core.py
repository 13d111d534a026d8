"""CORE (DCLM, arXiv:2406.11794): the mean centred accuracy over the tasks of a bundle, as in nanochat.

`score` is training.scoring.score_rows for a model.
"""

import csv
import math
import random
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.items import WRONG_FORM, Item, by_item, checked, mean_stderr
from tasks.sources import read_file
from tokens.tokenizer import opening
from training.scoring import Row, cut_left


def multiple_choice(raw: dict) -> Item:
    return Item([(raw['query'], choice) for choice in raw['choices']], raw['gold'])


def schema(raw: dict) -> Item:
    return Item([(context, raw['continuation']) for context in raw['context_options']], raw['gold'])


def language_modeling(raw: dict) -> Item:
    return Item([(raw['context'].strip(), raw['continuation'])])


KINDS = dict(multiple_choice=multiple_choice, schema=schema, language_modeling=language_modeling)


class CoreTask(NamedTuple):
    label: str
    kind: str  # one of KINDS
    n_shots: int  # examples with their answers before each item
    delimiter: str  # between a question and its answer
    baseline: float  # accuracy of guessing
    items: list[Item]


def read_core(folder: str, tokenizer, max_examples: int = 0) -> list[CoreTask]:
    """Read core.yaml, eval_meta_data.csv and eval_data/, and check that each item can be scored.

    max_examples  of each task, after a seeded shuffle; 0 = all
    """
    import yaml
    folder, tasks, source = Path(folder), [], 'core.yaml, eval_meta_data.csv'
    try:
        described = yaml.safe_load((folder / 'core.yaml').read_text(encoding='utf-8-sig'))['icl_tasks']
        with open(folder / 'eval_meta_data.csv', encoding='utf-8-sig', newline='') as f:
            baselines = {row['Eval Task']: float(row['Random baseline']) / 100 for row in csv.DictReader(f)}
        for entry in described:
            source = entry['dataset_uri']
            task = CoreTask(entry['label'], entry['icl_task_type'], entry['num_fewshot'][0],
                            entry.get('continuation_delimiter', ' '), baselines[entry['label']], [])
            raw_items = read_file(folder / 'eval_data' / source)
            random.Random(1337).shuffle(raw_items)
            for raw in raw_items[:max_examples or None]:
                source = f'{entry["dataset_uri"]}, {str(raw)[:100]} as an item of {task.kind}'
                item = checked(KINDS[task.kind](raw))
                for context, continuation in item.pairs:
                    tokenizer.encode(context + task.delimiter + continuation)
                task.items.append(item)
            if task.n_shots >= len(task.items):
                raise ValueError(f'{task.n_shots} examples are shown before each of {len(task.items)} items: '
                                 'give a larger --max_examples')
            tasks.append(task)
    except (*WRONG_FORM, yaml.YAMLError) as error:
        reason = ' '.join(str(error).split())
        raise ValueError(f'--core={folder} is not a CORE bundle for this tokenizer: {source}: '
                         f'{type(error).__name__}: {reason}') from None
    return tasks


def evaluate_core(score, tokenizer, bundle: list[CoreTask], *, block_size: int) -> dict:
    """Score a bundle: {'n': items, 'core': the metric, 'tasks': {label: numbers}}."""
    tasks = {}
    for task in bundle:
        rows = []
        for i in range(len(task.items)):
            rows += rows_of(task, i, tokenizer, block_size=block_size)
        hits = [is_right(task.kind, *scored) for scored in by_item(task.items, score(rows, task.label))]
        numbers = mean_stderr('acc', hits)
        centered = (numbers['acc'] - task.baseline) / (1 - task.baseline)
        tasks[task.label] = dict(n=len(hits), **numbers, centered=centered, shots=task.n_shots)
    n_items = sum(numbers['n'] for numbers in tasks.values())
    core = float(np.mean([numbers['centered'] for numbers in tasks.values()]))
    return dict(n=n_items, core=core, tasks=tasks)


def rows_of(task: CoreTask, i: int, tokenizer, *, block_size: int) -> list[Row]:
    """Return the rows of item i's pairs, after examples drawn from the other items."""
    drawn = random.Random(1234 + i).sample(range(len(task.items) - 1), task.n_shots)
    others = [n if n < i else n + 1 for n in drawn]
    shown = [task.items[n] for n in others]
    answered = [item.pairs[item.gold] for item in shown]
    before = ''.join(f'{context}{task.delimiter}{answer}\n\n' for context, answer in answered)
    prompts = [f'{before}{context}{task.delimiter}' for context, _ in task.items[i].pairs]
    texts = [prompt + answer for prompt, (_, answer) in zip(prompts, task.items[i].pairs, strict=True)]
    texts = [opening(tokenizer) + tokenizer.encode(text) for text in texts]

    # scored is the end that the texts share, or all after their shared beginning, or all after the prompt
    if task.kind == 'schema':
        n_shared = shared_length([ids[::-1] for ids in texts])
        starts = [len(ids) - n_shared for ids in texts]
    elif task.kind == 'multiple_choice':
        starts = [shared_length(texts)] * len(texts)
    else:
        starts = [shared_length([opening(tokenizer) + tokenizer.encode(prompts[0].strip()), *texts])]
    rows = []
    for ids, start in zip(texts, starts, strict=True):
        rows.append(cut_left(Row(np.array(ids, dtype=np.int32), start), block_size))  # as nanochat does
    return rows


def shared_length(sequences):
    """Count the tokens that all sequences share at their beginning."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))


def is_right(kind, item, scores):
    """Whether the right text has the smallest loss per token, or each token is the most likely one."""
    if kind == 'language_modeling':
        return scores[0].is_greedy
    # a text without tokens of its own has no loss; min() then takes the first text, as in nanochat
    losses = [-row.log_likelihood / (row.n_tokens or math.nan) for row in scores]
    return losses.index(min(losses)) == item.gold
