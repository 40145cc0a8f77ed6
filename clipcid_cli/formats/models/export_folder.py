"""An export folder: its file names, and how all of its files appear at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.hf_folder import HF_CONFIG, HF_PREPROCESSOR, HF_TOKENIZER, HF_WEIGHTS
from clipcid_cli.formats.models.open_clip_folder import CONFIG_NAME, TOKENIZER_NAMES, WEIGHTS_NAME
from clipcid_cli.formats.output import plan_path, read_sidecar, sidecar_path

IMAGE_ENCODER = "image_encoder.onnx"
TEXT_ENCODER = "text_encoder.onnx"
CLASSIFIER = "classifier.onnx"
PARITY = "parity.json"
CARD = "README.md"

_KINDS = ("fp32", "fp16", "int8")
_BUILDING = ".partial"


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


def refuse_foreign_folder(folder: Path, formats: Iterable[str]) -> None:
    """Refuse a folder with files that `export` would replace or remove and did not write.

    Raises:
        ClipcidError: when there are any.
    """
    if plan_path(folder, "export").exists():
        return  # an unfinished export, which refused such files when it began
    known = (read_sidecar(sidecar_path(folder, "export")) or {}).get("written", [])
    names = (*_REPLACED, _BUILDING, *(TOKENIZER_NAMES if "open-clip" in formats else ()))
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
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    for name in _REPLACED:
        (folder / name).unlink(missing_ok=True)
    for path in sorted(building.iterdir()):
        path.replace(folder / path.name)
    building.rmdir()
