"""The cluster table: parts joined in order, read back as written, errors for what does not fit."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sidecars import make_sidecar

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_json, write_npy
from clipcid_cli.formats.results.clusters import (
    TopClusters,
    join_parts,
    open_clusters,
    part_bounds,
    part_path,
    write_part,
)
from clipcid_cli.formats.sidecar import ClusterSidecar


def write_clusters(
    folder: Path, num_rows: int, *, captions: bool = True, num_clusters: int = 6, m: int = 3, seed: int = 0
) -> Any:
    random = np.random.default_rng(seed)
    similarities = -np.sort(-random.random((num_rows, m)), axis=1)
    clusters = random.integers(0, num_clusters, (num_rows, m)).astype(np.int32)
    tops = TopClusters(clusters, similarities.astype(np.float16))
    keys = pa.array([f"key {row}" for row in range(num_rows)], pa.large_string())
    bounds = part_bounds(num_rows)
    for part, (first, last) in enumerate(bounds):
        piece = TopClusters(clusters[first:last], tops.similarities[first:last])
        write_part(
            part_path(folder, part),
            keys=keys[first:last],
            similarities=similarities[first:last, 0],
            images=piece,
            captions=piece if captions else None,
        )
    join_parts(folder, len(bounds), captions=captions)
    write_npy(folder / "centroids.npy", np.eye(num_clusters, 8, dtype=np.float32))
    write_json(folder / "cluster.json", make_sidecar(ClusterSidecar))
    return keys, tops, similarities


@pytest.mark.parametrize("captions", [True, False])
def test_what_is_written_is_read_back(tmp_path: Path, captions: bool) -> None:
    keys, tops, similarities = write_clusters(tmp_path, 20_000, captions=captions)
    found = open_clusters(tmp_path, tmp_path / "cache")
    table = pq.read_table(tmp_path / "clusters.parquet")
    assert table["key"].to_pylist() == keys.to_pylist()
    np.testing.assert_array_equal(table["similarity"].to_numpy(), similarities[:, 0].astype(np.float32))
    assert found.labels.dtype == np.int32
    assert found.images.similarities.dtype == np.float16
    np.testing.assert_array_equal(found.labels, tops.clusters[:, 0])
    np.testing.assert_array_equal(found.images.clusters, tops.clusters)
    np.testing.assert_array_equal(found.images.similarities, tops.similarities)
    assert (found.captions is not None) == captions
    assert found.caption_temperature == (0.03 if captions else None)


def read_arrays(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*top_*.npy")}


def read_cache(folder: Path) -> dict[str, bytes]:
    """Read the arrays of the only table in the cache of a folder."""
    (arrays,) = (folder / "cache").iterdir()
    return read_arrays(arrays)


def test_arrays_that_are_missing_are_made_in_the_cache_and_nothing_is_written_beside_the_table(tmp_path: Path) -> None:
    _, tops, _ = write_clusters(tmp_path / "here", 20_000)
    cache = tmp_path / "cache"
    open_clusters(tmp_path / "here", cache)
    assert not cache.exists()
    written = read_arrays(tmp_path / "here")
    assert len(written) == 4
    for name in (*written, "top_arrays.json"):
        (tmp_path / "here" / name).unlink()
    left = sorted((tmp_path / "here").iterdir())
    found = open_clusters(tmp_path / "here", cache)
    np.testing.assert_array_equal(found.images.clusters, tops.clusters)
    assert read_cache(tmp_path) == written
    times = [path.stat().st_mtime_ns for path in sorted(cache.rglob("*"))]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found)).images.clusters, tops.clusters)
    assert times == [path.stat().st_mtime_ns for path in sorted(cache.rglob("*"))], "made once"
    assert sorted((tmp_path / "here").iterdir()) == left


def test_arrays_of_another_length_are_not_taken(tmp_path: Path) -> None:
    _, tops, _ = write_clusters(tmp_path, 100)
    written = read_arrays(tmp_path)
    np.save(tmp_path / "top_clusters.npy", tops.clusters[1:])
    open_clusters(tmp_path, tmp_path / "cache")
    assert read_cache(tmp_path) == written
    (made,) = (tmp_path / "cache").iterdir()
    np.save(made / "top_clusters.npy", tops.clusters[1:])
    open_clusters(tmp_path, tmp_path / "cache")
    assert read_cache(tmp_path) == written


def test_arrays_of_a_table_replaced_by_one_of_equal_size_are_not_taken(tmp_path: Path) -> None:
    write_clusters(tmp_path / "here", 100)
    _, tops, _ = write_clusters(tmp_path / "other", 100, seed=1)
    open_clusters(tmp_path / "here", tmp_path / "cache")
    for name in ("centroids.npy", "clusters.parquet", "cluster.json"):
        shutil.copyfile(tmp_path / "other" / name, tmp_path / "here" / name)
    np.testing.assert_array_equal(open_clusters(tmp_path / "here", tmp_path / "cache").images.clusters, tops.clusters)
    assert read_cache(tmp_path) == read_arrays(tmp_path / "other")


def test_an_array_that_was_replaced_by_one_of_equal_shape_is_not_taken(tmp_path: Path) -> None:
    _, tops, _ = write_clusters(tmp_path, 100)
    np.save(tmp_path / "top_clusters.npy", tops.clusters[::-1])
    np.testing.assert_array_equal(open_clusters(tmp_path, tmp_path / "cache").images.clusters, tops.clusters)


@pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"files": [{}]}', b'{"files": 3}'])
def test_arrays_with_a_damaged_record_are_not_taken(tmp_path: Path, content: bytes | None) -> None:
    _, tops, _ = write_clusters(tmp_path, 100)
    record = tmp_path / "top_arrays.json"
    written = json.loads(record.read_bytes())
    record.unlink()
    if content is not None:
        record.write_bytes(content)
    np.testing.assert_array_equal(open_clusters(tmp_path, tmp_path / "cache").images.clusters, tops.clusters)
    (made,) = (tmp_path / "cache").iterdir()
    again = json.loads((made / "top_arrays.json").read_bytes())
    assert [entry["hash"] for entry in again["files"]] == [entry["hash"] for entry in written["files"]]


def test_a_cache_that_cannot_be_written_is_named_with_one_fix(tmp_path: Path) -> None:
    write_clusters(tmp_path, 100)
    (tmp_path / "top_arrays.json").unlink()
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(ClipcidError, match=r"Could not write .*cache.*: Not a directory") as caught:
        open_clusters(tmp_path, tmp_path / "cache")
    assert caught.value.fix.startswith("Remove or rename what is in its place")


def test_clusters_without_captions_leave_no_arrays_of_those_before(tmp_path: Path) -> None:
    write_clusters(tmp_path, 10)
    write_clusters(tmp_path, 10, captions=False)
    assert set(read_arrays(tmp_path)) == {"top_clusters.npy", "top_similarities.npy"}


def test_rows_are_mapped_and_another_process_opens_the_files_itself(tmp_path: Path) -> None:
    write_clusters(tmp_path, 20_000)
    found = open_clusters(tmp_path, tmp_path / "cache")
    assert not found.images.clusters.flags.owndata
    assert isinstance(found.images.clusters.base, np.memmap)
    sent = pickle.dumps(found)
    assert len(sent) < 1000
    np.testing.assert_array_equal(pickle.loads(sent).images.clusters, found.images.clusters)


def test_other_tools_read_the_table(tmp_path: Path) -> None:
    write_clusters(tmp_path, 10, captions=False)
    frame = pd.read_parquet(tmp_path / "clusters.parquet")
    assert list(frame.columns) == ["key", "cluster", "similarity", "top_clusters", "top_similarities"]
    assert frame["cluster"].dtype == np.int32
    assert frame["similarity"].dtype == np.float32
    assert frame["top_similarities"][0].dtype == np.float16


@pytest.mark.parametrize("num_rows", [1, 8192, 8193, 100_000, 407_000_000])
def test_parts_cover_all_rows_once(num_rows: int) -> None:
    bounds = part_bounds(num_rows)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == num_rows
    assert all(before[1] == after[0] for before, after in itertools.pairwise(bounds))
    assert len(bounds) <= 256


def test_unfinished_clusters_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "clusters"
    write_clusters(folder, 10)
    (folder / "cluster.json").unlink()
    with pytest.raises(ClipcidError, match=r"no cluster\.json.*\nName another folder with --clusters"):
        open_clusters(folder, tmp_path / "cache")


def test_an_entry_that_clusters_lack_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "clusters"
    write_clusters(folder, 10)
    content = make_sidecar(ClusterSidecar)
    del content["temperatures"]
    write_json(folder / "cluster.json", content)
    with pytest.raises(ClipcidError, match=r"cluster\.json cannot be read .* missing required field `temperatures`"):
        open_clusters(folder, tmp_path / "cache", work=tmp_path)


def test_a_cut_off_table_is_refused(tmp_path: Path) -> None:
    write_clusters(tmp_path, 10)
    table = tmp_path / "clusters.parquet"
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(ClipcidError, match="cannot be read as clusters"):
        open_clusters(tmp_path, tmp_path / "cache")


def test_a_table_without_a_similarity_for_each_of_its_centroids_is_refused(tmp_path: Path) -> None:
    _, tops, _ = write_clusters(tmp_path, 10)
    table = pq.read_table(tmp_path / "clusters.parquet")
    column = pa.array(tops.clusters[:, :1].tolist(), pa.list_(pa.int32()))
    table = table.set_column(table.schema.get_field_index("top_clusters"), "top_clusters", column)
    pq.write_table(table, tmp_path / "clusters.parquet")
    with pytest.raises(ClipcidError, match=r"top_clusters is \[10, 1\], top_similarities \[10, 3\]"):
        open_clusters(tmp_path, tmp_path / "cache")


def test_labels_beyond_the_centroids_are_refused(tmp_path: Path) -> None:
    write_clusters(tmp_path, 100)
    write_npy(tmp_path / "centroids.npy", np.eye(2, 8, dtype=np.float32))
    with pytest.raises(ClipcidError, match=r"names cluster 5; centroids\.npy has 2 centroids"):
        open_clusters(tmp_path, tmp_path / "cache")
