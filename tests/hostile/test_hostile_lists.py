"""Lists from strangers: a cell names an image, and nothing else."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_image
from hostile_place import PUBLIC, Place, few
from hostile_server import redirect, serve_lies, whole

_ANY = ("--max-bad-fraction", 1, "--json")
_REFERENCES = {"version": 1, "templates": {"u": "{{ self.__init__.__globals__ }}"}, "refs": {"a.png": ["{{u}}"]}}
_PACKED = base64.b64encode(json.dumps(_REFERENCES).encode()).decode()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path / "place")
    (place.data / "0.png").write_bytes(make_image(0))
    return place


def write_list(place: Place, *cells: str) -> Path:
    """Write a list of an honest image and the given ones."""
    path = place.data / "list.tsv"
    rows = (f"{cell}\ta caption of {index}" for index, cell in enumerate(("0.png", *cells)))
    path.write_text("\n".join(("filepath\ttitle", *rows, "")))
    return path


_CELLS = [
    f"reference://a.png::data:application/json;base64,{_PACKED}",
    "s3://bucket/a.png",
    "zip://a.png::file://{private}",
    "file://pipe:touch touched",
    f"reference://a.png::data:application/json;base64,{_PACKED}#.png",
    "hf://datasets/someone/data/a.png",
    "github://someone:data@main/a.png",
    "sftp://127.0.0.1/a.png",
    "filecache::file://{private}",
    "simplecache::file://{private}",
    "dir::file://{private}",
    "libarchive://a.png::{private}",
    "REFERENCE://a.png::data:,{{}}",
    "pipe:touch touched",
]


@pytest.mark.parametrize("cell", few(4, _CELLS))
def test_a_cell_reaches_for_nothing_but_images(place: Place, tiny_model: Path, cell: str) -> None:
    path = write_list(place, cell.format(private=place.private))
    outcome = place.run("embed", path, "--model", tiny_model, *_ANY)
    assert not outcome.problems(), outcome


@pytest.mark.parametrize(
    "cell", few(2, ["{private}", "file://{private}", "FILE://{private}", "../../../../..{private}", "{up}"])
)
def test_a_list_from_a_server_reads_no_local_file(place: Place, tiny_model: Path, cell: str) -> None:
    up = os.path.relpath(place.private, place.work)
    with serve_lies() as server:
        cell = cell.format(private=place.private, up=up)
        server.answers["/list.csv"] = whole(f"filepath,title\n/0.png,zero\n0.png,one\n{cell},two\n".encode())
        server.answers["/0.png"] = whole(make_image(0))
        outcome = place.run("embed", f"{server.url}/list.csv", "--model", tiny_model, *_ANY, hosts=[server.address])
    assert not outcome.problems(), outcome


def test_a_local_list_may_name_local_files(place: Place, tiny_model: Path) -> None:
    """What people do every day: absolute paths, links, and folders beside the list."""
    (place.root / "pictures").mkdir()
    for index in (1, 2):
        (place.root / f"pictures/{index}.png").write_bytes(make_image(index))
    (place.data / "link.png").symlink_to("../pictures/2.png")
    cells = (str(place.root / "pictures/1.png"), "../pictures/2.png", "link.png")
    outcome = place.run("embed", write_list(place, *cells), "--model", tiny_model, *_ANY)
    assert not outcome.problems(), outcome
    assert outcome.json["images"] == 4, outcome


@pytest.mark.slow
@pytest.mark.parametrize("host", ["169.254.169.254", "inner.test", "2852039166", "0xa9fea9fe"])
def test_a_local_list_asks_no_link_local_server(place: Place, tiny_model: Path, host: str) -> None:
    """By its address, by a name that leads there, and by other spellings of the address."""
    with serve_lies() as server:
        server.answers["/a.png"] = whole(make_image(1))
        names = dict.fromkeys((host, "inner.test"), "169.254.169.254")
        internet = {"169.254.169.254:80": server.server_port}
        path = write_list(place, f"http://{host}/a.png")
        outcome = place.run("embed", path, "--model", tiny_model, *_ANY, names=names, internet=internet)
        assert not server.requests, outcome
    assert outcome.json["skipped"] == {"http_error": 1}, outcome


@pytest.mark.parametrize(
    "target",
    few(2, ["http://169.254.169.254/a.png", "{private}/a.png", "http://10.0.0.7/a.png", "http://inner.test/a.png"]),
)
def test_a_redirect_does_not_lead_from_a_public_server_to_a_private_one(
    place: Place, tiny_model: Path, target: str
) -> None:
    with serve_lies() as public, serve_lies() as private:
        private.answers["/a.png"] = whole(make_image(1))
        public.answers["/a.png"] = redirect(target.format(private=private.url))
        path = write_list(place, "http://images.test/a.png")
        outcome = place.run(
            "embed",
            path,
            "--model",
            tiny_model,
            *_ANY,
            hosts=["images.test:80"],
            names={"images.test": PUBLIC, "inner.test": "10.0.0.7"},
            internet={f"{PUBLIC}:80": public.server_port},
        )
        assert not private.requests, outcome
    assert not outcome.problems(), outcome


def test_a_redirect_between_public_servers_is_followed(place: Place, tiny_model: Path) -> None:
    other = "151.101.1.140"
    with serve_lies() as public, serve_lies() as network:
        network.answers["/a.png"] = whole(make_image(1))
        public.answers["/a.png"] = redirect("http://network.test/a.png")
        path = write_list(place, "http://images.test/a.png")
        outcome = place.run(
            "embed",
            path,
            "--model",
            tiny_model,
            *_ANY,
            hosts=["images.test:80", "network.test:80"],
            names={"images.test": PUBLIC, "network.test": other},
            internet={f"{PUBLIC}:80": public.server_port, f"{other}:80": network.server_port},
        )
    assert not outcome.problems(), outcome
    assert outcome.json["images"] == 2, outcome


@pytest.mark.parametrize(
    "cell", few(2, ["file:///dev/zero", "file://{fifo}", "/dev/zero", "{fifo}", "link.png", "/dev/fd/0"])
)
def test_a_cell_that_is_no_file_does_not_hang(place: Place, tiny_model: Path, cell: str) -> None:
    os.mkfifo(place.data / "fifo.png")
    (place.data / "link.png").symlink_to("/dev/zero")
    path = write_list(place, cell.format(fifo=place.data / "fifo.png"))
    outcome = place.run("embed", path, "--model", tiny_model, *_ANY)
    assert not outcome.problems(), outcome


def test_a_folder_and_a_list_that_are_no_files_do_not_hang(place: Place, tiny_model: Path) -> None:
    os.mkfifo(place.data / "1.png")
    os.mkfifo(place.data / "0.txt")
    (place.data / "2.png").symlink_to("/dev/zero")
    (place.data / "3.tif").symlink_to("3.tif")
    outcome = place.run("embed", place.data, "--model", tiny_model, *_ANY)
    assert not outcome.problems(), outcome
    os.mkfifo(place.data / "list.csv")
    outcome = place.run("embed", place.data / "list.csv", "--model", tiny_model, *_ANY)
    assert not outcome.problems(), outcome


_COLUMNS: Mapping[str, object] = {
    "structs of captions": {"title": [{"a": 1, "b": "x"}] * 2},
    "structs of classes": {"label": [{"a": 1}] * 2},
    "structs of images": {"filepath": [{"bytes": None, "path": "0.png"}] * 2},
    "structs of keys": {"key": [{"a": "x"}, {"a": "y"}]},
    "lists of structs": {"title": [[{"a": 1}], [{"b": 2}]]},
    "maps": {"title": pa.array([[("a", 1)], [("b", 2)]], pa.map_(pa.string(), pa.int64()))},
    "lists of lists": {"title": [[["a"]], [[]]]},
    "bytes": {"title": [b"\xff\xfe", b""]},
    "dates": {"title": pa.array([2**40, -1], pa.timestamp("us"))},
}


@pytest.mark.parametrize("name", few(2, _COLUMNS))
def test_columns_of_other_kinds_are_no_bug(place: Place, tiny_model: Path, name: str) -> None:
    columns = {"filepath": ["0.png", "1.png"], "title": ["a", "b"], **_COLUMNS[name]}  # type: ignore[dict-item]
    (place.data / "1.png").write_bytes(make_image(1))
    pq.write_table(pa.table(columns), place.data / "list.parquet")
    outcome = place.run("embed", place.data / "list.parquet", "--model", tiny_model, *_ANY)
    assert not outcome.problems(), outcome
