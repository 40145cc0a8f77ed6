"""Cluster centroids in the shared space, of which a batch needs few.

Shape legend: K centroids, D teacher width, d width of the shared space.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipcid_cli.algorithms.losses.shared_space import PrincipalAxes, project

# Centroids that take at most this many bytes in the shared space are kept there: K = 32,768 at 512 dimensions.
_KEPT_BYTES = 64 * 2**20
# Centroids are read and projected this many at a time.
_ROWS_AT_ONCE = 8192


class ProjectedCentroids:
    """Centroids in the shared space: few are projected once and kept, of many only those that are asked for are read.

    Few take at most 64 MiB, or an eighth of a GPU's memory.

    Attributes:
        kept_Kd: All rows in the shared space, where they are few enough.
    """

    def __init__(self, stored_KD: npt.NDArray[np.float32], axes: PrincipalAxes | None, device: torch.device) -> None:
        """Take unit rows in the teacher's space, mapped from a file; `axes` is None where the shared space is that one."""
        self._stored_KD, self._axes, self._device = stored_KD, axes, device
        self.width = int(stored_KD.shape[1] if axes is None else axes.basis_Dd.shape[1])
        max_bytes = _KEPT_BYTES
        if device.type == "cuda":
            max_bytes = torch.cuda.get_device_properties(device).total_memory // 8
        self.kept_Kd: Tensor | None = None
        if len(self) * self.width * 4 <= max_bytes:
            self.kept_Kd = self.take(np.arange(len(self)))

    def __len__(self) -> int:
        """Return K."""
        return len(self._stored_KD)

    def take(self, ids: npt.NDArray[np.int64]) -> Tensor:
        """Return centroids by number: unit rows of the shared space, float32 [n, d], on the device."""
        if self.kept_Kd is not None:
            return self.kept_Kd[torch.from_numpy(ids).to(self._device)]
        taken_nd = torch.empty(len(ids), self.width, device=self._device)
        for first in range(0, len(ids), _ROWS_AT_ONCE):
            rows_bD = torch.from_numpy(np.take(self._stored_KD, ids[first : first + _ROWS_AT_ONCE], axis=0))
            if self._device.type == "cuda":
                rows_bD = rows_bD.pin_memory()  # neither the host nor another stream waits for the copy
            taken_nd[first : first + _ROWS_AT_ONCE] = project(rows_bD.to(self._device, non_blocking=True), self._axes)
        return taken_nd
