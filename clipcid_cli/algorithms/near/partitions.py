"""Partitions of rows by their nearest centroid, and which rows of other partitions are so near that they are compared too.

A search of all pairs grows with the square of the rows. Near rows mostly share a nearest centroid, so rows are compared
within their partition, and each row with the members of the partitions whose border it is near to. How near is exact
geometry: let row a be at home in partition v and row b in h. a lies on v's side of the plane between both centroids, so

    b's distance to that plane  =  (f_h(b) − f_v(b)) / |c_h − c_v|  ≤  |a − b|,      f_c(x) = x·c − |c|²/2,

and a *margin* of ε loses no pair within ε. It may be far smaller: the plane's normal is one direction of many, and a − b has
about a share 1/√D of its length along it. What is needed is measured on a sample
(:mod:`clipcid_cli.algorithms.near.partition_margin`).

Which rows are compared must not depend on threads or processes. Centroids are float16 rows, so f is exact in float64
for them as it is for the rows (:mod:`clipcid_cli.algorithms.near.exact`); a float32 product decides where its
error cannot matter, and float64 decides the rest.

Shape letters: N rows, B rows of a block, K partitions, D width, P pairs, S sampled rows.

Source: docs/method.md#partitioned-search; k-means partitions with visits are the inverted lists of Jégou, Douze and
Schmid 2011; the margin to the plane is that of spill trees (Liu, Moore, Gray, Yang 2004).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from clipcid_cli.algorithms.near.block import ACCUMULATION_UNIT, exact_accumulation, read_stored
from clipcid_cli.algorithms.near.exact import IntArray, ReadRows, root, squared_lengths

# Scores and pairs computed at once: on a CPU they and what is made of them stay near the cores' caches.
_SCORES_AT_ONCE = 2**21
_PAIRS_AT_ONCE = {"cpu": 2048, "cuda": 65_536}
_CENTROIDS_AT_ONCE = 1024

# Above the rounding of a float32.
_ROUNDED_UP = 1.0 + 2.0**-22


def default_num_partitions(num_rows: int) -> int:
    """Choose the number of partitions: √N, where finding a row's partition and searching it cost alike."""
    return max(1, round(math.sqrt(num_rows)))


@dataclasses.dataclass(frozen=True)
class Visits:
    """Which rows of a block must be compared with partitions that are not their home.

    Attributes:
        home: Partition of each row, int64 [B].
        row: A row's position in the block, int64 [P].
        partition: A partition it visits, int64 [P]; pairs ascend by (row, partition).
    """

    home: torch.Tensor
    row: torch.Tensor
    partition: torch.Tensor


class Partitions:
    """The partitions of some centroids.

    Args:
        centroids_KD: Centroids, float16 [K, D].
    """

    def __init__(self, centroids_KD: torch.Tensor) -> None:
        self.centroids_KD = centroids_KD
        self._wide_KD = centroids_KD.float()
        self._half_K = squared_lengths(centroids_KD) / 2.0
        self._longest = math.sqrt(2.0 * float(self._half_K.max()))
        # How far centroids are apart, float32 rounded up, for the fast decision.
        self._apart_KK = (
            torch.cat([self._apart(part).float() for part in torch.split(centroids_KD, _CENTROIDS_AT_ONCE)])
            * _ROUNDED_UP
        )

    def __len__(self) -> int:
        return len(self.centroids_KD)

    @property
    def width(self) -> int:
        """Width D of the rows."""
        return self.centroids_KD.shape[1]

    def nearest(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """Find the nearest centroid of each row, float16 [N, D]; int64 [N], of equally near ones the smaller number."""
        blocks = torch.split(rows_ND, self.rows_at_once)
        return torch.cat([self._nearest(rows, *self._scores(rows)) for rows in blocks])

    def visits(self, rows_BD: torch.Tensor, margin: float) -> Visits:
        """Find the home of each row, float16 [B, D], and the partitions whose border is within `margin` of it."""
        scores_BK, error = self._scores(rows_BD)
        home_B = self._nearest(rows_BD, scores_BK, error)
        # (f_h − f_v) − margin·|c_h − c_v|, within twice the error; at most 0 where v is visited.
        beyond_BK = scores_BK.gather(1, home_B[:, None]) - scores_BK
        beyond_BK -= margin * self._apart_KK[home_B]
        beyond_BK.scatter_(1, home_B[:, None], math.inf)
        row_P, partition_P = (beyond_BK <= 3.0 * error).nonzero(as_tuple=True)
        unsure_P = (beyond_BK[row_P, partition_P] >= -3.0 * error).nonzero()[:, 0]
        row_U, partition_U = row_P[unsure_P], partition_P[unsure_P]
        stays_P = torch.ones(len(row_P), dtype=torch.bool, device=rows_BD.device)
        stays_P[unsure_P] = self.gaps(rows_BD[row_U], home_B[row_U], partition_U) <= margin
        return Visits(home_B, row_P[stays_P], partition_P[stays_P])

    def gaps(self, rows_PD: torch.Tensor, home_P: torch.Tensor, other_P: torch.Tensor) -> torch.Tensor:
        """Return the distance of each row to the plane between two centroids, exact but for two roundings.

        Args:
            rows_PD: Rows, float16 [P, D].
            home_P: The partition on whose side it is counted positive, int64 [P].
            other_P: The other, int64 [P].

        Returns:
            float64 [P]; 0 where both are one.
        """
        parts = []
        at_once = _PAIRS_AT_ONCE[rows_PD.device.type]
        for at in range(0, len(rows_PD), at_once):
            part = slice(at, at + at_once)
            home, other = home_P[part], other_P[part]
            # Differences of float16 numbers are exact in float64, and so is each sum here.
            normal_PD = self.centroids_KD[home].double() - self.centroids_KD[other].double()
            ahead = (rows_PD[part].double() * normal_PD).sum(dim=1) - (self._half_K[home] - self._half_K[other])
            # Two equal centroids have no plane between them: neither is nearer.
            parts.append((ahead / root((normal_PD * normal_PD).sum(dim=1))).nan_to_num(nan=0.0))
        return torch.cat([torch.empty(0, dtype=torch.float64, device=rows_PD.device), *parts])

    def spread(self, rows_SD: torch.Tensor, home_S: torch.Tensor) -> torch.Tensor:
        """Return the :meth:`gaps` of each row, float16 [S, D], to every partition, float64 [S, K]; 0 at home."""
        value_SK = rows_SD.double() @ self.centroids_KD.double().T - self._half_K
        ahead_SK = value_SK.gather(1, home_S[:, None]) - value_SK
        # Two equal centroids have no plane between them: neither is nearer.
        gap_SK = (ahead_SK / self._apart(self.centroids_KD[home_S])).nan_to_num(nan=0.0)
        return gap_SK.scatter_(1, home_S[:, None], 0.0)

    @property
    def rows_at_once(self) -> int:
        """Rows whose scores fit the cache."""
        return max(64, _SCORES_AT_ONCE // len(self))

    def _scores(self, rows_BD: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return f of each row and centroid, float32 [B, K], and the largest error any of them may have."""
        wide_BD = rows_BD.float()
        longest = float(wide_BD.norm(dim=1).max()) * 1.001
        # A score is a sum of D products and of −|c|²/2, which is rounded once more.
        error = (wide_BD.shape[1] + 4) * ACCUMULATION_UNIT * max(longest, 1.0) * max(self._longest, 1.0)
        with exact_accumulation(wide_BD.device):
            return torch.addmm(-self._half_K.float(), wide_BD, self._wide_KD.T), error

    def _nearest(self, rows_BD: torch.Tensor, scores_BK: torch.Tensor, error: float) -> torch.Tensor:
        """Return the exactly nearest centroid of each row, int64 [B]."""
        best_B, home_B = scores_BK.max(dim=1)
        near_BK = scores_BK >= (best_B - 2.0 * error)[:, None]
        unsure_U = (near_BK.sum(dim=1) > 1).nonzero()[:, 0]
        which_P, centroid_P = near_BK[unsure_U].nonzero(as_tuple=True)
        at_once = _PAIRS_AT_ONCE[rows_BD.device.type]
        parts = zip(torch.split(unsure_U[which_P], at_once), torch.split(centroid_P, at_once), strict=True)
        exact = [
            (rows_BD[row].double() * self.centroids_KD[centroid].double()).sum(dim=1) - self._half_K[centroid]
            for row, centroid in parts
        ]
        exact_P = torch.cat([torch.empty(0, dtype=torch.float64, device=rows_BD.device), *exact])
        best_U = torch.full((len(unsure_U),), -math.inf, dtype=torch.float64, device=rows_BD.device)
        best_U.scatter_reduce_(0, which_P, exact_P, "amax")
        wins_P = exact_P == best_U[which_P]
        chosen_U = torch.full_like(unsure_U, len(self))
        home_B[unsure_U] = chosen_U.scatter_reduce_(0, which_P[wins_P], centroid_P[wins_P], "amin")
        return home_B

    def _apart(self, centroids_CD: torch.Tensor) -> torch.Tensor:
        """Return the distances of some centroids to all, float64 [C, K]."""
        dots_CK = centroids_CD.double() @ self.centroids_KD.double().T
        squared_CK = squared_lengths(centroids_CD)[:, None] + 2.0 * self._half_K - 2.0 * dots_CK
        return root(squared_CK.clamp(min=0.0))


def assign_rows(
    partitions: Partitions,
    read: ReadRows,
    rows: IntArray,
    margin: float,
    *,
    share: tuple[int, int],
    advance: Callable[[int], object],
) -> Iterator[tuple[IntArray, IntArray, IntArray]]:
    """Find the home of rows and the partitions they visit, some rows after another.

    Args:
        rows: Row numbers, integers [N].
        margin: How near to a border a row visits the partition beyond it.
        share: Positions in `rows` to look at: the first, and the one after the last.
        advance: Called with the number of rows looked at.

    Yields:
        Of M rows the home of each, int32 [M]; of each of their visits the partition, int32 [E], and the row, integers [E].
    """
    start, stop = share
    for at in range(start, stop, partitions.rows_at_once):
        some = rows[at : min(at + partitions.rows_at_once, stop)]
        stored_BD = read_stored(read, some, partitions.centroids_KD.device)
        found = partitions.visits(stored_BD, margin)
        home, row, visited = (each.cpu().numpy() for each in (found.home, found.row, found.partition))
        yield home.astype(np.int32), visited.astype(np.int32), some[row]
        advance(len(some))


def group_rows(
    entries: Callable[[], Iterable[tuple[IntArray, IntArray]]], num_lists: int, allocate: Callable[[int], IntArray]
) -> tuple[IntArray, IntArray]:
    """Make lists of rows, one after another in one array, from entries that come part by part, in the memory of a part.

    Args:
        entries: Gives the parts, of E entries each a list's number and a row; called twice. A list keeps their order.
        allocate: Makes the array of all lists, of a length.

    Returns:
        The rows of all lists, integers [E], and where each ends, int64 [num_lists].
    """
    sizes = np.zeros(num_lists, np.int64)
    for lists, _ in entries():
        sizes += np.bincount(lists, minlength=num_lists)
    ends = np.cumsum(sizes)
    found, free = allocate(int(ends[-1])), ends - sizes
    for lists, rows in entries():
        counts = np.bincount(lists, minlength=num_lists)
        order = np.argsort(lists, kind="stable")
        # An entry's place among those of its list in this part, behind those of the parts before.
        within = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        found[np.repeat(free, counts) + within] = rows[order]
        free += counts
    return found, ends
