"""`clipcid cluster` from the command line: the table against a plain computation, and the inputs it takes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from balance_data import write_embeddings
from conftest import Clipcid
from sidecars import unfinish

from clipcid_cli.formats.results.clusters import open_clusters

NUM_ROWS, WIDTH, NUM_CLUSTERS = 900, 48, 40
KEYS = [f"{row:06d}" for row in range(NUM_ROWS)]


def make_rows(seed: int) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(seed)
    groups = np.random.default_rng(0).normal(size=(60, WIDTH))
    rows = groups[np.arange(NUM_ROWS) % 60] + 0.4 * random.normal(size=(NUM_ROWS, WIDTH))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    return write_embeddings(tmp_path / "emb", make_rows(1), texts=make_rows(2))


def write_keep_list(path: Path, kept: np.ndarray[Any, Any]) -> Path:
    # In another order than the embeddings: rows are joined by key.
    keys = [f"{row:06d}" for row in range(len(kept))][::-1]
    pq.write_table(pa.table({"key": keys, "kept": kept[::-1]}), path)
    return path


def hash_outputs(folder: Path) -> list[str]:
    names = ("centroids.npy", "clusters.parquet")
    return [hashlib.sha256((folder / "clusters" / name).read_bytes()).hexdigest() for name in names]


def test_the_table_is_what_a_plain_computation_gives(clipcid: Clipcid, embeddings: Path) -> None:
    call = ("cluster", "--embeddings", embeddings, "--num-clusters", NUM_CLUSTERS, "--json")
    dry = clipcid(*call, "--dry-run")
    assert dry.json["flop"] == 2 * NUM_ROWS * NUM_CLUSTERS * WIDTH * 20
    assert not (dry.cwd / "clipcid-work").exists()
    run = clipcid(*call)
    result = run.json
    assert (result["images"], result["clusters"]) == (NUM_ROWS, NUM_CLUSTERS)
    assert 1 < result["iterations"] <= 20
    folder = run.cwd / "clipcid-work" / "clusters"
    found = open_clusters(folder)
    centroids = found.centroids.astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    for rows, tops in ((make_rows(1), found.images), (make_rows(2), found.captions)):
        exact = rows.astype(np.float64) @ centroids.T
        order = np.argsort(-exact, axis=1, kind="stable")[:, :16]
        assert tops is not None
        np.testing.assert_array_equal(tops.clusters, order)
        # Sums in float32, rounded to float16.
        np.testing.assert_allclose(tops.similarities, np.take_along_axis(exact, order, axis=1), rtol=2**-10, atol=1e-6)
    np.testing.assert_array_equal(found.labels, found.images.clusters[:, 0])
    table = pd.read_parquet(folder / "clusters.parquet")
    assert result["objective"] == pytest.approx(float(table["similarity"].astype(float).mean()), rel=1e-12)
    assert list(table["key"]) == KEYS
    # The groups the rows were drawn around are found: far nearer to the own centroid than rows of one cluster would be.
    assert result["objective"] > 0.75
    weights = np.exp(found.images.similarities.astype(np.float64) / found.sidecar.temperatures["image"])
    weights /= weights.sum(axis=1, keepdims=True)
    perplexity = np.exp(-(weights * np.log(np.maximum(weights, 1e-300))).sum(axis=1))
    assert 3 <= float(np.median(perplexity)) <= 4

    again = clipcid(*call)
    assert again.json == result
    assert "already" in again.stderr
    assert "clusters holds these clusters already, finished." in clipcid(*call, "--dry-run").stderr
    other = (*call[:-2], 8, "--json")
    assert "num_clusters: 40 there, 8 now" in clipcid(*other, code=1).stderr
    assert clipcid(*other, "--overwrite").json["clusters"] == 8


def test_two_processes_write_the_same(clipcid: Clipcid, torchrun: Clipcid, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    rows = random.normal(size=(2, 2400, 256)) * np.arange(1, 257) ** -0.8
    images, texts = (rows / np.linalg.norm(rows, axis=2, keepdims=True)).astype(np.float16)
    embeddings = write_embeddings(tmp_path / "wide", images, texts=texts)
    keep = write_keep_list(tmp_path / "keep.parquet", np.arange(2400) % 3 > 0)
    call = ("cluster", "--embeddings", embeddings, "--keep-list", keep, "--num-clusters", 600, "--features", "joint")
    clipcid(*call, "--work", "one")
    torchrun(2, *call, "--work", "two")
    one, two = (hash_outputs(tmp_path / work) for work in ("one", "two"))
    assert one == two


def test_a_damaged_part_of_a_killed_run_is_computed_again(clipcid: Clipcid, embeddings: Path) -> None:
    command = ("cluster", "--embeddings", embeddings, "--num-clusters", NUM_CLUSTERS)
    clipcid(*command, cwd=embeddings.parent)
    work = embeddings.parent / "clipcid-work"
    expected = hash_outputs(work)
    parts = unfinish(work / "clusters", "cluster") / ".parts"
    parts.mkdir()
    (parts / "000.npz").write_bytes(b"half")
    clipcid(*command, cwd=embeddings.parent)
    assert hash_outputs(work) == expected


def test_centroids_of_some_rows_serve_all(clipcid: Clipcid, embeddings: Path, tmp_path: Path) -> None:
    arguments = ["cluster", "--embeddings", embeddings, "--num-clusters", 20, "--train-rows"]
    run = clipcid(*arguments, 300)
    assert "300 of the 900 images (--train-rows)" in run.said
    found = open_clusters(run.cwd / "clipcid-work" / "clusters")
    # A centroid is the direction of the mean of a third of the rows, so it is not that of all rows assigned to it.
    rows, centroids = make_rows(1).astype(np.float64), found.centroids.astype(np.float64)
    np.testing.assert_array_equal(found.labels, (rows @ centroids.T).argmax(axis=1))
    means = np.stack([rows[found.labels == label].mean(axis=0) for label in range(20)])
    assert np.abs(means / np.linalg.norm(means, axis=1, keepdims=True) - centroids).max() > 0.01
    # As many as there are is no sample.
    clipcid(*arguments, 900, "--work", tmp_path / "whole")
    clipcid(*arguments[:-1], "--work", tmp_path / "plain")
    assert hash_outputs(tmp_path / "whole") == hash_outputs(tmp_path / "plain")


def test_fewer_different_images_than_clusters_warns_and_ends(clipcid: Clipcid, tmp_path: Path) -> None:
    write_embeddings(tmp_path / "copies", np.repeat(make_rows(1)[:5], 40, axis=0))
    run = clipcid("cluster", "--embeddings", "copies", "--num-clusters", 12, "--json")
    assert run.json["empty_clusters"] == 7
    assert run.json["objective"] == pytest.approx(1, abs=1e-3)
    assert "7 of 12 clusters are empty" in run.said


def test_rows_that_are_not_finite_are_counted_and_named(clipcid: Clipcid, embeddings: Path) -> None:
    path = embeddings / "img_emb" / "img_emb_0.npy"
    rows = np.load(path)
    rows[:20] = np.nan
    np.save(path, rows)
    call = ("cluster", "--embeddings", embeddings, "--json")
    refused = clipcid(*call, code=1)
    assert "20 of 900 samples" in refused.json["error"]
    run = clipcid(*call, "--max-bad-fraction", "0.05")
    assert (run.json["images"], run.json["skipped"]) == (NUM_ROWS - 20, {"nan_row": 20})
    assert "20 × embedding that is zero or not finite: 0" in run.said
