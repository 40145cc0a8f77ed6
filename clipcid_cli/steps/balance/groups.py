"""Groups of rows that belong together, sets of near images or rows of one hash, which all processes share out.

The rows of a group lie in as many files, and there may be 41,000 of them: to map a file for nearly every row takes hours. So
where not all files stay mapped, each process copies the rows of its part of the files, in the order of the files, to where
their groups are. Groups are then read from as many files as there are processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.near.exact import HalfArray, IntArray, ReadRows, row_type
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.embeddings.rows import Rows, create_copy, open_copies, remove_copies
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.pipeline import thread_map
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.shared_arrays import SharedArrays

_ROWS_AT_ONCE = 16_384


class Groups(NamedTuple):
    """Groups of two rows or more, one group after another."""

    rows: IntArray  # row numbers, ascending within a group, integers [M]
    bounds: IntArray  # where each group starts, and the last one ends, int64 [G + 1]

    @classmethod
    def from_sets(cls, labels: IntArray) -> Groups:
        """Group rows by their sets, given each row's as its smallest row, integers [N]."""
        is_grouped = labels != np.arange(len(labels), dtype=labels.dtype)
        is_grouped[labels[is_grouped]] = True
        rows = np.flatnonzero(is_grouped).astype(labels.dtype)
        own = labels[rows]
        if labels.dtype == np.int32:  # numbers of a set and a row sort faster than rows by their sets
            both = np.sort(own.astype(np.int64) << 32 | rows)
            return cls((both & 0xFFFFFFFF).astype(np.int32), _find_bounds(both >> 32))
        order = np.argsort(own, kind="stable")
        return cls(rows[order], _find_bounds(own[order]))

    @classmethod
    def from_hashes(cls, hashes: npt.NDArray[np.uint64]) -> Groups:
        """Group the rows whose hash, uint64 [N], others have too."""
        rows = _may_repeat(hashes)
        ordered = hashes[rows]
        order = np.argsort(ordered, kind="stable")
        ordered, order = ordered[order], rows[order]
        is_grouped = np.zeros(len(ordered), np.bool_)
        is_grouped[1:] = ordered[1:] == ordered[:-1]
        is_grouped[:-1] |= is_grouped[1:]
        return cls(order[is_grouped], _find_bounds(ordered[is_grouped]))

    def share(self, context: DistContext) -> slice:
        """Return which groups this process works on: about as many rows as the others."""
        start, stop = np.searchsorted(self.bounds[:-1], context.rank_range(len(self.rows)))
        return slice(int(start), int(stop))


def _may_repeat(hashes: npt.NDArray[np.uint64]) -> IntArray:
    """Return the rows whose hash may be another's too, ascending: all that are, and few others.

    To sort values alone takes a twentieth of the time to sort the rows by them.
    """
    ordered = np.sort(hashes)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    del ordered
    # Told by the first bits: so many that one in eight is set at most.
    num_bits = max(16, (8 * len(repeated)).bit_length())
    shift = np.uint64(64 - num_bits)
    is_repeated = np.zeros(2**num_bits, np.bool_)
    is_repeated[repeated >> shift] = True
    return np.flatnonzero(is_repeated[hashes >> shift]).astype(row_type(len(hashes)))


def _find_bounds(ordered: npt.NDArray[np.integer]) -> IntArray:
    """Return where each of some equal numbers that lie side by side start, and the last ones end."""
    starts = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    return np.concatenate([[0], starts, [len(ordered)]]) if len(ordered) else np.zeros(1, np.int64)


@dataclasses.dataclass(frozen=True)
class Share:
    """The groups that a process works on, whose M rows are numbered from 0 in their order."""

    rows: IntArray  # their numbers among all rows, integers [M]
    starts: IntArray  # the first row of each group, int64 [G]
    labels: IntArray  # the first row of each row's group, int64 [M]
    source: Rows  # what they are read from
    places: IntArray  # where in it each row is, integers [M]

    def read(self, rows: IntArray) -> HalfArray:
        """Read some of the M rows, float16 [n, D]."""
        return self.source.take(self.places[rows])

    @property
    def sizes(self) -> IntArray:
        return np.diff(self.starts, append=len(self.rows))

    def split(self, count: int) -> list[Share]:
        """Return so many parts, or fewer, of about as many rows each."""
        even = np.arange(count) * len(self.rows) // count
        firsts = np.unique(np.searchsorted(self.starts, even))
        return [self._part(first, end) for first, end in pairwise([*firsts.tolist(), len(self.starts)])]

    def _part(self, first: int, end: int) -> Share:
        begin, stop = np.append(self.starts, len(self.rows))[[first, end]].tolist()
        starts, labels = self.starts[first:end] - begin, self.labels[begin:stop] - begin
        return Share(self.rows[begin:stop], starts, labels, self.source, self.places[begin:stop])


def find_places(rows: IntArray) -> Callable[[IntArray], IntArray]:
    """Return what finds the places in `rows` of some of them."""
    order = np.argsort(rows)
    return lambda some: order[np.searchsorted(rows, some, sorter=order)]


def work_on_groups(
    shared: SharedArrays, images: Rows, numbers: IntArray, groups: Groups, work: Callable[[Share], Arrays]
) -> list[Arrays]:
    """Let every process work on its share of the groups, in as many parts as it has threads.

    Args:
        numbers: Which of the images each row is, integers [N], ascending.

    Returns:
        The results in the order of the groups, on the first process; nothing on the others.
    """
    own = groups.share(shared.context)
    bounds = groups.bounds[own.start : own.stop + 1]
    first, end = int(bounds[0]), int(bounds[-1])
    starts = bounds[:-1] - first
    labels = np.repeat(starts, np.diff(bounds))
    with readable(shared, images, numbers, groups.rows, slice(first, end)) as (source, places):
        share = Share(groups.rows[first:end], starts, labels, source, places)
        return shared.collect(_work_in_threads, share, work)


def _work_in_threads(share: Share, work: Callable[[Share], Arrays]) -> Arrays:
    threads = torch.get_num_threads()
    parts = thread_map(work, share.split(threads), threads)
    return tuple(map(np.concatenate, zip(*parts, strict=True)))


@contextmanager
def readable(
    shared: SharedArrays, images: Rows, numbers: IntArray, rows: IntArray, own: slice = slice(None)
) -> Iterator[tuple[Rows, IntArray]]:
    """Make rows that lie anywhere readable in their order, until all processes have read them.

    Args:
        numbers: As of `work_on_groups`.
        rows: The rows, in the order in which they will be read, integers [M]; the same on every process.
        own: Which of them this process will read.

    Yields:
        What these are read from, and where in it each of them is, integers [m].
    """
    if images.stay_mapped or not len(rows):
        yield images, numbers[rows[own]]
        return
    with temporary_copies(shared):
        copies, places = _copy(shared, images, numbers, rows)
        yield copies, places[own]


@contextmanager
def temporary_copies(shared: SharedArrays) -> Iterator[None]:
    """Remove the copies of rows that processes make in the block, once none of them reads these any more."""
    try:
        yield
        shared.context.barrier()
    finally:
        if shared.context.is_main:
            remove_copies(shared.work)
    shared.context.barrier()  # others may make copies of the same names


def copy_rows(shared: SharedArrays, width: int, places: IntArray, numbers: IntArray, read: ReadRows) -> None:
    """Copy this process's rows, integers [n]: their places in its copy, and the numbers by which they are read."""
    copy = create_copy(shared.work, shared.context.rank, len(places), width)

    def copy_part(at: int) -> int:
        part = slice(at, at + _ROWS_AT_ONCE)
        copy[places[part]] = read(numbers[part])
        return len(places[part])

    with reporting.progress("group", len(places), "images") as progress:
        for count in thread_map(copy_part, range(0, len(places), _ROWS_AT_ONCE), torch.get_num_threads()):
            progress.advance(count)
    if shared.context.spans_hosts and isinstance(copy, np.memmap):
        copy.flush()


def _copy(shared: SharedArrays, images: Rows, numbers: IntArray, rows: IntArray) -> tuple[Rows, IntArray]:
    """Copy rows in the order in which they are to be read, each process the rows in its part of the files.

    Returns:
        The copies of all processes, and where among them each of the rows is, integers [M].
    """
    context = shared.context

    def locate() -> Arrays:
        """Say where each row is among the copies of all processes, and how many each of these has."""
        ends = [len(numbers) * (rank + 1) // context.size for rank in range(context.size)]
        owner = np.searchsorted(ends, rows, side="right").astype(np.int16)
        place = np.empty(len(rows), row_type(len(rows)))
        place[np.argsort(owner, kind="stable")] = np.arange(len(rows))
        return place, np.bincount(owner, minlength=context.size)

    place, sizes = shared.publish(locate)
    start, stop = context.rank_range(len(numbers))
    own = rows[(rows >= start) & (rows < stop)]
    order = np.argsort(own)
    context.on_all(copy_rows, shared, images.shape[1], order, numbers[own[order]], images.take)
    copies = context.on_all(open_copies, shared.work, sizes.tolist(), images.shape[1])
    return copies, place
