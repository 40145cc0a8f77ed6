"""Metrics of a linear probe, and of any classifier of which the scores of all classes are known.

Shape letters: N images, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from clipcid_cli.algorithms.metrics.average_precision import MULTI_LABEL_METRICS, average_precision
from clipcid_cli.algorithms.metrics.zeroshot import classification_metrics, rank_scores

# Rows scored at once: float64 scores of a million images for a thousand classes would be 8 GB.
_BLOCK = 16_384


def measure(
    weights_CD: torch.Tensor, bias_C: torch.Tensor, features_ND: torch.Tensor, labels: torch.Tensor, num_classes: int
) -> dict[str, float]:
    """Measure a linear classifier on some images.

    Args:
        weights_CD: One row of weights for each class, float64 [C, D].
        bias_C: Intercepts, float64 [C]; may be ±∞.
        features_ND: Features, float [N, D], on the classifier's device.
        labels: Classes, int64 [N], or whether an image has a class, bool [N, C].

    Returns:
        `SINGLE_LABEL_METRICS` where images have one class (``acc5`` is NaN below 5 classes), else `MULTI_LABEL_METRICS`; in
        [0, 1].
    """
    blocks = (torch.addmm(bias_C, rows.double(), weights_CD.T) for rows in torch.split(features_ND, _BLOCK))
    return measure_scores(blocks, labels, num_classes)


def measure_scores(blocks: Iterable[torch.Tensor], labels: torch.Tensor, num_classes: int) -> dict[str, float]:
    """Measure a classifier by its scores of some images.

    Args:
        blocks: Scores of block after block of the images, float [B, C], on the labels' device; −∞ where a class is out of
            the question.
        labels: Classes, int64 [N], or whether an image has a class, bool [N, C].

    Returns:
        As :func:`measure`.
    """
    if labels.ndim == 2:
        precision = average_precision(torch.cat(list(blocks)), labels)
        values = (precision.mean_area, precision.mean_eleven_point)
        return dict(zip(MULTI_LABEL_METRICS, values, strict=True))
    ranks = list[torch.Tensor]()
    first = 0
    for scores_BC in blocks:
        ranks.append(rank_scores(scores_BC, labels[first : first + len(scores_BC)])[1])
        first += len(scores_BC)
    return classification_metrics(torch.cat(ranks), labels, num_classes)
