"""Who still works: a process that others wait for may take as long as it works, and is named once it no longer does.

Every process tells in the store through which they found each other how often it has come to a meeting, where processes wait
for one another, and in how many beats it has worked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from clipcid_cli.at_work import count_notes
from clipcid_cli.errors import ClipcidError

_BEATS_A_LIMIT = 60
# Share of a core that a process takes at least while it works; one that waits, and draws its progress, takes 0.4 %.
_LEAST_WORK = 0.01
_NAMED = 8
NOTHING_DONE = "0 0"
"""What a process tells when it arrives: meetings and beats."""


class Heartbeat:
    """Tells the other processes of a run that this one works, and knows what each of them said last."""

    def __init__(self, store: Any, rank: int, size: int, limit: timedelta) -> None:
        """Begin to tell; `limit` is how long one may show no sign of work while others wait for it."""
        self._store = store.clone()  # a connection of its own, for another thread
        self._rank = rank
        self._places = [place_of(other) for other in range(size)]
        self._limit = limit.total_seconds()
        self._every = self._limit / _BEATS_A_LIMIT  # seconds between beats
        self.rests = False  # whether other limits hold: nobody is waited for here
        self.has_given_up = False  # whether a meeting was waited for in vain, and is not over
        self._meetings = 0
        self._beats = 0
        self._work = (0.0, 0)
        self._heard = time.monotonic()  # when the store last answered
        self._states = [(0, 0, self._heard)] * size  # meetings and beats of each, and since when it tells these
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Let other limits hold in the block."""
        self.rests = True
        try:
            yield
        finally:
            self.rests = False

    def wait(self, meeting: dist.Work) -> None:
        """Wait until all processes have come to a meeting, as long as those that have not still work; else name them."""
        self._meetings += 1
        earliest = time.monotonic() + self._limit
        while not _is_over(meeting, self._every):
            now = time.monotonic()
            if now < earliest:  # those that are missing may have waited themselves until now
                continue
            silent = [rank for rank in self._missing() if now > self._states[rank][2] + self._limit]
            if now > self._heard + self._limit:
                silent = [0]  # whose host has the store
            if silent:
                self.has_given_up = True
                raise self._silent_error(silent)

    def absent(self, seconds: float) -> list[int]:
        """Come to a last meeting of those that have waited in vain; return who has not come within some seconds."""
        self._meetings += 1
        self._tell()
        time.sleep(seconds)
        self._listen()
        return self._missing()

    def close(self) -> None:
        """Tell nothing more."""
        self._ends.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        with suppress(RuntimeError):  # the store has ended, with the process that has it
            while not self._ends.wait(self._every):
                self._beat()
                self._listen()

    def _beat(self) -> None:
        cpu, noted = self._work
        self._work = time.process_time() - time.thread_time(), count_notes()
        self._beats += self._work[0] - cpu > _LEAST_WORK * self._every or self._work[1] != noted
        self._tell()

    def _tell(self) -> None:
        self._store.set(self._places[self._rank], f"{self._meetings} {self._beats}")

    def _listen(self) -> None:
        states = [tuple(map(int, state.split())) for state in self._store.multi_get(self._places)]
        self._heard = time.monotonic()
        for rank, (meetings, beats) in enumerate(states):
            if (meetings, beats) != self._states[rank][:2]:
                self._states[rank] = meetings, beats, self._heard

    def _missing(self) -> list[int]:
        """Return who has come to fewer meetings."""
        return [rank for rank, (meetings, _, _) in enumerate(self._states) if meetings < self._meetings]

    def _silent_error(self, silent: Sequence[int]) -> ClipcidError:
        return ClipcidError(
            f"{name_processes(silent)} of the run showed no sign of work for {self._limit / 60:g} minutes, while the others "
            "waited for it.",
            "It hangs, or its host cannot be reached: look at its log, and at its host's disk, memory and network. Then run "
            "the same command again: it continues where it stopped.",
        )


def name_processes(ranks: Sequence[int]) -> str:
    """Name some processes of the run."""
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"Process {', '.join(map(str, ranks[:_NAMED]))}{more}"


def _is_over(meeting: dist.Work, seconds: float) -> bool:
    """Wait for a meeting for some seconds; tell whether all have come. The loss of a process is an error."""
    try:
        meeting.wait(timedelta(seconds=seconds))
    except RuntimeError:
        if not meeting.is_completed():
            return False
        meeting.wait()
    return True


def place_of(rank: int) -> str:
    """Return where in the store a process tells how it is; there is something from the time on that it has arrived."""
    return f"clipcid/at-work/{rank}"
