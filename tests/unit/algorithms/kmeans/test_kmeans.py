"""Spherical k-means: its sums, centroids, seeds, temperature and default number of clusters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from clipcid_cli.algorithms.kmeans.centroids import (
    centroids_of_sums,
    choose_first_rows,
    choose_seeds,
    spread_out,
)
from clipcid_cli.algorithms.kmeans.kmeans import default_num_clusters, joint_features, temperature_for_perplexity


def unit_rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=1).half()


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [(1, 1), (7, 1), (100, 12), (2048, 256), (7480, 256), (100_000, 444), (225_000_000, 1_000_000), (10**9, 1_000_000)],
)
def test_default_number_of_clusters(num_rows: int, expected: int) -> None:
    assert default_num_clusters(num_rows) == expected


def test_centroids_are_normalised_means_and_empty_clusters_keep_theirs() -> None:
    rows, previous = unit_rows(60, 24), torch.eye(24)[:2]
    sums = torch.stack([rows.double().sum(dim=0), torch.zeros(24, dtype=torch.float64)])
    centroids = centroids_of_sums(sums, previous)
    expected = torch.nn.functional.normalize(sums[0], dim=0)
    torch.testing.assert_close(centroids[0].double(), expected, rtol=0, atol=2.0**-25)
    assert torch.equal(centroids[1], previous[1])
    assert torch.equal(centroids * 2**24, (centroids * 2**24).round())


@pytest.mark.parametrize("num_clusters", [1, 20, 513, 600])
def test_first_rows_are_different_and_depend_on_the_seed_only(num_clusters: int) -> None:
    rows = unit_rows(600, 8).numpy()

    def choose(seed: int) -> list[int]:
        chosen = choose_first_rows(rows.__getitem__, 600, num_clusters, seed)
        return sorted(chosen.tolist())

    assert choose(5) == choose(5)
    assert len(set(choose(5))) == num_clusters
    if num_clusters < 600:
        assert choose(5) != choose(6)


def test_spread_out_rows_of_equal_rows_are_still_different() -> None:
    chosen = spread_out(torch.eye(4)[:1].half().repeat(9, 1), 5, np.random.default_rng(0))
    assert len(set(chosen.tolist())) == 5


@pytest.mark.parametrize("kind", ["spread", "in a cone", "copies", "near copies", "copies of short and long rows"])
def test_spread_out_rows_are_those_of_weights_computed_in_full(kind: str) -> None:
    random = np.random.default_rng(1)
    rows = random.standard_normal((300, 24))
    rows = rows * 0.05 + 1.0 if kind == "in a cone" else rows
    rows = rows[random.integers(0, 60, 300)] if "copies" in kind else rows
    rows += 0.001 * random.standard_normal(rows.shape) if kind == "near copies" else 0.0
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows *= random.uniform(0.999, 1.001, (300, 1)) if kind.endswith("long rows") else 1.0
    halves = torch.from_numpy(rows.astype(np.float16))
    exact = halves.double().numpy()

    def weights(chosen: int) -> np.ndarray:
        found = np.maximum(0, np.rint((1.0 - exact @ exact[chosen]) * 2.0**30)).astype(np.int64)
        found[chosen] = 0
        return found

    random = np.random.default_rng(7)
    chosen = [int(random.integers(300))]
    least = weights(chosen[0])
    while len(chosen) < 40:
        draws = random.integers(least.sum(), size=2 + int(math.log(40)))
        trials = np.searchsorted(least.cumsum(), draws, side="right")
        after = np.minimum(least, [weights(trial) for trial in trials])
        chosen.append(int(trials[after.sum(axis=1).argmin()]))
        least = after[after.sum(axis=1).argmin()]
    assert spread_out(halves, 40, np.random.default_rng(7)).tolist() == chosen


def test_seeds_are_the_farthest_rows_without_copies() -> None:
    rows = dict(zip([50, 40, 30, 20, 60, 10], np.eye(4, dtype=np.float16)[[0, 1, 1, 2, 3, 3]], strict=True))
    similarities = np.array([0.9, 0.1, 0.1, 0.3, 0.1, 0.9995])
    numbers = np.array(list(rows))

    def read(wanted: np.ndarray) -> np.ndarray:
        return np.stack([rows[number] for number in wanted.tolist()])

    assert choose_seeds(similarities, numbers, read, 3).tolist() == [2, 4, 3]
    assert choose_seeds(similarities, numbers, read, 9).tolist() == [2, 4, 3, 0]


@pytest.mark.parametrize("wanted", [2.0, 3.5, 8.0])
def test_the_temperature_gives_the_median_perplexity(wanted: float) -> None:
    random = np.random.default_rng(0)
    similarities = -np.sort(-random.normal(0.5, 0.1, (401, 16)), axis=1)
    temperature = temperature_for_perplexity(similarities, wanted)
    weights = np.exp(similarities / temperature)
    weights /= weights.sum(axis=1, keepdims=True)
    entropy = -(weights * np.log(np.maximum(weights, 1e-300))).sum(axis=1)
    assert float(np.median(np.exp(entropy))) == pytest.approx(wanted, rel=1e-3)


def test_joint_features_are_unit_rows_between_image_and_caption() -> None:
    images, texts = unit_rows(50, 32, 1).numpy(), unit_rows(50, 32, 2).numpy()
    texts[3], texts[4] = 0, -images[4]
    joint = joint_features(images, texts)
    assert joint.dtype == np.float16
    expected = torch.nn.functional.normalize(
        torch.from_numpy(images).double() + torch.from_numpy(texts).double(), dim=1
    )
    np.testing.assert_allclose(np.delete(joint, 4, 0), np.delete(expected.numpy(), 4, 0), atol=5e-4)
    np.testing.assert_array_equal(joint[4], images[4])
    np.testing.assert_array_equal(joint[10:20], joint_features(images[10:20], texts[10:20]))
