"""The terminal: everything for people goes to stderr, so stdout stays a clean pipe."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from clipcid_cli.commands.signals import said_at_end
from clipcid_cli.commands.summary import format_seconds, wrap
from clipcid_cli.steps.reporting import Progress, Reporter

# A bar would fill a log file: where stderr is no terminal, a line now and then says as much.
_SECONDS_BETWEEN_LINES = 15.0
# Wide enough that a log file gets each message on one line, to be searched.
_WIDTH_OF_A_FILE = 10_000
# What a label leaves at least, or it has a line of its own: "✓ ━ 123,456/400,000 images  1,234/s  12:34 left".
_ROOM_BESIDE_LABEL = 42


def make_console() -> Console:
    """Make the console of the run: stderr, and no guessing which numbers and paths to colour."""
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _WIDTH_OF_A_FILE)


class ConsoleReporter(Reporter):
    """A reporter that prints warnings and, unless it is quiet, notes and bars."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet

    def warn(self, text: str) -> None:
        """Print a warning."""
        lines = wrap(f"warning: {text}", self.console.width)
        self.console.print(Text.assemble((lines[:8], "bold yellow"), lines[8:]), soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a note."""
        if not self.quiet:
            self.console.print(Text(wrap(text, self.console.width), style="dim"), soft_wrap=True)

    def progress(self, label: str, total: float | None, unit: str) -> AbstractContextManager[Progress]:
        """Show a live bar on a terminal, a line every few seconds elsewhere; nothing where there is nothing to do."""
        if self.quiet or total == 0:
            return super().progress(label, total, unit)
        show = _show_bar if self.console.is_terminal else _print_lines
        return show(self.console, label, total, unit)


class _Numbers(ProgressColumn):
    """Done of total, units a second and the time left, or taken."""

    def render(self, task: Task) -> Text:
        total, unit, ended = task.fields["whole"], task.fields["unit"], task.fields["ended"]
        parts = _describe_pace(
            task.completed, total, unit, task.elapsed or 0.0, None if ended else task.speed, ended=ended
        )
        return Text("  ".join(parts))


class _Bars(Bars):
    """rich's bars; above them a label too long to stand beside them, below the current values."""

    label = ""
    values = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.label:
            yield Text(wrap(self.label, self.console.width))
        yield from super().get_renderables()
        if self.values:
            yield Text(wrap(f"  {self.values}", self.console.width), style="dim")


@dataclasses.dataclass
class _Bar(Progress):
    bars: _Bars
    task: TaskID

    def advance(self, amount: float = 1) -> None:
        self.bars.advance(self.task, amount)

    def show(self, **fields: Any) -> None:
        self.bars.values = _format_values(fields)


@contextmanager
def _show_bar(console: Console, label: str, total: float | None, unit: str) -> Iterator[Progress]:
    bars = _Bars(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        BarColumn(None, table_column=Column(max_width=16)),
        _Numbers(table_column=Column(no_wrap=True)),
        console=console,
        refresh_per_second=4,
    )
    if len(label) + _ROOM_BESIDE_LABEL > console.width:
        bars.label = label
        bars.columns = (bars.columns[0], *bars.columns[2:])
    # Work may end early: the bar is then full, and the numbers still say how much of the `whole` was done.
    task = bars.add_task(label, total=total, unit=unit, whole=total, ended=False)

    def end(*, well: bool) -> None:
        if well:
            bars.update(task, total=bars.tasks[task].completed)
        else:
            bars.columns = ("✗", *bars.columns[1:])
        bars.stop_task(task)
        bars.update(task, ended=True)

    def say_goodbye() -> None:
        end(well=False)
        bars.stop()

    with bars, said_at_end(say_goodbye):
        try:
            yield _Bar(bars, task)
        except BaseException:
            end(well=False)
            raise
        end(well=True)


@dataclasses.dataclass
class _Lines(Progress):
    console: Console
    label: str
    total: float | None
    unit: str
    done: float = 0.0
    values: str = ""

    def __post_init__(self) -> None:
        self.start = self.printed = time.monotonic()

    def advance(self, amount: float = 1) -> None:
        self.done += amount
        if time.monotonic() - self.printed > _SECONDS_BETWEEN_LINES:
            self.print()

    def show(self, **fields: Any) -> None:
        self.values = _format_values(fields)

    def print(self, *, ended: bool = False) -> None:
        self.printed = time.monotonic()
        parts = _describe_pace(self.done, self.total, self.unit, self.printed - self.start, None, ended=ended)
        parts += [self.values] if self.values else []
        self.console.print(Text(f"{self.label}: {', '.join(parts)}"), soft_wrap=True)


@contextmanager
def _print_lines(console: Console, label: str, total: float | None, unit: str) -> Iterator[Progress]:
    lines = _Lines(console, label, total, unit)
    yield lines
    lines.print(ended=True)


def _describe_pace(
    done: float, total: float | None, unit: str, seconds: float, rate: float | None, *, ended: bool
) -> list[str]:
    """Write how much is done, how fast (without a `rate` over the whole time), and the time left, or taken in the end."""
    parts = [f"{done:,.0f}" + (f"/{total:,.0f}" if total is not None else "") + f" {unit}"]
    rate = rate or (done / seconds if seconds > 0 else 0.0)
    if rate > 0:
        parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
    if ended:
        parts.append(format_seconds(seconds))
    elif total is not None and rate > 0:
        parts.append(f"{format_seconds(max(0.0, total - done) / rate)} left")
    return parts


def _format_values(fields: dict[str, Any]) -> str:
    """Write current values such that lines break between them only."""
    values = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in fields.items()}
    return " ".join(f"{name}={value}" for name, value in values.items())
