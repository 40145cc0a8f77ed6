"""How wide the sets are, which of them single linkage chained most, and what stars would make of those."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipcid_cli.algorithms.near.block import load_block
from clipcid_cli.algorithms.near.edges import Edges, sort_edges
from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.algorithms.near.search import near_pairs
from clipcid_cli.algorithms.sets.diameters import find_diameters
from clipcid_cli.algorithms.sets.star import count_kept, star_cover
from clipcid_cli.formats.results.forest import SetTable
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.sets import Sets

_CHAINS_SHOWN = 8
_STARS_SHOWN = 8
# Different images of a set that stars are made of for the report: all their pairs take a fifth of a second on two cores.
_MAX_STARRED = 4096


def measure_sets(run: BalanceRun, sets: Sets) -> SetTable:
    """Measure every set of two or more images: its diameter, and the image farthest from the one kept."""
    rows, labels, distances = run.rows, sets.labels, sets.distances
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
    found = find_diameters(rows.read, rows.unique, labels[rows.unique], run.machine.device)
    diameter, is_exact = np.zeros(len(label), np.float32), np.ones(len(label), np.bool_)
    place = np.searchsorted(label, found.label)
    diameter[place] = found.diameter
    is_exact[place] = found.is_exact
    return SetTable(label, size, sets.representatives[label], farthest, reach, diameter, is_exact)


def find_chains(run: BalanceRun, sets: Sets, table: SetTable) -> list[dict[str, Any]]:
    """Return the sets with most images beyond the cut-off, the widest of equals first; none for stars.

    Returns:
        What the table has of each, and: ``beyond``, how many of its images are farther than the cut-off from the one kept;
        ``stars``, the images that stars would keep of it, those that represent most first, None where it has too many to
        compare; ``shown``, those of its images that the report shows.
    """
    if sets.threshold is None or run.settings.linkage == "star":
        return []
    is_beyond = sets.distances > np.float32(sets.threshold)
    beyond = np.bincount(sets.labels[is_beyond], minlength=len(sets.labels))[table.label]
    order = np.lexsort((table.label, -table.diameter, -beyond))[:_CHAINS_SHOWN]
    copies = run.rows.count_copies()
    chains = []
    for place in order[beyond[order] > 0].tolist():
        chain = {name: column[place].item() for name, column in vars(table).items()}
        stars = _find_stars(run, sets, chain["label"], sets.threshold, copies)
        shown = [chain["representative"], chain["farthest"], *(stars or ())[:_STARS_SHOWN]]
        chains.append(chain | {"beyond": int(beyond[place]), "stars": stars, "shown": shown})
    return chains


def _find_stars(run: BalanceRun, sets: Sets, label: int, cutoff: float, copies: IntArray) -> list[int] | None:
    """Cover a set by stars, which never leave it, given how many rows equal each unique row, int64 [U]."""
    rows = run.rows
    place = np.flatnonzero(sets.labels[rows.unique] == label)
    if len(place) > _MAX_STARRED:
        return None
    numbers = np.arange(len(place), dtype=rows.unique.dtype)
    block = load_block(lambda some: rows.read(rows.unique[place[some]]), numbers, run.machine.device, run.scan.dtype)
    pairs = sort_edges(Edges.concatenate(near_pairs(block, block, cutoff)))
    representatives = star_cover(pairs, copies[place])
    represented = np.bincount(representatives, weights=copies[place], minlength=len(place))
    order = np.argsort(-represented, kind="stable")[: count_kept(representatives)]
    found: list[int] = rows.unique[place[order]].tolist()
    return found
