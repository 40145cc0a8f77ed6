"""Lloyd's iterations equal their definition in float64; all are the same for any number of processes, in every format."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from kmeans_data import assert_same, beginning, run, unit

from clipcid_cli.algorithms.kmeans import coarse, lloyd
from clipcid_cli.algorithms.kmeans.centroids import centroids_of_sums
from clipcid_cli.algorithms.kmeans.lloyd import LloydState

NUM_ROWS, WIDTH, NUM_CLUSTERS = 2500, 160, 70


@pytest.fixture(scope="module")
def values() -> npt.NDArray[np.float16]:
    """A cloud with few strong directions, with equal rows and rows that are not quite of unit length."""
    random = np.random.default_rng(0)
    values = random.normal(size=(NUM_ROWS, WIDTH)) * np.arange(1, WIDTH + 1) ** -0.9
    values[100:140] = values[100]
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    values[::7] *= 1.0015
    return values.astype(np.float16)


def test_iterations_are_those_of_the_definition(values: npt.NDArray[np.float16]) -> None:
    start = beginning(values, NUM_CLUSTERS)
    exact, before = torch.from_numpy(values).double(), start.centroids_KD
    for state in run(values, start):
        similarities = exact @ before.double().T
        labels = similarities.argmax(dim=1)  # the first of equals
        sums = torch.zeros(NUM_CLUSTERS, WIDTH, dtype=torch.float64).index_add_(0, labels, exact)
        assert torch.equal(state.centroids_KD, centroids_of_sums(sums, before))
        assert state.similarity == pytest.approx(
            float((exact * state.centroids_KD[labels]).sum(dim=1).mean()), rel=1e-12
        )
        assert state.num_empty == 0
        before = state.centroids_KD


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("processes", [1, 3])
def test_processes_and_formats_change_no_bit(
    values: npt.NDArray[np.float16], processes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = beginning(values, NUM_CLUSTERS)
    expected = run(values, start)
    monkeypatch.setattr(lloyd, "_RUN_ROWS", {"cpu": 300})
    assert_same(run(values, start, dtype=dtype, processes=processes), expected)
    assert_same(run(values, start, dtype=dtype, processes=processes, kept_bytes=0), expected)


def test_coarse_iterations_change_neither_with_processes_and_formats_nor_by_resuming(
    values: npt.NDArray[np.float16], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = beginning(values, NUM_CLUSTERS)
    without = run(values, start, iterations=24)
    monkeypatch.setattr(lloyd, "PLUS_PLUS_CLUSTERS", NUM_CLUSTERS - 1)
    monkeypatch.setattr(coarse, "_NEAR_GROUPS", 4)
    states = run(values, start, iterations=24)
    # The first is exact but for rounding; the loose ones, 4 of 24, let it end nearer.
    assert states[0].similarity == pytest.approx(without[0].similarity, abs=1e-3)
    assert states[-1].similarity > without[-1].similarity
    assert not any(state.converged or state.num_empty for state in states)
    resumable = [state.resumable for state in states]
    assert resumable == sorted(resumable)
    num_coarse = resumable.index(True) + 1
    assert 4 <= num_coarse <= 18
    assert_same(run(values, states[num_coarse - 1], iterations=24), states[num_coarse:])

    monkeypatch.setattr(lloyd, "_RUN_ROWS", {"cpu": 300})
    for processes, dtype in ((1, torch.int8), (2, torch.bfloat16), (4, torch.int8)):
        assert_same(run(values, start, iterations=24, processes=processes, dtype=dtype, kept_bytes=2**20), states)


def test_empty_clusters_get_the_farthest_rows_on_any_number_of_processes(values: npt.NDArray[np.float16]) -> None:
    centroids = beginning(values, NUM_CLUSTERS).centroids_KD
    centroids[40:] = centroids[:30]
    states = run(values, LloydState(centroids))
    assert states[0].num_empty == 30
    assert states[1].num_empty < 30
    similarities = (torch.from_numpy(values).double() @ centroids.double().T).amax(dim=1)
    # Clusters 40 … 69 lose every tie, so the rows farthest from all become theirs, the farthest first.
    farthest = unit(values[int(similarities.argmin())][None].astype(np.float64)).astype(np.float32)
    assert np.allclose(states[0].centroids_KD[40], farthest[0], atol=1e-3)
    assert_same(run(values, LloydState(centroids), processes=2), states)


def test_it_ends_where_no_centroid_moves() -> None:
    values = unit(np.repeat(np.eye(8), 20, axis=0))
    states = run(values, LloydState(torch.eye(8)), iterations=9)
    assert [state.converged for state in states] == [True]
    assert run(values, LloydState(torch.eye(8), 9), iterations=9, processes=1) == []
