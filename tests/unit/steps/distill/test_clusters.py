"""Cluster centroids gathered from their file, the targets built on them, and what a step of a million of them takes."""

from __future__ import annotations

import re
import select
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loss_data import unit

from clipcid_cli.algorithms.losses import cluster
from clipcid_cli.algorithms.losses.cluster import ProjectedCentroids
from clipcid_cli.algorithms.losses.shared_space import principal_axes
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.clusters import TopClusters
from clipcid_cli.steps.distill.clusters import ClusterLookup
from clipcid_cli.steps.settings.distill import DistillSettings

K, D, CUT, N, M = 300, 24, 10, 40, 6
CPU = torch.device("cpu")
NUM_CLUSTERS, WIDTH, BATCH, STORED = 1_000_000, 768, 1_024, 16
LIMIT = 800_000_000  # bytes that a step with so many clusters may add


@pytest.fixture
def file(tmp_path: Path) -> np.ndarray:
    path = tmp_path / "centroids.npy"
    # Off the unit sphere, as another tool may leave them.
    np.save(path, (1.01 * unit(np.random.default_rng(0).normal(size=(K, D)))).astype(np.float32))
    return np.load(path, mmap_mode="r")


@pytest.mark.parametrize("is_projected", [False, True])
@pytest.mark.parametrize("is_kept", [False, True])
def test_projected_rows(file: np.ndarray, is_projected: bool, is_kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = principal_axes(file.astype(np.float64).T @ file.astype(np.float64), CUT) if is_projected else None
    width = CUT if is_projected else D
    monkeypatch.setattr(cluster, "_KEPT_BYTES", K * width * 4 - (not is_kept))
    monkeypatch.setattr(cluster, "_ROWS_AT_ONCE", 7)
    centroids = ProjectedCentroids(file, axes, CPU)
    assert (centroids.kept_Kd is not None) == is_kept
    assert (len(centroids), centroids.width) == (K, width)
    ids = np.random.default_rng(1).permutation(K)[:50]
    expected = file[ids].astype(np.float64)
    if axes is not None:
        expected = expected @ axes.basis_Dd.double().numpy()
    np.testing.assert_allclose(centroids.take(ids).numpy(), unit(expected), atol=1e-6)


def make_lookup(file: np.ndarray, captions: bool, *, corrected: bool = True) -> ClusterLookup:
    random = np.random.default_rng(2)

    def top() -> TopClusters:
        clusters = np.array([random.permutation(K)[:M] for _ in range(N)], dtype=np.int32)
        return TopClusters(clusters, -np.sort(-random.uniform(0.2, 0.9, (N, M)), axis=1).astype(np.float16))

    table_rows = random.permutation(N)  # rows of the samples are not rows of the table
    towers = [(top(), 0.1), (top(), 0.3)] if captions else [(top(), 0.1)]
    settings = DistillSettings(
        student="s.json", preset="cid", candidate_ratio=0.1, min_candidates=1, candidate_correction=corrected, seed=5
    )
    return ClusterLookup(ProjectedCentroids(file, None, CPU), table_rows, towers, settings)


def test_targets_have_all_stored_clusters_and_four_of_each_are_candidates(file: np.ndarray) -> None:
    lookup, rows = make_lookup(file, captions=True), np.array([31, 2, 17])
    images, texts = lookup.targets(rows, step=3)
    assert texts is not None
    for targets, (top, temperature) in zip((images, texts), lookup.towers, strict=True):
        stored = unit(file[top.clusters[lookup.table_rows[rows]]])
        share = np.exp(top.similarities[lookup.table_rows[rows]].astype(np.float64) / temperature)
        share = 0.5 * share / share.sum(axis=1, keepdims=True) + 0.5 * (np.arange(M) == 0)
        np.testing.assert_allclose(targets.mean_bD.numpy(), np.einsum("bm,bmd->bd", share, stored), atol=1e-6)
    active = np.union1d(*(top.clusters[lookup.table_rows[rows], :4] for top, _ in lookup.towers))
    np.testing.assert_allclose(images.centroids_SD[: len(active)].numpy(), unit(file[active]), atol=1e-6)
    assert not images.log_correction_S[: len(active)].any()
    assert len(images.centroids_SD) == len(active) + 0.1 * K


def test_a_process_makes_the_means_of_its_own_rows(file: np.ndarray) -> None:
    lookup, rows = make_lookup(file, captions=True), np.array([31, 2, 17])
    for whole, own in zip(lookup.targets(rows, 3), lookup.targets(rows, 3, slice(1, 3)), strict=True):
        assert whole is not None
        assert own is not None
        assert torch.equal(own.mean_bD, whole.mean_bD[1:])
        assert torch.equal(own.centroids_SD, whole.centroids_SD)


def test_the_correction_of_the_draw_can_be_left_out(file: np.ndarray) -> None:
    rows = np.arange(6)
    corrected, texts = make_lookup(file, captions=False).targets(rows, step=1)
    without, _ = make_lookup(file, captions=False, corrected=False).targets(rows, step=1)
    assert texts is None
    assert len(without.centroids_SD) > len(corrected.centroids_SD), "all stored clusters are candidates then"
    assert float(corrected.log_correction_S.max()) > 0
    assert not without.log_correction_S.any()


def test_candidates_are_drawn_by_seed_and_step(file: np.ndarray) -> None:
    rows = np.arange(6)
    first, again, other = (make_lookup(file, captions=False).targets(rows, step=step)[0] for step in (1, 1, 2))
    assert torch.equal(first.centroids_SD, again.centroids_SD)
    assert not torch.equal(first.centroids_SD, other.centroids_SD)


@pytest.mark.parametrize("cluster", [-1, K])
def test_a_cluster_that_is_not_there_is_named(file: np.ndarray, cluster: int) -> None:
    lookup, rows = make_lookup(file, captions=False), np.arange(6)
    lookup.towers[0][0].clusters[lookup.table_rows[3], 1] = cluster
    with pytest.raises(ClipcidError, match=rf"name clusters .*{cluster}.*; there are {K:,} centroids"):
        lookup.targets(rows, step=1)


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
