"""A table that says which images belong together: near copies, drawings of one concept, pictures of one person."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.lists import read_frames, read_texts
from clipcid_cli.formats.data.samples import Columns, ListFormat

if TYPE_CHECKING:
    import pandas as pd


def validate_columns(table: Path, column: str, columns: Columns) -> None:
    """Refuse, before anything is computed, a table that cannot be read or lacks a column; see `read_groups`."""
    _find_key_column(table, next(read_frames(str(table), table, ListFormat())), column, columns)


def read_groups(table: Path, column: str, keys: Sequence[str], columns: Columns) -> npt.NDArray[np.int64]:
    """Return the group of each image, int64 [N] from 0; one whose cell is empty is a group of its own.

    Args:
        table: A csv, tsv or parquet file with a row for each image, as a keep list or a list of images is.
        column: Its column of groups.
        columns: Its column of keys or, without one, that of paths, which are then the keys.
    """
    group_of = _read_rows(table, column, frozenset(keys), columns)
    lost = [key for key in keys if key not in group_of]
    if lost:
        raise ClipcidError(
            f"{table} has no row for {len(lost):,} of {len(keys):,} images, such as {lost[0]}.",
            "Give a table with a row for each image: its key, and its group.",
        )
    numbers: dict[tuple[str, str], int] = {}
    groups = [numbers.setdefault((group_of[key], "" if group_of[key] else key), len(numbers)) for key in keys]
    if len(numbers) == 1:
        raise ClipcidError(
            f"Column {column!r} of {table} puts all {len(keys):,} images into one group.",
            "Name another column with --group-column, or omit --groups.",
        )
    return np.array(groups, np.int64)


def _read_rows(table: Path, column: str, keys: frozenset[str], columns: Columns) -> dict[str, str]:
    """Return the group of each key that has one; other rows take no memory, however many a table has."""
    group_of: dict[str, str] = {}
    source = str(table)
    for frame in read_frames(source, table, ListFormat()):
        key_column = _find_key_column(table, frame, column, columns)
        rows = zip(read_texts(source, frame, key_column), read_texts(source, frame, column), strict=True)
        for key, group in rows:
            if key in keys and group_of.setdefault(key, group) != group:
                raise ClipcidError(
                    f"{table} puts {key} into two groups, {group_of[key]!r} and {group!r}.",
                    "Give one group for each image.",
                )
    return group_of


def _find_key_column(table: Path, frame: pd.DataFrame, column: str, columns: Columns) -> str:
    key_column = columns.key if columns.key in frame else columns.image
    missing = next((name for name in (column, key_column) if name not in frame), None)
    if missing is not None:
        raise ClipcidError(
            f"{table} has no column {missing!r}; it has {', '.join(map(str, frame.columns[:12]))}.",
            "Name its columns: --group-column, and --key-column.",
        )
    return key_column
