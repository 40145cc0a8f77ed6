"""Embeddings whose rows of images and views are multiplied by a matrix as they are read."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import numpy.typing as npt

from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.rows import Float16, Numbers, Rows, unit_rows
from clipcid_cli.formats.fingerprint import FileRecord


def map_images(embeddings: Embeddings, image_map: RowMap) -> Embeddings:
    """Return embeddings with other rows of images and views."""
    mapped = copy.copy(embeddings)
    mapped.image_map = image_map
    return mapped


@dataclasses.dataclass(frozen=True)
class RowMap:
    """What image rows are multiplied by, before they are normalised again: the repair of a teacher."""

    map_DD: npt.NDArray[np.float32]  # entries are multiples of 2⁻¹⁶
    record: FileRecord  # of the file that it was read from

    def apply(self, kind: Kind, rows: Rows) -> Rows:
        """Return the rows of a kind with the map applied as they are read; those of texts stay as they are."""
        return _MappedRows(rows, self.map_DD) if kind in (Kind.IMAGES, Kind.VIEWS) else rows


class _MappedRows(Rows):
    """Rows times a matrix: to the bit the same on any machine and among any others, since products add without error."""

    def __init__(self, rows: Rows, map_DD: npt.NDArray[np.float32]) -> None:
        self._rows = rows
        self._map_DD = map_DD.astype(np.float64)
        self.shape = rows.shape

    @property
    def stay_mapped(self) -> bool:
        return self._rows.stay_mapped

    def read(self, start: int, stop: int) -> Float16:
        return self._map(self._rows.read(start, stop))

    def take(self, positions: Numbers) -> Float16:
        return self._map(self._rows.take(positions))

    def _map(self, rows: Float16) -> Float16:
        return unit_rows(rows.astype(np.float64) @ self._map_DD)
