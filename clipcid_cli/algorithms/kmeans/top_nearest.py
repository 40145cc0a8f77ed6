"""The m nearest of many centroids for each row: found by float32 products, proven and put in order by float64.

Shape letters: B rows of a block, K centroids, D width, m centroids asked for, k > m centroids a float32 search returns,
P (row, centroid) pairs, R rows that are left to a full product.

A float32 product gives centroid j a similarity s_j within e of the exact x·c_j (:mod:`.nearest` says what exact means). On
a CPU it sums up to 192 entries at a time, each sum with an error of at most 192·u·|x_i|·|c_i| in any order, u = 2⁻²⁴; by
Cauchy–Schwarz these are at most 192·u·|x|·|c_j| together, and adding the sums up costs u·|x|·|c_j| each. Lengths are at
most 1.01. On a GPU e is what :mod:`clipcid_cli.algorithms.near.block` allows for D entries. The search returns
the k centroids of largest s, in descending order:

- Where s_m > s_k + 2e, no centroid outside the k is among the m nearest, nor ties with the last of them: one outside has
  s ≤ s_k, so its exact similarity is at most s_k + e, and m centroids have more than that. Other rows are multiplied with
  all centroids in float64.
- Two centroids whose s differ by more than 2e are in the right order. The others are decided in float64; equal similarities
  in favour of the smaller number.
- s is returned for a similarity where all numbers within e of it round to the same float16. Otherwise it is computed in
  float64, as the largest always is.

So what is returned depends on rows and centroids only, whoever multiplied. On a CPU faiss's heaps keep the largest, in half
the time of PyTorch's topk; product and heaps together take as long as faiss's own search, whose sums of all D entries
would leave three times as many pairs to decide (D = 512). Callers look up several blocks at once, a thread each.
"""

from __future__ import annotations

import math

import torch

from clipcid_cli.algorithms.kmeans.pairwise import pair_similarities
from clipcid_cli.algorithms.near.block import ACCUMULATION_UNIT, exact_accumulation

# More centroids than asked for, so that the m-th is told from the first that is not returned: each makes the search slower.
_SPARE = 3
# Centroids multiplied at once; a CPU searches among as many as keep the product near its caches.
_CHUNK = {"cpu": 1024, "cuda": 4096}
_PRODUCT_ENTRIES = 2**21
# Entries of a row that one float32 product sums on a CPU.
_DEPTH = 192
# Of rows and centroids: unit vectors, rounded. Its square covers terms of second order in u as well.
_LONGEST = 1.01
# On top of e: s − e and s + e are rounded to float32.
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
    width, num_centroids = rows_BD.shape[1], len(centroids_KD)
    if width != centroids_KD.shape[1] or rows_BD.dtype != torch.float16:
        raise ValueError(
            f"rows must be float16 [B, {centroids_KD.shape[1]}], not {rows_BD.dtype} {list(rows_BD.shape)}"
        )
    if not 1 <= m <= num_centroids:
        raise ValueError(f"m must lie in [1, {num_centroids}], not {m}")
    k = min(num_centroids, m + _SPARE)
    wide_BD = rows_BD.float()
    score_Bk, found_Bk = _search(wide_BD, centroids_KD, k)
    on_cpu = rows_BD.device.type == "cpu"
    terms, unit = (min(width, _DEPTH) + width / _DEPTH, 2.0**-24) if on_cpu else (width, ACCUMULATION_UNIT)
    error = terms * unit * _LONGEST**2 + _SLACK

    # 1. Rows of which a centroid outside the k may be wanted, and centroids inside that may be.
    gap_B = score_Bk[:, m - 1] - score_Bk[:, -1]
    open_B = gap_B <= 2 * error if k < num_centroids else torch.zeros_like(gap_B, dtype=torch.bool)
    may_be_Bs = score_Bk[:, m - 1 : m] - score_Bk[:, m:] <= 2 * error

    # 2. What float32 leaves open: the order of neighbours, and how a similarity rounds.
    close_Bk = score_Bk[:, :-1] - score_Bk[:, 1:] <= 2 * error
    close_Bk[:, m - 1 :] &= may_be_Bs
    decide_Bk = (score_Bk - error).half() != (score_Bk + error).half()
    decide_Bk[:, m:] = False
    decide_Bk[:, 0] = True
    decide_Bk[:, :-1] |= close_Bk
    decide_Bk[:, 1:] |= close_Bk
    decide_Bk[open_B] = False

    # 3. Decide that in float64, and put rows with ties in order.
    place_P = decide_Bk.view(-1).nonzero()[:, 0]
    exact_Bk = score_Bk.double()
    centroid_P = found_Bk.view(-1)[place_P]
    exact_Bk.view(-1)[place_P] = pair_similarities(wide_BD, centroids_KD, place_P // k, centroid_P)
    exact_Bk[:, m:].masked_fill_(~may_be_Bs, -math.inf)
    # Ties as well: what decides them is the smaller number. Close ones are in the right order mostly.
    wrong_B = ((exact_Bk[:, :-1] <= exact_Bk[:, 1:]) & close_Bk).any(dim=1)
    mixed_R = (wrong_B & ~open_B).nonzero()[:, 0]
    found_Bk[mixed_R], exact_Bk[mixed_R] = _in_order(found_Bk[mixed_R], exact_Bk[mixed_R])
    found_Bm, exact_Bm = found_Bk[:, :m].contiguous(), exact_Bk[:, :m].contiguous()

    # 4. The rows that are open still.
    for open_R in torch.split(open_B.nonzero()[:, 0], max(1, 2**24 // num_centroids)):
        if len(open_R):
            found_Bm[open_R], exact_Bm[open_R] = _decide_densely(rows_BD[open_R], centroids_KD, m)
    return found_Bm, exact_Bm


def _search(wide_BD: torch.Tensor, centroids_KD: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest products of each row, float32 [B, k] and descending, and their centroids, int64 [B, k]."""
    if wide_BD.device.type == "cpu":
        return _search_on_cpu(wide_BD, centroids_KD, k)
    best: list[tuple[torch.Tensor, torch.Tensor]] = []
    for first in range(0, len(centroids_KD), _CHUNK["cuda"]):
        with exact_accumulation(wide_BD.device):
            product_BC = wide_BD @ centroids_KD[first : first + _CHUNK["cuda"]].T
        score_BC, found_BC = product_BC.topk(min(k, product_BC.shape[1]), dim=1)
        best = [
            (torch.cat([s for s, _ in best] + [score_BC], 1), torch.cat([f for _, f in best] + [found_BC + first], 1))
        ]
        score_BC, place_BC = best[0][0].topk(min(k, best[0][0].shape[1]), dim=1)
        best = [(score_BC, best[0][1].gather(1, place_BC))]
    return best[0]


# Memory for products that no thread uses now, of ended threads as well: fresh memory each time costs a fifth of a search.
_free_memory: list[torch.Tensor] = []


def _take_memory(number: int) -> torch.Tensor:
    """Return memory for at least so many float32 numbers; what is put into the list again is used again."""
    try:
        memory = _free_memory.pop()
    except IndexError:
        memory = torch.empty(0)
    return memory if len(memory) >= number else torch.empty(number)


def _search_on_cpu(wide_BD: torch.Tensor, centroids_KD: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    import faiss  # here alone: half a second

    faiss.omp_set_num_threads(torch.get_num_threads())  # of this thread; faiss has an OpenMP of its own
    score_Bk, found_Bk = torch.empty(len(wide_BD), k), torch.empty(len(wide_BD), k, dtype=torch.int64)
    heaps = faiss.float_minheap_array_t()
    heaps.nh, heaps.k = score_Bk.shape
    heaps.val, heaps.ids = faiss.swig_ptr(score_Bk.numpy()), faiss.swig_ptr(found_Bk.numpy())
    heaps.heapify()
    rows = torch.split(wide_BD, _DEPTH, dim=1)
    chunk = min(len(centroids_KD), max(1, _PRODUCT_ENTRIES // len(wide_BD)))
    memory = _take_memory(2 * len(wide_BD) * chunk)
    buffers = memory[: 2 * len(wide_BD) * chunk].view(2, -1)
    for first in range(0, len(centroids_KD), chunk):
        centroids = torch.split(centroids_KD[first : first + chunk], _DEPTH, dim=1)
        shape = len(wide_BD), len(centroids[0])
        sum_BC, product_BC = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
        torch.mm(rows[0], centroids[0].T, out=sum_BC)
        for rows_Bd, centroids_Cd in zip(rows[1:], centroids[1:], strict=True):
            # Not by addmm, which may add to the sum entry by entry: as inexact as a product of all.
            sum_BC += torch.mm(rows_Bd, centroids_Cd.T, out=product_BC)
        heaps.addn(shape[1], faiss.swig_ptr(sum_BC.numpy()), first)  # type: ignore[call-arg]  # its stub has no j0
    heaps.reorder()
    _free_memory.append(memory)
    return score_Bk, found_Bk


def _in_order(found_Rk: torch.Tensor, score_Rk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort by descending similarity, equal ones by ascending number."""
    found_Rk, order_Rk = found_Rk.sort(dim=1)
    score_Rk, place_Rk = score_Rk.gather(1, order_Rk).sort(dim=1, descending=True, stable=True)
    return found_Rk.gather(1, place_Rk), score_Rk


def _decide_densely(rows_RD: torch.Tensor, centroids_KD: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply rows with all centroids in float64: [R, m] each."""
    exact_RK = torch.cat(
        [
            rows_RD.double() @ centroids_CD.double().T
            for centroids_CD in torch.split(centroids_KD, _CHUNK[rows_RD.device.type])
        ],
        dim=1,
    )
    numbers_RK = torch.arange(exact_RK.shape[1], device=exact_RK.device).expand(exact_RK.shape)
    least_R1 = exact_RK.topk(m, dim=1).values[:, -1:]
    found_RK, score_RK = _in_order(numbers_RK, exact_RK.masked_fill(exact_RK < least_R1, -math.inf))
    return found_RK[:, :m], score_RK[:, :m]
