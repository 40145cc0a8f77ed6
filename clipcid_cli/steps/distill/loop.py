"""The loop: batches in, optimiser steps, logs, evaluations and checkpoints out."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_json
from clipcid_cli.formats.results.checkpoint import write_checkpoint
from clipcid_cli.formats.results.run_folder import RunFolder, append_lines, read_lines
from clipcid_cli.formats.results.tensorboard import TensorBoardLog
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.gradients import GradientAverager
from clipcid_cli.runtime.loading import load_batches
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.memory import memory_in_use
from clipcid_cli.runtime.models.augment import apply_colors
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.grad_cache import BatchPart, EncodeBoth, GradCache
from clipcid_cli.runtime.models.preprocess import normalize_pixels
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.runtime.training import Trainer, fast_attention
from clipcid_cli.steps.distill.batches import BatchMaker, BatchOrder, TrainingBatch
from clipcid_cli.steps.distill.evaluation import Evaluation
from clipcid_cli.steps.distill.objective import Objective
from clipcid_cli.steps.reporting import Progress, Reporter

# The log has at most about this many lines, whatever the length of the run.
_LOG_LINES = 5_000
# Seconds after which logged lines reach the disk.
_FLUSH_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When things happen."""

    steps: int
    eval_every: int
    checkpoint_every: int

    @property
    def log_every(self) -> int:
        """Steps between lines of the training log."""
        return max(1, self.steps // _LOG_LINES)


@dataclasses.dataclass
class Loop:
    """A run in progress.

    Attributes:
        maker: Makes a batch in a worker.
        evaluation: What it is evaluated on.
        precision: Number format of the towers.
        changes_colors: Whether batches carry colour maps worth applying.
        parts: Parts a process's share of a batch is encoded in.
        encode: Runs both towers of the student.
        frozen: Modules of towers that are not trained, kept in evaluation mode.
        run: Where logs and checkpoints go.
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
    precision: Precision
    changes_colors: bool
    parts: int
    encode: EncodeBoth
    frozen: list[nn.Module]
    schedule: Schedule
    run: RunFolder
    writes: bool
    tensorboard: TensorBoardLog
    seed: int
    workers: int
    max_bad_fraction: float
    reporter: Reporter
    bad: dict[str, str]

    def __post_init__(self) -> None:
        self.averager = GradientAverager(self.trainer.of_towers, self.trainer.of_losses, self.machine.size)
        self.terms: dict[str, float] = {}
        self.metrics: dict[str, float] = {}
        self.waited = 0.0

    def train(self) -> None:
        """Run the steps that are left.

        Raises:
            ClipcidError: when the loss is no longer finite, or too many images are unreadable.
        """
        if self.trainer.step == 0:
            self._evaluate()
        if self.trainer.step == self.schedule.steps:
            self._recall()
            return
        started, first = time.monotonic(), self.trainer.step
        lines: list[dict[str, Any]] = []
        flushed = started
        left = self.schedule.steps - first
        with self.reporter.progress("distill", left * self.order.batch_size, "samples") as progress:
            for batch, waited in self._batches():
                self.waited += waited
                self._count_bad(batch)
                if self.trainer.step == 0:
                    self._require_images()
                line = self.step(batch)
                progress.advance(self.order.batch_size)
                step = self.trainer.step
                now = time.monotonic()
                if step % self.schedule.log_every == 0 or step == self.schedule.steps:
                    seconds = now - started
                    line["samples_per_second"] = round((step - first) * self.order.batch_size / seconds, 1)
                    line["data_wait_share"] = round(self.waited / seconds, 3)
                    lines.append(line)
                    self._show(progress, line)
                if now - flushed > _FLUSH_SECONDS or self._is_due(step):
                    self._log(lines)
                    lines, flushed = [], now
                if step % self.schedule.eval_every == 0 or step == self.schedule.steps:
                    self._evaluate()
                if self._is_due(step):
                    self._save()

    def _is_due(self, step: int) -> bool:
        return step % self.schedule.checkpoint_every == 0 or step == self.schedule.steps

    def _batches(self) -> Iterator[tuple[TrainingBatch, float]]:
        """Yield each batch with the seconds it was waited for."""
        items = self.order.iterate(self.trainer.step, self.schedule.steps, self.machine.rank, self.machine.size)
        batches = load_batches(items, self.maker, self.workers)
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            if batch is None:
                return
            yield batch, time.monotonic() - asked

    def step(self, batch: TrainingBatch) -> dict[str, Any]:
        """Make one optimiser step and return its line of the log.

        Raises:
            ClipcidError: when the loss or its gradient is no longer finite.
        """
        trainer, module = self.trainer, self.student.module
        module.train()
        for tower in self.frozen:
            tower.eval()
        towers = GradCache(self._encode_part, self._split(batch))
        scale: Tensor = module.logit_scale.exp()  # type: ignore[operator]  # a parameter of every CLIP
        total, terms = self.objective(towers.image, towers.text, scale, batch, trainer.step)
        trainer.backward(total)
        # Layers that are computed again (--grad-checkpointing) need the attention kernel they had.
        with fast_attention(self.student.device, self.precision.dtype):
            towers.backward(self.averager.watch)
        self.averager.finish()
        norm = trainer.limit_gradient()
        values = self.objective.values(terms)
        loss = sum(self.objective.weights[name] * value for name, value in values.items())
        if not (math.isfinite(loss) and (math.isfinite(norm) or trainer.may_overflow)):
            self._stop(loss, norm, values)
        rate = trainer.update()
        self.terms = values
        return {
            "step": trainer.step,
            "loss": loss,
            **{f"loss_{name}": value for name, value in values.items()},
            "lr": rate,
            "gradient_norm": norm if math.isfinite(norm) else None,
            **{f"scale_{name}": value for name, value in trainer.scales().items()},
        }

    def _split(self, batch: TrainingBatch) -> list[BatchPart]:
        """Cut this process's share of a batch into the parts its towers take at once."""
        pixels, colors, tokens = (tensor.chunk(self.parts) for tensor in (batch.pixels, batch.colors, batch.tokens))
        return [
            BatchPart(
                pixels[part],
                colors[part],
                tokens[part],
                derive_seed("step", self.seed, self.trainer.step, self.machine.rank, part),
            )
            for part in range(self.parts)
        ]

    def _encode_part(self, part: BatchPart) -> tuple[Tensor, Tensor]:
        device = self.student.device
        pixels = part.pixels.to(device, non_blocking=True)
        if self.changes_colors:
            pixels = apply_colors(pixels, part.colors.to(device, non_blocking=True))
        pixels = normalize_pixels(pixels, self.student.info.preprocess)
        with self.precision.autocast(device), fast_attention(device, self.precision.dtype):
            return self.encode(pixels, part.tokens)

    def _count_bad(self, batch: TrainingBatch) -> None:
        self.bad.update({key: reason for reason, key in batch.bad})

    def _require_images(self) -> None:
        """Refuse a first batch without one readable image, before a line is logged.

        Raises:
            ClipcidError: on every process.
        """
        skips = self.bad_images()
        if skips.total >= self.order.batch_size:
            raise ClipcidError(
                f"None of the {self.order.batch_size:,} images of the first batch can be read:\n{skips.describe()}",
                "Mend the data.",
            )

    def bad_images(self) -> Skips:
        """Return the unreadable images met so far, of all processes; call it on every process."""
        skips = Skips()
        for bad in self.machine.gather(self.bad):
            for key, reason in bad.items():
                skips.add(reason, key)
        return skips

    def _stop(self, loss: float, norm: float, terms: dict[str, float]) -> None:
        """Save the keys of the batch that broke the run, and raise.

        All processes hold the same loss and gradient, so all of them arrive here.
        """
        step = self.trainer.step
        keys = [item.sample.key for item in self.order.items(step, 0, 1)]
        path = self.run.path / f"diverged_step_{step:08d}.json"
        values = {name: value if math.isfinite(value) else str(value) for name, value in terms.items()}
        where = f" The batch's keys are in {path}." if self.writes else ""
        if self.machine.is_main and self.writes:
            write_json(
                path, {"step": step, "losses": values, "loss": str(loss), "gradient_norm": str(norm), "keys": keys}
            )
        raise ClipcidError(
            f"Training diverged at step {step:,}: loss {loss:g}, gradient norm {norm:g}.{where}",
            "Lower --lr, lengthen --warmup, or train in --precision fp32; the last checkpoint is untouched.",
        )

    def _evaluate(self) -> None:
        if not self.evaluation.has_data:
            return
        decay = self.trainer.plan.decay_after(self.trainer.step)
        found = self.evaluation.measure(self.student, self.machine, decay)
        if self.machine.is_main:
            self.metrics = found
            append_lines(self.run.results_log, [{"step": self.trainer.step, **self.metrics}])
            self.tensorboard.write(self.trainer.step, {f"eval/{name}": value for name, value in self.metrics.items()})
        self.metrics = self.machine.broadcast(self.metrics)

    def _show(self, progress: Progress, line: dict[str, Any]) -> None:
        """Show the panel: losses, learning rate and scales, share of time spent waiting for data, memory."""
        progress.show(
            **self.terms,
            lr=line["lr"],
            **{f"σ {name}": value for name, value in self.trainer.scales().items()},
            waiting=f"{line['data_wait_share']:.0%}",
            memory=f"{memory_in_use(self.student.device) / 2**30:.1f} GiB",
        )

    def _recall(self) -> None:
        """Take the last values from the logs: the run was killed between its last checkpoint and its sidecar."""
        log, results = read_lines(self.run.train_log), read_lines(self.run.results_log)
        self.terms = {name.removeprefix("loss_"): value for name, value in log[-1].items() if name.startswith("loss_")}
        self.metrics = {name: value for name, value in (results or [{}])[-1].items() if name != "step"}

    def _log(self, lines: list[dict[str, Any]]) -> None:
        if self.machine.is_main:
            append_lines(self.run.train_log, lines)
            for line in lines:
                self.tensorboard.write(line["step"], {f"train/{name}": line[name] for name in line if name != "step"})
            self.tensorboard.flush()

    def _save(self) -> None:
        self.bad_images().check(len(self.order), self.max_bad_fraction, "the training data")
        found = self.machine.gather(self.bad)
        if self.machine.is_main:
            everyone = {name: reason for bad in found for name, reason in bad.items()}
            state = self.trainer.state() | {"bad": everyone}
            write_checkpoint(self.run.checkpoints, self.trainer.step, state)
        self.machine.barrier()
