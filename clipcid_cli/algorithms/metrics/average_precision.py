"""Average precision of data whose images have several classes each: one ranking of all images per class.

Shape letters: N images, C classes, B draws, P images that have a class.
"""

from __future__ import annotations

import numpy as np

from clipcid_cli.algorithms.metrics.intervals import Array, Metrics, mean_of_drawn

MULTI_LABEL_METRICS = ("mean_average_precision", "mean_average_precision_11_point")


def precision_metrics(scores_NC: Array, positive_NC: Array) -> Metrics:
    """Return the mean of each form of `average_precision` over the classes that have images.

    Args:
        scores_NC: Score of each image for each class, float [N, C]; only their order within a class matters.
        positive_NC: Whether the image has the class.

    Raises:
        ValueError: when a score is NaN.
    """
    if np.isnan(scores_NC).any():
        raise ValueError("scores hold NaN, which have no order")

    def of_draws(draws_BN: Array) -> dict[str, Array]:
        forms = average_precision(draws_BN, scores_NC, positive_NC)
        return dict(zip(MULTI_LABEL_METRICS, map(mean_of_drawn, forms), strict=True))

    return Metrics(np.ones(len(scores_NC), np.int64), of_draws)


def average_precision(draws_BN: Array, scores_NC: Array, positive_NC: Array) -> tuple[Array, Array]:
    """Measure how early the images of each class come when all images are sorted by their score for it.

    Images of equal score count together, so the order of the images never matters.

    Args:
        draws_BN: How often each image counts, int64 [B, N].

    Returns:
        The area under the stepwise precision-recall curve, and the mean over the recalls 0, 0.1, … 1 of the best precision
        at that recall or more, float64 [B, C] each; NaN where no image of the class was drawn.

    Source: the area as scikit-learn's average_precision_score; LAION-AI/CLIP_benchmark 1.6.2
        (metrics/zeroshot_classification.py, average_precision_per_class) is the same where no scores are equal, and counts
        a class without images as 0 where we omit it. The eleven points as Everingham et al. 2010 (PASCAL VOC), §4.2.
    """
    forms = np.full((2, len(draws_BN), scores_NC.shape[1]), np.nan)
    for number in range(scores_NC.shape[1]):
        order_N = np.argsort(-scores_NC[:, number], kind="stable")
        if positive_NC[:, number].any():
            forms[:, :, number] = _class_precision(
                draws_BN[:, order_N], scores_NC[order_N, number], positive_NC[order_N, number]
            )
    return forms[0], forms[1]


def _class_precision(draws_BN: Array, scores_N: Array, positive_N: Array) -> tuple[Array, Array]:
    """Return both forms of one class, float64 [B], from its images in descending order of score."""
    places_P = np.flatnonzero(positive_N)
    # Images of equal score count together: their precision is that of the last of them.
    last_P = np.searchsorted(-scores_N, -scores_N[places_P], side="right") - 1
    own_BP = draws_BN[:, places_P]
    found_BP = np.cumsum(own_BP, axis=1)[:, np.searchsorted(places_P, last_P, side="right") - 1]
    seen_BP = np.cumsum(draws_BN, axis=1)[:, last_P]
    total_B1 = own_BP.sum(axis=1, keepdims=True)
    precision_BP = found_BP / np.maximum(seen_BP, 1)
    area_B = (own_BP * precision_BP).sum(axis=1) / np.maximum(total_B1[:, 0], 1)
    best_BP = np.maximum.accumulate(precision_BP[:, ::-1], axis=1)[:, ::-1]  # the best precision at this recall or more
    # Recall ≥ t / 10 in whole numbers (10 · found ≥ t · total): 0.1 · 3 is not 0.3 in floating point.
    reached_B = [np.argmax(10 * found_BP >= tenths * total_B1, axis=1) for tenths in range(11)]
    points_B = np.mean([best_BP[np.arange(len(best_BP)), place_B] for place_B in reached_B], axis=0)
    drawn_B = total_B1[:, 0] > 0
    return np.where(drawn_B, area_B, np.nan), np.where(drawn_B, points_B, np.nan)
