"""What searches collect does not depend on the order of pairs; the star cover's two guarantees, by brute force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcid_cli.algorithms.near.edges import Edges, sort_edges
from clipcid_cli.algorithms.sets.components import connected_components
from clipcid_cli.algorithms.sets.covers import count_kept, find_cover_threshold
from clipcid_cli.algorithms.sets.forest import ForestSink
from clipcid_cli.algorithms.sets.sinks import NearestOf, PairsWithin
from clipcid_cli.algorithms.sets.star import star_cover

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


def points_and_pairs(seed: int, num_rows: int) -> tuple[np.ndarray, Edges]:
    """Points on a coarse grid of the plane, so that many distances tie, with all their pairs, ascending."""
    points = np.random.default_rng(seed).integers(0, 12, size=(num_rows, 2))
    a, b = np.triu_indices(num_rows, 1)
    weight = np.sqrt(((points[a] - points[b]) ** 2).sum(1)).astype(np.float32)
    return points, sort_edges(Edges(a.astype(np.int64), b.astype(np.int64), weight))


def cover_row_by_row(num_rows: int, pairs: Edges) -> list[int]:
    """The rule as docs/method.md#star-cover words it."""
    near: list[dict[int, float]] = [{} for _ in range(num_rows)]
    for a, b, weight in zip(pairs.a.tolist(), pairs.b.tolist(), pairs.weight.tolist(), strict=True):
        near[a][b] = near[b][a] = weight
    keepers: list[int] = []
    covered: set[int] = set()
    for row in sorted(range(num_rows), key=lambda row: (-len(near[row]), row)):
        if row not in covered:
            keepers.append(row)
            covered |= {row, *near[row]}
    nearest = [
        min((near[row][keeper], keeper) for keeper in keepers if keeper in near[row])
        if row not in keepers
        else (0, row)
        for row in range(num_rows)
    ]
    return [keeper for _, keeper in nearest]


@settings(max_examples=80)
@given(seed=st.integers(0, 2**32), num_rows=st.integers(1, 60), cutoff=st.sampled_from([0.0, 1.0, 1.5, 2.9, 5.0, 20.0]))
def test_star_cover(seed: int, num_rows: int, cutoff: float) -> None:
    points, pairs = points_and_pairs(seed, num_rows)
    near = pairs.up_to(cutoff)
    shuffled = near[np.random.default_rng(seed).permutation(len(near))]
    cover = star_cover(shuffled, np.ones(num_rows, np.int64))
    assert cover.tolist() == cover_row_by_row(num_rows, near)
    kept = np.flatnonzero(cover == np.arange(num_rows))
    assert (cover[cover] == cover).all()
    assert (np.linalg.norm(points - points[cover], axis=1) <= cutoff).all()
    between = np.linalg.norm(points[kept][:, None] - points[kept][None], axis=2)
    assert (between[np.triu_indices(len(kept), 1)] > cutoff).all()
    sets = connected_components(num_rows, near.a, near.b)
    assert (sets[cover] == sets).all()


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), num_rows=st.integers(2, 60), share=st.floats(0.05, 0.95))
def test_star_cutoff_for_a_number_of_rows(seed: int, num_rows: int, share: float) -> None:
    _, pairs = points_and_pairs(seed, num_rows)
    wanted = max(1, round(share * num_rows))
    found = find_cover_threshold(star_cover, pairs, np.ones(num_rows, np.int64), wanted)
    assert found is not None
    assert count_kept(found.representatives) <= wanted
    assert found.representatives.tolist() == cover_row_by_row(num_rows, pairs.up_to(found.threshold))
    smaller = pairs.weight[pairs.weight < found.threshold]
    if len(smaller):
        assert count_kept(star_cover(pairs.up_to(float(smaller[-1])), np.ones(num_rows, np.int64))) > wanted


def test_star_cutoff_beyond_the_pairs_is_not_guessed() -> None:
    _, pairs = points_and_pairs(0, 40)
    assert find_cover_threshold(star_cover, pairs.up_to(0.5), np.ones(40, np.int64), 2) is None
    assert find_cover_threshold(star_cover, Edges.empty(), np.ones(3, np.int64), 1) is None
