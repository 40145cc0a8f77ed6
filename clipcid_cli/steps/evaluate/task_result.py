"""What goes into the metrics of one data set, and what comes out."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from clipcid_cli.formats.results.predictions import Predictions, make_predictions
from clipcid_cli.steps.evaluate.encode import EmbeddedBatch
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The metrics of one model on one data set, and what explains them.

    Attributes:
        metrics: Values by name; CLIP_benchmark's names where it has one.
        intervals: For each metric the 95 % interval; empty when none was asked for.
        per_class: For each class ``{class, images, value, confused_with, confused}``; empty for retrieval.
        examples: Images for the report: ``{key, label, predicted, path, offset, size}``.
        predictions: What was predicted for each image; None unless asked for.
        texts: Number of prompts or captions used.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_class: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    predictions: Predictions | None
    texts: int


@dataclasses.dataclass(frozen=True)
class TaskEmbeddings:
    """The embeddings of one data set, and what to compute from them.

    Attributes:
        model: Slug of the model.
        batches: All batches, in order.
        keep_predictions: Whether to keep what was predicted for each image.
        replicates: Bootstrap draws of the images; 0 for no intervals.
        seed: Seed of the draws.
    """

    model: str
    task: ZeroshotTask
    batches: list[EmbeddedBatch]
    keep_predictions: bool
    replicates: int
    seed: int

    @property
    def keys(self) -> list[str]:
        """Key of each image."""
        return [key for batch in self.batches for key in batch.keys]

    @property
    def labels(self) -> torch.Tensor:
        """Classes of the images, int64 [N], or bool [N, C] where an image may have several."""
        return torch.cat([batch.labels for batch in self.batches if batch.labels is not None])

    def make_predictions(self, kind: str, columns: dict[str, Any]) -> Predictions:
        """Put what was predicted for each image into the columns of a predictions file."""
        num_classes = len(self.task.class_names)
        return make_predictions(kind, self.model, self.task.name, num_classes, {"key": self.keys} | columns)

    def make_example(self, row: int, label: int, predicted: int) -> dict[str, Any]:
        """Describe one image for the report.

        Args:
            row: Its place among all images.
            label: Its class.
            predicted: The class predicted for it.
        """
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
