"""Benchmarks during a training run: the tasks of evaluate.py at fixed intervals."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import distributed
from training.scoring import Interrupted, score_rows


class Benchmark(NamedTuple):
    name: str
    interval: int  # iterations between scores
    measure: Callable  # takes score_rows() of a model, returns numbers by name; for CORE also 'tasks'

    def run(self, model, place, autocast, batch_tokens) -> dict | None:
        """Return the numbers of the benchmark; None after a signal to stop."""
        try:
            return self.measure(partial(score_rows, model, batch_tokens=batch_tokens, place=place,
                                        autocast=autocast, stop=distributed.signal_to_stop))
        except Interrupted:
            return None


def open_benchmarks(settings: dict, tokenizer) -> list[Benchmark]:
    """Read the requested benchmarks, so that bad files fail before the first step.

    tokenizer  None if no benchmark is requested
    """
    intervals = {name: settings[f'{name}_interval'] for name in ('hellaswag', 'lambada', 'core')}
    names = [name for name in ('hellaswag', 'lambada') if intervals[name]]
    measures, max_examples = {}, settings['max_examples']
    if names:
        from tasks import items  # imported here: most runs need neither
        tasks = items.read_benchmarks(names, settings['eval_dir'], max_examples, tokenizer=tokenizer)
        for name in names:
            measures[name] = partial(items.evaluate_task, name=name, benchmark=tasks[name])
    if intervals['core']:
        from tasks import core
        bundle = core.read_core(settings['core'], tokenizer, max_examples)
        measures['core'] = partial(core.evaluate_core, tokenizer=tokenizer, bundle=bundle,
                                   block_size=settings['block_size'])
    return [Benchmark(name, intervals[name], measure) for name, measure in measures.items()]
