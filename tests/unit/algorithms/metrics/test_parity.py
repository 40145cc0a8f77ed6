"""Comparing two sets of rows: both measures, the worst row counts, and what is not a number never passes."""

import math

import pytest
import torch

from clipcid_cli.algorithms.metrics.parity import RowDifference, compare_rows


def test_the_worst_entry_and_the_worst_row_count() -> None:
    reference = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    other = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    difference = compare_rows(reference, other)
    assert difference.max_difference == pytest.approx(0.6)
    assert difference.min_cosine == pytest.approx(0.8)


def test_equal_rows_have_no_difference() -> None:
    rows = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    difference = compare_rows(rows, rows)
    assert difference.max_difference == 0
    assert difference.min_cosine == pytest.approx(1.0, abs=1e-12)


def test_not_a_number_is_over_every_limit() -> None:
    reference = torch.ones(2, 2)
    broken = torch.tensor([[1.0, 1.0], [1.0, math.nan]])
    assert compare_rows(reference, broken) == compare_rows(broken, broken) == RowDifference(math.inf, -1.0)
