"""The keep list: one row per readable image, with its set, the representative of the set, and whether it is kept.

It is written and read row group by row group: its keys may be more than memory, or a string column of Arrow, can hold. What
it keeps and drops is also written for other tools: DataComp's subset, a table of pairs, a list of keys.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import named_file, pack_csv, reading
from clipcid_cli.formats.parquet import ROWS_AT_ONCE, is_text, validate_expansion, write_row_groups
from clipcid_cli.formats.sidecar import Sidecar

_SCHEMA = pa.schema(
    {
        "key": pa.large_string(),
        "shard": pa.large_string(),
        "component": pa.int64(),
        "component_size": pa.int64(),
        "kept": pa.bool_(),
        "representative": pa.large_string(),
        "distance": pa.float32(),
    }
)
# DataComp's subset: its resharder loads the file, asserts this dtype and finds each sample by bisection.
UID_HALVES = np.dtype([("f0", "<u8"), ("f1", "<u8")])

_PAIRS = pa.schema([("from", pa.string()), ("to", pa.string()), ("distance", pa.float32())])
_REFERENCE = pa.field("reference", pa.string())
_UID = "[0-9a-fA-F]{32}"
_AT_ONCE = 2**16

_FIX = "Give another --keep-list, or make one: clipcid balance DATA --keep R"


class Pictures(msgspec.Struct):
    """The pictures of a report: how many are shown, shard and key of those that could not be read, and why not."""

    shown: int
    unread: list[tuple[str, str]]
    why: str


class BalanceSidecar(Sidecar, kw_only=True):
    """``balance.json``; the embeddings are named relative to the work directory."""

    embeddings: str
    pictures: Pictures
    result: dict[str, Any]


@dataclasses.dataclass
class KeepList:
    """Which images of a data set are kept. Only `kept` is in memory; keys and shards are read as they are needed."""

    path: Path
    kept: npt.NDArray[np.bool_]  # [N], in row order
    has_shards: bool
    has_reasons: bool  # whether it says by what each image was dropped: not all are repeats
    _held: tuple[int, pa.ChunkedArray] | None = None

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def num_kept(self) -> int:
        return int(np.count_nonzero(self.kept))

    @property
    def first_key(self) -> str | None:
        """Key of the first image; None where there are none."""
        return next((str(keys[0]) for keys in self._batches("key")), None)

    def kept_keys(self) -> Iterator[pa.Array]:
        """Yield the keys of the kept images, a part of the list at a time."""
        start = 0
        for keys in self._batches("key"):
            yield keys.filter(pa.array(self.kept[start : start + len(keys)]))
            start += len(keys)

    def kept_of_shard(self, shard: str) -> set[str]:
        """Return the keys of a shard's kept images; quickest for one shard after another in the order of the rows."""
        kept: set[str] = set()
        for start, stop in self._shards.get(shard, []):
            group, first = divmod(start, ROWS_AT_ONCE)
            if self._held is None or self._held[0] != group:
                with _open(self.path) as file:
                    self._held = group, file.read_row_group(group, columns=["key"])["key"]
                    _validate_length("key", len(self._held[1]), file.metadata.row_group(group).num_rows)
            keys = self._held[1].slice(first, stop - start)
            kept.update(keys.filter(pa.array(self.kept[start:stop])).to_pylist())
        return kept

    def count_by_shard(self) -> dict[str, int]:
        """Return the number of images in each shard, kept or not; empty when the list has no shards."""
        return {shard: sum(stop - start for start, stop in stretches) for shard, stretches in self._shards.items()}

    def count_kept_by_shard(self) -> dict[str, int]:
        """Return the number of kept images in each shard; empty when the list has no shards."""
        return {
            shard: sum(int(np.count_nonzero(self.kept[start:stop])) for start, stop in stretches)
            for shard, stretches in self._shards.items()
        }

    @cached_property
    def _shards(self) -> dict[str, list[tuple[int, int]]]:
        """Where each shard's rows are: stretches inside row groups, the first row and the one after the last."""
        shards: dict[str, list[tuple[int, int]]] = defaultdict(list)
        first = 0
        for batch in self._batches("shard") if self.has_shards else ():
            runs = pc.run_end_encode(batch)
            ends = [0, *runs.run_ends.to_pylist()]
            for name, (start, end) in zip(runs.values.to_pylist(), pairwise(ends), strict=True):
                shards[name].append((first + start, first + end))
            first += len(batch)
        return dict(shards)

    def _batches(self, column: str) -> Iterator[pa.Array]:
        count = 0
        with _open(self.path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[column]):
                count += len(batch)
                yield batch.column(0).cast(pa.large_string())
            _validate_length(column, count, len(self))


def _validate_length(column: str, count: int, rows: int) -> None:
    """Refuse a damaged column, which pyarrow may read as a shorter one."""
    if count != rows:
        raise ValueError(f"column {column} has {count:,} values for {rows:,} rows")


@dataclasses.dataclass(frozen=True)
class Column:
    """A column that a keep list has beside the usual ones; `read` makes the values of some rows."""

    name: str
    kind: pa.DataType
    read: Callable[[slice], pa.Array]


def float_column(name: str, values: npt.NDArray[np.float32]) -> Column:
    """Return a column of float32, with nulls where values are NaN."""
    return Column(name, pa.float32(), lambda part: pa.array(values[part], pa.float32(), from_pandas=True))


def write_keep_list(
    path: Path,
    *,
    keys: pa.LargeStringArray,
    shards: pa.LargeStringArray,
    labels: npt.NDArray[np.signedinteger],
    representatives: npt.NDArray[np.signedinteger],
    distances: npt.NDArray[np.float32],
    more: Sequence[Column] = (),
) -> None:
    """Write a keep list of N images, whole or not at all; the same values give the same bytes.

    Args:
        labels: The smallest row of each image's set, [N].
        representatives: The row kept in place of each image, its own where it is kept, [N]; −1 where none is:
            `representative` and `distance` are then null.
        distances: Distance to it, [N].
    """
    sizes = np.bincount(labels, minlength=len(labels))

    def read(part: slice) -> list[Any]:
        chosen = representatives[part]
        is_none = chosen < 0
        return [
            keys[part],
            shards[part],
            labels[part],
            sizes[labels[part]],
            chosen == np.arange(part.start, part.stop),
            keys.take(pa.array(chosen, mask=is_none)),
            pa.array(distances[part], mask=is_none),
            *(column.read(part) for column in more),
        ]

    schema = pa.schema([*_SCHEMA, *((column.name, column.kind) for column in more)])
    write_row_groups(path, schema, len(labels), read, store_schema=False)


def read_keep_list(path: Path) -> KeepList:
    """Open a keep list, ours or any parquet file with the columns `key` and `kept`."""
    with _open(path) as file:
        schema = file.schema_arrow
        missing = sorted({"key", "kept"} - set(schema.names))
        if missing:
            raise ClipcidError(f"{path} is not a keep list: it has no column {', '.join(missing)}.", _FIX)
        if not is_text(kind := schema.field("key").type):
            raise ClipcidError(f"{path} is not a keep list: its column `key` is of type {kind}, not text.", _FIX)
        kept = file.read(columns=["kept"])["kept"]
        _validate_length("kept", len(kept), file.metadata.num_rows)
        if kept.type != pa.bool_() or kept.null_count or _has_null_keys(file):
            raise ClipcidError(f"Keep list {path} has rows without a `key`, or without true or false as `kept`.", _FIX)
    return KeepList(path, kept.to_numpy(), "shard" in schema.names, "dropped_by" in schema.names)


def _has_null_keys(file: pq.ParquetFile) -> bool:
    """Tell whether the file's statistics count a null key; where it has none, such a row is no image's."""
    column = [file.schema.column(leaf).path for leaf in range(len(file.schema))].index("key")
    groups = (file.metadata.row_group(group).column(column) for group in range(file.num_row_groups))
    return any(group.is_stats_set and group.statistics.null_count for group in groups)


@contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    if not os.path.exists(path):  # pathlib raises where a name is too long
        raise ClipcidError(f"There is no keep list {path}.", _FIX)
    with reading(path, "a keep list", _FIX) as source, pq.ParquetFile(path) as file:
        validate_expansion(file.metadata, source)
        yield file


def _read_dropped(path: Path) -> Iterator[pa.Table]:
    """Read, part by part, the dropped images, those they are dropped for, and the distance between them, as `_PAIRS`."""
    with _open(path) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=["key", "representative", "distance", "kept"]):
            table = pa.Table.from_batches([batch])
            dropped = table.filter(pc.and_(pc.invert(table["kept"]), table["representative"].is_valid()))
            yield dropped.select(["key", "representative", "distance"]).rename_columns(_PAIRS.names).cast(_PAIRS)


def _read_dropped_of_references(path: Path) -> Iterator[pa.Table]:
    """Read what `_read_dropped` reads, and images near a reference, whose pair is an image of that: with its name."""
    schema = _PAIRS.append(_REFERENCE)
    names = ["key", "representative", "distance", "kept", "reference", "reference_key", "reference_distance"]
    with _open(path) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=names):
            table = pa.Table.from_batches([batch])
            is_near = table["reference"].is_valid()
            own = table.select(["key", "representative", "distance", "reference"]).rename_columns(schema.names)
            near = table.select(["key", "reference_key", "reference_distance", "reference"]).rename_columns(
                schema.names
            )
            own, near = own.cast(schema), near.cast(schema)
            columns = [pc.if_else(is_near, near[name], own[name]) for name in schema.names]
            is_pair = pc.and_(pc.invert(table["kept"]), pc.or_(is_near, own["to"].is_valid()))
            yield pa.table(columns, schema=schema).filter(is_pair)


def are_uids(keys: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Tell which of n strings are identifiers of DataComp, 32 hexadecimal digits: bool [n]."""
    matches: npt.NDArray[np.bool_] = pc.match_substring_regex(keys, f"^{_UID}$").to_numpy()
    return matches


def is_uid(key: object) -> bool:
    """Tell whether a value is an identifier of DataComp."""
    return isinstance(key, str) and re.fullmatch(_UID, key) is not None


def write_uids(path: Path, uids: Iterable[pa.ChunkedArray], count: int, *, overwrite: bool) -> int:
    """Write identifiers as DataComp's resharder and leaderboard read them: npy of their 64-bit halves, sorted.

    Args:
        uids: `count` strings of 32 hexadecimal digits, in any order, in parts.

    Returns:
        The number written: repeated ones once, since the resharder would write the sample for each occurrence.
    """
    halves = np.empty((count, 2), np.uint64)
    start = 0
    for part in uids:
        for at in range(0, len(part), _AT_ONCE):
            text = "".join(part.slice(at, _AT_ONCE).to_pylist())
            piece = np.frombuffer(bytes.fromhex(text), ">u8").reshape(-1, 2)
            halves[start : start + len(piece)] = piece
            start += len(piece)
    assert start == count, f"{start} of {count} identifiers"
    halves = halves[np.lexsort((halves[:, 1], halves[:, 0]))]
    is_first = np.ones(count, np.bool_)
    is_first[1:] = (halves[1:] != halves[:-1]).any(axis=1)
    halves = halves[is_first]
    with named_file(path, overwrite) as file:
        np.save(file, np.ascontiguousarray(halves, "<u8").view(UID_HALVES)[:, 0], allow_pickle=False)
    return len(halves)


def write_pairs(path: Path, keep_list: Path, *, overwrite: bool) -> None:
    """Write the dropped images of a keep list, as csv where the file's name ends so, else as parquet."""
    with _open(keep_list) as file:
        has_references = "reference" in file.schema_arrow.names
    pairs = _read_dropped_of_references(keep_list) if has_references else _read_dropped(keep_list)
    with named_file(path, overwrite) as target:
        if path.suffix == ".csv":
            for index, part in enumerate(pairs):
                frame = part.to_pandas()
                # The fewest digits that denote the same float32.
                frame["distance"] = [str(distance) for distance in frame["distance"].to_numpy()]
                target.write(pack_csv(frame, header=index == 0))
        else:
            schema = _PAIRS.append(_REFERENCE) if has_references else _PAIRS
            with pq.ParquetWriter(target, schema, compression="zstd") as writer:
                for part in pairs:
                    writer.write_table(part)


def write_keys(path: Path, keys: Iterable[pa.Array], *, overwrite: bool) -> None:
    """Write keys, in parts, as UTF-8 text, one a line; a key that holds a line break, which would be two, is refused."""
    with named_file(path, overwrite) as file:
        for part in keys:
            broken = part.filter(pc.match_substring_regex(part, r"[\r\n]"))
            if len(broken):
                raise ClipcidError(
                    f"Key {broken[0].as_py()!r} contains a line break, so it cannot be a line of {path}.",
                    "Omit --write-keys: the keep list has the keys.",
                )
            for start in range(0, len(part), _AT_ONCE):
                lines = part.slice(start, _AT_ONCE).to_pylist()
                file.write("".join(f"{line}\n" for line in lines).encode())
