"""The student a run begins with: loaded, filled from a larger model, its frozen towers set aside."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.clip_model import ClipModel, load_model
from clipcid_cli.runtime.models.inherit import inherit
from clipcid_cli.runtime.models.names import parse_model, with_default_tag
from clipcid_cli.runtime.models.used_tokens import freeze
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings


@dataclasses.dataclass(frozen=True)
class Student:
    """A model to train.

    Attributes:
        model: The model; its ``info.weights_hash`` says what it starts from.
        frozen: Modules that stay in evaluation mode.
        spare_unused_tokens: Whether token embeddings no caption uses may be set aside while training.
    """

    model: ClipModel
    frozen: list[nn.Module]
    spare_unused_tokens: bool


def load_student(settings: DistillSettings, machine: Machine, reporter: Reporter) -> Student:
    """Load the student as ``--student``, ``--init-from`` and ``--freeze-…`` say.

    Raises:
        ClipcidError: when a model cannot be loaded, or the one to inherit from does not fit.
    """
    return machine.on_all(lambda: _load(settings, machine.device, reporter))


def _load(settings: DistillSettings, device: torch.device, reporter: Reporter) -> Student:
    model = load_model(parse_model(str(settings.student)), device, fresh_seed=settings.seed)
    if settings.init_from is not None:
        source = load_model(with_default_tag(parse_model(settings.init_from)))
        left = inherit(model.module, source.module, settings.init_towers)
        which = "Both towers" if settings.init_towers == "both" else f"The {settings.init_towers} tower"
        kept = f"; not of it: {', '.join(left)}" if left else ""
        verb = "start" if settings.init_towers == "both" else "starts"
        reporter.note(f"{which} {verb} from {source.info.spec}{kept}.")
        weights_hash = f"{model.info.weights_hash}+{settings.init_towers}:{source.info.weights_hash}"
        model = dataclasses.replace(model, info=dataclasses.replace(model.info, weights_hash=weights_hash))
    frozen: list[nn.Module] = []
    for tower, wanted in (("image", settings.freeze_image), ("text", settings.freeze_text)):
        if wanted:
            frozen += freeze(model.module, tower)
    if settings.grad_checkpointing:
        _checkpoint_layers(model)
    return Student(model, frozen, spare_unused_tokens=not settings.freeze_text)


def _checkpoint_layers(model: ClipModel) -> None:
    try:
        model.module.set_grad_checkpointing(True)  # type: ignore[operator]  # every CLIP of open_clip has it
    except (AttributeError, NotImplementedError, AssertionError) as error:
        raise ClipcidError(
            f"--grad-checkpointing: a tower of {model.info.spec} cannot do it ({' '.join(str(error).split())[:200]}).",
            "Leave it away and use --accum-freq, which saves memory with any model.",
        ) from error
