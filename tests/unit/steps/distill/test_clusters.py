"""Cluster centroids gathered from their file, the targets built on them, and which towers they teach."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from loss_data import unit

from clipcid_cli.algorithms.losses import cluster
from clipcid_cli.algorithms.losses.cluster import ProjectedCentroids
from clipcid_cli.algorithms.losses.shared_space import principal_axes
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.clusters import TopClusters
from clipcid_cli.steps.distill.clusters import ClusterLookup, use_clusters
from clipcid_cli.steps.distill.samples import MatchCounts
from clipcid_cli.steps.settings.distill import DistillSettings

K, D, CUT, N, M = 300, 24, 10, 40, 6
CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path: Path) -> np.ndarray:
    path = tmp_path / "centroids.npy"
    # Off the unit sphere, as another tool may leave them.
    np.save(path, (1.01 * unit(np.random.default_rng(0).normal(size=(K, D)))).astype(np.float32))
    return np.load(path, mmap_mode="r")


@pytest.mark.parametrize("is_projected", [False, True])
@pytest.mark.parametrize("is_kept", [False, True])
def test_taken_rows_are_the_file_rows_projected(
    file: np.ndarray, is_projected: bool, is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        np.testing.assert_allclose(targets.mean_BD.numpy(), np.einsum("bm,bmd->bd", share, stored), atol=1e-6)
    active = np.union1d(*(top.clusters[lookup.table_rows[rows], :4] for top, _ in lookup.towers))
    np.testing.assert_allclose(images.centroids_SD[: len(active)].numpy(), unit(file[active]), atol=1e-6)
    assert not images.log_correction_S[: len(active)].any()
    assert len(images.centroids_SD) == len(active) + 0.1 * K


def test_draw_depends_on_the_step_and_its_correction_can_be_left_out(file: np.ndarray) -> None:
    rows = np.arange(6)
    first, _ = make_lookup(file, captions=False).targets(rows, step=1)
    again, texts = make_lookup(file, captions=False).targets(rows, step=1)
    other, _ = make_lookup(file, captions=False).targets(rows, step=2)
    assert texts is None
    for field in dataclasses.fields(first):
        assert torch.equal(getattr(first, field.name), getattr(again, field.name))
    assert not torch.equal(first.centroids_SD, other.centroids_SD)
    without, _ = make_lookup(file, captions=False, corrected=False).targets(rows, step=1)
    assert len(without.centroids_SD) > len(first.centroids_SD), "all stored clusters are candidates then"
    assert float(first.log_correction_S.max()) > 0
    assert not without.log_correction_S.any()


@pytest.mark.parametrize("cluster", [-1, K])
def test_a_cluster_that_is_not_there_is_named(file: np.ndarray, cluster: int) -> None:
    lookup, rows = make_lookup(file, captions=False), np.arange(6)
    lookup.towers[0][0].clusters[lookup.table_rows[3], 1] = cluster
    with pytest.raises(ClipcidError, match=rf"name clusters .*{cluster}.*; there are {K:,} centroids"):
        lookup.targets(rows, step=1)


@pytest.mark.parametrize(
    ("asked", "known", "freeze_text", "several", "taught"),
    [
        ("auto", True, False, False, True),
        ("auto", False, False, False, False),
        ("auto", True, True, False, False),
        ("auto", True, False, True, False),  # their clusters are those of the first caption
        ("both", True, False, True, True),
        ("image", True, False, False, False),
    ],
)
def test_which_towers_clusters_teach(asked: str, known: bool, freeze_text: bool, several: bool, taught: bool) -> None:
    nearest = TopClusters(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float16))
    made = SimpleNamespace(repair=None, temperatures={"image": 0.1})
    clusters: Any = SimpleNamespace(folder="c", centroids=[], captions=nearest if known else None, sidecar=made)
    settings = DistillSettings(student="s.json", preset="cid", cluster_towers=asked, freeze_text=freeze_text)
    assert use_clusters(settings, clusters, None, MatchCounts(), several, True).teach_text == taught
