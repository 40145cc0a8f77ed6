"""The peak learning rate of a run that is given none: by its losses, optimizer, batch and student's width.

Does not import torch, as `registry` does not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from clipcid_cli.algorithms.losses.registry import LOSSES

# What was best for the student of recipes/ablation, 96 wide, with batches of 64 and 2,000 steps, or within a point of it on
# the tuning split (captions alone with AdamW: 2 points below 2e-3), by what leads the losses: captions alone, a teacher, or
# a teacher's features themselves (`fd` with AdamW: 1, 3 and 6e-3 gave R@1 of 41.8, 55.0 and 59.3). All of one data set,
# with one seed; see recipes/ablation/README.md.
RATES = {
    "muon": {"captions": 3e-3, "teacher": 6e-3, "features": 6e-3},
    "adamw": {"captions": 1e-3, "teacher": 3e-3, "features": 6e-3},
}
AT_BATCH = 64
# Adam's best rate grows as the square root of the batch (Malladi et al. 2022, arXiv 2205.10287), up to where training
# becomes unstable, which is inverse to the width (Yang et al. 2022, arXiv 2203.03466). The product of rate and width is the
# largest that was tried on that student with AdamW; for a ViT-B/32, 512 wide, it gives 1.1e-3, where the CLIP-CID group
# publishes 1e-3.
LARGEST_BY_WIDTH = 6e-3 * 96

_LED_BY = {"captions": "captions", "teacher": "a teacher", "features": "a teacher's features"}


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """A peak learning rate, and why."""

    value: float
    reason: str


def default_rate(losses: Iterable[str], optimizer: str, batch_size: int, width: int) -> LearningRate:
    """Choose the peak learning rate of a run.

    min(rate by what leads the losses · √(batch/64), 0.576/width), rounded to two digits.

    Args:
        batch_size: Samples of a global batch.
        width: Dimensions of the student's embeddings.

    Source: our own, docs/method.md#training-recipe.
    """
    entries = [LOSSES[name] for name in losses]
    by_features = any(entry.compares_features for entry in entries)
    kind = "features" if by_features else "teacher" if any(entry.needs_teacher for entry in entries) else "captions"
    rate = RATES[optimizer][kind]
    wanted, largest = rate * math.sqrt(batch_size / AT_BATCH), LARGEST_BY_WIDTH / width
    reason = f"losses led by {_LED_BY[kind]}: {rate:g} x sqrt(batch size/{AT_BATCH})"
    if wanted > largest:
        reason += f", at most {LARGEST_BY_WIDTH:g}/{width} for an embedding of {width} dimensions"
    return LearningRate(float(f"{min(wanted, largest):.2g}"), reason)
