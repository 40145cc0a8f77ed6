"""The first distance searched, from a sample of nearest neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from balance_data import distance_matrix, make_rows
from scipy.sparse.csgraph import minimum_spanning_tree

from clipcid_cli.algorithms.near import cutoff as module
from clipcid_cli.algorithms.near.cutoff import FARTHEST, first_cutoff, nearest_distances, wider_cutoff

CPU = torch.device("cpu")
ROWS = make_rows(900, width=24)


def look(size: int = 200) -> np.ndarray:
    """Sample every second row: the distances to the nearest other, ascending."""
    numbers = np.arange(0, len(ROWS), 2)
    sample = np.sort(np.random.default_rng(1).choice(len(numbers), size, replace=False))
    nearest = nearest_distances(ROWS.__getitem__, numbers, sample, CPU)
    distances = distance_matrix(ROWS[numbers])
    np.fill_diagonal(distances, np.inf)
    np.testing.assert_array_equal(nearest, np.sort(distances[sample].min(axis=1)))
    return nearest


def test_nearest_distances_are_exact_whatever_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = look()
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 77)
    np.testing.assert_array_equal(look(), whole)


def test_first_cutoff_is_a_little_beyond_the_share_wanted() -> None:
    nearest = look()
    # 2 · 0.2 and two standard deviations √(0.4 · 0.6 / 200) more; from a third on, half way to 1.
    assert first_cutoff(nearest, 0.2) == nearest[94]
    assert first_cutoff(nearest, 0.27) == nearest[122]
    assert first_cutoff(nearest, 0.5) == nearest[150]
    assert first_cutoff(nearest, 0.27, for_stars=True) == nearest[112]
    assert first_cutoff(nearest, 0.8) == nearest[180]
    assert first_cutoff(nearest, 0.999) == nearest[-1]


@pytest.mark.parametrize("kind", ["uniform", "clustered", "heavy-tailed"])
@pytest.mark.parametrize("keep", [0.95, 0.9, 0.8, 0.7, 0.563])
def test_the_first_search_finds_enough_edges(kind: str, keep: float) -> None:
    """Whatever the rows are like: a search that falls short is done again in full."""
    random = np.random.default_rng(0)
    if kind == "uniform":
        rows = random.normal(size=(1500, 32))
    else:
        owners = random.integers(60, size=1500) if kind == "clustered" else random.zipf(1.3, size=1500) % 500
        rows = random.normal(size=(500, 32))[owners] + 0.4 * random.random((1500, 1)) * random.normal(size=(1500, 32))
    stored = np.unique((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16), axis=0)
    forest = minimum_spanning_tree(distance_matrix(stored).astype(np.float64)).data
    sample = np.sort(np.random.default_rng(0).choice(len(stored), 1024, replace=False))
    nearest = nearest_distances(stored.__getitem__, np.arange(len(stored)), sample, CPU)
    share = 1 - keep
    assert np.count_nonzero(forest <= first_cutoff(nearest, share)) >= share * len(stored)


def test_a_row_alone_is_searched_to_the_end() -> None:
    alone = nearest_distances(ROWS.__getitem__, np.arange(1), np.arange(1), CPU)
    assert first_cutoff(alone, 0.5) == FARTHEST


def test_cutoffs_grow_until_everything_is_within_reach() -> None:
    nearest = look()
    steps = [first_cutoff(nearest, 0.2)]
    reached = np.count_nonzero(nearest <= steps[0])
    assert wider_cutoff(nearest, steps[0], found=100, needed=150) == nearest[int(np.ceil(1.05 * 1.5 * reached))]
    while steps[-1] < FARTHEST:
        steps.append(wider_cutoff(nearest, steps[-1], found=399, needed=400))
        assert steps[-1] >= min(1.05 * steps[-2], FARTHEST)
    assert len(steps) < 60
    assert wider_cutoff(nearest, 0.0, found=0, needed=5) > 0
