"""Metrics of a linear probe.

Shape letters: N images, D width, C classes.
"""

from __future__ import annotations

import torch

from clipcid_cli.algorithms.metrics.average_precision import MULTI_LABEL_METRICS, average_precision
from clipcid_cli.algorithms.metrics.zeroshot import classification_metrics, rank_classes

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
    if labels.ndim == 2:
        scores_NC = torch.cat(
            [torch.addmm(bias_C, rows.double(), weights_CD.T) for rows in torch.split(features_ND, _BLOCK)]
        )
        precision = average_precision(scores_NC, labels)
        values = (precision.mean_area, precision.mean_eleven_point)
        return dict(zip(MULTI_LABEL_METRICS, values, strict=True))
    # The intercept is the weight of a feature that is 1.
    extended_CD = torch.cat([weights_CD, bias_C[:, None]], dim=1)
    parts = []
    for rows, own in zip(torch.split(features_ND, _BLOCK), torch.split(labels, _BLOCK), strict=True):
        ones = torch.ones(len(rows), 1, dtype=torch.float64, device=rows.device)
        parts.append(rank_classes(torch.cat([rows.double(), ones], dim=1), extended_CD, own)[1])
    return classification_metrics(torch.cat(parts), labels, num_classes)
