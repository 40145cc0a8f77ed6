"""What searches collect does not depend on the order of pairs, and is what their drains come to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from clipcid_cli.algorithms.near.edges import Edges, sort_edges
from clipcid_cli.algorithms.sets.forest import ForestSink
from clipcid_cli.algorithms.sets.sinks import NearestOf, PairsWithin

NUM_ROWS = 60


def some_pairs(seed: int) -> Edges:
    """Make all pairs of some rows in random order; weights tie."""
    generator = np.random.default_rng(seed)
    a, b = np.triu_indices(NUM_ROWS, 1)
    weight = (generator.integers(30, size=len(a)) / 7).astype(np.float32)
    return Edges(a, b, weight)[generator.permutation(len(a))]


def feed(sink: Any, edges: Edges, parts: int, drained: list[Edges] | None = None) -> Any:
    for part in np.array_split(np.arange(len(edges)), parts):
        some = edges[part]
        sink.add(some[sink.wants(some.a, some.b, some.weight)])
        if drained is not None:
            drained.append(sink.drain())
    return sink


def tell(edges: Edges) -> list[tuple[int, int, float]]:
    return list(zip(edges.a.tolist(), edges.b.tolist(), edges.weight.tolist(), strict=True))


ROWS = np.array([2, 3, 5, 8, 13, 21, 55])
SINKS = [
    lambda: ForestSink(NUM_ROWS),
    lambda: NearestOf(ROWS),
    lambda: PairsWithin(np.arange(NUM_ROWS) % 3, 10**6),
]


@pytest.mark.parametrize("make", SINKS, ids=["forest", "nearest", "pairs"])
def test_what_is_drained_comes_to_the_result(make: Callable[[], Any]) -> None:
    pairs = some_pairs(0)
    whole = tell(sort_edges(feed(make(), pairs, 1).result()))
    for seed, parts in ((1, 3), (2, 40)):
        order = np.random.default_rng(seed).permutation(len(pairs))
        drained = list[Edges]()
        feed(make(), pairs[order], parts, drained)
        assert tell(sort_edges(feed(make(), Edges.concatenate(drained), 2).result())) == whole


def test_the_nearest_is_the_smallest_of_equally_near_ones() -> None:
    pairs = some_pairs(4)
    found = tell(feed(NearestOf(ROWS), pairs, 5).result())
    for row, (a, b, weight) in zip(ROWS.tolist(), found, strict=True):
        near = [(w, b if a == row else a) for a, b, w in tell(pairs) if row in (a, b)]
        assert (weight, a + b - row) == min(near)


def test_no_more_pairs_are_wanted_than_fit() -> None:
    sink = PairsWithin(np.zeros(NUM_ROWS, np.int64), 100)
    pairs = some_pairs(5)
    feed(sink, pairs, 100)
    assert 100 < len(sink.result()) < 140
    other = PairsWithin(np.arange(NUM_ROWS), 100)
    assert len(feed(other, pairs, 3).result()) == 0
