"""On a GPU the searches, the sums and the linear probe give what they give on a CPU, by the same code."""

from __future__ import annotations

import pytest
import torch

from clipcid_cli.algorithms.kmeans.centroids import ClusterSums, centroids_of_sums
from clipcid_cli.algorithms.metrics.classification import measure_scores
from clipcid_cli.algorithms.near.nearest import Integers, nearest, top
from clipcid_cli.algorithms.probe import ProbeProblem, nearest_neighbours, regularisation_grid, sweep_regularisation

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_answers_and_sums_equal_the_cpus(dtype: torch.dtype, offset: float) -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(3000, 256, generator=random) + offset, dim=1).half()
    values = torch.randn(9000, 256, generator=random).double() + offset
    centroids = centroids_of_sums(values, torch.zeros(9000, 256))
    on_gpu = centroids_of_sums(values.cuda(), torch.zeros(9000, 256, device="cuda"))
    assert torch.equal(on_gpu.cpu(), centroids)
    labels, there = (
        nearest(Integers.from_rows(own, dtype), Integers.from_rows(all_, dtype, one_step=True))[0]
        for own, all_ in ((rows, centroids), (rows.cuda(), on_gpu))
    )
    assert torch.equal(there.cpu(), labels)
    (numbers, similarities), (on_gpu_numbers, on_gpu_similarities) = (
        top(own, all_, 16) for own, all_ in ((rows, centroids), (rows.cuda(), on_gpu))
    )
    assert float((on_gpu_similarities.cpu() - similarities).abs().max()) < 1e-6
    assert float((on_gpu_numbers.cpu() == numbers).float().mean()) > 0.999
    cpu, cuda = (ClusterSums(9000, 256, torch.device(device)) for device in ("cpu", "cuda"))
    cpu.move(rows, None, labels)
    cuda.move(rows.cuda(), None, labels.cuda())
    assert torch.equal(cuda.sums_KD.cpu(), cpu.sums_KD)


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


def test_nearest_neighbours_are_the_cpus() -> None:
    rows = torch.nn.functional.normalize(torch.randn(9000, 64, generator=torch.Generator().manual_seed(1)), dim=1)
    rows[8000:] = rows[:1000]  # equal cosines, also at the last place
    found = []
    for device in ("cpu", "cuda"):
        here = rows.to(device)
        parts = zip(*nearest_neighbours(here[:5000], here, 21), strict=True)
        found.append([torch.cat(part) for part in parts])
    (cosines, _), (on_gpu, _) = found
    assert float((on_gpu - cosines).abs().max()) < 1e-6
