"""A table of results as csv: one row for each model on each data set, a column for each metric any of them has."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipcid_cli.formats.atomic import write_text


def write_results(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows; what a row lacks, or None, is an empty cell."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
