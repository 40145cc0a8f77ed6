"""Parquet files that someone else may have written or damaged: their columns, as the types they must have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.formats.reading import reading

_EXPECTED = "a parquet file"


def column_names(path: Path, fix: str) -> list[str]:
    """Return the names of a file's columns.

    Raises:
        ClipcidError: when it cannot be read.
    """
    with reading(path, _EXPECTED, fix):
        return list(pq.read_schema(path).names)


def count_rows(path: Path, fix: str) -> int:
    """Return the number of a file's rows.

    Raises:
        ClipcidError: when it cannot be read.
    """
    with reading(path, _EXPECTED, fix):
        return int(pq.read_metadata(path).num_rows)


def is_text(kind: pa.DataType) -> bool:
    """Tell whether a column holds text, plain or by the numbers of a dictionary."""
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain))


def read_columns(path: Path, columns: Mapping[str, pa.DataType], fix: str) -> pa.Table:
    """Read columns as the given types.

    Raises:
        ClipcidError: when the file cannot be read, lacks a column, holds one that these types cannot express, or numbers
            that are missing.
    """
    with reading(path, _EXPECTED, fix):
        present = pq.read_schema(path).names
        missing = [name for name in columns if name not in present]
        if missing:
            raise ValueError(f"it has no column {', '.join(missing)}; its columns: {', '.join(present)}")
        table = pq.read_table(path, columns=list(columns))
        empty = [name for name, kind in columns.items() if table[name].null_count and not is_text(kind)]
        if empty:
            raise ValueError(f"its column {empty[0]} has {table[empty[0]].null_count:,} rows without a value")
        return pa.table({name: table[name].cast(kind) for name, kind in columns.items()})
