"""What the other linkage would keep at the same cut-off, as far as that is known without a long search."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.sets.forest import Curve, connected_components
from clipcid_cli.algorithms.sets.representatives import central_rows, distances_to, share_beyond
from clipcid_cli.algorithms.sets.star import star_curve
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.pairs import NotComputed, collect_few_pairs
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.balance.sets import Sets, single_curve

# Pairs that all covers of the star's curve process together: some seconds.
_MOST_COVERED = 2**25
_CURVE_POINTS = 24


@dataclasses.dataclass(frozen=True)
class OtherLinkage:
    """The other linkage at the cut-off of the sets.

    Attributes:
        linkage: ``single`` or ``star``.
        kept: Number of images it keeps.
        uncovered_ratio: Share of the images it drops that are farther than the cut-off from their representative.
        curve: Images it keeps over the cut-off: single linkage as far as the forest reaches, stars up to the cut-off.
    """

    linkage: str
    kept: int
    uncovered_ratio: float
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
        return run.machine.on_main(lambda: _single(run.rows, forest, threshold))
    pairs = collect_few_pairs(run, run.rows, sets.labels, threshold)
    if isinstance(pairs, NotComputed):
        run.reporter.note(f"What --linkage star would keep at this cut-off is not computed: {pairs.reason}.")
        return pairs
    return run.machine.on_main(lambda: _star(run.rows, pairs, threshold))


def _single(rows: BalanceRows, forest: Edges, threshold: float) -> OtherLinkage:
    part = forest.up_to(threshold)
    labels = connected_components(len(rows), part.a, part.b)
    numbers = np.arange(len(rows), dtype=labels.dtype)
    distances = distances_to(rows.read, numbers, central_rows(rows.read, numbers, labels))
    beyond = share_beyond(distances, threshold, len(part))
    return OtherLinkage("single", rows.num_searched - len(part), beyond, single_curve(rows, forest, threshold))


def _star(rows: BalanceRows, pairs: Edges, threshold: float) -> OtherLinkage:
    pairs = pairs.renumbered(rows.unique_positions())
    num_points = min(_CURVE_POINTS, _MOST_COVERED // max(1, len(pairs)))
    curve = star_curve(len(rows.unique), pairs, rows.count_copies(), threshold, num_points)
    # The cut-off is the last point, and all members of a star are within it of their representative.
    return OtherLinkage("star", int(curve.kept[-1]), 0.0, curve)
