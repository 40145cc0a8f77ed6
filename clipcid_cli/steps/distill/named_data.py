"""Data sets of ``--eval-data``, measured as `eval-zeroshot` does: while a student trains, and in the end."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from clipcid_cli.errors import ClipcidError, command_line, flag_words
from clipcid_cli.formats.results.metrics import RETRIEVAL
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.steps.evaluate.measure import measure
from clipcid_cli.steps.evaluate.model import EvaluatedModel
from clipcid_cli.steps.evaluate.result import Preview, ZeroshotResults
from clipcid_cli.steps.evaluate.task_plan import plan_tasks
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask
from clipcid_cli.steps.evaluate.zeroshot import ZeroshotPlan, evaluate
from clipcid_cli.steps.reporting import Reporter, reporting_to
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

_AVERAGE = "ema"  # what metrics of averaged weights are called by in the log


@dataclasses.dataclass(frozen=True)
class NamedData:
    """The data sets that the user named, and how they are measured."""

    tasks: list[ZeroshotTask]
    settings: EvalZeroshotSettings

    def measure(self, student: ClipModel, context: DistContext) -> dict[str, float]:
        """Measure a student; metrics are called ``NAME/METRIC``, those without a value (acc5 of four classes) are left out.

        Call it on every process; the metrics are whole on the first.
        """
        model = EvaluatedModel(ModelName(student.info.spec, "tag"), context, self.settings, student)

        def measure_task(task: ZeroshotTask) -> dict[str, float]:
            rows = model.encode(task)
            return context.on_rank0(lambda: measure(rows, context.device).draws.values())

        metrics: dict[str, float] = {}
        for task in self.tasks:
            with reporting_to(Reporter()):  # the bar of the training goes on
                values = measure_task(task)
            metrics |= {f"{task.name}/{name}": value for name, value in values.items() if math.isfinite(value)}
        return metrics

    def validate_unmeasured(self, students: list[Path]) -> None:
        """Refuse, before training, metrics of earlier students in the same folders."""
        self._plan(students).validate_unmeasured()

    def preview(self, students: list[Path]) -> list[Preview]:
        """Say what would be measured in the end."""
        return self._plan(students).preview()

    def evaluate(self, students: list[Path], context: DistContext) -> ZeroshotResults:
        """Measure the students in their folders, and write what `eval-zeroshot` writes; on every process."""
        return evaluate(self._plan(students), context)

    def _plan(self, students: list[Path]) -> ZeroshotPlan:
        names = [ModelName(str(path), "folder", path=path) for path in students]
        return ZeroshotPlan(names, self.tasks, self.settings)


def open_named_data(settings: DistillSettings) -> NamedData:
    """Open the data sets of ``--eval-data``, each once."""
    chosen = _zeroshot_settings(settings)
    tasks: dict[str, ZeroshotTask] = {}
    for data in chosen.data:
        task = _plan_task(dataclasses.replace(chosen, data=(data,)), settings.list_flags(data))
        if task.name == _AVERAGE:
            raise ClipcidError(
                f"--eval-data: {task.dataset.spec} is called {task.name}, the name of the weight average in the log.",
                "Rename the folder, or link it by another name.",
            )
        place = Path(task.dataset.spec).resolve()
        other = Path(tasks.setdefault(task.name, task).dataset.spec).resolve()
        if other != place:
            raise ClipcidError(
                f"--eval-data: {other} and {place} are both called {task.name}, and so would be their metrics.",
                "Rename one of the folders, or link it by another name.",
            )
    return NamedData(list(tasks.values()), chosen)


def _zeroshot_settings(settings: DistillSettings) -> EvalZeroshotSettings:
    """Return the settings of `eval-zeroshot` on ``--eval-data``: defaults, but for where captions are.

    Columns and keys are the training data's alone.
    """
    return EvalZeroshotSettings(
        work=settings.work,
        data=settings.eval_data,
        caption_key=settings.student_caption_key or settings.caption_key,
        caption_lines=settings.caption_lines,
        workers=settings.workers,
        overwrite=settings.overwrite,
        max_bad_fraction=settings.max_bad_fraction,
    )


def _plan_task(settings: EvalZeroshotSettings, list_flags: dict[str, Any]) -> ZeroshotTask:
    """Open one data set; data with classes need not have the captions that ``--caption-key`` names.

    Args:
        list_flags: The flags by which a list of training data is read, for the error.
    """
    try:
        try:
            [task] = plan_tasks(settings)
        except ClipcidError:
            if not settings.caption_key:
                raise
            [task] = plan_tasks(dataclasses.replace(settings, caption_key=()))
            if task.kind == RETRIEVAL:
                raise
    except ClipcidError as error:
        fix = error.fix
        if "--" in fix or settings.caption_key:  # flags that distill lacks, or that it reads its training data by
            [data] = settings.data
            measure = command_line("eval-zeroshot", "MODEL", data, **list_flags)
            given = [flag for flag, value in list_flags.items() if value is not None]
            if any(flag_words(**{flag: True}) in fix for flag in given):  # what was given is not advised once more
                fix = f"Only the training data is read by {flag_words(**list_flags)}."
            fix += (
                "\nOf the flags of eval-zeroshot only --caption-key and --caption-lines reach --eval-data. Where "
                f"others are needed, omit this data set here, and measure it after the training: {measure}"
            )
        raise ClipcidError(f"--eval-data: {error.message}", fix) from error
    return task
