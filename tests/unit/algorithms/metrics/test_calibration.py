"""Calibration: against loops in float64 and SciPy's minimiser, in any blocks, and where no temperature is best."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from scipy.optimize import minimize_scalar

from clipcid_cli.algorithms.metrics.calibration import BINS, Blocks, fit_scale, measure_calibration


def in_blocks(cosines: torch.Tensor, labels: torch.Tensor, size: int = 1000) -> Blocks:
    def blocks() -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        return zip(torch.split(cosines, size), torch.split(labels, size), strict=True)

    return blocks


def make(images: int = 300, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines as CLIP's are, close together, of which the right one is larger than most."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 7, (images,), generator=random)
    cosines = 0.2 + 0.03 * torch.randn(images, 7, generator=random)
    cosines[torch.arange(images), labels] += 0.04
    return cosines, labels


def probabilities(row: list[float], scale: float) -> list[float]:
    top = max(row)
    powers = [math.exp(scale * (value - top)) for value in row]
    return [power / math.fsum(powers) for power in powers]


def log_loss(cosines: torch.Tensor, labels: torch.Tensor, scale: float) -> float:
    rows = zip(cosines.tolist(), labels.tolist(), strict=True)
    return math.fsum(-math.log(probabilities(row, scale)[label]) for row, label in rows) / len(labels)


@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0, 100.0])
def test_error_and_log_loss_are_loops_in_float64(scale: float) -> None:
    cosines, labels = make()
    cosines[5:9, 1] = cosines[5:9, 3] = 0.9  # two most likely classes, of which the first is predicted
    labels[5:9] = torch.tensor([1, 1, 3, 3])
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for row, label in zip(cosines.tolist(), labels.tolist(), strict=True):
        confidence = max(probabilities(row, scale))
        (number,) = [m for m in range(BINS) if m / BINS < confidence <= (m + 1) / BINS]
        bins[number].append((confidence, row.index(max(row)) == label))
    gaps = [abs(math.fsum(right for _, right in one) - math.fsum(confidence for confidence, _ in one)) for one in bins]
    for size in (1000, 7, 1):
        found = measure_calibration(in_blocks(cosines, labels, size), scale)
        assert found.expected_calibration_error == pytest.approx(math.fsum(gaps) / len(labels), abs=1e-12)
        assert found.log_loss == pytest.approx(log_loss(cosines, labels, scale), abs=1e-12)
        assert found.images == len(labels)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_fitted_scale_is_scipys(seed: int) -> None:
    cosines, labels = make(120, seed=seed)
    found = fit_scale(in_blocks(cosines, labels, 50))
    theirs = minimize_scalar(
        lambda scale: log_loss(cosines, labels, scale), bracket=(1.0, 50.0), method="brent", options={"xtol": 1e-12}
    )
    assert found == pytest.approx(theirs.x, rel=1e-6)
    assert 20 < theirs.x < 200
    assert log_loss(cosines, labels, found) <= theirs.fun + 1e-15


def test_where_no_scale_is_best_there_is_none() -> None:
    cosines, labels = make(40)
    apart = cosines.clone()
    apart[torch.arange(40), labels] = 0.9
    assert fit_scale(in_blocks(apart, labels)) is None  # the larger the better
    assert fit_scale(in_blocks(-apart, labels)) is None  # worse than a guess
    assert fit_scale(in_blocks(torch.full((4, 3), 0.2), torch.tensor([0, 1, 2, 0]))) is None
    assert fit_scale(in_blocks(cosines[:0], labels[:0])) is None
