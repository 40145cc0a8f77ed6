"""Spherical k-means: iterations are those of its definition, on any number of processes and in every format."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kmeans_data import assert_same, beginning, run, unit

from clipcid_cli.algorithms.kmeans import lloyd
from clipcid_cli.algorithms.kmeans.centroids import centroids_of_sums
from clipcid_cli.algorithms.kmeans.kmeans import default_num_clusters
from clipcid_cli.algorithms.kmeans.lloyd import LloydState

NUM_CLUSTERS = 70


@pytest.fixture(scope="module")
def values() -> npt.NDArray[np.float16]:
    """A cloud with few strong directions, with equal rows and rows that are not quite of unit length."""
    random = np.random.default_rng(0)
    values = random.normal(size=(2500, 160)) * np.arange(1, 161) ** -0.9
    values[100:140] = values[100]
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    values[::7] *= 1.0015
    return values.astype(np.float16)


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [(1, 1), (7, 1), (100, 12), (2048, 256), (7480, 256), (100_000, 444), (225_000_000, 1_000_000), (10**9, 1_000_000)],
)
def test_default_number_of_clusters(num_rows: int, expected: int) -> None:
    assert default_num_clusters(num_rows) == expected


def test_centroids_are_normalised_means_on_the_grid_and_empty_clusters_keep_theirs(
    values: npt.NDArray[np.float16],
) -> None:
    previous = torch.eye(160)[:2]
    sums = torch.stack([torch.from_numpy(values).double().sum(dim=0), torch.zeros(160, dtype=torch.float64)])
    centroids = centroids_of_sums(sums, previous)
    expected = torch.nn.functional.normalize(sums[0], dim=0)
    torch.testing.assert_close(centroids[0].double(), expected, rtol=0, atol=2.0**-25)
    assert torch.equal(centroids[1], previous[1])
    assert torch.equal(centroids * 2**24, (centroids * 2**24).round())


def assert_defined(values: npt.NDArray[np.float16], start: LloydState, states: list[LloydState]) -> None:
    """Compare states with the definition, by products of rounded integers; which rows empty clusters get is left open."""
    exact, before = torch.from_numpy(values).double(), start.centroids_KD
    limit = np.float32(min(127, math.isqrt(2**24 // values.shape[1])))
    wide = values.astype(np.float32)
    integers = np.round(wide / (np.abs(wide).max(axis=1, keepdims=True) / limit)).astype(np.int64)
    for state in states:
        centroids = before.numpy()
        products = integers @ np.round(centroids / (np.abs(centroids).max() / limit)).astype(np.int64).T
        labels = torch.from_numpy(products.argmax(axis=1))  # the first of equals
        sums = torch.zeros(before.shape, dtype=torch.float64).index_add_(0, labels, exact)
        filled = torch.bincount(labels, minlength=len(before)) > 0
        assert torch.equal(state.centroids_KD[filled], centroids_of_sums(sums, before)[filled])
        similarities = (exact * state.centroids_KD[labels]).sum(dim=1)
        assert state.similarity == pytest.approx(float(similarities.mean()), rel=1e-12)
        assert state.num_empty == len(before) - int(filled.sum())
        assert state.converged == torch.equal(state.centroids_KD, before)
        before = state.centroids_KD


@settings(max_examples=10)
@given(
    width=st.integers(1, 40),
    num_clusters=st.integers(1, 90),
    spread=st.sampled_from([0.05, 5.0]),
    dtype=st.sampled_from([torch.int8, torch.bfloat16, torch.float32]),
    processes=st.integers(1, 3),
    kept_bytes=st.sampled_from([0, 2**31]),
    seed=st.integers(0, 1000),
)
def test_iterations_are_those_of_the_definition(
    width: int, num_clusters: int, spread: float, dtype: torch.dtype, processes: int, kept_bytes: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    values = unit(random.normal(size=(120, width)) * spread + random.normal(size=width))
    start = beginning(values, num_clusters)
    # Copies of centroids, and rows that lie on one: ties.
    start.centroids_KD[num_clusters // 2 :: 3] = start.centroids_KD[0].clone()
    values[:20] = start.centroids_KD[0].numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lloyd, "_RUN_ROWS", {"cpu": 50})
        states = run(values, start, iterations=5, dtype=dtype, processes=processes, kept_bytes=kept_bytes)
    assert_defined(values, start, states)


@pytest.mark.parametrize(("dtype", "processes"), [(torch.int8, 1), (torch.bfloat16, 3)], ids=str)
def test_iterations_of_many_rows_are_those_of_the_definition(
    values: npt.NDArray[np.float16], dtype: torch.dtype, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lloyd, "_RUN_ROWS", {"cpu": 300})
    start = beginning(values, NUM_CLUSTERS)
    assert_defined(values, start, run(values, start, dtype=dtype, processes=processes))


def test_a_resumed_run_goes_on_as_it_would_have(
    values: npt.NDArray[np.float16], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = beginning(values, NUM_CLUSTERS)
    states = run(values, start)
    assert not any(state.converged for state in states)
    monkeypatch.setattr(lloyd, "_RUN_ROWS", {"cpu": 300})
    for done, processes, dtype in ((1, 1, torch.int8), (5, 4, torch.bfloat16)):
        assert_same(run(values, states[done - 1], processes=processes, dtype=dtype, kept_bytes=2**18), states[done:])


def test_empty_clusters_get_the_farthest_rows_on_any_number_of_processes(values: npt.NDArray[np.float16]) -> None:
    centroids = beginning(values, NUM_CLUSTERS).centroids_KD
    centroids[40:] = centroids[:30]
    states = run(values, LloydState(centroids), iterations=3)
    assert states[0].num_empty == 30
    assert states[1].num_empty < 30
    similarities = (torch.from_numpy(values).double() @ centroids.double().T).amax(dim=1)
    # Clusters 40 … 69 lose every tie, so the rows farthest from all become theirs, the farthest first.
    farthest = unit(values[int(similarities.argmin())][None].astype(np.float64)).astype(np.float32)
    assert np.allclose(states[0].centroids_KD[40], farthest[0], atol=1e-3)
    assert_same(run(values, LloydState(centroids), iterations=3, processes=2), states)


def test_it_ends_where_no_centroid_moves() -> None:
    values = unit(np.repeat(np.eye(8), 20, axis=0))
    states = run(values, LloydState(torch.eye(8)), iterations=9)
    assert [state.converged for state in states] == [True]
    assert run(values, LloydState(torch.eye(8), 9), iterations=9) == []
