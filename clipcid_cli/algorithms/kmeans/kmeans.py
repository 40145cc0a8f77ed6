"""Spherical k-means of unit rows, exact and the same to the bit however the rows are split among processes.

Shape letters: N rows, B rows of a block, K centroids, D width, m nearest centroids.

Sums of rows and centroids are exact (:mod:`clipcid_cli.algorithms.near.centroids`), nearest centroids are
(:mod:`clipcid_cli.algorithms.near.nearest`), and seeds are chosen by element-wise float64 operations and comparisons only,
which IEEE 754 fixes to the bit. So one Lloyd iteration is a function of the rows and the centroids alone, not of blocks,
processes, threads or devices.

Source: docs/method.md#exact-k-means.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.near.centroids import fold_sum
from clipcid_cli.algorithms.near.exact import root

IMAGES_PER_CLUSTER = 225
MAX_CLUSTERS = 1_000_000
_FLOOR_CLUSTERS = 256
_FLOOR_IMAGES_PER_CLUSTER = 8


class RowReader(Protocol):
    """The rows to cluster, numbered 0 … N − 1, of all processes."""

    def __len__(self) -> int:
        """Return N."""

    @property
    def width(self) -> int:
        """Width D."""

    def features(self, start: int, stop: int) -> npt.NDArray[np.float16]:
        """Read rows start … stop − 1: unit rows, float16 [n, D]."""

    def features_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        """Read single rows by their numbers: unit rows, float16 [n, D]."""


def default_num_clusters(num_rows: int) -> int:
    """Choose the number of clusters for a data set.

    N/225, at most 10⁶; at least 256 clusters, or N/8 when that is fewer: N/225 would give a few thousand images fewer
    clusters than they have concepts.

    Args:
        num_rows: N ≥ 1.

    Returns:
        K in [1, min(N, 10⁶)].

    Source: docs/method.md#number-of-clusters.
    """
    floor = min(_FLOOR_CLUSTERS, num_rows // _FLOOR_IMAGES_PER_CLUSTER)
    return max(1, floor, min(MAX_CLUSTERS, round(num_rows / IMAGES_PER_CLUSTER)))


def joint_features(images_BD: npt.NDArray[np.float16], texts_BD: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    """Fuse image and caption: the normalised sum of the two embeddings.

    Args:
        images_BD: Unit rows, float16 [B, D].
        texts_BD: Unit rows, float16 [B, D]; a zero row (no caption) leaves the image's.

    Returns:
        float16 [B, D], unit rows; where the two cancel, the image's. Each row depends on its own values only.

    Source: docs/method.md#joint-features.
    """
    images = torch.from_numpy(np.array(images_BD))
    sums_BD = images.float() + torch.from_numpy(np.array(texts_BD)).float()
    lengths_B1 = root(fold_sum(sums_BD.square()))[:, None]
    joint_BD = torch.where(lengths_B1 > 0, (sums_BD / lengths_B1.clamp(min=1e-30)).half(), images)
    return joint_BD.numpy()


def sums_of_similarities(sums_KD: torch.Tensor, centroids_KD: torch.Tensor) -> torch.Tensor:
    """Return the sum of the similarities of each cluster's rows to a centroid, from the rows' sum alone.

    Args:
        sums_KD: Sums of the rows assigned to each centroid, float64 [K, D].
        centroids_KD: Those centroids, float32 [K, D].

    Returns:
        float64 [K].
    """
    similarities_K = sums_KD.new_empty(len(sums_KD))
    for first in range(0, len(sums_KD), 4096):
        part = slice(first, first + 4096)
        similarities_K[part] = fold_sum(sums_KD[part] * centroids_KD[part].double())
    return similarities_K


def temperature_for_perplexity(similarities_Nm: npt.NDArray[np.floating], perplexity: float = 3.5) -> float:
    """Find the temperature at which the median row's distribution over its nearest centroids has a given perplexity.

    The distribution is softmax(similarity/τ) over the m stored centroids, its perplexity the exponential of its entropy:
    1 when one centroid has all the weight, m when all have the same. The median grows with τ, so bisection finds it.

    Args:
        similarities_Nm: Similarities to the m nearest centroids, float [N, m].
        perplexity: Median to reach, see docs/method.md#soft-labels. With few centroids, half of the way from 1 to m is taken
            when that is less.

    Returns:
        τ > 0, rounded to four digits. 1.0 when there is one centroid, where every τ is the same.
    """
    num_nearest = similarities_Nm.shape[1]
    if num_nearest == 1:
        return 1.0
    target = min(perplexity, (1 + num_nearest) / 2)
    gaps_Nm = similarities_Nm.astype(np.float64) - similarities_Nm[:, :1]
    low, high = math.log(1e-5), math.log(1e2)
    for _ in range(60):
        middle = (low + high) / 2
        weights_Nm = np.exp(gaps_Nm / math.exp(middle))
        totals_N = weights_Nm.sum(axis=1)
        # Entropy of softmax(z) with its largest z at 0: log Σeᶻ − Σ z·eᶻ / Σeᶻ.
        entropy_N = np.log(totals_N) - (weights_Nm * gaps_Nm).sum(axis=1) / (math.exp(middle) * totals_N)
        if float(np.median(np.exp(entropy_N))) < target:
            low = middle
        else:
            high = middle
    return float(f"{math.exp((low + high) / 2):.4g}")
