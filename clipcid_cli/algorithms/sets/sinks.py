"""What a search collects of the pairs it finds, where it makes no forest of them: the nearest ones, or all.

A sink is asked which pairs are worth computing and given those found, in any order and some of them twice. Now and then it
is drained: of the pairs added since, it returns those that may still matter. What all drains returned comes to the same
result.
(:class:`clipcid_cli.algorithms.sets.forest.ForestSink` is the other one.)
"""

from __future__ import annotations

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import BoolArray, FloatArray, IntArray


class NearestOf:
    """The nearest other row of each of some rows, ascending; of equally near ones the smallest."""

    def __init__(self, rows: IntArray) -> None:
        self._rows = rows
        self._other = np.full(len(rows), -1, rows.dtype)
        # One more entry serves all other rows.
        self._distance = np.append(np.full(len(rows), np.inf, np.float32), np.float32(-1.0))
        self._is_fresh = np.zeros(len(rows), np.bool_)

    def wants(self, a: IntArray, b: IntArray, at_least: FloatArray) -> BoolArray:
        """Tell which pairs may be nearer than those found."""
        farthest = np.maximum(self._distance[self._place(a)], self._distance[self._place(b)])
        return np.asarray((a != b) & (at_least <= farthest))

    def add(self, edges: Edges) -> None:
        row, other = np.concatenate([edges.a, edges.b]), np.concatenate([edges.b, edges.a])
        place, weight = self._place(row), np.concatenate([edges.weight, edges.weight])
        order = np.lexsort((other, weight, place))
        order = order[np.diff(place[order], prepend=-1) != 0]
        order = order[place[order] < len(self._rows)]
        place, other, weight = place[order], other[order], weight[order]
        known = self._distance[place]
        nearer = (weight < known) | ((weight == known) & (other < self._other[place]))
        place = place[nearer]
        self._other[place], self._distance[place] = other[nearer], weight[nearer]
        self._is_fresh[place] = True

    def drain(self) -> Edges:
        """Return the nearest pairs of the rows that have come nearer since the last call."""
        fresh = np.flatnonzero(self._is_fresh)
        self._is_fresh[fresh] = False
        return self._pairs(fresh)

    def result(self) -> Edges:
        """Return the nearest pair of each row that has any, in the order of the rows."""
        return self._pairs(np.flatnonzero(self._other >= 0))

    def _pairs(self, places: IntArray) -> Edges:
        row, other = self._rows[places], self._other[places]
        return Edges(np.minimum(row, other), np.maximum(row, other), self._distance[places])

    def _place(self, rows: IntArray) -> IntArray:
        """Return the place of each row among the rows of the sink; of a row that it has not, their number."""
        place = np.searchsorted(self._rows, rows)
        return np.where(self._rows[np.minimum(place, len(self._rows) - 1)] == rows, place, len(self._rows))


class PairsWithin:
    """All pairs of rows of one component, given the component of each row; beyond a number of pairs no more are wanted."""

    def __init__(self, labels: IntArray, most: int) -> None:
        self._labels = labels
        self._most = most
        self._pairs = list[Edges]()
        self._num_pairs = 0

    def wants(self, a: IntArray, b: IntArray, at_least: FloatArray) -> BoolArray:
        """Tell which pairs are of one component."""
        return np.asarray((self._labels[a] == self._labels[b]) & (self._num_pairs <= self._most))

    def add(self, edges: Edges) -> None:
        # Copied: those of another process are mapped from files that are removed after this, and where another host removes
        # them, a map loses its content (NFS).
        self._pairs.append(Edges(edges.a.copy(), edges.b.copy(), edges.weight.copy()))
        self._num_pairs += len(edges)

    def drain(self) -> Edges:
        """Return the pairs added since the last call, and forget them."""
        pairs, self._pairs = self.result(), []
        return pairs

    def result(self) -> Edges:
        return Edges.concatenate(self._pairs)
