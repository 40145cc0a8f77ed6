"""Which rows of the embeddings are clustered, at a bit a row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]

# Rows of which the chosen ones are counted.
_BLOCK = 4096


class Selection:
    """Some of M rows, numbered 0 … N − 1 in their order. Memory: 0.13 bytes for each of the M."""

    def __init__(self, chosen: npt.NDArray[np.bool_]) -> None:
        """Take the chosen ones of all rows, bool [M]."""
        self.num_all = len(chosen)
        self._bits = np.packbits(chosen)
        counts = np.add.reduceat(chosen, np.arange(0, len(chosen), _BLOCK), dtype=np.int64)
        self._before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self._before[-1])

    def between(self, start: int, stop: int) -> Numbers:
        """Return the numbers, among all rows, of the chosen ones from start to stop − 1: int64, ascending."""
        first = int(np.searchsorted(self._before, start, side="right")) - 1
        begin = int(self._before[first])
        return self._numbers(first, int(np.searchsorted(self._before, stop)))[start - begin : stop - begin]

    def at(self, positions: Numbers) -> Numbers:
        """Return the numbers, among all rows, of the chosen ones at some positions, int64 [n] in any order."""
        blocks = np.searchsorted(self._before, positions, side="right") - 1
        order = np.argsort(blocks, kind="stable")
        different, firsts = np.unique(blocks[order], return_index=True)
        numbers = np.empty(len(positions), dtype=np.int64)
        for block, first, last in zip(different.tolist(), firsts, [*firsts[1:], len(order)], strict=False):
            places = order[first:last]
            numbers[places] = self._numbers(block, block + 1)[positions[places] - self._before[block]]
        return numbers

    def subset(self, positions: Numbers) -> Selection:
        """Return the selection of the chosen ones at some positions."""
        chosen = np.zeros(self.num_all, dtype=np.bool_)
        chosen[self.at(positions)] = True
        return Selection(chosen)

    def _numbers(self, first: int, last: int) -> Numbers:
        """Return the numbers of the rows chosen of the blocks from first to last − 1."""
        bits = self._bits[first * _BLOCK // 8 : last * _BLOCK // 8]
        # Bits beyond the last row are 0.
        return np.flatnonzero(np.unpackbits(bits)) + first * _BLOCK
