"""The model folders of `export`, open_clip's and Hugging Face's: written, loaded again, and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.export_folder import HF_WEIGHTS, OPEN_CLIP_WEIGHTS
from clipcid_cli.formats.models.hf_folder import EOS_ID, write_hf_folder
from clipcid_cli.formats.models.open_clip_folder import write_model_folder
from clipcid_cli.formats.models.pixels import square_side
from clipcid_cli.runtime.models.clip_model import load_model
from clipcid_cli.runtime.models.hf_model import HfClip
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.runtime.models.preprocess import normalize_pixels
from clipcid_cli.runtime.models.towers import ImageTower, TextTower
from clipcid_cli.runtime.quiet import quiet_libraries
from clipcid_cli.steps.export.check import Checker
from clipcid_cli.steps.export.check_inputs import SENTENCES

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

TOKENIZER_TEXTS = ("a photo of a cat.", "two DOGS & 3 birds — naïve café", "word " * 200)

# torchvision, with which transformers resizes, rounds its filter more coarsely than Pillow: at hard edges differences of 2
# of 255 levels were seen. A wrong filter or crop makes tens.
_MAX_LEVELS = 4.0


def write_open_clip(checker: Checker, folder: Path) -> dict[str, Any]:
    """Write a folder that open_clip loads as ``local-dir:``, load it again, and compare: its entry in `parity.json`."""
    model, precision = checker.model, checker.settings.stored_precision
    write_model_folder(
        folder,
        model.info.config,
        model.info.preprocess,
        model.module.state_dict(),
        dtype=DTYPES[precision],
        tokenizer_from=parse_model(model.info.spec).path,
    )
    written = load_model(parse_model(str(folder)), model.device)
    same_tokens = torch.equal(written.tokenizer(list(TOKENIZER_TEXTS)), model.tokenizer(list(TOKENIZER_TEXTS)))
    if not same_tokens or written.info.preprocess != model.info.preprocess:
        raise ClipcidError(
            f"open-clip: the written folder makes other {'pixels' if same_tokens else 'tokens'} than {model.info.spec}.",
            "Export from a folder that has the model's own preprocessing and tokenizer files.",
        )
    encoders = {"image": ImageTower(written.module), "text": TextTower(written.module)}
    return checker.check("open-clip", precision, encoders, [folder / OPEN_CLIP_WEIGHTS])


def write_hf(checker: Checker, folder: Path) -> dict[str, Any]:
    """Write a folder that transformers loads as ``CLIPModel`` and ``CLIPProcessor``, load it, and compare: its entry.

    Compared are rows of the same pixels and tokens, and the pixels and tokens that the folder's own processor makes.
    """
    model, precision = checker.model, checker.settings.stored_precision
    tokenizer = model.tokenizer.whole
    with quiet_libraries():
        write_hf_folder(
            folder,
            model.info.config,
            model.info.preprocess,
            model.module.state_dict(),
            dtype=DTYPES[precision],
            vocabulary=tokenizer.encoder,
            merges=list(tokenizer.bpe_ranks),
        )
    written = HfClip(folder)
    encoders = {"image": written.encode_images, "text": written.encode_texts}
    return checker.check("hf", precision, encoders, [folder / HF_WEIGHTS]) | {
        "engine": written.engine,
        "processor": _check_processor(written, checker),
        "tokenizer": _check_tokenizer(written, checker),
    }


def _check_processor(written: HfClip, checker: Checker) -> dict[str, Any]:
    """Compare pixels with open_clip's. transformers crops some images one pixel aside: these are counted and left out."""
    inputs, preprocess = checker.inputs, checker.model.info.preprocess
    std = torch.tensor(preprocess["std"]).view(3, 1, 1)
    largest, shifted = 0.0, 0
    for opener, prepared in zip(inputs.openers, inputs.images, strict=True):
        image = opener()
        theirs, ours = written.prepare_images([image]), normalize_pixels(prepared[None], preprocess)
        if _is_crop_shifted(image.size, preprocess):
            shifted += 1
        else:
            largest = max(largest, float(((theirs - ours).abs() * std * 255).max()))
    if largest > _MAX_LEVELS:
        raise ClipcidError(
            f"hf: the image processor's pixels differ from open_clip's by up to {largest:.1f} of 255 levels (allowed "
            f"{_MAX_LEVELS:.0f}).",
            "Report this with the model's preprocess_cfg; --format open-clip and onnx are not affected.",
        )
    return {
        "images": len(inputs.openers),
        "max_difference_levels": round(largest, 4),
        "cropped_one_pixel_aside": shifted,
    }


def _is_crop_shifted(size: tuple[int, int], preprocess: dict[str, Any]) -> bool:
    """Tell whether the longer side's margin is 3 modulo 4: transformers rounds half of it down, torchvision up."""
    side = square_side(preprocess["size"])
    assert side is not None
    shorter, longer = sorted(size)
    return preprocess["resize_mode"] == "shortest" and (side * longer // shorter - side) % 4 == 3


def _check_tokenizer(written: HfClip, checker: Checker) -> dict[str, Any]:
    """Compare the tokens of the folder's tokenizer with open_clip's, up to the end of each text.

    open_clip first cleans a text (curly quotes, HTML entities, broken encodings), which transformers does not: texts that
    this changes are counted, and must give the same tokens once they are cleaned.
    """
    candidates, model = checker.inputs.candidates, checker.model
    prompts = [text for texts in candidates.prompts for text in texts] if candidates is not None else []
    texts = list(dict.fromkeys([*TOKENIZER_TEXTS, *SENTENCES, *checker.inputs.texts, *prompts]))
    mended = 0
    for text, ours, theirs in zip(texts, model.tokenizer(texts), written.prepare_texts(texts), strict=True):
        if _same_text(ours, theirs):
            continue
        mended += 1
        if not _same_text(ours, written.prepare_texts([model.tokenizer.whole.clean_fn(text)])[0]):
            raise ClipcidError(
                f"hf: the tokenizer makes other tokens of {text[:60]!r} than open_clip's.",
                "Report this text; --format open-clip and onnx are not affected.",
            )
    return {"texts": len(texts), "same": len(texts) - mended, "same_once_mended": mended}


def _same_text(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Compare two rows of tokens up to the first end token; the text tower does not see the padding."""
    end = int((ours == EOS_ID).int().argmax()) + 1
    return torch.equal(ours[:end], theirs[:end])
