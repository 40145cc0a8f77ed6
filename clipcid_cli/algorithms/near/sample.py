"""The exact nearest neighbours of some sampled rows: how far near rows are apart, before all are compared with all.

Shape letters: N rows, S sampled rows, D width, P pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import torch

from clipcid_cli.algorithms.near.block import read_stored
from clipcid_cli.algorithms.near.exact import (
    DoubleArray,
    FloatArray,
    IntArray,
    ReadRows,
    round_distances,
    squared_lengths,
)

_ROWS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The nearest neighbours of sampled rows, ascending by (sampled row, distance, neighbour).

    Attributes:
        row: A sampled row, by its place in the sample, integers [P].
        other: A neighbour, by its place among all rows, integers [P].
        squared: Their squared distance, exact, float64 [P].
    """

    row: IntArray
    other: IntArray
    squared: DoubleArray

    @property
    def distance(self) -> FloatArray:
        """Their distance, float32 [P]."""
        found: FloatArray = round_distances(torch.from_numpy(self.squared)).numpy()
        return found

    @staticmethod
    def nearest(parts: Iterable[Neighbours], count: int) -> Neighbours:
        """Choose the nearest `count` neighbours of each row; of equally near ones the smaller."""
        row, other, squared = (np.concatenate(each) for each in zip(*map(dataclasses.astuple, parts), strict=True))
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
    share: tuple[int, int] | None = None,
) -> Neighbours:
    """Find the nearest neighbours of sampled rows.

    Args:
        rows: Row numbers, integers [N].
        sample: Places in `rows` of the sampled rows, int64 [S], ascending.
        count: Neighbours of each.
        share: The first place to look at, and the one after the last; by default all.
    """
    start, stop = share or (0, len(rows))
    sampled_SD = read_stored(read, rows[sample], device)
    squared_S, wide_SD = squared_lengths(sampled_SD), sampled_SD.double()
    farthest_S = torch.full((len(sample),), math.inf, dtype=torch.float64, device=device)
    found = Neighbours(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    for at in range(start, stop, _ROWS_AT_ONCE):
        part_ND = read_stored(read, rows[at : min(at + _ROWS_AT_ONCE, stop)], device)
        # Exact at once, which takes less time than bounds by a product of lower precision and what they leave open.
        squared_SN = torch.addmm(squared_lengths(part_ND), wide_SD, part_ND.double().T, alpha=-2.0)
        squared_SN += squared_S[:, None]
        met = np.flatnonzero((sample >= at) & (sample < at + len(part_ND)))
        squared_SN[torch.from_numpy(met), torch.from_numpy(sample[met] - at)] = math.inf
        if at == start:
            farthest_S = squared_SN.topk(min(count, len(part_ND)), largest=False).values.amax(dim=1)
        row_P, other_P = ((squared_SN <= farthest_S[:, None]) & (squared_SN < math.inf)).nonzero(as_tuple=True)
        if len(row_P):
            new = (row_P, other_P + at, squared_SN[row_P, other_P])
            found = Neighbours.nearest([found, Neighbours(*(each.cpu().numpy() for each in new))], count)
            full = np.flatnonzero(np.arange(len(found.row)) - np.searchsorted(found.row, found.row) == count - 1)
            farthest_S[torch.from_numpy(found.row[full])] = torch.from_numpy(found.squared[full]).to(device)
    return found
