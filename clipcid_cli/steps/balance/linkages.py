"""What the other linkage would keep of the same images at the same cut-off."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.plan import least_of_components
from clipcid_cli.algorithms.sets.forest import Curve, connected_components
from clipcid_cli.algorithms.sets.representatives import central_rows, distances_to, ratio_beyond
from clipcid_cli.algorithms.sets.star import star_curve
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.groups import Groups, Share, work_on_groups
from clipcid_cli.steps.balance.pairs import NotComputed, find_pairs
from clipcid_cli.steps.balance.result import OtherLinkageResult
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.balance.sets import Sets, single_curve

_CURVE_POINTS = 24
# Pairs that all covers of the other linkage's curve process together: some seconds.
_MAX_COVERED = 2**25
# Limits of the comparison with stars, some seconds on two cores: rows compared, and pairs found (20 bytes each, and several
# times that to sort and cover them).
_MAX_COMPARED = 2**31
_MAX_FOUND = 2**23


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
    pairs = _find_pairs(run, sets, threshold)
    if isinstance(pairs, NotComputed):
        reporting.note(f"What --linkage star would keep at this cut-off is not computed: {pairs.reason}.")
        return pairs
    return run.context.on_rank0(lambda: _star(run.rows, pairs, threshold))


def _find_pairs(run: BalanceRun, sets: Sets, threshold: float) -> Edges | NotComputed:
    # Each copy may leave one row alone with it; of the others no set needs to be looked at to see that they are too many.
    least = least_of_components(int(sets.table.size.sum()) - 2 * len(run.rows.copies))
    if least > _MAX_COMPARED:
        return NotComputed(
            f"it takes at least {least:,} comparisons within the sets, more than the {_MAX_COMPARED:,} made for a report"
        )
    return find_pairs(run, sets.labels, threshold, _MAX_FOUND, _MAX_COMPARED)


def _compare_single(run: BalanceRun, forest: Edges, threshold: float) -> OtherLinkage:
    """Apply single linkage, with the central image kept of each component."""
    rows, merged = run.rows, forest.up_to(threshold)

    def find_sets() -> Groups:
        return Groups.from_sets(connected_components(len(rows), merged.a, merged.b))

    def measure(share: Share) -> Arrays:
        return (distances_to(share.read, central_rows(share.read, share.labels)),)

    groups = Groups.publish(run.shared, find_sets)
    parts = work_on_groups(run.shared, rows.images, rows.numbers, groups, measure)

    def compare() -> OtherLinkage:
        distances = np.concatenate([distance for (distance,) in parts])
        beyond = ratio_beyond(distances, threshold, len(merged))
        result = OtherLinkageResult("single", rows.num_searched - len(merged), beyond)
        return OtherLinkage(result, single_curve(rows, forest, threshold))

    return run.context.on_rank0(compare)


def _star(rows: BalanceRows, pairs: Edges, threshold: float) -> OtherLinkage:
    pairs = pairs.renumbered(rows.unique_positions())
    num_points = min(_CURVE_POINTS, _MAX_COVERED // max(1, len(pairs)))
    curve = star_curve(pairs, rows.count_copies(), threshold, num_points)
    # The cut-off is the last point, and all members of a star are within it of their representative.
    return OtherLinkage(OtherLinkageResult("star", int(curve.kept[-1]), 0.0), curve)
