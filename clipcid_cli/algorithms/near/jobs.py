"""What a search compares, as numbered jobs: pairs of panels, which are stretches of an order of rows.

Exact, incremental and partitioned searches, and comparisons with other rows, are such jobs. A chunk is a fixed stretch of
the jobs, so what is done is known by the numbers of chunks, whatever the number of processes. 400 million rows have 300
million jobs: none is stored.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.algorithms.near.exact import IntArray

Job = tuple[int, int]

# Rows of a panel: of a search of all pairs as many as make a product fast, but few enough that a handful of processes get
# equal shares and a killed run loses little; less where several lists are compared, so that few panels are mostly empty.
_MAX_PANEL = 16_384
_PANEL = 8192
_MIN_PANEL = 2048
_MIN_PANELS = 8

# Of 400 million rows on 8 GPUs, each is a minute of work.
_MAX_CHUNKS = 4096
# A panel that passes by is read once for so many jobs; more would gain little.
_MAX_STRIP = 128


@dataclasses.dataclass(frozen=True)
class Jobs:
    """Jobs (panel i, panel j) in strips: some panels i, which stay in memory while the panels j pass by once."""

    # Row numbers in the order that panels are stretches of, integers [M]; a row may occur in several panels.
    rows: IntArray
    starts: IntArray  # where each panel starts in it, int64 [P]; it ends before `stops`
    stops: IntArray
    # The first panel j that each panel i is compared with, int64 [P], up to before `last`; itself is one.
    first: IntArray
    last: IntArray
    strip: int  # panels i of a strip

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def num_chunks(self) -> int:
        """How many chunks there are; the jobs alone decide."""
        return min(len(self), _MAX_CHUNKS)

    @property
    def num_pairs(self) -> int:
        sizes = self.stops - self.starts
        before = np.append(0, np.cumsum(sizes))
        own = np.where((self.first <= np.arange(len(sizes))) & (self.first < self.last), sizes, 0)
        return int((sizes * (before[self.last] - before[self.first])).sum() - (own * (own + 1) // 2).sum())

    @cached_property
    def identity(self) -> str:
        """Hash of all that decides what a chunk is."""
        return f"{hash_arrays(self.rows, self.starts, self.stops, self.first, self.last)}-{self.strip}"

    @cached_property
    def _ends(self) -> IntArray:
        """Number of jobs up to the end of each strip, int64 [S]."""
        return np.cumsum(np.add.reduceat(self.last - self.first, np.arange(0, len(self.starts), self.strip)))

    def panel(self, index: int) -> IntArray:
        return self.rows[self.starts[index] : self.stops[index]]

    def pairs_of(self, job: Job) -> int:
        size, other = (int(self.stops[panel] - self.starts[panel]) for panel in job)
        return size * (size - 1) // 2 if job[0] == job[1] else size * other

    def of_chunk(self, chunk: int) -> list[Job]:
        """Return the jobs of a chunk, in order."""
        start, stop = (len(self) * index // self.num_chunks for index in (chunk, chunk + 1))
        jobs = list[Job]()
        for strip in range(int(np.searchsorted(self._ends, start, side="right")), len(self._ends)):
            before = int(self._ends[strip - 1]) if strip else 0
            if before >= stop:
                break
            jobs += map(tuple, self._strip(strip)[max(0, start - before) : stop - before].tolist())
        return jobs

    def _strip(self, index: int) -> IntArray:
        """Return all jobs of a strip, in order, int64 [J, 2]."""
        i = np.arange(index * self.strip, min((index + 1) * self.strip, len(self.starts)))
        i = i[self.first[i] < self.last[i]]
        j = np.arange(self.first[i].min(initial=len(self.starts)), self.last[i].max(initial=0))
        which, place = np.nonzero((self.first[i] <= j[:, None]) & (j[:, None] < self.last[i]))
        return np.stack([i[place], j[which]], axis=1)


def hash_arrays(*arrays: npt.NDArray[Any]) -> str:
    """Hash what arrays hold."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def panel_rows_of(num_rows: int, *, all_pairs: bool = True) -> int:
    """Return the rows of a panel of a search of so many rows, in all pairs or in partitions."""
    if not all_pairs:
        return _PANEL
    return min(_MAX_PANEL, -(-(num_rows // _MIN_PANELS + 1) // _MIN_PANEL) * _MIN_PANEL)


def triangle(rows: IntArray, in_memory: int, num_first: int | None = None) -> Jobs:
    """Compare all pairs of rows, each once, or all pairs with one of the first rows; `in_memory` rows fit into memory."""
    panel_rows = panel_rows_of(len(rows))
    starts, stops, ahead = _cut([len(rows) if num_first is None else num_first, len(rows)], panel_rows)
    first = np.arange(len(starts))
    last = np.where(first < ahead, len(starts), first)
    return Jobs(rows, starts, stops, first, last, _strip_width(in_memory // panel_rows))


def rectangle(rows: IntArray, others: IntArray, in_memory: int) -> Jobs:
    """Compare each of some rows, integers [N], with each of some others, integers [M]."""
    starts, stops, ahead = _cut([len(rows), len(rows) + len(others)], _PANEL)
    first = np.full(len(starts), ahead)
    last = np.where(np.arange(len(starts)) < ahead, len(starts), first)
    return Jobs(np.concatenate([rows, others]), starts, stops, first, last, _strip_width(in_memory // _PANEL))


def components(members: IntArray, labels: IntArray, in_memory: int) -> Jobs:
    """Compare rows of one component, and others that share their panels, given the component of each, ascending."""
    starts, stops, _ = _cut([len(members)], _MIN_PANEL)
    # A panel shares a component with those that begin with what it ends with.
    last = np.searchsorted(labels[starts], labels[stops - 1], side="right")
    first = np.arange(len(starts))
    return Jobs(members, starts, stops, first, np.maximum(last, first + 1), _strip_width(in_memory // _MIN_PANEL))


def least_of_components(num_rows: int) -> int:
    """Return how many pairs of so many rows `components` compares at least: those within panels."""
    return num_rows // _MIN_PANEL * (_MIN_PANEL * (_MIN_PANEL - 1) // 2)


def pieces(rows: IntArray, ends: IntArray, in_memory: int) -> Jobs:
    """Compare the rows at home in each partition with each other and with its visitors.

    Args:
        rows: Those at home in the first partition, its visitors, those at home in the second, ….
        ends: Where each of these lists ends, int64 [2K].
    """
    starts, stops, _ = _cut(ends, _PANEL)
    first = np.arange(len(starts))
    owner = np.searchsorted(ends, starts, side="right")
    last = np.where(owner % 2 == 0, np.searchsorted(starts, ends[owner | 1]), first)
    return Jobs(rows, starts, stops, first, last, _strip_width(in_memory // _PANEL))


def _cut(ends: Sequence[int] | IntArray, panel_rows: int) -> tuple[IntArray, IntArray, int]:
    """Cut lists of rows, given where each ends, into panels: their starts, their stops, and how many the first list has."""
    lengths = np.diff(ends, prepend=0)
    counts = -(-lengths // panel_rows)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(ends - lengths, counts) + place * panel_rows
    return starts, np.minimum(starts + panel_rows, np.repeat(ends, counts)), int(counts[0])


def _strip_width(panels_in_memory: int) -> int:
    """Return the widest strip whose panels stay in memory beside two that pass by."""
    return min(_MAX_STRIP, max(1, panels_in_memory - 2))
