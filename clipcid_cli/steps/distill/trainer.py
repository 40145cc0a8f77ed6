"""Training: batches in; optimiser steps, logs, evaluations and checkpoints out."""

from __future__ import annotations

import math
import time
from contextlib import closing

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import write_json
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.run_folder import DistillSidecar, TrainingLog
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime import interruption
from clipcid_cli.runtime.distributed import DistContext, memory_in_use
from clipcid_cli.runtime.libraries import keep_freed_memory
from clipcid_cli.runtime.models.renderer import Processor
from clipcid_cli.steps import reporting
from clipcid_cli.steps.distill.batches import Batches, BatchMaker
from clipcid_cli.steps.distill.checkpoints import Checkpoints
from clipcid_cli.steps.distill.evaluation import Evaluation
from clipcid_cli.steps.distill.objective import Objective
from clipcid_cli.steps.distill.pace import Pace, full_speed
from clipcid_cli.steps.distill.plan import DistillPlan
from clipcid_cli.steps.distill.samples import index_of
from clipcid_cli.steps.distill.space import choose_space
from clipcid_cli.steps.distill.step import SentRecord, StepRecord, TrainStep
from clipcid_cli.steps.distill.student import Student, batch_norms
from clipcid_cli.steps.distill.training_batch import TrainingBatch
from clipcid_cli.training.train_state import TrainState

# Every so many steps the processes tell each other whether a signal asks one of them to end, and whether to save. What they
# exchange stays on the hosts: GPUs do not wait, and where one process hangs the others notice it here.
_STEPS_BETWEEN_WORDS = 8

# After this time there is a checkpoint, however many steps were made: a kill costs no more.
_SECONDS_BETWEEN_CHECKPOINTS = 480.0


class Trainer:
    """A run in progress; `losses` are of the last step that was read, `metrics` of the last evaluation."""

    def __init__(
        self,
        plan: DistillPlan,
        student: Student,
        context: DistContext,
        output: Output[DistillSidecar] | None = None,
        first: int = 0,
    ) -> None:
        """Assemble a run; without an `output` it writes nothing.

        Args:
            first: The step of the checkpoint from which it goes on; 0 for its beginning.
        """
        self.plan = plan
        self.student = student
        self.context = context
        self._output = output
        keep_freed_memory()
        settings = plan.settings
        inputs = plan.inputs
        model = student.model
        teacher = inputs.teacher
        width = model.info.embed_dim
        space = choose_space(inputs, width, context)
        clusters = None
        if inputs.clusters is not None:
            table_rows = inputs.training.column("clusters")
            clusters = inputs.clusters.open(settings, teacher, space.axes, table_rows, context.device)
        teacher.announce(inputs.losses)
        self.objective = Objective.from_inputs(inputs, width, space, context)
        reporting.note(f"Precision: {student.precision.name} ({student.precision.reason}).")
        self.state = TrainState(
            model.module, self.objective.parameters, plan.recipe, student.precision.dtype, ema=settings.ema
        )
        self.bad: dict[str, str] = {}
        self.checkpoints = Checkpoints(plan.folder, context)
        if first:
            self.bad = self.checkpoints.resume(self.state, first)
            reporting.note(f"Resuming at step {first:,} of {plan.steps:,}.")
        if settings.accum_freq * context.size > 1 and batch_norms(model.module):
            reporting.warn(
                "The student has batch normalisation, whose statistics are computed for each part of a batch: "
                "--accum-freq and several processes change what it learns."
            )
        maker = BatchMaker(settings, inputs, Processor.from_model(model), student.masking)
        self.batches = Batches(inputs, maker, clusters, plan.batch_size, settings.seed, context)
        self.evaluation = Evaluation(inputs, model, plan.named, context)
        board = None
        if settings.report_to != "none" and output is not None and context.is_main:
            from clipcid_cli.formats.results.boards import open_board

            board = open_board(
                settings.report_to, plan.folder, self.state.step, output.spec.provenance.settings, quiet=settings.quiet
            )
        self.log = TrainingLog(plan.folder, board, writes=output is not None and context.is_main)
        self.train_step = TrainStep(settings, student, self.objective, self.state, context)
        self.losses: dict[str, float] = {}
        self.metrics: dict[str, float] = {}
        self._saved_at = math.inf

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
        if index_of(plan.inputs.dataset).cache is not None:
            from clipcid_cli.formats.data.distant import close_copies

            close_copies()
        self._saved_at = time.monotonic()
        steps = range(first, plan.steps)
        with (
            closing(self.batches.load(steps, plan.workers)) as batches,
            reporting.progress("distill", len(steps) * plan.batch_size, "samples") as progress,
            self.context.limited_waits(),
            interruption.ends_when_saved(lambda: f"from step {self.checkpoints.saved_step:,}"),
            closing(self.checkpoints),
        ):
            speed = full_speed(plan, self.student, self.context)
            pace = Pace(first, plan.batch_size, lambda: self.batches.copy_seconds, speed)
            sent: SentRecord | None = None
            for step in range(first + 1, plan.steps + 1):
                with pace.phase("data_wait"):
                    batch = next(batches)
                self.make_step(batch)
                progress.advance(plan.batch_size)
                if sent is not None:  # of the step before: the GPU has this one to make while that is read
                    self._log(self._read(sent, pace), pace, progress)
                    sent = None
                intervals = (plan.log_every, plan.eval_every, plan.checkpoint_every)
                logs, evaluates, saves = (step % every == 0 or step == plan.steps for every in intervals)
                ends, is_due = self._agree_to_end_or_save(step)
                saves = saves or ends or is_due
                if logs or evaluates or saves:
                    sent = self.train_step.send()
                if sent is not None and (evaluates or saves or self.context.device.type == "cpu"):
                    record = self._read(sent, pace)
                    sent = None
                    if logs:
                        self._log(record, pace, progress)
                if evaluates:
                    with pace.phase("evaluation"):
                        self._evaluate()
                if saves:
                    with pace.phase("checkpoint"):
                        self._save()
                if ends or step == plan.steps:
                    self.checkpoints.finish()
                if ends:
                    interruption.end()
                    raise ClipcidError(
                        f"Another process of the run was interrupted, after step {step:,} was saved.",
                        "Run the same command again: it continues there.",
                    )

    def make_step(self, batch: TrainingBatch) -> None:
        """Make one step; what it measured is read later."""
        self._note_unreadable(batch)
        self.train_step(batch)

    def read(self, sent: SentRecord) -> StepRecord:
        """Wait for a step's record; refuse to go on where a step since the start diverged."""
        record = sent.read()
        if record.diverged_at is not None:
            self._stop_diverged(record, record.diverged_at)
        self.losses = record.losses
        return record

    def _read(self, sent: SentRecord, pace: Pace) -> StepRecord:
        record = self.read(sent)
        pace.add(record.seconds)
        return record

    def _log(self, record: StepRecord, pace: Pace, progress: reporting.Progress) -> None:
        measured = pace.measure(record.step)
        self.log.add(record.line() | measured.line())
        progress.show(
            **record.losses,
            lr=record.lr,
            **{f"σ {name}": scale for name, scale in record.scales.items()},
            waiting=f"{measured.waiting:.0%}",
            **({} if measured.mfu is None else {"MFU": f"{measured.mfu:.0%}"}),
            memory=f"{memory_in_use(self.context.device) / 2**30:.1f} GiB",
        )

    def unreadable_images(self) -> dict[str, str]:
        """Return the unreadable images that any process met so far, reason by key; call it on every process."""
        return {key: reason for bad in self.context.gather(self.bad) for key, reason in bad.items()}

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

    def _stop_diverged(self, record: StepRecord, step: int) -> None:
        """Save the keys of the batch whose loss or gradient is not finite, the same on all processes, and raise."""
        losses = record.losses
        path = self.plan.folder.diverged(step)
        where = ""
        if self._output is not None:
            where = f" The batch's keys are in {path}."
            if self.context.is_main:
                content = {
                    "step": step,
                    "losses": {name: value if math.isfinite(value) else str(value) for name, value in losses.items()},
                    "loss": str(record.loss),
                    "gradient_norm": str(record.gradient_norm),
                    "keys": self.batches.keys(step - 1),
                }
                write_json(path, content)
        bad = [f"{name} {value:g}" for name, value in losses.items() if not math.isfinite(value)]
        of = f" ({', '.join(bad)}; the others are finite)" if 0 < len(bad) < len(losses) else ""
        remedies = "Lower --lr, lengthen --warmup, or train in --precision fp32. Each starts"
        if self.student.precision.name == "fp32":
            remedies = "Lower --lr or lengthen --warmup. Either starts"
        raise ClipcidError(
            f"Training diverged at step {step:,}: loss {record.loss:g}{of}, gradient norm {record.gradient_norm:g}.{where}",
            f"{remedies} a new run; under another --name this run's checkpoints stay.",
        )

    def _agree_to_end_or_save(self, step: int) -> tuple[bool, bool]:
        """Tell whether a signal asks any process to end, and whether the last checkpoint is old; the same on all."""
        if self.context.size > 1 and step % _STEPS_BETWEEN_WORDS:
            return False, False
        is_old = time.monotonic() > self._saved_at + _SECONDS_BETWEEN_CHECKPOINTS
        words = self.context.gather((interruption.is_asked(), is_old))
        return any(is_asked for is_asked, _ in words), words[0][1]

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
        self.checkpoints.save(self.state, bad)
        self._saved_at = time.monotonic()
