"""The training loop: batches in; optimiser steps, logs, evaluations and checkpoints out."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Generator
from contextlib import closing
from typing import Any

from torch import nn

from clipcid_cli.algorithms.near.block import exact_accumulation
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_json
from clipcid_cli.formats.data.samples import close_copies
from clipcid_cli.formats.results.checkpoint import write_checkpoint
from clipcid_cli.formats.results.run_folder import RunFolder, TrainingLog
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.memory import memory_in_use
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.grad_cache import BatchEncoder
from clipcid_cli.runtime.pipeline import ordered_map, prefetch
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.runtime.training.gradients import GradientAverager
from clipcid_cli.runtime.training.step_values import StepValues
from clipcid_cli.runtime.training.trainer import Trainer
from clipcid_cli.steps.distill.batches import BatchMaker, BatchOrder, TrainingBatch
from clipcid_cli.steps.distill.evaluation import Evaluation
from clipcid_cli.steps.distill.objective import Objective, PreparedBatch
from clipcid_cli.steps.distill.plan import Schedule
from clipcid_cli.steps.reporting import Progress, Reporter


@dataclasses.dataclass
class Loop:
    """A run in progress.

    Attributes:
        maker: Makes a batch in a worker.
        encoder: Runs both towers of the student.
        frozen: Modules of towers that are not trained, kept in evaluation mode.
        folder: Where logs and checkpoints go.
        writes: Whether anything may be written there.
        max_bad_fraction: Largest share of samples whose image may be unreadable.
        bad: Unreadable images this process met: reason by key.
    """

    machine: Machine
    student: ClipModel
    trainer: Trainer
    objective: Objective
    order: BatchOrder
    maker: BatchMaker
    evaluation: Evaluation
    encoder: BatchEncoder
    frozen: list[nn.Module]
    schedule: Schedule
    folder: RunFolder
    log: TrainingLog
    writes: bool
    seed: int
    workers: int
    max_bad_fraction: float
    reporter: Reporter
    bad: dict[str, str]

    def __post_init__(self) -> None:
        self.averager = GradientAverager(self.trainer.of_towers, self.trainer.of_losses, self.machine.size)
        self.values = StepValues(self.machine.device)
        self.losses: dict[str, float] = {}
        self.metrics: dict[str, float] = {}

    def train(self) -> None:
        """Make the steps that are left."""
        schedule, batch_size, first = self.schedule, self.order.batch_size, self.trainer.step
        if first == 0:
            self._evaluate()
        if first == schedule.steps:
            # The run was killed between its last checkpoint and its sidecar.
            self.losses, self.metrics = self.folder.last_values()
            return
        close_copies()
        started, waited = time.monotonic(), 0.0
        left = (schedule.steps - first) * batch_size
        with closing(self._batches()) as batches, self.reporter.progress("distill", left, "samples") as progress:
            for batch, seconds_waited in batches:
                waited += seconds_waited
                self.bad.update({key: reason for reason, key in batch.local.bad})
                if self.trainer.step == 0:
                    self._require_images()
                rate = self.step(batch)
                progress.advance(batch_size)
                step = self.trainer.step
                logs, evaluates, saves = schedule.due_after(step)
                if logs or evaluates or saves:
                    line = self.read(step - first, rate)
                if logs:
                    seconds = time.monotonic() - started
                    line["samples_per_second"] = round((step - first) * batch_size / seconds, 1)
                    line["data_wait_share"] = round(waited / seconds, 3)
                    self.log.add(line)
                    self._show(progress, line)
                if saves:
                    self.log.flush()
                if evaluates:
                    self._evaluate()
                if saves:
                    self._save()

    def _batches(self) -> Generator[tuple[PreparedBatch, float]]:
        """Yield each batch, prepared during the step before, with the seconds spent waiting for it."""
        steps, machine = (self.trainer.step, self.schedule.steps), self.machine
        made = ordered_map(self.maker, self.order.iterate(*steps, machine.rank, machine.size), self.workers)
        prepared = prefetch(lambda pair: self.prepare(*pair), zip(made, range(*steps), strict=True), machine.device)
        with closing(made), closing(prepared):
            started = time.monotonic()
            for batch in prepared:
                yield batch, time.monotonic() - started
                started = time.monotonic()

    def prepare(self, batch: TrainingBatch, step: int) -> PreparedBatch:
        """Prepare a step's batch; a function of the batch and the step, whatever the steps before it change."""
        rows = batch.rows.numpy() if self.machine.size == 1 else self.order.rows(step)
        return self.objective.prepare(batch, rows, step)

    def step(self, batch: PreparedBatch) -> float:
        """Make one optimiser step and return its learning rate; what it found stays on the device until it is read."""
        trainer, module, rank = self.trainer, self.student.module, self.machine.rank
        local, encoder = batch.local, self.encoder
        module.train()
        for tower in self.frozen:
            tower.eval()
        seeds = [derive_seed("step", self.seed, trainer.step, rank, part) for part in range(encoder.num_parts)]
        encoded = encoder(local.pixels, local.colors, local.tokens, seeds, local.kept_patches)
        # Where the cluster loss is small it is the difference of two large terms: TF32 would leave nothing of its gradient.
        with exact_accumulation(self.machine.device):
            total, terms = self.objective(encoded.features, module.logit_scale.exp(), batch)  # type: ignore[operator]
            trainer.backward(total)
        encoder.backward(encoded, self.averager.watch)
        self.averager.finish()
        norm, losses = trainer.limit_gradient(), self.objective.values(terms)
        # A scaled gradient may overflow: the update is then skipped and the scale lowered.
        checked, others = ([losses], [norm]) if trainer.may_overflow else ([losses, norm], [])
        rate = trainer.update()
        self.values.add(checked, [*others, *trainer.log_scales().values()])
        return rate

    def read(self, num_steps: int, rate: float) -> dict[str, Any]:
        """Return the last step's line of the log.

        Args:
            num_steps: Number of steps made since the run began or was resumed.
            rate: The last step's learning rate.
        """
        num_finite, values = self.values.read()
        weights, scales = self.objective.weights, self.trainer.log_scales()
        losses = dict(zip(weights, values, strict=False))
        norm, log_scales = values[len(weights)], values[len(weights) + 1 :]
        loss = sum(weights[name] * value for name, value in losses.items())
        if num_finite < num_steps:
            self._stop(self.trainer.step - num_steps + num_finite, loss, norm, losses)
        self.losses = losses
        return {
            "step": self.trainer.step,
            "loss": loss,
            **{f"loss_{name}": value for name, value in losses.items()},
            "lr": rate,
            "gradient_norm": norm if math.isfinite(norm) else None,
            **{f"scale_{name}": math.exp(value) for name, value in zip(scales, log_scales, strict=True)},
        }

    def _require_images(self) -> None:
        """Refuse a first batch without one readable image, before a line is logged."""
        skips = Skips.of(self.bad_images())
        if skips.total >= self.order.batch_size:
            raise ClipcidError(
                f"None of the {self.order.batch_size:,} images of the first batch can be read:\n{skips.describe()}",
                "Fix the data.",
            )

    def bad_images(self) -> dict[str, str]:
        """Return the unreadable images that any process met so far, reason by key; call it on every process.

        In another epoch, an image may have come to another of them.
        """
        return {key: reason for bad in self.machine.gather(self.bad) for key, reason in bad.items()}

    def _stop(self, step: int, loss: float, norm: float, losses: dict[str, float]) -> None:
        """Save the keys of the batch whose loss or gradient is not finite, and raise.

        All processes hold the same loss and gradient, so all of them arrive here.
        """
        keys = [item.sample.key for item in self.order.items(step, 0, 1)]
        path = self.folder.diverged(step)
        values = {name: value if math.isfinite(value) else str(value) for name, value in losses.items()}
        where = f" The batch's keys are in {path}." if self.writes else ""
        if self.machine.is_main and self.writes:
            write_json(
                path, {"step": step, "losses": values, "loss": str(loss), "gradient_norm": str(norm), "keys": keys}
            )
        raise ClipcidError(
            f"Training diverged at step {step:,}: loss {loss:g}, gradient norm {norm:g}.{where}",
            "Lower --lr, lengthen --warmup, or train in --precision fp32. Each begins anew; under another --name, and this "
            "run's checkpoints stay.",
        )

    def _evaluate(self) -> None:
        if not self.evaluation.has_data:
            return
        metrics = self.evaluation.measure(self.student, self.machine, self.trainer)
        if self.machine.is_main:
            self.log.add_evaluation(self.trainer.step, metrics)
        self.metrics = self.machine.broadcast(metrics)

    def _show(self, progress: Progress, line: dict[str, Any]) -> None:
        """Show the panel: losses, learning rate and scales, share of time spent waiting for data, memory."""
        progress.show(
            **self.losses,
            lr=line["lr"],
            **{f"σ {name}": line[f"scale_{name}"] for name in self.trainer.log_scales()},
            waiting=f"{line['data_wait_share']:.0%}",
            memory=f"{memory_in_use(self.student.device) / 2**30:.1f} GiB",
        )

    def _save(self) -> None:
        bad = self.bad_images()
        Skips.of(bad).check(len(self.order), self.max_bad_fraction, "the training data")
        if self.machine.is_main:
            write_checkpoint(self.folder.checkpoints, self.trainer.step, self.trainer.state() | {"bad": bad})
        self.machine.barrier()
