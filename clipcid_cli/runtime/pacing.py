"""When to save work in progress: often enough to lose little, seldom enough that saving takes a small share of the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHARE = 0.05
"""Largest share of the time that saves take."""

_SHORTEST = 60.0


class SavePace:
    """Paces saves: at most one a minute, and none while saves would take more than `SHARE` of the time passed.

    So what is lost when the process is killed is at most a minute of work, or twenty times what a save takes.
    """

    def __init__(
        self, expected: float, shortest: float = _SHORTEST, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the clock.

        Args:
            expected: Seconds that the first save is expected to take; later ones, as long as the last.
            shortest: Seconds between saves at least.
        """
        self._expected, self._shortest, self._clock = expected, shortest, clock
        self._spent, self._began = 0.0, clock()
        self._saved = self._began

    def is_due(self) -> bool:
        """Tell whether to save now."""
        now = self._clock()
        return now - self._saved > self._shortest and self._spent + self._expected <= SHARE * (now - self._began)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure a save."""
        before = self._clock()
        yield
        self._saved = self._clock()
        self._expected = self._saved - before
        self._spent += self._expected
