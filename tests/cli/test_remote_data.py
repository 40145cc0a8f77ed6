"""Data behind URLs and from commands gives what the same data on a disk gives, whatever the connection does."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
from conftest import Run, shard_members, write_tar
from shard_server import serve

Clipcid = Callable[..., Run]


def write_shards(folder: Path, shards: int, each: int) -> Path:
    for number in range(shards):
        write_tar(folder / f"{number:05d}.tar", shard_members(number * each, each))
    return folder


def rows(work: Path) -> dict[str, object]:
    """Return the embeddings' files: bytes of .npy, rows of .parquet, whose metadata name where the data came from."""
    (folder,) = (work / "embeddings").iterdir()
    found: dict[str, object] = {path.name: path.read_bytes() for path in folder.rglob("*.npy")}
    return found | {path.name: pq.read_table(path).to_pydict() for path in folder.rglob("*.parquet")}


def counts(work: Path) -> object:
    return json.loads((work / "embeddings" / "tiny" / "embed.json").read_text())["counts"]


def test_embeddings_are_those_of_the_same_data_on_a_disk(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", 6, 9)
    settings = ("--model", tiny_model, "--batch-size", 4)
    clipcid("embed", data, *settings, "--work", "disk")
    with serve(data, drop_every=10, delay=0.01) as server:
        pattern = f"{server.url}/{{00000..00005}}.tar"
        clipcid("embed", pattern, *settings, "--work", "url", "--workers", 2)
        sent = sum(server.bytes_sent.values())
        # An index was made on the way: nothing is fetched to find that all is done.
        clipcid("embed", pattern, *settings, "--work", "url")
        assert sum(server.bytes_sent.values()) == sent
        assert server.dropped > 0
    pipe = f"pipe:cat {shlex.quote(str(data))}/{{00000..00005}}.tar"
    clipcid("embed", pipe, *settings, "--work", "pipe")
    expected = rows(tmp_path / "disk")
    assert len(expected) == 18
    for work in ("url", "pipe"):
        assert rows(tmp_path / work) == expected, work
        assert counts(tmp_path / work) == counts(tmp_path / "disk")
