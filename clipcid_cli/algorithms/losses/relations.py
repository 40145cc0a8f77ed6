"""Losses on in-batch similarities: the student's B × B logits follow the teacher's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import LossBatch

# MobileCLIP and TinyCLIP sharpen the teacher's similarities with the largest scale CLIP training reaches.
AFFINITY_SCALE = 100.0


def relation_divergence(batch: LossBatch) -> Tensor:
    """`crd` = ½[KL(teacher ‖ student) of image→text + of text→image] on in-batch logits, temperature 1.

    Both sides use their own logit scale; the scale is exponentiated on both (the published code forgets it on one).

    Returns:
        A scalar ≥ 0, in nats, mean over the batch.

    Source: Yang et al. 2024 (CLIP-KD, arXiv 2307.12732), contrastive relational distillation.
    """
    student = batch.student_scale * (batch.image_Bd @ batch.text_Bd.T)
    teacher = batch.teacher_logits()
    return 0.5 * (_divergence(student, teacher) + _divergence(student.T, teacher.T))


def affinity(batch: LossBatch) -> Tensor:
    """½ of the cross-entropies, image→text and text→image, from the teacher's in-batch softmax to the student's.

    Returns:
        A scalar, in nats, mean over the batch; its floor is the entropy of the teacher's softmax.

    Source: Vasu et al. 2024 (MobileCLIP, arXiv 2311.17049), eq. 1–2, up to its constant entropy; Wu et al. 2023
    (TinyCLIP, arXiv 2309.12314), affinity mimicking.
    """
    student = batch.student_scale * (batch.image_Bd @ batch.text_Bd.T)
    teacher = batch.teacher_logits(AFFINITY_SCALE)
    return 0.5 * (_soft_cross_entropy(student, teacher) + _soft_cross_entropy(student.T, teacher.T))


def _divergence(student_BB: Tensor, teacher_BB: Tensor) -> Tensor:
    """KL(softmax(teacher) ‖ softmax(student)), mean over rows."""
    return F.kl_div(
        student_BB.log_softmax(dim=1), teacher_BB.log_softmax(dim=1), reduction="batchmean", log_target=True
    )


def _soft_cross_entropy(student_BB: Tensor, teacher_BB: Tensor) -> Tensor:
    """−Σ softmax(teacher)·log softmax(student), mean over rows."""
    return F.cross_entropy(student_BB, teacher_BB.softmax(dim=1))
