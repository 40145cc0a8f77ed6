"""Runs with ``--text-tower teacher``: whose text tower is kept, and which losses train an image tower beside it.

The text tower never runs in a step: what it would make of captions are the teacher's own rows of them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.sidecar import read_embed_sidecar
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import ModelName, parse_model, with_default_tag
from clipcid_cli.runtime.models.text_tower import put_beside
from clipcid_cli.steps import reporting
from clipcid_cli.steps.models import embed_with, find_model, validate_teacher
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.embed import DEFAULT_MODEL


def load_beside_teacher(
    settings: DistillSettings, name: ModelName, device: torch.device
) -> tuple[ClipModel, Path | None]:
    """Load the student's image tower beside the teacher's text tower, and return the folder that the latter is from."""
    teacher_name = find_teacher(settings)
    teacher = load_model(teacher_name)
    if teacher.logit_bias is None:
        for loss in settings.losses:
            if loss.needs_bias:
                raise ClipcidError(
                    f"The loss {loss.name} trains a logit bias, which {teacher_name.spec} does not have, and --text-tower "
                    "teacher keeps the teacher's.",
                    f"Use --loss {loss.name}=0, or omit --text-tower.",
                )
    model, random = put_beside(name, teacher, device, settings.seed)
    trained = sum(value.numel() for key, value in model.module.named_parameters() if key.startswith("visual."))
    reporting.note(
        f"Text tower: that of {teacher_name.spec}, kept with its logit scale {teacher.logit_scale:.3g}; trained is an image "
        f"tower of {trained / 1e6:.1f} M parameters, of embeddings {model.info.embed_dim} wide."
    )
    if random:
        reporting.note(f"The image tower starts from {name.spec}, except {', '.join(random)}.")
    return model, teacher_name.folder


def find_teacher(settings: DistillSettings) -> ModelName:
    """Return the teacher, as it was named, else as its embeddings record it."""
    if settings.named_teacher is not None:
        return with_default_tag(find_model(settings.named_teacher))
    work = WorkDirectory(settings.work)
    if settings.named_embeddings is not None:
        folder = settings.named_embeddings
    elif settings.data is not None and not work.has_embeddings():
        return with_default_tag(parse_model(DEFAULT_MODEL))
    else:
        folder = work.find_embeddings()
    sidecar = read_embed_sidecar(folder)
    if sidecar is None:
        raise ClipcidError(
            f"--text-tower teacher, but {folder} does not record which model made it.",
            "Name the --teacher, a model of open_clip whose embeddings they are.",
        )
    name = parse_model(sidecar.model.spec)
    validate_teacher(f"embeddings in {folder}", sidecar.model, name, f"Run: {embed_with(name, settings)}")
    return name
