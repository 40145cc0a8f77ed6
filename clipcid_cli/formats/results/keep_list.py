"""The keep list: one row per readable image, with its set, the representative of the set, and whether it is kept.

It is written and read row group by row group: its keys may be more than memory, or a string column of Arrow, can hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import atomic_file
from clipcid_cli.formats.mapped_strings import map_strings
from clipcid_cli.formats.parquet import is_text
from clipcid_cli.formats.reading import describe, open_regular

ROWS_AT_ONCE = 2**20
"""Rows of a row group."""
_TAKEN_AT_ONCE = 2**16

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("component", pa.int64()),
        ("component_size", pa.int64()),
        ("kept", pa.bool_()),
        ("representative", pa.string()),
        ("distance", pa.float32()),
    ]
)
_REQUIRED = ("key", "kept")
_FIX = "Give another --keep-list, or make one: clipcid balance DATA --keep R"

BoolArray = npt.NDArray[np.bool_]


class KeepList:
    """Which images of a data set are kept. Only `kept` is in memory; keys and shards are read as they are needed.

    Attributes:
        path: The file.
        kept: Which of its N images are kept, bool [N], in row order.
        has_shards: Whether it names their shards.
        has_reasons: Whether it says by what each image was dropped: not all are repeats.
    """

    def __init__(self, path: Path, kept: BoolArray, has_shards: bool, has_reasons: bool) -> None:
        self.path, self.kept, self.has_shards, self.has_reasons = path, kept, has_shards, has_reasons
        self._held: tuple[int, pa.ChunkedArray] | None = None

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def num_kept(self) -> int:
        """Number of images kept."""
        return int(np.count_nonzero(self.kept))

    @cached_property
    def keys(self) -> pa.ChunkedArray:
        """Keys of all images, N strings; they stay in memory."""
        return pa.chunked_array(list(self._batches("key")), type=pa.large_string())

    def kept_rows(self, *columns: str) -> Iterator[tuple[pa.Array, ...]]:
        """Yield columns of strings of the kept images, a part of the list at a time."""
        start = 0
        for parts in zip(*map(self._batches, columns), strict=True):
            kept = pa.array(self.kept[start : start + len(parts[0])])
            start += len(kept)
            yield tuple(part.filter(kept) for part in parts)

    @cached_property
    def _shards(self) -> dict[str, list[tuple[int, int]]]:
        """Where each shard's rows are: stretches of them, the first row and the one after the last."""
        if not self.has_shards:
            raise ClipcidError("The keep list has no column `shard`.", "Make it with: clipcid balance")
        found: dict[str, list[tuple[int, int]]] = {}
        first = 0
        for batch in self._batches("shard"):
            runs = pc.run_end_encode(batch)
            start = 0
            for name, end in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
                stretches = found.setdefault(name, [])
                if stretches and stretches[-1][1] == first + start:
                    stretches[-1] = stretches[-1][0], first + end
                else:
                    stretches.append((first + start, first + end))
                start = end
            first += len(batch)
        return found

    def kept_of_shard(self, shard: str) -> set[str]:
        """Return the keys of the kept images of a shard; quickest for one shard after another in the order of the rows.

        Raises:
            ClipcidError: when the list has no shards.
        """
        found: set[str] = set()
        for start, stop in self._shards.get(shard, []):
            for first, keys in self._groups(start, stop):
                part = slice(max(start - first, 0), min(stop - first, len(keys)))
                kept = pa.array(self.kept[first + part.start : first + part.stop])
                found.update(keys[part].filter(kept).to_pylist())
        return found

    def count_by_shard(self) -> dict[str, int]:
        """Return the number of images in each shard, kept or not; empty when the list has no shards."""
        if not self.has_shards:
            return {}
        return {shard: sum(stop - start for start, stop in stretches) for shard, stretches in self._shards.items()}

    def _groups(self, start: int, stop: int) -> Iterator[tuple[int, pa.ChunkedArray]]:
        """Yield the keys of each row group that has some of the rows, and the number of its first row."""
        first = 0
        with _open(self.path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first < stop and start < first + rows:
                    if self._held is None or self._held[0] != group:
                        self._held = group, file.read_row_group(group, columns=["key"])["key"]
                    yield first, self._held[1]
                first += rows

    def _batches(self, column: str) -> Iterator[pa.Array]:
        with _open(self.path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[column]):
                yield batch.column(0).cast(pa.large_string())


@dataclasses.dataclass(frozen=True)
class Column:
    """A column that a keep list has beside the usual ones.

    Attributes:
        read: Makes the values of some rows.
    """

    name: str
    kind: pa.DataType
    read: Callable[[slice], pa.Array]


def float_column(name: str, values: npt.NDArray[np.float32]) -> Column:
    """Return a column of float32, with nulls where values are NaN."""
    return Column(name, pa.float32(), lambda part: pa.array(values[part], pa.float32(), from_pandas=True))


def write_keep_list(
    path: Path,
    *,
    keys: pa.ChunkedArray,
    shards: pa.ChunkedArray,
    labels: npt.NDArray[np.signedinteger],
    representatives: npt.NDArray[np.signedinteger],
    distances: npt.NDArray[np.float32],
    more: Sequence[Column] = (),
) -> None:
    """Write a keep list, whole or not at all; the same values give the same bytes.

    Args:
        keys: Key of each of N images.
        labels: The smallest row of each image's set, integers [N].
        representatives: The representative of each image, itself where it is kept, integers [N]; −1 where no image is kept
            in its place: `representative` and `distance` are then null.
        distances: Distance to it, float32 [N].
        more: Further columns.
    """
    sizes = np.zeros(len(labels), np.int32 if len(labels) < 2**31 else np.int64)
    parts = [slice(start, min(start + ROWS_AT_ONCE, len(labels))) for start in range(0, len(labels), ROWS_AT_ONCE)]
    for part in parts:
        np.add.at(sizes, labels[part], 1)
    all_keys, all_shards = (
        column.chunk(0) if column.num_chunks == 1 else map_strings(path.parent, column.chunks)
        for column in (keys.cast(pa.large_string()), shards.cast(pa.large_string()))
    )
    schema = pa.schema([*_SCHEMA, *((column.name, column.kind) for column in more)])
    with atomic_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for part in parts or [slice(0, 0)]:
            chosen = representatives[part]
            is_none = chosen < 0
            someone = np.maximum(chosen, 0)
            blocks = (someone[at : at + _TAKEN_AT_ONCE] for at in range(0, len(someone), _TAKEN_AT_ONCE))
            names = map_strings(path.parent, (all_keys.take(pa.array(block)) for block in blocks))
            columns = [
                _text(all_keys, part),
                _text(all_shards, part),
                labels[part].astype(np.int64, copy=False),
                sizes[labels[part]].astype(np.int64),
                chosen == np.arange(part.start, part.stop),
                _or_null(_text(names, slice(0, len(names))), is_none),
                pa.array(distances[part], mask=is_none),
                *(column.read(part) for column in more),
            ]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=ROWS_AT_ONCE)


def _or_null(names: pa.StringArray, is_none: BoolArray) -> pa.StringArray:
    return pc.if_else(pa.array(is_none), pa.scalar(None, pa.string()), names) if is_none.any() else names


def _text(column: pa.LargeStringArray, part: slice) -> pa.StringArray:
    """Return some of the strings, whose bytes are not copied: of mapped ones only the offsets take memory."""
    _, bounds, data = column.buffers()
    if bounds is None or part.start == part.stop:
        return pa.array([], pa.string())
    ends = np.frombuffer(bounds, np.int64)[column.offset + part.start : column.offset + part.stop + 1]
    first, last = int(ends[0]), int(ends[-1])
    if last - first >= 2**31:
        raise ValueError(
            f"the strings of {len(ends) - 1:,} rows take {last - first:,} bytes, more than a column can hold"
        )
    offsets = pa.py_buffer((ends - first).astype(np.int32))
    return pa.StringArray.from_buffers(len(ends) - 1, offsets, data.slice(first, last - first))


def read_keep_list(path: Path) -> KeepList:
    """Open a keep list, ours or any parquet file with the columns `key` and `kept`.

    Raises:
        ClipcidError: when there is no such file, or it is not a keep list.
    """
    with _open(path) as file:
        schema = file.schema_arrow
        missing = sorted(set(_REQUIRED) - set(schema.names))
        if missing:
            raise ClipcidError(f"{path} is not a keep list: it has no column {', '.join(missing)}.", _FIX)
        if not is_text(kind := schema.field("key").type):
            raise ClipcidError(f"{path} is not a keep list: its column `key` is of type {kind}, not text.", _FIX)
        has_nulls = schema.field("kept").type != pa.bool_()
        kept, start = np.empty(file.metadata.num_rows, np.bool_), 0
        if not has_nulls:
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=["kept"]):
                has_nulls |= bool(batch.column(0).null_count)
                kept[start : start + len(batch)] = batch.column(0).fill_null(False).to_numpy(zero_copy_only=False)
                start += len(batch)
        if has_nulls or _has_null_keys(file):
            raise ClipcidError(f"Keep list {path} has rows without a `key`, or without true or false as `kept`.", _FIX)
    return KeepList(path, kept, "shard" in schema.names, "dropped_by" in schema.names)


def _has_null_keys(file: pq.ParquetFile) -> bool:
    """Tell whether a key is null, from the file's statistics where it has them."""
    columns = file.metadata.schema
    column = next(number for number in range(len(columns)) if columns.column(number).path == "key")
    for group in range(file.num_row_groups):
        found = file.metadata.row_group(group).column(column).statistics
        if found is not None and found.has_null_count:
            nulls = found.null_count
        else:
            nulls = file.read_row_group(group, columns=["key"])["key"].null_count
        if nulls:
            return True
    return False


@contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with open_regular(path), pq.ParquetFile(path) as file:
            yield file
    except FileNotFoundError as error:
        raise ClipcidError(f"There is no keep list {path}.", _FIX) from error
    except ClipcidError:
        raise
    except Exception as error:  # pyarrow raises what it likes for a damaged file
        raise ClipcidError(f"Keep list {path} cannot be read: {describe(error)}.", _FIX) from error


def read_dropped(path: Path) -> Iterator[pa.Table]:
    """Read the dropped images and their representatives, a part of the list at a time.

    Args:
        path: A keep list written by `write_keep_list`.

    Yields:
        One row per dropped image that another is kept for, in row order: ``from`` (its key), ``to`` (the key of its
        representative), ``distance`` (float32).
    """
    with _open(path) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=["key", "representative", "distance", "kept"]):
            table = pa.Table.from_batches([batch])
            dropped = table.filter(pc.and_(pc.invert(table["kept"]), table["representative"].is_valid()))
            yield dropped.select(["key", "representative", "distance"]).rename_columns(["from", "to", "distance"])
