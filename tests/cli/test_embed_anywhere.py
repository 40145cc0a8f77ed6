"""Parts of embeddings as a user runs them: killed and started again, in a folder and on an S3 server."""

from __future__ import annotations

import csv
import functools
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import fsspec
import pyarrow.parquet as pq
import pytest
from conftest import Clipcid, make_image, shard_members, start_clipcid, write_tar

PARTS = 8
KILLED = (2, 5, 7)


def content(folder: Path) -> dict[str, Any]:
    """Read rows, metadata and the list of skipped samples, and the manifest without the times of files."""
    manifest = pq.read_table(folder / "manifest.parquet").to_pylist()
    for file in (file for shard in manifest for file in shard["files"].values() if file is not None):
        del file["time"]
    files = {path.name: path.read_bytes() for path in (*folder.glob("*/*"), *folder.glob("skipped.parquet"))}
    return files | {"manifest": manifest}


def write_shards(folder: Path, shards: int, each: int) -> None:
    for number in range(shards):
        bad = [(f"bad{number}.png", b"no image"), (f"bad{number}.txt", b"a cat")] if number % 7 == 3 else []
        write_tar(folder / f"{number:05d}.tar", [*shard_members(number * each, each), *bad])


def run_parts(tmp_path: Path, embed: tuple[object, ...], shards: int, env: dict[str, str] | None = None) -> None:
    """Run eight parts, of which three are killed as they write their second shard, and then run again."""
    for part in range(PARTS):
        hook = None
        if part in KILLED:
            second = f"img_emb_{part + PARTS:04d}.npy"
            hook = functools.partial(forks.after_naming, second, functools.partial(signal.raise_signal, signal.SIGKILL))
        started = start_clipcid(*embed, "--part", f"{part}/{PARTS}", cwd=tmp_path, env=env, hook=hook)
        assert started.wait() == (-signal.SIGKILL if part in KILLED else 0), started.read()


@pytest.mark.slow
def test_three_of_eight_parts_are_killed(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "data", 24, 5)
    embed = ("embed", "data", "--model", tiny_model, "--precision", "fp32", "--batch-size", 4)
    allowed = ("--max-bad-fraction", 0.1)
    clipcid(*embed, *allowed, "--out", "one")
    parts = (*embed, *allowed, "--out", "many")
    run_parts(tmp_path, parts, 24)
    missing = clipcid("embed", "--join", "many", code=1).said
    assert "6 of 24 shards are missing in many, of parts 2/8, 5/8, 7/8." in missing
    for part in KILLED:
        assert "1 of 3 shards are already embedded" in clipcid(*parts, "--part", f"{part}/{PARTS}").said
    clipcid("embed", "--join", "many", *allowed)
    assert content(tmp_path / "many") == content(tmp_path / "one")
    clipcid("balance", "--embeddings", "many", "--keep", 0.5)


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """An S3 server with a bucket, and the variables by which its client finds it."""
    server_of = pytest.importorskip("moto.server", reason="needs pip install '.[test-s3]'").ThreadedMotoServer
    server = server_of(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield variables
    server.stop()


@pytest.mark.slow
def test_a_thousand_objects_on_an_s3_server(
    s3: dict[str, str], clipcid: Clipcid, tiny_model: Path, tmp_path: Path
) -> None:
    write_shards(tmp_path / "data", 250, 2)
    embed = ("embed", "data", "--model", tiny_model, "--precision", "fp32", "--batch-size", 2)
    allowed = ("--max-bad-fraction", 0.5)
    clipcid(*embed, *allowed, "--out", "one")
    parts = (*embed, *allowed, "--out", "s3://bucket/many")
    run_parts(tmp_path, parts, 250, s3)
    missing = clipcid("embed", "--join", "s3://bucket/many", "--out", "joined", code=1, env=s3).said
    assert "of 250 shards are missing in s3://bucket/many, of parts 2/8, 5/8, 7/8." in missing
    for part in KILLED:
        clipcid(*parts, "--part", f"{part}/{PARTS}", env=s3)
    assert len(fsspec.filesystem("s3").find("bucket/many")) > 1000
    clipcid("embed", "--join", "s3://bucket/many", "--out", "joined", *allowed, env=s3)
    assert content(tmp_path / "joined") == content(tmp_path / "one")


@pytest.mark.slow
def test_images_and_shards_of_an_s3_server(
    s3: dict[str, str], clipcid: Clipcid, tiny_model: Path, tmp_path: Path
) -> None:
    store = fsspec.filesystem("s3")
    write_shards(tmp_path / "data", 2, 3)
    with (tmp_path / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath"])
        for number in range(3):
            store.pipe(f"bucket/images/{number}.png", make_image(number))
            writer.writerow([f"s3://bucket/images/{number}.png"])
    embed = ("embed", "--model", tiny_model, "--no-text", "--json")
    listed = clipcid(*embed, "list.csv", "--allow-scheme", "s3", "--work", "list", env=s3).json
    assert listed["images"] == 3
    for path in (tmp_path / "data").iterdir():
        store.put_file(str(path), f"bucket/data/{path.name}")
    assert clipcid(*embed, "s3://bucket/data/{00000..00001}.tar", "--work", "shards", env=s3).json["images"] == 6
    began = time.monotonic()
    part = (*embed, "data", "--part", "0/2", "--out", "s3://nowhere/parts")
    assert "could not be written: An error occurred (NoSuchBucket)" in clipcid(*part, code=1, env=s3).said
    assert time.monotonic() - began < 20
