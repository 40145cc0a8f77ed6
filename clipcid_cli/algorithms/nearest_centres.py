"""The nearest of many centres for each row: exact answers at the speed of a low-precision matrix product.

Shape letters: B rows of a block, K centres, D width, P (row, centre) pairs, m centres per row.

**Similarities are exact.** Rows are float16, so each entry is an integer multiple of 2⁻²⁴ (the smallest subnormal).
Centres are kept on the same grid (:func:`clipcid_cli.algorithms.kmeans.round_to_grid`), which moves an entry by at most
2⁻²⁵. A product of entries is then an integer multiple of 2⁻⁴⁸, and by Cauchy–Schwarz no partial sum of a dot product of
two vectors of length ≤ 1.01 exceeds 1.03 = 1.03·2⁴⁸ units < 2⁵³: float64 holds every intermediate result exactly. Any
order of summation, tiling, instruction set or device gives the same bits. [O]

**Low precision only discards.** Write x, c for a row and a centre, x̂, ĉ for their casts, a = fl(x̂·ĉ) for the product
accumulated in float32 and ŝ = round(a) for what the product returns. Then

    |a − x·c| ≤ |x − x̂|·|c| + |x̂|·|c − ĉ| + γ·|x̂|·|ĉ| =: e      (Cauchy–Schwarz; γ = D·2⁻²², four times the textbook
                                                                D·2⁻²⁴, which also covers truncating accumulators)

The residuals |x − x̂|, |c − ĉ| are measured, not bounded. Let v > 0 be such that m centres have ŝ ≥ v. Each of them has
a ≥ v·(1 − u) with u the unit roundoff of the output. A centre j among the true m nearest that is not one of them is at least
as similar as some centre i of them, so a_j ≥ x·c_j − e ≥ x·c_i − e ≥ a_i − 2e ≥ v·(1 − u) − 2e =: t, and, rounding being
monotone, ŝ_j ≥ round(t). Centres below round(t) are discarded; the others are decided in float64, equal similarities in
favour of the smaller number. Rows with t ≤ 0, or with so many candidates that a full product is cheaper, take a float64
product with all centres.

**The maximum is found in groups.** A positive float orders like its bit pattern read as an integer, and negative floats
have negative patterns, so maxima are taken over integers (several times faster on CPUs than over bfloat16). The maxima of
groups of 64 centres are a 64th of the work for everything after: the m-th largest of them is a valid v, and only groups
that reach round(t) are looked into.
"""

from __future__ import annotations

import dataclasses

import torch

GROUP = 64
# Centres multiplied at once: with 1,024 rows the product is 8 MiB in bfloat16, near the size of a second-level cache.
_CHUNK = 4096
# Pairs decided at once in float64: the operands stay within the cache.
_PAIRS = 1024
# A row that has candidates in more than this share of the groups is multiplied with all centres instead.
_DENSE_SHARE = 8
_PATTERNS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclasses.dataclass(frozen=True)
class PreparedRows:
    """A block of rows with all that can be known of them before the centres: worth keeping from iteration to iteration.

    Attributes:
        rows_BD: Unit rows, float16 [B, D].
        cast_BD: The same in the precision of the product.
        lengths_B: An upper bound of |x̂|, float32 [B].
        residuals_B: |x − x̂|, float32 [B].
    """

    rows_BD: torch.Tensor
    cast_BD: torch.Tensor
    lengths_B: torch.Tensor
    residuals_B: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows_BD)

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return self.rows_BD.nbytes + self.cast_BD.nbytes + self.lengths_B.nbytes + self.residuals_B.nbytes


def prepare_rows(rows_BD: torch.Tensor, dtype: torch.dtype) -> PreparedRows:
    """Cast a block of rows to the precision of the product and measure what that costs.

    Args:
        rows_BD: Unit rows, float16 [B, D].
        dtype: bfloat16, float16 or float32; the latter two lose nothing.

    Raises:
        ValueError: when the rows are not a float16 matrix, or the precision is none of the three.
    """
    if rows_BD.ndim != 2 or rows_BD.dtype != torch.float16:
        raise ValueError(f"rows must be float16 [B, D], not {rows_BD.dtype} {list(rows_BD.shape)}")
    _check_dtype(dtype)
    cast_BD, exact_BD = rows_BD.to(dtype), rows_BD.float()
    lengths_B = exact_BD.norm(dim=1)
    exact = dtype != torch.bfloat16
    residuals_B = torch.zeros_like(lengths_B) if exact else (exact_BD - cast_BD.float()).norm(dim=1)
    return PreparedRows(rows_BD, cast_BD, lengths_B + residuals_B, residuals_B)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _PATTERNS:
        raise ValueError(f"the product can be in {', '.join(map(str, _PATTERNS))}, not {dtype}")


class NearestCentres:
    """Finds the exactly nearest of fixed centres.

    Args:
        centres_KD: Unit rows on the 2⁻²⁴ grid, float32 [K, D], on the device of the search.
        dtype: Precision of the product that discards: bfloat16, float16 or float32. It changes the speed, never the answer.

    Raises:
        ValueError: when the centres are not a float32 matrix on the grid, or the precision is none of the three.
    """

    def __init__(self, centres_KD: torch.Tensor, dtype: torch.dtype) -> None:
        if centres_KD.ndim != 2 or centres_KD.dtype != torch.float32 or not len(centres_KD):
            raise ValueError(f"centres must be float32 [K, D], not {centres_KD.dtype} {list(centres_KD.shape)}")
        _check_dtype(dtype)
        if not torch.equal(centres_KD * 2.0**24, (centres_KD * 2.0**24).round()) or float(centres_KD.abs().max()) > 1.0:
            raise ValueError(
                "centres are not on the grid of multiples of 2⁻²⁴ within [−1, 1]; see kmeans.round_to_grid"
            )
        self.centres_KD = centres_KD
        self.dtype = dtype
        # GPUs can return the float32 accumulators; CPUs round them to the precision of the operands.
        self._output_dtype = torch.float32 if centres_KD.is_cuda else dtype
        num_centres, width = centres_KD.shape
        padded = -(-num_centres // GROUP) * GROUP
        # Zero rows fill the last group: their similarity 0 lies below every threshold, which is positive.
        self._cast_KD = torch.zeros(padded, width, dtype=dtype, device=centres_KD.device)
        self._cast_KD[:num_centres] = centres_KD
        self._longest, self._residual = 0.0, 0.0
        for first in range(0, num_centres, _CHUNK):
            exact_CD, cast_CD = centres_KD[first : first + _CHUNK], self._cast_KD[first : first + _CHUNK].float()
            self._longest = max(self._longest, float(exact_CD.norm(dim=1).max()), float(cast_CD.norm(dim=1).max()))
            self._residual = max(self._residual, float((exact_CD - cast_CD[: len(exact_CD)]).norm(dim=1).max()))

    def nearest(self, rows: PreparedRows) -> torch.Tensor:
        """Find the nearest centre of each row.

        Args:
            rows: The rows, on the device of the centres and in the precision of the search.

        Returns:
            int64 [B]; of equally similar centres the smaller number.

        Raises:
            ValueError: when the rows are of another width or precision.
        """
        self._check(rows)
        device = rows.rows_BD.device
        row_P, centre_P, dense_B = self._candidates(rows, 1)
        alone_B = torch.bincount(row_P, minlength=len(rows)) == 1
        alone_P = alone_B[row_P]
        labels_B = torch.full((len(rows),), len(self.centres_KD), dtype=torch.int64, device=device)
        labels_B[row_P[alone_P]] = centre_P[alone_P]
        row_P, centre_P = row_P[~alone_P], centre_P[~alone_P]
        similarity_P = self.similarities(rows.rows_BD, row_P, centre_P)
        dense_row_P, dense_centre_P, dense_similarity_P = self._dense_pairs(rows.rows_BD, dense_B.nonzero()[:, 0], 1)
        row_P, centre_P = torch.cat([row_P, dense_row_P]), torch.cat([centre_P, dense_centre_P])
        similarity_P = torch.cat([similarity_P, dense_similarity_P])
        best_B = torch.full((len(rows),), -torch.inf, dtype=torch.float64, device=device)
        best_B.scatter_reduce_(0, row_P, similarity_P, "amax")
        wins_P = similarity_P == best_B[row_P]
        return labels_B.scatter_reduce_(0, row_P[wins_P], centre_P[wins_P], "amin")

    def top(self, rows: PreparedRows, m: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the `m` nearest centres of each row, the most similar first.

        Args:
            rows: The rows, on the device of the centres and in the precision of the search.
            m: Centres per row, in [1, K].

        Returns:
            The centres, int64 [B, m], and the exact similarities, float64 [B, m], descending; of equally similar centres
            the smaller number comes first.

        Raises:
            ValueError: when the rows are of another width or precision, or `m` is outside [1, K].
        """
        self._check(rows)
        if not 1 <= m <= len(self.centres_KD):
            raise ValueError(f"m must lie in [1, {len(self.centres_KD)}], not {m}")
        row_P, centre_P, dense_B = self._candidates(rows, m)
        dense_row_P, dense_centre_P, dense_similarity_P = self._dense_pairs(rows.rows_BD, dense_B.nonzero()[:, 0], m)
        similarity_P = torch.cat([self.similarities(rows.rows_BD, row_P, centre_P), dense_similarity_P])
        row_P, centre_P = torch.cat([row_P, dense_row_P]), torch.cat([centre_P, dense_centre_P])
        # Both lists name the centres of a row in ascending order, and stable sorts keep that order among equals.
        order_P = torch.sort(similarity_P, descending=True, stable=True).indices
        order_P = order_P[torch.sort(row_P[order_P], stable=True).indices]
        counts_B = torch.bincount(row_P, minlength=len(rows))
        firsts_B = counts_B.cumsum(0) - counts_B
        chosen_Bm = order_P[firsts_B[:, None] + torch.arange(m, device=row_P.device)]
        return centre_P[chosen_Bm], similarity_P[chosen_Bm]

    def similarities(self, rows_BD: torch.Tensor, row_P: torch.Tensor, centre_P: torch.Tensor) -> torch.Tensor:
        """Return the exact similarity of each (row, centre) pair, float64 [P]."""
        similarity_P = torch.empty(len(row_P), dtype=torch.float64, device=rows_BD.device)
        for first in range(0, len(row_P), _PAIRS):
            last = first + _PAIRS
            products_PD = rows_BD[row_P[first:last]].double() * self.centres_KD[centre_P[first:last]].double()
            torch.sum(products_PD, dim=1, out=similarity_P[first:last])
        return similarity_P

    def _check(self, rows: PreparedRows) -> None:
        width = self.centres_KD.shape[1]
        if rows.rows_BD.shape[1] != width or rows.cast_BD.dtype != self.dtype:
            raise ValueError(
                f"rows must be {width} wide in {self.dtype}, not {rows.rows_BD.shape[1]} in {rows.cast_BD.dtype}"
            )

    def _error(self, rows: PreparedRows) -> torch.Tensor:
        """Bound the error e of the products of a block with any centre, float32 [B]."""
        accumulation = rows.rows_BD.shape[1] * 2.0**-22
        error_B = rows.residuals_B * self._longest + rows.lengths_B * (self._residual + accumulation * self._longest)
        # The norms and this formula are float32 sums of their own; a thousandth covers their rounding many times over.
        return error_B * 1.001

    def _multiply(self, cast_BD: torch.Tensor, cast_CD: torch.Tensor) -> torch.Tensor:
        """Multiply in low precision; the bit patterns of the similarities as integers [B, C]."""
        if self._output_dtype == self.dtype:
            product_BC = torch.mm(cast_BD, cast_CD.T)
        else:
            product_BC = torch.mm(cast_BD, cast_CD.T, out_dtype=self._output_dtype)
        return product_BC.view(_PATTERNS[self._output_dtype])

    def _candidates(self, rows: PreparedRows, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """List the pairs among which the `m` nearest centres of each row are.

        Returns:
            Rows and centres of the pairs, int64 [P] each, and which rows have none listed because all centres must be
            looked at, bool [B].
        """
        num_rows, num_groups = len(rows), len(self._cast_KD) // GROUP
        device = rows.rows_BD.device
        if num_groups < m:
            nothing = torch.empty(0, dtype=torch.int64, device=device)
            return nothing, nothing, torch.ones(num_rows, dtype=torch.bool, device=device)
        error_B = self._error(rows)
        most = max(4 * m, num_groups // _DENSE_SHARE)
        reached_B = torch.zeros(num_rows, dtype=torch.int64, device=device)
        pieces: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        best_Bm: torch.Tensor | None = None
        for first in range(0, len(self._cast_KD), _CHUNK):
            pattern_BC = self._multiply(rows.cast_BD, self._cast_KD[first : first + _CHUNK])
            grouped_BGg = pattern_BC.view(num_rows, -1, GROUP)
            maxima_BG = grouped_BGg.amax(dim=2)
            best_Bm = _largest(maxima_BG if best_Bm is None else torch.cat([best_Bm, maxima_BG], dim=1), m)
            threshold_B, _ = self._threshold(best_Bm, m, error_B)
            near_BG = maxima_BG >= threshold_B[:, None]
            reached_B += near_BG.sum(dim=1)
            near_BG &= (reached_B <= most)[:, None]
            row_Q, group_Q = near_BG.nonzero(as_tuple=True)
            members_Qg = grouped_BGg[row_Q, group_Q]
            pair_P, offset_P = (members_Qg >= threshold_B[row_Q, None]).nonzero(as_tuple=True)
            centre_P = group_Q[pair_P] * GROUP + offset_P + first
            pieces.append((row_Q[pair_P], centre_P, members_Qg[pair_P, offset_P]))
        assert best_Bm is not None
        # The threshold has risen since the first chunks were looked at.
        threshold_B, hopeless_B = self._threshold(best_Bm, m, error_B)
        dense_B = hopeless_B | (reached_B > most)
        row_P, centre_P, pattern_P = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        stays_P = (pattern_P >= threshold_B[row_P]) & ~dense_B[row_P]
        return row_P[stays_P], centre_P[stays_P], dense_B

    def _threshold(self, best_Bm: torch.Tensor, m: int, error_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pattern of round(t) per row, and for which rows t is not positive.

        While t is not positive every positive similarity is a candidate: a later chunk may still raise it.
        """
        v_B = best_Bm.amin(dim=1) if best_Bm.shape[1] == m else torch.zeros_like(best_Bm[:, 0])
        roundoff = torch.finfo(self._output_dtype).eps / 2
        t_B = v_B.view(self._output_dtype).float() * (1 - roundoff) - 2 * error_B
        hopeless_B = (v_B <= 0) | (t_B <= 0)
        pattern_B = t_B.to(self._output_dtype).view(v_B.dtype)
        return pattern_B.masked_fill(hopeless_B, 1).clamp(min=1), hopeless_B

    def _dense_pairs(
        self, rows_BD: torch.Tensor, row_R: torch.Tensor, m: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Multiply some rows with all centres in float64.

        Returns:
            Rows, centres and similarities of the pairs whose similarity is among the `m` largest distinct places of
            their row; all pairs that tie with the last one are listed.
        """
        chosen_RD = rows_BD[row_R].double()
        pieces: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        best_Rm = torch.empty(len(row_R), 0, dtype=torch.float64, device=rows_BD.device)
        for first in range(0, len(self.centres_KD) if len(row_R) else 0, _CHUNK):
            similarity_RC = chosen_RD @ self.centres_KD[first : first + _CHUNK].double().T
            best_Rm = _largest(torch.cat([best_Rm, similarity_RC], dim=1), m)
            pair_P, centre_P = (similarity_RC >= best_Rm.amin(dim=1)[:, None]).nonzero(as_tuple=True)
            pieces.append((pair_P, centre_P + first, similarity_RC[pair_P, centre_P]))
        if not pieces:
            nothing = torch.empty(0, dtype=torch.int64, device=rows_BD.device)
            return nothing, nothing, nothing.double()
        pair_P, centre_P, similarity_P = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        stays_P = similarity_P >= best_Rm.amin(dim=1)[pair_P]
        return row_R[pair_P[stays_P]], centre_P[stays_P], similarity_P[stays_P]


def _largest(values_BC: torch.Tensor, m: int) -> torch.Tensor:
    """Return the `m` largest values of each row in any order; all of them when there are fewer."""
    if m == 1:
        return values_BC.amax(dim=1, keepdim=True)
    return values_BC.topk(min(m, values_BC.shape[1]), dim=1, sorted=False).values
