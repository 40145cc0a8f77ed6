"""How close an export is to the original model (rows, zero-shot predictions, size, speed), and how close it must be."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from clipcid_cli.algorithms.metrics.classification import class_weights
from clipcid_cli.algorithms.metrics.parity import RowDifference, compare_rows
from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.preprocess import normalize_pixels
from clipcid_cli.runtime.models.towers import DenseImageTower, Encode, ImageTower, TextTower
from clipcid_cli.runtime.timing import Trial, time_trial
from clipcid_cli.steps.export.check_inputs import NUM_COMPARED_ROWS, CheckInputs
from clipcid_cli.steps.settings.export import ExportSettings

# One sample, two, an odd number, and more than a vector register holds.
BATCH_SIZES = (1, 2, 5, NUM_COMPARED_ROWS)
_IMAGE_BATCH, _TEXT_BATCH = 32, 64

# Largest differences allowed on unit rows. fp32: the order of summation. fp16, bf16: weights rounded to 11 or 8 bits in
# every layer. int8: only what is broken; its limit is the measured loss of accuracy.
LIMITS = {
    "fp32": RowDifference(max_difference=1e-4, min_cosine=0.99999),
    "fp16": RowDifference(max_difference=5e-3, min_cosine=0.9999),
    "bf16": RowDifference(max_difference=2e-2, min_cosine=0.999),
    "int8": RowDifference(max_difference=math.inf, min_cosine=0.9),
}
# Largest difference allowed of a classifier's cosine of image and class. fp32: about one byte in 10,000 is resized to a
# neighbouring value. int8 is judged by its predictions.
_COSINE_LIMITS = {"fp32": 1e-3, "fp16": 5e-3, "int8": math.inf}

# Outputs that are compared row by row, by their names in `parity.json`.
_OUTPUTS = {"image": "the image encoder", "text": "the text encoder", "dense": "the grid of patches"}


class Checker:
    """Compares exports with the original model, in fp32 on the CPU.

    Attributes:
        tokens: Of the texts whose rows are compared, int64 [NUM_COMPARED_ROWS, L].
        pixels: Of the images whose rows are compared, float32 [NUM_COMPARED_ROWS, 3, H, W]; fewer images are repeated.
        references: The original model's ``image`` and ``text`` tower, and ``dense`` where patches are compared.
    """

    def __init__(self, model: ClipModel, inputs: CheckInputs, settings: ExportSettings) -> None:
        self.model, self.inputs, self.settings = model, inputs, settings
        self.tokens = model.tokenizer(inputs.texts)
        self.pixels = self._prepare(torch.arange(NUM_COMPARED_ROWS) % len(inputs.images))
        self.references: dict[str, Encode] = {"image": ImageTower(model.module), "text": TextTower(model.module)}
        if settings.dense:
            tower = DenseImageTower(model.module).eval()
            self.references["dense"] = lambda pixels: tower(pixels)[1]

    def _prepare(self, places: torch.Tensor | slice) -> torch.Tensor:
        """Return some images as the image tower takes them, float32 [B, 3, H, W]."""
        return normalize_pixels(self.inputs.images[places], self.model.info.preprocess)

    @cached_property
    def expected(self) -> Trial[torch.Tensor | None]:
        """The original model's predictions, and the seconds it takes for an image."""
        return self._predict(self.references)

    def limit(self, kind: str) -> RowDifference:
        """Return the largest difference allowed for a number format; ``--max-difference`` is of all but int8."""
        limit = LIMITS[kind]
        if self.settings.max_difference is not None and kind != "int8":
            limit = dataclasses.replace(limit, max_difference=self.settings.max_difference)
        return limit

    def check(
        self, name: str, kind: str, encoders: Mapping[str, Encode], files: Sequence[Path], *, gated: bool = False
    ) -> dict[str, Any]:
        """Compare an export with the model, and raise when a difference is over its limit.

        Args:
            kind: Number format of its weights, which determines the limits.
            encoders: ``image`` and ``text``, and ``dense`` where it gives patches.
            files: Its weights.
            gated: Whether a loss of accuracy over the limit is an error.

        Returns:
            Its entry in `parity.json`.
        """
        predictions = self._predict(encoders)
        found = {
            "precision": kind,
            **{output: self._compare_rows(name, output, encode) for output, encode in encoders.items()},
            "bytes": sum(path.stat().st_size for path in files),
            "images_per_second": round(1 / predictions.seconds, 2),
            "zeroshot": self.compare_predictions(predictions.result, gated=gated),
        }
        self.validate(name, found)
        return found

    def _compare_rows(self, name: str, output: str, encode: Encode) -> dict[str, Any]:
        samples = self.tokens if output == "text" else self.pixels
        difference = RowDifference()
        with torch.inference_mode():
            for batch in (batch for size in BATCH_SIZES for batch in torch.split(samples, size)):
                ours, theirs = self.references[output](batch), encode(batch)
                if ours.shape != theirs.shape:
                    raise ClipcidError(
                        f"{name}: {_OUTPUTS[output]} makes {list(theirs.shape)}, PyTorch {list(ours.shape)}."
                    )
                # Rows are of unit length, patches of a length that varies with the model.
                longest = ours.norm(dim=-1).amax()
                flat = ((rows / longest).flatten(0, -2) for rows in (ours, theirs))
                difference = difference.merge(compare_rows(*flat))
        found = {"batch_sizes": list(BATCH_SIZES), "samples": len(samples), **dataclasses.asdict(difference)}
        return found if ours.ndim == 2 else found | {"shape": ["batch", *ours.shape[1:]]}

    def _predict(self, encoders: Mapping[str, Encode]) -> Trial[torch.Tensor | None]:
        """Embed all images and, where there are candidates, find the most similar one of each.

        Returns:
            The numbers of the candidates, int64 [N], and the median batch's seconds for an image, from prepared pixels.
        """
        rows, seconds = [], []
        with torch.inference_mode():
            encoders["image"](self._prepare(slice(_IMAGE_BATCH)))  # also pays for buffers
            for start in range(0, len(self.inputs.images), _IMAGE_BATCH):
                pixels = self._prepare(slice(start, start + _IMAGE_BATCH))
                trial = time_trial(partial(encoders["image"], pixels), warm_up=0)
                rows.append(trial.result)
                seconds.append(trial.seconds / len(pixels))
        nearest = None
        if self.inputs.candidates is not None:
            weights = self.encode_candidates(self.inputs.candidates.prompts, encoders["text"])
            nearest = (torch.cat(rows) @ weights.T).argmax(dim=1)
        return Trial(statistics.median(seconds), nearest)

    def encode_candidates(self, prompts: Sequence[Sequence[str]], encode: Encode) -> torch.Tensor:
        """Embed T texts of each of C classes or captions: their weights, float32 [C, D], unit rows."""
        texts = [text for texts in prompts for text in texts]
        batches = (texts[start : start + _TEXT_BATCH] for start in range(0, len(texts), _TEXT_BATCH))
        with torch.inference_mode():
            rows = torch.cat([encode(self.model.tokenizer(batch)) for batch in batches])
        return class_weights(rows.float().view(len(prompts), len(prompts[0]), -1))

    def compare_predictions(self, nearest: torch.Tensor | None, *, gated: bool) -> dict[str, Any] | None:
        """Compare an export's predictions with the model's; None where there is nothing to compare.

        Args:
            nearest: The most similar candidate of each image, int64 [N].
            gated: Whether a loss over the limit is an error.
        """
        candidates, expected = self.inputs.candidates, self.expected.result
        if candidates is None or nearest is None or expected is None:
            return None
        value, before = (float((side == candidates.labels).double().mean()) for side in (nearest, expected))
        return {
            "measure": candidates.measure,
            "images": len(nearest),
            "candidates": len(candidates.prompts),
            "agreement": float((nearest == expected).double().mean()),
            "value": value,
            "pytorch": before,
            "drop": before - value,
            "gated": gated,
        }

    def validate(self, name: str, found: Mapping[str, Any]) -> None:
        """Raise when an export's entry in `parity.json`, of this run or an earlier one, is over a limit of this run."""
        kind, spec = found["precision"], self.model.info.spec
        limit = self.limit(kind)
        for output in [name for name in _OUTPUTS if name in found]:
            difference = RowDifference(found[output]["max_difference"], found[output]["min_cosine"])
            if difference.within(limit):
                continue
            allowed = f" (allowed {limit.max_difference:.0e})" if math.isfinite(limit.max_difference) else ""
            raise ClipcidError(
                f"{name}: {_OUTPUTS[output]} differs from {spec} by up to {difference.max_difference:.2e}{allowed}, cosine "
                f"down to {difference.min_cosine:.7f} (allowed {limit.min_cosine}). Nothing was written.",
                "Omit this number format, or allow more with --max-difference."
                if kind != "fp32"
                else "Allow more with --max-difference, or check the model: its values may overflow.",
            )
        cosine = found.get("max_cosine_difference", 0.0)
        if not cosine <= _COSINE_LIMITS.get(kind, 0.0):  # nor when it is no number
            raise ClipcidError(
                f"{name}: a cosine of image and class differs by {cosine:.2e} from {spec} (allowed "
                f"{_COSINE_LIMITS[kind]:.0e}). Nothing was written.",
                "Omit --classnames." if kind == "fp32" else f"Omit --quantize {kind}.",
            )
        zeroshot, max_drop = found["zeroshot"], self.settings.max_accuracy_drop
        if zeroshot is not None and zeroshot["gated"] and zeroshot["drop"] > max_drop:
            raise ClipcidError(
                f"{name}: {zeroshot['measure']} falls from {zeroshot['pytorch']:.4f} to {zeroshot['value']:.4f} on "
                f"{zeroshot['images']:,} images, by {100 * zeroshot['drop']:.2f} points (allowed {100 * max_drop:.2f}). "
                "Nothing was written.",
                "Omit this number format from --quantize, or allow more with --max-accuracy-drop.",
            )
