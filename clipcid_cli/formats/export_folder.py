"""An export folder: its file names, and how it appears with all of its files or none."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.model_folder import CONFIG_NAME, TOKENIZER_NAMES, WEIGHTS_NAME
from clipcid_cli.formats.output import plan_path, sidecar_path

IMAGE_ENCODER = "image_encoder.onnx"
TEXT_ENCODER = "text_encoder.onnx"
PARITY = "parity.json"

FORMAT_FILES = {
    "open-clip": (CONFIG_NAME, WEIGHTS_NAME),
    "onnx": (IMAGE_ENCODER, TEXT_ENCODER),
}
_BUILDING = ".partial"
_WEIGHTS_BESIDE = tuple(f"{name}.data" for name in FORMAT_FILES["onnx"])  # weights above 2 GB
_REPLACED = (*(name for names in FORMAT_FILES.values() for name in names), *_WEIGHTS_BESIDE, PARITY)


def refuse_foreign_folder(folder: Path, forms: Iterable[str]) -> None:
    """Refuse to write where files lie that `export` would replace or remove and did not write.

    Raises:
        ClipcidError: when there are any.
    """
    if sidecar_path(folder, "export").exists() or plan_path(folder, "export").exists():
        return
    names = (*_REPLACED, _BUILDING, *(TOKENIZER_NAMES if "open-clip" in forms else ()))
    foreign = [name for name in names if (folder / name).exists()]
    if foreign:
        raise ClipcidError(
            f"{folder} holds files that clipcid export did not write and would replace: {', '.join(foreign)}.",
            "Give another folder with --out, or move them away.",
        )


@contextmanager
def build_export(folder: Path) -> Iterator[Path]:
    """Build an export out of sight.

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
