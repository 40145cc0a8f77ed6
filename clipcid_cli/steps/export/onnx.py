"""The ONNX files of `export` and their quantized variants: written, run by ONNX Runtime, and compared."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clipcid_cli.algorithms.metrics.classification import class_weights
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.export_folder import CLASSIFIER, IMAGE_ENCODER, TEXT_ENCODER, quantized_name
from clipcid_cli.formats.models.onnx_classifier import validate_for_classifier, write_classifier
from clipcid_cli.formats.models.onnx_file import DENSE_EMBEDS, IMAGE_EMBEDS, TEXT_EMBEDS, write_onnx, write_quantized
from clipcid_cli.formats.sidecar import Parity
from clipcid_cli.runtime.libraries import quiet_libraries
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.exported import OnnxSession
from clipcid_cli.runtime.models.towers import DenseImageTower, ImageTower, TextTower, has_patches, image_tower_kind
from clipcid_cli.steps.export.check import Checker, run_timed
from clipcid_cli.steps.export.inputs import ACCURACY, CheckInputs, Classes
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
    """
    classes = checker.inputs.classes
    with quiet_libraries():
        _write_encoders(checker, folder)
        for kind in checker.settings.quantize:
            for name in (IMAGE_ENCODER, TEXT_ENCODER):
                write_quantized(folder / name, folder / quantized_name(name, kind), kind)
    found = {
        _form("onnx", kind): _check_encoders(checker, folder, kind) for kind in ("fp32", *checker.settings.quantize)
    }
    return found if classes is None else found | _write_classifiers(checker, folder, classes)


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
    image, text = (OnnxSession(path) for path in files)
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


def _write_classifiers(checker: Checker, folder: Path, classes: Classes) -> dict[str, Parity]:
    """Write a classifier from each image encoder, run it on whole images one by one, and compare it with PyTorch.

    ONNX Runtime resizes its pixels, Pillow the model's: that difference is part of what is measured.
    """
    model, inputs, transform = checker.model, checker.inputs, checker.model.pixel_transform()
    weights = class_weights(checker.original.encode_prompts(classes.prompts()))

    def classify(image: Image.Image) -> torch.Tensor:
        return checker.original.images(transform(image)[None]) @ weights.T

    expected, images_per_second = run_timed(classify, inputs.read_images())
    # Labels then index the classes of --classnames, which are the candidates of the encoders, too.
    labelled = inputs.candidates is not None and inputs.candidates.measure == ACCURACY
    found = dict[str, Parity]()
    for kind in ("fp32", *checker.settings.quantize):
        encoder, path = (folder / quantized_name(name, kind) for name in (IMAGE_ENCODER, CLASSIFIER))
        write_classifier(path, encoder, weights.numpy(), classes.names, classes.templates)
        session = OnnxSession(path)
        images = (torch.from_numpy(np.array(image)[None]) for image in inputs.read_images())
        logits, rate = run_timed(session, images)  # of its outputs the first
        cosines, nearest = (logits - model.logit_bias) / model.logit_scale, logits.argmax(dim=1)
        form = _form("classifier", kind)
        found[form] = Parity(
            precision=kind,
            images=len(logits),
            max_cosine_difference=float((expected - cosines).abs().max()),
            agreement=float((expected.argmax(dim=1) == nearest).double().mean()),
            bytes=path.stat().st_size,
            images_per_second=rate,
            pytorch_images_per_second=images_per_second,
            zeroshot=checker.compare_predictions(nearest, gated=kind != "fp32") if labelled else None,
            engine=session.engine,
        )
        checker.validate(form, found[form])
    return found
