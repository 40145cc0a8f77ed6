"""What a student in training is measured on: retrieval on the held-out part, and data sets the user named."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from clipcid_cli.algorithms.metrics.chance import guess_captions
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.rows import Kind
from clipcid_cli.formats.results.metrics import RETRIEVAL
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.runtime.models.towers import Towers
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.steps.distill.inputs import Inputs
from clipcid_cli.steps.distill.student import batch_norms
from clipcid_cli.steps.encode import Decoded, Decoder, Encoded
from clipcid_cli.steps.evaluate.measure import measure
from clipcid_cli.steps.evaluate.model import EvaluatedModel, TaskRows
from clipcid_cli.steps.evaluate.task_plan import plan_tasks
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask
from clipcid_cli.steps.evaluate.zeroshot import ZeroshotPlan
from clipcid_cli.steps.reporting import Reporter, reporting_to
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings
from clipcid_cli.training.train_state import TrainState

# Held-out samples beyond this many are left to eval-zeroshot: evaluation during training should take seconds.
_MAX_HELD_OUT = 5_000
_BATCH = 256
# What the names of metrics of the averaged weights begin with.
EMA = "ema/"
_FP32 = Precision("fp32", "evaluation")


def zeroshot_settings(settings: DistillSettings) -> EvalZeroshotSettings:
    """Return the settings of `eval-zeroshot` on ``--eval-data``: defaults, but for where captions are.

    Columns and keys are the training data's alone.
    """
    return EvalZeroshotSettings(
        work=settings.work,
        data=settings.eval_data,
        caption_key=settings.caption_key,
        caption_lines=settings.caption_lines,
        workers=settings.workers,
        overwrite=settings.overwrite,
        max_bad_fraction=settings.max_bad_fraction,
    )


def plan_evaluation(settings: EvalZeroshotSettings) -> list[ZeroshotTask]:
    """Open the data sets of ``--eval-data``, each once: metrics are logged as ``NAME/METRIC``."""
    tasks: dict[str, ZeroshotTask] = {}
    for task in [_plan_task(dataclasses.replace(settings, data=(data,))) for data in settings.data]:
        if task.name == EMA.rstrip("/"):
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
    return list(tasks.values())


def _plan_task(settings: EvalZeroshotSettings) -> ZeroshotTask:
    """Open one data set; data with classes need not have the captions that ``--caption-key`` names."""
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
            fix += (
                " Of the flags that say how data is read only --caption-key and --caption-lines reach --eval-data: omit it "
                "here, and run clipcid eval-zeroshot with them after the training."
            )
        raise ClipcidError(f"--eval-data: {error.message}", fix) from error
    return task


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out samples that can be read, decoded for the model: up to 0.75 GB of pixels at 224 px."""

    student: ClipModel
    dataset: Dataset
    samples: list[Sample]
    rows: list[int]  # their rows among all samples held out
    decoded: Decoded

    @classmethod
    def read(cls, inputs: Inputs, student: ClipModel) -> HeldOut | None:
        """Read the first held-out samples; None when there are fewer than two, which retrieval cannot use."""
        first = np.arange(min(inputs.held_out.total, _MAX_HELD_OUT))
        samples = [ref.read() for ref in inputs.refs(inputs.held_out, first)]
        decode = Decoder.from_model(student, captions=True)
        decoded = decode(samples)
        rows = [row for row in range(len(samples)) if row not in decoded.failures]
        if len(rows) < 2:
            return None
        if len(rows) < len(samples):
            samples = [samples[row] for row in rows]
            decoded = decode(samples)
        return cls(student, inputs.dataset, samples, rows, decoded)

    def encode(self) -> Encoded:
        """Encode images and captions in full precision: unit rows, float32, on the CPU."""
        self.student.module.eval()
        towers = Towers.from_model(self.student, _FP32, _BATCH)
        assert self.decoded.pixels is not None
        assert self.decoded.tokens is not None
        images = torch.cat([towers.images(pixels).cpu() for pixels in torch.split(self.decoded.pixels, _BATCH)])
        return Encoded(self.samples, {Kind.IMAGES: images, Kind.TEXTS: towers.encode_texts(self.decoded.tokens)})

    @property
    def chance(self) -> dict[str, float]:
        """What a guess scores, by metric."""
        return guess_captions(np.array([len(sample.captions) for sample in self.samples]))

    def measure(self, encoded: Encoded, device: torch.device) -> dict[str, float]:
        """Measure what a model made of these samples, as `eval-zeroshot` does."""
        task = ZeroshotTask("held out", RETRIEVAL, self.dataset)
        with reporting_to(Reporter()):  # the bar of the training goes on
            return measure(TaskRows(task, encoded, None, Skips(), {}), device).draws.values()


class Evaluation:
    """The measurements of a run: of the held-out part, and of the data sets of ``--eval-data`` as `eval-zeroshot` does."""

    def __init__(self, inputs: Inputs, student: ClipModel, plan: ZeroshotPlan, context: DistContext) -> None:
        self.held_out: HeldOut | None = None  # on the first process; None when there are too few samples
        self._student = student
        self._plan = plan
        self._context = context

        def read() -> bool:
            self.held_out = HeldOut.read(inputs, student)
            return self.held_out is not None

        self.has_data = context.on_rank0(read) or bool(plan.tasks)

    def measure(self, state: TrainState) -> dict[str, float]:
        """Measure the student as it is, and with its averaged weights, in full precision; call it on every process.

        Metrics of a data set are called ``NAME/METRIC``, without those that have no value (acc5 of four classes), those of
        the average ``ema/…``. They are whole on the first process.
        """
        metrics = self._measure()
        if state.ema is None:
            return metrics
        averaged = metrics  # before the first step
        if state.step:
            with state.ema.swapped_in():
                averaged = self._measure()
        return metrics | {f"{EMA}{name}": value for name, value in averaged.items()}

    def _measure(self) -> dict[str, float]:
        context = self._context
        student = self._student
        student.module.eval()
        share_statistics(student.module, context)
        metrics: dict[str, float] = {}
        if self.held_out is not None:
            metrics |= self.held_out.measure(self.held_out.encode(), context.device)
        model = EvaluatedModel(ModelName(student.info.spec, "tag"), context, self._plan.settings, student)

        def measure_task(task: ZeroshotTask) -> dict[str, float]:
            rows = model.encode(task)
            return context.on_rank0(lambda: measure(rows, context.device).draws.values())

        for task in self._plan.tasks:
            with reporting_to(Reporter()):  # the bar of the training goes on
                values = measure_task(task)
            metrics |= {f"{task.name}/{name}": value for name, value in values.items() if math.isfinite(value)}
        return metrics


def share_statistics(module: nn.Module, context: DistContext) -> None:
    """Give every process the first one's running statistics of batch normalisation, which are those that are written.

    In training each process gathers those of its own rows, and reads none.
    """
    buffers = [buffer for layer in batch_norms(module) for buffer in layer.buffers()]
    if context.size == 1 or not buffers:
        return
    first = context.broadcast([buffer.cpu() for buffer in buffers] if context.is_main else [])
    for buffer, value in zip(buffers, first, strict=True):
        buffer.copy_(value)
