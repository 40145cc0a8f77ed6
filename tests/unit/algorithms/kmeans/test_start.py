"""The iterations along few directions equal their definition in integers, for any format and number of processes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from kmeans_data import ArrayRows, assert_same, beginning, run, unit
from torch.utils._python_dispatch import TorchDispatchMode

from clipcid_cli.algorithms.kmeans import lloyd, start
from clipcid_cli.algorithms.kmeans.lloyd import LloydState
from clipcid_cli.algorithms.kmeans.prepared import PreparedRows
from clipcid_cli.algorithms.kmeans.start import CodedRows, code_centroids, nearest_codes
from clipcid_cli.algorithms.kmeans.subspace import Subspace, find_subspace
from clipcid_cli.algorithms.near.centroids import centroids_of_sums

NUM_ROWS, WIDTH, NUM_CLUSTERS = 3000, 256, 1024


@pytest.fixture(scope="module")
def values() -> npt.NDArray[np.float16]:
    """A cloud with few strong directions."""
    random = np.random.default_rng(0)
    return unit(random.normal(size=(NUM_ROWS, WIDTH)) * np.arange(1.0, WIDTH + 1) ** -0.8)


@pytest.fixture(scope="module")
def subspace(values: npt.NDArray[np.float16]) -> Subspace:
    """Its directions."""
    found = find_subspace(ArrayRows(values), NUM_CLUSTERS)
    assert found is not None
    return found


def objective(values: npt.NDArray[np.float16], centroids: torch.Tensor) -> float:
    nearest_N = (torch.from_numpy(values).double() @ centroids.double().T).amax(dim=1)
    return float(nearest_N.mean())


def test_codes_are_within_half_a_step_and_steps_as_small_as_they_can_be() -> None:
    random = torch.Generator().manual_seed(0)
    projected = (torch.randn(200, 64, generator=random) * 2.0**20).round() * 2.0**-23
    projected[0] = 0.0
    projected[1] = 2.0**-23
    coded = CodedRows.of(projected)
    assert torch.equal(coded.steps_B * 2**23, (coded.steps_B * 2**23).round())
    assert bool(((coded.values() - projected.double()).abs() <= coded.steps_B.double()[:, None] / 2).all())
    assert bool((coded.codes_Bd[2:].abs().amax(dim=1) >= 126).all())
    assert torch.equal(coded.values()[:2], projected[:2].double())
    centroids = torch.nn.functional.normalize(projected, dim=1)
    codes = code_centroids(centroids)
    assert int(codes.abs().max()) == 127
    assert torch.allclose(codes * (centroids.abs().max() / 127), centroids, atol=float(centroids.abs().max()) / 250)
    assert not code_centroids(torch.zeros(3, 64)).any()


class DividesAsCuda(TorchDispatchMode):
    """Where a tensor is divided by a number, multiplies by its reciprocal in float32, as PyTorch does on CUDA."""

    def __torch_dispatch__(
        self, call: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if call is torch.ops.aten.div.Tensor and not isinstance(args[1], torch.Tensor):
            return args[0] * float(np.float32(1) / np.float32(args[1]))
        return call(*args, **kwargs or {})


def test_codes_do_not_depend_on_how_a_device_divides_by_a_number() -> None:
    """For centroids with entries halfway between two codes."""
    for largest in torch.arange(1.0, 128.0).rsqrt():
        centroids = torch.cat([largest * (torch.arange(0.5, 127.5) / 127), largest[None]])[None]
        codes = code_centroids(centroids)
        with DividesAsCuda():
            assert torch.equal(code_centroids(centroids), codes)


def test_the_first_of_the_largest_products_wins_in_every_format(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    rows, centroids = (torch.randint(-127, 128, (count, 64), generator=random, dtype=torch.int8) for count in (40, 300))
    rows[0], centroids[::2] = 0, centroids[1::2].clone()  # all equal; and each twice
    centroids[:, 0].clamp_(max=-1)
    rows[1] = torch.eye(64, dtype=torch.int8)[0] * 127  # all products negative
    expected = (rows.long() @ centroids.long().T).numpy().argmax(axis=1)
    monkeypatch.setattr(start, "_CHUNK", {"cpu": 7})
    for dtype in (torch.int8, torch.bfloat16, torch.float32):
        assert np.array_equal(nearest_codes(rows, centroids, dtype).numpy(), expected)


def test_iterations_are_those_of_the_definition(values: npt.NDArray[np.float16], subspace: Subspace) -> None:
    begun, exact = beginning(values, NUM_CLUSTERS), torch.from_numpy(values)
    coded, projected = CodedRows.of(subspace.project(exact)), subspace.project(begun.centroids_KD)
    centroids = centroids_of_sums(projected.double(), torch.zeros_like(projected))
    for number in range(3):
        labels = (coded.codes_Bd.long() @ code_centroids(centroids).long().T).numpy().argmax(axis=1)
        summed = coded.values() if number < 2 else exact.double()
        sums = torch.zeros(NUM_CLUSTERS, summed.shape[1], dtype=torch.float64)
        for row, label in zip(summed, labels.tolist(), strict=True):
            sums[label] += row
        centroids = centroids_of_sums(sums, centroids if number < 2 else begun.centroids_KD)
    first = run(values, begun, subspace=subspace)[0]
    assert torch.equal(first.centroids_KD, centroids)
    assert (first.iterations, first.converged) == (3, False)
    assert first.num_empty == NUM_CLUSTERS - len(np.unique(labels))
    own = (exact.double() * centroids[torch.from_numpy(labels)].double()).sum(dim=1)
    assert first.similarity == pytest.approx(float(own.mean()), rel=1e-9)


def test_projected_means_are_means_of_projections(values: npt.NDArray[np.float16], subspace: Subspace) -> None:
    """Up to rounding: so that only projections need be summed until the last iteration."""
    rows = torch.from_numpy(values[:40])
    sums, projected = rows.double().sum(dim=0), CodedRows.of(subspace.project(rows)).values().sum(dim=0)
    mean = subspace.project(centroids_of_sums(sums[None], torch.zeros(1, WIDTH)))[0].double()
    assert float(torch.nn.functional.cosine_similarity(mean, projected, dim=0)) > 0.9995


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32], ids=str)
def test_processes_formats_and_memory_change_no_bit(
    values: npt.NDArray[np.float16], subspace: Subspace, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = beginning(values, NUM_CLUSTERS)
    expected = run(values, begun, subspace=subspace, iterations=4, dtype=torch.bfloat16)
    monkeypatch.setattr(lloyd, "_RUN_ROWS", {"cpu": 300})
    options = {"subspace": subspace, "iterations": 4, "dtype": dtype, "processes": 3}
    assert_same(run(values, begun, **options, kept_bytes=0), expected)
    assert_same(run(values, begun, **options, kept_bytes=50_000), expected)


def test_kept_rows_of_both_forms_fit_into_the_memory_for_them(
    values: npt.NDArray[np.float16], subspace: Subspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most: dict[Any, int] = {CodedRows: 0, PreparedRows: 0, "all": 0}

    def watched(make: Callable[..., Any]) -> Callable[..., Any]:
        def make_and_count(*args: Any) -> Any:
            run = make(*args)
            alive.add(run)
            most[type(run)] = max(most[type(run)], run.num_bytes)
            most["all"] = max(most["all"], sum(other.num_bytes for other in alive))
            return run

        return make_and_count

    monkeypatch.setattr(lloyd, "_RUN_ROWS", {"cpu": 300})
    monkeypatch.setattr(CodedRows, "of", watched(CodedRows.of))
    monkeypatch.setattr(lloyd, "prepare_rows", watched(lloyd.prepare_rows))
    # Room for all rows in the first form and two of ten runs in the second.
    run(values, beginning(values, NUM_CLUSTERS), subspace=subspace, dtype=torch.int8, kept_bytes=500_000)
    assert 500_000 < most["all"] <= 500_000 + most[CodedRows] + most[PreparedRows]  # and those in hand


def test_resumed_after_it_ends_the_same_and_is_as_good(values: npt.NDArray[np.float16], subspace: Subspace) -> None:
    begun = beginning(values, NUM_CLUSTERS)
    whole = run(values, begun, subspace=subspace)
    assert [state.iterations for state in whole] == list(range(3, 3 + len(whole)))
    for place in (0, 2):
        again = run(values, whole[place], subspace=subspace)
        assert torch.equal(again[-1].centroids_KD, whole[-1].centroids_KD)
    full = run(values, begun)
    assert objective(values, whole[-1].centroids_KD) > 0.995 * objective(values, full[-1].centroids_KD)


def test_empty_clusters_keep_their_centroid_until_iterations_in_full() -> None:
    """Rows that differ in pairs outside the directions only, and two equal centroids for each pair: one of them is empty."""
    random, half = np.random.default_rng(2), NUM_CLUSTERS // 2
    inside = random.normal(size=(half, 64))
    inside /= np.linalg.norm(inside, axis=1, keepdims=True)
    outside = random.normal(size=(half, WIDTH - 64))
    outside *= 0.3 / np.linalg.norm(outside, axis=1, keepdims=True)
    values = unit(np.concatenate([np.hstack([inside, outside]), np.hstack([inside, -outside])] * 2))
    means = torch.from_numpy(np.hstack([inside, np.zeros_like(outside)]))
    centroids = centroids_of_sums(torch.cat([means, means]), torch.zeros(NUM_CLUSTERS, WIDTH))
    axes = Subspace(torch.eye(WIDTH, 64), 0.9, 0.9)
    states = run(values, LloydState(centroids), subspace=axes)
    assert states[0].num_empty == half  # of equals the smaller number has all rows
    assert torch.equal(states[0].centroids_KD[half:], centroids[half:])
    assert not torch.equal(states[1].centroids_KD[half:], centroids[half:])
