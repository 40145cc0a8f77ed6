"""Rows that occur among others too."""

from __future__ import annotations

import torch

from clipcid_cli.algorithms.near.repeated import find_repeated


def make_rows(count: int, seed: int) -> torch.Tensor:
    rows = torch.randn(count, 24, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def test_rows_that_are_equal_but_for_rounding_are_found() -> None:
    rows, others = make_rows(300, 0), make_rows(2_000, 1)
    assert not find_repeated(rows, others).any()
    rows[::3] = others[torch.randperm(2_000, generator=torch.Generator().manual_seed(2))[:100]] + 1e-7
    rows[1] = torch.nn.functional.normalize(others[5] + 1e-3, dim=0)  # near, and another image
    assert torch.nonzero(find_repeated(rows, others))[:, 0].tolist() == list(range(0, 300, 3))


def test_a_model_that_tells_nothing_apart_takes_no_time() -> None:
    alike = make_rows(1, 0).expand(50_000, -1)
    assert find_repeated(alike[:1_000], alike).all()
