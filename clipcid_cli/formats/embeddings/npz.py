"""Arrays of rows in ``.npz`` archives, as in DataComp's metadata: mapped in place, not read.

numpy's ``savez`` stores its members without compression, so an array is a contiguous part of the archive that can be
mapped like a ``.npy``. Members of ``savez_compressed`` can only be unpacked into memory, which is done up to a limit.
"""

from __future__ import annotations

import dataclasses
import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.npy import Fingerprint
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.reading import reading

# Limit on the memory of each process for compressed arrays, all files together.
MOST_UNPACKED = 4 * 2**30

_LOCAL_HEADER = 30
_ENCRYPTED = 1
_FIX = "Copy or download it again, or choose other embeddings."
_FORMATS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclasses.dataclass(frozen=True)
class NpzArray:
    """One array of an archive, described by its headers.

    Attributes:
        name: Name of the array in it.
        by_column: Whether it is stored in Fortran order.
        offset: First byte of its values in the archive; None where they are compressed.
        size: Bytes of the member, its npy header included.
        checksum: CRC-32 of the member according to the archive.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    by_column: bool
    offset: int | None
    size: int
    checksum: int

    @property
    def label(self) -> str:
        """The archive's path with the array's name."""
        return f"{self.path}[{self.name}]"

    @property
    def unpacked(self) -> int:
        """Bytes of memory that mapping takes: the size of a compressed array, 0 of an uncompressed one."""
        return self.size if self.offset is None else 0

    def map(self) -> npt.NDArray[Any]:
        """Return the array: mapped from the archive, or unpacked if it is compressed.

        Raises:
            ClipcidError: when the archive is truncated or damaged.
        """
        array: npt.NDArray[Any]
        try:
            if self.offset is None:
                with np.load(self.path, allow_pickle=False) as archive:
                    array = archive[self.name]
            elif 0 in self.shape:  # nothing to map
                array = np.empty(self.shape, self.dtype)
            else:
                order = "F" if self.by_column else "C"
                array = np.memmap(self.path, self.dtype, "r", offset=self.offset, shape=self.shape, order=order)  # type: ignore[call-overload]  # numpy's types know only the literal orders
        except Exception as error:  # likewise
            raise ClipcidError(f"{self.path} cannot be read: {error}.", _FIX) from error
        return array

    def fingerprint(self, of_file: Fingerprint) -> FileRecord:
        """Describe the array for a sidecar, as `record` describes a file: by the checksum of all its bytes."""
        return FileRecord(self.label, self.size, f"crc32:{self.checksum:08x}")


def list_arrays(path: Path) -> list[str]:
    """Return the names of the arrays in an archive, in its order.

    Raises:
        ClipcidError: when it is not an archive.
    """
    with _open(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def find_array(path: Path, name: str) -> NpzArray:
    """Find an array by its headers; its values are not read.

    Raises:
        ClipcidError: when there is no such array, it holds Python objects, or the archive is damaged or encrypted.
    """
    with _open(path) as archive:
        try:
            member = archive.getinfo(f"{name}.npy")
        except KeyError as error:
            there = ", ".join(list_arrays(path)) or "none"
            raise ClipcidError(
                f"{path} contains no array {name}; its arrays: {there}.",
                "Choose one that every .npz of the folder contains with --npz-array.",
            ) from error
        if member.flag_bits & _ENCRYPTED:
            raise ClipcidError(f"{path} is encrypted.", "Write it again without a password.")
        try:
            with archive.open(member) as file:
                shape, by_column, dtype = _read_header(file)
            offset = None
            if member.compress_type == zipfile.ZIP_STORED:
                offset = _find_values(path, member)
        except Exception as error:  # zipfile, zlib, tokenize and numpy raise what they like for a damaged archive
            raise ClipcidError(f"{path}, array {name}, cannot be read: {error}.", _FIX) from error
    if dtype.hasobject:
        raise ClipcidError(f"{path}, array {name}, holds Python objects (a pickle).", "Choose other embeddings.")
    if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize > member.file_size:
        raise ClipcidError(
            f"{path}, array {name}, promises {dtype} {list(shape)} and has {member.file_size:,} bytes.", _FIX
        )
    return NpzArray(path, name, shape, dtype, by_column, offset, member.file_size, member.CRC)


def choose_arrays(path: Path, requested: str | None) -> tuple[str, str | None]:
    """Choose which arrays of an archive are the embeddings.

    Args:
        path: The first archive of a folder.
        requested: Name of the array of image embeddings; None for the only one whose name ends in ``_img``.

    Returns:
        The name of the array of image embeddings, and of the matching text embeddings (``l14_txt`` for ``l14_img``),
        None where there are none.

    Raises:
        ClipcidError: when there are several to choose from, or none.
    """
    names = list_arrays(path)
    if requested is None:
        choices = [name for name in names if name.endswith("_img")]
        if len(choices) != 1:
            several = f"{len(choices)} arrays of image embeddings: {', '.join(choices)}"
            none = f"no array whose name ends in _img; its arrays: {', '.join(names) or 'none'}"
            raise ClipcidError(
                f"{path} contains {several if choices else none}.",
                f"Choose one with --npz-array, for example --npz-array {(choices or names or ['l14_img'])[-1]}.",
            )
        requested = choices[0]
    texts = requested.removesuffix("_img") + "_txt"
    return requested, texts if requested.endswith("_img") and texts in names else None


def _open(path: Path) -> zipfile.ZipFile:
    with reading(path, "an .npz", _FIX):
        return zipfile.ZipFile(path)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version not in _FORMATS:
        raise ValueError(f"npy format {version[0]}.{version[1]} is not supported")
    shape, by_column, dtype = _FORMATS[version](file)
    return shape, by_column, dtype


def _find_values(path: Path, member: zipfile.ZipInfo) -> int:
    """Return the first byte of an uncompressed array's values: after the member's header and that of the npy in it."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        header = file.read(_LOCAL_HEADER)
        # The last four bytes are the lengths of the name and of the extra field, which may differ from the lengths in the
        # archive's directory.
        name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        file.seek(member.header_offset + _LOCAL_HEADER + name + extra)
        _read_header(file)
        return file.tell()
