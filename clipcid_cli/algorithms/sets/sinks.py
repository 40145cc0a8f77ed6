"""What a search keeps of the pairs it finds, beside their forest (:class:`clipcid_cli.algorithms.sets.forest.ForestSink`).

All sinks have ``wants``, which tells a search what is worth computing, ``add`` for what it finds, ``drain`` for what is yet
to be saved, and ``result``; pairs may come in any order and more than once.

Source: [O].
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import FloatArray, IntArray


class NearestOf:
    """The nearest other row of each of some rows; of equally near ones the smaller.

    Args:
        rows: Row numbers, integers [M], ascending.

    Attributes:
        other: The nearest row of each, int64 [M]; −1 where none was found.
        distance: Its distance, float32 [M]; infinite where none was found.
    """

    def __init__(self, rows: IntArray) -> None:
        self._rows = rows
        self.other = np.full(len(rows), -1, np.int64)
        self.distance = np.full(len(rows), np.inf, np.float32)
        self._changed = np.zeros(len(rows), np.bool_)

    def wants(self, a: IntArray, b: IntArray, at_least: FloatArray) -> npt.NDArray[np.bool_]:
        """Tell which pairs may be nearer than those found."""
        farthest = np.append(self.distance, np.float32(-1.0))  # the last one is that of all other rows
        return np.asarray((a != b) & (at_least <= np.maximum(farthest[self._places(a)], farthest[self._places(b)])))

    def add(self, edges: Edges) -> None:
        """Add pairs, of which one row or both are among those asked for."""
        place = np.concatenate([self._places(edges.a), self._places(edges.b)])
        other, weight = np.concatenate([edges.b, edges.a]), np.tile(edges.weight, 2)
        order = np.lexsort((other, weight, place))
        order = order[(np.diff(place[order], prepend=-1) != 0) & (place[order] < len(self._rows))]
        place, other, weight = place[order], other[order], weight[order]
        known = self.distance[place]
        better = (weight < known) | ((weight == known) & (other < self.other[place]))
        place = place[better]
        self.other[place], self.distance[place] = other[better], weight[better]
        self._changed[place] = True

    def drain(self) -> Edges:
        """Return the pairs of rows whose nearest has changed since the last call."""
        changed, self._changed = self._changed, np.zeros_like(self._changed)
        return self._pairs(changed)

    def result(self) -> Edges:
        """Return the pairs of the rows with their nearest; one of two rows that were asked for may be there twice."""
        return self._pairs(self.other >= 0)

    def _pairs(self, which: npt.NDArray[np.bool_]) -> Edges:
        row, other = self._rows[which], self.other[which]
        return Edges(np.minimum(row, other), np.maximum(row, other), self.distance[which])

    def _places(self, rows: IntArray) -> IntArray:
        """Return the place of each row among those asked for; their number for others."""
        at = np.searchsorted(self._rows, rows)
        return np.where(self._rows[np.minimum(at, len(self._rows) - 1)] == rows, at, len(self._rows))


class AllPairs:
    """All pairs of two rows with one label.

    Args:
        labels: Label of each row, integers [N].

    Attributes:
        number: How many there are, 20 bytes each.
    """

    def __init__(self, labels: IntArray) -> None:
        self._labels = labels
        self.number = 0
        self._pairs, self._drained = list[Edges](), 0

    def wants(self, a: IntArray, b: IntArray, at_least: FloatArray) -> npt.NDArray[np.bool_]:
        """Tell which pairs have one label."""
        return np.asarray(self._labels[a] == self._labels[b])

    def add(self, edges: Edges) -> None:
        """Add pairs, each once."""
        self._pairs.append(edges)
        self.number += len(edges)

    def drain(self) -> Edges:
        """Return the pairs added since the last call."""
        new, self._drained = self._pairs[self._drained :], len(self._pairs)
        return Edges.concatenate(new)

    def result(self) -> Edges:
        """Return all pairs."""
        return Edges.concatenate(self._pairs)
