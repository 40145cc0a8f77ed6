"""The first distance searched, from a sample of nearest neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from balance_data import distance_matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import minimum_spanning_tree

from clipcid_cli.algorithms.near import cutoff as module
from clipcid_cli.algorithms.near.cutoff import CutoffEstimator, Neighbours, find_neighbours
from clipcid_cli.algorithms.near.exact import IntArray

CPU = torch.device("cpu")


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
        cutoff = CutoffEstimator(len(stored), find_nearest, False).choose(0.0, 0, needed)
        assert needed <= np.count_nonzero(forest <= cutoff) < 2 * needed + 50
        assert CutoffEstimator(len(stored), find_nearest, True).choose(0.0, 0, needed) >= 0.9 * cutoff


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
