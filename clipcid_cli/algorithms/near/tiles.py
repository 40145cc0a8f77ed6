"""The tiles of a search, computed from their numbers, and how they are divided among processes and sessions.

400 million rows have 300 million tiles. None is stored: what a process searches is a few ranges of numbers, and what it has
finished is how far it came in them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import tee

import numpy as np
import torch

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import IntArray, ReadRows
from clipcid_cli.algorithms.near.search import CACHE_BYTES, Panels, Wants, default_panel_rows, near_pairs, near_pairs_of

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


class TiledSearch(Panels):
    """A search among some rows for pairs within a distance, divided into tiles."""

    def __init__(
        self,
        read: ReadRows,
        rows: IntArray,
        device: torch.device,
        scan_dtype: torch.dtype,
        panel_rows: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Divide the work into tiles."""
        size = self.panel_rows = panel_rows or default_panel_rows(len(rows))
        self.rows = rows
        super().__init__(read, lambda index: rows[index * size : (index + 1) * size], device, scan_dtype, cache_bytes)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.panel_rows)

    def num_pairs(self, i: int, j: int) -> int:
        """Count the pairs of rows of two panels, or of one panel."""
        size_i, size_j = len(self.rows_of(i)), len(self.rows_of(j))
        return size_i * (size_i - 1) // 2 if i == j else size_i * size_j

    @property
    def name(self) -> str:
        """Identifies how the work is divided."""
        return f"strips-{self.panel_rows}"

    def tiles(self) -> Tiles:
        """Return the tiles (panel i, panel j), i ≤ j."""
        return TriangleTiles(len(self))

    @property
    def num_all_pairs(self) -> int:
        """Number of pairs that all tiles compare."""
        return len(self.rows) * (len(self.rows) - 1) // 2

    def search_tiles(
        self, tiles: Iterable[Tile], cutoff: float, wants: Wants
    ) -> Iterator[tuple[Tile, Iterable[Edges]]]:
        """Search tiles one after another; yields each tile, and what `near_pairs` yields for it."""
        tiles, again = tee(tiles)
        return zip(again, near_pairs_of(((self[i], self[j]) for i, j in tiles), cutoff, wants), strict=True)

    def search_tile(self, tile: Tile, cutoff: float, wants: Wants) -> Iterator[Edges]:
        """Read the panels of a tile and search them."""
        return near_pairs(self[tile[0]], self[tile[1]], cutoff, wants)


class GrownSearch(TiledSearch):
    """A search for the pairs that have a new row; old rows that fill its last panel are compared with all, too."""

    def __init__(
        self,
        read: ReadRows,
        new: IntArray,
        old: IntArray,
        device: torch.device,
        scan_dtype: torch.dtype,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Divide the work into tiles.

        Args:
            new: New rows, integers [M], each once.
            old: Old rows, likewise.
        """
        # No larger than the new rows fill.
        panel_rows = min(default_panel_rows(len(new) + len(old)), default_panel_rows(8 * len(new)))
        super().__init__(read, np.concatenate([new, old]), device, scan_dtype, panel_rows, cache_bytes)
        self._num_first = -(-len(new) // panel_rows)

    @property
    def name(self) -> str:
        """Identifies how the work is divided."""
        return f"{self.panel_rows}-grown"

    def tiles(self) -> Tiles:
        """Return the tiles (panel i, panel j), i ≤ j, whose panel i has new rows."""
        return GrownTiles(self._num_first, len(self))

    @property
    def num_all_pairs(self) -> int:
        """Number of pairs that all tiles compare."""
        first = min(self._num_first * self.panel_rows, len(self.rows))
        return first * (first - 1) // 2 + first * (len(self.rows) - first)
