"""A static folder with pages that classify pictures and search images in the browser, by npm packages and ONNX files."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from clipcid_cli import __version__
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import reading, write_bytes, write_json, write_text
from clipcid_cli.formats.models.export_folder import (
    ENGINE,
    ENGINE_BINARY,
    INDEX,
    JS_TOKENIZERS,
    JS_TOKENIZERS_LICENSE,
    SEARCH,
    SEARCH_IMAGES,
    SEARCH_ROWS,
    SEARCH_THUMBNAILS,
    TOKENIZER,
)
from clipcid_cli.formats.report import render_report
from clipcid_cli.shown import plain

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

# Entries of unit rows are written as so many parts of 1: closer than fp16, and a browser reads them as they are.
_ROW_UNIT = 32767
_LONGEST_TEXT = 200  # characters of a name or a caption


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
            # By its hash the very archive; its names lead nowhere, since files are written by those of `_PACKAGES`.
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
    # Words of this module alone, without a shell; and in a folder of its own, since npm obeys the .npmrc of the project that
    # it stands in, which may be a stranger's.
    (folder / "package.json").write_text("{}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip()[-500:]
        raise ClipcidError(f"--format web takes two packages from npm, which failed:\n{said}", _FIX)
    return folder


def write_page(
    folder: Path,
    model: dict[str, Any],
    encoders: Sequence[Path],
    labels: Sequence[str],
    templates: Sequence[str],
    *,
    search: bool,
) -> None:
    """Write the page that classifies pictures.

    Args:
        model: Its ``name``, ``width`` of the rows, ``logit_scale``, whether texts are ``canonical``, without capitals and
            punctuation, and how pixels are made: ``side``, ``mean``, ``std``, ``interpolation``, ``resize_mode``.
        encoders: The files of the image and the text encoder, which lie beside the page, as `tokenizer.json` does.
        labels: What the page begins with, as the prompt templates.
        search: Whether it leads to the page of `write_search`.
    """
    image, text = map(_describe_file, encoders)
    _write_html(
        folder / INDEX,
        "web.html",
        model=model | {"image_encoder": image, "text_encoder": text},
        labels=labels,
        templates=templates,
        search=SEARCH if search else None,
    )


@dataclasses.dataclass(frozen=True)
class SearchImages:
    """Images that a page searches: unit rows [N, D], and of each image its name, caption or "", and thumbnail, a WebP."""

    rows: npt.NDArray[np.float32]
    names: Sequence[str]
    captions: Sequence[str]
    thumbnails: Sequence[bytes]


def write_search(folder: Path, model: dict[str, Any], text_encoder: Path, images: SearchImages) -> list[Path]:
    """Write the page that searches images, and return the files that it reads besides the encoder.

    Args:
        model: As of `write_page`.
        text_encoder: Its file, which lies beside the page.
    """
    names, rows, thumbnails = (folder / name for name in (SEARCH_IMAGES, SEARCH_ROWS, SEARCH_THUMBNAILS))
    columns = {
        "names": [_shorten(name) for name in images.names],
        "captions": [_shorten(caption) for caption in images.captions],
        "bytes": [len(thumbnail) for thumbnail in images.thumbnails],
    }
    write_json(names, columns)
    write_bytes(rows, np.rint(images.rows * _ROW_UNIT).astype("<i2").tobytes())
    write_bytes(thumbnails, b"".join(images.thumbnails))
    _write_html(
        folder / SEARCH,
        "search.html",
        model={name: model[name] for name in ("name", "canonical")}
        | {"text_encoder": _describe_file(text_encoder), "rows": _describe_file(rows)},
        files={"images": SEARCH_IMAGES, "thumbnails": SEARCH_THUMBNAILS},
        row_unit=_ROW_UNIT,
        index=INDEX,
    )
    return [names, rows, thumbnails]


def read_search_rows(folder: Path, width: int) -> npt.NDArray[np.float32]:
    """Return the rows [N, width] that the page of `write_search` compares a text with."""
    packed = np.fromfile(folder / SEARCH_ROWS, "<i2").reshape(-1, width)
    return packed.astype(np.float32) / np.float32(_ROW_UNIT)


def _shorten(text: str) -> str:
    """Return a name or a caption as the page shows it: on one line, without secrets and control characters."""
    line = " ".join(plain(text).split())
    return line if len(line) <= _LONGEST_TEXT else line[: _LONGEST_TEXT - 1] + "…"


def _describe_file(path: Path) -> dict[str, Any]:
    return {"path": path.name, "bytes": path.stat().st_size}


def _write_html(path: Path, template: str, **context: Any) -> None:
    page = render_report(
        template, engine=ENGINE, tokenizers=JS_TOKENIZERS, tokenizer=TOKENIZER, version=__version__, **context
    )
    write_text(path, page)
