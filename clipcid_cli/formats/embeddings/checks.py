"""Whether the files of a folder of embeddings fit together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.npy import RowFile
from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.formats.parquet import count_rows
from clipcid_cli.formats.sidecar import EmbedSidecar, read_sidecar, sidecar_path

if TYPE_CHECKING:
    from clipcid_cli.formats.embeddings.folder import EmbeddingFile

AGAIN = "Copy or make the folder again."
_REMAKE = (
    "Give the command that made it again, with --overwrite; or copy the rows to another folder, without embed.json, and "
    "name that one."
)


def read_embed_sidecar(folder: Path) -> EmbedSidecar | None:
    """Read the sidecar of a folder of embeddings; None when there is none."""
    return read_sidecar(sidecar_path(folder, "embed"), EmbedSidecar, _REMAKE)


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
    bad = [start + np.flatnonzero(~_is_usable(block)) for start, block in rows.blocks()]
    return np.concatenate([np.empty(0, dtype=np.int64), *bad])


def has_usable_row(rows: Rows) -> bool:
    """Tell whether any row is neither zero nor not finite; rows are read until one is found."""
    return any(_is_usable(block).any() for _, block in rows.blocks())


def _is_usable(block: npt.NDArray[np.float16]) -> npt.NDArray[np.bool_]:
    return np.asarray(np.isfinite(block).all(axis=1) & block.any(axis=1))
