"""The loop: batches in, optimiser steps, logs, evaluations and checkpoints out."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clipcid_cli.algorithms.retrieval import retrieval_metrics
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_json
from clipcid_cli.formats.checkpoint import write_checkpoint
from clipcid_cli.formats.run_folder import RunFolder, append_lines, read_lines
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.augmentation import apply_colors
from clipcid_cli.runtime.encoder import ClipModel, normalize_pixels
from clipcid_cli.runtime.gradients import GradientAverager
from clipcid_cli.runtime.loading import load_batches
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.runtime.seeds import derive_seed
from clipcid_cli.runtime.training import Trainer, fast_attention
from clipcid_cli.steps.objective import Objective
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.training_data import Batch, BatchMaker, BatchOrder, HeldOut

# The log has at most about this many lines, whatever the length of the run.
_LOG_LINES = 5_000
_EVALUATION_BATCH = 256
# Seconds after which logged lines reach the disk.
_FLUSH_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Pace:
    """When things happen.

    Attributes:
        steps: Steps of the run.
        eval_every: Steps between evaluations.
        checkpoint_every: Steps between checkpoints.
    """

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
        machine: The processes.
        student: The model in training.
        trainer: Its parameters and optimiser.
        objective: Its losses.
        order: The batches.
        maker: Makes a batch in a worker.
        held_out: What it is evaluated on; None for nothing.
        precision: Number format of the towers.
        changes_colors: Whether batches carry colour maps worth applying.
        pace: When things happen.
        run: Where logs and checkpoints go.
        seed: Seed of the run.
        workers: Processes that prepare batches.
        max_bad_fraction: Largest share of samples whose image may be unreadable.
        reporter: Who is told.
        bad: Unreadable images this process met: reason by key.
    """

    machine: Machine
    student: ClipModel
    trainer: Trainer
    objective: Objective
    order: BatchOrder
    maker: BatchMaker
    held_out: HeldOut | None
    precision: Precision
    changes_colors: bool
    pace: Pace
    run: RunFolder
    seed: int
    workers: int
    max_bad_fraction: float
    reporter: Reporter
    bad: dict[str, str]

    def __post_init__(self) -> None:
        self.averager = GradientAverager(self.trainer.parameters, self.machine.size)
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
        if self.trainer.step == self.pace.steps:
            self._recall()
            return
        started, first = time.monotonic(), self.trainer.step
        lines: list[dict[str, Any]] = []
        flushed = started
        left = self.pace.steps - first
        with self.reporter.progress("distill", left * self.order.batch_size, "samples") as progress:
            for batch, waited in self._batches():
                self.waited += waited
                self._count_bad(batch)
                if self.trainer.step == 0:
                    self._require_images()
                line = self._step(batch)
                progress.advance(self.order.batch_size)
                step = self.trainer.step
                now = time.monotonic()
                if step % self.pace.log_every == 0 or step == self.pace.steps:
                    seconds = now - started
                    line["samples_per_second"] = round((step - first) * self.order.batch_size / seconds, 1)
                    line["data_wait_share"] = round(self.waited / seconds, 3)
                    lines.append(line)
                    progress.show(**self.terms, lr=line["lr"], waiting=f"{self.waited / seconds:.0%}")
                if now - flushed > _FLUSH_SECONDS or self._is_due(step):
                    self._log(lines)
                    lines, flushed = [], now
                if step % self.pace.eval_every == 0 or step == self.pace.steps:
                    self._evaluate()
                if self._is_due(step):
                    self._save()

    def _is_due(self, step: int) -> bool:
        return step % self.pace.checkpoint_every == 0 or step == self.pace.steps

    def _batches(self) -> Iterator[tuple[Batch, float]]:
        """Yield each batch with the seconds it was waited for."""
        items = self.order.iterate(self.trainer.step, self.pace.steps, self.machine.rank, self.machine.size)
        batches = load_batches(items, self.maker, self.workers)
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            if batch is None:
                return
            yield batch, time.monotonic() - asked

    def _step(self, batch: Batch) -> dict[str, Any]:
        """Make one optimiser step and return its line of the log."""
        trainer, module, device = self.trainer, self.student.module, self.student.device
        # Dropout and the like draw from a seed of their own at each step: nothing to save, nothing to restore.
        torch.manual_seed(derive_seed("step", self.seed, trainer.step, self.machine.rank))
        module.train()
        pixels = self._pixels(batch)
        with self.precision.autocast(device), fast_attention(device, self.precision.dtype):
            image, text = encode(module, pixels, batch.tokens.to(device))
        scale: Tensor = module.logit_scale.exp()  # type: ignore[operator]  # a parameter of every CLIP
        total, terms = self.objective(image, text, scale, batch, trainer.step)
        total.backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
        self.averager.finish()
        norm = trainer.limit_gradient()
        loss = float(total.detach())
        if not (math.isfinite(norm) and math.isfinite(loss)):
            self._stop(loss, norm, {name: float(term.detach()) for name, term in terms.items()})
        rate = trainer.update()
        self.terms = {name: float(term.detach()) for name, term in terms.items()}
        return {
            "step": trainer.step,
            "loss": loss,
            **{f"loss_{name}": value for name, value in self.terms.items()},
            "lr": rate,
            "gradient_norm": norm,
            **{f"scale_{name}": value for name, value in trainer.scales().items()},
        }

    def _pixels(self, batch: Batch) -> Tensor:
        device = self.student.device
        pixels = batch.pixels.to(device, non_blocking=True)
        if self.changes_colors:
            pixels = apply_colors(pixels, batch.colors.to(device, non_blocking=True))
        return normalize_pixels(pixels, self.student.info.preprocess)

    def _count_bad(self, batch: Batch) -> None:
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
        if self.machine.is_main:
            write_json(
                path, {"step": step, "losses": values, "loss": str(loss), "gradient_norm": str(norm), "keys": keys}
            )
        raise ClipcidError(
            f"Training diverged at step {step:,}: loss {loss:g}, gradient norm {norm:g}. The batch's keys are in {path}.",
            "Lower --lr, lengthen --warmup, or train in --precision fp32; the last checkpoint is untouched.",
        )

    def _evaluate(self) -> None:
        if self.held_out is None:
            return
        if self.machine.is_main:
            self.metrics = evaluate(self.student, self.held_out)
            append_lines(self.run.results_log, [{"step": self.trainer.step, **self.metrics}])
        self.metrics = self.machine.broadcast(self.metrics)

    def _recall(self) -> None:
        """Take the last values from the logs: the run was killed between its last checkpoint and its sidecar."""
        log, results = read_lines(self.run.train_log), read_lines(self.run.results_log)
        self.terms = {name.removeprefix("loss_"): value for name, value in log[-1].items() if name.startswith("loss_")}
        self.metrics = {name: value for name, value in (results or [{}])[-1].items() if name != "step"}

    def _log(self, lines: list[dict[str, Any]]) -> None:
        if self.machine.is_main:
            append_lines(self.run.train_log, lines)

    def _save(self) -> None:
        self.bad_images().check(len(self.order), self.max_bad_fraction, "the training data")
        found = self.machine.gather(self.bad)
        if self.machine.is_main:
            everyone = {name: reason for bad in found for name, reason in bad.items()}
            state = self.trainer.state() | {"bad": everyone}
            write_checkpoint(self.run.checkpoints, self.trainer.step, state)
        self.machine.barrier()


def encode(module: Any, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Run both towers; features are not normalised, [b, d] each."""
    image: Tensor = module.encode_image(pixels)
    text: Tensor = module.encode_text(tokens)
    return image, text


def embed_held_out(student: ClipModel, held_out: HeldOut) -> tuple[Tensor, Tensor]:
    """Embed the held-out part in full precision; image and text rows, float32 [n, d], unit, on the CPU."""
    fp32 = Precision("fp32", torch.float32, "evaluation")
    student.module.eval()
    images, texts = [], []
    for start in range(0, len(held_out.pixels), _EVALUATION_BATCH):
        part = slice(start, start + _EVALUATION_BATCH)
        images.append(student.encode_images(held_out.pixels[part], fp32).cpu())
        texts.append(student.encode_texts(held_out.tokens[part], fp32).cpu())
    return torch.cat(images), torch.cat(texts)


def evaluate(student: ClipModel, held_out: HeldOut) -> dict[str, float]:
    """Measure retrieval on the held-out part."""
    images, texts = embed_held_out(student, held_out)
    return retrieval_metrics(images, texts, torch.arange(len(images)))
