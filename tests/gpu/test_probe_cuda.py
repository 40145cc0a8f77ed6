"""On a GPU the linear probe finds what it finds on a CPU, by the same code."""

from __future__ import annotations

import pytest
import torch

from clipcid_cli.algorithms.metrics.classification import measure_scores
from clipcid_cli.algorithms.probe import ProbeProblem, nearest_neighbours, regularisation_grid, sweep_regularisation

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("several", [False, True])
def test_solutions_and_metrics_are_the_cpus(several: bool) -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 8, (2000,), generator=random)
    rows = torch.randn(8, 64, generator=random)[labels] + 2 * torch.randn(2000, 64, generator=random)
    rows = torch.nn.functional.normalize(rows, dim=1)
    if several:
        labels = torch.nn.functional.one_hot(labels, 8).bool() | (torch.rand(2000, 8, generator=random) < 0.1)
    found = []
    for device in ("cpu", "cuda"):
        here, own = rows.to(device), labels.to(device)
        solutions = list(sweep_regularisation(ProbeProblem(here[:1500], own[:1500], 8), regularisation_grid()))
        assert all(solution.converged for solution in solutions)
        metrics = [measure_scores(solution.classifier.scores(here[1500:]), own[1500:], 8) for solution in solutions]
        found.append(([solution.objective for solution in solutions], metrics))
    (objectives, metrics), (on_gpu, gpu_metrics) = found
    assert on_gpu == pytest.approx(objectives, rel=1e-4)
    for mine, theirs in zip(metrics, gpu_metrics, strict=True):
        assert theirs == pytest.approx(mine, abs=5e-3)


def test_nearest_neighbours_are_the_cpus_to_the_bit() -> None:
    rows = torch.nn.functional.normalize(torch.randn(9000, 64, generator=torch.Generator().manual_seed(1)), dim=1)
    rows[8000:] = rows[:1000]  # equal cosines, also at the last place
    found = []
    for device in ("cpu", "cuda"):
        here = rows.to(device)
        parts = zip(*nearest_neighbours(here[:5000], here, 21), strict=True)
        found.append([torch.cat(part) for part in parts])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)
