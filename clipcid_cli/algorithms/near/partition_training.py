"""Partitions of some rows by k-means, on any number of processes with the same result.

Shape letters: N rows, S sampled rows, B of them on this process, K partitions, D width.

Source: docs/method.md#partitioned-search.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from clipcid_cli.algorithms.near.block import read_stored
from clipcid_cli.algorithms.near.centroids import ClusterSums, centroids_of_sums
from clipcid_cli.algorithms.near.exact import IntArray, ReadRows
from clipcid_cli.algorithms.near.partitions import Partitions, default_num_partitions

# Rows that k-means sees for each partition: partitions need no fine centroids, only few rows near their borders.
ROWS_PER_CENTROID = 64
_ITERATIONS = 4
_SPLIT_ROUNDS = 2
# Times each of those is compared with all centroids, at most: at every move of the centroids and after each round.
LOOKS_AT_SAMPLE = _ITERATIONS + 1 + _SPLIT_ROUNDS * (_ITERATIONS // 2 + 1)


def train_partitions(
    read: ReadRows,
    rows: IntArray,
    device: torch.device,
    *,
    share: Callable[[int], tuple[int, int]],
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
    gather: Callable[[Any], list[Any]],
    advance: Callable[[], object],
) -> Partitions:
    """Find centroids by k-means on a sample of rows, and split partitions that have far more rows than others.

    Sums of rows are exact, so the centroids do not depend on how the sample is shared.

    Args:
        rows: Row numbers, int64 [N], the same on every process.
        share: Returns this process's part of n items: the first, and the one after the last.
        sum_over_processes: Returns the sum of a tensor over all processes; may change its argument.
        gather: Returns every process's value, in the order of their shares.
        advance: Called after each iteration.
    """
    num_partitions = default_num_partitions(len(rows))
    generator = np.random.default_rng(0)
    size = min(len(rows), ROWS_PER_CENTROID * num_partitions)
    sample_S = rows[np.sort(generator.choice(len(rows), size, replace=False))]
    first = np.sort(generator.choice(size, num_partitions, replace=False))
    start, stop = share(size)
    mine_BD = read_stored(read, sample_S[start:stop], device)
    centroids_KD = read_stored(read, sample_S[first], device)
    for round_ in range(1 + _SPLIT_ROUNDS):
        for _ in range(_ITERATIONS if round_ == 0 else _ITERATIONS // 2):
            sums = _sum_rows(mine_BD, _nearest(Partitions(centroids_KD), mine_BD), len(centroids_KD))
            # An empty partition keeps its centroid.
            centroids_KD = centroids_of_sums(sum_over_processes(sums.sums_KD), centroids_KD.float()).half()
            advance()
        partitions = Partitions(centroids_KD)
        home_S = np.concatenate(gather(_nearest(partitions, mine_BD).cpu().numpy()))
        counts_K = split_counts(np.bincount(home_S, minlength=len(partitions)), num_partitions)
        if counts_K.max() == 1 or round_ == _SPLIT_ROUNDS:
            break
        # Some of its own rows, evenly spaced, replace the centroid of a partition that is split.
        added = [
            members[np.linspace(0, len(members) - 1, counts_K[partition]).astype(np.int64)]
            for partition in np.flatnonzero(counts_K > 1).tolist()
            for members in [np.flatnonzero(home_S == partition)]
        ]
        added_AD = read_stored(read, sample_S[np.concatenate(added)], device)
        centroids_KD = torch.cat([centroids_KD[torch.from_numpy(counts_K == 1).to(device)], added_AD])
    return partitions


def split_counts(sizes_K: IntArray, num_partitions: int) -> IntArray:
    """Say in how many each partition is to be split, so that none holds more than four times its even share.

    Args:
        sizes_K: Rows of each, int64 [K].
        num_partitions: Partitions over which rows would lie evenly.

    Returns:
        int64 [K]; 1 where it stays as it is.
    """
    even = max(1.0, float(sizes_K.sum()) / num_partitions)
    return np.where(sizes_K > 4.0 * even, np.ceil(sizes_K / even), 1.0).astype(np.int64)


def _nearest(partitions: Partitions, rows_BD: torch.Tensor) -> torch.Tensor:
    """Find the nearest centroid of this process's rows, of which there may be none; int64 [B]."""
    return partitions.home(rows_BD) if len(rows_BD) else torch.empty(0, dtype=torch.int64, device=rows_BD.device)


def _sum_rows(rows_BD: torch.Tensor, home_B: torch.Tensor, num_partitions: int) -> ClusterSums:
    sums = ClusterSums(num_partitions, rows_BD.shape[1], rows_BD.device)
    sums.move(rows_BD, None, home_B)
    return sums
