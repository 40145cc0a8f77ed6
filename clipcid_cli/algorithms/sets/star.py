"""The star cover: every dropped image is within ε of its representative, and no two representatives are within ε.

Single linkage chains: at the end of a chain an image may be far from its representative. The star cover visits images by
descending number of neighbours within ε (ties by row), keeps each that no kept one covers, and assigns the others to the
nearest kept image. A star never crosses the border of a single-linkage component, since its edges are within ε.

Source: docs/method.md#star-cover.
"""

from __future__ import annotations

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import BoolArray, IntArray


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
