"""How close an export is to the original model: rows, zero-shot predictions, size and speed."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from clipcid_cli.algorithms.metrics.parity import RowDifference, compare_rows
from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.towers import Encode, ImageTower, TextTower
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.export.check_inputs import NUM_COMPARED_ROWS, CheckInputs
from clipcid_cli.steps.export.classes import encode_candidates

# One sample, two, an odd number, and more than a vector register holds.
BATCH_SIZES = (1, 2, 5, NUM_COMPARED_ROWS)
_BATCH = 32

# Largest differences allowed on unit rows. fp32: the order of summation. fp16, bf16: weights rounded to 11 or 8 bits in
# every layer. int8: only what is broken; its limit is the measured loss of accuracy.
LIMITS = {
    "fp32": RowDifference(max_difference=1e-4, min_cosine=0.99999),
    "fp16": RowDifference(max_difference=5e-3, min_cosine=0.9999),
    "bf16": RowDifference(max_difference=2e-2, min_cosine=0.999),
    "int8": RowDifference(max_difference=math.inf, min_cosine=0.9),
}

# Outputs that are compared row by row, by their names in `parity.json`.
_PARTS = {"image": "the image encoder", "text": "the text encoder", "dense": "the patches"}


@dataclasses.dataclass(frozen=True)
class ZeroshotPredictions:
    """What a model predicts for all images.

    Attributes:
        predicted: The most similar candidate of each image, int64 [N]; None where there are no candidates.
        images_per_second: Of the image tower, from prepared pixels, at batches of 32; the median batch's.
    """

    predicted: torch.Tensor | None
    images_per_second: float


class Checker:
    """Compares exports with the original model, in fp32 on the CPU.

    Args:
        model: The model in PyTorch, on the CPU.
        max_difference: Limit of ``--max-difference`` on entries, for all but int8.
        max_drop: Largest loss of accuracy of a quantized variant.
    """

    def __init__(self, model: ClipModel, inputs: CheckInputs, max_difference: float | None, max_drop: float) -> None:
        self.model, self.inputs = model, inputs
        self.max_difference, self.max_drop = max_difference, max_drop
        self.references: dict[str, Encode] = {"image": ImageTower(model.module), "text": TextTower(model.module)}

    @cached_property
    def reference(self) -> ZeroshotPredictions:
        """The original model's predictions."""
        return self.predict(self.references["image"], self.references["text"])

    def limit(self, kind: str) -> RowDifference:
        """Return the largest difference allowed for a number format."""
        limit = LIMITS[kind]
        if self.max_difference is not None and kind != "int8":
            limit = dataclasses.replace(limit, max_difference=self.max_difference)
        return limit

    def check(
        self, name: str, kind: str, towers: Mapping[str, Encode], files: Sequence[Path], *, quantized: bool = False
    ) -> dict[str, Any]:
        """Compare both towers of an export with the model's.

        Args:
            name: Name of the export in `parity.json`, for errors.
            kind: Number format of its weights, which determines the limits.
            towers: ``image`` and ``text``.
            files: Its weights, whose size is reported.
            quantized: Whether a loss of accuracy over the limit is an error.

        Returns:
            ``precision, bytes, images_per_second, zeroshot``, and for each tower ``batch_sizes, samples, max_difference,
            min_cosine``.

        Raises:
            ClipcidError: when a difference or the loss is over its limit; says which, and by how much.
        """
        found: dict[str, Any] = {"precision": kind}
        found |= {tower: self._check_rows(name, kind, tower, encode) for tower, encode in towers.items()}
        predictions = self.predict(towers["image"], towers["text"])
        found["bytes"] = sum(path.stat().st_size for path in files)
        found["images_per_second"] = round(predictions.images_per_second, 2)
        found["zeroshot"] = self.compare_predictions(name, predictions.predicted, gated=quantized)
        return found

    def _check_rows(self, name: str, kind: str, tower: str, encode: Encode) -> dict[str, Any]:
        samples = self.inputs.row_pixels(self.model) if tower == "image" else self.inputs.tokens
        difference = RowDifference()
        with torch.inference_mode():
            for size in BATCH_SIZES:
                for batch in samples.split(size):  # type: ignore[no-untyped-call]  # torch leaves split untyped
                    difference = difference.merge(compare_rows(self.references[tower](batch), encode(batch)))
        self.require_close(f"{name}: {_PARTS[tower]}", kind, difference)
        return {"batch_sizes": list(BATCH_SIZES), "samples": len(samples), **dataclasses.asdict(difference)}

    def require_close(self, what: str, kind: str, difference: RowDifference) -> None:
        """Raise when a difference is over the limit of its number format."""
        limit = self.limit(kind)
        if difference.within(limit):
            return
        allowed = f" (allowed {limit.max_difference:.0e})" if math.isfinite(limit.max_difference) else ""
        raise ClipcidError(
            f"{what} differs from {self.model.info.spec} by up to {difference.max_difference:.2e}{allowed}, cosine down to "
            f"{difference.min_cosine:.7f} (allowed {limit.min_cosine}). Nothing was written.",
            "Omit this number format, or allow more with --max-difference."
            if kind != "fp32"
            else "Allow more with --max-difference, or check the model: its values may overflow.",
        )

    def predict(self, image: Encode, text: Encode) -> ZeroshotPredictions:
        """Embed all images and, where there are candidates, find the most similar one of each."""
        rows, seconds = [], []
        count = len(self.inputs.images)
        with torch.inference_mode():
            image(self.inputs.pixels(self.model, 0, min(_BATCH, count)))  # the first batch also pays for buffers
            for start in range(0, count, _BATCH):
                pixels = self.inputs.pixels(self.model, start, min(start + _BATCH, count))
                trial = time_trial(partial(image, pixels), warm_up=0)
                rows.append(trial.result)
                seconds.append(trial.seconds / len(pixels))
            candidates = self.inputs.candidates
            predicted = None
            if candidates is not None:
                weights = encode_candidates(candidates.prompts, self.model.tokenizer, text)
                predicted = (torch.cat(rows) @ weights.T).argmax(dim=1)
        return ZeroshotPredictions(predicted, 1 / statistics.median(seconds))

    def compare_predictions(self, name: str, predicted: torch.Tensor | None, *, gated: bool) -> dict[str, Any] | None:
        """Compare an export's predictions with the model's.

        Args:
            name: Name of the export in `parity.json`, for the error.
            predicted: The most similar candidate of each image, int64 [N].
            gated: Whether a loss over the limit is an error.

        Returns:
            ``measure, images, candidates, agreement, value, pytorch, drop, gated``; None where there is nothing to compare.
        """
        candidates, reference = self.inputs.candidates, self.reference.predicted
        if candidates is None or predicted is None or reference is None:
            return None
        value, before = (float((side == candidates.labels).double().mean()) for side in (predicted, reference))
        found = {
            "measure": candidates.measure,
            "images": len(predicted),
            "candidates": len(candidates.prompts),
            "agreement": float((predicted == reference).double().mean()),
            "value": value,
            "pytorch": before,
            "drop": before - value,
            "gated": gated,
        }
        self._require_accuracy(name, found)
        return found

    def _require_accuracy(self, name: str, found: Mapping[str, Any]) -> None:
        """Raise when the loss of a gated export, as `compare_predictions` found it, is over the limit."""
        if found["gated"] and found["drop"] > self.max_drop:
            raise ClipcidError(
                f"{name}: {found['measure']} falls from {found['pytorch']:.4f} to {found['value']:.4f} on "
                f"{found['images']:,} images, by {100 * found['drop']:.2f} points (allowed {100 * self.max_drop:.2f}). "
                "Nothing was written.",
                "Omit this number format from --quantize, or allow more with --max-accuracy-drop.",
            )

    def require_limits(self, parity: Mapping[str, Any]) -> None:
        """Apply the limits of this run to what an earlier run measured.

        Args:
            parity: Entry ``parity`` of `parity.json`.

        Raises:
            ClipcidError: when a difference or the loss is over its limit.
        """
        for name, found in parity.items():
            for part, words in _PARTS.items():
                if part in found:
                    difference = RowDifference(found[part]["max_difference"], found[part]["min_cosine"])
                    self.require_close(f"{name}: {words}", found["precision"], difference)
            if found["zeroshot"] is not None:
                self._require_accuracy(name, found["zeroshot"])
