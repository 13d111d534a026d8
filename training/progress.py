"""The state of a training run outside its model and optimizers."""

import dataclasses
import math
import threading
import time
from dataclasses import dataclass

import distributed
from files import print0
from training import signals

BEGUN_S = time.monotonic()  # about when the process began


@dataclass
class Progress:
    """Counters of a run. Every checkpoint holds these fields."""

    iter_num: int = 0  # updates done
    best_val_loss: float = math.inf
    since_best: int = 0  # evaluations since the best one
    to_evaluate: bool = False  # a signal prevented the evaluation due at iter_num
    wandb_id: str | None = None

    def __post_init__(self):
        self.started_at = self.iter_num
        self.resumes_evaluation = self.to_evaluate
        self.val_loss = 0.0  # the latest
        self.previous_best = self.best_val_loss, self.since_best

    @classmethod
    def of(cls, state: dict):
        """Return the progress of a checkpoint, with defaults for the fields that it lacks."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: state[name] for name in names if state.get(name) is not None})

    @property
    def advanced(self) -> bool:
        """Whether there is anything to evaluate and save since this start."""
        return self.iter_num > self.started_at or self.resumes_evaluation

    def note_evaluation(self, val_loss: float) -> bool:
        """Record a validation loss. Return whether it is the best so far."""
        self.val_loss = val_loss
        self.previous_best = self.best_val_loss, self.since_best
        if not self.advanced:  # best.pt holds the weights of best_val_loss, and these are not saved
            return False
        self.since_best += 1
        if val_loss < self.best_val_loss:
            self.best_val_loss, self.since_best = val_loss, 0
        return self.since_best == 0

    def forget_best(self):
        """Undo the latest note_evaluation(): its weights could not be saved."""
        self.best_val_loss, self.since_best = self.previous_best

    def out_of_patience(self, patience: int) -> bool:
        if not 0 < patience <= self.since_best:
            return False
        print0(f'no new best validation loss in {self.since_best} evaluations: '
               f'stopping here (patience={patience})')
        return True


def limit_hours(max_hours: float):
    """Stop the run after this many hours of the process; 0 = never."""
    if max_hours:
        left_s = BEGUN_S + max_hours * 3600 - time.monotonic()
        timer = threading.Timer(left_s, signals.received.append, [signals.TIME_OVER])
        timer.daemon = True  # the process may end before it
        timer.start()


class SaveTimes:
    """Decide when to save: at intervals of iterations, and of minutes; 0 = never by the clock."""

    def __init__(self, interval: int, minutes: float):
        self.interval, self.minutes = interval, minutes
        self.last_s = time.monotonic()

    def due(self, iter_num: int) -> bool:
        """Whether to save now, the same on all ranks, which starts the minutes anew."""
        is_due = iter_num % self.interval == 0
        if self.minutes and not is_due:
            is_due = distributed.largest(time.monotonic() - self.last_s >= self.minutes * 60) == 1
        if is_due:
            self.last_s = time.monotonic()
        return is_due
