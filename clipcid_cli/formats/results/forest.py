"""The single-linkage forest as a file, and the parts that a search saves while it runs."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import atomic_file
from clipcid_cli.formats.output import Output, describe_outputs, find_changed, read_sidecar, sidecar_path
from clipcid_cli.formats.parquet import read_columns
from clipcid_cli.formats.reading import reading

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


def write_forest(
    folder: Path, forest: StoredForest, *, inputs: list[dict[str, Any]], seconds: dict[str, float]
) -> None:
    """Write ``forest.parquet`` and then its sidecar ``forest.json``, which makes it count.

    Partitioned ones are ``forest-partitioned.parquet`` and ``.json``.

    Args:
        folder: The folder of `balance`, whose lock the caller holds.
        inputs: Fingerprints of the embeddings it was made from.
        seconds: Time by phase.
    """
    step = _STEPS[forest.neighbors]
    sidecar = read_sidecar(sidecar_path(folder, step))
    if sidecar is not None and _contents(sidecar.get("inputs", [])) != _contents(inputs):
        # A run killed between the two files must not leave this forest with the sidecar of other embeddings.
        sidecar_path(folder, step).unlink()
    path = forest_path(folder, forest.neighbors)
    with atomic_file(path) as file, pq.ParquetWriter(file, _SCHEMA, compression="zstd") as writer:
        for start in range(0, len(forest.a), _ROWS_AT_ONCE) or [0]:
            part = slice(start, start + _ROWS_AT_ONCE)
            columns = [_wide(forest.a[part]), _wide(forest.b[part]), forest.distance[part]]
            writer.write_table(pa.table(columns, schema=_SCHEMA), row_group_size=_ROWS_AT_ONCE)
    Output(folder, step, {"neighbors": forest.neighbors}, inputs, finished=None, resumed=False).commit(
        counts={"images": forest.num_rows, "edges": len(forest.a)},
        seconds=seconds,
        outputs=describe_outputs(folder, [path]),
        cutoff=forest.cutoff,
        edges=_hash_edges(forest.a, forest.b, forest.distance),
    )


def read_forest(folder: Path, inputs: list[dict[str, Any]], neighbors: str = "exact") -> StoredForest | None:
    """Read the forest of these embeddings; None when there is none, or one of others.

    Args:
        folder: The folder of `balance`.
        neighbors: How it must have been searched.

    Raises:
        ClipcidError: when the file that the sidecar describes is missing, damaged or no longer the same.
    """
    step = _STEPS[neighbors]
    sidecar = read_sidecar(sidecar_path(folder, step))
    if sidecar is None or _contents(sidecar.get("inputs", [])) != _contents(inputs):
        return None
    path, fix = (
        forest_path(folder, neighbors),
        f"Remove {sidecar_path(folder, step)}; the forest is then searched again.",
    )
    with reading(sidecar_path(folder, step), "a sidecar of a forest", fix):
        cutoff, num_rows = float(sidecar["cutoff"]), int(sidecar["counts"]["images"])
    table = read_columns(path, {"a": pa.int64(), "b": pa.int64(), "distance": pa.float32()}, fix)
    distance = table["distance"].to_numpy()
    # A run killed while it replaced the forest by a longer one leaves the longer one with the old sidecar.
    end = int(np.searchsorted(distance, np.float32(cutoff), side="right"))
    kind = np.int32 if num_rows < 2**31 else np.int64
    a, b = (table[name].slice(0, end).to_numpy() for name in ("a", "b"))
    distance = distance[:end]
    changed = find_changed(folder, step, sidecar)
    if changed is not None and _hash_edges(a, b, distance) != sidecar["edges"]:
        raise ClipcidError(changed, fix)
    if len(a) and not (
        int(a.min()) >= 0 and (a < b).all() and int(b.max()) < num_rows and (distance[1:] >= distance[:-1]).all()
    ):
        raise ClipcidError(f"{path} is not a forest of {num_rows:,} rows with ascending distances.", fix)
    return StoredForest(a.astype(kind), b.astype(kind), distance, cutoff, num_rows, neighbors)


def _hash_edges(a: IntArray, b: IntArray, distance: npt.NDArray[np.float32]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for column in (a, b):
        for start in range(0, len(column), _ROWS_AT_ONCE):
            digest.update(_wide(np.ascontiguousarray(column[start : start + _ROWS_AT_ONCE])).data)
    digest.update(np.ascontiguousarray(distance).data)
    return f"blake2b:{digest.hexdigest()}"


def _wide(rows: IntArray) -> npt.NDArray[np.int64]:
    return rows.astype(np.int64, copy=False)


def _contents(inputs: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(entry["size"], entry["hash"]) for entry in inputs]


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
        folder: The folder of `balance`.
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
        with atomic_file(self.path / f"{part.session}-{part.rank}.npz") as file:
            np.savez(file, **dataclasses.asdict(part))

    def read(self, session: int) -> Iterator[ForestPart]:
        """Read the parts of a session. One that cannot be read is skipped: its tiles are searched again."""
        for path in sorted(self.path.glob(f"{session}-*.npz")):
            try:
                with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                    found = {field.name: arrays[field.name] for field in dataclasses.fields(ForestPart)}
                yield ForestPart(**{name: value if value.ndim else value.item() for name, value in found.items()})
            except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
                continue

    def clear(self) -> None:
        """Remove the parts of this and every earlier search."""
        shutil.rmtree(self.folder / _PARTS, ignore_errors=True)
