"""The longest part of `balance`: from mapped embeddings to the single-linkage forest, on all processes."""

from __future__ import annotations

import time
from functools import partial

import numpy as np

from clipcid_cli.algorithms.near.cutoff import FARTHEST, CutoffEstimator
from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import ReadRows
from clipcid_cli.algorithms.near.plan import Plan, hash_arrays, triangle
from clipcid_cli.algorithms.sets.forest import ForestSink
from clipcid_cli.steps.balance.partition import find_sampled, partitioned
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.balance.stored_forest import EarlierForest, Forest, ForestStore
from clipcid_cli.steps.chunks import SearchRun, run_chunks


def find_forest(
    run: SearchRun, store: ForestStore, *, cutoff: float | None = None, num_edges: int = 0, for_stars: bool = False
) -> tuple[Forest, bool]:
    """Return a forest that reaches far enough: the stored one, that one extended, or a new one.

    Where the stored forest is of some of the files, only the rows of the others are compared.

    Args:
        store: Where the forest is stored, and of which rows it is.
        cutoff: The distance it must be complete to; None where it must have a number of edges.
        num_edges: That number; at most N − 1.
        for_stars: Whether stars are to drop so many rows, which takes a larger distance.

    Returns:
        The forest, and whether the stored one reached far enough.
    """
    started, rows, note = time.perf_counter(), store.rows, run.reporter.note

    def is_enough(forest: Forest) -> bool:
        if len(forest.edges) == rows.num_searched - 1:
            return True
        return len(forest.edges) >= num_edges if cutoff is None else forest.cutoff >= float(np.float32(cutoff))

    def say_it_is_short(forest: Forest) -> None:
        has = "" if cutoff is not None else f" and has {len(forest.edges):,} of the {num_edges:,} edges needed"
        again = "all pairs are compared" if store.neighbors == "exact" else "it is searched again"
        note(f"The forest that is there ends at distance {forest.cutoff:.4f}{has}: {again}.")

    stored = store.read(run.machine)
    if stored is not None and is_enough(stored):
        return stored, True
    # Copies are at distance 0 and no other pairs are, so their edges are the forest up to 0.
    forest = stored or Forest(rows.copies, 0.0)
    if len(rows.unique) > 1:
        note(f"Near pairs are searched in {run.scan.name} ({run.scan.reason}) and verified in fp64.")
    earlier = None if stored is not None else store.read_earlier(run.machine, run.reporter)
    if earlier is not None and cutoff is not None and earlier.cutoff < np.float32(cutoff):
        say_it_is_short(earlier)
    elif earlier is not None and not is_enough(forest):
        forest = _search_new(run, rows, earlier)
    estimator = CutoffEstimator(len(rows.unique), partial(find_sampled, run, rows, 1), for_stars)
    while not is_enough(forest):
        if forest.cutoff:
            say_it_is_short(forest)
        # The sample holds unique rows, so edges of copies are not counted.
        found, needed = (number - len(rows.copies) for number in (len(forest.edges), num_edges))
        reach = estimator.choose(forest.cutoff, found, needed) if cutoff is None else float(np.float32(cutoff))
        forest = _search_all(run, store, forest.edges, reach)
    if earlier is None or forest.cutoff >= earlier.cutoff:  # the earlier one stays where it may be extended later
        seconds = time.perf_counter() - started
        run.machine.on_main(lambda: store.write(forest, seconds))
    return forest, False


def _search_new(run: SearchRun, rows: BalanceRows, earlier: EarlierForest) -> Forest:
    """Compare the rows that an earlier forest is not of with all."""
    number = np.count_nonzero(~earlier.is_new)
    run.reporter.note(f"A forest of {number:,} of the {len(rows):,} images exists: only the others are compared.")
    is_new = earlier.is_new[rows.unique]
    new, old = rows.unique[is_new], rows.unique[~is_new]
    plan = triangle(np.concatenate([new, old]), run.rows_in_memory, len(new))
    # As far as it is known, so that nothing of it is lost.
    return _search(run, rows, plan, rows.read, earlier.edges, earlier.cutoff)


def _search_all(run: SearchRun, store: ForestStore, known: Edges, reach: float) -> Forest:
    """Compare all rows with all, or those that are near in partitions, given some edges of the forest."""
    rows = store.rows
    # At the largest distance only a search of all pairs is sure to find what is missing.
    if store.neighbors == "partitioned" and reach < FARTHEST:
        with partitioned(run, rows, reach) as found:
            if found is not None:
                return _search(run, rows, *found, known, reach)
        run.reporter.note(f"Up to distance {reach:.4f} partitions would save little: all pairs are compared.")
    plan = triangle(rows.unique, run.rows_in_memory)
    return _search(run, rows, plan, rows.read, known, reach)


def _search(run: SearchRun, rows: BalanceRows, plan: Plan, read: ReadRows, known: Edges, reach: float) -> Forest:
    # What is saved leaves out what is known, and what that rules out.
    beside = run.machine.on_main(lambda: hash_arrays(known.a, known.b, known.weight))
    edges = run_chunks(run, plan, read, reach, lambda: ForestSink(len(rows), known), "search", of=beside)
    return Forest(edges, reach)
