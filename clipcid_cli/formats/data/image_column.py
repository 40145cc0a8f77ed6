"""Images in a column of a parquet file, as the Hugging Face hub stores them: ``image: {bytes, path}``, or the bytes alone.

Such a column is compressed in row groups, often of one page each: an image cannot be read without those around it. So a
file is read in order, a row group at a time. What reads images in any order makes a copy first, from which each is one
read away: int64 [rows + 1], where each image begins and the last ends, and then the images.
"""

from __future__ import annotations

import struct
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import is_remote
from clipcid_cli.formats.data.opening import open_source
from clipcid_cli.formats.files import describe, read_part
from clipcid_cli.formats.parquet import validate_expansion

_ROWS = 64  # that become Python's bytes at a time, or fewer, so that they are of at most
_AT_ONCE = 2**26  # bytes, though each be as large as all that is stored: of equal ones a file holds one
_MOST_REPEATED = 8  # times the stored bytes that the values of a row group may have
_BUFFER = 2**20  # of a column while it is read
_FILES = 64  # whose row groups a process remembers
_one_reads = threading.Lock()  # a row group, which the other threads wait for
_ENDS = struct.Struct("<2q")  # where an image begins and ends, in the table of a copy


@contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Open a file or what is behind a URL; what a damaged one raises while it is read becomes one error that names it."""
    try:
        with open_source(path) as opened:
            source = opened if is_remote(path) else pa.OSFile(path)
            with pq.ParquetFile(source, pre_buffer=False, buffer_size=_BUFFER) as file:
                validate_expansion(file.metadata, opened)
                yield file
    except (ClipcidError, MemoryError):  # pyarrow's own lack of memory is of both kinds
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ClipcidError(
            f"Shard {path} cannot be read as a parquet file: {describe(error)}.",
            "Copy or download it again, or remove it from the data.",
        ) from error


def count_rows(path: str) -> int:
    """Return the number of a file's rows."""
    with open_parquet(path) as file:
        return int(file.metadata.num_rows)


def is_image_column(kind: pa.DataType) -> bool:
    """Tell whether a column holds files of images: bytes, or a struct with a field of ``bytes``."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and is_image_column(kind.field(place).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def read_group(file: pq.ParquetFile, group: int, column: str) -> Iterator[bytes | None]:
    """Yield the images of a row group; None where there is none."""
    kind = file.schema_arrow.field(column).type
    is_struct = pa.types.is_struct(kind)
    for batch in read_batches(file, group, [f"{column}.bytes" if is_struct else column]):
        cells = batch.column(0)
        yield from (cells.flatten()[0] if is_struct else cells).to_pylist()


def read_batches(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield columns of a row group by a few rows at a time, fewer where they may be large; a ValueError beyond measure."""
    stored = _count_stored(file, group, columns)
    most = _AT_ONCE + _MOST_REPEATED * stored
    rows = min(max(_AT_ONCE // max(1, stored), 1), _ROWS)
    size = 0
    for batch in file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
        size += batch.nbytes
        if size > most:
            raise ValueError(f"row group {group:,} has more than {most:,} bytes of values, which are repeated")
        yield batch


def _count_stored(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> int:
    """Return the uncompressed bytes of columns in a row group, as the file describes them."""
    described = file.metadata.row_group(group)
    parts = map(described.column, range(described.num_columns))
    inside = tuple(f"{name}." for name in columns)
    return sum(
        part.total_uncompressed_size
        for part in parts
        if part.path_in_schema in columns or part.path_in_schema.startswith(inside)
    )


def have_images(cells: pa.Array) -> list[bool]:
    """Tell which cells of a column of images hold one."""
    if pa.types.is_struct(cells.type):
        cells = cells.flatten()[cells.type.get_field_index("bytes")]
    sizes = pc.binary_length(cells).fill_null(0)
    return [size > 0 for size in sizes.to_pylist()]


def copy_images(path: str, column: str, target: IO[bytes]) -> None:
    """Copy the images of a file one after another, after a table of where each begins; nothing is decoded."""
    starts = np.zeros(count_rows(path) + 1, "<i8")
    starts[0] = starts.nbytes
    target.seek(starts.nbytes)
    for row, image in enumerate(_read_all(path, column)):
        starts[row + 1] = starts[row] + target.write(image or b"")
    target.seek(0)
    target.write(starts.tobytes())
    target.seek(int(starts[-1]))  # where the copy ends, though room was made for more


def _read_all(path: str, column: str) -> Iterator[bytes | None]:
    with open_parquet(path) as file:
        for group in range(file.num_row_groups):
            yield from read_group(file, group, column)


def read_copied(descriptor: int, path: str, row: int) -> bytes:
    """Read an image from the copy at `path` by the number of its row; an OSError where the copy is damaged."""
    start, end = _ENDS.unpack(read_part(descriptor, path, row * _ENDS.size // 2, _ENDS.size))
    return read_part(descriptor, path, start, end - start)


def read_row(path: str, column: str, row: int) -> bytes:
    """Read an image by the number of its row, with the others of its row group; the last two row groups are held.

    Raises:
        OSError: where the file cannot be read, or has no such row or image.
    """
    try:
        firsts = _first_rows(path)
        group = bisect_right(firsts, row) - 1
        with _one_reads:
            images = _read_whole_group(path, column, group)
        return images[row - firsts[group]] or b""
    except (ClipcidError, LookupError) as error:
        raise OSError(f"{path} has no row {row:,} that can be read: {error}") from error


@lru_cache(maxsize=_FILES)
def _first_rows(path: str) -> list[int]:
    """Return the number of the first row of each row group."""
    with open_parquet(path) as file:
        sizes = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
        return [0, *accumulate(sizes)][:-1]


@lru_cache(maxsize=2)  # threads that read images in order are at the end of one and the beginning of the next
def _read_whole_group(path: str, column: str, group: int) -> list[bytes | None]:
    with open_parquet(path) as file:
        return list(read_group(file, group, column))
