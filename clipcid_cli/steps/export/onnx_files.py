"""The ONNX files of an export, encoders and classifier in several number formats: written, run, and compared."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clipcid_cli.algorithms.metrics.classification import class_weights
from clipcid_cli.formats.models.export_folder import (
    CLASSIFIER,
    IMAGE_ENCODER,
    TEXT_ENCODER,
    TOKENIZER,
    TRANSFORMERS_JS,
    link_file,
    quantized_name,
)
from clipcid_cli.formats.models.export_sidecar import Parity
from clipcid_cli.formats.models.hf_clip import ClipArchitecture
from clipcid_cli.formats.models.hf_folder import fits_tokenizer_file, write_hf_settings, write_tokenizer_file
from clipcid_cli.formats.models.onnx_file import (
    DENSE_EMBEDS,
    IMAGE_EMBEDS,
    TEXT_EMBEDS,
    write_classifier,
    write_onnx,
    write_quantized,
)
from clipcid_cli.runtime.libraries import quiet_libraries
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.exported import OnnxSession, onnx_towers, read_tokens
from clipcid_cli.runtime.models.renderer import Renderer
from clipcid_cli.runtime.models.tower_modules import DenseImageTower, ImageTower, TextTower
from clipcid_cli.steps.export.check import Checker, latency_of, rate_of, run_timed
from clipcid_cli.steps.export.inputs import ACCURACY, Classes
from clipcid_cli.steps.export.limits import validate_parity
from clipcid_cli.steps.export.metadata import describe_encoders
from clipcid_cli.steps.export.tokens import compare_tokens
from clipcid_cli.steps.settings.export import ExportSettings


def write_onnx_files(checker: Checker, folder: Path) -> dict[str, Parity]:
    """Write both encoders, and where there are classes a classifier, as ONNX files, run them with ONNX Runtime, and compare.

    The image encoder takes ``pixel_values``, the text encoder ``input_ids``; they give unit rows, ``image_embeds`` and
    ``text_embeds`` (Hugging Face's names). How pixels are made is in each file's metadata; `tokenizer.json` makes tokens.
    """
    classes = checker.inputs.classes
    kinds = ("fp32", *checker.settings.quantize)
    info = checker.model.info
    for_transformers_js = not transformers_js_problems(checker.model, checker.settings)
    tokens = None
    with quiet_libraries():
        _write_encoders(checker, folder)
        if for_transformers_js and "hf" not in checker.settings.format:
            config = ClipArchitecture().make_config(info.config, math.log(checker.model.logit_scale))
            write_hf_settings(folder, config, info.preprocess, checker.model.tokenizer.whole)
        if fits_tokenizer_file(checker.model.tokenizer.whole):
            write_tokenizer_file(folder, checker.model.tokenizer.whole)
            tokens = compare_tokens("onnx", partial(read_tokens, folder / TOKENIZER), checker)
        for kind in checker.settings.quantize:
            for name in (IMAGE_ENCODER, TEXT_ENCODER):
                write_quantized(folder / name, folder / quantized_name(name, kind), kind)
    parity = {_form("onnx", kind): _validate_encoders(checker, folder, kind) for kind in kinds}
    parity["onnx"].tokenizer = tokens
    if classes is not None:
        parity |= _write_classifiers(checker, folder, classes)
    for ours, theirs in TRANSFORMERS_JS.items() if for_transformers_js else ():
        # It takes each as one file.
        if (folder / ours).exists() and not (folder / f"{ours}.data").exists():
            link_file(folder / ours, folder / theirs)
    return parity


def transformers_js_problems(model: ClipModel, settings: ExportSettings) -> list[str]:
    """Name what keeps transformers.js from running a model: what Hugging Face's settings of a CLIP cannot express of it."""
    info = model.info
    if settings.static:
        return ["--static fixes the batch at one"]
    return ClipArchitecture().problems(info.config, info.preprocess, info.tokenizer)


def _form(name: str, kind: str) -> str:
    return name if kind == "fp32" else f"{name}-{kind}"


def _write_encoders(checker: Checker, folder: Path) -> None:
    model, opset = checker.model, checker.settings.onnx_opset
    assert opset is not None
    described = describe_encoders(model) | {"opset": opset}
    # Metadata of an ONNX file are texts.
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in described.items()}
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
        static = checker.settings.static
        write_onnx(folder / name, module.eval(), example, gives, opset=opset, metadata=metadata, static=static)


def _validate_encoders(checker: Checker, folder: Path, kind: str) -> Parity:
    files = [folder / quantized_name(name, kind) for name in (IMAGE_ENCODER, TEXT_ENCODER)]
    image, text = (OnnxSession(path) for path in files)
    dense = DENSE_EMBEDS if checker.settings.dense else None
    towers = onnx_towers(image, text, checker.original, checker.model, dense)
    parity = checker.check(_form("onnx", kind), kind, towers, files, gated=kind != "fp32")
    parity.engine = image.engine
    parity.opset = checker.settings.onnx_opset
    return parity


def _write_classifiers(checker: Checker, folder: Path, classes: Classes) -> dict[str, Parity]:
    """Write a classifier from each image encoder, run it on whole images one by one, and compare it with PyTorch.

    ONNX Runtime resizes its pixels, Pillow the model's: that difference is part of what is measured.
    """
    model = checker.model
    inputs = checker.inputs
    render = Renderer(model.info.preprocess)
    weights = class_weights(checker.original.encode_prompts(classes.prompts()))

    def classify(image: Image.Image) -> torch.Tensor:
        return checker.original.images(torch.from_numpy(np.stack([render(image)]))) @ weights.T

    expected, pytorch_seconds = run_timed(classify, inputs.read_images())
    # Labels then index the classes of --classnames, among which the encoders find theirs, too.
    labelled = inputs.task is not None and inputs.measure == ACCURACY
    parity = dict[str, Parity]()
    for kind in ("fp32", *checker.settings.quantize):
        encoder, path = (folder / quantized_name(name, kind) for name in (IMAGE_ENCODER, CLASSIFIER))
        write_classifier(path, encoder, weights.numpy(), classes.names, classes.templates)
        session = OnnxSession(path)
        images = (torch.from_numpy(np.array(image)[None]) for image in inputs.read_images())
        logits, seconds = run_timed(session, images)  # of its outputs the first
        cosines = (logits - (model.logit_bias or 0.0)) / model.logit_scale
        nearest = logits.argmax(dim=1)
        form = _form("classifier", kind)
        parity[form] = Parity(
            precision=kind,
            images=len(logits),
            max_cosine_difference=float((expected - cosines).abs().max()),
            agreement=float((expected.argmax(dim=1) == nearest).double().mean()),
            bytes=path.stat().st_size,
            images_per_second=rate_of(seconds),
            latency_ms=latency_of(seconds),
            pytorch_images_per_second=rate_of(pytorch_seconds),
            zeroshot=checker.compare_answers(nearest.numpy(), gated=kind != "fp32") if labelled else None,
            engine=session.engine,
        )
        validate_parity(form, parity[form], model.info.spec, checker.settings)
    return parity
