"""An export folder: the names of its files, what they hold, and how all of them appear at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.output import plan_path, read_sidecar, sidecar_path

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
HF_CONFIG = "config.json"
HF_WEIGHTS = "model.safetensors"
SPECIAL_TOKENS = "special_tokens_map.json"
VOCABULARY = "vocab.json"
MERGES = "merges.txt"
IMAGE_ENCODER = "image_encoder.onnx"
TEXT_ENCODER = "text_encoder.onnx"
CLASSIFIER = "classifier.onnx"
PARITY = "parity.json"
CARD = "README.md"

# Files of a Hugging Face tokenizer, which open_clip, too, reads from the model's folder.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    SPECIAL_TOKENS,
    "added_tokens.json",
    "vocab.txt",
    VOCABULARY,
    MERGES,
    "spiece.model",
    "sentencepiece.bpe.model",
)

_WORDS = {"fp32": "", "fp16": "; 16-bit weights", "int8": "; 8-bit weights"}


def quantized_name(name: str, kind: str) -> str:
    """Return the name of a quantized variant, as transformers.js names them: ``image_encoder_int8.onnx``."""
    return name if kind == "fp32" else name.replace(".onnx", f"_{kind}.onnx")


# What the files of an export are, as its model card says.
CONTENT = {
    OPEN_CLIP_CONFIG: "architecture and preprocessing, as open_clip reads them",
    OPEN_CLIP_WEIGHTS: "weights, as open_clip reads them",
    HF_CONFIG: "architecture, as transformers reads it",
    HF_WEIGHTS: "weights, as transformers reads them",
    "preprocessor_config.json": "preprocessing, as transformers reads it",
    "tokenizer.json": "CLIP's byte-pair encoding",
    PARITY: "how each export was compared with the original",
} | {
    quantized_name(name, kind): what + words
    for name, what in (
        (IMAGE_ENCODER, "prepared pixels to unit rows"),
        (TEXT_ENCODER, "tokens to unit rows"),
        (CLASSIFIER, "bytes of images of any size to one score per class; class names are in its metadata"),
    )
    for kind, words in _WORDS.items()
}

_HF_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", SPECIAL_TOKENS, VOCABULARY, MERGES)
# An export removes these files of an earlier one, whatever its formats.
_REPLACED = (
    *CONTENT,
    *_HF_TOKENIZER,
    *(f"{name}.data" for name in CONTENT if name.endswith(".onnx")),  # weights above 2 GB
    CARD,
)
_BUILDING = ".partial"


def refuse_foreign_folder(folder: Path, formats: Iterable[str]) -> None:
    """Refuse a folder with files that `export` would replace or remove and did not write."""
    if plan_path(folder, "export").exists():
        return  # an unfinished export, which refused such files when it began
    known = (read_sidecar(sidecar_path(folder, "export")) or {}).get("written", [])
    names = dict.fromkeys([*_REPLACED, _BUILDING, *(TOKENIZER_FILES if "open-clip" in formats else ())])
    foreign = [name for name in names if (folder / name).exists() and name not in known]
    if foreign:
        raise ClipcidError(
            f"{folder} holds files that clipcid export did not write and would replace: {', '.join(foreign)}.",
            "Give another folder with --out, or move them away.",
        )


@contextmanager
def build_export(folder: Path) -> Iterator[Path]:
    """Build an export in a hidden folder.

    Args:
        folder: The export folder, locked by the caller.

    Yields:
        An empty hidden folder to write into. When the block ends without an error, the files of an earlier export are
        removed and the new ones moved to `folder`; when it raises, the new ones are removed and `folder` is untouched.
    """
    building = folder / _BUILDING
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        made = sorted(building.iterdir())
        for path in made:  # libraries wrote some of them, and do not wait for the disk
            with path.open("rb") as file:
                os.fsync(file.fileno())
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    for name in _REPLACED:
        (folder / name).unlink(missing_ok=True)
    for path in made:
        path.replace(folder / path.name)
    building.rmdir()
