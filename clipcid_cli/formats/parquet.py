"""Parquet files that someone else may have written or damaged: their columns, as the types they must have."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipcid_cli.formats.files import atomic_file, reading

IntArray = npt.NDArray[np.int64]

ROWS_AT_ONCE = 2**20
"""Rows of a row group, of files that are written part by part."""

_EXPECTED = "a parquet file"
# To read so few with threads takes longer.
_FEW_ROWS = 65_536
_SMALL = 2**20
# What a file's rows may take in memory: this, or so many times what the file has. Texts compress tenfold, images hardly.
_MOST_EXPANDED = 2**28
_MOST_EXPANSION = 100
_BUFFER = 2**20  # of a column while it is read
_BYTES_OF_ROW = 8  # of any row, though it may have no value


def column_names(path: Path, fix: str) -> list[str]:
    """Return the names of a file's columns."""
    with _open(path, fix, ()) as file:
        return list(file.schema_arrow.names)


def count_rows(path: Path, fix: str) -> int:
    """Return the number of a file's rows."""
    with _open(path, fix, ()) as file:
        return int(file.metadata.num_rows)


def is_text(kind: pa.DataType) -> bool:
    """Tell whether a column holds text, plain or by the numbers of a dictionary."""
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain))


def read_columns(path: Path, columns: Mapping[str, pa.DataType], fix: str) -> pa.Table:
    """Read columns as the given types."""
    with _open(path, fix, columns) as file:
        present = file.schema_arrow.names
        missing = [name for name in columns if name not in present]
        if missing:
            raise ValueError(f"it has no column {', '.join(missing)}; its columns: {', '.join(present)}")
        return _read(file, columns)


def write_row_groups(
    path: Path, schema: pa.Schema, num_rows: int, read: Callable[[slice], list[Any]], *, store_schema: bool = True
) -> None:
    """Write a table whole or not at all, though no more than two row groups of it are in memory.

    Args:
        read: Makes the columns of some rows.
        store_schema: Whether Arrow's types are stored; else all readers see large strings as strings.
    """
    with (
        atomic_file(path) as file,
        pq.ParquetWriter(file, schema, compression="zstd", store_schema=store_schema) as writer,
    ):
        for table in _make_ahead(lambda part: pa.table(read(part), schema=schema), num_rows):
            writer.write_table(table, row_group_size=ROWS_AT_ONCE)


def _make_ahead(make: Callable[[slice], pa.Table], num_rows: int) -> Iterator[pa.Table]:
    """Make the tables of row groups, each while the one before it is written, which takes as long."""
    parts = [slice(start, min(start + ROWS_AT_ONCE, num_rows)) for start in range(0, num_rows, ROWS_AT_ONCE)]
    first, *others = parts or [slice(0, 0)]
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, first)
        for part in others:
            table = coming.result()
            coming = pool.submit(make, part)
            yield table
        yield coming.result()


def write_tables(
    file: IO[bytes], schema: pa.Schema, tables: Iterable[pa.Table], *, max_rows: int, max_bytes: int
) -> None:
    """Write tables one after another, in row groups of at most `max_rows` and about `max_bytes`.

    Args:
        tables: Each of at most `max_rows` rows.
    """
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        pending = list[pa.Table]()
        rows = size = 0

        def flush() -> None:
            nonlocal rows, size
            if rows:
                writer.write_table(pa.concat_tables(pending), row_group_size=rows)
            pending.clear()
            rows = size = 0

        for table in tables:
            if rows + len(table) > max_rows or size >= max_bytes:
                flush()
            pending.append(table)
            rows += len(table)
            size += table.nbytes
        flush()


def read_rows(path: Path, fix: str, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Read rows as Python objects, all columns or some."""
    with _open(path, fix, columns) as file:
        rows: list[dict[str, Any]] = file.read(columns=columns, use_threads=_has_many_rows(file)).to_pylist()
        return rows


def read_first_column(path: Path, names: Sequence[str], kind: pa.DataType, fix: str) -> pa.ChunkedArray | None:
    """Read the first of some columns that a file has; None where it has none of them."""
    with _open(path, fix, names) as file:
        present = file.schema_arrow.names
        name = next((name for name in names if name in present), None)
        return None if name is None else _read(file, {name: kind})[name]


def replace_invalid(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return strings (large_string) with U+FFFD for bytes that are not UTF-8, which some writers of parquet let through."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        texts = [text.decode("utf-8", errors="replace") for text in column.cast(pa.large_binary()).to_pylist()]
        column = pa.chunked_array([texts], type=pa.large_string())
    return column


def validate_expansion(
    metadata: pq.FileMetaData, file: IO[bytes], *, binary: bool = False, columns: Collection[str] | None = None
) -> None:
    """Raise a ValueError for a file that would fill the memory, as its own description and longest texts say.

    Args:
        binary: Whether columns of bytes may be texts, too.
        columns: Those that will be read, whose texts are looked at; None for all.
    """
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    values = sum(group.total_byte_size for group in groups)
    refuse_expansion(f"its {metadata.num_rows:,} rows", max(values, _BYTES_OF_ROW * metadata.num_rows), file)
    for leaf in range(metadata.num_columns):
        column = metadata.schema.column(leaf)
        if columns is not None and not any(f"{column.path}.".startswith(f"{name}.") for name in columns):
            continue
        parts = [group.column(leaf) for group in groups]
        # A text that is stored once may be that of every row.
        most = sum(part.num_values * part.total_uncompressed_size for part in parts)
        is_text_leaf = column.logical_type.type == "STRING" or (binary and column.physical_type == "BYTE_ARRAY")
        if most > _MOST_EXPANDED and is_text_leaf:
            refuse_expansion(f"the texts of its column {column.path}", _bound_texts(metadata, file, leaf), file)


def refuse_expansion(what: str, expanded: int, file: IO[bytes]) -> None:
    """Raise a ValueError where what a file holds would take far more memory than the file has bytes."""
    if expanded > _MOST_EXPANDED and expanded > _MOST_EXPANSION * (size := file.seek(0, os.SEEK_END)):
        raise ValueError(f"{what} would take {expanded:,} bytes of memory, and the file has {size:,}")


def _bound_texts(metadata: pq.FileMetaData, file: IO[bytes], leaf: int) -> int:
    """Return how many bytes the texts of a column take: at most so many, and exactly where that is much."""
    path = metadata.schema.column(leaf).path
    most = 0
    with pq.ParquetFile(
        file, metadata=metadata, read_dictionary=[path], pre_buffer=False, buffer_size=_BUFFER
    ) as packed:
        for group in range(metadata.num_row_groups):
            part = metadata.row_group(group).column(leaf)
            first = next(packed.iter_batches(1, row_groups=[group], columns=[path], use_threads=False), None)
            longest = 0 if first is None else max(_lengths(first.column(0))[0], default=0)
            most += part.total_uncompressed_size + part.num_values * longest
        if most <= _MOST_EXPANDED:
            return most
        batches = packed.iter_batches(_FEW_ROWS, columns=[path], use_threads=False)
        return sum(int(lengths[numbers].sum()) for lengths, numbers in (_lengths(batch.column(0)) for batch in batches))


def _lengths(texts: pa.Array) -> tuple[IntArray, IntArray]:
    """Return the lengths of the different texts in a column, perhaps of lists, and which of them each text is."""
    while not pa.types.is_dictionary(texts.type):
        texts = texts.flatten()[0] if pa.types.is_struct(texts.type) else texts.flatten()
    lengths = pc.binary_length(texts.dictionary).fill_null(0).to_numpy()
    return lengths.astype(np.int64), texts.indices.drop_null().to_numpy()


@contextmanager
def _open(path: Path, fix: str, columns: Collection[str] | None) -> Iterator[pq.ParquetFile]:
    """Open a file of which some columns will be read; None for all."""
    # Not through `pq.read_table`, whose data sets and threads take 1 ms a file; small files are read at once.
    with reading(path, _EXPECTED, fix) as raw:
        small = os.fstat(raw.fileno()).st_size <= _SMALL
        with pa.BufferReader(raw.read()) if small else pa.OSFile(str(path)) as source, pq.ParquetFile(source) as file:
            validate_expansion(file.metadata, raw, columns=columns)
            yield file


def _read(file: pq.ParquetFile, columns: Mapping[str, pa.DataType]) -> pa.Table:
    table = file.read(columns=list(columns), use_threads=_has_many_rows(file))
    empty = [name for name, kind in columns.items() if table[name].null_count and not is_text(kind)]
    if empty:
        raise ValueError(f"its column {empty[0]} has {table[empty[0]].null_count:,} rows without a value")
    return pa.table({name: table[name].cast(kind) for name, kind in columns.items()})


def _has_many_rows(file: pq.ParquetFile) -> bool:
    return bool(file.metadata.num_rows > _FEW_ROWS)
