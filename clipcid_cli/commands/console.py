"""The terminal: everything for people goes to stderr, so stdout stays a clean pipe."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from clipcid_cli.steps.reporting import Progress, Reporter, SilentReporter

# Without a terminal a bar would fill a log file; a line now and then says as much.
_SECONDS_BETWEEN_LINES = 15.0


def make_console() -> Console:
    """Make the console of the run: stderr, no guessing of numbers and paths to colour."""
    return Console(stderr=True, highlight=False, soft_wrap=False)


def make_reporter(console: Console, *, quiet: bool, is_main: bool) -> Reporter:
    """Choose who listens: the terminal on the first process, nobody on the others, warnings only when quiet."""
    if not is_main:
        return SilentReporter()
    return QuietReporter(console) if quiet else ConsoleReporter(console)


class QuietReporter(SilentReporter):
    """A reporter that prints warnings only."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.console.print(Text.assemble(("warning: ", "bold yellow"), text))


class ConsoleReporter(QuietReporter):
    """A reporter that prints notes, warnings and bars."""

    def note(self, text: str) -> None:
        """Print a note."""
        self.console.print(Text(text, style="dim"))

    def progress(self, label: str, total: float | None, unit: str) -> AbstractContextManager[Progress]:
        """Show a live bar on a terminal, a line every few seconds elsewhere."""
        return (
            _bar(self.console, label, total, unit)
            if self.console.is_terminal
            else _lines(self.console, label, total, unit)
        )


class _Rate(ProgressColumn):
    """Done of total, units a second and the time left; short enough for 80 columns."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        done = f"{task.completed:,.0f}" + (f"/{task.total:,.0f}" if task.total is not None else "")
        rate = task.finished_speed or task.speed
        parts = [f"{done} {unit}"]
        if rate:
            parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
        if task.finished:
            parts.append(format_seconds(task.finished_time or 0.0))
        elif task.time_remaining is not None:
            parts.append(f"{format_seconds(task.time_remaining)} left")
        return Text("  ".join(parts))


class _Bar:
    """A bar, and below it the current values, as many lines of them as the terminal's width asks for."""

    def __init__(self, bars: Bars, task: TaskID) -> None:
        self.bars, self.task, self.values = bars, task, ""

    def advance(self, amount: float = 1) -> None:
        self.bars.advance(self.task, amount)

    def show(self, **fields: Any) -> None:
        self.values = format_values(fields)

    def render(self) -> RenderableType:
        """Return what is on the screen now."""
        if not self.values:
            return self.bars
        lines = [""]
        for value in self.values.split("  "):
            # A value stays whole: lines break between them only.
            if lines[-1] and len(lines[-1]) + len(value) + 4 > self.bars.console.width:
                lines.append("")
            lines[-1] += f"  {value}"
        return Group(self.bars, Text("\n".join(lines), style="dim", no_wrap=True, overflow="ellipsis"))


@contextmanager
def _bar(console: Console, label: str, total: float | None, unit: str) -> Iterator[Progress]:
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        _Rate(),
    )
    bars = Bars(*columns, console=console, auto_refresh=False)
    bar = _Bar(bars, bars.add_task(label, total=total, unit=unit))
    with Live(get_renderable=bar.render, console=console, refresh_per_second=4):
        yield bar


class _Lines:
    def __init__(self, console: Console, label: str, total: float | None, unit: str) -> None:
        self.console, self.label, self.total, self.unit = console, label, total, unit
        self.done, self.values, self.start = 0.0, "", time.monotonic()
        self.printed = self.start

    def advance(self, amount: float = 1) -> None:
        self.done += amount
        if time.monotonic() - self.printed > _SECONDS_BETWEEN_LINES:
            self.print()

    def show(self, **fields: Any) -> None:
        self.values = format_values(fields)

    def print(self) -> None:
        self.printed = time.monotonic()
        seconds = self.printed - self.start
        rate = self.done / seconds if seconds > 0 else 0.0
        of = f"/{self.total:,.0f}" if self.total is not None else ""
        left = ""
        if self.total is not None and rate > 0 and self.done < self.total:
            left = f", {format_seconds((self.total - self.done) / rate)} left"
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        self.console.print(
            Text(f"{self.label}: {self.done:,.0f}{of} {self.unit} ({speed}/s{left}) {self.values}".rstrip())
        )


@contextmanager
def _lines(console: Console, label: str, total: float | None, unit: str) -> Iterator[Progress]:
    lines = _Lines(console, label, total, unit)
    yield lines
    lines.print()


def format_values(fields: dict[str, Any]) -> str:
    """Write current values in a few characters each."""
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in fields.items()
    )


def format_seconds(seconds: float) -> str:
    """Write a duration: ``4.2 s``, ``3:05``, ``2:03:04``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"


def print_facts(console: Console, title: str, facts: dict[str, str]) -> None:
    """Print a titled two-column list, the form of every step's summary."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2, 0, 0)
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table)


def file_facts(result: dict[str, Any]) -> dict[str, str]:
    """Return the written files of a result as facts, by their names in the JSON object."""
    return {name: str(path) for name, path in result.get("files", {}).items()}
