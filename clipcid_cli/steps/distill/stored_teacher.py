"""What the teacher said of each sample when it was embedded, brought into the space where the student meets it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import LossBatch
from clipcid_cli.algorithms.losses.shared_space import project
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.runtime.gradients import gather_rows
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.distill.batches import TrainingBatch
from clipcid_cli.steps.distill.cluster_targets import open_lookup
from clipcid_cli.steps.distill.teacher_inputs import TeacherInputs
from clipcid_cli.steps.distill.teacher_space import Teacher, choose_space
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings

# The scale CLIP training ends at; taken where another tool's embeddings do not say.
MAX_SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class ImageRows:
    """The teacher's image embeddings: of the images themselves, or of the views that are shown.

    Attributes:
        rows: Mapped from their files: [N, D] of the images, or [N·V, D] of their views.
        num_views: V, 0 where they are of the images themselves.
    """

    rows: Rows
    num_views: int

    def take(self, places: npt.NDArray[np.int64], views: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        """Return the rows of B samples, float16 [B, D].

        Args:
            places: Their rows among the embeddings, int64 [B].
            views: Which view each shows, int64 [B].
        """
        return self.rows.take(places * self.num_views + views if self.num_views else places)


@dataclasses.dataclass(frozen=True)
class CaptionRows:
    """The teacher's embeddings of captions.

    Attributes:
        first: Of each sample's first caption, [N, D].
        further: Of the captions after the first, sample after sample; None where only the first are shown.
        starts: Where each sample's begin in `further`, int64 [N]; None likewise.
    """

    first: Rows
    further: Rows | None = None
    starts: npt.NDArray[np.int64] | None = None

    @classmethod
    def of(cls, embeddings: Embeddings, *, all_captions: bool) -> CaptionRows:
        """Map the rows of the first captions, or of all."""
        if not all_captions:
            return cls(embeddings.texts())
        further = embeddings.caption_counts - 1
        return cls(embeddings.texts(), embeddings.further_captions(), np.cumsum(further) - further)

    def take(self, places: npt.NDArray[np.int64], captions: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        """Return the rows of B samples, float16 [B, D].

        Args:
            places: Their rows among the embeddings, int64 [B].
            captions: Which caption each shows, int64 [B], 0 for the first.
        """
        rows = self.first.take(places)
        later = captions > 0
        if self.further is not None and self.starts is not None and later.any():
            rows[later] = self.further.take(self.starts[places[later]] + captions[later] - 1)
        return rows


@dataclasses.dataclass(frozen=True)
class StoredTeacher(Teacher):
    """The teacher's side of every batch, from stored embeddings.

    Attributes:
        texts: Text embeddings; None where the teacher has none.
        places: Row of the embeddings of each usable sample, int64; −1 where there is none.
    """

    images: ImageRows
    texts: CaptionRows | None
    places: npt.NDArray[np.int64]

    def add_targets(self, batch: LossBatch, seen: TrainingBatch, step: int) -> LossBatch:
        """Add the rows of the views and captions that are shown."""
        shown = torch.stack([seen.rows, seen.views, seen.captions], dim=1)
        rows, views, captions = gather_rows(shown.to(self.device), self.size).cpu().numpy().T
        places = self.places[rows]
        return dataclasses.replace(
            self.add_clusters(batch, rows, step),
            teacher_image_BD=self._project(self.images.take(places, views)),
            teacher_text_BD=None if self.texts is None else self._project(self.texts.take(places, captions)),
        )

    def _project(self, rows: npt.NDArray[np.float16]) -> Tensor:
        return project(torch.from_numpy(rows).to(self.device).float(), self.space.axes)


def open_stored_teacher(
    settings: DistillSettings, teacher_inputs: TeacherInputs, student_width: int, machine: Machine, reporter: Reporter
) -> StoredTeacher:
    """Bring what the teacher left into the meeting space, as far as it is done once."""
    embeddings = teacher_inputs.embeddings
    assert embeddings is not None, "only an online teacher may have none"
    space = choose_space(settings.teacher_space, embeddings.width, embeddings, student_width, machine, reporter)
    return StoredTeacher(
        space=space,
        teacher_scale=teacher_scale(embeddings.sidecar, reporter) if "crd" in settings.losses() else MAX_SCALE,
        clusters=open_lookup(teacher_inputs, space.axes, settings, machine.device),
        device=machine.device,
        size=machine.size,
        images=ImageRows(
            embeddings.views() if teacher_inputs.num_views else embeddings.images(), teacher_inputs.num_views
        ),
        texts=CaptionRows.of(embeddings, all_captions=teacher_inputs.all_captions) if embeddings.has_texts else None,
        places=teacher_inputs.places,
    )


def teacher_scale(sidecar: dict[str, Any] | None, reporter: Reporter) -> float:
    """Return exp(logit_scale) of the teacher as `embed` recorded it."""
    if sidecar is not None and "logit_scale" in sidecar["model"]:
        return float(sidecar["model"]["logit_scale"])
    reporter.note(f"The embeddings do not say the teacher's logit scale; taking {MAX_SCALE:g}.")
    return MAX_SCALE
