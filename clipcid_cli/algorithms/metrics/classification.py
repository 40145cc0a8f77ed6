"""Classification: prompts become one weight vector per class, images go to the class of the largest score.

Shape letters: C classes, T templates, N images, D width of the embeddings, U cells and B draws of :mod:`.intervals`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch

from clipcid_cli.algorithms.metrics.average_precision import precision_metrics
from clipcid_cli.algorithms.metrics.intervals import (
    Array,
    Metrics,
    PairedMetric,
    compare,
    count_cells,
    mcnemar,
    mean_of_drawn,
    ratio,
)

ACCURACY_TOP_K = 5
SINGLE_LABEL_METRICS = ("acc1", "acc5", "mean_per_class_recall")


def class_weights(prompts_CTD: torch.Tensor) -> torch.Tensor:
    """Average the prompts of each class into one weight vector: the normalised mean of the normalised prompts.

    Args:
        prompts_CTD: Text embeddings, float [C, T, D], one per class and template, of any length.

    Returns:
        Unit rows [C, D] in the dtype of the prompts.

    Source: Radford et al. 2021 (CLIP), §3.1.4, prompt ensembling in embedding space.
    """
    mean_CD = torch.nn.functional.normalize(prompts_CTD, dim=-1).mean(dim=1)
    return torch.nn.functional.normalize(mean_CD, dim=-1)


def rank_classes(scores_NC: torch.Tensor, labels_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find, for each image, the class of the largest score and how many classes come before the right one.

    Equal scores rank in the order of the classes, so the result never depends on how a sort breaks ties. A class is
    outranked by every class whose score is not surely less: one whose score is NaN comes last, and an image is right
    exactly when the rank of its class is 0.

    Args:
        scores_NC: Scores, float [N, C]; −∞ for a class that is out of the question.
        labels_N: Right classes, int64 [N], in [0, C).

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
    """Find the 5 classes of the largest scores (all, where there are fewer); equal scores rank in the order of the classes.

    Returns:
        Their scores [N, 5], descending, and their numbers, int64 [N, 5].
    """
    sorted_NC, classes_NC = scores_NC.sort(dim=1, descending=True, stable=True)
    return sorted_NC[:, :ACCURACY_TOP_K], classes_NC[:, :ACCURACY_TOP_K]


def count_ties(scores_NC: torch.Tensor) -> int:
    """Count the images of which several classes share the largest score."""
    best_N2 = scores_NC.topk(min(2, scores_NC.shape[1]), dim=1).values
    return int((best_N2[:, :-1] == best_N2[:, 1:]).sum())


def accuracy_metrics(labels_N: Array, ranks_N: Array, num_classes: int) -> Metrics:
    """Return the metrics of a classification as CLIP_benchmark defines them.

    ``acc1`` and ``acc5`` are the shares of images whose right class is first, or among the first 5 (NaN below 5 classes,
    where it means nothing), and ``mean_per_class_recall`` is the mean over the classes that occur of the share of their
    images predicted right. All in [0, 1].

    Args:
        labels_N: Right classes, int64 [N].
        ranks_N: How many classes come before the right one, int64 [N], as `rank_classes` returns them.

    Source: LAION-AI/CLIP_benchmark 1.6.2, metrics/zeroshot_classification.py; its NaN for acc5 is kept.
    """
    cells_U3, images_U = count_cells(np.stack([labels_N, ranks_N == 0, ranks_N < ACCURACY_TOP_K], axis=1))
    return Metrics(images_U, partial(_accuracies, cells_U3, num_classes))


def compare_accuracies(
    labels_N: Array, first_N: Array, second_N: Array, num_classes: int, replicates: int, seed: int
) -> dict[str, PairedMetric]:
    """Compare `accuracy_metrics` of two models by the ranks of each, int64 [N]."""
    right = [ranks_N == 0 for ranks_N in (first_N, second_N)]
    among = [ranks_N < ACCURACY_TOP_K for ranks_N in (first_N, second_N)]
    cells_U5, images_U = count_cells(np.stack([labels_N, *right, *among], axis=1))
    sides = [
        Metrics(images_U, partial(_accuracies, cells_U5[:, [0, 1 + side, 3 + side]], num_classes)) for side in (0, 1)
    ]
    p_values = {"acc1": mcnemar(right[0], right[1]), "acc5": mcnemar(among[0], among[1])}
    return compare(sides[0], sides[1], replicates, seed, p_values)


def _accuracies(cells_U3: Array, num_classes: int, draws_BU: Array) -> dict[str, Array]:
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
    """Measure a classifier by its scores of some images.

    Args:
        blocks: Scores of block after block of the images, float [B, C], on the labels' device; −∞ where a class is out of
            the question.
        labels: Classes, int64 [N], or whether an image has a class, bool [N, C].

    Returns:
        `SINGLE_LABEL_METRICS` where images have one class, else `MULTI_LABEL_METRICS`.
    """
    if labels.ndim == 2:
        scores_NC = torch.cat(list(blocks))
        return precision_metrics(scores_NC.cpu().numpy(), labels.cpu().numpy()).values()
    ranks: list[torch.Tensor] = []
    first = 0
    for scores_BC in blocks:
        ranks.append(rank_classes(scores_BC, labels[first : first + len(scores_BC)])[1])
        first += len(scores_BC)
    return accuracy_metrics(labels.cpu().numpy(), torch.cat(ranks).cpu().numpy(), num_classes).values()
