"""How close two implementations of one model are, by their embeddings."""

from __future__ import annotations

from typing import NamedTuple

import torch


class RowDifference(NamedTuple):
    """The largest difference between two sets of rows.

    Attributes:
        max_difference: Largest absolute difference of two entries; infinite when any is not a number.
        min_cosine: Smallest cosine similarity of two rows; −1 when any is not a number.
    """

    max_difference: float
    min_cosine: float


def compare_rows(reference_ND: torch.Tensor, other_ND: torch.Tensor) -> RowDifference:
    """Compare rows one by one, in float64.

    Args:
        reference_ND: float [N, D].
        other_ND: float [N, D].

    Raises:
        ValueError: when the shapes differ or there is no row.
    """
    if reference_ND.shape != other_ND.shape or reference_ND.ndim != 2 or not len(reference_ND):
        raise ValueError(f"rows to compare have shapes {list(reference_ND.shape)} and {list(other_ND.shape)}")
    left, right = reference_ND.double(), other_ND.double()
    if not bool(left.isfinite().all() and right.isfinite().all()):
        return RowDifference(max_difference=float("inf"), min_cosine=-1.0)
    cosine_N = torch.nn.functional.cosine_similarity(left, right, dim=1)
    return RowDifference(float((left - right).abs().max()), min(1.0, float(cosine_N.min())))
