"""Losses on in-batch similarities: the student's B × B logits follow the teacher's."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import LossBatch
from clipcid_cli.algorithms.losses.row_blocks import sum_both_ways

# MobileCLIP and TinyCLIP sharpen the teacher's similarities with the largest scale CLIP training reaches.
AFFINITY_SCALE = 100.0


def relation_divergence(batch: LossBatch) -> Tensor:
    """`crd` = ½[KL(teacher ‖ student) of image→text + of text→image] on in-batch logits, temperature 1.

    Both sides use their own logit scale; the scale is exponentiated on both (the published code forgets it on one).

    Returns:
        This process's share, a scalar ≥ 0, in nats.

    Source: Yang et al. 2024 (CLIP-KD, arXiv 2307.12732), contrastive relational distillation.
    """
    assert batch.teacher_scale is not None
    return _compare(batch, batch.teacher_scale, _divergence)


def affinity(batch: LossBatch) -> Tensor:
    """½ of the cross-entropies, image→text and text→image, from the teacher's in-batch softmax to the student's.

    Returns:
        This process's share, a scalar, in nats; the floor of the whole is the entropy of the teacher's softmax.

    Source: Vasu et al. 2024 (MobileCLIP, arXiv 2311.17049), eq. 1–2, up to its constant entropy; Wu et al. 2023
    (TinyCLIP, arXiv 2309.12314), affinity mimicking.
    """
    return _compare(batch, AFFINITY_SCALE, _soft_cross_entropy)


def _compare(batch: LossBatch, teacher_scale: float, block_sum: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """Mean of both directions of `block_sum(first, student logits, teacher logits)`, over all queries."""
    image, text = batch.teacher()
    total = sum_both_ways(
        block_sum, batch.own, (batch.student_scale * batch.image_Bd, batch.text_Bd), (teacher_scale * image, text)
    )
    return total / (2 * len(batch))


def _divergence(first: int, student_bB: Tensor, teacher_bB: Tensor) -> Tensor:
    """Sum over rows of KL(softmax(teacher) ‖ softmax(student))."""
    return F.kl_div(student_bB.log_softmax(dim=1), teacher_bB.log_softmax(dim=1), reduction="sum", log_target=True)


def _soft_cross_entropy(first: int, student_bB: Tensor, teacher_bB: Tensor) -> Tensor:
    """Sum over rows of −Σ softmax(teacher)·log softmax(student)."""
    return F.cross_entropy(student_bB, teacher_bB.softmax(dim=1), reduction="sum")
