"""The single-linkage forest as a file, and the parts of it that a search leaves behind while it runs."""

from __future__ import annotations

import dataclasses
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
from clipcid_cli.formats.atomic import atomic_file, write_parquet
from clipcid_cli.formats.output import Output, read_sidecar, sidecar_path

# Pairs are compared all with all, or only where partitions are near: then some edges may be missing. The two kinds have
# files of their own, so that neither is ever taken, or replaced, for the other.
_STEPS = {"exact": "forest", "partitioned": "forest-partitioned"}
_PARTS = ".forest-parts"


def forest_path(folder: Path, neighbors: str) -> Path:
    """Return where a forest lies in the folder of `balance`."""
    return folder / f"{_STEPS[neighbors]}.parquet"


@dataclasses.dataclass(frozen=True)
class StoredForest:
    """A forest read from its file.

    Attributes:
        a: Smaller row of each edge, int64 [E].
        b: Larger row, int64 [E].
        distance: Their distance, float32 [E], ascending.
        cutoff: The distance up to which the forest is complete, or was searched for in partitions.
        num_rows: Rows it is a forest of.
        neighbors: How it was searched for: ``exact`` or ``partitioned``.
    """

    a: npt.NDArray[np.int64]
    b: npt.NDArray[np.int64]
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
        inputs: Fingerprints of the embeddings it was made of.
        seconds: Time by phase.
    """
    step = _STEPS[forest.neighbors]
    sidecar = read_sidecar(sidecar_path(folder, step))
    if sidecar is not None and _contents(sidecar["inputs"]) != _contents(inputs):
        # A run killed between the two files must not leave this forest under the sidecar of other embeddings.
        sidecar_path(folder, step).unlink()
    write_parquet(
        forest_path(folder, forest.neighbors),
        pa.table({"a": forest.a, "b": forest.b, "distance": pa.array(forest.distance, pa.float32())}),
    )
    Output(folder, step, {"neighbors": forest.neighbors}, inputs, finished=None, resumed=False).commit(
        counts={"images": forest.num_rows, "edges": len(forest.a)}, seconds=seconds, cutoff=forest.cutoff
    )


def read_forest(folder: Path, inputs: list[dict[str, Any]], neighbors: str = "exact") -> StoredForest | None:
    """Read a forest that was made of these embeddings; None when there is none, or one of others.

    Args:
        folder: The folder of `balance`.
        neighbors: How it must have been searched for.

    Raises:
        ClipcidError: when the file that the sidecar describes is missing or damaged.
    """
    step = _STEPS[neighbors]
    sidecar = read_sidecar(sidecar_path(folder, step))
    if sidecar is None or _contents(sidecar["inputs"]) != _contents(inputs):
        return None
    path, cutoff = forest_path(folder, neighbors), float(sidecar["cutoff"])
    try:
        table = pq.read_table(path, columns=["a", "b", "distance"])
        a, b, distance = (table[name].to_numpy() for name in ("a", "b", "distance"))
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise ClipcidError(
            f"Forest {path} cannot be read: {error}.",
            f"Remove {sidecar_path(folder, step)}; it is then made again.",
        ) from error
    # A run killed while it replaced the forest by a longer one leaves the longer one under the old sidecar.
    end = int(np.searchsorted(distance, np.float32(cutoff), side="right"))
    return StoredForest(a[:end], b[:end], distance[:end], cutoff, int(sidecar["counts"]["images"]), neighbors)


def _contents(inputs: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(entry["size"], entry["hash"]) for entry in inputs]


@dataclasses.dataclass(frozen=True)
class ForestPart:
    """What one process had found when it last saved: all pairs of some tiles, or the forest of them.

    Attributes:
        tiles: Tiles whose pairs it holds, int64 [T, 2].
        a: Smaller row of each edge, int64 [E].
        b: Larger row, int64 [E].
        distance: Their distance, float32 [E].
        has_all: Whether these are all pairs, bool without dimensions.
    """

    tiles: npt.NDArray[np.int64]
    a: npt.NDArray[np.int64]
    b: npt.NDArray[np.int64]
    distance: npt.NDArray[np.float32]
    has_all: npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class ForestParts:
    """The parts of a search in progress; a killed search resumes on them, and processes hand their finds over by them.

    Attributes:
        folder: The folder of `balance`.
        search: Name of the search: parts of another cut-off or another tiling are no use to it.
    """

    folder: Path
    search: str

    @property
    def path(self) -> Path:
        """Where the parts of this search lie."""
        return self.folder / _PARTS / self.search

    def next_session(self) -> int:
        """Return a number that no part of an earlier run has."""
        return 1 + max((int(path.name.split("-")[0]) for path in self.path.glob("*-*.npz")), default=-1)

    def write(self, session: int, rank: int, part: ForestPart) -> None:
        """Save the part of one process, replacing what it saved before in the same session."""
        with atomic_file(self.path / f"{session}-{rank}.npz") as file:
            np.savez(file, **dataclasses.asdict(part))

    def read(self) -> Iterator[ForestPart]:
        """Read all parts. One that cannot be read is left out: its tiles are then searched again."""
        for path in sorted(self.path.glob("*-*.npz")):
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    yield ForestPart(*(arrays[field.name] for field in dataclasses.fields(ForestPart)))
            except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
                continue

    def clear(self) -> None:
        """Remove the parts of this and every earlier search."""
        shutil.rmtree(self.folder / _PARTS, ignore_errors=True)
