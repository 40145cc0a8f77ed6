"""The forms that are folders of weights, open_clip's and Hugging Face's: written, loaded again, and compared."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.export_folder import HF_WEIGHTS
from clipcid_cli.formats.models.export_sidecar import Parity
from clipcid_cli.formats.models.hf_folder import write_hf_folder
from clipcid_cli.formats.models.open_clip_folder import (
    OPEN_CLIP_WEIGHTS,
    is_height_first,
    square_side,
    write_model_folder,
)
from clipcid_cli.runtime.libraries import quiet_libraries
from clipcid_cli.runtime.models.exported import HfClip, hf_towers
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.export.check import Checker, open_towers
from clipcid_cli.steps.export.tokens import TOKENIZER_TEXTS, compare_tokens

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# torchvision, with which transformers resizes, rounds its filter more coarsely than Pillow: of 1,534 photographs the median
# picture's largest difference was 1 of 255 levels, the worst picture's 2. A wrong filter or crop makes tens.
_MAX_LEVELS = 4.0


def write_open_clip(checker: Checker, folder: Path) -> dict[str, Parity]:
    """Write a folder that open_clip loads as ``local-dir:``, load it again, and compare."""
    model = checker.model
    write_model_folder(
        folder,
        model.info.config,
        model.info.preprocess,
        _stored_tensors(checker),
        source=parse_model(model.info.spec).folder,
        tokenizer=model.tokenizer.whole,
    )
    written = load_model(parse_model(str(folder)), model.device)
    same_tokens = torch.equal(written.tokenizer(TOKENIZER_TEXTS), model.tokenizer(TOKENIZER_TEXTS))
    if not same_tokens or written.info.preprocess != model.info.preprocess:
        raise ClipcidError(
            f"open-clip: the written folder gives other {'pixels' if same_tokens else 'tokens'} than {model.info.spec}.",
            "Export from a folder that has the model's own preprocessing and tokenizer files.",
        )
    precision = checker.settings.stored_precision
    return {"open-clip": checker.check("open-clip", precision, open_towers(written), [folder / OPEN_CLIP_WEIGHTS])}


def write_hf(checker: Checker, folder: Path) -> dict[str, Parity]:
    """Write a folder that transformers loads as ``AutoModel`` and ``AutoProcessor``, load it, and compare.

    Compared are rows of the same pixels and tokens, and the pixels and tokens that the folder's own processor makes.
    """
    model = checker.model
    tensors = _stored_tensors(checker)
    with quiet_libraries():
        write_hf_folder(folder, model.info.config, model.info.preprocess, tensors, model.module, model.tokenizer.whole)
    written = HfClip(folder)
    towers = hf_towers(written, checker.original, model)
    parity = checker.check("hf", checker.settings.stored_precision, towers, [folder / HF_WEIGHTS])
    parity.engine = written.engine
    parity.processor = _validate_processor(written, checker)
    parity.tokenizer = compare_tokens("hf", written.prepare_texts, checker)
    return {"hf": parity}


def _stored_tensors(checker: Checker) -> dict[str, torch.Tensor]:
    """Return the state dict in the number format of the folder."""
    dtype = _DTYPES[checker.settings.stored_precision]
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in checker.model.module.state_dict().items()
    }


def _validate_processor(written: HfClip, checker: Checker) -> dict[str, int | float]:
    """Compare pixels with open_clip's: what is over the limit in the median picture is an error.

    Two kinds of pictures transformers prepares in another way, which no setting changes: some it crops one pixel aside, of
    tall ones it resizes the width first. They are counted and left out, the latter with their differences.
    """
    inputs, model = checker.inputs, checker.model
    preprocess = model.info.preprocess
    std = torch.tensor(preprocess["std"]).view(3, 1, 1)
    levels = dict[str, float]()
    of_tall, cosines = list[float](), list[float]()
    aside = 0
    places = zip(inputs.samples, inputs.read_images(), inputs.pixels, checker.expected.images, strict=True)
    for sample, image, pixels, row in places:
        if _is_cropped_aside(preprocess, image.size):
            aside += 1
            continue
        given = written.prepare_image(image)
        difference = float(((given - model.normalize(pixels[None])).abs() * std * 255).max())
        if is_height_first(preprocess, image.size):
            of_tall.append(difference)
            with torch.inference_mode():
                cosines.append(float(written.encode_images(given)[0] @ row))
        else:
            levels[sample.key] = difference
    median = statistics.median(levels.values()) if levels else 0.0
    if median > _MAX_LEVELS:
        worst = max(levels, key=levels.__getitem__)
        raise ClipcidError(
            f"hf: the image processor's pixels differ from open_clip's by {median:.2f} of 255 levels in the median picture "
            f"(allowed {_MAX_LEVELS:.2f}), most in {worst}, by {levels[worst]:.2f}. Nothing was written.",
            "Report this with the model's preprocess_cfg; --format open-clip and onnx are not affected.",
        )
    tall: dict[str, float] = {}
    if of_tall:
        tall = {"max_difference_levels_width_first": round(max(of_tall), 4), "min_cosine_width_first": min(cosines)}
    return {
        "images": len(inputs.samples),
        "max_difference_levels": round(max(levels.values(), default=0.0), 4),
        "cropped_one_pixel_aside": aside,
        "resized_width_first": len(of_tall),
        **tall,
    }


def _is_cropped_aside(preprocess: Mapping[str, Any], size: tuple[int, int]) -> bool:
    """Tell whether transformers crops an image one pixel aside: of a margin of 3 modulo 4 it rounds half down, not up."""
    side = square_side(preprocess["size"])
    assert side is not None, "or it would have been refused"
    shorter, longer = sorted(size)
    return preprocess["resize_mode"] == "shortest" and (side * longer // shorter - side) % 4 == 3
