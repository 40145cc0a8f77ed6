"""A file is hashed once: its fingerprint is remembered until its size or time changes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from clipcid_cli.formats.fingerprints import FingerprintCache

from clipcid_cli.formats import fingerprints
from clipcid_cli.formats.output import fingerprint_file


def test_a_file_is_hashed_again_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_text(f"content of {file.name}")
    expected = [fingerprint_file(file) for file in files]
    first = FingerprintCache(tmp_path / "table")
    assert [first(file) for file in files] == expected
    first.save()

    hashed: list[Path] = []
    monkeypatch.setattr(fingerprints, "fingerprint_file", lambda path: hashed.append(path) or fingerprint_file(path))
    again = FingerprintCache(tmp_path / "table")
    assert [again(file) for file in files] == expected
    assert hashed == []
    files[1].write_text("content of c")  # as long as before
    os.utime(files[1], ns=(1, 1))
    assert again(files[1]) == fingerprint_file(files[1]) != expected[1]
    assert hashed == [files[1]]


@pytest.mark.parametrize("content", [b"", b"PAR1 is not all", b"\0" * 100])
def test_a_damaged_table_only_costs_time(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "table").write_bytes(content)
    (tmp_path / "a").write_text("a")
    cache = FingerprintCache(tmp_path / "table")
    assert cache(tmp_path / "a") == fingerprint_file(tmp_path / "a")
    cache.save()
    assert FingerprintCache(tmp_path / "table")(tmp_path / "a") == fingerprint_file(tmp_path / "a")


def test_what_killed_runs_left_is_removed_whatever_the_clock_says(tmp_path: Path) -> None:
    left = tmp_path / ".table.1234.partial"
    left.write_bytes(b"PAR1 half")
    os.utime(left, (time.time() + 366 * 86400,) * 2)
    (tmp_path / "a").write_text("a")
    cache = FingerprintCache(tmp_path / "table")
    cache(tmp_path / "a")
    cache.save()
    assert sorted(os.listdir(tmp_path)) == ["a", "table"]


def test_nothing_new_writes_nothing(tmp_path: Path) -> None:
    FingerprintCache(tmp_path / "table").save()
    assert list(tmp_path.iterdir()) == []


def test_a_table_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "file").write_text("in the way of a folder")
    cache = FingerprintCache(tmp_path / "file" / "table")
    assert cache(tmp_path / "a") == fingerprint_file(tmp_path / "a")
    cache.save()
