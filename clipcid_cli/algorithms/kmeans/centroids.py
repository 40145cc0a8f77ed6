"""Centroids of rows: the first ones, their exact sums and normalised means, and new ones for empty clusters.

Rows are float16, so their entries are integer multiples of 2⁻²⁴ of size ≤ 1: a float64 sum of up to 2²⁹ of them is exact
in any order, and a row that moves between clusters can be subtracted again without a trace. A mean is normalised by
element-wise float64 operations in a fixed order, which IEEE 754 fixes to the bit. So all of this is the same on any device,
in any order and however the rows are split among processes.

How to choose the first rows was decided by experiment: on 1,781 photographs (clothing features, 1,280 wide) after 20
iterations, mean of 4 seeds, greedy k-means++ reached a mean similarity of 0.5190, 0.6507, 0.7107 and 0.7921 at K = 16, 128,
256 and 512 against 0.5191, 0.6440, 0.6992 and 0.7800 from uniformly drawn rows, with spreads of about 0.001. The gain is in
clusters of few rows; at 225 rows a cluster (docs/method.md#number-of-clusters) there is none to see, and its cost grows with
K². So it is used for few clusters and uniform rows for many.

Shape letters beside those of the map: P sampled rows that are looked at, L trials.

Source: docs/method.md#k-means.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.near.block import ACCUMULATION_UNIT
from clipcid_cli.algorithms.near.exact import (
    LONGEST_UNIT_ROW,
    DoubleArray,
    HalfArray,
    IntArray,
    ReadRows,
    fold_sum,
    root,
    round_to_grid,
)

PLUS_PLUS_CLUSTERS = 512
PLUS_PLUS_ROWS_PER_CLUSTER = 16
# Distances are integers in these units.
_UNIT = 2.0**30
# Covers the rounding of weights and bounds to float32.
_SLACK = 2.0**-20
# Rows added to sums at once: on a CPU their float64 copies stay near the caches.
_ROWS_SUMMED = {"cpu": 1024, "cuda": 65_536}
_ROWS_READ = 16_384
# Rows more similar to their centroid (2.6°) seed no other cluster.
_NEAR_ENOUGH = 0.999


class RowReader(Protocol):
    """The rows to cluster, numbered 0 … N − 1, of all processes."""

    def __len__(self) -> int:
        """Return N."""

    @property
    def width(self) -> int:
        """Width D."""

    def features(self, numbers: IntArray) -> HalfArray:
        """Read rows by their numbers: unit rows, float16 [n, D]."""


def centroids_of_sums(sums_KD: torch.Tensor, previous_KD: torch.Tensor) -> torch.Tensor:
    """Turn the sums of the clusters' rows, float64, into centroids, float32: the normalised means, on the grid.

    The previous ones are kept where a sum is zero: an empty cluster, or rows that cancel.
    """
    lengths_K1 = root(fold_sum(sums_KD.square()))[:, None]
    means_KD = round_to_grid(sums_KD / lengths_K1.clamp(min=torch.finfo(torch.float64).tiny))
    return torch.where(lengths_K1 > 0, means_KD, previous_KD)


class ClusterSums:
    """Exact sums, float64, of the rows of each cluster, and their number, kept up to date as rows move."""

    def __init__(self, num_clusters: int, width: int, device: torch.device) -> None:
        self.sums_KD = torch.zeros(num_clusters, width, dtype=torch.float64, device=device)
        self.counts_K = torch.zeros(num_clusters, dtype=torch.int64, device=device)

    def move(self, rows_BD: torch.Tensor, old_B: torch.Tensor | None, new_B: torch.Tensor) -> None:
        """Move rows, float16, from their old clusters to new ones, int64 [B]; `old_B` is None for rows that were in none."""
        at_once = _ROWS_SUMMED[rows_BD.device.type]
        for first in range(0, len(rows_BD), at_once):
            part = slice(first, first + at_once)
            exact_BD = rows_BD[part].float().double()  # in two steps, in two thirds of the time of one
            self._add(exact_BD, new_B[part], 1)
            if old_B is not None:
                self._add(exact_BD, old_B[part], -1)

    def _add(self, rows_BD: torch.Tensor, clusters_B: torch.Tensor, count: int) -> None:
        self.sums_KD.index_add_(0, clusters_B, rows_BD, alpha=count)
        self.counts_K.index_add_(0, clusters_B, torch.full_like(clusters_B, count))


def first_centroids(rows: RowReader, num_clusters: int, seed: int) -> torch.Tensor:
    """Choose the first centroids, float32 [K, D] on the CPU."""
    return rows_as_centroids(rows, choose_first_rows(rows.features, len(rows), num_clusters, seed))


def rows_as_centroids(rows: RowReader, numbers: IntArray) -> torch.Tensor:
    """Read single rows as centroids: unit rows on the grid, float32 [K, D] on the CPU."""
    centroids_KD = torch.zeros(len(numbers), rows.width)
    for first in range(0, len(numbers), _ROWS_READ):
        part = slice(first, first + _ROWS_READ)
        chosen_CD = torch.from_numpy(rows.features(numbers[part])).double()
        centroids_KD[part] = centroids_of_sums(chosen_CD, centroids_KD[part])
    return centroids_KD


def choose_first_rows(read: ReadRows, num_rows: int, num_clusters: int, seed: int) -> npt.NDArray[np.int64]:
    """Choose the rows that become the first centroids: K different numbers, a function of the rows and the arguments only.

    Up to 512 clusters: greedy k-means++ on a uniform sample of 16·K rows. More: uniformly drawn rows.

    Raises:
        ValueError: when K is outside [1, N].
    """
    if not 1 <= num_clusters <= num_rows:
        raise ValueError(f"the number of clusters must lie in [1, {num_rows}], not {num_clusters}")
    random = np.random.default_rng(seed)

    def draw(count: int) -> npt.NDArray[np.int64]:
        return np.sort(random.choice(num_rows, count, replace=False, shuffle=False).astype(np.int64))

    if num_clusters > PLUS_PLUS_CLUSTERS:
        return draw(num_clusters)
    sample_S = draw(min(num_rows, PLUS_PLUS_ROWS_PER_CLUSTER * num_clusters))
    return sample_S[spread_out(torch.from_numpy(read(sample_S)), num_clusters, random)]


def spread_out(rows_SD: torch.Tensor, num_clusters: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """Choose rows far from each other by greedy k-means++.

    Each next row is the best of 2 + log K trials drawn with a probability proportional to 1 − similarity to the nearest
    row chosen so far, which for unit rows is half the squared distance. Dot products of float16 rows are exact in float64
    and the probabilities are integers, so the choice is the same for any number of threads and on any machine. A float32
    product of all rows with all, 4·S² bytes, tells which rows a trial can be nearer to: after the first few, a small share.

    Source: Arthur and Vassilvitskii 2007, k-means++, with the greedy trials of its section 5, as in scikit-learn.
    """
    exact_SD = rows_SD.double()

    def distances(chosen_L: torch.Tensor, others_P: torch.Tensor) -> torch.Tensor:
        """Return 1 − similarity in units of 2⁻³⁰, int64 [L, P]; exactly 0 for a chosen row itself."""
        distance_LP = (1.0 - exact_SD[chosen_L] @ exact_SD[others_P].T).mul_(_UNIT).round_().clamp_(min=0).long()
        return distance_LP.masked_fill_(chosen_L[:, None] == others_P, 0)

    # A chosen row's distance to itself counts as 0, even if a longer one is nearer by its product.
    about_SS = (rows_SD.float() @ rows_SD.float().T).fill_diagonal_(LONGEST_UNIT_ROW**2)
    nearer = 1.0 - (rows_SD.shape[1] * ACCUMULATION_UNIT * LONGEST_UNIT_ROW**2 + _SLACK)
    num_trials = 2 + int(math.log(num_clusters))
    chosen = [int(random.integers(len(rows_SD)))]
    weight_S = distances(torch.tensor(chosen), torch.arange(len(rows_SD)))[0]
    while len(chosen) < num_clusters:
        total = int(weight_S.sum())
        if total == 0:
            # Every row equals a chosen one: any others do, their clusters stay empty.
            rest = np.setdiff1d(np.arange(len(rows_SD)), chosen)[: num_clusters - len(chosen)]
            return np.asarray([*chosen, *rest.tolist()], dtype=np.int64)
        draws_L = torch.from_numpy(random.integers(total, size=num_trials))
        trials_L = torch.searchsorted(weight_S.cumsum(0), draws_L, right=True)
        # Rows that may be nearer to a trial than to all chosen so far; the weights of others stay.
        near_P = (about_SS[trials_L].amax(dim=0) >= nearer - weight_S.float() / _UNIT).nonzero()[:, 0]
        weights_LP = torch.minimum(weight_S[near_P], distances(trials_L, near_P))
        best = int(weights_LP.sum(dim=1).argmin())
        chosen.append(int(trials_L[best]))
        weight_S[near_P] = weights_LP[best]
    return np.asarray(chosen, dtype=np.int64)


def choose_seeds(similarities_P: DoubleArray, numbers_P: IntArray, read: ReadRows, count: int) -> npt.NDArray[np.int64]:
    """Choose rows to re-seed empty clusters: those farthest from their own centroids, no two of them equal.

    Rows next to their centroid are left out: data with fewer different rows than clusters has clusters that must stay empty.

    Args:
        similarities_P: Of candidate rows to their own centroids; equal ones go by the smaller number.

    Returns:
        Positions among the candidates, int64 [≤ count], the farthest first. The choice from parts of the candidates, made
        again from what was chosen of each part, is the choice from all.
    """
    far = np.flatnonzero(similarities_P <= _NEAR_ENOUGH)
    chosen: list[int] = []
    seen: set[bytes] = set()
    for position in far[np.lexsort((numbers_P[far], similarities_P[far]))].tolist():
        content = read(numbers_P[position, None]).tobytes()
        if content not in seen:
            seen.add(content)
            chosen.append(position)
        if len(chosen) == count:
            break
    return np.asarray(chosen, dtype=np.int64)
