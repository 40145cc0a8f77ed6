"""The ONNX files of `export` and their quantized variants: written, run by ONNX Runtime, and compared."""

from __future__ import annotations

import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.export_folder import CLASSIFIER, IMAGE_ENCODER, TEXT_ENCODER, quantized_name
from clipcid_cli.formats.models.onnx_classifier import LOGITS, check_pixels_expressible, write_classifier
from clipcid_cli.formats.models.onnx_file import (
    DENSE_EMBEDS,
    IMAGE_EMBEDS,
    INPUT_IDS,
    PIXEL_VALUES,
    TEXT_EMBEDS,
    write_onnx,
    write_quantized,
)
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.onnx_session import OnnxSession
from clipcid_cli.runtime.models.towers import (
    DenseImageTower,
    Encode,
    ImageTower,
    TextTower,
    has_patches,
    image_tower_kind,
)
from clipcid_cli.runtime.quiet import quiet_libraries
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.export.check import Checker
from clipcid_cli.steps.export.check_inputs import CheckInputs
from clipcid_cli.steps.export.classes import ACCURACY, Classes
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.export import ExportSettings


def check_onnx_expressible(model: ClipModel, settings: ExportSettings) -> None:
    """Refuse, before anything is written, patches of an image tower that is no ViT, and pixels no graph can prepare."""
    if settings.dense and not has_patches(model.module):
        raise ClipcidError(
            f"--dense: the image tower of {model.info.spec} is not a ViT of open_clip whose patches share the space of its "
            f"images ({image_tower_kind(model.module)}).",
            "Omit --dense.",
        )
    if settings.classnames is not None:
        check_pixels_expressible(model.info.preprocess)


def check_measurable(inputs: CheckInputs, settings: ExportSettings, reporter: Reporter) -> None:
    """Refuse 8 bits where their loss cannot be measured, and warn where too few images measure it."""
    count, max_drop = len(inputs.images), settings.max_accuracy_drop
    if settings.quantize and inputs.candidates is not None and 0 < max_drop < 1 / count:
        reporter.warn(
            f"What quantization loses is measured on {count:,} images, so one image is {100 / count:.2f} points, more than "
            f"the {100 * max_drop:.2f} allowed. Compare on at least {math.ceil(1 / max_drop):,} images, better on many more "
            "(--data, --check-images)."
        )
    if "int8" in settings.quantize and inputs.candidates is None:
        raise ClipcidError(
            "--quantize int8 needs images with classes or captions, to measure its loss of accuracy; "
            f"there are neither captions nor names of classes in {inputs.source}.",
            "Name some with --data: a CLIP_benchmark folder, a folder of images per class, or shards with captions; or give "
            "the names of the classes with --classnames: a file with one class name per line.",
        )


def write_onnx_files(checker: Checker, folder: Path, classes: Classes | None) -> dict[str, Any]:
    """Write both encoders, and for `classes` a classifier, as ONNX files, run them with ONNX Runtime, and compare.

    The image encoder takes ``pixel_values``, the text encoder ``input_ids``; they give unit rows, ``image_embeds`` and
    ``text_embeds`` (Hugging Face's names). How pixels and tokens are made is in each file's metadata.

    Returns:
        Entries of `parity.json`: ``onnx``, ``classifier`` and the quantized variants of both.
    """
    settings = checker.settings
    with quiet_libraries():
        _write_encoders(checker, folder)
    found: dict[str, Any] = {}
    for kind in ("fp32", *settings.quantize):
        image, text = (folder / quantized_name(name, kind) for name in (IMAGE_ENCODER, TEXT_ENCODER))
        if kind != "fp32":
            with quiet_libraries():
                write_quantized(folder / IMAGE_ENCODER, image, kind)
                write_quantized(folder / TEXT_ENCODER, text, kind)
        session = OnnxSession(image, torch.get_num_threads())
        encoders: dict[str, Encode] = {"image": session, "text": OnnxSession(text, torch.get_num_threads())}
        if settings.dense:
            encoders["dense"] = partial(_encode_patches, session)
        name = "onnx" if kind == "fp32" else f"onnx-{kind}"
        found[name] = checker.check(name, kind, encoders, [image, text], gated=kind != "fp32")
        found[name] |= {"opset": settings.onnx_opset, "engine": session.engine}
    return found if classes is None else found | _write_classifiers(checker, folder, classes)


def _encode_patches(session: OnnxSession, pixels: torch.Tensor) -> torch.Tensor:
    return session.run(pixels)[DENSE_EMBEDS]


def _write_encoders(checker: Checker, folder: Path) -> None:
    model, opset = checker.model, checker.settings.onnx_opset
    assert opset is not None
    metadata = {
        "model": model.info.spec,
        "weights_hash": model.info.weights_hash,
        "preprocess": json.dumps(model.info.preprocess),
        "tokenizer": model.info.tokenizer,
        "context_length": str(model.info.context_length),
        "logit_scale": repr(model.logit_scale),
        "output": "unit rows",
        "opset": str(opset),
    }
    tower: torch.nn.Module = ImageTower(model.module)
    outputs = [IMAGE_EMBEDS]
    if checker.settings.dense:
        tower = DenseImageTower(model.module)
        outputs.append(DENSE_EMBEDS)
        metadata[DENSE_EMBEDS] = "patches after the last block, final norm and projection; [N, h, w, D]; not unit rows"
    for name, module, example, takes, gives in (
        (IMAGE_ENCODER, tower, checker.pixels, PIXEL_VALUES, outputs),
        (TEXT_ENCODER, TextTower(model.module), checker.tokens, INPUT_IDS, [TEXT_EMBEDS]),
    ):
        write_onnx(
            folder / name,
            module.eval(),
            example[:2],
            input_name=takes,
            output_names=gives,
            opset=opset,
            metadata=metadata,
        )


def _write_classifiers(checker: Checker, folder: Path, classes: Classes) -> dict[str, Any]:
    """Write a classifier from each image encoder in `folder`, and compare it; class weights stay in 32 bits."""
    model = checker.model
    weights = checker.encode_candidates(classes.prompts(), checker.references["text"])
    found: dict[str, Any] = {}
    for kind in ("fp32", *checker.settings.quantize):
        path = folder / quantized_name(CLASSIFIER, kind)
        write_classifier(
            path,
            folder / quantized_name(IMAGE_ENCODER, kind),
            weights.numpy(),
            scale=model.logit_scale,
            bias=model.logit_bias,
            preprocess=model.info.preprocess,
            class_names=classes.names,
            templates=classes.templates,
        )
        name = "classifier" if kind == "fp32" else f"classifier-{kind}"
        found[name] = _compare_classifier(kind, path, weights, checker)
        checker.validate(name, found[name])
    return found


def _compare_classifier(kind: str, path: Path, weights: torch.Tensor, checker: Checker) -> dict[str, Any]:
    """Run a classifier on whole images one by one, and compare its cosines and predictions with PyTorch's.

    ONNX Runtime resizes its pixels, Pillow the model's: that difference is part of what is measured.
    """
    session = OnnxSession(path, torch.get_num_threads())
    model, inputs, transform = checker.model, checker.inputs, checker.model.transform()

    def ours(image: Image.Image) -> torch.Tensor:
        return checker.references["image"](transform(image)[None]) @ weights.T

    def theirs(image: Image.Image) -> torch.Tensor:
        return (session.run(torch.from_numpy(np.array(image)[None]))[LOGITS] - model.logit_bias) / model.logit_scale

    with torch.inference_mode():
        trials = [
            [time_trial(partial(classify, image), warm_up=0) for classify in (ours, theirs)]
            for image in (opener() for opener in inputs.openers)
        ]
    expected, given = (torch.cat([trial.result for trial in side]) for side in zip(*trials, strict=True))
    pytorch_seconds, seconds = (
        statistics.median(trial.seconds for trial in side) for side in zip(*trials, strict=True)
    )
    nearest = given.argmax(dim=1)
    # Labels then index the classes of --classnames, which are the candidates of the encoders, too.
    labelled = inputs.candidates is not None and inputs.candidates.measure == ACCURACY
    return {
        "precision": kind,
        "images": len(given),
        "max_cosine_difference": float((expected - given).abs().max()),
        "agreement": float((expected.argmax(dim=1) == nearest).double().mean()),
        "bytes": path.stat().st_size,
        "images_per_second": round(1 / seconds, 2),
        "pytorch_images_per_second": round(1 / pytorch_seconds, 2),
        "zeroshot": checker.compare_predictions(nearest, gated=kind != "fp32") if labelled else None,
        "engine": session.engine,
    }
