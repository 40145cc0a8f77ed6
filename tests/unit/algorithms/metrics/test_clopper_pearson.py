"""The interval of a rate."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from clipcid_cli.algorithms.metrics.intervals import clopper_pearson


@pytest.mark.parametrize(
    ("hits", "trials"),
    [(0, 1), (1, 1), (0, 30_000), (1, 30_000), (17, 30_000), (5, 10), (30_000, 30_000), (29_990, 30_000)],
)
def test_interval_is_scipys(hits: int, trials: int) -> None:
    # SciPy stops at an absolute error of 2e-12.
    expected = binomtest(hits, trials).proportion_ci(confidence_level=0.95, method="exact")
    np.testing.assert_allclose(clopper_pearson(hits, trials), (expected.low, expected.high), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("hits", "trials"), [(0, 0), (2, 1), (-1, 5)])
def test_counts_that_do_not_fit_are_refused(hits: int, trials: int) -> None:
    with pytest.raises(ValueError, match="hits in"):
        clopper_pearson(hits, trials)
