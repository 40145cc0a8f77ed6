"""Rows of embeddings: mapped from any number of files, few of them at a time, and unit float16 whatever the files hold.

Files are ``.npy``, or the arrays of ``.npz`` archives, described by their headers. numpy's ``savez`` stores its members
without compression, so an array is a contiguous part of the archive that can be mapped like a ``.npy``; members of
``savez_compressed`` can only be unpacked into memory.

A mapped file takes a descriptor, of which a process has 1,024, and one of the system's 65,530 maps: data of 41,000 shards
has more files than either. So a process keeps the maps it used last, `MAPS_KEPT` of them, whoever asked for them.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import create_mapped, read_npy_header
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.files import reading, write_error
from clipcid_cli.formats.parquet import refuse_expansion

Float16 = npt.NDArray[np.float16]
Numbers = npt.NDArray[np.int64]

AGAIN = "Copy or make the folder again."

MAPS_KEPT = 96
"""Files that a process holds mapped; mapping one anew takes 50 µs, reading one of at most 64 KiB 5 µs."""

_FIX = "Copy or make it again, or choose other embeddings."
# Arrays of at most this size are read whole: that takes a tenth of the time to map a file, and no descriptor.
_SMALL = 2**16
_LOCAL_HEADER = 30
_ENCRYPTED = 1

_BLOCK_ROWS = 65_536
_ROWS_IN_CACHE = 512
# A float16 row whose norm is this close to 1 is used unchanged: rounding D ≤ 4,096 entries of a unit row changes it by less.
_UNIT_TOLERANCE = 2e-3

_COPIES = ".grouped"


@dataclasses.dataclass(frozen=True, slots=True)
class ArrayFile:
    """An array of rows in a file."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int | None  # first byte of its values; None where they are compressed
    stamp: tuple[int, int]  # inode and time of the file when it was looked at
    by_column: bool = False  # whether it is stored in Fortran order
    member: str | None = None  # name of the array in an archive; None where the file is the array
    size: int = 0  # bytes of the file, or of the member
    hash: str | None = None  # of the content, where something records it; None where the file must be read for it
    source: Path | None = None  # the file in whose column `member` the rows are, where this is a copy of them

    @property
    def origin(self) -> Path:
        """The file that the user knows."""
        return self.source or self.path

    @property
    def label(self) -> str:
        """Name of the rows for errors."""
        return str(self.origin) if self.member is None else f"{self.origin}[{self.member}]"

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
                # Without objects nothing of it runs; `find_member` has refused what grows beyond measure.
                with np.load(file, allow_pickle=False) as archive:
                    return np.asarray(archive[self.member])
            if size > _SMALL:
                return np.memmap(file, self.dtype, "r", self.offset, self.shape, order)
            data = os.pread(file.fileno(), size, self.offset)
            if len(data) < size:
                raise OSError(f"it ends {size - len(data):,} bytes early")
            return np.frombuffer(data, self.dtype).reshape(self.shape, order=order)


@dataclasses.dataclass(frozen=True, slots=True)
class EmbeddingFile:
    """The files of one shard."""

    parts: dict[Kind, ArrayFile]  # its rows by kind; images are always among them
    metadata: Path | None  # parquet of keys and captions; None where there is none
    first: int = 0  # number of its first row among those of all shards

    @property
    def rows(self) -> int:
        return self.parts[Kind.IMAGES].shape[0]

    @property
    def name(self) -> str:
        """Name of the file without its suffix, used as the shard's where another tool did not record it."""
        return self.parts[Kind.IMAGES].origin.stem


def find_npy(path: Path) -> ArrayFile:
    """Look at an npy's header; the file is not mapped for it."""
    with reading(path, "an .npy", _FIX) as file:
        (shape, by_column, dtype), offset = read_npy_header(file)
        stat = os.fstat(file.fileno())
        needed = offset + math.prod(shape) * dtype.itemsize
        if stat.st_size < needed:
            raise OSError(f"it is cut off: its header promises {needed:,} bytes, and it has {stat.st_size:,}")
    return ArrayFile(path, shape, dtype, offset, (stat.st_ino, stat.st_mtime_ns), by_column, size=stat.st_size)


def list_arrays(path: Path) -> list[str]:
    """Return the names of the arrays in an archive, in its order."""
    with reading(path, "an .npz", _FIX), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def find_member(path: Path, name: str) -> ArrayFile:
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
            (shape, by_column, dtype), begin = read_npy_header(values)
        refuse_expansion(f"its array {name}", member.file_size, file)
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
    return ArrayFile(path, shape, dtype, offset, stamp, by_column, name, member.file_size, f"crc32:{member.CRC:08x}")


@lru_cache(maxsize=MAPS_KEPT)
def _map_file(file: ArrayFile) -> npt.NDArray[Any]:
    return file.map()


class Rows(ABC):
    """Rows [N, D], read in slices or picked one by one."""

    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    @abstractmethod
    def stay_mapped(self) -> bool:
        """Whether rows can be read in any order without mapping their files again and again."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Float16:
        """Return rows start … stop − 1, float16 [n, D]; a view of a file where that is possible."""

    @abstractmethod
    def take(self, positions: Numbers) -> Float16:
        """Return the rows at `positions` (int64 [n], any order), float16 [n, D], as an array of its own."""

    def blocks(self, size: int = _BLOCK_ROWS, stride: int = 1) -> Iterator[tuple[int, Float16]]:
        """Yield (number of the first row, rows) for consecutive blocks of `size` rows; the last may be shorter.

        Of each block only every `stride`-th row is read.
        """
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            yield start, self.read(start, stop) if stride == 1 else self.take(np.arange(start, stop, stride))


class FileRows(Rows):
    """Rows in several files, mapped as they are needed."""

    def __init__(self, files: Sequence[ArrayFile], width: int, as_stored: bool, hold: bool = False) -> None:
        """Prepare to read.

        Args:
            files: Of [n, D], or of [n, V, D], which are n·V rows.
            as_stored: Whether rows are taken as they are: unit float16 for sure, or no embeddings at all.
            hold: Whether to map all files now, for as long as this object lives; else as they are needed, among `MAPS_KEPT`.
        """
        self._files = files
        # Compressed arrays are unpacked once and stay: unpacking them again would take longer than all else.
        self._held = {index: file.map() for index, file in enumerate(files) if hold or file.unpacked}
        # Whether a file's rows are unit rows already; None until they have been checked, once.
        self._is_unit: list[bool | None] = [as_stored or None] * len(files)
        self._starts = np.concatenate([[0], np.cumsum([math.prod(file.shape[:-1]) for file in files], dtype=np.int64)])
        self.shape = (int(self._starts[-1]), width)
        self._dtype = files[0].dtype if as_stored and files else np.dtype(np.float16)

    @property
    def stay_mapped(self) -> bool:
        return len(self._files) - len(self._held) <= MAPS_KEPT

    def __getstate__(self) -> dict[str, Any]:
        """Send what describes the files, not their rows: another process maps them itself."""
        # By column: 41,000 data classes with a path each would take seconds for every worker.
        columns = [[getattr(file, field.name) for file in self._files] for field in dataclasses.fields(ArrayFile)]
        return self.__dict__ | {"_held": {}, "_files": [list(map(str, columns[0])), *columns[1:]]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        paths, *columns = state["_files"]
        self.__dict__ = state | {"_files": [ArrayFile(*file) for file in zip(map(Path, paths), *columns, strict=True)]}

    def read(self, start: int, stop: int) -> Float16:
        """Return rows start … stop − 1, float16 [n, D]; a view of the file where they come from a single one."""
        first = max(0, int(np.searchsorted(self._starts, start, side="right")) - 1)
        last = int(np.searchsorted(self._starts, stop, side="left"))
        if start >= stop or first >= last:
            return np.empty((0, self.shape[1]), self._dtype)
        if last - first == 1:
            return self._part(first, start, stop)
        # Copied one by one: views would hold all their files open.
        rows = np.empty((min(stop, len(self)) - start, self.shape[1]), self._dtype)
        for index in range(first, last):
            part = self._part(index, start, stop)
            begin = max(0, int(self._starts[index]) - start)
            rows[begin : begin + len(part)] = part
        return rows

    def _part(self, index: int, start: int, stop: int) -> Float16:
        """Return the part of rows start … stop − 1 that lies in one file."""
        begin = int(self._starts[index])
        return self._unit(index, self._rows(index)[max(0, start - begin) : max(0, stop - begin)])

    def take(self, positions: npt.NDArray[np.int64]) -> Float16:
        """Return the rows at `positions` (int64 [n], any order), float16 [n, D], as an array of its own."""
        if len(positions) and np.array_equal(positions, np.arange(positions[0], positions[0] + len(positions))):
            return np.array(self.read(int(positions[0]), int(positions[0]) + len(positions)))
        owners = np.searchsorted(self._starts, positions, side="right") - 1
        order = np.argsort(owners, kind="stable")
        bounds = np.append(np.flatnonzero(np.diff(owners[order], prepend=-1)), len(order))
        rows = np.empty((len(positions), self.shape[1]), self._dtype)
        for begin, end in pairwise(bounds.tolist()):
            places = order[begin:end]
            index = int(owners[places[0]])
            rows[places] = self._unit(index, self._rows(index)[positions[places] - self._starts[index]])
        return rows

    def _rows(self, index: int) -> npt.NDArray[Any]:
        rows = self._held.get(index)
        if rows is None:
            rows = _map_file(self._files[index])
            if self._files[index].unpacked:
                self._held[index] = rows
        return rows.reshape(-1, self.shape[1])

    def _unit(self, index: int, part: npt.NDArray[Any]) -> Float16:
        if self._is_unit[index] is None:
            self._is_unit[index] = holds_unit_rows(self._rows(index))
        if not self._is_unit[index]:
            part = unit_rows(part)
        # An array in an archive may begin at an odd byte.
        return part if part.flags.aligned and part.flags.c_contiguous else np.array(part, order="C")


def unit_rows(rows: npt.NDArray[Any]) -> Float16:
    """Normalise rows [n, D] and round them once to float16; float16 rows that are unit rows already are unchanged.

    Each row depends on its own values only. Zero rows and rows that are not finite become NaN.
    """
    exact = rows.astype(np.float64)
    norms = np.sqrt((exact * exact).sum(axis=1, keepdims=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = np.where(np.isfinite(norms), exact / norms, np.nan).astype(np.float16)
    if rows.dtype == np.float16:
        scaled = np.where(np.abs(norms - 1) <= _UNIT_TOLERANCE, rows, scaled)
    return scaled


def holds_unit_rows(rows: npt.NDArray[Any]) -> bool:
    """Tell whether `unit_rows` would leave all rows [n, D] unchanged."""
    if rows.dtype != np.float16:
        return False
    for start in range(0, len(rows), _ROWS_IN_CACHE):
        exact = rows[start : start + _ROWS_IN_CACHE].astype(np.float64)
        norms = np.sqrt((exact * exact).sum(axis=1))
        if not np.all(np.abs(norms - 1) <= _UNIT_TOLERANCE):
            return False
    return True


def take_images(rows: Mapping[Kind, Rows], images: Numbers, views: Numbers) -> Float16:
    """Return the rows of what B samples show of their images, float16 [B, D].

    Args:
        rows: Of images, and of views where any are shown.
        images: The samples' rows among the embeddings, int64 [B].
        views: Which view each shows, int64 [B]; −1 for none of them.
    """
    viewed = views >= 0
    num_views = len(rows[Kind.VIEWS]) // len(rows[Kind.IMAGES]) if Kind.VIEWS in rows else 0
    return _pick(rows, {Kind.IMAGES: (~viewed, images), Kind.VIEWS: (viewed, images * num_views + views)})


def take_captions(rows: Mapping[Kind, Rows], images: Numbers, captions: Numbers, starts: Numbers) -> Float16:
    """Return the rows of the captions that B samples show, float16 [B, D].

    Args:
        rows: Of first captions, and of further ones where all are shown.
        images: As of `take_images`.
        captions: Which caption each shows, int64 [B], 0 for the first.
        starts: Where the further captions of each begin, int64 [B].
    """
    later = (captions > 0) & (Kind.FURTHER in rows)
    return _pick(rows, {Kind.TEXTS: (~later, images), Kind.FURTHER: (later, starts + captions - 1)})


def _pick(rows: Mapping[Kind, Rows], choices: Mapping[Kind, tuple[npt.NDArray[np.bool_], Numbers]]) -> Float16:
    """Read the rows of B samples, each from one kind: for which of them, bool [B], and where they are, int64 [B]."""
    first = next(iter(choices))
    picked = np.empty((len(choices[first][0]), rows[first].shape[1]), np.float16)
    for kind, (where, places) in choices.items():
        if where.any():
            picked[where] = rows[kind].take(places[where])
    return picked


def create_copy(folder: Path, rank: int, rows: int, width: int) -> Float16:
    """Create the file of a process's copies of rows and map it, float16 [rows, width].

    A group of rows that are read together lies in as many files as there are shards, and opening each file for every group
    takes longer than to compare the rows. So each process copies a share of all rows, group by group, for a while.
    """
    try:
        (folder / _COPIES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder / _COPIES, error) from error
    return create_mapped(_copy_path(folder, rank), np.dtype(np.float16), (rows, width))


def open_copies(folder: Path, sizes: Sequence[int], width: int) -> Rows:
    """Return the copies of all processes, so many rows each, mapped as long as they are referred to."""
    copied = []
    for rank, size in enumerate(sizes):
        if size:
            path = _copy_path(folder, rank)
            stat = path.stat()
            stamp = (stat.st_ino, stat.st_mtime_ns)
            copied.append(ArrayFile(path, (size, width), np.dtype(np.float16), 0, stamp))
    return FileRows(copied, width, as_stored=True, hold=True)


def remove_copies(folder: Path) -> None:
    """Remove all copies, those of a run that was killed too."""
    shutil.rmtree(folder / _COPIES, ignore_errors=True)


def _copy_path(folder: Path, rank: int) -> Path:
    return folder / _COPIES / f"{rank}.rows"
