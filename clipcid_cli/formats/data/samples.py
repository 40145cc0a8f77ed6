"""Samples of image-text data: what each is, and where its bytes are."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from glob import glob
from typing import TYPE_CHECKING

from clipcid_cli.formats.data.addresses import is_remote
from clipcid_cli.formats.files import open_regular, read_part, read_regular, validate_size

if TYPE_CHECKING:
    from clipcid_cli.formats.data.cells import Origin
    from clipcid_cli.formats.data.shard_cache import ShardCopy

# Suffixes of images; of several in one sample the first in this order is taken (open_clip's, then others that Pillow reads).
IMAGE_SUFFIXES = ("jpg", "png", "jpeg", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm")

_OPEN_FILES = 64

MAX_SAMPLE_BYTES = 64 * 2**20
"""Bytes that one file of a sample may have, unless ``--max-sample-bytes`` says otherwise."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of a list's columns, or of a parquet file's with images; an optional ``label`` column numbers the classes.

    Where any cell of that column contains several numbers (a parquet list, or ``3 7`` in text), every image may have
    any number of classes, and an empty cell means none.
    """

    image: str = "filepath"  # see `cells.Origin`
    caption: str = "title"  # in parquet perhaps a list of several; optional
    key: str = "key"  # without such a column, the path as written

    def required(self, caption_keys: Sequence[str]) -> list[str]:
        """Name the columns that must exist: columns of captions, and columns that the user renamed."""
        renamed = ((self.caption, Columns.caption), (self.key, Columns.key))
        return [*caption_keys, *(name for name, default in renamed if name != default)]


@dataclasses.dataclass(frozen=True)
class ListFormat:
    """How a list is read where that is not found out: None."""

    root: str | None = None  # the folder of relative paths; else that of the list
    separator: str | None = None  # of the cells of a text
    encoding: str | None = None  # of a text


@dataclasses.dataclass(frozen=True, slots=True)
class ByteRange:
    """Where the bytes of an image or of an attributes file are stored."""

    path: str  # a local file, a URL that fsspec knows, or a ``pipe:`` command; empty where there is none
    offset: int = 0  # of a parquet file the number of a row
    size: int | None = None  # number of bytes; None for a whole file
    # The bytes themselves, where they came with a stream.
    data: bytes | None = dataclasses.field(default=None, compare=False, repr=False)
    # Local copy of a file behind a URL, or of the images of a parquet file, to read from.
    copy: ShardCopy | None = dataclasses.field(default=None, compare=False, repr=False)
    column: str | None = None  # that of the images in a parquet file
    max_bytes: int = dataclasses.field(default=MAX_SAMPLE_BYTES, compare=False, repr=False)
    # The list or folder that named it, where that is no file of the data itself.
    origin: Origin | None = dataclasses.field(default=None, compare=False, repr=False)

    def read(self) -> bytes:
        """Read the bytes; an OSError where the file is missing or has become shorter.

        A TooManyBytesError, which is an OSError too, where there are more than `max_bytes`: they are not read.
        Commands are never run here: a path may come from a file that someone else wrote.
        """
        problem = "" if self.origin is None else self.origin.why_refused(self.path)
        if problem:  # an index may be someone else's, too
            raise OSError(f"{self.path}{problem}")
        if self.size is not None:
            validate_size(self.path, self.size, self.max_bytes)
        if self.data is not None:
            return self.data
        if self.copy is not None or self.column is not None or is_remote(self.path):
            from clipcid_cli.formats.data.distant import read_distant  # none of it is needed for files of this disk

            return read_distant(self)
        if self.size is None:
            return read_regular(self.path, self.max_bytes)
        return read_part(_open_kept(self.path).fd, self.path, self.offset, self.size)


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One image with its captions and classes; of a file of texts, a text alone."""

    key: str  # its name, unique in the data set
    image: ByteRange
    captions: tuple[str, ...] = ()
    label: int | None = None
    labels: tuple[int, ...] | None = None  # numbers of its classes, none or several, where a list says so
    # Its vector of classes, a ``.npy`` with a 1 for each, as in CLIP_benchmark's multilabel folders.
    multi_hot: ByteRange | None = None
    attributes: ByteRange | None = None
    # Where its captions are, by each key, None where it has none; empty where they cannot be read from there again.
    captions_at: tuple[ByteRange | None, ...] = ()

    def without_image_data(self) -> Sample:
        """Return the sample without the bytes of its image, where they came with a stream: they are most of it."""
        if self.image.data is None:
            return self
        return dataclasses.replace(self, image=dataclasses.replace(self.image, data=None))


def natural_key(text: str) -> tuple[object, ...]:
    """Sort key by which ``2.tar`` comes before ``10.tar``; the text itself decides between ``01`` and ``1``."""
    return tuple(int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", text))), text


def match_pattern(pattern: str) -> list[str]:
    """Return the paths that a pattern matches, 2 before 10; the pattern itself where it is a path or matches none."""
    if os.path.lexists(pattern):
        return [pattern]
    return sorted(glob(os.path.expanduser(pattern)), key=natural_key) or [pattern]


class Handle:
    """A descriptor of an open file, closed when nothing holds it any more."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


@lru_cache(maxsize=_OPEN_FILES)
def _open_kept(path: str) -> Handle:
    with open_regular(path) as file:
        return Handle(os.dup(file.fileno()))
