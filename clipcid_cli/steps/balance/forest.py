"""The longest part of `balance`: from mapped embeddings to the single-linkage forest, on all processes; or from the disk.

A stored forest is of these rows, or of fewer files, from which that of all of them follows: MSF(A ∪ B) = MSF(MSF(A) ∪ B) for
the pairs B that have a new row. Files may have been added anywhere: rows keep their order, so ties are broken as before.

All pairs are compared, or those in partitions, which are the same for any number of processes, and whose losses are audited.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

from clipcid_cli.algorithms.kmeans.centroids import rows_as_centroids
from clipcid_cli.algorithms.kmeans.lloyd import LloydState, Processes, run_lloyd
from clipcid_cli.algorithms.metrics.intervals import clopper_pearson
from clipcid_cli.algorithms.near.block import read_stored
from clipcid_cli.algorithms.near.cutoff import FARTHEST, CutoffEstimator, Neighbours, draw_sample, find_neighbours
from clipcid_cli.algorithms.near.edges import Edges, merge_edges
from clipcid_cli.algorithms.near.exact import BoolArray, HalfArray, IntArray, ReadRows, row_type
from clipcid_cli.algorithms.near.partitions import (
    NEIGHBOURS,
    SAMPLE_ROWS,
    Partitions,
    default_num_partitions,
    group_rows,
    measure_margin,
)
from clipcid_cli.algorithms.near.plan import Plan, hash_arrays, pieces, rectangle, triangle
from clipcid_cli.algorithms.sets.forest import ForestSink
from clipcid_cli.algorithms.sets.sinks import NearestOf
from clipcid_cli.formats.arrays import Arrays, create_mapped, spool_arrays
from clipcid_cli.formats.embeddings.rows import create_copy, open_copies, remove_copies
from clipcid_cli.formats.fingerprint import find_lost
from clipcid_cli.formats.output import OutputSpec
from clipcid_cli.formats.results.forest import (
    ROW_FILES,
    RowFile,
    StoredForest,
    find_earlier,
    forest_spec,
    read_forest,
    read_row_files,
    row_files_path,
    write_forest,
)
from clipcid_cli.formats.sidecar import ForestSidecar
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.chunks import Search, run_chunks
from clipcid_cli.steps.balance.result import Audit

# Where this share of all pairs would be compared, all of them may as well be.
_MAX_FRACTION = 0.5
_ROWS_AT_ONCE = 16_384
_ENTRIES_AT_ONCE = 2**20
_ROWS_ASSIGNED = {"cpu": 2048, "cuda": 16_384}
# Partitions need no fine centroids, only few rows near their borders.
ROWS_PER_PARTITION = 64
ITERATIONS = 4
# If none of this many kept images has another, the rate is at most 1.3e-4 (95 %).
AUDIT_SAMPLE = 30_000


@dataclasses.dataclass(frozen=True)
class Forest:
    """The ascending edges of a forest that is complete up to a distance; after a search in partitions it may lack some."""

    edges: Edges
    cutoff: float


def find_forest(run: BalanceRun, *, cutoff: float | None = None, num_edges: int = 0) -> tuple[Forest, bool]:
    """Return a forest that reaches far enough: the stored one, that one extended, or a new one.

    Where the stored forest is of some of the files, only the rows of the others are compared.

    Args:
        cutoff: The distance it must be complete to; None where it must have a number of edges.
        num_edges: That number; at most N − 1.

    Returns:
        The forest, and whether the stored one reached far enough.
    """
    with timed(run.seconds, "search"):
        return _find(run, cutoff, num_edges)


def _find(run: BalanceRun, cutoff: float | None, num_edges: int) -> tuple[Forest, bool]:
    started = time.perf_counter()
    rows = run.rows
    settings = run.settings
    note = reporting.note

    def is_enough(forest: Forest) -> bool:
        if len(forest.edges) == rows.num_searched - 1:
            return True
        return len(forest.edges) >= num_edges if cutoff is None else forest.cutoff >= float(np.float32(cutoff))

    def say_it_is_short(forest: Forest) -> None:
        has = "" if cutoff is not None else f" and has {len(forest.edges):,} of the {num_edges:,} edges needed"
        again = "all pairs are compared" if settings.neighbors == "exact" else "it is searched again"
        note(f"The existing forest ends at distance {forest.cutoff:.4f}{has}: {again}.")

    stored = _read(run)
    if stored is not None and is_enough(stored):
        return stored, True
    # Copies are at distance 0 and no other pairs are, so their edges are the forest up to 0.
    forest = stored or Forest(rows.copies, 0.0)
    if len(rows.unique) > 1:
        note(f"Near pairs are searched in {run.scan.name} ({run.scan.reason}) and verified in fp64.")
    earlier = None if stored is not None else _read_earlier(run)
    if earlier is not None and cutoff is not None and earlier[0].cutoff < np.float32(cutoff):
        say_it_is_short(earlier[0])
    elif earlier is not None and not is_enough(forest):
        forest = _search_new(run, *earlier)
    for_stars = settings.linkage == "star"
    estimator = CutoffEstimator(len(rows.unique), partial(find_sampled, run, count=1), for_stars)
    while not is_enough(forest):
        if forest.cutoff:
            say_it_is_short(forest)
        # The sample holds unique rows, so edges of copies are not counted.
        found, needed = (number - len(rows.copies) for number in (len(forest.edges), num_edges))
        reach = estimator.choose(forest.cutoff, found, needed) if cutoff is None else float(np.float32(cutoff))
        forest = _search_all(run, forest.edges, reach)
    if earlier is None or forest.cutoff >= earlier[0].cutoff:  # the earlier one stays where it may be extended later
        seconds = time.perf_counter() - started
        run.context.on_rank0(lambda: _write(run, forest, seconds))
    return forest, False


def _search_new(run: BalanceRun, earlier: Forest, is_new: BoolArray) -> Forest:
    """Compare the rows that an earlier forest is not of with all."""
    unique = run.rows.unique
    number = np.count_nonzero(~is_new)
    reporting.note(f"A forest of {number:,} of the {len(is_new):,} images exists: only the others are compared.")
    new, old = unique[is_new[unique]], unique[~is_new[unique]]
    plan = triangle(np.concatenate([new, old]), run.rows_in_memory, len(new))
    # As far as it is known, so that nothing of it is lost.
    return _search(run, plan, run.rows.read, earlier.edges, earlier.cutoff)


def _search_all(run: BalanceRun, known: Edges, reach: float) -> Forest:
    """Compare all rows with all, or those that are near in partitions, given some edges of the forest."""
    # At the largest distance only a search of all pairs is sure to find what is missing.
    if run.settings.neighbors == "partitioned" and reach < FARTHEST:
        with partitioned(run, reach) as found:
            if found is not None:
                return _search(run, *found, known, reach)
        reporting.note(f"Up to distance {reach:.4f} partitions would save little: all pairs are compared.")
    return _search(run, triangle(run.rows.unique, run.rows_in_memory), run.rows.read, known, reach)


def _search(run: BalanceRun, plan: Plan, read: ReadRows, known: Edges, reach: float) -> Forest:
    # What is saved leaves out what is known, and what that rules out.
    beside = run.context.on_rank0(lambda: hash_arrays(known.a, known.b, known.weight))
    search = Search("search", plan, read, reach, lambda: ForestSink(len(run.rows), known), of=beside)
    return Forest(run_chunks(run, search), reach)


def _spec(run: BalanceRun) -> OutputSpec[ForestSidecar]:
    """Ask for the forest of these rows."""
    inputs = [*run.output.spec.inputs, *run.rows.describe_choice()]
    return forest_spec(run.folder, inputs, run.settings.forest_kind, overwrite=run.settings.overwrite)


def _read(run: BalanceRun) -> Forest | None:
    """Read the forest, if one of these rows is stored; the same on every process."""

    def read() -> Arrays:
        stored = read_forest(_spec(run))
        return () if stored is None else (stored.a, stored.b, stored.distance, np.array([stored.cutoff]))

    found = run.shared.publish(read)
    return Forest(Edges(*found[:3]), float(found[3][0])) if found else None


def _read_earlier(run: BalanceRun) -> tuple[Forest, BoolArray] | None:
    """Read the exact forest of fewer files where all of them are still there, in order; the same on every process.

    Returns:
        The forest, with the edges of all copies, in the numbers of all rows; and which rows it is not of, bool [N].
    """
    if run.settings.forest_kind != "exact":
        return None

    def read() -> Arrays:
        spec = _spec(run)
        sidecar = find_earlier(spec)
        if sidecar is None or not sidecar.cutoff:
            return ()
        fix = "Add --overwrite to search the forest again."
        paths = (run.work / ROW_FILES, row_files_path(run.folder, "exact"))
        files, earlier = ([file for file in read_row_files(path, fix) if file.rows is not None] for path in paths)
        is_new = _find_new(run, files, earlier)
        lost = find_lost(earlier, files)
        stored = read_forest(dataclasses.replace(spec, inputs=sidecar.inputs))
        if lost or stored is None or stored.num_rows != np.count_nonzero(~is_new):
            reporting.note(
                "The existing forest cannot be extended, since its files are not all there, unchanged and in that "
                f"order{lost and f' ({lost})'}: all pairs are compared."
            )
            return ()
        rows = np.flatnonzero(~is_new).astype(row_type(len(is_new)))
        edges, _ = merge_edges(Edges(rows[stored.a], rows[stored.b], stored.distance), run.rows.copies)
        return edges.a, edges.b, edges.weight, np.array([stored.cutoff]), is_new

    found = run.shared.publish(read)
    return (Forest(Edges(*found[:3]), float(found[3][0])), found[4]) if found else None


def _find_new(run: BalanceRun, files: list[RowFile], earlier: list[RowFile]) -> BoolArray:
    """Return which rows are of none of the earlier files, bool [N]."""
    numbers = run.rows.numbers
    is_new = np.ones(len(numbers), np.bool_)
    left = iter(earlier)
    end = 0
    known = next(left, None)
    for file in files:
        start, end = end, end + (file.rows or 0)
        if known is not None and file.content == known.content:
            is_new[slice(*np.searchsorted(numbers, np.array([start, end], numbers.dtype)))] = False
            known = next(left, None)
    return is_new


def _write(run: BalanceRun, forest: Forest, seconds: float) -> None:
    """Write a forest that took so long to search."""
    edges = forest.edges
    stored = StoredForest(edges.a, edges.b, edges.weight, forest.cutoff, len(run.rows))
    write_forest(_spec(run), stored, run.work / ROW_FILES, {"search": seconds})


@contextmanager
def partitioned(run: BalanceRun, reach: float) -> Iterator[tuple[Plan, ReadRows] | None]:
    """Divide unique rows into partitions so that few pairs within `reach` are missed, and copy them partition by partition.

    Yields:
        What to compare, and how to read its rows; None where it would be half of all pairs or more.
    """
    try:
        yield _partition(run, reach)
        run.context.barrier()
    finally:
        if run.context.is_main:
            remove_copies(run.work)


def _partition(run: BalanceRun, reach: float) -> tuple[Plan, ReadRows] | None:
    context, rows = run.context, run.rows
    read, unique = rows.read, rows.unique
    partitions = _find_partitions(run)
    number = len(unique)
    sample = draw_sample(number, SAMPLE_ROWS, seed=1)
    start, stop = context.rank_range(number)
    neighbours = find_sampled(run, sample, NEIGHBOURS)
    margin, visits = context.on_rank0(lambda: measure_margin(partitions, read, unique, sample, neighbours, reach))
    if number * number / len(partitions) * (0.5 + visits) > _MAX_FRACTION * number * (number - 1) / 2:
        return None
    reporting.note(
        f"{len(partitions):,} partitions; rows within {margin:.4f} of a border, {visits:.1f} partitions a row, are compared "
        "beyond their own."
    )
    with reporting.progress("assign", stop - start, "images") as progress:

        def assign() -> Iterator[Arrays]:
            """Yield homes of rows, and entries of rows in lists: of each partition, those at home and its visitors."""
            at_once = _ROWS_ASSIGNED[context.device.type]
            for at in range(start, stop, at_once):
                numbers = unique[at : min(at + at_once, stop)]
                home_B, row_P, other_P, _ = partitions.visits(read_stored(read, numbers, context.device), margin)
                home, visited, visitor = (each.cpu().numpy() for each in (home_B, other_P, row_P))
                yield home, np.concatenate([2 * home, 2 * visited + 1]), np.concatenate([numbers, numbers[visitor]])
                progress.advance(len(numbers))

        # Some dozens of entries a row: on the disk.
        assigned = context.on_all(lambda: spool_arrays(run.work, (np.int32, np.int32, unique.dtype), assign()))
    places = context.on_all(lambda: _copy_by_partition(run, assigned[0], partitions))
    parts = run.shared.collect((*assigned[1:], places))

    def allocate(length: int) -> IntArray:
        return create_mapped(run.work, np.dtype(unique.dtype), (length,), unnamed=True)

    def entries() -> Iterator[tuple[IntArray, IntArray]]:
        for lists, listed, _ in parts:
            for at in range(0, len(lists), _ENTRIES_AT_ONCE):
                yield lists[at : at + _ENTRIES_AT_ONCE], listed[at : at + _ENTRIES_AT_ONCE]

    def group() -> Arrays:
        place_of = allocate(len(rows))
        place_of[unique] = np.concatenate([places for *_, places in parts])
        return *group_rows(entries, 2 * len(partitions), allocate), place_of

    listed, ends, place_of = run.shared.publish(group)
    sizes = context.gather(stop - start)
    copies = context.on_all(lambda: open_copies(run.work, sizes, partitions.width))

    def read_copies(numbers: IntArray) -> HalfArray:
        return copies.take(place_of[numbers].astype(np.int64))

    return pieces(listed, ends, run.rows_in_memory), read_copies


def find_sampled(run: BalanceRun, sample: IntArray, count: int) -> Neighbours:
    """Find so many nearest neighbours of some unique rows, by their places, ascending: each process in its share of all."""
    context, unique = run.context, run.rows.unique
    own = context.rank_range(len(unique))
    found = context.on_all(lambda: find_neighbours(run.rows.read, unique, sample, count, context.device, own))
    return Neighbours.nearest(context.gather(found), count)


def _find_partitions(run: BalanceRun) -> Partitions:
    """Find centroids by k-means on a sample of the unique rows; the same on every process."""
    context, unique = run.context, run.rows.unique
    number = default_num_partitions(len(unique))
    reader = _Sample(run, unique[draw_sample(len(unique), ROWS_PER_PARTITION * number, seed=0)])
    # Drawn evenly, so that a crowd is cut into as many as its size asks for.
    centroids_KD = rows_as_centroids(reader, draw_sample(len(reader), number, seed=0))
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


def _copy_by_partition(run: BalanceRun, home: IntArray, partitions: Partitions) -> IntArray:
    """Copy this process's share of the unique rows, partition by partition: the rows of one are then read at once.

    Returns:
        The place of each row of the share, whose homes are given, among the copies of all processes, integers [M].
    """
    rows = run.rows
    start, stop = run.context.rank_range(len(rows.unique))
    copies = create_copy(run.work, run.context.rank, stop - start, partitions.width)
    places = np.empty(stop - start, row_type(len(rows)))
    places[np.argsort(home, kind="stable")] = np.arange(stop - start)
    with reporting.progress("group", stop - start, "images") as progress:
        for at in range(0, stop - start, _ROWS_AT_ONCE):
            numbers = rows.unique[start + at : min(start + at + _ROWS_AT_ONCE, stop)]
            copies[places[at : at + len(numbers)]] = rows.read(numbers)
            progress.advance(len(numbers))
    if run.context.spans_hosts and isinstance(copies, np.memmap):
        copies.flush()
    return places + start


def audit_kept(run: BalanceRun, kept: IntArray, cutoff: float) -> Audit:
    """Estimate what a search in partitions missed: compare a random sample of the kept rows, ascending, with all of them."""
    sample = np.sort(np.random.default_rng(0).permutation(kept)[:AUDIT_SAMPLE])
    plan = rectangle(sample, kept, run.rows_in_memory)
    found = run_chunks(run, Search("audit", plan, run.rows.read, cutoff, lambda: NearestOf(sample)))
    near = int(np.count_nonzero(np.isin(sample, np.concatenate([found.a, found.b]))))
    rate = near / len(sample)
    low, high = (rate, rate) if len(sample) == len(kept) else clopper_pearson(near, len(sample))
    return Audit(len(sample), len(kept), near, low, high, rate)
