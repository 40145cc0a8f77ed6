"""A list of images: a csv, tsv or parquet file with one row per sample, as open_clip's csv data sets are."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.remote import is_url, local_file
from clipcid_cli.formats.data.samples import Location, Sample
from clipcid_cli.formats.data.virtual_shard import VirtualShard, slice_rows
from clipcid_cli.formats.reading import describe, open_regular

if TYPE_CHECKING:
    import pandas as pd

LIST_SUFFIXES = (".csv", ".tsv", ".parquet")
LABEL_COLUMN = "label"
# What pandas makes of a cell of a parquet list.
_SEVERAL = (list, tuple, np.ndarray)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of a list's columns; an optional ``label`` column numbers the classes.

    Where any cell of that column contains several numbers (a parquet list, or ``3 7`` in text), every image may have
    any number of classes, and an empty cell means none.

    Attributes:
        image: Path of the image, relative to the list's folder or absolute, or a URL.
        caption: The caption, or in parquet a list of several; optional.
        key: The key; without such a column, the path as written.
    """

    image: str = "filepath"
    caption: str = "title"
    key: str = "key"


@dataclasses.dataclass(frozen=True)
class _Row:
    key: str
    path: str
    captions: tuple[str, ...]
    label: int | None
    labels: tuple[int, ...] | None
    repeated: bool


@dataclasses.dataclass(frozen=True)
class ListShard(VirtualShard[_Row]):
    """A slice of a list."""

    def fingerprint(self) -> dict[str, Any]:
        """Describe the slice: number of rows as its size, and a hash of them."""
        text = "\n".join(f"{row.key}\t{row.path}\t{row.captions}\t{row.labels or row.label}" for row in self.rows)
        digest = hashlib.blake2b(text.encode("utf-8", errors="surrogateescape"), digest_size=16).hexdigest()
        return {"path": f"{self.source}#{self.name}", "size": len(text), "hash": f"blake2b-rows:{digest}"}

    def _label(self, row: _Row) -> str:
        return row.key

    def _sample(self, row: _Row) -> Sample:
        return Sample(row.key, Location(row.path), row.captions, row.label, row.labels)


def read_sample_list(spec: str, columns: Columns, *, prefix_keys: bool) -> tuple[ListShard, ...]:
    """Read a list, in its own order.

    Args:
        spec: A ``.csv`` (commas, or tabs as open_clip's are), ``.tsv`` or ``.parquet`` file, or its URL.
        prefix_keys: Whether keys begin with the shard's name.

    Returns:
        Slices of the rows.

    Raises:
        ClipcidError: when the file is not of that kind, has no rows, or lacks the column of image paths.
    """
    with local_file(spec) as file:
        frame = _read_frame(spec, file)
    if columns.image not in frame:
        raise ClipcidError(
            f"List {spec} has no column {columns.image!r}; it has {', '.join(map(str, frame.columns[:12]))}.",
            "Give the column of image paths with --image-column (likewise --caption-column, --key-column).",
        )
    if frame.empty:
        raise ClipcidError(f"List {spec} has a header and no rows.", "Give a list with one row per image.")
    folder = spec.rpartition("/")[0] if is_url(spec) else os.path.dirname(spec)
    paths = _text(spec, frame, columns.image)
    captions = [_captions(cell) for cell in frame[columns.caption]] if columns.caption in frame else [()] * len(frame)
    keys = _text(spec, frame, columns.key) if columns.key in frame else paths
    classes = _classes(spec, frame) if LABEL_COLUMN in frame else None
    several = classes is not None and any(len(row) > 1 for row in classes)
    rows, seen = list[_Row](), set[str]()
    for number, (key, path, texts) in enumerate(zip(keys, paths, captions, strict=True)):
        where = path if not path or is_url(path) or os.path.isabs(path) else os.path.join(folder, path)
        own = classes[number] if classes is not None else ()
        label = own[0] if own and not several else None
        rows.append(_Row(key, where, texts, label, own if several else None, key in seen))
        seen.add(key)
    return tuple(ListShard(name, spec, part, prefix_keys) for name, part in slice_rows(rows))


def _read_frame(spec: str, path: Path) -> pd.DataFrame:
    import pandas as pd  # 0.15 s, which other kinds of data should not wait for

    try:
        open_regular(path).close()
        if spec.lower().endswith(".parquet"):
            return pd.read_parquet(path)
        with path.open(encoding="utf-8", errors="replace") as file:
            header = file.readline()
        # open_clip writes and reads tab-separated lists, whatever they are called.
        separator = "\t" if spec.lower().endswith(".tsv") or ("\t" in header and "," not in header) else ","
        return pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        raise ClipcidError(f"There is no list {spec}.", "Check the path.") from error
    except Exception as error:  # pandas and pyarrow raise what they like for a damaged file
        raise ClipcidError(
            f"List {spec} cannot be read: {describe(error)}.", "Give a csv, tsv or parquet file with a header."
        ) from error


def _text(spec: str, frame: pd.DataFrame, column: str) -> list[str]:
    if any(isinstance(cell, _SEVERAL) for cell in frame[column]):
        raise ClipcidError(
            f"Column {column!r} of list {spec} contains lists.",
            "Give a column of single values with --image-column or --key-column: one row per image.",
        )
    return [_clean(cell) for cell in frame[column]]


def _captions(cell: Any) -> tuple[str, ...]:
    texts = map(_clean, cell if isinstance(cell, _SEVERAL) else [cell])
    return tuple(text for text in texts if text)


def _clean(cell: Any) -> str:
    return "" if _is_missing(cell) else str(cell).strip()


def _classes(spec: str, frame: pd.DataFrame) -> list[tuple[int, ...]]:
    """Read the class numbers in each cell: none, one or several."""
    try:
        return [_numbers(cell) for cell in frame[LABEL_COLUMN]]
    except ValueError as error:
        raise ClipcidError(
            f"Column {LABEL_COLUMN!r} of list {spec} contains something other than integers: {error}.",
            "Number the classes from 0 (several of one image separated by spaces), or rename the column.",
        ) from error


def _numbers(cell: Any) -> tuple[int, ...]:
    parts = re.split(r"[\s,;|]+", cell.strip()) if isinstance(cell, str) else cell
    if not isinstance(parts, _SEVERAL):
        parts = [] if _is_missing(cell) else [cell]
    numbers = [float(part) for part in parts if part != ""]
    broken = next((number for number in numbers if not number.is_integer()), None)
    if broken is not None:
        raise ValueError(f"{broken:g} is not an integer")
    return tuple(dict.fromkeys(int(number) for number in numbers))


def _is_missing(cell: Any) -> bool:
    import pandas as pd

    return bool(pd.isna(cell))
