"""Training: what a student is trained for; batches in, and optimiser steps, logs, evaluations and checkpoints out."""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipcid_cli.algorithms.losses.batch import LossBatch, rows_between
from clipcid_cli.algorithms.losses.registry import load_loss
from clipcid_cli.algorithms.losses.shared_space import LossParameters, SharedSpace
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
from clipcid_cli.runtime.models.augment import Processor
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.distill.batches import Batches, BatchMaker, TrainingBatch
from clipcid_cli.steps.distill.evaluation import Evaluation
from clipcid_cli.steps.distill.student import Student, batch_norms
from clipcid_cli.steps.distill.teacher import Teacher, open_teacher
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.training.gradients import Features, gather_rows
from clipcid_cli.training.train_state import StepValues, TrainState

if TYPE_CHECKING:
    from clipcid_cli.steps.distill.run import Plan

# Every so many steps the processes tell each other whether a signal asks one of them to end. What they exchange stays on the
# hosts: GPUs do not wait, and where one process hangs the others notice it here.
_STEPS_BETWEEN_WORDS = 8


class Trainer:
    """A run in progress; `losses` are of the last step that was read, `metrics` of the last evaluation."""

    def __init__(
        self,
        plan: Plan,
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
        beside = None if teacher_model is None else Processor.of(teacher_model)
        maker = BatchMaker(settings, inputs, Processor.of(model), beside, student.masking)
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
                "The student has batch normalisation, whose statistics are those of each part of a batch: "
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
        raise ClipcidError(
            f"Training diverged at step {step:,}: loss {loss:g}, gradient norm {norm:g}.{where}",
            "Lower --lr, lengthen --warmup, or train in --precision fp32. Each starts a new run; under another --name "
            "this run's checkpoints stay.",
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


@dataclasses.dataclass(frozen=True)
class Objective:
    """The losses of a run, with their weights."""

    weights: dict[str, float]
    parameters: LossParameters
    teacher: Teacher | None
    context: DistContext
    affinity_scale: float
    local_loss: bool  # whether each process computes the losses of its own rows only, against everybody's

    @classmethod
    def of(
        cls,
        settings: DistillSettings,
        trust: float,
        student_width: int,
        teacher: Teacher | None,
        context: DistContext,
    ) -> Objective:
        """Make the losses that the settings ask for, at such trust in the teacher."""
        space = SharedSpace(student_width) if teacher is None else teacher.space
        chosen = settings.losses(trust)
        weights = {name: weight.at(space.width) for name, weight in chosen.items()}
        why = "" if chosen == settings.losses() else f" (trust in the teacher {trust:.2f}, by its repair)"
        reporting.note("Loss: " + " + ".join(f"{value:g}·{name}" for name, value in weights.items()) + f"{why}.")
        seed = derive_seed("loss parameters", settings.seed)
        parameters = LossParameters(weights, student_width, space, seed).to(context.device)
        local_loss = settings.local_loss and context.size > 1
        return cls(weights, parameters, teacher, context, settings.affinity_scale, local_loss)

    def __call__(
        self, features: Features, student_scale: Tensor, student_bias: Tensor | None, batch: TrainingBatch
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss of a step from each process's features; call it on every process.

        Returns:
            What the gradients are of: the weighted sum of the losses of the global batch, or (with local losses) of this
            process's rows, times the number of processes. And the losses of the global batch in order, without weights
            and gradients, float32 [L].
        """
        whole = dataclasses.replace(
            self._gather(features, student_scale, batch), student_bias=student_bias, affinity_scale=self.affinity_scale
        )
        terms = [load_loss(name)(whole, **self.parameters.of(name)) for name in self.weights]
        total = torch.stack([weight * term for weight, term in zip(self.weights.values(), terms, strict=True)]).sum()
        values = torch.stack([term.detach() for term in terms])
        if not self.local_loss:
            return total, values
        return total * self.context.size, self.context.sum_(values)

    def _gather(self, features: Features, student_scale: Tensor, batch: TrainingBatch) -> LossBatch:
        """Collect everybody's features, and the teacher's, as unit rows of the shared space."""
        size = self.context.size
        count = len(features.image)
        start = self.context.rank * count if self.local_loss else 0
        own = self._project(features)
        num_extra = len(features.text) - count  # texts without images come last
        extra = own.get("text_BD", own["text_Bd"])[count:] if num_extra else None
        # All in one exchange.
        together = gather_rows(torch.cat([rows_between(rows, 0, count) for rows in own.values()], dim=1))
        widths = [rows.shape[1] for rows in own.values()]
        rows: dict[str, Any] = dict(zip(own, torch.split(together, widths, dim=1), strict=True))
        taught = LossBatch(
            **{"image_BD": rows["image_Bd"], "text_BD": rows["text_Bd"]} | rows,
            student_scale=student_scale,
            image_tokens_bLD=self._project_tokens(features.image_tokens, self.parameters.image_map, count),
            text_tokens_bLD=self._project_tokens(features.text_tokens, self.parameters.text_map, count),
            extra_text_ED=self._gather_compared(extra),
            num_extra=size * num_extra,
            own=slice(start, start + count) if self.local_loss else slice(0, size * count),
        )
        if self.teacher is None:
            return taught
        with torch.no_grad():
            image, text, extra = self.teacher.rows(batch)
            return dataclasses.replace(
                taught,
                teacher_image_BD=gather_rows(image),
                teacher_text_BD=None if text is None else gather_rows(text),
                teacher_extra_text_ED=self._gather_compared(extra),
                teacher_scale=self.teacher.scale,
                teacher_bias=self.teacher.bias,
                image_clusters=batch.image_clusters,
                text_clusters=batch.text_clusters,
            )

    def _project(self, features: Features) -> dict[str, Tensor]:
        """Return the unit rows that losses compare, by their names in `LossBatch`."""
        # float32 from here on, whatever the towers ran in: the losses subtract numbers that are nearly equal.
        rows = {"image_Bd": features.image.float(), "text_Bd": features.text.float()}
        image_map = self.parameters.image_map
        text_map = self.parameters.text_map
        if image_map is not None and text_map is not None:
            rows |= {"image_BD": image_map(rows["image_Bd"]), "text_BD": text_map(rows["text_Bd"])}
        if features.masked_image is not None:
            masked = features.masked_image.float()
            rows["masked_image_BD"] = masked if image_map is None else image_map(masked)
        return {name: F.normalize(found, dim=1) for name, found in rows.items()}

    def _project_tokens(self, tokens_bLd: Tensor | None, learned: nn.Module | None, count: int) -> Tensor | None:
        """Return unit rows of patches or tokens in the shared space, zeros where there is none; none of further texts."""
        if tokens_bLd is None:
            return None
        found = tokens_bLd[:count].float()
        exists_bL1 = found.detach().any(dim=2, keepdim=True)
        found = F.normalize(found if learned is None else learned(found), dim=2) * exists_bL1
        gathered = self._gather_compared(found.flatten(1))
        return None if gathered is None else gathered.view(-1, *found.shape[1:])

    def _gather_compared(self, rows: Tensor | None) -> Tensor | None:
        """Collect everybody's rows of what a loss reads of the own samples alone, unless it is of these alone."""
        return rows if rows is None or self.local_loss else gather_rows(rows)
