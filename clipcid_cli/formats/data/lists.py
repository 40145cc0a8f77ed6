"""Lists of images: a csv, tsv or parquet file with a row for each."""

from __future__ import annotations

import codecs
import dataclasses
import io
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import without_query
from clipcid_cli.formats.data.captions import cut_cell, read_cell
from clipcid_cli.formats.data.cells import Origin, origin_of_list
from clipcid_cli.formats.data.opening import local_file
from clipcid_cli.formats.data.samples import ListFormat
from clipcid_cli.formats.data.shard import Opened, ReadOptions
from clipcid_cli.formats.data.slices import VIRTUAL_SHARD, Images, ListedImages, cut
from clipcid_cli.formats.files import describe, open_regular
from clipcid_cli.formats.parquet import validate_expansion

if TYPE_CHECKING:
    import pandas as pd

LABEL_COLUMN = "label"
_MOST_CHARACTERS = 2**27  # of the rows of a slice in a text
_LONGEST_HEADER = 2**20
_MAX_NUMBER = 2**53  # of a class: beyond, a float does not tell integers apart
# What pandas makes of a cell of a parquet list.
_SEVERAL = (list, tuple, np.ndarray)


def open_list(source: str, options: ReadOptions) -> Opened:
    """Open a list of images, or what is behind its URL."""
    return Opened("list", cut(ListImages(source, options)))


@dataclasses.dataclass(frozen=True)
class ListImages(Images):
    """The images that a list names."""

    @cached_property
    def origin(self) -> Origin:
        return origin_of_list(self.source, self.options.schemes, self.options.list_format.root)

    @property
    def caption_columns(self) -> tuple[str, ...]:
        return self.options.caption_keys or (self.options.columns.caption,)

    def list_images(self) -> ListedImages:
        return ListedImages(_list_rows(self.origin, self.options))

    def column_names(self) -> list[str]:
        """Return the names of the columns."""
        with local_file(self.source) as file:
            return list(map(str, next(read_frames(self.source, file, self.options.list_format)).columns))

    def resolve(self, path: str) -> str:
        if "\\" in path and not os.path.exists(os.path.join(self.origin.folder, path)):
            path = path.replace("\\", "/")  # as Windows writes paths
        return self.origin.locate(path)

    def key_of(self, row: dict[str, Any]) -> bytes:
        name: bytes = row["key"] or row["path"]
        return name


def _list_rows(origin: Origin, options: ReadOptions) -> Iterator[dict[str, Any]]:
    """List the rows of a list, in its own order.

    A ``.csv`` has commas, or tabs as open_clip's have, a ``.tsv`` tabs.
    """
    source = origin.source
    columns = options.columns
    caption_keys = options.caption_keys
    with local_file(source) as file:
        for frame in read_frames(source, file, options.list_format):
            needed = [columns.image, *columns.required(caption_keys)]
            missing = next((name for name in needed if name not in frame), None)
            if missing is not None:
                raise ClipcidError(
                    f"List {source} has no column {missing!r}; it has {', '.join(map(str, frame.columns[:12]))}.",
                    "Name its columns: --image-column (paths of images), --caption-column or --caption-key, --key-column."
                    + ("" if len(frame.columns) > 1 else " Or say what separates them: --list-separator TEXT."),
                )
            if frame.empty:
                raise ClipcidError(f"List {source} has a header and no rows.", "Give a list with one row per image.")
            nothing = [None] * len(frame)
            named = [name for name in caption_keys or (columns.caption,) if name in frame]
            for name in {columns.image, columns.key, LABEL_COLUMN, *named}.intersection(frame):
                _refuse_structs(source, frame, name)
            paths = read_texts(source, frame, columns.image)
            keys = read_texts(source, frame, columns.key) if columns.key in frame else paths
            captions = zip(*(map(_captions, frame[name]) for name in named), strict=True) if named else nothing
            classes = _classes(source, frame[LABEL_COLUMN]) if LABEL_COLUMN in frame else nothing
            if not origin.is_plain("\0".join(paths)):
                for path in filter(None, paths):
                    origin.locate(path)  # what it may not name stops the step at its start
            for key, path, texts, labels in zip(keys, paths, captions, classes, strict=True):
                yield {"key": os.fsencode(key), "path": os.fsencode(path), "captions": texts, "classes": labels}


def read_frames(source: str, path: Path, form: ListFormat) -> Iterator[pd.DataFrame]:
    """Read a list slice by slice; what is missing in a cell is None."""
    import pandas as pd  # 0.15 s, which other kinds of data should not wait for

    name = without_query(source).lower()

    def read() -> Iterator[pd.DataFrame]:
        open_regular(path).close()
        if name.endswith(".parquet"):
            yield from _read_tables(path)
            return
        encoding, separator = find_form(name, path, form)
        options: dict[str, Any] = {"encoding": encoding, "dtype": str, "keep_default_na": False}
        # A separator of several letters is one of pandas' regular expressions, which its slower parser reads.
        options |= {"sep": re.escape(separator), "engine": "python"} if len(separator) > 1 else {"sep": separator}
        with (
            _BoundedText(io.BufferedReader(open_regular(path)), encoding, newline="") as file,  # type: ignore[type-var]
            pd.read_csv(file, **options, chunksize=VIRTUAL_SHARD) as frames,
        ):
            for frame in frames:
                file.begin_part()
                _validate_rows(source, frame, separator)
                yield frame

    try:
        for frame in read():
            yield frame.astype(object).where(frame.notna(), None)
    except ClipcidError:
        raise
    except FileNotFoundError as error:
        raise ClipcidError(f"There is no list {source}.", "Check the path.") from error
    except UnicodeError as error:
        raise ClipcidError(
            f"List {source} cannot be read as {form.encoding or 'UTF-8'}: {describe(error)}.",
            "Name its encoding, such as --list-encoding latin-1 or cp1252, or save it as UTF-8.",
        ) from error
    except Exception as error:  # pandas and pyarrow raise what they like for a damaged file
        raise ClipcidError(
            f"List {source} cannot be read: {describe(error)}.", "Give a csv, tsv or parquet file with a header."
        ) from error


def _read_tables(path: Path) -> Iterator[pd.DataFrame]:
    with open_regular(path) as file, pq.ParquetFile(path) as table:
        validate_expansion(table.metadata, file, binary=True)
        nothing = table.schema_arrow.empty_table()
        for batch in table.iter_batches(VIRTUAL_SHARD) if table.metadata.num_rows else [nothing]:
            # As columns: pandas would make one the index, if one was, and floats of integers where one is missing.
            yield batch.to_pandas(ignore_metadata=True, integer_object_nulls=True)


class _BoundedText(io.TextIOWrapper):
    """A text of which no part, and so no cell or row, may be longer than `_MOST_CHARACTERS`."""

    _left = _MOST_CHARACTERS

    def begin_part(self) -> None:
        self._left = _MOST_CHARACTERS

    def read(self, size: int | None = -1) -> str:
        return self._count(super().read(size))

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        return self._count(super().readline(self._left + 1 if size < 0 else size))

    def _count(self, text: str) -> str:
        self._left -= len(text)
        if self._left < 0:
            raise ValueError(f"{VIRTUAL_SHARD:,} rows, or fewer, have more than {_MOST_CHARACTERS:,} characters")
        return text


def find_form(name: str, path: Path, form: ListFormat) -> tuple[str, str]:
    """Return the encoding of a text and what separates its cells, where the user does not say."""
    encoding = form.encoding or _find_encoding(path)
    with path.open(encoding=encoding, errors="replace") as file:
        return encoding, form.separator or _find_separator(name, file.readline(_LONGEST_HEADER))


def _find_encoding(path: Path) -> str:
    """Return UTF-16 where a text is marked as that, as Excel's "Unicode text" is; else UTF-8, whose mark pandas knows."""
    with open_regular(path) as file:
        mark = file.read(2)
    return "utf-16" if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8"


def _find_separator(name: str, header: str) -> str:
    """Return what separates the cells of a text: open_clip writes and reads tabs, whatever a list is called."""
    if name.endswith(".tsv") or ("\t" in header and "," not in header):
        return "\t"
    return ";" if ";" in header and "," not in header else ","


def _validate_rows(source: str, frame: pd.DataFrame, separator: str) -> None:
    """Refuse rows that pandas has shifted, as they have more cells than the header, and cells that take in further rows."""
    import pandas as pd

    columns = frame.shape[1]
    if not isinstance(frame.index, pd.RangeIndex):  # of the first cells
        called = {"\t": "tab", ",": "comma"}.get(separator, separator)
        raise ClipcidError(
            f"The header of list {source} has {columns} columns, and rows have {columns + frame.index.nlevels}.",
            f"Put cells that contain a {called} into quotation marks.",
        )
    if separator != "\t" or columns == 1:
        return
    for name in frame:
        # Rows that were taken in have a line break and all their tabs; the captions of a csv may have commas and lines.
        cells = frame[name][frame[name].str.contains("\n", regex=False)]
        joined = cells[cells.str.count("\t") == (columns - 1) * cells.str.count("\n")]
        if len(joined):
            raise ClipcidError(
                f"A cell of list {source} takes in further rows, since it begins with a quotation mark: "
                f"{str(joined.iloc[0])[:60]!r}.",
                "Double the quotation marks within cells, or remove them.",
            )


def read_texts(source: str, frame: pd.DataFrame, column: str) -> list[str]:
    """Return the text of each cell of a column."""
    if not set(map(type, frame[column])).isdisjoint(_SEVERAL):
        raise ClipcidError(
            f"Column {column!r} of list {source} contains lists.",
            "Give a column of single values with --image-column or --key-column: one row per image.",
        )
    return list(map(read_cell, frame[column]))


def _refuse_structs(source: str, frame: pd.DataFrame, column: str) -> None:
    kinds = set(map(type, frame[column]))
    if not kinds.isdisjoint(_SEVERAL):
        kinds |= {type(part) for cell in frame[column] if isinstance(cell, _SEVERAL) for part in cell}
    if not kinds.isdisjoint((dict, tuple)):
        raise ClipcidError(
            f"Column {column!r} of list {source} contains structs or maps, not texts or numbers.",
            "Write the field that is wanted as a column of its own, or name another: --image-column, --caption-column, "
            "--caption-key, --key-column.",
        )


def _captions(cell: Any) -> list[str]:
    if isinstance(cell, _SEVERAL):
        return list(filter(None, map(read_cell, cut_cell(list(cell)))))
    text = read_cell(cell)
    return [text] if text else []


def _classes(source: str, cells: pd.Series[Any]) -> list[list[int]]:
    """Read the class numbers in each cell: none, one or several."""
    try:
        return [_numbers(cell) for cell in cells]
    except ValueError as error:
        raise ClipcidError(
            f"Column {LABEL_COLUMN!r} of list {source} contains something other than integers: {error}.",
            "Number the classes from 0 (several of one image separated by spaces), or rename the column.",
        ) from error


def _numbers(cell: Any) -> list[int]:
    if isinstance(cell, str):
        cell = re.split(r"[\s,;|]+", cell.strip())
    parts = cell if isinstance(cell, _SEVERAL) else [cell]
    numbers = [float(part) for part in parts if part not in ("", None)]
    broken = next((value for value in numbers if not value.is_integer() or abs(value) >= _MAX_NUMBER), None)
    if broken is not None:
        raise ValueError(f"{broken:g} is {'too large' if broken.is_integer() else 'not an integer'}")
    return list(dict.fromkeys(map(int, numbers)))
