"""The model folders of `export`, open_clip's and Hugging Face's: written, loaded again, and compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.export_folder import HF_WEIGHTS, OPEN_CLIP_WEIGHTS
from clipcid_cli.formats.models.hf_folder import EOS_ID, write_hf_folder
from clipcid_cli.formats.models.open_clip_folder import write_model_folder
from clipcid_cli.formats.models.pixels import square_side
from clipcid_cli.formats.sidecar import Parity
from clipcid_cli.runtime.libraries import quiet_libraries
from clipcid_cli.runtime.models.clip_model import load_model
from clipcid_cli.runtime.models.exported import HfClip
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.export.check import Checker, towers_of
from clipcid_cli.steps.export.inputs import SENTENCES

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_TOKENIZER_TEXTS = ("a photo of a cat.", "two DOGS & 3 birds — naïve café", "word " * 200)

# torchvision, with which transformers resizes, rounds its filter more coarsely than Pillow: at hard edges differences of 2
# of 255 levels were seen. A wrong filter or crop makes tens.
_MAX_LEVELS = 4.0


def write_open_clip(checker: Checker, folder: Path) -> dict[str, Parity]:
    """Write a folder that open_clip loads as ``local-dir:``, load it again, and compare."""
    model = checker.model
    source = parse_model(model.info.spec).path
    write_model_folder(
        folder, model.info.config, model.info.preprocess, _stored_tensors(checker), tokenizer_from=source
    )
    written = load_model(parse_model(str(folder)), model.device)
    texts = [*_TOKENIZER_TEXTS]
    same_tokens = torch.equal(written.tokenizer(texts), model.tokenizer(texts))
    if not same_tokens or written.info.preprocess != model.info.preprocess:
        raise ClipcidError(
            f"open-clip: the written folder makes other {'pixels' if same_tokens else 'tokens'} than {model.info.spec}.",
            "Export from a folder that has the model's own preprocessing and tokenizer files.",
        )
    weights = [folder / OPEN_CLIP_WEIGHTS]
    precision = checker.settings.stored_precision
    return {"open-clip": checker.check("open-clip", precision, towers_of(written), weights)}


def write_hf(checker: Checker, folder: Path) -> dict[str, Parity]:
    """Write a folder that transformers loads as ``CLIPModel`` and ``CLIPProcessor``, load it, and compare.

    Compared are rows of the same pixels and tokens, and the pixels and tokens that the folder's own processor makes.
    """
    model = checker.model
    tensors = _stored_tensors(checker)
    with quiet_libraries():
        write_hf_folder(folder, model.info.config, model.info.preprocess, tensors, model.tokenizer.whole)
    written = HfClip(folder)
    inference = torch.inference_mode()
    towers = dataclasses.replace(
        checker.original,
        images=inference(lambda pixels: written.encode_images(model.normalize(pixels))),
        texts=inference(written.encode_texts),
        dense=None,
    )
    found = checker.check("hf", checker.settings.stored_precision, towers, [folder / HF_WEIGHTS])
    found.engine = written.engine
    found.processor = _check_processor(written, checker)
    found.tokenizer = _check_tokenizer(written, checker)
    return {"hf": found}


def _stored_tensors(checker: Checker) -> dict[str, torch.Tensor]:
    """Return the state dict in the number format of the folder."""
    dtype = _DTYPES[checker.settings.stored_precision]
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in checker.model.module.state_dict().items()
    }


def _check_processor(written: HfClip, checker: Checker) -> dict[str, int | float]:
    """Compare pixels with open_clip's. transformers crops some images one pixel aside: these are counted and left out."""
    inputs, preprocess = checker.inputs, checker.model.info.preprocess
    std = torch.tensor(preprocess["std"]).view(3, 1, 1)
    side = square_side(preprocess["size"])
    assert side is not None, "or it would have been refused"
    largest, shifted = 0.0, 0
    for image, pixels in zip(inputs.read_images(), inputs.pixels, strict=True):
        shorter, longer = sorted(image.size)
        # Of a longer side's margin of 3 modulo 4, transformers rounds half down, torchvision up.
        if preprocess["resize_mode"] == "shortest" and (side * longer // shorter - side) % 4 == 3:
            shifted += 1
            continue
        difference = written.prepare_images([image]) - checker.model.normalize(pixels[None])
        largest = max(largest, float((difference.abs() * std * 255).max()))
    if largest > _MAX_LEVELS:
        raise ClipcidError(
            f"hf: the image processor's pixels differ from open_clip's by up to {largest:.1f} of 255 levels (allowed "
            f"{_MAX_LEVELS:.0f}).",
            "Report this with the model's preprocess_cfg; --format open-clip and onnx are not affected.",
        )
    return {
        "images": len(inputs.samples),
        "max_difference_levels": round(largest, 4),
        "cropped_one_pixel_aside": shifted,
    }


def _check_tokenizer(written: HfClip, checker: Checker) -> dict[str, int]:
    """Compare the tokens of the folder's tokenizer with open_clip's.

    open_clip first cleans a text (curly quotes, HTML entities, broken encodings), which transformers does not: texts that
    this changes are counted, and must give the same tokens once they are cleaned.
    """
    candidates, tokenizer = checker.inputs.candidates, checker.model.tokenizer
    prompts = [text for texts in candidates.prompts for text in texts] if candidates is not None else []
    texts = list(dict.fromkeys([*_TOKENIZER_TEXTS, *SENTENCES, *checker.inputs.texts, *prompts]))
    mended = _find_different(texts, tokenizer(texts), written.prepare_texts(texts))
    if mended:
        cleaned = written.prepare_texts([tokenizer.whole.clean_fn(text) for text in mended])
        if different := _find_different(mended, tokenizer(mended), cleaned):
            raise ClipcidError(
                f"hf: the tokenizer makes other tokens of {different[0][:60]!r} than open_clip's.",
                "Report this text; --format open-clip and onnx are not affected.",
            )
    return {"texts": len(texts), "same": len(texts) - len(mended), "same_once_mended": len(mended)}


def _find_different(texts: list[str], ours: torch.Tensor, theirs: torch.Tensor) -> list[str]:
    """Return the texts whose tokens differ before the end of the text; the text tower does not see the padding."""
    padding = (ours == EOS_ID).cumsum(dim=1) - (ours == EOS_ID).int() > 0
    same = ((ours == theirs) | padding).all(dim=1)
    return [text for text, equal in zip(texts, same.tolist(), strict=True) if not equal]
