"""The single-linkage forest, and its sets at the cut-off.

``forest.parquet``, and files of like names for other searches, hold the edges; ``rows.parquet`` the row numbering, which is
the files of embeddings in the order of the rows; ``forest-rows.parquet`` a copy of it, of the forest; ``sets.parquet`` the
sets of near images; ``curve.csv`` how many images each cut-off keeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import reading, write_bytes, write_parquet, write_text
from clipcid_cli.formats.fingerprint import FileRecord, find_changed, record
from clipcid_cli.formats.output import OutputSpec, is_claimed, open_output
from clipcid_cli.formats.parquet import read_columns, read_rows, write_row_groups
from clipcid_cli.formats.sidecar import Sidecar, read_sidecar, sidecar_path

ROW_NUMBERING = "rows.parquet"
SET_TABLE = "sets.parquet"
CURVE = "curve.csv"

# All pairs are compared, or only those in and near partitions, where some edges may be missed; of all rows, or of those that
# filters have left. Each kind has files of its own, so that none is ever used, or replaced, as another.
_STEPS = {
    "exact": "forest",
    "partitioned": "forest-partitioned",
    "exact-filtered": "forest-filtered",
    "partitioned-filtered": "forest-partitioned-filtered",
}
_EDGES = pa.schema([("a", pa.int64()), ("b", pa.int64()), ("distance", pa.float32())])
_ROW_NUMBERING = pa.schema([("path", pa.string()), ("rows", pa.int64()), ("size", pa.int64()), ("hash", pa.string())])
_SETS = pa.schema(
    {
        "component": pa.int64(),
        "size": pa.int64(),
        "representative": pa.string(),
        "farthest": pa.string(),
        "farthest_distance": pa.float32(),
        "diameter": pa.float32(),
        "diameter_is_exact": pa.bool_(),
    }
)

# Row numbers: int32 below 2³¹ rows, else int64.
IntArray = npt.NDArray[np.signedinteger[Any]]


class ForestSidecar(Sidecar, kw_only=True):
    """``forest.json``: the distance up to which the forest is complete."""

    cutoff: float


def forest_path(folder: Path, kind: str) -> Path:
    """Return where the forest of a kind lies in the folder of `balance`."""
    return folder / f"{_STEPS[kind]}.parquet"


def row_numbering_path(folder: Path, kind: str) -> Path:
    """Return where the row numbering of a forest lies."""
    return folder / f"{_STEPS[kind]}-rows.parquet"


def forest_sidecar_path(folder: Path, kind: str) -> Path:
    """Return where the sidecar of a forest lies."""
    return sidecar_path(folder, _STEPS[kind])


def has_forest(folder: Path, kind: str) -> bool:
    """Tell whether the folder of `balance` holds a forest of a kind, finished or begun."""
    return is_claimed(folder, _STEPS[kind])


@dataclasses.dataclass(frozen=True)
class StoredForest:
    """The columns of a forest, [E] each, and what belongs to it."""

    a: IntArray  # the smaller row of each edge
    b: IntArray  # the larger one
    distance: npt.NDArray[np.float32]  # ascending
    searched_to: float  # the distance up to which it is complete
    num_rows: int


def forest_spec(folder: Path, inputs: Sequence[FileRecord], kind: str, *, overwrite: bool) -> OutputSpec[ForestSidecar]:
    """Ask for the forest of some embeddings in the folder of `balance`; one of others is replaced without a word."""
    return OutputSpec(
        folder,
        _STEPS[kind],
        ForestSidecar,
        settings={"neighbors": kind},
        inputs=inputs,
        may_differ=("inputs",),
        overwrite=overwrite,
    )


def write_forest(
    spec: OutputSpec[ForestSidecar], forest: StoredForest, row_numbering: Path, seconds: dict[str, float]
) -> None:
    """Write ``forest.parquet``, a copy of `row_numbering` and their sidecar ``forest.json``, or those of another kind."""
    kind = spec.settings["neighbors"]
    with open_output(spec) as output:
        output.begin_work()
        path = forest_path(output.work, kind)
        columns = forest.a, forest.b, forest.distance
        write_row_groups(path, _EDGES, len(forest.a), lambda part: [column[part] for column in columns])
        own = row_numbering_path(output.work, kind)
        write_bytes(own, row_numbering.read_bytes())
        output.commit(
            counts={"images": forest.num_rows, "edges": len(forest.a)},
            seconds=seconds,
            outputs=[record(file, output.work) for file in (path, own)],
            cutoff=forest.searched_to,
        )


def read_forest(spec: OutputSpec[ForestSidecar]) -> StoredForest | None:
    """Read the forest of these embeddings; None when there is none, one of others or, to overwrite it, a damaged one."""
    with open_output(spec) as output:
        sidecar = output.finished
    if sidecar is None:
        return None
    path = forest_path(spec.folder, spec.settings["neighbors"])
    fix = "Add --overwrite to search it again."
    table = read_columns(path, dict(zip(_EDGES.names, _EDGES.types, strict=True)), fix)
    a, b, distance = (column.to_numpy() for column in table.columns)
    num_rows = sidecar.counts["images"]
    in_range = a.min(initial=0) >= 0 and (a < b).all() and b.max(initial=-1) < num_rows
    is_searched = distance.max(initial=0.0) <= np.float32(sidecar.cutoff)
    if not (in_range and is_searched and (distance[1:] >= distance[:-1]).all()):
        raise ClipcidError(
            f"{path} is not a forest of {num_rows:,} rows with ascending distances up to {sidecar.cutoff:g}.", fix
        )
    kind = np.int32 if num_rows < 2**31 else np.int64
    return StoredForest(a.astype(kind), b.astype(kind), distance, sidecar.cutoff, num_rows)


def is_forest_damaged(folder: Path, kind: str) -> bool:
    """Tell whether the files of the forest in a folder, or its sidecar, are not as they were written."""
    path = forest_sidecar_path(folder, kind)
    try:
        sidecar = read_sidecar(path, ForestSidecar)
    except ClipcidError:
        return True
    return sidecar is None or find_changed(folder, sidecar.outputs, path) is not None


def find_earlier(spec: OutputSpec[ForestSidecar]) -> ForestSidecar | None:
    """Return the sidecar of the forest of other embeddings that is there; None when there is none."""
    with open_output(spec) as output:
        return output.earlier


class NumberedFile(FileRecord, frozen=True):
    """A file of embeddings, in the order of the rows; of a file of image embeddings with the number of its rows."""

    rows: int | None = None


def write_row_numbering(path: Path, files: Sequence[NumberedFile]) -> None:
    """Write the files through which rows are numbered, a row each."""
    write_parquet(path, pa.Table.from_pylist(msgspec.to_builtins(files), _ROW_NUMBERING))


def read_row_numbering(path: Path, fix: str) -> list[NumberedFile]:
    """Read the files through which rows are numbered."""
    rows = read_rows(path, fix)
    with reading(path, "a list of files of embeddings", fix):
        return msgspec.convert(rows, list[NumberedFile])


@dataclasses.dataclass(frozen=True)
class SetTable:
    """S sets of two or more images, in ascending order of their labels; arrays are [S]."""

    label: IntArray  # the smallest row
    size: npt.NDArray[np.int64]  # number of images
    representative: IntArray  # a row
    farthest: IntArray  # the row farthest from that one, the smaller of equals
    distance: npt.NDArray[np.float32]  # of these two
    diameter: npt.NDArray[np.float32]  # largest distance of two images; where not `is_exact`, at least half of that
    is_exact: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.label)


def write_set_table(path: Path, table: SetTable, keys: pa.Array) -> None:
    """Write the table, whole or not at all; `keys` are those of all rows, strings."""

    def read(part: slice) -> list[Any]:
        return [
            table.label[part],
            table.size[part],
            keys.take(pa.array(table.representative[part])),
            keys.take(pa.array(table.farthest[part])),
            table.distance[part],
            table.diameter[part],
            table.is_exact[part],
        ]

    write_row_groups(path, _SETS, len(table), read)


def write_curve(
    path: Path,
    *,
    distances: npt.NDArray[np.float32],
    kept: npt.NDArray[np.int64],
    largest: npt.NDArray[np.int64],
    num_images: int,
) -> None:
    """Write how many images are kept at each of C ascending cut-offs, and how many the largest set has, whole or not at all.

    Distances are written with the fewest digits that denote the same float32.
    """
    rows = zip(distances, kept.tolist(), largest.tolist(), strict=True)
    lines = [f"{distance!s},{count},{count / num_images:.6f},{size}" for distance, count, size in rows]
    write_text(path, "\n".join(["distance,kept,keep_ratio,largest_component", *lines, ""]))
