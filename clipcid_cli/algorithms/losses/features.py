"""Losses on single features: student and teacher of the same sample, no other sample involved."""

from __future__ import annotations

from torch import Tensor

from clipcid_cli.algorithms.losses.batch import LossBatch


def feature_distance(batch: LossBatch) -> Tensor:
    """`fd` = mean over the batch of |s' − t|² + |v' − u|², summed over the width.

    Returns:
        A scalar in [0, 8]: unit rows are at most 2 apart.

    Source: Yang et al. 2024 (CLIP-KD, arXiv 2307.12732), feature distillation. Their code averages over the width and
    multiplies by 2000; a sum does not depend on the width, so the preset divides 2000 by it.
    """
    image, text = batch.student_in_teacher_space()
    teacher_image, teacher_text = batch.teacher()
    distances = (image - teacher_image).square().sum(dim=1) + (text - teacher_text).square().sum(dim=1)
    return distances.mean()
