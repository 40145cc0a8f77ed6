"""The ONNX files of `export` and their quantized variants: written, run by ONNX Runtime, and compared."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clipcid_cli.algorithms.metrics.classification import class_weights
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.export_folder import CLASSIFIER, IMAGE_ENCODER, TEXT_ENCODER, quantized_name
from clipcid_cli.formats.models.onnx_classifier import LOGITS, validate_for_classifier, write_classifier
from clipcid_cli.formats.models.onnx_file import DENSE_EMBEDS, IMAGE_EMBEDS, TEXT_EMBEDS, write_onnx, write_quantized
from clipcid_cli.formats.sidecar import Parity
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.onnx_session import OnnxSession
from clipcid_cli.runtime.models.towers import DenseImageTower, ImageTower, TextTower, has_patches, image_tower_kind
from clipcid_cli.runtime.quiet import quiet_libraries
from clipcid_cli.runtime.timing import Trial, time_trial
from clipcid_cli.steps.export.check import Checker
from clipcid_cli.steps.export.inputs import ACCURACY, CheckInputs
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.export import ExportSettings


def validate_for_onnx(model: ClipModel, settings: ExportSettings) -> None:
    """Refuse, before anything is written, patches of an image tower that is no ViT, and pixels no graph can prepare."""
    if settings.dense and not has_patches(model.module):
        raise ClipcidError(
            f"--dense: the image tower of {model.info.spec} is not a ViT of open_clip whose patches share the space of its "
            f"images ({image_tower_kind(model.module)}).",
            "Omit --dense.",
        )
    if settings.classnames is not None:
        validate_for_classifier(model.info.preprocess)


def validate_measurable(inputs: CheckInputs, settings: ExportSettings, reporter: Reporter) -> None:
    """Refuse 8 bits where their loss cannot be measured, and warn where too few images measure it."""
    count, max_drop = len(inputs.pixels), settings.max_accuracy_drop
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


def write_onnx_files(checker: Checker, folder: Path) -> dict[str, Parity]:
    """Write both encoders, and where there are classes a classifier, as ONNX files, run them with ONNX Runtime, and compare.

    The image encoder takes ``pixel_values``, the text encoder ``input_ids``; they give unit rows, ``image_embeds`` and
    ``text_embeds`` (Hugging Face's names). How pixels and tokens are made is in each file's metadata.

    Returns:
        Entries of `parity.json`: ``onnx``, ``classifier`` and the quantized variants of both.
    """
    kinds, classes = ("fp32", *checker.settings.quantize), checker.inputs.classes
    with quiet_libraries():
        _write_encoders(checker, folder)
        for kind in checker.settings.quantize:
            for name in (IMAGE_ENCODER, TEXT_ENCODER):
                write_quantized(folder / name, folder / quantized_name(name, kind), kind)
    found = {_form("onnx", kind): _check_encoders(checker, folder, kind) for kind in kinds}
    if classes is not None:
        weights = class_weights(checker.original.encode_prompts(classes.prompts()))
        for kind in kinds:
            encoder, path = (folder / quantized_name(name, kind) for name in (IMAGE_ENCODER, CLASSIFIER))
            write_classifier(path, encoder, weights.numpy(), classes.names, classes.templates)
            found[_form("classifier", kind)] = _check_classifier(checker, path, kind, weights)
    return found


def _form(name: str, kind: str) -> str:
    return name if kind == "fp32" else f"{name}-{kind}"


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
        "logit_bias": repr(model.logit_bias),
        "output": "unit rows",
        "opset": str(opset),
    }
    tower: torch.nn.Module = ImageTower(model.module)
    outputs = [IMAGE_EMBEDS]
    if checker.settings.dense:
        tower = DenseImageTower(model.module)
        outputs.append(DENSE_EMBEDS)
        metadata[DENSE_EMBEDS] = "patches after the last block, final norm and projection; [N, h, w, D]; not unit rows"
    for name, module, example, gives in (
        (IMAGE_ENCODER, tower, model.normalize(checker.inputs.compared_pixels[:2]), outputs),
        (TEXT_ENCODER, TextTower(model.module), checker.inputs.tokens[:2], [TEXT_EMBEDS]),
    ):
        write_onnx(folder / name, module.eval(), example, gives, opset=opset, metadata=metadata)


def _check_encoders(checker: Checker, folder: Path, kind: str) -> Parity:
    files = [folder / quantized_name(name, kind) for name in (IMAGE_ENCODER, TEXT_ENCODER)]
    image, text = (OnnxSession(path, torch.get_num_threads()) for path in files)
    normalize = checker.model.normalize
    towers = dataclasses.replace(
        checker.original,
        images=lambda pixels: image(normalize(pixels)),
        texts=text,
        dense=(lambda pixels: image.run(normalize(pixels))[DENSE_EMBEDS]) if checker.settings.dense else None,
    )
    found = checker.check(_form("onnx", kind), kind, towers, files, gated=kind != "fp32")
    found.engine, found.opset = image.engine, checker.settings.onnx_opset
    return found


def _check_classifier(checker: Checker, path: Path, kind: str, weights: torch.Tensor) -> Parity:
    """Run a classifier on whole images one by one, and compare its cosines and predictions with PyTorch's.

    ONNX Runtime resizes its pixels, Pillow the model's: that difference is part of what is measured.
    """
    session = OnnxSession(path, torch.get_num_threads())
    model, inputs, transform = checker.model, checker.inputs, checker.model.pixel_transform()

    def classify_here(image: Image.Image) -> torch.Tensor:
        return checker.original.images(transform(image)[None]) @ weights.T

    def classify_there(image: Image.Image) -> torch.Tensor:
        return (session.run(torch.from_numpy(np.array(image)[None]))[LOGITS] - model.logit_bias) / model.logit_scale

    here, there = list[Trial[torch.Tensor]](), list[Trial[torch.Tensor]]()
    for image in inputs.read_images():
        here.append(time_trial(partial(classify_here, image), warm_up=0))
        there.append(time_trial(partial(classify_there, image), warm_up=0))
    expected, given = (torch.cat([trial.result for trial in side]) for side in (here, there))
    nearest = given.argmax(dim=1)
    # Labels then index the classes of --classnames, which are the candidates of the encoders, too.
    labelled = inputs.candidates is not None and inputs.candidates.measure == ACCURACY
    found = Parity(
        precision=kind,
        images=len(given),
        max_cosine_difference=float((expected - given).abs().max()),
        agreement=float((expected.argmax(dim=1) == nearest).double().mean()),
        bytes=path.stat().st_size,
        images_per_second=_rate(there),
        pytorch_images_per_second=_rate(here),
        zeroshot=checker.compare_predictions(nearest, gated=kind != "fp32") if labelled else None,
        engine=session.engine,
    )
    checker.validate(_form("classifier", kind), found)
    return found


def _rate(trials: list[Trial[torch.Tensor]]) -> float:
    return round(1 / statistics.median(trial.seconds for trial in trials), 2)
