"""The keep list: one row per readable image, with its set, the representative of the set, and whether it is kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_parquet
from clipcid_cli.formats.key_join import Keys, join_keys

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("component", pa.int64()),
        ("component_size", pa.int64()),
        ("kept", pa.bool_()),
        ("representative", pa.string()),
        ("distance", pa.float32()),
    ]
)
_REQUIRED = {"key", "kept"}


@dataclasses.dataclass(frozen=True)
class KeepList:
    """Which images of a data set are kept.

    Attributes:
        keys: Keys of all N images, in row order.
        shards: Their shards; None when the list does not have them.
        kept: Which are kept, bool [N].
    """

    keys: pa.ChunkedArray
    shards: pa.ChunkedArray | None
    kept: npt.NDArray[np.bool_]

    @property
    def num_kept(self) -> int:
        """Number of images kept."""
        return int(np.count_nonzero(self.kept))

    def look_up(self, keys: Keys) -> tuple[npt.NDArray[np.bool_], int]:
        """Tell which of n keys are kept, bool [n], and how many are missing from the list; those are not kept.

        Raises:
            ClipcidError: when a key occurs twice in the list.
        """
        rows = join_keys(keys, self.keys)
        is_listed = rows >= 0
        return is_listed & self.kept[np.maximum(rows, 0)], int(np.count_nonzero(~is_listed))

    def kept_by_shard(self) -> dict[str, set[str]]:
        """Return the keys of the kept images of each shard; the set is empty for a shard whose images are all dropped.

        Raises:
            ClipcidError: when the list has no shards.
        """
        if self.shards is None:
            raise ClipcidError("The keep list has no column `shard`.", "Make it with: clipcid balance")
        found: dict[str, set[str]] = {}
        rows = zip(self.shards.to_pylist(), self.keys.to_pylist(), self.kept.tolist(), strict=True)
        for shard, key, kept in rows:
            keys = found.setdefault(shard, set())
            if kept:
                keys.add(key)
        return found

    def count_by_shard(self) -> dict[str, int]:
        """Return the number of images in each shard, kept or not; empty when the list has no shards."""
        counts = [] if self.shards is None else pc.value_counts(self.shards).to_pylist()
        return {entry["values"]: entry["counts"] for entry in counts}


def write_keep_list(
    path: Path,
    *,
    keys: pa.ChunkedArray,
    shards: pa.ChunkedArray,
    labels: npt.NDArray[np.int64],
    representatives: npt.NDArray[np.int64],
    distances: npt.NDArray[np.float32],
) -> None:
    """Write a keep list, whole or not at all; the same values give the same bytes.

    Args:
        keys: Key of each of N images.
        labels: The smallest row of each image's set, int64 [N].
        representatives: The representative of each image, itself where it is kept, int64 [N].
        distances: Distance to it, float32 [N].
    """
    rows = np.arange(len(labels), dtype=np.int64)
    columns: list[Any] = [
        keys.cast(pa.string()),
        shards.cast(pa.string()),
        labels,
        np.bincount(labels, minlength=len(labels))[labels],
        representatives == rows,
        keys.cast(pa.string()).take(pa.array(representatives)),
        distances,
    ]
    write_parquet(path, pa.table(columns, schema=_SCHEMA))


def read_keep_list(path: Path) -> KeepList:
    """Read a keep list, ours or any parquet file with the columns `key` and `kept`.

    Raises:
        ClipcidError: when there is no such file, or it is not a keep list.
    """
    fix = "Give another --keep-list, or make one: clipcid balance DATA --keep R"
    try:
        names = set(pq.read_schema(path).names)
        missing = _REQUIRED - names
        if missing:
            raise ClipcidError(f"{path} is not a keep list: it has no column {', '.join(sorted(missing))}.", fix)
        table = pq.read_table(path, columns=sorted(_REQUIRED | ({"shard"} & names)))
    except FileNotFoundError as error:
        raise ClipcidError(f"There is no keep list {path}.", fix) from error
    except (OSError, pa.ArrowInvalid) as error:
        raise ClipcidError(f"Keep list {path} cannot be read: {error}.", fix) from error
    if table["kept"].type != pa.bool_() or table["kept"].null_count or table["key"].null_count:
        raise ClipcidError(f"Keep list {path} has rows without a `key`, or without true or false as `kept`.", fix)
    shards = table["shard"] if "shard" in names else None
    return KeepList(table["key"].cast(pa.string()), shards, table["kept"].to_numpy())


def read_dropped(path: Path) -> pa.Table:
    """Read the dropped images and their representatives.

    Args:
        path: A keep list written by `write_keep_list`.

    Returns:
        One row per dropped image, in row order: ``from`` (its key), ``to`` (the key of its representative), ``distance``
        (float32).
    """
    table = pq.read_table(path, columns=["key", "representative", "distance", "kept"])
    return table.filter(pc.invert(table["kept"])).drop_columns("kept").rename_columns(["from", "to", "distance"])
