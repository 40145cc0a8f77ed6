"""Spherical k-means does not depend on how rows are blocked, and its objective never falls."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcid_cli.algorithms.kmeans.centroids import ClusterSums, centroids_of_sums, choose_first_rows, fold_sum
from clipcid_cli.algorithms.near.block import make_block
from clipcid_cli.algorithms.near.nearest import NearestCentroid


def make_rows(num_rows: int, width: int, spread: float, seed: int) -> torch.Tensor:
    random = np.random.default_rng(seed)
    values = random.normal(size=(num_rows, width)) * spread + random.normal(size=width)
    # Some exact copies, as in real data.
    values[random.integers(num_rows, size=num_rows // 4)] = values[0]
    return torch.from_numpy(values / np.linalg.norm(values, axis=1, keepdims=True)).half()


def iterate(
    rows: torch.Tensor, centroids: torch.Tensor, blocks: list[torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, float]:
    search, sums = NearestCentroid(centroids, dtype), ClusterSums(len(centroids), rows.shape[1], torch.device("cpu"))
    for block in blocks:
        sums.move(rows[block], None, search.of(make_block(block.numpy(), rows[block], dtype)).number_B)
    return centroids_of_sums(sums.sums_KD, centroids), float(fold_sum(sums.sums_KD * centroids.double()).sum()) / len(
        rows
    )


@settings(max_examples=25)
@given(
    num_rows=st.integers(8, 300),
    width=st.integers(2, 40),
    num_clusters=st.integers(1, 90),
    spread=st.sampled_from([0.02, 0.5, 5.0]),
    cuts=st.lists(st.integers(1, 299), max_size=4),
    dtype=st.sampled_from([torch.int8, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_blocks_order_and_precision_change_no_bit_and_the_objective_never_falls(
    num_rows: int, width: int, num_clusters: int, spread: float, cuts: list[int], dtype: torch.dtype, seed: int
) -> None:
    rows = make_rows(num_rows, width, spread, seed)
    chosen = choose_first_rows(rows.numpy().__getitem__, num_rows, min(num_clusters, num_rows), seed)
    centroids = centroids_of_sums(rows[chosen].double(), torch.zeros(len(chosen), width))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(num_rows))
    pieces = [piece for piece in torch.tensor_split(order, sorted(cuts)) if len(piece)]
    before = -1.0
    for _ in range(4):
        whole, objective = iterate(rows, centroids, [torch.arange(num_rows)], torch.float32)
        cut, cut_objective = iterate(rows, centroids, pieces, dtype)
        assert torch.equal(whole, cut)
        assert objective == cut_objective
        # Centroids are rounded to the grid, which may cost √D · 2⁻²⁵ of similarity.
        assert objective >= before - width**0.5 * 2.0**-25
        centroids, before = whole, objective
