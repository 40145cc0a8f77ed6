"""The cluster table: parts joined in order, read back as written, errors for what does not fit."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sidecars import edit_sidecar, make_sidecar

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import save_arrays
from clipcid_cli.formats.atomic import write_json, write_npy
from clipcid_cli.formats.results.clusters import (
    TopClusters,
    join_parts,
    open_clusters,
    part_arrays,
    part_bounds,
    part_path,
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
        piece = clusters[first:last].astype(np.int64), similarities[first:last]
        save_arrays(part_path(folder, part), part_arrays({"image": piece} | ({"caption": piece} if captions else {})))
    join_parts(folder, bounds, lambda first, last: pa.chunked_array([keys[first:last]]))
    write_npy(folder / "centroids.npy", np.eye(num_clusters, 8, dtype=np.float32))
    temperatures = {"image": 0.02} | ({"caption": 0.03} if captions else {})
    write_json(folder / "cluster.json", make_sidecar(ClusterSidecar, temperatures=temperatures))
    return keys, tops, similarities


@pytest.mark.parametrize("captions", [True, False])
def test_what_is_written_is_read_back(tmp_path: Path, captions: bool) -> None:
    keys, tops, similarities = write_clusters(tmp_path, 20_000, captions=captions)
    found = open_clusters(tmp_path)
    table = pq.read_table(tmp_path / "clusters.parquet")
    assert table["key"].to_pylist() == keys.to_pylist()
    np.testing.assert_array_equal(table["similarity"].to_numpy(), similarities[:, 0].astype(np.float32))
    assert found.labels.dtype == np.int32
    assert found.images.similarities.dtype == np.float16
    np.testing.assert_array_equal(found.labels, tops.clusters[:, 0])
    np.testing.assert_array_equal(found.images.clusters, tops.clusters)
    np.testing.assert_array_equal(found.images.similarities, tops.similarities)
    assert (found.captions is not None) == captions
    assert found.sidecar.temperatures.get("caption") == (0.03 if captions else None)


@pytest.mark.parametrize("name", ["top_clusters.npy", "caption_top_similarities.npy"])
def test_clusters_without_the_arrays_are_refused_with_the_command_that_makes_them(tmp_path: Path, name: str) -> None:
    write_clusters(tmp_path / "clusters", 100)
    (tmp_path / "clusters" / name).unlink()
    with pytest.raises(
        ClipcidError, match=rf"{name} cannot be read.*\.\nRun: clipcid cluster .* --work .* --overwrite"
    ):
        open_clusters(tmp_path / "clusters", tmp_path)


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _, tops, _ = write_clusters(tmp_path, 10)
    np.save(tmp_path / "top_clusters.npy", tops.clusters[:, :1])
    with pytest.raises(ClipcidError, match=r"top_similarities\.npy .* holds float16 \[10, 3\]"):
        open_clusters(tmp_path)
    np.save(tmp_path / "top_clusters.npy", tops.clusters.astype(np.int64))
    with pytest.raises(ClipcidError, match=r"top_clusters\.npy .* holds int64 \[10, 3\]"):
        open_clusters(tmp_path)
    np.save(tmp_path / "top_clusters.npy", tops.clusters[1:])
    with pytest.raises(ClipcidError, match=r"top_clusters\.npy .* \[9, 3\]; clusters\.parquet has 10 rows"):
        open_clusters(tmp_path)


def test_rows_are_mapped_and_another_process_opens_the_files_itself(tmp_path: Path) -> None:
    write_clusters(tmp_path, 20_000)
    found = open_clusters(tmp_path)
    assert not found.images.clusters.flags.owndata
    assert isinstance(found.images.clusters.base, np.memmap)
    sent = pickle.dumps(found)
    assert len(sent) < 1000
    np.testing.assert_array_equal(pickle.loads(sent).images.clusters, found.images.clusters)


def test_other_tools_read_the_table(tmp_path: Path) -> None:
    write_clusters(tmp_path, 10, captions=False)
    frame = pd.read_parquet(tmp_path / "clusters.parquet")
    assert list(frame.columns) == ["key", "cluster", "similarity"]
    assert frame["cluster"].dtype == np.int32
    assert frame["similarity"].dtype == np.float32


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
        open_clusters(folder)


def test_an_entry_that_clusters_lack_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "clusters"
    write_clusters(folder, 10)
    edit_sidecar(folder / "cluster.json", lambda sidecar: sidecar.pop("temperatures"))
    with pytest.raises(ClipcidError, match=r"cluster\.json cannot be read .* missing required field `temperatures`"):
        open_clusters(folder, tmp_path)


def test_a_cut_off_table_is_refused(tmp_path: Path) -> None:
    write_clusters(tmp_path, 10)
    table = tmp_path / "clusters.parquet"
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(ClipcidError, match=r"clusters\.parquet cannot be read as a parquet file"):
        open_clusters(tmp_path)
