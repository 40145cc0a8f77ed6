"""The cluster table and its arrays: mapped, made in parts, and errors for what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sidecars import make_sidecar

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import save_arrays
from clipcid_cli.formats.files import write_json, write_npy
from clipcid_cli.formats.results.clusters import join_parts, open_clusters, part_arrays, part_bounds, part_path
from clipcid_cli.formats.sidecar import ClusterSidecar

CLUSTERS, M = 6, 3


def write_clusters(folder: Path, num_rows: int = 10) -> np.ndarray:
    """Write what `cluster` does; returns clusters [num_rows, M], of captions those of images."""
    random = np.random.default_rng(0)
    clusters = random.integers(0, CLUSTERS, (num_rows, M))
    similarities = -np.sort(-random.random((num_rows, M)), axis=1)
    keys = pa.array([f"key {row}" for row in range(num_rows)], pa.large_string())
    bounds = part_bounds(num_rows)
    for part, (first, last) in enumerate(bounds):
        piece = clusters[first:last], similarities[first:last]
        save_arrays(part_path(folder, part), part_arrays({"image": piece, "caption": piece}))
    join_parts(folder, bounds, lambda first, last: pa.chunked_array([keys[first:last]]))
    write_npy(folder / "centroids.npy", np.eye(CLUSTERS, 8, dtype=np.float32))
    write_json(folder / "cluster.json", make_sidecar(ClusterSidecar))
    return clusters


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    clusters = write_clusters(tmp_path).astype(np.int32)
    for wrong, message in (
        (clusters[:, :1], r"top_similarities\.npy .* holds float16 \[10, 3\]"),
        (clusters.astype(np.int64), r"top_clusters\.npy .* holds int64 \[10, 3\]"),
        (clusters[1:], r"top_clusters\.npy .* \[9, 3\]; clusters\.parquet has 10 rows"),
    ):
        np.save(tmp_path / "top_clusters.npy", wrong)
        with pytest.raises(ClipcidError, match=message):
            open_clusters(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "caption_top_similarities.npy",
            r"caption_top_similarities\.npy cannot be read.*\.\nRun: clipcid cluster .* --work .* --overwrite",
        ),
        ("cluster.json", r"no cluster\.json.*\nName another folder with --clusters"),
    ],
)
def test_clusters_that_lack_a_file_are_refused(tmp_path: Path, name: str, message: str) -> None:
    folder = tmp_path / "clusters"
    write_clusters(folder)
    (folder / name).unlink()
    with pytest.raises(ClipcidError, match=message):
        open_clusters(folder, tmp_path)
