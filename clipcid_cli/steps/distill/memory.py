"""Whether a training fits on its device, and with workers and checkpoints on its host; and the batch that does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from clipcid_cli.algorithms.costs import BATCH_OF_DEVICE, TOKENS_OF_CAPTION, Clip, describe_clip
from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.distributed import DistContext, available_memory
from clipcid_cli.runtime.models.names import find_config
from clipcid_cli.runtime.models.renderer import Processor
from clipcid_cli.runtime.pipeline import HostMemory, host_memory_of, validate_host_memory
from clipcid_cli.steps.distill.batches import BatchMaker, count_parts
from clipcid_cli.steps.distill.inputs import Inputs
from clipcid_cli.steps.distill.student import Student
from clipcid_cli.steps.distill.teachers import Teacher
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.training_memory import SHARE_OF_DEFAULT, planned_states, training_memory
from clipcid_cli.training.train_state import count_checkpoint_bytes, count_trained_bytes

if TYPE_CHECKING:
    from clipcid_cli.steps.distill.plan import DistillPlan

_CAPTIONS_LOOKED_AT = 256


def fitting_batch(settings: DistillSettings, student: Student, inputs: Inputs, memory: float) -> int:
    """Return how many samples a GPU with so much memory trains on at once where ``--batch-size`` does not say."""
    try:
        tokens = _measure_captions(student, inputs) if settings.trains_text else TOKENS_OF_CAPTION
        clip, teachers = _describe(settings, student, inputs.teacher, tokens)
    except ClipcidError:  # towers whose formulas are not known
        return BATCH_OF_DEVICE
    clusters = 0 if inputs.clusters is None else len(inputs.clusters.files.centroids)
    states = planned_states(settings, clip, memory, clusters)
    if settings.keeps_text_tower:  # whose weights lie there, too
        module = student.model.module
        states += sum(parameter.nbytes for parameter in module.parameters() if not parameter.requires_grad)
    needs = training_memory(
        settings,
        clip,
        states,
        mixed=student.precision.dtype != torch.float32,
        extra_texts=0.0 if inputs.teacher.extra_texts is None else 1.0,
        teachers=teachers,
    )
    return needs.largest(SHARE_OF_DEFAULT * memory)


def validate_memory(plan: DistillPlan, student: Student, context: DistContext) -> None:
    """Refuse a training for which a device or a host has too little memory; call it on every process.

    Counted is the least that it takes: what losses and fragments need is not known before.
    """
    context.on_all(_validate, plan, student, context)


def checkpoint_copy_bytes(plan: DistillPlan, student: Student) -> int:
    """Return the bytes of the copy from which the first process writes a checkpoint while training goes on."""
    return count_checkpoint_bytes(student.model.module, plan.recipe, ema=plan.settings.ema is not None)


def _validate(plan: DistillPlan, student: Student, context: DistContext) -> None:
    coming = _bytes_of_steps(plan, student, context)
    samples = plan.batch_size // context.size
    if context.device.type == "cuda":
        available = available_memory(context.device)
        if coming > available:
            raise ClipcidError(
                f"Training on {samples:,} samples a GPU takes {coming / 1e9:.3g} GB at least, and this GPU has "
                f"{available / 1e9:.3g} GB free.",
                "Use a smaller --batch-size, a larger --accum-freq or --grad-checkpointing, or end other programs on the "
                "GPU.",
            )
        coming = 0
    host_memory(plan, student, context, coming)


def host_memory(plan: DistillPlan, student: Student, context: DistContext, coming: int = 0) -> HostMemory:
    """Estimate what a run takes of this host; an error where the host has less.

    Args:
        coming: Bytes that each process will take for its steps.
    """
    settings = plan.settings
    maker = BatchMaker(settings, plan.inputs, Processor.from_model(student.model), student.masking)
    samples, extra_texts = plan.batch_size // context.size, plan.extra_texts // context.size
    num_parts = count_parts(samples)
    needed = host_memory_of(
        maker.count_bytes(-(-samples // num_parts), -(-extra_texts // num_parts)),
        maker.count_bytes(samples, extra_texts),
        plan.workers,
        num_parts=num_parts,
        num_items=num_parts * plan.steps,
        training=coming,
        checkpoint=checkpoint_copy_bytes(plan, student) if context.is_main else 0,
    )
    return validate_host_memory(needed, plan.workers, trains=True)


def _bytes_of_steps(plan: DistillPlan, student: Student, context: DistContext) -> int:
    """Return the least bytes that steps take on the device beside the models that are there."""
    settings = plan.settings
    module = student.model.module
    trained = count_trained_bytes(module)  # as gradients, and as their averages
    states = trained + plan.recipe.moment_bytes(module) + (0 if settings.ema is None else trained)
    if settings.torchcompile:  # compiled towers compute again what they do not keep: how much that is nobody says
        return states
    try:
        clip, _ = _describe(settings, student, plan.inputs.teacher, tokens=1)
    except ClipcidError:  # towers whose formulas are not known
        return states
    needs = training_memory(settings, clip, states, mixed=student.precision.dtype != torch.float32)
    return round(needs.needed(plan.batch_size // context.size))


def _describe(
    settings: DistillSettings, student: Student, teacher: Teacher, tokens: int
) -> tuple[Clip, Sequence[Clip]]:
    """Return the sizes of the towers that encode of the student, and of a model that runs alongside it.

    Args:
        tokens: Of a caption; a tower that encodes padding, too, takes the whole context.
    """
    config = student.model.info.config
    if settings.keeps_text_tower:  # which never runs, whatever its kind
        config = config | {"text_cfg": {}}
    clip = describe_clip(config, tokens if student.pruned.prunes_texts else student.model.info.context_length)
    if settings.keeps_text_tower:
        clip = clip.image_alone(clip.embed_dim)
    if teacher.online is None:
        return clip, []
    return clip, [describe_clip(find_config(teacher.online) or {})]


def _measure_captions(student: Student, inputs: Inputs) -> int:
    """Return the mean number of tokens of the first captions of the data."""
    rows = np.arange(min(_CAPTIONS_LOOKED_AT, inputs.training.total))
    if not len(rows):
        return TOKENS_OF_CAPTION
    captions = [ref.read().captions[0] for ref in inputs.refs(inputs.training, rows)]
    tokens = student.model.tokenizer(captions)
    # What follows a text is as its last place.
    lengths = (tokens != tokens[:, -1:]).sum(dim=1) + 1
    return int(lengths.float().mean().ceil())
