"""Contrastive losses: matching rows of two sides are told from all other rows of the global batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import LossBatch, mean_of_towers
from clipcid_cli.algorithms.losses.row_blocks import sum_both_ways, sum_one_way


def info_nce(queries_BD: Tensor, keys_BD: Tensor, scale: Tensor, own: slice = slice(None)) -> Tensor:
    """CE(A → B; σ) of METHOD, InfoNCE in one direction: each query picks its own row among the keys.

    Args:
        queries_BD: Unit rows [B, D].
        keys_BD: Unit rows [B, D]; row i belongs to query i.
        scale: Logit scale σ (not its logarithm), a scalar.
        own: The queries of this process.

    Returns:
        This process's share of the mean cross-entropy over all queries, in nats, a scalar; with all rows, log B for
        features that say nothing.

    Source: van den Oord et al. 2018 (arXiv 1807.03748), eq. 4.
    """
    # The scale goes to the B × D side: B × B is the larger.
    return sum_one_way(own_row_cross_entropy, own, (scale * queries_BD, keys_BD)) / len(queries_BD)


def symmetric_info_nce(left_BD: Tensor, right_BD: Tensor, scale: Tensor, own: slice = slice(None)) -> Tensor:
    """CE(A ↔ B; σ) of METHOD: the mean of both directions of `info_nce`.

    Source: Radford et al. 2021 (CLIP, arXiv 2103.00020), figure 3.
    """
    return sum_both_ways(own_row_cross_entropy, own, (scale * left_BD, right_BD)) / (2 * len(left_BD))


def own_row_cross_entropy(first: int, logits_bB: Tensor) -> Tensor:
    """Sum over rows r of −log softmax(row)[first + r], a scalar."""
    own = torch.arange(first, first + len(logits_bB), device=logits_bB.device)
    return F.cross_entropy(logits_bB, own, reduction="sum")


def clip(batch: LossBatch) -> Tensor:
    """L_clip = CE(s ↔ v; σ), the student's own image-text loss.

    Source: Radford et al. 2021 (arXiv 2103.00020).
    """
    return symmetric_info_nce(batch.image_Bd, batch.text_Bd, batch.student_scale, batch.own)


def instance(batch: LossBatch, scale: Tensor) -> Tensor:
    """L_ins = ½[CE(s' ↔ u) + CE(v' ↔ t)]: each student tower against the teacher's other tower.

    The idea is the CLIP-CID paper's; this form is our reconstruction (CLIP-KD's `icl` made symmetric). A teacher with one
    tower leaves the one half it can serve, at full weight.

    Args:
        batch: Features with teacher.
        scale: This loss's own σ.

    Source: CLIP-CID, arXiv 2408.09441 (idea); reconstruction, METHOD §3 [R].
    """
    return mean_of_towers([symmetric_info_nce(s, t, scale, batch.own) for s, t in batch.across_teacher()])


def instance_intra(batch: LossBatch, scale: Tensor) -> Tensor:
    """½[CE(s' ↔ t) + CE(v' ↔ u)]: each student tower against the same tower of the teacher, or the one that is there.

    Source: variant of `instance`, METHOD §3 [R].
    """
    return mean_of_towers([symmetric_info_nce(s, t, scale, batch.own) for s, t in batch.beside_teacher()])


def interactive(batch: LossBatch, scale: Tensor) -> Tensor:
    """`icl` = ½[CE(s' → u) + CE(v' → t)]: the student anchors the comparison, the teacher's rows are the choices.

    A teacher with one tower leaves the one half it can serve, at full weight.

    Source: Yang et al. 2024 (CLIP-KD, arXiv 2307.12732), interactive contrastive learning.
    """
    return mean_of_towers([info_nce(s, t, scale, batch.own) for s, t in batch.across_teacher()])
