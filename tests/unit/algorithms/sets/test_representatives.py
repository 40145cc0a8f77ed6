"""The representative of a set, how far the others are from it, and the diameter of the set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from balance_data import distance_matrix, make_rows

from clipcid_cli.algorithms.sets import representatives
from clipcid_cli.algorithms.sets.representatives import (
    best_rows,
    central_rows,
    medoid_rows,
)

CPU = torch.device("cpu")


@pytest.fixture
def rows() -> np.ndarray:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(3000, 24)) + generator.normal(size=24)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture
def labels() -> np.ndarray:
    """Sets of very different sizes, one of them larger than what is read at once."""
    drawn = (np.random.default_rng(1).random(3000) ** 4 * 800).astype(np.int64)
    drawn[500:1400] = 5
    first = {}
    return np.array([first.setdefault(label, row) for row, label in enumerate(drawn.tolist())])


def choose_by_cost(rows: np.ndarray, labels: np.ndarray, cost: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return for each row the first of those of its set with the least cost, which is of the set's rows in float64."""
    chosen = np.empty(len(rows), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen[members] = members[np.argmin(cost(rows[members].astype(np.float64)))]
    return chosen


def test_the_central_row_is_nearest_to_the_mean_however_rows_are_read(
    rows: np.ndarray, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = choose_by_cost(rows, labels, lambda wide: ((wide - wide.mean(axis=0)) ** 2).sum(axis=1))
    np.testing.assert_array_equal(central_rows(rows.__getitem__, labels), expected)
    monkeypatch.setattr(representatives, "_ROWS_AT_ONCE", 37)
    # All are read at once; some are read ahead and others as they are needed.
    for at_once, reads in ((2**15, 1), (100, 45)):
        monkeypatch.setattr(representatives, "_ROWS_READ", at_once)
        asked = list[int]()
        found = central_rows(lambda wanted, asked=asked: asked.append(len(wanted)) or rows[wanted], labels)
        np.testing.assert_array_equal(found, expected)
        assert len(asked) <= reads
        assert max(asked) <= 2 * at_once


def test_ties_keep_the_smaller_row() -> None:
    rows = np.array([[0, 1], [1, 0], [1, 0], [0, 1], [0.6, 0.8]], np.float16)
    labels = np.array([0, 0, 0, 0, 4])
    for choose in (central_rows, lambda *given: medoid_rows(*given, CPU)):
        assert choose(rows.__getitem__, labels).tolist() == [0, 0, 0, 0, 4]
    assert best_rows(np.array([1.0, 3.0, 3.0, 2.0, 0.0]), labels).tolist() == [1, 1, 1, 1, 4]


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
    found, exact = representatives.find_diameters(stored.__getitem__, rows, first, sets, CPU)
    assert exact.tolist() == (sizes[sets] <= most).tolist()
    for label, diameter, is_exact in zip(sets, found, exact, strict=True):
        members = np.flatnonzero(first == label)
        true = matrix[np.ix_(members, members)].max()
        assert diameter == true if is_exact else true / 2 <= diameter <= true
    if most == 2:
        assert 0 < np.count_nonzero(~exact) < len(sets)
    none = np.empty(0, np.int64)
    found, exact = representatives.find_diameters(stored.__getitem__, rows, first, none, CPU)
    assert len(found) == len(exact) == 0
