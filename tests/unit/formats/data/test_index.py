"""The index of a data set says what a listing says, is made once, and is made again for a shard that changed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from conftest import make_caption, make_image, shard_members, write_tar

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data import index as module
from clipcid_cli.formats.data import tar_shards
from clipcid_cli.formats.data.dataset import open_dataset
from clipcid_cli.formats.data.index import DataIndex, SampleRef
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.steps.data_index import ensure_index


def index_of(spec: Path, root: Path, workers: int = 0, **settings: str) -> DataIndex:
    with open_dist_context("cpu") as context:
        dataset = open_dataset(spec, index_root=root, **settings)
        index = ensure_index(dataset, context, workers).index
    assert index is not None
    return index


def write_images(folder: Path) -> Path:
    for number in range(7):
        path = folder / f"{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_image(number))
        if number != 3:
            path.with_suffix(".txt").write_text(make_caption(number))
    return folder


def write_list(path: Path, images: Path) -> Path:
    rows = [f"{image},{make_caption(number)}" for number, image in enumerate(sorted(images.rglob("*.png")))]
    path.write_text("filepath,title\n" + "\n".join([*rows, ",no path"]) + "\n")
    return path


def write_benchmark(folder: Path) -> Path:
    members: list[tuple[str, bytes]] = []
    for number in range(5):
        members.append((f"s{number}.jpg", make_image(number, kind="JPEG")))
        members.append((f"s{number}.txt", "\n".join(make_caption(number + each) for each in range(number)).encode()))
    write_tar(folder / "0.tar", members)
    (folder / "nshards.txt").write_text("1")
    return folder


@pytest.mark.parametrize("kind", ["shards", "prefixed", "images", "list", "benchmark"])
def test_it_says_what_a_listing_says_and_later_starts_open_no_shard(
    kind: str, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, settings = tiny_shards, {"keys": "shard"} if kind == "prefixed" else {}
    if kind == "benchmark":
        path = write_benchmark(tmp_path / "wds")
    elif kind in ("images", "list"):
        images = write_images(tmp_path / "images")
        path = images if kind == "images" else write_list(tmp_path / "l.csv", images)
    index = index_of(path, tmp_path / "index", **settings)
    plain = open_dataset(path, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(tar_shards, "read_members", lambda path: pytest.fail("a tar was listed again"))
        patch.setattr(tar_shards, "validate_tar", lambda path: pytest.fail("a tar was opened again"))
        again = open_dataset(path, index_root=tmp_path / "index", **settings)
        assert again.index == index
        fingerprints, count = again.fingerprints(), again.estimate_samples()
    assert fingerprints == plain.fingerprints()
    assert count == sum(len(shard.samples()) for shard in plain.shards)
    for number, shard in enumerate(plain.shards):
        part, expected = index.part(number), shard.samples()
        assert len(part) == len(expected) == index.sizes[number]
        assert part.keys.to_pylist() == [sample.key for sample in expected]
        assert part.num_captions.tolist() == [len(sample.captions) for sample in expected]
        for place, sample in enumerate(expected):
            sent = pickle.dumps(SampleRef(part, place))
            assert len(sent) < 1_000, "neither shards nor their samples are sent to workers"
            found = pickle.loads(sent).read()
            assert found.key == pickle.loads(sent).key == sample.key
            assert found.image.read() == sample.image.read()
            assert found.captions == sample.captions
            assert (found.attributes and found.attributes.read()) == (sample.attributes and sample.attributes.read())


def write_shards(folder: Path, count: int) -> Path:
    for number in range(count):
        write_tar(folder / f"{number:05d}.tar", shard_members(10 * number, 4))
    return folder


def parts_of(index: DataIndex) -> set[tuple[str, int, int]]:
    """Tell one version of the parts from another."""
    return {(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in index.folder.glob("*.arrow")}


def test_only_shards_that_are_new_or_have_changed_are_listed(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", 3)
    first = index_of(data, tmp_path / "index")
    before = parts_of(first)
    assert len(first.part(1)) == 4
    changed = write_tar(data / "00001.tar", shard_members(10, 6))
    os.utime(changed, ns=(0, 1))
    assert open_dataset(data, index_root=tmp_path / "index").index is None
    second = index_of(data, tmp_path / "index")
    assert len(before & parts_of(second)) == 2
    assert np.array_equal(second.sizes, [4, 6, 4])
    assert len(second.part(1)) == 6, "what the process remembered of the shard must not be taken"
    module._read_part.cache_clear()
    with pytest.raises(ClipcidError, match="of another version of its shard"):
        len(first.part(1))
    # Data that grew lists the new shard; the smaller data are still there, and so is their table.
    before = parts_of(second)
    added = write_tar(data / "00003.tar", shard_members(30, 4))
    grown = index_of(data, tmp_path / "index")
    assert before < parts_of(grown)
    assert grown.records[:3] == second.records
    added.unlink()
    assert open_dataset(data, index_root=tmp_path / "index").index == second


def test_shards_of_one_size_and_time_that_are_swapped_are_listed_again(tmp_path: Path) -> None:
    """As of reproducible archives, whose time is 0; what was not touched stays listed."""
    data = write_shards(tmp_path / "data", 3)
    first, second, _ = sorted(data.iterdir())
    assert first.stat().st_size == second.stat().st_size
    for path in data.iterdir():
        os.utime(path, ns=(0, 0))
    before = index_of(data, tmp_path / "index")
    assert open_dataset(data, index_root=tmp_path / "index").index == before
    parts = parts_of(before)
    first.rename(tmp_path / "swapped")
    second.rename(first)
    (tmp_path / "swapped").rename(second)
    assert open_dataset(data, index_root=tmp_path / "index").index is None
    after = index_of(data, tmp_path / "index")
    assert len(parts & parts_of(after)) == 1
    assert after.part(0).keys == before.part(1).keys


def test_a_caption_that_was_rewritten_is_read_again(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    index_of(folder, tmp_path / "index")
    (folder / "0" / "4.txt").write_text("another caption")
    part = index_of(folder, tmp_path / "index").part(0)
    assert part.sample(part.keys.to_pylist().index("0/4")).captions == ("another caption",)


def test_captions_of_a_shard_that_was_cut_are_an_error(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", 1)
    part = index_of(data, tmp_path / "index").part(0)
    os.truncate(data / "00000.tar", 512)
    with pytest.raises(ClipcidError, match=r"captions in .*00000\.tar cannot be read"):
        part.sample(1)
    assert part.sample(1, captions=False).captions == ()


def test_a_shard_that_changes_while_it_is_listed_is_listed_again_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_shards(tmp_path / "data", 2)
    stream, touched = Shard.stream, iter(range(1, 100))

    def touch(shard: Shard, *arguments: object) -> object:
        if shard.name == "00001" and (time := next(touched)) <= most:
            os.utime(shard.source, ns=(0, time))
        return stream(shard, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Shard, "stream", touch)
    most = 2  # once when the data is opened, once when it is listed
    found = index_of(data, tmp_path / "once")
    assert [found.part(number).keys[0].as_py() for number in range(2)] == ["000000", "000010"]
    most = 100
    with pytest.raises(ClipcidError, match=r"Shard 00001 of .* changed while it was being listed"):
        index_of(data, tmp_path / "always")
