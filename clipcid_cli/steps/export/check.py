"""How close an export is to the original model (rows, zero-shot predictions, size, speed), and how close it must be."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from clipcid_cli.algorithms.metrics.classification import class_weights
from clipcid_cli.algorithms.metrics.parity import RowDifference, compare_rows
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.sidecar import Parity, PredictionParity, RowParity
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.towers import DenseImageTower, Encode, ImageTower, TextTower
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.encode import Encoder
from clipcid_cli.steps.export.inputs import NUM_COMPARED_ROWS, CheckInputs
from clipcid_cli.steps.settings.export import ExportSettings

Batch = TypeVar("Batch")

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


@dataclasses.dataclass(frozen=True)
class Towers(Encoder):
    """The towers of the original or of an export, and where wanted `dense`: uint8 [B, H, W, 3] to patches [B, h, w, D]."""

    dense: Encode | None = None


def towers_of(model: ClipModel, *, dense: bool = False) -> Towers:
    """Return open_clip's own passes of the original, or of a form that open_clip loads."""
    inference = torch.inference_mode()
    image, text = ImageTower(model.module), TextTower(model.module)
    patches = DenseImageTower(model.module) if dense else None
    return Towers(
        images=inference(lambda pixels: image(model.normalize(pixels))),
        texts=inference(lambda tokens: text(tokens)),
        tokenizer=model.tokenizer,
        device=model.device,
        batch_size=_TEXT_BATCH,
        dense=None if patches is None else inference(lambda pixels: patches(model.normalize(pixels))[1]),
    )


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a model, the original or an export, makes of the inputs."""

    rows: dict[str, torch.Tensor]  # by output, of the compared samples in batches of each size, one after another
    nearest: torch.Tensor | None  # the most similar candidate of each image, int64 [N], where there are candidates
    images_per_second: float  # of the image encoder, from the bytes of cropped images, by the median batch


def evaluate(towers: Towers, inputs: CheckInputs) -> Outputs:
    """Run a model on the inputs."""
    pixels = inputs.compared_pixels
    compared = {
        "image": (towers.images, pixels),
        "text": (towers.texts, inputs.tokens),
        "dense": (towers.dense, pixels),
    }
    rows = {
        output: torch.cat([encode(batch) for size in BATCH_SIZES for batch in torch.split(samples, size)])
        for output, (encode, samples) in compared.items()
        if encode is not None
    }
    embedded, images_per_second = run_timed(towers.images, torch.split(inputs.pixels, _IMAGE_BATCH))
    nearest = None
    if inputs.candidates is not None:
        weights = class_weights(towers.encode_prompts(inputs.candidates.prompts))
        nearest = (embedded @ weights.T).argmax(dim=1)
    return Outputs(rows, nearest, images_per_second)


def run_timed(compute: Callable[[Batch], torch.Tensor], batches: Iterable[Batch]) -> tuple[torch.Tensor, float]:
    """Compute rows of images, batch after batch, and tell the images per second of the median batch."""
    rows, seconds = list[torch.Tensor](), list[float]()
    for batch in batches:
        trial = time_trial(partial(compute, batch), warm_up=int(not rows))  # the first also pays for buffers
        rows.append(trial.result)
        seconds.append(trial.seconds / len(trial.result))
    return torch.cat(rows), round(1 / statistics.median(seconds), 2)


class Checker:
    """Compares exports with the original model, in fp32 on the CPU."""

    def __init__(self, model: ClipModel, inputs: CheckInputs, settings: ExportSettings) -> None:
        self.model = model
        self.inputs = inputs
        self.settings = settings
        self.original = towers_of(model, dense=settings.dense)

    @cached_property
    def expected(self) -> Outputs:
        """What the original makes of the inputs."""
        return evaluate(self.original, self.inputs)

    def check(self, name: str, kind: str, towers: Towers, files: Sequence[Path], *, gated: bool = False) -> Parity:
        """Compare an export with the model: its entry in `parity.json`; one that is over a limit is an error.

        Args:
            kind: Number format of its weights, `files`, which determines the limits.
            gated: Whether a loss of accuracy over the limit is an error.
        """
        found = evaluate(towers, self.inputs)
        rows = {output: self._compare_rows(name, output, found.rows[output]) for output in found.rows}
        parity = Parity(
            precision=kind,
            image=rows["image"],
            text=rows["text"],
            dense=rows.get("dense"),
            bytes=sum(path.stat().st_size for path in files),
            images_per_second=found.images_per_second,
            zeroshot=self.compare_predictions(found.nearest, gated=gated),
        )
        self.validate(name, parity)
        return parity

    def _compare_rows(self, name: str, output: str, theirs: torch.Tensor) -> RowParity:
        ours = self.expected.rows[output]
        if ours.shape != theirs.shape:
            raise ClipcidError(f"{name}: {_OUTPUTS[output]} makes {[*theirs.shape[1:]]}, PyTorch {[*ours.shape[1:]]}.")
        # Rows are of unit length, patches of a length that varies with the model.
        longest = ours.norm(dim=-1).amax()
        return RowParity(
            batch_sizes=BATCH_SIZES,
            samples=NUM_COMPARED_ROWS,
            **compare_rows(*((rows / longest).flatten(0, -2) for rows in (ours, theirs)))._asdict(),
            shape=None if ours.ndim == 2 else ["batch", *ours.shape[1:]],
        )

    def compare_predictions(self, nearest: torch.Tensor | None, *, gated: bool) -> PredictionParity | None:
        """Compare an export's predictions, as in `Outputs`, with the model's; None where there are no candidates."""
        candidates, expected = self.inputs.candidates, self.expected.nearest
        if candidates is None or nearest is None or expected is None:
            return None
        value, before = (float((side == candidates.labels).double().mean()) for side in (nearest, expected))
        return PredictionParity(
            measure=candidates.measure,
            images=len(nearest),
            candidates=len(candidates.prompts),
            agreement=float((nearest == expected).double().mean()),
            value=value,
            pytorch=before,
            drop=before - value,
            gated=gated,
        )

    def validate(self, name: str, found: Parity) -> None:
        """Raise when an export's entry in `parity.json`, of this run or an earlier one, is over a limit of this run."""
        kind, spec = found.precision, self.model.info.spec
        limit = self.limit(kind)
        for output, words in _OUTPUTS.items():
            rows: RowParity | None = getattr(found, output)
            if rows is None or (rows.max_difference <= limit.max_difference and rows.min_cosine >= limit.min_cosine):
                continue
            allowed = f" (allowed {limit.max_difference:.0e})" if math.isfinite(limit.max_difference) else ""
            raise ClipcidError(
                f"{name}: {words} differs from {spec} by up to {rows.max_difference:.2e}{allowed}, cosine down to "
                f"{rows.min_cosine:.7f} (allowed {limit.min_cosine}). Nothing was written.",
                "Omit this number format, or allow more with --max-difference."
                if kind != "fp32"
                else "Allow more with --max-difference, or check the model: its values may overflow.",
            )
        cosine = found.max_cosine_difference
        if cosine is not None and not cosine <= _COSINE_LIMITS[kind]:  # nor when it is no number
            raise ClipcidError(
                f"{name}: a cosine of image and class differs by {cosine:.2e} from {spec} (allowed "
                f"{_COSINE_LIMITS[kind]:.0e}). Nothing was written.",
                "Omit --classnames." if kind == "fp32" else f"Omit --quantize {kind}.",
            )
        zeroshot, max_drop = found.zeroshot, self.settings.max_accuracy_drop
        if zeroshot is not None and zeroshot.gated and zeroshot.drop > max_drop:
            raise ClipcidError(
                f"{name}: {zeroshot.measure} falls from {zeroshot.pytorch:.4f} to {zeroshot.value:.4f} on "
                f"{zeroshot.images:,} images, by {100 * zeroshot.drop:.2f} points (allowed {100 * max_drop:.2f}). "
                "Nothing was written.",
                "Omit this number format from --quantize, or allow more with --max-accuracy-drop.",
            )

    def limit(self, kind: str) -> RowDifference:
        """Return the largest difference allowed for a number format; ``--max-difference`` is of all but int8."""
        asked = self.settings.max_difference
        return LIMITS[kind] if asked is None or kind == "int8" else LIMITS[kind]._replace(max_difference=asked)

    def describe(self) -> dict[str, Any]:
        """Return the reference and the limits, for `parity.json`."""
        info = self.model.info
        allowed: dict[str, Any] = {kind: self.limit(kind)._asdict() for kind in LIMITS}
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
                "inputs": self.inputs.source,
                "images": len(self.inputs.pixels),
            },
            "allowed": allowed | {"max_accuracy_drop": self.settings.max_accuracy_drop},
        }
