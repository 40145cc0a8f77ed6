"""From rows to the partitions in which near ones are looked for; the same on every process and for any number of them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from clipcid_cli.algorithms.near.exact import HalfArray, IntArray, ReadRows, row_type
from clipcid_cli.algorithms.near.partition_margin import measure_margin, sample_neighbours
from clipcid_cli.algorithms.near.partition_training import train_partitions
from clipcid_cli.algorithms.near.partitioned_search import Groups, PartitionedSearch
from clipcid_cli.algorithms.near.partitions import Assignment, Partitions, assign_rows, group_rows
from clipcid_cli.algorithms.near.tiles import TiledSearch
from clipcid_cli.formats.arrays import Arrays, create_unnamed, spool_arrays
from clipcid_cli.formats.embeddings.grouped import create_copy, open_copies
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.reporting import Progress, Reporter
from clipcid_cli.steps.shared_arrays import collect_arrays, share_arrays

# Where this share of all pairs would be compared, all of them may as well be.
_LARGEST_SHARE = 0.5
_ROWS_AT_ONCE = 16_384


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
        folder: Where processes share what they find, and where the rows are copied to: `remove_copies` in the end.
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
        assigned = assign_rows(partitions, read, rows, margin, share=(start, stop), advance=progress.advance)
        home, visited, visitor = machine.on_all(lambda: _spool(folder, assigned, len(rows)))
    with reporter.progress("group", stop - start, "images") as progress:
        places = machine.on_all(lambda: _copy_grouped(machine, folder, read, rows, home, partitions, progress))
    parts = collect_arrays(machine, folder, (home, visited, visitor, places))

    def group() -> Arrays:
        assignments = [Assignment(*part[:3]) for part in parts]
        homes, visitors = group_rows(assignments, len(partitions), partial(_allocate, folder))
        place_of = _allocate(folder, int(rows[-1]) + 1, row_type(len(rows)))
        first = 0
        for *_, part in parts:
            place_of[rows[first : first + len(part)]] = part
            first += len(part)
        return homes.rows, homes.ends, visitors.rows, visitors.ends, place_of

    *lists, place_of = share_arrays(machine, folder, group)
    homes, visitors = Groups(*lists[:2]), Groups(*lists[2:])
    sizes = machine.gather(stop - start)
    copies = machine.on_all(lambda: open_copies(folder, sizes, partitions.width))

    def read_copies(numbers: IntArray) -> HalfArray:
        return copies.take(place_of[numbers].astype(np.int64))

    return PartitionedSearch(read_copies, rows, homes, visitors, machine.device, scan_dtype)


def _copy_grouped(
    machine: Machine,
    folder: Path,
    read: ReadRows,
    rows: IntArray,
    home: IntArray,
    partitions: Partitions,
    progress: Progress,
) -> IntArray:
    """Copy this process's share of the rows, partition by partition: the rows of one are then read at once.

    Args:
        home: Home of each row of the share, int32 [M].

    Returns:
        The place of each among the copies of all processes, integers [M], mapped.
    """
    (start, stop), number = machine.share(len(rows)), len(partitions)
    copies = create_copy(folder, machine.rank, stop - start, partitions.width)
    places = _allocate(folder, stop - start, row_type(len(rows)))
    blocks = [slice(at, min(at + _ROWS_AT_ONCE, stop - start)) for at in range(0, stop - start, _ROWS_AT_ONCE)]
    sizes = sum((np.bincount(home[block], minlength=number) for block in blocks), np.zeros(number, np.int64))
    free = np.cumsum(sizes) - sizes
    for block in blocks:
        counts = np.bincount(home[block], minlength=number)
        place = np.empty(block.stop - block.start, np.int64)
        # Behind those of the blocks before it, in the order of the rows.
        ordered = np.arange(len(place)) + np.repeat(free - (np.cumsum(counts) - counts), counts)
        place[np.argsort(home[block], kind="stable")] = ordered
        copies[place] = read(rows[start + block.start : start + block.stop])
        places[block] = start + place
        free += counts
        progress.advance(len(place))
    if machine.spans_hosts and isinstance(copies, np.memmap):
        copies.flush()
    return places


def _spool(folder: Path, assignments: Iterable[Assignment], num_rows: int) -> Arrays:
    """Write the partitions of rows to files without a name as they are found; a row may visit dozens."""
    found = ((each.home, each.visited, each.visitor) for each in assignments)
    return spool_arrays(folder, (np.int32, np.int32, row_type(num_rows)), found)


def _allocate(folder: Path, length: int, dtype: type[np.signedinteger]) -> IntArray:
    return create_unnamed(folder, np.dtype(dtype), (length,))
