"""Rows in ``.npy`` files and ``.npz`` archives: described by their headers, mapped rather than read.

numpy's ``savez`` stores its members without compression, so an array is a contiguous part of the archive that can be
mapped like a ``.npy``. Members of ``savez_compressed`` can only be unpacked into memory.
"""

from __future__ import annotations

import dataclasses
import math
import os
import zipfile
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.reading import reading

_FIX = "Copy or make it again, or choose other embeddings."
# Arrays of at most this size are read whole: that takes a tenth of the time to map a file, and no descriptor.
_SMALL = 2**16
_LOCAL_HEADER = 30
_ENCRYPTED = 1

Header = tuple[tuple[int, ...], bool, np.dtype[Any]]  # shape, whether by column, number format


@dataclasses.dataclass(frozen=True, slots=True)
class RowFile:
    """An array of rows in a file.

    Attributes:
        offset: First byte of its values; None where they are compressed.
        stamp: Inode and time of the file when it was looked at.
        by_column: Whether it is stored in Fortran order.
        member: Name of the array in an archive; None where the file is the array.
        size: Bytes of the file, or of the member.
        hash: Of the content, where something records it; None where the file must be read for it.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int | None
    stamp: tuple[int, int]
    by_column: bool = False
    member: str | None = None
    size: int = 0
    hash: str | None = None

    @property
    def label(self) -> str:
        """Name of the rows for errors."""
        return str(self.path) if self.member is None else f"{self.path}[{self.member}]"

    @property
    def unpacked(self) -> int:
        """Bytes of memory that mapping takes; 0 where the rows stay on the disk."""
        return self.size if self.offset is None else 0

    def __hash__(self) -> int:
        return hash((self.path, self.member))

    def map(self) -> npt.NDArray[Any]:
        """Return the array: mapped, read where it is small, unpacked where it is compressed."""
        if 0 in self.shape:  # nothing to map
            return np.empty(self.shape, self.dtype)
        order: Literal["C", "F"] = "F" if self.by_column else "C"
        size = math.prod(self.shape) * self.dtype.itemsize
        with reading(self.path, "an array", _FIX) as file:
            stat = os.fstat(file.fileno())
            if (stat.st_ino, stat.st_mtime_ns) != self.stamp:
                raise OSError("it was replaced after this run had begun")
            if self.offset is None:
                with np.load(file, allow_pickle=False) as archive:
                    return np.asarray(archive[self.member])
            if size > _SMALL:
                return np.memmap(file, self.dtype, "r", self.offset, self.shape, order)
            data = os.pread(file.fileno(), size, self.offset)
            if len(data) < size:
                raise OSError(f"it ends {size - len(data):,} bytes early")
            return np.frombuffer(data, self.dtype).reshape(self.shape, order=order)


def find_npy(path: Path) -> RowFile:
    """Look at an npy's header; the file is not mapped for it."""
    with reading(path, "an .npy", _FIX) as file:
        (shape, by_column, dtype), offset = _read_header(file)
        stat = os.fstat(file.fileno())
        needed = offset + math.prod(shape) * dtype.itemsize
        if stat.st_size < needed:
            raise OSError(f"it is cut off: its header promises {needed:,} bytes, and it has {stat.st_size:,}")
    return RowFile(path, shape, dtype, offset, (stat.st_ino, stat.st_mtime_ns), by_column, size=stat.st_size)


def list_arrays(path: Path) -> list[str]:
    """Return the names of the arrays in an archive, in its order."""
    with reading(path, "an .npz", _FIX), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def find_member(path: Path, name: str) -> RowFile:
    """Find an array of an archive by its headers; its values are not read."""
    with reading(path, f"an .npz with an array {name}", _FIX) as file, zipfile.ZipFile(file) as archive:
        if f"{name}.npy" not in archive.namelist():
            raise ClipcidError(
                f"{path} contains no array {name}; its arrays: {', '.join(list_arrays(path)) or 'none'}.",
                "Choose one that every .npz of the folder contains with --npz-array.",
            )
        member = archive.getinfo(f"{name}.npy")
        if member.flag_bits & _ENCRYPTED:
            raise ClipcidError(f"{path} is encrypted.", "Write it again without a password.")
        with archive.open(member) as values:
            (shape, by_column, dtype), begin = _read_header(values)
        if begin + math.prod(shape) * dtype.itemsize > member.file_size:
            raise ValueError(f"it promises {dtype} {list(shape)} and has {member.file_size:,} bytes")
        offset = None
        if member.compress_type == zipfile.ZIP_STORED:
            file.seek(member.header_offset)
            header = file.read(_LOCAL_HEADER)
            # The last four bytes are the lengths of the name and of the extra field, which may differ from those in the
            # archive's directory.
            lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            offset = member.header_offset + _LOCAL_HEADER + lengths + begin
        stat = os.fstat(file.fileno())
    stamp = (stat.st_ino, stat.st_mtime_ns)
    # The archive's own checksum of all bytes tells one array from another.
    return RowFile(path, shape, dtype, offset, stamp, by_column, name, member.file_size, f"crc32:{member.CRC:08x}")


def _read_header(file: IO[bytes]) -> tuple[Header, int]:
    """Read an npy's header at the place of the file: what it says, and how many bytes it takes."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects (a pickle)")
    if any(length < 0 for length in shape):
        raise ValueError(f"it holds {dtype} {list(shape)}")
    return (shape, by_column, dtype), file.tell()
