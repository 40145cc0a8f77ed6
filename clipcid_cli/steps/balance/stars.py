"""``--linkage star``: sets whose images are all within the cut-off of the one that is kept."""

from __future__ import annotations

from functools import partial

import msgspec
import numpy as np

from clipcid_cli.algorithms.near.cutoff import FARTHEST
from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import IntArray, row_type
from clipcid_cli.algorithms.near.plan import hash_arrays
from clipcid_cli.algorithms.sets.forest import Curve, connected_components
from clipcid_cli.algorithms.sets.star import StarCover, find_star_cutoff, label_by_smallest, star_cover, star_curve
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.fingerprint import hash_json
from clipcid_cli.formats.journal import record_journal
from clipcid_cli.runtime.timing import SavePace, timed
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.forest import find_forest
from clipcid_cli.steps.balance.pairs import NotComputed, find_pairs
from clipcid_cli.steps.balance.sets import Division, shortest_decimal
from clipcid_cli.steps.balance.stored_forest import Forest

# A star cover keeps more than single linkage at one distance, mostly little more; each step beyond costs a cover.
_STAR_STEP = 1.05
_CURVE_POINTS = 24
# Pairs of a star cover, and the memory that each takes while they are sorted and covered (measured).
_MAX_COLLECTED = 2**26
_BYTES_A_PAIR = 75


class _Bounds(msgspec.Struct, frozen=True):
    """Between which distances the cut-off of stars is, as far as covers were tried."""

    reach: float  # how far pairs are searched
    above: float
    within: float

    @classmethod
    def beyond(cls, distance: float, above: float) -> _Bounds:
        """Search pairs a step farther than a distance."""
        reach = min(_STAR_STEP * distance + 1e-6, FARTHEST)  # where one star covers all rows
        return cls(reach, above, reach)


class _Progress:
    """The bounds of a bisection, saved now and then: of many pairs a cover takes half a minute."""

    def __init__(self, run: BalanceRun, copies: IntArray, threshold: float, num_kept: int) -> None:
        """Name what decides the bounds: unfinished work is taken over by runs of other settings and more files."""
        self._context = run.context
        self._journal = record_journal(run.work / ".stars", _Bounds)
        self._pace = SavePace(expected=0.0)
        rows = hash_arrays(run.rows.unique, copies)
        decisive = [run.inputs, run.settings.forest_kind, rows, threshold, num_kept]
        self._name = hash_json(decisive)

    def read(self) -> _Bounds | None:
        """Return those that a killed run saved last; the same on every process."""
        return self._context.on_rank0(lambda: self._journal.read(self._name))

    def save(self, reach: float, above: float, within: float) -> None:
        if self._context.is_main and self._pace.is_due():
            with self._pace.saving():
                self._journal.append(self._name, _Bounds(reach, above, within))


def divide_by_stars(run: BalanceRun, forest: Forest, threshold: float, num_kept: int) -> tuple[Division, Forest]:
    """Cover the rows by stars, at the threshold given, or from the single-linkage one up to where few enough are kept."""
    rows, num_unique = run.rows, len(run.rows.unique)
    positions = rows.unique_positions()
    copies = rows.count_copies()

    def pairs_up_to(cutoff: float) -> Edges:
        part = forest.edges.up_to(cutoff)
        labels = connected_components(len(rows), part.a, part.b)
        with timed(run.seconds, "search"):
            pairs = find_pairs(run, labels, cutoff, _MAX_COLLECTED)
        if isinstance(pairs, NotComputed):
            raise ClipcidError(
                f"More than {_MAX_COLLECTED:,} pairs of images are within {cutoff:.4f} of each other. A star cover holds "
                f"all of them in memory, about {_BYTES_A_PAIR} bytes each: "
                f"over {_MAX_COLLECTED * _BYTES_A_PAIR / 2**30:.0f} GiB.",
                "Use --linkage single, or drop fewer images: a larger --keep or a smaller --threshold.",
            )
        return pairs.renumbered(positions)

    cover: StarCover | None = None
    if run.settings.keep is None:
        pairs = pairs_up_to(threshold)
        cover = StarCover(threshold, star_cover(pairs, copies))
    elif num_kept >= num_unique:
        pairs = Edges.empty()
        cover = StarCover(0.0, np.arange(num_unique))
    # Always the same steps, so that the cut-off does not depend on how far the forest reaches.
    # Below the threshold single linkage keeps more than asked, and stars never fewer than it.
    below = float(np.nextafter(np.float32(threshold), np.float32(-1.0)))
    progress = _Progress(run, copies, threshold, num_kept)
    bounds = progress.read() or _Bounds.beyond(threshold, below)
    while cover is None:
        if bounds.reach > forest.cutoff:
            forest, _ = find_forest(run, cutoff=bounds.reach)
        pairs = pairs_up_to(bounds.reach)
        save = partial(progress.save, bounds.reach)
        cover = find_star_cutoff(pairs.up_to(bounds.within), copies, num_kept, bounds.above, save)
        if cover is None:
            bounds = _Bounds.beyond(bounds.reach, bounds.reach)
            progress.save(bounds.reach, bounds.above, bounds.within)
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
    return Division(labels, representatives, shortest_decimal(chosen.cutoff), make_curve), forest
