"""How near to a border between partitions rows must be compared beyond it: measured on a sample of near pairs.

Shape letters: S sampled rows, R rows looked at, K partitions, P pairs, D width.

Source: docs/method.md#partitioned-search.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.near.block import Block, load_block, read_stored
from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import DoubleArray, IntArray, ReadRows
from clipcid_cli.algorithms.near.nearest_pairs import NearestPairs
from clipcid_cli.algorithms.near.partitions import Partitions
from clipcid_cli.algorithms.near.search import near_pairs

# Rows whose neighbours determine the margin, how many neighbours each, and pairs that may be proposed among them and all
# rows.
MARGIN_SAMPLE = 1024
_NEIGHBOURS = 8
_FEWEST_SAMPLED = 32
_MOST_PROPOSED = 2**22
_ROWS_AT_ONCE = 8192
# Few pairs exceed the largest distance to a plane that some thousand sampled ones have, hardly any twice that, and rows that
# near to a border are few: with 1.5 times, 2 of 25,000 forest edges of 50,000 synthetic rows were lost.
_MARGIN_FACTOR = 2.0
_SMALLEST_MARGIN = 0.05
# Partitions a row may visit on average, 8 bytes each.
_MOST_VISITS = 64


def sample_neighbours(
    read: ReadRows,
    rows: IntArray,
    reach: float,
    device: torch.device,
    scan_dtype: torch.dtype,
    *,
    share: Callable[[int], tuple[int, int]],
    gather: Callable[[Any], list[Any]],
) -> tuple[Edges, IntArray]:
    """Find the nearest neighbours, within the reach, of a sample of rows among all rows; the same on every process.

    Args:
        rows: All rows, integers [N].
        reach: The distance to search to.
        scan_dtype: Format of the fast product.
        share: Returns this process's part of n items: the first, and the one after the last.
        gather: Returns every process's value, on every process.

    Returns:
        At most eight pairs for each sampled row, and the sampled rows, ascending.
    """

    def load(some: IntArray) -> Block:
        return load_block(read, some, device, scan_dtype)

    sample = np.random.default_rng(1).permutation(len(rows))[: min(MARGIN_SAMPLE, len(rows))]
    # Where nearly all pairs are within the reach, fewer rows suffice: how many, some rows and one panel show.
    first = load(rows[:_ROWS_AT_ONCE])
    few = NearestPairs(rows[np.sort(sample[:_FEWEST_SAMPLED])], _NEIGHBOURS)
    proposed = sum(len(edges) for edges in near_pairs(load(few.rows), first, reach, few.may_be_nearest))
    number = int(_MOST_PROPOSED / max(1.0, proposed / len(few.rows) * len(rows) / len(first)))
    found = NearestPairs(rows[np.sort(sample[: max(_FEWEST_SAMPLED, number)])], _NEIGHBOURS)
    block = load(found.rows)
    start, stop = share(len(rows))
    for at in range(start, stop, _ROWS_AT_ONCE):
        panel = load(rows[at : min(at + _ROWS_AT_ONCE, stop)])
        for edges in near_pairs(block, panel, reach, found.may_be_nearest):
            found.add(edges)
    for edges in gather(found.edges):  # a process adds its own again, which changes nothing
        found.add(edges)
    return found.edges, found.rows


def measure_margin(
    partitions: Partitions, read: ReadRows, neighbours: Edges, sample: IntArray, reach: float
) -> tuple[float, float]:
    """Choose the margin from how near to borders sampled rows and their neighbours lie.

    Args:
        neighbours: Near pairs of the sampled rows.
        sample: The sampled rows, int64 [S], ascending.
        reach: The distance to search to.

    Returns:
        The margin, and how many partitions a row visits with it on average.
    """
    device = partitions.centroids_KD.device
    rows = np.unique(np.concatenate([sample, neighbours.a, neighbours.b]))
    stored_RD = read_stored(read, rows, device)
    home_R = partitions.nearest(stored_RD)
    a, b = (torch.from_numpy(np.searchsorted(rows, each)).to(device) for each in (neighbours.a, neighbours.b))
    # A pair is found when either row visits the other's home.
    gap_P = torch.minimum(
        partitions.gaps(stored_RD[a], home_R[a], home_R[b]), partitions.gaps(stored_RD[b], home_R[b], home_R[a])
    )
    sampled = torch.from_numpy(np.searchsorted(rows, sample)).to(device)
    spread_SK = partitions.spread(stored_RD[sampled], home_R[sampled]).cpu().numpy()
    margin = choose_margin(gap_P.cpu().numpy(), spread_SK, reach, _MOST_VISITS)
    return margin, float(np.count_nonzero(spread_SK <= margin)) / len(sample) - 1.0


def choose_margin(gaps_P: DoubleArray, spread_SK: npt.NDArray[np.float64], reach: float, most_visits: float) -> float:
    """Choose the margin of a search.

    Args:
        gaps_P: How near each sampled pair within the reach is to the border between its homes: the smaller of its rows'
            :meth:`Partitions.gaps`, float64 [P].
        spread_SK: Gaps of sampled rows to every partition, float64 [S, K], 0 at home.
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
