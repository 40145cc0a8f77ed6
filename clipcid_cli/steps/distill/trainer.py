"""Training: batches in; optimiser steps, logs, evaluations and checkpoints out."""

from __future__ import annotations

import math
import time
from contextlib import closing
from typing import Any

from clipcid_cli.algorithms.near.block import exact_accumulation
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.samples import close_copies
from clipcid_cli.formats.files import reading, write_json
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.boards import open_board
from clipcid_cli.formats.results.run_folder import (
    TrainingLog,
    checkpoint_path,
    list_checkpoints,
    read_checkpoint,
    remove_old_checkpoints,
    write_checkpoint,
)
from clipcid_cli.formats.sidecar import DistillSidecar
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime import interruption
from clipcid_cli.runtime.distributed import DistContext, memory_in_use
from clipcid_cli.runtime.libraries import keep_freed_memory
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.views import Processor
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.distill.batches import Batches, BatchMaker, TrainingBatch
from clipcid_cli.steps.distill.evaluation import Evaluation
from clipcid_cli.steps.distill.objective import Objective
from clipcid_cli.steps.distill.plan import DistillPlan
from clipcid_cli.steps.distill.student import Student, batch_norms
from clipcid_cli.steps.distill.teacher import open_teacher
from clipcid_cli.training.train_state import StepValues, TrainState

# Every so many steps the processes tell each other whether a signal asks one of them to end. What they exchange stays on the
# hosts: GPUs do not wait, and where one process hangs the others notice it here.
_STEPS_BETWEEN_WORDS = 8


class Trainer:
    """A run in progress; `losses` are of the last step that was read, `metrics` of the last evaluation."""

    def __init__(
        self,
        plan: DistillPlan,
        student: Student,
        teacher_model: ClipModel | None,
        context: DistContext,
        output: Output[DistillSidecar] | None = None,
    ) -> None:
        """Assemble a run, from its last checkpoint on where it has one; without an `output` it writes nothing."""
        self.plan = plan
        self.student = student
        self.context = context
        self._output = output
        keep_freed_memory()
        settings = plan.settings
        inputs = plan.inputs
        model = student.model
        beside = None if teacher_model is None else Processor.from_model(teacher_model)
        maker = BatchMaker(settings, inputs, Processor.from_model(model), beside, student.masking)
        width = model.info.embed_dim
        teacher = open_teacher(settings, inputs, teacher_model, width, context)
        self.objective = Objective.of(settings, inputs.trust, width, teacher, context)
        reporting.note(f"Precision: {student.precision.name} ({student.precision.reason}).")
        self.state = TrainState(
            model.module, self.objective.parameters, plan.recipe, student.precision.dtype, ema=settings.ema
        )
        self.bad: dict[str, str] = {}
        if output is not None:
            self._resume(output)
        if settings.accum_freq * context.size > 1 and batch_norms(model.module):
            reporting.warn(
                "The student has batch normalisation, whose statistics are computed for each part of a batch: "
                "--accum-freq and several processes change what it learns."
            )
        clusters = None if teacher is None else teacher.clusters
        self.batches = Batches(inputs, maker, clusters, plan.batch_size, settings.seed, context)
        self.evaluation = Evaluation(inputs, model, plan.evaluations, context)
        board = None
        if output is not None and context.is_main:
            board = open_board(
                settings.report_to, plan.folder, self.state.step, output.spec.run.settings, quiet=settings.quiet
            )
        self.log = TrainingLog(plan.folder, board, writes=output is not None and context.is_main)
        self._saved_step = self.state.step
        self._values = StepValues(context.device)
        self.losses: dict[str, float] = {}
        self.metrics: dict[str, float] = {}

    def train(self) -> None:
        """Make the steps that are left: steps, and what is logged, measured and saved between them."""
        plan = self.plan
        first = self.state.step
        if first == 0:
            self._evaluate()
        if first == plan.steps:
            # The run was killed between its last checkpoint and its sidecar.
            self.losses, self.metrics = plan.folder.last_values()
            return
        close_copies()
        steps = range(first, plan.steps)
        waited = 0.0
        started = time.monotonic()
        with (
            closing(self.batches.load(steps, plan.workers)) as batches,
            reporting.progress("distill", len(steps) * plan.batch_size, "samples") as progress,
            self.context.limited_waits(),
            interruption.ends_when_saved(lambda: f"from step {self._saved_step:,}"),
        ):
            for step in range(first + 1, plan.steps + 1):
                before = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - before
                lr = self.step(batch)
                progress.advance(plan.batch_size)
                intervals = (plan.log_every, plan.eval_every, plan.checkpoint_every)
                logs, evaluates, saves = (step % every == 0 or step == plan.steps for every in intervals)
                ends = self._is_asked_to_end(step)
                saves = saves or ends
                if logs or evaluates or saves:
                    line = self.read(step - first, lr)
                if logs:
                    seconds = time.monotonic() - started
                    line["samples_per_second"] = round((step - first) * plan.batch_size / seconds, 1)
                    line["data_wait_share"] = round(waited / seconds, 3)
                    self.log.add(line)
                    progress.show(
                        **self.losses,
                        lr=lr,
                        **{f"σ {name}": line[f"scale_{name}"] for name in self.state.log_scales},
                        waiting=f"{waited / seconds:.0%}",
                        memory=f"{memory_in_use(self.context.device) / 2**30:.1f} GiB",
                    )
                if evaluates:
                    self._evaluate()
                if saves:
                    self._save()
                if ends:
                    interruption.end()
                    raise ClipcidError(
                        f"Another process of the run was interrupted, after step {step:,} was saved.",
                        "Run the same command again: it continues there.",
                    )

    def step(self, batch: TrainingBatch) -> float:
        """Make one optimiser step and return its learning rate; what it found stays on the device until it is read."""
        state = self.state
        student = self.student
        self._note_unreadable(batch)
        student.train()
        parts = range(self.plan.settings.accum_freq)
        seeds = [derive_seed("step", self.plan.settings.seed, state.step, self.context.rank, part) for part in parts]
        encoded = student.encode(batch, seeds)
        # Where the cluster loss is small it is the difference of two large terms: TF32 would leave nothing of its gradient.
        with exact_accumulation(self.context.device):
            total, losses = self.objective(encoded.features, state.log_scales["student"].exp(), state.bias, batch)
            state.backward(total)
        student.backward(encoded, before_last=state.averager.watch)
        state.averager.finish()
        norm = state.clip_grad_norm()
        # A scaled gradient may overflow: the update is then skipped and the scale lowered.
        checked, others = ([losses], [norm]) if state.may_overflow else ([losses, norm], [])
        lr = state.update()
        self._values.add(checked, [*others, *self._learned().values()])
        return lr

    def read(self, num_steps: int, lr: float) -> dict[str, Any]:
        """Return the last step's line of the log; refuse to go on where one of the `num_steps` since the start diverged."""
        num_finite, values = self._values.read()
        weights = self.objective.weights
        losses = dict(zip(weights, values, strict=False))
        norm = values[len(weights)]
        learned = dict(zip(self._learned(), values[len(weights) + 1 :], strict=True))
        loss = sum(weights[name] * value for name, value in losses.items())
        if num_finite < num_steps:
            self._stop_diverged(self.state.step - num_steps + num_finite, loss, norm, losses)
        self.losses = losses
        return {
            "step": self.state.step,
            "loss": loss,
            **{f"loss_{name}": value for name, value in losses.items()},
            "lr": lr,
            "gradient_norm": norm if math.isfinite(norm) else None,
            **{name: math.exp(value) if name.startswith("scale_") else value for name, value in learned.items()},
        }

    def unreadable_images(self) -> dict[str, str]:
        """Return the unreadable images that any process met so far, reason by key; call it on every process."""
        return {key: reason for bad in self.context.gather(self.bad) for key, reason in bad.items()}

    def _learned(self) -> dict[str, Any]:
        """Return what is logged of logit scales, as logarithms, and of the student's logit bias, by name."""
        scales = {f"scale_{name}": log_scale for name, log_scale in self.state.log_scales.items()}
        return scales | ({} if self.state.bias is None else {"bias_student": self.state.bias})

    def _note_unreadable(self, batch: TrainingBatch) -> None:
        """Refuse a first batch without one readable image, before a line is logged."""
        self.bad.update({key: reason for reason, key in batch.bad})
        if self.state.step:
            return
        skips = Skips.of(self.unreadable_images())
        if skips.total >= self.plan.batch_size:
            raise ClipcidError(
                f"None of the {self.plan.batch_size:,} images of the first batch can be read:\n{skips.describe()}",
                "Fix the data.",
            )

    def _stop_diverged(self, step: int, loss: float, norm: float, losses: dict[str, float]) -> None:
        """Save the keys of the batch whose loss or gradient is not finite, the same on all processes, and raise."""
        path = self.plan.folder.diverged(step)
        where = ""
        if self._output is not None:
            where = f" The batch's keys are in {path}."
            if self.context.is_main:
                values = {name: value if math.isfinite(value) else str(value) for name, value in losses.items()}
                found = {"step": step, "losses": values, "loss": str(loss), "gradient_norm": str(norm)}
                write_json(path, found | {"keys": self.batches.keys(step)})
        bad = [f"{name} {value:g}" for name, value in losses.items() if not math.isfinite(value)]
        of = f" ({', '.join(bad)}; the others are finite)" if 0 < len(bad) < len(losses) else ""
        remedies = "Lower --lr, lengthen --warmup, or train in --precision fp32. Each starts"
        if self.student.precision.name == "fp32":
            remedies = "Lower --lr or lengthen --warmup. Either starts"
        raise ClipcidError(
            f"Training diverged at step {step:,}: loss {loss:g}{of}, gradient norm {norm:g}.{where}",
            f"{remedies} a new run; under another --name this run's checkpoints stay.",
        )

    def _is_asked_to_end(self, step: int) -> bool:
        """Tell whether a signal asks any process to end, the same on all."""
        if self.context.size > 1 and step % _STEPS_BETWEEN_WORDS:
            return False
        return any(self.context.gather(interruption.is_asked()))

    def _evaluate(self) -> None:
        if not self.evaluation.has_data:
            return
        metrics = self.evaluation.measure(self.state)
        if self.context.is_main:
            self.log.add_evaluation(self.state.step, metrics)
        self.metrics = self.context.broadcast(metrics)

    def _save(self) -> None:
        self.log.flush()
        bad = self.unreadable_images()
        Skips.of(bad).check(len(self.batches), self.plan.settings.max_bad_fraction, "the training data")
        if self.context.is_main:
            state = self.state.state_dict() | {"bad": bad}
            write_checkpoint(self.plan.folder.checkpoints, self.state.step, state)
        self.context.barrier()
        self._saved_step = self.state.step

    def _resume(self, output: Output[DistillSidecar]) -> None:
        """Go on from the newest checkpoint of an unfinished run of the same settings and inputs, or clear the folder."""
        folder = self.plan.folder
        unfinished = output.resumed and self.plan.settings.resume != "never"
        steps = list_checkpoints(folder.checkpoints) if unfinished else []
        if not steps:
            if self.plan.settings.resume == "latest":
                raise ClipcidError(
                    f"--resume latest, but {folder.path} has no checkpoint of an unfinished run with these settings.",
                    "Omit --resume to start one.",
                )
            self.context.on_rank0(folder.clear)
            return
        path = checkpoint_path(folder.checkpoints, steps[-1])
        state = read_checkpoint(folder.checkpoints, steps[-1])
        with reading(path, "the state of this run", "Remove it to resume from the one before, or use --resume never."):
            self.state.load_state_dict(state)
            bad: dict[str, str] = dict(state["bad"])
        if self.context.is_main:
            self.bad = bad

        def rewind() -> None:
            folder.rewind(self.state.step)
            remove_old_checkpoints(folder.checkpoints)

        self.context.on_rank0(rewind)
        reporting.note(f"Resuming at step {self.state.step:,} of {self.plan.steps:,}.")
