"""A teacher whose stored embeddings teach, and the space that the student shares with any teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipcid_cli.algorithms.losses.registry import LOSSES
from clipcid_cli.algorithms.losses.shared_space import SharedSpace, principal_axes, project, second_moment
from clipcid_cli.formats.atomic import atomic_file
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.formats.embeddings.sample_rows import take_captions, take_images
from clipcid_cli.formats.fingerprint import identity_of
from clipcid_cli.formats.results.matched_samples import Column
from clipcid_cli.formats.sidecar import EmbedSidecar
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.pipeline import to_device
from clipcid_cli.runtime.training.gradients import gather_rows
from clipcid_cli.steps.distill.batches import TrainingBatch
from clipcid_cli.steps.distill.cluster_targets import open_lookup
from clipcid_cli.steps.distill.objective import Targets, Teacher
from clipcid_cli.steps.distill.teacher_inputs import TeacherInputs
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings

# The scale at which CLIP training ends; taken where another tool's embeddings do not record it.
MAX_SCALE = 100.0
# Cut to the student's width only where that keeps at least this share of the teacher's variance.
ENOUGH_VARIANCE = 0.98
# Principal axes are found from at most this many evenly spaced rows of each tower.
_AXES_ROWS = 2**20


def choose_space(
    settings: DistillSettings,
    teacher_width: int,
    embeddings: Embeddings | None,
    student_width: int,
    machine: Machine,
    reporter: Reporter,
) -> SharedSpace:
    """Choose the space in which student and teacher are compared.

    Args:
        embeddings: Stored ones, in which the axes of ``pca`` are found; None where there are none.
        machine: The processes; all take the first one's axes.

    Returns:
        For equal widths, and where no loss compares features of the two, the teacher's space as it is, unless requested
        otherwise; else as requested, but ``pca`` cannot widen: a student wider than its teacher takes ``project``, and so
        does one whose teacher has no stored embeddings.
    """
    requested = settings.teacher_space
    by_layer = f"Shared space: the teacher's {teacher_width} dimensions, by a learned layer per student tower."
    if requested == "auto" and all(LOSSES[name].space == "own" for name in settings.losses()):
        return SharedSpace(teacher_width)
    if requested == "project" or student_width > teacher_width:
        reporter.note(by_layer)
        return SharedSpace(teacher_width, is_learned=True)
    if student_width == teacher_width:
        return SharedSpace(teacher_width)
    if embeddings is None:
        reporter.note(
            f"{by_layer} There are no stored embeddings to find the axes of --teacher-space pca in (clipcid embed)."
        )
        return SharedSpace(teacher_width, is_learned=True)
    axes = machine.on_main(lambda: principal_axes(_find_second_moment(settings, embeddings), student_width))
    dimensions = f"{student_width} of the teacher's {teacher_width} dimensions"
    if requested == "auto" and axes.kept < ENOUGH_VARIANCE:
        reporter.note(
            f"{dimensions} keep only {axes.kept:.1%} of its variance, so a learned layer per student tower maps to all of "
            "them (--teacher-space pca cuts anyway)."
        )
        return SharedSpace(teacher_width, is_learned=True)
    reporter.note(f"Shared space: {dimensions}, which keep {axes.kept:.1%} of its variance.")
    return SharedSpace(student_width, axes.to(machine.device))


def _find_second_moment(settings: DistillSettings, embeddings: Embeddings) -> npt.NDArray[np.float64]:
    """Read the second moment of the teacher's rows that an earlier start kept; compute and keep it where there is none."""
    identity = identity_of({"axes_rows": _AXES_ROWS}, embeddings.fingerprints([Kind.TEXTS]))
    path = WorkDirectory(settings.work).second_moment(identity)
    with suppress(OSError, ValueError, EOFError):
        kept: npt.NDArray[np.float64] = np.load(path, allow_pickle=False)
        return kept
    found = _second_moment(embeddings)
    if not settings.dry_run:
        with atomic_file(path, shared=True) as file:  # two runs may keep it at once
            np.save(file, found, allow_pickle=False)
    return found


def _second_moment(embeddings: Embeddings) -> npt.NDArray[np.float64]:
    sides = [embeddings.rows(kind) for kind in (Kind.IMAGES, Kind.TEXTS) if kind in embeddings.kinds]
    stride = -(-embeddings.num_rows // _AXES_ROWS)
    # Rows of another tool that are not finite are left out of training, and here.
    blocks = (np.nan_to_num(block[::stride], posinf=0, neginf=0) for side in sides for _, block in side.blocks())
    return second_moment(blocks, embeddings.width)


@dataclasses.dataclass(frozen=True)
class StoredTeacher(Teacher):
    """The teacher's part of every batch, from stored embeddings.

    Attributes:
        rows: Embeddings of what is shown, by kind.
        embedding_rows: Row of the embeddings of each sample to train on, [N], mapped.
        extra_texts: Embeddings of further texts; None without any.
        caption_rows: First row of each sample's captions after the first, [N], mapped; None where only the first are shown.
    """

    rows: Mapping[Kind, Rows]
    extra_texts: Rows | None
    embedding_rows: Column
    caption_rows: Column | None

    def prepare(self, local: TrainingBatch, rows: npt.NDArray[np.int64], step: int) -> Targets:
        """Read the rows of the views and captions that this process shows."""
        own = local.rows.numpy()
        embedded = self.embedding_rows[own].astype(np.int64)
        images = take_images(self.rows, embedded, local.views.numpy())
        texts = None
        if Kind.TEXTS in self.rows:
            further = np.zeros_like(own) if self.caption_rows is None else self.caption_rows[own].astype(np.int64)
            found = take_captions(self.rows, embedded, local.captions.numpy(), further, local.variants.numpy())
            texts = to_device(torch.from_numpy(found), self.device)
        extra = None
        if self.extra_texts is not None:
            extra = to_device(torch.from_numpy(self.extra_texts.take(local.extra_rows.numpy())), self.device)
        return dataclasses.replace(
            super().prepare(local, rows, step),
            image_bD=to_device(torch.from_numpy(images), self.device),
            text_bD=texts,
            extra_text_eD=extra,
        )

    def teacher_rows(self, local: TrainingBatch, targets: Targets) -> tuple[Tensor, Tensor | None]:
        """Gather everybody's rows as they are stored, and project them."""
        assert targets.image_bD is not None, "a stored teacher prepares it"
        image, text = targets.image_bD, targets.text_bD
        return self._project(image), None if text is None else self._project(text)

    def _project(self, rows_bD: Tensor) -> Tensor:
        return project(gather_rows(rows_bD, self.size).float(), self.space.axes)


def open_stored_teacher(
    settings: DistillSettings, teacher_inputs: TeacherInputs, student_width: int, machine: Machine, reporter: Reporter
) -> StoredTeacher:
    """Make stored embeddings ready to teach."""
    embeddings = teacher_inputs.embeddings
    assert embeddings is not None, "only an online teacher may have none"
    space = choose_space(settings, embeddings.width, embeddings, student_width, machine, reporter)
    shown = {
        Kind.IMAGES: True,
        Kind.VIEWS: teacher_inputs.num_views > 0,
        Kind.TEXTS: embeddings.has_texts,
        Kind.FURTHER: embeddings.has_texts and teacher_inputs.all_captions,
        Kind.VARIANTS: embeddings.has_texts and teacher_inputs.text_variants is not None,
    }
    reads_scale = any(LOSSES[name].needs_teacher_scale for name in settings.losses())
    return StoredTeacher(
        space=space,
        teacher_scale=teacher_scale(embeddings.sidecar, reporter) if reads_scale else MAX_SCALE,
        clusters=open_lookup(teacher_inputs, space.axes, settings, machine.device),
        device=machine.device,
        size=machine.size,
        rows={kind: embeddings.rows(kind) for kind, is_shown in shown.items() if is_shown},
        extra_texts=None if teacher_inputs.extra_texts is None else teacher_inputs.extra_texts.rows,
        embedding_rows=teacher_inputs.samples.column("embeddings"),
        caption_rows=teacher_inputs.samples.column("captions") if teacher_inputs.all_captions else None,
    )


def teacher_scale(sidecar: EmbedSidecar | None, reporter: Reporter) -> float:
    """Return exp(logit_scale) of the teacher as `embed` recorded it."""
    if sidecar is not None and sidecar.model.logit_scale is not None:
        return float(sidecar.model.logit_scale)
    reporter.note(f"The embeddings do not record the teacher's logit scale; using {MAX_SCALE:g}.")
    return MAX_SCALE
