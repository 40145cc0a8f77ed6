"""A file of rows in numpy's ``.npy`` form, mapped rather than read."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.reading import describe, reading_from

_FIX = "Make it again, or choose other embeddings."
# Arrays of at most this size are read whole: that takes a tenth of the time to map a file, and no descriptor.
_SMALL = 2**16
# What numpy writes before the values of an array of few dimensions; how it begins; bytes before the header's own text.
_HEADER = 128
_VERSION_1 = b"\x93NUMPY\x01\x00"
_BEFORE_HEADER = 10

Fingerprint = Callable[[Path], FileRecord]


class RowFile(Protocol):
    """Rows [n, D] in a file of any form, described by its header until they are mapped."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def label(self) -> str:
        """Name of the rows for errors: the file, and the array within it where it holds several."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Their shape according to the header."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Their number format."""

    @property
    def unpacked(self) -> int:
        """Bytes of memory that mapping takes; 0 where the rows stay on the disk."""

    def map(self) -> npt.NDArray[Any]:
        """Return the rows, mapped where possible."""

    def fingerprint(self, of_file: Fingerprint) -> FileRecord:
        """Describe the content for a sidecar: ``path``, ``size``, ``hash``; `of_file` does that for a whole file."""

    def __hash__(self) -> int:
        """Files are told apart by path and part, so that maps of them can be remembered."""


@dataclasses.dataclass(frozen=True, slots=True)
class NpyFile:
    """An npy file."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    stamp: tuple[int, int]
    fortran_order: bool = False
    unpacked: int = 0

    @property
    def label(self) -> str:
        """The file's path."""
        return str(self.path)

    def __hash__(self) -> int:
        return hash(self.path)

    def map(self) -> npt.NDArray[Any]:
        """Return the array, mapped, or read where it is small.

        Raises:
            ClipcidError: when it can no longer be read, or was replaced since its header was.
        """
        if 0 in self.shape:  # nothing to map
            return np.empty(self.shape, self.dtype)
        order: Literal["C", "F"] = "F" if self.fortran_order else "C"
        size = math.prod(self.shape) * self.dtype.itemsize
        try:
            if size <= _SMALL:
                return np.frombuffer(self._read(size), self.dtype).reshape(self.shape, order=order)
            with self.path.open("rb") as file:
                self._require_same(file.fileno())
                return np.memmap(file, self.dtype, "r", self.offset, self.shape, order)
        except (OSError, ValueError) as error:
            raise _unreadable(self.path, str(error)) from error

    def fingerprint(self, of_file: Fingerprint) -> FileRecord:
        """Describe the file for a sidecar."""
        return of_file(self.path)

    def _read(self, size: int) -> bytes:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._require_same(descriptor)
            data = os.pread(descriptor, size, self.offset)
        finally:
            os.close(descriptor)
        if len(data) < size:
            raise ValueError(f"it ends {size - len(data):,} bytes early")
        return data

    def _require_same(self, descriptor: int) -> None:
        stat = os.fstat(descriptor)
        if (stat.st_ino, stat.st_mtime_ns) != self.stamp:
            raise ValueError("it was replaced after this run had begun")


def find_npy(path: Path) -> NpyFile:
    """Look at an npy's header; the file is not mapped for it.

    Raises:
        ClipcidError: when it cannot be read, is truncated, or holds Python objects.
    """
    with reading_from(path, "an .npy", _FIX) as file:
        start = file.read(_HEADER)
        end = _BEFORE_HEADER + int.from_bytes(start[8:_BEFORE_HEADER], "little")
        if start.startswith(_VERSION_1) and end <= len(start):
            shape, fortran_order, dtype = _parse_header(start[:end])
        else:
            file.seek(0)
            shape, fortran_order, dtype = _read_header(file)
            end = file.tell()
        stat = os.fstat(file.fileno())
    if dtype.hasobject or any(length < 0 for length in shape):
        raise _unreadable(path, f"it holds {dtype} {list(shape)}")
    needed = end + math.prod(shape) * dtype.itemsize
    if stat.st_size < needed:
        raise _unreadable(path, f"it is cut off: its header promises {needed:,} bytes, and it has {stat.st_size:,}")
    return NpyFile(path, shape, dtype, end, (stat.st_ino, stat.st_mtime_ns), fortran_order)


def raw_file(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NpyFile:
    """Describe a file of bare values as if it were an npy without a header.

    Raises:
        ClipcidError: when there is none, or it is too short.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise _unreadable(path, describe(error)) from error
    if stat.st_size < (needed := math.prod(shape) * dtype.itemsize):
        raise _unreadable(path, f"it should have {needed:,} bytes, and it has {stat.st_size:,}")
    return NpyFile(path, shape, dtype, 0, (stat.st_ino, stat.st_mtime_ns))


@lru_cache(maxsize=4096)
def _parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read a header, or give what an equal one said: numpy takes 60 µs, and shards have as many rows as others."""
    return _read_header(io.BytesIO(header))


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _unreadable(path: Path, why: str) -> ClipcidError:
    return ClipcidError(f"{path} cannot be read: {why}.", _FIX)
