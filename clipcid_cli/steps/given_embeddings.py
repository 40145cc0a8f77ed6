"""The embeddings that a command is given or finds: opened, and said which they are and what their keys are."""

from __future__ import annotations

from pathlib import Path

from clipcid_cli.formats.embeddings.folder import KEY_COLUMN, Embeddings, open_embeddings
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.shared import EmbeddingsSettings


def open_given(settings: EmbeddingsSettings, folder: Path, cache: Path | None, reporter: Reporter) -> Embeddings:
    """Open embeddings; of another tool's, say which column became the key. `cache` is as of `open_embeddings`."""
    embeddings = open_embeddings(folder, settings.keys, settings.npz_array, cache, settings.key_column)
    if embeddings.sidecar is not None:
        return embeddings
    column = embeddings.key_column
    keys = "the name of the file and the row" if column is None else f"column {column} of the metadata"
    if settings.key_column not in (KEY_COLUMN, column):
        reporter.warn(f"{folder}: the metadata have no column {settings.key_column!r}; the key is {keys}.")
    else:
        reporter.note(f"{folder}: the key is {keys}.")
    return embeddings
