"""What the linkage that was not asked for would do at the same cut-off, as far as that is had without a new search."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipcid_cli.algorithms.search.edges import Edges
from clipcid_cli.algorithms.sets.forest import Curve, connected_components, forest_curve
from clipcid_cli.algorithms.sets.representatives import central_rows, distances_to
from clipcid_cli.algorithms.sets.star import star_curve
from clipcid_cli.steps.balance.pairs import NotComputed, collect_few_pairs
from clipcid_cli.steps.balance.search import Survey
from clipcid_cli.steps.balance.sets import Inputs, Sets, among_unique, share_beyond, unique_positions

# Pairs that all covers of the star's curve go through together: some seconds.
_MOST_COVERED = 2**25
_CURVE_POINTS = 24


@dataclasses.dataclass(frozen=True)
class OtherLinkage:
    """The other linkage at the cut-off of the sets.

    Attributes:
        linkage: ``single`` or ``star``.
        coverage: Share of the images it drops that are farther than the cut-off from the one that stands for them.
        curve: Images it keeps over the cut-off: single linkage as far as the forest reaches, stars up to the cut-off.
    """

    linkage: str
    kept: int
    coverage: float
    curve: Curve


def compare_linkages(inputs: Inputs, sets: Sets, forest: Edges) -> OtherLinkage | NotComputed:
    """Apply the other linkage to the same images at the same cut-off; the same on every process.

    Single linkage follows from the forest, with the central image kept of each set. Stars need all pairs within the
    cut-off, which lie within the sets of single linkage and are collected when they are few.

    Args:
        inputs: What the sets were made from.
        sets: The sets of the linkage that was asked for.
        forest: The forest, ascending.

    Returns:
        The other linkage, or why it is not computed.
    """
    threshold = sets.threshold
    if threshold is None:
        return NotComputed("nothing was to be merged")
    if inputs.settings.linkage == "star":
        return inputs.machine.on_main(lambda: _single(inputs.survey, forest, threshold))
    survey, precision = inputs.survey, inputs.settings.precision
    pairs = collect_few_pairs(inputs.machine, survey, sets.labels, threshold, precision, inputs.reporter)
    if isinstance(pairs, NotComputed):
        return pairs
    return inputs.machine.on_main(lambda: _star(survey, pairs, threshold))


def _single(survey: Survey, forest: Edges, threshold: float) -> OtherLinkage:
    part, rows = forest.up_to(threshold), np.arange(survey.num_rows)
    labels = connected_components(survey.num_rows, part.a, part.b)
    distances = distances_to(survey.read, rows, central_rows(survey.read, rows, labels))
    curve = forest_curve(survey.num_rows, forest, threshold)
    return OtherLinkage("single", len(rows) - len(part), share_beyond(distances, len(part), threshold), curve)


def _star(survey: Survey, found: Edges, threshold: float) -> OtherLinkage:
    positions = unique_positions(survey)
    pairs = among_unique(found, positions)
    num_points = min(_CURVE_POINTS, _MOST_COVERED // max(1, len(pairs)))
    curve = star_curve(len(survey.unique), pairs, np.bincount(positions), threshold, num_points)
    # The cut-off is the last point, and a star's members are all within it of the image that stands for them.
    return OtherLinkage("star", int(curve.kept[-1]), 0.0, curve)
