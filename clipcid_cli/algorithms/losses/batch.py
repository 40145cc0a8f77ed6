"""What a loss is computed from: the features of one global batch, and which of its rows are this process's own.

Shape legend: B global batch, b own rows, E texts without images, d student width, D width of the shared space, L patches or
tokens, S candidate centroids, m stored clusters a sample.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class ClusterTargets:
    """Candidate centroids of one batch, and the teacher's distribution over them.

    Attributes:
        centroids_SD: Candidate centroids, unit rows, float32.
        log_correction_S: What is added to each candidate's logit so that the drawn ones represent all centroids that are
            not active: 0 for active candidates, log((K − |A|) / |R|) for drawn ones; float32.
        positions_Bm: Row of `centroids_SD` of each stored cluster of each sample, nearest first, int64; all are active.
        weights_Bm: Target distribution over them, rows sum to 1, float32.
    """

    centroids_SD: Tensor
    log_correction_S: Tensor
    positions_Bm: Tensor
    weights_Bm: Tensor


@dataclasses.dataclass(frozen=True)
class LossBatch:
    """Features of one global batch; all rows are of unit length, row i of each belongs to sample i.

    What no loss of the run needs is None; so are features and clusters of a tower that the teacher lacks.

    Every loss returns its **share**: the sum over the own rows as queries, divided by B. The shares of all processes add up
    to the loss of the global batch; with all rows the share is that loss. Own rows are compared with all rows.

    Attributes:
        student_scale: exp(logit_scale) of the student.
        image_BD: Student image features s' in the shared space; `image_Bd` itself when no map is learned.
        text_BD: Student text features v' there.
        teacher_image_BD: Teacher image features t, in the shared space (on the principal axes for ``--teacher-space pca``).
        teacher_text_BD: Teacher text features u, likewise.
        teacher_scale: exp(logit_scale) of the teacher.
        text_clusters: Those of the captions, with the same candidates; present for ``--cluster-towers both``.
        masked_image_BD: Student image features there of a pass that saw few patches of each image.
        image_tokens_bLD: Student features there of the patches of the own rows' images, or 0 where there is none.
        text_tokens_bLD: Those of the tokens of the own rows' captions, likewise.
        extra_text_ED: Student features v' of texts without images: this process's own, all where `own` is all.
        teacher_extra_text_ED: The teacher's features u of the same texts.
        num_extra: Texts without images in the global batch.
        own: The rows whose queries this process takes, step 1; all by default.
    """

    image_Bd: Tensor
    text_Bd: Tensor
    student_scale: Tensor
    image_BD: Tensor | None = None
    text_BD: Tensor | None = None
    teacher_image_BD: Tensor | None = None
    teacher_text_BD: Tensor | None = None
    teacher_scale: float | None = None
    image_clusters: ClusterTargets | None = None
    text_clusters: ClusterTargets | None = None
    masked_image_BD: Tensor | None = None
    image_tokens_bLD: Tensor | None = None
    text_tokens_bLD: Tensor | None = None
    extra_text_ED: Tensor | None = None
    teacher_extra_text_ED: Tensor | None = None
    num_extra: int = 0
    own: slice = dataclasses.field(default_factory=lambda: slice(None))

    def __len__(self) -> int:
        """Return B."""
        return len(self.image_Bd)

    def student_in_teacher_space(self) -> tuple[Tensor, Tensor]:
        """Return s' and v', [B, D] each."""
        assert self.image_BD is not None
        assert self.text_BD is not None
        return self.image_BD, self.text_BD

    def teacher(self) -> tuple[Tensor, Tensor]:
        """Return t and u, [B, D] each, of a teacher with both towers."""
        assert self.teacher_image_BD is not None
        assert self.teacher_text_BD is not None
        return self.teacher_image_BD, self.teacher_text_BD

    def same_tower_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return (s', t) and (v', u), without the pair whose teacher tower is missing."""
        image, text = self.student_in_teacher_space()
        pairs = ((image, self.teacher_image_BD), (text, self.teacher_text_BD))
        return [(student, teacher) for student, teacher in pairs if teacher is not None]

    def cross_tower_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return (s', u) and (v', t), without the pair whose teacher tower is missing."""
        image, text = self.student_in_teacher_space()
        pairs = ((image, self.teacher_text_BD), (text, self.teacher_image_BD))
        return [(student, teacher) for student, teacher in pairs if teacher is not None]
