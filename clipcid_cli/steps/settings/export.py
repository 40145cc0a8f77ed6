"""Settings of `export`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.fields import argument, option
from clipcid_cli.steps.settings.shared import SharedSettings

FORMATS = ("open-clip", "hf", "onnx")
QUANTIZED = ("fp16", "int8")
# The newest set that PyTorch 2.13 exports without converting; ONNX Runtime runs it from 1.17 on.
DEFAULT_OPSET = 20
_WRITE = "What is written"
_CLASSES = "Classes, of the classifier and of the check"
_CHECK = "How it is checked"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings(SharedSettings):
    """Settings of `export`."""

    model: str | None = argument(
        None, "Model to export: a folder or architecture:tag. By default the work directory's newest student."
    )
    format: tuple[str, ...] = option(
        ("open-clip",),
        "Form to write; give it several times for several. `open-clip` is a folder that open_clip loads as local-dir:DIR; "
        "`hf` one that transformers loads as CLIPModel and CLIPProcessor; `onnx` an image and a text encoder with a dynamic "
        "batch, and with --classnames a classifier.",
        group=_WRITE,
        choices=FORMATS,
    )
    out: Path | None = option(
        None, "Folder to write to; by default export/<model> in the work directory.", group=_WRITE, operational=True
    )
    opset: int | None = option(
        None, f"Version of ONNX's operators; by default {DEFAULT_OPSET}.", group=_WRITE, minimum=18, maximum=23
    )
    quantize: tuple[str, ...] = option(
        (),
        "Smaller form of each ONNX file to write beside it, as image_encoder_int8.onnx; give it twice for both. `fp16` is "
        "half the size; `int8` a quarter (dynamic quantisation), and needs images with classes or captions to measure what "
        "it costs.",
        group=_WRITE,
        choices=QUANTIZED,
    )
    dense: bool = option(
        False,
        "Give image_encoder.onnx a second output, dense_embeds [N, h, w, D]: each patch after the last block, the final "
        "norm and the projection, not of unit length. For ViTs.",
        group=_WRITE,
    )
    license: str | None = option(
        None, "Licence of the weights, for the model card; by default it says unknown.", group=_WRITE
    )
    classnames: Path | None = option(
        None,
        "File with one class name a line, or a CLIP_benchmark folder that holds classnames.txt. With --format onnx, "
        "classifier.onnx is written: bytes of an image of any size in, one score per class out.",
        group=_CLASSES,
        operational=True,  # as `templates`: the content counts, which is among the inputs
    )
    templates: Path | None = option(
        None,
        "File with one prompt template a line, {c} or {} where the class name goes; by default the folder's own, else `a "
        "photo of a {c}.`",
        group=_CLASSES,
        operational=True,
    )
    data: str | None = option(
        None,
        "Images to check with, best with classes or captions; by default those the work directory's embeddings were made "
        "of, else drawn patterns and shipped sentences.",
        group=_CHECK,
        operational=True,
    )
    check_images: int | None = option(
        None,
        "Largest number of images to check zero-shot answers and speed on; by default 1,000 of --data or for --quantize, "
        "else 64.",
        group=_CHECK,
        minimum=16,
        operational=True,
    )
    max_bad_fraction: float = option(
        0.01,
        "Largest share of the images of --data that cannot be read before the export fails.",
        group=_CHECK,
        minimum=0.0,
        maximum=1.0,
        operational=True,
    )
    max_difference: float | None = option(
        None,
        "Largest allowed difference of an entry of a unit row; by default 0.0001 for fp32, 0.005 for fp16, 0.02 for bf16. "
        "int8 is judged by --max-accuracy-drop.",
        group=_CHECK,
        minimum=0.0,
        operational=True,
    )
    max_accuracy_drop: float = option(
        0.01,
        "Largest allowed loss of a quantised form: of zero-shot accuracy where the images have classes, else of recall@1 "
        "from image to caption.",
        group=_CHECK,
        minimum=0.0,
        maximum=1.0,
        operational=True,
    )

    def __post_init__(self) -> None:
        """Check that what was asked for goes together."""
        super().__post_init__()
        for flag, values in (("--format", self.format), ("--quantize", self.quantize)):
            if len(set(values)) < len(values):
                raise UsageError(f"{flag} was given twice: {', '.join(values)}.", "Name each form once.")
        if "onnx" in self.format and self.precision not in ("auto", "fp32"):
            raise UsageError(
                f"--precision {self.precision} does not go with --format onnx, which is written in fp32.",
                "Use --quantize fp16, or export the two forms by two commands with different --out.",
            )
        about_onnx = {
            "--quantize": bool(self.quantize),
            "--dense": self.dense,
            "--opset": self.opset is not None,
        }
        for flag, given in about_onnx.items():
            if given and "onnx" not in self.format:
                raise UsageError(f"{flag} is about ONNX files, and --format names none.", "Add --format onnx.")
        if self.templates is not None and self.classnames is None:
            raise UsageError("--templates has no class names to go with.", "Give them with --classnames.")

    @property
    def stored_precision(self) -> str:
        """Number format that a folder's weights are stored in."""
        return "fp32" if self.precision == "auto" else self.precision

    @property
    def onnx_opset(self) -> int | None:
        """Version of ONNX's operators; None where no ONNX file is written."""
        return (self.opset or DEFAULT_OPSET) if "onnx" in self.format else None
