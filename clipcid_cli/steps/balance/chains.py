"""Sets that may be chains of different images: what stars would keep of them, for the report of `balance`."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipcid_cli.algorithms.near.block import load_block
from clipcid_cli.algorithms.near.edges import Edges, sort_edges
from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.algorithms.near.search import near_pairs
from clipcid_cli.algorithms.sets.covers import count_kept
from clipcid_cli.algorithms.sets.star import star_cover
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.linkages import LINKAGES
from clipcid_cli.steps.balance.sets import Sets

_CHAINS_SHOWN = 8
_STARS_SHOWN = 8
# Different images of a set that stars are made of for the report: all their pairs take a fifth of a second on two cores.
_MAX_STARRED = 4096


def find_chains(run: BalanceRun, sets: Sets) -> list[dict[str, Any]]:
    """Return the sets with most images beyond the cut-off, the widest of equals first; none where no image can be.

    Returns:
        What the table has of each, and: ``beyond``, how many of its images are farther than the cut-off from the one kept;
        ``stars``, the images that stars would keep of it, those that represent most first, None where it has too many to
        compare; ``shown``, those of its images that the report shows.
    """
    if sets.threshold is None or not LINKAGES[run.settings.linkage].may_chain:
        return []
    table = sets.table
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


def _find_stars(run: BalanceRun, sets: Sets, label: int, threshold: float, copies: IntArray) -> list[int] | None:
    """Cover a set by stars, which never leave it, given how many rows equal each unique row, int64 [U]."""
    rows = run.rows
    place = np.flatnonzero(sets.labels[rows.unique] == label)
    if len(place) > _MAX_STARRED:
        return None
    numbers = np.arange(len(place), dtype=rows.unique.dtype)
    block = load_block(lambda some: rows.read(rows.unique[place[some]]), numbers, run.context.device, run.scan.dtype)
    pairs = sort_edges(Edges.concatenate(near_pairs(block, block, threshold)))
    representatives = star_cover(pairs, copies[place])
    represented = np.bincount(representatives, weights=copies[place], minlength=len(place))
    order = np.argsort(-represented, kind="stable")[: count_kept(representatives)]
    stars: list[int] = rows.unique[place[order]].tolist()
    return stars
