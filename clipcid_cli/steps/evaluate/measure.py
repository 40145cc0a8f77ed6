"""From a model and a data set to metrics: what `eval-zeroshot` does for each pair."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from clipcid_cli.algorithms.metrics.classification import class_weights
from clipcid_cli.formats.skips import Skips
from clipcid_cli.steps.evaluate.calibration import calibrate
from clipcid_cli.steps.evaluate.classification import measure_classification, measure_multi_label
from clipcid_cli.steps.evaluate.encode import TaskEncoder, warn_of_skips
from clipcid_cli.steps.evaluate.retrieval import measure_retrieval
from clipcid_cli.steps.evaluate.task_result import TaskEmbeddings, TaskResult
from clipcid_cli.steps.evaluate.tasks import CLASSIFICATION, ZeroshotTask
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured of one model on one data set.

    Attributes:
        images: Number of images used.
        skips: Samples that could not be used.
        seconds: Time by phase: ``classes``, ``encode``, ``compare``.
        calibration: As `calibrate` returns it; None where an image has no class or several, or when not asked for.
    """

    result: TaskResult
    images: int
    skips: Skips
    seconds: dict[str, float]
    calibration: dict[str, Any] | None


def measure(
    encoder: TaskEncoder, task: ZeroshotTask, settings: EvalZeroshotSettings, *, with_calibration: bool = False
) -> Measurement:
    """Measure a model on a data set with all processes.

    Args:
        settings: Whether to keep predictions, and how to draw intervals.
    """
    started = time.perf_counter()
    weights = class_weights(encoder.encode_classes(task)) if task.task == CLASSIFICATION else None
    with_classes = time.perf_counter()
    batches, skips = encoder.encode(task)
    encoded = time.perf_counter()
    reporter = encoder.reporter
    warn_of_skips(task, skips, reporter)
    embeddings = TaskEmbeddings(
        encoder.model.info.slug, task, batches, settings.predictions, settings.bootstrap, settings.seed
    )
    calibration = None
    if weights is None:
        result = measure_retrieval(embeddings, encoder.machine.device, reporter)
    elif task.multi_label:
        result = measure_multi_label(embeddings, weights)
    else:
        result = measure_classification(embeddings, weights, reporter)
        if with_calibration:
            calibration = calibrate(batches, weights, encoder.model.logit_scale)
    seconds = {
        "classes": with_classes - started,
        "encode": encoded - with_classes,
        "compare": time.perf_counter() - encoded,
    }
    return Measurement(result, len(embeddings.keys), skips, seconds, calibration)
