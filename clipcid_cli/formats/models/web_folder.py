"""A static folder with a page that classifies pictures in the browser, by two packages of npm and the ONNX files."""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from clipcid_cli import __version__
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import reading, write_bytes, write_text
from clipcid_cli.formats.models.export_folder import (
    ENGINE,
    ENGINE_BINARY,
    INDEX,
    JS_TOKENIZERS,
    JS_TOKENIZERS_LICENSE,
    TOKENIZER,
)
from clipcid_cli.formats.report import render_report

# Packages in the versions that the page was tested with: which of their files it needs, and their names in its folder.
_PACKAGES = {
    "onnxruntime-web@1.30.0": {f"dist/{ENGINE}": ENGINE, f"dist/{ENGINE_BINARY}": ENGINE_BINARY},
    "@huggingface/tokenizers@0.2.0": {f"dist/{JS_TOKENIZERS}": JS_TOKENIZERS, "LICENSE": JS_TOKENIZERS_LICENSE},
}
# What npm calls their integrity (npm view PACKAGE dist.integrity): the SHA-512 of each archive.
_INTEGRITY = {
    "onnxruntime-web@1.30.0": (
        "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
    ),
    "@huggingface/tokenizers@0.2.0": (
        "sha512-LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg=="
    ),
}
_FIX = (
    f"On a machine with a network: npm pack {' '.join(_PACKAGES)}; then give the folder of both files: "
    "--npm-packages DIR"
)


def validate_packages(packages: Path | None) -> None:
    """Refuse a folder that lacks a package's file; without a folder, that npm is missing."""
    if packages is None:
        if shutil.which("npm") is None:
            raise ClipcidError("--format web takes two packages from npm, which is not installed.", _FIX)
        return
    missing = [name for name in map(_archive_name, _PACKAGES) if not (packages / name).is_file()]
    if missing:
        raise ClipcidError(f"--npm-packages: {packages} has no {' and no '.join(missing)}.", _FIX)


def write_engine(folder: Path, packages: Path | None) -> None:
    """Write what the page runs by.

    Args:
        packages: Folder of the files that ``npm pack`` wrote; without it npm fetches them, or takes them from its cache.
    """
    with TemporaryDirectory() as scratch:
        archives = packages or _fetch_packages(Path(scratch))
        for package, files in _PACKAGES.items():
            archive = archives / _archive_name(package)
            with reading(archive, f"npm's {package}", _FIX) as file:
                content = file.read()
            _validate_archive(content, archive, package)
            with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
                for member, name in files.items():
                    packed = tar.extractfile(f"package/{member}")
                    assert packed is not None, "a file of this very archive"
                    write_bytes(folder / name, packed.read())


def _validate_archive(content: bytes, archive: Path, package: str) -> None:
    """Refuse an archive that is not the very one that the page was tested with."""
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode("ascii")
    if integrity != _INTEGRITY[package]:
        raise ClipcidError(
            f"{archive} is not npm's {package}: its hash is {integrity}, not {_INTEGRITY[package]}.", _FIX
        )


def _archive_name(package: str) -> str:
    """Return how ``npm pack`` names a package's file."""
    return package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz"


def _fetch_packages(folder: Path) -> Path:
    command = ["npm", "pack", *_PACKAGES, "--prefer-offline", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip()[-500:]
        raise ClipcidError(f"--format web takes two packages from npm, which failed:\n{said}", _FIX)
    return folder


def write_page(
    folder: Path, model: dict[str, Any], encoders: Sequence[Path], labels: Sequence[str], templates: Sequence[str]
) -> None:
    """Write the page.

    Args:
        model: Its ``name``, ``width`` of the rows, ``logit_scale``, whether texts are ``canonical``, without capitals and
            punctuation, and how pixels are made: ``side``, ``mean``, ``std``, ``interpolation``, ``resize_mode``.
        encoders: The files of the image and the text encoder, which lie beside the page, as `tokenizer.json` does.
        labels: What the page begins with, as the prompt templates.
    """
    image, text = ({"path": path.name, "bytes": path.stat().st_size} for path in encoders)
    page = render_report(
        "web.html",
        model=model | {"image_encoder": image, "text_encoder": text},
        engine=ENGINE,
        tokenizers=JS_TOKENIZERS,
        tokenizer=TOKENIZER,
        labels=labels,
        templates=templates,
        version=__version__,
    )
    write_text(folder / INDEX, page)
