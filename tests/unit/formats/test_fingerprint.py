"""By which rule a file is still the one it was, and that it is hashed once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from clipcid_cli.formats import fingerprint
from clipcid_cli.formats.fingerprint import Memo, find_changed, record


def test_large_files_are_told_apart_by_their_middle(tmp_path: Path) -> None:
    size = 70 * 2**20
    path = tmp_path / "large.tar"
    with path.open("wb") as file:
        file.truncate(size)
    before = record(path)
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"x")
    assert before.hash.startswith("blake2b-sampled:")
    assert before.hash != record(path).hash


def test_a_file_is_hashed_again_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_text(f"content of {file.name}")
    expected = [record(file) for file in files]
    first = Memo(tmp_path / "table")
    assert first.record_all(files) == expected
    first.save()

    hashed: list[Path] = []
    monkeypatch.setattr(fingerprint, "record", lambda path: hashed.append(path) or record(path))
    again = Memo(tmp_path / "table")
    assert again.record_all(files, tmp_path) == [replace(each, path=Path(each.path).name) for each in expected]
    assert hashed == []
    files[1].write_text("content of c")  # as long as before
    os.utime(files[1], ns=(1, 1))
    assert again.record(files[1]) == record(files[1]) != expected[1]
    assert hashed == [files[1]]


@pytest.mark.parametrize("content", [b"", b"[{", b"[1]"])
def test_a_damaged_table_only_costs_time(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "table").write_bytes(content)
    (tmp_path / "a").write_text("a")
    memo = Memo(tmp_path / "table")
    assert memo.record(tmp_path / "a") == record(tmp_path / "a")
    memo.save()
    assert Memo(tmp_path / "table").record(tmp_path / "a") == record(tmp_path / "a")


def copy_elsewhere(path: Path) -> None:
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


@pytest.mark.parametrize("number", [3, 100])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.write_bytes(b"longer than it was"), "has changed"),
        (lambda path: path.write_bytes(b"unlike it"), "has changed"),  # of the same size
        (Path.unlink, "is missing"),
        (lambda path: os.utime(path, ns=(0, 0)), None),
        (copy_elsewhere, None),
    ],
)
def test_of_files_one_that_changed_is_found(
    tmp_path: Path, change: Callable[[Path], object], said: str | None, number: int
) -> None:
    """Many files are compared with a listing of their folders; a file of another time by its hash."""
    files = [tmp_path / kind / f"{each}.bin" for kind in ("a", "b") for each in range(number // 2 + 1)]
    for each, path in enumerate(files):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([each]) * 9)
        os.utime(path, ns=(1, 1))
    records, since = Memo().record_all(files, tmp_path), tmp_path / "embed.json"
    assert find_changed(tmp_path, records, since) is None
    change(files[-1])
    found = find_changed(tmp_path, records, since)
    assert (found is None) == (said is None)
    assert found is None or found.startswith(f"{files[-1]} {said}")
    shutil.rmtree(files[0].parent)
    assert str(find_changed(tmp_path, records, since)).startswith(f"{files[0]} is missing")
