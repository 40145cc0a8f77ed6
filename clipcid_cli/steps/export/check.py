"""An export's check: it and the original are evaluated on the same inputs, and compared by rows, answers, size and speed."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from clipcid_cli.algorithms.metrics.classification import class_weights
from clipcid_cli.algorithms.metrics.intervals import Array
from clipcid_cli.algorithms.metrics.parity import compare_rows
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.models.export_sidecar import Latency, Parity, PredictionParity, RowParity
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.tower_modules import DenseImageTower
from clipcid_cli.runtime.models.towers import Towers
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps import reporting
from clipcid_cli.steps.encode import Encoded
from clipcid_cli.steps.evaluate.measure import TaskResult, measure
from clipcid_cli.steps.evaluate.model import TaskRows
from clipcid_cli.steps.export.inputs import COMPARED_ROWS, CheckInputs
from clipcid_cli.steps.export.limits import LIMITS, OUTPUTS, find_limit, validate_parity
from clipcid_cli.steps.settings.export import ExportSettings

Batch = TypeVar("Batch")

# One sample, two, an odd number, and more than a vector register holds.
_BATCH_SIZES = (1, 2, 5, COMPARED_ROWS)
_IMAGE_BATCH, _TEXT_BATCH = 32, 64
# Images that are timed one by one; in int8 all are.
_TIMED_SINGLY = 32

_FP32 = Precision("fp32", "exports are compared in full precision")


def open_towers(model: ClipModel, *, dense: bool = False) -> Towers:
    """Return the towers of the original, or of a form that open_clip loads, as they are evaluated."""
    towers = Towers.from_model(model, _FP32, _TEXT_BATCH)
    if not dense:
        return towers
    patches = DenseImageTower(model.module)
    encode_patches = torch.inference_mode()(lambda pixels: patches(model.normalize(pixels))[1])
    return dataclasses.replace(towers, dense=encode_patches)


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a model, the original or an export, makes of the inputs."""

    rows: dict[str, torch.Tensor]  # by output, of COMPARED_ROWS samples in batches of each size, one after another
    images: torch.Tensor  # rows of all images, in batches
    alone: torch.Tensor  # rows of the first images, or of all, computed one by one
    answers: TaskResult | None  # which class or caption is the most similar to each image, where there is a task
    images_per_second: float  # of the image encoder, from the bytes of cropped images, by the median batch
    latency: Latency  # of the same, from one image

    @property
    def predicted(self) -> Array | None:
        """The class or caption that is the most similar to each image, int64 [N]; None where there is no task."""
        return None if self.answers is None else self.answers.predicted


def evaluate(towers: Towers, inputs: CheckInputs, alone: int = _TIMED_SINGLY) -> Outputs:
    """Run a model on the inputs, and on so many of the images one by one."""
    pixels = inputs.compared_pixels
    compared = {
        "image": (towers.images, pixels),
        "text": (towers.texts, inputs.tokens),
        "dense": (towers.dense, pixels),
    }
    rows = {
        output: torch.cat([encode(batch) for size in _BATCH_SIZES for batch in torch.split(samples, size)])
        for output, (encode, samples) in compared.items()
        if encode is not None
    }
    images, seconds = run_timed(towers.images, torch.split(inputs.pixels, _IMAGE_BATCH))
    single_images, seconds_of_one = run_timed(towers.images, torch.split(inputs.pixels[:alone], 1))
    answers = _answer(towers, inputs, images)
    return Outputs(rows, images, single_images, answers, rate_of(seconds), latency_of(seconds_of_one))


def _answer(towers: Towers, inputs: CheckInputs, images: torch.Tensor) -> TaskResult | None:
    """Measure the rows of all images as `eval-zeroshot` does; None where there is no task."""
    if inputs.task is None:
        return None
    weights = class_weights(towers.encode_prompts(inputs.prompts))
    encoded = Encoded(inputs.samples, {Kind.IMAGES: images})
    with reporting.reporting_to(reporting.Reporter()):  # what it says would be said of each form
        return measure(TaskRows(inputs.task, encoded, weights, inputs.skips, {}), towers.device)


def run_timed(compute: Callable[[Batch], torch.Tensor], batches: Iterable[Batch]) -> tuple[torch.Tensor, list[float]]:
    """Compute rows of images, batch after batch, and tell the seconds an image of each batch."""
    rows, seconds = list[torch.Tensor](), list[float]()
    for batch in batches:
        trial = time_trial(partial(compute, batch), warm_up=int(not rows))  # the first also pays for buffers
        rows.append(trial.result)
        seconds.append(trial.seconds / len(trial.result))
    return torch.cat(rows), seconds


def rate_of(seconds: Sequence[float]) -> float:
    """Return the images per second of the median batch."""
    return round(1 / statistics.median(seconds), 2)


def latency_of(seconds: Sequence[float]) -> Latency:
    """Return the latency of images that were computed one by one."""
    median, slow = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64))
    return Latency(round(1000 * float(median), 2), round(1000 * float(slow), 2))


class Checker:
    """Compares exports with the original model, in fp32 on the CPU."""

    def __init__(self, model: ClipModel, inputs: CheckInputs, settings: ExportSettings) -> None:
        self.model = model
        self.inputs = inputs
        self.settings = settings
        self.original = open_towers(model, dense=settings.dense)

    @cached_property
    def expected(self) -> Outputs:
        return evaluate(self.original, self.inputs)

    def check(self, name: str, kind: str, towers: Towers, files: Sequence[Path], *, gated: bool = False) -> Parity:
        """Compare an export with the model: its entry in `parity.json`; one that is over a limit is an error.

        Args:
            kind: Number format of its weights, `files`: it determines the limits.
            gated: Whether a loss of accuracy over the limit is an error.
        """
        # In int8 a row depends on the rest of its batch, and many users have batches of one.
        alone = len(self.inputs.pixels) if kind == "int8" else _TIMED_SINGLY
        outputs = evaluate(towers, self.inputs, alone)
        rows = {output: self._compare_rows(name, output, outputs) for output in outputs.rows}
        predicted = outputs.predicted
        parity = Parity(
            precision=kind,
            image=rows["image"],
            text=rows["text"],
            dense=rows.get("dense"),
            bytes=sum(path.stat().st_size for path in files),
            images_per_second=outputs.images_per_second,
            latency_ms=outputs.latency,
            zeroshot=None if predicted is None else self.compare_answers(predicted, gated=gated),
        )
        validate_parity(name, parity, self.model.info.spec, self.settings)
        return parity

    def _compare_rows(self, name: str, output: str, outputs: Outputs) -> RowParity:
        """Compare an output's rows of the compared samples; of the image encoder also its rows of all images."""
        ours, theirs = self.expected.rows[output], outputs.rows[output]
        if ours.shape != theirs.shape:
            raise ClipcidError(f"{name}: {OUTPUTS[output]} makes {[*theirs.shape[1:]]}, PyTorch {[*ours.shape[1:]]}.")
        samples = COMPARED_ROWS
        batch_sizes: tuple[int, ...] = _BATCH_SIZES
        if output == "image":
            images = self.expected.images
            ours = torch.cat([ours, images, images[: len(outputs.alone)]])
            theirs = torch.cat([theirs, outputs.images, outputs.alone])
            samples = len(images)
            batch_sizes = (*_BATCH_SIZES, _IMAGE_BATCH)
        # Rows are of unit length, patches of a length that varies with the model.
        longest = ours.norm(dim=-1).amax()
        return RowParity(
            batch_sizes=batch_sizes,
            samples=samples,
            **compare_rows(*((rows / longest).flatten(0, -2) for rows in (ours, theirs)))._asdict(),
            shape=None if ours.ndim == 2 else ["batch", *ours.shape[1:]],
        )

    def compare_answers(self, predicted: Array, *, gated: bool) -> PredictionParity:
        """Compare the class or caption that an export finds for each image, int64 [N], with the model's; there is a task."""
        expected = self.expected.predicted
        assert expected is not None
        value, before = (float((side == self.inputs.labels).mean()) for side in (predicted, expected))
        return PredictionParity(
            measure=self.inputs.measure,
            images=len(predicted),
            candidates=len(self.inputs.prompts),
            agreement=float((predicted == expected).mean()),
            value=value,
            pytorch=before,
            drop=before - value,
            gated=gated,
        )

    def warn_near_chance(self) -> None:
        """Say where the original answers so little better than a guess that no loss by quantization could be seen."""
        answers = self.expected.answers if self.settings.quantize else None
        if answers is None or answers.majority is None:
            return
        images = len(self.inputs.samples)
        right = answers.draws.values()["acc1"]
        guess = answers.majority
        chance = guess + 2 * math.sqrt(guess * (1 - guess) / images)  # two standard deviations
        if right - self.settings.max_accuracy_drop <= chance:
            reporting.warn(
                f"The check of quantized files can hardly fail here: {self.inputs.measure} of the model itself is "
                f"{right:.1%} on {images:,} images, and a guess would reach {guess:.1%}. Compare on images that the "
                "model knows (--data), or lower --max-accuracy-drop."
            )

    def describe(self) -> dict[str, Any]:
        """Return the reference and the limits, for `parity.json`."""
        info = self.model.info
        allowed: dict[str, Any] = {kind: find_limit(kind, self.settings)._asdict() for kind in LIMITS}
        allowed["int8"]["max_difference"] = None  # JSON has no infinity
        return {
            "reference": {
                "model": info.spec,
                "weights_hash": info.weights_hash,
                "engine": f"PyTorch {torch.__version__}",
                "precision": "fp32",
                "threads": torch.get_num_threads(),
                "bytes": sum(tensor.nbytes for tensor in self.model.module.state_dict().values()),
                "images_per_second": self.expected.images_per_second,
                "latency_ms": msgspec.to_builtins(self.expected.latency),
                "inputs": self.inputs.source,
                "images": len(self.inputs.pixels),
            },
            "allowed": allowed | {"max_accuracy_drop": self.settings.max_accuracy_drop},
        }
