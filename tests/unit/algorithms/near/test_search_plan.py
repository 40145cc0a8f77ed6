"""Plans compare each pair that they should once, in chunks, and in an order that reads few panels twice."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from clipcid_cli.algorithms.near import plan as planning
from clipcid_cli.algorithms.near.plan import Plan, components, pieces, triangle


@pytest.fixture(autouse=True)
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_MAX_PANEL", "_PANEL", "_MIN_PANEL"):
        monkeypatch.setattr(planning, name, 10)


def list_pairs(plan: Plan) -> list[tuple[int, int]]:
    """List the pairs of rows that all chunks compare."""
    jobs = [job for chunk in range(plan.num_chunks) for job in plan.jobs(chunk)]
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
        for job in plan.jobs(chunk):
            for panel in job:
                read(panel)
    assert read.cache_info().misses <= most
