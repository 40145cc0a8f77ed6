"""A keep list in another order than the samples, and one that lacks some: where it is joined, and what is said."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import lock
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.steps.inputs import ChosenKeepList, choose_keep_list

KEYS = [f"{row:04d}" for row in range(100)]


@pytest.fixture
def keep_list(tmp_path: Path) -> Path:
    path = tmp_path / "keep.parquet"
    kept = [row % 3 == 0 for row in range(100)]
    pq.write_table(pa.table({"key": KEYS[::-1], "kept": kept[::-1]}), path)
    return path


def apply(keep_list: Path, work: Path, dry_run: bool) -> list[bool]:
    def keys() -> list[pa.ChunkedArray]:
        return [pa.chunked_array([KEYS[:60]]), pa.chunked_array([KEYS[60:]])]

    chosen = choose_keep_list(str(keep_list), WorkDirectory(work), "rows", 0.0)
    assert chosen is not None
    found = chosen.find_kept(keys, 100, None if dry_run else work, "here")
    return list(found)


def test_it_is_joined_in_the_work_directory_not_in_the_folder_for_temporary_files(
    keep_list: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file" / "no such folder"))
    work = tmp_path / "work"
    assert apply(keep_list, work, dry_run=False) == list(np.arange(100) % 3 == 0)
    assert not work.exists()
    with pytest.raises(ClipcidError, match=r"Could not write .*no such folder"):
        apply(keep_list, work, dry_run=True)


def test_folders_of_killed_runs_are_removed_but_not_that_of_a_run_that_goes_on(
    keep_list: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    killed = work / ".clipcid-join-killed"
    killed.mkdir(parents=True)
    killed.with_suffix(".lock").touch()
    other = work / ".clipcid-join-other"
    other.mkdir()
    with lock(other.with_suffix(".lock")):
        assert apply(keep_list, work, dry_run=False) == list(np.arange(100) % 3 == 0)
        assert sorted(work.iterdir()) == [other, other.with_suffix(".lock")]


@pytest.mark.parametrize(
    ("missing", "said", "fix"),
    [
        (5, "lacks 5 of the 300 samples of data, more than the allowed 1.0%", "--max-bad-fraction 0.017"),
        (200, "lacks 200 of the 300 samples of data: it was made from other data", "--keep-list none"),
    ],
)
def test_a_list_that_lacks_samples_is_refused_with_what_allows_them(missing: int, said: str, fix: str) -> None:
    keep_list = ChosenKeepList(Path("keep.parquet"), 200, 300 - missing, "samples", 0.01)
    with pytest.raises(ClipcidError, match=said) as refused:
        keep_list.report("data", 300, kept=200, missing=missing)
    assert fix in refused.value.fix
