"""From the forest to sets of near images, each with the one image that is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import DoubleArray, FloatArray, IntArray, row_type
from clipcid_cli.algorithms.sets.forest import Curve, connected_components, forest_curve
from clipcid_cli.algorithms.sets.representatives import (
    best_rows,
    central_rows,
    distances_to,
    medoid_rows,
    random_scores,
    share_beyond,
)
from clipcid_cli.algorithms.sets.star import (
    StarCover,
    count_kept,
    find_star_cutoff,
    is_kept,
    label_by_smallest,
    star_cover,
    star_curve,
)
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.steps.balance.context import Context
from clipcid_cli.steps.balance.rows import caption_similarities
from clipcid_cli.steps.balance.samples import count_pixels
from clipcid_cli.steps.balance.stored_forest import Forest
from clipcid_cli.steps.shared_arrays import share_arrays

# A star cover keeps more than single linkage at one distance, mostly little more; each step beyond costs a cover.
_STAR_STEP = 1.05
# No two unit rows are farther apart.
_FARTHEST = 2.0


@dataclasses.dataclass(frozen=True)
class Sets:
    """Which images are near each other, and which one of each set is kept.

    Attributes:
        labels: The smallest row of each row's set, integers [N].
        representatives: The representative of each row, itself where it is kept, integers [N].
        distances: Distance to it, float32 [N].
        threshold: The cut-off; None when nothing was to be merged.
        curve: Images kept over the cut-off.
        num_kept: Number of images kept.
        largest: Size of the largest set.
        uncovered_ratio: Share of the dropped images that are farther than the cut-off from their representative.
    """

    labels: IntArray
    representatives: IntArray
    distances: FloatArray
    threshold: float | None
    curve: Curve
    num_kept: int
    largest: int
    uncovered_ratio: float

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """Which rows are kept, bool [N]."""
        return is_kept(self.representatives)


def make_sets(context: Context) -> tuple[Sets, Edges, bool]:
    """Make the sets that the settings ask for; the same on every process.

    Returns:
        The sets, the forest they were made from, and whether it was there already.
    """
    num_rows, settings = len(context.rows), context.settings
    num_kept = num_rows if settings.keep is None else max(1, round(settings.keep * num_rows))
    if settings.keep is not None and num_kept == num_rows:
        # Nothing to merge, not even copies: there is no cut-off, and a forest up to 0 to draw the curve from.
        forest, was_there = context.find_forest(num_edges=0)
        return _each_alone(context, forest.edges), forest.edges, was_there
    forest, was_there = context.find_forest(cutoff=settings.distance, num_edges=num_rows - num_kept)
    threshold = settings.distance
    if threshold is None:
        threshold = float(forest.edges.weight[num_rows - num_kept - 1])
    threshold = shortest_decimal(threshold)
    if settings.linkage == "star":
        searched = forest.cutoff
        sets, forest = _make_stars(context, forest, threshold, num_kept)
        return sets, forest.edges, was_there and forest.cutoff == searched
    return _make_components(context, forest.edges, threshold), forest.edges, was_there


def shortest_decimal(distance: float) -> float:
    """Return the number with the fewest digits that is the same float32: 0.447 rather than 0.44699999690055847."""
    return float(str(np.float32(distance)))


def _share_sets(
    context: Context,
    threshold: float | None,
    make: Callable[[], tuple[IntArray, IntArray]],
    make_curve: Callable[[], Curve],
) -> Sets:
    """Make sets on the first process and share them with the others.

    Args:
        make: Makes labels and representatives.
        make_curve: Makes the curve.
    """
    num_rows = len(context.rows)
    kind = row_type(num_rows)

    def write() -> Arrays:
        labels, representatives = (each.astype(kind, copy=False) for each in make())
        distances = distances_to(context.rows.read, np.arange(num_rows, dtype=kind), representatives)
        return labels, representatives, distances

    labels, representatives, distances = share_arrays(context.machine, context.output.work, write)

    def measure() -> tuple[Curve, int, int, float]:
        num_kept = count_kept(representatives)
        beyond = 0.0 if threshold is None else share_beyond(distances, threshold, num_rows - num_kept)
        return make_curve(), num_kept, int(np.bincount(labels).max()), beyond

    return Sets(labels, representatives, distances, threshold, *context.machine.on_main(measure))


def _each_alone(context: Context, forest: Edges) -> Sets:
    num_rows = len(context.rows)
    rows = np.arange(num_rows, dtype=row_type(num_rows))
    return _share_sets(context, None, lambda: (rows, rows), lambda: forest_curve(num_rows, forest, None))


def _make_components(context: Context, forest: Edges, threshold: float) -> Sets:
    """Single linkage: the components of the forest up to the threshold."""
    num_rows = len(context.rows)

    def make() -> tuple[IntArray, IntArray]:
        part = forest.up_to(threshold)
        labels = connected_components(num_rows, part.a, part.b)
        return labels, _SELECT[context.settings.select](context, labels)

    return _share_sets(context, threshold, make, lambda: forest_curve(num_rows, forest, threshold))


def _make_stars(context: Context, forest: Forest, threshold: float, num_kept: int) -> tuple[Sets, Forest]:
    """Cover the rows by stars, at the threshold given, or from the single-linkage one up to where few enough are kept."""
    rows, num_rows, num_unique = context.rows, len(context.rows), len(context.rows.unique)
    positions = rows.unique_positions()
    copies = np.bincount(positions)

    def pairs_up_to(cutoff: float) -> Edges:
        part = forest.edges.up_to(cutoff)
        labels = connected_components(num_rows, part.a, part.b)
        return context.collect_pairs(labels, cutoff).renumbered(positions)

    cover: StarCover | None = None
    if context.settings.keep is None:
        pairs = pairs_up_to(threshold)
        cover = StarCover(threshold, star_cover(num_unique, pairs, copies))
    elif num_kept >= num_unique:
        pairs = Edges.empty()
        cover = StarCover(0.0, np.arange(num_unique))
    # Always the same steps, so that the cut-off does not depend on how far the forest reaches.
    # Below the threshold single linkage keeps more than asked, and stars never fewer than it.
    reach, below = threshold, float(np.nextafter(np.float32(threshold), np.float32(-1.0)))
    while cover is None:
        reach = min(_STAR_STEP * reach + 1e-6, _FARTHEST)
        if reach > forest.cutoff:
            forest, _ = context.find_forest(cutoff=reach)
        pairs = pairs_up_to(reach)
        cover = find_star_cutoff(num_unique, pairs, num_kept, copies, below)
        below = reach
        if cover is None and reach == _FARTHEST:
            cover = StarCover(reach, star_cover(num_unique, pairs, copies))
    chosen = cover

    def make() -> tuple[IntArray, IntArray]:
        representatives = rows.unique[chosen.representatives][positions]
        return label_by_smallest(representatives), representatives

    def make_curve() -> Curve:
        return star_curve(num_unique, pairs, copies, chosen.cutoff)

    return _share_sets(context, shortest_decimal(chosen.cutoff), make, make_curve), forest


def _central(context: Context, labels: IntArray) -> IntArray:
    return central_rows(context.rows.read, np.arange(len(labels), dtype=labels.dtype), labels)


def _medoid(context: Context, labels: IntArray) -> IntArray:
    return medoid_rows(context.rows.read, np.arange(len(labels), dtype=labels.dtype), labels, context.machine.device)


def _first(context: Context, labels: IntArray) -> IntArray:
    return labels


def _random(context: Context, labels: IntArray) -> IntArray:
    return best_rows(random_scores(np.arange(len(labels)), context.settings.seed), labels)


def _similarity(context: Context, labels: IntArray) -> IntArray:
    """Keep the image most similar to its caption; images without one, or without a usable text embedding, come last."""
    scores: DoubleArray = np.full(len(labels), -np.inf)
    members = _rows_of_several(labels)
    scores[members] = caption_similarities(context.embeddings, context.rows, members, context.reporter)
    return best_rows(scores, labels)


def _resolution(context: Context, labels: IntArray) -> IntArray:
    members = _rows_of_several(labels)
    scores = np.zeros(len(labels))
    assert context.data is not None  # it was opened before the search
    numbers = context.rows.numbers[members]
    scores[members] = count_pixels(context.data, context.embeddings, numbers, context.reporter)
    return best_rows(scores, labels)


def _rows_of_several(labels: IntArray) -> IntArray:
    """Return the rows of sets of two or more: the others need no score."""
    return np.flatnonzero(np.bincount(labels, minlength=len(labels))[labels] > 1)


# Each rule of ``--select`` chooses the representative of each row from the sets, integers [N] both.
_SELECT: dict[str, Callable[[Context, IntArray], IntArray]] = {
    "central": _central,
    "medoid": _medoid,
    "first": _first,
    "random": _random,
    "similarity": _similarity,
    "resolution": _resolution,
}
