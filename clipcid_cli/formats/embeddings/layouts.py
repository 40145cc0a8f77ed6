"""How the files of a folder that another tool wrote are recognised, and which of them belong to the same shard.

The forms are:

    img_emb/img_emb_0000.npy        clip-retrieval, embedding-reader: with text_emb/*.npy and metadata/*.parquet of the same
    metadata/metadata_0000.parquet  numbers; files of `embed` without its sidecar are such a folder too
    any.npy                         bare rows
    0a1b….npz                       DataComp: arrays l14_img, l14_txt, b32_img, …, float16 [n, D]; in folders of its own too
    0a1b….parquet                   uid, text, …; row i belongs to row i of every array
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.samples import natural_key
from clipcid_cli.formats.embeddings.rows import METADATA, Kind, RowFile, find_member, find_npy, list_arrays
from clipcid_cli.formats.parquet import count_rows

AGAIN = "Copy or make the folder again."
_DIGITS = re.compile(r"(\d+)$")
_SEPARATE = "Keep embeddings of different models in separate folders."
_PARAMS = (16, 34)  # numbers of a view, without and with mixed ones


@dataclasses.dataclass(frozen=True, slots=True)
class EmbeddingFile:
    """The files of one shard."""

    parts: dict[Kind, RowFile]  # its rows by kind; images are always among them
    metadata: Path | None  # parquet of keys and captions; None where there is none
    first: int = 0  # number of its first row among those of all shards

    @property
    def rows(self) -> int:
        return self.parts[Kind.IMAGES].shape[0]

    @property
    def name(self) -> str:
        """Name of the file without its suffix, used as the shard's where another tool did not record it."""
        return self.parts[Kind.IMAGES].path.stem


def find_rows(folder: Path) -> Path | None:
    """Return the first file of embeddings in a folder, of whichever tool; None where there is none."""
    arrays = (path for place in (*Kind, "") for path in _list(folder / place, ".npy"))
    return next(arrays, None) or next(iter(_list_archives(folder)), None)


def find_files(folder: Path, npz_array: str | None) -> list[EmbeddingFile]:
    """Find the files of each shard, in natural order of names, and check that they fit together."""
    inside = folder / Kind.IMAGES
    images = _list(inside if inside.is_dir() else folder, ".npy")
    archives = _list_archives(folder)
    if archives and (npz_array is not None or not images):
        files = _pair_by_name(archives, npz_array)
    elif images:  # which the name of an array does not concern
        files = _pair_by_number(folder, images)
    else:
        raise ClipcidError(
            f"{folder} contains no embeddings (img_emb/*.npy, or *.npz).",
            "Give --embeddings DIR, or make them: clipcid embed DATA",
        )
    _check(files)
    return files


def _list(folder: Path, suffix: str) -> list[Path]:
    """Return the files whose names end so, hidden ones apart, in natural order; none where there is no such folder."""
    try:
        names = [name for name in os.listdir(folder) if name.endswith(suffix) and not name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in sorted(names, key=natural_key)]


def _list_archives(folder: Path) -> list[Path]:
    """Return the archives in a folder, or else those of the folders in it."""
    inner = (path for path in folder.glob("*/*.npz") if not path.name.startswith("."))
    return _list(folder, ".npz") or sorted(inner, key=lambda path: natural_key(str(path.relative_to(folder))))


def _pair_by_number(folder: Path, images: list[Path]) -> list[EmbeddingFile]:
    """Match each npy with the files of the same number in the sibling folders; where there are none, names say nothing."""
    others = {kind: _by_number(_list(folder / kind, ".npy")) for kind in Kind if kind is not Kind.IMAGES}
    metadata = _by_number(_list(folder / METADATA, ".parquet"))
    if not (metadata or any(others.values())):
        return [EmbeddingFile({Kind.IMAGES: find_npy(path)}, None) for path in images]
    files = list[EmbeddingFile]()
    for number, path in _by_number(images).items():
        parts = {kind: find_npy(paths[number]) for kind, paths in others.items() if number in paths}
        files.append(EmbeddingFile({Kind.IMAGES: find_npy(path)} | parts, metadata.get(number)))
    return files


def _by_number(paths: list[Path]) -> dict[str, Path]:
    """Return files by the number at the end of their names, else by the name, which identifies their shard."""
    found: dict[str, Path] = {}
    for path in paths:
        digits = _DIGITS.search(path.stem)
        other = found.setdefault(str(int(digits[1])) if digits else path.stem, path)
        if other != path:
            raise ClipcidError(
                f"{other} and {path.name} have the same number, by which files are matched.",
                "Rename or remove one of them.",
            )
    return found


def _pair_by_name(archives: list[Path], npz_array: str | None) -> list[EmbeddingFile]:
    names = _choose_arrays(archives[0], npz_array)
    files = list[EmbeddingFile]()
    for path in archives:
        metadata = path.with_suffix(".parquet")
        rows = {kind: find_member(path, name) for kind, name in names.items()}
        files.append(EmbeddingFile(rows, metadata if metadata.exists() else None))
    return files


def _choose_arrays(path: Path, requested: str | None) -> dict[Kind, str]:
    """Choose which arrays of an archive are the embeddings: of images, and of captions (``l14_txt`` for ``l14_img``)."""
    names = list_arrays(path)
    if requested is None:
        choices = [name for name in names if name.endswith("_img")]
        if len(choices) != 1:
            several = f"{len(choices)} arrays of image embeddings: {', '.join(choices)}"
            none = f"no array whose name ends in _img; its arrays: {', '.join(names) or 'none'}"
            raise ClipcidError(
                f"{path} contains {several if choices else none}.",
                f"Choose one with --npz-array, for example --npz-array {(choices or names or ['l14_img'])[-1]}.",
            )
        requested = choices[0]
    texts = requested.removesuffix("_img") + "_txt"
    has_texts = requested.endswith("_img") and texts in names
    return {Kind.IMAGES: requested} | ({Kind.TEXTS: texts} if has_texts else {})


def _check(files: Sequence[EmbeddingFile]) -> None:
    """Refuse shards whose files do not fit together, or not the shards before them."""
    first = files[0].parts
    kinds = {kind for file in files for kind in file.parts if kind is not Kind.FURTHER}
    kinds |= {Kind.VIEW_PARAMS} if Kind.VIEWS in kinds else set()
    with_metadata = any(file.metadata is not None for file in files)
    for file in files:
        parts = file.parts
        metadata = file.metadata
        images = parts[Kind.IMAGES]
        _validate_rows(images)
        if images.shape[1] != (width := first[Kind.IMAGES].shape[1]):
            raise ClipcidError(f"{images.label} has width {images.shape[1]}, the files before it {width}.", _SEPARATE)
        missing = [kind.replace("text_emb", "text embeddings") for kind in Kind if kind in kinds and kind not in parts]
        missing += [METADATA] if with_metadata and metadata is None else []
        if missing:
            same = "number" if images.member is None else "name"
            raise ClipcidError(f"{images.label} has no {missing[0]} of the same {same}.", AGAIN)
        counts = {str(metadata): count_rows(metadata, AGAIN)} if metadata is not None else {}
        if Kind.TEXTS in parts:
            texts = parts[Kind.TEXTS]
            _validate_rows(texts)
            if texts.shape[1] != width:
                raise ClipcidError(
                    f"{texts.label} has width {texts.shape[1]}, the image embeddings have {width}.", _SEPARATE
                )
            counts[texts.label] = texts.shape[0]
        for other, rows in counts.items():
            if rows != images.shape[0]:
                raise ClipcidError(f"{images.label} has {images.shape[0]:,} rows and {other} has {rows:,}.", AGAIN)
        for kind, rows_of in parts.items():
            if kind not in (Kind.IMAGES, Kind.TEXTS):
                _validate_extra(kind, rows_of, images, first)


def _validate_rows(file: RowFile) -> None:
    if len(file.shape) != 2 or not file.shape[1] or not np.issubdtype(file.dtype, np.floating):
        raise ClipcidError(
            f"{file.label} holds {file.dtype} {list(file.shape)}, not rows of floating-point numbers.",
            "Choose other embeddings.",
        )


def _validate_extra(kind: Kind, file: RowFile, images: RowFile, first: dict[Kind, RowFile]) -> None:
    """Refuse further rows whose format or shape is not that of `embed`, beside these images and the first shard's files."""
    rows, width = images.shape
    if kind is Kind.FURTHER:
        expected = (*file.shape[:1], width)
    else:
        # The first shard decides how many rows a sample has, the views how many parameters.
        several = first.get(Kind.VIEWS if kind is Kind.VIEW_PARAMS else kind, file).shape[1:2]
        if kind is Kind.VIEW_PARAMS:
            width = next((each for each in _PARAMS if first[kind].shape[-1:] == (each,)), _PARAMS[0])
        expected = (rows, *several, width)
    if file.shape != expected or file.dtype != kind.dtype:
        raise ClipcidError(
            f"{file.label} holds {file.dtype} {list(file.shape)}; {kind.dtype} {list(expected)} would match the image "
            "embeddings and the files before it.",
            AGAIN,
        )
