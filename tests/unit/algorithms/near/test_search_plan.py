"""What is compared with what: each pair once, in an order that reads few panels twice; partitions; the first distance."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pytest
import torch
from balance_data import distance_matrix, make_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import minimum_spanning_tree

from clipcid_cli.algorithms.near import cutoff as module
from clipcid_cli.algorithms.near import jobs as planning
from clipcid_cli.algorithms.near import partitions as partitioning
from clipcid_cli.algorithms.near.cutoff import CutoffEstimator, Neighbours, find_neighbours
from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.algorithms.near.jobs import Jobs, components, pieces, rectangle, triangle
from clipcid_cli.algorithms.near.partitions import Partitions

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def small_panels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_MAX_PANEL", "_PANEL", "_MIN_PANEL"):
            patch.setattr(planning, name, 10)
        yield


def list_pairs(plan: Jobs) -> list[tuple[int, int]]:
    """List the pairs of rows that all chunks compare."""
    jobs = [job for chunk in range(plan.num_chunks) for job in plan.of_chunk(chunk)]
    assert len(jobs) == len(plan) == len(set(jobs))
    found = [
        (a, b)
        for i, j in jobs
        for a in plan.panel(i).tolist()
        for b in plan.panel(j).tolist()
        if i != j or a < b
    ]  # fmt: skip
    assert len(found) == plan.num_pairs == sum(map(plan.pairs_of, jobs))
    return found


@pytest.mark.parametrize("in_memory", [0, 50, 10**6])
def test_a_triangle_has_each_pair_once(in_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_MAX_CHUNKS", 7)
    for number in (0, 1, 9, 10, 11, 64, 130):
        rows = np.arange(number)
        assert sorted(list_pairs(triangle(rows, in_memory))) == [(a, b) for a in rows for b in rows[a + 1 :]]
        for first in range(0, number, 13):
            pairs = list_pairs(triangle(rows, in_memory, first))
            assert sorted(pairs) == [(a, b) for a in rows[:first] for b in rows[a + 1 :]]


def test_a_rectangle_has_each_pair_of_both_sides() -> None:
    rows = np.arange(25)
    others = np.arange(100, 141)
    assert sorted(list_pairs(rectangle(rows, others, 40))) == [(a, b) for a in rows for b in others]


def test_components_are_compared_within_and_little_between() -> None:
    generator = np.random.default_rng(0)
    for sizes in (generator.integers(2, 5, size=50), np.array([45, 2, 31, 2, 2]), np.array([], np.int64)):
        labels = np.repeat(np.arange(len(sizes)), sizes)
        members = generator.permutation(len(labels))
        pairs = {tuple(sorted(pair)) for pair in list_pairs(components(members, labels, 30))}
        label_of = labels[np.argsort(members)]
        assert pairs >= {
            (a, b) for a in range(len(labels)) for b in range(a + 1, len(labels)) if label_of[a] == label_of[b]
        }
        assert len(pairs) <= 20 * len(labels) + sum(size * size for size in sizes)


@pytest.mark.parametrize("in_memory", [0, 50, 10**6])
def test_pieces_are_of_one_partition_and_its_visitors(in_memory: int) -> None:
    generator = np.random.default_rng(0)
    for number in (1, 2, 6):
        ends = np.cumsum(generator.integers(0, 35, size=2 * number))
        expected = set()
        lists = np.split(np.arange(ends[-1]), ends[:-1])
        for home, visitors in zip(lists[::2], lists[1::2], strict=True):
            expected |= {(a, b) for a in home for b in [*home, *visitors] if a < b}
        assert set(list_pairs(pieces(np.arange(ends[-1]), ends, in_memory))) == expected


# Panels, and those there is memory for; how many a process reads for all jobs, as counted with this code. In an order made
# by halving the triangle again and again they were 1,796 and 958.
@pytest.mark.parametrize(("num_panels", "room", "most"), [(200, 40, 719), (100, 20, 359)])
def test_few_panels_are_read_twice(num_panels: int, room: int, most: int) -> None:
    plan = triangle(np.arange(num_panels * 10), room * 10)
    read = lru_cache(maxsize=room)(plan.panel)
    for chunk in range(plan.num_chunks):
        for job in plan.of_chunk(chunk):
            for panel in job:
                read(panel)
    assert read.cache_info().misses <= most


def exact_gaps(rows: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The definition in float64: homes [N], and gaps to every partition [N, K]."""
    wide, middle = rows.astype(np.float64), centroids.astype(np.float64)
    value = wide @ middle.T
    home = value.argmax(axis=1)
    apart = np.sqrt(((middle[home][:, None] - middle) ** 2).sum(axis=2))
    ahead = value[np.arange(len(rows)), home][:, None] - value
    return home, np.divide(ahead, apart, out=np.zeros_like(ahead), where=apart > 0)


@given(
    width=st.integers(2, 40),
    num_near=st.integers(1, 12),
    num_others=st.sampled_from([0, 4]),
    margin=st.floats(0.01, 1.5),
    nearest=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25)
def test_homes_visits_and_gaps_are_those_of_float64(
    width: int, num_near: int, num_others: int, margin: float, nearest: int, seed: int
) -> None:
    """However few of the nearest centroids are looked at first; some centroids are equal, or rows."""
    generator = np.random.default_rng(seed)
    rows = np.unique(make_rows(100, width=width, seed=seed), axis=0)
    others = make_rows(num_others, width=width, seed=seed + 1)
    centroids = np.concatenate([rows[generator.integers(len(rows), size=num_near)], others])
    home, gaps = exact_gaps(rows, centroids)
    gaps[np.arange(len(rows)), home] = np.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitioning, "_NEAREST", nearest)
        patch.setattr(partitioning, "_VALUES_AT_ONCE", 50)
        partitions = Partitions(torch.from_numpy(centroids).float())
        homes, row, other, gap = partitions.visits(torch.from_numpy(rows), margin)
    np.testing.assert_array_equal(homes, home)
    np.testing.assert_array_equal(np.stack([row, other], axis=1), np.argwhere(gaps <= margin))
    np.testing.assert_array_equal(gap, gaps[row, other])


@pytest.mark.parametrize("kind", ["uniform", "pairs", "clustered", "heavy-tailed"])
def test_the_first_search_finds_enough_edges(kind: str) -> None:
    """Whatever the rows are like: a search that falls short is done again in full."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(750, 32))
    owners = random.integers(60, size=1500) if kind == "clustered" else random.zipf(1.3, size=1500) % 500
    noise = 0.4 * random.random((1500, 1)) * random.normal(size=(1500, 32))
    rows = {"uniform": 3 * noise, "pairs": np.concatenate([centres, centres])}.get(kind, centres[owners]) + noise
    stored = np.unique((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16), axis=0)
    forest = minimum_spanning_tree(distance_matrix(stored).astype(np.float64)).data
    numbers = np.arange(len(stored))

    def find_nearest(sample: IntArray) -> Neighbours:
        return find_neighbours(stored.__getitem__, numbers, sample, 1, CPU, (0, len(stored)))

    for keep in (0.95, 0.9, 0.8, 0.7, 0.563):
        needed = round((1 - keep) * len(stored))
        cutoff = CutoffEstimator(len(stored), find_nearest, None).choose(0.0, 0, needed)
        assert needed <= np.count_nonzero(forest <= cutoff) < 2 * needed + 50
        assert CutoffEstimator(len(stored), find_nearest, 1 / 1.8).choose(0.0, 0, needed) >= 0.9 * cutoff


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 5), st.booleans())
@settings(max_examples=30, deadline=None)
def test_neighbours_are_the_nearest_however_rows_are_shared(seed: int, count: int, size: int, ties: bool) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.integers(-2, 3, size=(40, 4)) / 8 if ties else generator.normal(size=(40, 4)) / 4
    rows, sample = rows.astype(np.float16), np.sort(generator.choice(40, 7, replace=False))
    shares = np.array_split(np.arange(40), size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS_AT_ONCE", 9)
        parts = [
            find_neighbours(rows.__getitem__, np.arange(40), sample, count, CPU, (int(share[0]), int(share[-1]) + 1))
            for share in shares
        ]
    found = Neighbours.nearest(parts, count)
    exact = distance_matrix(rows)
    expected = [
        (place, other)
        for place, row in enumerate(sample.tolist())
        for other in sorted(set(range(40)) - {row}, key=lambda other: (exact[row, other], other))[:count]
    ]
    assert list(zip(found.row.tolist(), found.other.tolist(), strict=True)) == expected
    np.testing.assert_array_equal(found.distance, exact[sample[found.row], found.other])
