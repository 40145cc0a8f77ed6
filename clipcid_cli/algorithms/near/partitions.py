"""Partitions of rows by their nearest centroid, and which rows of other partitions are so near that they are compared too.

A search of all pairs grows with the square of the rows. Near rows mostly share a nearest centroid, so rows are compared
within their partition, and each row with the members of the partitions whose border it is near to. How near is exact
geometry: let row a be at home in partition v and row b in h, so a·c_v ≥ a·c_h. The plane x·(c_h − c_v) = 0 lies between:

    b's distance to that plane  =  b·(c_h − c_v) / |c_h − c_v|  ≤  |a − b|,

and a *margin* of ε loses no pair within ε. It may be far smaller: the plane's normal is one direction of many, and a − b has
about a share 1/√D of its length along it. What is needed is measured on a sample of near pairs.

Centroids are at most 2 apart, so b visits none with b·c_v < b·c_h − 2 · margin. Where some of b's 16 nearest are left out by
that, the others of them are all that it may visit; only rows of which none is left out are multiplied with all centroids.
Where two centroids are equally near but for the last digit of float32, a row's home may be the other one on another machine.
Which partitions it visits is decided by gaps that are exact but for two roundings
(:mod:`clipcid_cli.algorithms.near.exact`), so which rows are compared does not depend on threads or processes.

Shape letters beside those of the map: K partitions, R rows of a block that are multiplied with all.

Source: docs/method.md#partitioned-search; k-means partitions with visits are the inverted lists of Jégou, Douze and
Schmid 2011; the margin to the plane is that of spill trees (Liu, Moore, Gray, Yang 2004).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from clipcid_cli.algorithms.near.block import read_stored
from clipcid_cli.algorithms.near.cutoff import Neighbours
from clipcid_cli.algorithms.near.exact import LONGEST_UNIT_ROW, IntArray, ReadRows, exact_dots, root, squared_lengths
from clipcid_cli.algorithms.near.nearest import top

# How many of a row's nearest centroids are looked at first. Of 20,000 synthetic rows of width 512 in 1,200 partitions, 173
# have more that they may visit. These are multiplied with all, so many values at once.
_NEAREST = 16
_VALUES_AT_ONCE = 2**22
# Similarities are float32 sums of up to some thousand products.
_SLACK = 2.0**-10
# Rows whose neighbours determine the margin, and how many neighbours each.
SAMPLE_ROWS = 1024
NEIGHBOURS = 8
# Few pairs exceed the largest distance to a plane that some thousand sampled ones have, hardly any twice that, and rows that
# near to a border are few: with 1.5 times, 2 of 25,000 forest edges of 50,000 synthetic rows were lost.
_MARGIN_FACTOR = 2.0
_MIN_MARGIN = 0.05
# Partitions a row may visit on average, 8 bytes each.
_MAX_VISITS = 64


def default_num_partitions(num_rows: int) -> int:
    """Choose the number of partitions: √N, where finding a row's partition and searching it cost alike."""
    return max(1, round(math.sqrt(num_rows)))


class Partitions:
    """The partitions of some centroids, unit rows on the grid of 2⁻²⁴, float32."""

    def __init__(self, centroids_KD: torch.Tensor) -> None:
        self.width = centroids_KD.shape[1]
        self.device = centroids_KD.device
        self._centroids_KD = centroids_KD
        self._squared_K = squared_lengths(centroids_KD)

    def __len__(self) -> int:
        return len(self._squared_K)

    def home(self, rows_BD: torch.Tensor) -> torch.Tensor:
        """Return the nearest centroid of stored rows, of equally near ones the smaller, int64 [B]."""
        return top(rows_BD, self._centroids_KD, 1)[0][:, 0]

    def gaps(
        self, rows_BD: torch.Tensor, row_P: torch.Tensor, home_P: torch.Tensor, other_P: torch.Tensor
    ) -> torch.Tensor:
        """Return the distance of rows to the planes between their homes and other partitions, 0 for equal centroids."""
        ahead_P = exact_dots(rows_BD, self._centroids_KD, row_P, home_P)
        ahead_P -= exact_dots(rows_BD, self._centroids_KD, row_P, other_P)
        dots_P = exact_dots(self._centroids_KD, self._centroids_KD, home_P, other_P)
        apart_P = root((self._squared_K[home_P] + self._squared_K[other_P] - 2.0 * dots_P).clamp(min=0.0))
        return (ahead_P / apart_P).nan_to_num_(nan=0.0)

    def visits(self, rows_BD: torch.Tensor, margin: float) -> tuple[torch.Tensor, ...]:
        """Find the partitions that stored rows visit, those beyond a border that is within `margin`.

        Returns:
            The home of each row, int64 [B]; and of each visit, ascending, the row's position and the partition, int64 [P],
            and the gap, float64 [P].
        """
        m = min(_NEAREST, len(self))
        number_Bm, cosine_Bm = top(rows_BD, self._centroids_KD, m)
        # No two centroids are farther apart than twice the longest.
        home_B, least_B1 = number_Bm[:, 0], cosine_Bm[:, :1] - margin * 2 * LONGEST_UNIT_ROW
        may_Bm = cosine_Bm >= least_B1 - _SLACK
        open_B = may_Bm[:, -1] & (m < len(self))
        row_P, place_P = (may_Bm & ~open_B[:, None]).nonzero(as_tuple=True)
        parts = [self._near(rows_BD, row_P, home_B[row_P], number_Bm[row_P, place_P], margin)]
        for open_R in torch.split(open_B.nonzero()[:, 0], max(1, _VALUES_AT_ONCE // len(self))):
            cosine_RK = rows_BD[open_R].double() @ self._centroids_KD.double().T
            place_P, other_P = (cosine_RK >= least_B1[open_R]).nonzero(as_tuple=True)
            row_P = open_R[place_P]
            parts.append(self._near(rows_BD, row_P, home_B[row_P], other_P, margin))
        row_P, other_P, gap_P = (torch.cat(column) for column in zip(*parts, strict=True))
        order_P = (row_P * len(self) + other_P).argsort()
        return home_B, row_P[order_P], other_P[order_P], gap_P[order_P]

    def _near(
        self, rows_BD: torch.Tensor, row_P: torch.Tensor, home_P: torch.Tensor, other_P: torch.Tensor, margin: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gap_P = self.gaps(rows_BD, row_P, home_P, other_P)
        near_P = (gap_P <= margin) & (other_P != home_P)
        return row_P[near_P], other_P[near_P], gap_P[near_P]


def measure_margin(
    partitions: Partitions, read: ReadRows, rows: IntArray, sample: IntArray, neighbours: Neighbours, reach: float
) -> tuple[float, float]:
    """Choose the margin from how near to borders sampled rows and their neighbours lie.

    Args:
        sample: Places in `rows` of the sampled rows, ascending.

    Returns:
        The margin, and how many partitions a row visits with it on average.
    """
    near = neighbours.distance <= np.float32(reach)
    row_P = torch.from_numpy(neighbours.row[near]).to(partitions.device)
    stored_SD = read_stored(read, rows[sample], partitions.device)
    other_PD = read_stored(read, rows[neighbours.other[near]], partitions.device)
    home_P, beyond_P = partitions.home(stored_SD)[row_P], partitions.home(other_PD)
    apart_P = (home_P != beyond_P).nonzero()[:, 0]
    row_P, home_P, beyond_P = row_P[apart_P], home_P[apart_P], beyond_P[apart_P]
    # A pair is found when either row visits the other's home.
    gap_P = torch.minimum(
        partitions.gaps(stored_SD, row_P, home_P, beyond_P), partitions.gaps(other_PD, apart_P, beyond_P, home_P)
    )
    largest = float(gap_P.max()) if len(gap_P) else 0.0
    margin = min(reach, max(_MIN_MARGIN * reach, _MARGIN_FACTOR * largest))
    *_, spread_P = partitions.visits(stored_SD, margin)
    allowed = _MAX_VISITS * len(sample)
    if allowed < len(spread_P):
        margin = float(spread_P.sort().values[allowed])
    return margin, int((spread_P <= margin).sum()) / len(sample)


def group_rows(
    entries: Callable[[], Iterable[tuple[IntArray, IntArray]]], num_lists: int, allocate: Callable[[int], IntArray]
) -> tuple[IntArray, IntArray]:
    """Make lists of rows, one after another in one array, from entries that come part by part, in the memory of a part.

    Args:
        entries: Gives the parts, of E entries each a list's number and a row; called twice. A list keeps their order.
        allocate: Makes the array of all lists, of a length.

    Returns:
        The rows of all lists, integers [E], and how many each has, int64 [num_lists].
    """
    sizes = np.zeros(num_lists, np.int64)
    for lists, _ in entries():
        sizes += np.bincount(lists, minlength=num_lists)
    grouped = allocate(int(sizes.sum()))
    free = np.cumsum(sizes) - sizes
    for lists, rows in entries():
        counts = np.bincount(lists, minlength=num_lists)
        order = np.argsort(lists, kind="stable")
        # An entry's place among those of its list in this part, behind those of the parts before.
        within = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        grouped[np.repeat(free, counts) + within] = rows[order]
        free += counts
    return grouped, sizes
