"""The distance up to which to search for a given number of forest edges.

A search to a distance finds every forest edge up to it. To keep n of N images it must reach the (N − n)-th smallest edge of
a forest that is not known yet, and should not go much further. Edges to nearest neighbours are all in the forest, and each
is counted once by a row, or twice where two rows are each other's nearest. So with F(ε) the share of rows whose nearest
neighbour is within ε, and R(ε) those of them that are theirs in turn,

    edges(ε) / N  ≥  F(ε) − R(ε)/2,

which a sample tells. Up to half of the rows the forest has few more edges than these.

Source: docs/method.md#first-cut-off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import numpy as np

from clipcid_cli.algorithms.near.exact import LONGEST_ROW, DoubleArray, FloatArray, IntArray
from clipcid_cli.algorithms.near.sample import Neighbours, draw_sample

# No two rows are farther apart.
FARTHEST = 2.0 * LONGEST_ROW
# Reaching a little further costs little; a forest with too few edges costs another search: two standard deviations of the
# sample are added. With fifteen kinds of rows (photographs, copies of them, pairs, triples, clusters, power laws, chains, …)
# 5 of 1,200 searches for 5 to 44 % of the rows fell short, against 56 where F reached twice the share or half way to 1.
_SAMPLE_ROWS = 512
_DEVIATIONS = 2.0
# Stars drop fewer rows than there are edges: F must be 1.40 to 1.76 times the share up to 0.44, and 0.90 to 0.94 of all rows
# at 0.7 (measured).
_FACTOR_OF_STARS = 1.8


def first_cutoff(nearest_S: FloatArray, edges_S: DoubleArray, share: float) -> float:
    """Choose the distance of the first search.

    Args:
        nearest_S: Distances of sampled rows to their nearest neighbours, float32 [S], ascending.
        edges_S: Forest edges that there are for each of them at least.
        share: Forest edges needed, as a share of the rows, in (0, 1).

    Returns:
        The distance at which there are enough of them, or four fifths of the way from `share` to 1 where that is less, since
        the last rows are outliers and a search that reaches them finds nearly all pairs.
    """
    size = len(nearest_S)
    mean_S, squares_S = np.cumsum(edges_S) / size, np.cumsum(edges_S**2) / size
    sure_S = mean_S - _DEVIATIONS * np.sqrt((squares_S - mean_S**2).clip(min=0.0) / size)
    return _at(nearest_S, min(int(np.count_nonzero(sure_S < share)), math.ceil((4.0 + share) / 5.0 * size)))


def wider_cutoff(nearest_S: FloatArray, cutoff: float, found: int, needed: int) -> float:
    """Choose the distance of the next search, after one to `cutoff` that found too few of the edges needed.

    Returns:
        A larger distance: where F has grown in the proportion that is missing, and at least 5 % more, so that some search
        reaches ``FARTHEST``, at which the forest is complete.
    """
    within = int(np.searchsorted(nearest_S, np.float32(cutoff), side="right"))
    return min(max(_at(nearest_S, math.ceil(1.05 * within * needed / max(1, found))), 1.05 * cutoff, 1e-3), FARTHEST)


def _at(nearest_S: FloatArray, position: int) -> float:
    return min(float(nearest_S[min(len(nearest_S) - 1, position)]), FARTHEST)


class CutoffEstimator:
    """Estimates how far a search must reach for a number of forest edges, from a fixed sample of the rows, if it is asked.

    Args:
        num_rows: N, the rows to search, at least 2, no two of them equal.
        find_nearest: Finds the nearest neighbour of each sampled row, given their places among the rows, ascending.
        for_stars: Whether a star cover is to drop as many rows, which takes a larger distance.
    """

    def __init__(self, num_rows: int, find_nearest: Callable[[IntArray], Neighbours], for_stars: bool) -> None:
        self._num_rows, self._find_nearest, self._for_stars = num_rows, find_nearest, for_stars

    def choose(self, searched: float, found: int, needed: int) -> float:
        """Return the distance of the next search, after one to `searched` (0: none) that found some of those needed."""
        nearest_S, edges_S = self._nearest
        if searched == 0.0:
            return first_cutoff(nearest_S, edges_S, needed / self._num_rows)
        return wider_cutoff(nearest_S, searched, found, needed)

    @cached_property
    def _nearest(self) -> tuple[FloatArray, DoubleArray]:
        sample = draw_sample(self._num_rows, _SAMPLE_ROWS, seed=0)
        nearest = self._find_nearest(sample)
        order = np.argsort(nearest.squared, kind="stable")
        if self._for_stars:
            return nearest.distance[order], np.full(len(sample), 1.0 / _FACTOR_OF_STARS)
        # Of every second row by distance: it stands for the next one, too.
        seconds = order[::2]
        others, which = np.unique(nearest.other[seconds], return_inverse=True)
        in_turn = self._find_nearest(others).other[which]
        edges_S = np.repeat(np.where(in_turn == sample[seconds], 0.5, 1.0), 2)[: len(sample)]
        return nearest.distance[order], edges_S
