"""Every form of input, its order, keys, classes, texts and fingerprints, and what damaged ones are told."""

from __future__ import annotations

import dataclasses
import gzip
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import make_caption, make_image, shard_members, write_tar
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.classes import read_classes
from clipcid_cli.formats.data.dataset import Columns, Dataset, open_dataset, open_described
from clipcid_cli.formats.data.image_fingerprint import fingerprint_images
from clipcid_cli.formats.data.list_copies import copy_list
from clipcid_cli.formats.data.lists import ListImages
from clipcid_cli.formats.data.samples import ListFormat, Sample, natural_key
from clipcid_cli.formats.data.slices import Slice
from clipcid_cli.formats.sidecar import DataSpec
from clipcid_cli.formats.skips import Skips


def list_samples(dataset: Dataset, skips: Skips | None = None) -> list[Sample]:
    return [sample for shard in dataset.shards for sample in shard.samples(skips)]


def list_keys(dataset: Dataset) -> list[str]:
    return [sample.key for sample in list_samples(dataset)]


@pytest.mark.parametrize(
    "pattern",
    ["{}/{{00000..00001}}.tar", "file://{}", "{}/0*.tar", "{0}/00001.tar::{0}/{{00000..00000}}.tar"],
)
def test_patterns_mean_the_shards_of_a_folder(pattern: str, tiny_shards: Path) -> None:
    folder, dataset = open_dataset(tiny_shards), open_dataset(pattern.format(tiny_shards))
    assert folder.kind == dataset.kind == "webdataset"
    assert list_samples(dataset) == list_samples(open_described(dataset.describe())) == list_samples(folder)
    assert list_keys(folder) == [f"{number:06d}" for number in range(24)]
    assert list_keys(open_dataset(tiny_shards / "00001.tar")) == list_keys(folder)[14:]
    sample = list_samples(folder)[3]
    assert (sample.image.read(), sample.captions) == (make_image(3), (make_caption(3),))
    assert sample.attributes is not None
    assert sample.attributes.read() == b'{"number": 3}'


def test_a_moved_folder_is_the_same_input(tiny_shards: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_shards, tmp_path / "moved")
    here, there = ([each.content for each in open_dataset(str(path)).fingerprints()] for path in (tiny_shards, moved))
    assert here == there


def test_patterns_that_name_a_shard_twice_or_an_unknown_variable_are_refused(tiny_shards: Path) -> None:
    with pytest.raises(ClipcidError, match="lists a shard twice"):
        open_dataset(f"{tiny_shards}::{tiny_shards}/00001.tar")
    with pytest.raises(ClipcidError, match="environment variable WDS_NAME, which is not set"):
        open_dataset(f"{tiny_shards}/${{NOWHERE}}.tar")


def test_what_braces_make_is_one_name_and_never_a_command(tmp_path: Path) -> None:
    command = f"pipe:touch {tmp_path}/touched"
    recorded = DataSpec(f"http://127.0.0.1:1/0.tar{{:,/1.tar}}:{command}", "sample", "filepath", "title", "key")
    with pytest.raises(ClipcidError, match=r"0\.tar::pipe:touch .* holds ::"):
        open_described(recorded)
    assert not (tmp_path / "touched").exists()


def test_shards_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder, first in (("a", 0), ("b", 5)):
        write_tar(tmp_path / folder / "0.tar", shard_members(first, 2))
    dataset = open_dataset(f"{tmp_path}/{{a,b}}/0.tar", keys="shard")
    assert [shard.name for shard in dataset.shards] == ["a/0", "b/0"]
    assert list_keys(dataset)[0] == "a/0/000000"


def test_keys_are_webdatasets(tmp_path: Path) -> None:
    import webdataset

    png = make_image(0)
    members = {"__meta__/a.png": png, "dir.v2/a.PNG": png, "dir.v2/a.txt": b" two\nlines "}
    members |= {"b.seg.png": png, "b.jpg": png, "b.txt": b"", "noext": b"x", "./c.webp": png}
    path = write_tar(tmp_path / "0.tar", members.items())
    with path.open("rb") as stream:
        members = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        theirs = [item["__key__"] for item in webdataset.tariterators.group_by_keys(members)]
    skips = Skips()
    samples = open_dataset(path).shards[0].samples(skips)
    assert [sample.key for sample in samples] == theirs == ["dir.v2/a", "b", "./c"]
    assert [sample.captions for sample in samples] == [("two\nlines",), (), ()]
    assert skips.total == 0


def test_samples_without_image_and_repeated_keys_are_counted(tmp_path: Path) -> None:
    more = [("000009.txt", b"no image"), ("000001.png", make_image(7)), ("000001.txt", b"again")]
    more += [("000009.png", make_image(9))]
    path = write_tar(tmp_path / "0.tar", [*shard_members(0, 3), *more])
    skips = Skips()
    samples = open_dataset(path).shards[0].samples(skips)
    assert [sample.key for sample in samples] == ["000000", "000001", "000002"]
    assert samples[1].image.read() == make_image(1)
    assert skips.counts == {"no_image": 1, "duplicate_key": 2}
    assert skips.examples == {"no_image": ["0/000009"], "duplicate_key": ["0/000001", "0/000009"]}


def test_benchmark_folder(tmp_path: Path) -> None:
    for number in range(11):
        members = [(f"s{number}.webp", make_image(number, kind="WEBP")), (f"s{number}.cls", str(number % 3).encode())]
        write_tar(tmp_path / f"{number}.tar", [*members, (f"s{number}.txt", b"one caption\nanother\n")])
    (tmp_path / "nshards.txt").write_text("11\n")
    dataset = open_dataset(tmp_path)
    assert dataset.kind == "benchmark"
    samples = list_samples(dataset)
    assert [sample.label for sample in samples] == [number % 3 for number in range(11)]
    assert samples[0].captions == ("one caption", "another")
    (tmp_path / "7.tar").unlink()
    with pytest.raises(ClipcidError, match=r"should contain 11 shards .* 1 are missing, first 7\.tar"):
        open_dataset(tmp_path)
    for content in (b"many", b"\xff"):
        (tmp_path / "nshards.txt").write_bytes(content)
        with pytest.raises(ClipcidError, match="not a number of shards"):
            open_dataset(tmp_path)


def test_image_folder_with_captions(tmp_path: Path) -> None:
    for name in ("z.png", "b/10.png", "b/9.png", "b/9.PNG.bak", "b/9.jpg", ".hidden/x.png", "b1/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(make_image(1))
    (tmp_path / "b" / "9.txt").write_text("a nine\n")
    (tmp_path / "b1" / "1.TXT").write_text("a one\n")
    (tmp_path / "b1" / "2.txt").write_text("no image has this name")
    (tmp_path / "about").mkdir()
    (tmp_path / "about" / "README.txt").write_text("beside no images")
    skips = Skips()
    dataset = open_dataset(tmp_path)
    samples = list_samples(dataset, skips)
    assert dataset.kind == "images"
    assert dataset.classes is None
    assert [sample.key for sample in samples] == ["b/9", "b/10", "b1/1", "z"]
    assert [sample.captions for sample in samples] == [("a nine",), (), ("a one",), ()]
    assert skips.examples == {"duplicate_key": ["b/9.png"]}
    assert skips.changed == {"without_image": 1}
    assert samples[0].image.read() == make_image(1)


def test_folders_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipcid_cli.formats.data.slices.VIRTUAL_SHARD", 4)
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(make_image(number))
    dataset = open_dataset(tmp_path)
    assert [shard.name for shard in dataset.shards] == ["00000", "00001", "00002"]
    assert [len(shard.samples()) for shard in dataset.shards] == [4, 4, 2]
    assert len({each.hash for each in dataset.fingerprints()}) == 3


FRAME = pd.DataFrame(
    {"filepath": ["b.png", "sub/a.png", "b.png", ""], "title": ["a b", None, "None", "x"], "label": [2, 0, 2, 1]}
)


def test_two_crawls_with_the_same_keys_are_refused_when_they_are_opened(tmp_path: Path) -> None:
    for number, first in enumerate((0, 4, 8)):
        write_tar(tmp_path / "one" / f"{number}.tar", shard_members(first, 4))
    write_tar(tmp_path / "other" / "2.tar", shard_members(11, 4))
    both = f"{tmp_path}/one::{tmp_path}/other"
    with pytest.raises(ClipcidError, match="Key '000011' occurs in shard one/2 and again in shard other/2") as refused:
        open_dataset(both, index_root=tmp_path / "index")
    assert "--keys shard" in refused.value.fix
    assert len(open_dataset(both, "shard", index_root=tmp_path / "index").shards) == 4


@pytest.mark.parametrize(
    ("encoding", "separator", "told"),
    [
        ("utf-8", ";", {}),
        ("utf-8-sig", ",", {}),
        ("utf-16", "\t", {}),
        ("latin-1", ",", {"encoding": "latin-1"}),
        ("utf-8", "|", {"separator": "|"}),
        ("utf-8", "||", {"separator": "||"}),
    ],
)
def test_lists_as_other_programs_write_them(
    encoding: str, separator: str, told: dict[str, str], tmp_path: Path
) -> None:
    rows = [("filepath", "title"), ("in\\1.png", "café"), ("in\\2.png", "a cat")]
    (tmp_path / "list.csv").write_bytes("".join(f"{separator.join(row)}\n" for row in rows).encode(encoding))
    (tmp_path / "images" / "in").mkdir(parents=True)
    (tmp_path / "images" / "in" / "1.png").write_bytes(make_image(1))
    form = ListFormat(root=str(tmp_path / "images"), **told)
    dataset = open_dataset(tmp_path / "list.csv", list_format=form)
    first, second = dataset.shards[0].samples()
    assert (first.key, first.captions, second.captions) == ("in\\1.png", ("café",), ("a cat",))
    assert first.image.read() == make_image(1)
    again = open_described(dataset.describe())
    assert again.fingerprints() == dataset.fingerprints()
    other = dataclasses.replace(form, root=str(tmp_path / "elsewhere"))
    assert open_dataset(tmp_path / "list.csv", list_format=other).fingerprints() != again.fingerprints()
    # A list of the kept rows is read with the same flags, but for a separator of several letters.
    copy_list(images_of(dataset), tmp_path / "kept.csv", lambda index: {first.key})
    kept = open_dataset(tmp_path / "kept.csv", list_format=ListFormat(**told) if len(separator) == 1 else None)
    assert [(sample.key, sample.captions) for sample in kept.shards[0].samples()] == [(first.key, first.captions)]


def images_of(dataset: Dataset) -> ListImages:
    (shard,) = dataset.shards
    assert isinstance(shard, Slice)
    assert isinstance(shard.images, ListImages)
    return shard.images


def test_a_new_list_says_where_its_encoding_lacks_a_letter_of_the_paths(tmp_path: Path) -> None:
    (tmp_path / "画像").mkdir()
    (tmp_path / "画像" / "list.csv").write_bytes("filepath,title\n1.png,café\n".encode("latin-1"))
    dataset = open_dataset(tmp_path / "画像" / "list.csv", list_format=ListFormat(encoding="latin-1"))
    with pytest.raises(ClipcidError, match="cannot be written as latin-1, which has no '画'") as refused:
        copy_list(images_of(dataset), tmp_path / "kept.csv", lambda index: {"1.png"})
    assert "Save the list as UTF-8" in refused.value.fix
    assert os.listdir(tmp_path) == ["画像"]


def test_a_list_that_is_not_read_as_it_is_written_names_the_flag(tmp_path: Path) -> None:
    for content, flag in (
        (b"filepath,title\n1.png,caf\xe9\n", "--list-encoding latin-1"),
        (b"filepath|title\n1.png|a\n", "--list-separator"),
    ):
        (tmp_path / "list.csv").write_bytes(content)
        with pytest.raises(ClipcidError) as refused:
            open_dataset(tmp_path / "list.csv")
        assert flag in refused.value.fix
    with pytest.raises(ClipcidError, match="say how a list is read"):
        open_dataset(write_tar(tmp_path / "0.tar", shard_members(0, 2)), list_format=ListFormat(separator=";"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", "-tabs.csv"])
def test_lists(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"list{suffix}"
    if suffix == ".parquet":
        FRAME.to_parquet(path)
    else:
        FRAME.to_csv(path, index=False, sep="," if suffix == ".csv" else "\t")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(make_image(4))
    skips = Skips()
    dataset = open_dataset(path)
    samples = list_samples(dataset, skips)
    assert dataset.kind == "list"
    assert [sample.key for sample in samples] == ["b.png", "sub/a.png"]
    assert [sample.captions for sample in samples] == [("a b",), ()]
    assert [sample.label for sample in samples] == [2, 0]
    assert samples[1].image.read() == make_image(4)
    assert skips.counts == {"duplicate_key": 1, "no_image": 1}
    assert skips.examples["no_image"] == ["row 4"]


def test_a_list_has_one_or_several_captions_in_a_cell(tmp_path: Path) -> None:
    frame = pd.DataFrame({"filepath": ["a.png", "b.png", "c.png"], "title": [["a dog", "one dog"], ["b"], []]})
    frame.to_parquet(tmp_path / "list.parquet")
    samples = list_samples(open_dataset(tmp_path / "list.parquet"))
    assert [sample.captions for sample in samples] == [("a dog", "one dog"), ("b",), ()]
    frame.rename(columns={"title": "key"}).to_parquet(tmp_path / "keys.parquet")
    with pytest.raises(ClipcidError, match=r"Column 'key' of list .* contains lists"):
        open_dataset(tmp_path / "keys.parquet")


def test_quoted_captions_of_a_tab_separated_list_may_have_tabs_and_lines(tmp_path: Path) -> None:
    texts = ["\n\t\ta cat", "size\tL\ncolour\tred", "a dog\non grass"]
    frame = pd.DataFrame({"filepath": ["a.png", "b.png", "c.png"], "title": texts})
    frame.to_csv(tmp_path / "list.tsv", sep="\t", index=False)
    captions = [sample.captions for sample in list_samples(open_dataset(tmp_path / "list.tsv"))]
    assert captions == [(text.strip(),) for text in texts]


def test_keys_of_a_parquet_list_are_those_that_were_written(tmp_path: Path) -> None:
    numbers = [2**60 + 1, 2**60 + 3, None]
    frame = pd.DataFrame({"filepath": ["a.png", "b.png", "c.png"], "key": pd.array(numbers, "Int64")})
    frame.to_parquet(tmp_path / "numbers.parquet")
    frame.assign(key=["x", "y", "z"]).set_index("key").to_parquet(tmp_path / "index.parquet")
    skips = Skips()
    for name, keys in (("numbers", list(map(str, numbers[:2]))), ("index", ["x", "y", "z"])):
        assert [each.key for each in list_samples(open_dataset(tmp_path / f"{name}.parquet"), skips)] == keys
    assert skips.counts == {"no_key": 1}


def test_texts_are_read_without_mark_and_half_characters(tmp_path: Path) -> None:
    texts = {"a": "\ufeffa cat", "b": "zwei Hunde \u2026", "c": "a dog"}
    members = [(f"{key}.png", make_image(0)) for key in texts] + [
        (f"{key}.txt", text.encode()) for key, text in texts.items()
    ]
    members.append(("c.json", rb'{"new": "a dog \ud83d", "all": ["\ud83d\ude00", " "]}'))
    path = write_tar(tmp_path / "a.tar", sorted(members))
    keys = ("txt", "json:new", "json:all")
    captions = [sample.captions for sample in list_samples(open_dataset(path, caption_keys=keys))]
    assert captions == [("a cat",), ("zwei Hunde …",), ("a dog", "a dog \ufffd", "😀")]


def test_a_list_has_captions_in_the_columns_that_are_named(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    pd.DataFrame({"filepath": ["a.png", "b.png"], "title": ["a", "b"], "again": ["c", None]}).to_csv(path, index=False)
    skips = Skips()
    dataset = open_dataset(path, caption_keys=("again", "title"))
    assert [sample.captions for sample in list_samples(dataset, skips)] == [("c", "a"), ("b",)]
    assert skips.without == {"again": 1}
    assert list_samples(open_described(dataset.describe())) == list_samples(dataset)
    with pytest.raises(ClipcidError, match="no column 'anew'; it has filepath, title, again"):
        open_dataset(path, caption_keys=("anew",))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(make_image(0))
    with pytest.raises(ClipcidError, match="photos is a folder of images"):
        open_dataset(tmp_path / "photos", caption_keys=("again",))


def test_keys_of_captions_in_tars_name_texts_once_with_or_without_a_dot(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.png", make_image(0)), ("0.syn.txt", b"a dog"), ("0.json", b"{}")])
    samples = list_samples(open_dataset(path, caption_keys=(".syn.txt", "syn.txt")))
    assert [sample.captions for sample in samples] == [("a dog",)]
    for key, message in (("json", "would take all of each .json"), ("png", "png names files that hold no text")):
        with pytest.raises(ClipcidError, match=message):
            open_dataset(path, caption_keys=("syn.txt", key))


def test_columns_of_a_list_can_be_renamed(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    pd.DataFrame({"url": ["http://x/a.png"], "text": ["NA"], "id": ["007"]}).to_csv(path, index=False)
    with pytest.raises(ClipcidError, match="no column 'filepath'; it has url, text, id") as raised:
        open_dataset(path)
    assert "--image-column" in raised.value.fix
    for misspelt in (Columns(image="url", key="ID"), Columns(image="url", caption="ID")):
        with pytest.raises(ClipcidError, match="no column 'ID'; it has url, text, id"):
            open_dataset(path, columns=misspelt)
    dataset = open_dataset(path, columns=Columns(image="url", caption="text", key="id"))
    sample = list_samples(dataset)[0]
    assert (sample.key, sample.image.path, sample.captions) == ("007", "http://x/a.png", ("NA",))
    assert list_samples(open_described(dataset.describe())) == [sample]
    pd.DataFrame({"filepath": ["a.png", "b.png"], "key": ["a", None]}).to_csv(path, index=False)
    skips = Skips()
    assert len(list_samples(open_dataset(path), skips)) == 1
    assert (skips.counts, skips.examples) == ({"no_key": 1}, {"no_key": ["b.png"]})


def write(path: Path, content: bytes = b"") -> Path:
    path.write_bytes(content)
    return path


def tar_of(*members: tuple[str, bytes], cut: int | None = None, compressed: bool = False) -> Callable[[Path], Path]:
    """Return what writes a folder with a tar, whole, cut off or compressed."""

    def make(folder: Path) -> Path:
        content = write_tar(folder / "a.tar", members).read_bytes()[:cut]
        return write(folder / "a.tar", gzip.compress(content) if compressed else content).parent

    return make


def write_splits(folder: Path) -> Path:
    write_tar(folder / "train" / "0.tar", shard_members(0, 2))
    return folder


SAMPLES = shard_members(0, 5)


@pytest.mark.parametrize(
    ("make", "message", "fix"),
    [
        (lambda folder: folder / "absent", "There is no data at", ""),
        (lambda folder: folder / "absent.csv", "There is no list", ""),
        (lambda folder: folder, "contains no .tar shard and no image", ""),
        (write_splits, "contains no .tar shard and no image", "/train"),
        (lambda folder: f"{folder}/{{0..3}}.tar", "0.tar cannot be read: No such file", ""),
        (lambda folder: f"{folder}/{{0..3.tar", "the braces are unbalanced", ""),
        (lambda folder: f"{folder}/{{0..99999999}}.tar", "names 100,000,000 shards, more than 1,000,000", ""),
        (lambda folder: f"{folder}/{{0..9999}}-{{1..2000}}.tar", "names 20,000,000 shards", ""),
        (lambda folder: f"{folder}/{'{a,b}' * 40}.tar", "names 1,099,511,627,776 shards", ""),
        (lambda folder: f"{folder}/{{{'{a..d}' * 20},x}}.tar", "names 1,099,511,627,777 shards", ""),
        (lambda folder: f"{folder}/{{a,b{{2..4..2}}}}{'{c,d}' * 20}.tar", "names 3,145,728 shards", ""),
        (lambda folder: f"{folder}/{'{' * 500}a,b{'}' * 500}.tar", "shards, more than 1,000,000", ""),
        (lambda folder: write(folder / "notes.tar", b"no tar, " * 200), "notes.tar is not a tar file", ""),
        (
            lambda folder: write(folder / "list.jsonl", b'{"image": "1.png"}\n'),
            "list.jsonl holds no data that can be read: it is not a tar file",
            "a csv, tsv or parquet list",
        ),
        (tar_of(*SAMPLES, cut=1900), r"is truncated: 00000\d\.\w+ should end at byte [\d,]+, the file has 1,900", ""),
        (tar_of(*SAMPLES, compressed=True), r"is compressed \(gzip\)", ""),
        (
            lambda folder: write(folder / "l.csv.gz", gzip.compress(b"a\n")),
            "l.csv.gz is a compressed list",
            "Unpack it",
        ),
        (
            tar_of(("1.txt", b"x"), ("2.txt", b"y")),
            r"no sample with an image in it \(2 without one, first a/1\)",
            "",
        ),
        (lambda folder: write(folder / "list.csv", b"filepath,title\n"), "has a header and no rows", ""),
        (
            lambda folder: write(folder / "l.csv", b"title,filepath\na cat, grey,a.png\n"),
            "has 2 columns, and rows have 3",
            "",
        ),
        (
            lambda folder: write(folder / "l.tsv", b'title\tfilepath\n"a\t1.png\n"b\t2.png\n'),
            "further rows, .*: .a.t1.png.nb",
            "",
        ),
        (lambda folder: write(folder / "a.tar"), "is empty: 0 bytes", ""),
        (lambda folder: write(folder / "list.parquet", b"not parquet"), "cannot be read", ""),
    ],
)
def test_bad_data_is_told(make: Callable[[Path], Path | str], message: str, fix: str, tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match=message) as raised:
        open_dataset(make(tmp_path))
    assert raised.value.fix
    assert fix in raised.value.fix


def npy(values: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values))
    return buffer.getvalue()


def classes_of(path: Path) -> list[tuple[int, ...] | None]:
    return [read_classes(sample, num_classes=4) for shard in open_dataset(path).shards for sample in shard.samples()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy([0, 1, 0]), r"int64 \[3\], not zeros and ones for 4 classes"),
        (npy([0, 1, 2, 0]), "not zeros and ones"),
        (b"not numpy", "cannot be read"),
        (npy(np.array([{}], dtype=object)), "cannot be read"),
    ],
    ids=["length", "values", "no npy", "pickle"],
)
def test_vectors_that_say_something_else_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = write_tar(tmp_path / "0.tar", [("a.npy", content), ("a.png", make_image(0))])
    with pytest.raises(ClipcidError, match=message):
        classes_of(path)


def test_lists_of_numbers(tmp_path: Path) -> None:
    frame = pd.DataFrame({"filepath": ["a.png", "b.png", "c.png"], "label": ["3 1", "", "2"]})
    frame.to_csv(tmp_path / "list.csv", index=False)
    frame.assign(label=[[3, 1], [], [2]]).to_parquet(tmp_path / "list.parquet")
    for suffix in ("csv", "parquet"):
        path = tmp_path / f"list.{suffix}"
        assert classes_of(path) == [(1, 3), (), (2,)]
        assert [sample.label for sample in open_dataset(path).shards[0].samples()] == [None, None, None]
    (tmp_path / "list.csv").write_text("filepath,label\na.png,2\nb.png,\nc.png,1.0\n")
    assert [sample.label for sample in open_dataset(tmp_path / "list.csv").shards[0].samples()] == [2, None, 1]
    assert classes_of(tmp_path / "list.csv") == [(2,), None, (1,)]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("cat", "other than integers"),
        ("1.5", "other than integers"),
        ("1 x", "other than integers"),
        (str(2**63), r"integers: 9.*e\+18 is too large"),
        ("0 4", "has class 4; there are 4 class names"),
    ],
)
def test_labels_of_no_class_are_refused(tmp_path: Path, cell: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(f"filepath,label\na.png,{cell}\n")
    with pytest.raises(ClipcidError, match=message):
        classes_of(tmp_path / "list.csv")


def digest(data: Path) -> str:
    return fingerprint_images(open_dataset(data)).hash


def test_images_of_the_same_size_are_told_apart_in_folders_and_lists(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.png").write_bytes(make_image(1))
    listed = folder / "list.csv"
    listed.write_text("filepath,label\ncat/0.png,0\ndog/0.png,1\n")
    before = [digest(folder), digest(listed)]
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert [digest(moved), digest(moved / "list.csv")] == before

    (folder / "dog" / "0.png").write_bytes(make_image(1)[:-1] + b"\0")
    assert digest(folder) != before[0]
    assert digest(listed) != before[1]
    (folder / "dog" / "0.png").write_bytes(make_image(1))
    assert [digest(folder), digest(listed)] == before
    listed.write_text("filepath,label\ncat/0.png,0\ndog/0.png,0\n")
    relabelled = digest(listed)
    (folder / "dog" / "0.png").unlink()
    assert len({before[1], relabelled, digest(listed)}) == 3


def test_images_that_are_not_compressed_count_whole(tmp_path: Path) -> None:
    def write(middle: int) -> str:
        image = np.full((80, 80, 3), 255, np.uint8)
        image[40, 40] = middle
        Image.fromarray(image).save(tmp_path / "0.bmp")
        return digest(tmp_path)

    assert write(0) == write(0) != write(1)


def test_a_member_in_the_midst_of_a_tar_counts(tmp_path: Path) -> None:
    def write(image: bytes, label: bytes, classes: bytes) -> str:
        filler = [(f"{number:03d}.png", make_image(0).ljust(70_000, b"\0")) for number in range(8)]
        middle = [("004a.png", image), ("004a.cls", label), ("004b.png", make_image(3)), ("004b.npy", classes)]
        write_tar(tmp_path / "0.tar", [*filler[:4], *middle, *filler[4:]])
        return digest(tmp_path / "0.tar")

    image = make_image(1)
    before = write(image, b"1", b"a vector")
    assert write(image, b"1", b"a vector") == before
    assert write(image[:-1] + b"\0", b"1", b"a vector") != before
    assert write(image, b"2", b"a vector") != before
    assert write(image, b"1", b"anothers") != before


NAMES = st.lists(st.text("a19.", max_size=6), unique=True)


@given(names=NAMES)
def test_any_names_have_one_order_by_the_numbers_in_them(names: list[str]) -> None:
    ordered = sorted(names, key=natural_key)
    names.reverse()
    assert ordered == sorted(names, key=natural_key)
    numbers = [name for name in ordered if name.isdigit()]
    assert list(map(int, numbers)) == sorted(map(int, numbers))


def test_a_name_that_begins_another_comes_before_it() -> None:
    assert sorted(["cat2", "cat10", "cat", "ca"], key=natural_key) == ["ca", "cat", "cat2", "cat10"]
