"""The terminal: everything for people goes to stderr, so stdout stays a clean pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from clipcid_cli.commands.signals import said_at_end
from clipcid_cli.commands.summary import format_seconds
from clipcid_cli.commands.wrapping import wrap
from clipcid_cli.steps.reporting import Progress, Reporter

# A bar would fill a log file: where stderr is no terminal, a line now and then says as much.
_SECONDS_BETWEEN_LINES = 15.0
# Wide enough that a log file gets each message on one line, to be searched.
_WIDTH_OF_A_FILE = 10_000
_WIDEST_BAR, _NARROWEST_BAR = 16, 4
# What stands behind a bar at most: "400,000,000/400,000,000 images  12,345/s  12:34:56 left".
_ROOM_FOR_NUMBERS = 42


def make_console() -> Console:
    """Make the console of the run: stderr, and no guessing which numbers and paths to colour."""
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _WIDTH_OF_A_FILE)


def make_reporter(console: Console, *, quiet: bool, is_main: bool) -> Reporter:
    """Choose who listens: the terminal on the first process, nobody on the others, warnings only when quiet."""
    if not is_main:
        return Reporter()
    return QuietReporter(console) if quiet else ConsoleReporter(console)


class QuietReporter(Reporter):
    """A reporter that prints warnings only."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def warn(self, text: str) -> None:
        """Print a warning."""
        lines = wrap(f"warning: {text}", self.console.width)
        self.console.print(Text.assemble((lines[:8], "bold yellow"), lines[8:]), soft_wrap=True)


class ConsoleReporter(QuietReporter):
    """A reporter that prints notes, warnings and bars."""

    def note(self, text: str) -> None:
        """Print a note."""
        self.console.print(Text(wrap(text, self.console.width), style="dim"), soft_wrap=True)

    def progress(self, label: str, total: float | None, unit: str) -> AbstractContextManager[Progress]:
        """Show a live bar on a terminal, a line every few seconds elsewhere; nothing where there is nothing to do."""
        if total == 0:
            return super().progress(label, total, unit)
        return (
            _bar(self.console, label, total, unit)
            if self.console.is_terminal
            else _lines(self.console, label, total, unit)
        )


class _Mark(ProgressColumn):
    """A spinner while it runs; a tick or a cross in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.spinner = SpinnerColumn()

    def render(self, task: Task) -> RenderableType:
        ended = task.fields["ended"]
        return self.spinner.render(task) if ended is None else Text("✓" if ended else "✗")


class _Numbers(ProgressColumn):
    """Done of total, units a second and the time left; short enough for 80 columns."""

    def render(self, task: Task) -> Text:
        parts = _describe_pace(
            task.completed,
            task.fields["whole"],
            task.fields["unit"],
            task.elapsed or 0.0,
            task.speed,
            ended=task.fields["ended"] is not None,
        )
        return Text("  ".join(parts))


class _Bar(Progress):
    """A bar, and below it the current values, as many lines of them as the terminal's width asks for."""

    def __init__(self, console: Console, label: str, total: float | None, unit: str) -> None:
        width = console.width
        room = width - len(label) - _ROOM_FOR_NUMBERS
        # A long label takes the bar's place, a longer one a line of its own.
        self.head = label if room < 0 else ""
        columns = [_Mark(), TextColumn("{task.description}"), BarColumn(bar_width=min(room, _WIDEST_BAR)), _Numbers()]
        if room < 0:
            columns.pop(1)
        elif room < _NARROWEST_BAR:
            columns.pop(2)
        self.bars = Bars(*columns, console=console, auto_refresh=False)
        self.task = self.bars.add_task(label, total=total, unit=unit, whole=total, ended=None)
        self.values: list[str] = []

    def advance(self, amount: float = 1) -> None:
        self.bars.advance(self.task, amount)

    def show(self, **fields: Any) -> None:
        self.values = format_values(fields)

    def end(self, *, well: bool) -> None:
        """Stop the clock and mark how it ended."""
        self.bars.stop_task(self.task)
        completed = self.bars.tasks[self.task].completed
        self.bars.update(self.task, ended=well, total=completed if well else self.bars.tasks[self.task].total)

    def render(self) -> RenderableType:
        """Return what is on the screen now."""
        lines: list[RenderableType] = [Text(self.head)] if self.head else []
        lines.append(self.bars)
        if self.values:
            text = [""]
            for value in self.values:
                # A value stays whole: lines break between them only.
                if text[-1] and len(text[-1]) + 2 + len(value) > self.bars.console.width:
                    text.append("")
                text[-1] += f"  {value}"
            lines.append(Text("\n".join(text), style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*lines)


@contextmanager
def _bar(console: Console, label: str, total: float | None, unit: str) -> Iterator[Progress]:
    bar = _Bar(console, label, total, unit)
    live = Live(get_renderable=bar.render, console=console, refresh_per_second=4)

    def say_goodbye() -> None:
        bar.end(well=False)
        live.stop()

    with live, said_at_end(say_goodbye):
        try:
            yield bar
        except BaseException:
            bar.end(well=False)
            raise
        bar.end(well=True)


class _Lines(Progress):
    def __init__(self, console: Console, label: str, total: float | None, unit: str) -> None:
        self.console, self.label, self.total, self.unit = console, label, total, unit
        self.done = 0.0
        self.values: list[str] = []
        self.start = self.printed = time.monotonic()

    def advance(self, amount: float = 1) -> None:
        self.done += amount
        if time.monotonic() - self.printed > _SECONDS_BETWEEN_LINES:
            self.print()

    def show(self, **fields: Any) -> None:
        self.values = format_values(fields)

    def print(self, *, ended: bool = False) -> None:
        self.printed = time.monotonic()
        parts = _describe_pace(self.done, self.total, self.unit, self.printed - self.start, None, ended=ended)
        self.console.print(Text(f"{self.label}: " + ", ".join([*parts, *self.values])), soft_wrap=True)


@contextmanager
def _lines(console: Console, label: str, total: float | None, unit: str) -> Iterator[Progress]:
    lines = _Lines(console, label, total, unit)
    yield lines
    lines.print(ended=True)


def _describe_pace(
    done: float, total: float | None, unit: str, seconds: float, rate: float | None, *, ended: bool
) -> list[str]:
    """Write how much is done, how fast, and the time left, or taken where it has ended.

    Args:
        rate: Units a second just now; over the whole time where it is not known.
    """
    parts = [f"{done:,.0f}" + (f"/{total:,.0f}" if total is not None else "") + f" {unit}"]
    if ended or not rate:
        rate = done / seconds if seconds > 0 else 0.0
    if rate > 0:
        parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
    if ended:
        parts.append(format_seconds(seconds))
    elif total is not None and rate > 0:
        parts.append(f"{format_seconds(max(0.0, total - done) / rate)} left")
    return parts


def format_values(fields: dict[str, Any]) -> list[str]:
    """Write current values in a few characters each."""
    return [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in fields.items()]
