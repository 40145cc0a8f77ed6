"""Whether the files of a folder of embeddings fit together, and are still what the sidecar records."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.npy import RowFile
from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.formats.listing import Stat, is_as_listed
from clipcid_cli.formats.output import sidecar_path
from clipcid_cli.formats.parquet import count_rows
from clipcid_cli.formats.reading import reading

if TYPE_CHECKING:
    from clipcid_cli.formats.embeddings.folder import EmbeddingFile

AGAIN = "Copy or make the folder again."
REMAKE = "Run: clipcid embed DATA --overwrite; or copy the rows to another folder, without embed.json, and name it."


def check_sidecar(folder: Path, sidecar: dict[str, Any]) -> None:
    """Refuse a sidecar without the entries that steps read from it.

    Raises:
        ClipcidError: naming the entry.
    """
    with reading(sidecar_path(folder, "embed"), "a sidecar of embed", REMAKE):
        if not isinstance(sidecar["model"]["spec"], str) or not isinstance(sidecar["settings"]["keys"], str):
            raise TypeError("its model or settings are of another type")
        if "data" in sidecar and not isinstance(sidecar["data"]["spec"], str):
            raise TypeError("its data are of another type")
        sidecar["model"]["weights_hash"], sidecar["inputs"], sidecar["counts"]["images"]


def describe_recorded(
    folder: Path, sidecar: dict[str, Any], stats: Mapping[str, Stat]
) -> dict[str, dict[str, Any]] | None:
    """Describe the files that are as the sidecar records, for other sidecars; None where it records none.

    They are named by their paths in the folder (`place_in`). A file of another time, as in a copy of the folder, is known
    but not described here.
    """
    if not sidecar.get("outputs"):
        return None
    found: dict[str, dict[str, Any]] = {}
    for entry in sidecar["outputs"]:
        same = is_as_listed(stats.get(entry["path"]), entry)
        described = {"path": str(folder / entry["path"]), "size": entry["size"], "hash": entry["hash"]}
        found[entry["path"]] = described if same else {}
    return found


def place_in(folder: Path, path: Path) -> str:
    """Return the path in a folder of a file that was found there."""
    return str(path).removeprefix(os.path.join(folder, ""))  # Path(".") / name has no "./" to remove


def refuse_added(folder: Path, files: list[EmbeddingFile], known: Container[str]) -> None:
    """Refuse files among those of `embed` that it did not write.

    Args:
        known: Those it did write, by path in the folder.

    Raises:
        ClipcidError: naming the first.
    """
    for file in files:
        parts = (file.images, file.texts, file.extras.views, file.extras.view_params, file.extras.further)
        paths = [part.path for part in parts if part is not None] + (
            [file.metadata] if file.metadata is not None else []
        )
        for path in paths:
            if place_in(folder, path) not in known:
                raise ClipcidError(f"{path} was added since {sidecar_path(folder, 'embed')} was written.", REMAKE)


def check_rows(file: RowFile) -> None:
    """Refuse what is not rows of floating-point numbers.

    Raises:
        ClipcidError: naming the file, its number format and shape.
    """
    if len(file.shape) != 2 or not file.shape[1] or not np.issubdtype(file.dtype, np.floating):
        raise ClipcidError(
            f"{file.label} holds {file.dtype} {list(file.shape)}, not rows of floating-point numbers.",
            "Choose other embeddings.",
        )


def check_file(file: EmbeddingFile, width: int, with_texts: bool, with_metadata: bool, *, count_metadata: bool) -> None:
    """Refuse a shard whose files do not fit together, or not the shards before it.

    Args:
        width: D of the shards before it.
        with_texts: Whether any shard has text embeddings.
        with_metadata: Whether any shard has metadata.
        count_metadata: Whether to look into the metadata; those that `embed` wrote have as many rows as the rest.

    Raises:
        ClipcidError: naming the files and both numbers.
    """
    images = file.images.label
    if file.images.shape[1] != width:
        raise ClipcidError(
            f"{images} has width {file.images.shape[1]}, the files before it {width}.",
            "Keep embeddings of different models in separate folders.",
        )
    same = "number" if file.images.path.suffix == ".npy" else "name"
    missing = "text embeddings" if file.texts is None and with_texts else ""
    if missing or (file.metadata is None and with_metadata):
        raise ClipcidError(f"{images} has no {missing or 'metadata'} of the same {same}.", "Make the folder again.")
    others = {}
    if file.texts is not None:
        check_rows(file.texts)
        if file.texts.shape[1] != width:
            raise ClipcidError(
                f"{file.texts.label} has width {file.texts.shape[1]}, the image embeddings have {width}.",
                "Keep embeddings of different models in separate folders.",
            )
        others[file.texts.label] = file.texts.shape[0]
    if file.metadata is not None and count_metadata:
        others[str(file.metadata)] = count_rows(file.metadata, AGAIN)
    for other, rows in others.items():
        if rows != file.rows:
            raise ClipcidError(
                f"{images} has {file.rows:,} rows and {other} has {rows:,}.",
                "Make the folder again.",
            )


def find_unusable_rows(rows: Rows) -> npt.NDArray[np.int64]:
    """Read all rows and return the numbers of those that are zero or not finite, int64, ascending."""
    bad = [
        start + np.flatnonzero(~np.isfinite(block).all(axis=1) | ~block.any(axis=1)) for start, block in rows.blocks()
    ]
    return np.concatenate([np.empty(0, dtype=np.int64), *bad])
