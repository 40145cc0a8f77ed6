"""On a GPU the search for nearest centroids, and the sums, give the bits they give on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipcid_cli.algorithms.kmeans.nearest import NearestCentroids
from clipcid_cli.algorithms.kmeans.prepared import prepare_rows
from clipcid_cli.algorithms.kmeans.start import CodedRows, code_centroids, nearest_codes
from clipcid_cli.algorithms.kmeans.subspace import Subspace
from clipcid_cli.algorithms.kmeans.top_nearest import top_nearest
from clipcid_cli.algorithms.near.centroids import ClusterSums, centroids_of_sums

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
    here, there = NearestCentroids(centroids, torch.float32), NearestCentroids(on_gpu, dtype)
    rows_here, rows_there = prepare_rows(rows, torch.float32), prepare_rows(rows.cuda(), dtype)
    labels = here.nearest(rows_here).centroids_B
    assert torch.equal(there.nearest(rows_there).centroids_B.cpu(), labels)
    for mine, theirs in zip(top_nearest(rows, centroids, 16), top_nearest(rows.cuda(), on_gpu, 16), strict=True):
        assert torch.equal(theirs.half().cpu(), mine.half())
    cpu, cuda = (ClusterSums(9000, 256, torch.device(device)) for device in ("cpu", "cuda"))
    cpu.move(rows, None, labels)
    cuda.move(rows.cuda(), None, labels.cuda())
    assert torch.equal(cuda.sums_KD.cpu(), cpu.sums_KD)


def test_rows_and_centroids_in_few_directions_are_those_of_the_cpu() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(3000, 256)) * np.arange(1.0, 257) ** -0.8
    rows = torch.from_numpy((values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16))
    subspace = Subspace.of(rows)
    there = subspace.to(torch.device("cuda"))
    here_Bd, there_Bd = subspace.project(rows), there.project(rows.cuda())
    assert torch.equal(there_Bd.cpu(), here_Bd)
    coded, coded_there = CodedRows.of(here_Bd), CodedRows.of(there_Bd)
    assert torch.equal(coded_there.codes_Bd.cpu(), coded.codes_Bd)
    assert torch.equal(coded_there.values().cpu(), coded.values())
    codes, codes_there = code_centroids(here_Bd[:700]), code_centroids(there_Bd[:700])
    expected = nearest_codes(coded.codes_Bd, codes, torch.float32)
    assert torch.equal(nearest_codes(coded_there.codes_Bd, codes_there, torch.float16).cpu(), expected)
