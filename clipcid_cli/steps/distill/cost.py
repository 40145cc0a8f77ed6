"""What a training run takes, measured: three real steps, and the teacher on one batch. Nothing is written."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.runtime.memory import memory_in_use
from clipcid_cli.runtime.models.clip_model import ClipModel, load_model
from clipcid_cli.runtime.models.names import parse_model, with_default_tag
from clipcid_cli.runtime.precision import Precision, choose_precision
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.distill.teacher import SAMPLES_AT_ONCE
from clipcid_cli.steps.distill.training_run import TrainingRun
from clipcid_cli.steps.embed.cost import TYPICAL_CAPTION

_MEASURED = 3
# The first step also allocates, and compiles with --torchcompile.
_WARM_UP = 1


@dataclasses.dataclass(frozen=True)
class TeacherCost:
    """What the teacher takes.

    Attributes:
        seconds: Time for the images and captions of one process's part of a batch.
        share: Its share of a step that runs it.
        break_even: Epochs after which embedding everything once has cost less than running the teacher in each step.
    """

    parameters: int
    seconds: float
    share: float
    break_even: float


def estimate_cost(run: TrainingRun) -> dict[str, Any]:
    """Estimate what a run takes, for ``--dry-run``.

    Returns:
        The JSON object: ``student, steps, samples, parameters, memory_bytes, seconds_per_step, data_seconds_per_step,
        samples_per_second, seconds{train}, teacher{}, files{}``.
    """
    student, plan, reporter = run.student.model, run.plan, run.reporter
    batch_seconds, step_seconds, memory = _measure_steps(run)
    teacher = _measure_teacher(run, step_seconds)
    workers = max(1, plan.workers)
    # Workers prepare batches during the steps; without any, one follows the other.
    seconds_per_step = step_seconds + batch_seconds if plan.workers == 0 else max(step_seconds, batch_seconds / workers)
    samples_per_second = plan.batch_size / seconds_per_step
    total_seconds = seconds_per_step * plan.optimiser.steps
    parameters = student.info.parameters
    by_workers = f", by {plan.workers} worker{'' if plan.workers == 1 else 's'}" if plan.workers else ""
    reporter.note(
        f"A step of {plan.batch_size:,} takes {1e3 * step_seconds:,.0f} ms, preparing its batch "
        f"{1e3 * batch_seconds:,.0f} ms of one core{by_workers} (medians of {_MEASURED}).\n"
        f"Held out: {run.inputs.held_out.total:,} samples."
    )
    if teacher is not None:
        verb = "takes" if run.online_teacher is not None else "would take"
        reporter.note(
            f"Teacher: {teacher.parameters / 1e6:.1f} M parameters; in the loop it {verb} {1e3 * teacher.seconds:,.0f} ms a "
            f"step, {teacher.share:.0%} of it. Embedding everything once pays after {teacher.break_even:.1f} epochs."
        )
    return {
        "student": str(run.folder.student),
        "steps": plan.optimiser.steps,
        "samples": plan.optimiser.steps * plan.batch_size,
        "parameters": parameters,
        "memory_bytes": memory,
        "seconds_per_step": round(step_seconds, 4),
        "data_seconds_per_step": round(batch_seconds, 4),
        "samples_per_second": round(samples_per_second, 1),
        "seconds": {"train": round(total_seconds, 3)},
        "teacher": None if teacher is None else dataclasses.asdict(teacher),
        "files": {},
    }


def _measure_steps(run: TrainingRun) -> tuple[float, float, int]:
    """Return the time to prepare a batch and to train on it, medians in seconds, and the memory in use."""
    loop = run.make_loop(lambda _: {})
    device = run.student.model.device
    prepared, trained = list[float](), list[float]()
    for dealt in loop.batches.deal(range(_WARM_UP + _MEASURED)):
        preparation = time_trial(partial(loop.batches.make, dealt), warm_up=0)
        prepared.append(preparation.seconds)
        batch = loop.batches.finish(dealt, preparation.result)
        step = time_trial(partial(loop.step, batch), device, warm_up=0)
        trained.append(step.seconds)
    loop.read(len(trained), step.result)  # which refuses steps that diverged
    return statistics.median(prepared[_WARM_UP:]), statistics.median(trained[_WARM_UP:]), memory_in_use(device)


def _measure_teacher(run: TrainingRun, step_seconds: float) -> TeacherCost | None:
    """Measure the teacher on one batch of noise; None where there is none, or it cannot be loaded here."""
    if run.inputs.teacher is None:
        return None
    teacher, embeddings, stored = run.online_teacher, run.inputs.embeddings, run.inputs.stored
    if teacher is None:
        assert embeddings is not None, "a teacher that is not online has stored embeddings"
        recorded = None if embeddings.sidecar is None else embeddings.sidecar.model.spec
        spec = run.settings.teacher or recorded
        if spec is None:
            return None
        try:
            teacher = load_model(with_default_tag(parse_model(spec)), run.machine.device)
        except ClipcidError as error:
            run.reporter.note(f"The time that the teacher would take in the loop is not measured: {error.message}")
            return None
    images, texts = _time_teacher(teacher, run.plan.batch_size // run.machine.size, run.settings.precision)
    seconds = images + texts
    step = step_seconds if run.online_teacher is not None else step_seconds + seconds
    # What is embedded once may be more than what is trained on: all images, not only the kept ones.
    rows = run.inputs.usable.total if embeddings is None else embeddings.num_rows
    has_further = embeddings is not None and Kind.FURTHER in embeddings.kinds
    texts_per_image = 1 + (len(embeddings.rows(Kind.FURTHER)) / rows if embeddings is not None and has_further else 0.0)
    texts_per_image += 0 if stored is None or stored.variants is None else stored.variants.number
    passes = (
        passes_to_embed(images, texts, 0 if stored is None else stored.num_views, texts_per_image)
        * rows
        / run.inputs.training.total
    )
    return TeacherCost(teacher.info.parameters, seconds, min(1.0, seconds / step), passes)


def passes_to_embed(images: float, texts: float, num_views: int, texts_per_image: float) -> float:
    """Return what embedding with views and several texts an image takes, in passes over images and one caption of each.

    Args:
        images: Time for some images.
        texts: Time for as many captions, in the same unit.
    """
    return ((1 + num_views) * images + texts_per_image * texts) / (images + texts)


def _time_teacher(teacher: ClipModel, count: int, requested: str) -> tuple[float, float]:
    """Return the seconds for `count` images and for as many captions."""
    precision = choose_precision(requested, teacher.device, "embed", teacher.info.parameters)
    teacher.cast_products(precision)
    height, width = teacher.info.image_size
    pixels = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    tokens = teacher.tokenizer([TYPICAL_CAPTION] * count)

    def measure(encode: Callable[[torch.Tensor, Precision], object], inputs: torch.Tensor) -> float:
        def encode_all() -> None:
            for part in torch.split(inputs, SAMPLES_AT_ONCE):
                encode(part, precision)

        return time_trial(encode_all, teacher.device, warm_up=_WARM_UP, repeats=_MEASURED).seconds

    return measure(teacher.encode_images, pixels), measure(teacher.encode_texts, tokens)
