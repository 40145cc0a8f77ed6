"""Identical rows, found by hashing: the time for copies of a placeholder image must grow with their number, not its square.

Source: docs/method.md#identical-rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import HalfArray, IntArray, ReadRows

HashArray = npt.NDArray[np.uint64]

_ROWS_AT_ONCE = 8192


def hash_rows(rows_ND: HalfArray) -> HashArray:
    """Hash rows of float16 [N, D] to uint64 [N]; rows that compare equal hash equal, −0 and +0 included."""
    bits = np.ascontiguousarray(rows_ND).view(np.uint16)
    if np.any(bits == 0x8000):
        bits = np.where(bits == 0x8000, np.uint16(0), bits)
    padding = -bits.shape[1] % 4
    if padding:
        bits = np.pad(bits, ((0, 0), (0, padding)))
    words = bits.view(np.uint64)
    # One odd constant a column, spread by the golden ratio; the shift carries high bits of a word into low bits of the sum.
    constants = (np.arange(1, words.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
    mixed = words * constants
    mixed ^= mixed >> np.uint64(29)
    return np.asarray(mixed.sum(axis=1, dtype=np.uint64))


def collapse_duplicates(read: ReadRows, rows: IntArray, hashes: HashArray) -> tuple[IntArray, Edges]:
    """Find rows that are equal to an earlier one.

    Args:
        rows: Row numbers to compare, integers [N], ascending.
        hashes: Their :func:`hash_rows`; rows of one hash are compared.

    Returns:
        The unique rows, each the first of its kind, ascending; and the edges, all of weight 0, that join each copy to the
        first of its kind. Kruskal's algorithm would take these edges from the complete graph of the copies, since ties go to
        the smaller row.
    """
    if not len(rows):
        return rows, Edges.empty()
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    # Places in the order whose hash is that of the place before, and where the run of each begins.
    place = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    del ordered
    begins = np.append(True, np.diff(place) > 1)[: len(place)]
    copies, firsts = order[place], order[np.maximum.accumulate(np.where(begins, place - 1, 0))]
    del order
    smaller = list[IntArray]()
    larger = list[IntArray]()
    while len(copies):
        equal = np.concatenate(
            [
                (read(rows[copies[at : at + _ROWS_AT_ONCE]]) == read(rows[firsts[at : at + _ROWS_AT_ONCE]])).all(axis=1)
                for at in range(0, len(copies), _ROWS_AT_ONCE)
            ]
        )
        smaller.append(firsts[equal])
        larger.append(copies[equal])
        # Different rows of one hash: the first of the remaining ones heads a group of its own.
        copies, firsts = copies[~equal], firsts[~equal]
        if len(copies):
            _, group_start, group = np.unique(firsts, return_index=True, return_inverse=True)
            firsts = copies[group_start][group]
            is_head = np.zeros(len(copies), np.bool_)
            is_head[group_start] = True
            copies, firsts = copies[~is_head], firsts[~is_head]
    if not larger:
        return rows, Edges.empty()
    unique = np.ones(len(rows), np.bool_)
    unique[np.concatenate(larger)] = False
    a, b = rows[np.concatenate(smaller)], rows[np.concatenate(larger)]
    return rows[unique], Edges(a, b, np.zeros(len(a), np.float32))
