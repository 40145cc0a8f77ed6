"""Which files of a folder of embeddings belong to the same shard: those of the same number, or of the same name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from clipcid_cli.formats.data.samples import natural_key
from clipcid_cli.formats.embeddings.npy import RowFile, find_npy
from clipcid_cli.formats.embeddings.npz import choose_arrays, find_array

DIGITS = re.compile(r"(\d+)$")
"""The number at the end of a file's name, which identifies its shard."""

Part = tuple[RowFile, RowFile | None, Path | None]  # image embeddings, text embeddings, metadata


def list_files(folder: Path, suffix: str) -> list[Path]:
    """Return the files whose names end so, hidden ones apart, in natural order; none where there is no such folder."""
    try:
        names = [name for name in os.listdir(folder) if name.endswith(suffix) and not name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in sorted(names, key=natural_key)]


def list_inner_files(folder: Path, suffix: str) -> list[Path]:
    """Return those of the folders in a folder, likewise."""
    found = (path for path in folder.glob(f"*/*{suffix}") if not path.name.startswith("."))
    return sorted(found, key=lambda path: natural_key(str(path.relative_to(folder))))


def pair_by_number(folder: Path, images: list[Path]) -> list[Part]:
    """Match each npy with the files of the same number in the sibling folders."""
    texts, metadata = _by_number(folder / "text_emb", ".npy"), _by_number(folder / "metadata", ".parquet")
    parts: list[Part] = []
    for path in images:
        number = _number(path)
        text = texts.get(number)
        parts.append((find_npy(path), None if text is None else find_npy(text), metadata.get(number)))
    return parts


def pair_by_name(archives: list[Path], npz_array: str | None) -> list[Part]:
    """Match the arrays of each npz with the parquet of the same name."""
    images, texts = choose_arrays(archives[0], npz_array)
    parts: list[Part] = []
    for path in archives:
        metadata = path.with_suffix(".parquet")
        image = find_array(path, images)
        text = None if texts is None else find_array(path, texts)
        parts.append((image, text, metadata if metadata.exists() else None))
    return parts


def _by_number(folder: Path, suffix: str) -> dict[str, Path]:
    return {_number(path): path for path in list_files(folder, suffix)}


def _number(path: Path) -> str:
    """Return the number at the end of a file's name, which identifies its shard."""
    digits = DIGITS.search(path.stem)
    return str(int(digits.group(1))) if digits else path.stem
