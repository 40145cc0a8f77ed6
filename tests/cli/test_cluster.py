"""`clipcid cluster` from the command line: the table against a plain computation, inputs it takes, errors it gives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Run

from clipcid_cli.formats.results.clusters import open_clusters

NUM_ROWS, WIDTH, NUM_CLUSTERS = 900, 48, 40


def make_rows(seed: int) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(seed)
    groups = np.random.default_rng(0).normal(size=(60, WIDTH))
    rows = groups[np.arange(NUM_ROWS) % 60] + 0.4 * random.normal(size=(NUM_ROWS, WIDTH))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def write_embeddings(folder: Path, images: np.ndarray[Any, Any], texts: np.ndarray[Any, Any] | None = None) -> Path:
    """Write a folder in clip-retrieval's layout, rows in two files."""
    keys = [f"{row:05d}" for row in range(len(images))]
    half = len(images) // 2
    for name in ("img_emb", "metadata", *(["text_emb"] if texts is not None else [])):
        (folder / name).mkdir(parents=True)
    for number, part in enumerate((slice(0, half), slice(half, None))):
        np.save(folder / f"img_emb/img_emb_{number:04d}.npy", images[part])
        if texts is not None:
            np.save(folder / f"text_emb/text_emb_{number:04d}.npy", texts[part])
        table = pa.table({"key": keys[part], "caption": [f"caption {key}" for key in keys[part]]})
        pq.write_table(table, folder / f"metadata/metadata_{number:04d}.parquet")
    return folder


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    return write_embeddings(tmp_path / "emb", make_rows(1), make_rows(2))


def write_keep_list(path: Path, kept: np.ndarray[Any, Any]) -> Path:
    # In another order than the embeddings: rows are joined by key.
    keys = [f"{row:05d}" for row in range(len(kept))][::-1]
    pq.write_table(pa.table({"key": keys, "kept": kept[::-1]}), path)
    return path


def hash_outputs(folder: Path) -> list[str]:
    names = ("centroids.npy", "clusters.parquet")
    return [hashlib.sha256((folder / "clusters" / name).read_bytes()).hexdigest() for name in names]


def test_the_table_is_what_a_plain_computation_gives(clipcid: Callable[..., Run], embeddings: Path) -> None:
    run = clipcid("cluster", "--embeddings", embeddings, "--num-clusters", NUM_CLUSTERS, "--json")
    result = run.json
    assert result["images"] == NUM_ROWS
    assert result["clusters"] == NUM_CLUSTERS
    assert set(result["seconds"]) == {"read", "kmeans", "assign", "write"}
    assert 1 < result["iterations"] <= 20
    folder = run.cwd / "clipcid-work" / "clusters"
    assert sorted(path.name for path in folder.iterdir() if path.name != ".cluster.lock") == [
        "caption_top_clusters.npy",
        "caption_top_similarities.npy",
        "centroids.npy",
        "cluster.json",
        "clusters.parquet",
        "top_clusters.npy",
        "top_similarities.npy",
    ]
    found = open_clusters(folder)
    centroids = found.centroids.astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    for rows, tops in ((make_rows(1), found.images), (make_rows(2), found.captions)):
        exact = rows.astype(np.float64) @ centroids.T
        order = np.argsort(-exact, axis=1, kind="stable")[:, :16]
        assert tops is not None
        np.testing.assert_array_equal(tops.clusters, order)
        np.testing.assert_array_equal(tops.similarities, np.take_along_axis(exact, order, axis=1).astype(np.float16))
    np.testing.assert_array_equal(found.labels, found.images.clusters[:, 0])
    table = pd.read_parquet(folder / "clusters.parquet")
    assert result["objective"] == pytest.approx(float(table["similarity"].astype(float).mean()), rel=1e-12)
    assert list(table["key"]) == [f"{row:05d}" for row in range(NUM_ROWS)]
    # The groups the rows were drawn around are found: far nearer to the own centroid than rows of one cluster would be.
    assert result["objective"] > 0.75
    weights = np.exp(found.images.similarities.astype(np.float64) / found.sidecar.temperatures["image"])
    weights /= weights.sum(axis=1, keepdims=True)
    perplexity = np.exp(-(weights * np.log(np.maximum(weights, 1e-300))).sum(axis=1))
    assert 3 <= float(np.median(perplexity)) <= 4


def test_two_processes_write_the_bytes_of_one(
    clipcid: Callable[..., Run], binary: Callable[..., Run], torchrun: Callable[..., Run], tmp_path: Path
) -> None:
    """Also with other products and threads."""
    random = np.random.default_rng(3)
    rows = random.normal(size=(2, 3600, 256)) * np.arange(1, 257) ** -0.8
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    embeddings = write_embeddings(tmp_path / "wide", *rows.astype(np.float16))
    keep = write_keep_list(tmp_path / "keep.parquet", np.arange(3600) % 3 > 0)
    arguments = ["cluster", "--embeddings", embeddings, "--keep-list", keep, "--num-clusters", 1024]
    arguments += ["--features", "joint"]
    clipcid(*arguments, "--work", tmp_path / "one")
    binary(*arguments, "--work", tmp_path / "fp32", "--precision", "fp32", env={"OMP_NUM_THREADS": "1"})
    torchrun(2, *arguments, "--work", tmp_path / "two")
    assert hash_outputs(tmp_path / "one") == hash_outputs(tmp_path / "two") == hash_outputs(tmp_path / "fp32")


def test_centroids_of_some_rows_serve_all(clipcid: Callable[..., Run], embeddings: Path, tmp_path: Path) -> None:
    arguments = ["cluster", "--embeddings", embeddings, "--num-clusters", 20, "--train-rows"]
    run = clipcid(*arguments, 300, "--json")
    assert run.json["images"] == NUM_ROWS
    assert "300 of 900 images (--train-rows)" in " ".join(run.stderr.split())
    found = open_clusters(run.cwd / "clipcid-work" / "clusters")
    # A centroid is the direction of the mean of a third of the rows, so it is not that of all rows assigned to it.
    rows, centroids = make_rows(1).astype(np.float64), found.centroids.astype(np.float64)
    np.testing.assert_array_equal(found.labels, (rows @ centroids.T).argmax(axis=1))
    means = np.stack([rows[found.labels == label].mean(axis=0) for label in range(20)])
    assert np.abs(means / np.linalg.norm(means, axis=1, keepdims=True) - centroids).max() > 0.01
    # Another number of rows is another setting; as many as there are is no sample.
    clipcid(*arguments, 900, "--work", tmp_path / "whole")
    clipcid(*arguments[:-1], "--work", tmp_path / "plain")
    assert hash_outputs(tmp_path / "whole") == hash_outputs(tmp_path / "plain")
    refused = clipcid(*arguments, 19, "--work", tmp_path / "few", check=False)
    assert refused.returncode == 1
    assert "--num-clusters 20 is more than --train-rows 19" in " ".join(refused.stderr.split())


def test_only_kept_images_are_clustered_and_it_says_which_list_it_took(
    clipcid: Callable[..., Run], embeddings: Path, tmp_path: Path
) -> None:
    kept = np.arange(NUM_ROWS) % 3 > 0
    keep = write_keep_list(tmp_path / "mine.parquet", kept)
    run = clipcid("cluster", "--embeddings", embeddings, "--keep-list", keep, "--json")
    assert run.json["images"] == int(kept.sum())
    assert run.json["clusters"] == int(kept.sum()) // 8
    assert str(keep) in run.stderr.replace("\n", "")
    frame = pd.read_parquet(run.cwd / run.json["files"]["clusters"])
    assert list(frame["key"]) == [f"{row:05d}" for row in np.flatnonzero(kept)]


def test_a_second_run_reuses_and_other_settings_need_overwrite(clipcid: Callable[..., Run], embeddings: Path) -> None:
    first = clipcid("cluster", "--embeddings", embeddings, "--num-clusters", 9, "--json")
    again = clipcid("cluster", "--embeddings", embeddings, "--num-clusters", 9, "--json")
    assert again.json == first.json
    assert "already" in again.stderr
    other = clipcid("cluster", "--embeddings", embeddings, "--num-clusters", 8, check=False)
    assert other.returncode == 1
    assert "num_clusters: 9 there, 8 now" in other.stderr
    assert "--overwrite" in other.stderr
    assert (
        clipcid("cluster", "--embeddings", embeddings, "--num-clusters", 8, "--overwrite", "--json").json["clusters"]
        == 8
    )


def test_fewer_different_images_than_clusters_warns_and_ends(clipcid: Callable[..., Run], tmp_path: Path) -> None:
    rows = np.repeat(make_rows(1)[:5], 40, axis=0)
    write_embeddings(tmp_path / "copies", rows)
    run = clipcid("cluster", "--embeddings", tmp_path / "copies", "--num-clusters", 12, "--json")
    assert run.json["empty_clusters"] == 7
    assert run.json["objective"] == pytest.approx(1, abs=1e-3)
    assert "7 of 12 clusters are empty" in run.stderr.replace("\n", " ")


def test_a_dry_run_writes_nothing(clipcid: Callable[..., Run], embeddings: Path) -> None:
    run = clipcid("cluster", "--embeddings", embeddings, "--dry-run", "--json")
    assert run.json["flop"] == 2 * NUM_ROWS * run.json["clusters"] * WIDTH * 20
    assert not (run.cwd / "clipcid-work").exists()


def break_rows(folder: Path) -> None:
    path = folder / "img_emb" / "img_emb_0000.npy"
    rows = np.load(path)
    rows[:20] = np.nan
    np.save(path, rows)


def test_bad_input_gives_one_error_and_leaves_nothing(
    clipcid: Callable[..., Run], embeddings: Path, tmp_path: Path
) -> None:
    images_only = write_embeddings(tmp_path / "images", make_rows(1)[:40])
    broken = write_embeddings(tmp_path / "broken", make_rows(1))
    break_rows(broken)
    nobody = write_keep_list(tmp_path / "nobody.parquet", np.zeros(NUM_ROWS, dtype=bool))
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"key": ["a", "b"], "kept": [True, True]}), foreign)
    cases: list[tuple[list[object], int, str]] = [
        (["--embeddings", images_only, "--num-clusters", 41], 1, "--num-clusters 41 is more than the 40 images"),
        (["--embeddings", images_only, "--features", "joint"], 1, "needs text embeddings"),
        (["--embeddings", tmp_path / "nowhere"], 1, "contains no embeddings"),
        ([], 1, "clipcid embed DATA"),
        (["--embeddings", embeddings, "--keep-list", nobody], 1, "Nothing is left to cluster"),
        (["--embeddings", embeddings, "--keep-list", foreign], 1, "lacks 900 of the 900 rows"),
        (["--embeddings", broken], 1, "20 of 900 samples"),
        (["--embeddings", embeddings, "--num-clusters", 0], 2, "--num-clusters"),
        (["--embeddings", embeddings, "--features", "text"], 2, "--features"),
    ]
    for arguments, code, message in cases:
        run = clipcid("cluster", *arguments, check=False)
        assert run.returncode == code, run
        assert message in " ".join(run.stderr.split()), run
        assert "Traceback" not in run.stderr
        assert not (run.cwd / "clipcid-work").exists()


def test_keys_that_repeat_across_files_need_a_flag(clipcid: Callable[..., Run], embeddings: Path) -> None:
    for number in range(2):
        path = embeddings / f"metadata/metadata_{number:04d}.parquet"
        pq.write_table(pa.table({"key": [f"{row:05d}" for row in range(NUM_ROWS // 2)]}), path)
    refused = clipcid("cluster", "--embeddings", embeddings, check=False)
    assert refused.returncode == 1
    assert "Key '00000' belongs to rows 0 and 450" in " ".join(refused.stderr.split()), refused
    assert "--keys shard" in refused.stderr
    run = clipcid("cluster", "--embeddings", embeddings, "--keys", "shard", "--num-clusters", NUM_CLUSTERS)
    keys = pd.read_parquet(run.cwd / "clipcid-work" / "clusters" / "clusters.parquet")["key"]
    assert keys.iloc[0] == "img_emb_0000/00000"
    assert keys.iloc[-1] == "img_emb_0001/00449"
    # Which keys the table has is one of its settings.
    for number in range(2):
        path = embeddings / f"metadata/metadata_{number:04d}.parquet"
        first = number * NUM_ROWS // 2
        pq.write_table(pa.table({"key": [f"{first + row:05d}" for row in range(NUM_ROWS // 2)]}), path)
    plain = ("cluster", "--embeddings", embeddings, "--num-clusters", NUM_CLUSTERS, "--work", "plain")
    clipcid(*plain)
    for dry in ((), ("--dry-run",)):
        refused = clipcid(*plain, "--keys", "shard", *dry, check=False)
        assert refused.returncode == 1
        assert 'settings.keys: "sample" there, "shard" now' in " ".join(refused.stderr.split())


def test_embeddings_of_other_data_than_the_keep_list_are_told_before_their_keys(
    clipcid: Callable[..., Run], tmp_path: Path
) -> None:
    mine = write_embeddings(tmp_path / "mine", make_rows(1))
    other = write_embeddings(tmp_path / "other", make_rows(2))
    for number in range(2):  # keys that repeat, and are in the list too
        path = other / f"metadata/metadata_{number:04d}.parquet"
        pq.write_table(pa.table({"key": [f"{row:05d}" for row in range(NUM_ROWS // 2)]}), path)
    clipcid("balance", "--embeddings", mine, "--keep", 0.8)
    refused = clipcid("cluster", "--embeddings", other, check=False)
    assert refused.returncode == 1
    told = " ".join(refused.stderr.split())
    assert "keep.parquet has none of the rows of" in told
    assert "it was made from other data" in told
    assert "--keys shard" not in told
    # A list of their own, made with the flag that is lacking here.
    clipcid("balance", "--embeddings", other, "--keep", 0.8, "--keys", "shard", "--work", "w")
    refused = clipcid("cluster", "--embeddings", other, "--work", "w", check=False)
    assert "Add --keys shard" in " ".join(refused.stderr.split())
    clipcid("cluster", "--embeddings", other, "--work", "w", "--keys", "shard")


def test_a_few_rows_that_are_not_finite_are_counted_and_named(clipcid: Callable[..., Run], embeddings: Path) -> None:
    break_rows(embeddings)
    run = clipcid("cluster", "--embeddings", embeddings, "--max-bad-fraction", "0.05", "--json")
    assert run.json["images"] == NUM_ROWS - 20
    assert run.json["skipped"] == {"nan_row": 20}
    assert "20 × embedding that is zero or not finite: 0" in " ".join(run.stderr.split())
