"""How long a piece of work takes, of a run and for ``--dry-run``, and when to save work in progress."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch

Result = TypeVar("Result")

_CPU = torch.device("cpu")

# Largest share of the time that saves take, and seconds between two of them at least.
_SHARE = 0.05
_SHORTEST = 60.0


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time of what is done meanwhile to that of a phase."""
    began = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began


class PhaseTimer:
    """Times by phase what a device does, without waiting for it: by events on a GPU, by the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._last: Any = None
        self._spans: list[tuple[str, Any, Any]] = []

    def start(self) -> None:
        """Begin the first phase."""
        self._last = self._now()

    def finish(self, phase: str) -> None:
        """End a phase, and begin the next."""
        now = self._now()
        self._spans.append((phase, self._last, now))
        self._last = now

    def take(self) -> PhaseTimes:
        """Return what was timed since the last call."""
        spans, self._spans = self._spans, []
        return PhaseTimes(spans)

    def _now(self) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        event.record()
        return event


class PhaseTimes:
    """Times on their way from a device."""

    def __init__(self, spans: list[tuple[str, Any, Any]]) -> None:
        self._spans = spans

    def read(self) -> dict[str, float]:
        """Return the seconds of each phase; the device must have come so far."""
        seconds = dict[str, float]()
        for phase, begin, end in self._spans:
            taken = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
            seconds[phase] = seconds.get(phase, 0.0) + taken
        return seconds


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


class SavePace:
    """Paces saves: at most one a minute, and none while saves would take more than a twentieth of the time passed.

    So what is lost when the process is killed is at most a minute of work, or twenty times what a save takes.
    """

    def __init__(self, expected: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock; the first save is expected to take so many seconds, later ones as long as the last."""
        self._expected = expected
        self._clock = clock
        self._spent = 0.0
        self._began = self._saved = clock()

    def is_due(self) -> bool:
        now = self._clock()
        return now - self._saved > _SHORTEST and self._spent + self._expected <= _SHARE * (now - self._began)

    @contextmanager
    def saving(self) -> Iterator[None]:
        before = self._clock()
        yield
        self._saved = self._clock()
        self._expected = self._saved - before
        self._spent += self._expected
