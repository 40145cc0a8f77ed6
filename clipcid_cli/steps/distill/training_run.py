"""One training run, from opened inputs to the written student."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_text
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.reading import reading
from clipcid_cli.formats.results.checkpoint import (
    checkpoint_path,
    list_checkpoints,
    read_checkpoint,
    remove_old_checkpoints,
)
from clipcid_cli.formats.results.run_folder import RunFolder, TrainingLog
from clipcid_cli.formats.sidecar import DistillSidecar
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.memory import keep_freed_memory
from clipcid_cli.runtime.models.augment import Augmentation, Processor
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.grad_cache import BatchEncoder, compile_towers
from clipcid_cli.runtime.models.pruned_forward import PrunedForward
from clipcid_cli.runtime.precision import Precision, choose_precision
from clipcid_cli.runtime.training.trainer import Trainer
from clipcid_cli.steps.distill.batches import BatchMaker, BatchOrder
from clipcid_cli.steps.distill.evaluation import prepare_evaluation
from clipcid_cli.steps.distill.inputs import TrainingInputs
from clipcid_cli.steps.distill.loop import Loop
from clipcid_cli.steps.distill.objective import Teacher, make_objective
from clipcid_cli.steps.distill.online_teacher import open_online_teacher
from clipcid_cli.steps.distill.plan import Plan, Schedule
from clipcid_cli.steps.distill.report import write_report
from clipcid_cli.steps.distill.stored_teacher import open_stored_teacher
from clipcid_cli.steps.distill.student import (
    Student,
    reads_tokens,
    warn_of_batch_statistics,
    write_students,
)
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings

# Of more samples, the images that a worker could keep would hardly ever be seen again.
_MAX_KEPT_SAMPLES = 200_000


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """A training run.

    Attributes:
        settings: As the user gave them.
        online_teacher: The model that teaches alongside the student; None where stored embeddings teach, or nobody.
        tasks: The data sets of ``--eval-data``.
        output: The claim on the run's folder; None for a run that writes nothing.
    """

    settings: DistillSettings
    machine: Machine
    inputs: TrainingInputs
    student: Student
    online_teacher: ClipModel | None
    plan: Plan
    tasks: list[ZeroshotTask]
    folder: RunFolder
    output: Output[DistillSidecar] | None
    reporter: Reporter

    def train(self, seconds: dict[str, float]) -> DistillSidecar:
        """Train, and write all results.

        Args:
            seconds: Time by phase so far; ``train`` and ``write`` are added.

        Returns:
            The sidecar.
        """
        loop = self.make_loop(self._restore)
        started, first = time.perf_counter(), loop.trainer.step
        try:
            loop.train()
        finally:
            loop.log.close()
        seconds["train"] = time.perf_counter() - started
        samples = (self.plan.optimiser.steps - first) * self.plan.batch_size
        skips = Skips.of(loop.bad_images())
        skips.merge(self.inputs.usable.skips)
        if skips.total:
            self.reporter.warn(f"{skips.total:,} samples were not used as they are:\n{skips.describe()}")
        return self.machine.on_main(lambda: self._finish(loop, skips, samples / seconds["train"], seconds))

    def make_loop(self, restore: Callable[[Trainer], dict[str, str]]) -> Loop:
        """Assemble the run.

        Args:
            restore: Brings a trainer to where the run continues; returns the unreadable images met so far.
        """
        settings, machine, inputs, student = self.settings, self.machine, self.inputs, self.student.model
        keep_freed_memory()
        augmentation = Augmentation(settings.crop_scale, settings.color_jitter, settings.gray_probability)
        if inputs.teacher_inputs is not None:
            augmentation = inputs.teacher_inputs.augmentation(augmentation)
        teacher = self._open_teacher(augmentation.changes_colors)
        objective = make_objective(settings, student.info.embed_dim, teacher, machine, self.reporter)
        precision = choose_precision(settings.precision, machine.device, "train", student.info.parameters)
        self.reporter.note(f"Precision: {precision.name} ({precision.reason}).")
        plan = self.plan
        trainer = Trainer(student.module, objective.parameters, plan.optimiser, precision.dtype, ema=settings.ema)
        bad = restore(trainer)
        if settings.accum_freq * machine.size > 1:
            warn_of_batch_statistics(student, self.reporter)
        steps, writes = plan.optimiser.steps, self.output is not None
        return Loop(
            machine=machine,
            student=student,
            trainer=trainer,
            objective=objective,
            order=self._order_batches(),
            maker=self._make_batch_maker(augmentation),
            evaluation=prepare_evaluation(settings, inputs.dataset, inputs.held_out, student, self.tasks, machine),
            encoder=self._make_encoder(precision, augmentation.changes_colors),
            frozen=self.student.frozen,
            schedule=Schedule(steps, plan.eval_every, settings.checkpoint_every or max(1, min(1_000, steps // 10))),
            folder=self.folder,
            log=TrainingLog(
                self.folder,
                trainer.step,
                writes=writes and machine.is_main,
                tensorboard=settings.report_to == "tensorboard",
            ),
            writes=writes,
            seed=settings.seed,
            workers=plan.workers,
            max_bad_fraction=settings.max_bad_fraction,
            reporter=self.reporter,
            bad=bad if machine.is_main else {},
        )

    def _open_teacher(self, changes_colors: bool) -> Teacher | None:
        """Make the teacher ready: the model that runs alongside the student, or its stored embeddings."""
        settings, teacher_inputs, width = self.settings, self.inputs.teacher_inputs, self.student.model.info.embed_dim
        if teacher_inputs is None:
            return None
        if self.online_teacher is None:
            return open_stored_teacher(settings, teacher_inputs, width, self.machine, self.reporter)
        return open_online_teacher(
            settings, teacher_inputs, self.online_teacher, width, changes_colors, self.machine, self.reporter
        )

    def _order_batches(self) -> BatchOrder:
        inputs, plan, seed = self.inputs, self.plan, self.settings.seed
        views = None if inputs.teacher_inputs is None else inputs.teacher_inputs.stored_views(seed)
        return BatchOrder(inputs.dataset, inputs.training, seed, plan.batch_size, views, inputs.extra_texts)

    def _make_batch_maker(self, augmentation: Augmentation) -> BatchMaker:
        teacher_inputs = self.inputs.teacher_inputs
        return BatchMaker(
            Processor.of(self.student.model),
            augmentation,
            self.settings.seed,
            first_caption=teacher_inputs is not None and teacher_inputs.first_captions,
            caption_dropout=self.settings.caption_dropout,
            text_variants=self.inputs.text_variants,
            variant_share=self.settings.variant_share,
            extra_text=None if self.inputs.extra_texts is None else self.inputs.extra_texts.reader,
            masking=self.student.masking,
            teacher=None if self.online_teacher is None else Processor.of(self.online_teacher),
            fast_decode=self.settings.fast_decode,
            keeps=self.inputs.training.total <= _MAX_KEPT_SAMPLES,
        )

    def _make_encoder(self, precision: Precision, changes_colors: bool) -> BatchEncoder:
        model = self.student.model
        short = PrunedForward(model.module)
        encode = compile_towers(model.module) if self.settings.torchcompile else short
        return BatchEncoder(
            model, encode, precision, changes_colors, self.settings.accum_freq, short, reads_tokens(self.settings)
        )

    def _restore(self, trainer: Trainer) -> dict[str, str]:
        """Resume from the newest checkpoint of an unfinished run of the same settings and inputs, or clear the folder.

        Returns:
            The unreadable images met so far: reason by key.
        """
        assert self.output is not None
        unfinished = self.output.resumed and self.settings.resume != "never"
        steps = list_checkpoints(self.folder.checkpoints) if unfinished else []
        if not steps:
            if self.settings.resume == "latest":
                raise ClipcidError(
                    f"--resume latest, but {self.folder.path} has no checkpoint of an unfinished run with these settings.",
                    "Omit --resume to start one.",
                )
            self.machine.on_main(self.folder.clear)
            return {}
        state = read_checkpoint(self.folder.checkpoints, steps[-1])
        path = checkpoint_path(self.folder.checkpoints, steps[-1])
        with reading(path, "the state of this run", "Remove it to resume from the one before, or use --resume never."):
            trainer.load(state)
            bad: dict[str, str] = dict(state["bad"])
        self.machine.on_main(lambda: self.folder.rewind(trainer.step))
        self.machine.on_main(lambda: remove_old_checkpoints(self.folder.checkpoints))
        self.reporter.note(f"Resuming at step {trainer.step:,} of {trainer.plan.steps:,}.")
        return bad

    def _finish(self, loop: Loop, skips: Skips, samples_per_second: float, seconds: dict[str, float]) -> DistillSidecar:
        """Write student, report and, last, the sidecar."""
        started = time.perf_counter()
        student, inputs, steps = self.student.model, self.inputs, self.plan.optimiser.steps
        info = student.info
        written = write_students(self.folder, student, str(self.settings.student), loop.trainer)
        write_text(self.folder.report, write_report(self.folder, self.settings, student, inputs, loop))
        seconds["write"] = time.perf_counter() - started
        assert self.output is not None
        return self.output.commit(
            counts={
                "read": inputs.usable.read,
                "used": inputs.training.total,
                "held_out": inputs.held_out.total,
                "skipped": dict(sorted(skips.counts.items())),
            },
            seconds=seconds,
            outputs=[record(file, self.folder.path) for folder in written for file in sorted(folder.iterdir())],
            model={"spec": info.spec, "parameters": info.parameters, "embed_dim": info.embed_dim},
            data=inputs.dataset.describe(),
            keep_list=None if inputs.keep_list is None else inputs.keep_list.describe(),
            result={
                "steps": steps,
                "samples": steps * self.plan.batch_size,
                "samples_per_second": round(samples_per_second, 1),
                "losses": loop.losses,
                "metrics": loop.metrics,
            },
        )
