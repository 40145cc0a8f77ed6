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
from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import BoolArray, ReadRows
from clipcid_cli.algorithms.near.jobs import Jobs, hash_arrays, triangle
from clipcid_cli.algorithms.sets.forest import ForestSink
from clipcid_cli.formats.results.forest import has_forest
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.linkages import LINKAGES
from clipcid_cli.steps.balance.run_search import Search, find_nearest, run_search
from clipcid_cli.steps.balance.stored_forest import Forest, read_earlier, read_stored, write_stored


@dataclasses.dataclass(frozen=True)
class _Need:
    """How far a forest must be searched: to a distance, or where that is None until it has a number of edges."""

    run: BalanceRun
    searched_to: float | None
    num_edges: int  # at most N − 1

    def is_met(self, forest: Forest) -> bool:
        if self.searched_to is None:
            return len(forest.edges) >= self.num_edges
        return forest.has_all_to(self.searched_to, self.run.rows.num_searched)

    def say_it_is_short(self, forest: Forest) -> None:
        edges = f" and has {len(forest.edges):,} of the {self.num_edges:,} edges needed"
        has = edges if self.searched_to is None else ""
        again = "all pairs are compared" if self.run.settings.neighbors == "exact" else "it is searched again"
        reporting.note(f"The existing forest ends at distance {forest.searched_to:.4f}{has}: {again}.")


def find_forest(run: BalanceRun, *, searched_to: float | None = None, num_edges: int = 0) -> tuple[Forest, bool]:
    """Return a forest that is searched far enough: the stored one, that one extended, or a new one.

    Where the stored forest is of some of the files, only the rows of the others are compared.

    Args:
        searched_to: The distance it must be complete to; None where it must have a number of edges.
        num_edges: That number; at most N − 1.

    Returns:
        The forest, and whether the stored one was searched far enough.
    """
    need = _Need(run, searched_to, num_edges)
    with timed(run.seconds, "search"):
        is_there = run.context.on_rank0(has_forest, run.folder, run.settings.forest_kind)
        stored = read_stored(run) if is_there else None
        if stored is not None and need.is_met(stored):
            return stored, True
        started = time.perf_counter()
        if len(run.rows.unique) > 1:
            reporting.note(f"Near pairs are searched in {run.scan.name} ({run.scan.reason}) and verified in fp64.")
        earlier = read_earlier(run) if is_there and stored is None else None
        # Copies are at distance 0 and no other pairs are, so their edges are the forest up to 0.
        forest = _start(need, stored or Forest(run.rows.copies, 0.0), earlier)
        drops_per_near_row = LINKAGES[run.settings.linkage].drops_per_near_row
        estimator = CutoffEstimator(len(run.rows.unique), partial(find_nearest, run, count=1), drops_per_near_row)
        while not need.is_met(forest):
            if forest.searched_to:
                need.say_it_is_short(forest)
            forest = _search_all(run, forest.edges, _choose_distance(need, forest, estimator))
        # An earlier one that was searched farther stays: it may be extended later.
        if earlier is None or forest.searched_to >= earlier[0].searched_to:
            seconds = time.perf_counter() - started
            run.context.on_rank0(write_stored, run, forest, seconds)
        return forest, False


def _start(need: _Need, forest: Forest, earlier: tuple[Forest, BoolArray] | None) -> Forest:
    """Extend an earlier forest of fewer files where one was searched far enough; else begin with the one given."""
    if earlier is None:
        return forest
    if need.searched_to is not None and earlier[0].searched_to < np.float32(need.searched_to):
        need.say_it_is_short(earlier[0])
        return forest
    return forest if need.is_met(forest) else _search_new(need.run, *earlier)


def _choose_distance(need: _Need, forest: Forest, estimator: CutoffEstimator) -> float:
    """Choose how far to search, after a search that gave too small a forest or none."""
    if need.searched_to is not None:
        return float(np.float32(need.searched_to))
    # The sample holds unique rows, so edges of copies are not counted.
    num_copies = len(need.run.rows.copies)
    return estimator.choose(forest.searched_to, len(forest.edges) - num_copies, need.num_edges - num_copies)


def _search_new(run: BalanceRun, earlier: Forest, is_new: BoolArray) -> Forest:
    """Compare the rows that an earlier forest is not of with all."""
    unique = run.rows.unique
    num_known = np.count_nonzero(~is_new)
    reporting.note(f"A forest of {num_known:,} of the {len(is_new):,} images exists: only the others are compared.")
    new, old = unique[is_new[unique]], unique[~is_new[unique]]
    jobs = triangle(np.concatenate([new, old]), run.rows_in_memory, len(new))
    # As far as it is known, so that nothing of it is lost.
    return _search_forest(run, jobs, run.rows.read, earlier.edges, earlier.searched_to)


def _search_all(run: BalanceRun, known: Edges, searched_to: float) -> Forest:
    """Compare all rows with all, or those that are near in partitions, given some edges of the forest."""
    # At the largest distance only a search of all pairs is sure to find what is missing.
    if run.settings.neighbors == "partitioned" and searched_to < FARTHEST:
        from clipcid_cli.steps.balance.partition import partitioned

        with partitioned(run, searched_to) as divided:
            if divided is not None:
                return _search_forest(run, *divided, known, searched_to)
        reporting.note(f"Up to distance {searched_to:.4f} partitions would save little: all pairs are compared.")
    return _search_forest(run, triangle(run.rows.unique, run.rows_in_memory), run.rows.read, known, searched_to)


def _search_forest(run: BalanceRun, jobs: Jobs, read: ReadRows, known: Edges, searched_to: float) -> Forest:
    # Saved chunks hold only edges that `known` does not rule out, so they are valid for this `known` alone.
    def further_identity() -> str:
        return hash_arrays(known.a, known.b, known.weight)

    search = Search("search", jobs, read, searched_to, partial(ForestSink, len(run.rows), known), further_identity)
    return Forest(run_search(run, search), searched_to)
