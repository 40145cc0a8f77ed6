"""The samples of training runs and their rows in other files: matched once, mapped by every process and every later run.

    <index of the data>/matched-<identity>/matched.json                  the counts: an output of its own
                                          /training.sizes.npy            int64 [S], samples of each shard
                                          /training.places.npy           place of each in its shard
                                          /training.embeddings.npy       its row of the embeddings
                                          /training.captions.npy         first row of its captions after the first
                                          /training.clusters.npy         its row of the clusters
                                          /held_out.….npy                the same of the samples held out

Shards are in order, samples within a shard too. Numbers are int32 where that suffices, else int64: 12 bytes a row for 400
million samples with embeddings and clusters. The folder may be removed while nothing runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from clipcid_cli.formats.files import atomic_file, write_npy
from clipcid_cli.formats.fingerprint import hash_json

STEP = "matched"
TRAINING = "training"
HELD_OUT = "held_out"
_VERSION = 5

Column: TypeAlias = npt.NDArray[np.int32] | npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class SampleRows:
    """The samples of one part, ``training`` or ``held_out``, in order of shard and place; picklable, and small."""

    folder: Path
    part: str
    sizes: npt.NDArray[np.int64]  # samples of each shard, [S]

    @property
    def total(self) -> int:
        return int(self.sizes.sum())

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self.sizes)

    def shard_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the shards of samples by their rows."""
        return np.searchsorted(self._ends, rows, side="right")

    def bounds(self, shard: int) -> tuple[int, int]:
        """Return the first row of a shard and the one after its last."""
        end = int(self._ends[shard])
        return end - int(self.sizes[shard]), end

    def column(self, name: str) -> Column:
        """Map ``places``, ``embeddings``, ``captions`` or ``clusters`` of each sample, [n]; −1 where it has no such row."""
        return _map_column(_column_path(self.folder, self.part, name), self.total)


@lru_cache(maxsize=8)  # a worker asks for them with every batch
def _map_column(path: Path, total: int) -> Column:
    # Without objects nothing of it runs; mapped, it takes no memory, whatever it promises.
    column: Column = np.load(path, mmap_mode="r" if total else None, allow_pickle=False)
    return column


Append: TypeAlias = Callable[[Mapping[str, npt.NDArray[Any]]], None]


@contextmanager
def writing_rows(folder: Path, part: str, limits: Mapping[str, int]) -> Iterator[Append]:
    """Write the samples of one part.

    Args:
        limits: The columns by name, with a number that no value reaches.

    Yields:
        What appends the samples of the next shard: n values for each column.
    """
    sizes = list[int]()
    kinds = {name: np.int32 if limit < 2**31 else np.int64 for name, limit in limits.items()}
    with ExitStack() as stack:
        files = {name: stack.enter_context(atomic_file(_column_path(folder, part, name))) for name in limits}

        def append(columns: Mapping[str, npt.NDArray[Any]]) -> None:
            sizes.append(len(columns["places"]))
            for name, file in files.items():
                file.write(columns[name].astype(kinds[name]).tobytes())

        for name, file in files.items():
            _write_header(file, kinds[name], 0)
        yield append
        for name, file in files.items():
            file.seek(0)
            _write_header(file, kinds[name], sum(sizes))  # numpy leaves room for any length
    write_npy(_column_path(folder, part, "sizes"), np.array(sizes, dtype=np.int64))


def _write_header(file: IO[bytes], kind: type, length: int) -> None:
    content = {"shape": (length,), "fortran_order": False, "descr": np.dtype(kind).str}
    np.lib.format.write_array_header_1_0(file, content)


def matched_folder(root: Path, identity: Mapping[str, Any]) -> Path:
    """Return the folder of the samples matched under `identity`: all that decides them, as JSON values."""
    return root / f"matched-{hash_json([_VERSION, identity])}"


def open_rows(folder: Path, part: str) -> SampleRows:
    """Open the samples of one part."""
    return SampleRows(folder, part, np.load(_column_path(folder, part, "sizes"), allow_pickle=False))


def _column_path(folder: Path, part: str, name: str) -> Path:
    return folder / f"{part}.{name}.npy"
