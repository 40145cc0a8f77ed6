"""The star cover's two guarantees, by brute force, and that rounds give what going row by row would."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcid_cli.algorithms.near.edges import Edges, sort_edges
from clipcid_cli.algorithms.sets.forest import connected_components
from clipcid_cli.algorithms.sets.star import count_kept, find_star_cutoff, star_cover


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
    found = find_star_cutoff(pairs, np.ones(num_rows, np.int64), wanted)
    assert found is not None
    assert count_kept(found.representatives) <= wanted
    assert found.representatives.tolist() == cover_row_by_row(num_rows, pairs.up_to(found.cutoff))
    smaller = pairs.weight[pairs.weight < found.cutoff]
    if len(smaller):
        assert count_kept(star_cover(pairs.up_to(float(smaller[-1])), np.ones(num_rows, np.int64))) > wanted


def test_star_cutoff_beyond_the_pairs_is_not_guessed() -> None:
    _, pairs = points_and_pairs(0, 40)
    assert find_star_cutoff(pairs.up_to(0.5), np.ones(40, np.int64), 2) is None
    assert find_star_cutoff(Edges.empty(), np.ones(3, np.int64), 1) is None
