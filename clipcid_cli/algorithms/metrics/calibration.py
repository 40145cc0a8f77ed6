"""How well the softmax of scaled cosines says how sure a classification is, and the temperature that says it best.

The temperature is 1/scale: p = softmax(cosine / temperature).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import cache

import torch

BINS = 15
# Temperatures below 1/_MAX_SCALE are not told apart by float32 cosines, whose spacing near 1 is 6e-8.
_MAX_SCALE = 2.0**17
_TOLERANCE = 1e-10

# Makes block after block of the images: cosines, float [B, C], and right classes, int64 [B]. Called once a pass, so that
# cosines need not be kept.
Blocks = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How well confidences fit: over `BINS` bins, and the mean negative log-likelihood of the right classes, in nats."""

    expected_calibration_error: float
    log_loss: float
    images: int


def measure_calibration(blocks: Blocks, scale: float) -> Calibration:
    """Compare the confidence of predictions with the share that is right; of one image or more.

    The confidence of an image is the probability of its most likely class, the first of equal ones. Images are put in bins
    of equal width, (m/15, (m + 1)/15]; the error is the mean over the images of |share right − mean confidence| of their
    bin.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, eq. 3.
    """
    excess = torch.zeros(BINS, dtype=torch.float64)
    log_loss = 0.0
    images = 0
    for cosines_BC, labels_B in blocks():
        log_p_BC = (scale * cosines_BC.double()).log_softmax(dim=1)
        right_B = cosines_BC.argmax(dim=1) == labels_B
        confidence_B = log_p_BC.max(dim=1).values.exp()
        bin_B = ((confidence_B * BINS).ceil().long() - 1).clamp(0, BINS - 1)
        excess.index_add_(0, bin_B, right_B.double() - confidence_B)
        log_loss -= float(log_p_BC.gather(1, labels_B[:, None]).sum())
        images += len(labels_B)
    return Calibration(float(excess.abs().sum()) / images, log_loss / images, images)


def fit_scale(blocks: Blocks) -> float | None:
    """Find the scale that minimises the mean negative log-likelihood, to a relative 1e-10.

    The likelihood is convex in the scale; its derivative is the mean over the images of E_p[cosine] − own cosine.

    Returns:
        The scale in (0, 2¹⁷); None where there is no minimum: no image, a likelihood that is best without regard to the
        cosines, or one that grows without end, since every image is right.

    Source: Guo et al. 2017, §4.2, temperature scaling.
    """
    from scipy.optimize import brentq

    @cache
    def slope(scale: float) -> float:
        total = 0.0
        for cosines_BC, labels_B in blocks():
            wide_BC = cosines_BC.double()
            mean_B = ((scale * wide_BC).softmax(dim=1) * wide_BC).sum(dim=1)
            total += float((mean_B - wide_BC.gather(1, labels_B[:, None])[:, 0]).sum())
        return total

    if slope(0.0) >= 0 or slope(_MAX_SCALE) <= 0:
        return None
    return float(brentq(slope, 0.0, _MAX_SCALE, rtol=_TOLERANCE))
