"""What a process of a run does to count as at work while it computes nothing: others work for it, or another run does."""

from __future__ import annotations

_notes = 0


def note_work() -> None:
    """Let this process count as at work for now."""
    global _notes
    _notes += 1


def count_notes() -> int:
    """Return how often `note_work` was called in this process."""
    return _notes
