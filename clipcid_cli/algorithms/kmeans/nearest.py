"""The nearest of many centroids for each row: exact answers at the speed of a low-precision matrix product.

Shape letters: B rows of a block, K centroids, C centroids of a chunk, G groups, D width, P (row, centroid) pairs, Q
(row, group) pairs, m centroids per row.

**Similarities are exact.** Rows are float16, so each entry is an integer multiple of 2⁻²⁴ (the smallest subnormal).
Centroids are kept on the same grid (:func:`clipcid_cli.algorithms.near.centroids.round_to_grid`), which moves an entry by
at most 2⁻²⁵. A product of entries is then an integer multiple of 2⁻⁴⁸, and by Cauchy–Schwarz no partial sum of a dot product
of two vectors of length ≤ 1.01 exceeds 1.03 = 1.03·2⁴⁸ units < 2⁵³: float64 holds every intermediate result exactly. Any
order of summation, tiling, instruction set or device gives the same bits.

**Low precision only discards.** With a = fl(x̂·ĉ) for the product of the copies of a row and a centroid, ŝ = round(a)
for what the product returns, and |a − x·c| ≤ e as proven in :mod:`clipcid_cli.algorithms.near.block`:

- A centroid that is at least as near as one of exact similarity s has a ≥ s − e, and, rounding being monotone,
  ŝ ≥ round(s − e). Others are discarded: :meth:`NearestCentroids.nearest`, where the approximately nearest centroid is
  decided first, so that s is known.
- The same is done once more with the products of single pairs in float32, of smaller e.

What is not discarded is decided in float64, equal similarities in favour of the smaller number. Rows with so many candidates
that a full product is cheaper take one with all centroids of the chunk in float32.

**The maximum is found in groups.** A positive float orders like its bit pattern read as an integer, and negative floats
have negative patterns, so maxima are taken over integers (several times faster on CPUs than over bfloat16). The maxima of
groups of 64 centroids are a 64th of the work for everything after, and only groups that reach the threshold are looked into.

**On a GPU** the same is done in fewer and larger operators (:mod:`clipcid_cli.algorithms.kmeans.wide`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch

from clipcid_cli.algorithms.kmeans.best_so_far import BestSoFar, Nearest
from clipcid_cli.algorithms.kmeans.pairwise import pair_similarities
from clipcid_cli.algorithms.kmeans.prepared import PreparedRows, prepare_centroids
from clipcid_cli.algorithms.kmeans.wide import nearest_at_once
from clipcid_cli.algorithms.near.block import exact_accumulation

# Rows multiplied with centroids at once. On a CPU the products stay near the caches; a GPU needs more work at a time.
BLOCK_ROWS = {"cpu": 1024, "cuda": 16_384}
GROUP = 64
# Centroids multiplied at once: with 1,024 rows the product is 16 MiB in int32, near the size of a second-level cache.
_CHUNK = {"cpu": 4096, "cuda": 16_384}
# Where many centroids are nearly as near as the nearest, a GPU makes products of this many in float32, and lists of pairs.
_CROWDED_CHUNK = 4096
# A row that has candidates in more than this share of the groups is multiplied with all centroids of the chunk instead.
_COSTLY_SHARE = 6
_PATTERNS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.int32: torch.int32,
}


class NearestCentroids:
    """Finds the exactly nearest of fixed centroids; several threads may ask at once.

    Args:
        centroids_KD: Unit rows on the 2⁻²⁴ grid, float32 [K, D], on the device of the search.
        dtype: Format of the product that discards: int8 (on a CPU), bfloat16, float16 or float32. It changes the speed,
            never the answer.
        order_K: Numbers of the centroids in the order in which :meth:`nearest` looks at them, int64 [K]; by default as they
            come.

    Raises:
        ValueError: when the centroids are not a float32 matrix on the grid, or the format is none of the four.
    """

    def __init__(self, centroids_KD: torch.Tensor, dtype: torch.dtype, order_K: torch.Tensor | None = None) -> None:
        if centroids_KD.ndim != 2 or centroids_KD.dtype != torch.float32 or not len(centroids_KD):
            raise ValueError(f"centroids must be float32 [K, D], not {centroids_KD.dtype} {list(centroids_KD.shape)}")
        self._chunk = _CHUNK[centroids_KD.device.type]
        if not torch.stack([_on_grid(part_CD) for part_CD in torch.split(centroids_KD, self._chunk)]).all():
            raise ValueError("centroids are not on the grid of multiples of 2⁻²⁴ within [−1, 1]; see round_to_grid")
        self.centroids_KD = centroids_KD
        self.dtype = dtype
        self._prepared = prepare_centroids(centroids_KD, dtype, order_K, GROUP)
        numbers_K = torch.arange(len(centroids_KD), device=centroids_KD.device) if order_K is None else order_K
        self._numbers_K = torch.cat([numbers_K, numbers_K[-1:].expand(len(self._prepared.cast_KD) - len(numbers_K))])
        self._output_dtype = torch.int32 if dtype == torch.int8 else dtype
        self._products = _Products(self._output_dtype, centroids_KD.device)
        self._lowest = torch.iinfo(_PATTERNS[self._output_dtype]).min

    def nearest(self, rows: PreparedRows, known: Nearest | None = None, leading: int | None = None) -> Nearest:
        """Find the nearest centroid of each row.

        Args:
            rows: The rows, on the device of the centroids and in the format of the search.
            known: A centroid of each row that takes part whether it is looked at or not, with its exact similarity; the
                nearer it is, the more is discarded. ``others_B`` is not used.
            leading: How many centroids to look at, the first of the order; by default all. Rounded up to a multiple of 64.

        Returns:
            The nearest of the centroids that take part; of equally similar ones the smaller number.

        Raises:
            ValueError: when the rows are of another width or format.
        """
        self._check(rows)
        num_centroids = len(self.centroids_KD)
        error_B = self._prepared.error(rows)
        last = num_centroids if leading is None else min(num_centroids, -(-leading // GROUP) * GROUP)
        if self.centroids_KD.is_cuda:
            found = nearest_at_once(rows, self.centroids_KD, self._chunks(last), error_B, known)
            if found is not None:
                return found
        best = BestSoFar(known, len(rows), rows.rows_BD.device)
        chunk = min(self._chunk, _CROWDED_CHUNK)
        for first in range(0, last, chunk):
            self._search_chunk(rows, first, min(last, first + chunk), error_B, best)
        return Nearest(best.centroids_B, best.similarities_B, best.others_B)

    def _chunks(self, last: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the copies and the numbers of the first centroids of the order, the numbers by group, chunk by chunk."""
        last = -(-last // GROUP) * GROUP
        for first in range(0, last, self._chunk):
            part = slice(first, min(last, first + self._chunk))
            yield self._prepared.cast_KD[part], self._numbers_K[part].view(-1, GROUP)

    def _search_chunk(self, rows: PreparedRows, first: int, last: int, error_B: torch.Tensor, best: BestSoFar) -> None:
        """Take centroids `first` … `last` − 1 of the order into account."""
        pattern_BC = self._multiply(rows, first, last)
        grouped_BGg = pattern_BC.view(len(rows), -1, GROUP)
        maxima_BG = grouped_BGg.amax(dim=2)

        # 1. Decide the approximately nearest centroid of each row first, where it may be the nearest: its exact similarity
        #    raises the threshold for all others. Then remove it from the products and from its group's maximum.
        largest_B, group_B = maxima_BG.max(dim=1)
        row_P = (largest_B >= self._patterns_of(best.similarities_B - error_B, rows)).nonzero()[:, 0]
        group_P = group_B[row_P]
        members_Pg = grouped_BGg[row_P, group_P]
        offset_P = members_Pg.argmax(dim=1)
        centroid_P = self._numbers_K[first + group_P * GROUP + offset_P]
        new_P = centroid_P != best.centroids_B[row_P]
        similarity_P = self.similarities(rows.rows_BD, row_P[new_P], centroid_P[new_P])
        best.take(row_P[new_P], centroid_P[new_P], similarity_P)
        members_Pg.scatter_(1, offset_P[:, None], self._lowest)
        grouped_BGg[row_P, group_P, offset_P] = self._lowest
        maxima_BG[row_P, group_P] = members_Pg.amax(dim=1)

        # 2. List the groups that reach the threshold, except in rows with so many that a full product is cheaper.
        threshold_B = self._patterns_of(best.similarities_B - error_B, rows)
        near_BG = maxima_BG >= threshold_B[:, None]
        dense_B = near_BG.sum(dim=1) > max(4, near_BG.shape[1] // _COSTLY_SHARE)
        near_BG &= ~dense_B[:, None]

        # 3. Decide the members of those groups that reach the threshold themselves.
        row_Q, group_Q = near_BG.nonzero(as_tuple=True)
        members_Qg = grouped_BGg[row_Q, group_Q]
        near_Qg = members_Qg >= threshold_B[row_Q, None]
        pair_P, offset_P = near_Qg.nonzero(as_tuple=True)
        centroid_P = self._numbers_K[first + group_Q[pair_P] * GROUP + offset_P]
        row_P = row_Q[pair_P]
        new_P = centroid_P != best.centroids_B[row_P]
        self._decide(rows, row_P[new_P], centroid_P[new_P], best)

        # 4. The largest discarded product, of a group or of a member, bounds the similarity to all discarded centroids.
        rest_B = maxima_BG.masked_fill_(near_BG | dense_B[:, None], self._lowest).amax(dim=1)
        rest_B.scatter_reduce_(0, row_Q, members_Qg.masked_fill_(near_Qg, self._lowest).amax(dim=1), "amax")
        torch.maximum(best.others_B, self._at_most(rest_B, rows) + error_B, out=best.others_B)

        # 5. The rows left out in 2.
        self._decide_densely(rows, dense_B.nonzero()[:, 0], self._numbers_K[first:last], best)

    def _decide(self, rows: PreparedRows, row_P: torch.Tensor, centroid_P: torch.Tensor, best: BestSoFar) -> None:
        """Take candidates into account that are not their row's centroid so far."""
        # In float32, where rows and centroids are exact, most are told apart at a quarter of the cost.
        about_P = pair_similarities(rows.rows_BD, self.centroids_KD, row_P, centroid_P, torch.float32).double()
        error_B = self._prepared.float32_error(rows)
        lowest_B = best.similarities_B.scatter_reduce(0, row_P, about_P - error_B[row_P], "amax") - error_B
        open_P = about_P >= lowest_B[row_P]
        closed_P = ~open_P
        best.bound_others(row_P[closed_P], about_P[closed_P] + error_B[row_P[closed_P]])
        row_P, centroid_P = row_P[open_P], centroid_P[open_P]
        best.take(row_P, centroid_P, self.similarities(rows.rows_BD, row_P, centroid_P))

    def _decide_densely(self, rows: PreparedRows, row_R: torch.Tensor, number_C: torch.Tensor, best: BestSoFar) -> None:
        """Multiply some rows with the centroids of a chunk in float32 and take what that cannot discard into account."""
        if not len(row_R):
            return
        with exact_accumulation(number_C.device):
            about_RC = rows.rows_BD[row_R].float() @ self.centroids_KD[number_C].T
        about_RC.masked_fill_(number_C == best.centroids_B[row_R, None], -torch.inf)
        error_R = self._prepared.float32_error(rows)[row_R]
        lowest_R = torch.maximum(best.similarities_B[row_R], about_RC.amax(dim=1) - error_R) - error_R
        # Rounded to float32 it may be too high by far less than the error is too large.
        pair_P, centroid_P = (about_RC >= lowest_R[:, None].float()).nonzero(as_tuple=True)
        row_P = row_R[pair_P]
        best.take(row_P, number_C[centroid_P], self.similarities(rows.rows_BD, row_P, number_C[centroid_P]))
        about_RC[pair_P, centroid_P] = -torch.inf
        best.bound_others(row_R, about_RC.amax(dim=1) + error_R)

    def similarities(self, rows_BD: torch.Tensor, row_P: torch.Tensor, centroid_P: torch.Tensor) -> torch.Tensor:
        """Return the exact similarity of each (row, centroid) pair, float64 [P]."""
        return pair_similarities(rows_BD, self.centroids_KD, row_P, centroid_P)

    def _check(self, rows: PreparedRows) -> None:
        width = self.centroids_KD.shape[1]
        if (width, self.dtype) != (rows.rows_BD.shape[1], rows.cast_BD.dtype):
            raise ValueError(
                f"rows must be {width} wide in {self.dtype}, not {rows.rows_BD.shape[1]} in {rows.cast_BD.dtype}"
            )

    def _multiply(self, rows: PreparedRows, first: int, last: int) -> torch.Tensor:
        """Multiply rows with centroids `first` … `last` − 1 of the order in low precision.

        Returns:
            The bit patterns of the products as integers, [B, C rounded up to whole groups], the lowest in the added places.
        """
        cast_CD = self._prepared.cast_KD[first : -(-last // GROUP) * GROUP]
        with exact_accumulation(cast_CD.device):
            product_BC = self._products.take(len(rows), len(cast_CD))
            (torch._int_mm if self.dtype == torch.int8 else torch.mm)(rows.cast_BD, cast_CD.T, out=product_BC)
        pattern_BC = product_BC.view(_PATTERNS[self._output_dtype])
        pattern_BC[:, last - first :] = self._lowest
        return pattern_BC

    def _patterns_of(self, bound_B: torch.Tensor, rows: PreparedRows) -> torch.Tensor:
        """Return the patterns that products of at least a bound, float64 [B], reach; any where a float is not positive."""
        if self.dtype == torch.int8:
            limits_B = (bound_B / (rows.steps_B.double() * self._prepared.step)).floor()
            return limits_B.clamp(self._lowest + 1, 2.0**31 - 1).to(torch.int32)
        finfo = torch.finfo(self._output_dtype)
        pattern_B = bound_B.to(self._output_dtype).view(_PATTERNS[self._output_dtype])
        return pattern_B.masked_fill(bound_B < finfo.tiny, self._lowest + 1)

    def _at_most(self, pattern_B: torch.Tensor, rows: PreparedRows) -> torch.Tensor:
        """Bound products before their rounding from their patterns, float64 [B]."""
        if self.dtype == torch.int8:
            return pattern_B.double() * (rows.steps_B.double() * self._prepared.step)
        # Negative ones do not order like their patterns: 0 bounds them all.
        return pattern_B.view(self._output_dtype).double().clamp(min=0.0) * (1 + torch.finfo(self._output_dtype).eps)


class _Products(threading.local):
    """Memory for products, of each thread its own: fresh memory for each would cost a sixth of its time."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def take(self, rows: int, columns: int) -> torch.Tensor:
        """Return memory for one product at a time, [rows, columns]."""
        if len(self._memory) < rows * columns:
            self._memory = self._memory.new_empty(rows * columns)
        return self._memory[: rows * columns].view(rows, columns)


def _on_grid(centroids_CD: torch.Tensor) -> torch.Tensor:
    scaled_CD = centroids_CD * 2.0**24
    return (scaled_CD == scaled_CD.round()).all() & (centroids_CD.abs().max() <= 1.0)
