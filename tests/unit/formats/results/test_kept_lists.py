"""The keep list, in our form and those of other tools, and copied shards."""

from __future__ import annotations

import io
import mmap
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_tar
from uid_data import UIDS, datacomp_subset

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.tar_shards import TarShard
from clipcid_cli.formats.data.tars import copy_samples, count_samples
from clipcid_cli.formats.results.keep_list import (
    are_uids,
    is_uid,
    read_keep_list,
    write_keep_list,
    write_keys,
    write_uids,
)


def map_beyond_2_gib(folder: Path, text: bytes) -> pa.LargeStringArray:
    """Make strings of one letter that lie beyond the first 2 GiB of their column."""
    start = 2**31 + 5
    with open(folder / "text", "w+b") as file:  # sparse: it takes no room
        file.seek(start)
        file.write(text)
        file.flush()
        content = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    offsets = pa.py_buffer(np.arange(start, start + len(text) + 1, dtype=np.int64))
    return pa.LargeStringArray.from_buffers(len(text), offsets, content)


def test_a_keep_list_has_the_columns_of_the_contract_and_keys_of_any_size(tmp_path: Path) -> None:
    write_keep_list(
        tmp_path / "keep.parquet",
        keys=map_beyond_2_gib(tmp_path, b"abcd"),
        shards=pa.array(["s0", "s0", "s1", "s1"], pa.large_string()),
        labels=np.array([0, 1, 0, 0]),
        representatives=np.array([2, 1, 2, 2]),
        distances=np.array([0.5, 0, 0, 0.25], np.float32),
    )
    table = pq.read_table(tmp_path / "keep.parquet")
    assert table.to_pydict() == {
        "key": ["a", "b", "c", "d"],
        "shard": ["s0", "s0", "s1", "s1"],
        "component": [0, 1, 0, 0],
        "component_size": [3, 1, 3, 3],
        "kept": [False, True, True, False],
        "representative": ["c", "b", "c", "c"],
        "distance": [0.5, 0.0, 0.0, 0.25],
    }
    assert [*map(str, table.schema.types)] == ["string", "string", "int64", "int64", "bool", "string", "float"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (None, "There is no keep list"),
        ({"key": ["a"]}, "no column kept"),
        ({"key": ["a"], "kept": [1]}, "without true or false"),
        ({"key": ["a", None], "kept": [True, True]}, "rows without a `key`"),
    ],
)
def test_what_is_no_keep_list_is_refused(tmp_path: Path, columns: dict[str, Any] | None, message: str) -> None:
    if columns is not None:
        pq.write_table(pa.table(columns), tmp_path / "other.parquet")
    with pytest.raises(ClipcidError, match=message):
        read_keep_list(tmp_path / "other.parquet")


def write_odd_tar(path: Path, form: int) -> None:
    """Write samples with odd members: long names, a folder, a key that comes twice, a member without a suffix."""
    members = [("x/a.jpg", b"A" * 700), ("x/a.txt", b"first"), ("x/README", b"no suffix")]
    members += [(f"x/{'b' * 300}.jpg", b"B" * 512), ("c.jpg", b""), ("c.seg.png", b"C")]
    members += [("x/a.jpg", b"again"), ("d.jpg", b"D")]
    with tarfile.open(path, "w", format=form) as archive:
        folder = tarfile.TarInfo("x")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size, header.mtime, header.uname = len(data), 1_700_000_000, "jörg"
            archive.addfile(header, io.BytesIO(data))


def raw_bytes(path: Path, member: tarfile.TarInfo) -> bytes:
    """Return a member as it lies in the tar, with all its headers and its padding."""
    return path.read_bytes()[member.offset : member.offset_data + -(-member.size // 512) * 512]


@pytest.mark.parametrize("column", ["key", "shard", "kept"])
def test_a_damaged_column_that_reads_as_a_shorter_one_is_refused(tmp_path: Path, column: str) -> None:
    path, names = tmp_path / "keep.parquet", ["key", "shard", "kept"]
    table = pa.table({"key": ["a", "b"], "shard": ["s", "s"], "kept": [True, True]})
    pq.write_table(table, path, use_dictionary=False)
    start = pq.read_metadata(path).row_group(0).column(names.index(column)).data_page_offset
    content = bytearray(path.read_bytes())
    content[start + 1] = 2  # the page says that it is of an index, and is passed over
    path.write_bytes(content)
    with pytest.raises(ClipcidError, match=f"column {column} has 0 values for 2 rows"):
        read_keep_list(path).kept_of_shard("s")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_samples_are_copied_byte_for_byte(tmp_path: Path, form: int) -> None:
    source, target = tmp_path / "s.tar", tmp_path / "out" / "s.tar"
    write_odd_tar(source, form)
    assert copy_samples(source, target, {"x/a", "x/" + "b" * 300, "c", "elsewhere"}) == (3, 5)
    assert count_samples(source) == 5
    with tarfile.open(source) as before, tarfile.open(target) as after:
        old = {member.name: member for member in reversed(before.getmembers())}
        names = [member.name for member in after.getmembers()]
        assert names == ["x/a.jpg", "x/a.txt", "x/" + "b" * 300 + ".jpg", "c.jpg", "c.seg.png"]
        for member in after.getmembers():
            assert raw_bytes(target, member) == raw_bytes(source, old[member.name])
    assert target.stat().st_size % 10240 == 0
    assert [sample.key for sample in TarShard("s", str(target)).samples()] == ["x/a", "x/" + "b" * 300, "c"]
    write_tar(source, [("0.jpg", b""), ("1.txt", b""), ("2.png", b""), ("3.json", b"")])
    assert count_samples(source) == 4
    assert TarShard("s", str(source)).estimate_samples() == 2, "those with an image"


def test_uids_are_what_datacomp_makes_of_them_each_once(tmp_path: Path) -> None:
    uids = [*UIDS[:9], "F" * 32, "0" * 32, "0" * 16 + "f" * 16, UIDS[3].upper()]
    column = pa.chunked_array([uids[:4], uids[4:]], type=pa.large_string())
    assert are_uids(column).all()
    assert write_uids(tmp_path / "s.npy", [column[:5], column[5:]], len(column), overwrite=False) == 12
    found, expected = np.load(tmp_path / "s.npy", mmap_mode="r"), datacomp_subset(uids[:-1])
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)
    assert write_uids(tmp_path / "none.npy", [], 0, overwrite=False) == len(np.load(tmp_path / "none.npy")) == 0
    others = ["", "a" * 31, "a" * 33, "g" * 32, "a" * 32 + "\n"]
    assert not are_uids(pa.chunked_array([others])).any()
    assert not any(map(is_uid, [*others, 3, None]))


def test_a_file_of_other_content_is_replaced_only_when_asked_for(tmp_path: Path) -> None:
    path, keys = tmp_path / "new" / "keys.txt", pa.chunked_array([["a/1", "b c", "ü"]])
    for _ in range(2):
        write_keys(path, keys.chunks, overwrite=False)
    with pytest.raises(ClipcidError, match="already exists with other content"):
        write_keys(path, keys[:2].chunks, overwrite=False)
    assert path.read_text(encoding="utf-8") == "a/1\nb c\nü\n"
    write_keys(path, keys[:2].chunks, overwrite=True)
    assert path.read_text(encoding="utf-8") == "a/1\nb c\n"
    with pytest.raises(ClipcidError, match="contains a line break"):
        write_keys(tmp_path / "b.txt", [pa.array(["a", "b\nc"])], overwrite=False)
    with pytest.raises(ClipcidError, match="already exists with other content"):
        write_keys(tmp_path, keys.chunks, overwrite=True)
