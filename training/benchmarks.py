"""The tasks of evaluate.py, there and at fixed intervals during a training run."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from training.scoring import Interrupted, score_rows
from training.signals import signal_to_stop


class Benchmark(NamedTuple):
    name: str
    interval: int  # iterations between scores
    measure: Callable  # as of open_tasks()

    def run(self, model, place, autocast, batch_tokens) -> dict | None:
        """Return the numbers of the benchmark; None after a signal to stop."""
        try:
            return self.measure(partial(score_rows, model, batch_tokens=batch_tokens, place=place,
                                        autocast=autocast, stop=signal_to_stop))
        except Interrupted:
            return None


def open_benchmarks(settings: dict, tokenizer) -> list[Benchmark]:
    """Read the requested benchmarks, so that bad files fail before the first step."""
    intervals = {name: settings[f'{name}_interval'] for name in ('hellaswag', 'lambada', 'core')}
    names = [name for name, interval in intervals.items() if interval]
    if not names:
        return []
    tasks = open_tasks(names, settings, tokenizer, settings['block_size'])
    return [Benchmark(name, intervals[name], measure) for name, measure in tasks.items()]


def open_tasks(names: list[str], settings: dict, tokenizer, block_size: int, *,
               skip_unwritable: bool = False) -> dict[str, Callable]:
    """Read the items of tasks. A task takes score_rows() of a model, and returns numbers by name.

    skip_unwritable  skip a task with a character that the tokenizer lacks
    """
    from tasks import core, items  # imported here: most runs need neither
    max_examples, tasks = settings['max_examples'], {}
    benchmarks = items.read_benchmarks([name for name in names if name != 'core'], settings['eval_dir'],
                                       max_examples, tokenizer=tokenizer, skip_unwritable=skip_unwritable)
    for name, benchmark in benchmarks.items():
        tasks[name] = partial(items.evaluate_task, name=name, benchmark=benchmark)
    if 'core' in names:
        bundle = core.read_core(settings['core'], tokenizer, max_examples)
        tasks['core'] = partial(core.evaluate_core, tokenizer=tokenizer, bundle=bundle, block_size=block_size)
    return tasks
