"""From rows to the partitions in which near ones are looked for, the same for any number of processes; and their audit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

from clipcid_cli.algorithms.kmeans.centroids import rows_as_centroids
from clipcid_cli.algorithms.kmeans.lloyd import LloydState, Processes, run_lloyd
from clipcid_cli.algorithms.metrics.intervals import clopper_pearson
from clipcid_cli.algorithms.near.block import read_stored
from clipcid_cli.algorithms.near.cutoff import draw_sample
from clipcid_cli.algorithms.near.exact import HalfArray, IntArray, ReadRows, row_type
from clipcid_cli.algorithms.near.jobs import Jobs, pieces, rectangle
from clipcid_cli.algorithms.near.partitions import (
    NEIGHBOURS,
    SAMPLE_ROWS,
    Partitions,
    default_num_partitions,
    group_rows,
    measure_margin,
)
from clipcid_cli.algorithms.sets.sinks import NearestOf
from clipcid_cli.formats.arrays import Arrays, create_mapped, spool_arrays
from clipcid_cli.formats.embeddings.rows import open_copies
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.groups import copy_rows, temporary_copies
from clipcid_cli.steps.balance.result import Audit
from clipcid_cli.steps.balance.run_search import Search, find_nearest, run_search

# Where this share of all pairs would be compared, all of them may as well be.
_MAX_FRACTION = 0.5
_ENTRIES_AT_ONCE = 2**20
_ROWS_ASSIGNED = {"cpu": 2048, "cuda": 16_384}
# Partitions need no fine centroids, only few rows near their borders.
ROWS_PER_PARTITION = 64
ITERATIONS = 4
# If none of this many kept images has another, the rate is at most 1.3e-4 (95 %).
AUDIT_SAMPLE = 30_000


@contextmanager
def partitioned(run: BalanceRun, searched_to: float) -> Iterator[tuple[Jobs, ReadRows] | None]:
    """Divide unique rows into partitions in which few pairs within a distance are missed, and copy them in this order.

    Yields:
        What to compare, and how to read its rows; None where it would be half of all pairs or more.
    """
    with temporary_copies(run.shared):
        yield _partition(run, searched_to)


def _partition(run: BalanceRun, searched_to: float) -> tuple[Jobs, ReadRows] | None:
    context, rows = run.context, run.rows
    read, unique = rows.read, rows.unique
    partitions = _find_partitions(run)
    count = len(unique)
    sample = draw_sample(count, SAMPLE_ROWS, seed=1)
    neighbours = find_nearest(run, sample, NEIGHBOURS)
    margin, visits = context.on_rank0(measure_margin, partitions, read, unique, sample, neighbours, searched_to)
    if count * count / len(partitions) * (0.5 + visits) > _MAX_FRACTION * count * (count - 1) / 2:
        return None
    reporting.note(
        f"{len(partitions):,} partitions; rows within {margin:.4f} of a border are also compared beyond their own, in "
        f"{visits:.1f} partitions per row."
    )
    parts = run.shared.exchange(_assign_and_copy, run, partitions, margin)
    listed, lengths = run.shared.assemble(_group, run, parts, 2 * len(partitions))

    def locate() -> Arrays:
        place_of = _allocate(run, len(rows))
        place_of[unique] = np.concatenate([places for *_, places in parts])
        return (place_of,)

    (place_of,) = run.shared.publish(locate)
    start, stop = _share(run)
    sizes = context.gather(stop - start)
    copies = context.on_all(open_copies, run.work, sizes, partitions.width)

    def read_copies(numbers: IntArray) -> HalfArray:
        return copies.take(place_of[numbers].astype(np.int64))

    return pieces(listed, np.cumsum(lengths), run.rows_in_memory), read_copies


def _group(run: BalanceRun, parts: list[Arrays], num_lists: int) -> Arrays:
    """Make this process's share of the lists, from the entries of all processes.

    Returns:
        The rows of the lists, one after another, integers [E], and how many each has, int64 [L].
    """
    first, end = run.context.rank_range(num_lists)

    def entries() -> Iterator[tuple[IntArray, IntArray]]:
        for lists, listed, _ in parts:
            for at in range(0, len(lists), _ENTRIES_AT_ONCE):
                some = lists[at : at + _ENTRIES_AT_ONCE]
                own = np.flatnonzero((first <= some) & (some < end))
                yield some[own] - first, listed[at : at + _ENTRIES_AT_ONCE][own]

    return group_rows(entries, end - first, partial(_allocate, run))


def _allocate(run: BalanceRun, length: int) -> IntArray:
    return create_mapped(run.work, np.dtype(run.rows.unique.dtype), (length,), unnamed=True)


def _assign_and_copy(run: BalanceRun, partitions: Partitions, margin: float) -> Arrays:
    """Assign this process's share of the unique rows to partitions, and copy them.

    Returns:
        Entries of rows in lists, of each partition those at home and its visitors: the list and the row of each, integers
        [E]; and the place of each row of the share among the copies of all processes, integers [M].
    """
    unique, device = run.rows.unique, run.context.device
    start, stop = _share(run)
    at_once = _ROWS_ASSIGNED[device.type]
    with reporting.progress("assign", stop - start, "images") as progress:

        def assign() -> Iterator[Arrays]:
            """Yield the homes of rows, and their entries in lists."""
            for at in range(start, stop, at_once):
                numbers = unique[at : min(at + at_once, stop)]
                home_B, row_P, other_P, _ = partitions.visits(read_stored(run.rows.read, numbers, device), margin)
                home, visited, visitor = (column.cpu().numpy() for column in (home_B, other_P, row_P))
                yield home, np.concatenate([2 * home, 2 * visited + 1]), np.concatenate([numbers, numbers[visitor]])
                progress.advance(len(numbers))

        # Some dozens of entries a row: on the disk.
        home, lists, listed = spool_arrays(run.work, (np.int32, np.int32, unique.dtype), assign())
    return lists, listed, _copy(run, home, partitions)


def _share(run: BalanceRun) -> tuple[int, int]:
    """Return this process's share of the unique rows, in whole blocks of those that are assigned together."""
    return run.context.block_range(len(run.rows.unique), _ROWS_ASSIGNED[run.context.device.type])


def _find_partitions(run: BalanceRun) -> Partitions:
    """Find centroids by k-means on a sample of the unique rows; the same on every process."""
    context, unique = run.context, run.rows.unique
    count = default_num_partitions(len(unique))
    reader = _Sample(run, unique[draw_sample(len(unique), ROWS_PER_PARTITION * count, seed=0)])
    # Drawn evenly, so that a crowd is cut into as many as its size asks for.
    centroids_KD = rows_as_centroids(reader, draw_sample(len(reader), count, seed=0))
    states = run_lloyd(
        reader,
        LloydState(centroids_KD),
        iterations=ITERATIONS,
        dtype=run.scan.dtype,
        device=context.device,
        processes=Processes(context.rank_range, context.sum_, context.gather),
    )
    with reporting.progress("partitions", ITERATIONS, "iterations") as progress:
        for state in states:
            centroids_KD = state.centroids_KD
            progress.advance()
    return Partitions(centroids_KD.to(context.device))


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Some rows, as k-means reads them."""

    run: BalanceRun
    rows: IntArray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        return self.run.embeddings.width

    def features(self, numbers: IntArray) -> HalfArray:
        return self.run.rows.read(self.rows[numbers])


def _copy(run: BalanceRun, home: IntArray, partitions: Partitions) -> IntArray:
    """Copy this process's share of the unique rows, partition by partition: the rows of one are then read at once.

    Returns:
        The place of each row of the share, whose homes are given, among the copies of all processes, integers [M].
    """
    rows = run.rows
    start, stop = _share(run)
    places = np.empty(stop - start, row_type(len(rows)))
    places[np.argsort(home, kind="stable")] = np.arange(stop - start)
    copy_rows(run.shared, partitions.width, places, rows.unique[start:stop], rows.read)
    return places + start


def audit_kept(run: BalanceRun, kept: IntArray, threshold: float) -> Audit:
    """Estimate what a search in partitions missed: compare a random sample of the kept rows, ascending, with all of them."""
    sample = np.sort(np.random.default_rng(0).permutation(kept)[:AUDIT_SAMPLE])
    jobs = rectangle(sample, kept, run.rows_in_memory)
    pairs = run_search(run, Search("audit", jobs, run.rows.read, threshold, lambda: NearestOf(sample)))
    near = int(np.count_nonzero(np.isin(sample, np.concatenate([pairs.a, pairs.b]))))
    rate = near / len(sample)
    low, high = (rate, rate) if len(sample) == len(kept) else clopper_pearson(near, len(sample))
    return Audit(len(sample), len(kept), near, low, high, rate)
