"""Multiple-choice benchmarks and LAMBADA: from items to rows of tokens, from scores to accuracies.

Prompts, choices and accuracies are those of lm-evaluation-harness 0.4.13 without examples in the prompt.
`score` is training.scoring.score_rows for a model: (rows, title) -> [RowScore].
"""

import math
import re
import string
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

import distributed
from files import print0, printable
from tasks.sources import own_form, read_items
from tokens.tokenizer import opening
from training.scoring import Row, RowScore

TYPICAL = string.ascii_letters + string.digits + ' .,:\'"'  # occur in every benchmark
WRONG_FORM = (KeyError, TypeError, ValueError, AttributeError, IndexError)  # raised by items of another form


class Item(NamedTuple):
    pairs: list[tuple[str, str]]  # a context and what follows it, for each choice
    gold: int = 0  # number of the right choice


class Benchmark(NamedTuple):
    items: list[Item]
    rows: list[Row]  # of each pair of each item, in order
    source: str


def hellaswag(raw: dict) -> Item:
    context = clean_wikihow(f'{raw["activity_label"]}: {raw["ctx_a"]} {raw["ctx_b"].capitalize()}')
    return Item([(context, clean_wikihow(ending)) for ending in raw['endings']], int(raw['label']))


def clean_wikihow(text):
    text = text.strip().replace(' [title]', '. ')
    return re.sub(r'\[.*?\]', '', text).replace('  ', ' ')


def lambada(raw: dict) -> Item:
    context, _, last_word = raw['text'].rpartition(' ')
    return Item([(context, last_word)])


def arc(raw: dict) -> Item:
    return openbookqa({**raw, 'question_stem': f'Question: {raw["question"]}\nAnswer:'})


def openbookqa(raw: dict) -> Item:
    gold = raw['choices']['label'].index(raw['answerKey'].lstrip())
    return Item([(raw['question_stem'], choice) for choice in raw['choices']['text']], gold)


def piqa(raw: dict) -> Item:
    context = f'Question: {raw["goal"]}\nAnswer:'
    return Item([(context, raw['sol1']), (context, raw['sol2'])], int(raw['label']))


def winogrande(raw: dict) -> Item:
    """Score the same ending after either name (arXiv:1806.02847)."""
    before, _, after = raw['sentence'].partition('_')
    pairs = [(before + raw[name], after.strip()) for name in ('option1', 'option2')]
    return Item(pairs, int(raw['answer']) - 1)


def copa(raw: dict) -> Item:
    context = raw['premise'].strip()[:-1] + {'cause': ' because', 'effect': ' therefore'}[raw['question']]
    # prepare() adds a space before each choice, so two spaces stand there, as in the harness
    pairs = [(context, f' {choice[0].lower()}{choice[1:]}') for choice in (raw['choice1'], raw['choice2'])]
    return Item(pairs, int(raw['label']))


TASKS = dict(hellaswag=hellaswag, lambada=lambada, arc_easy=arc, arc_challenge=arc, piqa=piqa,
             winogrande=winogrande, copa=copa, openbookqa=openbookqa)


def read_benchmarks(names: list[str], eval_dir: str, max_examples: int, *, tokenizer,
                    skip_unwritable: bool = False) -> dict[str, Benchmark]:
    """Make benchmarks ready to be scored. The first rank reads or downloads their items.

    max_examples     of each benchmark; 0 = all
    skip_unwritable  skip a benchmark with a character that the tokenizer lacks
    """
    if skip_unwritable and not eval_dir:
        try:
            tokenizer.encode(TYPICAL)
        except ValueError as error:  # known without a download
            print0(f'skipping {", ".join(names)}: {error}')
            return {}
    benchmarks = {}
    for name, (items, source) in distributed.on_first_rank(lambda: read_items(names, eval_dir)).items():
        try:
            benchmarks[name] = prepare(name, items[:max_examples or None], source, tokenizer=tokenizer)
        except ValueError as error:
            if not skip_unwritable:
                raise
            print0(f'skipping {name}: {printable(str(error))}')
    return benchmarks


def prepare(name: str, raw_items: list[dict], source: str, *, tokenizer) -> Benchmark:
    """Make a benchmark of items in the form of their dataset. ValueError names an item of another form."""
    items, rows = [], []
    for i, raw in enumerate(raw_items):
        try:
            item = checked(TASKS[name](own_form(raw)))
            rows += [encode_pair(tokenizer, context, f' {choice}') for context, choice in item.pairs]
            items.append(item)
        except WRONG_FORM as error:
            raise ValueError(f'{source}: item {i} cannot be scored as one of {name} with this tokenizer '
                             f'({type(error).__name__}: {error})') from None
    if not items:
        raise ValueError(f'{source} has no items of {name}')
    return Benchmark(items, rows, source)


def checked(item: Item) -> Item:
    if not 0 <= item.gold < len(item.pairs):  # test splits that keep their answers secret say -1
        raise ValueError(f'the right choice is number {item.gold} of {len(item.pairs)}, counted from 0')
    return item


def encode_pair(tokenizer, context: str, continuation: str) -> Row:
    """Encode two texts as one; score the tokens after those of the context without its last spaces."""
    before, whole = tokenizer.encode(context.rstrip()), tokenizer.encode(context + continuation)
    first = tokenizer.prefix if before else opening(tokenizer)
    before, whole = first + before, first + whole
    if len(whole) <= len(before):
        raise ValueError(f'{continuation!r} has no token of its own after {context[-40:]!r}')
    return Row(np.array(whole, dtype=np.int32), len(before))


def evaluate_task(score, name: str, benchmark: Benchmark) -> dict:
    scores = score(benchmark.rows, name)
    numbers = dict(n=len(benchmark.items), source=benchmark.source)
    if name != 'lambada':
        return numbers | choice_accuracies(benchmark.items, scores)
    numbers |= mean_stderr('acc', [row.is_greedy for row in scores])
    nats, *stderr = mean_stderr('nats', [-row.log_likelihood for row in scores]).values()
    numbers['perplexity'] = math.exp(min(nats, 700))  # e^709 is the largest float
    if stderr:
        numbers['perplexity_stderr'] = numbers['perplexity'] * stderr[0]  # to first order
    return numbers


def choice_accuracies(items: list[Item], scores: list[RowScore]) -> dict:
    """Count how often the most likely choice is right: in total, per character, per byte, per token."""
    hits = dict(acc=[], acc_norm=[], acc_bytes=[], acc_tokens=[])
    for item, rows in by_item(items, scores):
        nats = [row.log_likelihood for row in rows]
        choices = [choice for _, choice in item.pairs]
        sizes = dict(acc=[1] * len(rows), acc_norm=[len(choice) for choice in choices],
                     acc_bytes=[len(choice.encode()) for choice in choices],
                     acc_tokens=[row.n_tokens for row in rows])
        for name, units in sizes.items():
            # an empty choice is never taken
            per_unit = np.where(np.array(units) > 0, nats / np.maximum(units, 1), -math.inf)
            hits[name].append(per_unit.argmax() == item.gold)
    numbers = {}
    for name, values in hits.items():
        numbers |= mean_stderr(name, values)
    return numbers


def by_item(items: list[Item], scores: list[RowScore]) -> Iterator:
    """Yield each item with the scores of its pairs."""
    remaining = iter(scores)
    for item in items:
        yield item, list(islice(remaining, len(item.pairs)))


def mean_stderr(name: str, values) -> dict:
    """Return a mean and its standard error by name; a single value has no error."""
    values = np.asarray(values, dtype=np.float64)
    numbers = {name: float(values.mean())}
    if len(values) > 1:
        numbers[f'{name}_stderr'] = float(values.std(ddof=1) / math.sqrt(len(values)))
    return numbers
