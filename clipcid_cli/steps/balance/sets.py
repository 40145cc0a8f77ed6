"""From the forest to sets of near images, each with the one image that is kept.

Why the threshold ε of ``--keep`` is exact, with N searched rows of which k = `num_requested` are to be kept:

1. Sets of single linkage at ε are the components of the minimum spanning forest without its edges longer than ε
   (`algorithms/sets/forest.py`). A forest of E edges has N − E components, so N − k edges leave k sets: ε is the weight of
   edge N − k of the ascending forest, which `find_forest` extends until it has that many.
2. The forest is that of all pairs up to where it was searched: a low-precision product leaves out only pairs that a proven
   bound rules out (`algorithms/near/block.py`), and the distance of any other is one number, rounded once, on every machine
   (`algorithms/near/exact.py`). Copies are joined by edges of weight 0. Only ``--neighbors partitioned`` may lack pairs.
3. Edges that tie with edge N − k are within ε as well, and all of them merge: fewer than k images may then be kept.
4. k is ``keep · N`` rounded to a whole number, a half to the even one, and at least 1.

What stars keep does not always shrink as ε grows. So theirs is bisected from the ε of single linkage on, and it is only
certain that the next smaller distance *tried* keeps more than k (`find_cover_threshold`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import BoolArray, FloatArray, IntArray, row_type
from clipcid_cli.algorithms.sets.components import connected_components
from clipcid_cli.algorithms.sets.covers import count_kept, is_own_representative
from clipcid_cli.algorithms.sets.forest import Curve, forest_curve
from clipcid_cli.algorithms.sets.representatives import (
    best_rows,
    central_rows,
    distances_to,
    find_diameters,
    medoid_rows,
    ratio_beyond,
)
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.results.forest import SetTable
from clipcid_cli.runtime.pipeline import Background
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.find_forest import find_forest
from clipcid_cli.steps.balance.groups import Groups, Share, find_places, work_on_groups
from clipcid_cli.steps.balance.linkages import LINKAGES
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.balance.stored_forest import Forest

# Rules of --select that look at the rows of a set; the others score each image by itself.
_BY_ROWS = ("central", "medoid")
# What took longer to measure is saved: hundreds of millions of rows are read for it.
_LONG_SECONDS = 60.0
MEASURED = ".sets"
"""In the folder of unfinished work: what was saved of it."""


@dataclasses.dataclass(frozen=True)
class Sets:
    """Which images are near each other, and which one of each set is kept."""

    labels: IntArray  # the smallest row of each row's set, integers [N]; a row that filters dropped is a set of its own
    # The representative of each row, itself where it is kept, integers [N]; −1 for what filters dropped.
    representatives: IntArray
    distances: FloatArray  # distance to it, float32 [N]
    threshold: float | None  # the cut-off; None when nothing was to be merged
    curve: Curve
    num_kept: int
    largest: int  # size of the largest set
    table: SetTable  # what is measured of every set of two or more
    uncovered_ratio: float  # share of the dropped repeats that are farther than the cut-off from their representative

    @property
    def kept(self) -> BoolArray:
        """Which rows are kept, bool [N]."""
        return is_own_representative(self.representatives)


@dataclasses.dataclass(frozen=True)
class Division:
    """How rows are divided into sets, the same on every process."""

    labels: IntArray  # as of `Sets`
    # The representative of each row, integers [N]; None where the linkage leaves the choice to ``--select``.
    representatives: IntArray | None
    threshold: float | None
    make_curve: Callable[[], Curve]


def divide(run: BalanceRun) -> tuple[Division, Forest, bool]:
    """Divide the searched rows into the sets that the settings ask for; the same on every process.

    Returns:
        The sets, the forest they are made from, and whether it was there already.
    """
    settings, num_kept = run.settings, run.num_requested
    num_edges = run.rows.num_searched - num_kept
    forest, reused = find_forest(run, searched_to=settings.distance, num_edges=num_edges)
    threshold = settings.distance
    if threshold is None and num_edges:
        threshold = float(forest.edges.weight[num_edges - 1])
    if threshold is None:
        division = _keep_all(run, forest.edges)
    else:
        searched_to = forest.searched_to
        linkage = LINKAGES[settings.linkage]
        needed = num_kept if settings.distance is None else None
        division, forest = linkage.divide(run, forest, shortest_decimal(threshold), needed)
        if division.representatives is None and settings.select not in _BY_ROWS:
            division = _choose_by_score(run, division)
        reused = reused and forest.searched_to == searched_to
    return division, forest, reused


def shortest_decimal(distance: float) -> float:
    """Return the number with the fewest digits that is the same float32: 0.447 rather than 0.44699999690055847."""
    return float(str(np.float32(distance)))


def single_curve(rows: BalanceRows, forest: Edges, threshold: float | None) -> Curve:
    """Return what single linkage keeps of the searched rows over the cut-off, as far as the forest reaches."""
    curve = forest_curve(len(rows), forest, threshold)
    return dataclasses.replace(curve, kept=curve.kept - (len(rows) - rows.num_searched))


def measure_sets(run: BalanceRun, division: Division) -> Sets:
    """Choose representatives where there are none yet, and measure the sets; rows that filters dropped have none."""
    threshold = division.threshold
    curves = list[Curve]()
    with Background() as background:
        if run.context.is_main:
            background.start(lambda: curves.append(division.make_curve()))
        measured = _load_measured(run, division) or _measure_all(run, division)
    representatives_N, distances_N, *columns = measured
    table = SetTable(*columns)
    num_kept = count_kept(representatives_N)
    beyond = 0.0
    if threshold is not None:
        beyond = ratio_beyond(distances_N, threshold, run.rows.num_searched - num_kept)
    return Sets(
        labels=division.labels,
        representatives=representatives_N,
        distances=distances_N,
        threshold=threshold,
        curve=run.context.on_rank0(curves.pop),
        num_kept=num_kept,
        largest=int(table.size.max(initial=1)),
        table=table,
        uncovered_ratio=beyond,
    )


def _load_measured(run: BalanceRun, division: Division) -> Arrays:
    """Load what a killed run has measured where that took long, as `_measure_all` returns it; nothing where none did."""
    if not run.context.on_rank0((run.work / MEASURED).is_dir):
        return ()
    from clipcid_cli.steps.balance.saved_sets import load_measured

    return run.shared.publish(load_measured, run, division)


def _measure_all(run: BalanceRun, division: Division) -> Arrays:
    """Measure the sets, each process some; the same on every process.

    Returns:
        The representative of each row, integers [N], and its distance to it, float32 [N]; then the columns of the table.
    """
    rows, labels = run.rows, division.labels
    began = time.monotonic()
    groups = Groups(*run.shared.publish(Groups.from_sets, labels))
    is_unique = np.zeros(len(rows), np.bool_)
    is_unique[rows.unique] = True
    measure = partial(_measure, run, division.representatives, is_unique)
    parts = work_on_groups(run.shared, rows.images, rows.numbers, groups, measure)

    def join() -> Arrays:
        members, is_first = groups.rows, groups.bounds[:-1]
        chosen, distance, farthest, diameter, is_exact = map(np.concatenate, zip(*parts, strict=True))
        representatives_N = labels.copy()
        representatives_N[members] = chosen
        if rows.is_searched is not None:
            representatives_N = np.where(rows.is_searched, representatives_N, labels.dtype.type(-1))
        distances_N = np.zeros(len(labels), np.float32)
        distances_N[members] = distance
        farthest_distance = distances_N[farthest]
        sizes = np.diff(groups.bounds)
        table = (members[is_first], sizes, chosen[is_first], farthest, farthest_distance, diameter, is_exact)
        arrays = (representatives_N, distances_N, *table)
        if time.monotonic() > began + _LONG_SECONDS:
            from clipcid_cli.steps.balance.saved_sets import save_measured

            save_measured(run, division, arrays)
        return arrays

    return run.shared.publish(join)


def _measure(run: BalanceRun, representatives: IntArray | None, is_unique: BoolArray, share: Share) -> Arrays:
    """Measure some sets.

    Args:
        representatives: The representative of each row, integers [N]; None where the rows of a set decide which it is.
        is_unique: Which rows are no copies, bool [N].

    Returns:
        The representative of each row, integers [M], and its distance, float32 [M]; of each set the row farthest from it,
        integers [S], its diameter, float32 [S], and whether that is exact, bool [S].
    """
    if representatives is not None:
        chosen = find_places(share.rows)(representatives[share.rows])
    elif run.settings.select == "medoid":
        chosen = medoid_rows(share.read, share.labels, run.context.device)
    else:
        chosen = central_rows(share.read, share.labels)
    distances = distances_to(share.read, chosen)
    largest = np.maximum.reduceat(distances, share.starts) if len(share.starts) else distances
    at_largest = np.flatnonzero(distances == np.repeat(largest, share.sizes))
    farthest = at_largest[np.searchsorted(at_largest, share.starts)]
    unique = np.flatnonzero(is_unique[share.rows])  # copies are at distance 0 of each other
    diameter, is_exact = find_diameters(share.read, unique, share.labels[unique], share.starts, run.context.device)
    return share.rows[chosen], distances, share.rows[farthest], diameter, is_exact


def _keep_all(run: BalanceRun, forest: Edges) -> Division:
    """Merge nothing, not even copies: each row is a set of its own."""
    num_rows = len(run.rows)
    labels = np.arange(num_rows, dtype=row_type(num_rows))
    return Division(labels, None, None, partial(single_curve, run.rows, forest, None))


def divide_by_components(
    run: BalanceRun, forest: Forest, threshold: float, num_kept: int | None
) -> tuple[Division, Forest]:
    """Single linkage: the components of the forest up to the threshold, at which it keeps as many as are asked for."""

    def label() -> Arrays:
        merged = forest.edges.up_to(threshold)
        return (connected_components(len(run.rows), merged.a, merged.b),)

    (labels,) = run.shared.publish(label)
    return Division(labels, None, threshold, partial(single_curve, run.rows, forest.edges, threshold)), forest


def _choose_by_score(run: BalanceRun, division: Division) -> Division:
    """Choose the representative of each set by a score of each image."""
    labels = division.labels

    def choose() -> Arrays:
        from clipcid_cli.steps.balance.scores import SCORES

        scores = np.zeros(len(labels))
        # The rows of sets of two or more: the others need no score.
        members = np.flatnonzero(np.bincount(labels, minlength=len(labels))[labels] > 1)
        scores[members] = SCORES[run.settings.select](run, members)
        return (best_rows(scores, labels),)

    (representatives,) = run.shared.publish(choose)
    return dataclasses.replace(division, representatives=representatives)
