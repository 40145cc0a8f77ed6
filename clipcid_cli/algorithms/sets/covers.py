"""Covers of rows, as the star cover: every dropped row is within ε of a kept one, its representative.

What a cover keeps need not shrink as ε grows, so ε for a number of rows is bisected, and a curve costs a cover a point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import BoolArray, IntArray
from clipcid_cli.algorithms.sets.forest import Curve

CoverRows = Callable[[Edges, IntArray], IntArray]
"""Covers rows, given all pairs within ε and how many equal rows each stands for, as `star.star_cover` does."""


class Cover(NamedTuple):
    """A threshold ε, and the representative of each row, itself where it is kept, int64 [N]."""

    threshold: float
    representatives: IntArray


def find_cover_threshold(
    cover: CoverRows,
    pairs: Edges,
    copies: IntArray,
    num_kept: int,
    above: float = -1.0,
    on_cover: Callable[[float, float], None] = lambda above, within: None,
) -> Cover | None:
    """Find the ε > `above` that keeps a given number of rows at most, by bisection over the distances of ascending pairs.

    Args:
        on_cover: Told after each cover between which distances ε is: it is above one that keeps more. The bisection goes on
            from there where it is begun with both, the pairs up to the second.

    Returns:
        A cover that keeps so few, while the next smaller distance tried keeps more; None when even all pairs keep more.
    """
    distances = np.unique(pairs.weight)
    if not len(distances):
        return None
    low, high = int(np.searchsorted(distances, np.float32(above), side="right")) - 1, len(distances) - 1
    best = Cover(float(distances[high]), cover(pairs, copies))
    if count_kept(best.representatives) > num_kept:
        return None
    while high - low > 1:
        on_cover(float(distances[low]) if low >= 0 else above, float(distances[high]))
        middle = (low + high) // 2
        threshold = float(distances[middle])
        tried = Cover(threshold, cover(pairs.up_to(threshold), copies))
        if count_kept(tried.representatives) <= num_kept:
            high, best = middle, tried
        else:
            low = middle
    return best


def is_own_representative(representatives: IntArray) -> BoolArray:
    """Tell which rows represent themselves, and are thus kept, bool [N]."""
    return np.asarray(representatives == np.arange(len(representatives), dtype=representatives.dtype))


def count_kept(representatives: IntArray) -> int:
    """Count the rows that are kept."""
    return int(np.count_nonzero(is_own_representative(representatives)))


def label_by_smallest(representatives: IntArray) -> IntArray:
    """Label each row with the smallest row of its set, int64 [N]."""
    smallest = np.full(len(representatives), len(representatives))
    np.minimum.at(smallest, representatives, np.arange(len(representatives)))
    return smallest[representatives]


def cover_curve(cover: CoverRows, pairs: Edges, copies: IntArray, chosen: float, num_points: int) -> Curve:
    """Count rows kept, and measure the largest set, over the cut-off up to the largest distance of ascending pairs.

    Each point costs a cover: the chosen cut-off, and so many others.
    """
    farthest = float(pairs.weight[-1]) if len(pairs) else 0.0
    distances = np.unique(np.append(np.linspace(0.0, farthest, num_points), chosen).astype(np.float32))
    kept, largest = [], []
    for distance in distances:
        representatives = cover(pairs.up_to(float(distance)), copies)
        kept.append(count_kept(representatives))
        largest.append(int(np.bincount(representatives, weights=copies).max()))
    return Curve(distances, np.array(kept, np.int64), np.array(largest, np.int64))
