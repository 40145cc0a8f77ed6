"""Text for a terminal: broken into lines, never inside a name; lists of facts and tables that fit without cutting one."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from clipcid_cli.shown import metric_title, plain

_GAP = 2
_INDENT = 4  # of the rest of a row, below its first columns
_UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 1000}
_PART = r"""'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\]"""  # of a word, as a shell reads it
_WORD = re.compile(rf"(?:{_PART}|\S)+")
_FLAG = re.compile(r"--?[A-Za-z]")
_AFTER_SLASH = re.compile(r"(?<=/)(?=.)")
# A command line, or a flag with its value, that ends a sentence: "Give --embeddings, or run: clipcid embed DATA". One that
# made an output is no advice, and is broken like other text.
_COMMAND = re.compile(rf"(?P<before>.*(?<!made by):) (?P<command>(?:clipcid|torchrun) .*|--[a-z-]+ (?:{_PART})+)")


def wrap(text: str, width: int) -> str:
    """Make a text plain, and break each line of a text that is wider than `width`, keeping its indentation.

    Lines end between words; a path that is too long for a line, after a slash. A longer word stays whole.
    """
    return "\n".join(_wrap_line(line, width) for line in plain(text).split("\n"))


def wrap_command(command: str, width: int) -> str:
    r"""Break a command line before its flags with a trailing ``\``, as a shell reads it."""
    parts: list[str] = []
    for word in _WORD.findall(command):
        if _FLAG.match(word) or not parts:
            parts.append(word)
        else:
            parts[-1] += f" {word}"
    lines = parts[:1]
    for flag in parts[1:]:
        if len(lines[-1]) + 1 + len(flag) + 2 > width:
            lines[-1] += " \\"
            lines.append(f"    {flag}")
        else:
            lines[-1] += f" {flag}"
    return "\n".join(lines)


def _wrap_line(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    match = _COMMAND.fullmatch(line)
    if match is not None:
        command = wrap_command(match["command"], width - 2).replace("\n", "\n  ")
        return f"{_wrap_line(match['before'], width)}\n  {command}"
    indent = " " * (len(line) - len(line.lstrip()))
    return _Wrapper(width, indent, indent, break_long_words=False, break_on_hyphens=False).fill(line.strip())


class _Wrapper(textwrap.TextWrapper):
    def _split(self, text: str) -> list[str]:
        """Split a text into what lines may end after: words, and of those too long for a line what a slash ends."""
        room = self.width - len(self.initial_indent)
        words = super()._split(text)
        return [part for word in words for part in (_AFTER_SLASH.split(word) if len(word) > room else [word])]


def print_facts(console: Console, title: str, facts: dict[str, str], files: dict[str, str] | None = None) -> None:
    """Print a title and a list of names and values, then of written files, the form of every step's summary."""
    if title:
        console.print(Text(plain(title), style="bold"), soft_wrap=True)
    named = {name.replace("_", " "): path for name, path in (files or {}).items()}
    facts = facts | {f"{name} file" if name in facts else name: path for name, path in named.items()}
    facts = {plain(name): plain(value) for name, value in facts.items()}
    indent = max(map(len, facts), default=0) + _GAP
    for name, value in facts.items():
        room = console.width - indent
        if max(map(len, value.split()), default=0) <= room:
            text = " " * (indent - len(name)) + wrap(value, room).replace("\n", "\n" + " " * indent)
        else:
            # A path too long to stand beside its name starts on the next line.
            text = "\n" + textwrap.indent(wrap(value, console.width - _GAP), " " * _GAP)
        console.print(Text.assemble((name, "cyan"), text), soft_wrap=True)


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1
) -> None:
    """Print a table.

    Where it is wider than the terminal, as many of the first columns as must stand on lines of their own, above the
    rest of their row; where that does not help, a ``column: value`` line for each cell.

    The first `left` columns are aligned left; the others are numbers and aligned right.
    """
    console.print(Text(plain(title), style="bold"), soft_wrap=True)
    lines = [[plain(cell) for cell in row] for row in [columns, *rows]]
    above = _count_above(lines, left, console.width)
    if above is None:
        _print_cells(lines, console)
        return
    indent = " " * _INDENT if above else ""
    widths = [max(map(len, cells)) for cells in list(zip(*lines, strict=True))[above:]]
    previous = None
    for index, line in enumerate(lines):
        names = (" " * _GAP).join(line[:above])
        if above and names != previous:
            console.print(Text(names, style="cyan" if index else "bold"), soft_wrap=True)
        previous = names
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line[above:], widths, strict=True), above)
        ]
        first = Text(cells[0], style="" if above or not index else "cyan")
        rest = (" " * _GAP).join(["", *cells[1:]]).rstrip()
        console.print(Text.assemble(indent, first, rest, style="" if index else "bold"), soft_wrap=True)


def _count_above(lines: Sequence[Sequence[str]], left: int, width: int) -> int | None:
    """Return how many of the first columns must stand above the others for a table to fit; None where it never does."""
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for above in range(min(left, len(widths) - 1) + 1):
        rest = widths[above:]
        if sum(rest) + _GAP * (len(rest) - 1) + (_INDENT if above else 0) <= width:
            return above
    return None


def _print_cells(lines: Sequence[Sequence[str]], console: Console) -> None:
    """Print a line for each cell, and an empty one between rows."""
    columns, *rows = lines
    for index, row in enumerate(rows):
        if index:
            console.print()
        for column, cell in zip(columns, row, strict=True):
            console.print(Text.assemble((f"{column}:", "cyan"), f" {cell.strip()}"), soft_wrap=True)


def format_skipped(skipped: dict[str, int]) -> str:
    """Write how many samples were skipped for each reason."""
    return ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())


def format_phases(seconds: dict[str, float]) -> str:
    """Write the seconds of each phase: ``read 0.1 s, kmeans 3:05``."""
    return ", ".join(f"{phase} {format_seconds(value)}" for phase, value in seconds.items())


def format_seconds(seconds: float) -> str:
    """Write a duration: ``4.2 s``, ``3:05``, ``2:03:04``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"


def format_bytes(size: int) -> str:
    """Write a size by three digits: ``92.1 kB``, ``1.23 TB``."""
    unit = next((unit for unit, least in _UNITS.items() if size >= least), "kB")
    return f"{float(f'{size / _UNITS[unit]:.3g}'):,g} {unit}"


def format_host_memory(total: int, shared: int) -> str:
    """Write what a run takes of a host."""
    return f"up to {total / 1e9:,.1f} GB on each host, {shared / 1e9:,.1f} GB of it in /dev/shm"


def format_percent(value: float | None, digits: int = 1) -> str:
    """Write a share in percent, without the sign."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def shorten_metric(name: str) -> str:
    """Write a metric's name as the heading of a column of a terminal."""
    return metric_title(name).removeprefix("mean ")


def count(amount: int, noun: str, plural: str | None = None) -> str:
    """Write a number with its noun: ``1 image``, ``1,126 images``."""
    return f"{amount:,} {noun if amount == 1 else plural or noun + 's'}"
