"""What the teacher said of each sample: embeddings and clusters, brought into the space where the student meets them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import LossBatch
from clipcid_cli.algorithms.meeting_space import Rotation, bring, principal_rotation
from clipcid_cli.formats.embedding_rows import Rows
from clipcid_cli.formats.embeddings import Embeddings
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.cluster_lookup import ClusterLookup, open_lookup
from clipcid_cli.steps.distill_inputs import Teaching
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings

# Cut to the student's width only where that keeps at least this share of the teacher's variance.
ENOUGH_VARIANCE = 0.98
# Principal axes are found from at most this many evenly spaced rows of each tower.
_ROTATION_ROWS = 2**20
# The scale CLIP training ends at; taken where another tool's embeddings do not say.
MAX_SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class Space:
    """Where student and teacher meet.

    Attributes:
        kind: ``same`` (equal widths, as they are), ``pca`` (the teacher's rows rotated and cut) or ``project``
            (the student's features through a learned layer).
        rotation: The axes of ``pca``, else None.
        width: Dimensions of the space.
    """

    kind: str
    rotation: Rotation | None
    width: int


def choose_space(
    requested: str, embeddings: Embeddings, student_width: int, machine: Machine, reporter: Reporter
) -> Space:
    """Decide where student and teacher meet.

    Args:
        requested: ``auto``, ``pca`` or ``project``.
        embeddings: The teacher's.
        student_width: d.
        machine: The processes; all take the first one's axes.
        reporter: Told what was chosen.

    Returns:
        ``same`` for equal widths unless a layer is asked for; else as requested, but ``pca`` cannot
        widen: a student wider than its teacher takes ``project``.
    """
    teacher_width = embeddings.width
    if requested == "project" or student_width > teacher_width:
        reporter.note(
            f"Student and teacher meet in the teacher's {teacher_width} dimensions, by a learned layer per tower."
        )
        return Space("project", None, teacher_width)
    if student_width == teacher_width:
        return Space("same", None, teacher_width)
    rotation = machine.on_main(lambda: principal_rotation(second_moment(embeddings), student_width))
    share = f"{student_width} of the teacher's {teacher_width} dimensions keep {rotation.kept:.1%} of its variance"
    if requested == "auto" and rotation.kept < ENOUGH_VARIANCE:
        reporter.note(
            f"Only {share}: a learned layer per tower leads to all of them (--teacher-space pca cuts anyway)."
        )
        return Space("project", None, teacher_width)
    reporter.note(f"Student and teacher meet in {share}.")
    return Space("pca", rotation, student_width)


def second_moment(embeddings: Embeddings) -> npt.NDArray[np.float64]:
    """Sum xᵀx over image rows and text rows, evenly spaced ones where there are many; float64 [D, D]."""
    total = np.zeros((embeddings.width, embeddings.width))
    stride = -(-embeddings.num_rows // _ROTATION_ROWS)
    for rows in (embeddings.images(), embeddings.texts()):
        for _, block in rows.blocks():
            values = block[::stride].astype(np.float64)
            total += values.T @ values
    return total


@dataclasses.dataclass(frozen=True)
class TeacherTargets:
    """The teacher's side of every batch.

    Attributes:
        images: Image embeddings, mapped from their files.
        texts: Text embeddings.
        places: Row of the embeddings of each usable sample, int64; −1 where there is none.
        space: Where student and teacher meet.
        teacher_scale: exp(logit_scale) of the teacher.
        clusters: Clusters; None when no loss asks.
        device: Where the losses are computed.
    """

    images: Rows
    texts: Rows
    places: npt.NDArray[np.int64]
    space: Space
    teacher_scale: float
    clusters: ClusterLookup | None
    device: torch.device

    @property
    def width(self) -> int:
        """Dimensions of the meeting space."""
        return self.space.width

    @property
    def is_projected(self) -> bool:
        """Whether the student reaches the meeting space by a learned layer."""
        return self.space.kind == "project"

    def add_to(self, batch: LossBatch, rows: Tensor, step: int) -> LossBatch:
        """Add the teacher's side to a batch.

        Args:
            batch: The student's side.
            rows: Rows of the global batch among the usable samples, int64 [B].
            step: Number of the step.
        """
        own = rows.cpu().numpy()
        places = self.places[own]
        images, texts = None, None
        if self.clusters is not None:
            images, texts = self.clusters.targets(own, step)
        return dataclasses.replace(
            batch,
            teacher_image_BD=self._bring(self.images.take(places)),
            teacher_text_BD=self._bring(self.texts.take(places)),
            teacher_scale=self.teacher_scale,
            image_clusters=images,
            text_clusters=texts,
        )

    def _bring(self, rows: npt.NDArray[np.float16]) -> Tensor:
        return bring(torch.from_numpy(rows).to(self.device).float(), self.space.rotation)


def open_targets(
    settings: DistillSettings,
    teaching: Teaching,
    student_width: int,
    machine: Machine,
    reporter: Reporter,
) -> TeacherTargets:
    """Bring what the teacher left into the meeting space, as far as it is done once."""
    embeddings, clusters = teaching.embeddings, teaching.clusters
    space = choose_space(settings.teacher_space, embeddings, student_width, machine, reporter)
    lookup = None
    if clusters is not None and teaching.cluster_places is not None:
        lookup = open_lookup(clusters, teaching.cluster_places, space.rotation, settings, machine.device)
    scale = teacher_scale(embeddings.sidecar, reporter) if "crd" in settings.losses() else MAX_SCALE
    return TeacherTargets(
        embeddings.images(), embeddings.texts(), teaching.places, space, scale, lookup, machine.device
    )


def teacher_scale(sidecar: dict[str, Any] | None, reporter: Reporter) -> float:
    """Return exp(logit_scale) of the teacher as `embed` recorded it."""
    if sidecar is not None and "logit_scale" in sidecar["model"]:
        return float(sidecar["model"]["logit_scale"])
    reporter.note(f"The embeddings do not say the teacher's logit scale; taking {MAX_SCALE:g}.")
    return MAX_SCALE
