"""`balance --write-data`: the kept samples of parquet files, lists and folders, read as the data itself is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from balance_data import balance, make_rows, write_embeddings
from conftest import kill_when, make_caption, make_image, run_clipcid
from shard_server import serve

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset, open_dataset
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.steps.balance import write_data

NUM_ROWS = 24
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def read_samples(data: Dataset | Path) -> list[Sample]:
    dataset = data if isinstance(data, Dataset) else open_dataset(data)
    return [sample for shard in dataset.shards for sample in shard.samples()]


def write_kept(place: Path, data: Path | str, out: Path | None = None, **settings: Any) -> tuple[list[bool], str]:
    """Balance embeddings of data, whose keys and shards they record; return which samples are kept, and what was said."""
    dataset = open_dataset(data)
    named = [(shard.name, sample.key) for shard in dataset.shards for sample in shard.samples()]
    if not (place / "e").exists():
        shards, keys = map(list, zip(*named, strict=True))
        write_embeddings(place / "e", make_rows(len(named), seed=3), keys=keys, shards=shards)
    given = {"keep": 0.5, "data": str(data), "write_data": out or place / "out"} | settings
    result, told = balance(place / "work", place / "e", **given)
    kept = pd.read_parquet(result["files"]["keep_list"])["kept"].tolist()
    assert result["data"] == {"written": sum(kept), "not_written": 0}
    assert result["files"]["data"] == str(given["write_data"])
    return kept, told


def check_samples(data: Path, out: Path, kept: list[bool]) -> None:
    """The written data has the kept samples: the same keys, captions, classes and bytes."""
    expected = [sample for sample, is_kept in zip(read_samples(data), kept, strict=True) if is_kept]
    found = read_samples(out)
    for parts in zip(found, expected, strict=True):
        one, other = ((part.key, part.captions, part.label, part.image.read()) for part in parts)
        assert one == other


def write_files(folder: Path, *, with_keys: bool) -> Path:
    """Write files as the hub's are: features in the metadata, large types, and a column that nothing reads."""
    for number in range(3):
        rows = range(8 * number, 8 * number + 8)
        columns: dict[str, Any] = {
            "image": pa.array([{"bytes": make_image(row), "path": f"{row}.png"} for row in rows], IMAGE),
            "caption": pa.array([[make_caption(row), "another"] for row in rows], pa.large_list(pa.large_string())),
            "label": pa.array([row % 2 for row in rows], pa.int16()),
            "score": pa.array([None if row % 5 == 0 else row / 7 for row in rows], pa.float32()),
        }
        if with_keys:
            columns["key"] = [f"k{row}" for row in rows]
        table = pa.table(columns).replace_schema_metadata({"huggingface": '{"info": {"features": {}}}', "own": "1"})
        folder.mkdir(exist_ok=True)
        pq.write_table(table, folder / f"train-{number:05d}-of-00003.parquet", row_group_size=3)
    return folder


@pytest.mark.parametrize("with_keys", [True, False])
def test_parquet_files_keep_columns_metadata_and_keys(tmp_path: Path, with_keys: bool) -> None:
    data = write_files(tmp_path / "data", with_keys=with_keys)
    kept, _ = write_kept(tmp_path, data)
    check_samples(data, tmp_path / "out", kept)
    for number, part in enumerate(np.array_split(np.array(kept), 3)):
        name = f"train-{number:05d}-of-00003.parquet"
        source, found = pq.read_table(data / name), pq.read_table(tmp_path / "out" / name)
        assert found.select(source.column_names).equals(source.filter(pa.array(part)), check_metadata=True)
        assert found.schema.metadata == source.schema.metadata
        assert found.column_names == [*source.column_names, *([] if with_keys else ["key"])]
    assert "already holds this data" in write_kept(tmp_path, data)[1]


def test_row_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipcid_cli.formats.data.parquet_shards._ROWS_OF_GROUP", 3)
    monkeypatch.setattr("clipcid_cli.formats.data.image_column._ROWS", 2)
    kept, _ = write_kept(tmp_path, write_files(tmp_path / "data", with_keys=True))
    file = pq.ParquetFile(tmp_path / "out" / "train-00000-of-00003.parquet")
    assert sum(kept[:8]) == file.metadata.num_rows > 3
    assert all(file.metadata.row_group(group).num_rows <= 3 for group in range(file.num_row_groups))


def test_a_run_that_was_killed_continues_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_files(tmp_path / "data", with_keys=False)
    write_kept(tmp_path, data, tmp_path / "whole")
    copied = list[str]()
    copy = write_data.copy_rows

    def count(path: str, *given: Any) -> int:
        copied.append(Path(path).name)
        if len(copied) == 2:
            raise KeyboardInterrupt
        return copy(path, *given)

    monkeypatch.setattr(write_data, "copy_rows", count)
    with pytest.raises(KeyboardInterrupt):
        write_kept(tmp_path, data)
    assert os.listdir(tmp_path / "out") == [next((tmp_path / "out").glob(".write-data-*")).name]
    write_kept(tmp_path, data)
    assert [copied.count(f"train-{number:05d}-of-00003.parquet") for number in range(3)] == [1, 2, 1]
    for path in (tmp_path / "whole").glob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def write_images(folder: Path) -> Path:
    for row in range(NUM_ROWS):
        path = folder / ("boat", "red door")[row % 2] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_image(row))
        if row % 3:
            path.with_suffix(".txt").write_text(make_caption(row))
    return folder


def test_a_folder_has_other_names_of_the_same_files(tmp_path: Path) -> None:
    data = write_images(tmp_path / "photos")
    with pytest.raises(ClipcidError, match=r"--write-data .*/photos/kept would become part of the data"):
        write_kept(tmp_path, data, data / "kept")
    kept, _ = write_kept(tmp_path, data)
    check_samples(data, tmp_path / "out", kept)
    for path in (tmp_path / "out").glob("*/*"):
        assert path.samefile(data / path.relative_to(tmp_path / "out"))
    assert open_dataset(tmp_path / "out").classes == ("boat", "red door")
    # Another keep list: what it does not keep goes, and nothing else.
    for path in (tmp_path / "out" / "mine.md", tmp_path / "outside"):
        path.write_text("precious")
    with (tmp_path / "out" / "write-data.files.jsonl").open("a") as listing:  # by someone else
        listing.write(f'"../outside"\n"{tmp_path}/outside"\nnothing\n[1]\n')
    fewer, _ = write_kept(tmp_path, data, keep=0.2, overwrite=True)
    assert sum(fewer) < sum(kept)
    check_samples(data, tmp_path / "out", fewer)
    for path in (tmp_path / "out" / "mine.md", tmp_path / "outside"):
        assert path.read_text() == "precious"
    # A folder that was replaced by a link is not written through.
    shutil.move(tmp_path / "out" / "boat", tmp_path / "elsewhere")
    (tmp_path / "out" / "boat").symlink_to(tmp_path / "elsewhere")
    before = sorted(os.listdir(tmp_path / "elsewhere"))
    with pytest.raises(ClipcidError, match=r"Could not write .*out/boat"):
        write_kept(tmp_path, data, overwrite=True)
    assert sorted(os.listdir(tmp_path / "elsewhere")) == before


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv", "pairs.parquet"])
@pytest.mark.parametrize("with_keys", [True, False])
def test_a_list_keeps_its_form_and_leads_to_the_images(tmp_path: Path, name: str, with_keys: bool) -> None:
    data = write_images(tmp_path / "photos")
    paths = [str(path.relative_to(tmp_path)) for path in sorted(data.glob("*/*.png"))]
    paths[1] = str(tmp_path / paths[1])
    frame = pd.DataFrame({"filepath": paths, "title": [f'{make_caption(row)}, "so"' for row in range(NUM_ROWS)]})
    frame["width"] = np.arange(NUM_ROWS)
    if with_keys:
        frame["key"] = [f" k{row} " for row in range(NUM_ROWS)]
    separator = {".csv": ",", ".tsv": "\t"}.get(Path(name).suffix)
    if separator is None:
        frame.to_parquet(tmp_path / name, row_group_size=5)
    else:
        frame.to_csv(tmp_path / name, sep=separator, index=False)
    kept, _ = write_kept(tmp_path, tmp_path / name)
    check_samples(tmp_path / name, tmp_path / "out" / name, kept)
    read = pd.read_parquet if separator is None else lambda path: pd.read_csv(path, sep=separator)
    written, source = read(tmp_path / "out" / name), read(tmp_path / name)[kept]
    rest = ["title", "width", *(["key"] if with_keys else [])]
    pd.testing.assert_frame_equal(written[rest], source[rest].reset_index(drop=True))
    assert written["filepath"].tolist() == [str(tmp_path / path) for path in source["filepath"]]
    if not with_keys:
        assert written["key"].tolist() == source["filepath"].tolist()


def test_a_list_behind_a_signed_address_is_named_without_the_signature(tmp_path: Path) -> None:
    data = write_images(tmp_path / "photos")
    paths = [str(path.relative_to(tmp_path)) for path in sorted(data.glob("*/*.png"))]
    pd.DataFrame({"filepath": paths, "title": "a"}).to_csv(tmp_path / "pairs.csv", index=False)
    with serve(tmp_path) as server:
        write_kept(tmp_path, f"{server.url}/pairs.csv?X-Amz-Signature=secret")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert tmp_path / "out" / "pairs.csv" in files
    assert not [path for path in files if b"secret" in path.read_bytes() + bytes(path)]


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.parquet").write_bytes(b"precious")
    with pytest.raises(ClipcidError, match="out holds files that --write-data did not write"):
        write_kept(tmp_path, write_files(tmp_path / "data", with_keys=True))
    assert os.listdir(tmp_path / "out") == ["mine.parquet"]
    assert not (tmp_path / "work" / "balance").exists(), "that was said before the search"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["files", "photos"])
def test_a_command_that_is_killed_ends_with_the_bytes_of_one_that_is_not(tmp_path: Path, form: str) -> None:
    data = write_files(tmp_path / form, with_keys=False) if form == "files" else write_images(tmp_path / form)
    write_kept(tmp_path, data, tmp_path / "whole")
    for processes, out in ((1, "one"), (2, "two")):
        command = ("balance", data, "--embeddings", "e", "--keep", 0.5, "--work", "work", "--write-data", out)
        (tmp_path / out).mkdir()
        last = "write-data.files.jsonl" if form == "photos" else "train-00002-of-00003.parquet"
        first = f".{16 * '?'}.json" if form == "photos" else "train-00000-of-00003.parquet"  # the record of a slice
        kill_when(tmp_path / out, first, (last, "write-data.json"), *command, cwd=tmp_path, processes=processes)
        run_clipcid(*command, cwd=tmp_path, processes=processes)
        assert read_tree(tmp_path / out) == read_tree(tmp_path / "whole")


def read_tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "write-data.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
