"""The representative of each set of near images, how far the others are from it, and how wide the set is.

Shape letters beside those of the map: M rows of a set, or of some sets that lie one after another.

Source: docs/method.md#representatives: the paper's central image; ties, the other choices and diameters are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce
from itertools import pairwise

import numpy as np
import torch

from clipcid_cli.algorithms.near.block import read_stored
from clipcid_cli.algorithms.near.exact import (
    BoolArray,
    DoubleArray,
    FloatArray,
    IntArray,
    ReadRows,
    distance_matrix,
    edge_weights,
    paired_dots,
    row_type,
    squared_lengths,
)
from clipcid_cli.algorithms.sets.covers import is_own_representative

# Temporary copies of this many rows stay in the cache.
_ROWS_AT_ONCE = 1024
# Rows that lie anywhere are read together: from each file once, of which few are mapped at a time. Sets of three among
# 200,000 rows of width 16 in 1,000 files took 0.20 s; read 1,024 at a time, twice, they took 3.3 (AMD EPYC, one process).
_ROWS_READ = 2**15

# Sets of more rows are swept. At this size all pairs take half a second on two cores where N is 100,000.
MAX_COMPARED = 1024
_ROWS_COMPARED = 4096
_SWEEPS = 3


def central_rows(read: ReadRows, labels: IntArray) -> IntArray:
    """Choose the row nearest to the mean of each set, given the set of each row as its smallest row, integers [N].

    Returns:
        Each row's representative, integers [N]. Means are float64 means of the stored rows, whose sums are exact; of equal
        distances the smaller row wins.
    """
    return _choose(read, labels, _from_means)


def medoid_rows(read: ReadRows, labels: IntArray, device: torch.device) -> IntArray:
    """Choose the row of each set with the smallest sum of distances to the others; as :func:`central_rows` otherwise."""
    return _choose(read, labels, partial(_from_members, device=device))


def _choose(read: ReadRows, labels: IntArray, score: Callable[[ReadRows, IntArray], DoubleArray]) -> IntArray:
    """Choose the row with the least score in each set, of equal ones the first; for all rows of the set.

    Args:
        score: Returns the scores of M rows, float64 [M], given their reader and where each set of them starts and the last
            one ends, int64 [S + 1].
    """
    chosen_N = labels.copy()
    for members_M, bounds in _batches(labels):
        scores_M = score(_read_ahead(read, members_M), bounds)
        least_M = np.repeat(np.minimum.reduceat(scores_M, bounds[:-1]), np.diff(bounds))
        places = np.flatnonzero(scores_M == least_M)
        first_S = places[np.searchsorted(places, bounds[:-1])]
        chosen_N[members_M] = np.repeat(members_M[first_S], np.diff(bounds))
    return chosen_N


def best_rows(scores: DoubleArray, labels: IntArray) -> IntArray:
    """Choose the row of each set with the highest score, float64 [N], not NaN; as :func:`central_rows` otherwise."""
    best = np.flatnonzero(best_of_groups(scores, labels, 1)).astype(labels.dtype)
    chosen = np.empty_like(labels)
    chosen[labels[best]] = best
    return chosen[labels]


def best_of_groups(scores: DoubleArray, labels: IntArray, most: int) -> BoolArray:
    """Tell which rows have the highest scores (not NaN) of their group, at most so many; of equal ones the first."""
    order = np.lexsort((-scores, labels))
    ordered = labels[order]
    chosen = np.zeros(len(order), np.bool_)
    chosen[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered) < most
    return chosen


def random_scores(rows: IntArray, seed: int) -> DoubleArray:
    """Draw a number in [0, 1) for each row number; it depends on the seed and the row only."""
    mixed = rows.astype(np.uint64) + np.uint64(seed * 0xD1342543DE82EF95 % 2**64)
    # splitmix64's finaliser (Steele, Lea, Flood 2014)
    mixed += np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return np.asarray((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def distances_to(read: ReadRows, representatives: IntArray) -> FloatArray:
    """Return the exact distance of each row to its representative, integers [N]: float32 [N], 0 for its own."""
    distances = np.zeros(len(representatives), np.float32)
    others = np.flatnonzero(~is_own_representative(representatives)).astype(representatives.dtype)
    for at in range(0, len(others), _ROWS_READ):
        part = others[at : at + _ROWS_READ]
        a, b = (torch.from_numpy(read(some)) for some in (part, representatives[part]))
        distances[part] = edge_weights(squared_lengths(a), squared_lengths(b), paired_dots(a, b)).numpy()
    return distances


def ratio_beyond(distances: FloatArray, cutoff: float, num_dropped: int) -> float:
    """Return the share of the dropped rows that are farther than the cut-off from their representative."""
    return float(np.count_nonzero(distances > np.float32(cutoff)) / max(1, num_dropped))


def _batches(labels: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield whole sets, of about ``_ROWS_READ`` rows together: the rows [M], and where each starts and all end [S + 1].

    Sets of one or two rows are omitted: two rows are equally far from their mean, and from each other, so the smaller
    position represents them and the rows need not be read.
    """
    order = np.flatnonzero((np.bincount(labels) > 2)[labels]).astype(labels.dtype)
    order = order[np.argsort(labels[order], kind="stable")]
    bounds = np.append(np.flatnonzero(np.diff(labels[order], prepend=-1)), len(order))
    first = 0
    while bounds[first] < len(order):
        last = max(first + 1, int(np.searchsorted(bounds[:-1], bounds[first] + _ROWS_READ)))
        yield order[bounds[first] : bounds[last]], bounds[first : last + 1] - bounds[first]
        first = last


def _read_ahead(read: ReadRows, rows: IntArray) -> ReadRows:
    """Read rows now, from each file once; return what gives those at some places in `rows`. Very many are read as needed."""
    if len(rows) > 2 * _ROWS_READ:
        return lambda places: read(rows[places])
    stored = read(rows)
    return lambda places: stored[places]


def _from_means(read: ReadRows, bounds: IntArray) -> DoubleArray:
    """Return the squared distance of each row to the mean of its set, float64 [M]."""
    set_M = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    means_SD = np.zeros((len(bounds) - 1, read(bounds[:1]).shape[1]))
    for chunk, rows_BD in _chunks(read, len(set_M)):
        sets, begins = np.unique(set_M[chunk], return_index=True)
        means_SD[sets] += np.add.reduceat(rows_BD, begins, axis=0)
    means_SD /= np.diff(bounds)[:, None]
    # Summed along the contiguous axis, a row's sum does not depend on which other rows are in the chunk.
    chunks = _chunks(read, len(set_M))
    return np.concatenate([((rows_BD - means_SD[set_M[chunk]]) ** 2).sum(axis=1) for chunk, rows_BD in chunks])


def _chunks(read: ReadRows, num_rows: int) -> Iterator[tuple[slice, DoubleArray]]:
    """Yield rows in chunks that stay in the cache, float64 [B, D], and which they are; many are read at a time."""
    for at in range(0, num_rows, _ROWS_READ):
        stored = read(np.arange(at, min(at + _ROWS_READ, num_rows)))
        for start in range(0, len(stored), _ROWS_AT_ONCE):
            part = stored[start : start + _ROWS_AT_ONCE]
            yield slice(at + start, at + start + len(part)), part.astype(np.float64)


def _from_members(read: ReadRows, bounds: IntArray, device: torch.device) -> DoubleArray:
    """Return the sum of the distances of each row to all rows of its set, float64 [M]."""
    sums = list[torch.Tensor]()
    for first, end in pairwise(bounds.tolist()):
        places = [np.arange(at, min(at + _ROWS_AT_ONCE, end)) for at in range(first, end, _ROWS_AT_ONCE)]
        for part in places:
            a_BD = read_stored(read, part, device)
            parts = (distance_matrix(a_BD, read_stored(read, other, device)).double().sum(dim=1) for other in places)
            sums.append(reduce(torch.add, parts))
    sums_M: DoubleArray = torch.cat(sums).cpu().numpy()
    return sums_M


def find_diameters(
    read: ReadRows, rows: IntArray, labels: IntArray, sets: IntArray, device: torch.device
) -> tuple[FloatArray, BoolArray]:
    """Find the diameters of sets: the largest distance of two of their rows, 0 for a set of one.

    All pairs of a set are compared; of large sets only the rows farthest from one another in turn, which finds at least half
    of the diameter.

    Args:
        labels: The set of each of the row numbers.
        sets: The sets asked for, ascending.

    Returns:
        The diameters, float32 [S], and which are exact, bool [S].
    """
    order = np.argsort(labels, kind="stable").astype(row_type(len(rows)))
    ordered = labels[order]
    starts = np.searchsorted(ordered, sets)
    sizes = np.searchsorted(ordered, sets, side="right") - starts
    diameter = np.zeros(len(sets), np.float32)
    for size in np.unique(sizes[sizes > 1]).tolist():
        sets_S = np.flatnonzero(sizes == size)
        at_once = max(1, _ROWS_COMPARED // size)
        for part in (sets_S[at : at + at_once] for at in range(0, len(sets_S), at_once)):
            members_SM = rows[order[starts[part][:, None] + np.arange(size)]]
            if size <= MAX_COMPARED:
                diameter[part] = _compare(read, members_SM, device)
            else:
                diameter[part] = [_sweep(read, members_M, device) for members_M in members_SM]
    return diameter, sizes <= MAX_COMPARED


def _compare(read: ReadRows, members_SM: IntArray, device: torch.device) -> FloatArray:
    """Return the largest distance within each of S sets of one size, float32 [S]."""
    stored = read_stored(read, members_SM.reshape(-1), device)
    squared_SM = squared_lengths(stored).view(members_SM.shape)
    wide_SMD = stored.double().view(*members_SM.shape, -1)
    weight_SMM = edge_weights(squared_SM[:, :, None], squared_SM[:, None, :], torch.bmm(wide_SMD, wide_SMD.mT))
    diameters: FloatArray = weight_SMM.amax(dim=(1, 2)).cpu().numpy()
    return diameters


def _sweep(read: ReadRows, members: IntArray, device: torch.device) -> float:
    """Return the largest distance found by going to the farthest row again and again."""
    here = members[:1]
    largest = 0.0
    for _ in range(_SWEEPS):
        one = read_stored(read, here, device)
        starts = range(0, len(members), _ROWS_COMPARED)
        parts = (read_stored(read, members[at : at + _ROWS_COMPARED], device) for at in starts)
        distance = torch.cat([distance_matrix(one, part)[0] for part in parts])
        farthest = int(distance.argmax())
        if float(distance[farthest]) <= largest:
            break
        here, largest = members[farthest : farthest + 1], float(distance[farthest])
    return largest
