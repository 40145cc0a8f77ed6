"""Metrics of a classification that weigh classes or groups of images: F1 over classes, and the accuracy of the worst group.

Shape letters beside those of the map: U cells and B draws of :mod:`.intervals`, G groups, C classes that occur.

Source: Koh et al. 2021 (WILDS), §4 and appendix E; names as mlfoundations/datacomp's evaluation writes them.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np

from clipcid_cli.algorithms.metrics.classification import ACCURACY_TOP_K, accuracies
from clipcid_cli.algorithms.metrics.intervals import Array, CellMetrics, find_cells


@dataclasses.dataclass(frozen=True)
class OwnMetric:
    """A metric that a data set has beside the usual ones."""

    name: str
    # Which number of an image's metadata is its group, whose worst accuracy is measured; None measures F1.
    group: int | None = None
    top: int = 1  # an image is right if its class is among so many most similar ones: 1 or 5


OWN_METRICS = {
    "iwildcam": OwnMetric("F1-macro_all"),
    "camelyon17": OwnMetric("acc_wg", group=1),  # of a slide
    "fmow": OwnMetric("acc_worst_region", group=0),
    "dollar-street": OwnMetric("acc_top5_wg", group=0, top=5),  # of a quarter of the incomes
    "geode": OwnMetric("acc_wg", group=0),  # of a region
}
"""Of each data set that has one, by its name."""


def own_metrics(
    own: OwnMetric, labels_N: Array, predicted_N: Array, ranks_N: Array, groups_N: Array | None, num_classes: int
) -> CellMetrics:
    """Return the metrics of `accuracy_metrics`, and `own`.

    Args:
        predicted_N: The classes that images are taken for, int64.
        ranks_N: How many classes come before the right one, int64.
        groups_N: The group of each image, int64; None for F1.
    """
    among_N = predicted_N if groups_N is None else groups_N
    right_N, first_N = ranks_N == 0, ranks_N < ACCURACY_TOP_K
    cells_U4, cells_N = find_cells(np.stack([labels_N, right_N, first_N, among_N], axis=1))

    def of_draws(draws_BU: Array) -> dict[str, Array]:
        return accuracies(cells_U4[:, :3], num_classes, draws_BU) | {own.name: measure(draws_BU)}

    if groups_N is None:
        measure = partial(mean_f1, cells_U4[:, 0], cells_U4[:, 3])
    else:
        measure = partial(worst_accuracy, cells_U4[:, 3], cells_U4[:, 1 if own.top == 1 else 2])
    return CellMetrics(cells_N, of_draws)


def worst_accuracy(groups_U: Array, right_U: Array, draws_BU: Array) -> Array:
    """Return the lowest share of right images among the groups that were drawn, float64 [B]."""
    names_G, group_U = np.unique(groups_U, return_inverse=True)
    is_of_UG = group_U[:, None] == np.arange(len(names_G))
    images_BG = draws_BU @ is_of_UG
    right_BG = (draws_BU * right_U) @ is_of_UG
    return np.asarray(np.where(images_BG > 0, right_BG / np.maximum(images_BG, 1), np.inf).min(axis=1))


def mean_f1(labels_U: Array, predicted_U: Array, draws_BU: Array) -> Array:
    """Return the mean of F1 = 2·TP / (2·TP + FP + FN) over the classes that images drawn have, float64 [B]."""
    labels_C, label_U = np.unique(labels_U, return_inverse=True)
    of_label_UC = label_U[:, None] == np.arange(len(labels_C))
    taken_for_UC = predicted_U[:, None] == labels_C
    images_BC = draws_BU @ of_label_UC
    predicted_BC = draws_BU @ taken_for_UC
    right_BC = draws_BU @ (of_label_UC & taken_for_UC)
    f1_BC = 2 * right_BC / np.maximum(images_BC + predicted_BC, 1)
    is_drawn_BC = images_BC > 0
    return np.asarray((f1_BC * is_drawn_BC).sum(axis=1) / is_drawn_BC.sum(axis=1))
