"""The representative of each set of near images, and how far the others are from it.

Shape letters: N rows, D width, S sets, M rows of some sets, which lie one after another.

Source: docs/method.md#representatives: the paper's central image; ties and the other choices are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.near.block import read_stored
from clipcid_cli.algorithms.near.exact import (
    DoubleArray,
    FloatArray,
    IntArray,
    ReadRows,
    distance_matrix,
    edge_weights,
    paired_dots,
    squared_lengths,
)
from clipcid_cli.algorithms.sets.star import is_kept

# Temporary copies of this many rows stay in the cache.
_ROWS_AT_ONCE = 1024
# Rows that lie anywhere are read together: from each file once, of which few are mapped at a time. Sets of three among
# 200,000 rows of width 16 in 1,000 files took 0.20 s; read 1,024 at a time, twice, they took 3.3 (AMD EPYC, one process).
_ROWS_READ = 2**15


def central_rows(read: ReadRows, labels: IntArray) -> IntArray:
    """Choose the row nearest to the mean of each set.

    Args:
        labels: Set of each row, the smallest row in it, integers [N].

    Returns:
        Each row's representative, integers [N]. Means are float64 means of the stored rows, whose sums are exact; of equal
        distances the smaller row wins.
    """
    # Of few sets at once: their means are float64.
    return _choose(read, labels, _ROWS_AT_ONCE, _from_means)


def medoid_rows(read: ReadRows, labels: IntArray, device: torch.device) -> IntArray:
    """Choose the row of each set with the smallest sum of distances to the others; as :func:`central_rows` otherwise."""
    return _choose(read, labels, 1, partial(_from_members, device=device))


def _choose(
    read: ReadRows,
    labels: IntArray,
    at_once: int,
    score: Callable[[ReadRows, IntArray, int], DoubleArray],
) -> IntArray:
    """Choose the row with the least score in each set, of equal ones the first; for all rows of the set.

    Args:
        at_once: Rows of the sets that are scored together; one set at least.
        score: Returns the scores of M rows, by where their sets start, int64 [S], and where the last ends.
    """
    chosen_N = labels.copy()
    for members_M, starts_S in _batches(labels):
        read_M = _read_ahead(read, members_M)
        parts = _spans(starts_S, len(members_M), at_once)
        scores_M = np.concatenate([score(read_M, starts_S[some], end) for some, end in parts])
        sizes_S = np.diff(starts_S, append=len(members_M))
        places = np.flatnonzero(scores_M == np.repeat(np.minimum.reduceat(scores_M, starts_S), sizes_S))
        first_S = places[np.searchsorted(places, starts_S)]
        chosen_N[members_M] = np.repeat(members_M[first_S], sizes_S)
    return chosen_N


def best_rows(scores: DoubleArray, labels: IntArray) -> IntArray:
    """Choose the row of each set with the highest score, float64 [N], not NaN; as :func:`central_rows` otherwise."""
    best = np.flatnonzero(best_of_groups(scores, labels, 1)).astype(labels.dtype)
    chosen = np.empty_like(labels)
    chosen[labels[best]] = best
    return chosen[labels]


def best_of_groups(scores: DoubleArray, labels: IntArray, most: int) -> npt.NDArray[np.bool_]:
    """Tell which rows are among the best of their group.

    Args:
        scores: Higher is better; of equal ones the smaller position, float64 [N], not NaN.
        labels: Group of each row, integers [N].
        most: How many rows of a group at most.

    Returns:
        bool [N].
    """
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
    others = np.flatnonzero(~is_kept(representatives)).astype(representatives.dtype)
    for at in range(0, len(others), _ROWS_READ):
        part = others[at : at + _ROWS_READ]
        a, b = (torch.from_numpy(read(each)) for each in (part, representatives[part]))
        distances[part] = edge_weights(squared_lengths(a), squared_lengths(b), paired_dots(a, b)).numpy()
    return distances


def share_beyond(distances: FloatArray, cutoff: float, num_dropped: int) -> float:
    """Return the share of the dropped rows that are farther than the cut-off from their representative."""
    return float(np.count_nonzero(distances > np.float32(cutoff)) / max(1, num_dropped))


def _batches(labels: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield whole sets, together of about ``_ROWS_READ`` rows, as positions [M] and where each set starts [S].

    Sets of one or two rows are omitted: two rows are equally far from their mean, and from each other, so the smaller
    position represents them and the rows need not be read.
    """
    is_large = np.bincount(labels) > 2
    order = np.flatnonzero(is_large[labels]).astype(labels.dtype)
    order = order[np.argsort(labels[order], kind="stable")]
    ordered = labels[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(order)])
    del is_large, ordered
    for some, end in _spans(starts, len(order), _ROWS_READ):
        yield order[starts[some.start] : end], starts[some] - starts[some.start]


def _spans(starts: IntArray, num_rows: int, size: int) -> Iterator[tuple[slice, int]]:
    """Yield ranges of whole sets, together of about `size` rows or one that is larger, and the end of their rows."""
    first = 0
    while first < len(starts):
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + size)))
        yield slice(first, last), int(starts[last]) if last < len(starts) else num_rows
        first = last


def _read_ahead(read: ReadRows, rows: IntArray) -> ReadRows:
    """Read rows now, from each file once; return what gives those at some places in `rows`. Very many are read as needed."""
    if len(rows) > 2 * _ROWS_READ:
        return lambda places: read(rows[places])
    stored = read(rows)
    return lambda places: stored[places]


def _from_means(read: ReadRows, starts_S: IntArray, end: int) -> DoubleArray:
    """Return the squared distance of each row to the mean of its set, float64 [M]."""
    first = int(starts_S[0])
    sizes_S = np.diff(starts_S, append=end)
    set_M = np.repeat(np.arange(len(starts_S)), sizes_S)
    means_SD: DoubleArray | None = None
    for chunk, rows_BD in _chunks(read, first, end):
        sets, begins = np.unique(set_M[chunk], return_index=True)
        if means_SD is None:
            means_SD = np.zeros((len(starts_S), rows_BD.shape[1]))
        means_SD[sets] += np.add.reduceat(rows_BD, begins, axis=0)
    assert means_SD is not None  # sets have rows
    means_SD /= sizes_S[:, None]
    # Summed along the contiguous axis, a row's sum does not depend on which other rows are in the chunk.
    return np.concatenate(
        [((rows_BD - means_SD[set_M[chunk]]) ** 2).sum(axis=1) for chunk, rows_BD in _chunks(read, first, end)]
    )


def _chunks(read: ReadRows, first: int, end: int) -> Iterator[tuple[slice, DoubleArray]]:
    """Yield some rows in chunks that stay in the cache, float64 [B, D], and which they are; many are read at a time."""
    for at in range(first, end, _ROWS_READ):
        stored = read(np.arange(at, min(at + _ROWS_READ, end)))
        for start in range(0, len(stored), _ROWS_AT_ONCE):
            part = stored[start : start + _ROWS_AT_ONCE]
            yield slice(at - first + start, at - first + start + len(part)), part.astype(np.float64)


def _from_members(read: ReadRows, starts_S: IntArray, end: int, device: torch.device) -> DoubleArray:
    """Return sums of distances to all members of one set, float64 [M]."""

    def parts() -> Iterator[torch.Tensor]:
        for at in range(int(starts_S[0]), end, _ROWS_AT_ONCE):
            yield read_stored(read, np.arange(at, min(at + _ROWS_AT_ONCE, end)), device)

    zero = torch.zeros(1, dtype=torch.float64, device=device)
    sums = [sum((distance_matrix(a_BD, b_BD).double().sum(dim=1) for b_BD in parts()), zero) for a_BD in parts()]
    found: DoubleArray = torch.cat(sums).cpu().numpy()
    return found
