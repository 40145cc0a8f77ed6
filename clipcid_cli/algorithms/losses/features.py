"""Losses on single features: student and teacher of the same sample, no other sample involved."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from clipcid_cli.algorithms.losses.batch import LossBatch
from clipcid_cli.algorithms.losses.row_blocks import add, rows_between


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

    Other losses never see s'_m (in the published code its pass replaces the whole one, for the task's loss too). In [0, 8].

    Source: Yang et al. 2024 (CLIP-KD, arXiv 2307.12732), masked feature distillation; the weight as for `fd`.
    """
    assert batch.masked_image_BD is not None
    return _squared_distances(dataclasses.replace(batch, image_BD=batch.masked_image_BD))


def _squared_distances(batch: LossBatch) -> Tensor:
    first, stop, _ = batch.own.indices(len(batch))
    image, text = (rows_between(rows, first, stop) for rows in batch.student_in_teacher_space())
    sums = []
    if batch.teacher_image_BD is not None:
        taught = rows_between(batch.teacher_image_BD, first, stop)
        sums.append((image - taught).square().sum() / len(batch))
    num_texts = batch.num_extra
    if batch.teacher_text_BD is not None:
        num_texts += len(batch)
        taught = rows_between(batch.teacher_text_BD, first, stop)
        sums.append((text - taught).square().sum() / num_texts)
    if batch.extra_text_ED is not None and batch.teacher_extra_text_ED is not None:
        sums.append((batch.extra_text_ED - batch.teacher_extra_text_ED).square().sum() / num_texts)
    return add(sums)
