"""Strings on the disk are those that were given, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from clipcid_cli.formats.mapped_strings import map_strings


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["a", "", "ü b", "c" * 3000]])
def test_strings_come_back_from_the_disk(tmp_path: Path, texts: list[str]) -> None:
    sliced = pa.array(["before", *texts, "after"]).slice(1, len(texts))
    found = map_strings(tmp_path / "new", [sliced, pa.array([], pa.large_string()), pa.array(texts, pa.large_string())])
    found.validate(full=True)
    assert found.to_pylist() == texts * 2
    assert list((tmp_path / "new").iterdir()) == []
