"""The tables of tests/faults/RESULTS.md: each between a mark of its own and the next `end`."""

from __future__ import annotations

import subprocess
from pathlib import Path

DOCUMENT = Path(__file__).parent / "faults" / "RESULTS.md"
_END = "<!-- end -->"


def read_commit() -> str:
    """Return the short name of the commit that is tried."""
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


def read_rows(program: str) -> dict[str, str]:
    """Return the rows of the table that `program` wrote last, by their first cell."""
    _, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(_mark(program))
    lines = rest.partition(_END)[0].splitlines()
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}


def write_table(program: str, heading: list[str], rows: list[str], before: list[str]) -> None:
    """Replace what `program` wrote last.

    Args:
        program: Its path in the repository.
        before: Lines above the table.
    """
    head, mark, rest = DOCUMENT.read_text(encoding="utf-8").partition(_mark(program))
    table = [f"| {' | '.join(heading)} |", "|" + "---|" * len(heading), *rows]
    body = "\n".join([*before, *([""] if before else []), *table])
    DOCUMENT.write_text(f"{head}{mark}\n{body}\n{_END}{rest.partition(_END)[2]}", encoding="utf-8")


def _mark(program: str) -> str:
    return f"<!-- written by {program} -->"
