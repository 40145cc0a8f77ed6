"""How close two implementations of one model are, by their embeddings."""

from __future__ import annotations

from typing import NamedTuple

import torch


class RowDifference(NamedTuple):
    """The largest difference of two entries and the smallest cosine of two rows; ∞ and −1 when one is not a number."""

    max_difference: float
    min_cosine: float


def compare_rows(reference_ND: torch.Tensor, other_ND: torch.Tensor) -> RowDifference:
    """Compare rows, float [N, D] both, N ≥ 1, one by one in float64."""
    left, right = reference_ND.double(), other_ND.double()
    if not bool(left.isfinite().all() and right.isfinite().all()):
        return RowDifference(max_difference=float("inf"), min_cosine=-1.0)
    cosine_N = torch.nn.functional.cosine_similarity(left, right, dim=1)
    return RowDifference(float((left - right).abs().max()), min(1.0, float(cosine_N.min())))
