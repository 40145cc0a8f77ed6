"""Parquet files whose texts would fill the memory: refused where these are read, and no time is spent where they are not."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats import parquet
from clipcid_cli.formats.parquet import read_first_column


def test_only_texts_that_are_read_are_looked_through_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_MOST_EXPANDED", 1_000_000)
    keys = [f"{row:06d}" for row in range(2_000)]
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"key": keys, "caption": ["x" * 100_000] * 2_000}), path)
    column = read_first_column(path, ("key", "name"), pa.large_string(), "")
    assert column is not None
    assert column.to_pylist() == keys
    with pytest.raises(ClipcidError, match=r"texts of its column caption would take [0-9,]+ bytes of memory"):
        read_first_column(path, ("caption",), pa.large_string(), "")
