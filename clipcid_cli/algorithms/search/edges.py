"""Weighted pairs of rows: what a search finds and a forest is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from clipcid_cli.algorithms.search.distances import FloatArray, IntArray


@dataclasses.dataclass(frozen=True)
class Edges:
    """Weighted pairs of rows.

    Attributes:
        a: Smaller row of each pair, integers [E].
        b: Larger row of each pair, integers [E].
        weight: Distance of each pair, float32 [E], at least 0.
    """

    a: IntArray
    b: IntArray
    weight: FloatArray

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, index: slice | npt.NDArray[np.bool_] | IntArray) -> Edges:
        return Edges(self.a[index], self.b[index], self.weight[index])

    @staticmethod
    def empty() -> Edges:
        """Return no edges."""
        return Edges(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))

    @staticmethod
    def concatenate(parts: Iterable[Edges]) -> Edges:
        """Return all edges of `parts` in their order."""
        parts = [Edges.empty(), *parts]
        return Edges(
            np.concatenate([part.a for part in parts]),
            np.concatenate([part.b for part in parts]),
            np.concatenate([part.weight for part in parts]),
        )

    def in_type(self, kind: type[np.signedinteger]) -> Edges:
        """Return the edges with row numbers of a type that holds them."""
        return Edges(self.a.astype(kind, copy=False), self.b.astype(kind, copy=False), self.weight)

    def renumbered(self, numbers: IntArray) -> Edges:
        """Return the edges, ascending, with each row replaced by its number, int64 [N]; numbers keep the order of rows."""
        return sort_edges(Edges(numbers[self.a], numbers[self.b], self.weight))

    def up_to(self, cutoff: float) -> Edges:
        """Return the edges whose weight is at most `cutoff`; they must be in ascending order."""
        return self[: int(np.searchsorted(self.weight, np.float32(cutoff), side="right"))]


def sort_edges(edges: Edges) -> Edges:
    """Order edges by (weight, smaller row, larger row)."""
    # Non-negative floats order like their bit patterns, so weight and smaller row form one 64-bit key, whose vectorised
    # sort is many times faster than a sort by three columns; ties are then sorted by the larger row.
    if len(edges) and int(edges.a.max()) >= 2**32:
        return edges[np.lexsort((edges.b, edges.a, edges.weight))]
    weight = edges.weight + np.float32(0.0)  # −0.0 would sort above everything
    key = weight.view(np.uint32).astype(np.uint64)
    key <<= np.uint64(32)
    key |= edges.a.view(f"u{edges.a.itemsize}")
    order = np.argsort(key)
    key = key[order]
    equal = key[1:] == key[:-1]
    if equal.any():
        tied = np.flatnonzero(np.concatenate([equal, [False]]) | np.concatenate([[False], equal]))
        among = order[tied]
        order[tied] = among[np.lexsort((edges.b[among], key[tied]))]
    del key, weight
    return edges[order]
