"""Copies of rows and keys that cannot be mapped where they are: columns of parquet files, keys as lines of text.

A column is compressed, so that no row can be read without those around it. So it is read once, in order, and written as an
array of unit float16 rows, 2 bytes × width a row, which later starts map. A copy is found again by path, size, times and
inode of its file.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.rows import ArrayFile, find_npy, unit_rows
from clipcid_cli.formats.files import atomic_file, lock, reading, write_error
from clipcid_cli.formats.fingerprint import hash_json, stamp_of
from clipcid_cli.formats.parquet import refuse_expansion, validate_expansion

MAX_WIDTH = 65_536
"""Numbers in a row, above which a column is no embeddings."""

_VERSION = 1
_ROWS_AT_ONCE = 1024
_CHARACTERS_AT_ONCE = 2**24  # of keys
_LONGEST_KEY = 2**16
_FIX = "Copy or make it again, or choose other embeddings."
_KEYS = pa.schema([("key", pa.large_string())])


class Copies:
    """The folder of copies."""

    def __init__(self, folder: Path | None) -> None:
        """Take the folder, which need not exist; None for one that is removed with the process."""
        self._folder = folder

    def columns(self, columns: Sequence[tuple[Path, str]]) -> list[ArrayFile]:
        """Return the rows in columns of files, copied where they are not yet."""
        targets = [self._target(path, f"{name}.npy") for path, name in columns]

        def make(index: int) -> Callable[[IO[bytes]], None]:
            return lambda file: _copy_column(*columns[index], file)

        # What another process copies is waited for last.
        for waits in (False, True):
            for index, target in enumerate(targets):
                _make(target, make(index), waits=waits)
        return [
            dataclasses.replace(find_npy(target), source=path, member=name)
            for target, (path, name) in zip(targets, columns, strict=True)
        ]

    def keys(self, path: Path, rows: int) -> Path:
        """Return a parquet file of the keys in a text file, one a line, which must be as many as the rows."""
        target = self._target(path, "parquet")
        _make(target, lambda file: _copy_keys(path, rows, file), waits=True)
        return target

    def _target(self, path: Path, name: str) -> Path:
        folder = _temporary() if self._folder is None else self._folder
        with reading(path, "a file of embeddings", _FIX) as file:
            stamp = stamp_of(os.fstat(file.fileno()))
        identity = hash_json([_VERSION, str(path.resolve()), *stamp, name])
        return folder / f"{identity}.{name.rpartition('.')[2]}"


@lru_cache(maxsize=1)
def _temporary() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="clipcid-rows-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _make(target: Path, write: Callable[[IO[bytes]], None], *, waits: bool) -> None:
    """Write a file that is not there yet, unless another process does."""
    if target.is_file():
        return
    held = target.with_suffix(".lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock(held, wait=waits):
            try:
                if not target.is_file():
                    with atomic_file(target) as file:
                        write(file)
            finally:
                held.unlink(missing_ok=True)
    except BlockingIOError:
        return
    except OSError as error:
        raise write_error(target, error) from error


def _copy_column(path: Path, name: str, target: IO[bytes]) -> None:
    """Write a column as an npy of unit rows, float16 [n, D]; a row that is null, zero or not finite becomes NaN."""
    with reading(path, "a parquet file", _FIX) as source, pq.ParquetFile(path) as file:
        validate_expansion(file.metadata, source)
        num_rows = file.metadata.num_rows
        width = _find_width(file, path, name)
        # A row that is stored once may be repeated without end.
        refuse_expansion(f"its {num_rows:,} rows of width {width:,} in column {name}", 2 * num_rows * width, source)
        header = {"descr": "<f2", "fortran_order": False, "shape": (num_rows, width)}
        np.lib.format.write_array_header_1_0(target, header)
        written = 0
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[name], use_threads=False):
            target.write(unit_rows(_to_rows(batch.column(0), width, f"{path}[{name}]", written)).tobytes())
            written += len(batch)
        if written != num_rows:
            raise ValueError(f"it has {written:,} rows, and promises {num_rows:,}")


def _find_width(file: pq.ParquetFile, path: Path, name: str) -> int:
    """Return how many numbers the first row has; row groups that promise too many are refused before they are read."""
    leaf = next(place for place in range(len(file.schema)) if file.schema.column(place).path.startswith(f"{name}."))
    for group in range(file.num_row_groups):
        part = file.metadata.row_group(group)
        if part.column(leaf).num_values > part.num_rows * MAX_WIDTH:
            raise ClipcidError(
                f"{path}[{name}] has {part.column(leaf).num_values:,} numbers in {part.num_rows:,} rows, more than "
                f"{MAX_WIDTH:,} in each.",
                "Choose other embeddings.",
            )
    for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[name], use_threads=False):
        lengths = pc.list_value_length(_storage(batch.column(0))).drop_null()
        if len(lengths):
            return int(lengths[0].as_py())
    return 0


def _storage(cells: pa.Array) -> pa.Array:
    return cells.storage if isinstance(cells, pa.ExtensionArray) else cells


def _to_rows(cells: pa.Array, width: int, label: str, first: int) -> npt.NDArray[Any]:
    """Return lists of numbers as rows [n, width], NaN where there is none; one of another length is refused."""
    cells = _storage(cells)
    is_there = cells.is_valid().to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(cells).fill_null(width).to_numpy()
    others = np.flatnonzero(lengths != width)
    if len(others):
        raise ClipcidError(
            f"{label} has {lengths[others[0]]:,} numbers in row {first + others[0]:,}, and {width:,} in the first.",
            "Choose other embeddings.",
        )
    values = cells.drop_null().flatten().to_numpy(zero_copy_only=False)
    rows = np.full((len(cells), width), np.nan, values.dtype)
    rows[is_there] = values.reshape(-1, width)
    return rows


def _copy_keys(path: Path, rows: int, target: IO[bytes]) -> None:
    count = 0

    def parts() -> Iterator[list[str]]:
        with path.open(encoding="utf-8", newline="\n") as file:
            rest = ""
            while part := file.read(_CHARACTERS_AT_ONCE):
                *lines, rest = (rest + part).split("\n")
                if len(rest) > _LONGEST_KEY:
                    raise ValueError(f"it has a line of more than {_LONGEST_KEY:,} characters")
                yield [line.removesuffix("\r") for line in lines]
            yield [rest.removesuffix("\r")] if rest else []

    with reading(path, "UTF-8 text with a key per line", _FIX), pq.ParquetWriter(target, _KEYS) as writer:
        for keys in parts():
            count += len(keys)
            writer.write_table(pa.table({"key": [key or None for key in keys]}, schema=_KEYS))
    if count != rows:
        raise ClipcidError(f"{path} has {count:,} lines, and the array beside it {rows:,} rows.", "Give a key per row.")
