"""Scores of low-precision copies are never farther from the exact products than is proven, and residuals are measured."""

from __future__ import annotations

import pytest
import torch

from clipcid_cli.algorithms.near.block import (
    FORMATS,
    check_format,
    common_step,
    copies_error,
    is_lossless,
    narrow,
    residuals,
    row_steps,
    widen,
)
from clipcid_cli.algorithms.near.int8 import distortion, rotate, rotation_error


def make_rows(width: int, kind: str) -> torch.Tensor:
    values = torch.randn(60, width, generator=torch.Generator().manual_seed(width))
    if kind == "spikes":  # a few columns many times as large as the rest
        values[:, ::17] *= 40
    rows = torch.nn.functional.normalize(values, dim=1)
    return (rows * torch.linspace(0.2, 1.9, 60)[:, None]).half()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("width", [1, 2, 33, 512])
@pytest.mark.parametrize("kind", ["cloud", "spikes"])
@pytest.mark.parametrize("steps_of", ["rows", "block"])
def test_scores_are_within_the_proven_error(kind: str, width: int, dtype: torch.dtype, steps_of: str) -> None:
    a, b = make_rows(width, kind), make_rows(width, "cloud").flip(0).contiguous()
    lengths, found, scores = [], [], []
    for rows in (a, b):
        wide = widen(rows, dtype)
        steps = torch.ones(len(rows), 1)
        if dtype == torch.int8:
            steps = row_steps(wide) if steps_of == "rows" else torch.full((len(rows), 1), common_step([wide]))
        copy = narrow(wide, dtype, steps)
        length = rows.double().norm(dim=1)
        lengths.append(length)
        found.append(residuals(wide, copy, length, steps).double())
        scores.append(copy.double() * steps.double())
    exact = a.double() @ b.double().T
    error = copies_error(dtype, width, (lengths[0], float(lengths[1].max())), (found[0], float(found[1].max())))
    assert bool(((scores[0] @ scores[1].T - exact).abs() <= error[:, None]).all())
    if is_lossless(a.dtype, dtype):
        assert not found[0].any()
    else:
        assert 0 < float(found[0].max()) < 0.05
        apart = (widen(a, dtype).double() - scores[0][:, :width]).norm(dim=1)
        assert bool((apart <= found[0]).all())
        assert float(found[0].max()) < 1.2 * float(apart.max())
        assert float(error.max()) < 0.2


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


def test_one_step_of_a_block_is_the_largest_of_its_rows() -> None:
    wide = widen(make_rows(64, "spikes"), torch.int8)
    assert common_step(torch.split(wide, 7)) == float(row_steps(wide).max())


def test_what_is_lossless() -> None:
    pairs = [(torch.float16, target) for target in FORMATS] + [(torch.float32, target) for target in FORMATS]
    assert [target for source, target in pairs if is_lossless(source, target)] == [
        torch.float16, torch.float32, torch.float32
    ]  # fmt: skip


def test_formats_without_a_product_are_refused() -> None:
    with pytest.raises(ValueError, match=r"product can be in .*, not torch.float64"):
        check_format(torch.float64, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"products in torch.int8 are for CPUs, not cuda"):
        check_format(torch.int8, torch.device("cuda"))
