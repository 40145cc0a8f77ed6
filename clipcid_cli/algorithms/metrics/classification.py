"""Classification: prompts become one weight vector per class, images go to the class of the largest score, or to several.

Where images have several classes, each class ranks all images, and is measured by its average precision.

Shape letters beside those of the map: T templates, P images that have a class, U cells and B draws of :mod:`.intervals`, S
seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch

from clipcid_cli.algorithms.metrics.intervals import (
    Array,
    CellMetrics,
    PairedMetric,
    compare,
    find_cells,
    mcnemar,
    mean_of_drawn,
    ratio,
)

ACCURACY_TOP_K = 5
SINGLE_LABEL_METRICS = ("acc1", "acc5", "mean_per_class_recall")

MULTI_LABEL_METRICS = ("mean_average_precision", "mean_average_precision_11_point")


def class_weights(prompts_CTD: torch.Tensor) -> torch.Tensor:
    """Average the prompts of each class into one weight vector: the normalised mean of the normalised prompts.

    Source: Radford et al. 2021 (CLIP), §3.1.4, prompt ensembling in embedding space.
    """
    mean_CD = torch.nn.functional.normalize(prompts_CTD, dim=-1).mean(dim=1)
    return torch.nn.functional.normalize(mean_CD, dim=-1)


def rank_classes(scores_NC: torch.Tensor, labels_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find, for each image, the class of the largest score (−∞: out of the question) and how many come before the right one.

    Equal scores rank in the order of the classes, so the result never depends on how a sort breaks ties. A class is
    outranked by every class whose score is not surely less: one whose score is NaN comes last, and an image is right
    exactly when the rank of its class is 0.

    Returns:
        The predicted classes, int64 [N], and the ranks of the right classes, int64 [N] in [0, C]; C where the right
        class's score is NaN or −∞.
    """
    num_classes = scores_NC.shape[1]
    own_N1 = scores_NC.gather(1, labels_N[:, None])
    earlier_NC = torch.arange(num_classes, device=labels_N.device) < labels_N[:, None]
    # "Not less" rather than "greater": a comparison with NaN is false, and must not put the right class first.
    after_NC = (scores_NC < own_N1) | ((scores_NC == own_N1) & ~earlier_NC)
    ranks_N = torch.where(own_N1[:, 0] > -torch.inf, (~after_NC).sum(dim=1), num_classes)
    return scores_NC.nan_to_num(nan=-torch.inf).argmax(dim=1), ranks_N


def top_classes(scores_NC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 5 largest scores (all, where there are fewer), descending, and their classes; equal ones in their order."""
    sorted_NC, classes_NC = scores_NC.sort(dim=1, descending=True, stable=True)
    return sorted_NC[:, :ACCURACY_TOP_K], classes_NC[:, :ACCURACY_TOP_K]


def count_ties(scores_NC: torch.Tensor) -> int:
    """Count the images of which several classes share the largest score."""
    best_N2 = scores_NC.topk(min(2, scores_NC.shape[1]), dim=1).values
    return int((best_N2[:, :-1] == best_N2[:, 1:]).sum())


def accuracy_metrics(labels_N: Array, ranks_N: Array, num_classes: int) -> CellMetrics:
    """Return the metrics of a classification as CLIP_benchmark defines them, from the ranks of `rank_classes`.

    ``acc1`` and ``acc5`` are the shares of images whose right class is first, or among the first 5 (NaN below 5 classes,
    where it means nothing), and ``mean_per_class_recall`` is the mean over the classes that occur of the share of their
    images predicted right. All in [0, 1].

    Source: LAION-AI/CLIP_benchmark 1.6.2, metrics/zeroshot_classification.py; its NaN for acc5 is kept.
    """
    cells_U3, cells_N = find_cells(np.stack([labels_N, ranks_N == 0, ranks_N < ACCURACY_TOP_K], axis=1))
    return CellMetrics(cells_N, partial(accuracies, cells_U3, num_classes))


def compare_accuracies(
    labels_N: Array,
    first_S: Sequence[Array],
    second_S: Sequence[Array],
    num_classes: int,
    replicates: int,
    seed: int,
    groups_N: Array | None = None,
) -> dict[str, PairedMetric]:
    """Compare `accuracy_metrics` of two models, or of seeds of each, by the ranks, int64 [N]; groups as for `compare`."""
    ranks = [*first_S, *second_S]
    right = [ranks_N == 0 for ranks_N in ranks]
    among = [ranks_N < ACCURACY_TOP_K for ranks_N in ranks]
    cells_UV, cells_N = find_cells(np.stack([labels_N, *right, *among], axis=1))
    models = [
        CellMetrics(cells_N, partial(accuracies, cells_UV[:, [0, 1 + model, 1 + len(ranks) + model]], num_classes))
        for model in range(len(ranks))
    ]
    num_seeds = len(first_S)
    p_values = {"acc1": mcnemar(*right), "acc5": mcnemar(*among)} if num_seeds == 1 else None
    return compare(models[:num_seeds], models[num_seeds:], replicates, seed, p_values, groups_N)


def accuracies(cells_U3: Array, num_classes: int, draws_BU: Array) -> dict[str, Array]:
    """Return the metrics of draws from cells of class, right (0, 1) and among the first (0, 1), classes ascending."""
    classes_U, right_U, among_U = cells_U3.T
    starts_C = np.flatnonzero(np.diff(classes_U, prepend=classes_U[0] - 1))
    images_BC = np.add.reduceat(draws_BU, starts_C, axis=1)
    right_BC = np.add.reduceat(draws_BU * right_U, starts_C, axis=1)
    recall_BC = np.where(images_BC > 0, right_BC / np.maximum(images_BC, 1), np.nan)
    has_top = num_classes >= ACCURACY_TOP_K
    return {
        "acc1": ratio(draws_BU, right_U),
        "acc5": ratio(draws_BU, among_U) if has_top else np.full(len(draws_BU), np.nan),
        "mean_per_class_recall": mean_of_drawn(recall_BC),
    }


def measure_scores(blocks: Iterable[torch.Tensor], labels: torch.Tensor, num_classes: int) -> dict[str, float]:
    """Return the values of `score_metrics`."""
    return score_metrics(blocks, labels, num_classes).values()


def score_metrics(blocks: Iterable[torch.Tensor], labels: torch.Tensor, num_classes: int) -> CellMetrics:
    """Measure a classifier by its scores of some images.

    Args:
        blocks: Scores of block after block of the images, [B, C], on the labels' device.
        labels: Classes, int64 [N], or whether an image has a class, bool [N, C].

    Returns:
        `SINGLE_LABEL_METRICS` where images have one class, else `MULTI_LABEL_METRICS`.
    """
    if labels.ndim == 2:
        scores_NC = torch.cat(list(blocks))
        return precision_metrics(scores_NC.cpu().numpy(), labels.cpu().numpy())
    ranks: list[torch.Tensor] = []
    first = 0
    for scores_BC in blocks:
        ranks.append(rank_classes(scores_BC, labels[first : first + len(scores_BC)])[1])
        first += len(scores_BC)
    return accuracy_metrics(labels.cpu().numpy(), torch.cat(ranks).cpu().numpy(), num_classes)


def precision_metrics(scores_NC: Array, positive_NC: Array) -> CellMetrics:
    """Return the mean of each form of `average_precision` over the classes that have images.

    Raises:
        ValueError: when a score is NaN.
    """
    if np.isnan(scores_NC).any():
        raise ValueError("scores hold NaN, which have no order")

    def of_draws(draws_BN: Array) -> dict[str, Array]:
        forms = average_precision(draws_BN, scores_NC, positive_NC)
        return dict(zip(MULTI_LABEL_METRICS, map(mean_of_drawn, forms), strict=True))

    return CellMetrics(np.arange(len(scores_NC)), of_draws)


def average_precision(draws_BN: Array, scores_NC: Array, positive_NC: Array) -> tuple[Array, Array]:
    """Measure how early the images of each class come when all images are sorted by their score for it.

    Images of equal score count together, so the order of the images never matters.

    Args:
        draws_BN: How often each image counts, int64.
        positive_NC: Whether it has the class.

    Returns:
        The area under the stepwise precision-recall curve, and the mean over the recalls 0, 0.1, … 1 of the best precision
        at that recall or more, float64 [B, C] each; NaN where no image of the class was drawn.

    Source: the area as scikit-learn's average_precision_score; LAION-AI/CLIP_benchmark 1.6.2
        (metrics/zeroshot_classification.py, average_precision_per_class) is the same where no scores are equal, and counts
        a class without images as 0 where we omit it. The eleven points as Everingham et al. 2010 (PASCAL VOC), §4.2.
    """
    forms = np.full((2, len(draws_BN), scores_NC.shape[1]), np.nan)
    for label in range(scores_NC.shape[1]):
        order_N = np.argsort(-scores_NC[:, label], kind="stable")
        if positive_NC[:, label].any():
            forms[:, :, label] = _class_precision(
                draws_BN[:, order_N], scores_NC[order_N, label], positive_NC[order_N, label]
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
