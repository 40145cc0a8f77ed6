"""All pairs within a distance, searched within the components of a forest: a star cover needs them beside the forest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.algorithms.near.search import CACHE_BYTES, default_panel_rows, near_pairs
from clipcid_cli.algorithms.near.tiles import Tile, TiledSearch
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import Arrays, spool_arrays
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.precision import choose_scan
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.shared_arrays import collect_arrays, share_arrays

# Limits of `collect_few_pairs`, some seconds on two cores: rows compared, and pairs found (20 bytes each, and several times
# that to sort and cover them). Small panels compare few rows of different components.
_MOST_COMPARED = 2**31
_MOST_FOUND = 2**23
_SMALL_PANEL = 2048
# Limit of the small panels kept for the next tiles: few components have more than two.
_SMALL_CACHE = 2**26
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
    machine: Machine,
    folder: Path,
    rows: BalanceRows,
    labels: IntArray,
    cutoff: float,
    precision: str,
    reporter: Reporter,
) -> Edges:
    """Find all pairs of unique rows within a distance, given the components at it; the same on every process.

    Args:
        folder: Where processes share what they find.
        labels: Component of each row at the distance, int64 [N]; only pairs within one are compared.
        cutoff: The distance, inclusive.
        precision: Format of the fast product, see `choose_scan`.
    """
    tiles = _share_tiles(machine, folder, rows, labels)
    parts = _collect(machine, folder, tiles, rows, precision, cutoff, _MOST_COLLECTED, CACHE_BYTES, reporter)
    if parts is None:
        raise ClipcidError(
            f"More than {_MOST_COLLECTED:,} pairs of images are within {cutoff:.4f} of each other. A star cover holds all "
            f"of them in memory, about {_BYTES_A_PAIR} bytes each: "
            f"over {_MOST_COLLECTED * _BYTES_A_PAIR / 2**30:.0f} GiB.",
            "Use --linkage single, or drop fewer images: a larger --keep or a smaller --threshold.",
        )

    def join() -> Arrays:
        found = Edges.concatenate(parts)
        return found.a, found.b, found.weight

    return Edges(*share_arrays(machine, folder, join))


def collect_few_pairs(
    machine: Machine,
    folder: Path,
    rows: BalanceRows,
    labels: IntArray,
    cutoff: float,
    precision: str,
    reporter: Reporter,
) -> Edges | NotComputed:
    """Find the pairs that :func:`collect_pairs` finds, unless that would take long.

    Returns:
        The pairs on the first process, none on the others; or what there is too much of, on all.
    """
    tiles = _share_tiles(machine, folder, rows, labels, _SMALL_PANEL)
    compared = tiles.num_pairs
    if compared > _MOST_COMPARED:
        return NotComputed(
            f"it takes {compared:,} comparisons within the groups, more than the {_MOST_COMPARED:,} made for a report"
        )
    parts = _collect(machine, folder, tiles, rows, precision, cutoff, _MOST_FOUND, _SMALL_CACHE, reporter)
    if parts is None:
        return NotComputed(f"more than {_MOST_FOUND:,} pairs are within the cut-off")
    return Edges.concatenate(parts)


def _share_tiles(
    machine: Machine, folder: Path, rows: BalanceRows, labels: IntArray, panel_rows: int | None = None
) -> ComponentTiles:
    (members,) = share_arrays(machine, folder, lambda: (_find_members(rows, labels),))
    return ComponentTiles(labels, members, panel_rows)


def _find_members(rows: BalanceRows, labels: IntArray) -> IntArray:
    """Return the unique rows that are not alone in their component, by component, integers [M]."""
    label_U = labels[rows.unique]
    members = rows.unique[(np.bincount(label_U, minlength=1) > 1)[label_U]]
    return members[np.argsort(labels[members], kind="stable")]


class ComponentTiles:
    """The tiles of a search that may hold pairs of one component; how many pairs they compare is known before any is made.

    Args:
        labels: Component of each row, integers [N].
        members: Unique rows that are not alone in their component, by component, integers [M].
        panel_rows: Rows a side of a tile, see `TiledSearch`.
    """

    def __init__(self, labels: IntArray, members: IntArray, panel_rows: int | None = None) -> None:
        self.labels, self.members = labels, members
        self.panel_rows = default_panel_rows(len(members)) if panel_rows is None else panel_rows
        starts = np.arange(0, len(members), self.panel_rows)
        self._ends = np.append(starts, len(members))[1:]
        # Members are sorted by component, so a panel shares one with those that begin with what it ends with.
        first, last = labels[self.members[starts]], labels[self.members[self._ends - 1]]
        self._farthest = np.maximum(np.searchsorted(first, last, side="right") - 1, np.arange(len(starts)))

    @property
    def num_pairs(self) -> int:
        """Number of pairs that all tiles compare."""
        sizes = np.diff(self._ends, prepend=0)
        return int((sizes * (sizes - 1) // 2 + sizes * (self._ends[self._farthest] - self._ends)).sum())

    def __iter__(self) -> Iterator[Tile]:
        for i, farthest in enumerate(self._farthest.tolist()):
            for j in range(i, farthest + 1):
                yield i, j


def _collect(
    machine: Machine,
    folder: Path,
    tiles: ComponentTiles,
    rows: BalanceRows,
    precision: str,
    cutoff: float,
    most: int,
    cache_bytes: int,
    reporter: Reporter,
) -> list[Edges] | None:
    """Find the pairs of one component in the tiles, each process in its share.

    Returns:
        On the first process what each found, mapped, and nothing on the others; None where they are more than `most`.
    """
    scan, labels = choose_scan(precision, machine.device), tiles.labels
    number = 0

    def find() -> Iterator[Arrays]:
        nonlocal number
        search = TiledSearch(rows.read, tiles.members, machine.device, scan.dtype, tiles.panel_rows, cache_bytes)
        with reporter.progress("pairs", tiles.num_pairs // machine.size, "pairs") as progress:
            for i, j in islice(tiles, machine.rank, None, machine.size):
                for edges in near_pairs(search[i], search[j], cutoff, lambda a, b, _: labels[a] == labels[b]):
                    number += len(edges)
                    if number > most:
                        return
                    yield edges.a, edges.b, edges.weight
                progress.advance(search.num_pairs(i, j))

    kinds = (tiles.members.dtype, tiles.members.dtype, np.float32)
    found = machine.on_all(lambda: spool_arrays(folder, kinds, find() if len(tiles.members) else ()))
    if sum(machine.gather(number)) > most:
        return None
    return [Edges(*each) for each in collect_arrays(machine, folder, found)]
