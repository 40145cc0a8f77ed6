"""Losses on single features: student and teacher of the same sample, no other sample involved."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from clipcid_cli.algorithms.losses.batch import LossBatch
from clipcid_cli.algorithms.losses.row_blocks import add, rows_between


def feature_distance(batch: LossBatch) -> Tensor:
    """`fd` = mean over the batch of |s' − t|² + |v' − u|², summed over the width.

    With a teacher of one tower one of the two summands remains, at its usual weight.

    Returns:
        This process's share, a scalar; of all rows in [0, 8]: unit rows are at most 2 apart.

    Source: Yang et al. 2024 (CLIP-KD, arXiv 2307.12732), feature distillation. Their code averages over the width and
    multiplies by 2000; a sum does not depend on the width, so the preset divides 2000 by it.
    """
    return _squared_distances(batch)


def masked_feature_distance(batch: LossBatch) -> Tensor:
    """`mfd` = mean over the batch of |s'_m − t|² + |v' − u|², where s'_m saw a quarter of the image's patches.

    Other losses never see s'_m (in the published code its pass replaces the whole one, for the task's loss too).

    Returns:
        This process's share, a scalar; of all rows in [0, 8].

    Source: Yang et al. 2024 (CLIP-KD, arXiv 2307.12732), masked feature distillation; the weight as for `fd`.
    """
    assert batch.masked_image_BD is not None
    return _squared_distances(dataclasses.replace(batch, image_BD=batch.masked_image_BD))


def _squared_distances(batch: LossBatch) -> Tensor:
    first, stop, _ = batch.own.indices(len(batch))
    differences = (
        rows_between(student, first, stop) - rows_between(teacher, first, stop)
        for student, teacher in batch.same_tower_pairs()
    )
    return add([difference.square().sum() for difference in differences]) / len(batch)
