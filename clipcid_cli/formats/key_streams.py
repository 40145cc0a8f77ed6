"""Files with keys matched with the samples of a data set, at any size: no key is held longer than its chunk.

Files that the toolkit made of one another list their rows in the order of the data, with some left out: they are read once,
in step with the shards, and every key is compared (`OrderedMatch`). Files in another order are joined by a sorted merge on
the disk (`join_stream`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import create_mapped
from clipcid_cli.formats.key_join import hash_keys
from clipcid_cli.formats.parquet import is_text
from clipcid_cli.formats.reading import reading

Values = npt.NDArray[np.int64]
KeyStream: TypeAlias = Callable[[], Iterator[tuple[pa.Array, Values]]]
"""Starts reading a file: chunks of n keys, with k numbers ≥ 0 for each, int64 [n, k]."""

# Hashes sorted together: they, their rows and their order take 320 MB.
_SORTED_AT_ONCE = 2**23
_READ_AT_ONCE = 2**22
_ROWS_OF_PARQUET = 2**16
# Hashes that agree are confirmed by a second, independent one: 128 bits in all.
_CHECK = 0x5851F42D4C957F2D


def parquet_keys(path: Path, value: str | None = None) -> KeyStream:
    """Read the column ``key`` of a parquet file, with the number of each row, or with another column."""

    def read() -> Iterator[tuple[pa.Array, Values]]:
        first = 0
        with reading(path, "a parquet file with a column key of text", "Make it again."), pq.ParquetFile(path) as file:
            if not is_text(kind := file.schema_arrow.field("key").type):
                raise TypeError(f"its keys are of type {kind}")
            for batch in file.iter_batches(_ROWS_OF_PARQUET, columns=["key", *([value] if value else [])]):
                rows = np.arange(first, first + len(batch), dtype=np.int64)
                values = batch[value].to_numpy(zero_copy_only=False).astype(np.int64) if value else rows
                yield batch["key"], values[:, None]
                first += len(batch)

    return read


class OrderedMatch:
    """A file read in step with the shards of a data set."""

    def __init__(self, stream: KeyStream, width: int) -> None:
        """Start reading.

        Args:
            stream: The file.
            width: k, the numbers of each key.
        """
        self._chunks, self._width = stream(), width
        self._keys, self._values = pa.array([], pa.large_string()), np.empty((0, width), dtype=np.int64)
        self._repeats = False

    def match(self, keys: pa.Array) -> Values:
        """Look up the n keys (large_string, all different) of the next shard: int64 [n, k], −1 for those not in the file."""
        values = np.full((len(keys), self._width), -1, dtype=np.int64)
        matched = 0
        while matched < len(keys) and not self._repeats and self._load():
            part = self._keys.slice(0, len(keys) - matched)
            if part.equals(keys):
                places = np.arange(len(keys))
            else:
                places = pc.index_in(part, value_set=keys).fill_null(-1).to_numpy()
            others = np.flatnonzero(places < 0)
            count = int(others[0]) if len(others) else len(places)
            values[places[:count]] = self._values[:count]
            matched += count
            self._keys, self._values = self._keys.slice(count), self._values[count:]
            if len(others):
                break
        self._repeats = self._repeats or np.count_nonzero(values[:, 0] >= 0) != matched
        return values

    def is_complete(self) -> bool:
        """Tell, after the last shard, whether each row of the file was matched: then it is in the data's order."""
        return not (self._repeats or self._load())

    def _load(self) -> bool:
        while not len(self._keys):
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._keys, self._values = chunk[0].cast(pa.large_string()), chunk[1]
        return True


class JoinedMatch:
    """The numbers that `join_stream` found, handed out shard by shard."""

    def __init__(self, values: Values) -> None:
        self._values, self._first = values, 0

    def match(self, keys: pa.Array) -> Values:
        """Return those of the n keys of the next shard, int64 [n, k]."""
        first = self._first
        self._first += len(keys)
        return self._values[first : self._first]

    def is_complete(self) -> bool:
        """Rows of the file that belong to no key do not matter."""
        return True


def join_stream(
    keys: Iterable[pa.Array], count: int, stream: KeyStream, width: int, folder: Path, source: Path
) -> Values:
    """Look up keys in a file that lists them in any order.

    Memory is of a fixed size; on the disk it takes 24 + 8·k bytes a key.

    Args:
        keys: The keys to look up in chunks, all different.
        count: How many there are.
        stream: The file; each of the keys is there at most once.
        width: k, the numbers of each key.
        folder: Where files are written; it may be removed as soon as the result is there.
        source: What `stream` reads, for errors.

    Returns:
        int64 [count, k], mapped; −1 for keys not in the file. Keys are equal where two independent 64-bit hashes are.

    Raises:
        ClipcidError: when one of the keys is there twice, or the disk is full.
    """
    values = create_mapped(folder / "values", np.dtype(np.int64), (count, width))
    if not count:
        return values
    for start in range(0, count, _READ_AT_ONCE):
        values[start : start + _READ_AT_ONCE] = -1
    hashes, checks = (create_mapped(folder / name, np.dtype(np.uint64), (count,)) for name in ("hashes", "checks"))
    first = 0
    for chunk in keys:
        column = pa.chunked_array([chunk])
        hashes[first : first + len(chunk)] = hash_keys(column)
        checks[first : first + len(chunk)] = hash_keys(column, _CHECK)
        first += len(chunk)
    rows = _sort(hashes, folder)
    seen = 0
    for chunk, numbers in stream():
        for start in range(0, len(chunk), _READ_AT_ONCE):
            part = pa.chunked_array([chunk.slice(start, _READ_AT_ONCE)])
            places, owners = _find(part, hashes, checks, rows)
            repeated = values[owners, 0] >= 0
            repeated[np.setdiff1d(np.arange(len(owners)), np.unique(owners, return_index=True)[1])] = True
            if repeated.any():
                place = int(places[repeated].min())
                raise _repeated_key(part[place].as_py(), seen + start + place, stream, source)
            values[owners] = numbers[start : start + _READ_AT_ONCE][places]
        seen += len(chunk)
    return values


def _find(
    keys: pa.ChunkedArray, hashes: npt.NDArray[np.uint64], checks: npt.NDArray[np.uint64], rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Find which of some keys are known: their places among them, and the row of each, int64 [f] each."""
    sought = hash_keys(keys)
    order = np.argsort(sought, kind="stable")  # neighbours in the table are then looked up together
    sought, sought_check = sought[order], hash_keys(keys, _CHECK)[order]
    at = np.searchsorted(hashes, sought)
    places, owners = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    left = np.arange(len(sought))
    while len(left):
        left = left[at[left] < len(hashes)]
        left = left[hashes[at[left]] == sought[left]]
        found = rows[at[left]]
        same = checks[found] == sought_check[left]
        places.append(order[left[same]])
        owners.append(found[same])
        left = left[~same]  # another key of the same hash: the next one may be it
        at[left] += 1
    return np.concatenate(places), np.concatenate(owners)


def _sort(hashes: npt.NDArray[np.uint64], folder: Path) -> npt.NDArray[np.int64]:
    """Sort mapped hashes in place, a range of them at a time, and return the row each had, int64, mapped."""
    count = len(hashes)
    rows = create_mapped(folder / "rows", np.dtype(np.int64), (count,))
    ordered = create_mapped(folder / "ordered", np.dtype(np.uint64), (count,))
    buckets = np.uint64(-(-count // _SORTED_AT_ONCE))
    first = 0
    for bucket in range(int(buckets)):
        inside = []
        for start in range(0, count, _READ_AT_ONCE):
            part = hashes[start : start + _READ_AT_ONCE]
            inside.append(start + np.flatnonzero((part >> np.uint64(32)) * buckets >> np.uint64(32) == bucket))
        members = np.concatenate(inside)
        found = hashes[members]
        order = np.argsort(found, kind="stable")
        ordered[first : first + len(members)] = found[order]
        rows[first : first + len(members)] = members[order]
        first += len(members)
    for start in range(0, count, _READ_AT_ONCE):
        hashes[start : start + _READ_AT_ONCE] = ordered[start : start + _READ_AT_ONCE]
    del ordered
    (folder / "ordered").unlink()
    return rows


def _repeated_key(key: str, row: int, stream: KeyStream, source: Path) -> ClipcidError:
    first = earlier = 0
    for chunk, _ in stream():
        place = pc.index(chunk.cast(pa.large_string()), pa.scalar(key, pa.large_string())).as_py()
        if place >= 0:
            earlier = first + place
            break
        first += len(chunk)
    return ClipcidError(
        f"Key {key!r} occurs in row {earlier:,} and again in row {row:,} of {source}.",
        "Keys must be unique: make the file again with --keys shard, or remove one of the rows.",
    )
