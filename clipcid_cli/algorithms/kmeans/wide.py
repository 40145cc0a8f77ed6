"""The nearest centroids of many rows at once, for a GPU: few operators, and two waits of the host for a chunk of centroids.

Shape letters: B rows of a block, C centroids of a chunk, G groups of g centroids, D width, Q (row, group) pairs, P (row,
centroid) pairs.

With |ŝ − x·c| ≤ e for the score ŝ of every centroid, of which e includes the rounding of ŝ: where r is the largest score so
far, or s + e for a known similarity s, some centroid has x·c ≥ r − e. The nearest is at least as near, so its score is at
least r − 2e. Centroids that reach that are collected, chunk by chunk, and all are decided in float64 at the end; those that
do not have x·c ≤ ŝ + e.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from clipcid_cli.algorithms.kmeans.best_so_far import BestSoFar, Nearest
from clipcid_cli.algorithms.kmeans.pairwise import pair_similarities
from clipcid_cli.algorithms.kmeans.prepared import PreparedRows
from clipcid_cli.algorithms.near.block import exact_accumulation

# Of unit rows and centroids: no score is larger.
_LARGEST_SCORE = 1.1
# Groups of a chunk that are looked into for each row, on average; of rows with a single near centroid it is one.
_MOST_GROUPS = 4


def nearest_at_once(
    rows: PreparedRows,
    centroids_KD: torch.Tensor,
    chunks: Iterable[tuple[torch.Tensor, torch.Tensor]],
    error_B: torch.Tensor,
    known: Nearest | None,
) -> Nearest | None:
    """Find the exactly nearest of the centroids of some chunks, and of the known ones, for each row.

    Args:
        centroids_KD: All centroids, float32 [K, D].
        chunks: Copies of centroids in the format of the rows' copies, [C, D], and their numbers, int64 [G, g] with G·g = C;
            some may occur twice.
        error_B: Error of the products before they are rounded, float64 [B].
        known: As for `NearestCentroids.nearest`.

    Returns:
        None where so many centroids are nearly as near as the nearest that collecting them would fill the memory.
    """
    error_B1 = (error_B + torch.finfo(rows.cast_BD.dtype).eps / 2 * _LARGEST_SCORE)[:, None]
    reach_B1 = torch.full_like(error_B1, -torch.inf) if known is None else known.similarities_B[:, None] + error_B1
    window_B1, rest_B = 2 * error_B1, torch.full_like(error_B, -torch.inf)
    collected: list[tuple[torch.Tensor, torch.Tensor]] = []
    for cast_CD, number_Gg in chunks:
        with exact_accumulation(cast_CD.device):
            score_BGg = (rows.cast_BD @ cast_CD.T).view(len(rows), *number_Gg.shape)
        largest_BG = score_BGg.amax(dim=2)
        reach_B1 = torch.maximum(reach_B1, largest_BG.amax(dim=1, keepdim=True))
        least_B1 = reach_B1 - window_B1
        row_Q, group_Q = (largest_BG >= least_B1).nonzero(as_tuple=True)
        if len(row_Q) > _MOST_GROUPS * len(rows):
            return None
        member_Qg = score_BGg[row_Q, group_Q]
        near_Qg = member_Qg >= least_B1[row_Q]
        pair_P, place_P = near_Qg.nonzero(as_tuple=True)
        collected.append((row_Q[pair_P], number_Gg[group_Q[pair_P], place_P]))
        largest_BG[row_Q, group_Q] = member_Qg.masked_fill(near_Qg, -torch.inf).amax(dim=1)
        rest_B = torch.maximum(rest_B, largest_BG.amax(dim=1))
    row_P, centroid_P = (torch.cat(parts) for parts in zip(*collected, strict=True))
    best = BestSoFar(known, len(rows), error_B.device)
    best.take(row_P, centroid_P, pair_similarities(rows.rows_BD, centroids_KD, row_P, centroid_P))
    return Nearest(best.centroids_B, best.similarities_B, torch.maximum(best.others_B, rest_B + error_B1[:, 0]))
