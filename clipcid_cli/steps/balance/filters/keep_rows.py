"""The rows of the keep list: those that filters dropped beside those that were balanced."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.algorithms.near.exact import FloatArray, IntArray
from clipcid_cli.formats.arrays import map_strings
from clipcid_cli.formats.results.keep_list import Column, float_column
from clipcid_cli.steps.balance.filters.against import NearReferences
from clipcid_cli.steps.balance.filters.cluster_cap import ClusterCap
from clipcid_cli.steps.balance.filters.select import Filters
from clipcid_cli.steps.balance.sets import Sets

# What `dropped_by` says, by its number here; null where an image is kept.
_REASONS = ("reference", "caption", "repeat", "cluster")
_REFERENCE, _CAPTION, _REPEAT, _CLUSTER = range(len(_REASONS))


@dataclasses.dataclass(frozen=True)
class KeepRows:
    """The sets of all finite rows; a row that a filter dropped is a set of its own.

    Attributes:
        labels: The smallest row of each row's set, integers [N].
        representatives: The kept row that represents each row, integers [N]; −1 where none does.
        distances: Distance to it, float32 [N].
        columns: What the keep list says beside that.
    """

    labels: IntArray
    representatives: IntArray
    distances: FloatArray
    columns: list[Column]

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """Which rows are kept, bool [N]."""
        rows = np.arange(len(self.representatives), dtype=self.representatives.dtype)
        return np.asarray(self.representatives == rows)


def list_rows(folder: Path, filters: Filters, sets: Sets, cap: ClusterCap | None) -> KeepRows:
    """List all finite rows with the sets of those that were balanced.

    Args:
        folder: Where strings are mapped that may be more than memory holds.
        cap: What was dropped of the kept images in turn.
    """
    positions = filters.rows.positions
    if positions is None and cap is None:
        return KeepRows(sets.labels, sets.representatives, sets.distances, [])
    if positions is None:
        labels, representatives, distances = sets.labels, sets.representatives, sets.distances
    else:
        num_rows = len(filters.everything)
        labels, representatives = np.arange(num_rows, dtype=positions.dtype), np.full(num_rows, -1, positions.dtype)
        distances = np.zeros(num_rows, np.float32)
        labels[positions] = positions[sets.labels]
        representatives[positions] = positions[sets.representatives]
        distances[positions] = sets.distances
    is_balanced = np.asarray(representatives >= 0)
    if cap is not None:
        is_gone = cap.dropped[representatives] & is_balanced
        representatives = np.where(is_gone, representatives.dtype.type(-1), representatives)

    def read_reasons(part: slice) -> pa.Array:
        reasons = np.full(part.stop - part.start, _REPEAT, np.int8)
        reasons[~is_balanced[part]] = _CAPTION
        if filters.near is not None:
            reasons[filters.near.owner[part] >= 0] = _REFERENCE
        if cap is not None:
            reasons[cap.dropped[part]] = _CLUSTER
        is_kept = representatives[part] == np.arange(part.start, part.stop)
        return pa.array(_REASONS, pa.string()).take(pa.array(reasons, mask=is_kept))

    columns = [Column("dropped_by", pa.string(), read_reasons)]
    if filters.near is not None:
        columns += _name_references(folder, filters.near)
    if filters.captions is not None:
        columns.append(float_column("caption_similarity", filters.captions.similarity))
    if cap is not None:
        columns.append(_name_clusters(cap))
    return KeepRows(labels, representatives, distances, columns)


def _name_clusters(cap: ClusterCap) -> Column:
    def read(part: slice) -> pa.Array:
        return pa.array(cap.cluster[part], pa.int32(), mask=cap.cluster[part] < 0)

    return Column("cluster", pa.int32(), read)


def _name_references(folder: Path, near: NearReferences) -> list[Column]:
    """Return the columns that name the nearest reference row of each row that is near one."""
    keys: dict[int, pa.Array] = {}

    def read_names(part: slice) -> pa.Array:
        owner = near.owner[part]
        return pa.array([each.name for each in near.references]).take(pa.array(owner, mask=owner < 0))

    def read_keys(part: slice) -> pa.Array:
        owner, found = near.owner[part], pa.nulls(part.stop - part.start, pa.string())
        for number in np.unique(owner[owner >= 0]).tolist():
            if number not in keys:
                embeddings = near.references[number].embeddings
                chunks = (chunk for file in embeddings.files for chunk in embeddings.keys_of(file).chunks)
                keys[number] = map_strings(folder, chunks)
            is_its = owner == number
            named = keys[number].take(pa.array(near.row[part][is_its])).cast(pa.string())
            found = pc.replace_with_mask(found, pa.array(is_its), named)
        return found

    return [
        Column("reference", pa.string(), read_names),
        Column("reference_key", pa.string(), read_keys),
        float_column("reference_distance", near.distance),
    ]
