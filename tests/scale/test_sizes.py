"""Files beyond what 32-bit offsets and string columns of 2 GiB hold, written and read with little memory."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sidecars import make_sidecar

from clipcid_cli.formats.arrays import map_strings
from clipcid_cli.formats.files import write_json, write_npy
from clipcid_cli.formats.results.clusters import (
    ClusterParts,
    ClusterSidecar,
    TopClusters,
    join_parts,
    open_clusters,
    part_arrays,
    part_bounds,
)
from clipcid_cli.formats.results.keep_list import read_keep_list, write_keep_list

pytestmark = pytest.mark.slow

AT_ONCE = 2**20
GIB = 2**30

# DataComp's keys have 32 characters: this many rows of them are more than a string column of Arrow holds.
KEY_LENGTH = 32
KEEP_ROWS = 2**31 // KEY_LENGTH + AT_ONCE
# Each dropped image's representative is at most this many rows before it.
GROUP = 3

NEAREST = 16
# The last of these rows' nearest centroids lie behind 2^31 others.
CLUSTER_ROWS = 2**31 // NEAREST + AT_ONCE
NUM_CLUSTERS = 4096


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied at once: pytest keeps those of its last runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@contextmanager
def limit_memory(more: int) -> Iterator[None]:
    """Limit the private memory that may be added meanwhile, in bytes: beyond, allocations fail."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    used = int(status["VmData"].split()[0]) * 1024
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def make_keys(start: int, stop: int) -> pa.LargeStringArray:
    """The keys of rows start … stop − 1: their numbers in 32 digits."""
    digits = np.full((stop - start, KEY_LENGTH), ord("0"), dtype=np.uint8)
    rest = np.arange(start, stop)
    for place in range(KEY_LENGTH - 1, KEY_LENGTH - 11, -1):
        digits[:, place] += (rest % 10).astype(np.uint8)
        rest //= 10
    offsets = np.arange(0, digits.size + 1, KEY_LENGTH, dtype=np.int64)
    return pa.LargeStringArray.from_buffers(stop - start, pa.py_buffer(offsets), pa.py_buffer(digits))


def test_a_keep_list_holds_more_than_2_gib_of_keys(folder: Path) -> None:
    bounds = [(start, min(start + AT_ONCE, KEEP_ROWS)) for start in range(0, KEEP_ROWS, AT_ONCE)]
    rows = np.arange(KEEP_ROWS)
    kept_rows = rows // GROUP * GROUP
    path = folder / "keep.parquet"
    # The keys themselves take 2.6 GiB where they are held whole; per row 64 bytes are allowed beside.
    with limit_memory(64 * KEEP_ROWS + 4 * GIB):
        write_keep_list(
            path,
            keys=map_strings(folder, (make_keys(*bound) for bound in bounds)),
            shards=pa.repeat(pa.scalar("s", pa.large_string()), KEEP_ROWS),
            labels=kept_rows,
            representatives=kept_rows,
            distances=(rows - kept_rows).astype(np.float32),
        )
    del kept_rows
    with limit_memory(64 * KEEP_ROWS + 4 * GIB):
        found = read_keep_list(path)
        np.testing.assert_array_equal(found.kept, rows % GROUP == 0)
        for (start, stop), keys in zip(bounds, found.kept_keys(), strict=True):
            assert keys.equals(make_keys(start, stop).filter(pa.array(found.kept[start:stop]))), start
    del found

    start = 0
    for batch in pq.ParquetFile(path).iter_batches(AT_ONCE, columns=["representative", "component", "component_size"]):
        stop = start + len(batch)
        labels = rows[start:stop] // GROUP * GROUP
        np.testing.assert_array_equal(batch["component"], labels)
        np.testing.assert_array_equal(batch["component_size"], np.minimum(labels + GROUP, KEEP_ROWS) - labels)
        first = int(labels[0])
        representatives = make_keys(first, stop).take(pa.array(labels - first))
        assert batch["representative"].cast(pa.large_string()).equals(representatives), start
        start = stop
    assert start == KEEP_ROWS


def make_tops(rows: npt.NDArray[np.int64]) -> TopClusters:
    """The nearest centroids of some rows: each row's follow from its number."""
    clusters = ((rows[:, None] + np.arange(NEAREST)) % NUM_CLUSTERS).astype(np.int32)
    similarities = (1 - (rows[:, None] % 7 + np.arange(NEAREST)) / 64).astype(np.float16)
    return TopClusters(clusters, similarities)


def test_clusters_hold_more_rows_than_32_bits_count_neighbours(folder: Path) -> None:
    bounds = part_bounds(CLUSTER_ROWS)
    with limit_memory(4 * GIB):
        for part, (start, stop) in enumerate(bounds):
            tops = make_tops(np.arange(start, stop))
            arrays = part_arrays({"image": (tops.clusters.astype(np.int64), tops.similarities.astype(np.float64))})
            ClusterParts(folder).append(part, arrays)
        join_parts(folder, bounds, lambda start, stop: pa.chunked_array([make_keys(start, stop)]))
        shutil.rmtree(folder / ".parts")
    write_npy(folder / "centroids.npy", np.eye(NUM_CLUSTERS, 8, dtype=np.float32))
    write_json(folder / "cluster.json", make_sidecar(ClusterSidecar, temperatures={"image": 0.02}))

    # What `distill` may hold a row.
    with limit_memory(8 * CLUSTER_ROWS + 2 * GIB):
        found = open_clusters(folder)
        assert len(found.labels) == CLUSTER_ROWS
        drawn = np.random.default_rng(0).integers(0, CLUSTER_ROWS - 1000, 100)
        for start in (0, CLUSTER_ROWS - AT_ONCE - 2, CLUSTER_ROWS - 1000, *drawn):
            rows = np.arange(start, start + 1000)
            tops = make_tops(rows)
            np.testing.assert_array_equal(found.labels[rows], tops.clusters[:, 0])
            np.testing.assert_array_equal(found.images.clusters[rows], tops.clusters)
            np.testing.assert_array_equal(found.images.similarities[rows], tops.similarities)
    # Keys and exact similarities are in the table alone, a part to a row group.
    with pq.ParquetFile(folder / "clusters.parquet") as file:
        assert file.metadata.num_rows == CLUSTER_ROWS
        for part in (0, len(bounds) // 2, len(bounds) - 1):
            table, (start, stop) = file.read_row_group(part, columns=["key", "similarity"]), bounds[part]
            assert table["key"].combine_chunks().cast(pa.large_string()).equals(make_keys(start, stop))
            exact = make_tops(np.arange(start, stop)).similarities[:, 0]
            np.testing.assert_array_equal(table["similarity"].to_numpy(), exact.astype(np.float32))
