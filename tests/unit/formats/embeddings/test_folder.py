"""Folders of embeddings, ours and other tools'."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace
from sidecars import make_sidecar, unfinish

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings import folder as folders
from clipcid_cli.formats.embeddings.folder import open_embeddings
from clipcid_cli.formats.embeddings.npy import find_npy
from clipcid_cli.formats.embeddings.rows import holds_unit_rows, unit_rows
from clipcid_cli.formats.embeddings.writer import (
    EmbeddingWriter,
    ShardRecord,
    ShardRows,
    refuse_foreign_folder,
)
from clipcid_cli.formats.fingerprint import identity_of, refuse_changed
from clipcid_cli.formats.sidecar import EmbedSidecar
from clipcid_cli.formats.skips import Skips

RANDOM = np.random.default_rng(0)
SIZES = (5, 0, 7)


def make_rows(count: int, width: int = 8) -> npt.NDArray[np.float16]:
    return unit_rows(RANDOM.normal(size=(count, width)))


def write_folder(folder: Path, *, texts: bool = True) -> dict[str, Any]:
    """Write three shards as `embed` does, the middle one without a row."""
    writer = EmbeddingWriter(folder, ["plan"] * len(SIZES))
    images, captions = [make_rows(size) for size in SIZES], [make_rows(size) for size in SIZES]
    for number, size in enumerate(SIZES):
        skips = Skips()
        skips.add("no_caption", f"{number}: x")
        record = ShardRecord(f"s{number}", size + 1, size, skips, flattened=number)
        keys, words = [f"{number}-{row}" for row in range(size)], [f"caption {row}" for row in range(size)]
        writer.write(number, record, keys, words, ShardRows(images[number], captions[number] if texts else None))
    sidecar = make_sidecar(EmbedSidecar, outputs=msgspec.to_builtins(writer.describe()))
    (folder / "embed.json").write_text(json.dumps(sidecar))
    return {"images": np.concatenate(images), "texts": np.concatenate(captions), "writer": writer}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    written = write_folder(tmp_path)
    embeddings = open_embeddings(tmp_path)
    assert (embeddings.num_rows, embeddings.width, embeddings.has_texts) == (12, 8, True)
    assert embeddings.keys.to_pylist() == [f"0-{row}" for row in range(5)] + [f"2-{row}" for row in range(7)]
    assert embeddings.shards.to_pylist() == ["s0"] * 5 + ["s2"] * 7
    assert embeddings.captions[6].as_py() == "caption 1"
    images = embeddings.images()
    assert images.shape == (12, 8)
    assert np.array_equal(images.read(0, 12), written["images"])
    assert np.array_equal(images.read(3, 9), written["images"][3:9])
    assert images.read(4, 4).shape == (0, 8)
    places = np.array([11, 0, 5, 4, 11])
    assert np.array_equal(embeddings.texts().take(places), written["texts"][places])
    blocks = list(images.blocks(5))
    assert [start for start, _ in blocks] == [0, 5, 10]
    assert np.array_equal(np.concatenate([rows for _, rows in blocks]), written["images"])
    assert np.shares_memory(images.read(5, 12), images.read(6, 12))  # views of what is held of the file
    assert sorted(path.name for path in (tmp_path / "metadata").iterdir())[0] == "metadata_0000.parquet"


def test_the_folder_is_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    expected = open_embeddings(tmp_path).fingerprints(texts=True)
    monkeypatch.chdir(tmp_path)
    found = open_embeddings(Path("."))
    assert found.is_verified
    assert [replace(each, path=str(tmp_path / each.path)) for each in found.fingerprints(texts=True)] == expected
    sidecar = json.loads(Path("embed.json").read_text())
    others = [entry for entry in sidecar["outputs"] if entry["path"] != "text_emb/text_emb_0002.npy"]
    Path("embed.json").write_text(json.dumps(sidecar | {"outputs": others}))
    with pytest.raises(ClipcidError, match=r"^text_emb/text_emb_0002.npy was added since embed.json was written"):
        open_embeddings(Path("."))


def test_a_damaged_sidecar_is_not_to_be_removed(tmp_path: Path) -> None:
    write_folder(tmp_path)
    sidecar = json.loads((tmp_path / "embed.json").read_text())
    for content in (
        {name: sidecar[name] for name in sidecar if name != "model"},
        [],
    ):  # without it they are another tool's
        (tmp_path / "embed.json").write_text(json.dumps(content))
        with pytest.raises(ClipcidError, match="Give the command that made it again, with --overwrite"):
            open_embeddings(tmp_path)


def test_records_of_shards_belong_to_a_plan(tmp_path: Path) -> None:
    writer = write_folder(tmp_path)["writer"]
    record = writer.read_record(2)
    assert (record.shard, record.read, record.rows, record.flattened) == ("s2", 8, 7, 2)
    assert record.skips.examples == {"no_caption": ["2: x"]}
    assert EmbeddingWriter(tmp_path, ["another plan"] * 3).read_record(2) is None
    (tmp_path / "img_emb" / "img_emb_0002.npy").unlink()
    assert writer.read_record(2) is None
    assert writer.read_record(0) is not None


@pytest.mark.parametrize(
    "file", ["img_emb/img_emb_0000.npy", "text_emb/text_emb_0000.npy", "metadata/metadata_0000.parquet"]
)
def test_a_shard_whose_files_changed_is_embedded_again(tmp_path: Path, file: str) -> None:
    writer, path = write_folder(tmp_path)["writer"], tmp_path / file
    content, stat = path.read_bytes(), path.stat()
    path.write_bytes(bytes(len(content)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert writer.read_record(0) is None
    path.write_bytes(content)  # the same bytes, copied at another time
    assert writer.read_record(0) is not None


@pytest.mark.parametrize(
    "file", ["img_emb/img_emb_0000.npy", "text_emb/text_emb_0002.npy", "metadata/metadata_0002.parquet"]
)
def test_finished_files_that_were_replaced_are_refused(tmp_path: Path, file: str) -> None:
    write_folder(tmp_path)
    for name in ("img_emb", "text_emb", "metadata"):
        shutil.copytree(tmp_path / name, tmp_path / "copy" / name)
    shutil.copy(tmp_path / "embed.json", tmp_path / "copy")
    assert open_embeddings(tmp_path / "copy").is_verified
    changed = tmp_path / "copy" / file
    content = bytearray(changed.read_bytes())
    content[-9] ^= 1
    changed.write_bytes(content)
    with pytest.raises(ClipcidError, match=rf"{changed.name} has changed since .*embed.json was written"):
        open_embeddings(tmp_path / "copy")
    changed.unlink()
    with pytest.raises(ClipcidError, match=rf"{changed.name} is missing"):
        open_embeddings(tmp_path / "copy")


def replace_file(path: Path, content: bytes) -> None:
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("file", ["img_emb/img_emb_0002.npy", "metadata/metadata_0002.parquet"])
def test_files_replaced_while_a_folder_is_in_use_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    write_folder(tmp_path / "first")
    write_folder(tmp_path / "other")
    embeddings = open_embeddings(tmp_path / "first")
    os.utime(tmp_path / "first" / file, ns=(0, 1))  # the same content at another time is the same file
    expected = embeddings.fingerprints(texts=True)
    assert len(expected) == 9
    embeddings = open_embeddings(tmp_path / "first")
    assert embeddings.fingerprints(texts=True) == expected
    other = (tmp_path / "other" / file).read_bytes()[:-1] + b"?"  # of the same size
    replace_file(tmp_path / "first" / file, other)
    for fingerprint in (embeddings.fingerprints, embeddings.text_fingerprints):
        with pytest.raises(ClipcidError, match=rf"{file} has changed since .*embed.json was written"):
            fingerprint()

    def compare_and_replace(folder: Path, *arguments: Any, **named: Any) -> str | None:
        found = refuse_changed(folder, *arguments, **named)
        replace_file(folder / file, other)
        return found

    monkeypatch.setattr(folders, "refuse_changed", compare_and_replace)
    look = open_embeddings if file.endswith(".npy") else lambda folder: open_embeddings(folder).fingerprints()
    with pytest.raises(ClipcidError, match=rf"{file} has changed since .*embed.json was written"):
        look(tmp_path / "other")


@pytest.mark.parametrize("rows", [3, 2**14])
def test_rows_replaced_between_their_header_and_their_first_use_are_refused(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.ones((rows, 4), np.float16))
    found, (more, stat) = find_npy(path), (path.read_bytes(), path.stat())
    assert found.map().shape == (rows, 4)
    replace_file(path, more[:-1] + b"?")
    with pytest.raises(ClipcidError, match="it was replaced after this run had begun"):
        found.map()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # still another file
    with pytest.raises(ClipcidError, match="it was replaced after this run had begun"):
        found.map()


def test_rows_that_are_zero_or_not_finite_are_found_in_images_and_texts_of_any_writer(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "embed.json").write_text(
        json.dumps(json.loads((tmp_path / "embed.json").read_text()) | {"outputs": []})
    )
    for file, row, value in (("img_emb/img_emb_0000.npy", 1, np.nan), ("text_emb/text_emb_0002.npy", 3, 0)):
        rows = np.load(tmp_path / file)
        rows[row] = value
        np.save(tmp_path / file, rows)
    embeddings = open_embeddings(tmp_path)
    assert embeddings.find_bad_rows(texts=False).tolist() == [1]
    assert embeddings.find_bad_rows(texts=True).tolist() == [1, 8]


def test_files_of_more_shards_are_removed(tmp_path: Path) -> None:
    write_folder(tmp_path)["writer"].remove_notes()
    (tmp_path / "mine.txt").touch()
    EmbeddingWriter(tmp_path, ["plan"] * 2).remove_others(with_texts=False)
    names = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert names == [
        "embed.json",
        "img_emb_0000.npy",
        "img_emb_0001.npy",
        "metadata_0000.parquet",
        "metadata_0001.parquet",
        "mine.txt",
    ]


def test_folders_of_others_are_not_written_to(tmp_path: Path) -> None:
    refuse_foreign_folder(tmp_path)
    write_folder(tmp_path)
    refuse_foreign_folder(tmp_path)
    (tmp_path / "embed.json").unlink()
    with pytest.raises(ClipcidError, match=r"did not write, such as .*img_emb_0000\.npy"):
        refuse_foreign_folder(tmp_path)


def write_foreign(folder: Path, column: str | None = "image_path") -> npt.NDArray[np.float32]:
    """Write what clip-retrieval and others do: float32, not unit, numbers without leading zeros, 11 files."""
    rows = RANDOM.normal(size=(22, 6)).astype(np.float32) * 3
    for number in range(11):
        for kind in ("img_emb", "metadata"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", rows[2 * number : 2 * number + 2])
        columns = {column: [f"p/{number}a", f"p/{number}b"]} if column else {"width": [1, 2]}
        pq.write_table(pa.table(columns), folder / "metadata" / f"metadata_{number}.parquet")
    return rows


def test_other_tools_folders_are_read_as_they_are(tmp_path: Path) -> None:
    rows = write_foreign(tmp_path)
    embeddings = open_embeddings(tmp_path)
    assert embeddings.sidecar is None
    assert embeddings.keys.to_pylist()[18:22] == ["p/9a", "p/9b", "p/10a", "p/10b"]
    assert embeddings.captions.to_pylist() == [""] * 22
    exact = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    whole = embeddings.images().read(0, 22)
    assert np.array_equal(whole, exact.astype(np.float16))
    assert np.array_equal(embeddings.images().take(np.arange(22)), whole)
    assert np.array_equal(np.concatenate([part for _, part in embeddings.images().blocks(3)]), whole)
    with pytest.raises(ClipcidError, match="contains no text embeddings"):
        embeddings.texts()


def test_clip_retrievals_folder_with_the_metadata_of_img2dataset(tmp_path: Path) -> None:
    """As its NumpyWriter writes it: partitions padded to one width, those without a sample left out, columns joined."""
    rows = RANDOM.normal(size=(4, 6)).astype(np.float16)
    for kind in ("img_emb", "text_emb", "metadata"):
        (tmp_path / kind).mkdir()
    for number, part in ((2, slice(0, 2)), (11, slice(2, 4))):
        np.save(tmp_path / "img_emb" / f"img_emb_{number:02d}.npy", rows[part])
        np.save(tmp_path / "text_emb" / f"text_emb_{number:02d}.npy", rows[part].astype(np.float32))
        keys = [f"{number:05d}{row:04d}" for row in range(2)]
        frame = pd.DataFrame(
            {
                "image_path": keys,
                "caption": ["a", "b"],
                "uid": [f"{row:032x}" for row in range(2)],
                "key": keys,
                "width": 9,
            }
        )
        frame.to_parquet(tmp_path / "metadata" / f"metadata_{number:02d}.parquet")
    found = open_embeddings(tmp_path)
    assert (found.num_rows, found.has_texts, found.has_uids) == (4, True, True)
    assert found.keys.to_pylist() == ["000020000", "000020001", "000110000", "000110001"]
    assert found.shards.to_pylist() == ["img_emb_02"] * 2 + ["img_emb_11"] * 2
    assert np.array_equal(found.images().read(0, 4), found.texts().read(0, 4))
    assert np.array_equal(found.images().read(0, 4), unit_rows(rows))


def test_without_keys_rows_are_named_by_file_and_place(tmp_path: Path) -> None:
    write_foreign(tmp_path, column=None)
    assert open_embeddings(tmp_path).keys.to_pylist()[3] == "img_emb_1/1"
    assert open_embeddings(tmp_path / "img_emb").num_rows == 22


def test_unit_rows_in_float16_keep_their_bits() -> None:
    rows = make_rows(50, 512)
    assert np.array_equal(unit_rows(rows), rows)
    assert not np.array_equal(unit_rows((rows * 1.5).astype(np.float16)), rows * 1.5)
    bad = np.array([[0, 0], [np.nan, 1], [np.inf, 1], [3, 4]], dtype=np.float32)
    assert np.isnan(unit_rows(bad)[:3]).all()
    assert unit_rows(bad)[3].tolist() == [np.float16(0.6), np.float16(0.8)]


def test_bad_rows_of_other_tools_are_found(tmp_path: Path) -> None:
    write_foreign(tmp_path)
    path = tmp_path / "img_emb" / "img_emb_4.npy"
    rows = np.load(path)
    rows[1] = 0
    np.save(path, rows)
    assert open_embeddings(tmp_path).find_bad_rows(texts=False).tolist() == [9]


def break_width(folder: Path) -> None:
    np.save(folder / "img_emb" / "img_emb_3.npy", np.ones((2, 7), np.float16))


def break_count(folder: Path) -> None:
    np.save(folder / "img_emb" / "img_emb_3.npy", np.ones((3, 6), np.float16))


def break_pairing(folder: Path) -> None:
    (folder / "metadata" / "metadata_3.parquet").unlink()


def break_pickle(folder: Path) -> None:
    np.save(folder / "img_emb" / "img_emb_3.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


def break_type(folder: Path) -> None:
    np.save(folder / "img_emb" / "img_emb_3.npy", np.ones((2, 6), np.int64))


def break_npy(folder: Path) -> None:
    (folder / "img_emb" / "img_emb_3.npy").write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_width, "img_emb_3.npy has width 7, the files before it 6"),
        (break_count, "img_emb_3.npy has 3 rows and .*metadata_3.parquet has 2"),
        (break_pairing, "img_emb_3.npy has no metadata of the same number"),
        (break_pickle, "img_emb_3.npy cannot be read"),
        (break_type, r"holds int64 \[2, 6\], not rows of floating-point numbers"),
        (break_npy, "img_emb_3.npy cannot be read"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    write_foreign(tmp_path)
    damage(tmp_path)
    with pytest.raises(ClipcidError, match=message):
        open_embeddings(tmp_path)


def test_nothing_there_and_unfinished(tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match="contains no embeddings") as raised:
        open_embeddings(tmp_path)
    assert "clipcid embed" in raised.value.fix
    write_folder(tmp_path)
    unfinish(tmp_path, "embed")
    with pytest.raises(ClipcidError, match="are unfinished"):
        open_embeddings(tmp_path)


def test_plans_follow_settings_and_content() -> None:
    inputs = [{"path": "/a", "size": 3, "hash": "h"}]
    plan = identity_of({"x": 1}, inputs)
    assert identity_of({"x": 1}, [inputs[0] | {"path": "/b"}]) == plan
    assert identity_of({"x": 2}, inputs) != plan
    assert identity_of({"x": 1}, [inputs[0] | {"hash": "i"}]) != plan


def test_rows_of_other_tools_are_normalised_only_where_they_need_it(tmp_path: Path) -> None:
    unit = make_rows(700)
    for rows, stays in ((unit, True), (unit.astype(np.float32), False)):
        assert holds_unit_rows(rows) == stays
    for bad in (np.float16(1.5), np.float16(np.nan), np.float16(0)):
        rows = unit.copy()
        rows[600] *= bad
        assert not holds_unit_rows(rows)
        folder = tmp_path / str(bad)
        folder.mkdir()
        np.save(folder / "0.npy", rows)
        np.testing.assert_array_equal(open_embeddings(folder).images().read(0, 700), unit_rows(rows))


def test_captions_that_are_wider_than_the_images_are_refused(tmp_path: Path) -> None:
    for kind, width in (("img_emb", 8), ("text_emb", 9)):
        (tmp_path / kind).mkdir()
        np.save(tmp_path / kind / f"{kind}_0.npy", make_rows(4, width))
    with pytest.raises(ClipcidError, match=r"text_emb_0\.npy has width 9, the image embeddings have 8"):
        open_embeddings(tmp_path)
