"""Partitions: which rows are compared follows from exact geometry, and what is found is true."""

from __future__ import annotations

import numpy as np
import torch
from balance_data import distance_matrix, make_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcid_cli.algorithms.near.block import load_block
from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.algorithms.near.nearest_pairs import NearestPairs
from clipcid_cli.algorithms.near.partition_margin import choose_margin
from clipcid_cli.algorithms.near.partition_training import split_counts
from clipcid_cli.algorithms.near.partitions import Partitions, default_num_partitions, group_rows
from clipcid_cli.algorithms.near.plan import pieces
from clipcid_cli.algorithms.near.search import near_pairs

CPU = torch.device("cpu")


@st.composite
def scenes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float]:
    """Rows, centroids of which some are equal or rows themselves, and a distance."""
    width, seed = draw(st.integers(2, 40)), draw(st.integers(0, 2**32 - 1))
    rows = np.unique(make_rows(draw(st.integers(20, 120)), width=width, seed=seed), axis=0)
    generator = np.random.default_rng(seed)
    centroids = rows[generator.integers(len(rows), size=draw(st.integers(1, 12)))]
    if draw(st.booleans()):
        other = generator.normal(size=(4, width))
        centroids = np.concatenate([centroids, (other / np.linalg.norm(other, axis=1)[:, None]).astype(np.float16)])
    return rows, centroids, draw(st.floats(0.01, 1.5))


def exact_gaps(rows: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The definition in float64: homes [N], and gaps to every partition [N, K]."""
    wide, middle = rows.astype(np.float64), centroids.astype(np.float64)
    value = wide @ middle.T - (middle * middle).sum(axis=1) / 2.0
    home = value.argmax(axis=1)
    apart = np.sqrt(((middle[home][:, None] - middle) ** 2).sum(axis=2))
    ahead = value[np.arange(len(rows)), home][:, None] - value
    return home, np.divide(ahead, apart, out=np.zeros_like(ahead), where=apart > 0)


def all_of_them(a: IntArray, b: IntArray, at_least: np.ndarray) -> np.ndarray:
    return np.ones(len(a), np.bool_)


def search(rows: np.ndarray, centroids: np.ndarray, margin: float, cutoff: float) -> Edges:
    """Find the pairs within a distance that partitions find."""
    found = Partitions(torch.from_numpy(centroids)).visits(torch.from_numpy(rows), margin)
    entries = [(2 * found.home.numpy(), np.arange(len(rows))), (2 * found.partition.numpy() + 1, found.row.numpy())]
    listed, ends = group_rows(lambda: entries, 2 * len(centroids), lambda length: np.empty(length, np.int64))
    plan = pieces(listed, ends, 0)
    blocks = [
        tuple(load_block(rows.__getitem__, plan.panel(panel), CPU, torch.float32) for panel in dict.fromkeys(job))
        for chunk in range(plan.num_chunks)
        for job in plan.jobs(chunk)
    ]
    return Edges.concatenate(edges for pair in blocks for edges in near_pairs(pair[0], pair[-1], cutoff, all_of_them))


@given(scenes())
@settings(max_examples=60, deadline=None)
def test_homes_visits_and_gaps_are_those_of_float64(case: tuple[np.ndarray, np.ndarray, float]) -> None:
    rows, centroids, margin = case
    home, gaps = exact_gaps(rows, centroids)
    partitions = Partitions(torch.from_numpy(centroids))
    stored = torch.from_numpy(rows)
    np.testing.assert_array_equal(partitions.nearest(stored), home)
    np.testing.assert_array_equal(partitions.spread(stored, torch.from_numpy(home)), gaps)
    found = partitions.visits(stored, margin)
    np.testing.assert_array_equal(found.home, home)
    expected = gaps <= margin
    expected[np.arange(len(rows)), home] = False
    np.testing.assert_array_equal(np.stack([found.row, found.partition], axis=1), np.argwhere(expected))


@given(scenes())
@settings(max_examples=60, deadline=None)
def test_a_margin_of_the_cutoff_loses_no_pair_and_no_pair_is_wrong(case: tuple[np.ndarray, np.ndarray, float]) -> None:
    rows, centroids, cutoff = case
    exact = distance_matrix(rows)
    a, b = np.nonzero(np.triu(exact <= np.float32(cutoff), 1))
    for margin in (cutoff, 0.2 * cutoff):
        found = search(rows, centroids, margin, cutoff)
        assert (found.a < found.b).all()
        np.testing.assert_array_equal(found.weight, exact[found.a, found.b])
        pairs = set(zip(found.a.tolist(), found.b.tolist(), strict=True))
        within = set(zip(a.tolist(), b.tolist(), strict=True))
        assert pairs <= within
        # Borders are only known to a rounding: the pairs whose gap is the cut-off itself are none of these.
        assert margin < cutoff or pairs == within


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(0, 200))
@settings(max_examples=40, deadline=None)
def test_lists_made_part_by_part_are_those_of_all_entries(seed: int, num_lists: int, number: int) -> None:
    generator = np.random.default_rng(seed)
    lists, rows = generator.integers(num_lists, size=number), generator.integers(1000, size=number)
    parts = np.array_split(np.arange(number), 1 + seed % 5)
    entries = [(lists[part], rows[part]) for part in parts]
    found, ends = group_rows(lambda: entries, num_lists, lambda length: np.empty(length, np.int64))
    np.testing.assert_array_equal(found, rows[np.argsort(lists, kind="stable")])
    np.testing.assert_array_equal(ends, np.cumsum(np.bincount(lists, minlength=num_lists)))


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_nearest_pairs_do_not_depend_on_the_order_they_come_in(seed: int, count: int, pieces: int) -> None:
    generator = np.random.default_rng(seed)
    weight = generator.integers(0, 20, size=(30, 30)).astype(np.float32)
    weight = np.minimum(weight, weight.T)
    a, b = np.triu_indices(30, 1)
    order = generator.permutation(len(a))
    rows = np.sort(generator.choice(30, 7, replace=False))
    kept = NearestPairs(rows, count)
    for part in np.array_split(order, pieces):
        edges = Edges(a[part], b[part], weight[a[part], b[part]])
        kept.add(edges[kept.may_be_nearest(edges.a, edges.b, edges.weight)])
    expected = set()
    for row in rows.tolist():
        others = [other for other in range(30) if other != row]
        others.sort(key=lambda other: (weight[row, other], other))
        expected |= {(min(row, other), max(row, other)) for other in others[:count]}
    assert set(zip(kept.edges.a.tolist(), kept.edges.b.tolist(), strict=True)) == expected
    np.testing.assert_array_equal(kept.edges.weight, weight[kept.edges.a, kept.edges.b])


def test_partitions_that_hold_too_much_are_split_and_others_are_not() -> None:
    sizes = np.array([400, 10, 40, 50, 0])
    assert split_counts(sizes, 5).tolist() == [1, 1, 1, 1, 1]  # 4 times the even share of 100
    assert split_counts(sizes, 10).tolist() == [8, 1, 1, 1, 1]
    assert [default_num_partitions(number) for number in (1, 100, 10**6, 10**8)] == [1, 10, 1000, 10_000]


def test_the_margin_lies_within_the_reach_and_visits_stay_bounded() -> None:
    spread = np.linspace(0.0, 2.0, 400).reshape(20, 20)
    assert choose_margin(np.array([0.01, 0.1]), spread, 0.5, most_visits=20) == 0.2
    assert choose_margin(np.array([0.4]), spread, 0.5, most_visits=20) == 0.5
    assert choose_margin(np.empty(0), spread, 0.5, most_visits=20) == 0.025
    bounded = choose_margin(np.array([1.0]), spread, 2.0, most_visits=3)
    assert np.count_nonzero(spread <= bounded) == 61
