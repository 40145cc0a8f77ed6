"""A static folder with a page that classifies pictures in the browser, by two packages of npm and the ONNX files."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from clipcid_cli import __version__
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_bytes, write_text
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
_FIX = (
    f"Where there is a network: npm pack {' '.join(_PACKAGES)}; then give the folder of both files: --npm-packages DIR"
)


def write_engine(folder: Path, packages: Path | None) -> None:
    """Write what the page runs by.

    Args:
        packages: Folder of the files that ``npm pack`` wrote; without it npm fetches them, or takes them from its cache.
    """
    with TemporaryDirectory() as scratch:
        archives = packages or _fetch_packages(Path(scratch))
        for package, files in _PACKAGES.items():
            archive = archives / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
            try:
                with tarfile.open(archive) as tar:
                    contents = {name: tar.extractfile(f"package/{member}") for member, name in files.items()}
                    for name, content in contents.items():
                        assert content is not None, "packages of npm hold no folders as members"
                        write_bytes(folder / name, content.read())
            except (OSError, KeyError, tarfile.TarError) as error:
                raise ClipcidError(f"--npm-packages: {archive} is not npm's {package}: {error}.", _FIX) from error


def _fetch_packages(folder: Path) -> Path:
    command = ["npm", "pack", *_PACKAGES, "--prefer-offline", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ClipcidError("--format web takes two packages from npm, which is not installed.", _FIX) from error
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
