"""What a search keeps of the pairs it finds: their forest, and all of the pairs while they are few.

Source: [O]. Stars (:mod:`clipcid_cli.algorithms.sets.star`) need all pairs; collected on the way, these cost no
second search.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clipcid_cli.algorithms.near.edges import Edges, sort_edges
from clipcid_cli.algorithms.near.exact import FloatArray, IntArray
from clipcid_cli.algorithms.sets.forest import ForestBuilder


class PairCollector:
    """Collects the pairs of a search, each added once, in any order.

    Args:
        known: Forest edges known before the search.
        most_pairs: Limit of the pairs kept, 20 bytes each; beyond it only their forest is kept.
    """

    def __init__(self, num_rows: int, known: Edges, most_pairs: int) -> None:
        self._builder = ForestBuilder(num_rows, known)
        self._most = most_pairs
        self._pairs: list[Edges] | None = [] if most_pairs else None
        self._num_pairs = 0

    def may_matter(self, a: IntArray, b: IntArray, at_least: FloatArray) -> npt.NDArray[np.bool_]:
        """Tell which pairs are worth computing: all while they are kept, then those of :meth:`ForestBuilder.may_join`."""
        if self._pairs is not None:
            return np.ones(len(a), np.bool_)
        return self._builder.may_join(a, b, at_least)

    def add(self, edges: Edges) -> None:
        """Add pairs."""
        self._builder.add(edges)
        if self._pairs is not None:
            self._pairs.append(edges)
            self._num_pairs += len(edges)
            if self._num_pairs > self._most:
                self._pairs = None

    def forget_pairs(self) -> None:
        """Keep the forest only, as beyond the limit."""
        self._pairs = None

    def forest(self) -> Edges:
        """Return the forest of all known and added edges, ascending by (weight, smaller row, larger row)."""
        return self._builder.build()

    def pairs(self) -> Edges | None:
        """Return all added pairs, ascending by (weight, smaller row, larger row); None where only the forest was kept."""
        if self._pairs is None:
            return None
        self._pairs = [sort_edges(Edges.concatenate(self._pairs))]
        return self._pairs[0]
