"""Zero-shot classification: from embeddings and class weights to metrics, per-class results and example images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from clipcid_cli.algorithms.metrics.average_precision import average_precision, precision_metrics
from clipcid_cli.algorithms.metrics.classification import (
    ACCURACY_TOP_K,
    accuracy_metrics,
    count_ties,
    rank_classes,
    top_classes,
)
from clipcid_cli.algorithms.metrics.intervals import Array
from clipcid_cli.formats.results import predictions
from clipcid_cli.steps.evaluate.task_result import TaskEmbeddings, TaskResult
from clipcid_cli.steps.reporting import Reporter

_CORRECT_EXAMPLES = 6
_WRONG_EXAMPLES_PER_CLASS = 4
_WORST_CLASSES = 8


def measure_classification(embeddings: TaskEmbeddings, weights: torch.Tensor, reporter: Reporter) -> TaskResult:
    """Measure the accuracy of images that have one class each.

    Args:
        weights: Class weights, float32 [C, D], unit rows.
    """
    task, labels, num_classes = embeddings.task, embeddings.labels.numpy(), len(weights)
    ranked, top, ties = [], [], 0
    for batch in embeddings.batches:
        assert batch.labels is not None, "a classification has labels"
        scores = batch.images @ weights.T
        ranked.append(rank_classes(scores, batch.labels))
        if embeddings.keep_predictions:
            top.append(top_classes(scores))
        ties += count_ties(scores)
    predicted, ranks = (torch.cat(parts).numpy() for parts in zip(*ranked, strict=True))
    if num_classes < ACCURACY_TOP_K:
        reporter.note(f"{task.name}: acc5 is null because there are only {num_classes} classes.")
    absent = num_classes - len(np.unique(labels))
    if absent:
        reporter.note(
            f"{task.name}: {absent} of {num_classes} classes have no image; the mean over classes ignores them."
        )
    if ties:
        reporter.warn(
            f"{task.name}: {ties:,} of {len(labels):,} images are equally similar to several classes; the first of these "
            "classes is predicted. Does the model, or do the class names, tell the classes apart?"
        )
    metrics = accuracy_metrics(labels, ranks, num_classes)
    kept = None
    if embeddings.keep_predictions:
        scores_of_top, numbers_of_top = (torch.cat(parts).tolist() for parts in zip(*top, strict=True))
        columns = {"label": labels, "predicted": predicted, "top": numbers_of_top, "scores": scores_of_top}
        kept = embeddings.make_predictions(predictions.CLASSIFICATION, columns)
    return TaskResult(
        metrics=metrics.values(),
        intervals=metrics.intervals(embeddings.replicates, embeddings.seed),
        per_class=_describe_classes(task.class_names, labels, predicted),
        examples=_choose_examples(embeddings, labels, predicted),
        predictions=kept,
        texts=num_classes * len(task.templates),
    )


def _describe_classes(names: tuple[str, ...], labels: Array, predicted: Array) -> list[dict[str, Any]]:
    """Count the images of each class, the share predicted right, and the wrong class predicted most often."""
    described = []
    for number, name in enumerate(names):
        images_of = np.bincount(predicted[labels == number], minlength=len(names))
        images, correct = int(images_of.sum()), int(images_of[number])
        images_of[number] = 0
        other = int(images_of.argmax())
        confused = int(images_of[other])
        described.append(
            {
                "class": name,
                "images": images,
                "value": correct / images if images else None,
                "confused_with": names[other] if confused else None,
                "confused": confused,
            }
        )
    return described


def _choose_examples(embeddings: TaskEmbeddings, labels: Array, predicted: Array) -> list[dict[str, Any]]:
    """Take the first images that are right, and the first wrong ones of each of the worst classes."""
    right = labels == predicted
    images, correct = np.bincount(labels), np.bincount(labels[right], minlength=labels.max() + 1)
    recall = np.where(images > 0, correct / np.maximum(images, 1), np.inf)
    worst = [number for number in np.argsort(recall, kind="stable")[:_WORST_CLASSES] if recall[number] < 1]
    rows = list(np.flatnonzero(right)[:_CORRECT_EXAMPLES])
    for number in worst:
        rows += list(np.flatnonzero(~right & (labels == number))[:_WRONG_EXAMPLES_PER_CLASS])
    return [embeddings.make_example(int(row), int(labels[row]), int(predicted[row])) for row in rows]


def measure_multi_label(embeddings: TaskEmbeddings, weights: torch.Tensor) -> TaskResult:
    """Measure the average precision of images that may have any number of classes.

    Args:
        weights: Class weights, float32 [C, D], unit rows.
    """
    task, positive = embeddings.task, embeddings.labels
    scores = torch.cat([batch.images @ weights.T for batch in embeddings.batches])
    metrics = precision_metrics(scores.numpy(), positive.numpy())
    areas = average_precision(metrics.images_U[None], scores.numpy(), positive.numpy())[0][0]
    kept = None
    if embeddings.keep_predictions:
        scores_of_top, top = top_classes(scores)
        columns = {
            "labels": [row.nonzero().squeeze(1).tolist() for row in positive],
            "predicted": top[:, 0].numpy(),
            "top": top.tolist(),
            "scores": scores_of_top.tolist(),
            "class_scores": scores.tolist(),
        }
        kept = embeddings.make_predictions(predictions.MULTI_LABEL, columns)
    return TaskResult(
        metrics=metrics.values(),
        intervals=metrics.intervals(embeddings.replicates, embeddings.seed),
        per_class=[
            {
                "class": name,
                "images": images,
                "value": None if np.isnan(area) else area,
                "confused_with": None,
                "confused": 0,
            }
            for name, images, area in zip(task.class_names, positive.sum(dim=0).tolist(), areas.tolist(), strict=True)
        ],
        examples=[],
        predictions=kept,
        texts=len(weights) * len(task.templates),
    )
