"""The learning rate that losses take by default, by what leads them, the optimiser, the batch and the student's width."""

from __future__ import annotations

import math
from collections.abc import Collection

from clipcid_cli.algorithms.losses.registry import LossEntry

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
# becomes unstable, which is inverse to the width (Yang et al. 2022, arXiv 2203.03466). A guard, not an optimum: the product
# of rate and width is the largest that was tried on that student with AdamW, and the width is the embedding's, not the
# towers'. For a ViT-B/32, 512 wide, it gives 1.1e-3, where the CLIP-CID group publishes 1e-3.
LARGEST_BY_WIDTH = 6e-3 * 96
# Such rates would undo what weights know that are trained already.
OF_TRAINED = 0.1

_LED_BY = {"captions": "captions", "teacher": "a teacher", "features": "a teacher's features"}


def default_rate(
    entries: Collection[LossEntry], optimizer: str, batch_size: int, width: int, *, trained: bool = False
) -> tuple[float, str]:
    """Choose the peak learning rate, and say why: min(rate by what leads the losses · √(batch/64), 0.576/student's width).

    It is a tenth of that for a student that starts from `trained` weights.

    Source: our own, docs/method.md#training-recipe.
    """
    by_features = any(entry.compares_features for entry in entries)
    kind = "features" if by_features else "teacher" if any(entry.needs_teacher for entry in entries) else "captions"
    rate = RATES[optimizer][kind]
    wanted = rate * math.sqrt(batch_size / AT_BATCH)
    largest = LARGEST_BY_WIDTH / width
    reason = f"losses led by {_LED_BY[kind]}: {rate:g} x sqrt(batch size/{AT_BATCH})"
    if wanted > largest:
        reason += f", at most {LARGEST_BY_WIDTH:g}/{width} for an embedding of {width} dimensions"
    lr = min(wanted, largest)
    if trained:
        lr *= OF_TRAINED
        reason += f"; {OF_TRAINED:g} of that, since the student starts from trained weights"
    return float(f"{lr:.2g}"), reason
