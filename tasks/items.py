"""Multiple-choice benchmarks and LAMBADA: from items to rows of tokens, from scores to accuracies.

    benchmarks = read_benchmarks(['hellaswag', 'lambada'], '', 1000, tokenizer=tokenizer)
    numbers = evaluate_task(score, 'hellaswag', benchmarks['hellaswag'])     # {'n': 1000, 'acc': ..., ...}

Prompts, choices and accuracies are those of lm-evaluation-harness 0.4.13 without examples in the prompt; the
tests compare them item by item. `score` is scoring.score_rows for a model: (rows, title) -> [RowScore].
"""

import math
import re
import string
from typing import NamedTuple

import numpy as np

import distributed
from files import print0, printable
from scoring import Row, RowScore
from tasks import sources
from tokens.tokenizer import opening

TYPICAL = string.ascii_letters + string.digits + ' .,:\'"'  # characters that occur in every benchmark


class Item(NamedTuple):
    pairs: list[tuple[str, str]]  # a context and what follows it, for each choice
    gold: int  # number of the right choice


class Benchmark(NamedTuple):
    items: list[Item]
    rows: list[Row]  # of each pair of each item, in order
    source: str


class Unwritable(ValueError):
    """The tokenizer lacks a character of an item."""


# -----------------------------------------------------------------------------
# items


def hellaswag(item: dict) -> Item:
    context = clean_wikihow(f'{item["activity_label"]}: {item["ctx_a"]} {item["ctx_b"].capitalize()}')
    return Item([(context, clean_wikihow(ending)) for ending in item['endings']], int(item['label']))


def clean_wikihow(text):
    text = text.strip().replace(' [title]', '. ')
    return re.sub(r'\[.*?\]', '', text).replace('  ', ' ')


def lambada(item: dict) -> Item:
    context, _, last_word = item['text'].rpartition(' ')
    return Item([(context, last_word)], 0)


def arc(item: dict) -> Item:
    context = f'Question: {item["question"]}\nAnswer:'
    choices = item['choices']
    return Item([(context, choice) for choice in choices['text']], choices['label'].index(item['answerKey']))


def openbookqa(item: dict) -> Item:
    choices = item['choices']
    gold = choices['label'].index(item['answerKey'].lstrip())
    return Item([(item['question_stem'], choice) for choice in choices['text']], gold)


def piqa(item: dict) -> Item:
    context = f'Question: {item["goal"]}\nAnswer:'
    return Item([(context, item['sol1']), (context, item['sol2'])], int(item['label']))


def winogrande(item: dict) -> Item:
    """Score the same ending after either name (arXiv:1806.02847)."""
    before, _, after = item['sentence'].partition('_')
    pairs = [(before + item[name], after.strip()) for name in ('option1', 'option2')]
    return Item(pairs, int(item['answer']) - 1)


def copa(item: dict) -> Item:
    context = item['premise'].strip()[:-1] + {'cause': ' because', 'effect': ' therefore'}[item['question']]
    # encode() adds a space before each choice, so two spaces stand there, as in the harness
    pairs = [(context, f' {choice[0].lower()}{choice[1:]}') for choice in (item['choice1'], item['choice2'])]
    return Item(pairs, int(item['label']))


TASKS = dict(hellaswag=hellaswag, lambada=lambada, arc_easy=arc, arc_challenge=arc, piqa=piqa,
             winogrande=winogrande, copa=copa, openbookqa=openbookqa)


# -----------------------------------------------------------------------------
# benchmarks


def read_benchmarks(names: list[str], eval_dir: str, max_examples: int, *, tokenizer,
                    skip_unwritable: bool = False) -> dict[str, Benchmark]:
    """Read benchmarks and make them ready to be scored. The first rank reads and downloads for all.

    max_examples     of each benchmark; 0 = all
    skip_unwritable  leave a benchmark out, with one line, if the tokenizer lacks a character of it
    raises           OSError, ValueError in one line
    """
    if skip_unwritable and not eval_dir:
        try:
            tokenizer.encode(TYPICAL)
        except ValueError as error:  # nothing needs to be downloaded to know this
            print0(f'skipping {", ".join(names)}: {error}')
            return {}
    found = distributed.on_first_rank(lambda: sources.read_items(names, eval_dir))
    benchmarks = {}
    for name, (items, source) in found.items():
        try:
            benchmarks[name] = prepare(name, items[:max_examples or None], source, tokenizer=tokenizer)
        except Unwritable as error:
            if not skip_unwritable:
                raise
            print0(f'skipping {name}: {printable(str(error))}')
    return benchmarks


def prepare(name: str, raw_items: list[dict], source: str, *, tokenizer) -> Benchmark:
    """Make a benchmark of items as their dataset has them. ValueError names an item of another form."""
    items, rows = [], []
    for i, raw_item in enumerate(raw_items):
        try:
            item = TASKS[name](raw_item)
            check_gold(item.gold, len(item.pairs))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f'{source}: item {i} cannot be an item of {name} '
                             f'({type(error).__name__}: {error})') from None
        try:
            rows += [encode_pair(tokenizer, context, ' ' + choice) for context, choice in item.pairs]
        except ValueError as error:
            raise Unwritable(f'{source}: item {i} cannot be scored with this tokenizer: {error}') from None
        items.append(item)
    if not items:
        raise ValueError(f'{source} has no items of {name}')
    return Benchmark(items, rows, source)


def check_gold(gold, n_choices):
    if not 0 <= gold < n_choices:  # test splits that keep their answers secret say -1
        raise ValueError(f'the right choice is number {gold} of {n_choices}, counted from 0')


def encode_pair(tokenizer, context: str, continuation: str) -> Row:
    """Encode a context and its continuation as one text; score the tokens after those of the context alone.

    Spaces at the end of the context belong to the continuation, because byte-level BPE joins a space and the
    word after it.
    """
    bare = context.rstrip()
    if bare:
        before, whole = tokenizer.encode(bare), tokenizer.encode(context + continuation)
    else:
        before = opening(tokenizer)
        whole = before + tokenizer.encode(context + continuation)
    if len(whole) <= len(before):
        raise ValueError(f'{continuation!r} has no token of its own after {context[-40:]!r}')
    return Row(np.array(whole, dtype=np.int32), len(before))


# -----------------------------------------------------------------------------
# accuracies


def evaluate_task(score, name: str, benchmark: Benchmark) -> dict:
    """Score a benchmark: {'n': items, 'source': ..., 'acc': ..., 'acc_stderr': ..., and more}."""
    scores = score(benchmark.rows, name)
    numbers = dict(n=len(benchmark.items), source=benchmark.source)
    if name != 'lambada':
        return numbers | choice_accuracies(benchmark.items, scores)
    nats = mean_stderr('nats', [-row.log_likelihood for row in scores])
    perplexity = math.exp(min(nats['nats'], 700))  # e^709 is the largest float
    numbers |= mean_stderr('acc', [row.is_greedy for row in scores]) | dict(perplexity=perplexity)
    if 'nats_stderr' in nats:
        numbers['perplexity_stderr'] = perplexity * nats['nats_stderr']  # to first order
    return numbers


def choice_accuracies(items: list[Item], scores: list[RowScore]) -> dict:
    """Count how often the most likely choice is right: in total, per character, per byte and per token.

    scores  of each pair of each item, in order
    """
    hits, first = dict(acc=[], acc_norm=[], acc_bytes=[], acc_tokens=[]), 0
    for item in items:
        rows = scores[first:first + len(item.pairs)]
        first += len(item.pairs)
        sizes = dict(acc=[1] * len(rows), acc_norm=[len(choice) for _, choice in item.pairs],
                     acc_bytes=[len(choice.encode()) for _, choice in item.pairs],
                     acc_tokens=[row.n_tokens for row in rows])
        for name, units in sizes.items():
            hits[name].append(most_likely(rows, units) == item.gold)
    numbers = {}
    for name, values in hits.items():
        numbers |= mean_stderr(name, values)
    return numbers


def most_likely(rows, sizes):
    """Number of the choice with the largest log-likelihood per unit; an empty choice is never taken."""
    return np.argmax([row.log_likelihood / size if size else -math.inf
                      for row, size in zip(rows, sizes, strict=True)])


def mean_stderr(name: str, values) -> dict:
    """{name: mean, name_stderr: its standard error}; a single value has no error."""
    values = np.asarray(values, dtype=np.float64)
    numbers = {name: float(values.mean())}
    if len(values) > 1:
        numbers[f'{name}_stderr'] = float(values.std(ddof=1) / math.sqrt(len(values)))
    return numbers
