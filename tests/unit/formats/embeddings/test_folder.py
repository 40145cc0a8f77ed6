"""Folders of embeddings, ours and other tools', and of DataComp's archives."""

from __future__ import annotations

import json
import os
import resource
import shutil
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from balance_data import write_embeddings
from conftest import limited
from sidecars import make_sidecar, unfinish
from uid_data import make_uid

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings import foreign
from clipcid_cli.formats.embeddings.folder import EmbeddingFile, Embeddings, open_embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.rows import MAPS_KEPT, find_member, find_npy, holds_unit_rows, unit_rows
from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter, ShardRows
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.skips import Skips

RANDOM = np.random.default_rng(0)
SIZES = (5, 0, 7)


def make_rows(count: int, width: int = 8) -> npt.NDArray[np.float16]:
    return unit_rows(RANDOM.normal(size=(count, width)))


def write_folder(folder: Path) -> dict[str, Any]:
    """Write three shards as `embed` does, the middle one without a row."""
    inputs = [FileRecord(f"s{number}.tar", size, f"h{number}", shard=f"s{number}") for number, size in enumerate(SIZES)]
    writer = EmbeddingWriter(folder, {}, inputs)
    images, captions = [make_rows(size) for size in SIZES], [make_rows(size) for size in SIZES]
    for number, size in enumerate(SIZES):
        skips = Skips()
        skips.add("no_caption", f"{number}: x")
        keys, words = [f"{number}-{row}" for row in range(size)], [f"caption {row}" for row in range(size)]
        rows = {Kind.IMAGES: images[number], Kind.TEXTS: captions[number]}
        writer.write(number, ShardRows(size + 1, skips, {"laid_on_white": number}, keys, words, None, rows))
    writer.finish()
    write_sidecar(folder)
    return {"images": np.concatenate(images), "texts": np.concatenate(captions)}


def write_sidecar(folder: Path) -> None:
    outputs = [msgspec.to_builtins(record(folder / "manifest.parquet", folder))]
    (folder / "embed.json").write_text(json.dumps(make_sidecar(EmbedSidecar, outputs=outputs)))


def write_skipping(folder: Path, shards: Sequence[int], order: Iterable[int]) -> EmbeddingWriter:
    """Write shards in some order, of which those of odd numbers skip as many samples as their number."""
    writer = EmbeddingWriter(folder, {}, [FileRecord(f"{n}.tar", n, f"h{n}", shard=f"s{n}") for n in shards])
    for place in order:
        shard = shards[place]
        listed = [(f"{number}", f"s{shard}", "no_image") for number in range(shard if shard % 2 else 0)]
        skips = Skips({"no_image": len(listed)} if listed else {}, listed=listed)
        rows = {Kind.IMAGES: make_rows(1)}
        writer.write(place, ShardRows(1 + skips.total, skips, {"laid_on_white": 0}, ["a"], [""], None, rows))
    return writer


def test_all_that_was_skipped_is_listed_whoever_wrote_it_and_whenever(tmp_path: Path) -> None:
    expected = [(f"{number}", f"s{shard}", "no_image") for shard in (1, 3, 5) for number in range(shard)]
    for name, order in (("whole", range(6)), ("other", (5, 3, 4, 0, 2, 1))):
        write_skipping(tmp_path / name, range(6), order).finish()
        listed = pq.read_table(tmp_path / name / "skipped.parquet").to_pylist()
        assert [tuple(row.values()) for row in listed] == expected
    whole = (tmp_path / "whole" / "skipped.parquet").read_bytes()
    assert (tmp_path / "other" / "skipped.parquet").read_bytes() == whole
    # Killed between the list of a shard and its record; then with lists that are gone or edited: they are not finished.
    killed = write_skipping(tmp_path / "killed", range(6), range(6))
    (tmp_path / "killed/.shards/0005.json").unlink()
    (tmp_path / "killed/.shards/0003.skipped.parquet").unlink()
    shutil.copy(tmp_path / "killed/.shards/0005.skipped.parquet", tmp_path / "killed/.shards/0001.skipped.parquet")
    assert [number for number in range(6) if killed.finished_record(number) is None] == [1, 3, 5]
    write_skipping(tmp_path / "killed", range(6), (1, 3, 5)).finish()
    assert (tmp_path / "killed" / "skipped.parquet").read_bytes() == whole
    # Data that grew takes over the lists, unless they are missing.
    part = write_skipping(tmp_path / "part", (1, 2, 5), range(3)).finish()
    grown = write_skipping(tmp_path / "grown", range(6), (0, 3, 4))
    grown.take(tmp_path / "part", part)
    assert all(grown.finished_record(number) is not None for number in range(6))
    grown.finish()
    assert (tmp_path / "grown" / "skipped.parquet").read_bytes() == whole
    (tmp_path / "part" / "skipped.parquet").unlink()
    anew = write_skipping(tmp_path / "anew", range(6), ())
    anew.take(tmp_path / "part", part)
    assert [number for number in range(6) if anew.finished_record(number) is not None] == [2]
    # None skipped: no file, also where there was one.
    write_skipping(tmp_path / "whole", (2, 4), range(2)).finish()
    assert not (tmp_path / "whole" / "skipped.parquet").exists()


def test_a_finished_folder_gives_its_shards_in_place_of_other_ones_that_a_killed_run_wrote(tmp_path: Path) -> None:
    finished = write_skipping(tmp_path / "finished", (1, 2), range(2)).finish()
    write_skipping(tmp_path / "work", (1, 3, 4), (1, 2))  # with other data: its shards 1 and 2
    (tmp_path / "work/.shards/0000.json").write_text('{"torn')
    shifted = write_skipping(tmp_path / "work", (2, 1, 4), ())
    assert shifted.estimate_done(finished) == [0, 1, 2]
    shifted.take(tmp_path / "finished", finished)
    assert [index for index in range(3) if shifted.finished_record(index) is not None] == [0, 1, 2]
    listed = shifted.finish()
    assert [record.input.shard for record in listed] == ["s2", "s1", "s4"]
    assert len(pq.read_table(tmp_path / "work" / "skipped.parquet")) == 1


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
    assert found.sidecar is not None
    assert [each.path for each in found.fingerprints([Kind.TEXTS])] == ["img_emb", "metadata", "text_emb"]
    assert [each.content for each in found.fingerprints([Kind.TEXTS])] == expected
    shutil.copy("text_emb/text_emb_0002.npy", "text_emb/text_emb_0003.npy")
    with pytest.raises(ClipcidError, match=r"^text_emb/text_emb_0003.npy was added since manifest.parquet was written"):
        open_embeddings(Path("."))


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


def write_foreign(folder: Path) -> npt.NDArray[np.float32]:
    """Write what clip-retrieval and others do: float32, not unit, numbers without leading zeros, 11 files."""
    rows = RANDOM.normal(size=(22, 6)).astype(np.float32) * 3
    write_embeddings(folder, rows, 11, keys=[f"p/{number}{place}" for number in range(11) for place in "ab"])
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


def test_unit_rows_in_float16_keep_their_bits() -> None:
    rows = make_rows(50, 512)
    assert np.array_equal(unit_rows(rows), rows)
    assert not np.array_equal(unit_rows((rows * 1.5).astype(np.float16)), rows * 1.5)
    bad = np.array([[0, 0], [np.nan, 1], [np.inf, 1], [3, 4]], dtype=np.float32)
    assert np.isnan(unit_rows(bad)[:3]).all()
    assert unit_rows(bad)[3].tolist() == [np.float16(0.6), np.float16(0.8)]


def test_unfinished_embeddings_are_refused_and_a_damaged_sidecar_is_not_to_be_removed(tmp_path: Path) -> None:
    for folder in (tmp_path / "unfinished", tmp_path / "damaged"):
        write_folder(folder)
    unfinish(tmp_path / "unfinished", "embed")
    with pytest.raises(ClipcidError, match="are unfinished"):
        open_embeddings(tmp_path / "unfinished")
    (tmp_path / "damaged" / "embed.json").write_text("[]")  # without it they are another tool's
    with pytest.raises(ClipcidError) as raised:
        open_embeddings(tmp_path / "damaged")
    assert "Run embed again with --overwrite" in raised.value.fix


def replace_file(path: Path, content: bytes) -> None:
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("rows", [3, 2**14])
def test_rows_replaced_after_a_run_has_begun_are_refused(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.ones((rows, 4), np.float16))
    found, content, stat = find_npy(path), path.read_bytes(), path.stat()
    assert found.map().shape == (rows, 4)
    replace_file(path, content[:-1] + b"?")
    with pytest.raises(ClipcidError, match="it was replaced after this run had begun"):
        found.map()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # still another file
    with pytest.raises(ClipcidError, match="it was replaced after this run had begun"):
        found.map()


@pytest.mark.parametrize(
    ("columns", "keys"),
    [
        ({"image_path": ["1a", "1b"], "key": ["0", "1"], "uid": ["2", "3"]}, ["0", "1"]),  # img2dataset's
        ({"image_path": ["1a", "1b"], "uid": ["2", "3"]}, ["1a", "1b"]),
        ({"uid": ["2", "3"]}, ["2", "3"]),
        ({"width": [1, 2]}, ["img_emb_01/0", "img_emb_01/1"]),
    ],
)
def test_keys_are_those_of_the_first_column_that_tells(tmp_path: Path, columns: Any, keys: list[str]) -> None:
    for kind in ("img_emb", "text_emb", "metadata"):
        (tmp_path / kind).mkdir()
    rows = RANDOM.normal(size=(2, 6)).astype(np.float16)
    np.save(tmp_path / "img_emb" / "img_emb_01.npy", rows)
    np.save(tmp_path / "text_emb" / "text_emb_01.npy", rows.astype(np.float32))
    pq.write_table(pa.table(columns), tmp_path / "metadata" / "metadata_01.parquet")
    found = open_embeddings(tmp_path)
    assert read_all(found, found.keys_of) == keys
    assert read_all(found, found.shards_of) == ["img_emb_01"] * 2
    assert (found.has_texts, found.has_uids) == (True, "uid" in columns)
    assert np.array_equal(found.rows(Kind.TEXTS).read(0, 2), unit_rows(rows))


def test_captions_that_are_not_utf_8_have_a_mark_in_their_place(tmp_path: Path) -> None:
    write_foreign(tmp_path)
    binary = pa.array([b"cat\xe9", b"dog"], pa.binary())
    broken = pa.StringArray.from_buffers(2, *binary.buffers()[1:])
    pq.write_table(pa.table({"key": ["a", "b"], "caption": broken}), tmp_path / "metadata" / "metadata_0.parquet")
    found = open_embeddings(tmp_path)
    assert found.captions_of(found.files[0]).to_pylist() == ["cat\ufffd", "dog"]


def test_rows_of_other_tools_are_normalised_only_where_they_need_it(tmp_path: Path) -> None:
    unit = make_rows(700)
    for name in ("train_1", "validation_01"):
        np.save(tmp_path / f"{name}.npy", unit)
    assert open_embeddings(tmp_path).num_rows == 1400, "the numbers in names of bare rows say nothing"
    for path in tmp_path.iterdir():
        path.unlink()
    assert holds_unit_rows(unit)
    assert not holds_unit_rows(unit.astype(np.float32))
    for row, factor in ((3, 1.5), (600, np.nan), (600, 0)):
        rows = unit.copy()
        rows[row] *= np.float16(factor)
        assert not holds_unit_rows(rows)
        np.save(tmp_path / "0.npy", rows)
        np.testing.assert_array_equal(open_embeddings(tmp_path).rows(Kind.IMAGES).read(0, 700), unit_rows(rows))


IMAGES, METADATA = Path("img_emb/img_emb_3.npy"), Path("metadata/metadata_3.parquet")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, 7), np.float16), "img_emb_3.npy has width 7, the files before it 6"),
        (np.ones((3, 6), np.float16), "img_emb_3.npy has 3 rows and .*metadata_3.parquet has 2"),
        (np.ones((2, 6), np.int64), r"holds int64 \[2, 6\], not rows of floating-point numbers"),
        (np.ones(3, np.float16), r"holds float16 \[3\]"),
        (np.array([{"a": 1}], dtype=object), "img_emb_3.npy cannot be read"),
    ],
)
def test_arrays_that_do_not_belong_to_the_others_are_refused(tmp_path: Path, array: Any, message: str) -> None:
    write_foreign(tmp_path)
    np.save(tmp_path / IMAGES, array, allow_pickle=True)
    with pytest.raises(ClipcidError, match=message):
        open_embeddings(tmp_path)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_foreign(tmp_path)
    shutil.copy(tmp_path / METADATA, tmp_path / "metadata" / "metadata_0003.parquet")
    with pytest.raises(ClipcidError, match=r"metadata_0003\.parquet and metadata_3.parquet have the same number"):
        open_embeddings(tmp_path)
    (tmp_path / "metadata" / "metadata_0003.parquet").unlink()
    (tmp_path / METADATA).unlink()
    with pytest.raises(ClipcidError, match=r"img_emb_3\.npy has no metadata of the same number"):
        open_embeddings(tmp_path)
    shutil.rmtree(tmp_path / "metadata")
    (tmp_path / "text_emb").mkdir()
    for number in range(11):
        np.save(tmp_path / "text_emb" / f"text_emb_{number}.npy", make_rows(2, 9))
    with pytest.raises(ClipcidError, match=r"text_emb_0\.npy has width 9, the image embeddings have 6"):
        open_embeddings(tmp_path)


@pytest.mark.parametrize("counts", [[0, 3], [1, 3]])
def test_captions_that_are_counted_otherwise_than_embedded_are_refused(tmp_path: Path, counts: list[int]) -> None:
    for kind, rows in (("img_emb", 2), ("text_emb", 2), ("captions_emb", 1)):
        (tmp_path / kind).mkdir()
        np.save(tmp_path / kind / f"{kind}_0.npy", make_rows(rows))
    (tmp_path / "metadata").mkdir()
    pq.write_table(pa.table({"key": ["a", "b"], "captions": counts}), tmp_path / "metadata" / "metadata_0.parquet")
    found = open_embeddings(tmp_path)
    with pytest.raises(ClipcidError, match=r"captions_emb_0\.npy has 1 rows; .* captions after the first"):
        found.counts_of(found.files[0])


@pytest.mark.parametrize(("count", "mapped"), [(1, False), (8_200, True)])
def test_many_files_take_few_descriptors_and_maps(tmp_path: Path, count: int, mapped: bool) -> None:
    """41,000 shards have more files than a process may have open, and more than the system's maps; small ones are read."""
    (tmp_path / "img_emb").mkdir()
    whole = unit_rows(RANDOM.normal(size=(200 * count, 4)))
    for number, part in enumerate(np.split(whole, 200)):
        np.save(tmp_path / "img_emb" / f"img_emb_{number}.npy", part)
    before = len(os.listdir("/proc/self/fd"))
    rows = open_embeddings(tmp_path).rows(Kind.IMAGES)
    order = RANDOM.permutation(len(whole))[:1000]
    with limited(resource.RLIMIT_NOFILE, before + MAPS_KEPT + 32):  # nor while it reads
        assert np.array_equal(rows.take(order), whole[order])
        assert np.array_equal(rows.read(0, len(whole)), whole)
    assert len(os.listdir("/proc/self/fd")) - before <= MAPS_KEPT <= 128
    maps = Path("/proc/self/maps").read_text().count(str(tmp_path))
    assert (0 < maps <= MAPS_KEPT) if mapped else maps == 0


@pytest.mark.parametrize(("shards", "number"), [(10_000, "0000"), (10_001, "00000")])
def test_numbers_of_files_have_at_least_four_digits(tmp_path: Path, shards: int, number: str) -> None:
    inputs = [FileRecord(f"{shard}.tar", 1, "blake2b:00", shard=str(shard)) for shard in range(shards)]
    rows = {Kind.IMAGES: np.zeros((1, 4), np.float16)}
    EmbeddingWriter(tmp_path, {}, inputs).write(0, ShardRows(1, Skips(), {"laid_on_white": 0}, ["a"], [""], None, rows))
    assert (tmp_path / f"img_emb/img_emb_{number}.npy").is_file()
    assert (tmp_path / f"metadata/metadata_{number}.parquet").is_file()


def write_datacomp(folder: Path, save: Any = np.savez) -> dict[str, np.ndarray]:
    """Write what DataComp's metadata hold: arrays of two models, float16, not quite unit; returns all rows of each."""
    folder.mkdir(parents=True)
    widths = {"b32_img": 8, "b32_txt": 8, "l14_img": 12, "l14_txt": 12, "dedup": 6}
    whole: dict[str, list[np.ndarray]] = {name: [] for name in widths}
    for number, size in enumerate(SIZES):
        arrays = {name: (3 * RANDOM.normal(size=(size, width))).astype(np.float16) for name, width in widths.items()}
        stem = f"{number}{make_uid(number)[1:]}"
        save(folder / f"{stem}.npz", **arrays)
        uids = [make_uid(100 * number + row) for row in range(size)]
        texts = [f"caption {uid[:4]}" for uid in uids]
        columns = {"uid": uids, "url": "http://x/y.jpg", "text": texts, "original_width": 640, "sha256": uids}
        pd.DataFrame(columns).to_parquet(folder / f"{stem}.parquet")
        for name, rows in arrays.items():
            whole[name].append(rows)
    return {name: np.concatenate(parts) for name, parts in whole.items()}


def test_arrays_are_mapped_where_they_lie_and_keyed_by_uid(tmp_path: Path) -> None:
    whole = write_datacomp(tmp_path / "small")
    found = open_embeddings(tmp_path / "small", array="l14_img")
    assert (found.num_rows, found.width, found.has_texts, found.sidecar) == (12, 12, True, None)
    assert np.array_equal(found.rows(Kind.IMAGES).read(0, 12), unit_rows(whole["l14_img"]))
    assert np.array_equal(found.rows(Kind.TEXTS).take(np.array([11, 3])), unit_rows(whole["l14_txt"])[[11, 3]])
    assert read_all(found, found.keys_of) == [make_uid(n) for n in [*range(5), *range(200, 207)]]
    assert read_all(found, found.captions_of)[5] == f"caption {make_uid(200)[:4]}"
    assert read_all(found, found.shards_of)[11] == f"2{make_uid(2)[1:]}"
    path = next((tmp_path / "small").glob("0*.npz"))
    array = find_member(path, "b32_img")
    assert array.unpacked == 0
    # What tells one array from another is its content, by the archive's own checksum.
    assert array.hash != find_member(path, "b32_txt").hash
    assert [each.path for each in found.fingerprints()] == [f"{path.parent}[l14_img]", str(path.parent)]
    assert found.contents(Kind.IMAGES)[0].path == f"{path}[l14_img]"

    # The largest pool has its files in folders of their own.
    (tmp_path / "small").rename(tmp_path / "xlarge")
    (tmp_path / "above").mkdir()
    (tmp_path / "xlarge").rename(tmp_path / "above" / "part-0")
    assert open_embeddings(tmp_path / "above", array="b32_img").width == 8


def test_the_only_array_of_images_is_taken_and_an_empty_or_columnwise_one_read(tmp_path: Path) -> None:
    rows = np.asfortranarray(RANDOM.normal(size=(4, 6)))
    np.savez(tmp_path / "a.npz", img=rows, a_img=rows, a_txt=rows)
    found = open_embeddings(tmp_path)
    assert np.array_equal(found.rows(Kind.IMAGES).read(0, 4), unit_rows(rows))
    assert found.has_texts
    assert read_all(found, found.keys_of) == ["a/0", "a/1", "a/2", "a/3"]


def test_unit_rows_that_begin_at_an_odd_byte_are_read_as_any_others(tmp_path: Path) -> None:
    rows = unit_rows(RANDOM.normal(size=(9_000, 8)))
    np.savez(tmp_path / "a.npz", b32_img=rows, by_column_img=np.asfortranarray(rows))
    for name in ("b32_img", "by_column_img"):
        part = open_embeddings(tmp_path, array=name).rows(Kind.IMAGES).read(2, 7)
        assert np.array_equal(part, rows[2:7])
        assert part.flags.aligned
        assert part.flags.c_contiguous
    mapped = find_member(tmp_path / "a.npz", "b32_img").map()
    assert isinstance(mapped, np.memmap)
    assert mapped.ctypes.data % 2 == 1


def test_compressed_arrays_are_unpacked_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_datacomp(tmp_path / "c", np.savez_compressed)
    found = open_embeddings(tmp_path / "c", array="b32_img")
    assert np.array_equal(found.rows(Kind.IMAGES).read(2, 9), unit_rows(whole["b32_img"])[2:9])
    monkeypatch.setattr(foreign, "MAX_UNPACKED", 500)
    with pytest.raises(ClipcidError, match="are compressed, so that they cannot be mapped") as refused:
        found.rows(Kind.IMAGES)
    assert "numpy.savez" in refused.value.fix


def write_no_array(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("l14_img.npy", b"nothing of numpy's")


def test_archives_of_several_models_need_the_name_of_an_array(tmp_path: Path) -> None:
    write_datacomp(tmp_path / "d")
    with pytest.raises(ClipcidError, match="contains 2 arrays of image embeddings: b32_img, l14_img"):
        open_embeddings(tmp_path / "d")
    arrays = "b32_img, b32_txt, l14_img, l14_txt, dedup"
    with pytest.raises(ClipcidError, match=f"contains no array h14_img; its arrays: {arrays}"):
        open_embeddings(tmp_path / "d", array="h14_img")


SIX = np.ones((6, 12))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda last: last.write_bytes(b"PK"), "cannot be read"),
        (lambda last: np.savez(last, l14_img=np.array([{}], object)), "holds Python objects"),
        (lambda last: np.savez(last, l14_img=SIX, l14_txt=SIX), r"l14_img\] has 6 rows and .*parquet has 7"),
        (lambda last: last.with_suffix(".parquet").unlink(), "has no metadata of the same name"),
        (lambda last: np.savez(last, b32_img=np.ones((7, 12))), "contains no array l14_img"),
        (write_no_array, "cannot be read as an .npz with an array l14_img"),
    ],
)
def test_archives_that_cannot_be_read_are_one_error(damage: Any, message: str, tmp_path: Path) -> None:
    write_datacomp(tmp_path / "d")
    damage(next((tmp_path / "d").glob("2*.npz")))
    with pytest.raises(ClipcidError, match=message):
        open_embeddings(tmp_path / "d", array="l14_img")
