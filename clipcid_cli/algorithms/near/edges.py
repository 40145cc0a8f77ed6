"""Weighted pairs of rows: what a search finds and a forest is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from clipcid_cli.algorithms.near.exact import BoolArray, FloatArray, IntArray

# Edges merged at once: about 60 bytes each while they are sorted.
_MERGED_AT_ONCE = 2**14


@dataclasses.dataclass(frozen=True)
class Edges:
    """Weighted pairs of rows: the smaller and the larger row, integers [E], and their distance, float32 [E], at least 0."""

    a: IntArray
    b: IntArray
    weight: FloatArray

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, index: slice | BoolArray | IntArray) -> Edges:
        return Edges(self.a[index], self.b[index], self.weight[index])

    @staticmethod
    def empty() -> Edges:
        return Edges(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))

    @staticmethod
    def concatenate(parts: Iterable[Edges]) -> Edges:
        """Return all edges of `parts` in their order; not a copy where only one has any."""
        parts = [part for part in parts if len(part)] or [Edges.empty()]
        if len(parts) == 1:
            return parts[0]
        return Edges(*map(np.concatenate, zip(*((part.a, part.b, part.weight) for part in parts), strict=True)))

    def renumbered(self, numbers: IntArray) -> Edges:
        """Return the edges, ascending, with each row replaced by its number, int64 [N]; numbers keep the order of rows."""
        return sort_edges(Edges(numbers[self.a], numbers[self.b], self.weight))

    def up_to(self, cutoff: float) -> Edges:
        """Return the edges whose weight is at most `cutoff`; they must be in ascending order."""
        return self[: int(np.searchsorted(self.weight, np.float32(cutoff), side="right"))]


def sort_edges(edges: Edges) -> Edges:
    """Order edges by (weight, smaller row, larger row)."""
    return edges[_order(edges)]


def _order(edges: Edges) -> IntArray:
    # Non-negative floats order like their bit patterns, so weight and smaller row form one 64-bit key, whose vectorised
    # sort is many times faster than a sort by three columns; ties are then sorted by the larger row.
    if len(edges) and int(edges.a.max()) >= 2**32:
        return np.lexsort((edges.b, edges.a, edges.weight))
    weight = edges.weight + np.float32(0.0)  # −0.0 would sort above everything
    key = weight.view(np.uint32).astype(np.uint64)
    key <<= np.uint64(32)
    key |= edges.a.view(f"u{edges.a.itemsize}")
    equal = key[1:] == key[:-1]
    if ((key[1:] > key[:-1]) | (equal & (edges.b[1:] >= edges.b[:-1]))).all():  # as a part that was merged before
        return np.arange(len(key))
    order: IntArray = np.argsort(key)
    key = key[order]
    equal = key[1:] == key[:-1]
    if equal.any():
        tied = np.flatnonzero(np.append(equal, False) | np.append(False, equal))
        among = order[tied]
        order[tied] = among[np.lexsort((edges.b[among], key[tied]))]
    return order


def merge_edges(one: Edges, other: Edges) -> tuple[Edges, BoolArray]:
    """Return all edges of both, ascending, and which of them are the other's, bool [E]; each must ascend.

    The memory is that of the result, and of a part of it. Equal weights are sorted at once, however many they are.
    """
    length = len(one) + len(other)
    if not len(one) or not len(other):
        return one if len(one) else other, np.full(length, not len(one))
    kind = np.result_type(one.a, other.a)
    merged = Edges(np.empty(length, kind), np.empty(length, kind), np.empty(length, np.float32))
    is_other = np.empty(length, np.bool_)
    start_one = start_other = 0
    for last in [*one.weight[_MERGED_AT_ONCE - 1 :: _MERGED_AT_ONCE].tolist(), np.inf]:
        end_one, end_other = (int(np.searchsorted(edges.weight, np.float32(last), "right")) for edges in (one, other))
        part = Edges.concatenate([one[start_one:end_one], other[start_other:end_other]])
        order = _order(part)
        place = slice(start_one + start_other, end_one + end_other)
        merged.a[place], merged.b[place], merged.weight[place] = part.a[order], part.b[order], part.weight[order]
        is_other[place] = order >= end_one - start_one
        start_one, start_other = end_one, end_other
    return merged, is_other
