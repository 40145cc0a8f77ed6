"""The samples of training runs and their rows in other files: matched once, mapped by every process and every later run.

    <index of the data>/matched-<identity>/matched.json                  the counts
                                          /training.sizes.npy            int64 [S], samples of each shard
                                          /training.places.npy           place of each in its shard
                                          /training.embeddings.npy       its row of the embeddings
                                          /training.captions.npy         first row of its captions after the first
                                          /training.clusters.npy         its row of the clusters
                                          /held_out.….npy                the same of the samples held out

Shards are in order, samples within a shard too. Numbers are int32 where that suffices, else int64: 12 bytes a row for 400
million samples with embeddings and clusters. The folder appears whole or not at all, and may be removed while nothing runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from clipcid_cli.formats.atomic import write_error, write_json, write_npy
from clipcid_cli.formats.fingerprint import FileRecord, Memo, find_changed
from clipcid_cli.formats.reading import read_regular

TRAINING, HELD_OUT = "training", "held_out"
_VERSION = 4
_COUNTS = "matched.json"

Column = npt.NDArray[np.int32] | npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class SampleRows:
    """The samples of one part, in order of shard and place; picklable, and small beside them.

    Attributes:
        folder: Where their columns are.
        part: ``training`` or ``held_out``.
        sizes: Samples of each shard, int64 [S].
    """

    folder: Path
    part: str
    sizes: npt.NDArray[np.int64]

    @property
    def total(self) -> int:
        """Samples of all shards."""
        return int(self.sizes.sum())

    def places(self) -> Column:
        """Map the place of each sample in its shard, [n]."""
        return self._map("places")

    def embeddings(self) -> Column:
        """Map the row of the embeddings of each sample, [n]; −1 where there is none."""
        return self._map("embeddings")

    def captions(self) -> Column:
        """Map the first row of the embeddings of each sample's captions after the first, [n]."""
        return self._map("captions")

    def clusters(self) -> Column:
        """Map the row of the clusters' table of each sample, [n]; −1 where there is none."""
        return self._map("clusters")

    def _map(self, name: str) -> Column:
        path = _column_path(self.folder, self.part, name)
        column: Column = np.load(path, mmap_mode="r" if self.total else None, allow_pickle=False)
        return column


class _Matched(msgspec.Struct):
    counts: dict[str, Any]
    outputs: list[FileRecord]


class SampleRowsWriter:
    """Writes the samples of one part, shard after shard."""

    def __init__(self, folder: Path, part: str, limits: Mapping[str, int]) -> None:
        """Begin the files.

        Args:
            limits: The columns by name, with a number that no value reaches.
        """
        self._folder, self._part, self._sizes = folder, part, list[int]()
        self._columns = {
            name: _NpyAppender(_column_path(folder, part, name), np.dtype(np.int32 if limit < 2**31 else np.int64))
            for name, limit in limits.items()
        }

    def append(self, columns: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write the samples of the next shard: n values for each column."""
        (size,) = {len(values) for values in columns.values()}
        self._sizes.append(size)
        for name, column in self._columns.items():
            column.append(columns[name])

    def finish(self) -> SampleRows:
        """Complete the files and close them."""
        for column in self._columns.values():
            column.finish()
        sizes = np.array(self._sizes, dtype=np.int64)
        write_npy(_column_path(self._folder, self._part, "sizes"), sizes)
        return SampleRows(self._folder, self._part, sizes)

    def close(self) -> None:
        """Close the files, complete or not."""
        for column in self._columns.values():
            column.close()


def matched_folder(root: Path, identity: Mapping[str, Any]) -> Path:
    """Return the folder of the samples matched under `identity`: all that decides them, as JSON values."""
    content = json.dumps([_VERSION, identity], sort_keys=True).encode("utf-8", "surrogateescape")
    return root / f"matched-{hashlib.blake2b(content, digest_size=8).hexdigest()}"


def read_matched(folder: Path) -> dict[str, Any] | None:
    """Read the counts of finished files; None when there are none, or one of them has changed since."""
    try:
        found = msgspec.json.decode(read_regular(folder / _COUNTS), type=_Matched)
    except (OSError, msgspec.MsgspecError):
        return None
    return None if find_changed(folder, found.outputs, folder / _COUNTS) else found.counts


def open_rows(folder: Path, part: str) -> SampleRows:
    """Open the samples of one part of finished files."""
    return SampleRows(folder, part, np.load(_column_path(folder, part, "sizes"), allow_pickle=False))


@contextmanager
def begin_matched(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write the files of `folder` in; it is removed where the block fails, or a run was killed."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise write_error(partial, error) from error
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def finish_matched(partial: Path, folder: Path, counts: Mapping[str, Any]) -> None:
    """Let the files of `partial` appear as `folder`, in the place of damaged ones."""
    files = sorted(path for path in partial.iterdir() if path.is_file())
    matched = _Matched({**counts}, Memo().record_all(files, partial))
    write_json(partial / _COUNTS, msgspec.to_builtins(matched))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


class _NpyAppender:
    """A one-dimensional npy file of a length that is known at its end."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path, self._dtype, self._length = path, dtype, 0
        self._file = path.open("wb")
        self._write_header()

    def append(self, values: npt.NDArray[Any]) -> None:
        self._length += len(values)
        try:
            self._file.write(values.astype(self._dtype).tobytes())
        except OSError as error:
            raise write_error(self._path, error) from error

    def finish(self) -> None:
        try:
            self._file.seek(0)
            self._write_header()  # numpy leaves room for any length
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise write_error(self._path, error) from error

    def close(self) -> None:
        with suppress(OSError):  # what is left to write to a full disk
            self._file.close()

    def _write_header(self) -> None:
        shape = {"shape": (self._length,), "fortran_order": False, "descr": np.lib.format.dtype_to_descr(self._dtype)}
        np.lib.format.write_array_header_1_0(self._file, shape)


def _column_path(folder: Path, part: str, name: str) -> Path:
    return folder / f"{part}.{name}.npy"
