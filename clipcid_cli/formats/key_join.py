"""Rows of different files joined by key, and keys checked for repeats, at any scale.

Keys are compared by sorted 64-bit hashes, and themselves where hashes agree. A Python dict of 400 million keys would take
some 60 GB; hashes and their order take 16 bytes a row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.errors import ClipcidError

Keys: TypeAlias = "pa.ChunkedArray | pa.Array | Sequence[str]"

_CHECKED_AT_ONCE = 2**20
_HASHED_AT_ONCE = 2**16


def join_keys(left: Keys, right: Keys) -> npt.NDArray[np.int64]:
    """Find each key of `left` among `right`.

    Args:
        left: Keys to look for, n of them.
        right: Keys to look among; each must be there once.

    Returns:
        int64 [n]: the position in `right` of each key of `left`, −1 where it is not there. Keys are compared, not only
        their hashes.

    Raises:
        ClipcidError: when a key occurs twice in `right`.
    """
    return KeyIndex(right).find(left)


class KeyIndex:
    """Keys to look among, each there once; made once for many looks.

    Raises:
        ClipcidError: when a key occurs twice.
    """

    def __init__(self, keys: Keys) -> None:
        self._column = _as_column(keys)
        hashes = hash_keys(self._column)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        _refuse_repeats(self._column, self._hashes, self._order)

    def find(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Find each of n keys: int64 [n], its position, −1 where it is not there."""
        sought, column, order = _as_column(keys), self._column, self._order
        hashes = hash_keys(sought)
        first = np.searchsorted(self._hashes, hashes, side="left")
        last = np.searchsorted(self._hashes, hashes, side="right")
        positions = np.full(len(sought), -1, dtype=np.int64)
        found = last > first
        positions[found] = order[first[found]]
        for row in np.flatnonzero(last - first > 1):  # different keys of one hash
            key = sought[int(row)].as_py()
            same = [int(place) for place in order[first[row] : last[row]] if column[int(place)].as_py() == key]
            positions[row] = same[0] if same else -1
        for start in range(0, len(sought), _CHECKED_AT_ONCE):
            part = positions[start : start + _CHECKED_AT_ONCE]
            hit = np.flatnonzero(part >= 0)
            equal = pc.equal(sought.take(pa.array(hit + start)), column.take(pa.array(part[hit])))
            part[hit[~np.asarray(equal.to_numpy(), dtype=bool)]] = -1
        return positions


def find_repeated_key(keys: Keys) -> tuple[str, int, int] | None:
    """Find a key that occurs twice.

    Returns:
        The key and its first two positions, for the repeated key whose second position comes first; None when all
        differ.
    """
    column = _as_column(keys)
    hashes = hash_keys(column)
    order = np.argsort(hashes, kind="stable")
    return _first_repeat(column, hashes[order], order)


def mark_repeats(keys: Keys) -> npt.NDArray[np.bool_]:
    """Mark each of n keys that an earlier position has already: bool [n]."""
    column = _as_column(keys)
    hashes = hash_keys(column)
    order = np.argsort(hashes, kind="stable")
    repeated = np.zeros(len(column), dtype=np.bool_)
    for _, _, place in _repeats(column, hashes[order], order):
        repeated[place] = True
    return repeated


def hash_keys(keys: pa.ChunkedArray, variant: int = 0) -> npt.NDArray[np.uint64]:
    """Hash every key to 64 bits, the same on every machine; no key becomes a Python object.

    Args:
        variant: Hashes of different variants are independent.
    """
    hashes = np.empty(len(keys), dtype=np.uint64)
    first = 0
    for chunk in keys.chunks:
        for start in range(0, len(chunk), _HASHED_AT_ONCE):
            part = chunk.slice(start, _HASHED_AT_ONCE).cast(pa.large_binary())
            hashes[first : first + len(part)] = _hash_texts(part, variant)
            first += len(part)
    return hashes


def _hash_texts(texts: pa.Array, variant: int) -> npt.NDArray[np.uint64]:
    """Hash n byte strings (large_binary), eight bytes of all of them at a time."""
    _, offsets, data = texts.buffers()
    bounds = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    text = b"" if data is None else data[int(bounds[0]) : int(bounds[-1])].to_pybytes()
    starts, left = bounds[:-1] - bounds[0], np.diff(bounds)
    # The eight bytes that begin at any byte, as one number.
    words = np.ndarray(len(text) + 1, dtype="<u8", buffer=text + bytes(8), strides=(1,))
    hashes = _mix(left.astype(np.uint64) ^ np.uint64(variant))
    rows = np.flatnonzero(left > 0)
    while len(rows):
        word = words[starts[rows]]
        few = np.minimum(left[rows], 8).astype(np.uint64)
        word &= np.uint64(2**64 - 1) >> (np.uint64(64) - np.uint64(8) * few)
        hashes[rows] = _mix(hashes[rows] ^ word)
        starts, left = starts + 8, left - 8
        rows = rows[left[rows] > 0]
    return hashes


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Spread every bit over all 64. Source: Steele et al. 2014, SplitMix64 with the constants of Stafford's variant 13."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _refuse_repeats(column: pa.ChunkedArray, hashes: npt.NDArray[np.uint64], order: npt.NDArray[np.int64]) -> None:
    repeat = _first_repeat(column, hashes, order)
    if repeat is not None:
        key, one, other = repeat
        raise ClipcidError(
            f"Key {key!r} occurs in row {one:,} and again in row {other:,}.",
            "Keys must be unique: make the file again with --keys shard, or remove one of the rows.",
        )


def _first_repeat(
    column: pa.ChunkedArray, hashes: npt.NDArray[np.uint64], order: npt.NDArray[np.int64]
) -> tuple[str, int, int] | None:
    return min(_repeats(column, hashes, order), key=lambda repeat: repeat[2], default=None)


def _repeats(
    column: pa.ChunkedArray, hashes: npt.NDArray[np.uint64], order: npt.NDArray[np.int64]
) -> Iterator[tuple[str, int, int]]:
    """Yield each repeated key with its first position and a later one."""
    # Rows with the same hash are adjacent, in order of position.
    same = np.flatnonzero(hashes[1:] == hashes[:-1])
    for stretch in np.split(same, np.flatnonzero(np.diff(same) > 1) + 1) if len(same) else []:
        first: dict[str, int] = {}  # the keys of one hash: nearly always a single one
        for place in order[stretch[0] : stretch[-1] + 2].tolist():
            key = column[place].as_py()
            if key in first:
                yield key, first[key], place
            else:
                first[key] = place


def _as_column(keys: Keys) -> pa.ChunkedArray:
    if isinstance(keys, pa.ChunkedArray):
        return keys.cast(pa.large_string())
    if isinstance(keys, pa.Array):
        return pa.chunked_array([keys.cast(pa.large_string())])
    # Not by pa.array, which imports pandas: 0.15 s more for every command that reads a folder of images.
    try:
        kind, texts = pa.large_string(), [key.encode() for key in keys]
    except UnicodeEncodeError:  # names of files need not be UTF-8
        kind, texts = pa.large_binary(), [os.fsencode(key) for key in keys]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(texts))]
    return pa.chunked_array([pa.Array.from_buffers(kind, len(texts), buffers)])
