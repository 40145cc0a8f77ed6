"""An export folder: its file names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.hf_folder import HF_CONFIG, HF_PREPROCESSOR, HF_TOKENIZER, HF_WEIGHTS
from clipcid_cli.formats.models.open_clip_folder import CONFIG_NAME, TOKENIZER_NAMES, WEIGHTS_NAME
from clipcid_cli.formats.output import unfinished
from clipcid_cli.formats.sidecar import ExportSidecar, read_sidecar, sidecar_path

IMAGE_ENCODER = "image_encoder.onnx"
TEXT_ENCODER = "text_encoder.onnx"
CLASSIFIER = "classifier.onnx"
PARITY = "parity.json"
CARD = "README.md"

_KINDS = ("fp32", "fp16", "int8")


def quantized_name(name: str, kind: str) -> str:
    """Return the name of a quantized variant, as transformers.js names them: ``image_encoder_int8.onnx``."""
    return name if kind == "fp32" else name.replace(".onnx", f"_{kind}.onnx")


_ONNX_FILES = tuple(quantized_name(name, kind) for name in (IMAGE_ENCODER, TEXT_ENCODER, CLASSIFIER) for kind in _KINDS)
_OF_FORMAT = {
    "open-clip": (CONFIG_NAME, WEIGHTS_NAME),
    "hf": (HF_CONFIG, HF_WEIGHTS, HF_PREPROCESSOR, *HF_TOKENIZER),
    "onnx": (*_ONNX_FILES, *(f"{name}.data" for name in _ONNX_FILES)),  # weights above 2 GB
}
_REPLACED = (*(name for names in _OF_FORMAT.values() for name in names), PARITY, CARD)


def refuse_foreign_folder(folder: Path, formats: Iterable[str], *, overwrite: bool) -> None:
    """Refuse a folder with files that `export` would replace and did not write."""
    if unfinished(folder, "export") is not None:
        return  # an unfinished export, which refused such files when it began
    try:
        sidecar = read_sidecar(sidecar_path(folder, "export"), ExportSidecar)
    except ClipcidError:
        if overwrite:
            return  # an export of an earlier version, or with a damaged sidecar
        raise
    known = [] if sidecar is None else sidecar.written
    names = (*_REPLACED, *(TOKENIZER_NAMES if "open-clip" in formats else ()))
    foreign = [name for name in names if (folder / name).exists() and name not in known]
    if foreign:
        raise ClipcidError(
            f"{folder} holds files that clipcid export did not write and would replace: {', '.join(foreign)}.",
            "Give another folder with --out, or move them away.",
        )
