"""A loss on the student's features of single patches and tokens.

Shape legend: B global batch, b own rows, L patches of an image or tokens of a caption, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import LossBatch
from clipcid_cli.algorithms.losses.row_blocks import Similarities, add, rows_between

# Share of a sample's patches or tokens that is taught, rounded up.
SELECTED = 0.25


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
    image, text = rows_between(teacher_image, first, stop), rows_between(teacher_text, first, stop)

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
        target_bD: What they are pulled to.
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
