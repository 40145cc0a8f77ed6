"""Images that are files of their own: in a folder, or named by a csv, tsv or parquet list; read in slices.

What is said of the images is held in Arrow columns, some 100 bytes an image, until there is an index; it is not sent to other
processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.remote import is_url, local_file
from clipcid_cli.formats.data.samples import IMAGE_SUFFIXES, Location, Sample, Unusable, natural_key
from clipcid_cli.formats.data.shard import Rows
from clipcid_cli.formats.reading import describe, open_regular, read_regular

if TYPE_CHECKING:
    import pandas as pd

VIRTUAL_SHARD = 10_000
"""Samples in a slice."""

LIST_SUFFIXES = (".csv", ".tsv", ".parquet")
LABEL_COLUMN = "label"
# What pandas makes of a cell of a parquet list.
_SEVERAL = (list, tuple, np.ndarray)

_Arrays: TypeAlias = dict[str, pa.Array]


@dataclasses.dataclass(frozen=True)
class _ImageRows(Rows):
    """Rows of images, listed when they are first asked for.

    Attributes:
        source: The folder or the list, as it was named.
    """

    source: str

    @cached_property
    def slices(self) -> list[pa.RecordBatch]:
        """The rows, `VIRTUAL_SHARD` a slice, with a column ``repeated``: whether an earlier one has the same key."""
        slices, seen = list[pa.RecordBatch](), set[str]()
        for columns in self._list():
            repeated = list[bool]()
            for key in self._keys(columns):
                repeated.append(key in seen)
                seen.add(key)
            slices.append(pa.record_batch({**columns, "repeated": pa.array(repeated)}))
        return slices

    def __len__(self) -> int:
        return len(self.slices)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def forget(self) -> None:
        self.__dict__.pop("slices", None)

    def read(self, number: int) -> Iterator[Sample | Unusable]:
        for row in self.slices[number].to_pylist():
            if not row["path"] or row["repeated"]:
                yield Unusable("duplicate_key" if row["path"] else "no_image", self._name(row))
            else:
                yield self._sample(row)

    def stamp(self, number: int) -> tuple[int, int]:
        rows = self.slices[number]
        return len(rows), int.from_bytes(hashlib.blake2b(rows.serialize(), digest_size=7).digest(), "big")

    def fingerprint(self, number: int) -> tuple[int, str]:
        """Return the number of rows, and a hash of what they say: paths, sizes, captions (of files too) and classes."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self.slices[number].to_pylist():
            sample = self._sample(row)
            content = (row["path"], row.get("size"), sample.key, sample.captions, sample.label, sample.labels)
            digest.update(repr(content).encode("utf-8", "surrogateescape"))
        return len(self.slices[number]), f"blake2b-rows:{digest.hexdigest()}"

    @abstractmethod
    def _list(self) -> Iterator[_Arrays]:
        """Yield the columns of each slice, among them ``path``, which is empty where a row names no image."""

    @abstractmethod
    def _keys(self, columns: _Arrays) -> list[str]:
        """Return the keys of the rows."""

    @abstractmethod
    def _name(self, row: dict[str, Any]) -> str:
        """Return what a user would look for to find a row."""

    @abstractmethod
    def _sample(self, row: dict[str, Any]) -> Sample:
        """Return a row as a sample."""


@dataclasses.dataclass(frozen=True)
class ImageFolder(_ImageRows):
    """A folder of images, in natural order of their paths: captions in ``.txt`` files next to them, or a folder per class.

    Folders within it are included, hidden files are not. Images whose names differ in the suffix only have the same key.
    """

    @cached_property
    def labels(self) -> dict[str, int]:
        """Number of each class by its name, where every image is in a folder of its class; else none.

        They are sorted as torchvision's ImageFolder sorts them.
        """
        paths = (path for rows in self.slices for path in rows["path"].to_pylist())
        folders = {path.partition(b"/")[0] if b"/" in path else b"" for path in paths}
        return {} if b"" in folders else {name: number for number, name in enumerate(sorted(map(os.fsdecode, folders)))}

    def _list(self) -> Iterator[_Arrays]:
        texts: dict[str, tuple[str, os.stat_result]] = {}
        images: list[tuple[str, int]] = []
        for path, stat in _walk(self.source):
            key, suffix = os.path.splitext(path)
            if suffix[1:].lower() in IMAGE_SUFFIXES:
                images.append((path, stat.st_size))
            elif suffix.lower() == ".txt" and (
                key not in texts or suffix > texts[key][0]
            ):  # of `1.TXT` and `1.txt` the latter
                texts[key] = suffix, stat
        images.sort(key=lambda image: tuple(natural_key(part) for part in image[0].split("/")))
        for start in range(0, len(images), VIRTUAL_SHARD):
            found = images[start : start + VIRTUAL_SHARD]
            captions = [texts.get(os.path.splitext(path)[0]) for path, _ in found]
            yield {
                "path": pa.array([os.fsencode(path) for path, _ in found], pa.binary()),
                "size": pa.array([size for _, size in found], pa.int64()),
                "caption_suffix": pa.array([text and text[0] for text in captions], pa.string()),
                "caption_size": pa.array([text and text[1].st_size for text in captions], pa.int64()),
                "caption_time": pa.array([text and text[1].st_mtime_ns for text in captions], pa.int64()),
            }

    def _keys(self, columns: _Arrays) -> list[str]:
        return [os.path.splitext(os.fsdecode(path))[0] for path in columns["path"].to_pylist()]

    def _name(self, row: dict[str, Any]) -> str:
        return os.fsdecode(row["path"])

    def _sample(self, row: dict[str, Any]) -> Sample:
        path, text = os.fsdecode(row["path"]), ""
        key = os.path.splitext(path)[0]
        if row["caption_suffix"]:
            with contextlib.suppress(OSError):  # a caption that cannot be read is a missing one, and counted as such
                file = os.path.join(self.source, key + row["caption_suffix"])
                text = read_regular(file).decode("utf-8", errors="replace").strip()
        label = self.labels.get(path.partition("/")[0])
        return Sample(key, Location(os.path.join(self.source, path)), (text,) if text else (), label)


def _walk(root: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield every file by its relative path; links to folders are followed, and each folder is visited once."""
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
                if entry.is_dir():
                    pending.append(path)
                elif entry.is_file():
                    yield path, entry.stat()


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
class ImageList(_ImageRows):
    """A ``.csv`` (commas, or tabs as open_clip's are), ``.tsv`` or ``.parquet`` file, or its URL, in its own order."""

    columns: Columns

    @cached_property
    def several(self) -> bool:
        """Whether images may have several classes each."""
        return any(len(found or ()) > 1 for rows in self.slices for found in rows["classes"].to_pylist())

    def _list(self) -> Iterator[_Arrays]:
        with local_file(self.source) as file:
            yield from map(self._convert, self._read_frames(file))

    def _read_frames(self, path: Path) -> Iterator[pd.DataFrame]:
        """Yield the rows of each slice."""
        import pandas as pd  # 0.15 s, which other kinds of data should not wait for

        try:
            open_regular(path).close()
            if self.source.lower().endswith(".parquet"):
                frame = pd.read_parquet(path)
                for start in range(0, len(frame) or 1, VIRTUAL_SHARD):
                    yield frame[start : start + VIRTUAL_SHARD]
                return
            with path.open(encoding="utf-8", errors="replace") as file:
                header = file.readline()
            # open_clip writes and reads tab-separated lists, whatever they are called.
            separator = "\t" if self.source.lower().endswith(".tsv") or ("\t" in header and "," not in header) else ","
            with pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, chunksize=VIRTUAL_SHARD) as frames:
                yield from frames
        except FileNotFoundError as error:
            raise ClipcidError(f"There is no list {self.source}.", "Check the path.") from error
        except Exception as error:  # pandas and pyarrow raise what they like for a damaged file
            raise ClipcidError(
                f"List {self.source} cannot be read: {describe(error)}.",
                "Give a csv, tsv or parquet file with a header.",
            ) from error

    def _convert(self, frame: pd.DataFrame) -> _Arrays:
        columns = self.columns
        if columns.image not in frame:
            raise ClipcidError(
                f"List {self.source} has no column {columns.image!r}; it has {', '.join(map(str, frame.columns[:12]))}.",
                "Give the column of image paths with --image-column (likewise --caption-column, --key-column).",
            )
        if frame.empty:
            raise ClipcidError(f"List {self.source} has a header and no rows.", "Give a list with one row per image.")
        paths = self._texts(frame, columns.image)
        captions = [_captions(cell) for cell in frame[columns.caption]] if columns.caption in frame else None
        classes = self._classes(frame) if LABEL_COLUMN in frame else None
        nothing = [None] * len(frame)
        return {
            "path": pa.array(paths, pa.string()),
            "key": pa.array(self._texts(frame, columns.key) if columns.key in frame else paths, pa.string()),
            "captions": pa.array(captions or nothing, pa.list_(pa.string())),
            "classes": pa.array(classes or nothing, pa.list_(pa.int64())),
        }

    def _texts(self, frame: pd.DataFrame, column: str) -> list[str]:
        if any(isinstance(cell, _SEVERAL) for cell in frame[column]):
            raise ClipcidError(
                f"Column {column!r} of list {self.source} contains lists.",
                "Give a column of single values with --image-column or --key-column: one row per image.",
            )
        return [_clean(cell) for cell in frame[column]]

    def _classes(self, frame: pd.DataFrame) -> list[list[int]]:
        """Read the class numbers in each cell: none, one or several."""
        try:
            return [_numbers(cell) for cell in frame[LABEL_COLUMN]]
        except ValueError as error:
            raise ClipcidError(
                f"Column {LABEL_COLUMN!r} of list {self.source} contains something other than integers: {error}.",
                "Number the classes from 0 (several of one image separated by spaces), or rename the column.",
            ) from error

    def _keys(self, columns: _Arrays) -> list[str]:
        keys: list[str] = columns["key"].to_pylist()
        return keys

    def _name(self, row: dict[str, Any]) -> str:
        return str(row["key"])

    def _sample(self, row: dict[str, Any]) -> Sample:
        path, classes, label, labels = row["path"], row["classes"], None, None
        if path and not is_url(path):
            path = os.path.join(
                self.source.rpartition("/")[0] if is_url(self.source) else os.path.dirname(self.source), path
            )
        if classes is not None and self.several:
            labels = tuple(classes)
        elif classes:
            label = classes[0]
        return Sample(row["key"], Location(path), tuple(row["captions"] or ()), label, labels)


def _captions(cell: Any) -> list[str]:
    texts = map(_clean, cell if isinstance(cell, _SEVERAL) else [cell])
    return [text for text in texts if text]


def _clean(cell: Any) -> str:
    return "" if _is_missing(cell) else str(cell).strip()


def _numbers(cell: Any) -> list[int]:
    parts = re.split(r"[\s,;|]+", cell.strip()) if isinstance(cell, str) else cell
    if not isinstance(parts, _SEVERAL):
        parts = [] if _is_missing(cell) else [cell]
    numbers = [float(part) for part in parts if part != ""]
    broken = next((number for number in numbers if not number.is_integer()), None)
    if broken is not None:
        raise ValueError(f"{broken:g} is not an integer")
    return list(dict.fromkeys(int(number) for number in numbers))


def _is_missing(cell: Any) -> bool:
    import pandas as pd

    return bool(pd.isna(cell))
