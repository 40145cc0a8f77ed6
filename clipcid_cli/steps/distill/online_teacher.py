"""A teacher that runs alongside the student, on the same views and captions."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from clipcid_cli.algorithms.losses.shared_space import project
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.augment import apply_colors
from clipcid_cli.runtime.models.clip_model import ClipModel, load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.runtime.models.preprocess import normalize_pixels
from clipcid_cli.runtime.precision import Precision, choose_precision
from clipcid_cli.runtime.training.gradients import gather_rows
from clipcid_cli.steps.distill.batches import TrainingBatch
from clipcid_cli.steps.distill.cluster_targets import open_lookup
from clipcid_cli.steps.distill.objective import Targets, Teacher
from clipcid_cli.steps.distill.stored_teacher import choose_space
from clipcid_cli.steps.distill.teacher_inputs import TeacherInputs
from clipcid_cli.steps.model_identity import cluster_with
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings

# Samples the teacher takes at once, whatever the batch; no activations are kept.
SAMPLES_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class OnlineTeacher(Teacher):
    """The teacher's part of every batch, computed on the fly.

    Attributes:
        model: The teacher, its products cast to `precision`.
        precision: Number format of its products.
        changes_colors: Whether batches carry colour maps that change anything.
    """

    model: ClipModel
    precision: Precision
    changes_colors: bool

    def teacher_rows(self, local: TrainingBatch, targets: Targets) -> tuple[Tensor, Tensor | None]:
        """Embed this process's part and gather everybody's rows."""
        image, text = self.embed(local)
        width = image.shape[1]
        gathered = gather_rows(torch.cat([image, text], dim=1), self.size)
        return gathered[:, :width].contiguous(), gathered[:, width:].contiguous()

    def embed(self, local: TrainingBatch) -> tuple[Tensor, Tensor]:
        """Embed what the student is shown.

        Returns:
            Image and text rows in the shared space, unit, float32 [b, D] each, without gradients.
        """
        assert local.teacher_pixels is not None, "the batch maker has the teacher's processor"
        assert local.teacher_tokens is not None, "likewise"
        images, texts = [], []
        with torch.no_grad():
            for start in range(0, len(local.rows), SAMPLES_AT_ONCE):
                part = slice(start, start + SAMPLES_AT_ONCE)
                pixels = local.teacher_pixels[part].to(self.device, non_blocking=True)
                if self.changes_colors:
                    shown = apply_colors(pixels, local.colors[part].to(self.device, non_blocking=True))
                    pixels = normalize_pixels(shown, self.model.info.preprocess)
                images.append(self.model.encode_images(pixels, self.precision))
                texts.append(self.model.encode_texts(local.teacher_tokens[part], self.precision))
            axes = self.space.axes
            return project(torch.cat(images), axes), project(torch.cat(texts), axes)


def load_online_teacher(teacher_inputs: TeacherInputs | None, machine: Machine) -> ClipModel | None:
    """Load the teacher that runs alongside the student; None where none does."""
    if teacher_inputs is None or teacher_inputs.online is None:
        return None
    name = teacher_inputs.online
    model = machine.on_all(lambda: load_model(name, machine.device))
    for parameter in model.module.parameters():
        parameter.requires_grad_(False)
    return model


def describe_weights(model: ClipModel) -> FileRecord:
    """Describe an online teacher as an input of the run: by its weights, and what decides its pixels and tokens."""
    info = model.info
    content = f"{info.weights_hash} {info.preprocess_hash} {info.tokenizer} {info.context_length}"
    return FileRecord(f"the teacher {info.spec}", info.parameters, content)


def open_online_teacher(
    settings: DistillSettings,
    teacher_inputs: TeacherInputs,
    model: ClipModel,
    student_width: int,
    changes_colors: bool,
    machine: Machine,
    reporter: Reporter,
) -> OnlineTeacher:
    """Make a loaded teacher ready to teach.

    Args:
        teacher_inputs: Its clusters, and stored embeddings to find the axes of the shared space in.
        changes_colors: Whether batches carry colour maps that change anything.
    """
    info, clusters = model.info, teacher_inputs.clusters
    space = choose_space(settings, info.embed_dim, teacher_inputs.embeddings, student_width, machine, reporter)
    if clusters is not None and clusters.centroids.shape[1] != info.embed_dim:
        raise ClipcidError(
            f"The clusters in {clusters.folder} have width {clusters.centroids.shape[1]}, the teacher {info.spec} "
            f"{info.embed_dim}: they are of another teacher.",
            cluster_with(parse_model(info.spec), settings),
        )
    lookup = open_lookup(teacher_inputs, space.axes, settings, machine.device)
    precision = choose_precision(settings.precision, machine.device, "embed", info.parameters)
    model.cast_products(precision)
    reporter.note(
        f"Online teacher: {info.parameters / 1e6:.1f} M parameters, {info.image_size[0]} px, {info.context_length} tokens, "
        f"precision {precision.name} ({precision.reason})."
    )
    return OnlineTeacher(
        space=space,
        teacher_scale=model.logit_scale,
        clusters=lookup,
        device=machine.device,
        size=machine.size,
        model=model,
        precision=precision,
        changes_colors=changes_colors,
    )
