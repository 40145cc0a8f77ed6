"""What is measured in each step of training: numbers that stay on the device until the host asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Measurements:
    """The numbers of the last step, by name; once those of a step are not finite, that step's, whatever comes after."""

    def __init__(self, device: torch.device) -> None:
        self._names: list[str] = []
        self._last = torch.empty(0, device=device)
        self._is_finite = torch.ones((), dtype=torch.bool, device=device)
        self._num_finite = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, checked: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
        """Keep a step's numbers, float32 [] or [1] each, of the same names in every step; the host does not wait.

        Args:
            checked: Numbers of which none may be infinite or NaN: otherwise training has diverged.
            others: Numbers of any value.
        """
        numbers = {**checked, **others}
        values = torch.stack([value.squeeze() if value.ndim else value for value in numbers.values()])
        self._last = torch.where(self._is_finite, values, self._last) if self._names else values
        self._names = list(numbers)
        self._is_finite = self._is_finite & torch.isfinite(values[: len(checked)]).all()
        self._num_finite += self._is_finite

    def send(self) -> SentMeasurements:
        """Start to copy the numbers to the host, which waits for them only in `SentMeasurements.read`."""
        return SentMeasurements(self._names, torch.cat([self._last.double(), self._num_finite[None]]))


class SentMeasurements:
    """Numbers on their way to the host; steps that come after do not change them."""

    def __init__(self, names: Sequence[str], values: Tensor) -> None:
        self._names = names
        self._values = values.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if values.device.type == "cuda" else None  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> tuple[int, dict[str, float]]:
        """Return how many steps came before one whose checked numbers were not finite, and the numbers by name."""
        if self._arrived is not None:
            self._arrived.synchronize()
        *values, num_finite = self._values.tolist()
        return int(num_finite), dict(zip(self._names, values, strict=True))
