"""What is read of a sample, whatever others have put into its files: names, captions, bytes, repeats."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from conftest import make_image, shard_members, write_tar
from hypothesis import given
from hypothesis import strategies as st
from shard_server import serve

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import load_arrays, save_arrays
from clipcid_cli.formats.data.captions import LONGEST_CAPTION, MOST_TEXT, parse_json, split_captions
from clipcid_cli.formats.data.classes import read_classes
from clipcid_cli.formats.data.dataset import open_dataset
from clipcid_cli.formats.data.samples import ByteRange, Sample
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.formats.data.tars import copy_samples, count_samples, split_name
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.models.decode import SkippedImage, read_image


@given(st.text(alphabet="a.B/_", max_size=12))
def test_names_are_split_as_webdataset_splits_them(name: str) -> None:
    key, suffix = webdataset.tariterators.base_plus_ext(name)
    if not name.startswith("__"):
        assert split_name(name) == (None if key is None else (key, suffix.lower()))


@pytest.mark.parametrize("name", ["__a__", "____", "__a__/b.png", "__._"])
def test_names_that_webdataset_reserves_are_no_samples(name: str) -> None:
    assert (split_name(name) is None) == (name != "__._")


def test_a_long_name_is_refused_at_once(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [(f"{'a/' * 500_000}x.png", make_image(1))])
    start = time.perf_counter()
    with pytest.raises(ClipcidError, match=r"its name has 1,000,005 bytes, more than 4,096"):
        open_dataset(path)
    assert time.perf_counter() - start < 1
    longest = "a" * 4_092 + ".png"
    assert open_dataset(write_tar(tmp_path / "1.tar", [(longest, make_image(1))])).shards[0].samples()


TWICE = [("0020.jpg", b"first"), ("0020.txt", b"one"), ("0020.jpg", b"second"), ("0020.txt", b"two")]
INSIDE = [("0020.jpg", b"first"), ("0020.jpg", b"second"), ("0020.txt", b"one")]


@pytest.mark.parametrize("repeated", [TWICE, INSIDE, [*TWICE, *TWICE]])
def test_a_sample_that_follows_itself_is_counted_and_copied_once(
    tmp_path: Path, repeated: Sequence[tuple[str, bytes]]
) -> None:
    path = write_tar(tmp_path / "0.tar", [*shard_members(0, 1), *repeated, *shard_members(1, 1)])
    skips = Skips()
    samples = open_dataset(path).shards[0].samples(skips)
    repeats = sum(name == "0020.jpg" for name, _ in repeated) - 1
    assert [sample.key for sample in samples] == ["000000", "0020", "000001"]
    assert (samples[1].image.read(), samples[1].captions) == (b"first", ("one",))
    assert skips.counts == {"duplicate_key": repeats}
    assert count_samples(path) == 3 + repeats
    copied = copy_samples(path, tmp_path / "new.tar", {sample.key for sample in samples})
    assert copied == (3, 3 + repeats)
    with (tmp_path / "new.tar").open("rb") as stream:
        members = webdataset.tariterators.tar_file_expander([{"url": "new.tar", "stream": stream}])
        read = list(webdataset.tariterators.group_by_keys(members))
    assert [(item["__key__"], item["txt"]) for item in read if item["__key__"] == "0020"] == [("0020", b"one")]
    assert len(read) == 3


@pytest.mark.parametrize(
    ("content", "captions", "changed"),
    [
        (b"a dog\n", ("a dog",), {}),
        (b"a dog\r\none dog\n", ("a dog\r\none dog",), {"several_lines": 1}),
        ("Café".encode("latin-1"), ("Caf�",), {"not_utf8": 1}),
        (b"x" * 2**20, ("x" * LONGEST_CAPTION,), {"cut": 1}),
        ("€".encode() * (MOST_TEXT // 2), ("€" * LONGEST_CAPTION,), {"cut": 1}),
        (b"\xef\xbb\xbf", (), {}),
    ],
    ids=["plain", "lines", "latin-1", "long", "cut-in-a-letter", "empty"],
)
def test_captions_that_are_not_used_as_stored_are_counted(
    tmp_path: Path, content: bytes, captions: tuple[str, ...], changed: dict[str, int]
) -> None:
    write_tar(tmp_path / "tar" / "0.tar", [("0.png", make_image(0)), ("0.txt", content)])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "0.png").write_bytes(make_image(0))
    (tmp_path / "folder" / "0.txt").write_bytes(content)
    for data in ("tar", "folder"):
        skips = Skips()
        (sample,) = open_dataset(tmp_path / data).shards[0].samples(skips)
        assert (sample.captions, skips.changed) == (captions, changed), data


def test_captions_of_several_lines_are_counted_in_json_lists_and_parquet(tmp_path: Path) -> None:
    captions, image = ["a dog\none dog", "a cat"], make_image(0)
    members = [(f"{row}.png", image) for row in range(2)]
    members += [(f"{row}.json", json.dumps({"caption": caption}).encode()) for row, caption in enumerate(captions)]
    write_tar(tmp_path / "0.tar", sorted(members))
    (tmp_path / "0.png").write_bytes(image)
    rows = pd.DataFrame({"filepath": "0.png", "key": ["a", "b"], "title": captions})
    rows.to_csv(tmp_path / "list.csv", index=False)
    rows.assign(image=image).drop(columns="filepath").to_parquet(tmp_path / "images.parquet")
    for data in (
        open_dataset(tmp_path / "0.tar", caption_keys=("json:caption",)),
        open_dataset(tmp_path / "list.csv"),
        open_dataset(tmp_path / "images.parquet", caption_keys=("title",)),
    ):
        skips = Skips()
        assert [sample.captions for sample in data.shards[0].samples(skips)] == [(captions[0],), (captions[1],)]
        assert skips.changed == {"several_lines": 1}, data.kind


def test_captions_of_an_image_are_not_too_many() -> None:
    skips = Skips()
    lines = split_captions(b"a\n" * 5_000, a_line_each=True, skips=skips)
    assert (len(lines), skips.changed) == (1_000, {"cut": 1})


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"{}" + b" " * MOST_TEXT])
def test_a_json_that_cannot_be_read_is_a_missing_caption(tmp_path: Path, content: bytes) -> None:
    assert parse_json(content) is None
    path = write_tar(tmp_path / "0.tar", [("0.png", make_image(0)), ("0.json", content)])
    skips = Skips()
    (sample,) = open_dataset(path, caption_keys=("json:caption",)).shards[0].samples(skips)
    assert (sample.captions, skips.without) == ((), {"json:caption": 1})


@pytest.mark.parametrize("column", ["title", "label", "key", "filepath"])
def test_a_list_with_structs_is_refused(tmp_path: Path, column: str) -> None:
    table = {"filepath": ["a.png", "b.png"], "title": ["a", "b"], "key": ["a", "b"], "label": [0, 1]}
    structs = pa.StructArray.from_arrays([[1, 2], [3, 4]], ["x", "y"])
    pq.write_table(pa.table(table | {column: structs}), tmp_path / "list.parquet")
    with pytest.raises(ClipcidError, match=rf"Column '{column}' of list .* contains structs or maps"):
        open_dataset(tmp_path / "list.parquet")


LARGE = make_image(1) + bytes(2_000)


def limited(shard: Shard, limit: int) -> Shard:
    return dataclasses.replace(shard, max_sample_bytes=limit)


def test_members_that_are_too_large_are_not_read_from_a_stream(tmp_path: Path) -> None:
    members = [("0.png", make_image(0)), ("1.png", LARGE), ("1.txt", b"a dog"), ("2.png", make_image(2))]
    write_tar(tmp_path / "0.tar", members)
    limit = len(LARGE) - 1
    with serve(tmp_path) as server:
        for data in (tmp_path, f"{server.url}/0.tar", f"pipe:cat {tmp_path}/0.tar"):
            shard = limited(open_dataset(data).shards[0], limit)
            samples = list(shard.stream())
            assert [sample.image.data is None or len(sample.image.data) <= limit for sample in samples] == [True] * 3
            assert read_image(samples[1].image) == SkippedImage("too_many_bytes"), data
            assert samples[1].captions == ("a dog",)


@pytest.mark.parametrize("suffix", ["txt", "cls", "npy", "json"])
def test_a_text_that_is_too_large_leaves_its_sample_out(tmp_path: Path, suffix: str) -> None:
    members = [("0.png", make_image(0)), ("1.png", make_image(1)), (f"1.{suffix}", b"1" * 2_000)]
    tar = write_tar(tmp_path / "tars" / "0.tar", members)
    kinds: list[str | Path] = [tar, f"pipe:cat {tar}"]
    if suffix == "txt":
        (tmp_path / "folder").mkdir()
        for name, content in members:
            (tmp_path / "folder" / name).write_bytes(content)
        kinds.append(tmp_path / "folder")
    for data in kinds:
        skips = Skips()
        dataset = open_dataset(data, max_sample_bytes=1_999)
        assert [sample.key for sample in dataset.shards[0].samples(skips)] == ["0"], data
        assert skips.counts == {"too_many_bytes": 1}, data
    write_tar(tar, members[1:])
    with pytest.raises(ClipcidError, match=r"no sample can be used\.\n  1 × file larger than --max-sample-bytes: 0/1"):
        open_dataset(tar, max_sample_bytes=1_999)


def test_cells_that_are_too_large_are_skipped(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [make_image(0), LARGE], "title": ["a", "b"]}), tmp_path / "0.parquet")
    samples = list(limited(open_dataset(tmp_path / "0.parquet").shards[0], len(LARGE) - 1).stream())
    assert samples[1].image.data is None
    assert read_image(samples[1].image) == SkippedImage("too_many_bytes")
    assert not isinstance(read_image(samples[0].image), SkippedImage)


def write_repeated(path: Path, column: str, value: pa.Array, rows: int, **others: object) -> Path:
    """Write a value once and name it in every row."""
    cells = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), value)
    table = pa.table({column: cells, **others})
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**30, store_schema=False)
    return path


def test_a_parquet_file_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipcid_cli.formats.parquet._MOST_EXPANDED", 2**20)
    nothing = pa.table({"image": pa.nulls(400_000, pa.binary()), "filepath": pa.nulls(400_000, pa.string())})
    for name in ("image", "filepath"):
        pq.write_table(nothing.select([name]), tmp_path / f"{name}.parquet", row_group_size=400_000)
        with pytest.raises(
            ClipcidError, match=r"its 400,000 rows would take 3,200,000 bytes of memory, and the file has"
        ):
            open_dataset(tmp_path / f"{name}.parquet")


def test_an_image_that_a_file_repeats_is_not_read_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipcid_cli.formats.data.image_column._AT_ONCE", 2**20)
    path = write_repeated(tmp_path / "0.parquet", "image", pa.array([bytes(2**18)], pa.binary()), 100)
    with pytest.raises(ClipcidError, match=r"row group 0 has more than [\d,]+ bytes of values, which are repeated"):
        list(open_dataset(path).shards[0].stream())


def test_an_array_of_unfinished_work_that_is_compressed_is_made_anew(tmp_path: Path) -> None:
    save_arrays(tmp_path / "plain.npz", {"a": np.zeros(1_000)})
    saved = load_arrays(tmp_path / "plain.npz")
    assert saved is not None
    with np.load(tmp_path / "plain.npz") as archive:
        np.savez_compressed(tmp_path / "small.npz", **archive)
    assert load_arrays(tmp_path / "small.npz") is None


def test_a_vector_of_classes_holds_what_its_header_promises(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (2**40,)})
    (tmp_path / "0.npy").write_bytes(buffer.getvalue() + b"\1\0\1")
    sample = Sample("0", ByteRange(""), multi_hot=ByteRange(str(tmp_path / "0.npy")))
    with pytest.raises(ClipcidError, match=r"its header promises 1,099,511,627,776 bytes, and it has 3"):
        read_classes(sample, 3)


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (ByteRange(str(tmp_path / "pipe"), 0, 10), ByteRange("/dev/zero", 0, 10), ByteRange("/dev/zero")):
        assert read_image(place) == SkippedImage("unreadable_image")


@pytest.mark.parametrize("plain", [True, False], ids=["beside-plain", "alone"])
def test_compressed_tars_are_not_left_out_in_silence(tmp_path: Path, plain: bool) -> None:
    if plain:
        write_tar(tmp_path / "0.tar", shard_members(0, 2))
    (tmp_path / "0.tgz").mkdir()  # a folder of that name is none
    packed = write_tar(tmp_path / "1.tar", shard_members(2, 2))
    (tmp_path / "1.tar.gz").write_bytes(gzip.compress(packed.read_bytes()))
    assert [shard.name for shard in open_dataset(tmp_path).shards] == ["0", "1"][1 - plain :]
    packed.unlink()
    with pytest.raises(ClipcidError, match=r"contains compressed tars, .*: 1, first 1\.tar\.gz") as raised:
        open_dataset(tmp_path)
    assert f"gunzip {tmp_path}/1.tar.gz" in raised.value.fix


def test_links_to_nothing_are_files_that_are_not_found(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(make_image(0))
    (tmp_path / "1.png").symlink_to("gone.png")
    (tmp_path / "2.png").symlink_to("2.png")
    (tmp_path / "0.txt").symlink_to("gone.txt")
    os.mkfifo(tmp_path / "3.png")
    samples = open_dataset(tmp_path).shards[0].samples()
    assert [sample.key for sample in samples] == ["0", "1", "2", "3"]
    reasons = [read_image(sample.image) for sample in samples[1:]]
    assert reasons == [SkippedImage(f"not_found: {tmp_path}/1.png"), *[SkippedImage("unreadable_image")] * 2]
    assert samples[0].captions == ()


def write_cut(folder: Path, cut: Callable[[bytes], int]) -> Path:
    """Write nine whole shards of four samples, and a tenth that ends early."""
    for number in range(10):
        write_tar(folder / f"{number}.tar", shard_members(4 * number, 4))
    content = (folder / "9.tar").read_bytes()
    (folder / "9.tar").write_bytes(content[: cut(content)])
    return folder


# Within the header of a member it is not known whether the sample before it is whole.
CUTS = {
    "content": (b"000038.png", 600, 2),
    "padding": (b"000038.txt", 600, 2),
    "header": (b"000038.png", 100, 1),
    "caption's header": (b"000038.txt", 100, 2),
}


@pytest.mark.parametrize(("member", "after", "whole"), CUTS.values(), ids=CUTS)
def test_the_samples_before_the_end_of_a_truncated_shard_are_used(
    tmp_path: Path, member: bytes, after: int, whole: int
) -> None:
    data = write_cut(tmp_path / "data", lambda content: content.index(member) + after)
    message = r"9\.tar is truncated.*; up to about \d\.\d% of the data is missing, more than the allowed"
    for allowed in (0.0, 0.01):
        with pytest.raises(ClipcidError, match=message) as raised:
            open_dataset(data, max_bad_fraction=allowed)
        assert "add --max-bad-fraction 0.0" in raised.value.fix
    shard = open_dataset(data, max_bad_fraction=0.1).shards[9]
    skips = Skips()
    keys = ["000036", "000037", "000038"]
    assert [sample.key for sample in shard.samples(skips)] == keys[:whole]
    assert skips.examples == {"cut_off": [f"9/{keys[whole]}"]}
    assert copy_samples(Path(shard.source), tmp_path / "new.tar", set(keys)) == (whole, whole + 1)


def test_what_a_lone_truncated_shard_lacks_is_not_known(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", shard_members(0, 4))
    path.write_bytes(path.read_bytes()[:-11_000])
    with pytest.raises(ClipcidError, match="an unknown part of the data is missing"):
        open_dataset(path, max_bad_fraction=0.9)
    assert open_dataset(path, max_bad_fraction=1.0).shards[0].samples()


@pytest.mark.parametrize("size", [2**24, 2**14])
def test_a_list_whose_texts_would_fill_the_memory_is_refused(tmp_path: Path, size: int) -> None:
    rows = 2**29 // size
    names = [f"{row}.png" for row in range(rows)]
    path = write_repeated(tmp_path / "list.parquet", "title", pa.array(["x" * size]), rows, filepath=names)
    with pytest.raises(ClipcidError, match=r"the texts of its column title would take 536,870,912 bytes of memory"):
        open_dataset(path)


def test_a_list_with_one_long_text_is_read(tmp_path: Path) -> None:
    """Many rows and one long text: what all take is counted before it is refused."""
    titles = ["x" * 2**14, *["a cat"] * 40_000]
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"filepath": [f"{row}.png" for row in range(len(titles))], "title": titles}), path)
    assert path.stat().st_size < 2**22
    assert sum(len(shard.samples()) for shard in open_dataset(path).shards) == len(titles)
