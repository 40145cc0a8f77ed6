"""A selection of rows: the numbers that numpy finds, whatever is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from clipcid_cli.steps.cluster.rows import Selection


@pytest.mark.parametrize("share", [0.0002, 0.3, 1.0])
@pytest.mark.parametrize("num_rows", [1, 4095, 4096, 20_011])
def test_chosen_rows_are_those_of_the_mask(num_rows: int, share: float) -> None:
    random = np.random.default_rng(0)
    mask = random.random(num_rows) < share
    mask[num_rows // 2] = True
    selection, numbers = Selection(mask), np.flatnonzero(mask)
    assert len(selection) == len(numbers)
    np.testing.assert_array_equal(selection.between(0, len(numbers)), numbers)
    for _ in range(50):
        start, stop = np.sort(random.integers(0, len(numbers) + 1, 2))
        np.testing.assert_array_equal(selection.between(int(start), int(stop)), numbers[start:stop])
    positions = random.integers(0, len(numbers), 300)
    np.testing.assert_array_equal(selection.at(positions), numbers[positions])
    assert selection.at(positions[:0]).shape == (0,)
    some = np.unique(positions)
    np.testing.assert_array_equal(selection.subset(some).between(0, len(some)), numbers[some])
