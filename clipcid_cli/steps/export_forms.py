"""The forms of `export`: how each is written, and how far what was written is from the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from clipcid_cli.algorithms.parity import Difference, compare_rows
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.export_folder import IMAGE_ENCODER, TEXT_ENCODER
from clipcid_cli.formats.model_folder import write_model_folder
from clipcid_cli.formats.onnx_file import write_onnx
from clipcid_cli.runtime.encoder import ClipModel, load_model
from clipcid_cli.runtime.model_names import parse_model
from clipcid_cli.runtime.onnx_session import OnnxSession
from clipcid_cli.runtime.towers import ImageTower, TextTower
from clipcid_cli.steps.parity_inputs import ParityInputs

# One sample, two, an odd number, and more than a vector register holds.
BATCH_SIZES = (1, 2, 5, 16)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Encode = Callable[[torch.Tensor], torch.Tensor]
_PROBES = ["a photo of a cat.", "two DOGS & 3 birds — naïve café", "word " * 200]


@dataclasses.dataclass(frozen=True)
class FormOptions:
    """What the forms need to know.

    Attributes:
        precision: Number format of the stored weights: ``fp32``, ``fp16`` or ``bf16``.
        opset: Version of ONNX's operators.
        limit: Largest difference allowed.
        tokenizer_from: Folder whose tokenizer files go along, where the model came from one.
    """

    precision: str
    opset: int
    limit: Difference
    tokenizer_from: Path | None


def write_open_clip(model: ClipModel, folder: Path, samples: ParityInputs, options: FormOptions) -> dict[str, Any]:
    """Write a folder that open_clip loads as ``local-dir:``, load it again, and compare.

    Returns:
        The comparison of each tower, as `parity.json` holds it.

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
    same_tokens = torch.equal(written.tokenizer(_PROBES), model.tokenizer(_PROBES))
    if not same_tokens or written.info.preprocess != model.info.preprocess:
        raise ClipcidError(
            f"open-clip: the written folder gives other {'pixels' if same_tokens else 'tokens'} than {model.info.spec}.",
            "Export from a folder that holds the model's own preprocessing and tokenizer files.",
        )
    towers = {"image": ImageTower(written.module), "text": TextTower(written.module)}
    return compare_towers("open-clip", model, towers, samples, options.limit)


def write_onnx_encoders(model: ClipModel, folder: Path, samples: ParityInputs, options: FormOptions) -> dict[str, Any]:
    """Write both encoders as ONNX files with a dynamic batch, run them with ONNX Runtime, and compare.

    The image encoder takes ``pixel_values``, the text encoder ``input_ids``; they give unit rows, ``image_embeds`` and
    ``text_embeds`` (Hugging Face's names). How pixels and tokens are made is in each file's metadata.

    Returns:
        The comparison of each tower, as `parity.json` holds it.

    Raises:
        ClipcidError: when an encoder cannot be expressed in ONNX or differs from the model by more than the limit.
    """
    metadata = {
        "model": model.info.spec,
        "weights_hash": model.info.weights_hash,
        "preprocess": json.dumps(model.info.preprocess),
        "tokenizer": model.info.tokenizer,
        "context_length": str(model.info.context_length),
        "logit_scale": repr(model.logit_scale),
        "output": "unit rows",
    }
    write_onnx(
        folder / IMAGE_ENCODER,
        ImageTower(model.module).eval(),
        samples.pixels[:2],
        input_name="pixel_values",
        output_name="image_embeds",
        opset=options.opset,
        metadata=metadata,
    )
    write_onnx(
        folder / TEXT_ENCODER,
        TextTower(model.module).eval(),
        samples.tokens[:2],
        input_name="input_ids",
        output_name="text_embeds",
        opset=options.opset,
        metadata=metadata,
    )
    threads = torch.get_num_threads()
    sessions = {
        "image": OnnxSession(folder / IMAGE_ENCODER, threads),
        "text": OnnxSession(folder / TEXT_ENCODER, threads),
    }
    towers = compare_towers("onnx", model, sessions, samples, options.limit)
    return {
        tower: values | {"opset": options.opset, "engine": sessions["image"].engine} for tower, values in towers.items()
    }


def compare_towers(
    form: str, model: ClipModel, towers: Mapping[str, Encode], samples: ParityInputs, limit: Difference
) -> dict[str, Any]:
    """Compare both towers of a written form with the model, in fp32 on the CPU, at each batch size.

    Args:
        form: Name of the form, for the error.
        model: The model in PyTorch, on the CPU.
        towers: ``image`` and ``text``: prepared inputs to unit rows.
        samples: The inputs, at least as many as the largest batch.
        limit: Largest difference allowed.

    Returns:
        For each tower ``batch_sizes, samples, max_difference, min_cosine``.

    Raises:
        ClipcidError: when a difference is over the limit; says which, and by how much.
    """
    references: dict[str, Encode] = {"image": ImageTower(model.module), "text": TextTower(model.module)}
    inputs = {"image": samples.pixels, "text": samples.tokens}
    found: dict[str, Any] = {}
    for tower, encode in towers.items():
        difference = Difference()
        with torch.inference_mode():
            for size in BATCH_SIZES:
                for batch in inputs[tower].split(size):  # type: ignore[no-untyped-call]  # torch leaves split untyped
                    difference = difference.merge(compare_rows(references[tower](batch), encode(batch)))
        if not difference.within(limit):
            raise ClipcidError(
                f"{form}: the {tower} encoder differs from {model.info.spec} by up to {difference.max_difference:.2e} "
                f"(allowed {limit.max_difference:.0e}), cosine down to {difference.min_cosine:.7f} "
                f"(allowed {limit.min_cosine}). Nothing was written.",
                "Use --precision fp32, or allow more with --max-difference.",
            )
        found[tower] = {
            "batch_sizes": list(BATCH_SIZES),
            "samples": len(inputs[tower]),
            "max_difference": difference.max_difference,
            "min_cosine": difference.min_cosine,
        }
    return found
