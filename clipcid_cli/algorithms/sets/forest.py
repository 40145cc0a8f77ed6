"""Single-linkage forests: minimum spanning forests of the distance graph, merged from any pieces in any order.

Edges are totally ordered by (weight, smaller row, larger row), so the minimum spanning forest of a graph is unique, and
MSF(A ∪ B) = MSF(MSF(A) ∪ MSF(B)): a forest can be built edge by edge, tile by tile or process by process. Its components
without the edges heavier than ε are the groups of images within ε of each other, chains included.

Source: docs/method.md#minimum-spanning-forest. Borůvka 1926 for the rounds; the order of ties is ours.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from clipcid_cli.algorithms.gather import gather
from clipcid_cli.algorithms.near.edges import Edges, merge_edges, sort_edges
from clipcid_cli.algorithms.near.exact import BoolArray, FloatArray, IntArray, row_type
from clipcid_cli.algorithms.sets.components import connected_components, find_roots

# Edges collected before they are merged into the forest; at least a quarter as many as the forest has, and one for so many
# rows, since a merge passes over all of them.
_MIN_FOLD = 2**18
_ROWS_OF_FOLD = 32
# Small pieces, each three arrays of its own, are put together before they are many.
_MAX_PIECES = 2**10
_CURVE_POINTS = 1000


@dataclasses.dataclass(frozen=True)
class _Round:
    """A round of Borůvka's algorithm: of each node its lightest edge's weight (∞ for none), and the next round's node."""

    weight: FloatArray
    parent: IntArray


def _contract(num_rows: int, edges: Edges) -> tuple[IntArray, list[_Round]]:
    """Find the minimum spanning forest of a graph whose edges ascend: their places, ascending, and the rounds.

    Nodes without further edges leave after a round.
    """
    kind = row_type(max(num_rows, len(edges)))
    rank = np.arange(len(edges), dtype=kind)
    a, b = edges.a, edges.b
    num_nodes = num_rows
    picked = list[IntArray]()
    rounds = list[_Round]()
    while none := len(rank):
        # Edges ascend, so writing their places in reverse leaves the lightest edge at each node.
        place = np.arange(none, dtype=kind)
        lightest = np.full(num_nodes, none, dtype=kind)
        lightest[a[::-1]] = place[::-1]
        lightest_b = np.full(num_nodes, none, dtype=kind)
        lightest_b[b[::-1]] = place[::-1]
        np.minimum(lightest, lightest_b, out=lightest)
        del lightest_b
        has_edge = lightest < none
        is_chosen = np.zeros(none + 1, np.bool_)  # the last place is that of nodes without an edge
        is_chosen[lightest] = True
        chosen = np.flatnonzero(is_chosen[:-1])
        picked.append(rank[chosen])
        weight = np.full(num_nodes, np.inf, np.float32)
        weight[has_edge] = gather(edges.weight, gather(rank, lightest[has_edge]))
        del lightest
        labels = connected_components(num_nodes, a[chosen], b[chosen])
        has_edge &= labels == np.arange(num_nodes, dtype=kind)  # the first node of each component
        nodes = np.cumsum(has_edge, dtype=kind)
        num_nodes = int(nodes[-1])
        nodes -= 1
        parent = gather(nodes, labels)
        rounds.append(_Round(weight, parent))
        a, b = gather(parent, a), gather(parent, b)
        apart = a != b
        a, b, rank = a[apart], b[apart], rank[apart]
    return np.sort(np.concatenate([np.empty(0, kind), *picked])), rounds


class ForestSink:
    """Merges edges into a minimum spanning forest as they are added, in memory bounded by the number of rows.

    The rounds that built the forest tell how light the path between two rows is: the heaviest edge of the path weighs as
    much as the heaviest lightest edge of the nodes that the rows are merged into, round by round, until both are one node
    (King 1997, "A simpler minimum spanning tree verification algorithm"). They take about 12 bytes a row, at most 16.
    """

    def __init__(self, num_rows: int, known: Edges | None = None) -> None:
        self._num_rows = num_rows
        self._rounds: list[_Round] = []
        self._forest, self._is_fresh = Edges.empty(), np.empty(0, np.bool_)
        # Since the last merge; those drained before are saved already.
        self._drained = list[Edges]()
        self._added = list[Edges]()
        self._num_added = 0
        if known is not None:
            self.add(known)
            self.result()
            self.drain()

    def wants(self, a: IntArray, b: IntArray, at_least: FloatArray) -> BoolArray:
        """Tell which pairs can still be edges of the forest, from lower bounds of their weights.

        A pair whose rows are joined already by strictly lighter edges closes a cycle as its heaviest edge and is in no
        minimum spanning forest. Edges added since the last merge are not considered, so True does not mean that it joins.
        """
        possible = np.ones(len(a), np.bool_)
        pair = np.arange(len(a))
        for level in self._rounds:
            lighter = (gather(level.weight, a) < at_least) & (gather(level.weight, b) < at_least)
            a, b, pair, at_least = a[lighter], b[lighter], pair[lighter], at_least[lighter]
            if not len(pair):
                break
            a, b = gather(level.parent, a), gather(level.parent, b)
            apart = a != b
            possible[pair[~apart]] = False
            a, b, pair, at_least = a[apart], b[apart], pair[apart], at_least[apart]
        return possible

    def add(self, edges: Edges) -> None:
        edges = edges[self.wants(edges.a, edges.b, edges.weight)]
        a, b = (ends.astype(row_type(self._num_rows), copy=False) for ends in (edges.a, edges.b))
        self._added.append(Edges(a, b, edges.weight))
        self._num_added += len(edges)
        del edges, a, b  # to merge needs their memory
        if self._num_added >= max(_MIN_FOLD, len(self._forest) // 4, self._num_rows // _ROWS_OF_FOLD):
            self.result()
        elif len(self._added) >= _MAX_PIECES:
            self._added = [Edges.concatenate(self._added)]

    def result(self) -> Edges:
        """Return the forest of all edges added so far, ascending by (weight, smaller row, larger row)."""
        if self._num_added:
            drained, added = (sort_edges(Edges.concatenate(parts)) for parts in (self._drained, self._added))
            self._drained, self._added = [], []
            self._num_added = 0
            edges_added, is_added = merge_edges(drained, added)
            del drained, added
            edges, is_found = merge_edges(self._forest, edges_added)
            is_fresh = np.empty(len(edges), np.bool_)
            is_fresh[is_found], is_fresh[~is_found] = is_added, self._is_fresh
            del edges_added
            self._forest, self._rounds = Edges.empty(), []  # their memory is needed
            chosen, self._rounds = _contract(self._num_rows, edges)
            self._forest, self._is_fresh = edges[chosen], is_fresh[chosen]
        return self._forest

    def drain(self) -> Edges:
        """Return the edges added since the last call, without those that a merge has ruled out; it merges nothing."""
        fresh = Edges.concatenate([self._forest[self._is_fresh], *self._added])
        self._is_fresh = np.zeros_like(self._is_fresh)
        self._drained.append(Edges.concatenate(self._added))
        self._added = []
        return fresh


@dataclasses.dataclass(frozen=True)
class Curve:
    """Over the cut-off, float32 [C] and strictly ascending, the images kept and the size of the largest set, int64 [C]."""

    distance: FloatArray
    kept: IntArray
    largest: IntArray


def forest_curve(num_rows: int, forest: Edges, chosen: float | None) -> Curve:
    """Count components, and measure the largest, from the smallest weight of an ascending forest to its largest.

    The chosen cut-off, if any, is among the points; the others fall evenly on the number of images kept.
    """
    ends = np.linspace(1, max(1, len(forest)), _CURVE_POINTS).astype(np.int64) - 1
    distances = forest.weight[np.unique(ends)] if len(forest) else np.zeros(1, np.float32)
    if chosen is not None:
        distances = np.append(distances, np.float32(chosen))
    distances = np.unique(distances)
    ends = np.searchsorted(forest.weight, distances, side="right")
    kind = row_type(num_rows)
    labels = np.arange(num_rows, dtype=kind)
    sizes = np.ones(num_rows, dtype=kind)
    largest = 1
    largest_at = np.empty(len(ends), np.int64)
    start = 0
    for point, end in enumerate(ends.tolist()):
        # Only components that these edges touch are relabelled, so the whole curve costs one pass.
        roots_a, roots_b = find_roots(labels, forest.a[start:end]), find_roots(labels, forest.b[start:end])
        roots, position = np.unique(np.concatenate([roots_a, roots_b]), return_inverse=True)
        joined = connected_components(len(roots), position[: len(roots_a)], position[len(roots_a) :])
        labels[roots] = roots[joined]
        total = np.bincount(joined, weights=sizes[roots], minlength=len(roots)).astype(kind)
        sizes[roots] = total
        largest = max(largest, int(total.max(initial=0)))
        largest_at[point] = largest
        start = end
    return Curve(distances, num_rows - ends, largest_at)
