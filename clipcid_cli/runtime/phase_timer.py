"""How long the phases of a training step take on a device."""

from __future__ import annotations

import time
from typing import Any

import torch


class PhaseTimer:
    """Times by phase what a device does, without waiting for it: by events on a GPU, by the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._last: Any = None
        self._spans: list[tuple[str, Any, Any]] = []

    def start(self) -> None:
        """Begin the first phase."""
        self._last = self._now()

    def finish(self, phase: str) -> None:
        """End a phase, and begin the next."""
        now = self._now()
        self._spans.append((phase, self._last, now))
        self._last = now

    def take(self) -> PhaseTimes:
        """Return what was timed since the last call."""
        spans, self._spans = self._spans, []
        return PhaseTimes(spans)

    def _now(self) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        event.record()
        return event


class PhaseTimes:
    """Times on their way from a device."""

    def __init__(self, spans: list[tuple[str, Any, Any]]) -> None:
        self._spans = spans

    def read(self) -> dict[str, float]:
        """Return the seconds of each phase; the device must have come so far."""
        seconds = dict[str, float]()
        for phase, begin, end in self._spans:
            taken = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
            seconds[phase] = seconds.get(phase, 0.0) + taken
        return seconds
