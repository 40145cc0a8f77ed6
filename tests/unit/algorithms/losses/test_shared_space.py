"""The principal axes on which student and teacher are compared."""

from __future__ import annotations

import numpy as np
import pytest

from clipcid_cli.algorithms.losses.shared_space import principal_axes, second_moment


def test_axes_keep_what_lies_in_few_dimensions() -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(200, 3)) @ random.normal(size=(3, 10))
    found = principal_axes(second_moment([rows[:90], rows[90:]], 10), 3)
    assert found.kept == pytest.approx(1)
    axes = found.basis_Dd.double().numpy()
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    # Dot products survive: that is what the losses see.
    np.testing.assert_allclose((rows @ axes) @ (rows @ axes).T, rows @ rows.T, rtol=1e-4, atol=1e-3)
    half = principal_axes(rows.T @ rows, 1)
    assert half.kept == pytest.approx(((rows @ half.basis_Dd.numpy()) ** 2).sum() / (rows**2).sum(), rel=1e-6)
    assert (axes[np.abs(axes).argmax(axis=0), range(3)] > 0).all()


def test_the_second_moment_is_summed_in_float64() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float16)
    expected = rows.astype(np.float64).T @ rows.astype(np.float64)
    np.testing.assert_allclose(second_moment([rows[:20], rows[20:21], rows[21:]], 6), expected, rtol=1e-12, atol=1e-12)
