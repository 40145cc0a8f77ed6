"""ONNX encoders of `export` and their quantized variants: written, run by ONNX Runtime, and compared."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from clipcid_cli.algorithms.metrics.parity import RowDifference, compare_rows
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.export_folder import IMAGE_ENCODER, TEXT_ENCODER, quantized_name
from clipcid_cli.formats.models.onnx_classifier import check_pixels_expressible
from clipcid_cli.formats.models.onnx_file import (
    DENSE_EMBEDS,
    IMAGE_EMBEDS,
    INPUT_IDS,
    PIXEL_VALUES,
    TEXT_EMBEDS,
    write_onnx,
)
from clipcid_cli.formats.models.onnx_quantized import write_quantized
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.onnx_session import OnnxSession
from clipcid_cli.runtime.models.towers import DenseImageTower, ImageTower, TextTower, has_patches, image_tower_kind
from clipcid_cli.runtime.quiet import quiet_libraries
from clipcid_cli.steps.export.check import BATCH_SIZES, Checker
from clipcid_cli.steps.export.check_inputs import CheckInputs
from clipcid_cli.steps.export.classifier import write_classifiers
from clipcid_cli.steps.export.folders import ExportOptions
from clipcid_cli.steps.reporting import Reporter


def check_onnx_expressible(model: ClipModel, options: ExportOptions) -> None:
    """Refuse, before anything is written, what ONNX files cannot express of this model.

    Raises:
        ClipcidError: for patches of an image tower that is no ViT, and preprocessing that cannot be part of a graph.
    """
    if options.dense and not has_patches(model.module):
        raise ClipcidError(
            f"--dense: the image tower of {model.info.spec} is not a ViT of open_clip whose patches share the space of its "
            f"images ({image_tower_kind(model.module)}).",
            "Omit --dense.",
        )
    if options.classes is not None:
        check_pixels_expressible(model.info.preprocess)


def check_measurable(inputs: CheckInputs, options: ExportOptions, max_drop: float, reporter: Reporter) -> None:
    """Refuse 8 bits where their loss cannot be measured, and warn where too few images measure it.

    Args:
        max_drop: Largest loss of accuracy of a quantized variant.

    Raises:
        ClipcidError: when the images have neither classes that have names nor captions.
    """
    count = len(inputs.images)
    if options.quantize and inputs.candidates is not None and 0 < max_drop < 1 / count:
        reporter.warn(
            f"What quantization loses is measured on {count:,} images, so one image is {100 / count:.2f} points, more than "
            f"the {100 * max_drop:.2f} allowed. Compare on at least {math.ceil(1 / max_drop):,} images, better on many more "
            "(--data, --check-images)."
        )
    if "int8" in options.quantize and inputs.candidates is None:
        if inputs.unnamed_classes:
            raise ClipcidError(
                f"--quantize int8: the classes of {inputs.source} have no names, so its loss cannot be measured.",
                "Give them with --classnames: a file with one class name per line.",
            )
        raise ClipcidError(
            "--quantize int8 needs images with classes or captions, to measure its loss of accuracy.",
            "Name some with --data: a CLIP_benchmark folder, a folder of images per class, or shards with captions.",
        )


def write_onnx_files(model: ClipModel, folder: Path, checker: Checker, options: ExportOptions) -> dict[str, Any]:
    """Write both encoders as ONNX files with a dynamic batch, run them with ONNX Runtime, and compare.

    The image encoder takes ``pixel_values``, the text encoder ``input_ids``; they give unit rows, ``image_embeds`` and
    ``text_embeds`` (Hugging Face's names). How pixels and tokens are made is in each file's metadata.

    Returns:
        The comparisons, as `parity.json` holds them: ``onnx``, ``classifier`` and the quantized variants of both.

    Raises:
        ClipcidError: when an encoder cannot be expressed in ONNX or differs from the model by more than the limit.
    """
    with quiet_libraries():
        _write_encoders(model, folder, checker, options)
    found: dict[str, Any] = {}
    for kind in ("fp32", *options.quantize):
        paths = {
            "image": folder / quantized_name(IMAGE_ENCODER, kind),
            "text": folder / quantized_name(TEXT_ENCODER, kind),
        }
        if kind != "fp32":
            with quiet_libraries():
                for source, path in zip((IMAGE_ENCODER, TEXT_ENCODER), paths.values(), strict=True):
                    write_quantized(folder / source, path, kind)
        sessions = {tower: OnnxSession(path, torch.get_num_threads()) for tower, path in paths.items()}
        name = "onnx" if kind == "fp32" else f"onnx-{kind}"
        found[name] = checker.check(name, kind, sessions, list(paths.values()), quantized=kind != "fp32")
        if options.dense:
            found[name]["dense"] = _check_patches(name, kind, model, sessions["image"], checker)
        found[name] |= {"opset": options.opset, "engine": sessions["image"].engine}
    if options.classes is not None:
        found |= write_classifiers(model, folder, checker, options)
    return found


def _write_encoders(model: ClipModel, folder: Path, checker: Checker, options: ExportOptions) -> None:
    assert options.opset is not None
    metadata = {
        "model": model.info.spec,
        "weights_hash": model.info.weights_hash,
        "preprocess": json.dumps(model.info.preprocess),
        "tokenizer": model.info.tokenizer,
        "context_length": str(model.info.context_length),
        "logit_scale": repr(model.logit_scale),
        "output": "unit rows",
        "opset": str(options.opset),
    }
    outputs = [IMAGE_EMBEDS]
    tower: torch.nn.Module = ImageTower(model.module)
    if options.dense:
        tower, outputs = DenseImageTower(model.module), [*outputs, DENSE_EMBEDS]
        metadata[DENSE_EMBEDS] = "patches after the last block, final norm and projection; [N, h, w, D]; not unit rows"
    write_onnx(
        folder / IMAGE_ENCODER,
        tower.eval(),
        checker.inputs.row_pixels(model)[:2],
        input_name=PIXEL_VALUES,
        output_names=outputs,
        opset=options.opset,
        metadata=metadata,
    )
    write_onnx(
        folder / TEXT_ENCODER,
        TextTower(model.module).eval(),
        checker.inputs.tokens[:2],
        input_name=INPUT_IDS,
        output_names=[TEXT_EMBEDS],
        opset=options.opset,
        metadata=metadata,
    )


def _check_patches(name: str, kind: str, model: ClipModel, session: OnnxSession, checker: Checker) -> dict[str, Any]:
    """Compare patches with PyTorch's, divided by the greatest length: their scale varies with the model."""
    reference = DenseImageTower(model.module).eval()
    difference, pixels = RowDifference(), checker.inputs.row_pixels(model)
    with torch.inference_mode():
        for size in BATCH_SIZES:
            for batch in pixels.split(size):  # type: ignore[no-untyped-call]  # torch leaves split untyped
                ours, theirs = reference(batch)[1], session.run(batch)[DENSE_EMBEDS]
                if ours.shape != theirs.shape:
                    raise ClipcidError(
                        f"{name}: {DENSE_EMBEDS} has shape {list(theirs.shape)}, PyTorch's {list(ours.shape)}."
                    )
                longest = ours.norm(dim=-1).amax()
                difference = difference.merge(
                    compare_rows((ours / longest).flatten(0, 2), (theirs / longest).flatten(0, 2))
                )
    checker.require_close(f"{name}: the patches", kind, difference)
    return {"shape": ["batch", *ours.shape[1:]], **dataclasses.asdict(difference)}
