"""The exact nearest neighbours of some sampled rows: how far near rows are apart, before all are compared with all.

Shape letters: N rows, S sampled rows, D width, P pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import torch

from clipcid_cli.algorithms.near.block import load_block, multiply, rounded_error
from clipcid_cli.algorithms.near.exact import DoubleArray, FloatArray, IntArray, ReadRows, exact_dots, round_distances

_ROWS_AT_ONCE = 2048


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
    """Find so many nearest neighbours of sampled rows.

    Args:
        rows: Row numbers, integers [N].
        sample: Places in `rows` of the sampled rows, int64 [S], ascending.
        share: The first place to look at, and the one after the last.
    """
    start, stop = share
    # In float32: rows are compared once, and to prepare them for int8 would take longer than their product.
    sampled = load_block(read, rows[sample], device, torch.float32)
    # The value of a pair a, b is a·b − |b|²/2 = (|a|² − d²)/2; here the least that matters.
    least_S = torch.full((len(sample),), -math.inf, dtype=torch.float64, device=device)
    found = Neighbours(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
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
            new = Neighbours(*(each.cpu().numpy() for each in (row_P, other_P + at, squared_P)))
            found = Neighbours.nearest([found, new], count)
            full = np.flatnonzero(np.arange(len(found.row)) - np.searchsorted(found.row, found.row) == count - 1)
            row, farthest = (torch.from_numpy(each[full]).to(device) for each in (found.row, found.squared))
            least_S[row] = (sampled.squared[row] - farthest) / 2.0
    return found
