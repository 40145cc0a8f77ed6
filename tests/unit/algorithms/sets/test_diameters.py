"""Diameters of sets, against all pairs in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from balance_data import distance_matrix, make_rows

from clipcid_cli.algorithms.sets import representatives


@pytest.mark.parametrize("most", [2, 5, 1024])
def test_diameters_are_the_largest_distances(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(representatives, "MAX_COMPARED", most)
    monkeypatch.setattr(representatives, "_ROWS_COMPARED", 7)
    stored, generator = make_rows(300), np.random.default_rng(0)
    rows = np.sort(generator.permutation(300)[:250])
    group = generator.integers(60, size=250) ** 2 // 60  # sets of many sizes
    first = np.array([np.flatnonzero(group == each)[0] for each in group])
    matrix, sizes = distance_matrix(stored[rows]), np.bincount(first, minlength=250)
    sets = np.flatnonzero(sizes)
    found, exact = representatives.find_diameters(stored.__getitem__, rows, first, sets, torch.device("cpu"))
    assert exact.tolist() == (sizes[sets] <= most).tolist()
    for label, diameter, is_exact in zip(sets, found, exact, strict=True):
        members = np.flatnonzero(first == label)
        true = matrix[np.ix_(members, members)].max()
        assert diameter == true if is_exact else true / 2 <= diameter <= true
    if most == 2:
        assert 0 < np.count_nonzero(~exact) < len(sets)


def test_no_sets_have_no_diameters() -> None:
    none = np.empty(0, np.int64)
    found, exact = representatives.find_diameters(
        make_rows(3).__getitem__, np.arange(3), np.arange(3), none, torch.device("cpu")
    )
    assert len(found) == len(exact) == 0
