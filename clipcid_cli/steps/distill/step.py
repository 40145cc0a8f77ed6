"""One step of training: encode a batch, gather all processes' features, compare them, propagate, clip, update."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor

from clipcid_cli.algorithms.accumulation import exact_accumulation
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.phase_timer import PhaseTimer, PhaseTimes
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.steps.distill.objective import Objective
from clipcid_cli.steps.distill.student import Student
from clipcid_cli.steps.distill.training_batch import TrainingBatch
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.training.measurements import Measurements, SentMeasurements
from clipcid_cli.training.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What one step measured."""

    step: int  # steps done, this one included
    lr: float
    loss: float  # weighted sum of the losses
    losses: dict[str, float]  # without their weights
    gradient_norm: float  # before clipping
    scales: dict[str, float]  # logit scales: the student's own under ``student``, losses' under their names
    bias: float | None  # the student's logit bias
    # The first step that was not finite, numbered as in `step`; None where all were. Then `losses` and
    # `gradient_norm` are those of that step.
    diverged_at: int | None
    seconds: dict[str, float]  # of the steps since the record before, by phase, on the device

    def line(self) -> dict[str, Any]:
        """Return the step's line of ``train.jsonl``, but for times."""
        return {
            "step": self.step,
            "loss": self.loss,
            **{f"loss_{name}": value for name, value in self.losses.items()},
            "lr": self.lr,
            "gradient_norm": self.gradient_norm if math.isfinite(self.gradient_norm) else None,
            **{f"scale_{name}": value for name, value in self.scales.items()},
            **({} if self.bias is None else {"bias_student": self.bias}),
        }


@dataclasses.dataclass(frozen=True)
class SentRecord:
    """A step's record on its way to the host."""

    step: int
    lr: float
    steps_made: int  # by this process
    weights: dict[str, float]
    measured: SentMeasurements
    times: PhaseTimes

    def read(self) -> StepRecord:
        """Wait until the device has made the step, and return the record."""
        num_finite, values = self.measured.read()
        losses = {name: values[f"loss_{name}"] for name in self.weights}
        log_scales = {name: value for name, value in values.items() if name.startswith("log_scale_")}
        return StepRecord(
            step=self.step,
            lr=self.lr,
            loss=sum(self.weights[name] * value for name, value in losses.items()),
            losses=losses,
            gradient_norm=values["gradient_norm"],
            scales={name.removeprefix("log_scale_"): math.exp(value) for name, value in log_scales.items()},
            bias=values.get("bias"),
            diverged_at=None if num_finite == self.steps_made else self.step - self.steps_made + num_finite + 1,
            seconds=self.times.read(),
        )


class TrainStep:
    """Makes the steps of a run, the same on every process."""

    def __init__(
        self,
        settings: DistillSettings,
        student: Student,
        objective: Objective,
        state: TrainState,
        context: DistContext,
    ) -> None:
        self._settings = settings
        self._student = student
        self._objective = objective
        self._state = state
        self._context = context
        self._measurements = Measurements(context.device)
        self._timer = PhaseTimer(context.device)
        self._steps_made = 0
        self._lr = 0.0

    def __call__(self, batch: TrainingBatch) -> None:
        """Make one step; what it measures stays on the device, and the host does not wait for it."""
        student, objective, state = self._student, self._objective, self._state
        self._timer.start()
        student.train()
        encoded = student.encode(batch, self._draw_seeds())
        # Where the cluster loss is small it is the difference of two large terms: TF32 would leave nothing of its gradient.
        with exact_accumulation(self._context.device):
            scale = state.log_scales["student"].exp()
            loss_batch = objective.make_loss_batch(encoded.features, scale, state.bias, batch)
            compared = objective.compare(loss_batch)
            state.backward(compared.total)
        student.backward(encoded, before_last=state.averager.watch)
        state.averager.finish()
        self._timer.finish("forward_backward")
        norm = state.clip_grad_norm()
        # A scaled gradient may overflow: the update is then skipped and the scale lowered.
        may_overflow = state.may_overflow
        self._lr = state.update()
        self._timer.finish("optimizer")
        self._steps_made += 1
        self._measure(compared.losses, norm, may_overflow)

    def send(self) -> SentRecord:
        """Start to copy the last step's record to the host, which need not wait for it."""
        sent = self._measurements.send()
        times = self._timer.take()
        return SentRecord(self._state.step, self._lr, self._steps_made, self._objective.weights, sent, times)

    def _draw_seeds(self) -> list[int]:
        """Return a seed for each part of the batch, for dropout and the like."""
        settings = self._settings
        step, rank = self._state.step, self._context.rank
        return [derive_seed("step", settings.seed, step, rank, part) for part in range(settings.accum_freq)]

    def _measure(self, losses: dict[str, Tensor], norm: Tensor, may_overflow: bool) -> None:
        state = self._state
        checked = {f"loss_{name}": value for name, value in losses.items()}
        learned: dict[str, Tensor] = {f"log_scale_{name}": value for name, value in state.log_scales.items()}
        if state.bias is not None:
            learned["bias"] = state.bias
        if may_overflow:
            self._measurements.add(checked, {"gradient_norm": norm, **learned})
        else:
            self._measurements.add({**checked, "gradient_norm": norm}, learned)
