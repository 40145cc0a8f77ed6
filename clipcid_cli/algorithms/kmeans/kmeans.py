"""Spherical k-means of unit rows, exact and the same to the bit however the rows are split among processes.

Shape letters: N rows, B rows of a block, K centroids, D width.

Rows are float16, so their entries are integer multiples of 2⁻²⁴ of size ≤ 1: a float64 sum of up to 2²⁹ of them is exact
in any order, and a row that moves between clusters can be subtracted again without a trace. Everything else that decides
the result (normalising a mean, choosing seeds) uses element-wise float64 operations and comparisons only, which IEEE 754
fixes to the bit. Nearest centroids are exact as well (:mod:`clipcid_cli.algorithms.kmeans.nearest`). So one Lloyd
iteration is a function of the rows and the centroids alone, not of blocks, processes, threads or devices. [O]

[P] The CLIP-CID paper clusters the teacher's image embeddings with k-means. [R] K = N/225, at most 10⁶ (the same group's
UNICOM and MLCD use 10⁶ for their 400 M images; 225 M kept images over 10⁶ clusters is 225 a cluster).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.search.distances import root

IMAGES_PER_CLUSTER = 225
MAX_CLUSTERS = 1_000_000
_FLOOR_CLUSTERS = 256
_FLOOR_IMAGES_PER_CLUSTER = 8
_GRID = 2.0**24
# Rows added to sums at once: their float64 copies stay near the caches.
_ROWS_AT_ONCE = 4096


def default_num_clusters(num_rows: int) -> int:
    """Choose the number of clusters for a data set.

    [R] N/225, at most 10⁶. [O] Small sets get at least 256 clusters, or N/8 when that is fewer: N/225 would give a few
    thousand images fewer clusters than they have concepts.

    Args:
        num_rows: N ≥ 1.

    Returns:
        K in [1, min(N, 10⁶)].
    """
    floor = min(_FLOOR_CLUSTERS, num_rows // _FLOOR_IMAGES_PER_CLUSTER)
    return max(1, floor, min(MAX_CLUSTERS, round(num_rows / IMAGES_PER_CLUSTER)))


def round_to_grid(centroids_KD: torch.Tensor) -> torch.Tensor:
    """Round to multiples of 2⁻²⁴, which float32 holds exactly within [−1, 1].

    Args:
        centroids_KD: float64 [K, D], unit rows.

    Returns:
        float32 [K, D]; each entry moves by at most 2⁻²⁵.
    """
    return (centroids_KD * _GRID).round().clamp(-_GRID, _GRID).div(_GRID).float()


def centroids_of_sums(sums_KD: torch.Tensor, previous_KD: torch.Tensor) -> torch.Tensor:
    """Turn the sums of the clusters' rows into centroids: the normalised means, on the grid.

    Args:
        sums_KD: Sums of rows, float64 [K, D].
        previous_KD: Centroids kept where a sum is zero (an empty cluster, or rows that cancel), float32 [K, D].

    Returns:
        float32 [K, D], unit rows up to the rounding of the grid.
    """
    lengths_K1 = root(fold_sum(sums_KD.square()))[:, None]
    means_KD = round_to_grid(sums_KD / lengths_K1.clamp(min=torch.finfo(torch.float64).tiny))
    return torch.where(lengths_K1 > 0, means_KD, previous_KD)


def fold_sum(values_KD: torch.Tensor) -> torch.Tensor:
    """Sum each row by halving its width again and again.

    Only element-wise additions in a fixed order take part, so the bits are the same on every device, which a library's
    own reduction does not promise.

    Args:
        values_KD: float [K, D], D ≥ 1.

    Returns:
        [K], in the dtype of the values.
    """
    while (width := values_KD.shape[1]) > 1:
        half = width // 2
        folded_KD = values_KD[:, :half] + values_KD[:, half : 2 * half]
        values_KD = folded_KD if width % 2 == 0 else torch.cat([folded_KD, values_KD[:, -1:]], dim=1)
    return values_KD[:, 0]


def distances_moved(before_KD: torch.Tensor, after_KD: torch.Tensor) -> torch.Tensor:
    """Return how far centroids moved, from float32 [K, D] each: float64 [K], 0 for those that did not and for no others."""
    return root(fold_sum((after_KD.double() - before_KD.double()).square()))


def joint_features(images_BD: npt.NDArray[np.float16], texts_BD: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    """Fuse image and caption: the normalised sum of the two embeddings.

    [R] UNICOM clusters joint image and text features; the sum of unit rows is CLIP's own middle of a pair.

    Args:
        images_BD: Unit rows, float16 [B, D].
        texts_BD: Unit rows, float16 [B, D]; a zero row (no caption) leaves the image's.

    Returns:
        float16 [B, D], unit rows; where the two cancel, the image's. Each row depends on its own values only.
    """
    images = torch.from_numpy(np.array(images_BD))
    sums_BD = images.float() + torch.from_numpy(np.array(texts_BD)).float()
    lengths_B1 = root(fold_sum(sums_BD.square()))[:, None]
    joint_BD = torch.where(lengths_B1 > 0, (sums_BD / lengths_B1.clamp(min=1e-30)).half(), images)
    return joint_BD.numpy()


class ClusterSums:
    """Exact sums of the rows of each cluster, kept up to date as rows move.

    Args:
        device: Where the sums live; 8·K·D bytes.
    """

    def __init__(self, num_clusters: int, width: int, device: torch.device) -> None:
        self.sums_KD = torch.zeros(num_clusters, width, dtype=torch.float64, device=device)
        self.counts_K = torch.zeros(num_clusters, dtype=torch.int64, device=device)

    def move(self, rows_BD: torch.Tensor, old_B: torch.Tensor, new_B: torch.Tensor) -> int:
        """Move rows from their old clusters to new ones.

        Args:
            rows_BD: float16 [B, D].
            old_B: Clusters the rows were counted in, int64 [B]; −1 for a row that was in none.
            new_B: Clusters they belong to now, int64 [B].

        Returns:
            How many rows moved.
        """
        moved_B = (old_B != new_B).nonzero()[:, 0]
        for part_B in torch.split(moved_B, _ROWS_AT_ONCE):
            self._add(rows_BD[part_B].double(), new_B[part_B], 1)
            left_B = part_B[old_B[part_B] >= 0]
            self._add(rows_BD[left_B].double().neg(), old_B[left_B], -1)
        return len(moved_B)

    def _add(self, rows_BD: torch.Tensor, clusters_B: torch.Tensor, count: int) -> None:
        self.sums_KD.index_add_(0, clusters_B, rows_BD)
        self.counts_K.index_add_(0, clusters_B, torch.full_like(clusters_B, count))


def sum_of_similarities(sums_KD: torch.Tensor, centroids_KD: torch.Tensor) -> float:
    """Return the sum, over all rows, of the similarity to the own centroid, from the clusters' sums alone.

    Args:
        sums_KD: Sums of the rows assigned to each centroid, float64 [K, D].
        centroids_KD: Those centroids, float32 [K, D].
    """
    total = 0.0
    for first in range(0, len(sums_KD), 4096):
        products_CD = sums_KD[first : first + 4096] * centroids_KD[first : first + 4096].double()
        total += float(fold_sum(fold_sum(products_CD)[None, :])[0])
    return total


def temperature_for_perplexity(similarities_Nm: npt.NDArray[np.floating], perplexity: float = 3.5) -> float:
    """Find the temperature at which the median row's distribution over its nearest centroids has the wanted perplexity.

    The distribution is softmax(similarity/τ) over the m stored centroids, its perplexity the exponential of its entropy:
    1 when one centroid has all the weight, m when all have the same. The median grows with τ, so bisection finds it.

    Args:
        similarities_Nm: Similarities to the m nearest centroids, float [N, m].
        perplexity: Wanted median, see docs/method.md#soft-labels. With few centroids half of the way from 1 to m is taken
            when that is less.

    Returns:
        τ > 0, rounded to four digits. 1.0 when there is one centroid, where every τ is the same.
    """
    num_nearest = similarities_Nm.shape[1]
    if num_nearest == 1:
        return 1.0
    wanted = min(perplexity, (1 + num_nearest) / 2)
    gaps_Nm = similarities_Nm.astype(np.float64) - similarities_Nm[:, :1]
    low, high = math.log(1e-5), math.log(1e2)
    for _ in range(60):
        middle = (low + high) / 2
        weights_Nm = np.exp(gaps_Nm / math.exp(middle))
        totals_N = weights_Nm.sum(axis=1)
        # Entropy of softmax(z) with its largest z at 0: log Σeᶻ − Σ z·eᶻ / Σeᶻ.
        entropy_N = np.log(totals_N) - (weights_Nm * gaps_Nm).sum(axis=1) / (math.exp(middle) * totals_N)
        if float(np.median(np.exp(entropy_N))) < wanted:
            low = middle
        else:
            high = middle
    return float(f"{math.exp((low + high) / 2):.4g}")
