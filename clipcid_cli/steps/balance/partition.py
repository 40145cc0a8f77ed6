"""From rows to the partitions in which near ones are looked for; the same on every process and for any number of them."""

from __future__ import annotations

from pathlib import Path

import torch

from clipcid_cli.algorithms.search.distances import ReadRows
from clipcid_cli.algorithms.search.pair_search import TiledSearch
from clipcid_cli.algorithms.search.partition_margin import measure_margin, sample_neighbours
from clipcid_cli.algorithms.search.partition_training import train_partitions
from clipcid_cli.algorithms.search.partitioned_search import Groups, PartitionedSearch
from clipcid_cli.algorithms.search.partitions import Assignment, assign_rows, group_rows
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.shared_arrays import Arrays, collect_arrays, share_arrays

# Where this share of all pairs would be compared, all of them may as well be.
_LARGEST_SHARE = 0.5


def partition_rows(
    machine: Machine,
    folder: Path,
    search: TiledSearch,
    read: ReadRows,
    scan_dtype: torch.dtype,
    reach: float,
    reporter: Reporter,
) -> PartitionedSearch | None:
    """Divide the rows of a search into partitions so that few pairs within `reach` are missed.

    Args:
        folder: Where processes share what they find.
        search: The search of all pairs of rows.
        scan_dtype: Format of the fast product.
        reach: The distance to search to.

    Returns:
        The search of the partitions; None where it would compare half of all pairs or more.
    """
    rows = search.rows
    with reporter.progress("partitions", None, "iterations") as progress:
        partitions = train_partitions(
            read,
            rows,
            machine.device,
            share=machine.share,
            sum_over_processes=machine.sum_,
            gather=machine.gather,
            advance=progress.advance,
        )
    neighbours, sample = sample_neighbours(search, reach, share=machine.share, gather=machine.gather)
    margin, visits = machine.on_main(lambda: measure_margin(partitions, read, neighbours, sample, reach))
    compared = len(rows) * len(rows) / len(partitions) * (0.5 + visits)
    if compared > _LARGEST_SHARE * len(rows) * (len(rows) - 1) / 2:
        return None
    reporter.note(
        f"{len(partitions):,} partitions; rows within {margin:.4f} of a border, {visits:.1f} partitions a row, are compared "
        "beyond their own."
    )
    start, stop = machine.share(len(rows))
    with reporter.progress("assign", stop - start, "images") as progress:
        found = assign_rows(partitions, read, rows, margin, share=(start, stop), advance=progress.advance)
    parts = collect_arrays(machine, folder, (found.home, found.visited, found.visitor))

    def group() -> Arrays:
        homes, visitors = group_rows([Assignment(*part) for part in parts], len(partitions))
        return homes.rows, homes.ends, visitors.rows, visitors.ends

    home_rows, home_ends, visitor_rows, visitor_ends = share_arrays(machine, folder, group)
    homes, visitors = Groups(home_rows, home_ends), Groups(visitor_rows, visitor_ends)
    return PartitionedSearch(read, rows, homes, visitors, machine.device, scan_dtype)
