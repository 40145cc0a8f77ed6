"""The sets as tables: ``sets.parquet``, each set of near images; ``curve.csv``, how many images each cut-off keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipcid_cli.formats.atomic import write_text
from clipcid_cli.formats.parquet import write_row_groups

SET_TABLE = "sets.parquet"
CURVE = "curve.csv"

_SCHEMA = pa.schema(
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


@dataclasses.dataclass(frozen=True)
class SetTable:
    """S sets of two or more images, in ascending order of their labels; arrays are [S].

    Attributes:
        label: The smallest row.
        size: Number of images.
        representative: The row that represents it.
        farthest: The row farthest from that one, the smaller of equals; how far is `distance`.
        diameter: Largest distance of two of its images; where not `is_exact`, at least half of that.
    """

    label: npt.NDArray[np.signedinteger]
    size: npt.NDArray[np.int64]
    representative: npt.NDArray[np.signedinteger]
    farthest: npt.NDArray[np.signedinteger]
    distance: npt.NDArray[np.float32]
    diameter: npt.NDArray[np.float32]
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

    write_row_groups(path, _SCHEMA, len(table), read)


def write_curve(
    path: Path,
    *,
    distances: npt.NDArray[np.float32],
    kept: npt.NDArray[np.int64],
    largest: npt.NDArray[np.int64],
    num_images: int,
) -> None:
    """Write the curve, whole or not at all.

    Args:
        distances: Cut-offs, ascending, float32 [C]; written with the fewest digits that denote the same float32.
        kept: Images kept at each, int64 [C].
        largest: Images in the largest set at each, int64 [C].
    """
    rows = zip(distances, kept.tolist(), largest.tolist(), strict=True)
    lines = [f"{distance!s},{count},{count / num_images:.6f},{size}" for distance, count, size in rows]
    write_text(path, "\n".join(["distance,kept,keep_ratio,largest_component", *lines, ""]))
