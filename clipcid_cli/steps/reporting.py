"""How a step says what it is doing, independent of where it is shown; said to nobody until `reporting_to` names one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

_LEAST_SHOWN = 1e-4  # smaller numbers would be printed as 2.1e-05


class Progress:
    """A progress bar; this one is not shown."""

    def advance(self, amount: float = 1) -> None:
        """Count `amount` more units as done."""

    def expect(self, total: float) -> None:
        """Correct the total, which was estimated or unknown."""

    def show(self, **fields: Any) -> None:
        """Show current values next to the bar, e.g. ``loss=1.23``."""


class Reporter:
    """Receives what is said; this one drops it, for all processes but the first and for use from Python."""

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def progress(self, label: str, total: float | None, unit: str) -> AbstractContextManager[Progress]:
        return nullcontext(Progress())


_reporters = [Reporter()]


@contextmanager
def reporting_to(reporter: Reporter) -> Iterator[None]:
    """Let a reporter receive what is said in the block, by whichever thread: a process runs one command at a time."""
    _reporters.append(reporter)
    try:
        yield
    finally:
        _reporters.pop()


def note(text: str) -> None:
    """Say something worth knowing, such as which input was taken or which default was chosen."""
    _reporters[-1].note(text)


def warn(text: str) -> None:
    """Say something that may surprise the user; printed even under ``--quiet``."""
    _reporters[-1].warn(text)


def progress(label: str, total: float | None, unit: str) -> AbstractContextManager[Progress]:
    """Show a bar that counts to `total` units (unknown when None)."""
    return _reporters[-1].progress(label, total, unit)


def format_duration(seconds: float) -> str:
    """Print a time as a person would: 8 s, 12 min, 3.4 h, 5.2 days, 120 days."""
    for limit, unit, name in ((99.5, 1, "s"), (5_970, 60, "min"), (172_800, 3600, "h"), (8_596_800, 86_400, "days")):
        if seconds < limit:
            return f"{max(seconds / unit, _LEAST_SHOWN):.2g} {name}"
    return f"{seconds / 86_400:,.0f} days"
