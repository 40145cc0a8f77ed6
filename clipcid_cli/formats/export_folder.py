"""An export folder: its file names, and how it appears with all of its files or none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipcid_cli.formats.model_folder import CONFIG_NAME, WEIGHTS_NAME

IMAGE_ENCODER = "image_encoder.onnx"
TEXT_ENCODER = "text_encoder.onnx"
PARITY = "parity.json"

FORMAT_FILES = {
    "open-clip": (CONFIG_NAME, WEIGHTS_NAME),
    "onnx": (IMAGE_ENCODER, TEXT_ENCODER),
}
_BUILDING = ".partial"


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
    for name in (*(name for names in FORMAT_FILES.values() for name in names), PARITY):
        (folder / name).unlink(missing_ok=True)
        (folder / f"{name}.data").unlink(missing_ok=True)
    for path in sorted(building.iterdir()):
        path.replace(folder / path.name)
    building.rmdir()
