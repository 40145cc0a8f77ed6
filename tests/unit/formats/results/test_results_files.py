"""What steps write: clusters, features, columns of samples, checkpoints and logs, and errors for what was damaged."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from sidecars import make_sidecar

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import write_json, write_npy
from clipcid_cli.formats.results.clusters import (
    ClusterParts,
    ClusterSidecar,
    join_parts,
    open_clusters,
    part_arrays,
    part_bounds,
)
from clipcid_cli.formats.results.features import ImageFeatures, read_features, write_features
from clipcid_cli.formats.results.matched_samples import TRAINING, open_rows, writing_rows
from clipcid_cli.formats.results.run_folder import (
    checkpoint_path,
    list_checkpoints,
    read_checkpoint,
    read_lines,
    write_checkpoint,
)

N, CLUSTERS, M = 10, 6, 3


def write_clusters(folder: Path) -> np.ndarray:
    """Write what `cluster` does; returns clusters [N, M], of captions those of images."""
    random = np.random.default_rng(0)
    clusters = random.integers(0, CLUSTERS, (N, M))
    similarities = -np.sort(-random.random((N, M)), axis=1)
    keys = pa.array([f"key {row}" for row in range(N)], pa.large_string())
    bounds = part_bounds(N)
    for part, (first, last) in enumerate(bounds):
        piece = clusters[first:last], similarities[first:last]
        ClusterParts(folder).append(part, part_arrays({"image": piece, "caption": piece}))
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
    np.save(tmp_path / "top_clusters.npy", clusters)
    centroids = np.eye(CLUSTERS, 8, dtype=np.float32)
    for row in (0, CLUSTERS - 1):
        centroids[:] = 1
        centroids[row, 3] = np.nan
        np.save(tmp_path / "centroids.npy", centroids)
        with pytest.raises(ClipcidError, match="not finite float32"):
            open_clusters(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "caption_top_similarities.npy",
            r"caption_top_similarities\.npy cannot be read.*\.\nRun cluster again with --overwrite\.",
        ),
        ("cluster.json", r"no cluster\.json.*\nName another folder with --clusters"),
    ],
)
def test_clusters_that_lack_a_file_are_refused(tmp_path: Path, name: str, message: str) -> None:
    folder = tmp_path / "clusters"
    write_clusters(folder)
    (folder / name).unlink()
    with pytest.raises(ClipcidError, match=message):
        open_clusters(folder)


@pytest.mark.parametrize("rows", [torch.zeros(3, 4), torch.eye(4)[:2], torch.full((3, 4), float("nan"))])
def test_rows_that_no_model_makes_and_damaged_files_are_none(tmp_path: Path, rows: torch.Tensor) -> None:
    path = tmp_path / "tiny-0.npz"
    write_features(path, ImageFeatures(rows, torch.arange(3), keys="abc"))
    assert read_features(path) is None
    write_features(path, ImageFeatures(torch.eye(3), torch.arange(3), keys="ab"))
    assert read_features(path) is None  # a key lacks
    write_features(path, ImageFeatures(torch.eye(3), torch.arange(3), keys="abc"))
    read = read_features(path)
    assert read is not None
    assert read.keys == ["a", "b", "c"]
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    assert read_features(path) is None


@pytest.mark.parametrize(("limit", "dtype"), [(2**31 - 1, np.int32), (2**31, np.int64)])
def test_columns_are_as_wide_as_they_must_be(limit: int, dtype: type, tmp_path: Path) -> None:
    with writing_rows(tmp_path, TRAINING, {"places": limit}) as append:
        for numbers in (np.arange(100_000), np.arange(0), np.array([limit - 1])):
            append({"places": numbers})
    sent = pickle.dumps(open_rows(tmp_path, TRAINING))
    assert len(sent) < 1_000
    column = pickle.loads(sent).column("places")
    assert isinstance(column, np.memmap)
    assert column.dtype == dtype
    assert column.tolist() == [*range(100_000), limit - 1]


def test_newest_two_checkpoints_are_kept_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step, {"step": step})
    assert list_checkpoints(tmp_path) == [20, 30]
    path = checkpoint_path(tmp_path, 30)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ClipcidError, match=r"step_00000030\.pt cannot be read"):
        read_checkpoint(tmp_path, 30)


def test_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (str(tmp_path / "harmed"),))

    torch.save({"step": Harmful()}, checkpoint_path(tmp_path, 1))
    with pytest.raises(ClipcidError):
        read_checkpoint(tmp_path, 1)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"5", b"[]", b'{"loss": 1}', b'{"step": "1"}', b'{"step": 1, "loss": "x"}', b"\0", b"\xed\xa0\x80"],
)
def test_a_damaged_line_is_named_unless_it_is_the_last_one(tmp_path: Path, line: bytes) -> None:
    log, whole = tmp_path / "train.jsonl", b'{"step": 1, "loss": 0.5}\n'
    log.write_bytes(whole + line)
    assert read_lines(log) == [{"step": 1, "loss": 0.5}]
    log.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(ClipcidError, match=r"Line 2 of .*train\.jsonl is not a line of a log"):
        read_lines(log)
