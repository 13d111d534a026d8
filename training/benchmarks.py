"""Benchmarks during a training run: the tasks of evaluate.py at fixed intervals."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import distributed
from scoring import Interrupted, score_rows


class Benchmark(NamedTuple):
    name: str
    interval: int  # iterations between scores
    measure: Callable  # takes score_rows() of a model, returns numbers by name; for CORE also 'tasks'

    def run(self, model, place, autocast, batch_tokens) -> dict | None:
        """Return the numbers of the benchmark; None after a signal to stop."""
        score = partial(score_rows, model, batch_tokens=batch_tokens, place=place, autocast=autocast,
                        stop=distributed.signal_to_stop)
        try:
            return self.measure(score)
        except Interrupted:
            return None


def open_benchmarks(settings: dict, tokenizer) -> list[Benchmark]:
    """Read the requested benchmarks, so that bad files fail before the first step.

    tokenizer  None if no benchmark is requested
    """
    intervals = {name: settings[f'{name}_interval'] for name in ('hellaswag', 'lambada', 'core')}
    if not any(intervals.values()):
        return []
    from tasks import core, items  # imported here: most runs need neither
    names = [name for name in ('hellaswag', 'lambada') if intervals[name]]
    max_examples, benchmarks = settings['max_examples'], []
    tasks = items.read_benchmarks(names, settings['eval_dir'], max_examples, tokenizer=tokenizer)
    for name in names:
        measure = partial(items.evaluate_task, name=name, benchmark=tasks[name])
        benchmarks.append(Benchmark(name, intervals[name], measure))
    if intervals['core']:
        bundle = core.read_core(settings['core'], tokenizer, max_examples)
        measure = partial(core.evaluate_core, tokenizer=tokenizer, bundle=bundle,
                          block_size=settings['block_size'])
        benchmarks.append(Benchmark('core', intervals['core'], measure))
    return benchmarks
