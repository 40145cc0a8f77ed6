"""How wide the sets are, which of them single linkage chained most, and what stars would make of those."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import (
    ROWS_IN_CACHE,
    IntArray,
    distance_matrix,
    row_type,
)
from clipcid_cli.algorithms.sets.diameters import find_diameters
from clipcid_cli.algorithms.sets.star import count_kept, star_cover
from clipcid_cli.formats.results.sets import SetTable
from clipcid_cli.steps.balance.context import Context
from clipcid_cli.steps.balance.sets import Sets

_CHAINS_SHOWN = 8
_STARS_SHOWN = 8
# Different images of a set that stars are made of for the report: all their pairs take a fifth of a second on two cores.
_MOST_STARRED = 4096


def measure_sets(context: Context, sets: Sets) -> SetTable:
    """Measure every set of two or more images: its diameter, and the image farthest from the one kept."""
    rows, labels, distances = context.rows, sets.labels, sets.distances
    sizes = np.bincount(labels, minlength=len(labels))
    label = np.flatnonzero(sizes > 1).astype(labels.dtype)
    size = sizes[label]
    del sizes
    reach = np.zeros(len(labels), np.float32)
    np.maximum.at(reach, labels, distances)
    at_reach = np.flatnonzero(distances == reach[labels]).astype(labels.dtype)
    reach = reach[label]
    first = np.full(len(labels), len(labels), labels.dtype)
    np.minimum.at(first, labels[at_reach], at_reach)
    farthest = first[label]
    del at_reach, first
    # Copies are at distance 0 of each other, and sets of copies alone have no diameter to find.
    found = find_diameters(rows.read, rows.unique, labels[rows.unique], context.machine.device)
    diameter, is_exact = np.zeros(len(label), np.float32), np.ones(len(label), np.bool_)
    place = np.searchsorted(label, found.label)
    diameter[place], is_exact[place] = found.diameter, found.is_exact
    return SetTable(label, size, sets.representatives[label], farthest, reach, diameter, is_exact)


@dataclasses.dataclass(frozen=True)
class Chain:
    """A set that single linkage chained.

    Attributes:
        label: Its smallest row.
        beyond: How many of its images are farther than the cut-off from the one kept.
        farthest: The image farthest from that one.
        distance: How far it is.
        diameter: Largest distance of two of its images; where it is not exact, at least half of that.
        num_stars: How many images stars would keep of it; None where it has too many to compare.
        stars: Some of those images, those that represent most first.
    """

    label: int
    size: int
    beyond: int
    representative: int
    farthest: int
    distance: float
    diameter: float
    is_exact: bool
    num_stars: int | None
    stars: list[int]


def find_chains(context: Context, sets: Sets, table: SetTable) -> list[Chain]:
    """Return the sets with most images beyond the cut-off, the widest of equals first; none for stars."""
    if sets.threshold is None or context.settings.linkage == "star":
        return []
    is_beyond = sets.distances > np.float32(sets.threshold)
    beyond = np.bincount(sets.labels[is_beyond], minlength=len(sets.labels))[table.label]
    order = np.lexsort((table.label, -table.diameter, -beyond))[:_CHAINS_SHOWN]
    copies = np.bincount(context.rows.unique_positions(), minlength=len(context.rows.unique))
    chains = []
    for place in order[beyond[order] > 0].tolist():
        stars = _find_stars(context, sets, int(table.label[place]), sets.threshold, copies)
        chains.append(
            Chain(
                int(table.label[place]),
                int(table.size[place]),
                int(beyond[place]),
                int(table.representative[place]),
                int(table.farthest[place]),
                float(table.distance[place]),
                float(table.diameter[place]),
                bool(table.is_exact[place]),
                None if stars is None else len(stars),
                [] if stars is None else stars[:_STARS_SHOWN],
            )
        )
    return chains


def _find_stars(context: Context, sets: Sets, label: int, cutoff: float, copies: IntArray) -> list[int] | None:
    """Cover a set by stars; a star never leaves it. Return the images kept, those that represent most first.

    Args:
        copies: How many rows equal each unique row, int64 [U].
    """
    rows = context.rows
    place = np.flatnonzero(sets.labels[rows.unique] == label)
    if len(place) > _MOST_STARRED:
        return None
    stored = torch.from_numpy(rows.read(rows.unique[place])).to(context.machine.device)
    representatives = star_cover(len(place), _near_pairs(stored, cutoff), copies[place])
    represented = np.bincount(representatives, weights=copies[place], minlength=len(place))
    order = np.lexsort((np.arange(len(place)), -represented))[: count_kept(representatives)]
    found: list[int] = rows.unique[place[order]].tolist()
    return found


def _near_pairs(stored_ND: torch.Tensor, cutoff: float) -> Edges:
    """Return the pairs of rows, float16 [N, D], within a distance; the distances of few rows to all are held at once."""
    parts = []
    for first in range(0, len(stored_ND), ROWS_IN_CACHE):
        part = slice(first, first + ROWS_IN_CACHE)
        weight_PN = distance_matrix(stored_ND[part], stored_ND).cpu().numpy()
        a, b = np.nonzero(np.triu(weight_PN <= np.float32(cutoff), first + 1))
        parts.append(Edges(a + first, b, weight_PN[a, b]).in_type(row_type(len(stored_ND))))
    return Edges.concatenate(parts)
