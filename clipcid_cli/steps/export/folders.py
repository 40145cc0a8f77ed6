"""The model folders of `export`, open_clip's and Hugging Face's: written, loaded again, and compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.hf_config import EOS_ID, HfDescription, describe_as_hf
from clipcid_cli.formats.models.hf_folder import HF_WEIGHTS, write_hf_folder
from clipcid_cli.formats.models.open_clip_folder import WEIGHTS_NAME, write_model_folder
from clipcid_cli.runtime.models.clip_model import ClipModel, load_model
from clipcid_cli.runtime.models.hf_model import HfClip
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.runtime.models.towers import ImageTower, TextTower
from clipcid_cli.steps.export.check import Checker
from clipcid_cli.steps.export.check_inputs import SENTENCES
from clipcid_cli.steps.export.classes import Classes

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

TOKENIZER_TEXTS = ("a photo of a cat.", "two DOGS & 3 birds — naïve café", "word " * 200)

# torchvision, with which transformers resizes, rounds its filter more coarsely than Pillow: at hard edges differences of 2
# of 255 levels were seen. A wrong filter or crop makes tens.
_MAX_LEVELS = 4.0
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """How exports are written.

    Attributes:
        precision: Number format of the stored weights of a folder: ``fp32``, ``fp16`` or ``bf16``.
        opset: Version of ONNX's operators; None where no ONNX file is written.
        quantize: Quantized variants of each ONNX file: ``fp16``, ``int8``.
        dense: Whether the ONNX image encoder also returns patches.
        classes: Classes of the ONNX classifier; None writes none.
        tokenizer_from: Folder whose tokenizer files are copied, where the model was loaded from one.
    """

    precision: str
    opset: int | None
    quantize: tuple[str, ...]
    dense: bool
    classes: Classes | None
    tokenizer_from: Path | None


def describe_hf(model: ClipModel) -> HfDescription:
    """Translate a model's settings into Hugging Face's.

    Raises:
        ClipcidError: naming what cannot be expressed there.
    """
    scale = cast(torch.Tensor, model.module.logit_scale).detach()
    return describe_as_hf(model.info.config, model.info.preprocess, model.info.tokenizer, float(scale))


def write_open_clip(model: ClipModel, folder: Path, checker: Checker, options: ExportOptions) -> dict[str, Any]:
    """Write a folder that open_clip loads as ``local-dir:``, load it again, and compare.

    Returns:
        The comparison, as `parity.json` holds it: one entry.

    Raises:
        ClipcidError: when the loaded folder differs from the model by more than the limit.
    """
    write_model_folder(
        folder,
        model.info.config,
        model.info.preprocess,
        model.module.state_dict(),
        dtype=DTYPES[options.precision],
        tokenizer_from=options.tokenizer_from,
    )
    written = load_model(parse_model(str(folder)), model.device)
    same_tokens = torch.equal(written.tokenizer(list(TOKENIZER_TEXTS)), model.tokenizer(list(TOKENIZER_TEXTS)))
    if not same_tokens or written.info.preprocess != model.info.preprocess:
        raise ClipcidError(
            f"open-clip: the written folder makes other {'pixels' if same_tokens else 'tokens'} than {model.info.spec}.",
            "Export from a folder that has the model's own preprocessing and tokenizer files.",
        )
    towers = {"image": ImageTower(written.module), "text": TextTower(written.module)}
    return {"open-clip": checker.check("open-clip", options.precision, towers, [folder / WEIGHTS_NAME])}


def write_hf(model: ClipModel, folder: Path, checker: Checker, options: ExportOptions) -> dict[str, Any]:
    """Write a folder that transformers loads as ``CLIPModel`` and ``CLIPProcessor``, load it with them, and compare.

    Compared are rows of the same pixels and tokens, and the pixels and tokens that the folder's own processor makes.

    Returns:
        The comparison, as `parity.json` holds it: one entry.

    Raises:
        ClipcidError: when the model cannot be expressed there or differs by more than the limit.
    """
    tokenizer = model.tokenizer.whole
    write_hf_folder(
        folder,
        describe_hf(model),
        model.module.state_dict(),
        dtype=DTYPES[options.precision],
        vocabulary=tokenizer.encoder,
        merges=list(tokenizer.bpe_ranks),
    )
    written = HfClip(folder)
    towers = {"image": written.encode_images, "text": written.encode_texts}
    found = checker.check("hf", options.precision, towers, [folder / HF_WEIGHTS])
    found["engine"] = written.engine
    found["processor"] = _check_processor(model, written, checker)
    found["tokenizer"] = _check_tokenizer(model, written, checker)
    return {"hf": found}


def _check_processor(model: ClipModel, written: HfClip, checker: Checker) -> dict[str, Any]:
    """Compare the pixels of the folder's image processor with open_clip's.

    transformers rounds half of an odd margin down, torchvision to even: where they differ, the crop is shifted by one pixel,
    which no setting of the folder can prevent. Such images are counted, and any other difference is an error.
    """
    inputs = checker.inputs
    std = torch.tensor(model.info.preprocess["std"]).view(3, 1, 1)
    largest, shifted = 0.0, 0
    for start in range(0, len(inputs.openers), _BATCH):
        images = [opener() for opener in inputs.openers[start : start + _BATCH]]
        theirs, ours = written.prepare_images(images), inputs.pixels(model, start, start + len(images))
        if theirs.shape != ours.shape:
            raise ClipcidError(
                f"hf: the image processor makes {list(theirs.shape[1:])}, open_clip {list(ours.shape[1:])}."
            )
        levels = ((theirs - ours).abs() * std * 255).amax(dim=(1, 2, 3))
        for image, level in zip(images, levels.tolist(), strict=True):
            if _is_crop_shifted(image, model.info.preprocess):
                shifted += 1
            else:
                largest = max(largest, level)
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


def _is_crop_shifted(image: Image.Image, preprocess: dict[str, Any]) -> bool:
    """Tell whether the longer side's margin is 3 modulo 4: transformers rounds half of it down, torchvision up."""
    if preprocess["resize_mode"] != "shortest":
        return False
    size = preprocess["size"]
    side = int(size[0] if isinstance(size, list) else size)
    shorter, longer = sorted(image.size)
    return (side * longer // shorter - side) % 4 == 3


def _check_tokenizer(model: ClipModel, written: HfClip, checker: Checker) -> dict[str, Any]:
    """Compare the tokens of the folder's tokenizer with open_clip's, up to the end of each text.

    open_clip first cleans a text (curly quotes, HTML entities, broken encodings), which transformers does not: texts that
    this changes are counted, and must give the same tokens once they are cleaned.
    """
    candidates = checker.inputs.candidates
    prompts = [text for texts in candidates.prompts for text in texts] if candidates is not None else []
    texts = list(dict.fromkeys([*TOKENIZER_TEXTS, *SENTENCES, *checker.inputs.texts, *prompts]))
    ours, theirs = model.tokenizer(texts), written.prepare_texts(texts)
    different = [place for place in range(len(texts)) if not _same_text(ours[place], theirs[place])]
    cleaned = [model.tokenizer.whole.clean_fn(texts[place]) for place in different]
    again = written.prepare_texts(cleaned) if cleaned else theirs[:0]
    wrong = [place for place, tokens in zip(different, again, strict=True) if not _same_text(ours[place], tokens)]
    if wrong:
        raise ClipcidError(
            f"hf: the tokenizer makes other tokens of {_shorten(texts[wrong[0]])!r} than open_clip's "
            f"({len(wrong)} of {len(texts)} texts).",
            "Report this text; --format open-clip and onnx are not affected.",
        )
    return {"texts": len(texts), "same": len(texts) - len(different), "same_once_mended": len(different)}


def _same_text(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Compare two rows of tokens up to the first end token; the text tower does not see the padding."""
    end = int((ours == EOS_ID).int().argmax()) + 1
    return torch.equal(ours[:end], theirs[:end])


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"
