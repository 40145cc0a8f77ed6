"""Rows of many files, and files that are no rows."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_npy
from clipcid_cli.formats.embeddings import rows as rows_module
from clipcid_cli.formats.embeddings.folder import open_embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.rows import MAPS_KEPT, Rows, find_npy, unit_rows


@pytest.mark.parametrize(("count", "mapped"), [(1, False), (8_200, True)])
def test_many_files_take_few_descriptors_and_maps(tmp_path: Path, count: int, mapped: bool) -> None:
    """41,000 shards have more files than a process may have open, and more than the system's maps; small ones are read."""
    (tmp_path / "img_emb").mkdir()
    whole = np.random.default_rng(0).normal(size=(200 * count, 4))
    whole = (whole / np.linalg.norm(whole, axis=1, keepdims=True)).astype(np.float16)
    for number, part in enumerate(np.split(whole, 200)):
        np.save(tmp_path / "img_emb" / f"img_emb_{number}.npy", part)
    before = len(os.listdir("/proc/self/fd"))
    rows = open_embeddings(tmp_path).rows(Kind.IMAGES)
    order = np.random.default_rng(1).permutation(len(whole))[:1000]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + MAPS_KEPT + 32, hard))  # nor while it reads
    try:
        assert np.array_equal(rows.take(order), whole[order])
        assert np.array_equal(rows.read(0, len(whole)), whole)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(os.listdir("/proc/self/fd")) - before <= MAPS_KEPT
    assert MAPS_KEPT <= 128
    maps = Path("/proc/self/maps").read_text().count(str(tmp_path))
    assert (0 < maps <= MAPS_KEPT) if mapped else maps == 0


def test_a_file_that_was_replaced_is_not_taken_for_the_one_mapped_before(tmp_path: Path) -> None:
    (tmp_path / "img_emb").mkdir()
    path = tmp_path / "img_emb" / "img_emb_0.npy"
    for value in (1.0, -1.0):
        write_npy(path, np.full((3, 1), value, np.float16))
        assert open_embeddings(tmp_path).rows(Kind.IMAGES).read(0, 3).tolist() == [[value]] * 3


@pytest.mark.parametrize("array", [np.float16(1), np.ones(3, np.float16), np.ones((3, 0), np.float16)])
def test_arrays_that_are_no_rows_are_named(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ClipcidError, match=r"a\.npy holds float16|a\.npy .*float16"):
        open_embeddings(tmp_path)


@pytest.mark.parametrize("header", [b"{'descr': '<f2", b"{[]: 1}", b"", b"\0" * 20])
def test_a_damaged_header_is_one_error(tmp_path: Path, header: bytes) -> None:
    padded = header.ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded)
    with pytest.raises(ClipcidError, match="cannot be read"):
        open_embeddings(tmp_path)


def test_of_repaired_rows_only_those_of_the_stride_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    np.save(tmp_path / "rows.npy", unit_rows(random.normal(size=(50, 4))))
    image_map = np.round(random.normal(size=(4, 4)) * 2**16) / 2**16
    rows = Rows([find_npy(tmp_path / "rows.npy")], 4, as_stored=True, map_DD=image_map.astype(np.float32))
    whole = rows.read(0, 50)
    computed = list[int]()
    monkeypatch.setattr(rows_module, "unit_rows", lambda part: computed.append(len(part)) or unit_rows(part))
    for first, block in rows.blocks(size=20, stride=8):
        assert np.array_equal(block, whole[first : first + 20][::8])
    assert computed == [3, 3, 2]
