"""What the cells of lists, indexes and records of earlier runs may name: they may be someone else's."""

from __future__ import annotations

import json
import os
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_server import send, serve, serve_answers

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset, open_dataset, open_described
from clipcid_cli.formats.sidecar import DataSpec
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.steps.data_index import ensure_index
from clipcid_cli.steps.shard_copies import cache_shards


def write_list(folder: Path, *cells: object, name: str = "list.csv") -> Path:
    path = folder / name
    path.write_text("".join(f'"{cell}",text\n' for cell in ("filepath", *cells)).replace("text", "title", 1))
    return path


def images(dataset: Dataset) -> list[bytes]:
    return [sample.image.read() for shard in dataset.shards for sample in shard.samples()]


def test_a_local_list_names_files_and_web_addresses(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"one")
    with serve(tmp_path) as server:
        inside, absolute = "a.jpg", tmp_path / "a.jpg"
        path = write_list(tmp_path, inside, absolute, f"file://{absolute}", f"FILE://{absolute}", f"{server.url}/a.jpg")
        assert images(open_dataset(path)) == [b"one"] * 5


def test_pipes_and_devices_in_a_list_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    cells = [
        "pipe.jpg",
        tmp_path / "pipe.jpg",
        f"file://{tmp_path}/pipe.jpg",
        "/dev/zero",
        "file:///dev/zero",
        tmp_path,
    ]
    dataset = open_dataset(write_list(tmp_path, *cells))
    for sample in dataset.shards[0].samples():
        with pytest.raises(OSError, match=r"it is a (pipe or device|folder), not a file"):
            sample.image.read()


@pytest.mark.parametrize(
    ("cell", "problem", "fix"),
    [
        ("s3://bucket/1.jpg", "the scheme s3 is not read from lists", "--allow-scheme s3"),
        ("HF://org/name/1.jpg", "the scheme hf is not", "--allow-scheme hf"),
        ("reference://x/1.jpg", "the scheme reference is not", "--allow-scheme reference"),
        ("reference://x::data:application/json,{}", "holds `::`", "Name images by"),
        ("http://127.0.0.1/1.jpg::file:///etc/passwd", "holds `::`", "Name images by"),
    ],
)
def test_other_addresses_in_a_list_are_refused_by_name(cell: str, problem: str, fix: str, tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match=f"list.csv names .*{problem}") as raised:
        open_dataset(write_list(tmp_path, "1.jpg", cell))
    assert fix in raised.value.fix


@pytest.mark.parametrize(
    "cell", ["/etc/passwd", "file:///etc/passwd", "FILE://file:///etc/passwd", "../1.jpg", "a/../../1.jpg"]
)
def test_a_list_from_elsewhere_names_no_files(cell: str, tmp_path: Path) -> None:
    write_list(tmp_path, cell)
    with serve(tmp_path) as server, pytest.raises(ClipcidError, match="may name no file on it"):
        open_dataset(f"{server.url}/list.csv")


def test_a_list_from_elsewhere_names_images_beside_it(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(b"one")
    with serve(tmp_path) as server:
        write_list(tmp_path, "photos/1.jpg", f"{server.url}/photos/1.jpg")
        assert images(open_dataset(f"{server.url}/list.csv")) == [b"one"] * 2


def test_schemes_are_read_where_the_user_allows_them(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/cells/1.jpg", b"one")
    path = write_list(tmp_path, "memory://cells/1.jpg")
    dataset = open_dataset(path, schemes=("memory",))
    assert images(dataset) == [b"one"]
    assert images(open_described(dataset.describe(), schemes=("memory",))) == [b"one"]
    with pytest.raises(ClipcidError, match="the scheme memory is not read"):
        open_described(dataset.describe())


@pytest.mark.parametrize(
    "before", ["", "file://", "FILE://", "file://FILE://", "/nowhere/*.tar::", "/nowhere/*.tar::file://"]
)
def test_a_record_runs_no_command(before: str, tiny_shards: Path, tmp_path: Path) -> None:
    spec = f"{before}pipe:touch {tmp_path}/mark; cat {tiny_shards}/00000.tar"
    with pytest.raises(ClipcidError):
        open_described(DataSpec(spec, "sample", "filepath", "title", "key"))
    assert not (tmp_path / "mark").exists()


def test_a_record_lets_no_list_from_a_server_name_files() -> None:
    spec = DataSpec("http://127.0.0.1:9/list.csv", "sample", "filepath", "title", "key", list_root="/etc")
    with pytest.raises(ClipcidError, match="names files on it only where you say so"):
        open_described(spec)


@pytest.mark.parametrize("spec", ["reference://x/1.tar", "/nowhere/1.tar::Memory://x/1.tar"])
def test_a_record_opens_common_schemes(spec: str) -> None:
    with pytest.raises(ClipcidError, match=r"the scheme (reference|memory) is not opened unless you give it yourself"):
        open_described(DataSpec(spec, "sample", "filepath", "title", "key"))


def test_a_server_that_lists_a_chain_of_file_systems_is_refused() -> None:
    page = b'<a href="1::reference://x.tar">'
    with serve_answers(lambda request: send(request, 200, page, Content_Type="text/html")) as url:
        refused = pytest.raises(ClipcidError, match=r"1::reference:/x\.tar holds ::, by which file systems are read")
        with refused:
            open_dataset(f"{url}/data")


def test_a_page_lists_the_shards_below_it(tiny_shards: Path) -> None:
    """As web servers and buckets write it; what leads elsewhere is not taken."""
    page = b"""<a href="?C=N">Name</a> <A class="x" HREF=\'00000.tar\'>one</A> <a href="/data/00001.tar">two</a>
        <a href="../2.tar">up</a> <a href="http://127.0.0.1:1/data/3.tar">other</a> <a <a href="0&#48;000.tar">one</a>"""

    def answer(request: BaseHTTPRequestHandler) -> None:
        name = request.path.rpartition("/")[2]
        send(request, 200, (tiny_shards / name).read_bytes() if name.endswith(".tar") else page)

    with serve_answers(answer) as url:
        found = open_dataset(f"{url}/data")
    assert [shard.source.removeprefix(url) for shard in found.shards] == ["/data/00000.tar", "/data/00001.tar"]


def move_shards(index: Path, path: str) -> None:
    """Have an index say that its shards are elsewhere."""
    (table,) = index.glob("*/shards-*.parquet")
    rows = [json.loads(row) for row in pq.read_table(table)["shard"].to_pylist()]
    for row in rows:
        row["fingerprint"]["path"] = path
    pq.write_table(pa.table({"shard": [json.dumps(row) for row in rows]}), table)


def test_an_index_says_neither_what_is_run_nor_where_shards_are(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPCID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    with serve(tiny_shards) as server, open_dist_context("cpu") as context:
        spec = f"{server.url}/00000.tar"
        ensure_index(open_dataset(spec, index_root=tmp_path / "index"), context, 0)
        move_shards(tmp_path / "index", f"pipe:touch {tmp_path}/mark; cat {tiny_shards}/00000.tar")
        dataset = cache_shards(open_dataset(spec, index_root=tmp_path / "index"), 1.0)
        assert dataset.index is not None
        dataset.index.part(0).sample(0).image.read()
        assert server.requests["00000.tar"] > 1
    assert not (tmp_path / "mark").exists()
    assert os.listdir(tmp_path / "cache")
