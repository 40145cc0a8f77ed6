"""From the forest to sets of near images, each with the one image that is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import BoolArray, FloatArray, IntArray
from clipcid_cli.algorithms.sets.forest import Curve, connected_components, forest_curve
from clipcid_cli.algorithms.sets.representatives import (
    best_rows,
    central_rows,
    distances_to,
    find_diameters,
    medoid_rows,
    ratio_beyond,
)
from clipcid_cli.algorithms.sets.star import (
    count_kept,
    is_kept,
)
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.results.forest import SetTable
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.forest import find_forest
from clipcid_cli.steps.balance.groups import Groups, Share, find_places
from clipcid_cli.steps.balance.rows import BalanceRows

# Rules of --select that look at the rows of a set; the others score each image by itself.
_BY_ROWS = ("central", "medoid")


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
        return is_kept(self.representatives)


def make_sets(run: BalanceRun) -> tuple[Sets, Edges, bool]:
    """Make the sets that the settings ask for; the same on every process.

    Returns:
        The sets, the forest they were made from, and whether it was there already.
    """
    num_rows, settings = run.rows.num_searched, run.settings
    num_kept = num_rows if settings.keep is None else max(1, round(settings.keep * num_rows))
    forest, reused = find_forest(run, cutoff=settings.distance, num_edges=num_rows - num_kept)
    if settings.keep is not None and num_kept == num_rows:  # nothing is to be merged, not even copies
        return _make_components(run, forest.edges, None), forest.edges, reused
    threshold = settings.distance
    if threshold is None:
        threshold = float(forest.edges.weight[num_rows - num_kept - 1])
    threshold = shortest_decimal(threshold)
    if settings.linkage == "star":
        from clipcid_cli.steps.balance.stars import make_stars

        searched = forest.cutoff
        sets, forest = make_stars(run, forest, threshold, num_kept)
        return sets, forest.edges, reused and forest.cutoff == searched
    return _make_components(run, forest.edges, threshold), forest.edges, reused


def shortest_decimal(distance: float) -> float:
    """Return the number with the fewest digits that is the same float32: 0.447 rather than 0.44699999690055847."""
    return float(str(np.float32(distance)))


def single_curve(rows: BalanceRows, forest: Edges, threshold: float | None) -> Curve:
    """Return what single linkage keeps of the searched rows over the cut-off, as far as the forest reaches."""
    curve = forest_curve(len(rows), forest, threshold)
    return dataclasses.replace(curve, kept=curve.kept - (len(rows) - rows.num_searched))


def finish_sets(
    run: BalanceRun,
    threshold: float | None,
    labels: IntArray,
    representatives: IntArray | None,
    make_curve: Callable[[], Curve],
) -> Sets:
    """Choose representatives where there are none yet, and measure the sets; rows that filters dropped have none."""
    rows = run.rows
    groups = Groups.publish(run.shared, lambda: Groups.from_sets(labels))
    parts = run.work_on_groups(groups, lambda share: _measure(run, share, representatives))

    def join() -> Arrays:
        """Return the representative of each row, and its distance to it; then the columns of the table."""
        members, is_first = groups.rows, groups.bounds[:-1]
        chosen, distance, farthest, diameter, is_exact = map(np.concatenate, zip(*parts, strict=True))
        representatives_N = labels.copy()
        representatives_N[members] = chosen
        if rows.is_searched is not None:
            representatives_N = np.where(rows.is_searched, representatives_N, labels.dtype.type(-1))
        distances_N = np.zeros(len(labels), np.float32)
        distances_N[members] = distance
        reach = distances_N[farthest]
        sizes = np.diff(groups.bounds)
        table = (members[is_first], sizes, chosen[is_first], farthest, reach, diameter, is_exact)
        return representatives_N, distances_N, *table

    representatives_N, distances_N, *table = run.shared.publish(join)
    num_kept = count_kept(representatives_N)
    beyond = 0.0
    if threshold is not None:
        beyond = ratio_beyond(distances_N, threshold, rows.num_searched - num_kept)
    return Sets(
        labels=labels,
        representatives=representatives_N,
        distances=distances_N,
        threshold=threshold,
        curve=run.context.on_rank0(make_curve),
        num_kept=num_kept,
        largest=int(np.diff(groups.bounds).max(initial=1)),
        table=SetTable(*table),
        uncovered_ratio=beyond,
    )


def _measure(run: BalanceRun, share: Share, representatives: IntArray | None) -> Arrays:
    """Measure some sets.

    Returns:
        The representative of each row, integers [M], and its distance, float32 [M]; of each set the row farthest from it,
        integers [S], its diameter, float32 [S], and whether that is exact, bool [S].
    """
    if representatives is None:
        chosen = _choose_representatives(run, share)
    else:
        chosen = find_places(share.rows)(representatives[share.rows])
    distances = distances_to(share.read, chosen)
    reach = np.maximum.reduceat(distances, share.starts) if len(share.starts) else distances
    at_reach = np.flatnonzero(distances == np.repeat(reach, share.sizes))
    farthest = at_reach[np.searchsorted(at_reach, share.starts)]
    # Copies are at distance 0 of each other.
    is_unique = np.zeros(len(run.rows), np.bool_)
    is_unique[run.rows.unique] = True
    unique = np.flatnonzero(is_unique[share.rows])
    diameter, is_exact = find_diameters(share.read, unique, share.labels[unique], share.starts, run.context.device)
    return share.rows[chosen], distances, share.rows[farthest], diameter, is_exact


def _make_components(run: BalanceRun, forest: Edges, threshold: float | None) -> Sets:
    """Single linkage: the components of the forest up to the threshold; without one each row is a set of its own."""

    def make() -> Arrays:
        part = forest[:0] if threshold is None else forest.up_to(threshold)
        labels = connected_components(len(run.rows), part.a, part.b)
        if threshold is not None and run.settings.select not in _BY_ROWS:
            return labels, _best_by_score(run, labels)
        return (labels,)

    labels, *chosen = run.shared.publish(make)
    representatives = chosen[0] if chosen else None
    return finish_sets(run, threshold, labels, representatives, lambda: single_curve(run.rows, forest, threshold))


def _choose_representatives(run: BalanceRun, share: Share) -> IntArray:
    """Choose the representative of each row of some sets by the rows themselves, integers [M]."""
    if run.settings.select == "medoid":
        return medoid_rows(share.read, share.labels, run.context.device)
    return central_rows(share.read, share.labels)


def _best_by_score(run: BalanceRun, labels: IntArray) -> IntArray:
    """Choose the representative of each row by a score of each image, integers [N]."""
    from clipcid_cli.steps.balance.scores import SCORES

    scores = np.zeros(len(labels))
    # The rows of sets of two or more: the others need no score.
    members = np.flatnonzero(np.bincount(labels, minlength=len(labels))[labels] > 1)
    scores[members] = SCORES[run.settings.select](run, members)
    return best_rows(scores, labels)
