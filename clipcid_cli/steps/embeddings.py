"""Embeddings that a command is given or finds: opened, said, and their unusable rows left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.folder import KEY_COLUMN, Embeddings, open_embeddings
from clipcid_cli.formats.skipped import list_rows
from clipcid_cli.formats.skips import NAMED, Skips
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.steps import reporting
from clipcid_cli.steps.settings.shared import EmbeddingsSettings, KeptSettings

# Files in which a key like one of the data's is looked for, to show it in an error.
_FILES_COMPARED = 16


def open_given(
    settings: EmbeddingsSettings, folder: Path, work: Path | None, *, needs_column: bool = True
) -> Embeddings:
    """Open embeddings; of another tool's, say which column became the key. `work` is as of `open_embeddings`.

    Args:
        needs_column: Whether a column that ``--key-column`` names must be there.
    """
    embeddings = open_embeddings(folder, settings.keys, settings.array_name, work, settings.key_column)
    if embeddings.sidecar is not None:
        return embeddings
    column = embeddings.key_column
    keys = "the name of the file and the row" if column is None else f"column {column} of the metadata"
    if needs_column and settings.key_column not in (KEY_COLUMN, column):
        there = ", ".join(embeddings.metadata_columns[:12])
        raise ClipcidError(
            f"{folder}: the metadata have no column {settings.key_column!r}; "
            + (f"they have {there}." if there else "there are none."),
            f"Name another column with --key-column, or omit it: the key is then {keys}.",
        )
    reporting.note(f"{folder}: the key is {keys}.")
    return embeddings


def open_teacher(settings: KeptSettings, folder: Path, work: Path | None) -> Embeddings:
    """Open a teacher's embeddings and say what they are; `work` is as of `open_embeddings`."""
    teacher = open_given(settings, folder, work)
    reporting.note(f"Embeddings: {teacher.folder}, {teacher.num_rows:,} rows of width {teacher.width}.")
    return teacher


def open_kept(settings: KeptSettings, work: Path | None) -> Embeddings:
    """Open the embeddings that were named, else those of the work directory; `work` is as of `open_embeddings`."""
    folders = settings.embeddings or (WorkDirectory(settings.work).find_embeddings(),)
    opened = [open_teacher(settings, folder, work) for folder in folders]
    if len(opened) == 1:
        return opened[0]
    from clipcid_cli.steps.several_teachers import join_teachers

    return join_teachers(settings, opened, work)


def compare_keys(key: str, embeddings: Embeddings) -> str:
    """Show a key of the data beside one of embeddings, the same but for what was added to it if there is one."""
    other = ""
    for file in [file for file in embeddings.files if file.rows][:_FILES_COMPARED]:
        keys = embeddings.keys_of(file)
        alike = pc.indices_nonzero(pc.match_substring(keys, key))
        if len(alike):
            other = str(keys[alike[0].as_py()])
            break
        other = other or str(keys[0])
    return f"One of these keys is {key!r}, one of the embeddings' {other!r}."


def advise_keys(embeddings: Embeddings) -> str:
    """Return a remedy for keys of another tool that are not the data's; empty for those of `embed`."""
    if embeddings.sidecar is not None:
        return ""
    others = [name for name in embeddings.metadata_columns if name != embeddings.key_column]
    if not others:
        return "Write the data's keys into the column key of the metadata.\n"
    return f"Name the column of the metadata with the data's keys, --key-column NAME: {', '.join(others[:12])}.\n"


def skip_rows(embeddings: Embeddings, bad: npt.NDArray[np.int64], max_bad_fraction: float) -> Skips:
    """Count and name rows that cannot be used, given their numbers, ascending; too many of them are an error."""
    first = embeddings.take_column(embeddings.keys_of, bad[:NAMED])
    skips = Skips()
    if len(bad):
        skips = Skips({"nan_row": len(bad)}, {"nan_row": [key for piece in first for key in piece.to_pylist()]})
    skips.check(embeddings.num_rows, max_bad_fraction, str(embeddings.folder))
    if skips.total:
        reporting.warn(f"Rows skipped: {skips.total:,}\n{skips.describe()}")
    return skips


def list_bad_rows(embeddings: Embeddings, bad: npt.NDArray[np.int64]) -> Iterator[pa.Table]:
    """List rows that cannot be used, given their numbers, ascending: one file in memory at a time."""
    for file in embeddings.files:
        start, stop = np.searchsorted(bad, [file.first, file.first + file.rows])
        if start < stop:
            places = pa.array(bad[start:stop] - file.first)
            keys, shards = (
                read(file).take(places).combine_chunks() for read in (embeddings.keys_of, embeddings.shards_of)
            )
            yield list_rows(keys, shards, "nan_row")
