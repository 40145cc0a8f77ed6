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

from clipcid_cli.algorithms.near.block import read_stored
from clipcid_cli.algorithms.near.exact import (
    LONGEST_ROW,
    FloatArray,
    IntArray,
    ReadRows,
    round_distances,
    squared_lengths,
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

_ROWS_AT_ONCE = 1024


def nearest_distances(read: ReadRows, rows: IntArray, sample: IntArray, device: torch.device) -> FloatArray:
    """Return the distances of sampled rows to their nearest other row, float32 [S], ascending; infinite of a row alone.

    Args:
        rows: Rows to compare with, integers [N].
        sample: Positions in `rows` of the sampled rows, int64 [S], S ≥ 1.
    """
    sampled_SD = read_stored(read, rows[sample], device)
    wide_SD, largest_S = sampled_SD.double(), torch.full((len(sample),), -math.inf, dtype=torch.float64, device=device)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part_ND = read_stored(read, rows[start : start + _ROWS_AT_ONCE], device)
        # a·b − |b|²/2 is exact, too. In float64 at once, all of it takes less time than bounds from low precision would.
        value_SN = torch.addmm(squared_lengths(part_ND) / -2.0, wide_SD, part_ND.double().T)
        met = np.flatnonzero((sample >= start) & (sample < start + len(part_ND)))
        value_SN[torch.from_numpy(met), torch.from_numpy(sample[met] - start)] = -math.inf
        largest_S = torch.maximum(largest_S, value_SN.amax(dim=1))
    found: FloatArray = round_distances(squared_lengths(sampled_SD) - 2.0 * largest_S).cpu().numpy()
    return np.sort(found)


def first_cutoff(nearest_S: FloatArray, share: float, for_stars: bool = False) -> float:
    """Choose the distance of the first search.

    Args:
        nearest_S: :func:`nearest_distances`.
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
    margin = _DEVIATIONS * math.sqrt(expected * (1.0 - expected) / len(nearest_S))
    return _at(nearest_S, math.ceil(min(expected + margin, most) * len(nearest_S)))


def wider_cutoff(nearest_S: FloatArray, cutoff: float, found: int, needed: int) -> float:
    """Choose the distance of the next search after one whose forest had too few edges.

    Args:
        nearest_S: :func:`nearest_distances`.
        cutoff: Distance of the last search.
        found: Edges that its forest has.
        needed: Edges that it must have.

    Returns:
        A larger distance: where F has grown in the proportion that is missing, and at least 5 % more, so that some search
        reaches ``FARTHEST``, at which the forest is complete.
    """
    within = int(np.searchsorted(nearest_S, np.float32(cutoff), side="right"))
    return min(max(_at(nearest_S, math.ceil(1.05 * within * needed / max(1, found))), 1.05 * cutoff, 1e-3), FARTHEST)


def _at(nearest_S: FloatArray, position: int) -> float:
    return min(float(nearest_S[min(len(nearest_S) - 1, position)]), FARTHEST)


class CutoffEstimator:
    """Estimates how far a search must reach for a number of forest edges, from a fixed sample of the rows.

    Nothing is computed before the first estimate.

    Args:
        rows: Rows to search, integers [N], N ≥ 2, no two of them equal.
        for_stars: As for :func:`first_cutoff`.
    """

    def __init__(self, read: ReadRows, rows: IntArray, device: torch.device, for_stars: bool) -> None:
        self._read, self._rows, self._device, self._for_stars = read, rows, device, for_stars

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
    def _nearest(self) -> FloatArray:
        size = min(SAMPLE_ROWS, len(self._rows))
        sample = np.sort(np.random.default_rng(0).choice(len(self._rows), size, replace=False))
        return nearest_distances(self._read, self._rows, sample, self._device)
