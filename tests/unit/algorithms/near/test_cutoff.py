"""The first distance searched, from a sample of nearest neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from balance_data import distance_matrix, make_rows
from scipy.sparse.csgraph import minimum_spanning_tree

from clipcid_cli.algorithms.near.cutoff import (
    CutoffEstimator,
    Neighbours,
    find_neighbours,
)
from clipcid_cli.algorithms.near.exact import IntArray

CPU = torch.device("cpu")
ROWS = make_rows(900, width=24)


KINDS = ["uniform", "pairs", "clustered", "heavy-tailed"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0.95, 0.9, 0.8, 0.7, 0.563])
def test_the_first_search_finds_enough_edges(kind: str, keep: float) -> None:
    """Whatever the rows are like: a search that falls short is done again in full."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(750, 32))
    owners = random.integers(60, size=1500) if kind == "clustered" else random.zipf(1.3, size=1500) % 500
    noise = 0.4 * random.random((1500, 1)) * random.normal(size=(1500, 32))
    rows = {"uniform": 3 * noise, "pairs": np.concatenate([centres, centres])}.get(kind, centres[owners]) + noise
    stored = np.unique((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16), axis=0)
    forest = minimum_spanning_tree(distance_matrix(stored).astype(np.float64)).data
    needed = round((1 - keep) * len(stored))
    numbers = np.arange(len(stored))

    def find_nearest(sample: IntArray) -> Neighbours:
        return find_neighbours(stored.__getitem__, numbers, sample, 1, CPU, (0, len(stored)))

    cutoff = CutoffEstimator(len(stored), find_nearest, False).choose(0.0, 0, needed)
    assert needed <= np.count_nonzero(forest <= cutoff) < 2 * needed + 50
    assert CutoffEstimator(len(stored), find_nearest, True).choose(0.0, 0, needed) >= 0.9 * cutoff
