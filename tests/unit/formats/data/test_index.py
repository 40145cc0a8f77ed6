"""The index of a data set says what a listing says, is made once, and is made again for a shard that changed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_caption, make_image, shard_members, write_tar

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data import dataset as dataset_module
from clipcid_cli.formats.data import index as module
from clipcid_cli.formats.data import tars
from clipcid_cli.formats.data.dataset import Dataset, open_dataset
from clipcid_cli.formats.data.index import SampleRef
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.steps.data_index import ensure_index
from clipcid_cli.steps.reporting import Reporter


def indexed(spec: Path, root: Path, workers: int = 0, **settings: str) -> Dataset:
    with open_dist_context("cpu") as context:
        dataset = open_dataset(spec, index_root=root, **settings)
        return ensure_index(dataset, context, workers, Reporter())


def write_folder(folder: Path) -> Path:
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


@pytest.fixture(params=["shards", "prefixed", "folder", "list", "benchmark"])
def spec(request: pytest.FixtureRequest, tiny_shards: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    kind = request.param
    if kind in ("shards", "prefixed"):
        return tiny_shards, {"keys": "shard"} if kind == "prefixed" else {}
    if kind == "benchmark":
        return write_benchmark(tmp_path / "wds"), {}
    folder = write_folder(tmp_path / "images")
    return (folder, {}) if kind == "folder" else (write_list(tmp_path / "l.csv", folder), {})


def test_it_says_what_a_listing_says_and_later_starts_open_no_shard(
    spec: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, settings = spec
    dataset = indexed(path, tmp_path / "index", **settings)
    plain = open_dataset(path, **settings)
    assert dataset.index is not None
    assert dataset.fingerprints() == plain.fingerprints()
    assert dataset.estimate_samples() == sum(len(shard.samples()) for shard in plain.shards)
    with monkeypatch.context() as patch:
        patch.setattr(tars, "read_members", lambda path: pytest.fail("a tar was listed again"))
        patch.setattr(dataset_module, "check_tar", lambda path: pytest.fail("a tar was opened again"))
        again = open_dataset(path, index_root=tmp_path / "index", **settings)
        assert again.index == dataset.index
    for number, shard in enumerate(plain.shards):
        part, expected = dataset.index.part(number), shard.samples()
        assert len(part) == len(expected) == dataset.index.sizes[number]
        assert part.keys.to_pylist() == [sample.key for sample in expected]
        assert part.num_captions.tolist() == [len(sample.captions) for sample in expected]
        for place, sample in enumerate(expected):
            found = dataset.index.part(number).sample(place)
            assert found.image.read() == sample.image.read()
            assert found.captions == sample.captions
            assert (found.attributes and found.attributes.read()) == (sample.attributes and sample.attributes.read())
            sent = pickle.dumps(SampleRef(dataset.index.part(number), place))
            assert len(sent) < 1_000, "neither shards nor their samples are sent to workers"
            assert pickle.loads(sent).read() == found
            assert pickle.loads(sent).key == found.key


def test_captions_of_a_shard_that_was_cut_are_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "0.tar", shard_members(0, 4))
    dataset = indexed(tmp_path / "data", tmp_path / "index")
    os.truncate(tmp_path / "data" / "0.tar", 512)
    assert dataset.index is not None
    with pytest.raises(ClipcidError, match=r"captions in .*0\.tar cannot be read"):
        SampleRef(dataset.index.part(0), 1).read()


def test_workers_write_the_same_index(tmp_path: Path) -> None:
    for number in range(12):
        write_tar(tmp_path / "data" / f"{number:05d}.tar", shard_members(10 * number, 4))
    alone = indexed(tmp_path / "data", tmp_path / "alone")
    shared = indexed(tmp_path / "data", tmp_path / "shared", workers=2)
    assert alone.index is not None
    assert shared.index is not None
    assert alone.index.records == shared.index.records
    for path in sorted(alone.index.folder.glob("*.*")):
        assert path.read_bytes() == (shared.index.folder / path.name).read_bytes()


def note_listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the names of shards are added as they are listed."""
    listed: list[str] = []

    def note(folder: Path, shard: Shard, *arguments: object) -> object:
        listed.append(shard.name)
        return module.write_part(folder, shard, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("clipcid_cli.steps.data_index.write_part", note)
    return listed


def test_a_shard_that_changed_is_listed_again_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_tar(tmp_path / "data" / f"{number}.tar", shard_members(10 * number, 4))
    before = indexed(tmp_path / "data", tmp_path / "index")
    changed = write_tar(tmp_path / "data" / "1.tar", shard_members(10, 6))
    os.utime(changed, ns=(0, 1))
    assert open_dataset(tmp_path / "data", index_root=tmp_path / "index").index is None
    listed = note_listed(monkeypatch)
    after = indexed(tmp_path / "data", tmp_path / "index")
    assert listed == ["1"]
    assert before.index is not None
    assert after.index is not None
    assert np.array_equal(after.index.sizes, [4, 6, 4])
    assert len(after.index.part(1)) == 6, "what the process remembered of the shard must not be taken"


def test_a_key_of_two_shards_is_refused(tmp_path: Path) -> None:
    for number in range(4):
        write_tar(tmp_path / "data" / f"{number}.tar", shard_members(10 * number, 4))
    write_tar(tmp_path / "data" / "3.tar", shard_members(12, 2))
    with pytest.raises(ClipcidError, match="Key '000012' occurs in shard 1 and again in shard 3") as error:
        indexed(tmp_path / "data", tmp_path / "index")
    assert "--keys shard" in error.value.fix
    prefixed = indexed(tmp_path / "data", tmp_path / "index", keys="shard")
    assert prefixed.index is not None


def test_a_caption_that_was_rewritten_is_read_again(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    first = indexed(folder, tmp_path / "index")
    (folder / "0" / "4.txt").write_text("another caption")
    again = indexed(folder, tmp_path / "index")
    assert first.index is not None
    assert again.index is not None
    place = again.index.part(0).keys.to_pylist().index("0/4")
    assert again.index.part(0).sample(place).captions == ("another caption",)


def test_what_a_killed_run_left_is_removed(tiny_shards: Path, tmp_path: Path) -> None:
    folder = indexed(tiny_shards, tmp_path).index_folder
    assert folder is not None
    path = next(folder.glob("*.arrow"))
    matched, part = (folder / f".{name}.partial" for name in ("matched-1", path.name))
    matched.mkdir()
    (matched / "training.places.npy").touch()
    part.touch()
    path.unlink()
    table_of(folder).unlink()
    indexed(tiny_shards, tmp_path)
    assert path.exists()
    assert not list(folder.glob(".*.partial"))


def test_a_shard_that_changes_while_it_is_listed_is_listed_again_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        write_tar(tmp_path / "data" / f"{number}.tar", shard_members(10 * number, 4))
    stream, touched = Shard.stream, iter(range(1, 100))

    def touch(shard: Shard, *arguments: object) -> object:
        if shard.name == "1" and (time := next(touched)) <= most:
            os.utime(shard.source, ns=(0, time))
        return stream(shard, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Shard, "stream", touch)
    most = 2  # once when the data is opened, once when it is listed
    found = indexed(tmp_path / "data", tmp_path / "once").index
    assert found is not None
    assert [found.part(number).keys[0].as_py() for number in range(2)] == ["000000", "000010"]
    most = 100
    with pytest.raises(ClipcidError, match=r"Shard 1 of .* changes while it is listed"):
        indexed(tmp_path / "data", tmp_path / "always")


def test_a_part_of_another_version_of_its_shard_is_refused(tiny_shards: Path, tmp_path: Path) -> None:
    index = indexed(tiny_shards, tmp_path / "index").index
    assert index is not None
    parts = [Path(index.part(number).path) for number in range(2)]
    parts[0].write_bytes(parts[1].read_bytes())
    parts[1].unlink()
    module._read_table.cache_clear()
    for number in range(2):
        with pytest.raises(ClipcidError, match="missing, edited, damaged, or of another version") as error:
            len(index.part(number))
        assert str(index.folder) in error.value.fix


def table_of(folder: Path) -> Path:
    """Find the only table of an index."""
    (table,) = folder.glob("shards-*.parquet")
    return table


def edit_part(path: Path) -> list[str]:
    """Exchange the first two keys of a part, which keeps its size and time; return what they were."""
    stat, part = path.stat(), pa.ipc.open_file(path.read_bytes()).read_all()
    keys: list[str] = part["key"].to_pylist()
    edited = part.set_column(0, "key", pa.array([keys[1], keys[0], *keys[2:]]))
    with pa.ipc.new_file(path, part.schema) as writer:
        writer.write_table(edited.cast(part.schema))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    module._read_table.cache_clear()
    return keys


def test_an_edited_part_is_refused_until_the_table_is_removed(tiny_shards: Path, tmp_path: Path) -> None:
    index = indexed(tiny_shards, tmp_path / "index").index
    assert index is not None
    path = Path(index.part(0).path)
    keys = edit_part(path)
    with pytest.raises(ClipcidError, match=rf"{path.name} is missing, edited, damaged") as error:
        len(index.part(0))
    assert f"Remove {index.folder}/shards-*.parquet and give the command again" in error.value.fix
    table_of(index.folder).unlink()
    again = indexed(tiny_shards, tmp_path / "index").index
    assert again is not None
    assert again.part(0).keys.to_pylist() == keys
    assert again.records == index.records


@pytest.mark.parametrize("table_is_there", [True, False], ids=["another-shard-touched", "table-removed"])
def test_an_edited_part_is_listed_again_where_the_table_is_made_anew(tmp_path: Path, table_is_there: bool) -> None:
    for number in range(2):
        write_tar(tmp_path / "data" / f"{number}.tar", shard_members(10 * number, 4))
    index = indexed(tmp_path / "data", tmp_path / "index").index
    assert index is not None
    keys = edit_part(Path(index.part(0).path))
    if table_is_there:
        os.utime(tmp_path / "data" / "1.tar", ns=(0, 1))
    else:
        table_of(index.folder).unlink()
    again = indexed(tmp_path / "data", tmp_path / "index").index
    assert again is not None
    assert again.part(0).keys.to_pylist() == keys
    assert again.records[0] == index.records[0]


def test_what_a_part_says_of_its_shard_cannot_be_edited_either(tiny_shards: Path, tmp_path: Path) -> None:
    index = indexed(tiny_shards, tmp_path / "index").index
    assert index is not None
    path = Path(index.part(0).path)
    content = path.read_bytes()
    assert content.count(b'"with_captions": 14') == 2, "at the head and at the end"
    path.write_bytes(content.replace(b'"with_captions": 14', b'"with_captions": 13'))
    assert module.read_record(index.folder, index.shards[0]) is None
    path.write_bytes(content)
    assert module.read_record(index.folder, index.shards[0]) == index.records[0]


def test_data_that_grew_lists_the_new_shard_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        write_tar(tmp_path / "data" / f"{number}.tar", shard_members(10 * number, 4))
    first = indexed(tmp_path / "data", tmp_path / "index").index
    write_tar(tmp_path / "data" / "2.tar", shard_members(20, 4))
    listed = note_listed(monkeypatch)
    grown = indexed(tmp_path / "data", tmp_path / "index").index
    assert listed == ["2"]
    assert first is not None
    assert grown is not None
    assert grown.folder == first.folder
    assert grown.records[:2] == first.records
    assert grown.part(2).keys[0].as_py() == "000020"
    # The smaller data are still there, and so is their table.
    (tmp_path / "data" / "2.tar").unlink()
    again = indexed(tmp_path / "data", tmp_path / "index").index
    assert listed == ["2"]
    assert again is not None
    assert again.records == first.records


def test_names_that_are_not_utf_8_are_one_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    (folder / "0" / os.fsdecode(b"caf\xe9.png")).write_bytes(make_image(9))
    with pytest.raises(ClipcidError, match=r"the name of a file is not UTF-8: .*caf\\udce9"):
        indexed(folder, tmp_path / "index")
