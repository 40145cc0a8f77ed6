"""``rows.parquet``: the files of embeddings through which rows are numbered, as in the keep list and the forest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pyarrow as pa

from clipcid_cli.formats.atomic import write_parquet
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.parquet import read_rows
from clipcid_cli.formats.reading import reading

ROW_FILES = "rows.parquet"

_SCHEMA = pa.schema([("path", pa.string()), ("rows", pa.int64()), ("size", pa.int64()), ("hash", pa.string())])


class RowFile(FileRecord, frozen=True):
    """A file of embeddings, in the order of the rows.

    Attributes:
        rows: Of a file of image embeddings, the number of its rows; None for the metadata beside it.
    """

    rows: int | None = None


def write_row_files(path: Path, files: Sequence[RowFile]) -> None:
    """Write the files, a row each."""
    write_parquet(path, pa.Table.from_pylist(msgspec.to_builtins(files), _SCHEMA))


def read_row_files(path: Path, fix: str) -> list[RowFile]:
    """Read the files."""
    rows = read_rows(path, fix)
    with reading(path, "a list of files of embeddings", fix):
        return msgspec.convert(rows, list[RowFile])
