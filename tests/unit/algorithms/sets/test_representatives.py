"""The representative of a set, and how far the others are from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipcid_cli.algorithms.sets import representatives
from clipcid_cli.algorithms.sets.representatives import (
    best_rows,
    central_rows,
    distances_to,
    medoid_rows,
    random_scores,
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


def test_central_row_is_nearest_to_the_mean(
    rows: np.ndarray, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = np.empty(len(rows), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        wide = rows[members].astype(np.float64)
        expected[members] = members[np.argmin(((wide - wide.mean(axis=0)) ** 2).sum(axis=1))]
    np.testing.assert_array_equal(central_rows(rows.__getitem__, labels), expected)
    monkeypatch.setattr(representatives, "_ROWS_AT_ONCE", 37)
    # All are read at once; some are read ahead and others as they are needed.
    for at_once, reads in ((2**15, 1), (100, 45)):
        monkeypatch.setattr(representatives, "_ROWS_READ", at_once)
        asked: list[int] = []

        def read(wanted: np.ndarray, asked: list[int] = asked) -> np.ndarray:
            asked.append(len(wanted))
            return rows[wanted]

        np.testing.assert_array_equal(central_rows(read, labels), expected)
        assert len(asked) <= reads
        assert max(asked) <= 2 * at_once


def test_medoid_has_the_smallest_sum(rows: np.ndarray, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(representatives, "_ROWS_AT_ONCE", 100)
    monkeypatch.setattr(representatives, "_ROWS_READ", 200)
    chosen = medoid_rows(rows.__getitem__, labels, CPU)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        wide = rows[members].astype(np.float64)
        distances = np.sqrt(((wide[:, None] - wide[None]) ** 2).sum(axis=2)).astype(np.float32)
        assert (chosen[members] == members[np.argmin(distances.astype(np.float64).sum(axis=1))]).all()


def test_ties_keep_the_smaller_row() -> None:
    rows = np.array([[0, 1], [1, 0], [1, 0], [0, 1], [0.6, 0.8]], np.float16)
    labels = np.array([0, 0, 0, 0, 4])
    for choose in (central_rows, lambda *given: medoid_rows(*given, CPU)):
        assert choose(rows.__getitem__, labels).tolist() == [0, 0, 0, 0, 4]
    assert best_rows(np.array([1.0, 3.0, 3.0, 2.0, 0.0]), labels).tolist() == [1, 1, 1, 1, 4]


def test_the_best_row_is_the_first_of_those_with_the_highest_score(labels: np.ndarray) -> None:
    scores = np.random.default_rng(2).integers(4, size=len(labels)).astype(np.float64)
    scores[labels == labels[7]] = -np.inf
    chosen = best_rows(scores, labels)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        assert (chosen[members] == members[np.argmax(scores[members])]).all()


def test_random_scores_depend_on_seed_and_row_only() -> None:
    numbers = np.arange(100_000)
    scores = random_scores(numbers, 5)
    np.testing.assert_array_equal(random_scores(numbers[::-1], 5)[::-1], scores)
    assert 0.0 <= scores.min() < scores.max() < 1.0
    assert abs(scores.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(scores, random_scores(numbers, 6))[0, 1]) < 0.02


def test_distances_are_exact_and_zero_for_the_kept(
    rows: np.ndarray, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = central_rows(rows.__getitem__, labels)
    wide = rows.astype(np.float64)
    expected = np.sqrt(((wide - wide[chosen]) ** 2).sum(axis=1)).astype(np.float32)
    np.testing.assert_array_equal(distances_to(rows.__getitem__, chosen), expected)
    monkeypatch.setattr(representatives, "_ROWS_READ", 333)
    monkeypatch.setattr(representatives, "_ROWS_AT_ONCE", 100)
    np.testing.assert_array_equal(distances_to(rows.__getitem__, chosen), expected)
    assert (expected[chosen] == 0).all()
