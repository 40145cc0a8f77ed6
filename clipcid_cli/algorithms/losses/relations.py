"""Losses on in-batch similarities: the student's B × B logits follow the teacher's, or the gradients that they make.

Shape legend: B global batch, b rows of a block, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import LossBatch, Similarities, add, over_blocks, rows_between, sum_both_ways


def relation_divergence(batch: LossBatch) -> Tensor:
    """`crd` = ½[KL(teacher ‖ student) of image→text + of text→image] on in-batch logits, temperature 1.

    Both sides use their own logit scale, not its logarithm. At least 0, in nats.

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
    return _compare(batch, batch.affinity_scale, _soft_cross_entropy)


def sigmoid_relation(batch: LossBatch) -> Tensor:
    """`siglip-kd` = −1/B Σ_i Σ_j [q_ij log p_ij + (1 − q_ij) log(1 − p_ij)], p = σ(scale·s_i·v_j + bias) of the student.

    q_ij is the teacher's probability that image i and caption j match: the sigmoid of its logits where it has a bias, else
    the mean of their softmax over the captions and over the images. In nats; its floor is the entropy of q.

    Source: our own, docs/method.md#losses-of-other-papers; p is that of Zhai et al. 2023 (SigLIP, arXiv 2303.15343).
    """
    assert batch.teacher_scale is not None

    def block_sum(first: int, student_bB: Tensor, teacher_bB: Tensor) -> Tensor:
        bias = batch.teacher_bias
        target_bB = teacher_bB.softmax(dim=1) if bias is None else (teacher_bB + bias).sigmoid()
        return F.binary_cross_entropy_with_logits(student_bB + batch.bias(), target_bB, reduction="sum")

    return _compare(batch, batch.teacher_scale, block_sum)


def vertical_relation(batch: LossBatch, scale: Tensor) -> Tensor:
    """`vrd`: as an image's student row lies among the teacher's images, so its caption's should among the captions.

    With I = σ·t s'ᵀ (images) and V = σ·u v'ᵀ (captions, a fixed target), softmax over rows: ½[KL(V ‖ I) + KL(Vᵀ ‖ Iᵀ)] +
    CE(t ↔ s'; σ) + CE(u ↔ v'; σ). The cross-entropies train the captions and keep σ from falling until all rows are flat.

    σ is this loss's own, the same for images and captions; the published code learns one for each and forgets to
    exponentiate them. At least 0, in nats.

    Source: Chung et al. 2026 (CLIP-RD, arXiv 2603.25383), vertical relational distillation; the one scale is ours,
    docs/method.md#losses-of-other-papers.
    """
    teacher_image, teacher_text = batch.teacher()
    images = Similarities(teacher_image, batch.image_BD, scale)
    captions = Similarities(teacher_text, batch.text_BD, scale)
    total = sum_both_ways(_vertical, batch.own, images, captions)
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
    teacher_image, teacher_text = batch.teacher()
    scale = batch.student_scale.detach()
    to_captions = Similarities(teacher_image, batch.text_BD, scale)
    to_images = Similarities(teacher_text, batch.image_BD, scale)
    total = sum_both_ways(_each_other, batch.own, to_captions, to_images)
    return total / (4 * len(batch))


def gradient_distance(batch: LossBatch) -> Tensor:
    """`gd` = mean over the batch of |∇s'_i − ∇t_i|² + |∇v'_i − ∇u_i|², summed over the width.

    ∇ is the gradient by that row of B times CE(A ↔ B; σ), the contrastive loss: with P = softmax over the rows of
    σ·A Bᵀ and Q = softmax over its columns, ∇a_i = σ·Σ_j (½[P_ij + Q_ij] − 1[i = j])·b_j. Both sides take their own σ, the
    student's as a constant: learned here it would fall until no gradient is left, which is what a sure teacher has.

    Source: Yang et al. 2024 (CLIP-KD, arXiv 2307.12732), gradient distillation: its equation, of the whole contrastive loss,
    where the published code compares the two directions apart, divides by σ where it should multiply, and averages over
    batch² and width; the constant σ is ours, docs/method.md#losses-of-other-papers.
    """
    assert batch.teacher_scale is not None
    student = _Contrast.of(Similarities(batch.image_BD, batch.text_BD, batch.student_scale.detach()))
    with torch.no_grad():
        teacher = _Contrast.of(Similarities(*batch.teacher(), batch.teacher_scale))
    first, stop, _ = batch.own.indices(len(batch))

    def distances(moving: _Contrast, fixed: _Contrast) -> list[Tensor]:
        def block(start: int, end: int) -> Tensor:
            with torch.no_grad():
                wanted_bD = fixed.gradients(start, end)
            return (moving.gradients(start, end) - wanted_bD).square().sum()

        return over_blocks(block, first, stop, len(batch), batch.image_BD.device)

    sums = distances(student, teacher) + distances(student.transposed(), teacher.transposed())
    return add(sums) / len(batch)


def _compare(batch: LossBatch, teacher_scale: float, block_sum: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """Mean of both directions of `block_sum(first, student logits, teacher logits)`, over all queries."""
    student = Similarities(batch.image_Bd, batch.text_Bd, batch.student_scale)
    teacher = Similarities(*batch.teacher(), teacher_scale)
    total = sum_both_ways(block_sum, batch.own, student, teacher)
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


@dataclasses.dataclass(frozen=True)
class _Contrast:
    """A contrastive loss of which gradients are taken: its logits, and their logΣexp for each left and right row."""

    similarities: Similarities
    of_left_B: Tensor
    of_right_B: Tensor

    @classmethod
    def of(cls, similarities: Similarities) -> _Contrast:
        def normaliser(_: int, logits_bB: Tensor) -> Tensor:
            return logits_bB.logsumexp(dim=1)

        sides = (similarities, similarities.transposed())
        return cls(similarities, *(side.of_each_row(normaliser, 0, len(side.left_BD)) for side in sides))

    def transposed(self) -> _Contrast:
        return _Contrast(self.similarities.transposed(), self.of_right_B, self.of_left_B)

    def gradients(self, first: int, stop: int) -> Tensor:
        """Return the gradients by left rows first … stop − 1, [b, D]."""
        logits_bB = self.similarities.rows(first, stop)
        right_BD = self.similarities.right_BD
        as_query_bB = (logits_bB - rows_between(self.of_left_B, first, stop)[:, None]).exp()
        as_key_bB = (logits_bB - self.of_right_B).exp()
        pulled_bD = (as_query_bB + as_key_bB) / 2 @ right_BD - rows_between(right_BD, first, stop)
        return pulled_bD * self.similarities.scale
