"""The terminal: everything for people goes to stderr, so stdout stays a clean pipe."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from clipcid_cli.commands.signals import said_at_end
from clipcid_cli.commands.summary import format_seconds, wrap
from clipcid_cli.shown import plain
from clipcid_cli.steps.reporting import Progress, Reporter

# A bar would fill a log file: where stderr is no terminal, a line now and then says as much.
_SECONDS_BETWEEN_LINES = 15.0
# Wide enough that a log file gets each message on one line, to be searched.
_WIDTH_OF_A_FILE = 10_000
# Columns of a bar. A label that leaves it less beside the longest pace has a line of its own.
_SHORTEST_BAR = 8
_LONGEST_BAR = 16
_LONGEST_RATE = "  12,345/s  12:34:56 left"
# Numbers of a total ten times as large are written in these, as of the 8e16 pairs among 400 million images.
_SCALES = ((1e12, " trillion"), (1e9, " billion"))


class _Console(Console):
    """A console whose broken pipe is an error like any other; rich's ends the program with exit code 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def make_console() -> Console:
    """Make the console of the run: stderr, and no guessing which numbers and paths to colour."""
    return _Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _WIDTH_OF_A_FILE)


class ConsoleReporter(Reporter):
    """A reporter that prints warnings and, unless it is quiet, notes and bars."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet

    def warn(self, text: str) -> None:
        lines = wrap(f"warning: {text}", self.console.width)
        self.console.print(Text.assemble((lines[:8], "bold yellow"), lines[8:]), soft_wrap=True)

    def note(self, text: str) -> None:
        if not self.quiet:
            self.console.print(Text(wrap(text, self.console.width), style="dim"), soft_wrap=True)

    @contextmanager
    def progress(self, label: str, total: float | None, unit: str) -> Iterator[Progress]:
        """Show a live bar on a terminal, a line every few seconds elsewhere; nothing where there is nothing to do."""
        if self.quiet or total == 0:
            yield Progress()
            return
        shown = _Shown(self.console, label, total, unit)
        if not self.console.is_terminal:
            yield shown
            shown.end("✓")
            shown.print_line()
            return

        def say_goodbye() -> None:
            shown.end("✗")
            live.stop()

        with Live(shown, console=self.console, refresh_per_second=4) as live, said_at_end(say_goodbye):
            try:
                yield shown
            except BaseException:
                shown.end("✗")
                raise
            shown.end("✓")


class _Shown(Progress):
    """How much is done, how fast, the time left, or taken in the end, and current values."""

    def __init__(self, console: Console, label: str, total: float | None, unit: str) -> None:
        self.console = console
        self.label = plain(label)
        self.total = total
        self.unit = unit
        self.scale, self.word = next((scale for scale in _SCALES if (total or 0) >= 10 * scale[0]), (1.0, ""))
        self.values = ""
        self.mark: RenderableType = Spinner("dots", style="progress.spinner")
        self.bar = ProgressBar(total)
        self.started = self.printed = time.monotonic()
        self.ended: float | None = None

    def advance(self, amount: float = 1) -> None:
        self.bar.completed += amount
        if not self.console.is_terminal and time.monotonic() - self.printed > _SECONDS_BETWEEN_LINES:
            self.print_line()

    def expect(self, total: float) -> None:
        self.total = self.bar.total = total

    def show(self, **fields: Any) -> None:
        values = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in fields.items()}
        # Lines may break between them only.
        self.values = plain(" ".join(f"{name}={value}" for name, value in values.items()))

    def end(self, mark: str) -> None:
        """Show that the work is over; it may have ended early: then the numbers still say of how much."""
        self.mark = mark
        self.ended = time.monotonic()
        if mark == "✓":
            self.bar.total = self.bar.completed
            if self.total is not None:  # which may have been estimated
                self.total = self.bar.completed

    def print_line(self) -> None:
        self.printed = time.monotonic()
        parts = [*self._describe_pace(), *([self.values] if self.values else [])]
        self.console.print(Text(f"{self.label}: {', '.join(parts)}"), soft_wrap=True)

    def __rich__(self) -> RenderableType:
        """Draw the bar; above it a label too long to stand beside it, below it the current values."""
        width = self.console.width
        columns = [Column(), Column(min_width=_SHORTEST_BAR, max_width=_LONGEST_BAR), Column(no_wrap=True)]
        cells: list[RenderableType] = [self.mark, self.bar, Text("  ".join(self._describe_pace()))]
        lines: list[RenderableType] = []
        whole = f"✓ {self.label} {_SHORTEST_BAR * '━'} {self._describe_done(self.total or 0)}{_LONGEST_RATE}"
        if len(whole) <= width:
            columns.insert(1, Column(no_wrap=True))
            cells.insert(1, Text(self.label))
        else:
            lines.append(Text(wrap(self.label, width)))
        row = Table.grid(*columns, padding=(0, 1))
        row.add_row(*cells)
        lines.append(row)
        if self.values:
            lines.append(Text(wrap(f"  {self.values}", width), style="dim"))
        return Group(*lines)

    def _describe_pace(self) -> list[str]:
        done = self.bar.completed
        parts = [self._describe_done(done)]
        seconds = (self.ended or time.monotonic()) - self.started
        rate = done / seconds if seconds > 0 else 0.0
        if rate > 0:
            shown = rate / self.scale
            parts.append((f"{shown:,.0f}" if shown >= 10 else f"{shown:.2g}") + f"{self.word}/s")
        if self.ended is not None:
            parts.append(format_seconds(seconds))
        elif self.total is not None and rate > 0:
            parts.append(f"{format_seconds(max(0.0, self.total - done) / rate)} left")
        return parts

    def _describe_done(self, done: float) -> str:
        total = "" if self.total is None else f"/{self.total / self.scale:,.0f}"
        return f"{done / self.scale:,.0f}{total}{self.word} {self.unit}"
