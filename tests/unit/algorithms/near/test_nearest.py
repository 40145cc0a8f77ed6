"""Low-precision products: no score is farther from the exact product than is proven, and the nearest found are exact."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from clipcid_cli.algorithms.kmeans.centroids import centroids_of_sums
from clipcid_cli.algorithms.near import nearest
from clipcid_cli.algorithms.near.block import (
    distortion,
    make_block,
    multiply,
    rotate,
    rotation_error,
    rounded_error,
    score_error,
)
from clipcid_cli.algorithms.near.nearest import Found, NearestCentroid, top_nearest

FORMATS = (torch.int8, torch.bfloat16, torch.float16, torch.float32)


def make_rows(width: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    values = torch.randn(60, width, generator=generator)
    if kind == "worst":  # all lie a little above a power of two, to which bfloat16 rounds them: all errors add up
        mantissa = 1 + torch.randint(0, 5, values.shape, generator=generator) / 1024
        return (values[0].sign() * mantissa * 2.0 ** round(math.log2(width**-0.5))).half()
    if kind == "spikes":  # a few columns many times as large as the rest
        values[:, ::17] *= 40
    rows = torch.nn.functional.normalize(values, dim=1)
    return (rows * torch.linspace(0.2, 1.9, 60)[:, None]).half()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("width", [1, 2, 33, 512])
@pytest.mark.parametrize("kind", ["cloud", "spikes", "worst"])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32], ids=str)
def test_scores_are_within_the_proven_error(
    kind: str, width: int, dtype: torch.dtype, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipcid_cli.algorithms.near.block.ROWS_IN_CACHE", 17)
    both = make_rows(width, kind), make_rows(width, "worst" if kind == "worst" else "cloud").flip(0).contiguous()
    if stored == torch.float32:
        both = tuple((rows.float() * 0.7 * 2**24).round() / 2**24 for rows in both)
    a, b = (make_block(np.arange(60), rows, dtype) for rows in both)
    exact = a.stored.double() @ b.stored.double().T
    copies_a, copies_b = (block.scan.double() * block.step for block in (a, b))
    assert float((copies_a @ copies_b.T - exact).abs().max()) <= score_error(a, b)
    computed = multiply(a.scan, b.scan).double() * (a.step * b.step)
    assert float((computed - exact).abs().max()) <= rounded_error(a, b)
    if dtype in (stored, torch.float32):
        assert a.residual == 0.0
        return
    wide = rotate(a.stored) if dtype == torch.int8 else a.stored
    apart = float((wide.double() - copies_a[:, :width]).norm(dim=1).max())
    assert 0.0 < apart <= a.residual < min(0.15, 1.2 * apart)
    assert rounded_error(a, b) < 0.5


@pytest.mark.parametrize("width", [1, 2, 31, 33, 192, 512])
def test_rotation_is_as_exact_and_as_orthogonal_as_claimed(width: int) -> None:
    rows = make_rows(width, "spikes")
    rotated = rotate(rows).double()
    matrix = rotate(torch.eye(width)).double().T  # T·e_i is exact: one product an entry of each factor
    lengths = rows.double().norm(dim=1)
    assert float(torch.linalg.matrix_norm(matrix.T @ matrix - torch.eye(width), 2)) <= distortion(width) + 1e-6
    assert distortion(width) < 1e-5
    assert bool(((rotated - rows.double() @ matrix.T).norm(dim=1) <= 2 * rotation_error(width) * lengths).all())
    assert float(rotate(torch.eye(width)).abs().max()) <= 2.0 / width**0.5 + 1e-6  # a single column is spread over all


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
        return unit_rows(normal(150, 64)), on_grid(normal(1100, 64))
    if name == "cone":  # as CLIP's embeddings: all similarities close to each other
        return unit_rows(normal(150, 48) + 4), on_grid(normal(700, 48) + 4)
    if name == "copies":  # many equal centroids and rows that lie on them: ties everywhere
        centroids = on_grid(normal(40, 32)).repeat(30, 1)
        return unit_rows(centroids[:40].clone()), centroids
    if name == "opposite":  # no similarity is positive
        centroids = on_grid(normal(70, 16).abs())
        return unit_rows(-normal(50, 16).abs()), centroids
    if name == "several parts":
        return unit_rows(normal(60, 24)), on_grid(normal(9000, 24))
    if name == "one centroid":
        return unit_rows(normal(20, 8)), on_grid(normal(1, 8))
    if name == "one column":
        return unit_rows(normal(20, 1)), on_grid(normal(5, 1))
    assert name == "axes"  # subnormal entries and exact zeros
    rows = torch.eye(16).repeat(4, 1) + 3e-8
    return rows.half(), on_grid(torch.eye(16).repeat(5, 1) * torch.linspace(0.5, 1, 80)[:, None])


CASES = ["spread", "cone", "copies", "opposite", "several parts", "one centroid", "one column", "axes"]


def find(rows: torch.Tensor, centroids: torch.Tensor, dtype: torch.dtype) -> Found:
    return NearestCentroid(centroids, dtype).of(make_block(np.arange(len(rows)), rows, dtype))


def rank(rows: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    exact = rows.double() @ centroids.double().T
    return torch.sort(exact, dim=1, descending=True, stable=True)


@pytest.mark.parametrize("limits", ["as they are", "small"])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_nearest_is_that_of_a_float64_product(
    case: str, dtype: torch.dtype, limits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, centroids = make_case(case)
    if limits == "small":  # many products, and crowded ones cut
        monkeypatch.setattr(nearest, "_PRODUCT_CENTROIDS", {"cpu": 256})
        monkeypatch.setattr(nearest, "_CROWDED", 10**9)
        monkeypatch.setattr(nearest, "_MAX_GROUPS", 100)
    found, (cosines, numbers) = find(rows, centroids, dtype), rank(rows, centroids)
    assert torch.equal(found.number_B, numbers[:, 0])
    assert torch.equal(found.cosine_B, cosines[:, 0])
    if len(centroids) > 1:
        assert bool((found.others_B >= cosines[:, 1]).all())


@pytest.mark.parametrize("given", ["exact", "less"])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_known_centroid_counts_with_the_similarity_that_is_given(
    case: str, dtype: torch.dtype, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "_PRODUCT_CENTROIDS", {"cpu": 256})
    rows, centroids = make_case(case)
    exact = rows.double() @ centroids.double().T
    number = torch.arange(len(rows)) * 7 % len(centroids)
    number[::3] = exact[::3].argmax(dim=1)
    number[1::3] = len(centroids) - 1 - torch.arange(len(rows))[1::3] % 2 * (len(centroids) // 2)
    cosine = exact.gather(1, number[:, None])[:, 0] - (0.01 if given == "less" else 0.0)
    expected, numbers = torch.sort(
        exact.scatter(1, number[:, None], cosine[:, None]), dim=1, descending=True, stable=True
    )
    search = NearestCentroid(centroids, dtype)
    found = search.of(make_block(np.arange(len(rows)), rows, dtype), known=Found(number, cosine, cosine))
    assert torch.equal(found.number_B, numbers[:, 0])
    assert torch.equal(found.cosine_B, expected[:, 0])
    if len(centroids) > 1:
        assert bool((found.others_B >= expected[:, 1]).all())


@pytest.mark.parametrize("with_faiss", [True, False])
@pytest.mark.parametrize(("m", "all_exact"), [(1, False), (2, True), (16, False), (16, True)])
@pytest.mark.parametrize("case", CASES)
def test_the_top_ones_are_those_of_a_float64_product(
    case: str, m: int, all_exact: bool, with_faiss: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_faiss:
        monkeypatch.setitem(sys.modules, "faiss", None)  # as where it is not installed
    rows, centroids = make_case(case)
    cosines, numbers = rank(rows, centroids)
    m = min(m, len(centroids))
    found, similarities = top_nearest(rows, centroids, m, all_exact=all_exact)
    assert torch.equal(found, numbers[:, :m])
    assert torch.equal(similarities[:, 0], cosines[:, 0])
    assert torch.equal(similarities.half(), cosines[:, :m].half())
    if all_exact:
        assert torch.equal(similarities, cosines[:, :m])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_near_ties_that_the_product_cannot_tell_are_decided_exactly(dtype: torch.dtype) -> None:
    # Centroids around a row that differ by one step of the grid in one entry: similarities differ by 2⁻²⁴ of that entry of
    # the row, far below what any of the formats resolves, and the nearest is the last but for exact ties.
    row = unit_rows(torch.randn(1, 96, generator=torch.Generator().manual_seed(2)).abs() + 0.1)
    centroids = on_grid(row.float()).repeat(96, 1)
    centroids[torch.arange(96), torch.arange(96)] -= 2.0**-24
    cosines, numbers = rank(row, centroids)
    assert len(cosines.unique()) > 50
    assert float(cosines.max() - cosines.min()) < 2.0**-24
    assert find(row, centroids, dtype).number_B.tolist() == numbers[:, 0].tolist()
    for m in (1, 5, 60, 96):
        assert torch.equal(top_nearest(row, centroids, m)[0], numbers[:, :m])
