"""The ONNX classifier of `export`: preprocessing, image encoder and class weights in one file, compared on whole images."""

from __future__ import annotations

import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.export_folder import CLASSIFIER, IMAGE_ENCODER, quantized_name
from clipcid_cli.formats.models.onnx_classifier import LOGITS, write_classifier
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.onnx_session import OnnxSession
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.export.check import Checker
from clipcid_cli.steps.export.check_inputs import ACCURACY
from clipcid_cli.steps.export.classes import encode_candidates
from clipcid_cli.steps.export.folders import ExportOptions

# Largest difference allowed of a cosine of image and class. fp32: about one byte in 10,000 is resized to a neighbouring
# value. int8 is judged by its predictions.
_COSINE_LIMITS = {"fp32": 1e-3, "fp16": 5e-3, "int8": math.inf}


def write_classifiers(model: ClipModel, folder: Path, checker: Checker, options: ExportOptions) -> dict[str, Any]:
    """Write a classifier from each image encoder, and compare its cosines and predictions with PyTorch's.

    Class weights stay in 32 bits.

    Args:
        folder: Holds the image encoders, of 32 bits and quantized.

    Returns:
        The comparisons, as `parity.json` holds them: ``classifier`` and its quantized variants.

    Raises:
        ClipcidError: when a classifier does not fit into one file or differs from the model by more than the limit.
    """
    classes = options.classes
    assert classes is not None
    prompts = [classes.prompts(name) for name in classes.names]
    with torch.inference_mode():
        weights = encode_candidates(prompts, model.tokenizer, checker.references["text"])
    found: dict[str, Any] = {}
    for kind in ("fp32", *options.quantize):
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
        found[name] = _check_classifier(name, kind, path, model, weights, checker)
    return found


def _check_classifier(
    name: str, kind: str, path: Path, model: ClipModel, weights: torch.Tensor, checker: Checker
) -> dict[str, Any]:
    """Run the classifier on whole images one by one, and compare its cosines and predictions with PyTorch's.

    ONNX Runtime resizes its pixels, Pillow the model's: that difference is part of what is measured.
    """
    session = OnnxSession(path, torch.get_num_threads())
    inputs, transform, encode = checker.inputs, model.transform(), checker.references["image"]
    bias = model.logit_bias

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
            f"{name}: a cosine of image and class differs by {largest:.2e} from {model.info.spec} (allowed "
            f"{_COSINE_LIMITS[kind]:.0e}). Nothing was written.",
            "Omit --classnames." if kind == "fp32" else f"Omit --quantize {kind}.",
        )
    top = torch.tensor(tops)
    # Labels then index the classes of --classnames, which are the candidates of the encoders, too.
    labelled = inputs.candidates is not None and inputs.candidates.measure == ACCURACY
    return {
        "precision": kind,
        "images": len(tops),
        "max_cosine_difference": largest,
        "agreement": float((top[:, 0] == top[:, 1]).double().mean()),
        "bytes": path.stat().st_size,
        "images_per_second": round(1 / statistics.median(seconds), 2),
        "pytorch_images_per_second": round(1 / statistics.median(pytorch_seconds), 2),
        "zeroshot": checker.compare_predictions(name, top[:, 1], gated=kind != "fp32") if labelled else None,
        "engine": session.engine,
    }
