"""The tiles of a search, computed from their numbers, and how they are divided among processes and sessions.

400 million rows have 300 million tiles. None is stored: what a process searches is a few ranges of numbers, and what it has
finished is how far it came in them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from clipcid_cli.algorithms.search.distances import IntArray

Tile = tuple[int, int]


class Tiles(ABC):
    """Tiles by number, 0 ≤ number < len."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def at(self, number: int) -> Tile:
        """Return the tile of a number."""

    def __iter__(self) -> Iterator[Tile]:
        return map(self.at, range(len(self)))


class TriangleTiles(Tiles):
    """The tiles (panel i, panel j), i ≤ j < `num_panels`, back and forth: the panels read last are needed next."""

    def __init__(self, num_panels: int) -> None:
        self._panels = num_panels

    def __len__(self) -> int:
        return self._panels * (self._panels + 1) // 2

    def at(self, number: int) -> Tile:
        """Return the tile of a number."""
        side = 2 * self._panels + 1
        i = (side - math.isqrt(side * side - 8 * number)) // 2
        if self._before(i) > number:  # the root was rounded down
            i -= 1
        beyond = number - self._before(i)
        return i, i + beyond if i % 2 == 0 else self._panels - 1 - beyond

    def _before(self, i: int) -> int:
        """Count the tiles of the panels before a panel."""
        return i * (2 * self._panels - i + 1) // 2


class PieceTiles(Tiles):
    """The tiles (partition, piece) of partitions divided into pieces, int64 [K]."""

    def __init__(self, pieces: IntArray) -> None:
        self._ends = np.cumsum(pieces)
        self._pieces = pieces

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def at(self, number: int) -> Tile:
        """Return the tile of a number."""
        partition = int(np.searchsorted(self._ends, number, side="right"))
        return partition, number - int(self._ends[partition] - self._pieces[partition])


def deal(numbers: Sequence[range], size: int) -> list[list[range]]:
    """Divide numbers evenly among processes: a single range in turn, several by their order.

    Returns:
        The share of each of `size` processes.
    """
    if len(numbers) == 1:
        return [[numbers[0][rank::size]] for rank in range(size)]
    total = sum(map(len, numbers))
    return [cut(numbers, total * rank // size, total * (rank + 1) // size) for rank in range(size)]


def cut(numbers: Sequence[range], start: int, stop: int) -> list[range]:
    """Return the numbers at the places start … stop − 1 of some ranges, one after the other."""
    found = []
    for part in numbers:
        inside = part[max(0, start) : max(0, stop)]
        if len(inside):
            found.append(inside)
        start, stop = start - len(part), stop - len(part)
    return found


def left_after(numbers: Sequence[range], done: Sequence[int]) -> list[range]:
    """Return what is left of numbers that were dealt to processes, each of which did the first so many of its share."""
    shares = deal(numbers, len(done))
    return [part for share, count in zip(shares, done, strict=True) for part in cut(share, count, sum(map(len, share)))]
