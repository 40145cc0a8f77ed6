"""From a model's rows of a data set to metrics, and what explains them: classes and example images.

Shape letters: N images, C classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from clipcid_cli.algorithms.metrics.associations import choose_associated, jaccard_metrics
from clipcid_cli.algorithms.metrics.chance import guess_captions, guess_classes, guess_order, largest_class
from clipcid_cli.algorithms.metrics.classification import (
    ACCURACY_TOP_K,
    accuracy_metrics,
    average_precision,
    count_ties,
    precision_metrics,
    rank_classes,
)
from clipcid_cli.algorithms.metrics.groups import OwnMetric, own_metrics
from clipcid_cli.algorithms.metrics.intervals import Array, CellMetrics
from clipcid_cli.algorithms.metrics.retrieval import RECALL_AT, retrieval_metrics, retrieval_ranks
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.classes import read_metadata
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.results.evaluations import ClassScore, Example
from clipcid_cli.formats.results.metrics import ASSOCIATION
from clipcid_cli.steps import reporting
from clipcid_cli.steps.evaluate.model import TaskRows
from clipcid_cli.steps.evaluate.predictions import class_columns, multi_label_columns

_CORRECT_EXAMPLES = 6
_WRONG_EXAMPLES_PER_CLASS = 4
_WORST_CLASSES = 8
# Of metadata that may be a stranger's: each group takes a column as long as the images.
_MOST_GROUPS = 1000
# Images whose cosines with all classes are held at once.
_SCORED_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The metrics of one model on one data set, and what explains them."""

    # The metrics, of all images and of random draws of them; CLIP_benchmark's names where it has one.
    draws: CellMetrics
    columns: Callable[[], dict[str, Any]]  # makes the columns of the predictions file but for the keys
    texts: int  # number of prompts or captions used
    chance: dict[str, float]  # what a guess scores, of the metrics where that is known
    predicted: Array | None = None  # the class of each image, int64 [N], where each has one
    majority: float | None = None  # share of the images in the largest class, where each has one
    per_class: list[ClassScore] = dataclasses.field(default_factory=list)
    examples: list[Example] = dataclasses.field(default_factory=list)


def measure(rows: TaskRows, device: torch.device) -> TaskResult:
    """Measure what a model made of a data set; similarities of images and captions are computed on the device."""
    if rows.weights is None:
        return _measure_retrieval(rows, device)
    if rows.task.kind == ASSOCIATION:
        return _measure_associations(rows, rows.weights)
    if rows.task.multi_label:
        return _measure_multi_label(rows, rows.weights)
    return _measure_classification(rows, rows.weights)


def _score(rows: TaskRows, weights: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the cosines of block after block of the images with all classes."""
    for images in torch.split(rows.encoded.rows[Kind.IMAGES], _SCORED_AT_ONCE):
        yield images @ weights.T


def _measure_classification(rows: TaskRows, weights: torch.Tensor) -> TaskResult:
    """Measure the accuracy of images that have one class each."""
    task = rows.task
    num_classes = len(weights)
    ranked = []
    ties = 0
    for scores, own in zip(_score(rows, weights), torch.split(rows.labels, _SCORED_AT_ONCE), strict=True):
        ranked.append(rank_classes(scores, own))
        ties += count_ties(scores)
    predicted, ranks = (torch.cat(parts).numpy() for parts in zip(*ranked, strict=True))
    labels = rows.labels.numpy()
    if num_classes < ACCURACY_TOP_K:
        reporting.note(f"{task.name}: acc5 is null because there are only {num_classes} classes.")
    absent = num_classes - len(np.unique(labels))
    if absent:
        reporting.note(
            f"{task.name}: {absent} of {num_classes} classes have no image; the mean over classes ignores them."
        )
    if ties:
        reporting.warn(
            f"{task.name}: {ties:,} of {len(labels):,} images are equally similar to several classes; the first of these "
            "classes is predicted. Does the model, or do the class names, tell the classes apart?"
        )

    per_class = _score_classes(task.class_names, labels, predicted)
    draws = accuracy_metrics(labels, ranks, num_classes)
    if task.own is not None:
        draws = own_metrics(task.own, labels, predicted, ranks, _read_groups(rows, task.own), num_classes)
    return TaskResult(
        draws=draws,
        columns=lambda: class_columns(rows.labels, _score(rows, weights)),
        texts=num_classes * len(task.templates),
        chance=guess_classes(num_classes),
        predicted=predicted,
        majority=largest_class(labels),
        per_class=per_class,
        examples=_choose_examples(rows, labels, predicted, per_class),
    )


def _read_groups(rows: TaskRows, own: OwnMetric) -> Array | None:
    """Read the group of each image, int64 [N]; None where the metric is of no groups."""
    place = own.group
    if place is None:
        return None
    groups = np.array([read_metadata(sample, place) for sample in rows.encoded.samples], np.int64)
    count = len(np.unique(groups))
    if count > _MOST_GROUPS:
        raise ClipcidError(
            f"{rows.task.name}: the images are of {count:,} groups by their .npy; at most {_MOST_GROUPS:,} are compared.",
            "Get the copy of the data set that DataComp evaluates.",
        )
    return groups


def _score_classes(names: tuple[str, ...], labels: Array, predicted: Array) -> list[ClassScore]:
    """Find the recall of each class, and the wrong class predicted most often."""
    scores = []
    for label, name in enumerate(names):
        images_of = np.bincount(predicted[labels == label], minlength=len(names))
        images, correct = int(images_of.sum()), int(images_of[label])
        images_of[label] = 0
        other = int(images_of.argmax())
        confused = int(images_of[other])
        recall = correct / images if images else None
        scores.append(ClassScore(name, images, recall, names[other] if confused else None, confused))
    return scores


def _choose_examples(rows: TaskRows, labels: Array, predicted: Array, per_class: list[ClassScore]) -> list[Example]:
    """Take the first images that are right, and the first wrong ones of each of the worst classes."""
    recall = [1.0 if score.value is None else score.value for score in per_class]
    wrong = labels != predicted
    chosen = list(np.flatnonzero(~wrong)[:_CORRECT_EXAMPLES])
    for label in np.argsort(recall, kind="stable")[:_WORST_CLASSES]:
        chosen += list(np.flatnonzero(wrong & (labels == label))[:_WRONG_EXAMPLES_PER_CLASS])
    names = rows.task.class_names
    examples = []
    for row in chosen:
        sample = rows.encoded.samples[row]
        place = sample.image
        example = Example(
            key=sample.key,
            label=names[labels[row]],
            predicted=names[predicted[row]],
            path=place.path,
            offset=place.offset,
            size=place.size,
            column=place.column,
        )
        examples.append(example)
    return examples


def _measure_multi_label(rows: TaskRows, weights: torch.Tensor) -> TaskResult:
    """Measure the average precision of images that may have any number of classes."""
    task = rows.task
    positive = rows.labels
    scores = torch.cat(list(_score(rows, weights)))
    draws = precision_metrics(scores.numpy(), positive.numpy())
    areas = average_precision(draws.sizes[None], scores.numpy(), positive.numpy())[0][0].tolist()

    return TaskResult(
        draws=draws,
        columns=lambda: multi_label_columns(positive, scores),
        texts=len(weights) * len(task.templates),
        chance=guess_order(positive.numpy()),
        per_class=[
            ClassScore(name, images, None if math.isnan(area) else area)
            for name, images, area in zip(task.class_names, positive.sum(dim=0).tolist(), areas, strict=True)
        ],
    )


def _measure_associations(rows: TaskRows, weights: torch.Tensor) -> TaskResult:
    """Measure how well the images of each cue that belong to it are told from its other candidates.

    Cues with a candidate that cannot be used are left out: to choose among fewer is another question.
    """
    samples = rows.encoded.samples
    cues = rows.labels.numpy()
    scores = (rows.encoded.rows[Kind.IMAGES] * weights[rows.labels]).sum(dim=1).numpy()
    is_associated = np.array([bool(sample.labels) for sample in samples])
    is_chosen = choose_associated(scores, cues, is_associated)
    is_whole = (np.bincount(cues, minlength=len(weights)) == rows.task.candidates)[cues]
    if not is_whole.any():
        raise ClipcidError(
            f"{rows.task.dataset.spec}: no cue has all of its candidate images.", "Download the data set again."
        )
    if not is_whole.all():
        lost = len(np.unique(cues[~is_whole]))
        reporting.warn(f"{rows.task.name}: cues left out, since an image of theirs cannot be used: {lost:,}.")

    def columns() -> dict[str, Any]:
        return {"cue": cues, "associated": is_associated, "chosen": is_chosen, "score": scores}

    return TaskResult(
        draws=jaccard_metrics(cues[is_whole], is_associated[is_whole], is_chosen[is_whole]),
        columns=columns,
        texts=len(weights),
        chance={},
    )


def _measure_retrieval(rows: TaskRows, device: torch.device) -> TaskResult:
    """Measure how well captions find their images, and images their captions: all of `MEASURES`."""
    encoded = rows.encoded
    images, texts = (encoded.rows[kind].to(device) for kind in (Kind.IMAGES, Kind.TEXTS))
    smallest = min(len(images), len(texts))
    if smallest <= max(RECALL_AT):
        reporting.note(
            f"{rows.task.name}: with {len(images)} images and {len(texts)} captions, recall at {smallest} or more means "
            "little."
        )
    image_ranks, text_ranks = (ranks.cpu() for ranks in retrieval_ranks(images, texts, encoded.owners.to(device)))

    def columns() -> dict[str, Any]:
        by_image = torch.split(image_ranks, encoded.captions.tolist())
        return {"image_ranks": [ranks.tolist() for ranks in by_image], "text_rank": text_ranks.numpy()}

    return TaskResult(
        draws=retrieval_metrics((image_ranks, text_ranks), encoded.owners),
        columns=columns,
        texts=len(texts),
        chance=guess_captions(encoded.captions.numpy()),
    )
