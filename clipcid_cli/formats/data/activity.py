"""Signs that data still arrives, however slowly: a worker that gives some has not stalled."""

from __future__ import annotations

import itertools

_received = itertools.count(1)
_last_received = 0


def count_received() -> int:
    """Return a number that grows while this process receives, asks again or waits for a copy that grows."""
    return _last_received


def note_received() -> None:
    """Let `count_received` grow."""
    global _last_received
    _last_received = next(_received)
