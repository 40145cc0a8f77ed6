"""Folders of embeddings, ours and other tools'."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sidecars import make_sidecar, unfinish

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.folder import EmbeddingFile, Embeddings, open_embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.manifest import EmbeddingWriter, ShardRows, Skipped, read_manifest
from clipcid_cli.formats.embeddings.rows import find_npy, holds_unit_rows, unit_rows
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.sidecar import EmbedSidecar
from clipcid_cli.formats.skips import Skips

RANDOM = np.random.default_rng(0)
SIZES = (5, 0, 7)


def make_rows(count: int, width: int = 8) -> npt.NDArray[np.float16]:
    return unit_rows(RANDOM.normal(size=(count, width)))


def make_writer(folder: Path, settings: dict[str, Any] | None = None) -> EmbeddingWriter:
    inputs = [FileRecord(f"s{number}.tar", size, f"h{number}", shard=f"s{number}") for number, size in enumerate(SIZES)]
    return EmbeddingWriter(folder, settings or {}, inputs)


def write_folder(folder: Path, *, texts: bool = True) -> dict[str, Any]:
    """Write three shards as `embed` does, the middle one without a row."""
    writer = make_writer(folder)
    images, captions = [make_rows(size) for size in SIZES], [make_rows(size) for size in SIZES]
    for number, size in enumerate(SIZES):
        skips = Skips()
        skips.add("no_caption", f"{number}: x")
        keys, words = [f"{number}-{row}" for row in range(size)], [f"caption {row}" for row in range(size)]
        rows = {Kind.IMAGES: images[number]} | ({Kind.TEXTS: captions[number]} if texts else {})
        writer.write(number, ShardRows(size + 1, skips, number, keys, words, None, rows))
    records = writer.finish()
    write_sidecar(folder)
    return {"images": np.concatenate(images), "texts": np.concatenate(captions), "writer": writer, "records": records}


def write_sidecar(folder: Path) -> None:
    outputs = [msgspec.to_builtins(record(folder / "manifest.parquet", folder))]
    (folder / "embed.json").write_text(json.dumps(make_sidecar(EmbedSidecar, outputs=outputs)))


def read_all(embeddings: Embeddings, read: Callable[[EmbeddingFile], pa.ChunkedArray]) -> list[str]:
    return [text for file in embeddings.files for text in read(file).to_pylist()]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    written = write_folder(tmp_path)
    embeddings = open_embeddings(tmp_path)
    assert (embeddings.num_rows, embeddings.width, embeddings.has_texts) == (12, 8, True)
    assert read_all(embeddings, embeddings.keys_of) == [f"0-{row}" for row in range(5)] + [
        f"2-{row}" for row in range(7)
    ]
    assert read_all(embeddings, embeddings.shards_of) == ["s0"] * 5 + ["s2"] * 7
    assert read_all(embeddings, embeddings.captions_of)[6] == "caption 1"
    images = embeddings.rows(Kind.IMAGES)
    assert images.shape == (12, 8)
    assert np.array_equal(images.read(0, 12), written["images"])
    assert np.array_equal(images.read(3, 9), written["images"][3:9])
    assert images.read(4, 4).shape == (0, 8)
    places = np.array([11, 0, 5, 4, 11])
    assert np.array_equal(embeddings.rows(Kind.TEXTS).take(places), written["texts"][places])
    blocks = list(images.blocks(5))
    assert [start for start, _ in blocks] == [0, 5, 10]
    assert np.array_equal(np.concatenate([rows for _, rows in blocks]), written["images"])
    assert np.shares_memory(images.read(5, 12), images.read(6, 12))  # views of what is held of the file
    assert sorted(path.name for path in (tmp_path / "metadata").iterdir())[0] == "metadata_0000.parquet"


def test_the_folder_is_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    expected = [each.content for each in open_embeddings(tmp_path).fingerprints([Kind.TEXTS])]
    monkeypatch.chdir(tmp_path)
    found = open_embeddings(Path("."))
    assert found.is_verified
    assert [each.path for each in found.fingerprints([Kind.TEXTS])] == ["img_emb", "metadata", "text_emb"]
    assert [each.content for each in found.fingerprints([Kind.TEXTS])] == expected
    shutil.copy("text_emb/text_emb_0002.npy", "text_emb/text_emb_0003.npy")
    with pytest.raises(ClipcidError, match=r"^text_emb/text_emb_0003.npy was added since manifest.parquet was written"):
        open_embeddings(Path("."))


def test_the_manifest_says_what_was_made_of_each_shard(tmp_path: Path) -> None:
    records = write_folder(tmp_path)["records"]
    table = pd.read_parquet(tmp_path / "manifest.parquet")
    assert [each["shard"] for each in table.input] == ["s0", "s1", "s2"]
    assert (table.read.tolist(), table.rows.tolist(), table.laid_on_white.tolist()) == ([6, 1, 8], [5, 0, 7], [0, 1, 2])
    assert table.skipped[2][0]["reason"] == "no_caption"
    assert table.skipped[2][0]["examples"].tolist() == ["2: x"]
    assert [each["img_emb"]["size"] for each in table.files] == [128 + 2 * 8 * size for size in SIZES]
    assert read_manifest(tmp_path, "") == records


def test_a_manifest_that_does_not_fit_its_files_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    table = pq.read_table(tmp_path / "manifest.parquet")
    place = table.column_names.index("rows")
    pq.write_table(table.set_column(place, "rows", pa.array([5, 0, 6])), tmp_path / "manifest.parquet")
    with pytest.raises(ClipcidError, match=r"manifest.parquet has changed since .*embed.json was written"):
        open_embeddings(tmp_path)
    write_sidecar(tmp_path)
    with pytest.raises(
        ClipcidError, match=r"manifest of embeddings: img_emb/img_emb_0002.npy of .* does not hold 6 rows"
    ):
        open_embeddings(tmp_path)


def test_a_damaged_sidecar_is_not_to_be_removed(tmp_path: Path) -> None:
    write_folder(tmp_path)
    sidecar = json.loads((tmp_path / "embed.json").read_text())
    for content in (
        {name: sidecar[name] for name in sidecar if name != "model"},
        [],
    ):  # without it they are another tool's
        (tmp_path / "embed.json").write_text(json.dumps(content))
        with pytest.raises(ClipcidError) as raised:
            open_embeddings(tmp_path)
        assert "Give the command that made it again, with --overwrite" in raised.value.fix


def test_records_of_shards_belong_to_a_plan(tmp_path: Path) -> None:
    writer = write_folder(tmp_path)["writer"]
    found = writer.read_record(2)
    assert (found.input.shard, found.read, found.rows, found.laid_on_white) == ("s2", 8, 7, 2)
    assert found.skipped == [Skipped("no_caption", 1, ["2: x"])]
    assert make_writer(tmp_path, {"other": True}).read_record(2) is None
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


@pytest.mark.parametrize("link", [True, False])
def test_finished_shards_are_taken_over_whatever_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: bool
) -> None:
    records = write_folder(tmp_path / "old")["records"]
    if not link:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    (tmp_path / "old" / "img_emb" / "img_emb_0001.npy").write_bytes(b"damaged")
    inputs = [FileRecord("new.tar", 1, "new", shard="new"), *(record.input for record in records)]
    writer = EmbeddingWriter(tmp_path / "new", {}, inputs)
    writer.take(tmp_path / "old", records)
    assert [writer.read_record(number) is not None for number in range(4)] == [False, True, False, True]
    rows = np.load(tmp_path / "new" / "img_emb" / "img_emb_0003.npy")
    assert np.array_equal(rows, np.load(tmp_path / "old" / "img_emb" / "img_emb_0002.npy"))
    assert (tmp_path / "new" / "img_emb" / "img_emb_0003.npy").stat().st_nlink == (2 if link else 1)


@pytest.mark.parametrize(
    "file", ["img_emb/img_emb_0000.npy", "text_emb/text_emb_0002.npy", "metadata/metadata_0002.parquet"]
)
def test_finished_files_that_were_replaced_are_refused(tmp_path: Path, file: str) -> None:
    write_folder(tmp_path)
    for name in ("img_emb", "text_emb", "metadata"):
        shutil.copytree(tmp_path / name, tmp_path / "copy" / name)
    for name in ("embed.json", "manifest.parquet"):
        shutil.copy(tmp_path / name, tmp_path / "copy")
    assert open_embeddings(tmp_path / "copy").is_verified
    changed = tmp_path / "copy" / file
    content = bytearray(changed.read_bytes())
    content[-9] ^= 1
    changed.write_bytes(content)
    with pytest.raises(ClipcidError, match=rf"{changed.name} has changed since .*manifest.parquet was written"):
        open_embeddings(tmp_path / "copy")
    changed.unlink()
    with pytest.raises(ClipcidError, match=rf"{changed.name} is missing"):
        open_embeddings(tmp_path / "copy")


def replace_file(path: Path, content: bytes) -> None:
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("file", ["img_emb/img_emb_0002.npy", "metadata/metadata_0002.parquet"])
def test_files_replaced_while_a_folder_is_in_use_are_refused(tmp_path: Path, file: str) -> None:
    write_folder(tmp_path / "first")
    write_folder(tmp_path / "other")
    embeddings = open_embeddings(tmp_path / "first")
    expected = embeddings.fingerprints([Kind.TEXTS])
    assert len(expected) == 3
    os.utime(tmp_path / "first" / file, ns=(0, 1))  # the same content at another time is the same file
    assert embeddings.fingerprints([Kind.TEXTS]) == expected
    embeddings = open_embeddings(tmp_path / "first")
    other = (tmp_path / "other" / file).read_bytes()[:-1] + b"?"  # of the same size
    replace_file(tmp_path / "first" / file, other)
    with pytest.raises(ClipcidError, match=rf"{file} has changed since .*manifest.parquet was written"):
        embeddings.fingerprints()
    if file.endswith(".npy"):
        with pytest.raises(ClipcidError, match="it was replaced after this run had begun"):
            embeddings.rows(Kind.IMAGES).read(5, 12)


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
    (tmp_path / "embed.json").unlink()
    for file, row, value in (("img_emb/img_emb_0000.npy", 1, np.nan), ("text_emb/text_emb_0002.npy", 3, 0)):
        rows = np.load(tmp_path / file)
        rows[row] = value
        np.save(tmp_path / file, rows)
    embeddings = open_embeddings(tmp_path)
    assert embeddings.find_bad_rows(texts=False).tolist() == [1]
    assert embeddings.find_bad_rows(texts=True).tolist() == [1, 8]


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
    assert read_all(embeddings, embeddings.keys_of)[18:22] == ["p/9a", "p/9b", "p/10a", "p/10b"]
    assert read_all(embeddings, embeddings.captions_of) == [""] * 22
    exact = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    whole = embeddings.rows(Kind.IMAGES).read(0, 22)
    assert np.array_equal(whole, exact.astype(np.float16))
    assert np.array_equal(embeddings.rows(Kind.IMAGES).take(np.arange(22)), whole)
    assert np.array_equal(np.concatenate([part for _, part in embeddings.rows(Kind.IMAGES).blocks(3)]), whole)
    with pytest.raises(ClipcidError, match="contains no text embeddings"):
        embeddings.rows(Kind.TEXTS)


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
    assert read_all(found, found.keys_of) == ["000020000", "000020001", "000110000", "000110001"]
    assert read_all(found, found.shards_of) == ["img_emb_02"] * 2 + ["img_emb_11"] * 2
    assert np.array_equal(found.rows(Kind.IMAGES).read(0, 4), found.rows(Kind.TEXTS).read(0, 4))
    assert np.array_equal(found.rows(Kind.IMAGES).read(0, 4), unit_rows(rows))


def test_without_keys_rows_are_named_by_file_and_place(tmp_path: Path) -> None:
    write_foreign(tmp_path, column=None)
    embeddings = open_embeddings(tmp_path)
    assert read_all(embeddings, embeddings.keys_of)[3] == "img_emb_1/1"
    assert open_embeddings(tmp_path / "img_emb").num_rows == 22


def test_the_numbers_in_names_of_bare_rows_say_nothing(tmp_path: Path) -> None:
    for name in ("train_1", "validation_01"):
        np.save(tmp_path / f"{name}.npy", make_rows(3))
    assert open_embeddings(tmp_path).num_rows == 6


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


def break_number(folder: Path) -> None:
    shutil.copy(folder / "metadata" / "metadata_3.parquet", folder / "metadata" / "metadata_0003.parquet")


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
        (break_number, "metadata_0003.parquet and metadata_3.parquet have the same number"),
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
    (tmp_path / "embed.json").write_text(json.dumps(make_sidecar(EmbedSidecar)))
    unfinish(tmp_path, "embed")
    with pytest.raises(ClipcidError, match="are unfinished"):
        open_embeddings(tmp_path)


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
        np.testing.assert_array_equal(open_embeddings(folder).rows(Kind.IMAGES).read(0, 700), unit_rows(rows))


def test_captions_that_are_wider_than_the_images_are_refused(tmp_path: Path) -> None:
    for kind, width in (("img_emb", 8), ("text_emb", 9)):
        (tmp_path / kind).mkdir()
        np.save(tmp_path / kind / f"{kind}_0.npy", make_rows(4, width))
    with pytest.raises(ClipcidError, match=r"text_emb_0\.npy has width 9, the image embeddings have 8"):
        open_embeddings(tmp_path)
