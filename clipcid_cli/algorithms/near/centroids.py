"""Centroids of rows: their sums and normalised means, the same to the bit in any order and on any device.

Rows are float16, so their entries are integer multiples of 2⁻²⁴ of size ≤ 1: a float64 sum of up to 2²⁹ of them is exact
in any order, and a row that moves between clusters can be subtracted again without a trace. A mean is normalised by
element-wise float64 operations in a fixed order, which IEEE 754 fixes to the bit.

Shape letters: N rows, B rows of a block, K centroids, D width.

Source: docs/method.md#exact-k-means.
"""

from __future__ import annotations

import torch

from clipcid_cli.algorithms.near.exact import root

_GRID = 2.0**24
# Rows added to sums at once: on a CPU their float64 copies stay near the caches.
_ROWS_AT_ONCE = {"cpu": 1024, "cuda": 65_536}


def round_to_grid(centroids_KD: torch.Tensor) -> torch.Tensor:
    """Round unit rows, float64, to multiples of 2⁻²⁴, which float32 holds within [−1, 1]: entries move by at most 2⁻²⁵."""
    return (centroids_KD * _GRID).round().clamp(-_GRID, _GRID).div(_GRID).float()


def centroids_of_sums(sums_KD: torch.Tensor, previous_KD: torch.Tensor) -> torch.Tensor:
    """Turn the sums of the clusters' rows, float64, into centroids, float32: the normalised means, on the grid.

    Args:
        previous_KD: Centroids kept where a sum is zero (an empty cluster, or rows that cancel), float32.
    """
    lengths_K1 = root(fold_sum(sums_KD.square()))[:, None]
    means_KD = round_to_grid(sums_KD / lengths_K1.clamp(min=torch.finfo(torch.float64).tiny))
    return torch.where(lengths_K1 > 0, means_KD, previous_KD)


def fold_sum(values_KD: torch.Tensor) -> torch.Tensor:
    """Sum each row, of width ≥ 1, by halving its width again and again: [K].

    Only element-wise additions in a fixed order take part, so the bits are the same on every device, which a library's
    own reduction does not promise.
    """
    while (width := values_KD.shape[1]) > 1:
        first_KH, second_KH, *last = torch.split(values_KD, width // 2, dim=1)
        values_KD = first_KH + second_KH
        if last:
            values_KD = torch.cat([values_KD, *last], dim=1)
    return values_KD[:, 0]


class ClusterSums:
    """Exact sums of the rows of each cluster, kept up to date as rows move.

    Attributes:
        sums_KD: float64 [K, D].
        counts_K: Rows of each cluster, int64 [K].
    """

    def __init__(self, num_clusters: int, width: int, device: torch.device) -> None:
        self.sums_KD = torch.zeros(num_clusters, width, dtype=torch.float64, device=device)
        self.counts_K = torch.zeros(num_clusters, dtype=torch.int64, device=device)

    def move(self, rows_BD: torch.Tensor, old_B: torch.Tensor | None, new_B: torch.Tensor) -> None:
        """Move rows, float16, from their old clusters to new ones, int64 [B]; `old_B` is None for rows that were in none."""
        at_once = _ROWS_AT_ONCE[rows_BD.device.type]
        for first in range(0, len(rows_BD), at_once):
            part = slice(first, first + at_once)
            exact_BD = rows_BD[part].float().double()  # in two steps, in two thirds of the time of one
            self._add(exact_BD, new_B[part], 1)
            if old_B is not None:
                self._add(exact_BD, old_B[part], -1)

    def _add(self, rows_BD: torch.Tensor, clusters_B: torch.Tensor, count: int) -> None:
        self.sums_KD.index_add_(0, clusters_B, rows_BD, alpha=count)
        self.counts_K.index_add_(0, clusters_B, torch.full_like(clusters_B, count))
