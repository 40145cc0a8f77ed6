"""The single-linkage forest: ``forest.parquet``, and files of like names for those of other searches."""

from __future__ import annotations

import dataclasses
import hashlib
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
    """
    step = _STEPS[neighbors]
    sidecar = read_sidecar(sidecar_path(folder, step))
    if sidecar is None or _contents(sidecar.get("inputs", [])) != _contents(inputs):
        return None
    path = forest_path(folder, neighbors)
    fix = f"Remove {sidecar_path(folder, step)}; the forest is then searched again."
    with reading(sidecar_path(folder, step), "a sidecar of a forest", fix):
        cutoff, num_rows = float(sidecar["cutoff"]), int(sidecar["counts"]["images"])
    table = read_columns(path, dict(zip(_SCHEMA.names, _SCHEMA.types, strict=True)), fix)
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
