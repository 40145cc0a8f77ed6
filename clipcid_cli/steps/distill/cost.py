"""What a training run takes, by a few real steps of it: time to decode and to train, and memory. Nothing is written."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import NamedTuple

import numpy as np

from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.runtime.distributed import memory_in_use
from clipcid_cli.runtime.models.decode import read_size
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps import reporting
from clipcid_cli.steps.distill.memory import checkpoint_copy_bytes, host_memory
from clipcid_cli.steps.distill.result import DistillCost
from clipcid_cli.steps.distill.samples import index_of
from clipcid_cli.steps.distill.trainer import Trainer

# The first step also allocates, and compiles with --torchcompile: it counts only where there is time for no other.
_STEPS = 4
_ENOUGH_SECONDS = 30.0
_SIZES_LOOKED_AT = 8  # images
_ADVISED_SIDE = 256


class _Steps(NamedTuple):
    """What the steps took."""

    timed: int  # how many of them
    batch_seconds: float  # to prepare a batch on one core, the median
    step_seconds: float  # to train on it, the median


def measure_cost(trainer: Trainer) -> DistillCost:
    """Make a few steps, for ``--dry-run``, and say what a run of such steps takes."""
    plan = trainer.plan
    reporting.note(f"Timing steps of {plan.batch_size:,} samples.")
    measured = _make_steps(trainer)
    # What steps take on the device is there now; on a CPU that is the host.
    memory = trainer.context.on_all(host_memory, plan, trainer.student, trainer.context)
    # Workers prepare batches during the steps; without any, one follows the other.
    data_seconds = measured.batch_seconds / max(1, plan.workers)
    seconds_per_step = max(measured.step_seconds, data_seconds)
    if plan.workers == 0:
        seconds_per_step = measured.step_seconds + data_seconds
    supply = plan.batch_size / data_seconds
    demand = plan.batch_size / measured.step_seconds
    bound_by = "data" if supply < demand else "model"
    reporting.note(
        f"A step of {plan.batch_size:,} takes {1e3 * measured.step_seconds:,.0f} ms, preparing its batch "
        f"{1e3 * measured.batch_seconds:,.0f} ms of one core (medians of {measured.timed}).\n"
        f"Held out: {plan.inputs.held_out.total:,} samples."
    )
    if plan.workers:
        workers = f"{plan.workers} worker" + ("" if plan.workers == 1 else "s")
        bottleneck = "decoding" if bound_by == "data" else "the model"
        reporting.note(
            f"The model can take {demand:,.0f} samples/s, {workers} can read and decode {supply:,.0f}: "
            f"{bottleneck} is the bottleneck."
        )
    if bound_by == "data":
        reporting.note("More cores and --workers decode more.")
        if _measure_shorter_side(plan.inputs.dataset) > _ADVISED_SIDE:
            reporting.note(
                "So do smaller images: with 256 px on the shorter side a core prepares twice as many as with 512 "
                "(img2dataset --image_size 256 --resize_mode keep_ratio)."
            )
    return DistillCost(
        student=str(plan.folder.student),
        steps=plan.steps,
        samples=plan.steps * plan.batch_size,
        parameters=trainer.student.model.info.parameters,
        memory_bytes=memory_in_use(trainer.context.device),
        host_memory_bytes=memory.total,
        shared_memory_bytes=memory.shared,
        checkpoint_copy_bytes=checkpoint_copy_bytes(plan, trainer.student),
        seconds_per_step=round(seconds_per_step, 4),
        data_seconds_per_step=round(measured.batch_seconds, 4),
        samples_per_second=round(plan.batch_size / seconds_per_step, 1),
        data_samples_per_second=round(supply, 1),
        bound_by=bound_by,
        seconds={"train": round(seconds_per_step * plan.steps, 3)},
        pairing=plan.inputs.teacher.judgement.pairing,
    )


def _measure_shorter_side(dataset: Dataset) -> float:
    """Return the median shorter side of a few images of the first shard, in pixels; 0 where none can be read."""
    part = index_of(dataset).part(0)
    places = np.unique(np.linspace(0, len(part) - 1, min(len(part), _SIZES_LOOKED_AT)).astype(np.int64))
    sizes = [read_size(part.sample(place).image) for place in places.tolist()]
    return statistics.median([min(size) for size in sizes if isinstance(size, tuple)] or [0])


def _make_steps(trainer: Trainer) -> _Steps:
    """Make the first steps of the run, fewer where these take long, and time each and its batch."""
    context = trainer.context
    prepared, trained = list[float](), list[float]()
    began = time.monotonic()
    for dealt in trainer.batches.deal(range(_STEPS)):
        preparation = time_trial(partial(trainer.batches.make_here, dealt), warm_up=0)
        batch = trainer.batches.finish(dealt, preparation.result)
        step = time_trial(partial(trainer.make_step, batch), context.device, warm_up=0)
        prepared.append(preparation.seconds)
        trained.append(step.seconds)
        if context.broadcast(time.monotonic() - began > _ENOUGH_SECONDS):
            break
    trainer.read(trainer.train_step.send())  # which refuses steps that diverged
    first = 1 if len(trained) > 1 else 0
    return _Steps(
        timed=len(trained) - first,
        batch_seconds=statistics.median(prepared[first:]),
        step_seconds=statistics.median(trained[first:]),
    )
