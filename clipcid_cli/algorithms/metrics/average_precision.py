"""Average precision of data whose images have several classes each: one ranking of all images per class.

Shape letters: N images, C classes.
"""

from __future__ import annotations

import dataclasses

import torch

MULTI_LABEL_METRICS = ("mean_average_precision", "mean_average_precision_11_point")

_RECALL_POINTS = 11


@dataclasses.dataclass(frozen=True)
class AveragePrecision:
    """How early the images of each class come when all images are sorted by their score for it.

    Attributes:
        area_C: Area under the stepwise precision-recall curve, float64 [C]; NaN where a class has no image.
        eleven_point_C: Mean over the recalls 0, 0.1, … 1 of the best precision at that recall or more, float64 [C]; NaN
            where a class has no image.
    """

    area_C: torch.Tensor
    eleven_point_C: torch.Tensor

    @property
    def mean_area(self) -> float:
        """Mean of `area_C` over the classes that have images; NaN when none has."""
        return float(self.area_C.nanmean())

    @property
    def mean_eleven_point(self) -> float:
        """Mean of `eleven_point_C` over the classes that have images, as VOC2007 is reported; NaN when none has."""
        return float(self.eleven_point_C.nanmean())


def average_precision(scores_NC: torch.Tensor, positive_NC: torch.Tensor) -> AveragePrecision:
    """Compute the average precision of every class, in both usual forms.

    Images of equal score count together, so the order of the images never matters.

    Args:
        scores_NC: Score of each image for each class, float [N, C]; only their order within a class matters.
        positive_NC: Whether the image has the class, bool [N, C].

    Raises:
        ValueError: when shapes differ, there is no image, or a score is NaN.

    Source: `area_C` as scikit-learn's average_precision_score; LAION-AI/CLIP_benchmark 1.6.2
        (metrics/zeroshot_classification.py, average_precision_per_class) is the same where no scores are equal, and counts
        a class without images as 0 where we omit it. `eleven_point_C` as Everingham et al. 2010 (PASCAL VOC), §4.2.
    """
    if scores_NC.ndim != 2 or scores_NC.shape != positive_NC.shape:
        raise ValueError(f"scores are {list(scores_NC.shape)}, labels {list(positive_NC.shape)}; both must be [N, C]")
    if not len(scores_NC):
        raise ValueError("no image to rank")
    if bool(scores_NC.isnan().any()):
        raise ValueError("scores hold NaN, which have no order")
    # One class at a time: all C at once would take four times the memory of the scores.
    pairs = [
        _class_precision(scores_NC[:, number], positive_NC[:, number].bool()) for number in range(scores_NC.shape[1])
    ]
    areas, points = zip(*pairs, strict=True)
    return AveragePrecision(torch.tensor(areas, dtype=torch.float64), torch.tensor(points, dtype=torch.float64))


def _class_precision(scores_N: torch.Tensor, positive_N: torch.Tensor) -> tuple[float, float]:
    """Return the area under one class's curve and its mean over eleven recalls; NaN both where it has no image."""
    total = int(positive_N.sum())
    if total == 0:
        return float("nan"), float("nan")
    sorted_N, order_N = scores_N.sort(descending=True)
    found_N = positive_N[order_N].cumsum(0)
    # A threshold includes all images of one score: only the last of each run of equal scores is a point of the curve.
    last_N = torch.ones_like(positive_N)
    last_N[:-1] = sorted_N[1:] != sorted_N[:-1]
    places_P = last_N.nonzero().squeeze(1)
    found_P = found_N[places_P]
    precision_P = found_P.double() / (places_P + 1).double()
    gained_P = torch.diff(found_P, prepend=found_P.new_zeros(1)).double()
    area = float((precision_P * gained_P).sum() / total)
    best_P = precision_P.flip(0).cummax(0).values.flip(0)  # the best precision at this recall or more
    # Recall ≥ t / 10 in whole numbers (10 · found ≥ t · total): 0.1 · 3 is not 0.3 in floating point.
    targets_T = torch.arange(_RECALL_POINTS, device=found_P.device) * total
    points_T = best_P[torch.searchsorted(found_P * (_RECALL_POINTS - 1), targets_T)]
    return area, float(points_T.mean())
