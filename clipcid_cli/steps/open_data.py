"""The data that a command names, opened as its flags say."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset, open_dataset
from clipcid_cli.formats.data.samples import IMAGE_SUFFIXES, Columns, ListFormat
from clipcid_cli.formats.data.shard_files import FORMS
from clipcid_cli.formats.output import is_claimed
from clipcid_cli.steps.settings.shared import ReadingSettings

_OF_DATA = {*IMAGE_SUFFIXES, "tar"}


def refuse_empty(data: str) -> None:
    """Refuse the name that a shell makes of a variable that is not set: as a path it would be the current folder."""
    if not data.strip():
        raise ClipcidError("The path of the data is empty.", f"If a shell variable holds it, set that. {FORMS}")


def open_named(settings: ReadingSettings, data: str, index_root: Path | None = None) -> Dataset:
    """Open the data that a command names, as its flags say."""
    refuse_empty(data)
    columns = Columns(settings.image_column, settings.caption_column, settings.key_column)
    list_flags = settings.list_flags(data)
    root = list_flags["list_root"]
    try:
        return open_dataset(
            data,
            settings.keys,
            columns,
            index_root,
            caption_lines=settings.caption_lines,
            caption_keys=settings.caption_key,
            **settings.trust,
            max_bad_fraction=settings.max_bad_fraction,
            list_format=ListFormat(
                None if root is None else os.path.abspath(root),
                list_flags["list_separator"],
                list_flags["list_encoding"],
            ),
        )
    except ClipcidError as error:
        folder = Path(data)
        with suppress(OSError, ValueError):  # what is no path: a URL, a command
            if holds_embeddings(folder) and not _holds_data(folder):
                raise ClipcidError(
                    f"{data} holds embeddings, and no images.",
                    "Name it with --embeddings (balance, cluster, distill), not as the data.",
                ) from error
        raise


def holds_embeddings(folder: Path) -> bool:
    """Tell whether a folder is one of embeddings, as `open_embeddings` finds them; also where they are unfinished.

    An array beside images or tars is a label of theirs, or a list.
    """
    if is_claimed(folder, "embed"):
        return True
    from clipcid_cli.formats.embeddings.layouts import find_rows

    first = find_rows(folder)
    return first is not None and not _holds_data(first.parent)


def _holds_data(folder: Path) -> bool:
    return any(path.suffix[1:].lower() in _OF_DATA for path in folder.iterdir())
