"""On a GPU the search for nearest centroids, and the sums, give the bits they give on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipcid_cli.algorithms.kmeans.centroids import ClusterSums, centroids_of_sums
from clipcid_cli.algorithms.near.block import make_block
from clipcid_cli.algorithms.near.nearest import NearestCentroid, top_nearest

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
    block, there = (
        make_block(np.arange(3000), each, kind) for each, kind in ((rows, torch.float32), (rows.cuda(), dtype))
    )
    labels = NearestCentroid(centroids, torch.float32).of(block).number_B
    assert torch.equal(NearestCentroid(on_gpu, dtype).of(there).number_B.cpu(), labels)
    for mine, theirs in zip(top_nearest(rows, centroids, 16), top_nearest(rows.cuda(), on_gpu, 16), strict=True):
        assert torch.equal(theirs.half().cpu(), mine.half())
    cpu, cuda = (ClusterSums(9000, 256, torch.device(device)) for device in ("cpu", "cuda"))
    cpu.move(rows, None, labels)
    cuda.move(rows.cuda(), None, labels.cuda())
    assert torch.equal(cuda.sums_KD.cpu(), cpu.sums_KD)
