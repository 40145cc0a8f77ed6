"""Files that are small on a disk and large in memory: the limits are known before they are read."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_image, run_clipcid, shard_members, write_benchmark, write_classified, write_tar
from hostile_files import (
    deflate_zeros,
    gzip_zeros,
    npy_header,
    npz_bomb,
    parquet_bomb,
    png_bomb,
    sparse_file,
    tar_of,
    zip_file,
    zlib_zeros,
)
from hostile_place import Outcome, Place, few
from hostile_server import endless, serve_lies, whole
from PIL import Image

_ANY = ("--max-bad-fraction", 1, "--json")
_GIGABYTES = 3 * 2**30
_TAKEN = 2**28  # bytes that a client may have taken of an endless answer


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path / "place")
    (place.data / "0.png").write_bytes(make_image(0))
    return place


def embed(place: Place, data: object, model: Path, *more: object, **options: object) -> Outcome:
    outcome = place.run("embed", data, "--model", model, "--no-text", *_ANY, *more, **options)  # type: ignore[arg-type]
    assert not outcome.problems(), outcome
    return outcome


def test_an_image_that_a_server_inflates_is_skipped(place: Place, tiny_model: Path) -> None:
    with serve_lies() as server:
        server.answers["/a.png"] = whole(gzip_zeros(_GIGABYTES, make_image(1)), Content_Encoding="gzip")
        server.answers["/b.png"] = whole(zlib_zeros(_GIGABYTES), Content_Encoding="deflate")
        (place.data / "list.csv").write_text(f"filepath\n0.png\n{server.url}/a.png\n{server.url}/b.png\n")
        assert embed(place, place.data / "list.csv", tiny_model, hosts=[server.address]).json["images"] == 1


@pytest.mark.parametrize("claimed", few(1, [None, 2**40]))
def test_an_image_without_end_is_skipped(place: Place, tiny_model: Path, claimed: int | None) -> None:
    with serve_lies() as server:
        server.answers["/a.png"] = endless(make_image(1), claimed)
        (place.data / "list.csv").write_text(f"filepath\n0.png\n{server.url}/a.png\n")
        assert embed(place, place.data / "list.csv", tiny_model, hosts=[server.address]).json["images"] == 1
        assert server.bytes_sent["/a.png"] < _TAKEN


@pytest.mark.parametrize("suffix", few(1, ["png", "txt", "json", "cls", "bin"]))
def test_a_member_of_a_remote_shard_that_claims_too_much(place: Place, tiny_model: Path, suffix: str) -> None:
    header = tarfile.TarInfo(f"000000.{suffix}")
    header.size = 5 * 2**28
    with serve_lies() as server:
        server.answers["/0.tar"] = endless(header.tobuf(tarfile.GNU_FORMAT), header.size + 10240)
        url = f"{server.url}/0.tar"
        outcome = place.run("embed", url, "--model", tiny_model, "--no-text", *_ANY, hosts=[server.address])
    assert not outcome.problems(), outcome


def test_sparse_images_and_captions_of_a_folder_are_skipped(place: Place, tiny_model: Path) -> None:
    sparse_file(place.data / "1.png", 400 * 10**9, make_image(1))
    sparse_file(place.data / "2.jpg", _GIGABYTES)
    sparse_file(place.data / "0.txt", _GIGABYTES, b"a caption")
    (place.data / "3.png").write_bytes(make_image(3))
    assert embed(place, place.data, tiny_model).json["images"] == 1


@pytest.mark.parametrize("suffix", few(1, ["txt", "png", "json", "cls", "npy"]))
def test_sparse_members_of_a_tar_take_no_memory(place: Place, tiny_model: Path, suffix: str) -> None:
    """A tar of 3 GB that takes a block of the disk, as an unpacked one may be."""
    path = place.data / "0.tar"
    tar_of(path, [("0.png", make_image(0)), ("1.png", make_image(1))] if suffix != "png" else [])
    content = path.read_bytes().rstrip(b"\0") if suffix != "png" else b""
    content += bytes(-len(content) % 512)
    header = tarfile.TarInfo(f"1.{suffix}")
    header.size = _GIGABYTES
    sparse_file(path, len(content) + 512 + _GIGABYTES + 10240, content + header.tobuf(tarfile.GNU_FORMAT))
    captions = ("--no-text",) if suffix == "png" else ("--caption-key", "txt", "--caption-key", "json:a")
    outcome = place.run("embed", path, "--model", tiny_model, *captions, *_ANY)
    assert not outcome.problems(), outcome
    outcome = place.run("eval-zeroshot", tiny_model, path, "--task", "classification")
    assert not outcome.problems(), outcome


@pytest.mark.parametrize("begin", few(1, [b"", b"filepath,title\n0.png,", b"filepath,title\n0.png,one\n"]))
def test_a_sparse_list_takes_no_memory(place: Place, tiny_model: Path, begin: bytes) -> None:
    path = sparse_file(place.data / "list.csv", _GIGABYTES, begin)
    outcome = place.run("embed", path, "--model", tiny_model, *_ANY)
    assert not outcome.problems(), outcome
    assert outcome.run.returncode == 1, outcome


@pytest.mark.parametrize("name", few(2, ["list.csv", "folder/", "list.parquet"]))
def test_a_list_or_folder_without_end_fills_nothing(place: Place, tiny_model: Path, name: str) -> None:
    with serve_lies() as server:
        server.answers[f"/{name}"] = endless(b"filepath,title\n0.png,one\n")
        outcome = place.run("embed", f"{server.url}/{name}", "--model", tiny_model, *_ANY, hosts=[server.address])
    assert not outcome.problems(), outcome
    assert outcome.run.returncode == 1, outcome


def bomb_png(depth: int) -> bytes:
    return png_bomb(9456, 9456, depth)  # just below the limit of pixels


def test_sixteen_bits_of_grey_take_little_memory(place: Place, tiny_model: Path) -> None:
    (place.data / "1.png").write_bytes(bomb_png(16))
    embed(place, place.data, tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "F", "CMYK", "I"])
def test_the_largest_images_of_every_kind_take_little_memory(place: Place, tiny_model: Path, mode: str) -> None:
    image = Image.new(mode, (9456, 9456))
    form = {"F": "TIFF", "CMYK": "TIFF", "I": "TIFF"}.get(mode, "PNG")
    more = {"compression": "tiff_deflate"} if form == "TIFF" else {"transparency": 0} if mode == "P" else {}
    image.save(place.data / f"1.{'tif' if form == 'TIFF' else 'png'}", form, **more)
    embed(place, place.data, tiny_model)


@pytest.mark.parametrize("column", few(1, ["title", "filepath", "key"]))
def test_a_parquet_list_of_little_that_is_much(place: Place, tiny_model: Path, column: str) -> None:
    columns = {name: ["0.png"] * 1500 for name in ("filepath", "title", "key") if name != column}
    path = parquet_bomb(place.data / "list.parquet", column, 1500, 2**20, **columns)
    outcome = place.run("embed", path, "--model", tiny_model, *_ANY)
    assert not outcome.problems(), outcome


@pytest.mark.parametrize("size", few(1, [2**24, 3 * 10**8]))
def test_a_parquet_shard_of_little_that_is_much(place: Place, tiny_model: Path, size: int) -> None:
    rows = 2**33 // size
    captions = pa.array(["a caption"] * rows)
    path = parquet_bomb(place.data / "0.parquet", "image", rows, size, binary=True, caption=captions)
    outcome = place.run("embed", path, "--model", tiny_model, "--caption-column", "caption", *_ANY)
    assert not outcome.problems(), outcome


_ARCHIVES: dict[str, Callable[[], bytes]] = {
    "zeros": lambda: npz_bomb(10**6, 1024),
    "a header of a gigabyte": lambda: zip_file(
        {"l14_img.npy": (deflate_zeros(_GIGABYTES, b"\x93NUMPY\x02\x00\xff\xff\xff\xbf"), _GIGABYTES)}
    ),
    "more than its header says": lambda: zip_file(
        {"l14_img.npy": (deflate_zeros(_GIGABYTES, npy_header((4, 8))), _GIGABYTES)}
    ),
    "less than its header says": lambda: zip_file({"l14_img.npy": (deflate_zeros(64, npy_header((2**40, 512))), 192)}),
}


@pytest.mark.parametrize("name", few(2, _ARCHIVES))
def test_an_archive_of_embeddings_that_is_much(place: Place, name: str) -> None:
    (place.data / "a.npz").write_bytes(_ARCHIVES[name]())
    outcome = place.run("balance", "--embeddings", place.data, "--keep", "0.5")
    assert not outcome.problems(), outcome


@pytest.mark.parametrize("shape", few(1, [(2**40, 512), (2**62, 2**62), (4, 2**40)]))
def test_an_array_that_claims_too_many_rows(place: Place, shape: tuple[int, ...]) -> None:
    (place.data / "img_emb").mkdir()
    (place.data / "img_emb/img_emb_0000.npy").write_bytes(npy_header(shape) + bytes(4096))
    outcome = place.run("balance", "--embeddings", place.data, "--keep", "0.5")
    assert not outcome.problems(), outcome
    assert outcome.run.returncode == 1, outcome


def test_a_sparse_array_of_embeddings(place: Place) -> None:
    (place.data / "img_emb").mkdir()
    header = npy_header((2**28, 8))
    sparse_file(place.data / "img_emb/img_emb_0000.npy", len(header) + 2**32, header)
    outcome = place.run("balance", "--embeddings", place.data, "--keep", "0.5", "--dry-run")
    assert not outcome.problems(), outcome


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A work directory with embeddings and a balance; treat it as read-only."""
    folder = tmp_path_factory.mktemp("embedded")
    write_tar(folder / "0.tar", shard_members(0, 12))
    run_clipcid("embed", "0.tar", "--model", tiny_model, cwd=folder)
    run_clipcid("balance", "--keep", "0.7", cwd=folder)
    return folder


@pytest.mark.parametrize("column", few(1, ["key", "shard"]))
def test_a_keep_list_of_absurd_texts(place: Place, embedded: Path, column: str) -> None:
    shutil.copytree(embedded, place.work, dirs_exist_ok=True)
    other = {name: ["0"] * 1500 for name in ("key", "shard") if name != column}
    path = parquet_bomb(place.data / "keep.parquet", column, 1500, 2**20, kept=[True] * 1500, **other)
    outcome = place.run("cluster", "--num-clusters", 2, "--keep-list", path)
    assert not outcome.problems(), outcome


def test_metadata_of_absurd_texts(place: Place) -> None:
    (place.data / "img_emb").mkdir()
    (place.data / "metadata").mkdir()
    np.save(place.data / "img_emb/img_emb_0000.npy", np.random.default_rng(0).normal(size=(1500, 8)).astype("f2"))
    paths = list(map(str, range(1500)))
    parquet_bomb(place.data / "metadata/metadata_0000.parquet", "caption", 1500, 2**20, image_path=paths)
    outcome = place.run("balance", "--embeddings", place.data, "--keep", "0.5")
    assert not outcome.problems(), outcome


_RECORDS = (
    "clipcid-work/embeddings/tiny/embed.json",
    "clipcid-work/balance/balance.json",
    "clipcid-work/balance/.balance-0123456789abcdef/.run.json",
)


@pytest.mark.parametrize("name", few(1, _RECORDS))
def test_records_without_end(place: Place, embedded: Path, name: str) -> None:
    shutil.copytree(embedded, place.work, dirs_exist_ok=True)
    (place.work / name).parent.mkdir(exist_ok=True)
    sparse_file(place.work / name, _GIGABYTES)
    outcome = place.run("balance", "--keep", "0.6")
    assert not outcome.problems(), outcome


def test_class_names_and_configurations_without_end(place: Place, tiny_model: Path) -> None:
    write_classified(place.data / "classified")
    sparse_file(place.data / "classified/classnames.txt", _GIGABYTES)
    outcome = place.run("eval-zeroshot", tiny_model, place.data / "classified")
    assert not outcome.problems(), outcome
    shutil.copytree(tiny_model, place.data / "model")
    sparse_file(place.data / "model/open_clip_config.json", _GIGABYTES)
    outcome = place.run("embed", place.data / "0.png", "--model", place.data / "model")
    assert not outcome.problems(), outcome


@pytest.mark.parametrize("count", few(2, ["999999999", "9" * 5000, "²"]))
def test_a_count_of_shards_that_is_absurd(place: Place, tiny_model: Path, count: str) -> None:
    folder = write_benchmark(place.data / "things", "test", shard_members(0, 4, captions=False, classes=2))
    (folder / "classnames.txt").write_text("one\ntwo\n")
    (folder / "test/nshards.txt").write_text(count)
    outcome = place.run("eval-zeroshot", tiny_model, folder, "--task", "classification")
    assert not outcome.problems(), outcome
    assert outcome.run.returncode == 1, outcome
