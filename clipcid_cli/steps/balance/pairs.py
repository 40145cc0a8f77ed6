"""All pairs within a distance, looked for within the sets of a forest: what a cover by stars needs beside it."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipcid_cli.algorithms.search.distances import IntArray
from clipcid_cli.algorithms.search.edges import Edges
from clipcid_cli.algorithms.search.pair_search import TiledSearch
from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.precision import choose_scan
from clipcid_cli.steps.balance.search import Survey
from clipcid_cli.steps.reporting import Reporter

# What `collect_few_pairs` does at most, some seconds on two cores: rows compared, and pairs found (20 bytes each, and as
# much again several times to sort and cover them). Small panels compare few rows of different components.
_MOST_COMPARED = 2**31
_MOST_FOUND = 2**23
_SMALL_PANEL = 2048
# Pairs that `collect_pairs` collects at most, and the memory each takes while they are sorted and covered (measured).
_MOST_COLLECTED = 2**26
_BYTES_A_PAIR = 75


@dataclasses.dataclass(frozen=True)
class NotComputed:
    """The result of what was not computed.

    Attributes:
        reason: Ends the sentence "… is not computed: ".
    """

    reason: str


def collect_pairs(
    machine: Machine, survey: Survey, labels: IntArray, cutoff: float, precision: str, reporter: Reporter
) -> Edges:
    """Find all pairs of unique rows within a distance, given which rows are joined at it; the same on every process.

    Args:
        labels: Component of each row at the distance, int64 [N]; only pairs within one are looked at.
        cutoff: The distance, inclusive.
        precision: Format in which near pairs are looked for.

    Raises:
        ClipcidError: when they are more than fit into memory.
    """
    join, tiles = _join_within(machine, survey, labels, precision)
    found, is_whole = _search_within(machine, join, tiles, labels, cutoff, _MOST_COLLECTED, reporter)
    if not all(machine.gather(is_whole)) or sum(machine.gather(len(found))) > _MOST_COLLECTED:
        raise ClipcidError(
            f"More than {_MOST_COLLECTED:,} pairs of images are within {cutoff:.4f} of each other. A cover by stars holds "
            f"all of them in memory, about {_BYTES_A_PAIR} bytes each: "
            f"over {_MOST_COLLECTED * _BYTES_A_PAIR / 2**30:.0f} GiB.",
            "Use --linkage single, or let fewer images go: a larger --keep or a smaller --threshold.",
        )
    return Edges.concatenate(machine.gather(found))


def collect_few_pairs(
    machine: Machine, survey: Survey, labels: IntArray, cutoff: float, precision: str, reporter: Reporter
) -> Edges | NotComputed:
    """Find the pairs that :func:`collect_pairs` finds, unless they are so many that it would take long.

    Returns:
        The pairs, or what there is too much of; the same for any number of processes.
    """
    join, tiles = _join_within(machine, survey, labels, precision, _SMALL_PANEL)
    compared = sum(map(join.num_pairs, tiles))
    if compared > _MOST_COMPARED:
        return NotComputed(
            f"it takes {compared:,} comparisons within the sets, more than the {_MOST_COMPARED:,} made for a report"
        )
    found, is_whole = _search_within(machine, join, tiles, labels, cutoff, _MOST_FOUND, reporter)
    if not all(machine.gather(is_whole)) or sum(machine.gather(len(found))) > _MOST_FOUND:
        return NotComputed(f"more than {_MOST_FOUND:,} pairs are within the cut-off")
    return Edges.concatenate(machine.gather(found))


def _join_within(
    machine: Machine, survey: Survey, labels: IntArray, precision: str, panel_rows: int | None = None
) -> tuple[TiledSearch, list[tuple[int, int]]]:
    """Join the unique rows of each component; returns the tiles in which two rows of one may meet."""
    sizes = np.bincount(labels[survey.unique], minlength=survey.num_rows)
    members = survey.unique[sizes[labels[survey.unique]] > 1]
    members = members[np.argsort(labels[members], kind="stable")]
    scan = choose_scan(precision, machine.device)
    join = TiledSearch(survey.read, members, machine.device, scan.dtype, panel_rows)
    # Rows lie sorted by component, so two panels share one only where the later begins with what the earlier ends with.
    return join, [tile for tile in join.tiles() if _shares_component(join, labels, tile)]


def _search_within(
    machine: Machine,
    join: TiledSearch,
    tiles: list[tuple[int, int]],
    labels: IntArray,
    cutoff: float,
    most: int,
    reporter: Reporter,
) -> tuple[Edges, bool]:
    """Search this process's share of the tiles for pairs of one component.

    Returns:
        What was found, and whether that is all: the search ends where there are more than `most`.
    """
    found: list[Edges] = []
    number = 0
    mine = tiles[machine.rank :: machine.size]
    if not mine:
        return Edges.empty(), True
    with reporter.progress("pairs", sum(map(join.num_pairs, mine)), "pairs") as progress:
        for tile in mine:
            for edges in join.search_tile(tile, cutoff, lambda a, b, _: labels[a] == labels[b]):
                found.append(edges)
                number += len(edges)
                if number > most:
                    return Edges.empty(), False
            progress.advance(join.num_pairs(tile))
    return Edges.concatenate(found), True


def _shares_component(join: TiledSearch, labels: IntArray, tile: tuple[int, int]) -> bool:
    i, j = tile
    return i == j or bool(labels[join.panel_rows_of(i)[-1]] == labels[join.panel_rows_of(j)[0]])
