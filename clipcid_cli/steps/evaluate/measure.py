"""From embeddings to metrics: what `eval-zeroshot` measures of one model on one data set."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import torch

from clipcid_cli.algorithms.metrics.average_precision import average_precision
from clipcid_cli.algorithms.metrics.intervals import draw_average_precision, draw_cells, interval, mean_recall, ratio
from clipcid_cli.algorithms.metrics.retrieval import RECALL_AT, retrieval_ranks
from clipcid_cli.algorithms.metrics.zeroshot import (
    ACCURACY_TOP_K,
    class_weights,
    classification_metrics,
    rank_classes,
    top_classes,
)
from clipcid_cli.formats.data.known_datasets import ELEVEN_POINT, MEAN_AVERAGE_PRECISION
from clipcid_cli.formats.results import predictions as predictions_file
from clipcid_cli.formats.results.predictions import Predictions, make_predictions
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.steps.evaluate.encode import EncodedBatch, encode_classes, encode_task
from clipcid_cli.steps.evaluate.tasks import CLASSIFICATION, ZeroshotTask
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

_NUM_EXAMPLES = 6
_EXAMPLES_A_CLASS = 4
_WORST_CLASSES = 8


@dataclasses.dataclass(frozen=True)
class Found:
    """What the embeddings of one data set say.

    Attributes:
        metrics: Values by name; CLIP_benchmark's names where it has one.
        intervals: For each metric the 95 % interval; empty when none was asked for.
        per_class: For each class ``{class, images, value, confused_with, confused}``; empty for retrieval.
        examples: Images for the report: ``{key, label, predicted, path, offset, size}``.
        predictions: What was said of each image; None when nobody asked.
        texts: Prompts or captions used.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_class: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    predictions: Predictions | None
    texts: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of one model on one data set.

    Attributes:
        found: The metrics and what is behind them.
        skips: Samples that could not be used.
        seconds: Time by phase: ``classes``, ``encode``, ``compare``.
    """

    found: Found
    images: int
    skips: Skips
    seconds: dict[str, float]


def measure(
    model: ClipModel,
    task: ZeroshotTask,
    machine: Machine,
    precision: Precision,
    batch_size: int,
    settings: EvalZeroshotSettings,
    reporter: Reporter,
) -> Measured:
    """Measure a model on a data set with all processes.

    Raises:
        ClipcidError: when no sample, or too few, can be used.
    """
    started = time.perf_counter()
    weights = None
    if task.task == CLASSIFICATION:
        weights = class_weights(encode_classes(model, task, machine, precision, batch_size))
    with_classes = time.perf_counter()
    with reporter.progress(f"{model.info.slug} on {task.name}", None, "images") as progress:
        batches, skips = encode_task(
            model,
            task,
            machine,
            precision,
            batch_size=batch_size,
            workers=settings.workers,
            max_bad_fraction=settings.max_bad_fraction,
            progress=progress,
        )
    encoded = time.perf_counter()
    if skips.total:
        reporter.warn(f"{task.name}: {skips.total} samples were skipped.\n{skips.describe()}")
    run = _Run(model.info.slug, task, batches, settings.predictions, settings.bootstrap, settings.seed)
    if weights is None:
        found = _retrieve(run, machine, reporter)
    elif task.multi_label:
        found = _rank_images(run, weights)
    else:
        found = _classify(run, weights, reporter)
    seconds = {
        "classes": with_classes - started,
        "encode": encoded - with_classes,
        "compare": time.perf_counter() - encoded,
    }
    return Measured(found, sum(len(batch.keys) for batch in batches), skips, seconds)


@dataclasses.dataclass(frozen=True)
class _Run:
    """The embeddings of one data set, whether to keep what is said of each image, and how often to draw it anew."""

    model: str
    task: ZeroshotTask
    batches: list[EncodedBatch]
    keep: bool
    replicates: int
    seed: int

    @property
    def keys(self) -> list[str]:
        return [key for batch in self.batches for key in batch.keys]

    @property
    def labels(self) -> torch.Tensor:
        return torch.cat([batch.labels for batch in self.batches if batch.labels is not None])

    def predictions(self, kind: str, columns: dict[str, Any]) -> Predictions:
        classes = len(self.task.class_names)
        return make_predictions(kind, self.model, self.task.name, classes, {"key": self.keys} | columns)

    def example(self, row: int, label: int, predicted: int) -> dict[str, Any]:
        """Describe one image for the report, by its place among all."""
        for batch in self.batches:
            if row < len(batch.keys):
                break
            row -= len(batch.keys)
        names = self.task.class_names
        return {
            "key": batch.keys[row],
            "label": names[label],
            "predicted": names[predicted],
            **dataclasses.asdict(batch.locations[row]),
        }


def _classify(run: _Run, weights: torch.Tensor, reporter: Reporter) -> Found:
    task, labels = run.task, run.labels
    num_classes = len(weights)
    ranked = [rank_classes(batch.images, weights, batch.labels) for batch in run.batches if batch.labels is not None]
    predictions, ranks = (torch.cat(parts) for parts in zip(*ranked, strict=True))
    if num_classes < ACCURACY_TOP_K:
        reporter.note(f"{task.name}: acc5 is null, since there are only {num_classes} classes.")
    absent = num_classes - len(torch.unique(labels))
    if absent:
        reporter.note(
            f"{task.name}: {absent} of {num_classes} classes have no image; the mean over classes leaves them out."
        )
    intervals = {}
    if run.replicates:
        values = torch.stack([labels, ranks == 0, ranks < ACCURACY_TOP_K], dim=1).numpy()
        cells, draws = draw_cells(values, run.replicates, run.seed)
        intervals["acc1"] = interval(ratio(draws, cells[:, 1]))
        if num_classes >= ACCURACY_TOP_K:
            intervals["acc5"] = interval(ratio(draws, cells[:, 2]))
        intervals["mean_per_class_recall"] = interval(mean_recall(draws, cells[:, 0], cells[:, 1]))
    kept = None
    if run.keep:
        pairs = [top_classes(batch.images, weights) for batch in run.batches]
        scores, top = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        columns = {"label": labels.numpy(), "predicted": predictions.numpy(), "top": top.tolist()}
        kept = run.predictions(predictions_file.CLASSIFICATION, columns | {"scores": scores.tolist()})
    return Found(
        classification_metrics(predictions, ranks, labels, num_classes),
        intervals,
        _count_classes(task, labels.numpy(), predictions.numpy()),
        _choose_examples(run, labels.numpy(), predictions.numpy()),
        kept,
        num_classes * len(task.templates),
    )


def _count_classes(
    task: ZeroshotTask, labels: np.ndarray[Any, Any], predicted: np.ndarray[Any, Any]
) -> list[dict[str, Any]]:
    """Say of each class how many images it has, which share is right, and with what class it is most often confused."""
    rows = []
    for number, name in enumerate(task.class_names):
        said = np.bincount(predicted[labels == number], minlength=len(task.class_names))
        images, right = int(said.sum()), int(said[number])
        said[number] = 0
        other = int(said.argmax())
        rows.append(
            {
                "class": name,
                "images": images,
                "value": right / images if images else None,
                "confused_with": task.class_names[other] if said[other] else None,
                "confused": int(said[other]),
            }
        )
    return rows


def _choose_examples(run: _Run, labels: np.ndarray[Any, Any], predicted: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """Take the first images that are right, and the first wrong ones of each of the worst classes."""
    right = labels == predicted
    images, found = np.bincount(labels), np.bincount(labels[right], minlength=labels.max() + 1)
    recall = np.where(images > 0, found / np.maximum(images, 1), np.inf)
    worst = [number for number in np.argsort(recall, kind="stable")[:_WORST_CLASSES] if recall[number] < 1]
    rows = list(np.flatnonzero(right)[:_NUM_EXAMPLES])
    for number in worst:
        rows += list(np.flatnonzero(~right & (labels == number))[:_EXAMPLES_A_CLASS])
    return [run.example(int(row), int(labels[row]), int(predicted[row])) for row in rows]


def _rank_images(run: _Run, weights: torch.Tensor) -> Found:
    """Average precision where an image may have several classes."""
    task, positive = run.task, run.labels
    scores = torch.cat([batch.images @ weights.T for batch in run.batches])
    precision = average_precision(scores, positive)
    intervals = {}
    if run.replicates:
        areas, points = draw_average_precision(scores.numpy(), positive.numpy(), run.replicates, run.seed)
        intervals = {MEAN_AVERAGE_PRECISION: interval(areas), ELEVEN_POINT: interval(points)}
    kept = None
    if run.keep:
        ordered, top = scores.sort(dim=1, descending=True, stable=True)
        columns = {
            "labels": [row.nonzero().squeeze(1).tolist() for row in positive],
            "predicted": top[:, 0].numpy(),
            "top": top[:, :ACCURACY_TOP_K].tolist(),
            "scores": ordered[:, :ACCURACY_TOP_K].tolist(),
            "class_scores": scores.tolist(),
        }
        kept = run.predictions(predictions_file.MULTI_LABEL, columns)
    values = precision.area_C.tolist()
    return Found(
        {MEAN_AVERAGE_PRECISION: precision.mean_area, ELEVEN_POINT: precision.mean_eleven_point},
        intervals,
        [
            {
                "class": name,
                "images": int(positive[:, number].sum()),
                "value": None if np.isnan(values[number]) else values[number],
                "confused_with": None,
                "confused": 0,
            }
            for number, name in enumerate(task.class_names)
        ],
        [],
        kept,
        len(weights) * len(task.templates),
    )


def _retrieve(run: _Run, machine: Machine, reporter: Reporter) -> Found:
    task, batches = run.task, run.batches
    images = torch.cat([batch.images for batch in batches]).to(machine.device)
    texts = torch.cat([batch.texts for batch in batches if batch.texts is not None]).to(machine.device)
    captions = torch.tensor([number for batch in batches for number in batch.captions_per_image])
    image_of_text = torch.repeat_interleave(torch.arange(len(images)), captions)
    smallest = min(len(images), len(texts))
    if smallest <= max(RECALL_AT):
        reporter.note(
            f"{task.name}: with {len(images)} images and {len(texts)} captions, recall at {smallest} or more says little."
        )
    image_ranks, text_ranks = (
        ranks.cpu() for ranks in retrieval_ranks(images, texts, image_of_text.to(machine.device))
    )
    metrics = {f"image_retrieval_recall@{k}": float((image_ranks < k).double().mean()) for k in RECALL_AT}
    metrics |= {f"text_retrieval_recall@{k}": float((text_ranks < k).double().mean()) for k in RECALL_AT}
    kept = None
    if run.keep:
        columns = {
            "image_ranks": [part.tolist() for part in torch.split(image_ranks, captions.tolist())],
            "text_rank": text_ranks.numpy(),
        }
        kept = run.predictions(predictions_file.RETRIEVAL, columns)
    return Found(
        metrics,
        retrieval_intervals(image_ranks, text_ranks, captions, run.replicates, run.seed) if run.replicates else {},
        [],
        [],
        kept,
        len(texts),
    )


def retrieval_intervals(
    image_ranks: torch.Tensor, text_ranks: torch.Tensor, captions: torch.Tensor, replicates: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Intervals of both directions: images are drawn, each with all its captions, which stand and fall together."""
    cells, draws = draw_cells(retrieval_values(image_ranks, text_ranks, captions), replicates, seed)
    count = len(RECALL_AT)
    found = {
        f"image_retrieval_recall@{k}": interval(ratio(draws, cells[:, 1 + place], cells[:, 0]))
        for place, k in enumerate(RECALL_AT)
    }
    return found | {
        f"text_retrieval_recall@{k}": interval(ratio(draws, cells[:, 1 + count + place]))
        for place, k in enumerate(RECALL_AT)
    }


def retrieval_values(
    image_ranks: torch.Tensor, text_ranks: torch.Tensor, captions: torch.Tensor
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Sum up each image: its captions, how many of them find it at each k, and whether it finds one: int64 [N, 7]."""
    owner = torch.repeat_interleave(torch.arange(len(captions)), captions)
    found = [
        torch.zeros(len(captions), dtype=torch.int64).index_add_(0, owner, (image_ranks < k).long()) for k in RECALL_AT
    ]
    return torch.stack([captions, *found, *((text_ranks < k).long() for k in RECALL_AT)], dim=1).numpy()
