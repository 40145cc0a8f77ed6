"""A search of partitions: the rows of each against each other and against its visitors, in tiles like a full search.

Source: docs/method.md#partitioned-search.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from clipcid_cli.algorithms.near.block import Block
from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import IntArray, ReadRows
from clipcid_cli.algorithms.near.search import Wants, near_pairs
from clipcid_cli.algorithms.near.tiles import PieceTiles, TiledSearch

# Rows read at once on each side: a partition of more is compared in pieces, so memory does not depend on its size.
_PANEL_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class Groups:
    """Lists of rows, one a partition, in one array.

    Attributes:
        rows: The rows of all lists, integers [E].
        ends: Where each list ends, int64 [K].
    """

    rows: IntArray
    ends: IntArray

    @staticmethod
    def of_entries(partitions: IntArray, rows: IntArray, num_partitions: int) -> Groups:
        """Make the lists of entries, each a partition in [0, K) and a row, integers [E]; a list keeps their order."""
        return Groups.of_parts(
            lambda: [(partitions, rows)], num_partitions, lambda length: np.empty(length, rows.dtype)
        )

    @staticmethod
    def of_parts(
        parts: Callable[[], Iterable[tuple[IntArray, IntArray]]],
        num_partitions: int,
        allocate: Callable[[int], IntArray],
    ) -> Groups:
        """Make the lists of entries that come part by part, as `of_entries` would of all of them, in the memory of a part.

        Args:
            parts: Gives the parts, partitions and rows; it is called twice.
            allocate: Makes the array of all lists, of a length.
        """
        sizes = np.zeros(num_partitions, np.int64)
        for partitions, _ in parts():
            sizes += np.bincount(partitions, minlength=num_partitions)
        ends = np.cumsum(sizes)
        lists, free = allocate(int(ends[-1])), ends - sizes
        for partitions, rows in parts():
            counts = np.bincount(partitions, minlength=num_partitions)
            order = np.argsort(partitions, kind="stable")
            # An entry's place among those of its partition in this part, behind those of the parts before.
            within = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
            lists[np.repeat(free, counts) + within] = rows[order]
            free += counts
        return Groups(lists, ends)

    def sizes(self) -> IntArray:
        """Return the length of each list, int64 [K]."""
        return np.diff(self.ends, prepend=0)

    def of(self, partition: int) -> IntArray:
        """Return the rows of one partition in the order they were given."""
        start = int(self.ends[partition - 1]) if partition else 0
        return self.rows[start : int(self.ends[partition])]


class PartitionedSearch:
    """A search of partitions for pairs within a distance. A tile is a piece of one partition.

    It finds pairs of rows at home in one partition, and pairs of which one row visits the other's home; some of them twice.

    Args:
        rows: Rows to compare, int64 [N], each once.
        homes: Positions in `rows` by home partition.
        visitors: Positions in `rows` by the partitions they visit, never their home.
        scan_dtype: Format of the fast product.
        panel_rows: Rows read at once on each side.
    """

    def __init__(
        self,
        read: ReadRows,
        rows: IntArray,
        homes: Groups,
        visitors: Groups,
        device: torch.device,
        scan_dtype: torch.dtype,
        panel_rows: int = _PANEL_ROWS,
    ) -> None:
        self.panel_rows = panel_rows
        self._rows = rows
        self._homes, self._visitors = homes, visitors
        self._home_sizes, self._visitor_sizes = homes.sizes(), visitors.sizes()
        self._search = TiledSearch(read, rows, device, scan_dtype)

    @property
    def name(self) -> str:
        """Identifies the partitions and how the work is divided."""
        sizes = hashlib.blake2b(digest_size=6)
        for groups in (self._homes, self._visitors):
            sizes.update(groups.sizes().tobytes())
        return f"partitioned-{sizes.hexdigest()}-{self.panel_rows}"

    def tiles(self) -> PieceTiles:
        """Return the tiles (partition, piece)."""
        return PieceTiles(-(-self._home_sizes // self.panel_rows))

    @property
    def num_all_pairs(self) -> int:
        """Number of pairs that all tiles compare."""
        return int((self._home_sizes * (self._home_sizes - 1) // 2 + self._home_sizes * self._visitor_sizes).sum())

    def num_pairs(self, partition: int, piece: int) -> int:
        """Count the pairs of rows a tile compares."""
        total = int(self._home_sizes[partition])
        start, stop = piece * self.panel_rows, min((piece + 1) * self.panel_rows, total)
        size = stop - start
        return size * (size - 1) // 2 + size * (total - stop + int(self._visitor_sizes[partition]))

    def search_tiles(
        self, tiles: Iterable[tuple[int, int]], cutoff: float, pair_filter: Wants
    ) -> Iterator[tuple[tuple[int, int], Iterable[Edges]]]:
        """As :meth:`TiledSearch.search_tiles`."""
        return ((tile, self.search_tile(tile, cutoff, pair_filter)) for tile in tiles)

    def search_tile(self, tile: tuple[int, int], cutoff: float, pair_filter: Wants) -> Iterator[Edges]:
        """Compare a piece of a partition with itself, the pieces after it, and the partition's visitors.

        Args:
            cutoff: Largest distance, inclusive.

        Yields:
            As :meth:`TiledSearch.search`.
        """
        partition, piece = tile
        home, visitors = self._homes.of(partition), self._visitors.of(partition)
        start, stop = piece * self.panel_rows, (piece + 1) * self.panel_rows
        panel = self._load(home[start:stop])
        yield from near_pairs(panel, panel, cutoff, pair_filter)
        for others in (home[stop:], visitors):
            for at in range(0, len(others), self.panel_rows):
                yield from near_pairs(panel, self._load(others[at : at + self.panel_rows]), cutoff, pair_filter)

    def _load(self, positions: IntArray) -> Block:
        return self._search.load(self._rows[positions])
