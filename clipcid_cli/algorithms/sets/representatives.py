"""The representative of each group of near images, and how far the others are from it.

Shape letters: N rows, D width, S groups, M rows of a group.

Source: docs/method.md#representatives: the paper's central image; ties and the other choices are ours.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.near.block import load_block
from clipcid_cli.algorithms.near.exact import (
    DoubleArray,
    FloatArray,
    IntArray,
    ReadRows,
    edge_weights,
    paired_dots,
    round_distances,
    squared_lengths,
)
from clipcid_cli.algorithms.sets.star import is_kept

# Temporary copies of this many rows stay in the cache.
_ROWS_AT_ONCE = 1024
# Rows that lie anywhere are read together: from each file once, of which few are mapped at a time. Sets of three among
# 200,000 rows of width 16 in 1,000 files took 0.20 s; read 1,024 at a time, twice, they took 3.3 (AMD EPYC, one process).
_ROWS_READ = 2**15


def central_rows(read: ReadRows, rows: IntArray, labels: IntArray) -> IntArray:
    """Choose the row nearest to the mean of each group.

    Args:
        rows: Row numbers, integers [N].
        labels: Group of each row, the smallest position in it, integers [N].

    Returns:
        The position in `rows` of each row's representative, integers [N]. Means are float64 means of the stored rows, whose
        sums are exact; of equal distances the smaller position wins.
    """
    chosen_N = labels.copy()
    for members_M, starts_S in _batches(labels):
        read_M = _read_ahead(read, rows[members_M])
        # Of few groups at once: their means are float64.
        parts = [(starts_S[some], end) for some, end in _spans(starts_S, len(members_M), _ROWS_AT_ONCE)]
        scores_M = np.concatenate([_from_means(read_M, starts, end) for starts, end in parts])
        _choose_least(chosen_N, members_M, starts_S, scores_M)
    return chosen_N


def medoid_rows(read: ReadRows, rows: IntArray, labels: IntArray, device: torch.device) -> IntArray:
    """Choose the row of each group with the smallest sum of distances to the others; as :func:`central_rows` otherwise."""
    chosen_N = labels.copy()
    for members_M, starts_S in _batches(labels):
        read_M = _read_ahead(read, rows[members_M])
        parts = np.split(np.arange(len(members_M)), starts_S[1:])
        sums_M = np.concatenate([_from_members(read_M, part, device) for part in parts])
        _choose_least(chosen_N, members_M, starts_S, sums_M)
    return chosen_N


def _choose_least(chosen_N: IntArray, members_M: IntArray, starts_S: IntArray, scores_M: DoubleArray) -> None:
    """Write the member with the least score of each group, of equal ones the first, for all its members."""
    sizes_S = np.diff(starts_S, append=len(members_M))
    least_M = np.repeat(np.minimum.reduceat(scores_M, starts_S), sizes_S)
    places = np.flatnonzero(scores_M == least_M)
    first_S = places[np.searchsorted(places, starts_S)]
    chosen_N[members_M] = np.repeat(members_M[first_S], sizes_S)


def best_rows(scores: DoubleArray, labels: IntArray) -> IntArray:
    """Choose the row of each group with the highest score, float64 [N], not NaN; as :func:`central_rows` otherwise."""
    highest = np.full(len(labels), -np.inf)
    np.maximum.at(highest, labels, scores)
    best = np.flatnonzero(scores == highest[labels]).astype(labels.dtype)
    del highest
    chosen = np.full(len(labels), len(labels), labels.dtype)
    np.minimum.at(chosen, labels[best], best)
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
    starts = np.flatnonzero(np.append(True, np.diff(labels[order]) != 0)) if len(order) else np.empty(0, np.int64)
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    chosen = np.zeros(len(order), np.bool_)
    chosen[order] = rank < most
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


def distances_to(read: ReadRows, rows: IntArray, representatives: IntArray) -> FloatArray:
    """Return the exact distance of each row to its representative.

    Args:
        rows: Row numbers, integers [N].
        representatives: Positions in `rows`, integers [N].

    Returns:
        float32 [N], 0 for rows that represent themselves.
    """
    distances = np.zeros(len(rows), np.float32)
    others = np.flatnonzero(~is_kept(representatives)).astype(representatives.dtype)
    for start in range(0, len(others), _ROWS_READ):
        part = others[start : start + _ROWS_READ]
        sides = (torch.from_numpy(read(each)) for each in (rows[part], rows[representatives[part]]))
        pairs = zip(*(torch.split(side, _ROWS_AT_ONCE) for side in sides), strict=True)
        found = [edge_weights(squared_lengths(a), squared_lengths(b), paired_dots(a, b)) for a, b in pairs]
        distances[part] = torch.cat(found).numpy()
    return distances


def share_beyond(distances: FloatArray, cutoff: float, num_dropped: int) -> float:
    """Return the share of the dropped rows that are farther than the cut-off from their representative.

    Args:
        distances: Distance of every row to its representative, float32 [N].
        num_dropped: Number of rows that another row represents.
    """
    return float(np.count_nonzero(distances > np.float32(cutoff)) / num_dropped) if num_dropped else 0.0


def _batches(labels: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield whole groups, together of about ``_ROWS_READ`` rows, as positions [M] and where each group starts [S].

    Groups of one or two rows are omitted: two rows are equally far from their mean, and from each other, so the smaller
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
    """Yield ranges of whole groups, together of about `size` rows or one that is larger, and the end of their rows."""
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
    """Return the squared distance of each row to the mean of its group, float64 [M]; groups lie one after another.

    Args:
        read: Reads rows by their places.
        starts_S: Where each group starts.
        end: Where the last one ends.
    """
    first = int(starts_S[0])
    sizes_S = np.diff(starts_S, append=end)
    group_M = np.repeat(np.arange(len(starts_S)), sizes_S)
    totals_SD: DoubleArray | None = None
    for chunk, rows_BD in _chunks(read, first, end):
        groups, begins = np.unique(group_M[chunk], return_index=True)
        if totals_SD is None:
            totals_SD = np.zeros((len(starts_S), rows_BD.shape[1]))
        totals_SD[groups] += np.add.reduceat(rows_BD, begins, axis=0)
    assert totals_SD is not None  # a batch has rows
    means_SD = totals_SD / sizes_S[:, None]
    # Summed along the contiguous axis, a row's sum does not depend on which other rows are in the chunk.
    return np.concatenate(
        [((rows_BD - means_SD[group_M[chunk]]) ** 2).sum(axis=1) for chunk, rows_BD in _chunks(read, first, end)]
    )


def _chunks(read: ReadRows, first: int, end: int) -> Iterator[tuple[slice, DoubleArray]]:
    """Yield some rows in chunks that stay in the cache, float64 [B, D], and which they are; many are read at a time."""
    for at in range(first, end, _ROWS_READ):
        stored = read(np.arange(at, min(at + _ROWS_READ, end)))
        for start in range(0, len(stored), _ROWS_AT_ONCE):
            part = stored[start : start + _ROWS_AT_ONCE]
            yield slice(at - first + start, at - first + start + len(part)), part.astype(np.float64)


def _from_members(read: ReadRows, members: IntArray, device: torch.device) -> DoubleArray:
    """Return sums of distances to all members, float64 [M]."""
    starts = range(0, len(members), _ROWS_AT_ONCE)
    sums = []
    for i in starts:
        a = load_block(read, members[i : i + _ROWS_AT_ONCE], device, torch.float16)
        wide_MD = a.stored.to(torch.float64)
        total_M = torch.zeros(len(a), dtype=torch.float64, device=device)
        for j in starts:
            b = load_block(read, members[j : j + _ROWS_AT_ONCE], device, torch.float16)
            squared_MN = a.squared[:, None] + b.squared - 2.0 * (wide_MD @ b.stored.to(torch.float64).T)
            total_M += round_distances(squared_MN).to(torch.float64).sum(dim=1)
        sums.append(total_M.cpu().numpy())
    return np.concatenate(sums)
