"""How fast a run goes and what its time goes to, from its first step here on: what a logged line says of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from clipcid_cli.algorithms.costs import describe_clip
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.run_folder import PHASES
from clipcid_cli.runtime.devices import find_device
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps.distill.plan import DistillPlan
from clipcid_cli.steps.distill.student import Student

# The backward pass of a tower that is trained has two products for each one of the forward pass.
_WITH_BACKWARD = 3


class Measured(NamedTuple):
    """What a line says of the pace."""

    samples_per_second: float  # since the first step, as what follows
    waiting: float  # share of the time in which the process waited for batches
    mfu: float | None  # share of the data sheets' rate of products; None where that is not known
    seconds: dict[str, float]  # by phase, since the line before

    def line(self) -> dict[str, float]:
        """Return the fields of ``train.jsonl``."""
        return {
            "samples_per_second": round(self.samples_per_second, 1),
            "data_wait_share": round(self.waiting, 3),
            **({} if self.mfu is None else {"mfu": float(f"{self.mfu:.4g}")}),
            **{f"seconds_{phase}": round(self.seconds[phase], 4) for phase in PHASES},
        }


class Pace:
    """The time of a run by what it goes to; the host waits for nothing to measure it."""

    def __init__(
        self, first: int, batch_size: int, copied: Callable[[], float], full_speed: float | None = None
    ) -> None:
        """Start the clock.

        Args:
            first: Steps done before.
            copied: Returns the seconds that the copies of batches have taken so far.
            full_speed: Samples a second at the data sheets' rate of products.
        """
        self._first = first
        self._batch_size = batch_size
        self._copied = copied
        self._copied_before = copied()
        self._full_speed = full_speed
        self._started = time.monotonic()
        self._waited = 0.0
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of what this process does meanwhile."""
        with timed(self._seconds, name):
            yield

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count what was timed elsewhere, by phase."""
        for name, value in seconds.items():
            self._seconds[name] += value

    def measure(self, step: int) -> Measured:
        """Measure the pace up to a step that has just ended, for a line of the log."""
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        copied = self._copied()
        seconds["copy"] = copied - self._copied_before
        self._copied_before = copied
        self._waited += seconds["data_wait"]
        passed = time.monotonic() - self._started
        speed = (step - self._first) * self._batch_size / passed
        mfu = None if self._full_speed is None else speed / self._full_speed
        return Measured(speed, self._waited / passed, mfu, seconds)


def full_speed(plan: DistillPlan, student: Student, context: DistContext) -> float | None:
    """Return the samples a second of all processes at the data sheets' rate of products; None where that is not known.

    Counted are the student's products, of captions of a usual length: not layers that are computed again, the optimiser,
    losses or a teacher.
    """
    if context.device.type != "cuda":
        return None
    device = find_device(torch.cuda.get_device_name(context.device))
    try:
        clip = describe_clip(student.model.info.config)
    except ClipcidError:  # towers whose formulas are not known
        return None
    if device is None:
        return None
    settings = plan.settings
    texts = 1 + plan.extra_texts / plan.batch_size
    if settings.keeps_text_tower:  # which encodes nothing
        clip = clip.image_alone(clip.embed_dim)
    image = clip.image.operations * (1 if settings.freeze_image else _WITH_BACKWARD)
    text = clip.text.operations * (_WITH_BACKWARD if settings.trains_text else 1)
    rate = device.exact if student.precision.dtype == torch.float32 else device.product
    return context.size * rate / (image + texts * text)
