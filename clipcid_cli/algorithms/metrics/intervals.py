"""How much a metric depends on the sample of images: bootstrap intervals, McNemar's test, Clopper-Pearson intervals.

A metric of counts depends on how many images fall into each cell (class × right or wrong × …), and of images drawn with
replacement the counts of cells are multinomial. So replicates are drawn as counts of cells: the same distribution as drawing
images one by one, at a cost that does not grow with their number.

Shape letters: N images, V values of an image, U cells, B replicates, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_CHUNK_ENTRIES = 2**24
_TAIL = 0.025


def draw_cells(values_NV: Array, replicates: int, seed: int) -> tuple[Array, Array]:
    """Draw replicates of a data set.

    Args:
        values_NV: Values of each image, whole numbers [N, V].
        seed: Seed of the draws; equal seeds and values give equal draws.

    Returns:
        The distinct rows, int64 [U, V], in lexicographic order, and how often each was drawn, int64 [B, U]; rows sum to N.

    Raises:
        ValueError: when there is no image.

    Source: Efron 1979; for counts the draws are multinomial (Efron and Tibshirani 1993, §5.2).
    """
    if not len(values_NV):
        raise ValueError("no image to draw")
    cells_UV, counts_U = np.unique(values_NV, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    return cells_UV, generator.multinomial(len(values_NV), counts_U / len(values_NV), size=replicates)


def ratio(draws_BU: Array, above_U: Array, below_U: Array | None = None) -> Array:
    """Sum one value over the drawn images and divide by the sum of another (by their number when None): float64 [B]."""
    below_B = draws_BU.sum(axis=1) if below_U is None else draws_BU @ below_U
    return np.asarray(draws_BU @ above_U / below_B)


def mean_recall(draws_BU: Array, classes_U: Array, right_U: Array) -> Array:
    """Average, over the classes that were drawn, the share of their images that is right.

    Args:
        draws_BU: Draws of :func:`draw_cells`.
        classes_U: Class of each cell, ascending.
        right_U: Whether the cell's images are right.

    Returns:
        float64 [B].
    """
    starts = np.flatnonzero(np.diff(classes_U, prepend=classes_U[0] - 1))
    images_BC = np.add.reduceat(draws_BU, starts, axis=1)
    right_BC = np.add.reduceat(draws_BU * right_U.astype(draws_BU.dtype), starts, axis=1)
    return _mean_of_drawn(np.where(images_BC > 0, right_BC / np.maximum(images_BC, 1), np.nan).T)


def draw_average_precision(scores_NC: Array, positive_NC: Array, replicates: int, seed: int) -> tuple[Array, Array]:
    """Draw replicates of the mean average precision, in both forms of :mod:`.average_precision`.

    Args:
        scores_NC: Score of each image for each class, float [N, C].
        positive_NC: Whether the image has the class, bool [N, C].
        seed: Two models on the same images with the same seed are drawn the same images, so differences are paired.

    Returns:
        Means of the area and of the eleven points over the classes that were drawn, float64 [B] each.
    """
    num_images, num_classes = scores_NC.shape
    orders = [np.argsort(-scores_NC[:, number], kind="stable") for number in range(num_classes)]
    generator = np.random.default_rng(seed)
    areas, points = [], []
    rows = max(1, _CHUNK_ENTRIES // num_images)
    for start in range(0, replicates, rows):
        count = min(rows, replicates - start)
        weights_bN = generator.multinomial(num_images, np.full(num_images, 1 / num_images), size=count).astype(
            np.float64
        )
        both = [
            _weighted_precision(weights_bN[:, order], scores_NC[order, number], positive_NC[order, number])
            for number, order in enumerate(orders)
            if positive_NC[:, number].any()
        ]
        areas.append(_mean_of_drawn(np.stack([area for area, _ in both])))
        points.append(_mean_of_drawn(np.stack([point for _, point in both])))
    return np.concatenate(areas), np.concatenate(points)


def _weighted_precision(weights_bN: Array, scores_N: Array, positive_N: Array) -> tuple[Array, Array]:
    """Average precision of one class when each image, in descending order of score, counts as often as it was drawn."""
    places_P = np.flatnonzero(positive_N)
    # Images of equal score count together: their precision is that of the last of them.
    last_P = np.searchsorted(-scores_N, -scores_N[places_P], side="right") - 1
    own_bP = weights_bN[:, places_P]
    found_bP = np.cumsum(own_bP, axis=1)[:, np.searchsorted(places_P, last_P, side="right") - 1]
    seen_bP = np.cumsum(weights_bN, axis=1)[:, last_P]
    total_b1 = own_bP.sum(axis=1, keepdims=True)
    precision_bP = found_bP / np.maximum(seen_bP, 1)
    area_b = (own_bP * precision_bP).sum(axis=1) / np.maximum(total_b1[:, 0], 1)
    best_bP = np.maximum.accumulate(precision_bP[:, ::-1], axis=1)[:, ::-1]
    reached = [np.argmax(10 * found_bP >= tenths * total_b1, axis=1) for tenths in range(11)]
    point_b = np.mean([np.take_along_axis(best_bP, place[:, None], axis=1)[:, 0] for place in reached], axis=0)
    drawn_b = total_b1[:, 0] > 0
    return np.where(drawn_b, area_b, np.nan), np.where(drawn_b, point_b, np.nan)


def _mean_of_drawn(values_Cb: Array) -> Array:
    """Mean over the classes that were drawn; NaN where none was."""
    drawn_b = (~np.isnan(values_Cb)).sum(axis=0)
    return np.where(drawn_b > 0, np.nansum(values_Cb, axis=0) / np.maximum(drawn_b, 1), np.nan)


def interval(replicates_B: Array, share: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval with `share` of the replicates; NaN replicates do not count."""
    tail = (1 - share) / 2
    low, high = np.nanquantile(replicates_B, [tail, 1 - tail])
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the probability of disagreements at least as uneven if both models are equally good.

    Args:
        only_first: Images only the first model gets right.
        only_second: Images only the second model gets right.

    Returns:
        The exact two-sided p-value, in (0, 1]; 1 where the models never disagree.

    Source: McNemar 1947, in its exact (binomial) form.
    """
    total, fewer = only_first + only_second, min(only_first, only_second)
    # log of C(total, k) / 2^total: the binomials themselves overflow beyond 1,000 disagreements.
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def clopper_pearson(hits: int, trials: int) -> tuple[float, float]:
    """Return the exact 95 % confidence interval of a rate.

    Args:
        hits: Number of successes, in [0, trials].
        trials: Number of independent trials; at least 1.

    Returns:
        The ends of the interval, in [0, 1].

    Raises:
        ValueError: when the counts are out of range.

    Source: Clopper and Pearson 1934; with no hit the upper end is the "rule of three", about 3.7/n for two-sided 95 %.
    """
    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"{hits} hits in {trials} trials")
    low = 0.0 if hits == 0 else _bisect(lambda rate: 1.0 - _at_most(hits - 1, trials, rate) < _TAIL)
    high = 1.0 if hits == trials else _bisect(lambda rate: _at_most(hits, trials, rate) > _TAIL)
    return low, high


def _bisect(is_above: Callable[[float], bool]) -> float:
    """Find the rate in [0, 1] up to which a predicate holds, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2.0
        low, high = (middle, high) if is_above(middle) else (low, middle)
    return high


def _at_most(hits: int, trials: int, rate: float) -> float:
    """Return the probability of at most `hits` successes; rates outside (0, 1) are taken as its ends."""
    if rate <= 0.0 or rate >= 1.0:
        return 1.0 if rate <= 0.0 or hits >= trials else 0.0
    count = np.arange(hits + 1)
    # log C(n, k) from C(n, k) = C(n, k−1)·(n−k+1)/k.
    choices = np.concatenate([[0.0], np.cumsum(np.log((trials - count[1:] + 1.0) / count[1:]))])
    return float(np.exp(choices + count * math.log(rate) + (trials - count) * math.log1p(-rate)).sum())
