"""The tiles of a search, computed from their numbers, and how they are divided among processes and sessions.

400 million rows have 300 million tiles. None is stored: what a process searches is a few ranges of numbers, and what it has
finished is how far it came in them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from clipcid_cli.algorithms.near.distances import IntArray

Tile = tuple[int, int]

# Strips of panels that tiles are ordered by first: with as many processes or fewer, each compares panels of its own with
# others and has its part of the diagonal, where near rows often are.
_STRIPS = 8


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
    """The tiles (panel i, panel j), i ≤ j < `num_panels`, so ordered that any stretch of numbers has few different panels.

    On a circle each panel is compared with itself and the half of the others that follow it. That makes a rectangle of
    panels by offsets, which is cut into strips of panels and those into halves, again and again along the longer side; the
    tiles of one half come before those of the other. So, however many panels a process keeps, the tiles it has them for
    follow one another, and processes that each take a stretch of the numbers read few of the same panels.
    """

    def __init__(self, num_panels: int) -> None:
        self._panels = num_panels
        first, rest = (num_panels + 1) // 2, num_panels // 2
        # First panel, number of panels, number of offsets: of an even number of panels only half have one exactly opposite.
        self._rectangles = (
            [(0, num_panels, first)] if num_panels % 2 else [(0, rest, rest + 1), (rest, num_panels - rest, rest)]
        )

    def __len__(self) -> int:
        return self._panels * (self._panels + 1) // 2

    def at(self, number: int) -> Tile:
        """Return the tile of a number."""
        start, rows, offsets = self._rectangles[0]
        if number >= rows * offsets:
            number -= rows * offsets
            start, rows, offsets = self._rectangles[1]
        offset = 0
        while rows * offsets > 1:
            if rows > 1 and (rows >= offsets or rows * _STRIPS > self._panels):
                half = rows // 2
                if number < half * offsets:
                    rows = half
                else:
                    start, rows, number = start + half, rows - half, number - half * offsets
            else:
                half = offsets // 2
                if number < half * rows:
                    offsets = half
                else:
                    offset, offsets, number = offset + half, offsets - half, number - half * rows
        other = (start + offset) % self._panels
        return min(start, other), max(start, other)


class GrownTiles(Tiles):
    """The tiles (panel i, panel j), i ≤ j < `num_panels`, of the first panels i: first those of two first panels.

    The others follow in strips of some first panels, which stay while the rest pass by once.
    """

    def __init__(self, num_first: int, num_panels: int) -> None:
        self._first, self._rest = num_first, num_panels - num_first
        self._inner = TriangleTiles(num_first)

    def __len__(self) -> int:
        return len(self._inner) + self._first * self._rest

    def at(self, number: int) -> Tile:
        """Return the tile of a number."""
        if number < len(self._inner):
            return self._inner.at(number)
        strip, place = divmod(number - len(self._inner), _STRIPS * self._rest)
        other, each = divmod(place, min(_STRIPS, self._first - strip * _STRIPS))
        return strip * _STRIPS + each, self._first + other


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
    """Divide numbers evenly among processes by their order, so that each has a stretch of them.

    Returns:
        The share of each of `size` processes.
    """
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
