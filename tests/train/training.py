"""What the tests of training share."""

import time

from rwkv_nb.runs import Run
from rwkv_nb.train.session import TrainSession

TIMING = ("tokens_per_s", "peak_memory_mb")


def train(run, settings, **options):
    return TrainSession(Run(run), settings, **options).start().join()


def stopped(run, settings, after=2, **options):
    """A run that was stopped after so many steps, or a few more."""
    session = TrainSession(Run(run), settings, **options).start()
    until(lambda: session.snapshot().step >= after)
    session.stop()
    session.join()


def steps(rows):
    """Rows of steps, without what the clock decides."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows if "loss" in row]


def until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)
