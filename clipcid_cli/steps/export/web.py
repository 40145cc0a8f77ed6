"""The page of an export, which runs the smallest of its ONNX encoders in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark import DEFAULT_TEMPLATES
from clipcid_cli.formats.models.export_folder import (
    IMAGE_ENCODER,
    TEXT_ENCODER,
    TOKENIZER,
    WEB,
    link_file,
    quantized_name,
)
from clipcid_cli.formats.models.export_sidecar import Parity
from clipcid_cli.formats.models.open_clip_folder import HEIGHT_MAY_BE_FIRST, square_side
from clipcid_cli.formats.models.web_folder import write_page
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.export.card import export_name
from clipcid_cli.steps.export.check import Checker
from clipcid_cli.steps.settings.export import ExportSettings

# What a page without classes begins with.
_EXAMPLE_LABELS = ("cat", "dog", "person", "house", "landscape", "food", "text")


def write_web(checker: Checker, folder: Path) -> dict[str, Parity]:
    """Write the page, which runs the smallest encoders; they are compared already, and get a second name in its folder."""
    model, classes = checker.model, checker.inputs.classes
    names = page_encoders(checker.settings)
    if too_large := [name for name in names if (folder / f"{name}.data").exists()]:
        raise ClipcidError(
            f"--format web: {', '.join(too_large)} is above 2 GB, more than a browser loads.", "Add --quantize int8."
        )
    for name in (*names, TOKENIZER):
        link_file(folder / name, folder / WEB / name)
    labels, templates = (_EXAMPLE_LABELS, DEFAULT_TEMPLATES) if classes is None else (classes.names, classes.templates)
    write_page(
        folder / WEB,
        describe_for_page(model),
        [folder / WEB / name for name in names],
        labels,
        templates,
        search=checker.settings.search_images is not None,
    )
    return {}


def smallest_kind(settings: ExportSettings) -> str:
    """Return the number format of the encoders that the page loads."""
    return next(kind for kind in ("int8", "fp16", "fp32") if kind in ("fp32", *settings.quantize))


def page_encoders(settings: ExportSettings) -> list[str]:
    """Name the image and the text encoder that the page loads."""
    return [quantized_name(name, smallest_kind(settings)) for name in (IMAGE_ENCODER, TEXT_ENCODER)]


def describe_for_page(model: ClipModel) -> dict[str, Any]:
    """Return what the page must know of a model: see `write_page`."""
    preprocess = model.info.preprocess
    return {
        "name": export_name(parse_model(model.info.spec)),
        "width": model.info.embed_dim,
        "logit_scale": model.logit_scale,
        "canonical": model.tokenizer.whole.clean_fn("A.") == "a",
        "side": square_side(preprocess["size"]),
        "height_may_be_first": HEIGHT_MAY_BE_FIRST,
        **{name: preprocess[name] for name in ("mean", "std", "interpolation", "resize_mode")},
    }
