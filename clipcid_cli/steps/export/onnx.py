"""ONNX files of `export`: encoders, their smaller forms, and the classifier with preprocessing inside."""

from __future__ import annotations

import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from clipcid_cli.algorithms.metrics.parity import Difference, compare_rows
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.export_folder import CLASSIFIER, IMAGE_ENCODER, TEXT_ENCODER, smaller_name
from clipcid_cli.formats.models.onnx_classifier import LOGITS, check_pixels_expressible, write_classifier
from clipcid_cli.formats.models.onnx_file import write_onnx
from clipcid_cli.formats.models.onnx_quantized import write_smaller
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.onnx_session import OnnxSession
from clipcid_cli.runtime.models.towers import DenseImageTower, ImageTower, TextTower, has_patches
from clipcid_cli.runtime.quiet import quiet_libraries
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.export.check import BATCH_SIZES, Checker
from clipcid_cli.steps.export.check_inputs import ACCURACY, ParityInputs
from clipcid_cli.steps.export.classes import encode_candidates
from clipcid_cli.steps.export.folders import FormOptions
from clipcid_cli.steps.reporting import Reporter

_PATCHES = "dense_embeds"

# Largest difference allowed of a cosine of image and class. fp32: a byte in some 10,000 is resized one level aside. int8 is
# judged by its answers.
_COSINE_LIMITS = {"fp32": 1e-3, "fp16": 5e-3, "int8": math.inf}


def check_onnx_expressible(model: ClipModel, options: FormOptions) -> None:
    """Refuse before anything is written what cannot be had of this model.

    Raises:
        ClipcidError: when patches are wanted of another tower than a ViT, or its preprocessing cannot be part of a graph.
    """
    if options.dense and not has_patches(model.module):
        raise ClipcidError(
            f"--dense: the image tower of {model.info.spec} is not a ViT of open_clip whose patches share the space of its "
            f"images ({type(cast(Any, model.module).visual).__name__}).",
            "Leave out --dense.",
        )
    if options.classes is not None:
        check_pixels_expressible(model.info.preprocess)


def check_measurable(inputs: ParityInputs, options: FormOptions, max_drop: float, reporter: Reporter) -> None:
    """Refuse 8 bits where nothing would tell what they cost, and warn where too few images would.

    Args:
        inputs: What the forms are compared on.
        max_drop: Largest loss of accuracy of a quantised form.

    Raises:
        ClipcidError: when the images have neither classes that have names nor captions.
    """
    count = len(inputs.images)
    if options.quantize and inputs.candidates is not None and 0 < max_drop < 1 / count:
        reporter.warn(
            f"What a smaller form loses is measured on {count:,} images, of which one is {100 / count:.2f} points: a loss "
            f"as small as the {100 * max_drop:.2f} allowed does not show. Compare on at least {math.ceil(1 / max_drop):,} "
            "images, better on many more (--data, --check-images)."
        )
    if "int8" in options.quantize and inputs.candidates is None:
        if inputs.unnamed_classes:
            raise ClipcidError(
                f"--quantize int8: the classes of {inputs.source} have no names to measure by what it costs.",
                "Give them with --classnames: a file with one class name a line.",
            )
        raise ClipcidError(
            "--quantize int8 needs images with classes or captions, to measure what it costs.",
            "Name some with --data: a CLIP_benchmark folder, a folder of images per class, or shards with captions.",
        )


def write_onnx_files(model: ClipModel, folder: Path, checker: Checker, options: FormOptions) -> dict[str, Any]:
    """Write both encoders as ONNX files with a dynamic batch, run them with ONNX Runtime, and compare.

    The image encoder takes ``pixel_values``, the text encoder ``input_ids``; they give unit rows, ``image_embeds`` and
    ``text_embeds`` (Hugging Face's names). How pixels and tokens are made is in each file's metadata.

    Returns:
        The comparisons, as `parity.json` holds them: ``onnx``, ``classifier`` and the smaller forms of both.

    Raises:
        ClipcidError: when an encoder cannot be expressed in ONNX or differs from the model by more than the limit.
    """
    with quiet_libraries():
        _write_encoders(model, folder, checker, options)
    found: dict[str, Any] = {}
    for kind in ("fp32", *options.quantize):
        paths = {
            "image": folder / smaller_name(IMAGE_ENCODER, kind),
            "text": folder / smaller_name(TEXT_ENCODER, kind),
        }
        if kind != "fp32":
            with quiet_libraries():
                for name, path in zip((IMAGE_ENCODER, TEXT_ENCODER), paths.values(), strict=True):
                    write_smaller(folder / name, path, kind)
        sessions = {tower: OnnxSession(path, torch.get_num_threads()) for tower, path in paths.items()}
        form = "onnx" if kind == "fp32" else f"onnx-{kind}"
        found[form] = checker.check(form, kind, sessions, list(paths.values()), quantized=kind != "fp32")
        if options.dense:
            found[form]["dense"] = _check_patches(form, kind, model, sessions["image"], checker)
        found[form] |= {"opset": options.opset, "engine": sessions["image"].engine}
    if options.classes is not None:
        found |= _write_classifiers(model, folder, checker, options)
    return found


def _write_encoders(model: ClipModel, folder: Path, checker: Checker, options: FormOptions) -> None:
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
    outputs = ["image_embeds"]
    tower: torch.nn.Module = ImageTower(model.module)
    if options.dense:
        tower, outputs = DenseImageTower(model.module), [*outputs, _PATCHES]
        metadata[_PATCHES] = "patches after the last block, final norm and projection; [N, h, w, D]; not unit rows"
    write_onnx(
        folder / IMAGE_ENCODER,
        tower.eval(),
        checker.inputs.close_look(model)[:2],
        input_name="pixel_values",
        output_names=outputs,
        opset=options.opset,
        metadata=metadata,
    )
    write_onnx(
        folder / TEXT_ENCODER,
        TextTower(model.module).eval(),
        checker.inputs.tokens[:2],
        input_name="input_ids",
        output_names=["text_embeds"],
        opset=options.opset,
        metadata=metadata,
    )


def _check_patches(form: str, kind: str, model: ClipModel, session: OnnxSession, checker: Checker) -> dict[str, Any]:
    """Compare patches with PyTorch's, as unit rows: their own length varies with the model."""
    reference = DenseImageTower(model.module).eval()
    difference, pixels = Difference(), checker.inputs.close_look(model)
    with torch.inference_mode():
        for size in BATCH_SIZES:
            for batch in pixels.split(size):  # type: ignore[no-untyped-call]  # torch leaves split untyped
                ours, theirs = reference(batch)[1], session.run(batch)[_PATCHES]
                if ours.shape != theirs.shape:
                    raise ClipcidError(
                        f"{form}: {_PATCHES} has shape {list(theirs.shape)}, PyTorch's {list(ours.shape)}."
                    )
                longest = ours.norm(dim=-1).amax()
                difference = difference.merge(
                    compare_rows((ours / longest).flatten(0, 2), (theirs / longest).flatten(0, 2))
                )
    checker.require_close(f"{form}: the patches", kind, difference)
    return {"shape": ["batch", *ours.shape[1:]], "max_difference": difference.max_difference} | {
        "min_cosine": difference.min_cosine
    }


def _write_classifiers(model: ClipModel, folder: Path, checker: Checker, options: FormOptions) -> dict[str, Any]:
    """Write the classifier over each form of the image encoder; class weights stay in 32 bits."""
    classes = options.classes
    assert classes is not None
    prompts = [classes.prompts(name) for name in classes.names]
    with torch.inference_mode():
        weights = encode_candidates(prompts, model.tokenizer, checker.references["text"])
    found: dict[str, Any] = {}
    for kind in ("fp32", *options.quantize):
        path = folder / smaller_name(CLASSIFIER, kind)
        write_classifier(
            path,
            folder / smaller_name(IMAGE_ENCODER, kind),
            weights.numpy(),
            scale=model.logit_scale,
            bias=_bias(model),
            preprocess=model.info.preprocess,
            class_names=classes.names,
            templates=classes.templates,
        )
        form = "classifier" if kind == "fp32" else f"classifier-{kind}"
        found[form] = _check_classifier(form, kind, path, model, weights, checker)
    return found


def _check_classifier(
    form: str, kind: str, path: Path, model: ClipModel, weights: torch.Tensor, checker: Checker
) -> dict[str, Any]:
    """Show the classifier whole images one by one, and compare its cosines and answers with PyTorch's.

    Its pixels are resized by ONNX Runtime, the model's by Pillow: the difference is part of what is measured.
    """
    session = OnnxSession(path, torch.get_num_threads())
    inputs, transform, encode = checker.inputs, model.transform(), checker.references["image"]
    bias = _bias(model)

    def ours(image: Image.Image) -> torch.Tensor:
        return encode(transform(image)[None]) @ weights.T

    def theirs(image: Image.Image) -> torch.Tensor:
        return (session.run(torch.from_numpy(np.array(image)[None]))[LOGITS] - bias) / model.logit_scale

    largest, tops, pytorch_seconds, seconds = 0.0, list[tuple[int, int]](), list[float](), list[float]()
    with torch.inference_mode():
        for opener in inputs.openers:
            image = opener()
            pytorch_second, expected = time_trial(partial(ours, image), warm_up=0)
            second, given = time_trial(partial(theirs, image), warm_up=0)
            pytorch_seconds.append(pytorch_second)
            seconds.append(second)
            difference = float((expected - given).abs().max())
            largest = difference if math.isnan(difference) else max(largest, difference)
            tops.append((int(expected.argmax()), int(given.argmax())))
    if not largest <= _COSINE_LIMITS[kind]:
        raise ClipcidError(
            f"{form}: a cosine of image and class differs by {largest:.2e} from {model.info.spec} (allowed "
            f"{_COSINE_LIMITS[kind]:.0e}). Nothing was written.",
            "Leave out --classnames." if kind == "fp32" else "Leave this form out of --quantize.",
        )
    top = torch.tensor(tops)
    # With classes named, labels count in them: the same candidates as the encoders'.
    labelled = inputs.candidates is not None and inputs.candidates.measure == ACCURACY
    return {
        "precision": kind,
        "images": len(tops),
        "max_cosine_difference": largest,
        "agreement": float((top[:, 0] == top[:, 1]).double().mean()),
        "bytes": path.stat().st_size,
        "images_per_second": round(1 / statistics.median(seconds), 2),
        "pytorch_images_per_second": round(1 / statistics.median(pytorch_seconds), 2),
        "zeroshot": checker.compare_answers(form, top[:, 1], gated=kind != "fp32") if labelled else None,
        "engine": session.engine,
    }


def _bias(model: ClipModel) -> float:
    bias = getattr(model.module, "logit_bias", None)
    return float(bias.detach()) if isinstance(bias, torch.Tensor) else 0.0
