"""Losses on single features: student and teacher of the same sample, pulled together.

Shape legend: B global batch, b own rows, L patches of an image or tokens of a caption, D width.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import LossBatch, Similarities, add, rows_between

# Share of a sample's patches or tokens that is taught, rounded up.
SELECTED = 0.25


def feature_distance(batch: LossBatch) -> Tensor:
    """`fd` = mean over images of |s' − t|² + mean over texts of |v' − u|², summed over the width.

    With a teacher of one tower one of the two summands remains, at its usual weight. Texts without images are texts like
    captions, and do not change the weight of the mean; where the teacher has no captions, the mean is over them alone. In
    [0, 8]: unit rows are at most 2 apart.

    Source: Yang et al. 2024 (CLIP-KD, arXiv 2307.12732), feature distillation. Their code averages over the width and
    multiplies by 2000; a sum does not depend on the width, so the preset divides 2000 by it.
    """
    return _squared_distances(batch)


def masked_feature_distance(batch: LossBatch) -> Tensor:
    """`mfd` = mean over images of |s'_m − t|² + mean over texts of |v' − u|²; s'_m saw a quarter of an image's patches.

    Other losses never see s'_m (in the published code the whole pass overwrites it, so no loss does). In [0, 8].

    Source: Yang et al. 2024 (CLIP-KD, arXiv 2307.12732), masked feature distillation; the weight as for `fd`.
    """
    assert batch.masked_image_BD is not None
    return _squared_distances(dataclasses.replace(batch, image_BD=batch.masked_image_BD))


def _squared_distances(batch: LossBatch) -> Tensor:
    first, stop, _ = batch.own.indices(len(batch))
    image, text = (rows_between(rows, first, stop) for rows in (batch.image_BD, batch.text_BD))
    sums = []
    if batch.teacher_image_BD is not None:
        taught = rows_between(batch.teacher_image_BD, first, stop)
        sums.append((image - taught).square().sum() / len(batch))
    num_texts = batch.num_extra
    if batch.teacher_text_BD is not None and batch.trains_text:
        num_texts += len(batch)
        taught = rows_between(batch.teacher_text_BD, first, stop)
        sums.append((text - taught).square().sum() / num_texts)
    if batch.extra_text_ED is not None and batch.teacher_extra_text_ED is not None:
        sums.append((batch.extra_text_ED - batch.teacher_extra_text_ED).square().sum() / num_texts)
    return add(sums)


def token_distance(batch: LossBatch) -> Tensor:
    """`td` = mean over the batch of c_i·½[mean of |p − t_i|₁ over selected patches p + mean of |q − u_i|₁ over tokens q].

    Of the student's patches a quarter is selected, those most similar to the teacher's caption u_i; of its caption tokens
    those most similar to the teacher's image t_i. c_i, the teacher's confidence, is the mean of the shares that its in-batch
    softmax gives to the right caption and to the right image. Distances are summed over the width.

    Source: Wang et al. 2022 (CLIP-TD, arXiv 2201.05729) for L1, selected tokens and weights by confidence; no formulas are
    public, so selection, weights and targets are our reconstruction: the teacher's features of whole images and captions
    stand for those of its tokens, which nothing stores. docs/method.md#losses-of-other-papers.
    """
    teacher_image, teacher_text = batch.teacher()
    assert batch.teacher_scale is not None
    first, stop, _ = batch.own.indices(len(batch))
    image = rows_between(teacher_image, first, stop)
    text = rows_between(teacher_text, first, stop)

    def matching_share(start: int, logits_bB: Tensor) -> Tensor:
        return logits_bB.softmax(dim=1).diagonal(start)

    with torch.no_grad():
        to_text = Similarities(teacher_image, teacher_text, batch.teacher_scale)
        confidence_b = (
            to_text.of_each_row(matching_share, first, stop)
            + to_text.transposed().of_each_row(matching_share, first, stop)
        ) / 2
    sums = []
    for tokens, target, other in ((batch.image_tokens_bLD, image, text), (batch.text_tokens_bLD, text, image)):
        assert tokens is not None
        sums.append((confidence_b * distance_of_selected(tokens, target, other)).sum())
    return add(sums) / (2 * len(batch))


def distance_of_selected(tokens_bLD: Tensor, target_bD: Tensor, other_bD: Tensor) -> Tensor:
    """Return for each sample the mean over its selected tokens of their L1 distance to its target, [b].

    Args:
        tokens_bLD: Unit rows; rows of zeros are no tokens, and every sample has one at least.
        other_bD: What they are selected by: those of the largest dot product, a quarter of a sample's, rounded up.
    """
    with torch.no_grad():
        exists_bL = tokens_bLD.any(dim=2)
        similarity_bL = torch.einsum("bld,bd->bl", tokens_bLD, other_bD).masked_fill(~exists_bL, -torch.inf)
        places_bn = similarity_bL.topk(math.ceil(SELECTED * tokens_bLD.shape[1]), dim=1).indices
        wanted_b1 = (SELECTED * exists_bL.sum(dim=1, keepdim=True)).ceil()
        shares_bn = (torch.arange(places_bn.shape[1], device=places_bn.device) < wanted_b1) / wanted_b1
    selected_bnD = tokens_bLD.gather(1, places_bn[:, :, None].expand(-1, -1, tokens_bLD.shape[2]))
    return ((selected_bnD - target_bD[:, None]).abs().sum(dim=2) * shares_bn).sum(dim=1)
