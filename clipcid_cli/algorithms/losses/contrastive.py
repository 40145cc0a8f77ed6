"""Contrastive losses: the matching row of the other side is told from all other rows of the global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import LossBatch, Similarities, add, sum_both_ways, sum_one_way


def contrast_both_ways(left_BD: Tensor, right_BD: Tensor, scale: Tensor, own: slice = slice(None)) -> Tensor:
    """2B times CE(A ↔ B; σ) of docs/method.md#notation, InfoNCE: each row of both sides picks its own among the other's.

    Args:
        left_BD: Unit rows.
        right_BD: Unit rows; row i belongs to left row i.
        scale: Logit scale σ (not its logarithm), a scalar.
        own: The queries of this process.

    Returns:
        Sum of the cross-entropies of the own queries, in nats, a scalar; log B each for uninformative features.

    Source: Radford et al. 2021 (CLIP, arXiv 2103.00020), figure 3; van den Oord et al. 2018 (arXiv 1807.03748), eq. 4.
    """
    return sum_both_ways(matching_cross_entropy, own, Similarities(left_BD, right_BD, scale))


def matching_cross_entropy(first: int, logits_bB: Tensor) -> Tensor:
    """Sum over rows r of −log softmax(row)[first + r], a scalar."""
    matching = torch.arange(first, first + len(logits_bB), device=logits_bB.device)
    return F.cross_entropy(logits_bB, matching, reduction="sum")


def clip(batch: LossBatch) -> Tensor:
    """L_clip = CE(s ↔ v; σ), the student's own image-text loss.

    Source: Radford et al. 2021 (arXiv 2103.00020).
    """
    total = contrast_both_ways(batch.image_Bd, batch.text_Bd, batch.student_scale, batch.own)
    return total / (2 * len(batch))


def siglip(batch: LossBatch) -> Tensor:
    """−1/B Σ_i Σ_j log σ(z_ij·(scale·s_i·v_j + bias)), z = 1 where i = j, else −1: each pair alone is told matching or not.

    Scale and bias are the student's own.

    Source: Zhai et al. 2023 (SigLIP, arXiv 2303.15343), eq. 1.
    """

    def block_sum(first: int, logits_bB: Tensor) -> Tensor:
        pairs_bB = logits_bB + batch.bias()
        # −log σ(−x) is softplus(x), and −log σ(x) is that less x.
        return F.softplus(pairs_bB).sum() - pairs_bB.diagonal(first).sum()

    compared = Similarities(batch.image_Bd, batch.text_Bd, batch.student_scale)
    return sum_one_way(block_sum, batch.own, compared) / len(batch)


def instance(batch: LossBatch, scale: Tensor) -> Tensor:
    """L_ins = ½[CE(s' ↔ u) + CE(v' ↔ t)]: each student tower against the teacher's other tower.

    The idea is the CLIP-CID paper's; this form is our reconstruction (CLIP-KD's `icl` made symmetric). A teacher with one
    tower leaves the one half it can serve, at full weight.

    Source: CLIP-CID, arXiv 2408.09441 (idea); reconstruction, docs/method.md#instance-loss.
    """
    sums = [contrast_both_ways(student, teacher, scale, batch.own) for student, teacher in batch.cross_tower_pairs()]
    return add(sums) / (2 * len(sums) * len(batch))


def instance_intra(batch: LossBatch, scale: Tensor) -> Tensor:
    """½[CE(s' ↔ t) + CE(v' ↔ u)]: each student tower against the same tower of the teacher, or the available one.

    Source: variant of `instance`, docs/method.md#instance-loss.
    """
    sums = [contrast_both_ways(student, teacher, scale, batch.own) for student, teacher in batch.same_tower_pairs()]
    return add(sums) / (2 * len(sums) * len(batch))


def interactive(batch: LossBatch, scale: Tensor) -> Tensor:
    """`icl` = ½[CE(s' → u) + CE(v' → t)]: the student anchors the comparison, the teacher's rows are the choices.

    A teacher with one tower leaves the one half it can serve, at full weight. The scale starts at 1/0.07 = 14.3; in the
    published code at ln(1/0.07) = 2.66, which is used without exponentiating it.

    Source: Yang et al. 2024 (CLIP-KD, arXiv 2307.12732), interactive contrastive learning.
    """
    sums = [
        sum_one_way(matching_cross_entropy, batch.own, Similarities(student, teacher, scale))
        for student, teacher in batch.cross_tower_pairs()
    ]
    return add(sums) / (len(sums) * len(batch))


def fused(batch: LossBatch, scale: Tensor, fusion: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
    """`afd` = CE(F_I[s; t] ↔ F_T[v; u]; σ): the contrastive loss of student and teacher joined by a linear layer each.

    The layers can learn to pass the student over, whose features then learn nothing: watch the student's own retrieval, not
    this loss.

    Args:
        scale: Starts at 1/0.07 = 14.3; in the published code at ln(1/0.07) = 2.66, which is used without exponentiating it.
        fusion: F_I and F_T, [B, d + D] → [B, d].

    Source: Yang et al. 2024 (CLIP-KD, arXiv 2307.12732), augmented feature distillation.
    """
    sides = zip((batch.image_Bd, batch.text_Bd), batch.teacher(), fusion, strict=True)
    image, text = (F.normalize(fuse(torch.cat([student, teacher], dim=1)), dim=1) for student, teacher, fuse in sides)
    return contrast_both_ways(image, text, scale, batch.own) / (2 * len(batch))
