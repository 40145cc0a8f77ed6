"""What a training run takes, measured: three real steps, and the teacher on one batch, or parts of these on a slow CPU.

Nothing is written.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.embeddings.rows import Kind
from clipcid_cli.formats.results.repair import PairingFigures
from clipcid_cli.runtime.distributed import memory_in_use
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.decode import read_size
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model, with_default_tag
from clipcid_cli.runtime.pipeline import HostMemory, estimate_host_memory
from clipcid_cli.runtime.precision import Precision, choose_precision
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps import reporting
from clipcid_cli.steps.distill.batches import Batches, TrainingBatch
from clipcid_cli.steps.distill.samples import index_of
from clipcid_cli.steps.distill.teacher import SAMPLES_AT_ONCE
from clipcid_cli.steps.distill.trainer import Trainer
from clipcid_cli.steps.evaluate.result import Preview

_MEASURED = 3
# The first step also allocates, and compiles with --torchcompile.
_WARM_UP = 1
# On a CPU a step of few samples of each process tells whether whole batches may take longer than so many seconds a step.
# Where they may, a step of at least eight times as many samples tells what each further one takes: with fewer the time of
# the optimiser, which is the same for all, hides it.
_SMALL_PART = 8
_LEAST_PARTS = 8
_LONGEST_STEP = 10.0
_SIZES_LOOKED_AT = 8
# Images of more pixels on the shorter side are worth making smaller before training.
_ADVISED_SIDE = 256
# About as long as the median caption on the web.
_TYPICAL_CAPTION = "a photo of a cat on a red chair"


class TeacherCost(msgspec.Struct):
    """What the teacher takes."""

    parameters: int
    seconds: float  # for the images and captions of one process's part of a batch
    share: float  # its share of a step that runs it
    # Epochs after which embedding everything once has cost less than running the teacher in each step.
    break_even: float


class _Steps(NamedTuple):
    """What a step takes: seconds to prepare its batch on one core, seconds to train on it, and the memory in use."""

    batch_seconds: float
    step_seconds: float
    memory: int  # bytes
    how: str  # how these are known


class DistillCost(msgspec.Struct):
    """What a run would take."""

    student: str
    steps: int
    samples: int
    parameters: int
    memory_bytes: int  # of one process, on its device
    host_memory_bytes: int  # of all processes of a host, with what waits in /dev/shm
    shared_memory_bytes: int
    seconds_per_step: float
    data_seconds_per_step: float  # of one core
    samples_per_second: float
    data_samples_per_second: float  # what all workers read and decode
    bound_by: str  # ``data`` where that is less than the model takes, else ``model``
    seconds: dict[str, float]
    teacher: TeacherCost | None  # None where there is none, or it cannot be loaded here
    pairing: PairingFigures | None = None  # how well the teacher knows these captions and images
    files: dict[str, str] = {}
    evaluations: list[Preview] = []


def estimate_cost(trainer: Trainer) -> DistillCost:
    """Estimate what a run takes, for ``--dry-run``."""
    plan = trainer.plan
    measured = _measure_steps(trainer)
    batch_seconds, step_seconds = measured.batch_seconds, measured.step_seconds
    # Workers prepare batches during the steps; without any, one follows the other.
    data_seconds = batch_seconds / max(1, plan.workers)
    seconds_per_step = step_seconds + data_seconds if plan.workers == 0 else max(step_seconds, data_seconds)
    supply, demand = plan.batch_size / data_seconds, plan.batch_size / step_seconds
    bound_by = "data" if supply < demand else "model"
    host = _estimate_host_memory(trainer)
    teacher = _measure_teacher(trainer, step_seconds)
    reporting.note(
        f"A step of {plan.batch_size:,} takes {1e3 * step_seconds:,.0f} ms, preparing its batch "
        f"{1e3 * batch_seconds:,.0f} ms of one core ({measured.how}).\n"
        f"Held out: {plan.inputs.held_out.total:,} samples."
    )
    if plan.workers:
        workers = f"{plan.workers} worker" + ("" if plan.workers == 1 else "s")
        reporting.note(
            f"The model can take {demand:,.0f} samples/s, {workers} can read and decode {supply:,.0f}: "
            f"{'decoding' if bound_by == 'data' else 'the model'} is the bottleneck."
        )
    if bound_by == "data":
        smaller = (
            ", and so do smaller images: with 256 px on the shorter side a core prepares twice as many as with 512 "
            "(img2dataset --image_size 256 --resize_mode keep_ratio)"
        )
        is_large = _measure_shorter_side(plan.inputs.dataset) > _ADVISED_SIDE
        reporting.note(f"More cores and --workers decode more{smaller * is_large}. A mixture is two images.")
    if teacher is not None:
        is_stored = plan.inputs.stored is not None
        advice = f" Embedding everything once pays off after {teacher.break_even:.1f} epochs."
        reporting.note(
            f"Teacher: {teacher.parameters / 1e6:.1f} M parameters; in the loop it {'would take' if is_stored else 'takes'} "
            f"{1e3 * teacher.seconds:,.0f} ms per step, {teacher.share:.0%} of it."
            + (" Its embeddings are stored." if is_stored else advice)
        )
    return DistillCost(
        student=str(plan.folder.student),
        steps=plan.steps,
        samples=plan.steps * plan.batch_size,
        parameters=trainer.student.model.info.parameters,
        memory_bytes=measured.memory,
        host_memory_bytes=host.total,
        shared_memory_bytes=host.shared,
        seconds_per_step=round(seconds_per_step, 4),
        data_seconds_per_step=round(batch_seconds, 4),
        samples_per_second=round(plan.batch_size / seconds_per_step, 1),
        data_samples_per_second=round(supply, 1),
        bound_by=bound_by,
        seconds={"train": round(seconds_per_step * plan.steps, 3)},
        teacher=teacher,
        pairing=plan.inputs.pairing,
    )


def _measure_shorter_side(dataset: Dataset) -> float:
    """Return the median shorter side of a few images of the first shard, in pixels; 0 where none can be read."""
    part = index_of(dataset).part(0)
    places = np.unique(np.linspace(0, len(part) - 1, min(len(part), _SIZES_LOOKED_AT)).astype(np.int64))
    sizes = [read_size(part.sample(place).image) for place in places.tolist()]
    return statistics.median([min(size) for size in sizes if isinstance(size, tuple)] or [0])


def _measure_steps(trainer: Trainer) -> _Steps:
    """Time steps of whole batches, or where these take long on a CPU estimate them from parts."""
    plan = trainer.plan
    context = trainer.context
    whole = trainer.batches
    reporting.note(f"Timing steps of {plan.batch_size:,} samples.")
    accum_freq = plan.settings.accum_freq
    small = context.size * max(_SMALL_PART, accum_freq)
    # Compiled towers would be compiled once more for each size.
    if context.device.type == "cuda" or plan.settings.torchcompile or plan.batch_size <= _LEAST_PARTS * small:
        return _time_steps(trainer, whole)
    one = _time_steps(trainer, whole.resized(small), repeats=1)
    parts = context.broadcast(int(_LONGEST_STEP / one.step_seconds))
    if parts * small >= plan.batch_size:
        return _time_steps(trainer, whole)
    larger = small * max(_LEAST_PARTS, parts)
    reporting.note(
        f"A step of {small:,} takes {one.step_seconds:,.1f} s: one of {larger:,} tells what whole ones take."
    )
    several = _time_steps(trainer, whole.resized(larger), warm_up=0, repeats=1)
    dealt = next(whole.deal(range(1)))
    made = time_trial(partial(whole.make, dealt), warm_up=0)
    further = (plan.batch_size - larger) / (larger - small)
    return _Steps(
        batch_seconds=made.seconds,
        step_seconds=several.step_seconds + further * max(0.0, several.step_seconds - one.step_seconds),
        memory=several.memory + int(further * max(0, several.memory - one.memory)),
        how=f"estimated from parts of a batch, {small:,} and {larger:,} samples",
    )


def _time_steps(trainer: Trainer, batches: Batches, warm_up: int = _WARM_UP, repeats: int = _MEASURED) -> _Steps:
    device = trainer.context.device
    prepared, trained = list[float](), list[float]()
    for dealt in batches.deal(range(warm_up + repeats)):
        made = time_trial(partial(batches.make, dealt), warm_up=0)
        prepared.append(made.seconds)
        batch = batches.finish(dealt, made.result)
        step = time_trial(partial(trainer.step, batch), device, warm_up=0)
        trained.append(step.seconds)
    trainer.read(trainer.make_step.send())  # which refuses steps that diverged
    return _Steps(
        batch_seconds=statistics.median(prepared[warm_up:]),
        step_seconds=statistics.median(trained[warm_up:]),
        memory=memory_in_use(device),
        how=f"medians of {repeats}",
    )


def _estimate_host_memory(trainer: Trainer) -> HostMemory:
    dealt = next(trainer.batches.deal(range(1)))
    sizes = [_size_of(part) for part in trainer.batches.make(dealt)]
    workers = trainer.plan.workers
    return trainer.context.on_all(lambda: estimate_host_memory(max(sizes), sum(sizes), workers, len(sizes)))


def _size_of(part: TrainingBatch) -> int:
    return sum(value.nbytes for value in vars(part).values() if isinstance(value, torch.Tensor))


def _measure_teacher(trainer: Trainer, step_seconds: float) -> TeacherCost | None:
    """Measure the teacher on one batch of noise; None where there is none, or it cannot be loaded here."""
    taught_by = trainer.objective.teacher
    if taught_by is None:
        return None
    context = trainer.context
    inputs = trainer.plan.inputs
    embeddings = inputs.embeddings
    teacher = taught_by.model
    if teacher is None:
        recorded = None if embeddings is None or embeddings.model is None else embeddings.model.spec
        spec = next(iter(trainer.plan.settings.teacher), recorded)
        if spec is None or trainer.plan.settings.num_teachers > 1:
            return None
        try:
            teacher = load_model(with_default_tag(parse_model(spec)), context.device)
        except ClipcidError as error:
            reporting.note(f"The time that the teacher would take in the loop is not measured: {error.message}")
            return None
    images, texts = _time_teacher(teacher, trainer.plan.batch_size // context.size, trainer.plan.settings.precision)
    seconds = images + texts
    # What is embedded once may be more than what is trained on: all images, not only the kept ones.
    rows = inputs.usable.total if embeddings is None else embeddings.num_rows
    texts_per_image = 1.0
    if embeddings is not None and Kind.FURTHER in embeddings.kinds:
        texts_per_image += len(embeddings.rows(Kind.FURTHER)) / rows
    if inputs.extra_texts is not None:
        texts_per_image += inputs.extra_texts.variants.number
    # In passes over images and one caption of each.
    passes = ((1 + inputs.num_views) * images + texts_per_image * texts) / seconds
    return TeacherCost(
        parameters=teacher.info.parameters,
        seconds=seconds,
        share=min(1.0, seconds / (step_seconds + (seconds if inputs.stored is not None else 0))),
        break_even=passes * rows / inputs.training.total,
    )


def _time_teacher(teacher: ClipModel, count: int, requested: str) -> tuple[float, float]:
    """Return the seconds for `count` images and for as many captions."""
    precision = choose_precision(requested, teacher.device, "embed", teacher.info.parameters)
    teacher.cast_products(precision)
    height, width = teacher.info.image_size
    pixels = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    tokens = teacher.tokenizer([_TYPICAL_CAPTION] * count)

    def measure(encode: Callable[[torch.Tensor, Precision], torch.Tensor], inputs: torch.Tensor) -> float:
        def encode_all() -> list[torch.Tensor]:
            return [encode(part, precision) for part in torch.split(inputs, SAMPLES_AT_ONCE)]

        if teacher.device.type == "cpu" and count > _SMALL_PART:
            part = time_trial(lambda: encode(inputs[:_SMALL_PART], precision), warm_up=_WARM_UP)
            estimate = part.seconds * count / _SMALL_PART
            if estimate > _LONGEST_STEP:
                return estimate
        return time_trial(encode_all, teacher.device, warm_up=_WARM_UP, repeats=_MEASURED).seconds

    return measure(teacher.encode_images, pixels), measure(teacher.encode_texts, tokens)
