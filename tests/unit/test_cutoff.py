"""The first distance searched, from a sample of nearest neighbours."""

from __future__ import annotations

import numpy as np
import torch

from clipcid_cli.algorithms.cutoff import FARTHEST, first_cutoff, nearest_distances, wider_cutoff


def test_nearest_distances_are_exact() -> None:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(5000, 16))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    numbers = np.arange(0, 5000, 2)
    sample = np.array([0, 7, 2499, 1300])
    nearest = nearest_distances(rows.__getitem__, numbers, sample, torch.device("cpu"))
    wide = rows[numbers].astype(np.float64)
    for position, distance in zip(sample, nearest, strict=True):
        squared = ((wide - wide[position]) ** 2).sum(axis=1)
        squared[position] = np.inf
        assert distance == np.float32(np.sqrt(squared.min()))


def test_a_row_alone_has_no_neighbour() -> None:
    rows = np.array([[1, 0]], np.float16)
    assert nearest_distances(rows.__getitem__, np.arange(1), np.arange(1), torch.device("cpu")).tolist() == [np.inf]
    assert first_cutoff(np.array([np.inf], np.float32), 0.5) == FARTHEST


def test_cutoffs_grow_until_everything_is_within_reach() -> None:
    nearest = np.linspace(0.1, 1.1, 1001).astype(np.float32)
    cutoff = first_cutoff(nearest, 0.4)
    assert np.isclose(cutoff, 0.1 + 0.46, atol=2e-3)
    assert np.isclose(wider_cutoff(nearest, cutoff, found=200, wanted=400), 0.1 + 0.46 * 2.1, atol=1e-2)
    steps = [cutoff]
    while steps[-1] < FARTHEST:
        steps.append(wider_cutoff(nearest, steps[-1], found=399, wanted=400))
        assert steps[-1] > steps[-2]
    assert len(steps) < 60
    assert wider_cutoff(np.zeros(10, np.float32), 0.0, found=0, wanted=5) > 0
