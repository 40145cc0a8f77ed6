"""Covering linkages, as ``--linkage star``: sets whose images are all within the cut-off of the one that is kept."""

from __future__ import annotations

from functools import partial

import msgspec
import numpy as np

from clipcid_cli.algorithms.near.cutoff import FARTHEST
from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import IntArray, row_type
from clipcid_cli.algorithms.near.jobs import hash_arrays
from clipcid_cli.algorithms.sets.covers import Cover, CoverRows, cover_curve, find_cover_threshold, label_by_smallest
from clipcid_cli.algorithms.sets.forest import Curve
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.fingerprint import hash_json
from clipcid_cli.formats.journal import record_journal
from clipcid_cli.runtime.save_pace import SavePace
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.find_forest import find_forest
from clipcid_cli.steps.balance.linkages import LINKAGES
from clipcid_cli.steps.balance.pairs import collect_pairs
from clipcid_cli.steps.balance.sets import Division, shortest_decimal
from clipcid_cli.steps.balance.stored_forest import Forest

# A cover keeps more than single linkage at one distance, mostly little more; each step beyond costs a cover.
_STEP = 1.05
_CURVE_POINTS = 24


class _Bounds(msgspec.Struct, frozen=True):
    """Where the threshold of a cover is, as far as covers were tried: `above` < threshold ≤ `within` ≤ `searched_to`."""

    searched_to: float  # all pairs up to this distance are collected
    above: float
    within: float

    @classmethod
    def beyond(cls, distance: float, above: float) -> _Bounds:
        """Return the bounds of a threshold that may be a step farther than a distance, up to where pairs are searched."""
        searched_to = min(_STEP * distance + 1e-6, FARTHEST)  # where one row covers all
        return cls(searched_to, above, searched_to)


class _Progress:
    """The bounds of a bisection, saved now and then: of many pairs a cover takes half a minute."""

    def __init__(self, run: BalanceRun, copies: IntArray, threshold: float, num_kept: int) -> None:
        """Name what decides the bounds: unfinished work is taken over by runs of other settings and more files."""
        self._context = run.context
        self._journal = record_journal(run.work / ".stars", _Bounds)
        self._pace = SavePace(expected=0.0)
        rows = hash_arrays(run.rows.unique, copies)
        settings = run.settings
        decisive = [run.inputs_hash, settings.linkage, settings.forest_kind, rows, threshold, num_kept]
        self._name = hash_json(decisive)

    def read(self) -> _Bounds | None:
        """Return those that a killed run saved last; the same on every process."""
        return self._context.on_rank0(self._journal.read, self._name)

    def save(self, searched_to: float, above: float, within: float) -> None:
        if self._context.is_main and self._pace.is_due():
            with self._pace.saving():
                self._journal.append(self._name, _Bounds(searched_to, above, within))


def divide(run: BalanceRun, forest: Forest, threshold: float, num_kept: int | None) -> tuple[Division, Forest]:
    """Cover the rows, at the threshold given, or from the single-linkage one up to where few enough are kept."""
    rows = run.rows
    copies = rows.count_copies()
    cover_rows = LINKAGES[run.settings.linkage].load_cover()
    if num_kept is None:
        pairs = collect_pairs(run, forest, threshold)
        cover = Cover(threshold, cover_rows(pairs, copies))
    elif num_kept >= len(rows.unique):
        pairs = Edges.empty()
        cover = Cover(0.0, np.arange(len(rows.unique)))
    else:
        cover, pairs, forest = _find_cover(run, cover_rows, forest, threshold, num_kept)
    positions = rows.unique_positions()

    def make() -> Arrays:
        representatives = rows.unique[cover.representatives][positions]
        if rows.is_searched is not None:
            representatives = np.where(rows.is_searched, representatives, np.arange(len(rows)))
        kind = row_type(len(rows))
        return label_by_smallest(representatives).astype(kind), representatives.astype(kind)

    def make_curve() -> Curve:
        return cover_curve(cover_rows, pairs, copies, cover.threshold, _CURVE_POINTS)

    labels, representatives = run.shared.publish(make)
    return Division(labels, representatives, shortest_decimal(cover.threshold), make_curve), forest


def _find_cover(
    run: BalanceRun, cover_rows: CoverRows, forest: Forest, threshold: float, num_kept: int
) -> tuple[Cover, Edges, Forest]:
    """Find the cover that keeps a number of rows at most; with it the pairs that were collected, and the forest they need.

    Pairs are collected up to a step beyond the single-linkage threshold, and a step farther until few enough rows are kept:
    never up to where the stored forest happens to end, so that the same command gives the same sets with any forest.
    """
    copies = run.rows.count_copies()
    # Below the threshold single linkage keeps more than asked for, and a cover keeps no fewer than it at any distance.
    below = float(np.nextafter(np.float32(threshold), np.float32(-1.0)))
    progress = _Progress(run, copies, threshold, num_kept)
    bounds = progress.read() or _Bounds.beyond(threshold, below)
    while True:
        if bounds.searched_to > forest.searched_to:
            forest, _ = find_forest(run, searched_to=bounds.searched_to)
        pairs = collect_pairs(run, forest, bounds.searched_to)
        save = partial(progress.save, bounds.searched_to)
        within = pairs.up_to(bounds.within)
        cover = find_cover_threshold(cover_rows, within, copies, num_kept, above=bounds.above, on_cover=save)
        if cover is not None:
            return cover, pairs, forest
        bounds = _Bounds.beyond(bounds.searched_to, bounds.searched_to)
        progress.save(bounds.searched_to, bounds.above, bounds.within)
