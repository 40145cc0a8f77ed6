"""Partitions of rows by their nearest centroid, and which rows of other partitions are so near that they are compared too.

A search of all pairs grows with the square of the rows. Near rows mostly share a nearest centroid, so rows are compared
within their partition, and each row with the members of the partitions whose border it is near to. How near is exact
geometry: let row a be at home in partition v and row b in h. a lies on v's side of the plane between both centroids, so

    b's distance to that plane  =  (f_h(b) − f_v(b)) / |c_h − c_v|  ≤  |a − b|,      f_c(x) = x·c − |c|²/2,

and a *margin* of ε loses no pair within ε. It may be far smaller: the plane's normal is one direction of many, and a − b has
about a share 1/√D of its length along it. What is needed is measured on a sample of near pairs.

Which rows are compared must not depend on threads or processes. Centroids are on the grid of float16 rows, so f is exact in
float64 for them as it is for the rows (:mod:`clipcid_cli.algorithms.near.exact`).

Shape letters: N rows, B rows of a block, K partitions, D width, P pairs, S sampled rows.

Source: docs/method.md#partitioned-search; k-means partitions with visits are the inverted lists of Jégou, Douze and
Schmid 2011; the margin to the plane is that of spill trees (Liu, Moore, Gray, Yang 2004).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from clipcid_cli.algorithms.near.block import read_stored
from clipcid_cli.algorithms.near.exact import DoubleArray, IntArray, ReadRows, root, squared_lengths
from clipcid_cli.algorithms.near.sample import Neighbours

# Values of f computed at once: on a CPU they and what is made of them stay near the cores' caches.
_VALUES_AT_ONCE = 2**20
# Rows whose neighbours determine the margin, and how many neighbours each.
SAMPLE_ROWS, NEIGHBOURS = 1024, 8
# Few pairs exceed the largest distance to a plane that some thousand sampled ones have, hardly any twice that, and rows that
# near to a border are few: with 1.5 times, 2 of 25,000 forest edges of 50,000 synthetic rows were lost.
_MARGIN_FACTOR = 2.0
_SMALLEST_MARGIN = 0.05
# Partitions a row may visit on average, 8 bytes each.
_MOST_VISITS = 64


def default_num_partitions(num_rows: int) -> int:
    """Choose the number of partitions: √N, where finding a row's partition and searching it cost alike."""
    return max(1, round(math.sqrt(num_rows)))


class Partitions:
    """The partitions of some centroids.

    Args:
        centroids_KD: Centroids, float16, or float32 on the grid of 2⁻²⁴, [K, D].
    """

    def __init__(self, centroids_KD: torch.Tensor) -> None:
        self.width = centroids_KD.shape[1]
        self._wide_KD = centroids_KD.double()
        self._half_K = squared_lengths(centroids_KD) / 2.0
        dots_KK = self._wide_KD @ self._wide_KD.T
        # How far centroids are apart.
        self._apart_KK = root((2.0 * (self._half_K[:, None] + self._half_K - dots_KK)).clamp(min=0.0))

    def __len__(self) -> int:
        return len(self._half_K)

    @property
    def device(self) -> torch.device:
        """Where the centroids are."""
        return self._half_K.device

    def gaps(self, rows_ND: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield, for some rows after another, their home and their gap to each partition.

        Args:
            rows_ND: Stored rows, float16 [N, D].

        Yields:
            The nearest centroid of each row, of equally near ones the smaller, int64 [B]; and its distance to the planes
            between that and all others, exact but for two roundings, float64 [B, K]: infinite at home, 0 where both
            centroids are equal, so that neither is nearer.
        """
        for rows_BD in torch.split(rows_ND, self.rows_at_once):
            value_BK = torch.addmm(-self._half_K, rows_BD.double(), self._wide_KD.T)
            best_B, home_B = value_BK.max(dim=1, keepdim=True)
            gap_BK = (best_B - value_BK).div_(self._apart_KK[home_B[:, 0]]).nan_to_num_(nan=0.0)
            yield home_B[:, 0], gap_BK.scatter_(1, home_B, math.inf)

    @property
    def rows_at_once(self) -> int:
        """Rows whose values of f fit the cache."""
        return max(64, _VALUES_AT_ONCE // len(self))

    def home(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """Return the nearest centroid of each row, int64 [N]."""
        return torch.cat([home_B for home_B, _ in self.gaps(rows_ND)])


def measure_margin(
    partitions: Partitions, read: ReadRows, rows: IntArray, sample: IntArray, neighbours: Neighbours, reach: float
) -> tuple[float, float]:
    """Choose the margin from how near to borders sampled rows and their neighbours lie.

    Args:
        rows: Row numbers, integers [N].
        sample: Places in `rows` of the sampled rows, int64 [S], ascending.
        neighbours: Their nearest neighbours.
        reach: The distance to search to.

    Returns:
        The margin, and how many partitions a row visits with it on average.
    """
    near = neighbours.distance <= np.float32(reach)
    stored_SD = read_stored(read, rows[sample], partitions.device)
    parts = list(partitions.gaps(stored_SD))
    home_S, spread_SK = (torch.cat(each) for each in zip(*parts, strict=True))
    row_P = torch.from_numpy(neighbours.row[near]).to(partitions.device)
    other_PD = read_stored(read, rows[neighbours.other[near]], partitions.device)
    # A pair is found when either row visits the other's home.
    gaps = [torch.empty(0, dtype=torch.float64)]
    first = 0
    for home_B, gap_BK in partitions.gaps(other_PD):
        row_B = row_P[first : first + len(home_B)]
        there_B = gap_BK.gather(1, home_S[row_B][:, None])[:, 0]
        gap_B = torch.minimum(there_B, spread_SK[row_B, home_B])
        gaps.append(gap_B[home_B != home_S[row_B]].cpu())
        first += len(home_B)
    spread = spread_SK.cpu().numpy()
    margin = choose_margin(torch.cat(gaps).numpy(), spread, reach, _MOST_VISITS)
    return margin, float(np.count_nonzero(spread <= margin)) / len(sample)


def choose_margin(gaps_P: DoubleArray, spread_SK: DoubleArray, reach: float, most_visits: float) -> float:
    """Choose the margin of a search.

    Args:
        gaps_P: How near each sampled pair within the reach is to the border between its homes, float64 [P].
        spread_SK: Gaps of sampled rows to every partition, float64 [S, K].
        reach: The distance to search to.
        most_visits: Partitions a row may visit on average, which bounds memory.

    Returns:
        A margin in [0, reach].
    """
    margin = min(reach, max(_SMALLEST_MARGIN * reach, _MARGIN_FACTOR * float(gaps_P.max(initial=0.0))))
    allowed = int(most_visits * len(spread_SK))
    if allowed < spread_SK.size:
        margin = min(margin, float(np.partition(spread_SK.ravel(), allowed)[allowed]))
    return margin


def assign_rows(
    partitions: Partitions, read: ReadRows, rows: IntArray, margin: float, share: tuple[int, int]
) -> Iterator[tuple[IntArray, IntArray, IntArray]]:
    """Find the home of rows and the partitions they visit, some rows after another.

    Args:
        rows: Row numbers, integers [N].
        margin: How near to a border a row visits the partition beyond it.
        share: Places in `rows` to look at: the first, and the one after the last.

    Yields:
        Homes of consecutive rows, int32 [B]; the partitions that some of them visit, int32 [E], and the numbers of these
        rows, integers [E].
    """
    start, stop = share
    for at in range(start, stop, partitions.rows_at_once):
        numbers = rows[at : min(at + partitions.rows_at_once, stop)]
        for home_B, gap_BK in partitions.gaps(read_stored(read, numbers, partitions.device)):
            row, visited = (gap_BK <= margin).nonzero(as_tuple=True)
            yield (
                home_B.cpu().numpy().astype(np.int32),
                visited.cpu().numpy().astype(np.int32),
                numbers[row.cpu().numpy()],
            )


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
