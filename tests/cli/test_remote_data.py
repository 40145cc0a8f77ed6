"""Data behind URLs and from commands gives what the same data on a disk gives, whatever the connection does."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import STUDENT, Clipcid, make_image, shard_members, write_tar
from shard_server import serve

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import open_dataset
from clipcid_cli.steps.shard_copies import cache_shards


def write_shards(folder: Path, shards: int, each: int) -> Path:
    for number in range(shards):
        write_tar(folder / f"{number:05d}.tar", shard_members(number * each, each))
    return folder


def rows(work: Path) -> dict[str, object]:
    """Return the embeddings' files: bytes of .npy, rows of .parquet, whose metadata name where the data came from."""
    (folder,) = (work / "embeddings").iterdir()
    found: dict[str, object] = {path.name: path.read_bytes() for path in folder.rglob("*.npy")}
    return found | {path.name: pq.read_table(path).to_pydict() for path in folder.glob("*/*.parquet")}


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
    piped = clipcid("embed", pipe, *settings, "--work", "pipe")
    assert "embed: 54/54 images" in piped.said  # whatever six commands were estimated to give
    expected = rows(tmp_path / "disk")
    assert len(expected) == 18
    for work in ("url", "pipe"):
        assert rows(tmp_path / work) == expected, work
        assert counts(tmp_path / work) == counts(tmp_path / "disk")


def test_what_a_run_allows_to_a_list_is_allowed_in_that_run(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    sizes = [(tmp_path / f"{number}.png").write_bytes(make_image(number)) for number in range(3)]
    cells = [f"local://{tmp_path}/{number}.png" for number in range(3)]
    (tmp_path / "list.csv").write_text("\n".join(["filepath", *cells]))
    embed = ("embed", "list.csv", "--model", tiny_model, "--no-text", "--json")
    assert "the scheme local is not read from lists" in clipcid(*embed, code=1).said
    allowed = (*embed, "--allow-scheme", "local", "--max-bad-fraction", 1)
    done = clipcid(*allowed, "--max-sample-bytes", max(sizes) - 1).json
    too_large = sizes.count(max(sizes))
    assert (done["images"], done["skipped"]) == (3 - too_large, {"too_many_bytes": too_large})
    assert "settings.max_sample_bytes" in clipcid(*allowed, code=1).said
    assert "--allow-scheme local" in clipcid("embed", *embed[2:], code=1).said  # what is recorded is no permission


def test_the_chain_from_urls_with_little_disk(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    """One connection in ten breaks, every answer is slow, and one shard arrives damaged at first."""
    data = write_shards(tmp_path / "data", 44, 4)
    size = (data / "00031.tar").stat().st_size
    (tmp_path / "student.json").write_text(json.dumps(STUDENT))
    work = tmp_path / "clipcid-work"
    distill = ("--teacher", tiny_model, "--preset", "clip-kd", "--student", "student.json", "--name", "one")
    distill += ("--batch-size", 8, "--epochs", 2, "--val-fraction", 0.1)
    with serve(data, drop_every=10, delay=0.005) as server:
        server.damaged = "00031.tar"
        embed = ("embed", f"{server.url}/{{00000..00043}}.tar", "--model", tiny_model)
        assert "00031.tar is damaged at byte 1,024" in clipcid(*embed, code=1).said
        server.damaged = ""
        done = clipcid(*embed)
        # Not quite 31: batches that were being computed when the damage was met are computed again.
        assert re.search(r"\b\d\d? of 44 shards are already embedded", done.said)
        clipcid("balance", "--keep", 0.9)
        before = server.bytes_sent.total()
        environment = {"CLIPCID_CACHE": str(tmp_path / "cache"), "CLIPCID_WORKERS": "2"}
        clipcid("distill", *distill, "--cache-size", 40 * size / 1e9, env=environment)
        # Each epoch reads each shard once; the held-out samples and connections that broke take some more.
        assert server.bytes_sent.total() - before < 4 * 44 * size
        assert server.dropped > 10
        indexed = open_dataset(embed[1], index_root=work / "index")
        with pytest.raises(ClipcidError, match="37 shards that are read, fetched ahead or still in use"):
            cache_shards(indexed, 36.9 * size / 1e9)
        copy = next((tmp_path / "cache").glob("*.tar"))
        copy.write_bytes(copy.read_bytes()[:-1])
        told = clipcid("verify", "--read-data", "--quiet", env=environment, code=1).stderr.splitlines()
        assert told == [f"warning: {copy} has {size - 1:,} bytes; {size:,} were fetched."]
    assert not list(work.rglob("*.tar"))
    inputs = ("--embeddings", work / "embeddings" / "tiny", "--keep-list", work / "balance" / "keep.parquet")
    clipcid("distill", data, *distill, *inputs, "--work", "disk")
    url, disk = (
        json.loads((folder / "distill" / "one" / "distill.json").read_text())["result"]
        for folder in (work, tmp_path / "disk")
    )
    assert url["losses"] == disk["losses"]
    assert url["metrics"] == disk["metrics"]


def test_secrets_of_an_address_are_used_and_not_written(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", 2, 9)
    work = tmp_path / "clipcid-work"
    (tmp_path / "student.json").write_text(json.dumps(STUDENT))
    distill = ("--teacher", tiny_model, "--student", "student.json", "--batch-size", 8, "--val-fraction", 0.2)
    with serve(data) as server:

        def sign(name: str, signature: str) -> str:
            login = server.url.replace("//", "//ann:hunter2@")
            return f"{login}/{name}.tar?X-Amz-Date={signature}&X-Amz-Signature=secret-{signature}"

        first = clipcid("embed", sign("{00000..00001}", "one"), "--model", tiny_model)
        sent = server.bytes_sent.total()
        # Signed anew it is the same data, and its index is found.
        again = clipcid("embed", sign("{00000..00001}", "two"), "--model", tiny_model)
        assert "already holds the embeddings" in again.said
        assert server.bytes_sent.total() == sent
        shutil.copy(data / "00000.tar", data / "00002.tar")
        other = clipcid("embed", sign("{00001..00002}", "two"), "--model", tiny_model, code=1)
        assert "made with other settings or inputs" in other.said
        environment = {"CLIPCID_CACHE": str(tmp_path / "cache")}
        evaluated = ("--eval-data", sign("00001", "three"), "--report-to", "tensorboard")
        trained = clipcid(
            "distill", sign("{00000..00001}", "three"), *distill, "--steps", 1, *evaluated, env=environment
        )
    missing = clipcid("distill", *distill, "--steps", 2, "--name", "other", code=1)
    assert f"{server.url.replace('//', '//REDACTED@')}/{{00000..00001}}.tar?X-Amz-Date=REDACTED&X-Amz" in missing.said
    assert "an address whose secrets are not recorded. Give the data again, with its whole address." in missing.said
    for run in (first, again, other, trained, missing):
        assert not re.search("hunter2|secret-", run.said + run.stdout)
    written = [path for path in work.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert not [path for path in written if re.search(rb"hunter2|secret-", path.read_bytes() + bytes(path))]
