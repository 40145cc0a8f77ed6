"""Images that are files of their own: in a folder, or named by a csv, tsv or parquet list; read in slices.

What is known of the images is held in Arrow columns, some 130 bytes an image, until there is an index. It is not sent to
other processes: they list the images themselves where they need to.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Set
from functools import cached_property
from itertools import islice
from pathlib import Path
from stat import S_ISDIR
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.cells import Origin, origin_of_list
from clipcid_cli.formats.data.remote import local_file, without_query
from clipcid_cli.formats.data.samples import (
    IMAGE_SUFFIXES,
    MAX_SAMPLE_BYTES,
    ByteRange,
    Columns,
    ListFormat,
    Sample,
    cut_cell,
    gather_captions,
    natural_key,
    read_cell,
    split_captions,
)
from clipcid_cli.formats.data.shard import Slices
from clipcid_cli.formats.files import atomic_file, describe, open_regular, read_regular, reading
from clipcid_cli.formats.parquet import validate_expansion, write_tables
from clipcid_cli.formats.skips import Skips

if TYPE_CHECKING:
    import pandas as pd

VIRTUAL_SHARD = 10_000
"""Samples in a slice."""

TEXT_LISTS = (".csv", ".tsv")
LIST_SUFFIXES = (*TEXT_LISTS, ".parquet")
LABEL_COLUMN = "label"
# Of a parquet list that is written.
_ROWS_OF_GROUP = 2**17
_BYTES_OF_GROUP = 2**26
_MOST_CHARACTERS = 2**27  # of the rows of a slice in a text
_LONGEST_HEADER = 2**20
_MAX_NUMBER = 2**53  # of a class: beyond, a float does not tell integers apart
# What pandas makes of a cell of a parquet list.
_SEVERAL = (list, tuple, np.ndarray)

_SCHEMA = pa.schema(
    [
        ("key", pa.binary()),  # as the path: names of files need not be UTF-8
        ("path", pa.binary()),  # of the image, relative to the folder; empty where a row of a list names none
        ("captions", pa.list_(pa.list_(pa.string()))),  # by column of captions
        ("classes", pa.list_(pa.int64())),  # null where there are none
        ("size", pa.int64()),  # of the image, where it was looked at
        ("text", pa.binary()),  # path of the file that holds the caption, its size and time
        ("text_size", pa.int64()),
        ("text_time", pa.int64()),
        ("repeated", pa.bool_()),  # whether an earlier image has the same key
    ]
)


class _Listed(NamedTuple):
    slices: list[pa.RecordBatch]
    class_names: tuple[str, ...] | None
    several: bool  # whether an image may have several classes


@dataclasses.dataclass(frozen=True)
class Images(Slices):
    """The images of a folder or a list, listed when they are first asked for."""

    source: str  # the folder, or the list or its URL
    columns: Columns | None = None  # of a list
    caption_lines: bool = False  # whether each line of a ``.txt`` is a caption
    caption_keys: tuple[str, ...] = ()  # columns of captions that a list must have, in place of that of `columns`
    max_sample_bytes: int = MAX_SAMPLE_BYTES  # of an image or of its ``.txt``
    schemes: tuple[str, ...] = ()  # of URLs that a list may name, beside http and https
    list_format: ListFormat = dataclasses.field(default_factory=ListFormat)

    @cached_property
    def origin(self) -> Origin:
        """Where the images are named."""
        if self.columns is None:
            return Origin(self.source)
        return origin_of_list(self.source, self.schemes, self.list_format.root)

    @cached_property
    def _listed(self) -> _Listed:
        if self.columns is None:
            class_names, rows = _list_folder(self.source)
        else:
            class_names = None
            rows = _list_rows(self.origin, self.columns, self.caption_keys, self.list_format)
        slices = list[pa.RecordBatch]()
        seen = set[bytes]()
        several = False
        while pending := list(islice(rows, VIRTUAL_SHARD)):
            for row in pending:
                several |= len(row.get("classes") or ()) > 1
                row["repeated"] = row["key"] in seen
                seen.add(row["key"])
            slices.append(pa.RecordBatch.from_pylist(pending, _SCHEMA))
        return _Listed(slices, class_names, several)

    def column_names(self) -> list[str]:
        """Return the names of the columns of a list; of a folder none."""
        if self.columns is None:
            return []
        with local_file(self.source) as file:
            return list(map(str, next(_read_frames(self.source, file, self.list_format)).columns))

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, where every image of a folder is in a folder of its class."""
        return self._listed.class_names

    def __len__(self) -> int:
        return len(self._listed.slices)

    def __getstate__(self) -> dict[str, Any]:
        """Return what names the images, not what was listed."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def forget(self) -> None:
        self.__dict__.pop("_listed", None)

    def read(self, number: int, skips: Skips) -> Iterator[Sample]:
        """Yield the samples of a slice; count rows without a path or a key, and those whose key an earlier one has."""
        for row in self._listed.slices[number].to_pylist():
            name = os.fsdecode(row["key"] if self.columns is not None and row["key"] else row["path"])
            if not row["path"]:
                skips.add("no_image", name)
            elif not row["key"]:
                skips.add("no_key", name)
            elif row["repeated"]:
                skips.add("duplicate_key", name)
            else:
                yield self._sample(row, skips)

    def stamp(self, number: int) -> tuple[int, ...]:
        """Return the number of rows, and a hash of them."""
        rows = self._listed.slices[number]
        return len(rows), int.from_bytes(hashlib.blake2b(rows.serialize(), digest_size=7).digest(), "big")

    def fingerprint(self, number: int) -> tuple[int, str]:
        """Return the number of rows, and a hash of paths, sizes, captions and classes."""
        digest = hashlib.blake2b((self.list_format.root or "").encode("utf-8", "surrogateescape"), digest_size=16)
        rows = self._listed.slices[number].to_pylist()
        for row in rows:
            sample = self._sample(row, Skips())
            content = (row["path"], row["size"], row["key"], sample.captions, sample.label, sample.labels)
            digest.update(repr(content).encode("utf-8", "surrogateescape"))
        return len(rows), f"blake2b-rows:{digest.hexdigest()}"

    def files(self, number: int) -> Iterator[tuple[str, list[str]]]:
        """Yield the key of each image of a folder's slice, and the paths of its files there: the image, and its caption."""
        for row in self._listed.slices[number].to_pylist():
            if not row["repeated"]:
                yield os.fsdecode(row["key"]), [os.fsdecode(row[name]) for name in ("path", "text") if row[name]]

    def resolve(self, path: str) -> str:
        """Return the place of an image by its path in the folder or as the list has it."""
        if self.columns is None:
            return os.path.join(self.source, path)
        if "\\" in path and not os.path.exists(os.path.join(self.origin.folder, path)):
            path = path.replace("\\", "/")  # as Windows writes paths
        return self.origin.locate(path)

    def _sample(self, row: dict[str, Any], skips: Skips) -> Sample:
        path = os.fsdecode(row["path"])
        captions: tuple[str, ...] = ()
        classes = row["classes"]
        if self.columns is not None and row["captions"] is not None:
            keys = self.caption_keys or (self.columns.caption,)
            captions = gather_captions(keys, row["captions"], skips)
        if row["text"]:
            with contextlib.suppress(OSError):  # a caption that cannot be read is a missing one, and counted as such
                text = read_regular(os.path.join(self.source, os.fsdecode(row["text"])), self.max_sample_bytes)
                captions = split_captions(text, a_line_each=self.caption_lines, skips=skips)
        return Sample(
            key=os.fsdecode(row["key"]),
            image=ByteRange(self.resolve(path), max_bytes=self.max_sample_bytes, origin=self.origin),
            captions=captions,
            label=classes[0] if classes and not self._listed.several else None,
            labels=tuple(classes) if classes is not None and self._listed.several else None,
        )


def _list_folder(root: str) -> tuple[tuple[str, ...] | None, Iterator[dict[str, Any]]]:
    """List a folder of images, in natural order of their paths: captions are in ``.txt`` files next to them.

    Returns:
        The names of the classes when every image is in a folder of its class (sorted as torchvision's ImageFolder sorts
        them, so that labels agree), else None; and the rows.
    """
    texts: dict[str, tuple[str, os.stat_result]] = {}
    images: list[tuple[str, int]] = []
    for path, stat in _walk(root):
        key, suffix = os.path.splitext(path)
        if suffix[1:].lower() in IMAGE_SUFFIXES:
            images.append((path, stat.st_size))
        elif suffix.lower() == ".txt":
            texts[key] = max(texts.get(key, ("", stat)), (path, stat))  # of `1.TXT` and `1.txt` the latter
    images.sort(key=lambda image: tuple(natural_key(part) for part in image[0].split("/")))
    class_names: tuple[str, ...] | None = None
    if images and all("/" in path for path, _ in images):
        class_names = tuple(sorted({path.partition("/")[0] for path, _ in images}))
    labels = {name: number for number, name in enumerate(class_names or ())}

    def rows() -> Iterator[dict[str, Any]]:
        for path, size in images:
            key = os.path.splitext(path)[0]
            row = {"key": os.fsencode(key), "path": os.fsencode(path), "size": size}
            if labels:
                row["classes"] = [labels[path.partition("/")[0]]]
            if key in texts:
                text, stat = texts[key]
                row |= {"text": os.fsencode(text), "text_size": stat.st_size, "text_time": stat.st_mtime_ns}
            yield row

    return class_names, rows()


def _walk(root: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield every file that is not hidden by its relative path; links to folders are followed, each folder visited once.

    Links to nothing and what else is no file are among them, to be counted where they are called as images.
    """
    visited: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        folder = pending.pop()
        identity = os.stat(os.path.join(root, folder))
        if (identity.st_dev, identity.st_ino) in visited:
            continue
        visited.add((identity.st_dev, identity.st_ino))
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    continue
                try:
                    found = entry.stat()
                except OSError:  # a link to nothing, or to itself
                    found = entry.stat(follow_symlinks=False)
                if S_ISDIR(found.st_mode):
                    pending.append(path)
                else:
                    yield path, found


def _list_rows(
    origin: Origin, columns: Columns, caption_keys: tuple[str, ...], form: ListFormat
) -> Iterator[dict[str, Any]]:
    """List a ``.csv`` (commas, or tabs as open_clip's are), ``.tsv`` or ``.parquet`` file, or its URL, in its own order."""
    source = origin.source
    with local_file(source) as file:
        for frame in _read_frames(source, file, form):
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
            texts = [name for name in caption_keys or (columns.caption,) if name in frame]
            for name in {columns.image, columns.key, LABEL_COLUMN, *texts}.intersection(frame):
                _refuse_structs(source, frame, name)
            paths = _texts(source, frame, columns.image)
            keys = _texts(source, frame, columns.key) if columns.key in frame else paths
            captions = zip(*(map(_captions, frame[name]) for name in texts), strict=True) if texts else nothing
            classes = _classes(source, frame[LABEL_COLUMN]) if LABEL_COLUMN in frame else nothing
            if not origin.is_plain("\0".join(paths)):
                for path in filter(None, paths):
                    origin.locate(path)  # what it may not name stops the step at its start
            for key, path, found, numbers in zip(keys, paths, captions, classes, strict=True):
                yield {"key": os.fsencode(key), "path": os.fsencode(path), "captions": found, "classes": numbers}


def _read_frames(source: str, path: Path, form: ListFormat) -> Iterator[pd.DataFrame]:
    """Read a list slice by slice; what is missing in a cell is None."""
    import pandas as pd  # 0.15 s, which other kinds of data should not wait for

    name = without_query(source).lower()

    def read() -> Iterator[pd.DataFrame]:
        open_regular(path).close()
        if name.endswith(".parquet"):
            yield from _read_tables(path)
            return
        encoding, separator = _find_form(name, path, form)
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


def _find_form(name: str, path: Path, form: ListFormat) -> tuple[str, str]:
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


def _texts(source: str, frame: pd.DataFrame, column: str) -> list[str]:
    if not set(map(type, frame[column])).isdisjoint(_SEVERAL):
        raise ClipcidError(
            f"Column {column!r} of list {source} contains lists.",
            "Give a column of single values with --image-column or --key-column: one row per image.",
        )
    return list(map(read_cell, frame[column]))


def _refuse_structs(source: str, frame: pd.DataFrame, column: str) -> None:
    kinds = set(map(type, frame[column]))
    if not kinds.isdisjoint(_SEVERAL):
        kinds |= {type(each) for cell in frame[column] if isinstance(cell, _SEVERAL) for each in cell}
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
    broken = next((number for number in numbers if not number.is_integer() or abs(number) >= _MAX_NUMBER), None)
    if broken is not None:
        raise ValueError(f"{broken:g} is {'too large' if broken.is_integer() else 'not an integer'}")
    return list(dict.fromkeys(map(int, numbers)))


class _KeptRows(NamedTuple):
    """The rows of a slice that are kept: their numbers in it, where their images are, and their keys."""

    rows: list[int]
    paths: list[str]
    keys: list[str]


def copy_list(images: Images, target: Path, keys_of: Callable[[int], Set[str]]) -> list[int]:
    """Copy the rows of samples with the given keys to a new list of the same form; return how many of each slice.

    All columns stay. Paths become absolute, so that they lead to the images from the new place. A list whose keys are its
    paths gets a column of them, so that keys stay the same.

    Args:
        keys_of: The keys of a slice to keep; called for one slice after the other.
    """
    assert images.columns is not None, "a list"
    columns, source = images.columns, images.source
    sizes = list[int]()

    def choose(frame: pd.DataFrame) -> _KeptRows:
        keys = keys_of(len(sizes))
        paths = _texts(source, frame, columns.image)
        named = _texts(source, frame, columns.key) if columns.key in frame else paths
        seen = set[str]()
        kept = _KeptRows([], [], [])
        for row, (key, path) in enumerate(zip(named, paths, strict=True)):
            if key in keys and path and key not in seen:
                kept.rows.append(row)
                kept.paths.append(images.resolve(path))
                kept.keys.append(key)
            seen.add(key)
        sizes.append(len(kept.rows))
        return kept

    with local_file(source) as file, atomic_file(target) as copy:
        name = without_query(source).lower()
        if name.endswith(".parquet"):
            with reading(file, "a parquet file", "Give a csv, tsv or parquet file with a header."):
                _copy_table(pq.ParquetFile(file), copy, columns, choose)
            return sizes
        _, separator = _find_form(name, file, images.list_format)
        separator = "\t" if len(separator) > 1 else separator  # pandas writes no longer one
        for frame in _read_frames(source, file, images.list_format):
            kept = choose(frame)
            rows = frame.iloc[kept.rows].assign(**{columns.image: kept.paths})
            if columns.key not in rows:
                rows[columns.key] = kept.keys
            text = rows.to_csv(sep=separator, index=False, header=len(sizes) == 1, lineterminator="\n")
            copy.write(text.encode())
    return sizes


def _copy_table(
    file: pq.ParquetFile,
    copy: IO[bytes],
    columns: Columns,
    choose: Callable[[pd.DataFrame], _KeptRows],
) -> None:
    schema = file.schema_arrow
    new_key = columns.key not in schema.names
    used = [columns.image] if new_key else [columns.image, columns.key]
    if new_key:
        schema = schema.append(pa.field(columns.key, pa.string()))

    def kept_rows() -> Iterator[pa.Table]:
        for table in _slice_rows(file, VIRTUAL_SHARD):
            frame = table.select(used).to_pandas(ignore_metadata=True, integer_object_nulls=True).astype(object)
            kept = choose(frame.where(frame.notna(), None))
            rows = table.take(pa.array(kept.rows, pa.int64()))
            place = rows.schema.get_field_index(columns.image)
            field = rows.schema.field(place)
            rows = rows.set_column(place, field, pa.array(kept.paths, pa.string()).cast(field.type))
            if new_key:
                rows = rows.append_column(schema.field(columns.key), pa.array(kept.keys, pa.string()))
            yield rows.cast(schema)

    write_tables(copy, schema, kept_rows(), max_rows=_ROWS_OF_GROUP, max_bytes=_BYTES_OF_GROUP)


def _slice_rows(file: pq.ParquetFile, size: int) -> Iterator[pa.Table]:
    """Yield the rows of a file, `size` at a time whatever its row groups are."""
    pending = file.schema_arrow.empty_table()
    for batch in file.iter_batches(size):
        pending = pa.concat_tables([pending, pa.Table.from_batches([batch])])
        while len(pending) >= size:
            yield pending.slice(0, size)
            pending = pending.slice(size)
    if len(pending):
        yield pending
