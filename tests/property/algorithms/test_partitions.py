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
    value = wide @ middle.T
    home = value.argmax(axis=1)
    apart = np.sqrt(((middle[home][:, None] - middle) ** 2).sum(axis=2))
    ahead = value[np.arange(len(rows)), home][:, None] - value
    return home, np.divide(ahead, apart, out=np.zeros_like(ahead), where=apart > 0)


@given(scenes(), st.integers(1, 20))
@settings(max_examples=25)
def test_homes_visits_and_gaps_are_those_of_float64(case: tuple[np.ndarray, np.ndarray, float], nearest: int) -> None:
    """However few of the nearest centroids are looked at first."""
    rows, centroids, margin = case
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
