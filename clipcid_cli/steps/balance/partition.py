"""From rows to the partitions in which near ones are looked for; the same on every process and for any number of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from clipcid_cli.algorithms.search.blocks import load_block
from clipcid_cli.algorithms.search.centroids import ClusterSums, centroids_of_sums
from clipcid_cli.algorithms.search.distances import IntArray, ReadRows
from clipcid_cli.algorithms.search.edges import Edges
from clipcid_cli.algorithms.search.nearest_pairs import NearestPairs
from clipcid_cli.algorithms.search.pair_search import TiledSearch
from clipcid_cli.algorithms.search.partitioned_search import Groups, PartitionedSearch, RowArray
from clipcid_cli.algorithms.search.partitions import Partitions, choose_margin, default_num_partitions, split_counts
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.reporting import Reporter

# k-means sees so many rows a partition; partitions need no fine centroids, only few rows near their borders.
ROWS_PER_CENTROID = 64
_ITERATIONS = 4
_ROWS_AT_ONCE = 8192
_SPLIT_ROUNDS = 2
# Times each of those is looked at, at most: at every move of the centroids and after each round.
LOOKS_AT_SAMPLE = _ITERATIONS + 1 + _SPLIT_ROUNDS * (_ITERATIONS // 2 + 1)
# Rows whose neighbours tell the margin, how many neighbours each, and pairs that may be proposed among them and all rows.
MARGIN_SAMPLE = 1024
_NEIGHBOURS = 8
_FEWEST_SAMPLED = 32
_MOST_PROPOSED = 2**22
# Partitions a row may visit on average, 8 bytes each.
_MOST_VISITS = 64
# Where this share of all pairs would be compared, all of them may as well be.
_LARGEST_SHARE = 0.5


def partition_rows(
    machine: Machine, join: TiledSearch, read: ReadRows, scan_dtype: torch.dtype, reach: float, reporter: Reporter
) -> PartitionedSearch | None:
    """Cut the rows of a join into partitions so that few pairs within `reach` are missed.

    Args:
        join: The join of all rows with all rows.
        scan_dtype: Format of the fast product.
        reach: The distance to search to.

    Returns:
        The search of the partitions; None where it would compare half of all pairs or more.
    """
    rows = join.rows
    partitions = _train(machine, read, rows, reporter)
    margin, visits = _measure_margin(machine, join, read, scan_dtype, partitions, reach)
    compared = len(rows) * len(rows) / len(partitions) * (0.5 + visits)
    if compared > _LARGEST_SHARE * len(rows) * (len(rows) - 1) / 2:
        return None
    reporter.note(
        f"{len(partitions):,} partitions; rows within {margin:.4f} of a border, {visits:.1f} partitions a row, are compared "
        "beyond their own."
    )
    homes, visitors = _assign(machine, read, rows, partitions, margin, reporter)
    return PartitionedSearch(read, rows, homes, visitors, machine.device, scan_dtype)


def _train(machine: Machine, read: ReadRows, rows: IntArray, reporter: Reporter) -> Partitions:
    """Find centroids by k-means on a sample, and split those that have far more rows than others."""
    wanted = default_num_partitions(len(rows))
    generator = np.random.default_rng(0)
    size = min(len(rows), ROWS_PER_CENTROID * wanted)
    sample = np.sort(generator.choice(len(rows), size, replace=False))
    first = np.sort(generator.choice(size, wanted, replace=False))
    # Each process looks at its share of the sample; sums of rows are exact, so the centroids do not depend on the shares.
    start, stop = (machine.rank + np.array([0, 1])) * size // machine.size
    mine = _load(read, rows[sample[start:stop]], machine.device)
    centroids_KD = _load(read, rows[sample[first]], machine.device)
    with reporter.progress("partitions", None, "iterations") as progress:
        for round_ in range(1 + _SPLIT_ROUNDS):
            for _ in range(_ITERATIONS if round_ == 0 else _ITERATIONS // 2):
                home_B = _nearest(Partitions(centroids_KD), mine)
                centroids_KD = _move(machine, mine, home_B, centroids_KD)
                progress.advance()
            partitions = Partitions(centroids_KD)
            home_S = np.concatenate(machine.gather(_nearest(partitions, mine).cpu().numpy()))
            counts = split_counts(np.bincount(home_S, minlength=len(partitions)), wanted)
            if counts.max() == 1 or round_ == _SPLIT_ROUNDS:
                break
            added = [
                members[np.linspace(0, len(members) - 1, counts[partition]).astype(np.int64)]
                for partition in np.flatnonzero(counts > 1).tolist()
                for members in [np.flatnonzero(home_S == partition)]
            ]
            new_KD = _load(read, rows[sample[np.concatenate(added)]], machine.device)
            centroids_KD = torch.cat([centroids_KD[torch.from_numpy(counts == 1).to(machine.device)], new_KD])
    return partitions


def _nearest(partitions: Partitions, rows_BD: torch.Tensor) -> torch.Tensor:
    return partitions.nearest(rows_BD) if len(rows_BD) else torch.empty(0, dtype=torch.int64, device=rows_BD.device)


def _move(machine: Machine, rows_BD: torch.Tensor, home_B: torch.Tensor, centroids_KD: torch.Tensor) -> torch.Tensor:
    """Return the normalised means of the partitions' rows, float16 [K, D]; an empty one keeps its centroid."""
    sums = ClusterSums(len(centroids_KD), centroids_KD.shape[1], machine.device)
    for rows, home in zip(torch.split(rows_BD, _ROWS_AT_ONCE), torch.split(home_B, _ROWS_AT_ONCE), strict=True):
        sums.move(rows, torch.full_like(home, -1), home)
    return centroids_of_sums(machine.sum_(sums.sums_KD), centroids_KD.float()).half()


def _measure_margin(
    machine: Machine, join: TiledSearch, read: ReadRows, scan_dtype: torch.dtype, partitions: Partitions, reach: float
) -> tuple[float, float]:
    """Find by exact search how near to borders sampled rows and their neighbours lie.

    Returns:
        The margin, and how many partitions a row visits with it on average.
    """
    neighbours, sample = _sample_neighbours(machine, join, read, scan_dtype, reach)

    def measure() -> tuple[float, float]:
        device = machine.device
        rows = np.unique(np.concatenate([sample, neighbours.a, neighbours.b]))
        stored_RD = _load(read, rows, device)
        home_R = partitions.nearest(stored_RD)
        a, b = (torch.from_numpy(np.searchsorted(rows, each)).to(device) for each in (neighbours.a, neighbours.b))
        gap_P = torch.minimum(
            partitions.gaps(stored_RD[a], home_R[a], home_R[b]), partitions.gaps(stored_RD[b], home_R[b], home_R[a])
        )
        some = torch.from_numpy(np.searchsorted(rows, sample)).to(device)
        spread_SK = partitions.spread(stored_RD[some], home_R[some]).cpu().numpy()
        margin = choose_margin(gap_P.cpu().numpy(), spread_SK, reach, _MOST_VISITS)
        return margin, float(np.count_nonzero(spread_SK <= margin)) / len(sample) - 1.0

    return machine.on_main(measure)


def _sample_neighbours(
    machine: Machine, join: TiledSearch, read: ReadRows, scan_dtype: torch.dtype, reach: float
) -> tuple[Edges, IntArray]:
    """Find the nearest neighbours, within the reach, of a sample of rows among all rows.

    Returns:
        At most eight pairs for each sampled row, and the sampled rows, ascending.
    """
    rows = join.rows
    sample = np.random.default_rng(1).permutation(len(rows))[: min(MARGIN_SAMPLE, len(rows))]
    # Not the join's own panels: it remembers them, and each is needed once.
    first = load_block(read, rows[:_ROWS_AT_ONCE], machine.device, scan_dtype)
    # Where nearly all pairs are within the reach, fewer rows say as much.
    few = NearestPairs(rows[np.sort(sample[:_FEWEST_SAMPLED])], _NEIGHBOURS)
    block = load_block(read, few.rows, machine.device, scan_dtype)
    proposed = sum(len(edges) for edges in join.search(block, first, reach, few.wanted))
    share = _MOST_PROPOSED / max(1.0, proposed / len(few.rows) * len(rows) / len(first))
    found = NearestPairs(rows[np.sort(sample[: max(_FEWEST_SAMPLED, int(share))])], _NEIGHBOURS)
    block = load_block(read, found.rows, machine.device, scan_dtype)
    for at in range(machine.rank * _ROWS_AT_ONCE, len(rows), machine.size * _ROWS_AT_ONCE):
        panel = load_block(read, rows[at : at + _ROWS_AT_ONCE], machine.device, scan_dtype)
        for edges in join.search(block, panel, reach, found.wanted):
            found.add(edges)
    for edges in machine.gather(found.edges):  # a process adds its own again, which changes nothing
        found.add(edges)
    return found.edges, found.rows


def _assign(
    machine: Machine, read: ReadRows, rows: IntArray, partitions: Partitions, margin: float, reporter: Reporter
) -> tuple[Groups, Groups]:
    """Find the home of every row and the partitions it visits; each process looks at its share of the rows."""
    start, stop = ((machine.rank + np.array([0, 1])) * len(rows) // machine.size).tolist()
    small: type[np.signedinteger[Any]] = np.int32 if len(rows) < 2**31 else np.int64
    parts: list[tuple[RowArray, RowArray, RowArray]] = []
    with reporter.progress("assign", stop - start, "images") as progress:
        for at in range(start, stop, partitions.rows_at_once):
            positions = np.arange(at, min(at + partitions.rows_at_once, stop))
            found = partitions.visits(_load(read, rows[positions], machine.device), margin)
            home, row, visited = (each.cpu().numpy() for each in (found.home, found.row, found.partition))
            parts.append((home.astype(np.int32), visited.astype(np.int32), (row + at).astype(small)))
            progress.advance(len(positions))
    empty = np.empty(0, np.int32)
    mine = tuple(np.concatenate([empty, *each]) for each in zip(*parts, strict=True)) if parts else (empty,) * 3
    home, visited, visitor = (np.concatenate(each) for each in zip(*machine.gather(mine), strict=True))
    homes = Groups(home, np.arange(len(rows)).astype(small), len(partitions))
    return homes, Groups(visited, visitor, len(partitions))


def _load(read: ReadRows, rows: IntArray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(read(rows))).to(device)
