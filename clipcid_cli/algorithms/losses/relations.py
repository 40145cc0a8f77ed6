"""Losses on in-batch similarities: the student's B × B logits follow the teacher's."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import LossBatch
from clipcid_cli.algorithms.losses.row_blocks import Similarities, sum_both_ways

# MobileCLIP and TinyCLIP sharpen the teacher's similarities with the largest scale CLIP training reaches.
AFFINITY_SCALE = 100.0


def relation_divergence(batch: LossBatch) -> Tensor:
    """`crd` = ½[KL(teacher ‖ student) of image→text + of text→image] on in-batch logits, temperature 1.

    Both sides use their own logit scale; the scale is exponentiated on both (the published code forgets it on one). At
    least 0, in nats.

    Source: Yang et al. 2024 (CLIP-KD, arXiv 2307.12732), contrastive relational distillation.
    """
    assert batch.teacher_scale is not None
    return _compare(batch, batch.teacher_scale, _divergence)


def affinity(batch: LossBatch) -> Tensor:
    """½ of the cross-entropies, image→text and text→image, from the teacher's in-batch softmax to the student's.

    In nats; its floor is the entropy of the teacher's softmax.

    Source: Vasu et al. 2024 (MobileCLIP, arXiv 2311.17049), eq. 1–2, up to its constant entropy; Wu et al. 2023
    (TinyCLIP, arXiv 2309.12314), affinity mimicking.
    """
    return _compare(batch, AFFINITY_SCALE, _soft_cross_entropy)


def vertical_relation(batch: LossBatch, scale: Tensor) -> Tensor:
    """`vrd`: as an image's student row lies among the teacher's images, so its caption's should among the captions.

    With I = σ·t s'ᵀ (images) and V = σ·u v'ᵀ (captions, a fixed target), softmax over rows: ½[KL(V ‖ I) + KL(Vᵀ ‖ Iᵀ)] +
    CE(t ↔ s'; σ) + CE(u ↔ v'; σ). The cross-entropies train the captions and keep σ from falling until all rows are flat.

    σ is this loss's own, the same for images and captions; the published code learns one for each and forgets to
    exponentiate them. At least 0, in nats.

    Source: Chung et al. 2026 (CLIP-RD, arXiv 2603.25383), vertical relational distillation; the one scale is ours,
    docs/method.md#losses-of-other-papers.
    """
    image, text = batch.student_in_teacher_space()
    teacher_image, teacher_text = batch.teacher()
    total = sum_both_ways(
        _vertical, batch.own, Similarities(teacher_image, image, scale), Similarities(teacher_text, text, scale)
    )
    return total / (2 * len(batch))


def cross_relation(batch: LossBatch) -> Tensor:
    """`xrd`: teacher image against student caption, and teacher caption against student image, agree.

    With P = σ·t v'ᵀ and Q = σ·u s'ᵀ, softmax over rows, ‾ marking a fixed target: ¼[KL(Q‾ ‖ P) + KL(P‾ ‖ Q) + the same of
    Pᵀ and Qᵀ, whose rows are the student's].

    σ is the student's own scale, as a constant: learned here it would fall until all rows are flat and the loss is 0
    (the published code shares the one of `icl`, and forgets to exponentiate it). At least 0, in nats.

    Source: Chung et al. 2026 (CLIP-RD, arXiv 2603.25383), cross relational distillation; σ is ours,
    docs/method.md#losses-of-other-papers.
    """
    image, text = batch.student_in_teacher_space()
    teacher_image, teacher_text = batch.teacher()
    scale = batch.student_scale.detach()
    total = sum_both_ways(
        _each_other, batch.own, Similarities(teacher_image, text, scale), Similarities(teacher_text, image, scale)
    )
    return total / (4 * len(batch))


def _compare(batch: LossBatch, teacher_scale: float, block_sum: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """Mean of both directions of `block_sum(first, student logits, teacher logits)`, over all queries."""
    image, text = batch.teacher()
    total = sum_both_ways(
        block_sum,
        batch.own,
        Similarities(batch.image_Bd, batch.text_Bd, batch.student_scale),
        Similarities(image, text, teacher_scale),
    )
    return total / (2 * len(batch))


def _divergence(first: int, student_bB: Tensor, teacher_bB: Tensor) -> Tensor:
    """Sum over rows of KL(softmax(teacher) ‖ softmax(student))."""
    return F.kl_div(student_bB.log_softmax(dim=1), teacher_bB.log_softmax(dim=1), reduction="sum", log_target=True)


def _soft_cross_entropy(first: int, student_bB: Tensor, teacher_bB: Tensor) -> Tensor:
    """Sum over rows of −Σ softmax(teacher)·log softmax(student)."""
    return F.cross_entropy(student_bB, teacher_bB.softmax(dim=1), reduction="sum")


def _vertical(first: int, image_bB: Tensor, text_bB: Tensor) -> Tensor:
    """Sum over rows r of KL(constant text ‖ image) − log image[first + r] − log text[first + r], after softmax."""
    image, text = image_bB.log_softmax(dim=1), text_bB.log_softmax(dim=1)
    divergence = F.kl_div(image, text.detach(), reduction="sum", log_target=True)
    return divergence - image.diagonal(first).sum() - text.diagonal(first).sum()


def _each_other(first: int, left_bB: Tensor, right_bB: Tensor) -> Tensor:
    """Sum over rows of KL(constant right ‖ left) + KL(constant left ‖ right), after softmax."""
    left, right = left_bB.log_softmax(dim=1), right_bB.log_softmax(dim=1)
    return F.kl_div(left, right.detach(), reduction="sum", log_target=True) + F.kl_div(
        right, left.detach(), reduction="sum", log_target=True
    )
