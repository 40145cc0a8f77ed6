"""A selection of rows has the numbers that numpy finds, whatever is asked for, and is a bit a row."""

from __future__ import annotations

import numpy as np
import pytest

from clipcid_cli.steps.cluster import Selection


@pytest.mark.parametrize("share", [0.0002, 0.3, 1.0])
@pytest.mark.parametrize("num_rows", [1, 4095, 4096, 20_011])
def test_chosen_rows_are_those_of_the_mask(num_rows: int, share: float) -> None:
    random = np.random.default_rng(0)
    mask = random.random(num_rows) < share
    mask[num_rows // 2] = True
    selection, places = Selection(mask), np.flatnonzero(mask)
    assert len(selection) == len(places)
    for _ in range(50):
        start, stop = np.sort(random.integers(0, len(places) + 1, 2))
        np.testing.assert_array_equal(selection.places(np.arange(start, stop)), places[start:stop])
    numbers = random.integers(0, len(places), 300)
    np.testing.assert_array_equal(selection.places(numbers), places[numbers])
    some = np.unique(numbers)
    np.testing.assert_array_equal(selection.subset(some).places(np.arange(len(some))), places[some])
