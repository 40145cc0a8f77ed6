"""From the forest to sets of near images, each with the one image that is kept; and what the other linkage would keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from clipcid_cli.algorithms.near.cutoff import FARTHEST
from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import BoolArray, FloatArray, IntArray, row_type
from clipcid_cli.algorithms.near.plan import components, hash_arrays
from clipcid_cli.algorithms.sets.forest import Curve, connected_components, forest_curve
from clipcid_cli.algorithms.sets.representatives import (
    best_rows,
    central_rows,
    distances_to,
    find_diameters,
    medoid_rows,
    ratio_beyond,
)
from clipcid_cli.algorithms.sets.sinks import PairsWithin
from clipcid_cli.algorithms.sets.star import (
    StarCover,
    count_kept,
    find_star_cutoff,
    is_kept,
    label_by_smallest,
    star_cover,
    star_curve,
)
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.results.forest import SetTable
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRows, BalanceRun
from clipcid_cli.steps.balance.chunks import Search, run_chunks
from clipcid_cli.steps.balance.forest import Forest, find_forest
from clipcid_cli.steps.balance.groups import Groups, Share, find_places, readable
from clipcid_cli.steps.balance.result import OtherLinkageResult
from clipcid_cli.steps.balance.scores import SCORES

# A star cover keeps more than single linkage at one distance, mostly little more; each step beyond costs a cover.
_STAR_STEP = 1.05
# Pairs that all covers of the other linkage's curve process together: some seconds.
_MAX_COVERED = 2**25
_CURVE_POINTS = 24
# Limits of the comparison with stars, some seconds on two cores: rows compared, and pairs found (20 bytes each, and several
# times that to sort and cover them).
_MAX_COMPARED = 2**31
_MAX_FOUND = 2**23
# Pairs of a star cover, and the memory that each takes while they are sorted and covered (measured).
_MAX_COLLECTED = 2**26
_BYTES_A_PAIR = 75


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
    threshold = _shortest_decimal(threshold)
    if settings.linkage == "star":
        searched = forest.cutoff
        sets, forest = _make_stars(run, forest, threshold, num_kept)
        return sets, forest.edges, reused and forest.cutoff == searched
    return _make_components(run, forest.edges, threshold), forest.edges, reused


def _shortest_decimal(distance: float) -> float:
    """Return the number with the fewest digits that is the same float32: 0.447 rather than 0.44699999690055847."""
    return float(str(np.float32(distance)))


def _single_curve(rows: BalanceRows, forest: Edges, threshold: float | None) -> Curve:
    """Return what single linkage keeps of the searched rows over the cut-off, as far as the forest reaches."""
    curve = forest_curve(len(rows), forest, threshold)
    return dataclasses.replace(curve, kept=curve.kept - (len(rows) - rows.num_searched))


def _finish_sets(
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
        members, is_first = groups.rows, groups.bounds[:-1]
        chosen, distance, farthest, diameter, is_exact = map(np.concatenate, zip(*parts, strict=True))
        representatives_N = labels.copy()
        representatives_N[members] = chosen
        if rows.is_searched is not None:
            representatives_N = np.where(rows.is_searched, representatives_N, labels.dtype.type(-1))
        distances_N = np.zeros(len(labels), np.float32)
        distances_N[members] = distance
        return (
            representatives_N,
            distances_N,
            members[is_first],
            np.diff(groups.bounds),
            chosen[is_first],
            farthest,
            distances_N[farthest],
            diameter,
            is_exact,
        )

    representatives, distances, *table = run.shared.publish(join)

    num_kept = count_kept(representatives)
    return Sets(
        labels=labels,
        representatives=representatives,
        distances=distances,
        threshold=threshold,
        curve=run.context.on_rank0(make_curve),
        num_kept=num_kept,
        largest=int(np.diff(groups.bounds).max(initial=1)),
        table=SetTable(*table),
        uncovered_ratio=0.0 if threshold is None else ratio_beyond(distances, threshold, rows.num_searched - num_kept),
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
        if threshold is not None and run.settings.select in SCORES:
            return labels, _best_by_score(run, labels)
        return (labels,)

    labels, *chosen = run.shared.publish(make)
    representatives = chosen[0] if chosen else None
    return _finish_sets(run, threshold, labels, representatives, lambda: _single_curve(run.rows, forest, threshold))


def _make_stars(run: BalanceRun, forest: Forest, threshold: float, num_kept: int) -> tuple[Sets, Forest]:
    """Cover the rows by stars, at the threshold given, or from the single-linkage one up to where few enough are kept."""
    rows, num_unique = run.rows, len(run.rows.unique)
    positions = rows.unique_positions()
    copies = rows.count_copies()

    def pairs_up_to(cutoff: float) -> Edges:
        part = forest.edges.up_to(cutoff)
        labels = connected_components(len(rows), part.a, part.b)
        with timed(run.seconds, "search"):
            found = _find_pairs(run, labels, cutoff, _MAX_COLLECTED)
        if isinstance(found, NotComputed):
            raise ClipcidError(
                f"More than {_MAX_COLLECTED:,} pairs of images are within {cutoff:.4f} of each other. A star cover holds "
                f"all of them in memory, about {_BYTES_A_PAIR} bytes each: "
                f"over {_MAX_COLLECTED * _BYTES_A_PAIR / 2**30:.0f} GiB.",
                "Use --linkage single, or drop fewer images: a larger --keep or a smaller --threshold.",
            )
        return found.renumbered(positions)

    cover: StarCover | None = None
    if run.settings.keep is None:
        pairs = pairs_up_to(threshold)
        cover = StarCover(threshold, star_cover(pairs, copies))
    elif num_kept >= num_unique:
        pairs = Edges.empty()
        cover = StarCover(0.0, np.arange(num_unique))
    # Always the same steps, so that the cut-off does not depend on how far the forest reaches.
    # Below the threshold single linkage keeps more than asked, and stars never fewer than it.
    reach = threshold
    below = float(np.nextafter(np.float32(threshold), np.float32(-1.0)))
    while cover is None:
        reach = min(_STAR_STEP * reach + 1e-6, FARTHEST)  # where one star covers all rows
        if reach > forest.cutoff:
            forest, _ = find_forest(run, cutoff=reach)
        pairs = pairs_up_to(reach)
        cover = find_star_cutoff(pairs, copies, num_kept, below)
        below = reach
    chosen = cover

    def make() -> Arrays:
        representatives = rows.unique[chosen.representatives][positions]
        if rows.is_searched is not None:
            representatives = np.where(rows.is_searched, representatives, np.arange(len(rows)))
        kind = row_type(len(rows))
        return label_by_smallest(representatives).astype(kind), representatives.astype(kind)

    def make_curve() -> Curve:
        return star_curve(pairs, copies, chosen.cutoff, _CURVE_POINTS)

    labels, representatives = run.shared.publish(make)
    return _finish_sets(run, _shortest_decimal(chosen.cutoff), labels, representatives, make_curve), forest


@dataclasses.dataclass(frozen=True)
class NotComputed:
    """The result of what was not computed; the reason completes the sentence "… is not computed: "."""

    reason: str


def _find_pairs(
    run: BalanceRun, labels: IntArray, cutoff: float, max_found: int, max_compared: int | None = None
) -> Edges | NotComputed:
    """Find all pairs of unique rows within a distance, given the component of each row at it; the same on every process."""

    def find_members() -> tuple[IntArray]:
        """Return the unique rows that are not alone in their component, by component."""
        unique = run.rows.unique
        label_U = labels[unique]
        members = unique[(np.bincount(label_U, minlength=1) > 1)[label_U]]
        return (members[np.argsort(labels[members], kind="stable")],)

    (members,) = run.shared.publish(find_members)
    plan = components(members, labels[members], run.rows_in_memory)
    if max_compared is not None and plan.num_pairs > max_compared:
        return NotComputed(
            f"it takes {plan.num_pairs:,} comparisons within the sets, more than the {max_compared:,} made for a report"
        )
    of = f"{hash_arrays(labels[members])}-{max_found}"
    place_of = find_places(members)
    with readable(run.shared, run.rows.images, run.rows.numbers, members) as read:
        search = Search(
            "pairs", plan, lambda rows: read(place_of(rows)), cutoff, lambda: PairsWithin(labels, max_found), of
        )
        found = run_chunks(run, search)
    return found if len(found) <= max_found else NotComputed(f"more than {max_found:,} pairs are within the cut-off")


@dataclasses.dataclass(frozen=True)
class OtherLinkage:
    """What the other linkage keeps at the cut-off of the sets; its curve ends there for stars, else with the forest."""

    result: OtherLinkageResult
    curve: Curve


def compare_linkages(run: BalanceRun, sets: Sets, forest: Edges) -> OtherLinkage | NotComputed:
    """Apply the other linkage to the same images at the same cut-off; the same on every process.

    Single linkage follows from the forest, with the central image kept of each component. Stars need all pairs within the
    cut-off, which are within the components of single linkage and are collected when they are few.
    """
    threshold = sets.threshold
    if threshold is None:
        return NotComputed("nothing was to be merged")
    if run.settings.linkage == "star":
        return _compare_single(run, forest, threshold)
    pairs = _find_pairs(run, sets.labels, threshold, _MAX_FOUND, _MAX_COMPARED)
    if isinstance(pairs, NotComputed):
        reporting.note(f"What --linkage star would keep at this cut-off is not computed: {pairs.reason}.")
        return pairs
    return run.context.on_rank0(lambda: _star(run.rows, pairs, threshold))


def _compare_single(run: BalanceRun, forest: Edges, threshold: float) -> OtherLinkage:
    rows, part = run.rows, forest.up_to(threshold)
    groups = Groups.publish(run.shared, lambda: Groups.from_sets(connected_components(len(rows), part.a, part.b)))
    parts = run.work_on_groups(
        groups, lambda share: (distances_to(share.read, central_rows(share.read, share.labels)),)
    )

    def compare() -> OtherLinkage:
        distances = np.concatenate([distance for (distance,) in parts])
        beyond = ratio_beyond(distances, threshold, len(part))
        result = OtherLinkageResult("single", rows.num_searched - len(part), beyond)
        return OtherLinkage(result, _single_curve(rows, forest, threshold))

    return run.context.on_rank0(compare)


def _star(rows: BalanceRows, pairs: Edges, threshold: float) -> OtherLinkage:
    pairs = pairs.renumbered(rows.unique_positions())
    num_points = min(_CURVE_POINTS, _MAX_COVERED // max(1, len(pairs)))
    curve = star_curve(pairs, rows.count_copies(), threshold, num_points)
    # The cut-off is the last point, and all members of a star are within it of their representative.
    return OtherLinkage(OtherLinkageResult("star", int(curve.kept[-1]), 0.0), curve)


def _choose_representatives(run: BalanceRun, share: Share) -> IntArray:
    """Choose the representative of each row of some sets by the rows themselves, integers [M]."""
    if run.settings.select == "medoid":
        return medoid_rows(share.read, share.labels, run.context.device)
    return central_rows(share.read, share.labels)


def _best_by_score(run: BalanceRun, labels: IntArray) -> IntArray:
    """Choose the representative of each row by a score of each image, integers [N]."""
    scores = np.zeros(len(labels))
    # The rows of sets of two or more: the others need no score.
    members = np.flatnonzero(np.bincount(labels, minlength=len(labels))[labels] > 1)
    scores[members] = SCORES[run.settings.select](run, members)
    return best_rows(scores, labels)
