"""Parquet files with images in them give the samples that tars of the same images give, from a disk or a server."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_caption, make_image, write_tar
from shard_server import serve

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Columns, Dataset, open_dataset, open_described
from clipcid_cli.formats.data.left_out import describe_left_out, find_lists
from clipcid_cli.formats.data.samples import ListFormat, Sample
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.steps.data_index import ensure_index
from clipcid_cli.steps.shard_copies import cache_shards

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = {"label": {"names": ["red_door", "boat"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}


def write_parquet(path: Path, numbers: range, rows_a_group: int = 3, **columns: list[Any]) -> Path:
    """Write a file as the hub's are: images of these numbers, captions, and other columns."""
    images = [{"bytes": make_image(number), "path": f"{number}.png"} for number in numbers]
    table = pa.table(
        {
            "image": pa.array(columns.pop("image", images), IMAGE),
            "caption": [make_caption(number) for number in numbers],
            **columns,
        }
    )
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": NAMES}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_a_group)
    return path


def write_folder(folder: Path, split: str = "train") -> Path:
    for number in range(3):
        labels = [number % 2] * 8 if number else [-1] * 8
        write_parquet(
            folder / f"{split}-{number:05d}-of-00003.parquet", range(8 * number, 8 * number + 8), label=labels
        )
    return folder


def list_samples(dataset: Dataset, skips: Skips | None = None) -> list[Sample]:
    return [sample for shard in dataset.shards for sample in shard.samples(skips)]


def test_samples_are_rows_in_order_and_each_image_is_read_again(tmp_path: Path) -> None:
    dataset = open_dataset(write_folder(tmp_path / "data"))
    assert (dataset.kind, dataset.classes, dataset.estimate_samples()) == ("parquet", ("red_door", "boat"), 24)
    samples = list_samples(dataset)
    assert [sample.key for sample in samples[:9]] == [
        *(f"train-00000-of-00003/{row}" for row in range(8)),
        "train-00001-of-00003/0",
    ]
    assert [sample.captions for sample in samples] == [(make_caption(number),) for number in range(24)]
    assert [sample.label for sample in samples] == [None] * 8 + [1] * 8 + [0] * 8
    for number in (23, 0, 10, 9):
        assert samples[number].image.read() == make_image(number)
    for spec in (f"{tmp_path}/data/train-*.parquet", f"{tmp_path}/data/train-{{00000..00002}}-of-00003.parquet"):
        assert list_samples(open_dataset(spec)) == samples
    assert list_samples(open_described(dataset.describe())) == samples
    (tmp_path / "data" / "README.md").write_text("a card")
    write_folder(tmp_path / "data", "test")
    with pytest.raises(ClipcidError, match="several splits") as error:
        open_dataset(tmp_path / "data")
    assert f'"{tmp_path}/data/train-*"' in error.value.fix
    assert len(list_samples(open_dataset(f"{tmp_path}/data/test-*"))) == 24


def test_copies_give_the_same_bytes_in_any_order_from_a_disk_and_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPCID_CACHE", str(tmp_path / "cache"))
    folder = write_folder(tmp_path / "data")
    with serve(folder, drop_every=7) as server, open_dist_context("cpu") as context:
        url = f"{server.url}/train-{{00000..00002}}-of-00003.parquet"
        for spec in (str(folder), url):
            dataset = ensure_index(open_dataset(spec, index_root=tmp_path / "index"), context, 0)
            assert open_dataset(spec, index_root=tmp_path / "index").index is not None  # nothing is listed again
            index = cache_shards(dataset, 1.0).index
            assert index is not None
            for number in (20, 3, 12, 21):
                sample = index.part(number // 8).sample(number % 8)
                assert sample.image.read() == make_image(number), spec
                assert sample.captions == (make_caption(number),)
        assert server.dropped
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    copies = list((tmp_path / "cache").glob("*.images"))
    images = sum(len(make_image(number)) for number in range(24))
    assert len(copies) == 6
    assert sum(copy.stat().st_size for copy in copies) == 2 * (images + 3 * 9 * 8)  # and tables of where they are
    assert not list(tmp_path.rglob("*.partial"))
    for size in (100, 10):  # an image is cut off, or the table
        for copy in copies:
            os.truncate(copy, size)
        with pytest.raises(OSError, match=r"images ends \d+ bytes early"):
            index.part(2).sample(4).image.read()


def test_what_is_missing_is_counted_and_keys_and_captions_are_named(tmp_path: Path) -> None:
    images = [
        None,
        {"bytes": None, "path": "/home/x.png"},
        *({"bytes": make_image(each), "path": None} for each in range(5)),
    ]
    columns: dict[str, list[Any]] = {
        "image": images,
        "uid": ["a", "b", "c", "c", None, "d", "e"],
        "recaption": [["x"], ["x"], ["one", "two"], ["x"], ["x"], [], None],
    }
    path = write_parquet(tmp_path / "a.parquet", range(7), **columns)
    skips = Skips()
    read_so = Columns(key="uid")
    samples = list_samples(open_dataset(path, columns=read_so, caption_keys=("caption", "recaption")), skips)
    assert [(sample.key, sample.captions[1:]) for sample in samples] == [("c", ("one", "two")), ("d", ()), ("e", ())]
    assert skips.counts == {"no_image": 2, "duplicate_key": 1, "no_key": 1}
    assert skips.without == {"recaption": 2}
    with pytest.raises(ClipcidError, match="no column 'recaptoin'; it has image, caption, uid, recaption"):
        open_dataset(path, caption_keys=("recaptoin",))
    for misspelt in (Columns(key="id"), Columns(caption="id")):
        with pytest.raises(ClipcidError, match="no column 'id'"):
            open_dataset(path, columns=misspelt)


def test_rows_that_img2dataset_could_not_download_are_no_samples(tmp_path: Path) -> None:
    images = [make_image(0), None, None, None, make_image(4)]
    status = ["success", "failed_to_download", "failed_to_resize", "success", "success"]
    captions = pa.array([b"a", b"b", b"c", b"d", b"e"])  # not marked as text
    pq.write_table(pa.table({"jpg": images, "caption": captions, "status": status}), tmp_path / "00000.parquet")
    skips = Skips()
    samples = list_samples(open_dataset(tmp_path), skips)
    assert [(sample.key, sample.captions) for sample in samples] == [("00000/0", ("a",)), ("00000/4", ("e",))]
    assert skips.counts == {"no_image": 1}


def test_damaged_and_other_parquet_files_are_told(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    second = folder / "train-00001-of-00003.parquet"
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(ClipcidError, match=r"train-00001-of-00003\.parquet cannot be read as a parquet file"):
        open_dataset(folder)
    pq.write_table(pa.table({"image": pa.array([], IMAGE)}), second)
    with pytest.raises(ClipcidError, match=r"train-00001-of-00003\.parquet has no column 'caption', which the first"):
        open_dataset(folder)
    pq.write_table(pa.table({"a": [b"1"], "b": [b"2"]}), tmp_path / "two.parquet")
    with pytest.raises(ClipcidError, match="several columns with images: a, b"):
        open_dataset(tmp_path / "two.parquet")
    pq.write_table(pa.table({"image_path": ["a"], "caption": ["b"]}), tmp_path / "metadata.parquet")
    with pytest.raises(ClipcidError, match="has no column 'filepath'"):
        open_dataset(tmp_path / "metadata.parquet")
    (tmp_path / "both").mkdir()
    pq.write_table(pa.table({"img": [b"1"], "filepath": ["a"], "some": [[b"1"]]}), tmp_path / "both" / "a.parquet")
    for columns in (Columns(), Columns(image="pic")):
        with pytest.raises(ClipcidError, match=f"no images in column '{columns.image}'; it has some in img") as error:
            open_dataset(tmp_path / "both", columns=columns)
        assert "--image-column img" in error.value.fix
    pq.write_table(pa.table({"some": [[b"1"]]}), tmp_path / "both" / "a.parquet")
    for spec in (tmp_path / "both", f"{tmp_path}/both/*.parquet"):
        with pytest.raises(ClipcidError, match="no column with one image per row") as error:
            open_dataset(spec)
        assert "lists of images are not read" in error.value.fix
    pq.write_table(pa.table({"filepath": ["a"]}), tmp_path / "both" / "a.parquet")
    with pytest.raises(
        ClipcidError, match=r"is a list of images .*; a folder or pattern of lists is not read"
    ) as error:
        open_dataset(tmp_path / "both")
    assert f"Give a list itself, for example {tmp_path}/both/a.parquet;" in error.value.fix
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(make_image(0))
    (tmp_path / "metadata.parquet").rename(tmp_path / "photos" / "metadata.parquet")
    assert open_dataset(tmp_path / "photos").kind == "images"
    unread = "its images are read, and not what is beside them (.parquet: 1)"
    assert unread in describe_left_out(str(tmp_path / "photos"), "images")
    with pytest.raises(ClipcidError, match=r"say how a list is read, and .*/photos is none") as error:
        open_dataset(tmp_path / "photos", list_format=ListFormat(root=str(tmp_path)))
    assert error.value.fix == f"Omit them, or give a list of that folder: {tmp_path}/photos/metadata.parquet."
    write_tar(tmp_path / "photos" / "metadata.tar", [("0.png", make_image(0))])
    for name in (".hidden.csv", "lists.parquet"):
        shutil.copy(tmp_path / "photos" / "metadata.parquet", tmp_path / "photos" / name)
    assert find_lists(str(tmp_path / "photos"), "webdataset") == [f"{tmp_path}/photos/lists.parquet"]
    assert find_lists(str(tmp_path / "photos"), "parquet") == []
    for number in range(1_000):
        (tmp_path / "photos" / str(number)).mkdir()
        (tmp_path / "photos" / str(number) / "0.png").touch()
    assert "folders of images or tars: 1,000 or more)" in describe_left_out(str(tmp_path / "photos"), "webdataset")
