"""The distance up to which to search for a given number of forest edges.

A search to a distance finds every forest edge up to it. To keep n of N images it must reach the (N − n)-th smallest edge of
a forest that is not known yet, and should not go much further. F(ε), the share of rows whose nearest neighbour is within ε,
brackets it: each of those rows has an edge to its nearest neighbour in the forest, and two rows may share one, so
edges(ε) / N lies in [F(ε)/2, F(ε)).

Source: docs/method.md#first-cut-off.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch

from clipcid_cli.algorithms.near.blocks import Block, exact_accumulation, load_block, multiply, score_bounds
from clipcid_cli.algorithms.near.distances import (
    LONGEST_ROW,
    ROUNDING_MARGIN,
    DoubleArray,
    IntArray,
    ReadRows,
    round_distances,
)

# No two rows are farther apart.
FARTHEST = 2.0 * LONGEST_ROW
# Rows whose nearest neighbours are sampled: F is then known within 3 %.
SAMPLE_ROWS = 1024
# Reaching a little further costs little; a forest with too few edges costs another search. Twice the share always suffices,
# but F is known from a sample only: two standard deviations are added. Where shares are large, F needs less than twice the
# share: up to 1.40 times 0.44 was measured. Of 100 searches (features of photographs, uniform, clustered, heavy-tailed and
# power-law rows, shares of 0.05 to 0.44) all had enough edges, against 87 at 1.75 times the share without a margin.
_FIRST_FACTOR = 2.0
_DEVIATIONS = 2.0
# The same for a star cover: measured 1.40 to 1.76 at shares up to 0.44, and 0.90 to 0.94 of all rows at 0.7. Without the
# deviations a share of 0.1 took a second search: F was 1.77 times it in the sample, at 0.2833 where 0.2838 was needed.
_FIRST_FACTOR_OF_STARS = 1.8

_ROWS_AT_ONCE = 4096


class NearestSample:
    """Distances of sampled rows to their nearest neighbours: bounds for all of them, exact where it matters.

    A low-precision product bounds each distance. Order statistics and counts are exact nevertheless: rows whose bounds do
    not settle them are compared in float64. So the answers depend on the rows only.
    """

    def __init__(
        self, read: ReadRows, rows: IntArray, sample: IntArray, device: torch.device, scan_dtype: torch.dtype
    ) -> None:
        """Bound the distances.

        Args:
            rows: Rows to compare with, int64 [N].
            sample: Positions in `rows` of the sampled rows, int64 [S], S ≥ 1.
            scan_dtype: Format of the fast product.
        """
        self._read, self._rows, self._sample, self._device = read, rows, sample, device
        low_S = torch.full((len(sample),), math.inf, dtype=torch.float64, device=device)
        high_S = low_S.clone()
        sampled = load_block(read, rows[sample], device, scan_dtype)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            block = load_block(read, rows[start : start + _ROWS_AT_ONCE], device, scan_dtype)
            with exact_accumulation(device):
                scores_SN = multiply(sampled.scan, block.scan)
            least = -math.inf if scores_SN.is_floating_point() else torch.iinfo(scores_SN.dtype).min
            self._mask_self(scores_SN, np.arange(len(sample)), start, least)
            lowest_S, highest_S = score_bounds(sampled, block, scores_SN.amax(dim=1))
            low_S = torch.minimum(low_S, sampled.squared + block.bounds.shortest**2 - 2.0 * highest_S)
            high_S = torch.minimum(high_S, sampled.squared + block.bounds.longest**2 - 2.0 * lowest_S)
        # Wider by the rounding to float32, so that the exact distance never lies outside.
        self._low: DoubleArray = low_S.clamp(min=0.0).sqrt().cpu().numpy() * (1.0 - ROUNDING_MARGIN)
        self._high: DoubleArray = high_S.clamp(min=0.0).sqrt().cpu().numpy() * (1.0 + ROUNDING_MARGIN)

    def __len__(self) -> int:
        return len(self._sample)

    def order_statistic(self, position: int) -> float:
        """Return the distance, a float32, at `position` in ascending order; infinite when there is only one row."""
        low, high = np.sort(self._low)[position], np.sort(self._high)[position]
        self._refine((self._high >= low) & (self._low <= high))
        return float(np.sort(self._high)[position])

    def count_within(self, distance: float) -> int:
        """Count the rows whose nearest neighbour is within a distance."""
        self._refine((self._low <= distance) & (self._high > distance))
        return int(np.count_nonzero(self._high <= distance))

    def _refine(self, which_S: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> None:
        """Replace bounds by exact distances."""
        open_K = np.flatnonzero(which_S & (self._low < self._high))
        if not len(open_K):
            return
        sampled = load_block(self._read, self._rows[self._sample[open_K]], self._device, torch.float16)
        wide_KD = sampled.stored.to(torch.float64)
        nearest_K = torch.full((len(open_K),), math.inf, dtype=torch.float64, device=self._device)
        for start in range(0, len(self._rows), _ROWS_AT_ONCE):
            block: Block = load_block(
                self._read, self._rows[start : start + _ROWS_AT_ONCE], self._device, torch.float16
            )
            squared_KN = sampled.squared[:, None] + block.squared - 2.0 * (wide_KD @ block.stored.to(torch.float64).T)
            self._mask_self(squared_KN, open_K, start, math.inf)
            nearest_K = torch.minimum(nearest_K, squared_KN.amin(dim=1))
        self._low[open_K] = self._high[open_K] = round_distances(nearest_K).cpu().numpy()

    def _mask_self(self, values_KN: torch.Tensor, which_K: IntArray, start: int, value: float) -> None:
        """Write a value where a sampled row is compared with itself."""
        own = self._sample[which_K] - start
        met = np.flatnonzero((own >= 0) & (own < values_KN.shape[1]))
        values_KN[torch.from_numpy(met), torch.from_numpy(own[met])] = value


def first_cutoff(nearest: NearestSample, share: float, for_stars: bool = False) -> float:
    """Choose the distance of the first search.

    Args:
        share: Forest edges needed, as a share of the rows, in (0, 1).
        for_stars: Whether a star cover is to drop that share, which takes a larger distance.

    Returns:
        The distance at which F is twice `share` and two standard deviations of the sample more, or half way from `share` to
        1 where that is less, since the last rows are outliers and a search that reaches them finds nearly all pairs; for
        stars 1.8 times and the deviations, or four fifths of the way.
    """
    factor, most = _FIRST_FACTOR, (1.0 + share) / 2.0
    if for_stars:
        factor, most = _FIRST_FACTOR_OF_STARS, (4.0 + share) / 5.0
    expected = min(1.0, factor * share)
    margin = _DEVIATIONS * math.sqrt(expected * (1.0 - expected) / len(nearest))
    aim = min(expected + margin, most)
    position = min(len(nearest) - 1, math.ceil(aim * len(nearest)))
    return min(nearest.order_statistic(position), FARTHEST)


def wider_cutoff(nearest: NearestSample, cutoff: float, found: int, needed: int) -> float:
    """Choose the distance of the next search after one whose forest had too few edges.

    Args:
        cutoff: Distance of the last search.
        found: Edges that its forest has.
        needed: Edges that it must have.

    Returns:
        A larger distance: where F has grown in the proportion that is missing, and at least 5 % more, so that some search
        reaches ``FARTHEST``, at which the forest is complete.
    """
    share = 1.05 * nearest.count_within(cutoff) * needed / max(1, found)
    position = min(len(nearest) - 1, math.ceil(share))
    return min(max(nearest.order_statistic(position), 1.05 * cutoff, 1e-3), FARTHEST)


class CutoffEstimator:
    """Estimates how far a search must reach for a number of forest edges, from a fixed sample of the rows."""

    def __init__(
        self, read: ReadRows, rows: IntArray, device: torch.device, scan_dtype: torch.dtype, for_stars: bool
    ) -> None:
        """Prepare; nothing is computed before the first estimate.

        Args:
            rows: Rows to search, int64 [N], N ≥ 2, no two of them equal.
            scan_dtype: Format of the fast product of the search.
            for_stars: As for :func:`first_cutoff`.
        """
        self._read, self._rows, self._device, self._for_stars = read, rows, device, for_stars
        # Rows are compared with the sample only once: to prepare them for int8 takes longer than a float32 product.
        self._scan_dtype = torch.float32 if scan_dtype == torch.int8 else scan_dtype

    def choose(self, searched: float, found: int, needed: int) -> float:
        """Return the distance of the next search.

        Args:
            searched: Distance of the last search; 0 before the first.
            found: Edges that its forest has.
            needed: Edges that it must have.
        """
        if searched == 0.0:
            return first_cutoff(self._nearest, needed / len(self._rows), self._for_stars)
        return wider_cutoff(self._nearest, searched, found, needed)

    @cached_property
    def _nearest(self) -> NearestSample:
        size = min(SAMPLE_ROWS, len(self._rows))
        sample = np.sort(np.random.default_rng(0).choice(len(self._rows), size, replace=False))
        return NearestSample(self._read, self._rows, sample, self._device, self._scan_dtype)
