"""The principal axes on which student and teacher are compared."""

from __future__ import annotations

import numpy as np
import pytest

from clipcid_cli.algorithms.losses.shared_space import principal_axes, second_moment


def test_axes_keep_what_lies_in_few_dimensions() -> None:
    random = np.random.default_rng(0)
    rows = (random.normal(size=(200, 3)) @ random.normal(size=(3, 10))).astype(np.float16)
    moment = second_moment([rows[:90], rows[90:91], rows[91:]], 10)
    wide = rows.astype(np.float64)
    np.testing.assert_allclose(moment, wide.T @ wide, rtol=1e-12, atol=1e-12)
    found = principal_axes(moment, 3)
    assert found.kept == pytest.approx(1, abs=1e-5)
    axes = found.basis_Dd.double().numpy()
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    # Dot products survive: that is what the losses see.
    np.testing.assert_allclose((wide @ axes) @ (wide @ axes).T, wide @ wide.T, rtol=1e-3, atol=1e-2)
    half = principal_axes(moment, 1)
    assert half.kept == pytest.approx(((wide @ half.basis_Dd.numpy()) ** 2).sum() / (wide**2).sum(), rel=1e-6)
    assert (axes[np.abs(axes).argmax(axis=0), range(3)] > 0).all()
