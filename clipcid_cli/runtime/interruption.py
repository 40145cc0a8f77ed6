"""How work that can save itself ends after a signal: between two steps, once what it has done is saved.

Other work ends at once. Two threads meet here: the one that ends the process when a signal has come
(``commands/signals.py``), and the one that works.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A signal reaches the processes of a host at about the same time, those of other hosts perhaps never.
_SECONDS_BETWEEN_PROCESSES = 2.0

_asked = threading.Event()
_saved = threading.Event()
_describe: Callable[[], str] | None = None
_resumes = True


@contextmanager
def ends_when_saved(describe: Callable[[], str]) -> Iterator[None]:
    """Let the block save itself before a signal ends the process; it asks `is_asked` now and then, and answers by `end`.

    Args:
        describe: Says from where the work would go on if the process ended now, such as ``from step 1,000``.
    """
    global _describe
    _saved.clear()
    _describe = describe
    try:
        yield
    finally:
        _describe = None
        _saved.set()


@contextmanager
def starts_over() -> Iterator[None]:
    """Let what is said at a signal within the block promise no resumption: the same command begins anew."""
    global _resumes
    before = _resumes
    _resumes = False
    try:
        yield
    finally:
        _resumes = before


def is_asked() -> bool:
    """Tell whether a signal has asked this process to end."""
    return _asked.is_set()


def end() -> None:
    """Say that all is saved, and wait for the end; return where no signal has asked this process of the run."""
    _saved.set()
    if _asked.wait(_SECONDS_BETWEEN_PROCESSES):
        threading.Event().wait()


def ask() -> bool:
    """Ask the work to end; False where it cannot save itself."""
    _asked.set()
    return _describe is not None


def wait_until_saved(seconds: float) -> bool:
    """Wait for the work to have saved itself; False where it has not in so many seconds."""
    return _saved.wait(seconds)


def describe_resumption() -> str:
    """Say where the same command goes on, as the end of a sentence; nothing where it begins anew."""
    if not _resumes:
        return ""
    return f" to continue {'where it stopped' if _describe is None else _describe()}"
