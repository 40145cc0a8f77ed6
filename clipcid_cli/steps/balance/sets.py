"""The part of `balance` that turns a forest into sets of repeats and chooses the image that stands for each."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clipcid_cli.algorithms.search.distances import DoubleArray, FloatArray, IntArray
from clipcid_cli.algorithms.search.edges import Edges, sort_edges
from clipcid_cli.algorithms.sets.forest import Curve, connected_components, forest_curve
from clipcid_cli.algorithms.sets.representatives import (
    best_rows,
    central_rows,
    distances_to,
    medoid_rows,
    random_scores,
)
from clipcid_cli.algorithms.sets.star import StarSearch, count_kept, find_star_cutoff, star_cover, star_curve
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.balance.pairs import collect_pairs
from clipcid_cli.steps.balance.samples import count_pixels
from clipcid_cli.steps.balance.search import Forest, Survey, find_forest
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings

# A star cover keeps more than single linkage at one distance, mostly little more: each look beyond takes a cover.
_STAR_STEP = 1.05
_FARTHEST = 2.0
_ROWS_AT_ONCE = 8192


@dataclasses.dataclass(frozen=True)
class Sets:
    """Which images are repeats of each other, and which one of them is kept.

    Attributes:
        labels: The smallest row of each row's set, int64 [N].
        representatives: The row that stands for each row, itself where it is kept, int64 [N].
        distances: Distance to it, float32 [N].
        threshold: The cut-off; None when nothing was to be merged.
        curve: Images kept over the cut-off.
    """

    labels: IntArray
    representatives: IntArray
    distances: FloatArray
    threshold: float | None
    curve: Curve

    @property
    def num_kept(self) -> int:
        """Number of images kept."""
        return count_kept(self.representatives)

    @property
    def sizes(self) -> IntArray:
        """Size of each row's set, int64 [N]."""
        return np.asarray(np.bincount(self.labels, minlength=len(self.labels))[self.labels])

    @property
    def coverage(self) -> float:
        """Share of the dropped images that are farther than the cut-off from the one that stands for them."""
        num_dropped = len(self.labels) - self.num_kept
        return 0.0 if self.threshold is None else share_beyond(self.distances, num_dropped, self.threshold)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What sets are made from.

    Attributes:
        settings: Settings of `balance`.
        folder: Where the forest is kept.
        seconds: Time by phase; what searching takes is added to ``search``.
    """

    settings: BalanceSettings
    machine: Machine
    folder: Path
    embeddings: Embeddings
    fingerprints: list[dict[str, Any]]
    survey: Survey
    reporter: Reporter
    seconds: dict[str, float]

    def forest(self, *, cutoff: float | None = None, num_edges: int = 0) -> tuple[Forest, bool]:
        """Call :func:`find_forest` on these inputs, and count its time."""
        started = time.perf_counter()
        found = find_forest(
            self.machine,
            self.folder,
            self.survey,
            self.fingerprints,
            cutoff=cutoff,
            num_edges=num_edges,
            neighbors=self.settings.neighbors,
            precision=self.settings.precision,
            reporter=self.reporter,
            for_stars=self.settings.linkage == "star",
        )
        self.seconds["search"] += time.perf_counter() - started
        return found

    def pairs(self, labels: IntArray, cutoff: float) -> Edges:
        """Call :func:`collect_pairs` on these inputs, and count its time."""
        started = time.perf_counter()
        found = collect_pairs(self.machine, self.survey, labels, cutoff, self.settings.precision, self.reporter)
        self.seconds["search"] += time.perf_counter() - started
        return found


def make_sets(inputs: Inputs) -> tuple[Sets, Edges, bool]:
    """Make the sets that the settings ask for; the same on every process.

    Returns:
        The sets, the forest they were made from, and whether that was there already.
    """
    num_rows, settings = inputs.survey.num_rows, inputs.settings
    num_kept = num_rows
    if settings.keep is not None:
        num_kept = max(1, round(settings.keep * num_rows))
        if num_kept == num_rows:
            # Nothing to merge, not even copies: there is no cut-off, and a forest up to 0 to draw the curve from.
            forest, was_there = inputs.forest(num_edges=0)
            alone = np.arange(num_rows)
            curve = forest_curve(num_rows, forest.edges, None)
            return Sets(alone, alone, np.zeros(num_rows, np.float32), None, curve), forest.edges, was_there
    forest, was_there = inputs.forest(cutoff=settings.distance, num_edges=num_rows - num_kept)
    threshold = settings.distance
    if threshold is None:
        threshold = float(forest.edges.weight[num_rows - num_kept - 1])
    threshold = shortest_decimal(threshold)
    if settings.linkage == "star":
        reach = forest.cutoff
        sets, forest = _star_sets(inputs, forest, threshold, num_kept)
        return sets, forest.edges, was_there and forest.cutoff == reach
    part = forest.edges.up_to(threshold)
    labels = connected_components(num_rows, part.a, part.b)
    representatives = inputs.machine.on_main(lambda: _SELECT[settings.select](inputs, labels))
    distances = distances_to(inputs.survey.read, np.arange(num_rows), representatives)
    curve = forest_curve(num_rows, forest.edges, threshold)
    return Sets(labels, representatives, distances, threshold, curve), forest.edges, was_there


def unique_positions(survey: Survey) -> IntArray:
    """Return where, among the unique rows, the one lies that each row equals, int64 [N]."""
    positions = np.zeros(survey.num_rows, np.int64)
    positions[survey.unique] = np.arange(len(survey.unique))
    positions[survey.copies.b] = positions[survey.copies.a]
    return positions


def among_unique(pairs: Edges, positions: IntArray) -> Edges:
    """Number the rows of pairs among the unique ones, as :func:`unique_positions` tells, and sort the pairs."""
    return sort_edges(Edges(positions[pairs.a], positions[pairs.b], pairs.weight))


def share_beyond(distances: FloatArray, num_dropped: int, threshold: float) -> float:
    """Return the share of the dropped images that are farther than the cut-off from the one that stands for them."""
    return float(np.count_nonzero(distances > np.float32(threshold)) / num_dropped) if num_dropped else 0.0


def shortest_decimal(distance: float) -> float:
    """Return the number with the fewest digits that is the same float32: 0.447 rather than 0.44699999690055847."""
    return float(str(np.float32(distance)))


def _star_sets(inputs: Inputs, forest: Forest, threshold: float, num_kept: int) -> tuple[Sets, Forest]:
    """Cover the rows by stars, at the threshold given, or from the single-linkage one up to where few enough are kept."""
    num_rows, unique = inputs.survey.num_rows, inputs.survey.unique
    positions = unique_positions(inputs.survey)
    copies = np.bincount(positions)

    def pairs_up_to(cutoff: float) -> Edges:
        if forest.pairs is not None and cutoff <= forest.cutoff:
            return among_unique(forest.pairs.up_to(cutoff), positions)
        part = forest.edges.up_to(cutoff)
        labels = connected_components(num_rows, part.a, part.b)
        return among_unique(inputs.pairs(labels, cutoff), positions)

    if inputs.settings.keep is None:
        pairs = pairs_up_to(threshold)
        found = StarSearch(threshold, star_cover(len(unique), pairs, copies))
    elif num_kept >= len(unique):
        pairs = Edges.empty()
        found = StarSearch(0.0, np.arange(len(unique)))
    else:
        # Always the same steps, so that the cut-off does not depend on how far the forest or its pairs reach.
        # Below the threshold single linkage keeps more than asked, and stars never fewer than it.
        below = float(np.nextafter(np.float32(threshold), np.float32(-1.0)))
        reach, search = threshold, None
        while search is None:
            reach = min(_STAR_STEP * reach + 1e-6, _FARTHEST)
            if reach > forest.cutoff:
                forest, _ = inputs.forest(cutoff=reach)
            pairs = pairs_up_to(reach)
            search = find_star_cutoff(len(unique), pairs, num_kept, copies, below)
            below = reach
            if search is None and reach == _FARTHEST:
                search = StarSearch(reach, star_cover(len(unique), pairs, copies))
        found = search
    representatives = unique[found.stands_for][positions]
    smallest = np.full(num_rows, num_rows)
    np.minimum.at(smallest, representatives, np.arange(num_rows))
    labels = smallest[representatives]
    distances = distances_to(inputs.survey.read, np.arange(num_rows), representatives)
    curve = star_curve(len(unique), pairs, copies, found.cutoff)
    return Sets(labels, representatives, distances, shortest_decimal(found.cutoff), curve), forest


def _central(inputs: Inputs, labels: IntArray) -> IntArray:
    return central_rows(inputs.survey.read, np.arange(len(labels)), labels)


def _medoid(inputs: Inputs, labels: IntArray) -> IntArray:
    return medoid_rows(inputs.survey.read, np.arange(len(labels)), labels, inputs.machine.device)


def _first(inputs: Inputs, labels: IntArray) -> IntArray:
    return labels


def _random(inputs: Inputs, labels: IntArray) -> IntArray:
    return best_rows(random_scores(np.arange(len(labels)), inputs.settings.seed), labels)


def _similarity(inputs: Inputs, labels: IntArray) -> IntArray:
    """Keep the image most similar to its caption; images without a caption come last."""
    texts, survey = inputs.embeddings.texts(), inputs.survey
    scores: DoubleArray = np.full(len(labels), -np.inf)
    sizes = np.bincount(labels, minlength=len(labels))[labels]
    members = np.flatnonzero(sizes > 1)
    for start in range(0, len(members), _ROWS_AT_ONCE):
        rows = members[start : start + _ROWS_AT_ONCE]
        text = texts.take(survey.readable[rows]).astype(np.float64)
        captions = inputs.embeddings.captions.take(survey.readable[rows]).to_pylist()
        usable = np.array([caption != "" for caption in captions]) & np.isfinite(text).all(axis=1)
        scores[rows[usable]] = (survey.read(rows).astype(np.float64) * text).sum(axis=1)[usable]
    return best_rows(scores, labels)


def _resolution(inputs: Inputs, labels: IntArray) -> IntArray:
    sizes = np.bincount(labels, minlength=len(labels))[labels]
    members = np.flatnonzero(sizes > 1)
    scores = np.zeros(len(labels))
    scores[members] = count_pixels(inputs.settings, inputs.embeddings, inputs.survey.readable[members], inputs.reporter)
    return best_rows(scores, labels)


_SELECT: dict[str, Callable[[Inputs, IntArray], IntArray]] = {
    "central": _central,
    "medoid": _medoid,
    "first": _first,
    "random": _random,
    "similarity": _similarity,
    "resolution": _resolution,
}
