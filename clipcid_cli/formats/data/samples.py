"""Samples of image-text data and their shards, whatever kind of file they are stored in."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from clipcid_cli.formats.data.remote import is_pipe, is_url, read_range, read_whole
from clipcid_cli.formats.data.shard_cache import ShardCopy
from clipcid_cli.formats.reading import read_regular
from clipcid_cli.formats.skips import Skips

# Suffixes of images; of several in one sample the first in this order is taken (open_clip's, then others that Pillow reads).
IMAGE_SUFFIXES = ("jpg", "png", "jpeg", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm")

_OPEN_FILES = 64
# Copies a process holds, so that they are not removed: one for each shard whose samples are shuffled together.
_OPEN_COPIES = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Location:
    """Where the bytes of an image or of an attributes file are stored.

    Attributes:
        path: A local file, a URL that fsspec knows, or a ``pipe:`` command.
        size: Number of bytes; None for a whole file.
        data: The bytes themselves, where they came with a stream.
        copy: Local copy of a file behind a URL, to read from.
    """

    path: str
    offset: int = 0
    size: int | None = None
    data: bytes | None = dataclasses.field(default=None, compare=False, repr=False)
    copy: ShardCopy | None = dataclasses.field(default=None, compare=False, repr=False)

    def read(self) -> bytes:
        """Read the bytes. Handles of local files are kept open between calls, separately in each process.

        Raises:
            OSError: when the file is missing or has become shorter. Commands are never run here: a path may come from a
                file that someone else wrote.
            ClipcidError: when part of a file behind a URL cannot be fetched.
        """
        if self.data is not None:
            return self.data
        if self.copy is not None and self.size is not None:
            return self._read_from(_copy_handle(self.copy))
        if is_pipe(self.path):
            raise OSError(f"the output of {self.path} has passed")
        if is_url(self.path):
            return read_whole(self.path) if self.size is None else read_range(self.path, self.offset, self.size)
        if self.size is None:
            return read_regular(self.path)
        return self._read_from(_handle(self.path))

    def _read_from(self, handle: _Handle) -> bytes:
        assert self.size is not None, "part of a file"
        data = os.pread(handle.fd, self.size, self.offset)
        if len(data) != self.size:
            raise OSError(f"{self.path} ends {self.size - len(data)} bytes early")
        return data

    def without_data(self) -> Location:
        """Return where the bytes are, without the bytes."""
        return self if self.data is None else dataclasses.replace(self, data=None)


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One image with its captions and classes.

    Attributes:
        key: Its name, unique in the data set.
        captions: Its captions; empty when it has none.
        label: Number of its class, where each image has one.
        labels: Numbers of its classes, none or several, where a list says so.
        multi_hot: Its vector of classes, a ``.npy`` of zeros and ones (see `formats.data.multi_label`).
        attributes: Its JSON attributes.
        captions_at: Where the text of its captions is; None where they are not in the shard's own file.
    """

    key: str
    image: Location
    captions: tuple[str, ...] = ()
    label: int | None = None
    labels: tuple[int, ...] | None = None
    multi_hot: Location | None = None
    attributes: Location | None = None
    captions_at: Location | None = None

    def without_image_data(self) -> Sample:
        """Return the sample without the bytes of its image, which are most of it."""
        return self if self.image.data is None else dataclasses.replace(self, image=self.image.without_data())

    def without_data(self) -> Sample:
        """Return the sample without the bytes that came with a stream."""
        if self.image.data is None:
            return self
        return dataclasses.replace(
            self,
            image=self.image.without_data(),
            multi_hot=self.multi_hot and self.multi_hot.without_data(),
            attributes=self.attributes and self.attributes.without_data(),
            captions_at=self.captions_at and self.captions_at.without_data(),
        )


class Shard(Protocol):
    """Some thousands of samples that are read together: a tar, or a slice of a folder or list. Picklable and small."""

    @property
    def name(self) -> str:
        """Name of the shard, unique in the data set."""

    def samples(self, skips: Skips | None = None) -> list[Sample]:
        """List its samples in order.

        Args:
            skips: Counts the samples that are omitted: those without an image or with a key that occurs earlier in the
                shard.
        """

    def stream(self, skips: Skips | None = None) -> Iterator[Sample]:
        """Yield its samples in order while it is read; those of a shard behind a URL or a command come with their bytes.

        Args:
            skips: As of `samples`; complete once all samples were taken.
        """

    def fingerprint(self) -> dict[str, Any]:
        """Describe the shard's content for a sidecar: ``path``, ``size``, ``hash``."""

    @property
    def source(self) -> str:
        """Path or URL of the tar, folder or list that it is read from."""

    @property
    def file(self) -> str:
        """The file its samples are in, as their locations name it; empty where each image is a file of its own."""

    def stamp(self) -> tuple[int, int]:
        """Return two numbers that change when the shard does, at the cost of a look at its file's size and time.

        (0, 0) for a file behind a URL, which is not asked for at each start.
        """

    def split_captions(self, text: bytes) -> tuple[str, ...]:
        """Return the captions in the text at `Sample.captions_at`."""


def natural_key(text: str) -> tuple[object, ...]:
    """Sort key by which ``2.tar`` comes before ``10.tar``; the text itself decides between ``01`` and ``1``."""
    parts: list[object] = list(re.split(r"(\d+)", text))
    parts[1::2] = [int(str(number)) for number in parts[1::2]]
    return tuple(parts), text


class _Handle:
    """A file that is closed when the cache drops it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


@lru_cache(maxsize=_OPEN_FILES)
def _handle(path: str) -> _Handle:
    return _Handle(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


@lru_cache(maxsize=_OPEN_COPIES)
def _copy_handle(copy: ShardCopy) -> _Handle:
    return _Handle(copy.open())


def close_copies() -> None:
    """Close the copies of shards that this process holds open, so that they can make room for others."""
    _copy_handle.cache_clear()


def relative_key(path: Path) -> str:
    """Return a file's key: its relative path without the suffix, with forward slashes."""
    return path.with_suffix("").as_posix()
