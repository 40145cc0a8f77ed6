"""Two models on the same images: every metric of both, and bootstrap draws of its difference.

Both models are drawn the same images, so what makes an image easy or hard for both cancels out of the difference.

Shape letters: N images, M captions, C classes, K entries of a top-k, B replicates, U cells of :mod:`.intervals`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from clipcid_cli.algorithms.metrics.average_precision import MULTI_LABEL_METRICS, average_precision
from clipcid_cli.algorithms.metrics.intervals import (
    Array,
    draw_average_precision,
    draw_cells,
    interval,
    mcnemar,
    mean_recall,
    ratio,
)
from clipcid_cli.algorithms.metrics.retrieval import RECALL_AT, count_hits
from clipcid_cli.algorithms.metrics.zeroshot import ACCURACY_TOP_K

_SIGNIFICANCE = 0.05


@dataclasses.dataclass(frozen=True)
class PairedMetric:
    """A metric of two models on the same images.

    Attributes:
        first: Value of the first model.
        difference_B: Second minus first, for each draw.
        p_value: McNemar's, where the metric counts images that are right or wrong.
    """

    first: float
    second: float
    difference_B: Array
    p_value: float | None = None

    @property
    def difference(self) -> float:
        """Second minus first."""
        return self.second - self.first

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference."""
        return interval(self.difference_B)

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        low, high = self.interval
        return low > 0 or high < 0

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0 and McNemar's test, where it applies, agrees at the 5 % level."""
        return self.excludes_zero and (self.p_value is None or self.p_value < _SIGNIFICANCE)


@dataclasses.dataclass(frozen=True)
class ClassPredictions:
    """What one model predicted of images with one class each.

    Attributes:
        predicted_N: The most similar class, int [N].
        top_NK: The most similar classes, int [N, K], K = min(5, C).
    """

    predicted_N: Array
    top_NK: Array


def compare_classification(
    labels_N: Array,
    first: ClassPredictions,
    second: ClassPredictions,
    num_classes: int,
    replicates: int,
    seed: int,
) -> dict[str, PairedMetric]:
    """Compare ``acc1``, ``acc5`` (from 5 classes on) and ``mean_per_class_recall``.

    Args:
        labels_N: Right classes, int [N].
    """
    right = [side.predicted_N == labels_N for side in (first, second)]
    among = [(side.top_NK == labels_N[:, None]).any(axis=1) for side in (first, second)]
    cells, draws = draw_cells(np.stack([labels_N, *right, *among], axis=1).astype(np.int64), replicates, seed)
    found = {"acc1": _compare_shares(right, draws, cells[:, 1], cells[:, 2])}
    if num_classes >= ACCURACY_TOP_K:
        found["acc5"] = _compare_shares(among, draws, cells[:, 3], cells[:, 4])
    order = np.argsort(labels_N, kind="stable")
    once = np.ones((1, len(labels_N)))  # the data as it is: a draw of each image once
    recalls = [float(mean_recall(once, labels_N[order], side[order])[0]) for side in right]
    drawn_B = mean_recall(draws, cells[:, 0], cells[:, 2]) - mean_recall(draws, cells[:, 0], cells[:, 1])
    found["mean_per_class_recall"] = PairedMetric(recalls[0], recalls[1], drawn_B)
    return found


def _compare_shares(right: list[Array], draws: Array, first_U: Array, second_U: Array) -> PairedMetric:
    """Compare shares of images, each of which is right or wrong."""
    first, second = (float(side.mean()) for side in right)
    return PairedMetric(first, second, ratio(draws, second_U - first_U), _mcnemar(*right))


def _mcnemar(first_N: Array, second_N: Array) -> float:
    return mcnemar(int((first_N & ~second_N).sum()), int((second_N & ~first_N).sum()))


@dataclasses.dataclass(frozen=True)
class RetrievalRanks:
    """Ranks of one model, as `retrieval.retrieval_ranks` returns them.

    Attributes:
        image_M: For each caption the images before its own, int64 [M], captions in order of their images.
        text_N: For each image the captions before the first of its own, int64 [N].
    """

    image_M: torch.Tensor
    text_N: torch.Tensor


def compare_retrieval(
    captions_N: torch.Tensor, first: RetrievalRanks, second: RetrievalRanks, replicates: int, seed: int
) -> dict[str, PairedMetric]:
    """Compare recall at `RECALL_AT` in both directions, that of images first.

    Args:
        captions_N: Number of captions of each image, int64 [N].
    """
    sides = [count_hits(side.image_M, side.text_N, captions_N) for side in (first, second)]
    width, text_start = sides[0].shape[1], 1 + len(RECALL_AT)
    cells, draws = draw_cells(np.concatenate(sides, axis=1), replicates, seed)
    found = {}
    for column, k in enumerate(RECALL_AT, start=1):
        # Captions of one image are not independent, as McNemar's test would need: images are drawn with all of theirs.
        values = [float(side[:, column].sum() / side[:, 0].sum()) for side in sides]
        gained_U = cells[:, width + column] - cells[:, column]
        found[f"image_retrieval_recall@{k}"] = PairedMetric(values[0], values[1], ratio(draws, gained_U, cells[:, 0]))
    for column, k in enumerate(RECALL_AT, start=text_start):
        hits = [side[:, column].astype(bool) for side in sides]
        found[f"text_retrieval_recall@{k}"] = _compare_shares(hits, draws, cells[:, column], cells[:, width + column])
    return found


def compare_multi_label(
    positive_NC: Array, first_NC: Array, second_NC: Array, replicates: int, seed: int
) -> dict[str, PairedMetric]:
    """Compare both forms of mean average precision.

    Args:
        positive_NC: Whether the image has the class, bool [N, C].
        first_NC: Scores of the first model, float [N, C].
        second_NC: Scores of the second.
    """
    values, drawn = [], []
    for scores_NC in (first_NC, second_NC):
        precision = average_precision(torch.from_numpy(scores_NC), torch.from_numpy(positive_NC))
        values.append((precision.mean_area, precision.mean_eleven_point))
        drawn.append(draw_average_precision(scores_NC, positive_NC, replicates, seed))
    return {
        name: PairedMetric(values[0][place], values[1][place], drawn[1][place] - drawn[0][place])
        for place, name in enumerate(MULTI_LABEL_METRICS)
    }
