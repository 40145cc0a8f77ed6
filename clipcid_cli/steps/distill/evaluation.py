"""What a student in training is measured on: retrieval on the held-out part, and data sets the user named."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from clipcid_cli.algorithms.metrics.retrieval import retrieval_metrics
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset, Sample
from clipcid_cli.formats.results.matched_samples import SampleRows
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.decode import SkippedImage, read_image
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.runtime.models.tokenizer import Tokenizer
from clipcid_cli.runtime.models.used_tokens import whole_table
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.runtime.training.trainer import Trainer
from clipcid_cli.steps.distill.samples import index_of
from clipcid_cli.steps.evaluate.measure import measure
from clipcid_cli.steps.evaluate.model import EvaluatedModel, TaskRows
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask, plan_tasks
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

# Held-out samples beyond this many are left to eval-zeroshot: evaluation during training should take seconds.
_MAX_HELD_OUT = 5_000
_BATCH = 256
# What the names of metrics of the averaged weights begin with.
EMA = "ema/"
_FP32 = Precision("fp32", torch.float32, "evaluation")


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out samples, ready for the model.

    Attributes:
        pixels: uint8 [n, H, W, 3], the model's own evaluation pixels.
        tokens: int64 [n, L].
        samples: The samples themselves, for the report's pictures.
        rows: Their rows among all samples held out.
    """

    pixels: torch.Tensor
    tokens: torch.Tensor
    samples: list[Sample]
    rows: list[int]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The measurements of a run.

    Attributes:
        held_out: Samples kept out of training, on the first process; None when there are too few.
        tasks: Data sets of ``--eval-data``, as `eval-zeroshot` measures them.
        has_data: Whether there is anything to measure, the same on all processes.
    """

    held_out: HeldOut | None
    tasks: list[ZeroshotTask]
    settings: EvalZeroshotSettings
    has_data: bool

    def measure(self, student: ClipModel, machine: Machine, trainer: Trainer) -> dict[str, float]:
        """Measure the student as it is, and with its averaged weights, in full precision; call it on every process.

        Returns:
            Metrics of the held-out part by name, those of a named data set as ``NAME/METRIC``, without those it has no value
            for (acc5 of four classes), those of the average as ``ema/…``; whole on the first process.
        """
        average, step = trainer.average, trainer.step
        metrics = self._measure(student, machine, trainer.plan.decay_after(step))
        if average is None:
            return metrics
        averaged = metrics  # before the first step
        if step:
            with average.in_place():
                averaged = self._measure(student, machine, average.unused)
        return metrics | {f"{EMA}{name}": value for name, value in averaged.items()}

    def _measure(self, student: ClipModel, machine: Machine, decay: float) -> dict[str, float]:
        """Measure a model.

        Args:
            decay: What the steps so far leave of the embedding of a token that no caption uses; prompts may use it.
        """
        student.module.eval()
        share_statistics(student.module, machine)
        metrics: dict[str, float] = {}
        if self.held_out is not None:
            images, texts = embed_held_out(student, self.held_out)
            metrics |= retrieval_metrics(images, texts, torch.arange(len(images)))
        name = ModelName(student.info.spec, "tag")
        model = EvaluatedModel(name, machine, self.settings, Reporter(), student)
        with whole_table(student.module, decay):
            for task in self.tasks:
                rows = model.encode(task)
                found = machine.on_main(partial(_metrics_of, rows, machine.device))
                metrics |= {f"{task.name}/{name}": value for name, value in found.items() if math.isfinite(value)}
        return metrics


def _metrics_of(rows: TaskRows, device: torch.device) -> dict[str, float]:
    return measure(rows, device, Reporter()).draws.values()


def share_statistics(module: nn.Module, machine: Machine) -> None:
    """Give every process the first one's running statistics of batch normalisation, which are those that are written.

    In training each process gathers those of its own rows, and reads none.
    """
    normed = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if machine.size == 1 or not normed:
        return
    buffers = [buffer for part in normed for buffer in part.buffers()]
    first = machine.broadcast([buffer.cpu() for buffer in buffers] if machine.is_main else [])
    for buffer, value in zip(buffers, first, strict=True):
        buffer.copy_(value)


def zeroshot_settings(settings: DistillSettings) -> EvalZeroshotSettings:
    """Return the settings of `eval-zeroshot` on the data sets of ``--eval-data``.

    The defaults, but for what speaks of no data set in particular: columns and keys are those of the training data.
    """
    return EvalZeroshotSettings(
        work=settings.work,
        data=settings.eval_data,
        workers=settings.workers,
        overwrite=settings.overwrite,
        max_bad_fraction=settings.max_bad_fraction,
    )


def prepare_evaluation(
    settings: DistillSettings,
    dataset: Dataset,
    held_out: SampleRows,
    student: ClipModel,
    tasks: list[ZeroshotTask],
    machine: Machine,
) -> Evaluation:
    """Read the held-out samples, on the first process: up to 0.75 GB of pixels at 224 px.

    Args:
        tasks: The data sets of ``--eval-data``.
    """
    samples: HeldOut | None = None

    def read() -> bool:
        nonlocal samples
        samples = read_held_out(dataset, held_out, student.pixel_transform(), student.tokenizer, _MAX_HELD_OUT)
        return samples is not None

    has_data = machine.on_main(read) or bool(tasks)
    chosen = dataclasses.replace(zeroshot_settings(settings), bootstrap=0, workers=0, batch_size=_BATCH)
    return Evaluation(samples, tasks, chosen, has_data)


def read_held_out(
    dataset: Dataset,
    held_out: SampleRows,
    transform: Callable[[Image.Image], torch.Tensor],
    tokenizer: Tokenizer,
    limit: int,
) -> HeldOut | None:
    """Read the first `limit` held-out samples; None when there are fewer than two, which retrieval cannot use."""
    samples, first = list[Sample](), 0
    places = held_out.column("places")
    for number, size in enumerate(held_out.sizes.tolist()):
        if len(samples) >= limit:
            break
        samples.extend(map(index_of(dataset).part(number).sample, places[first : first + size].tolist()))
        first += size
    pixels, readable = list[torch.Tensor](), list[int]()
    for number, sample in enumerate(samples[:limit]):
        image = read_image(sample.image)
        if not isinstance(image, SkippedImage):
            pixels.append(transform(image))
            readable.append(number)
    if len(readable) < 2:
        return None
    chosen = [samples[number] for number in readable]
    tokens = tokenizer([sample.captions[0] for sample in chosen])
    return HeldOut(torch.stack(pixels), tokens, chosen, readable)


def plan_evaluation(settings: EvalZeroshotSettings, reporter: Reporter) -> list[ZeroshotTask]:
    """Open the data sets of ``--eval-data``, each once: metrics are logged as ``NAME/METRIC``."""
    if not settings.data:
        return []
    try:
        planned = plan_tasks(settings, reporter)
    except ClipcidError as error:
        fix = error.fix
        if "--" in fix:  # flags that distill lacks, or that it reads its training data by
            fix += (
                " Such flags do not reach --eval-data: omit it here, and run clipcid eval-zeroshot with them after the "
                "training."
            )
        raise ClipcidError(f"--eval-data: {error.message}", fix) from error
    tasks: dict[str, ZeroshotTask] = {}
    for task in planned:
        if task.name == EMA.rstrip("/"):
            raise ClipcidError(
                f"--eval-data: {task.dataset.spec} is called {task.name}, as which the average of the weights is logged.",
                "Rename the folder, or link it by another name.",
            )
        place = Path(task.dataset.spec).resolve()
        other = Path(tasks.setdefault(task.name, task).dataset.spec).resolve()
        if other != place:
            raise ClipcidError(
                f"--eval-data: {other} and {place} are both called {task.name}, so their metrics would be too.",
                "Rename one of the folders, or link it by another name.",
            )
    return list(tasks.values())


def embed_held_out(student: ClipModel, held_out: HeldOut) -> tuple[Tensor, Tensor]:
    """Embed the held-out part in full precision; image and text rows, float32 [n, d], unit, on the CPU."""
    student.module.eval()
    images, texts = [], []
    for start in range(0, len(held_out.pixels), _BATCH):
        part = slice(start, start + _BATCH)
        images.append(student.encode_images(held_out.pixels[part], _FP32).cpu())
        texts.append(student.encode_texts(held_out.tokens[part], _FP32).cpu())
    return torch.cat(images), torch.cat(texts)
