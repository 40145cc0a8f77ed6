"""Searches for near pairs: in one piece on the first process, or where there are more pieces on all, resumable."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from clipcid_cli.algorithms.near.block import load_block
from clipcid_cli.algorithms.near.cutoff import Neighbours, find_neighbours
from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import IntArray, ReadRows
from clipcid_cli.algorithms.near.jobs import Jobs
from clipcid_cli.algorithms.near.search import near_pairs
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun

if TYPE_CHECKING:
    from clipcid_cli.steps.balance.merge import Sink

KEPT = ".references"
"""In the folder of `balance`: what was compared with references, for later runs."""


@dataclasses.dataclass(frozen=True)
class Search:
    """A search for near pairs."""

    label: str  # names it to the user
    jobs: Jobs
    read: ReadRows
    searched_to: float  # largest distance of the pairs that sinks are given, inclusive
    new_sink: Callable[[], Sink]
    # Further text to hash into the name of the saved work, made on the first process; inputs, jobs and distance are in it
    # already.
    further_identity: Callable[[], str] = lambda: ""
    stays: bool = False  # whether its results stay for later runs


def run_search(run: BalanceRun, search: Search) -> Edges:
    """Compare what the jobs name, and return what all found; the same on every process."""
    # One job takes seconds, so nothing of it is saved.
    if len(search.jobs) > 1 or search.stays:
        from clipcid_cli.steps.balance.saved_search import run_chunks

        return run_chunks(run, search)
    return Edges(*run.shared.publish(_compare_at_once, run, search))


def _compare_at_once(run: BalanceRun, search: Search) -> Arrays:
    """Compare the two panels of the only job, or one with itself; of rows that are all alone there is none.

    Returns:
        The rows a and b of the pairs, integers [P], and their distances, float32 [P].
    """
    jobs, sink = search.jobs, search.new_sink()
    with reporting.progress(search.label, jobs.num_pairs, "pairs") as progress:
        for one, other in jobs.of_chunk(0) if len(jobs) else []:
            a = b = load_block(search.read, jobs.panel(one), run.context.device, run.scan.dtype)
            if other != one:
                b = load_block(search.read, jobs.panel(other), run.context.device, run.scan.dtype)
            for edges in near_pairs(a, b, search.searched_to, sink.wants):
                sink.add(edges)
            progress.advance(jobs.num_pairs)
    edges = sink.result()
    return edges.a, edges.b, edges.weight


def forget_searches(folder: Path, but: Collection[str] = ()) -> None:
    """Remove the searches that were kept in the folder of `balance`, but for some by their names."""
    for path in (folder / KEPT).glob("*") if but else [folder / KEPT]:
        if path.name not in but:
            shutil.rmtree(path, ignore_errors=True)


def find_nearest(run: BalanceRun, sample: IntArray, count: int) -> Neighbours:
    """Find so many nearest neighbours of some unique rows, by their places, ascending: each process in its share of all."""
    context, unique = run.context, run.rows.unique
    places = context.rank_range(len(unique))
    own = context.on_all(find_neighbours, run.rows.read, unique, sample, count, context.device, places)
    return Neighbours.nearest(context.gather(own), count)
