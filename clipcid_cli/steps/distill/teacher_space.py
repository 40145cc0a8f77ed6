"""Where student and teacher of different widths meet, and what every kind of teacher adds to a batch there."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.losses.batch import LossBatch
from clipcid_cli.algorithms.losses.shared_space import PrincipalAxes, principal_axes
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.distill.batches import TrainingBatch
from clipcid_cli.steps.distill.cluster_targets import ClusterLookup
from clipcid_cli.steps.reporting import Reporter

# Cut to the student's width only where that keeps at least this share of the teacher's variance.
ENOUGH_VARIANCE = 0.98
# Principal axes are found from at most this many evenly spaced rows of each tower.
_ROTATION_ROWS = 2**20


@dataclasses.dataclass(frozen=True)
class Space:
    """Where student and teacher meet.

    Attributes:
        kind: ``same`` (equal widths, as they are), ``pca`` (the teacher's rows rotated and cut) or ``project``
            (the student's features through a learned layer).
        axes: The axes of ``pca``, else None.
    """

    kind: str
    axes: PrincipalAxes | None
    width: int


def choose_space(
    requested: str,
    teacher_width: int,
    embeddings: Embeddings | None,
    student_width: int,
    machine: Machine,
    reporter: Reporter,
) -> Space:
    """Decide where student and teacher meet.

    Args:
        requested: ``auto``, ``pca`` or ``project``.
        teacher_width: Width of the teacher's rows.
        embeddings: Stored ones, in which the axes of ``pca`` are found; None where there are none.
        machine: The processes; all take the first one's axes.

    Returns:
        ``same`` for equal widths unless a layer is asked for; else as requested, but ``pca`` cannot
        widen: a student wider than its teacher takes ``project``, and so does one whose teacher left no embeddings.
    """
    by_layer = f"Student and teacher meet in the teacher's {teacher_width} dimensions, by a learned layer per tower."
    if requested == "project" or student_width > teacher_width:
        reporter.note(by_layer)
        return Space("project", None, teacher_width)
    if student_width == teacher_width:
        return Space("same", None, teacher_width)
    if embeddings is None:
        reporter.note(
            f"{by_layer} There are no stored embeddings of it to find the axes of --teacher-space pca in (clipcid embed)."
        )
        return Space("project", None, teacher_width)
    axes = machine.on_main(lambda: principal_axes(second_moment(embeddings), student_width))
    share = f"{student_width} of the teacher's {teacher_width} dimensions keep {axes.kept:.1%} of its variance"
    if requested == "auto" and axes.kept < ENOUGH_VARIANCE:
        reporter.note(
            f"Only {share}: a learned layer per tower leads to all of them (--teacher-space pca cuts anyway)."
        )
        return Space("project", None, teacher_width)
    reporter.note(f"Student and teacher meet in {share}.")
    return Space("pca", axes, student_width)


def second_moment(embeddings: Embeddings) -> npt.NDArray[np.float64]:
    """Sum xᵀx over image rows and text rows (where there are any), evenly spaced ones of many; float64 [D, D]."""
    total = np.zeros((embeddings.width, embeddings.width))
    stride = -(-embeddings.num_rows // _ROTATION_ROWS)
    for rows in (embeddings.images(), *([embeddings.texts()] if embeddings.has_texts else [])):
        for _, block in rows.blocks():
            values = block[::stride].astype(np.float64)
            total += values.T @ values
    return total


@dataclasses.dataclass(frozen=True)
class Teacher(ABC):
    """The teacher's side of every batch.

    Attributes:
        space: Where student and teacher meet.
        clusters: Clusters; None when no loss asks.
        device: Where the losses are computed.
    """

    space: Space
    teacher_scale: float
    clusters: ClusterLookup | None
    device: torch.device
    size: int

    @property
    def width(self) -> int:
        """Dimensions of the meeting space."""
        return self.space.width

    @property
    def is_projected(self) -> bool:
        """Whether the student reaches the meeting space by a learned layer."""
        return self.space.kind == "project"

    @abstractmethod
    def add_targets(self, batch: LossBatch, seen: TrainingBatch, step: int) -> LossBatch:
        """Add the teacher's side to a global batch; call it on every process.

        Args:
            seen: This process's part, as a worker made it.
        """

    def add_clusters(self, batch: LossBatch, rows: npt.NDArray[np.int64], step: int) -> LossBatch:
        """Add the teacher's scale and the clusters of samples: of the images, whatever view is shown, and first captions.

        Args:
            batch: A global batch.
            rows: Rows of its samples among the usable ones, int64 [B].
            step: Number of the step; decides the draw of centroids.
        """
        images, texts = (None, None) if self.clusters is None else self.clusters.targets(rows, step)
        return dataclasses.replace(batch, teacher_scale=self.teacher_scale, image_clusters=images, text_clusters=texts)
