"""How far a written form is from the model it came from: rows, zero-shot answers, size and speed."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from clipcid_cli.algorithms.metrics.parity import Difference, compare_rows
from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.towers import Encode, ImageTower, TextTower
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.export.check_inputs import CLOSE_LOOK, ParityInputs
from clipcid_cli.steps.export.classes import encode_candidates

# One sample, two, an odd number, and more than a vector register holds.
BATCH_SIZES = (1, 2, 5, CLOSE_LOOK)
_BATCH = 32

# Largest differences allowed on unit rows. fp32: the order of summation. fp16, bf16: weights rounded to 11 or 8 bits, felt
# through every layer. int8: only what is broken; the measured drop is its gate.
LIMITS = {
    "fp32": Difference(max_difference=1e-4, min_cosine=0.99999),
    "fp16": Difference(max_difference=5e-3, min_cosine=0.9999),
    "bf16": Difference(max_difference=2e-2, min_cosine=0.999),
    "int8": Difference(max_difference=math.inf, min_cosine=0.9),
}

# What is compared row by row, by its name in `parity.json`.
_PARTS = {"image": "the image encoder", "text": "the text encoder", "dense": "the patches"}


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model says of all images.

    Attributes:
        top: The candidate each image is nearest to, int64 [N]; None where there are none.
        images_per_second: Of the image tower, from prepared pixels, at batches of 32; the median batch's.
    """

    top: torch.Tensor | None
    images_per_second: float


class Checker:
    """Compares written forms with one model, in fp32 on the CPU.

    Args:
        model: The model in PyTorch, on the CPU.
        max_difference: The user's own limit of the difference of entries, for all but int8.
        max_drop: Largest loss of accuracy of a quantised form.
    """

    def __init__(self, model: ClipModel, inputs: ParityInputs, max_difference: float | None, max_drop: float) -> None:
        self.model, self.inputs = model, inputs
        self.max_difference, self.max_drop = max_difference, max_drop
        self.references: dict[str, Encode] = {"image": ImageTower(model.module), "text": TextTower(model.module)}

    @cached_property
    def reference(self) -> Answers:
        """The model's own answers."""
        return self.answer(self.references["image"], self.references["text"])

    def limit(self, kind: str) -> Difference:
        """Return the largest difference allowed for a number format."""
        limit = LIMITS[kind]
        if self.max_difference is not None and kind != "int8":
            limit = dataclasses.replace(limit, max_difference=self.max_difference)
        return limit

    def check(
        self, form: str, kind: str, towers: Mapping[str, Encode], files: Sequence[Path], *, quantized: bool = False
    ) -> dict[str, Any]:
        """Compare both towers of a form with the model's.

        Args:
            form: Name of the form, for errors.
            kind: Number format of its weights, which decides the limits.
            towers: ``image`` and ``text``.
            files: Its weights, whose size is told.
            quantized: Whether a loss of accuracy over the limit is an error.

        Returns:
            ``precision, bytes, images_per_second, zeroshot``, and for each tower ``batch_sizes, samples, max_difference,
            min_cosine``.

        Raises:
            ClipcidError: when a difference or the loss is over its limit; says which, and by how much.
        """
        found: dict[str, Any] = {"precision": kind}
        found |= {tower: self._check_rows(form, kind, tower, encode) for tower, encode in towers.items()}
        answers = self.answer(towers["image"], towers["text"])
        found["bytes"] = sum(path.stat().st_size for path in files)
        found["images_per_second"] = round(answers.images_per_second, 2)
        found["zeroshot"] = self.compare_answers(form, answers.top, gated=quantized)
        return found

    def _check_rows(self, form: str, kind: str, tower: str, encode: Encode) -> dict[str, Any]:
        samples = self.inputs.close_look(self.model) if tower == "image" else self.inputs.tokens
        difference = Difference()
        with torch.inference_mode():
            for size in BATCH_SIZES:
                for batch in samples.split(size):  # type: ignore[no-untyped-call]  # torch leaves split untyped
                    difference = difference.merge(compare_rows(self.references[tower](batch), encode(batch)))
        self.require_close(f"{form}: {_PARTS[tower]}", kind, difference)
        return {"batch_sizes": list(BATCH_SIZES), "samples": len(samples), **dataclasses.asdict(difference)}

    def require_close(self, what: str, kind: str, difference: Difference) -> None:
        """Raise when a difference is over the limit of its number format."""
        limit = self.limit(kind)
        if difference.within(limit):
            return
        allowed = f" (allowed {limit.max_difference:.0e})" if math.isfinite(limit.max_difference) else ""
        raise ClipcidError(
            f"{what} differs from {self.model.info.spec} by up to {difference.max_difference:.2e}{allowed}, cosine down to "
            f"{difference.min_cosine:.7f} (allowed {limit.min_cosine}). Nothing was written.",
            "Leave out this number format, or allow more with --max-difference."
            if kind != "fp32"
            else "Allow more with --max-difference, or check the model: its values may overflow.",
        )

    def answer(self, image: Encode, text: Encode) -> Answers:
        """Show a model all images and, where there are candidates, find the nearest of each."""
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
            top = None
            if candidates is not None:
                weights = encode_candidates(candidates.prompts, self.model.tokenizer, text)
                top = (torch.cat(rows) @ weights.T).argmax(dim=1)
        return Answers(top, 1 / statistics.median(seconds))

    def compare_answers(self, form: str, top: torch.Tensor | None, *, gated: bool) -> dict[str, Any] | None:
        """Compare a form's nearest candidates with the model's.

        Args:
            form: Name of the form, for the error.
            top: Candidate of each image, int64 [N].
            gated: Whether a loss over the limit is an error.

        Returns:
            ``measure, images, candidates, agreement, value, pytorch, drop, gated``; None where there is nothing to compare.
        """
        candidates, reference = self.inputs.candidates, self.reference.top
        if candidates is None or top is None or reference is None:
            return None
        value, before = (float((answer == candidates.labels).double().mean()) for answer in (top, reference))
        found = {
            "measure": candidates.measure,
            "images": len(top),
            "candidates": len(candidates.prompts),
            "agreement": float((top == reference).double().mean()),
            "value": value,
            "pytorch": before,
            "drop": before - value,
            "gated": gated,
        }
        self._require_answers(form, found)
        return found

    def _require_answers(self, form: str, found: Mapping[str, Any]) -> None:
        """Raise when a gated form's loss, as `compare_answers` found it, is over the limit."""
        if found["gated"] and found["drop"] > self.max_drop:
            raise ClipcidError(
                f"{form}: {found['measure']} falls from {found['pytorch']:.4f} to {found['value']:.4f} on "
                f"{found['images']:,} images, by {100 * found['drop']:.2f} points (allowed {100 * self.max_drop:.2f}). "
                "Nothing was written.",
                "Leave this form out of --quantize, or allow more with --max-accuracy-drop.",
            )

    def require_limits(self, parity: Mapping[str, Any]) -> None:
        """Hold what an earlier run found to the limits of this one.

        Args:
            parity: What was found of each form, by its name.

        Raises:
            ClipcidError: when a difference or the loss is over its limit, as if it were found now.
        """
        for form, found in parity.items():
            for part, words in _PARTS.items():
                if part in found:
                    difference = Difference(found[part]["max_difference"], found[part]["min_cosine"])
                    self.require_close(f"{form}: {words}", found["precision"], difference)
            if found["zeroshot"] is not None:
                self._require_answers(form, found["zeroshot"])
