"""The longest part of `balance`: from mapped embeddings to the single-linkage forest, on all processes; or from the disk.

A stored forest is of these rows, or of fewer files, from which that of all of them follows: MSF(A ∪ B) = MSF(MSF(A) ∪ B) for
the pairs B that have a new row. Files may have been added anywhere: rows keep their order, so ties are broken as before.
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial

import numpy as np

from clipcid_cli.algorithms.near.cutoff import FARTHEST, CutoffEstimator
from clipcid_cli.algorithms.near.edges import Edges, merge_edges
from clipcid_cli.algorithms.near.exact import BoolArray, ReadRows, row_type
from clipcid_cli.algorithms.near.plan import Plan, hash_arrays, triangle
from clipcid_cli.algorithms.sets.forest import ForestSink
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.fingerprint import find_lost
from clipcid_cli.formats.output import OutputSpec
from clipcid_cli.formats.results.forest import (
    ROW_FILES,
    ForestSidecar,
    RowFile,
    StoredForest,
    find_earlier,
    forest_spec,
    read_forest,
    read_row_files,
    row_files_path,
    write_forest,
)
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.search import Search, find_nearest, run_chunks


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
    estimator = CutoffEstimator(len(rows.unique), partial(find_nearest, run, count=1), for_stars)
    while not is_enough(forest):
        if forest.cutoff:
            say_it_is_short(forest)
        # The sample holds unique rows, so edges of copies are not counted.
        if cutoff is None:
            num_copies = len(rows.copies)
            reach = estimator.choose(forest.cutoff, len(forest.edges) - num_copies, num_edges - num_copies)
        else:
            reach = float(np.float32(cutoff))
        forest = _search_all(run, forest.edges, reach)
    if earlier is None or forest.cutoff >= earlier[0].cutoff:  # the earlier one stays where it may be extended later
        seconds = time.perf_counter() - started
        run.context.on_rank0(lambda: _write(run, forest, seconds))
    return forest, False


def _search_new(run: BalanceRun, earlier: Forest, is_new: BoolArray) -> Forest:
    """Compare the rows that an earlier forest is not of with all."""
    unique = run.rows.unique
    num_known = np.count_nonzero(~is_new)
    reporting.note(f"A forest of {num_known:,} of the {len(is_new):,} images exists: only the others are compared.")
    new, old = unique[is_new[unique]], unique[~is_new[unique]]
    plan = triangle(np.concatenate([new, old]), run.rows_in_memory, len(new))
    # As far as it is known, so that nothing of it is lost.
    return _search(run, plan, run.rows.read, earlier.edges, earlier.cutoff)


def _search_all(run: BalanceRun, known: Edges, reach: float) -> Forest:
    """Compare all rows with all, or those that are near in partitions, given some edges of the forest."""
    # At the largest distance only a search of all pairs is sure to find what is missing.
    if run.settings.neighbors == "partitioned" and reach < FARTHEST:
        from clipcid_cli.steps.balance.partition import partitioned

        with partitioned(run, reach) as divided:
            if divided is not None:
                return _search(run, *divided, known, reach)
        reporting.note(f"Up to distance {reach:.4f} partitions would save little: all pairs are compared.")
    return _search(run, triangle(run.rows.unique, run.rows_in_memory), run.rows.read, known, reach)


def _search(run: BalanceRun, plan: Plan, read: ReadRows, known: Edges, reach: float) -> Forest:
    # What is saved leaves out what is known, and what that rules out.
    def beside() -> str:
        return hash_arrays(known.a, known.b, known.weight)

    search = Search("search", plan, read, reach, lambda: ForestSink(len(run.rows), known), beside)
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

    stored = run.shared.publish(read)
    return Forest(Edges(*stored[:3]), float(stored[3][0])) if stored else None


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
                "The existing forest cannot be extended, since its files are not all there, unchanged and in the "
                f"same order{lost and f' ({lost})'}: all pairs are compared."
            )
            return ()
        rows = np.flatnonzero(~is_new).astype(row_type(len(is_new)))
        edges, _ = merge_edges(Edges(rows[stored.a], rows[stored.b], stored.distance), run.rows.copies)
        return edges.a, edges.b, edges.weight, np.array([stored.cutoff]), is_new

    arrays = run.shared.publish(read)
    return (Forest(Edges(*arrays[:3]), float(arrays[3][0])), arrays[4]) if arrays else None


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
