"""Parquet files of other writers."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.formats.parquet import read_first_column, replace_invalid


def test_strings_that_are_not_utf_8_are_read_with_a_mark_in_their_place(tmp_path: Path) -> None:
    binary = pa.array([b"cat\xe9", b"dog"], pa.binary())
    broken = pa.StringArray.from_buffers(2, *binary.buffers()[1:])
    pq.write_table(pa.table({"caption": broken}), tmp_path / "a.parquet")
    column = read_first_column(tmp_path / "a.parquet", ["caption"], pa.large_string(), "")
    assert column is not None
    assert replace_invalid(column).to_pylist() == ["cat\ufffd", "dog"]
    whole = pa.chunked_array([["cat", "\u00fc"]], pa.large_string())
    assert replace_invalid(whole) is whole
