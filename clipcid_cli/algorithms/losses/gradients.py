"""A loss on gradients: the student's features are pulled by a batch as the teacher's would be.

Shape legend: B global batch, b rows of a block, D width.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import LossBatch
from clipcid_cli.algorithms.losses.row_blocks import Similarities, add, over_blocks, rows_between


def gradient_distance(batch: LossBatch) -> Tensor:
    """`gd` = mean over the batch of |∇s'_i − ∇t_i|² + |∇v'_i − ∇u_i|², summed over the width.

    ∇ is the gradient by that row of B times CE(A ↔ B; σ), the contrastive loss: with P = softmax over the rows of
    σ·A Bᵀ and Q = softmax over its columns, ∇a_i = σ·Σ_j (½[P_ij + Q_ij] − 1[i = j])·b_j. Both sides take their own σ, the
    student's as a constant: learned here it would fall until no gradient is left, which is what a sure teacher has.

    Source: Yang et al. 2024 (CLIP-KD, arXiv 2307.12732), gradient distillation: its equation, of the whole contrastive loss,
    where the published code compares the two directions apart, divides by σ where it should multiply, and averages over
    batch² and width; the constant σ is ours, docs/method.md#losses-of-other-papers.
    """
    image, text = batch.student_in_teacher_space()
    assert batch.teacher_scale is not None
    student = _Contrast.of(Similarities(image, text, batch.student_scale.detach()))
    with torch.no_grad():
        teacher = _Contrast.of(Similarities(*batch.teacher(), batch.teacher_scale))
    first, stop, _ = batch.own.indices(len(batch))

    def distances(moving: _Contrast, fixed: _Contrast) -> list[Tensor]:
        def block(start: int, end: int) -> Tensor:
            with torch.no_grad():
                wanted_bD = fixed.gradients(start, end)
            return (moving.gradients(start, end) - wanted_bD).square().sum()

        return over_blocks(block, first, stop, len(batch), image.device)

    sums = distances(student, teacher) + distances(student.transposed(), teacher.transposed())
    return add(sums) / len(batch)


@dataclasses.dataclass(frozen=True)
class _Contrast:
    """A contrastive loss over a global batch, of which gradients are taken.

    Attributes:
        of_left_B: Logarithm of the softmax's denominator of each left row as query, over the right rows; [B].
        of_right_B: The same of each right row as query, over the left ones.
    """

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
        logits_bB, right_BD = self.similarities.rows(first, stop), self.similarities.right_BD
        as_query_bB = (logits_bB - rows_between(self.of_left_B, first, stop)[:, None]).exp()
        as_key_bB = (logits_bB - self.of_right_B).exp()
        pulled_bD = (as_query_bB + as_key_bB) / 2 @ right_BD - rows_between(right_BD, first, stop)
        return pulled_bD * self.similarities.scale
