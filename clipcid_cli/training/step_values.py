"""What a training step found, kept on the device until somebody wants to know: to read it, the host waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class StepValues:
    """The numbers of the last step; once those of a step are not finite, that step's, whatever comes after."""

    def __init__(self, device: torch.device) -> None:
        self._last = torch.empty(0, device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._num_finite = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, checked: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Keep a step's numbers; the host does not wait.

        Args:
            checked: float32 [] or [n] each; where one is not finite training has diverged.
            others: More of them, of any value.
        """
        now, rest = (torch.cat([value.detach().reshape(-1) for value in values]) for values in (checked, others))
        found = torch.cat([now, rest])
        self._last = torch.where(self._finite, found, self._last) if len(self._last) else found
        self._finite = self._finite & torch.isfinite(now).all()
        self._num_finite += self._finite

    def read(self) -> tuple[int, list[float]]:
        """Return the number of steps before one whose checked numbers are not finite, and its numbers, or the last's."""
        *values, num_finite = torch.cat([self._last.double(), self._num_finite.double()[None]]).tolist()
        return int(num_finite), values
