"""Numbers of training steps that are read later than they are found."""

from __future__ import annotations

import math

import pytest
import torch

from clipcid_cli.training.train_state import StepValues


def add(values: StepValues, losses: list[float], norm: float, scale: float) -> None:
    values.add([torch.tensor(losses), torch.tensor(norm)], [torch.tensor(scale)])


def test_the_last_step_is_read() -> None:
    values = StepValues(torch.device("cpu"))
    add(values, [1.5, 2.5], 3.0, 4.0)
    assert values.read() == (1, [1.5, 2.5, 3.0, 4.0])
    add(values, [1.25, 2.25], 3.5, math.inf)
    assert values.read() == (2, [1.25, 2.25, 3.5, math.inf]), "what is not checked may be anything"


@pytest.mark.parametrize("bad", [([math.nan, 2.0], 3.0), ([1.0, math.inf], 3.0), ([1.0, 2.0], -math.inf)])
def test_the_first_step_that_is_not_finite_is_kept(bad: tuple[list[float], float]) -> None:
    values = StepValues(torch.device("cpu"))
    add(values, [1.0, 2.0], 3.0, 4.0)
    add(values, *bad, 5.0)
    add(values, [7.0, 8.0], 9.0, 10.0)
    add(values, [math.nan, math.nan], 9.0, 10.0)
    num_finite, kept = values.read()
    assert num_finite == 1
    assert kept == pytest.approx([*bad[0], bad[1], 5.0], nan_ok=True)
