"""A model folder in open_clip's format: ``open_clip_config.json`` and ``open_clip_model.safetensors``.

``open_clip.create_model_and_transforms("local-dir:FOLDER")`` reads it in a process that does not know clipcid.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL
import torch
from safetensors.torch import save

from clipcid_cli.formats.files import write_bytes, write_error, write_json

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
# Of a text tower of Hugging Face, and of its tokenizer.
HF_CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

# Filters that Hugging Face and ONNX have too: PIL's numbers, as Hugging Face stores them.
RESAMPLE = {"bilinear": 2, "bicubic": 3}

# Pillow resizes one side after the other, in bytes, so the order shows where a byte is clipped in between. Until version 13
# the width came first; since then the height does where it shrinks by more than twice as many pixels as the width.
HEIGHT_MAY_BE_FIRST = int(PIL.__version__.partition(".")[0]) >= 13


def write_model_folder(
    folder: Path,
    config: Mapping[str, Any],
    preprocess: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    source: Path | None = None,
    tokenizer: Any = None,
) -> None:
    """Write a model folder. The configuration is written last, so a folder that has one is complete.

    Args:
        tensors: State dict of the open_clip module, in any number format.
        source: Model folder from which the configuration of a Hugging Face text tower is copied.
        tokenizer: open_clip's, as it was loaded; where it is Hugging Face's, its files are written.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(folder / OPEN_CLIP_WEIGHTS, save(stored, metadata={"format": "pt"}))
    text = config["text_cfg"]
    if text.get("hf_model_name") and source is not None and (source / HF_CONFIG).is_file():
        shutil.copyfile(source / HF_CONFIG, folder / HF_CONFIG)
        _drop_code(folder / HF_CONFIG)
    if text.get("hf_tokenizer_name") and tokenizer is not None:
        with refusals_of_the_system(folder):
            tokenizer.save_pretrained(folder)
        _drop_code(folder / TOKENIZER_CONFIG)
    write_json(folder / OPEN_CLIP_CONFIG, {"model_cfg": dict(config), "preprocess_cfg": dict(preprocess)})


def _drop_code(path: Path) -> None:
    """Remove the entry by which transformers would run code of the model, which was not run here and is not copied."""
    content = json.loads(path.read_bytes()) if path.exists() else {}
    if content.pop("auto_map", None) is not None:
        write_json(path, content)


@contextmanager
def refusals_of_the_system(folder: Path) -> Iterator[None]:
    """Name a full disk as such: safetensors and tokenizers raise errors of their own, which end in its number."""
    try:
        yield
    except Exception as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise write_error(folder, OSError(int(code[1]), os.strerror(int(code[1])))) from error


def square_side(size: Any) -> int | None:
    """Return the side of a square given as one number or two; None when it is not square."""
    if isinstance(size, list | tuple):
        return int(size[0]) if len(set(size)) == 1 else None
    return int(size)


def is_height_first(preprocess: Mapping[str, Any], size: tuple[int, int]) -> bool:
    """Tell whether Pillow resizes the height of an image, of this width and height, before its width."""
    side = square_side(preprocess["size"])
    assert side is not None, "of models whose pixels Hugging Face and ONNX can express"
    shorter = min(size)
    squash = preprocess["resize_mode"] == "squash"
    width, height = (length - (side if squash else side * length // shorter) for length in size)
    return HEIGHT_MAY_BE_FIRST and height > max(0, 2 * width)


def pixel_problems(preprocess: Mapping[str, Any]) -> list[str]:
    """Name the entries of a ``preprocess_cfg`` that neither Hugging Face nor an ONNX graph can express."""
    expressible = {
        "size": square_side(preprocess["size"]) is not None,
        "resize_mode": preprocess["resize_mode"] in ("shortest", "squash"),
        "interpolation": preprocess["interpolation"] in RESAMPLE,
    }
    return [f"preprocess_cfg.{name} is {preprocess[name]!r}" for name, good in expressible.items() if not good]
