"""Images that are files of their own, in a folder or on a list, read in slices of some thousands.

What is known of the images is held in Arrow columns, some 130 bytes an image, until there is an index. It is not sent to
other processes: they list the images themselves where they need to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa

from clipcid_cli.formats.data.captions import clean_captions, gather_captions, split_captions
from clipcid_cli.formats.data.cells import Origin
from clipcid_cli.formats.data.samples import ByteRange, Sample
from clipcid_cli.formats.data.shard import ReadOptions, Shard
from clipcid_cli.formats.files import read_regular
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.skips import Skips
from clipcid_cli.shown import redact

VIRTUAL_SHARD = 10_000
"""Samples in a slice."""

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


class ListedImages(NamedTuple):
    """The images of a folder or list, in order."""

    rows: Iterable[dict[str, Any]]  # see `_SCHEMA`
    class_names: tuple[str, ...] | None = None
    texts_alone: int = 0  # files of captions beside images, of which none has their name


class _Sliced(NamedTuple):
    """What is held of the images of a folder or list."""

    slices: list[pa.RecordBatch]
    class_names: tuple[str, ...] | None
    several: bool  # whether an image may have several classes
    texts_alone: int


@dataclasses.dataclass(frozen=True)
class Images(ABC):
    """The images of a folder or a list, listed when they are first asked for."""

    source: str  # the folder, or the list or its URL
    options: ReadOptions

    @property
    @abstractmethod
    def origin(self) -> Origin:
        """Where the images are named."""

    @abstractmethod
    def list_images(self) -> ListedImages:
        """List the images."""

    @abstractmethod
    def resolve(self, path: str) -> str:
        """Return the place of an image by its path in the folder or as the list has it."""

    @abstractmethod
    def key_of(self, row: dict[str, Any]) -> bytes:
        """Return what names a row that is left out."""

    def column_names(self) -> list[str]:
        """Return the names of the columns of a list."""
        return []

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """Names of the columns of captions, for what is counted of them."""
        return ()

    @cached_property
    def _listed(self) -> _Sliced:
        listing = self.list_images()
        rows = iter(listing.rows)
        slices = list[pa.RecordBatch]()
        seen = set[bytes]()
        several = False
        while pending := list(islice(rows, VIRTUAL_SHARD)):
            for row in pending:
                several |= len(row.get("classes") or ()) > 1
                row["repeated"] = row["key"] in seen
                seen.add(row["key"])
            slices.append(pa.RecordBatch.from_pylist(pending, _SCHEMA))
        return _Sliced(slices, listing.class_names, several, listing.texts_alone)

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
        """Give up what was listed."""
        self.__dict__.pop("_listed", None)

    def rows(self, index: int) -> list[dict[str, Any]]:
        """Return the rows of a slice, see `_SCHEMA`."""
        rows: list[dict[str, Any]] = self._listed.slices[index].to_pylist()
        return rows

    def stamp(self, index: int) -> tuple[int, ...]:
        """Return the number of rows of a slice, a hash of them and, where there are any, the captions without an image."""
        rows = self._listed.slices[index]
        stamp = len(rows), int.from_bytes(hashlib.blake2b(rows.serialize(), digest_size=7).digest(), "big")
        alone = self.texts_alone(index)
        return (*stamp, alone) if alone else stamp

    def texts_alone(self, index: int) -> int:
        """Count the files of captions without an image, all of them with the first slice."""
        return 0 if index else self._listed.texts_alone

    def make_sample(self, row: dict[str, Any], skips: Skips) -> Sample:
        """Return the sample of a row; its caption is read where it is a file of its own."""
        captions: tuple[str, ...] = ()
        if row["captions"] is not None:
            cells = [clean_captions(cell, skips) for cell in row["captions"]]
            captions = gather_captions(self.caption_columns, cells, skips)
        if row["text"]:
            captions = self._read_text(os.fsdecode(row["text"]), skips)
        classes = row["classes"]
        several = self._listed.several
        return Sample(
            key=os.fsdecode(row["key"]),
            image=ByteRange(
                self.resolve(os.fsdecode(row["path"])), max_bytes=self.options.max_sample_bytes, origin=self.origin
            ),
            captions=captions,
            label=classes[0] if classes and not several else None,
            labels=tuple(classes) if classes is not None and several else None,
        )

    def _read_text(self, path: str, skips: Skips) -> tuple[str, ...]:
        options = self.options
        with contextlib.suppress(OSError):  # a caption that cannot be read is a missing one, and counted as such
            text = read_regular(os.path.join(self.source, path), options.max_sample_bytes)
            return split_captions(text, a_line_each=options.caption_lines, skips=skips)
        return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice(Shard):
    """Some thousands of images of a folder or a list, one after another."""

    images: Images
    index: int

    def _read_own(self, skips: Skips) -> Iterator[Sample]:
        """Yield the samples of a slice; count the rows that are left out.

        These have no path, no key, a key that an earlier one has, or a caption in a file that is too large.
        """
        if alone := self.images.texts_alone(self.index):
            skips.change("without_image", alone)
        for row_number, row in enumerate(self.images.rows(self.index), self.index * VIRTUAL_SHARD + 1):
            name = os.fsdecode(self.images.key_of(row)) or f"row {row_number}"
            if not row["path"]:
                skips.add("no_image", name)
            elif not row["key"]:
                skips.add("no_key", name)
            elif row["repeated"]:
                skips.add("duplicate_key", name)
            elif (row["text_size"] or 0) > self.max_sample_bytes:
                skips.add("too_many_bytes", name)
            else:
                yield self.images.make_sample(row, skips)

    @property
    def file(self) -> str:
        return ""

    @property
    def origin(self) -> Origin:
        return self.images.origin

    def column_names(self) -> list[str]:
        return self.images.column_names()

    def forget(self) -> None:
        self.images.forget()

    def stamp(self) -> tuple[int, ...]:
        return self.images.stamp(self.index)

    def fingerprint(self) -> FileRecord:
        """Describe a slice by its number of rows, and a hash of paths, sizes, captions and classes."""
        root = self.images.options.list_format.root or ""
        digest = hashlib.blake2b(root.encode("utf-8", "surrogateescape"), digest_size=16)
        rows = self.images.rows(self.index)
        for row in rows:
            sample = self.images.make_sample(row, Skips())
            content = (row["path"], row["size"], row["key"], sample.captions, sample.label, sample.labels)
            digest.update(repr(content).encode("utf-8", "surrogateescape"))
        return FileRecord(f"{redact(self.source)}#{self.name}", len(rows), f"blake2b-rows:{digest.hexdigest()}")


def cut(images: Images) -> list[Slice]:
    """Return images as shards."""
    options = images.options
    return [
        Slice(
            f"{index:05d}",
            images.source,
            prefix_keys=options.prefix_keys,
            max_sample_bytes=options.max_sample_bytes,
            images=images,
            index=index,
        )
        for index in range(len(images))
    ]
