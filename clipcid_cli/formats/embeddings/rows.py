"""Rows of embeddings: mapped from any number of files, few of them at a time, and unit float16 whatever the files hold.

A mapped file takes a descriptor, of which a process has 1,024, and one of the system's 65,530 maps: data of 41,000
shards has more files than either. So a process keeps the maps it used last, `MAPS_KEPT` of them, whoever asked for them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.formats.embeddings.row_files import RowFile

Float16 = npt.NDArray[np.float16]

BLOCK_ROWS = 65_536

MAPS_KEPT = 96
"""Files that a process holds mapped; mapping one anew takes 50 µs, reading one of at most 64 KiB 5 µs."""

_ROWS_IN_CACHE = 512

# A float16 row whose norm is this close to 1 is used unchanged: rounding D ≤ 4,096 entries of a unit row changes it by less.
_UNIT_TOLERANCE = 2e-3


@lru_cache(maxsize=MAPS_KEPT)
def map_file(file: RowFile) -> npt.NDArray[Any]:
    """Map a file's rows, or give the map held."""
    return file.map()


class Rows:
    """Rows [N, D] in several files, mapped into memory as they are needed; read in slices or picked one by one."""

    def __init__(
        self,
        files: Sequence[RowFile],
        width: int,
        as_stored: bool,
        hold: bool = False,
        map_DD: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Prepare to read.

        Args:
            files: Files of [n, D], or of [n, V, D], which are n·V rows.
            as_stored: Whether rows are taken as they are: unit float16 for sure, or no embeddings at all.
            hold: Whether to map all files now, for as long as this object lives; else as they are needed, among `MAPS_KEPT`.
            map_DD: What rows are multiplied by before they are normalised again. Where its entries are multiples of 2⁻¹⁶,
                each row is to the bit the same on any machine and among any others: products are added without error.
        """
        self._files = files
        # Compressed arrays are unpacked once and stay: unpacking them again would take longer than all else.
        self._held = {number: file.map() for number, file in enumerate(files) if hold or file.unpacked}
        # Whether a file's rows are unit rows already; None until they have been checked, once.
        self._is_unit: list[bool | None] = [as_stored or None] * len(files)
        self._starts = np.concatenate([[0], np.cumsum([math.prod(file.shape[:-1]) for file in files], dtype=np.int64)])
        self.shape = (int(self._starts[-1]), width)
        self._dtype = files[0].dtype if as_stored and files else np.dtype(np.float16)
        self._map_DD = None if map_DD is None else map_DD.astype(np.float64)

    def __len__(self) -> int:
        return self.shape[0]

    def __getstate__(self) -> dict[str, Any]:
        """Send what describes the files, not their rows: another process maps them itself."""
        # By column: 41,000 data classes with a path each would take seconds for every worker.
        columns = [[getattr(file, field.name) for file in self._files] for field in dataclasses.fields(RowFile)]
        return self.__dict__ | {"_held": {}, "_files": [list(map(str, columns[0])), *columns[1:]]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        paths, *columns = state["_files"]
        self.__dict__ = state | {"_files": [RowFile(*file) for file in zip(map(Path, paths), *columns, strict=True)]}

    def read(self, start: int, stop: int) -> Float16:
        """Return rows start … stop − 1, float16 [n, D]; a view of the file where they come from a single one."""
        first = max(0, int(np.searchsorted(self._starts, start, side="right")) - 1)
        last = int(np.searchsorted(self._starts, stop, side="left"))
        if start >= stop or first >= last:
            return np.empty((0, self.shape[1]), self._dtype)
        if last - first == 1:
            return self._part(first, start, stop)
        # Copied one by one: views would hold all their files open.
        rows = np.empty((min(stop, len(self)) - start, self.shape[1]), self._dtype)
        for number in range(first, last):
            part = self._part(number, start, stop)
            begin = max(0, int(self._starts[number]) - start)
            rows[begin : begin + len(part)] = part
        return rows

    def _part(self, number: int, start: int, stop: int) -> Float16:
        """Return those of a file's rows that are rows start … stop − 1."""
        begin = int(self._starts[number])
        return self._unit(number, self._rows(number)[max(0, start - begin) : max(0, stop - begin)])

    def take(self, positions: npt.NDArray[np.int64]) -> Float16:
        """Return the rows at `positions` (int64 [n], any order), float16 [n, D], as an array of its own."""
        if len(positions) and np.array_equal(positions, np.arange(positions[0], positions[0] + len(positions))):
            return np.array(self.read(int(positions[0]), int(positions[0]) + len(positions)))
        owners = np.searchsorted(self._starts, positions, side="right") - 1
        order = np.argsort(owners, kind="stable")
        bounds = np.append(np.flatnonzero(np.diff(owners[order], prepend=-1)), len(order))
        rows = np.empty((len(positions), self.shape[1]), self._dtype)
        for begin, end in pairwise(bounds.tolist()):
            places = order[begin:end]
            number = int(owners[places[0]])
            rows[places] = self._unit(number, self._rows(number)[positions[places] - self._starts[number]])
        return rows

    def _rows(self, number: int) -> npt.NDArray[Any]:
        rows = self._held.get(number)
        if rows is None:
            rows = map_file(self._files[number])
            if self._files[number].unpacked:
                self._held[number] = rows
        return rows.reshape(-1, self.shape[1])

    def _unit(self, number: int, part: npt.NDArray[Any]) -> Float16:
        if self._is_unit[number] is None:
            self._is_unit[number] = holds_unit_rows(self._rows(number))
        if not self._is_unit[number]:
            part = unit_rows(part)
        if self._map_DD is not None:
            return unit_rows(part.astype(np.float64) @ self._map_DD)
        # An array in an archive may begin at an odd byte.
        return part if part.flags.aligned and part.flags.c_contiguous else np.array(part, order="C")

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[int, Float16]]:
        """Yield (number of the first row, rows) for consecutive blocks of `size` rows; the last may be shorter."""
        for start in range(0, len(self), size):
            yield start, self.read(start, min(start + size, len(self)))


def unit_rows(rows: npt.NDArray[Any]) -> Float16:
    """Normalise rows and round them once to float16; float16 rows that are unit rows already are unchanged.

    Args:
        rows: [n, D] of any floating-point format.

    Returns:
        float16 [n, D]; each row depends on its own values only. Zero rows and rows that are not finite become NaN.
    """
    exact = rows.astype(np.float64)
    norms = np.sqrt((exact * exact).sum(axis=1, keepdims=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = np.where(np.isfinite(norms), exact / norms, np.nan).astype(np.float16)
    if rows.dtype == np.float16:
        scaled = np.where(np.abs(norms - 1) <= _UNIT_TOLERANCE, rows, scaled)
    return scaled


def holds_unit_rows(rows: npt.NDArray[Any]) -> bool:
    """Tell whether `unit_rows` would leave all rows [n, D] unchanged."""
    if rows.dtype != np.float16:
        return False
    for start in range(0, len(rows), _ROWS_IN_CACHE):
        exact = rows[start : start + _ROWS_IN_CACHE].astype(np.float64)
        norms = np.sqrt((exact * exact).sum(axis=1))
        if not np.all(np.abs(norms - 1) <= _UNIT_TOLERANCE):
            return False
    return True
