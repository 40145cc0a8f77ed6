"""The fast search for nearest centroids against a float64 product with all of them, on easy and on hostile rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipcid_cli.algorithms.kmeans import nearest as nearest_centroids
from clipcid_cli.algorithms.kmeans import wide
from clipcid_cli.algorithms.kmeans.best_so_far import Nearest
from clipcid_cli.algorithms.kmeans.nearest import NearestCentroids
from clipcid_cli.algorithms.kmeans.prepared import prepare_centroids, prepare_rows
from clipcid_cli.algorithms.kmeans.top_nearest import top_nearest
from clipcid_cli.algorithms.near.centroids import centroids_of_sums

DTYPES = [torch.int8, torch.bfloat16, torch.float16, torch.float32]


def unit_rows(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(values, dim=1).half()


def on_grid(values: torch.Tensor) -> torch.Tensor:
    return centroids_of_sums(values.double(), torch.zeros_like(values))


def make_case(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows float16 and centroids on the grid."""
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    if name == "spread":
        return unit_rows(normal(300, 64)), on_grid(normal(1100, 64))
    if name == "cone":  # as CLIP's embeddings: all similarities close to each other
        return unit_rows(normal(300, 48) + 4), on_grid(normal(1500, 48) + 4)
    if name == "copies":  # many equal centroids and rows that lie on them: ties everywhere
        centroids = on_grid(normal(40, 32)).repeat(30, 1)
        return unit_rows(centroids[:40].clone()), centroids
    if name == "opposite":  # no similarity is positive
        centroids = on_grid(normal(70, 16).abs())
        return unit_rows(-normal(50, 16).abs()), centroids
    if name == "several chunks":
        return unit_rows(normal(150, 24)), on_grid(normal(9000, 24))
    if name == "one centroid":
        return unit_rows(normal(20, 8)), on_grid(normal(1, 8))
    assert name == "axes"  # subnormal entries and exact zeros
    rows = torch.eye(16).repeat(4, 1) + 3e-8
    return rows.half(), on_grid(torch.eye(16).repeat(5, 1) * torch.linspace(0.5, 1, 80)[:, None])


CASES = ["spread", "cone", "copies", "opposite", "several chunks", "one centroid", "axes"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_answers_equal_a_float64_product_with_all_centroids(case: str, dtype: torch.dtype) -> None:
    rows, centroids = make_case(case)
    exact = rows.double() @ centroids.double().T
    search = NearestCentroids(centroids, dtype)
    nearest = search.nearest(prepare_rows(rows, dtype))
    ranked = torch.sort(exact, dim=1, descending=True, stable=True)
    assert torch.equal(nearest.centroids_B, ranked.indices[:, 0])
    assert torch.equal(nearest.similarities_B, ranked.values[:, 0])
    if len(centroids) > 1:
        assert bool((nearest.others_B >= ranked.values[:, 1]).all())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_wide_search_of_gpus_gives_the_same_answers(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, centroids = make_case(case)
    search, prepared = NearestCentroids(centroids, dtype), prepare_rows(rows, dtype)
    expected = search.nearest(prepared)
    given = (prepared, centroids, list(search._chunks(len(centroids))), search._prepared.error(prepared))
    if case == "copies":
        assert wide.nearest_at_once(*given, None) is None, "it would fill the memory"
    monkeypatch.setattr(wide, "_MOST_GROUPS", 1000)
    of_other = search.similarities(rows, torch.arange(len(rows)), torch.zeros(len(rows), dtype=torch.int64))
    for known in (None, Nearest(torch.zeros(len(rows), dtype=torch.int64), of_other, of_other), expected):
        found = wide.nearest_at_once(*given, known)
        assert found is not None
        assert torch.equal(found.centroids_B, expected.centroids_B)
        assert torch.equal(found.similarities_B, expected.similarities_B)
        if len(centroids) > 1:
            second = torch.sort(rows.double() @ centroids.double().T, dim=1, descending=True).values[:, 1]
            assert bool((found.others_B >= second).all())


@pytest.mark.parametrize("m", [1, 2, 16])
@pytest.mark.parametrize("case", CASES)
def test_the_top_ones_equal_a_float64_product(case: str, m: int) -> None:
    rows, centroids = make_case(case)
    ranked = torch.sort(rows.double() @ centroids.double().T, dim=1, descending=True, stable=True)
    m = min(m, len(centroids))
    found, similarities = top_nearest(rows, centroids, m)
    assert torch.equal(found, ranked.indices[:, :m])
    assert torch.equal(similarities[:, 0], ranked.values[:, 0])
    assert np.array_equal(similarities.numpy().astype(np.float16), ranked.values[:, :m].numpy().astype(np.float16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_near_ties_that_the_product_cannot_tell_are_decided_exactly(dtype: torch.dtype) -> None:
    # Centroids around a row that differ by one step of the grid in one entry: similarities differ by 2⁻²⁴ of that entry of
    # the row, far below what any of the formats resolves, and the nearest is the last but for exact ties.
    row = unit_rows(torch.randn(1, 96, generator=torch.Generator().manual_seed(2)).abs() + 0.1)
    base = on_grid(row.float())
    centroids = base.repeat(96, 1)
    centroids[torch.arange(96), torch.arange(96)] -= 2.0**-24
    exact = row.double() @ centroids.double().T
    assert len(exact.unique()) > 50
    assert float(exact.max() - exact.min()) < 2.0**-24
    search, prepared = NearestCentroids(centroids, dtype), prepare_rows(row, dtype)
    assert int(search.nearest(prepared).centroids_B) == int(exact.argmax())
    assert torch.equal(top_nearest(row, centroids, 96)[0], torch.sort(exact, descending=True, stable=True).indices)
    for m in (1, 5, 60):
        assert torch.equal(
            top_nearest(row, centroids, m)[0], torch.sort(exact, descending=True, stable=True).indices[:, :m]
        )


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
def test_most_centroids_are_discarded_by_the_fast_product(dtype: torch.dtype) -> None:
    rows, centroids = make_case("spread")
    decided = 0

    class Counting(NearestCentroids):
        def similarities(self, rows_BD: torch.Tensor, row_P: torch.Tensor, centroid_P: torch.Tensor) -> torch.Tensor:
            nonlocal decided
            decided += len(row_P)
            return super().similarities(rows_BD, row_P, centroid_P)

    Counting(centroids, dtype).nearest(prepare_rows(rows, dtype))
    assert 0 < decided < 4 * len(rows)


def test_the_block_size_of_centroids_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, centroids = make_case("several chunks")
    whole = NearestCentroids(centroids, torch.bfloat16).nearest(prepare_rows(rows, torch.bfloat16))
    monkeypatch.setattr(nearest_centroids, "_CHUNK", {"cpu": 256})
    chunked = NearestCentroids(centroids, torch.bfloat16).nearest(prepare_rows(rows, torch.bfloat16))
    assert torch.equal(whole.centroids_B, chunked.centroids_B)
    assert torch.equal(whole.similarities_B, chunked.similarities_B)


def test_similarities_are_exact_in_any_order() -> None:
    rows, centroids = make_case("spread")
    forward = (rows.double() * centroids[:300].double()).sum(dim=1)
    order = torch.from_numpy(np.random.default_rng(0).permutation(64))
    shuffled = torch.zeros(300, dtype=torch.float64)
    for column in order.tolist():
        shuffled += rows[:, column].double() * centroids[:300, column].double()
    assert torch.equal(forward, shuffled)


def test_wrong_arguments_are_named() -> None:
    search = NearestCentroids(on_grid(torch.eye(8)[:4]), torch.float32)
    with pytest.raises(ValueError, match="rows must be float16"):
        prepare_rows(torch.zeros(3, 8), torch.float32)
    with pytest.raises(ValueError, match=r"product can be in .*, not torch.float64"):
        prepare_rows(torch.zeros(3, 8).half(), torch.float64)
    with pytest.raises(ValueError, match=r"8 wide in torch.float32, not 9 in torch.float32"):
        search.nearest(prepare_rows(torch.zeros(3, 9).half(), torch.float32))
    with pytest.raises(ValueError, match=r"8 wide in torch.float32, not 8 in torch.bfloat16"):
        search.nearest(prepare_rows(torch.zeros(3, 8).half(), torch.bfloat16))
    with pytest.raises(ValueError, match=r"m must lie in \[1, 4\], not 5"):
        top_nearest(torch.zeros(3, 8).half(), search.centroids_KD, 5)
    with pytest.raises(ValueError, match=r"rows must be float16 \[B, 8\], not torch.float32 \[3, 8\]"):
        top_nearest(torch.zeros(3, 8), search.centroids_KD, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_product_is_off_by_more_than_is_proven(dtype: torch.dtype) -> None:
    for case in ("spread", "cone", "axes", "one centroid"):
        rows, centroids = make_case(case)
        prepared, copies = prepare_rows(rows, dtype), prepare_centroids(centroids, dtype, None, 1)
        product = (
            prepared.cast_BD.double() @ copies.cast_KD.double().T * prepared.steps_B[:, None].double() * copies.step
        )
        difference = (product - rows.double() @ centroids.double().T).abs().amax(dim=1)
        assert bool((difference <= copies.error(prepared)).all())
        assert float(copies.error(prepared).max()) < 0.05


def test_centroids_off_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="not on the grid"):
        NearestCentroids(torch.full((2, 4), 0.1), torch.float32)
