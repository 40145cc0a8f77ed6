"""Comparing two sets of rows: the worst entry and the worst row count, and what is not a number never passes."""

import math

import pytest
import torch

from clipcid_cli.algorithms.metrics.parity import RowDifference, compare_rows


def test_the_worst_entry_and_the_worst_row_count() -> None:
    reference = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    difference = compare_rows(reference, torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    assert difference.max_difference == pytest.approx(0.6)
    assert difference.min_cosine == pytest.approx(0.8)
    assert compare_rows(reference, reference) == RowDifference(0.0, 1.0)
    broken = torch.tensor([[1.0, 1.0], [1.0, math.nan]])
    assert compare_rows(reference, broken) == compare_rows(broken, broken) == RowDifference(math.inf, -1.0)
