"""The keep list in the forms of other tools: DataComp's subset and a list of keys."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from uid_data import UIDS, datacomp_subset

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.keep_list import are_uids, is_uid, write_keys, write_uids


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
