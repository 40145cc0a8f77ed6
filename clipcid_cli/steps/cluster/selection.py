"""Which rows of the embeddings are clustered, at a bit a row: processes send it to each other, and each holds it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from clipcid_cli.algorithms.near.exact import BoolArray, IntArray

# Rows of which the chosen ones are counted.
_BLOCK = 4096


class Selection:
    """Some of M rows, numbered 0 … N − 1 in their order. Memory: 0.13 bytes for each of the M."""

    def __init__(self, is_chosen: BoolArray) -> None:
        """Take the chosen ones of all rows, bool [M]."""
        self._num_all = len(is_chosen)
        self._bits = np.packbits(is_chosen)
        counts = np.add.reduceat(is_chosen, np.arange(0, len(is_chosen), _BLOCK), dtype=np.int64)
        self._before = np.append(0, np.cumsum(counts))

    def __len__(self) -> int:
        return int(self._before[-1])

    def places(self, numbers: IntArray) -> IntArray:
        """Return where chosen rows are among all, by their numbers, which come in any order: int64 [n]."""
        blocks = np.searchsorted(self._before, numbers, side="right") - 1
        order = np.argsort(blocks, kind="stable")
        bounds = np.append(np.flatnonzero(np.diff(blocks[order], prepend=-1)), len(order))
        found = np.empty(len(numbers), np.int64)
        for begin, end in pairwise(bounds.tolist()):
            here = order[begin:end]
            block = int(blocks[here[0]])
            bits = self._bits[block * _BLOCK // 8 : (block + 1) * _BLOCK // 8]
            chosen = np.flatnonzero(np.unpackbits(bits)) + block * _BLOCK
            found[here] = chosen[numbers[here] - self._before[block]]
        return found

    def subset(self, numbers: IntArray) -> Selection:
        """Return the selection of some of the chosen rows, by their numbers."""
        is_chosen = np.zeros(self._num_all, np.bool_)
        is_chosen[self.places(numbers)] = True
        return Selection(is_chosen)
