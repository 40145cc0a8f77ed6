"""Zero-shot classification: prompts become one weight vector per class, images go to the most similar class.

Shape letters: C classes, T templates, N images, D width of the embeddings.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from clipcid_cli.algorithms.metrics.intervals import Array, draw_cells, interval, mean_recall, ratio

ACCURACY_TOP_K = 5
SINGLE_LABEL_METRICS = ("acc1", "acc5", "mean_per_class_recall")


def class_weights(prompts_CTD: torch.Tensor) -> torch.Tensor:
    """Average the prompts of each class into one weight vector: the normalised mean of the normalised prompts.

    Args:
        prompts_CTD: Text embeddings, float [C, T, D], one per class and template, of any length.

    Returns:
        Unit rows [C, D] in the dtype of the prompts.

    Raises:
        ValueError: when there is no class or no template.

    Source: Radford et al. 2021 (CLIP), §3.1.4, prompt ensembling in embedding space.
    """
    if prompts_CTD.ndim != 3 or 0 in prompts_CTD.shape:
        raise ValueError(f"prompts must be [classes, templates, width], none of them 0, not {list(prompts_CTD.shape)}")
    mean_CD = torch.nn.functional.normalize(prompts_CTD, dim=-1).mean(dim=1)
    return torch.nn.functional.normalize(mean_CD, dim=-1)


def rank_classes(
    images_ND: torch.Tensor, weights_CD: torch.Tensor, labels_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find, for each image, the most similar class and how many classes come before the right one.

    Args:
        images_ND: Image embeddings, float [N, D], unit rows.
        weights_CD: Class weights of :func:`class_weights`, float [C, D].
        labels_N: Right classes, int64 [N], in [0, C).

    Returns:
        As :func:`rank_scores`.

    Raises:
        ValueError: when a label names no class.
    """
    return rank_scores(images_ND @ weights_CD.T, labels_N)


def rank_scores(scores_NC: torch.Tensor, labels_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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

    Raises:
        ValueError: when a label names no class.
    """
    num_classes = scores_NC.shape[1]
    if len(labels_N) and not 0 <= int(labels_N.min()) <= int(labels_N.max()) < num_classes:
        low, high = int(labels_N.min()), int(labels_N.max())
        raise ValueError(f"labels are in [{low}, {high}], classes in [0, {num_classes - 1}]")
    own_N1 = scores_NC.gather(1, labels_N[:, None])
    earlier_NC = torch.arange(num_classes, device=labels_N.device) < labels_N[:, None]
    # "Not less" rather than "greater": a comparison with NaN is false, and must not put the right class first.
    after_NC = (scores_NC < own_N1) | ((scores_NC == own_N1) & ~earlier_NC)
    ranks_N = torch.where(own_N1[:, 0] > -torch.inf, (~after_NC).sum(dim=1), num_classes)
    return scores_NC.nan_to_num(nan=-torch.inf).argmax(dim=1), ranks_N


def top_classes(images_ND: torch.Tensor, weights_CD: torch.Tensor, k: int = ACCURACY_TOP_K) -> tuple[torch.Tensor, ...]:
    """Find the classes most similar to each image; equal similarities rank in the order of the classes.

    Args:
        images_ND: Image embeddings, float [N, D], unit rows.
        weights_CD: Class weights of :func:`class_weights`, float [C, D].
        k: How many; with fewer classes, all.

    Returns:
        Cosine similarities [N, k], descending, and the numbers of the classes, int64 [N, k].
    """
    scores_NC, classes_NC = (images_ND @ weights_CD.T).sort(dim=1, descending=True, stable=True)
    return scores_NC[:, :k], classes_NC[:, :k]


def count_ties(images_ND: torch.Tensor, weights_CD: torch.Tensor) -> int:
    """Count the images that are equally similar to several classes, more than to any other class."""
    if len(weights_CD) < 2:
        return 0
    best_N2 = (images_ND @ weights_CD.T).topk(2, dim=1).values
    return int((best_N2[:, 0] == best_N2[:, 1]).sum())


def classification_metrics(ranks_N: torch.Tensor, labels_N: torch.Tensor, num_classes: int) -> dict[str, float]:
    """Compute the metrics of a classification as CLIP_benchmark does.

    Args:
        ranks_N: How many classes come before the right one, int64 [N], as :func:`rank_classes` returns them.
        labels_N: Right classes, int64 [N].

    Returns:
        ``acc1`` and ``acc5``, the shares of images whose right class is first, or among the first 5 (NaN below 5
        classes, where it means nothing), and ``mean_per_class_recall``, the mean over the classes that occur of the
        share of their images predicted right. All in [0, 1].

    Raises:
        ValueError: when there is no image.

    Source: LAION-AI/CLIP_benchmark 1.6.2, metrics/zeroshot_classification.py; its NaN for acc5 is kept.
    """
    if not len(labels_N):
        raise ValueError("no image to measure")
    images_C = torch.bincount(labels_N, minlength=num_classes)
    right_C = torch.bincount(labels_N[ranks_N == 0], minlength=num_classes)
    present = images_C > 0
    recall = (right_C[present].double() / images_C[present].double()).mean()
    top_k = (ranks_N < ACCURACY_TOP_K).double().mean() if num_classes >= ACCURACY_TOP_K else torch.tensor(float("nan"))
    return {
        "acc1": float((ranks_N == 0).double().mean()),
        "acc5": float(top_k),
        "mean_per_class_recall": float(recall),
    }


def classification_intervals(
    ranks_N: torch.Tensor, labels_N: torch.Tensor, num_classes: int, replicates: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Return the 95 % bootstrap interval of each of `classification_metrics`; none of acc5 below 5 classes.

    Args:
        ranks_N: As :func:`rank_classes` returns them.
        replicates: Number of draws.
    """
    values_N3 = torch.stack([labels_N, ranks_N == 0, ranks_N < ACCURACY_TOP_K], dim=1).numpy()
    cells, draws = draw_cells(values_N3, replicates, seed)
    intervals = {"acc1": interval(ratio(draws, cells[:, 1]))}
    if num_classes >= ACCURACY_TOP_K:
        intervals["acc5"] = interval(ratio(draws, cells[:, 2]))
    intervals["mean_per_class_recall"] = interval(mean_recall(draws, cells[:, 0], cells[:, 1]))
    return intervals


@dataclasses.dataclass(frozen=True)
class ClassConfusion:
    """How the images of one class were classified.

    Attributes:
        images: Number of its images.
        correct: Those predicted right.
        confused_with: The wrong class predicted most often; None when none was.
        confused: Number of images predicted as that class.
    """

    images: int
    correct: int
    confused_with: int | None
    confused: int


def confuse_classes(labels_N: Array, predictions_N: Array, num_classes: int) -> list[ClassConfusion]:
    """Count, for each class, its images, those predicted right, and the wrong class predicted most often.

    Args:
        labels_N: Right classes, int64 [N], in [0, C).
        predictions_N: Predicted classes, int64 [N], in [0, C).

    Returns:
        One entry per class, in order.
    """
    found = []
    for number in range(num_classes):
        predicted_C = np.bincount(predictions_N[labels_N == number], minlength=num_classes)
        images, correct = int(predicted_C.sum()), int(predicted_C[number])
        predicted_C[number] = 0
        other = int(predicted_C.argmax())
        confused = int(predicted_C[other])
        found.append(ClassConfusion(images, correct, other if confused else None, confused))
    return found
