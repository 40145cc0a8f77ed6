"""An export folder: the names of its files, what each holds, and which files of others are left alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.export_sidecar import ExportSidecar
from clipcid_cli.formats.models.open_clip_folder import (
    HF_CONFIG,
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    TOKENIZER_CONFIG,
)
from clipcid_cli.formats.output import unfinished
from clipcid_cli.formats.sidecar import read_sidecar, sidecar_path

HF_WEIGHTS = "model.safetensors"
SPECIAL_TOKENS = "special_tokens_map.json"
VOCABULARY = "vocab.json"
MERGES = "merges.txt"
TOKENIZER = "tokenizer.json"
ST_MODULES = "modules.json"
ST_SETTINGS = "sentence_bert_config.json"
IMAGE_ENCODER = "image_encoder.onnx"
TEXT_ENCODER = "text_encoder.onnx"
CLASSIFIER = "classifier.onnx"
IMAGE_PROGRAM = "image_encoder.pte"
TEXT_PROGRAM = "text_encoder.pte"
ENCODERS = "encoders.json"
WEB = "web"
PARITY = "parity.json"
CARD = "README.md"

# Files of a Hugging Face tokenizer, as transformers writes them.
_TOKENIZER_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    "added_tokens.json",
    "vocab.txt",
    VOCABULARY,
    MERGES,
    "spiece.model",
    "sentencepiece.bpe.model",
)


def quantized_name(name: str, kind: str) -> str:
    """Return the name of a quantized variant, as transformers.js names them: ``image_encoder_int8.onnx``."""
    stem, _, form = name.rpartition(".")
    return name if kind == "fp32" else f"{stem}_{kind}.{form}"


# Where transformers.js looks for the encoders, by their names here.
TRANSFORMERS_JS = {
    quantized_name(name, kind): f"onnx/{theirs}{suffix}.onnx"
    for name, theirs in ((IMAGE_ENCODER, "vision_model"), (TEXT_ENCODER, "text_model"))
    for kind, suffix in (("fp32", ""), ("fp16", "_fp16"), ("int8", "_quantized"))
}

# The page in WEB, and what it runs by.
INDEX = "index.html"
ENGINE = "ort.wasm.bundle.min.mjs"
ENGINE_BINARY = "ort-wasm-simd-threaded.wasm"
JS_TOKENIZERS = "tokenizers.min.mjs"
JS_TOKENIZERS_LICENSE = "tokenizers.LICENSE"

# The page that searches images, and what it reads.
SEARCH = "search.html"
SEARCH_IMAGES = "search_images.json"
SEARCH_ROWS = "search_rows.bin"
SEARCH_THUMBNAILS = "search_thumbnails.bin"

_IN_WEB = (
    *(INDEX, ENGINE, ENGINE_BINARY, JS_TOKENIZERS, JS_TOKENIZERS_LICENSE, TOKENIZER, *TRANSFORMERS_JS),
    *(SEARCH, SEARCH_IMAGES, SEARCH_ROWS, SEARCH_THUMBNAILS),
)

# What the files of an export are, as its model card says.
CONTENT = {
    OPEN_CLIP_CONFIG: "architecture and preprocessing, as open_clip reads them",
    OPEN_CLIP_WEIGHTS: "weights, as open_clip reads them",
    HF_CONFIG: "architecture, as transformers reads it",
    HF_WEIGHTS: "weights, as transformers reads them",
    "preprocessor_config.json": "preprocessing, as transformers reads it",
    ST_MODULES: "what sentence-transformers makes of the folder",
    ST_SETTINGS: "how sentence-transformers pads texts",
    ENCODERS: "how the inputs of the ExecuTorch programs are made",
    TOKENIZER: "texts to tokens, padded and cut to the model's length",
    f"{WEB}/{INDEX}": "a page that classifies pictures in a browser, for any static server; it needs only this folder",
    f"{WEB}/{SEARCH}": "a page that searches images by text in a browser",
    f"{WEB}/{SEARCH_IMAGES}": "names and captions of the images, and the bytes of each thumbnail",
    f"{WEB}/{SEARCH_ROWS}": "their embeddings, a row an image: int16, little-endian, in units of 1/32767",
    f"{WEB}/{SEARCH_THUMBNAILS}": "their thumbnails, WebP files one after another",
    PARITY: "how each export was compared with the original",
} | {
    quantized_name(name, kind): what + words
    for name, what in (
        (IMAGE_ENCODER, "prepared pixels to unit rows"),
        (TEXT_ENCODER, "tokens to unit rows"),
        (IMAGE_PROGRAM, "prepared pixels of one image to a unit row, by ExecuTorch"),
        (TEXT_PROGRAM, "tokens of one text to a unit row, by ExecuTorch"),
        (CLASSIFIER, "bytes of images of any size to one score per class; class names are in its metadata"),
    )
    for kind, words in (("fp32", ""), ("fp16", "; 16-bit weights"), ("int8", "; 8-bit weights"))
}
CONTENT |= {theirs: f"`{ours}` under the name that transformers.js reads" for ours, theirs in TRANSFORMERS_JS.items()}

# What an export may write; weights of ONNX files above 2 GB go to a second file.
_WRITTEN = (
    *CONTENT,
    *_TOKENIZER_FILES,
    *(f"{name}.data" for name in CONTENT if name.endswith(".onnx")),
    *(f"{WEB}/{name}" for name in _IN_WEB),
    CARD,
)


def validate_export_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder with files that an export may replace and did not write."""
    if unfinished(folder, "export") is not None:
        return  # an unfinished export, which refused such files when it began
    try:
        sidecar = read_sidecar(sidecar_path(folder, "export"), ExportSidecar)
    except ClipcidError:
        if overwrite:
            return  # an export of an earlier version, or with a damaged sidecar
        raise
    known = [] if sidecar is None else sidecar.written
    foreign = [name for name in dict.fromkeys(_WRITTEN) if (folder / name).exists() and name not in known]
    if foreign:
        raise ClipcidError(
            f"{folder} holds files that clipcid export did not write and would replace: {', '.join(foreign)}.",
            "Give another folder with --out, or move them away.",
        )


def list_written(folder: Path) -> list[str]:
    """List the files of an export and of the folders in it, without scratch."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(name.as_posix() for name in names if not name.parts[0].startswith("."))


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name, which takes no space; where the file system has no hard links, copy it."""
    target.parent.mkdir(exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def sync_files(paths: Iterable[Path]) -> None:
    """Wait until files are on the disk, which the libraries that wrote some of them do not."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
