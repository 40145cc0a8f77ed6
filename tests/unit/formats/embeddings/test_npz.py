"""Folders of ``.npz`` as DataComp's metadata have them: which array, mapped where it lies, keys from the parquet beside."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from uid_data import make_uid

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings import folder as embeddings_file
from clipcid_cli.formats.embeddings.folder import EmbeddingFile, Embeddings, open_embeddings
from clipcid_cli.formats.embeddings.rows import Kind, find_member, unit_rows

RANDOM = np.random.default_rng(0)


def write_datacomp(folder: Path, save: Any = np.savez, sizes: tuple[int, ...] = (5, 0, 7)) -> dict[str, np.ndarray]:
    """Write what DataComp's metadata hold: arrays of two models, float16, not quite unit; returns all rows of each."""
    folder.mkdir(parents=True)
    widths = {"b32_img": 8, "b32_txt": 8, "l14_img": 12, "l14_txt": 12, "dedup": 6}
    whole: dict[str, list[np.ndarray]] = {name: [] for name in widths}
    for number, size in enumerate(sizes):
        arrays = {name: (3 * RANDOM.normal(size=(size, width))).astype(np.float16) for name, width in widths.items()}
        stem = f"{number}{make_uid(number)[1:]}"
        save(folder / f"{stem}.npz", **arrays)
        uids = [make_uid(100 * number + row) for row in range(size)]
        texts = [f"caption {uid[:4]}" for uid in uids]
        frame = pd.DataFrame(
            {"uid": uids, "url": "http://x/y.jpg", "text": texts, "original_width": 640, "sha256": uids}
        )
        frame.to_parquet(folder / f"{stem}.parquet")
        for name, rows in arrays.items():
            whole[name].append(rows)
    return {name: np.concatenate(parts) for name, parts in whole.items()}


def read_all(embeddings: Embeddings, read: Callable[[EmbeddingFile], pa.ChunkedArray]) -> list[str]:
    return [text for file in embeddings.files for text in read(file).to_pylist()]


def test_arrays_are_mapped_where_they_lie_and_keyed_by_uid(tmp_path: Path) -> None:
    whole = write_datacomp(tmp_path / "small")
    found = open_embeddings(tmp_path / "small", npz_array="l14_img")
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
    assert open_embeddings(tmp_path / "above", npz_array="b32_img").width == 8


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
        part = open_embeddings(tmp_path, npz_array=name).rows(Kind.IMAGES).read(2, 7)
        assert np.array_equal(part, rows[2:7])
        assert part.flags.aligned
        assert part.flags.c_contiguous
    mapped = find_member(tmp_path / "a.npz", "b32_img").map()
    assert isinstance(mapped, np.memmap)
    assert mapped.ctypes.data % 2 == 1


def test_compressed_arrays_are_unpacked_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_datacomp(tmp_path / "c", np.savez_compressed)
    found = open_embeddings(tmp_path / "c", npz_array="b32_img")
    assert np.array_equal(found.rows(Kind.IMAGES).read(2, 9), unit_rows(whole["b32_img"])[2:9])
    monkeypatch.setattr(embeddings_file, "MAX_UNPACKED", 500)
    with pytest.raises(ClipcidError, match="are compressed, so that they cannot be mapped") as refused:
        found.rows(Kind.IMAGES)
    assert "numpy.savez" in refused.value.fix


def the_last(folder: Path, form: str = "npz") -> Path:
    return next(folder.glob(f"2*.{form}"))


def write_no_array(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("l14_img.npy", b"nothing of numpy's")


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (lambda folder: None, None, "contains 2 arrays of image embeddings: b32_img, l14_img"),
        (
            lambda folder: None,
            "h14_img",
            "contains no array h14_img; its arrays: b32_img, b32_txt, l14_img, l14_txt, dedup",
        ),
        (lambda folder: the_last(folder).write_bytes(b"PK"), "l14_img", "cannot be read"),
        (lambda folder: np.savez(the_last(folder), l14_img=np.array([{}], object)), "l14_img", "holds Python objects"),
        (
            lambda folder: np.savez(the_last(folder), l14_img=np.ones((6, 12)), l14_txt=np.ones((6, 12))),
            "l14_img",
            r"l14_img\] has 6 rows and .*parquet has 7",
        ),
        (lambda folder: the_last(folder, "parquet").unlink(), "l14_img", "has no metadata of the same name"),
        (lambda folder: np.savez(the_last(folder), b32_img=np.ones((7, 12))), "l14_img", "contains no array l14_img"),
        (lambda folder: write_no_array(the_last(folder)), "l14_img", "cannot be read as an .npz with an array l14_img"),
    ],
)
def test_what_cannot_be_read_is_one_error(damage: Any, name: str | None, message: str, tmp_path: Path) -> None:
    write_datacomp(tmp_path / "d")
    damage(tmp_path / "d")
    with pytest.raises(ClipcidError, match=message):
        open_embeddings(tmp_path / "d", npz_array=name)
