"""Zero-shot classification: from embeddings and class weights to metrics, per-class results and example images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from clipcid_cli.algorithms.metrics.average_precision import MULTI_LABEL_METRICS, average_precision
from clipcid_cli.algorithms.metrics.intervals import Array, draw_average_precision, interval
from clipcid_cli.algorithms.metrics.zeroshot import (
    ACCURACY_TOP_K,
    classification_intervals,
    classification_metrics,
    confuse_classes,
    count_ties,
    rank_classes,
    top_classes,
)
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
    task, labels, num_classes = embeddings.task, embeddings.labels, len(weights)
    ranked = [
        rank_classes(batch.images, weights, batch.labels) for batch in embeddings.batches if batch.labels is not None
    ]
    predicted, ranks = (torch.cat(parts) for parts in zip(*ranked, strict=True))
    if num_classes < ACCURACY_TOP_K:
        reporter.note(f"{task.name}: acc5 is null because there are only {num_classes} classes.")
    absent = num_classes - len(torch.unique(labels))
    if absent:
        reporter.note(
            f"{task.name}: {absent} of {num_classes} classes have no image; the mean over classes ignores them."
        )
    _warn_of_ties(embeddings, weights, reporter)
    intervals = {}
    if embeddings.replicates:
        intervals = classification_intervals(ranks, labels, num_classes, embeddings.replicates, embeddings.seed)
    kept = None
    if embeddings.keep_predictions:
        pairs = [top_classes(batch.images, weights) for batch in embeddings.batches]
        scores, top = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        columns = {"label": labels.numpy(), "predicted": predicted.numpy(), "top": top.tolist()}
        kept = embeddings.make_predictions(predictions.CLASSIFICATION, columns | {"scores": scores.tolist()})
    return TaskResult(
        metrics=classification_metrics(ranks, labels, num_classes),
        intervals=intervals,
        per_class=_describe_classes(task.class_names, labels.numpy(), predicted.numpy()),
        examples=_choose_examples(embeddings, labels.numpy(), predicted.numpy()),
        predictions=kept,
        texts=num_classes * len(task.templates),
    )


def _warn_of_ties(embeddings: TaskEmbeddings, weights: torch.Tensor, reporter: Reporter) -> None:
    """Say how many images have several most similar classes, of which the first in order is predicted."""
    tied = sum(count_ties(batch.images, weights) for batch in embeddings.batches)
    if tied:
        images = sum(len(batch.keys) for batch in embeddings.batches)
        reporter.warn(
            f"{embeddings.task.name}: {tied:,} of {images:,} images are equally similar to several classes; the first of "
            "these classes is predicted. Does the model, or do the class names, tell the classes apart?"
        )


def _describe_classes(names: tuple[str, ...], labels: Array, predicted: Array) -> list[dict[str, Any]]:
    return [
        {
            "class": name,
            "images": found.images,
            "value": found.correct / found.images if found.images else None,
            "confused_with": None if found.confused_with is None else names[found.confused_with],
            "confused": found.confused,
        }
        for name, found in zip(names, confuse_classes(labels, predicted, len(names)), strict=True)
    ]


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
    precision = average_precision(scores, positive)
    intervals = {}
    if embeddings.replicates:
        drawn = draw_average_precision(scores.numpy(), positive.numpy(), embeddings.replicates, embeddings.seed)
        intervals = {name: interval(values) for name, values in zip(MULTI_LABEL_METRICS, drawn, strict=True)}
    kept = None
    if embeddings.keep_predictions:
        ordered, top = scores.sort(dim=1, descending=True, stable=True)
        columns = {
            "labels": [row.nonzero().squeeze(1).tolist() for row in positive],
            "predicted": top[:, 0].numpy(),
            "top": top[:, :ACCURACY_TOP_K].tolist(),
            "scores": ordered[:, :ACCURACY_TOP_K].tolist(),
            "class_scores": scores.tolist(),
        }
        kept = embeddings.make_predictions(predictions.MULTI_LABEL, columns)
    means = (precision.mean_area, precision.mean_eleven_point)
    return TaskResult(
        metrics=dict(zip(MULTI_LABEL_METRICS, means, strict=True)),
        intervals=intervals,
        per_class=[
            {
                "class": name,
                "images": images,
                "value": None if np.isnan(area) else area,
                "confused_with": None,
                "confused": 0,
            }
            for name, images, area in zip(
                task.class_names, positive.sum(dim=0).tolist(), precision.area_C.tolist(), strict=True
            )
        ],
        examples=[],
        predictions=kept,
        texts=len(weights) * len(task.templates),
    )
