"""Diameters of sets, against all pairs in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from balance_data import distance_matrix, make_rows

from clipcid_cli.algorithms.sets import diameters


@pytest.mark.parametrize("most", [2, 5, 1024])
def test_diameters_are_the_largest_distances(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(diameters, "MAX_COMPARED", most)
    monkeypatch.setattr(diameters, "_ROWS_AT_ONCE", 7)
    stored, generator = make_rows(300), np.random.default_rng(0)
    rows = np.sort(generator.permutation(300)[:250])
    group = generator.integers(60, size=250) ** 2 // 60  # sets of many sizes
    first = np.array([np.flatnonzero(group == each)[0] for each in group])
    found = diameters.find_diameters(lambda numbers: stored[numbers], rows, first, torch.device("cpu"))
    matrix, sizes = distance_matrix(stored[rows]), np.bincount(first, minlength=250)
    assert found.label.tolist() == np.flatnonzero(sizes > 1).tolist()
    assert found.is_exact.tolist() == (sizes[found.label] <= most).tolist()
    for label, diameter, is_exact in zip(found.label, found.diameter, found.is_exact, strict=True):
        members = np.flatnonzero(first == label)
        true = matrix[np.ix_(members, members)].max()
        assert diameter == true if is_exact else true / 2 <= diameter <= true
    if most == 2:
        assert 0 < np.count_nonzero(~found.is_exact) < len(found.label)


def test_no_sets_have_no_diameters() -> None:
    found = diameters.find_diameters(
        lambda numbers: make_rows(3)[numbers], np.arange(3), np.arange(3), torch.device("cpu")
    )
    assert len(found.label) == len(found.diameter) == len(found.is_exact) == 0
