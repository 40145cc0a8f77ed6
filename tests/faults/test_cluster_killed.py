"""`cluster` killed again and again, then left to end: the bytes of an uninterrupted run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
from conftest import clean_environment, clipcid_command, run_command


def command(embeddings: Path, work: Path) -> list[str]:
    arguments = ["--embeddings", str(embeddings), "--num-clusters", "1024", "--work", str(work), "--iterations", "8"]
    return [*clipcid_command(), "cluster", *arguments]


def kill_when(path: Path, arguments: list[str]) -> None:
    """Start a command and kill it the moment `path` is there and new."""
    before = path.stat().st_mtime_ns if path.exists() else None
    process = subprocess.Popen(arguments, env=clean_environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not path.exists() or path.stat().st_mtime_ns == before:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def test_killed_in_each_phase_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    # Two of eight iterations compare in few directions; test_subspace.py resumes after each of them.
    rows = np.random.default_rng(0).normal(size=(20_000, 256)) * np.arange(1, 257) ** -0.8
    embeddings = tmp_path / "emb"
    embeddings.mkdir()
    np.save(embeddings / "img_emb_0.npy", (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16))
    whole = run_command(command(embeddings, tmp_path / "whole"), tmp_path, True, 300, None)
    assert "The first 2 iterations" in whole.stderr

    folder = tmp_path / "broken" / "clusters"
    for moment in (".progress.npz", ".clusters.parquet.part-000", ".clusters.parquet.part-002"):
        kill_when(folder / moment, command(embeddings, tmp_path / "broken"))
        assert not (folder / "cluster.json").exists(), "it was over before it could be killed"
    again = run_command(command(embeddings, tmp_path / "broken"), tmp_path, True, 300, None)
    assert "Resuming after" in again.stderr
    for name in ("centroids.npy", "clusters.parquet", "top_clusters.npy", "top_similarities.npy"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / "clusters" / name).read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == [
        ".cluster.lock",
        "centroids.npy",
        "cluster.json",
        "clusters.parquet",
        "top_arrays.json",
        "top_clusters.npy",
        "top_similarities.npy",
    ]
