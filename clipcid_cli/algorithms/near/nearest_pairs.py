"""The nearest neighbours of some rows, collected from pairs as they are found.

Shape letters: S query rows, P pairs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import FloatArray, IntArray


class NearestPairs:
    """Keeps the pairs of each query row with its nearest neighbours, whatever order the pairs come in.

    Args:
        rows: The query rows, int64 [S], ascending.
        count: Neighbours of each; of equally near ones the smaller rows.
    """

    def __init__(self, rows: IntArray, count: int) -> None:
        self.rows = rows
        self._count = count
        self._row: IntArray = np.empty(0, np.int64)
        self._other: IntArray = np.empty(0, np.int64)
        self._weight: FloatArray = np.empty(0, np.float32)
        # Distance of the farthest neighbour kept of each query row; one more entry serves all other rows.
        self._farthest = np.append(np.full(len(rows), np.inf, np.float32), np.float32(-1.0))

    @property
    def edges(self) -> Edges:
        """The pairs kept; a pair of two query rows may occur twice."""
        return Edges(np.minimum(self._row, self._other), np.maximum(self._row, self._other), self._weight)

    def may_be_nearest(self, a: IntArray, b: IntArray, at_least: FloatArray) -> npt.NDArray[np.bool_]:
        """Tell which pairs may be among those to keep: a `Wants`."""
        farthest = np.maximum(self._farthest[self._position(a)], self._farthest[self._position(b)])
        return np.asarray((a != b) & (at_least <= farthest))

    def add(self, edges: Edges) -> None:
        """Add pairs."""
        row = np.concatenate([self._row, edges.a, edges.b])
        other = np.concatenate([self._other, edges.b, edges.a])
        weight = np.concatenate([self._weight, edges.weight, edges.weight])
        is_query = self._position(row) < len(self.rows)
        row, other, weight = row[is_query], other[is_query], weight[is_query]
        order = np.lexsort((other, weight, row))
        row, other, weight = row[order], other[order], weight[order]
        new = np.concatenate([[True], (row[1:] != row[:-1]) | (other[1:] != other[:-1])])[: len(row)]
        row, other, weight = row[new], other[new], weight[new]
        rank = np.arange(len(row)) - np.searchsorted(row, row, side="left")
        near = rank < self._count
        last = rank == self._count - 1
        self._farthest[self._position(row[last])] = weight[last]
        self._row, self._other, self._weight = row[near], other[near], weight[near]

    def _position(self, rows: IntArray) -> IntArray:
        """Return the position of each row among the query rows; their number for others."""
        at = np.searchsorted(self.rows, rows)
        return np.where(self.rows[np.minimum(at, len(self.rows) - 1)] == rows, at, len(self.rows))
