"""The nearest of many for each row, exact: fast products propose, float64 decides; of equally near ones the smaller number.

Rows and those they are compared with are float16, or float32 multiples of 2⁻²⁴ of length at most 1.01 (centroids, see
:mod:`clipcid_cli.algorithms.kmeans.centroids`): float64 holds all sums of their products exactly
(:mod:`clipcid_cli.algorithms.near.exact`), so what is found depends on neither blocks, threads, formats nor devices.

**One**: with |s − x·c| ≤ e for the score s of row x and centroid c (:mod:`clipcid_cli.algorithms.near.block`), and r the
exact similarity of the centroid with the largest score: the nearest has at least as much, so its score is at least r − e.
Centroids that reach that are candidates, which float64 tells apart; the others have at most their score plus e.

**Many**: float32 products propose k > m in descending order of s. With |s − x·c| ≤ e,

- where s_m > s_k + 2e, no centroid outside the k is among the m nearest, nor ties with the last of them: one outside has
  s ≤ s_k, so x·c ≤ s_k + e, and m centroids have more than that. Other rows are multiplied with all centroids in float64;
- two whose s differ by more than 2e are in the right order. The others are decided in float64;
- s is returned for a cosine where all numbers within e of it round to the same float16, if that is precise enough.

Shape letters beside those of the map: G groups of g centroids, P (row, centroid) and Q (row, group) pairs, k proposed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import threading
from collections.abc import Sequence
from functools import cached_property, partial

import numpy as np
import torch

from clipcid_cli.algorithms.near.block import (
    ACCUMULATION_UNIT,
    Block,
    exact_accumulation,
    make_block,
    multiply,
    rounded_error,
    score_dtype,
)
from clipcid_cli.algorithms.near.exact import LONGEST_UNIT_ROW, exact_dots

# Rows and centroids of one product: on a CPU its scores stay near the caches, a GPU needs more work at a time.
PRODUCT_ROWS = {"cpu": 1024, "cuda": 16_384}
_PRODUCT_CENTROIDS = {"cpu": 4096, "cuda": 16_384}
# Groups of those centroids. Of most the largest score tells that there is no candidate.
_GROUPS = {"cpu": 64, "cuda": 256}
# Where rows have candidates in more groups than this on average, all centroids are about equally near and a product in
# float32 is cheaper: rows with cosines of 0.9 took 11 s without that and 2.6 with it (2.2 in float32 from the start).
_CROWDED = 10
# Groups that are looked into at once; where many centroids are equal there are more.
_MAX_GROUPS = 2**18
# No centroid yet: above every number.
_NONE = torch.iinfo(torch.int64).max

# More centroids than asked for, so that the m-th is told from the first that is not proposed: each makes the search slower.
_SPARE = 3
# s − e and s + e are rounded to float32.
_SLACK = 2.0**-23


@dataclasses.dataclass(frozen=True)
class Found:
    """Of some rows the nearest of the centroids looked at."""

    number_B: torch.Tensor  # numbers of the centroids, int64 [B]
    cosine_B: torch.Tensor  # exact similarities to them, float64 [B]
    others_B: torch.Tensor  # no other one is more similar than this, float64 [B]

    def at(self, which: torch.Tensor | slice) -> Found:
        return Found(self.number_B[which], self.cosine_B[which], self.others_B[which])

    @staticmethod
    def join(parts: Sequence[Found]) -> Found:
        names = [field.name for field in dataclasses.fields(Found)]
        return Found(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


class NearestCentroid:
    """Finds the nearest of fixed centroids; several threads may ask at once.

    Args:
        centroids_KD: On the device of the search, float32.
        dtype: Format of the product that proposes; it changes the speed, never the answer.
        order_K: Numbers of the centroids in the order in which they are looked at, int64 [K]; by default as they come.
    """

    def __init__(self, centroids_KD: torch.Tensor, dtype: torch.dtype, order_K: torch.Tensor | None = None) -> None:
        device = centroids_KD.device
        self._centroids_KD = centroids_KD
        self._buffer = _Buffer()
        self._groups = _GROUPS[device.type]
        self._order_K = torch.arange(len(centroids_KD), device=device) if order_K is None else order_K
        self._place_K = torch.argsort(self._order_K)
        self._parts: list[tuple[torch.Tensor, Block]] = []
        for number_C in torch.split(self._order_K, _PRODUCT_CENTROIDS[device.type]):
            # The last one more than once to fill the groups.
            number_C = torch.cat([number_C, number_C[-1:].expand(-len(number_C) % self._groups)])
            part = make_block(np.arange(len(number_C)), centroids_KD[number_C], dtype)
            self._parts.append((number_C, dataclasses.replace(part, stored=part.stored[:0].clone())))

    @cached_property
    def _in_float32(self) -> NearestCentroid:
        return NearestCentroid(self._centroids_KD, torch.float32, self._order_K)

    def of(
        self, rows: Block, which_B: torch.Tensor | None = None, known: Found | None = None, leading: int | None = None
    ) -> Found:
        """Find the nearest centroid of each row.

        Args:
            rows: Their copies are in the format of the search.
            which_B: Positions of some of them, int64 [B]; by default all.
            known: A centroid of each row that takes part with the similarity given, its exact one or less, whether it is
                looked at or not; the nearer it is, the more is discarded. ``others_B`` is not used.
            leading: How many centroids to look at, the first of the order, rounded up; by default all.
        """
        device = rows.stored.device
        which_B = torch.arange(len(rows.stored), device=device) if which_B is None else which_B
        # Unlike indexing, this copies whole rows.
        size = len(which_B)
        scan_BD = rows.scan.index_select(0, which_B)
        nobody_B = torch.full((size,), -torch.inf, dtype=torch.float64, device=device)
        place_B = None if known is None else self._place_K[known.number_B]
        found = known or Found(torch.full((size,), _NONE, device=device), nobody_B, nobody_B)
        found = dataclasses.replace(found, others_B=nobody_B)
        looked_at = 0
        # Some centroid is at least as similar as this.
        nearest_B = found.cosine_B
        candidates = list[tuple[torch.Tensor, torch.Tensor]]()
        decide = partial(self._decide, rows.stored, which_B)
        for number_C, part in self._parts:
            if leading is not None:
                number_C = number_C[: -(-(leading - looked_at) // self._groups) * self._groups]
            unit = rows.step * part.step
            error = rounded_error(rows, part)
            score_BC = multiply(scan_BD, part.scan[: len(number_C)], self._buffer.take(size * len(number_C), scan_BD))
            # Neither what fills the groups nor the known one is compared.
            lowest = torch.iinfo(score_BC.dtype).min if score_BC.dtype == torch.int32 else -torch.inf
            score_BC[:, len(self._order_K) - looked_at :] = lowest
            if place_B is not None:
                # Without the positions of the rows whose own is among these, for which a GPU would be waited.
                here_B1 = (place_B[:, None] - looked_at).clamp(0, len(number_C) - 1)
                is_own_B1 = here_B1 + looked_at == place_B[:, None]
                score_BC.scatter_(1, here_B1, score_BC.gather(1, here_B1).masked_fill_(is_own_B1, lowest))
            # A group is of every G-th column: of these the maximum is fast in any format.
            grouped_BgG = score_BC.view(size, -1, self._groups)
            largest_BG = grouped_BgG.amax(dim=1)
            largest_B, group_B = largest_BG.max(dim=1)
            highest_B = largest_B.double() * unit
            if looked_at == 0:  # the likeliest is decided first: few others can be nearer than that
                row_R = (highest_B + error >= nearest_B).nonzero()[:, 0]
                group_R = group_B[row_R]
                place_R = grouped_BgG[row_R, :, group_R].argmax(dim=1) * self._groups + group_R
                found = decide(row_R, number_C[place_R], found)
                nearest_B = found.cosine_B
            else:
                nearest_B = torch.maximum(nearest_B, highest_B - error)
            looked_at += len(number_C)

            # Rounding to a float format is covered by the error, which is a full unit in the last place instead of a half.
            least_B1 = ((nearest_B - error) / unit)[:, None]
            least_B1 = (least_B1.floor() if score_BC.dtype == torch.int32 else least_B1).to(score_BC.dtype)
            near_BG = largest_BG >= least_B1
            row_Q, group_Q = near_BG.nonzero(as_tuple=True)
            if scan_BD.dtype != torch.float32 and len(row_Q) > _CROWDED * size:
                stored = rows.stored.index_select(0, which_B)
                wide = dataclasses.replace(rows, stored=stored, scan=stored.float(), residual=0.0, step=1.0)
                return self._in_float32.of(wide, None, known, leading)
            if len(row_Q) > _MAX_GROUPS and size > 1:
                halves = (slice(0, size // 2), slice(size // 2, size))
                return Found.join([self.of(rows, which_B[half], known and known.at(half), leading) for half in halves])

            score_Qg = grouped_BgG[row_Q, :, group_Q]
            near_Qg = score_Qg >= least_B1[row_Q]
            pair_P, member_P = near_Qg.nonzero(as_tuple=True)
            # The largest of the other scores bounds the others.
            rest_B = largest_BG.masked_fill_(near_BG, lowest).amax(dim=1)
            rest_B.scatter_reduce_(0, row_Q, score_Qg.masked_fill_(near_Qg, lowest).amax(dim=1), "amax")
            found = dataclasses.replace(found, others_B=torch.maximum(found.others_B, rest_B.double() * unit + error))
            candidates.append((row_Q[pair_P], number_C[member_P * self._groups + group_Q[pair_P]]))
            if leading is not None and looked_at >= leading:
                break
        row_P, number_P = (torch.cat(parts) for parts in zip(*candidates, strict=True))
        return decide(row_P, number_P, found)

    def _decide(
        self,
        stored_ND: torch.Tensor,
        which_B: torch.Tensor,
        row_P: torch.Tensor,
        number_P: torch.Tensor,
        found: Found,
    ) -> Found:
        new_P = (number_P != found.number_B[row_P]).nonzero()[:, 0]
        row_P, number_P = row_P[new_P], number_P[new_P]
        cosine_P = exact_dots(stored_ND, self._centroids_KD, which_B[row_P], number_P)
        best_B = found.cosine_B.scatter_reduce(0, row_P, cosine_P, "amax")
        winner_P = torch.where(cosine_P == best_B[row_P], number_P, _NONE)
        number_B = torch.where(found.cosine_B == best_B, found.number_B, _NONE).scatter_reduce(
            0, row_P, winner_P, "amin"
        )
        before_B = found.cosine_B.masked_fill(found.number_B == number_B, -torch.inf)
        other_P = cosine_P.masked_fill(number_P == number_B[row_P], -torch.inf)
        others_B = torch.maximum(found.others_B, before_B).scatter_reduce(0, row_P, other_P, "amax")
        return Found(number_B, best_B, others_B)


class _Buffer(threading.local):
    """Memory for scores, of each thread its own: fresh memory for each product would cost a sixth of its time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def take(self, number: int, scan_BD: torch.Tensor) -> torch.Tensor:
        """Return memory for so many scores of a product at a time."""
        if len(self._memory) < number:
            self._memory = torch.empty(number, dtype=score_dtype(scan_BD.dtype), device=scan_BD.device)
        return self._memory


def top_nearest(
    rows_BD: torch.Tensor, centroids_KD: torch.Tensor, m: int, *, all_exact: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the `m` nearest centroids of each row, the most similar first.

    Callers on a CPU ask for blocks of some thousand rows, a thread each.

    Args:
        rows_BD: Unit rows, float16 or float32, on the device of the centroids.
        m: Centroids per row, in [1, K].
        all_exact: Whether each cosine must be exact; else the first is, and the others round to the same float16.

    Returns:
        The centroids, int64 [B, m], and their cosines, float64 [B, m].
    """
    wide_BD = rows_BD.float()
    num_centroids = len(centroids_KD)
    k = min(num_centroids, m + _SPARE)
    score_Bk, found_Bk = _propose(wide_BD, centroids_KD, k)
    unit = 2.0**-24 if wide_BD.device.type == "cpu" else ACCUMULATION_UNIT
    error = wide_BD.shape[1] * unit * LONGEST_UNIT_ROW**2 + _SLACK
    open_B = score_Bk[:, m - 1] - score_Bk[:, -1] <= 2 * error
    if k == num_centroids:
        open_B = torch.zeros_like(open_B)

    # What float32 leaves open: the order of neighbours, and how a cosine rounds.
    close_Bk = score_Bk[:, :-1] - score_Bk[:, 1:] <= 2 * error
    decide_Bk = ((score_Bk - error).half() != (score_Bk + error).half()) | all_exact
    decide_Bk[:, 0] = True
    decide_Bk[:, m:] = False
    decide_Bk[:, :-1] |= close_Bk
    decide_Bk[:, 1:] |= close_Bk
    decide_Bk[open_B] = False
    row_P, place_P = decide_Bk.nonzero(as_tuple=True)
    cosine_Bk = score_Bk.double()
    cosine_Bk[row_P, place_P] = exact_dots(wide_BD, centroids_KD, row_P, found_Bk[row_P, place_P])
    mixed_R = (cosine_Bk[:, :-1] <= cosine_Bk[:, 1:]).any(dim=1).nonzero()[:, 0]
    found_Bk[mixed_R], cosine_Bk[mixed_R] = _in_order(found_Bk[mixed_R], cosine_Bk[mixed_R])

    for open_R in torch.split(open_B.nonzero()[:, 0], max(1, 2**24 // num_centroids)):
        parts = torch.split(centroids_KD, _PRODUCT_CENTROIDS[wide_BD.device.type])
        cosine_RK = torch.cat([wide_BD[open_R].double() @ part_CD.double().T for part_CD in parts], dim=1)
        least_R1 = cosine_RK.topk(m, dim=1).values[:, -1:]
        number_RK = torch.arange(num_centroids, device=open_R.device).expand(cosine_RK.shape)
        found_RK, cosine_RK = _in_order(number_RK, cosine_RK.masked_fill(cosine_RK < least_R1, -math.inf))
        found_Bk[open_R, :m], cosine_Bk[open_R, :m] = found_RK[:, :m], cosine_RK[:, :m]
    return found_Bk[:, :m].contiguous(), cosine_Bk[:, :m].contiguous()


def _propose(wide_BD: torch.Tensor, centroids_KD: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest float32 products of each row, [B, k] and descending, and their centroids, int64 [B, k]."""
    if wide_BD.device.type == "cpu" and importlib.util.find_spec("faiss") is not None:  # faiss is quicker there
        if torch.backends.cpu.get_cpu_capability() == "AVX512":
            # On processors it does not know, faiss's OpenBLAS takes kernels that need twice as long (AMD EPYC, width 192).
            os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")
        import faiss  # here alone: half a second

        faiss.omp_set_num_threads(torch.get_num_threads())  # of this thread; faiss has an OpenMP of its own
        found = faiss.knn(wide_BD.numpy(), centroids_KD.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])
    score_Bk, found_Bk = wide_BD[:, :0], wide_BD[:, :0].long()
    at_once = _PRODUCT_CENTROIDS[wide_BD.device.type]
    for first in range(0, len(centroids_KD), at_once):
        with exact_accumulation(wide_BD.device):
            score_BC = wide_BD @ centroids_KD[first : first + at_once].T
        more_Bk, place_Bk = score_BC.topk(min(k, score_BC.shape[1]), dim=1)
        score_BC, found_BC = torch.cat([score_Bk, more_Bk], dim=1), torch.cat([found_Bk, place_Bk + first], dim=1)
        score_Bk, place_Bk = score_BC.topk(min(k, score_BC.shape[1]), dim=1)
        found_Bk = found_BC.gather(1, place_Bk)
    return score_Bk, found_Bk


def _in_order(number_Rk: torch.Tensor, cosine_Rk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort by descending cosine, equal ones by ascending number."""
    number_Rk, order_Rk = number_Rk.sort(dim=1)
    cosine_Rk, place_Rk = cosine_Rk.gather(1, order_Rk).sort(dim=1, descending=True, stable=True)
    return number_Rk.gather(1, place_Rk), cosine_Rk
