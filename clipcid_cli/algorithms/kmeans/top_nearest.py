"""The m nearest of many centroids for each row: found by float32 products, proven and put in order by float64.

Shape letters: B rows of a block, K centroids, D width, m centroids asked for, k > m centroids a float32 search returns,
P (row, centroid) pairs, R rows that are left to a full product.

A float32 product gives centroid j a similarity s_j within e of the exact x·c_j (:mod:`.nearest` says what exact means):
|s_j − x·c_j| ≤ D·u·|x|·|c_j|, with u = 2⁻²⁴ for a CPU's rounded sums in any order, and what
:mod:`clipcid_cli.algorithms.search.low_precision` allows for a GPU's. The search returns the k centroids of largest s,
in descending order:

- Where s_m > s_k + 2e, no centroid outside the k is among the m nearest, nor ties with the last of them: one outside has
  s ≤ s_k, so its exact similarity is at most s_k + e, and m centroids have more than that. Other rows are multiplied with
  all centroids in float64.
- Two centroids whose s differ by more than 2e are in the right order. The others are decided in float64; equal similarities
  in favour of the smaller number.
- s is returned for a similarity where all numbers within e of it round to the same float16. Otherwise it is computed in
  float64, as the largest always is.

So what is returned depends on rows and centroids only, whoever multiplied. On a CPU faiss searches, in half the time of a
product and PyTorch's topk (200,000 × 192 rows, 1,024 centroids, k = 24); on a GPU those two do.
"""

from __future__ import annotations

import math

import torch

from clipcid_cli.algorithms.kmeans.pairwise import pair_similarities
from clipcid_cli.algorithms.search.blocks import exact_accumulation
from clipcid_cli.algorithms.search.low_precision import ACCUMULATION_UNIT

# More centroids than asked for, so that the m-th is told from the first that is not returned.
_SPARE = 4
# Centroids multiplied at once.
_CHUNK = 4096
# Of the lengths' own float32 sums, and of terms of second order in u.
_ROUNDED_UP = 1.001
# On top of e: PyTorch rounds float64 to float16 by way of float32.
_SLACK = 2.0**-23


def top_nearest(rows_BD: torch.Tensor, centroids_KD: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the `m` nearest centroids of each row, the most similar first.

    Args:
        rows_BD: Unit rows, float16 [B, D], on the device of the centroids.
        centroids_KD: Unit rows on the 2⁻²⁴ grid, float32 [K, D].
        m: Centroids per row, in [1, K].

    Returns:
        The centroids, int64 [B, m], and their similarities, float64 [B, m]: the first is exact, the others round to the same
        float16 as the exact ones. Of equally similar centroids the smaller number comes first.

    Raises:
        ValueError: when the widths differ, or `m` is outside [1, K].
    """
    (num_rows, width), num_centroids = rows_BD.shape, len(centroids_KD)
    if width != centroids_KD.shape[1] or rows_BD.dtype != torch.float16:
        raise ValueError(
            f"rows must be float16 [B, {centroids_KD.shape[1]}], not {rows_BD.dtype} {list(rows_BD.shape)}"
        )
    if not 1 <= m <= num_centroids:
        raise ValueError(f"m must lie in [1, {num_centroids}], not {m}")
    k = min(num_centroids, m + _SPARE)
    wide_BD = rows_BD.float()
    score_Bk, found_Bk = _search(wide_BD, centroids_KD, k)
    unit = 2.0**-24 if rows_BD.device.type == "cpu" else ACCUMULATION_UNIT
    lengths_B1 = wide_BD.norm(dim=1, keepdim=True).double() * centroids_KD.norm(dim=1).max()
    error_B1 = width * unit * lengths_B1 * _ROUNDED_UP + _SLACK

    # 1. Rows of which a centroid outside the k may be wanted, and centroids inside that may be.
    last_B1 = score_Bk[:, m - 1 : m]
    open_B = torch.full((num_rows,), False, device=rows_BD.device)
    if k < num_centroids:
        open_B = (last_B1 - score_Bk[:, -1:] <= 2 * error_B1)[:, 0]
    may_be_Bk = last_B1 - score_Bk <= 2 * error_B1
    may_be_Bk[:, :m] = True

    # 2. What float32 leaves open: the order of neighbours, and how a similarity rounds.
    tie_Bk = torch.zeros_like(may_be_Bk)
    close = (score_Bk[:, :-1] - score_Bk[:, 1:] <= 2 * error_B1) & may_be_Bk[:, 1:]
    tie_Bk[:, :-1] |= close
    tie_Bk[:, 1:] |= close
    rounds_Bk = (score_Bk - error_B1).half() != (score_Bk + error_B1).half()
    rounds_Bk[:, m:] = False
    decide_Bk = (tie_Bk | rounds_Bk) & ~open_B[:, None]
    decide_Bk[:, 0] = ~open_B

    # 3. Decide that in float64, and put rows with ties in order.
    row_P, place_P = decide_Bk.nonzero(as_tuple=True)
    score_Bk[row_P, place_P] = pair_similarities(rows_BD, centroids_KD, row_P, found_Bk[row_P, place_P])
    score_Bk.masked_fill_(~may_be_Bk, -math.inf)
    mixed_R = (tie_Bk.any(dim=1) & ~open_B).nonzero()[:, 0]
    found_Bk[mixed_R], score_Bk[mixed_R] = _in_order(found_Bk[mixed_R], score_Bk[mixed_R])
    found_Bm, score_Bm = found_Bk[:, :m].contiguous(), score_Bk[:, :m].contiguous()

    # 4. The rows that are open still.
    for open_R in torch.split(open_B.nonzero()[:, 0], max(1, 2**24 // num_centroids)):
        if len(open_R):
            found_Bm[open_R], score_Bm[open_R] = _decide_densely(rows_BD[open_R], centroids_KD, m)
    return found_Bm, score_Bm


def _search(wide_BD: torch.Tensor, centroids_KD: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest float32 products of each row, as float64 and descending, and their centroids, int64 [B, k]."""
    if wide_BD.device.type == "cpu":
        import faiss  # here alone: half a second, and threads of its own

        score_Bk, found_Bk = faiss.knn(wide_BD.numpy(), centroids_KD.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(score_Bk).double(), torch.from_numpy(found_Bk)
    best: list[tuple[torch.Tensor, torch.Tensor]] = []
    for first in range(0, len(centroids_KD), _CHUNK):
        with exact_accumulation(wide_BD.device):
            product_BC = wide_BD @ centroids_KD[first : first + _CHUNK].T
        score_BC, found_BC = product_BC.topk(min(k, product_BC.shape[1]), dim=1)
        best = [
            (torch.cat([s for s, _ in best] + [score_BC], 1), torch.cat([f for _, f in best] + [found_BC + first], 1))
        ]
        score_BC, place_BC = best[0][0].topk(min(k, best[0][0].shape[1]), dim=1)
        best = [(score_BC, best[0][1].gather(1, place_BC))]
    return best[0][0].double(), best[0][1]


def _in_order(found_Rk: torch.Tensor, score_Rk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort by descending similarity, equal ones by ascending number."""
    found_Rk, order_Rk = found_Rk.sort(dim=1)
    score_Rk, place_Rk = score_Rk.gather(1, order_Rk).sort(dim=1, descending=True, stable=True)
    return found_Rk.gather(1, place_Rk), score_Rk


def _decide_densely(rows_RD: torch.Tensor, centroids_KD: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply rows with all centroids in float64: [R, m] each."""
    exact_RK = torch.cat(
        [rows_RD.double() @ centroids_CD.double().T for centroids_CD in torch.split(centroids_KD, _CHUNK)], dim=1
    )
    numbers_RK = torch.arange(exact_RK.shape[1], device=exact_RK.device).expand(exact_RK.shape)
    least_R1 = exact_RK.topk(m, dim=1).values[:, -1:]
    found_RK, score_RK = _in_order(numbers_RK, exact_RK.masked_fill(exact_RK < least_R1, -math.inf))
    return found_RK[:, :m], score_RK[:, :m]
