"""Settings of `export`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import ClassVar

from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.shared import FRACTION, Range, TrustSettings, argument, group

# In the order in which they are written: onnx completes the tokenizer's file of hf, and web shows the files of onnx.
FORMATS = ("open-clip", "hf", "onnx", "executorch", "web")
QUANTIZED = ("fp16", "int8")
# The newest set that PyTorch 2.13 exports without converting; ONNX Runtime runs it from 1.17 on.
DEFAULT_OPSET = 20

_output = group("Output")
_classes = group("Classes")
_check = group("Verification")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings(TrustSettings):
    """Settings of `export`, which runs on the CPU and draws nothing at random."""

    omitted: ClassVar[tuple[str, ...]] = ("device", "batch_size", "workers", "seed")

    model: str | None = argument(
        None, "Model to export: a folder or architecture:tag. By default, the newest student in the work directory."
    )
    ema: bool = _output(
        False,
        "Export the average of the student's weights that `clipcid distill --ema` kept, instead of the student.",
        operational=True,  # the weights count, which are among the inputs
    )
    format: tuple[str, ...] = _output(
        ("open-clip",),
        "Format to write; may be repeated. `open-clip`: a folder for open_clip (local-dir:DIR). `hf`: a folder for "
        "transformers (AutoModel, AutoProcessor). `onnx`: image and text encoder, also for transformers.js, and with "
        "--classnames a classifier. `web`: the same, and web/, a static folder with a page that classifies pictures in the "
        "browser, and with --search-images one that searches images by text. `executorch`: both encoders for phones.",
        choices=FORMATS,
    )
    out: Path | None = _output(
        None, "Output folder; by default export/<model> in the work directory.", operational=True
    )
    opset: int | None = _output(None, f"ONNX opset version; by default {DEFAULT_OPSET}.", within=Range(18, 23))
    quantize: tuple[str, ...] = _output(
        (),
        "Also write each ONNX or ExecuTorch file in this format, such as image_encoder_int8.onnx; may be repeated. `fp16` "
        "halves the size; `int8` quarters it and needs labeled or captioned images to measure the loss of accuracy.",
        choices=QUANTIZED,
    )
    static: bool = _output(
        False,
        "Fix the batch of the ONNX encoders at one image or text, as accelerators of phones need it.",
        operational=True,  # it counts where it is on
    )
    dense: bool = _output(
        False,
        "Add a second output to image_encoder.onnx, dense_embeds [N, h, w, D]: the projected patch embeddings of a ViT, not "
        "normalized.",
    )
    npm_packages: Path | None = _output(
        None,
        "For --format web: folder of the packages onnxruntime-web and @huggingface/tokenizers, as `npm pack` writes them. "
        "By default, npm fetches them (33 MB, once).",
        operational=True,
    )
    search_images: str | None = _output(
        None,
        "Images that the page searches by text, in any form of data. web/ then holds their embeddings, names, captions and "
        "thumbnails, which everyone who can open the page can read.",
        metavar="DATA",
        operational=True,  # as `classnames`: the content counts
    )
    max_search_images: int = _output(
        10_000,
        "Maximum number of --search-images: the first ones, or, of images with classes, evenly spaced ones.",
        within=Range(1),
        operational=True,
    )
    push: str | None = _output(
        None,
        "Also upload the files to this repository of the Hugging Face hub, by one commit; a new repository is private. The "
        "token is that of `hf auth login` or HF_TOKEN.",
        metavar="ORG/NAME",
        operational=True,
    )
    license: str | None = _output(None, "License of the weights, for the model card; by default unknown.")
    classnames: Path | None = _classes(
        None,
        "File with one class name per line, a CLIP_benchmark folder, or a folder with one folder per class. With --format "
        "onnx, also write classifier.onnx, from image bytes to one score per class.",
        operational=True,  # as `templates`: the content counts, which is among the inputs
    )
    templates: Path | None = _classes(
        None,
        "File with one prompt template per line, with {c} or {} for the class name; by default the folder's own, else `a "
        "photo of a {c}.`",
        operational=True,
    )
    data: str | None = _check(
        None,
        "Images to verify the export with, preferably with classes or captions. By default, the data of the embeddings in "
        "the work directory, else synthetic images and built-in sentences.",
        metavar="DATA",
        operational=True,
    )
    check_images: int | None = _check(
        None,
        "Maximum number of images for comparing zero-shot predictions and speed; by default 1,000 with --data or "
        "--quantize, else 64.",
        within=Range(16),
        operational=True,
    )
    max_bad_fraction: float | None = _check(
        None,
        "Fail when more than this share of the images cannot be read: by default half of those that are compared, and "
        "0.01 of --search-images.",
        within=FRACTION,
        operational=True,
    )
    max_difference: float | None = _check(
        None,
        "Largest allowed difference in an entry of a unit embedding; by default 0.0001 for fp32, 0.005 for fp16, 0.02 for "
        "bf16. For int8 see --max-accuracy-drop.",
        within=Range(0),
        operational=True,
    )
    max_accuracy_drop: float = _check(
        0.01,
        "Largest allowed loss of a quantized model in zero-shot accuracy if the images have classes, else in recall@1 from "
        "image to caption.",
        within=FRACTION,
        operational=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, values in (("--format", self.format), ("--quantize", self.quantize)):
            if len(set(values)) < len(values):
                raise UsageError(f"{flag} was given twice: {', '.join(values)}.", "Give each format once.")
        in_fp32 = next((form for form in ("onnx", "executorch") if form in self.forms), None)
        if in_fp32 is not None and self.precision not in ("auto", "fp32"):
            raise UsageError(
                f"--precision {self.precision} cannot be combined with --format {in_fp32}, which is written in fp32.",
                "Use --quantize fp16, or export the two formats in two runs with different --out.",
            )
        if self.quantize and not {"onnx", "executorch"} & {*self.forms}:
            raise UsageError("--quantize applies only to ONNX and ExecuTorch files.", "Add --format onnx.")
        about_onnx = {
            "--dense": self.dense,
            "--opset": self.opset is not None,
            "--static": self.static,
            "--classnames": self.classnames is not None,
        }
        for flag, given in about_onnx.items():
            if given and "onnx" not in self.forms:
                raise UsageError(f"{flag} applies only to ONNX files.", "Add --format onnx.")
        if self.static and (self.classnames is not None or "web" in self.format):
            raise UsageError(
                "--static fixes the batch of the encoders at one, and a classifier and the page take several at once.",
                "Omit --classnames and --format web, or export them in another run with another --out.",
            )
        about_web = {"--npm-packages": self.npm_packages, "--search-images": self.search_images}
        for flag, value in about_web.items():
            if value is not None and "web" not in self.format:
                raise UsageError(f"{flag} applies only to the page.", "Add --format web.")
        if self.push is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", self.push):
            raise UsageError(
                f"--push {self.push} does not name a repository.", "Give ORG/NAME, such as acme/clip-small."
            )
        if self.templates is not None and self.classnames is None:
            raise UsageError("--templates needs class names.", "Add --classnames FILE.")

    @property
    def forms(self) -> tuple[str, ...]:
        """The formats that are written, in order."""
        return tuple(form for form in FORMATS if form in self.format or (form == "onnx" and "web" in self.format))

    @property
    def max_bad_compared(self) -> float:
        """Largest share of unreadable images among those compared, which are only a measure of the export."""
        return 0.5 if self.max_bad_fraction is None else self.max_bad_fraction

    @property
    def max_bad_searched(self) -> float:
        """Largest share of unreadable images among those that the page searches."""
        return 0.01 if self.max_bad_fraction is None else self.max_bad_fraction

    @property
    def stored_precision(self) -> str:
        """Number format that a folder's weights are stored in."""
        return "fp32" if self.precision == "auto" else self.precision

    @property
    def onnx_opset(self) -> int | None:
        """Version of ONNX's operators; None where no ONNX file is written."""
        return (self.opset or DEFAULT_OPSET) if "onnx" in self.forms else None
