"""The normaliser of a softmax over many centroids on a GPU: float32 products made of float16 parts.

A float32 product takes a GPU 15 times as long as one in float16. So each factor is cut into two float16 numbers of 11 bits,
x = high + low, and the parts are multiplied in one product of three times the length: low·high + high·low + high·high. What
is left out is 2⁻²² of a product, less than the rounding of a sum in float32. One float16 product alone would move the
gradient of a fitted loss by several percent.

Shape legend: b own rows, S candidates, D width of the shared space.

Source: Ootomo and Yokota 2022 (arXiv 2203.03341).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Powers of two that put entries of at most 1, and of at most the largest logit scale of 100, to the top of float16's range:
# low parts are then far above its smallest numbers.
_OF_UNITS = 2.0**14
_OF_SCALED = 2.0**8


class LogSumExp(torch.autograd.Function):
    """logΣexp of each row of scaled·centroidsᵀ + correction, float32 [b]; the logits are made again for the gradient."""

    @staticmethod
    def forward(ctx: Any, scaled_bD: Tensor, centroids_SD: Tensor, correction_S: Tensor) -> Tensor:
        """Take scaled unit rows, and unit rows, which get no gradient."""
        normaliser_b = _logits(scaled_bD, centroids_SD, correction_S).logsumexp(dim=1)
        ctx.save_for_backward(scaled_bD, centroids_SD, correction_S, normaliser_b)
        return normaliser_b

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        scaled_bD, centroids_SD, correction_S, normaliser_b = ctx.saved_tensors
        logits_bS = _logits(scaled_bD, centroids_SD, correction_S)
        shares_bS = logits_bS.sub_((normaliser_b - math.log(_OF_UNITS))[:, None]).exp_()
        left_b3S = _cut(shares_bS, dim=1, low=0)
        right_3SD = _cut(centroids_SD * _OF_UNITS, dim=0, low=1)
        means_bD = torch.mm(left_b3S.flatten(1), right_3SD.flatten(0, 1), out_dtype=torch.float32)
        return means_bD * (gradients[0] / _OF_UNITS**2)[:, None], None, None


def _logits(scaled_bD: Tensor, centroids_SD: Tensor, correction_S: Tensor) -> Tensor:
    left_b3D = _cut(scaled_bD * _OF_SCALED, dim=1, low=0)
    right_S3D = _cut(centroids_SD * _OF_UNITS, dim=1, low=1)
    products_bS = torch.mm(left_b3D.flatten(1), right_S3D.flatten(1).T, out_dtype=torch.float32)
    return torch.add(correction_S, products_bS, alpha=1 / (_OF_SCALED * _OF_UNITS))


def _cut(rows: Tensor, dim: int, low: int) -> Tensor:
    """Cut entries into parts along a new dimension: low ones at place 0 or 1, high ones at the others, float16."""
    parts = torch.stack([rows.half()] * 3, dim=dim)
    torch.sub(rows, parts.select(dim, 2), out=parts.select(dim, low))
    return parts
