"""How the files of a folder that another tool wrote are recognised, and which of them belong to the same shard.

The forms are:

    img_emb/img_emb_0000.npy        clip-retrieval, embedding-reader: with text_emb/*.npy and metadata/*.parquet of the same
    metadata/metadata_0000.parquet  numbers; files of `embed` without its sidecar are such a folder too
    any.npy                         bare rows; with any.parquet or any.keys.txt, a key per line, beside each
    0a1b….npz                       DataComp: arrays l14_img, l14_txt, b32_img, …, float16 [n, D]; in folders of its own too
    0a1b….parquet                   uid, text, …; row i belongs to row i of every array
    any.parquet                     a column of lists of numbers, perhaps another of captions' rows, and key, caption, …

A file of one of these forms may also be given itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.image_column import is_image_column
from clipcid_cli.formats.data.samples import natural_key
from clipcid_cli.formats.embeddings.kinds import METADATA, Kind
from clipcid_cli.formats.embeddings.rows import AGAIN, ArrayFile, EmbeddingFile, find_member, find_npy, list_arrays
from clipcid_cli.formats.files import reading
from clipcid_cli.formats.parquet import count_rows

if TYPE_CHECKING:
    from clipcid_cli.formats.embeddings.copies import Copies

_GIVE = "Give --embeddings DIR, or make them: clipcid embed DATA"
_FIX = "Copy or make it again, or choose other embeddings."
_SUFFIXES = (".npy", ".npz", ".parquet")
# What names of columns have for images and for captions.
_OF_IMAGE = re.compile("image|img", re.IGNORECASE)
_OF_TEXT = re.compile("text|txt|caption", re.IGNORECASE)
_DIGITS = re.compile(r"(\d+)$")
_SEPARATE = "Keep embeddings of different models in separate folders."
_PARAMS = (16, 34)  # numbers of a view, without and with mixed ones


def find_rows(folder: Path) -> Path | None:
    """Return the first file of embeddings in a folder, of whichever tool, or the file itself; None where there is none."""
    if folder.is_file():
        return folder if folder.suffix in (".npy", ".npz") or _is_table(folder) else None
    arrays = (path for place in (*Kind, "") for path in _list(folder / place, ".npy"))
    array = next(arrays, None) or next(iter(_list_archives(folder)), None)
    return array or next(filter(_is_table, _list(folder, ".parquet")[:1]), None)


def _is_table(path: Path) -> bool:
    """Tell whether a file has a column of embeddings, and none of images, which would make it data."""
    if path.suffix != ".parquet":
        return False
    with suppress(ClipcidError):
        return bool(list_columns(path)) and not has_images(path)
    return False


def list_columns(path: Path) -> list[str]:
    """Return the names of the columns of a parquet file that hold a list of floating-point numbers per row."""
    with reading(path, "a parquet file", _FIX), pq.ParquetFile(path) as file:
        return [field.name for field in file.schema_arrow if _is_rows(field.type)]


def has_images(path: Path) -> bool:
    """Tell whether a parquet file holds images."""
    with reading(path, "a parquet file", _FIX), pq.ParquetFile(path) as file:
        return any(is_image_column(field.type) for field in file.schema_arrow)


def _is_rows(kind: pa.DataType) -> bool:
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and pa.types.is_floating(kind.value_type))


def find_files(folder: Path, array: str | None, copies: Copies) -> list[EmbeddingFile]:
    """Find the files of each shard, in natural order of names, and check that they fit together.

    Args:
        array: Name of the arrays in archives, or of the column in parquet files; None for the one that is found.
    """
    if folder.is_file():
        images, archives, tables = ([folder] if folder.suffix == suffix else [] for suffix in _SUFFIXES)
    else:
        inside = folder / Kind.IMAGES
        images = _list(inside if inside.is_dir() else folder, ".npy")
        archives = _list_archives(folder)
        tables = _list(folder, ".parquet")
    if archives and (array is not None or not images):
        files = _pair_by_name(archives, array)
    elif images:  # which the name of an array does not concern
        files = _pair_by_number(folder, images, copies)
    elif tables:
        files = _pair_columns(tables, array, copies)
    else:
        raise ClipcidError(
            f"{folder} contains no embeddings (img_emb/*.npy, *.npz, or *.parquet with a column of them).",
            _GIVE,
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


def _pair_by_number(folder: Path, images: list[Path], copies: Copies) -> list[EmbeddingFile]:
    """Match each npy with the files of the same number in the sibling folders; where there are none, names say nothing."""
    others = {kind: _by_number(_list(folder / kind, ".npy")) for kind in Kind if kind is not Kind.IMAGES}
    metadata = _by_number(_list(folder / METADATA, ".parquet"))
    if not (metadata or any(others.values())):
        rows = [find_npy(path) for path in images]
        return [
            EmbeddingFile({Kind.IMAGES: images_file}, metadata_path)
            for images_file, metadata_path in zip(rows, _beside(rows, copies), strict=True)
        ]
    files = list[EmbeddingFile]()
    for label, path in _by_number(images).items():
        parts = {kind: find_npy(paths[label]) for kind, paths in others.items() if label in paths}
        files.append(EmbeddingFile({Kind.IMAGES: find_npy(path)} | parts, metadata.get(label)))
    return files


def _beside(arrays: Sequence[ArrayFile], copies: Copies) -> list[Path | None]:
    """Return the metadata that have the names of arrays; None for all where one has none."""
    tables = list[Path | None]()
    for array in arrays:
        table, keys = (array.path.with_suffix(suffix) for suffix in (".parquet", ".keys.txt"))
        if not (table.is_file() or keys.is_file()):
            return [None] * len(arrays)
        tables.append(table if table.is_file() else copies.keys(keys, array.shape[0] if array.shape else 0))
    return tables


def _pair_columns(tables: list[Path], column: str | None, copies: Copies) -> list[EmbeddingFile]:
    """Take the rows in columns of parquet files, whose other columns are their metadata."""
    names = _choose_columns(tables[0], column)
    for path in tables:
        missing = next((name for name in names.values() if name not in list_columns(path)), None)
        if missing is not None:
            raise ClipcidError(f"{path} has no column {missing} of lists of numbers; {tables[0]} has.", AGAIN)
    rows = {kind: copies.columns([(path, name) for path in tables]) for kind, name in names.items()}
    parts = [dict(zip(rows, rows_of, strict=True)) for rows_of in zip(*rows.values(), strict=True)]
    return [EmbeddingFile(rows_of, path) for rows_of, path in zip(parts, tables, strict=True)]


def _choose_columns(path: Path, requested: str | None) -> dict[Kind, str]:
    """Choose the columns of the embeddings of images, and of captions (``text_embedding`` for ``image_embedding``)."""
    names = list_columns(path)
    if requested is None:
        choices = [name for name in names if not _OF_TEXT.search(name)]
        if not names:
            raise ClipcidError(f"{path} has no column of embeddings, lists of floating-point numbers.", _GIVE)
        if len(choices) != 1:
            of_images = f"{len(choices)} columns" if choices else "no column"
            raise ClipcidError(
                f"{path} has {of_images} of image embeddings; its columns of embeddings: {', '.join(names[:12])}.",
                f"Choose one with --embedding-column, for example --embedding-column {(choices or names)[0]}.",
            )
        requested = choices[0]
    elif requested not in names:
        raise ClipcidError(
            f"{path} has no column {requested} of lists of numbers; it has {', '.join(names[:12]) or 'none'}.",
            "Name another one with --embedding-column.",
        )
    texts = [name for name in names if name != requested and _OF_TEXT.search(name)]
    same = _OF_IMAGE.sub("", requested)
    paired = [name for name in texts if _OF_TEXT.sub("", name) == same] or (texts if len(texts) == 1 else [])
    return {Kind.IMAGES: requested} | ({Kind.TEXTS: paired[0]} if paired else {})


def _by_number(paths: list[Path]) -> dict[str, Path]:
    """Return files by the number at the end of their names, else by the name, which identifies their shard."""
    labelled: dict[str, Path] = {}
    for path in paths:
        digits = _DIGITS.search(path.stem)
        other = labelled.setdefault(str(int(digits[1])) if digits else path.stem, path)
        if other != path:
            raise ClipcidError(
                f"{other} and {path.name} have the same number, by which files are matched.",
                "Rename or remove one of them.",
            )
    return labelled


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


def _validate_rows(file: ArrayFile) -> None:
    if len(file.shape) != 2 or not file.shape[1] or not np.issubdtype(file.dtype, np.floating):
        raise ClipcidError(
            f"{file.label} holds {file.dtype} {list(file.shape)}, not rows of floating-point numbers.",
            "Choose other embeddings.",
        )


def _validate_extra(kind: Kind, file: ArrayFile, images: ArrayFile, first: dict[Kind, ArrayFile]) -> None:
    """Refuse rows of views, variants or further captions that do not fit their images or the first shard's files."""
    rows, width = images.shape
    if kind is Kind.FURTHER:
        expected = (*file.shape[:1], width)
    else:
        # The first shard decides how many rows a sample has, the views how many parameters.
        several = first.get(Kind.VIEWS if kind is Kind.VIEW_PARAMS else kind, file).shape[1:2]
        if kind is Kind.VIEW_PARAMS:
            width = next((count for count in _PARAMS if first[kind].shape[-1:] == (count,)), _PARAMS[0])
        expected = (rows, *several, width)
    if file.shape != expected or file.dtype != kind.dtype:
        raise ClipcidError(
            f"{file.label} holds {file.dtype} {list(file.shape)}; {kind.dtype} {list(expected)} would match the image "
            "embeddings and the files before it.",
            AGAIN,
        )
