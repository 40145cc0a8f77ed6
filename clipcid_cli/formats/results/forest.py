"""The single-linkage forest as a file, and the parts that a search saves while it runs."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import load_arrays, save_arrays
from clipcid_cli.formats.atomic import atomic_file
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.output import Output, open_output
from clipcid_cli.formats.parquet import read_columns
from clipcid_cli.formats.sidecar import ForestSidecar

# All pairs are compared, or only those in and near partitions, where some edges may be missed; of all rows, or of those that
# filters have left. Each kind has files of its own, so that none is ever used, or replaced, as another.
_STEPS = {
    "exact": "forest",
    "partitioned": "forest-partitioned",
    "exact-filtered": "forest-filtered",
    "partitioned-filtered": "forest-partitioned-filtered",
}
_PARTS = ".forest-parts"
_SCHEMA = pa.schema([("a", pa.int64()), ("b", pa.int64()), ("distance", pa.float32())])
# Rows of a row group.
_ROWS_AT_ONCE = 2**20

# Row numbers: int32 below 2³¹ rows, else int64.
IntArray = npt.NDArray[np.signedinteger[Any]]


def forest_path(folder: Path, neighbors: str) -> Path:
    """Return where a forest lies in the folder of `balance`."""
    return folder / f"{_STEPS[neighbors]}.parquet"


@dataclasses.dataclass(frozen=True)
class StoredForest:
    """A forest read from its file.

    Attributes:
        a: Smaller row of each edge, integers [E].
        b: Larger row, integers [E].
        distance: Their distance, float32 [E], ascending.
        cutoff: The distance up to which it was searched.
        num_rows: Number of rows.
        neighbors: How it was searched: ``exact`` or ``partitioned``; of rows that filters have left, followed by
            ``-filtered``.
    """

    a: IntArray
    b: IntArray
    distance: npt.NDArray[np.float32]
    cutoff: float
    num_rows: int
    neighbors: str = "exact"


def open_forest(
    folder: Path, inputs: Sequence[FileRecord], neighbors: str, *, overwrite: bool
) -> AbstractContextManager[Output[ForestSidecar]]:
    """Open the forest of some embeddings in the folder of `balance`; one of others is replaced without a word."""
    settings = {"neighbors": neighbors}
    may_differ = ("inputs",)
    step = _STEPS[neighbors]
    return open_output(
        folder, step, ForestSidecar, settings=settings, inputs=inputs, overwrite=overwrite, may_differ=may_differ
    )


def write_forest(
    folder: Path, forest: StoredForest, *, inputs: Sequence[FileRecord], seconds: dict[str, float], overwrite: bool
) -> None:
    """Write ``forest.parquet`` and its sidecar ``forest.json``, or those of another kind.

    Args:
        folder: The folder of `balance`.
        inputs: The embeddings it was made from.
        seconds: Time by phase.
    """
    with open_forest(folder, inputs, forest.neighbors, overwrite=overwrite) as output:
        output.start()
        path = forest_path(output.work, forest.neighbors)
        with atomic_file(path) as file, pq.ParquetWriter(file, _SCHEMA, compression="zstd") as writer:
            for start in range(0, len(forest.a), _ROWS_AT_ONCE) or [0]:
                part = slice(start, start + _ROWS_AT_ONCE)
                columns = [_wide(forest.a[part]), _wide(forest.b[part]), forest.distance[part]]
                writer.write_table(pa.table(columns, schema=_SCHEMA), row_group_size=_ROWS_AT_ONCE)
        output.commit(
            counts={"images": forest.num_rows, "edges": len(forest.a)},
            seconds=seconds,
            outputs=[record(path, output.work)],
            cutoff=forest.cutoff,
        )


def read_forest(
    folder: Path, inputs: Sequence[FileRecord], neighbors: str = "exact", *, overwrite: bool = False
) -> StoredForest | None:
    """Read the forest of these embeddings; None when there is none, or one of others.

    Args:
        folder: The folder of `balance`.
        neighbors: How it must have been searched.
        overwrite: Whether one that is damaged or no longer the same counts as none.
    """
    with open_forest(folder, inputs, neighbors, overwrite=overwrite) as output:
        sidecar = output.finished
    if sidecar is None:
        return None
    path, fix = forest_path(folder, neighbors), "Add --overwrite to search it again."
    table = read_columns(path, {"a": pa.int64(), "b": pa.int64(), "distance": pa.float32()}, fix)
    num_rows, distance = sidecar.counts["images"], table["distance"].to_numpy()
    a, b = (table[name].to_numpy() for name in ("a", "b"))
    if len(a) and not (
        int(a.min()) >= 0 and (a < b).all() and int(b.max()) < num_rows and (distance[1:] >= distance[:-1]).all()
    ):
        raise ClipcidError(f"{path} is not a forest of {num_rows:,} rows with ascending distances.", fix)
    kind = np.int32 if num_rows < 2**31 else np.int64
    return StoredForest(a.astype(kind), b.astype(kind), distance, sidecar.cutoff, num_rows, neighbors)


def find_earlier(folder: Path, inputs: Sequence[FileRecord], *, overwrite: bool) -> ForestSidecar | None:
    """Return the sidecar of the exact forest of other embeddings that is there; None when there is none."""
    with open_forest(folder, inputs, "exact", overwrite=overwrite) as output:
        return output.earlier


def _wide(rows: IntArray) -> npt.NDArray[np.int64]:
    return rows.astype(np.int64, copy=False)


@dataclasses.dataclass(frozen=True)
class ForestPart:
    """What one process has found in the first tiles of its share: all pairs, or their forest.

    A session is one run of a search; the next one, after it was stopped, divides what is left of its tiles.

    Attributes:
        session: Number of the session.
        rank: Number of the process.
        size: Number of processes.
        tiles: The tiles that the session divides, ranges of their numbers: start, stop and step, int64 [R, 3].
        done: How many tiles of its share the process has finished.
        a: Smaller row of each edge, integers [E].
        b: Larger row, integers [E].
        distance: Their distance, float32 [E].
        has_all: Whether these are all pairs.
    """

    session: int
    rank: int
    size: int
    tiles: npt.NDArray[np.int64]
    done: int
    a: IntArray
    b: IntArray
    distance: npt.NDArray[np.float32]
    has_all: bool


@dataclasses.dataclass(frozen=True)
class ForestParts:
    """The parts of a search in progress: a killed search resumes from them, and the first process merges them.

    Attributes:
        folder: The work folder of `balance`.
        search: Name of the search; parts of another cut-off or other tiles have another name.
    """

    folder: Path
    search: str

    @property
    def path(self) -> Path:
        """Where the parts of this search lie."""
        return self.folder / _PARTS / self.search

    def next_session(self) -> int:
        """Return a session number that no earlier run has used."""
        return 1 + max((int(path.name.split("-")[0]) for path in self.path.glob("*-*.npz")), default=-1)

    def write(self, part: ForestPart) -> None:
        """Save the part of one process, replacing what it saved before in the same session."""
        save_arrays(self.path / f"{part.session}-{part.rank}.npz", dataclasses.asdict(part))

    def read(self, session: int) -> Iterator[ForestPart]:
        """Read the parts of a session. One that cannot be read is skipped: its tiles are searched again."""
        for path in sorted(self.path.glob(f"{session}-*.npz")):
            if (found := load_arrays(path)) is not None:
                plain: dict[str, Any] = {name: value if value.ndim else value.item() for name, value in found.items()}
                yield ForestPart(**plain)

    def clear(self) -> None:
        """Remove the parts of this and every earlier search."""
        shutil.rmtree(self.folder / _PARTS, ignore_errors=True)
