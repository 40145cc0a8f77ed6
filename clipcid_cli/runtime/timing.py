"""How long a piece of work takes, of a run and for ``--dry-run``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

import torch

Result = TypeVar("Result")

_CPU = torch.device("cpu")


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time of what is done meanwhile to that of a phase."""
    began = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began


class Trial(NamedTuple, Generic[Result]):
    """A timed piece of work."""

    seconds: float  # the median time of a run
    result: Result  # of the last run


def time_trial(
    work: Callable[[], Result],
    device: torch.device = _CPU,
    *,
    warm_up: int = 1,
    repeats: int = 1,
    at_least: float = 0.0,
) -> Trial[Result]:
    """Run some work several times and take the median of its times.

    Args:
        warm_up: Runs before those that are timed: the first one also allocates, compiles and fills caches.
        repeats: Smallest number of timed runs, at least 1.
        at_least: Seconds that the timed runs take together; short work is repeated until they have passed.
    """
    for _ in range(warm_up):
        work()
    _synchronize(device)
    seconds = list[float]()
    while len(seconds) < repeats or sum(seconds) < at_least:
        began = time.perf_counter()
        result = work()
        _synchronize(device)
        seconds.append(time.perf_counter() - began)
    return Trial(statistics.median(seconds), result)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
