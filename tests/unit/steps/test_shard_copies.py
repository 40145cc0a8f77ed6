"""Copies of shards that the processes of a host share: who fetches which ahead."""

import time
from pathlib import Path

import pytest
from conftest import run_in_two, write_tar
from shard_server import serve

from clipcid_cli.formats.data.dataset import open_dataset
from clipcid_cli.formats.data.index import DataIndex
from clipcid_cli.formats.data.shard_cache import FETCHED_AT_ONCE
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.steps.data_index import ensure_index
from clipcid_cli.steps.shard_copies import cache_shards, fetch_part_ahead

SHARDS = 16


def fetch(_: int, index: DataIndex) -> None:
    """Fetch this process's part, and wait until the other one has fetched its own, too."""
    copies = [copy for shard in range(SHARDS) if (copy := index.copy(shard)) is not None]
    with open_dist_context("cpu") as context:
        context.barrier()
        fetch_part_ahead(index, range(SHARDS), context)
        deadline = time.monotonic() + 30
        while not all(copy.local.exists() for copy in copies):
            assert time.monotonic() < deadline, "some are not fetched"
            time.sleep(0.01)


def test_processes_of_a_host_fetch_different_shards_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPCID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    for shard in range(SHARDS):
        write_tar(tmp_path / "data" / f"{shard:05}.tar", [(f"{shard}.jpg", b"image"), (f"{shard}.txt", b"caption")])
    with serve(tmp_path / "data") as server, open_dist_context("cpu") as context:
        url = f"{server.url}/{{00000..{SHARDS - 1:05}}}.tar"
        index = cache_shards(ensure_index(open_dataset(url, index_root=tmp_path / "index"), context, 0), 1.0).index
        server.requests.clear()
        server.delay, server.most_at_once = 0.1, 0
        run_in_two(fetch, tmp_path, index)
    assert FETCHED_AT_ONCE < server.most_at_once <= 2 * FETCHED_AT_ONCE
    assert set(server.requests.values()) == {1}
