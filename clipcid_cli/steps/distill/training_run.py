"""One training run, from opened inputs to the written student."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from clipcid_cli.algorithms.losses.registry import LOSSES
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_text
from clipcid_cli.formats.models.open_clip_folder import write_model_folder
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.checkpoint import list_checkpoints, read_checkpoint
from clipcid_cli.formats.results.run_folder import RunFolder
from clipcid_cli.formats.results.tensorboard import TensorBoardLog
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.memory import keep_freed_memory
from clipcid_cli.runtime.models.augment import Augmentation
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.grad_cache import compile_towers
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.runtime.models.short_forward import ShortForward
from clipcid_cli.runtime.models.used_tokens import train_used_rows, whole_state
from clipcid_cli.runtime.precision import choose_precision
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.runtime.training import LossParameters, Trainer
from clipcid_cli.steps.distill.batches import BatchMaker, BatchOrder, Processor, read_held_out, used_tokens
from clipcid_cli.steps.distill.evaluation import Evaluation, plan_evaluation
from clipcid_cli.steps.distill.inputs import TrainingInputs
from clipcid_cli.steps.distill.loop import Loop, Schedule
from clipcid_cli.steps.distill.objective import Objective
from clipcid_cli.steps.distill.online_teacher import open_online_teacher
from clipcid_cli.steps.distill.plan import Plan
from clipcid_cli.steps.distill.report import write_report
from clipcid_cli.steps.distill.stored_teacher import open_stored_teacher
from clipcid_cli.steps.distill.student import Student
from clipcid_cli.steps.distill.teacher_space import Teacher
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

# Held-out samples beyond this many are left to eval-zeroshot: evaluation during training should take seconds.
HELD_OUT_LIMIT = 5_000


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """A training run.

    Attributes:
        settings: As the user gave them.
        student: The model to train.
        teacher: The model that teaches beside it; None where stored embeddings do, or nobody.
        output: The claim on that folder; None for a run that writes nothing.
    """

    settings: DistillSettings
    machine: Machine
    inputs: TrainingInputs
    student: Student
    teacher: ClipModel | None
    plan: Plan
    folder: RunFolder
    output: Output | None
    reporter: Reporter

    def train(self, seconds: dict[str, float]) -> dict[str, Any]:
        """Train, and write everything that comes of it.

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
            loop.tensorboard.close()
        seconds["train"] = time.perf_counter() - started
        samples = (self.plan.optimiser.steps - first) * self.plan.batch_size
        skips = loop.bad_images()
        skips.merge(self.inputs.usable.skips)
        if skips.total:
            self.reporter.warn(f"{skips.total:,} samples were not used as they are:\n{skips.describe()}")
        return self.machine.on_main(lambda: self._finish(loop, skips, samples / seconds["train"], seconds))

    def make_loop(self, restore: Callable[[Trainer], dict[str, str]]) -> Loop:
        """Put the run together.

        Args:
            restore: Brings a trainer to where the run goes on; returns the unreadable images met so far.
        """
        settings, machine, inputs, student = self.settings, self.machine, self.inputs, self.student.model
        keep_freed_memory()
        teacher_inputs = inputs.teacher_inputs
        augmentation = Augmentation(settings.crop_scale, settings.color_jitter, settings.gray_probability)
        if teacher_inputs is not None:
            augmentation = teacher_inputs.augmentation(augmentation)
        objective = self._make_objective(self._open_teacher(augmentation.changes_colors))
        if self.student.spare_unused_tokens:
            self._spare_unused_tokens()
        precision = choose_precision(settings.precision, machine.device, "train", student.info.parameters)
        self.reporter.note(f"Precision: {precision.name} ({precision.reason}).")
        scaled = precision.dtype == torch.float16
        trainer = Trainer(student.module, objective.parameters, self.plan.optimiser, scaled=scaled)
        bad = restore(trainer)
        self._warn_of_batch_statistics()
        steps = self.plan.optimiser.steps
        return Loop(
            machine=machine,
            student=student,
            trainer=trainer,
            objective=objective,
            order=BatchOrder(
                inputs.dataset,
                inputs.training,
                settings.seed,
                self.plan.batch_size,
                None if teacher_inputs is None else teacher_inputs.stored_views(settings.seed),
            ),
            maker=BatchMaker(
                Processor.of(student),
                augmentation,
                settings.seed,
                first_caption=teacher_inputs is not None and teacher_inputs.first_captions,
                caption_dropout=settings.caption_dropout,
                teacher=None if self.teacher is None else Processor.of(self.teacher),
            ),
            evaluation=self._make_evaluation(),
            precision=precision,
            changes_colors=augmentation.changes_colors,
            parts=settings.accum_freq,
            encode=compile_towers(student.module) if settings.torchcompile else ShortForward(student.module),
            frozen=self.student.frozen,
            schedule=Schedule(
                steps,
                self.plan.eval_every,
                settings.checkpoint_every or max(1, min(1_000, steps // 10)),
            ),
            run=self.folder,
            writes=self.output is not None,
            tensorboard=self._open_tensorboard(trainer.step),
            seed=settings.seed,
            workers=self.plan.workers,
            max_bad_fraction=settings.max_bad_fraction,
            reporter=self.reporter,
            bad=bad if machine.is_main else {},
        )

    def _open_teacher(self, changes_colors: bool) -> Teacher | None:
        """Make the teacher ready: the model that runs beside the student, or what its embeddings say."""
        settings, teacher_inputs, width = self.settings, self.inputs.teacher_inputs, self.student.model.info.embed_dim
        if teacher_inputs is None:
            return None
        if self.teacher is None:
            return open_stored_teacher(settings, teacher_inputs, width, self.machine, self.reporter)
        return open_online_teacher(
            settings, teacher_inputs, self.teacher, width, changes_colors, self.machine, self.reporter
        )

    def _make_objective(self, targets: Teacher | None) -> Objective:
        student_width = self.student.model.info.embed_dim
        width = student_width if targets is None else targets.width
        weights = {name: weight.at(width) for name, weight in self.settings.losses().items()}
        self.reporter.note("Loss: " + " + ".join(f"{value:g}·{name}" for name, value in weights.items()) + ".")
        parameters = LossParameters(
            [name for name in weights if LOSSES[name].own_scale],
            student_width,
            targets.width if targets is not None and targets.is_projected else None,
            derive_seed("loss parameters", self.settings.seed),
        )
        return Objective(
            weights, parameters.to(self.machine.device), targets, self.machine, local=self.settings.local_loss
        )

    def _make_evaluation(self) -> Evaluation:
        settings, inputs, student = self.settings, self.inputs, self.student.model
        held_out = read_held_out(
            inputs.dataset, inputs.held_out, student.pixel_transform(), student.tokenizer, HELD_OUT_LIMIT
        )
        reading = EvalZeroshotSettings(work=settings.work, data=settings.eval_data, bootstrap=0, workers=0)
        tasks = self.machine.on_main(lambda: plan_evaluation(reading, self.reporter)) if settings.eval_data else []
        return Evaluation(held_out, tasks, reading)

    def _open_tensorboard(self, step: int) -> TensorBoardLog:
        asked = self.settings.report_to == "tensorboard" and self.machine.is_main and self.output is not None
        return TensorBoardLog(self.folder.tensorboard if asked else None, step)

    def _warn_of_batch_statistics(self) -> None:
        split = self.settings.accum_freq * self.machine.size > 1
        if split and any(
            isinstance(part, nn.modules.batchnorm._BatchNorm) for part in self.student.model.module.modules()
        ):
            self.reporter.warn(
                "The student has batch normalisation, whose statistics are those of each part of a batch: "
                "--accum-freq and several processes change what it learns."
            )

    def _spare_unused_tokens(self) -> None:
        # A caption cut into parts that are joined anew may use tokens that no whole caption has.
        if self.settings.caption_dropout:
            return
        used = used_tokens(self.inputs.dataset, self.inputs.usable, self.student.model.tokenizer)
        if used is not None and train_used_rows(self.student.model.module, used):
            self.reporter.note(
                f"The captions use {len(used):,} tokens: only their embeddings are trained, the others decay as in AdamW."
            )

    def _restore(self, trainer: Trainer) -> dict[str, str]:
        """Go on from the newest checkpoint of an unfinished run of the same settings and inputs, or clear the folder.

        Returns:
            The unreadable images met so far: reason by key.

        Raises:
            ClipcidError: for ``--resume latest`` when there is nothing to go on from.
        """
        assert self.output is not None
        unfinished = self.output.resumed and self.settings.resume != "never"
        steps = list_checkpoints(self.folder.checkpoints) if unfinished else []
        if not steps:
            if self.settings.resume == "latest":
                raise ClipcidError(
                    f"--resume latest, but {self.folder.path} has no checkpoint of an unfinished run with these settings.",
                    "Leave --resume away to start one.",
                )
            self.machine.on_main(self.folder.clear)
            return {}
        state = read_checkpoint(self.folder.checkpoints, steps[-1])
        trainer.load(state)
        self.machine.on_main(lambda: self.folder.rewind(trainer.step))
        self.reporter.note(f"Going on from step {trainer.step:,} of {trainer.plan.steps:,}.")
        bad: dict[str, str] = state["bad"]
        return bad

    def _finish(self, loop: Loop, skips: Skips, samples_per_second: float, seconds: dict[str, float]) -> dict[str, Any]:
        """Write student, report and, last, the sidecar."""
        began = time.perf_counter()
        info, inputs, steps = self.student.model.info, self.inputs, self.plan.optimiser.steps
        source = parse_model(str(self.settings.student)).path
        write_model_folder(
            self.folder.student,
            info.config,
            info.preprocess,
            whole_state(self.student.model.module, self.plan.optimiser.decay_after(steps)),
            tokenizer_from=source if source is not None and source.is_dir() else None,
        )
        write_text(self.folder.report, write_report(self.folder, self.settings, self.student.model, inputs, loop))
        seconds["write"] = time.perf_counter() - began
        assert self.output is not None
        return self.output.commit(
            counts={
                "read": inputs.usable.read,
                "used": inputs.training.total,
                "held_out": inputs.held_out.total,
                "skipped": dict(sorted(skips.counts.items())),
            },
            seconds=seconds,
            model={"spec": info.spec, "parameters": info.parameters, "embed_dim": info.embed_dim},
            data=inputs.dataset.describe(),
            keep_list=None if inputs.keep_list is None else inputs.keep_list.describe(),
            result={
                "steps": steps,
                "samples": steps * self.plan.batch_size,
                "samples_per_second": round(samples_per_second, 1),
                "losses": loop.terms,
                "metrics": loop.metrics,
            },
        )
