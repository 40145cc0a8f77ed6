"""Scores of low-precision copies are never farther from the exact products than is proven, and residuals are measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from clipcid_cli.algorithms.near.block import (
    distortion,
    make_block,
    multiply,
    rotate,
    rotation_error,
    rounded_error,
    score_error,
)

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
