"""What surrounds k-means: how many clusters, joint features of image and caption, and the temperature of soft labels."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.near.exact import HalfArray, fold_sum, root

IMAGES_PER_CLUSTER = 225
MAX_CLUSTERS = 1_000_000
_FLOOR_CLUSTERS = 256
_FLOOR_IMAGES_PER_CLUSTER = 8


def default_num_clusters(num_rows: int) -> int:
    """Choose the number of clusters of N rows.

    N/225, at most 10⁶; at least 256 clusters, or N/8 when that is fewer: N/225 would give a few thousand images fewer
    clusters than they have concepts.

    Source: docs/method.md#number-of-clusters.
    """
    floor = min(_FLOOR_CLUSTERS, num_rows // _FLOOR_IMAGES_PER_CLUSTER)
    return max(1, floor, min(MAX_CLUSTERS, round(num_rows / IMAGES_PER_CLUSTER)))


def joint_features(images_BD: HalfArray, texts_BD: HalfArray) -> HalfArray:
    """Fuse image and caption, unit rows [B, D] both: the normalised sum, each row by itself.

    Where there is no caption (a zero row), or the two cancel, it is the image's row.

    Source: docs/method.md#joint-features.
    """
    images = torch.from_numpy(np.array(images_BD))
    sums_BD = images.float() + torch.from_numpy(np.array(texts_BD)).float()
    lengths_B1 = root(fold_sum(sums_BD.square()))[:, None]
    joint_BD = torch.where(lengths_B1 > 0, (sums_BD / lengths_B1.clamp(min=1e-30)).half(), images)
    return joint_BD.numpy()


def temperature_for_perplexity(similarities_Nm: npt.NDArray[np.floating], perplexity: float = 3.5) -> float:
    """Find the temperature at which the median row's distribution over its nearest centroids has a given perplexity.

    The distribution is softmax(similarity/τ) over the m stored centroids, its perplexity the exponential of its entropy:
    1 when one centroid has all the weight, m when all have the same. The median grows with τ, so bisection finds it.

    Args:
        similarities_Nm: To the m nearest centroids, descending.
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
