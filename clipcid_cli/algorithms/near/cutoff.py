"""What a sample of the rows tells before all are compared: their nearest neighbours, and how far a search must reach.

A search to a distance finds every forest edge up to it. To keep n of N images it must reach the (N − n)-th smallest edge of
a forest that is not known yet, and should not go much further. Edges to nearest neighbours are all in the forest, and each
is counted once by a row, or twice where two rows are each other's nearest. So with F(ε) the share of rows whose nearest
neighbour is within ε, and R(ε) those of them that are theirs in turn,

    edges(ε) / N  ≥  F(ε) − R(ε)/2,

which a sample tells. Up to half of the rows the forest has few more edges than these.

Source: docs/method.md#first-cut-off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import cached_property

import numpy as np
import torch

from clipcid_cli.algorithms.near.block import load_block, multiply, rounded_error
from clipcid_cli.algorithms.near.exact import (
    LONGEST_ROW,
    DoubleArray,
    FloatArray,
    IntArray,
    ReadRows,
    exact_dots,
    round_distances,
)

# No two rows are farther apart.
FARTHEST = 2.0 * LONGEST_ROW
# Reaching a little further costs little; a forest with too few edges costs another search: two standard deviations of the
# sample are added. With fifteen kinds of rows (photographs, copies of them, pairs, triples, clusters, power laws, chains, …)
# 5 of 1,200 searches for 5 to 44 % of the rows fell short, against 56 where F reached twice the share or half way to 1.
_SAMPLE_ROWS = 512
_DEVIATIONS = 2.0
# Rows compared with the sample at once.
_ROWS_AT_ONCE = 2048


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The nearest neighbours of sampled rows, ascending by (sampled row, distance, neighbour)."""

    row: IntArray  # a sampled row, by its place in the sample, integers [P]
    other: IntArray  # a neighbour, by its place among all rows, integers [P]
    squared: DoubleArray  # their squared distance, exact, float64 [P]

    @property
    def distance(self) -> FloatArray:
        """Their distance, float32 [P]."""
        distance: FloatArray = round_distances(torch.from_numpy(self.squared)).numpy()
        return distance

    @staticmethod
    def nearest(parts: Iterable[Neighbours], count: int) -> Neighbours:
        """Choose the nearest `count` neighbours of each row; of equally near ones the smaller."""
        columns = zip(*((part.row, part.other, part.squared) for part in parts), strict=True)
        row, other, squared = map(np.concatenate, columns)
        order = np.lexsort((other, squared, row))
        row, other, squared = row[order], other[order], squared[order]
        near = np.arange(len(row)) - np.searchsorted(row, row) < count
        return Neighbours(row[near], other[near], squared[near])


def draw_sample(num_rows: int, size: int, seed: int) -> IntArray:
    """Draw the places of sampled rows, int64 [S], ascending."""
    return np.sort(np.random.default_rng(seed).choice(num_rows, min(size, num_rows), replace=False))


def find_neighbours(
    read: ReadRows,
    rows: IntArray,
    sample: IntArray,
    count: int,
    device: torch.device,
    share: tuple[int, int],
) -> Neighbours:
    """Find so many nearest neighbours of sampled rows, given by their places among all, in a range of all rows."""
    start, stop = share
    # In float32: rows are compared once, and to prepare them for int8 would take longer than their product.
    sampled = load_block(read, rows[sample], device, torch.float32)
    # The value of a pair a, b is a·b − |b|²/2 = (|a|² − d²)/2; here the least that matters.
    least_S = torch.full((len(sample),), -math.inf, dtype=torch.float64, device=device)
    nearest = Neighbours(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    for at in range(start, stop, _ROWS_AT_ONCE):
        part = load_block(read, rows[at : min(at + _ROWS_AT_ONCE, stop)], device, torch.float32)
        value_SN = multiply(sampled.scan, part.scan) - (part.squared / 2.0).float()
        error = rounded_error(sampled, part)
        met = np.flatnonzero((sample >= at) & (sample < at + len(part)))
        value_SN[torch.from_numpy(met), torch.from_numpy(sample[met] - at)] = -math.inf
        if at == start:
            least_S = value_SN.topk(min(count, len(part))).values.amin(dim=1).double() - error
        proposed_SN = (value_SN >= (least_S - error).float()[:, None]) & (value_SN > -math.inf)
        row_P, other_P = proposed_SN.nonzero(as_tuple=True)
        if len(row_P):
            dots_P = exact_dots(sampled.stored, part.stored, row_P, other_P)
            squared_P = sampled.squared[row_P] + part.squared[other_P] - 2.0 * dots_P
            new = Neighbours(*(values.cpu().numpy() for values in (row_P, other_P + at, squared_P)))
            nearest = Neighbours.nearest([nearest, new], count)
            full = np.flatnonzero(np.arange(len(nearest.row)) - np.searchsorted(nearest.row, nearest.row) == count - 1)
            row, farthest = (torch.from_numpy(values[full]).to(device) for values in (nearest.row, nearest.squared))
            least_S[row] = (sampled.squared[row] - farthest) / 2.0
    return nearest


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


def wider_cutoff(nearest_S: FloatArray, cutoff: float, edges: int, needed: int) -> float:
    """Choose a larger distance after a search to `cutoff` that found too few of the edges needed.

    It is where F has grown in the proportion that is missing, and at least 5 % more, so that some search reaches
    ``FARTHEST``, at which the forest is complete.
    """
    within = int(np.searchsorted(nearest_S, np.float32(cutoff), side="right"))
    return min(max(_at(nearest_S, math.ceil(1.05 * within * needed / max(1, edges))), 1.05 * cutoff, 1e-3), FARTHEST)


def _at(nearest_S: FloatArray, position: int) -> float:
    return min(float(nearest_S[min(len(nearest_S) - 1, position)]), FARTHEST)


class CutoffEstimator:
    """Estimates how far a search must reach for a number of forest edges, from a fixed sample of the rows, if it is asked.

    Args:
        num_rows: N, the rows to search, at least 2, no two of them equal.
        find_nearest: Finds the nearest neighbour of each sampled row, given their places among the rows, ascending.
        drops_per_near_row: How many rows are dropped, at least, for each that has a neighbour within the cut-off; None
            where every forest edge drops one.
    """

    def __init__(
        self, num_rows: int, find_nearest: Callable[[IntArray], Neighbours], drops_per_near_row: float | None
    ) -> None:
        self._num_rows = num_rows
        self._find_nearest = find_nearest
        self._drops_per_near_row = drops_per_near_row

    def choose(self, searched: float, edges: int, needed: int) -> float:
        """Return the distance of the next search, after one to `searched` (0: none) that found some of those needed."""
        nearest_S, edges_S = self._nearest
        if searched == 0.0:
            return first_cutoff(nearest_S, edges_S, needed / self._num_rows)
        return wider_cutoff(nearest_S, searched, edges, needed)

    @cached_property
    def _nearest(self) -> tuple[FloatArray, DoubleArray]:
        sample = draw_sample(self._num_rows, _SAMPLE_ROWS, seed=0)
        nearest = self._find_nearest(sample)
        order = np.argsort(nearest.squared, kind="stable")
        if self._drops_per_near_row is not None:
            return nearest.distance[order], np.full(len(sample), self._drops_per_near_row)
        # Of every second row by distance: it stands for the next one, too.
        seconds = order[::2]
        others, which = np.unique(nearest.other[seconds], return_inverse=True)
        in_turn = self._find_nearest(others).other[which]
        edges_S = np.repeat(np.where(in_turn == sample[seconds], 0.5, 1.0), 2)[: len(sample)]
        return nearest.distance[order], edges_S
