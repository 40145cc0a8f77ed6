"""The star cover: every dropped image is within ε of its representative, and no two representatives are within ε.

Single linkage chains: at the end of a chain an image may be far from its representative. The star cover visits images by
descending number of neighbours within ε (ties by row), keeps each that no kept one covers, and assigns the others to the
nearest kept image. A star never crosses the border of a single-linkage component, since its edges are within ε.

Source: docs/method.md#star-cover.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import BoolArray, IntArray
from clipcid_cli.algorithms.sets.forest import Curve


def star_cover(pairs: Edges, copies: IntArray) -> IntArray:
    """Cover rows by stars, given all pairs within ε, each once: the representative of each row, itself where it is kept.

    `copies` says how many equal rows each row stands for, itself included, int64 [N]. They count as neighbours.
    """
    num_rows = len(copies)
    degree = copies - 1
    for one, other in ((pairs.a, pairs.b), (pairs.b, pairs.a)):  # whole numbers below 2⁵³, so the sums are exact
        degree = degree + np.bincount(one, weights=copies[other], minlength=num_rows).astype(np.int64)
    place = np.empty(num_rows, np.int64)
    place[np.lexsort((np.arange(num_rows), -degree))] = np.arange(num_rows)
    keeps = _keep_in_order(num_rows, place, pairs)
    covering = keeps[pairs.a] != keeps[pairs.b]
    kept = np.where(keeps[pairs.a], pairs.a, pairs.b)[covering]
    dropped = np.where(keeps[pairs.a], pairs.b, pairs.a)[covering]
    # The nearest kept row last, the smaller row of equals, so that it is the one that remains.
    order = np.lexsort((-kept, -pairs.weight[covering]))
    representatives = np.arange(num_rows, dtype=np.int64)
    representatives[dropped[order]] = kept[order]
    return representatives


def _keep_in_order(num_rows: int, place: IntArray, pairs: Edges) -> BoolArray:
    """Keep each row that no row kept before it is paired with, bool [N]; `place` is each row's place in the order.

    In rounds over the pairs rather than row by row: a row that comes before all its undecided neighbours is kept, and its
    neighbours are covered. The rows kept are those of the one-by-one rule, whatever can be decided at once
    (Blelloch, Fineman, Shun 2012, "Greedy sequential maximal independent set and matching are parallel on average").
    """
    keeps, decided = np.zeros(num_rows, np.bool_), np.zeros(num_rows, np.bool_)
    is_ordered = place[pairs.a] < place[pairs.b]
    early, late = np.where(is_ordered, pairs.a, pairs.b), np.where(is_ordered, pairs.b, pairs.a)
    while len(early):
        waits = np.zeros(num_rows, np.bool_)
        waits[late] = True
        kept_now = early[~waits[early]]
        keeps[kept_now] = decided[kept_now] = True
        decided[late[keeps[early]]] = True
        open_pairs = ~decided[early] & ~decided[late]
        early, late = early[open_pairs], late[open_pairs]
    return keeps | ~decided


class StarCover(NamedTuple):
    """A threshold ε, and the representative of each row, itself where it is kept, int64 [N]."""

    threshold: float
    representatives: IntArray


def find_star_threshold(
    pairs: Edges,
    copies: IntArray,
    num_kept: int,
    above: float = -1.0,
    on_cover: Callable[[float, float], None] = lambda above, within: None,
) -> StarCover | None:
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
    best = StarCover(float(distances[high]), star_cover(pairs, copies))
    if count_kept(best.representatives) > num_kept:
        return None
    while high - low > 1:
        on_cover(float(distances[low]) if low >= 0 else above, float(distances[high]))
        middle = (low + high) // 2
        threshold = float(distances[middle])
        cover = StarCover(threshold, star_cover(pairs.up_to(threshold), copies))
        if count_kept(cover.representatives) <= num_kept:
            high, best = middle, cover
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
    """Label each row with the smallest row of its star, int64 [N]."""
    smallest = np.full(len(representatives), len(representatives))
    np.minimum.at(smallest, representatives, np.arange(len(representatives)))
    return smallest[representatives]


def star_curve(pairs: Edges, copies: IntArray, chosen: float, num_points: int) -> Curve:
    """Count rows kept, and measure the largest star, over the cut-off up to the largest distance of ascending pairs.

    Each point costs a cover: the chosen cut-off, and so many others.
    """
    farthest = float(pairs.weight[-1]) if len(pairs) else 0.0
    distances = np.unique(np.append(np.linspace(0.0, farthest, num_points), chosen).astype(np.float32))
    kept, largest = [], []
    for distance in distances:
        cover = star_cover(pairs.up_to(float(distance)), copies)
        kept.append(count_kept(cover))
        largest.append(int(np.bincount(cover, weights=copies).max()))
    return Curve(distances, np.array(kept, np.int64), np.array(largest, np.int64))
