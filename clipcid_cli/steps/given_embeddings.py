"""The embeddings that a command is given or finds: opened, joined, and said which they are and what their keys are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.combined import CombinedEmbeddings
from clipcid_cli.formats.embeddings.folder import KEY_COLUMN, Embeddings, open_embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.shared import EmbeddingsSettings, KeptSettings


def open_given(
    settings: EmbeddingsSettings, folder: Path, cache: Path | None, reporter: Reporter, *, needs_column: bool = True
) -> Embeddings:
    """Open embeddings; of another tool's, say which column became the key. `cache` is as of `open_embeddings`.

    Args:
        needs_column: Whether a column that ``--key-column`` names must be there.
    """
    embeddings = open_embeddings(folder, settings.keys, settings.npz_array, cache, settings.key_column)
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
    reporter.note(f"{folder}: the key is {keys}.")
    return embeddings


def open_teachers(
    settings: KeptSettings, folders: Sequence[Path], cache: Path | None, scratch: Path | None, reporter: Reporter
) -> Embeddings:
    """Open a teacher's embeddings, or join several teachers' to those of one, and say what they are.

    `scratch` is as `folder` of `join`.
    """
    opened = [open_given(settings, folder, cache, reporter) for folder in folders]
    for each in opened:
        reporter.note(f"Embeddings: {each.folder}, {each.num_rows:,} rows of width {each.width}.")
    if len(opened) == 1:
        return opened[0]
    combined = CombinedEmbeddings(opened, settings.teacher_weights, scratch)
    weights = ", ".join(f"{weight:.3g}" for weight in combined.weights)
    reporter.note(f"Teachers: {len(opened)}, joined by key to rows of width {combined.width}; weights {weights}.")
    silent = [str(each.folder) for each in opened if not each.has_texts]
    if silent and combined.has_texts:
        reporter.note(f"Without captions, and so with zeros in rows of texts: {', '.join(silent)}.")
    left = frozenset[Kind]().union(*(each.kinds for each in opened)) - combined.kinds
    if left:
        reporter.note(f"Not used, since not all teachers have the same: {', '.join(sorted(left))}.")
    return combined
