"""What the linkage that a run is compared with would keep of the same images at the same cut-off."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.jobs import least_of_components
from clipcid_cli.algorithms.sets.components import connected_components
from clipcid_cli.algorithms.sets.covers import CoverRows, cover_curve
from clipcid_cli.algorithms.sets.forest import Curve
from clipcid_cli.algorithms.sets.representatives import central_rows, distances_to, ratio_beyond
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.groups import Groups, Share, work_on_groups
from clipcid_cli.steps.balance.linkages import LINKAGES
from clipcid_cli.steps.balance.pairs import NotComputed, find_pairs
from clipcid_cli.steps.balance.result import ComparedLinkageResult
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.balance.sets import Sets, single_curve
from clipcid_cli.steps.balance.stored_forest import Forest

_CURVE_POINTS = 24
# Pairs that all covers of a curve process together: some seconds.
_MAX_COVERED = 2**25
# Limits of the comparison with a cover, some seconds on two cores: rows compared, and pairs found (20 bytes each, and
# several times that to sort and cover them).
_MAX_COMPARED = 2**31
_MAX_FOUND = 2**23


@dataclasses.dataclass(frozen=True)
class ComparedLinkage:
    """What another linkage than the chosen one keeps at the cut-off of the sets.

    The curve of one that follows the forest ends with the forest, that of another one at the cut-off.
    """

    result: ComparedLinkageResult
    curve: Curve


def compare_linkages(run: BalanceRun, sets: Sets, forest: Forest) -> ComparedLinkage | NotComputed:
    """Apply the linkage that the chosen one is compared with to the same images; the same on every process."""
    if sets.threshold is None:
        return NotComputed("nothing was to be merged")
    linkage = LINKAGES[run.settings.linkage]
    compared = linkage.compare(run, forest, sets.threshold)
    if isinstance(compared, NotComputed):
        name = linkage.compared_with
        reporting.note(f"What --linkage {name} would keep at this cut-off is not computed: {compared.reason}.")
    return compared


def compare_single(run: BalanceRun, forest: Forest, threshold: float) -> ComparedLinkage:
    """Apply single linkage, which follows from the forest, with the central image kept of each component."""
    rows, merged = run.rows, forest.edges.up_to(threshold)

    def find_sets() -> Groups:
        return Groups.from_sets(connected_components(len(rows), merged.a, merged.b))

    def measure(share: Share) -> Arrays:
        return (distances_to(share.read, central_rows(share.read, share.labels)),)

    groups = Groups(*run.shared.publish(find_sets))
    parts = work_on_groups(run.shared, rows.images, rows.numbers, groups, measure)

    def compare() -> ComparedLinkage:
        distances = np.concatenate([distance for (distance,) in parts])
        beyond = ratio_beyond(distances, threshold, len(merged))
        result = ComparedLinkageResult("single", rows.num_searched - len(merged), beyond)
        return ComparedLinkage(result, single_curve(rows, forest.edges, threshold))

    return run.context.on_rank0(compare)


def compare_cover(run: BalanceRun, forest: Forest, threshold: float) -> ComparedLinkage | NotComputed:
    """Cover the images by stars, or as another covering linkage, if few pairs are within the cut-off to be collected."""
    # A forest has more rows than edges; those of copies join none of the rows that would be compared.
    least = least_of_components(len(forest.edges.up_to(threshold)) - len(run.rows.copies))
    if least > _MAX_COMPARED:
        return NotComputed(
            f"it takes at least {least:,} comparisons within the sets, more than the {_MAX_COMPARED:,} made for a report"
        )
    pairs = find_pairs(run, forest, threshold, _MAX_FOUND, _MAX_COMPARED)
    if isinstance(pairs, NotComputed):
        return pairs
    name = LINKAGES[run.settings.linkage].compared_with
    cover = LINKAGES[name].load_cover()

    def compare() -> ComparedLinkage:
        curve = _draw_curve(cover, run.rows, pairs, threshold)
        # The cut-off is the last point, and all members of a set are within it of their representative.
        return ComparedLinkage(ComparedLinkageResult(name, int(curve.kept[-1]), 0.0), curve)

    return run.context.on_rank0(compare)


def _draw_curve(cover: CoverRows, rows: BalanceRows, pairs: Edges, threshold: float) -> Curve:
    pairs = pairs.renumbered(rows.unique_positions())
    num_points = min(_CURVE_POINTS, _MAX_COVERED // max(1, len(pairs)))
    return cover_curve(cover, pairs, rows.count_copies(), threshold, num_points)
