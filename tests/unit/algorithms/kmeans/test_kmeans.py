"""Spherical k-means: its sums, centroids, seeds, temperature and default number of clusters."""

from __future__ import annotations

import pytest
import torch

from clipcid_cli.algorithms.kmeans.centroids import (
    centroids_of_sums,
)
from clipcid_cli.algorithms.kmeans.kmeans import default_num_clusters


def unit_rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=1).half()


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [(1, 1), (7, 1), (100, 12), (2048, 256), (7480, 256), (100_000, 444), (225_000_000, 1_000_000), (10**9, 1_000_000)],
)
def test_default_number_of_clusters(num_rows: int, expected: int) -> None:
    assert default_num_clusters(num_rows) == expected


def test_centroids_are_normalised_means_and_empty_clusters_keep_theirs() -> None:
    rows, previous = unit_rows(60, 24), torch.eye(24)[:2]
    sums = torch.stack([rows.double().sum(dim=0), torch.zeros(24, dtype=torch.float64)])
    centroids = centroids_of_sums(sums, previous)
    expected = torch.nn.functional.normalize(sums[0], dim=0)
    torch.testing.assert_close(centroids[0].double(), expected, rtol=0, atol=2.0**-25)
    assert torch.equal(centroids[1], previous[1])
    assert torch.equal(centroids * 2**24, (centroids * 2**24).round())
