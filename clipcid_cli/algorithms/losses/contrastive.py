"""Contrastive losses: matching rows of two sides are told from all other rows of the global batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import LossBatch


def info_nce(queries_BD: Tensor, keys_BD: Tensor, scale: Tensor) -> Tensor:
    """One direction of InfoNCE: each query picks its own row among the keys.

    Args:
        queries_BD: Unit rows [B, D].
        keys_BD: Unit rows [B, D]; row i belongs to query i.
        scale: Logit scale σ (not its logarithm), a scalar.

    Returns:
        Mean cross-entropy over the queries, in nats, a scalar; log B for features that say nothing.

    Source: van den Oord et al. 2018 (arXiv 1807.03748), eq. 4.
    """
    logits = scale * (queries_BD @ keys_BD.T)
    return F.cross_entropy(logits, torch.arange(len(queries_BD), device=queries_BD.device))


def symmetric_info_nce(left_BD: Tensor, right_BD: Tensor, scale: Tensor) -> Tensor:
    """CE(A ↔ B; σ) of METHOD: the mean of both directions of `info_nce`; the logits are computed once.

    Source: Radford et al. 2021 (CLIP, arXiv 2103.00020), figure 3.
    """
    logits = scale * (left_BD @ right_BD.T)
    own = torch.arange(len(left_BD), device=left_BD.device)
    return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))


def clip(batch: LossBatch) -> Tensor:
    """L_clip = CE(s ↔ v; σ), the student's own image-text loss.

    Source: Radford et al. 2021 (arXiv 2103.00020).
    """
    return symmetric_info_nce(batch.image_Bd, batch.text_Bd, batch.student_scale)


def instance(batch: LossBatch, scale: Tensor) -> Tensor:
    """L_ins = ½[CE(s' ↔ u) + CE(v' ↔ t)]: each student tower against the teacher's other tower.

    The idea is the CLIP-CID paper's; this form is our reconstruction (CLIP-KD's `icl` made symmetric).

    Args:
        batch: Features with teacher.
        scale: This loss's own σ.

    Source: CLIP-CID, arXiv 2408.09441 (idea); reconstruction, METHOD §3 [R].
    """
    image, text = batch.student_in_teacher_space()
    teacher_image, teacher_text = batch.teacher()
    return 0.5 * (symmetric_info_nce(image, teacher_text, scale) + symmetric_info_nce(text, teacher_image, scale))


def instance_intra(batch: LossBatch, scale: Tensor) -> Tensor:
    """½[CE(s' ↔ t) + CE(v' ↔ u)]: each student tower against the same tower of the teacher.

    Source: variant of `instance`, METHOD §3 [R].
    """
    image, text = batch.student_in_teacher_space()
    teacher_image, teacher_text = batch.teacher()
    return 0.5 * (symmetric_info_nce(image, teacher_image, scale) + symmetric_info_nce(text, teacher_text, scale))


def interactive(batch: LossBatch, scale: Tensor) -> Tensor:
    """`icl` = ½[CE(s' → u) + CE(v' → t)]: the student anchors the comparison, the teacher's rows are the choices.

    Source: Yang et al. 2024 (CLIP-KD, arXiv 2307.12732), interactive contrastive learning.
    """
    image, text = batch.student_in_teacher_space()
    teacher_image, teacher_text = batch.teacher()
    return 0.5 * (info_nce(image, teacher_text, scale) + info_nce(text, teacher_image, scale))
