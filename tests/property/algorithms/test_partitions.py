"""Partitions: which rows are compared follows from exact geometry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from balance_data import make_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcid_cli.algorithms.near import partitions as partitioning
from clipcid_cli.algorithms.near.partitions import Partitions


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
