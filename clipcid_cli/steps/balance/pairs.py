"""All pairs within a distance, searched within the components of a forest: a star cover needs them beside the forest."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipcid_cli.algorithms.search.distances import IntArray
from clipcid_cli.algorithms.search.edges import Edges
from clipcid_cli.algorithms.search.pair_search import TiledSearch
from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.precision import choose_scan
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.reporting import Reporter

# Limits of `collect_few_pairs`, some seconds on two cores: rows compared, and pairs found (20 bytes each, and several times
# that to sort and cover them). Small panels compare few rows of different components.
_MOST_COMPARED = 2**31
_MOST_FOUND = 2**23
_SMALL_PANEL = 2048
# Limit of `collect_pairs`, and the memory a pair takes while pairs are sorted and covered (measured).
_MOST_COLLECTED = 2**26
_BYTES_A_PAIR = 75


@dataclasses.dataclass(frozen=True)
class NotComputed:
    """The result of what was not computed.

    Attributes:
        reason: Completes the sentence "… is not computed: ".
    """

    reason: str


def collect_pairs(
    machine: Machine, rows: BalanceRows, labels: IntArray, cutoff: float, precision: str, reporter: Reporter
) -> Edges:
    """Find all pairs of unique rows within a distance, given the components at it; the same on every process.

    Args:
        labels: Component of each row at the distance, int64 [N]; only pairs within one are compared.
        cutoff: The distance, inclusive.
        precision: Format of the fast product, see `choose_scan`.

    Raises:
        ClipcidError: when they would not fit into memory.
    """
    search, tiles = _search_within_components(machine, rows, labels, precision)
    found = _collect(machine, search, tiles, labels, cutoff, _MOST_COLLECTED, reporter)
    if found is None:
        raise ClipcidError(
            f"More than {_MOST_COLLECTED:,} pairs of images are within {cutoff:.4f} of each other. A star cover holds all "
            f"of them in memory, about {_BYTES_A_PAIR} bytes each: "
            f"over {_MOST_COLLECTED * _BYTES_A_PAIR / 2**30:.0f} GiB.",
            "Use --linkage single, or drop fewer images: a larger --keep or a smaller --threshold.",
        )
    return found


def collect_few_pairs(
    machine: Machine, rows: BalanceRows, labels: IntArray, cutoff: float, precision: str, reporter: Reporter
) -> Edges | NotComputed:
    """Find the pairs that :func:`collect_pairs` finds, unless that would take long.

    Returns:
        The pairs, or what there is too much of; the same for any number of processes.
    """
    search, tiles = _search_within_components(machine, rows, labels, precision, _SMALL_PANEL)
    compared = sum(map(search.num_pairs, tiles))
    if compared > _MOST_COMPARED:
        return NotComputed(
            f"it takes {compared:,} comparisons within the groups, more than the {_MOST_COMPARED:,} made for a report"
        )
    found = _collect(machine, search, tiles, labels, cutoff, _MOST_FOUND, reporter)
    if found is None:
        return NotComputed(f"more than {_MOST_FOUND:,} pairs are within the cut-off")
    return found


def _search_within_components(
    machine: Machine, rows: BalanceRows, labels: IntArray, precision: str, panel_rows: int | None = None
) -> tuple[TiledSearch, list[tuple[int, int]]]:
    """Return a search of the unique rows that are not alone in their component, and its tiles that may hold pairs of one."""
    sizes = np.bincount(labels[rows.unique], minlength=len(rows))
    members = rows.unique[sizes[labels[rows.unique]] > 1]
    members = members[np.argsort(labels[members], kind="stable")]
    scan = choose_scan(precision, machine.device)
    search = TiledSearch(rows.read, members, machine.device, scan.dtype, panel_rows)
    # Members are sorted by component, so two panels share one only where the later begins with what the earlier ends with.
    return search, [tile for tile in search.tiles() if _shares_component(search, labels, tile)]


def _shares_component(search: TiledSearch, labels: IntArray, tile: tuple[int, int]) -> bool:
    i, j = tile
    return i == j or bool(labels[search.panel_rows_of(i)[-1]] == labels[search.panel_rows_of(j)[0]])


def _collect(
    machine: Machine,
    search: TiledSearch,
    tiles: list[tuple[int, int]],
    labels: IntArray,
    cutoff: float,
    most: int,
    reporter: Reporter,
) -> Edges | None:
    """Find the pairs of one component in the tiles, each process in its share; None where they are more than `most`."""
    mine = tiles[machine.rank :: machine.size]
    found: list[Edges] = []
    number = 0
    if mine:
        with reporter.progress("pairs", sum(map(search.num_pairs, mine)), "pairs") as progress:
            for tile in mine:
                for edges in search.search_tile(tile, cutoff, lambda a, b, _: labels[a] == labels[b]):
                    number += len(edges)
                    if number > most:
                        break
                    found.append(edges)
                if number > most:
                    break
                progress.advance(search.num_pairs(tile))
    if sum(machine.gather(number)) > most:
        return None
    return Edges.concatenate(machine.gather(Edges.concatenate(found)))
