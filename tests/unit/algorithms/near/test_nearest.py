"""Low-precision products: no score is farther from the exact product than is proven; the nearest are those defined."""

from __future__ import annotations

import math

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
from clipcid_cli.algorithms.near.nearest import Integers, top
from clipcid_cli.algorithms.near.nearest import nearest as find_nearest

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


def rank(rows: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    exact = rows.double() @ centroids.double().T
    return torch.sort(exact, dim=1, descending=True, stable=True)


@pytest.mark.parametrize("limits", ["as they are", "small"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_nearest_is_that_of_integer_products(
    case: str, dtype: torch.dtype, limits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, centroids = make_case(case)
    if limits == "small":  # many products
        monkeypatch.setattr(nearest, "_PRODUCT_ROWS", {"cpu": 7})
        monkeypatch.setattr(nearest, "_PRODUCT_CENTROIDS", {"cpu": 64})
    number, similarity = find_nearest(
        Integers.from_rows(rows, dtype), Integers.from_rows(centroids, dtype, one_step=True)
    )
    limit = np.float32(min(127, math.isqrt(2**24 // rows.shape[1])))
    wide, all_centroids = rows.float().numpy(), centroids.numpy()
    step, centroid_step = np.abs(wide).max(axis=1, keepdims=True) / limit, np.abs(all_centroids).max() / limit
    products = np.round(wide / step).astype(np.int64) @ np.round(all_centroids / centroid_step).astype(np.int64).T
    assert number.tolist() == products.argmax(axis=1).tolist()
    scaled = products.max(axis=1) * step[:, 0].astype(np.float64) * np.float64(centroid_step)
    assert np.allclose(similarity.numpy(), scaled, rtol=1e-12, atol=0)
    # And the exact similarity is nearly the largest.
    cosines, _ = rank(rows, centroids)
    exact = (rows.double() * centroids[number].double()).sum(dim=1)
    assert float((cosines[:, 0] - exact).max()) < 0.02
    assert float((similarity - exact).abs().max()) < 0.02


@pytest.mark.parametrize("m", [1, 2, 16])
@pytest.mark.parametrize("case", CASES)
def test_the_top_ones_are_those_of_a_float64_product_but_for_its_last_digits(case: str, m: int) -> None:
    rows, centroids = make_case(case)
    cosines, numbers = rank(rows, centroids)
    m = min(m, len(centroids))
    found, similarities = top(rows, centroids, m)
    assert float((similarities.double() - cosines[:, :m]).abs().max()) < 1e-6
    is_clear = torch.nn.functional.pad(cosines[:, :-1] - cosines[:, 1:] > 1e-6, (1, 1), value=True)
    is_clear = (is_clear[:, :-1] & is_clear[:, 1:])[:, :m]
    assert torch.equal(found[is_clear], numbers[:, :m][is_clear])
    assert bool(((similarities[:, :-1] > similarities[:, 1:]) | (found[:, :-1] < found[:, 1:])).all())
    assert all(len(set(row)) == m for row in found.tolist())
    exact = (rows.double()[:, None] * centroids.double()[found]).sum(dim=2)
    assert float((similarities.double() - exact).abs().max()) < 1e-6
