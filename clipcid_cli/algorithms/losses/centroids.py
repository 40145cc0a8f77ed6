"""Cluster centroids in the shared space, of which a batch needs few.

Shape legend: K centroids, D teacher width, d width of the shared space.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipcid_cli.algorithms.losses.shared_space import PrincipalAxes, project

# Centroids that take at most this many bytes in the shared space are kept there: K = 32,768 at 512 dimensions.
_KEPT_BYTES = 64 * 2**20
# Centroids are read and projected this many at a time.
_ROWS_AT_ONCE = 8192


@dataclasses.dataclass(frozen=True)
class ProjectedCentroids:
    """Centroids in the shared space, projected on request.

    Of many centroids only the requested rows are read and projected, at every request, so that memory never holds K
    rows; few centroids are projected once and kept.

    Attributes:
        stored_KD: Unit rows in the teacher's space, float32 [K, D]; an array mapped from a file.
        axes: Axes of the shared space; None where it is the teacher's own.
        kept_Kd: All rows in the shared space, where they are few enough.
    """

    stored_KD: npt.NDArray[np.float32]
    axes: PrincipalAxes | None
    device: torch.device
    kept_Kd: Tensor | None = None

    @classmethod
    def of(
        cls, stored_KD: npt.NDArray[np.float32], axes: PrincipalAxes | None, device: torch.device
    ) -> ProjectedCentroids:
        """Project all centroids at once where they take at most 64 MiB, or an eighth of a GPU's memory; else on request."""
        centroids = cls(stored_KD, axes, device)
        max_bytes = _KEPT_BYTES
        if device.type == "cuda":
            max_bytes = torch.cuda.get_device_properties(device).total_memory // 8
        if len(centroids) * centroids.width * 4 > max_bytes:
            return centroids
        return dataclasses.replace(centroids, kept_Kd=centroids.take(np.arange(len(centroids))))

    def __len__(self) -> int:
        """Return K."""
        return len(self.stored_KD)

    @property
    def width(self) -> int:
        """Dimensions of the shared space."""
        return int(self.stored_KD.shape[1] if self.axes is None else self.axes.basis_Dd.shape[1])

    def take(self, ids: npt.NDArray[np.int64]) -> Tensor:
        """Return centroids by number: unit rows of the shared space, float32 [n, d], on the device."""
        if self.kept_Kd is not None:
            return self.kept_Kd[torch.from_numpy(ids).to(self.device)]
        taken_nd = torch.empty(len(ids), self.width, device=self.device)
        for first in range(0, len(ids), _ROWS_AT_ONCE):
            rows_bD = torch.from_numpy(np.take(self.stored_KD, ids[first : first + _ROWS_AT_ONCE], axis=0))
            if self.device.type == "cuda":
                rows_bD = rows_bD.pin_memory()  # neither the host nor another stream waits for the copy
            taken_nd[first : first + _ROWS_AT_ONCE] = project(rows_bD.to(self.device, non_blocking=True), self.axes)
        return taken_nd
