"""The cluster loss at K = 1,000,000: what a step adds to a real process's anonymous memory."""

from __future__ import annotations

import re
import select
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from loss_data import unit

NUM_CLUSTERS, WIDTH, BATCH, STORED = 1_000_000, 768, 1_024, 16
LIMIT = 800_000_000

STEP = f"""
import sys
import numpy as np, torch
import torch.nn.functional as F
from clipcid_cli.algorithms.losses.batch import LossBatch
from clipcid_cli.algorithms.losses.cluster import ProjectedCentroids, cluster
from clipcid_cli.formats.results.clusters import TopClusters
from clipcid_cli.steps.distill.clusters import ClusterLookup
from clipcid_cli.steps.settings.distill import DistillSettings

def top(seed):
    random = np.random.default_rng(seed)
    clusters = random.integers(0, {NUM_CLUSTERS}, ({BATCH}, {STORED}), dtype=np.int32)
    return TopClusters(clusters, -np.sort(-random.uniform(size=clusters.shape)).astype(np.float16))

def features(seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn({BATCH}, {WIDTH}, generator=generator), dim=1).requires_grad_()

centroids = ProjectedCentroids(np.load(sys.argv[1], mmap_mode="r"), None, torch.device("cpu"))
towers = [(top(0), 0.05), (top(1), 0.05)]
settings = DistillSettings(student="s.json", preset="cid", candidate_ratio=0.1, min_candidates=4096)
lookup = ClusterLookup(centroids, np.arange({BATCH}), towers, settings)
image, text, scale = features(2), features(3), torch.tensor(14.0, requires_grad=True)
torch.autograd.grad((image @ text.T).sum(), image)  # its threads are there
print("ready", flush=True)
sys.stdin.readline()
targets = lookup.targets(np.arange({BATCH}), step=0)
batch = LossBatch(image, text, scale, image, text, image_clusters=targets[0], text_clusters=targets[1])
cluster(batch, scale).backward()
print(float(image.grad.norm()) > 0, flush=True)
"""


def anonymous_bytes(pid: int) -> int:
    found = re.search(r"^RssAnon:\s*(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def measure_step(centroids: Path) -> int:
    """Run a step in a process of its own; return by how much its anonymous memory rose at most."""
    command = [sys.executable, "-c", STEP, str(centroids)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = peak = anonymous_bytes(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        while not select.select([process.stdout], [], [], 0.002)[0]:
            peak = max(peak, anonymous_bytes(process.pid))
        assert process.stdout.readline() == "True\n"
        return peak - before


@pytest.mark.slow
def test_million_centroids_add_at_most_800_mb(tmp_path: Path) -> None:
    path = tmp_path / "centroids.npy"
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(NUM_CLUSTERS, WIDTH))
    rows = unit(np.random.default_rng(0).normal(size=(20_000, WIDTH))).astype(np.float32)
    for place, first in enumerate(range(0, NUM_CLUSTERS, len(rows))):
        file[first : first + len(rows)] = np.roll(rows, place, axis=1)
    file.flush()
    # The candidates' rows alone are there in any case: less would mean that nothing was measured.
    assert 0.1 * NUM_CLUSTERS * WIDTH * 4 < measure_step(path) <= LIMIT
