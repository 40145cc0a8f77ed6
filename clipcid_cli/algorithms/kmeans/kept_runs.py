"""Runs of rows in the form they are compared in, kept from iteration to iteration while there is memory for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class _Run(Protocol):
    @property
    def num_bytes(self) -> int: ...


Run = TypeVar("Run", bound=_Run)


class Room:
    """Memory for what is kept, of one kind or several. Threads may share it.

    Args:
        num_bytes: All of it.
    """

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self._changing = threading.Lock()

    def take(self, num_bytes: int) -> bool:
        """Take some of it, if that much is left; return whether it was."""
        with self._changing:
            enough = num_bytes <= self._left
            self._left -= num_bytes if enough else 0
        return enough

    def give_back(self, num_bytes: int) -> None:
        """Return what was taken."""
        with self._changing:
            self._left += num_bytes


class KeptRuns(Generic[Run]):
    """Runs of one kind. Several threads may each ask for another run.

    Args:
        make: Reads a run by the number of its first row.
        room: Where it is kept; when that is full, it is made anew each time.
    """

    def __init__(self, make: Callable[[int], Run], room: Room) -> None:
        self._make, self._room = make, room
        self._runs: dict[int, Run] = {}

    def __contains__(self, first: int) -> bool:
        return first in self._runs

    def get(self, first: int) -> Run:
        """Return a run and keep it if there is room."""
        run = self._runs.get(first)
        if run is None:
            run = self._make(first)
            if self._room.take(run.num_bytes):
                self._runs[first] = run
        return run

    def get_last(self, first: int) -> Run:
        """Return a run that is not asked for again and keep it no longer."""
        run = self._runs.pop(first, None)
        if run is None:
            return self._make(first)
        self._room.give_back(run.num_bytes)
        return run
