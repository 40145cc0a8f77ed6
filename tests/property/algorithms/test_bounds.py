"""Rows compared only with the centroids that bounds cannot rule out get the nearest of all centroids, ties included."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcid_cli.algorithms.kmeans.centroids import centroids_of_sums
from clipcid_cli.algorithms.kmeans.lloyd import CentroidDrift, distances_moved
from clipcid_cli.algorithms.near.block import make_block
from clipcid_cli.algorithms.near.exact import exact_dots
from clipcid_cli.algorithms.near.nearest import Found, NearestCentroid


def on_grid(values: torch.Tensor) -> torch.Tensor:
    return centroids_of_sums(values.double(), torch.zeros_like(values))


def follow(rows: torch.Tensor, steps: list[torch.Tensor], dtype: torch.dtype) -> list[Found]:
    """Find the nearest centroids after each step from what is known of the step before."""
    block = make_block(np.arange(len(rows)), rows, dtype)
    found = NearestCentroid(steps[0], dtype).of(block)
    results = [found]
    for before, after in pairwise(steps):
        drift = CentroidDrift.of(distances_moved(before, after))
        search = NearestCentroid(after, dtype, drift.order_K)
        now = exact_dots(rows, after, torch.arange(len(rows)), found.number_B)
        others = torch.minimum(found.others_B, found.cosine_B)
        count = drift.leading(found.cosine_B, now, others)
        known = Found(found.number_B.clone(), now, others + drift.reach_K[count])
        for row in count.nonzero()[:, 0].tolist():
            one = slice(row, row + 1)
            looked = search.of(block, torch.tensor([row]), known.at(one), int(count[row]))
            known.number_B[one], known.cosine_B[one] = looked.number_B, looked.cosine_B
            known.others_B[one] = torch.maximum(known.others_B[one], looked.others_B)
        found = known
        results.append(found)
    return results


@settings(max_examples=25)
@given(
    width=st.integers(1, 40),
    num_clusters=st.integers(1, 150),
    spread=st.sampled_from([0.05, 5.0]),
    moved=st.floats(0.0, 1.0),
    distance=st.sampled_from([1e-7, 1e-3, 0.3]),
    dtype=st.sampled_from([torch.int8, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_what_was_not_looked_at_is_not_nearer(
    width: int,
    num_clusters: int,
    spread: float,
    moved: float,
    distance: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    mean = normal(width)
    rows = torch.nn.functional.normalize(normal(12, width) * spread + mean, dim=1).half()
    steps = [on_grid(normal(num_clusters, width) * spread + mean)]
    # Copies of centroids, and rows that lie on one: ties.
    steps[0][num_clusters // 2 :: 3] = steps[0][0].clone()
    rows[:3] = steps[0][0].half()
    for _ in range(4):
        moves = torch.rand(num_clusters, generator=random) < moved
        after = on_grid(steps[-1] + normal(num_clusters, width) * distance * moves[:, None])
        steps.append(torch.where(moves[:, None], after, steps[-1]))
    results = follow(rows, steps, dtype)
    for centroids, found in zip(steps, results, strict=True):
        exact = rows.double() @ centroids.double().T
        assert torch.equal(found.cosine_B, exact.amax(dim=1))
        assert torch.equal(found.number_B, exact.argmax(dim=1))
        exact[torch.arange(len(rows)), found.number_B] = -torch.inf
        assert bool((found.others_B >= exact.amax(dim=1)).all())
