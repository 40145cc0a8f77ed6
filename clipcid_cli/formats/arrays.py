"""Arrays on the disk: larger than memory for the time of a computation, and those of unfinished work."""

from __future__ import annotations

import hashlib
import io
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from clipcid_cli.formats.files import atomic_file, create, read_regular, write_error

if TYPE_CHECKING:
    import pyarrow as pa

    from clipcid_cli.formats.journal import Journal

Header = tuple[tuple[int, ...], bool, np.dtype[Any]]  # shape, whether by column, number format
Arrays = tuple[npt.NDArray[Any], ...]
ArrayJournal: TypeAlias = "Journal[dict[str, Any]]"
Number = TypeVar("Number", bound=np.generic)

_HASH = "hash"

_STRINGS_AT_ONCE = 2**20
_LARGEST_HEADER = 2**16  # bytes of an npy's, which NumPy reads before it finds it too long; real ones have 128


def read_npy_header(file: IO[bytes]) -> tuple[Header, int]:
    """Read an npy's header at the place of the file: what it says, and how many bytes it takes."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        length = int.from_bytes(file.read(4), "little")
        if length > _LARGEST_HEADER:
            raise ValueError(f"its header has {length:,} bytes")
        file.seek(-4, os.SEEK_CUR)
        shape, by_column, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects (a pickle)")
    if any(length < 0 for length in shape):
        raise ValueError(f"it holds {dtype} {list(shape)}")
    return (shape, by_column, dtype), file.tell()


def parse_npy(content: bytes) -> npt.NDArray[Any]:
    """Return the array in the bytes of an npy; a ValueError where they are none, or fewer than its header promises."""
    (shape, by_column, dtype), begin = read_npy_header(io.BytesIO(content))
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size > len(content) - begin:
        raise ValueError(f"its header promises {size:,} bytes, and it has {len(content) - begin:,}")
    return np.frombuffer(content, dtype, count, begin).reshape(shape, order="F" if by_column else "C")


def save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Save arrays and numbers of unfinished work by name, with a hash of them, whole or not at all."""
    with atomic_file(path) as file:
        np.savez(file, **arrays | {_HASH: _hash(arrays)})


def load_arrays(path: Path) -> dict[str, npt.NDArray[Any]] | None:
    """Load what `save_arrays` saved; None where there is nothing, or it is damaged or edited: it is then computed again."""
    try:
        content = read_regular(path)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(member.file_size for member in archive.infolist()) > len(content):
                return None  # compressed, as `save_arrays` writes none: it may fill the memory
        # Without objects nothing of it runs.
        with np.load(io.BytesIO(content), allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in saved.files}
        return arrays if arrays.pop(_HASH) == _hash(arrays) else None
    except MemoryError:
        raise
    except Exception:  # NumPy and zipfile raise what they like for a damaged archive
        return None


def array_journal(folder: Path) -> ArrayJournal:
    """Return the journal of arrays and numbers by name."""
    from clipcid_cli.formats.journal import Journal

    return Journal(folder, ".npz", save_arrays, load_arrays)


def _hash(arrays: dict[str, Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in arrays.items():
        array = np.asarray(value)
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def create_mapped(
    place: Path, dtype: np.dtype[Number], shape: tuple[int, ...], *, unnamed: bool = False
) -> npt.NDArray[Number]:
    """Create a file and map it as an array of zeros, [*shape]; an array without elements has no file.

    Its blocks are reserved first: where the disk is full, writing to a mapped file without them kills the process (SIGBUS).

    Args:
        place: The file; where `unnamed`, the folder of a file without a name, which lasts as long as the array.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return np.empty(shape, dtype)
    try:
        with TemporaryFile(dir=place) if unnamed else create(place, "x+b") as file:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        if not unnamed:
            place.unlink(missing_ok=True)
        raise write_error(place, error) from error


def spool_arrays(folder: Path, dtypes: Sequence[Any], parts: Iterable[Sequence[npt.NDArray[Any]]]) -> Arrays:
    """Write K arrays that come part by part, [n] each, to files without a name; return them whole, mapped."""
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(TemporaryFile(dir=folder)) for _ in dtypes]
            for part in parts:
                for file, dtype, values in zip(files, dtypes, part, strict=True):
                    # `tofile` would not notice that a disk is full
                    file.write(np.ascontiguousarray(values, dtype).data)
            return tuple(map(_map_written, files, dtypes))
    except OSError as error:
        raise write_error(folder, error) from error


def map_strings(folder: Path, chunks: Iterable[pa.Array]) -> pa.LargeStringArray:
    """Write strings as `spool_strings` does; return them in one array."""
    return view_strings(*spool_strings(folder, chunks))


def view_strings(bounds: npt.NDArray[np.int64], text: npt.NDArray[np.uint8]) -> pa.LargeStringArray:
    """Return strings, given where each begins and the last one ends, int64 [n + 1], in the bytes of all.

    Arrow looks rows up quickly in a single array only, and the keys of 400 million images take 10 GB and more.
    """
    import pyarrow as pa  # callers have it

    return pa.LargeStringArray.from_buffers(len(bounds) - 1, pa.py_buffer(bounds), pa.py_buffer(text))


def spool_strings(folder: Path, chunks: Iterable[pa.Array]) -> Arrays:
    """Write strings without nulls, which come in chunks of any length, as `spool_arrays` does: their bounds and bytes."""
    import pyarrow as pa  # callers have it

    def parts() -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]]:
        end = 0
        yield np.zeros(1, np.int64), np.empty(0, np.uint8)
        for chunk in chunks:
            for start in range(0, len(chunk), _STRINGS_AT_ONCE):
                part = chunk.slice(start, _STRINGS_AT_ONCE).cast(pa.large_string())
                _, bounds, data = part.buffers()
                ends = np.frombuffer(bounds, np.int64)[part.offset : part.offset + len(part) + 1]
                first = int(ends[0])
                last = int(ends[-1])
                yield ends[1:] - first + end, np.frombuffer(data or b"", np.uint8)[first:last]
                end += last - first

    return spool_arrays(folder, (np.int64, np.uint8), parts())


def _map_written(file: IO[bytes], dtype: Any) -> npt.NDArray[Any]:
    file.flush()
    return np.memmap(file, dtype, "r") if os.fstat(file.fileno()).st_size else np.empty(0, dtype)
