"""Coarse comparisons of rows with centroids: nearly the nearest, and the same in every format."""

from __future__ import annotations

import pytest
import torch

from clipcid_cli.algorithms.kmeans import coarse
from clipcid_cli.algorithms.kmeans.coarse import CoarseCentroids, CoarseRows
from clipcid_cli.algorithms.near.exact import round_to_grid


def unit(count: int, width: int, seed: int) -> torch.Tensor:
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(values * torch.arange(1, width + 1) ** -0.7, dim=1)


@pytest.mark.parametrize("width", [1, 2, 37, 1500])
@pytest.mark.parametrize(("grouped", "near_groups"), [(False, 2), (True, 2), (True, 99)])
def test_what_is_found_is_nearly_the_nearest(
    width: int, grouped: bool, near_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coarse, "_NEAR_GROUPS", near_groups)
    monkeypatch.setattr(coarse, "PRODUCT_ROWS", {"cpu": 64})
    centroids, stored = round_to_grid(unit(300, width, 0)), unit(500, width, 1).half()
    exact = stored.double() @ centroids.double().T
    rows, search = CoarseRows.of(stored, torch.int8), CoarseCentroids(centroids, torch.int8, grouped=grouped)
    number, cosine = search.nearest(rows)
    each = torch.arange(500)
    assert float((exact.amax(dim=1) - exact[each, number]).max()) < 0.02
    assert float((exact[each, number] - cosine).abs().max()) < 0.02

    own = torch.randint(300, (500,), generator=torch.Generator().manual_seed(2))
    other, cosine, own_cosine = search.nearest_other(rows, own)
    assert (other != own).all()
    assert float((exact[each, other] - cosine).abs().max()) < 0.02
    assert float((exact[each, own] - own_cosine).abs().max()) < 0.02
    if near_groups == 99 or not grouped:
        nearest_other = exact.scatter(1, own[:, None], -9.0).amax(dim=1)
        assert float((nearest_other - exact[each, other]).max()) < 0.02

    wide = CoarseCentroids(centroids, torch.float32, grouped=grouped)
    for found in (search.nearest_other(rows, own), wide.nearest_other(CoarseRows.of(stored, torch.float32), own)):
        assert all(torch.equal(a, b) for a, b in zip(found, (other, cosine, own_cosine), strict=True))
    assert torch.equal(wide.nearest(CoarseRows.of(stored, torch.float32))[0], number)
