"""The embeddings that a command is given or finds: opened, and said what their keys are and which rows cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.folder import KEY_COLUMN, Embeddings, open_embeddings
from clipcid_cli.formats.skips import Skips
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.shared import EmbeddingsSettings


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


def skip_rows(embeddings: Embeddings, bad: npt.NDArray[np.int64], max_bad_fraction: float, reporter: Reporter) -> Skips:
    """Count and name rows that cannot be used, given their numbers, ascending; too many of them are an error."""
    pieces = embeddings.take_column(embeddings.keys_of, bad)
    skips = Skips.of({key: "nan_row" for piece in pieces for key in piece.to_pylist()})
    skips.check(embeddings.num_rows, max_bad_fraction, str(embeddings.folder))
    if skips.total:
        reporter.warn(f"{skips.total:,} rows were skipped:\n{skips.describe()}")
    return skips
