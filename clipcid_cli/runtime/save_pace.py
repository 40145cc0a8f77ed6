"""When to save work in progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Largest share of the time that saves take, and seconds between two of them at least.
_SHARE = 0.05
_SHORTEST = 60.0


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
