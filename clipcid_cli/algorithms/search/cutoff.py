"""The distance up to which to search, when what is asked for is a share of images to keep.

A search to a distance finds every forest edge up to it, so it must reach the (N − n)-th smallest edge of a forest nobody has
seen yet, and not much further. F(ε), the share of rows whose nearest neighbour is within ε, brackets it: each of those rows
has an edge to its nearest neighbour in the forest, and two rows may share one, so edges(ε) / N lies in [F(ε)/2, F(ε)).

Source: docs/method.md#first-cut-off.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from clipcid_cli.algorithms.search.blocks import Block, exact_accumulation, load_block, multiply, score_bounds
from clipcid_cli.algorithms.search.distances import LONGEST_ROW, DoubleArray, IntArray, ReadRows, round_distances

# No two rows are farther apart.
FARTHEST = 2.0 * LONGEST_ROW
# Reaching a little further costs little; a forest that runs short costs another search. Measured on drawings, features of
# photographs and synthetic sets, shares of 0.1, 0.2 and 0.44 needed F up to 1.70, 1.61 and 1.40 times the share wanted.
_FIRST_FACTOR = 1.75
# The same for a cover by stars: measured 1.40 to 1.76 at shares up to 0.44, and 0.90 to 0.94 of all rows at 0.7.
_FIRST_FACTOR_OF_STARS = 1.8

_ROWS_AT_ONCE = 4096


class NearestSample:
    """How far some rows are from their nearest neighbours: bounds for all of them, exact distances where they decide.

    A fast product bounds each distance; the order statistics and counts that are asked for are exact all the same, since
    the rows whose bounds leave them open are looked up in float64. So the answers depend on the rows only.
    """

    def __init__(
        self, read: ReadRows, rows: IntArray, sample: IntArray, device: torch.device, scan_dtype: torch.dtype
    ) -> None:
        """Bound the distances.

        Args:
            rows: Rows to look among, int64 [N].
            sample: Positions in `rows` to look for, int64 [S], S ≥ 1.
            scan_dtype: Format of the fast product.
        """
        self._read, self._rows, self._sample, self._device = read, rows, sample, device
        low_S = torch.full((len(sample),), math.inf, dtype=torch.float64, device=device)
        high_S = low_S.clone()
        wanted = load_block(read, rows[sample], device, scan_dtype)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            block = load_block(read, rows[start : start + _ROWS_AT_ONCE], device, scan_dtype)
            with exact_accumulation(device):
                scores_SN = multiply(wanted.scan, block.scan)
            least = -math.inf if scores_SN.is_floating_point() else torch.iinfo(scores_SN.dtype).min
            self._hide_own(scores_SN, np.arange(len(sample)), start, least)
            lowest_S, highest_S = score_bounds(wanted, block, scores_SN.amax(dim=1))
            low_S = torch.minimum(low_S, wanted.squared + block.bounds.shortest**2 - 2.0 * highest_S)
            high_S = torch.minimum(high_S, wanted.squared + block.bounds.longest**2 - 2.0 * lowest_S)
        # One unit more on each side for the rounding to float32, so that an exact distance never lies outside.
        self._low: DoubleArray = low_S.clamp(min=0.0).sqrt().cpu().numpy() * (1.0 - 2.0**-22)
        self._high: DoubleArray = high_S.clamp(min=0.0).sqrt().cpu().numpy() * (1.0 + 2.0**-22)

    def __len__(self) -> int:
        return len(self._sample)

    def order_statistic(self, position: int) -> float:
        """Return the distance, a float32, that is at `position` when all are sorted; infinite when a row is alone."""
        low, high = np.sort(self._low)[position], np.sort(self._high)[position]
        self._decide((self._high >= low) & (self._low <= high))
        return float(np.sort(self._high)[position])

    def count_within(self, distance: float) -> int:
        """Count the rows whose nearest neighbour is within a distance."""
        self._decide((self._low <= distance) & (self._high > distance))
        return int(np.count_nonzero(self._high <= distance))

    def _decide(self, which_S: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> None:
        """Replace bounds by exact distances."""
        open_K = np.flatnonzero(which_S & (self._low < self._high))
        if not len(open_K):
            return
        wanted = load_block(self._read, self._rows[self._sample[open_K]], self._device, torch.float16)
        wide_KD = wanted.stored.to(torch.float64)
        nearest_K = torch.full((len(open_K),), math.inf, dtype=torch.float64, device=self._device)
        for start in range(0, len(self._rows), _ROWS_AT_ONCE):
            block: Block = load_block(
                self._read, self._rows[start : start + _ROWS_AT_ONCE], self._device, torch.float16
            )
            squared_KN = wanted.squared[:, None] + block.squared - 2.0 * (wide_KD @ block.stored.to(torch.float64).T)
            self._hide_own(squared_KN, open_K, start, math.inf)
            nearest_K = torch.minimum(nearest_K, squared_KN.amin(dim=1))
        self._low[open_K] = self._high[open_K] = round_distances(nearest_K).cpu().numpy()

    def _hide_own(self, values_KN: torch.Tensor, which_K: IntArray, start: int, value: float) -> None:
        """Put a value where a sampled row meets itself."""
        own = self._sample[which_K] - start
        met = np.flatnonzero((own >= 0) & (own < values_KN.shape[1]))
        values_KN[torch.from_numpy(met), torch.from_numpy(own[met])] = value


def first_cutoff(nearest: NearestSample, share: float, for_stars: bool = False) -> float:
    """Choose the distance of the first search.

    Args:
        share: Forest edges wanted, as a share of the rows, in (0, 1).
        for_stars: Whether a cover by stars is to drop that share, which takes a larger distance.

    Returns:
        The distance at which F is 1.75 times `share`, or half way from it to 1 where that is nearer, since the last rows are
        outliers and a search that reaches them finds nearly all pairs; for stars 1.8 times, or four fifths of the way.
    """
    aim = min(_FIRST_FACTOR * share, (1.0 + share) / 2.0)
    if for_stars:
        aim = min(_FIRST_FACTOR_OF_STARS * share, (4.0 + share) / 5.0)
    position = min(len(nearest) - 1, math.ceil(aim * len(nearest)))
    return min(nearest.order_statistic(position), FARTHEST)


def wider_cutoff(nearest: NearestSample, cutoff: float, found: int, wanted: int) -> float:
    """Choose the distance of the next search after one whose forest had too few edges.

    Args:
        cutoff: Distance of the last search.

    Returns:
        A larger distance: where F has grown in the proportion that is missing, and at least 5 % more, so that some
        search reaches ``FARTHEST``, at which the forest is complete.
    """
    share = 1.05 * nearest.count_within(cutoff) * wanted / max(1, found)
    position = min(len(nearest) - 1, math.ceil(share))
    return min(max(nearest.order_statistic(position), 1.05 * cutoff, 1e-3), FARTHEST)
