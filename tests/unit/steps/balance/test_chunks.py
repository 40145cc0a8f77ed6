"""Searches are resumed from what is saved, at whatever moment they were stopped and whatever of it is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from balance_data import balance, make_rows, write_embeddings

from clipcid_cli.algorithms.near import plan as planning
from clipcid_cli.steps.balance import chunks

NUM_ROWS = 400
NUM_JOBS = 10 * 11 // 2


class Disk:
    """Saves what a search has found, and stops the search after a number of saves, as a kill would."""

    def __init__(self) -> None:
        self.saves = 0
        self.stop_after = 10**6
        self.is_damaged = False
        self._save = chunks.save_arrays

    def save(self, path: Path, arrays: dict[str, Any]) -> None:
        if self.saves == self.stop_after:
            raise KeyboardInterrupt
        self.saves += 1
        self._save(path, arrays)
        if self.is_damaged:
            path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Panels are small, and each pair of them is saved on its own."""
    monkeypatch.setattr(planning, "_MIN_PANEL", 40)
    monkeypatch.setattr(planning, "_MAX_PANEL", 40)
    monkeypatch.setattr(chunks.SavePace, "is_due", lambda pace: True)
    disk = Disk()
    monkeypatch.setattr(chunks, "save_arrays", disk.save)
    return disk


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    return write_embeddings(tmp_path / "e", np.unique(make_rows(NUM_ROWS + 100), axis=0)[:NUM_ROWS])


def search(embeddings: Path, work: Path, threshold: float = 0.9) -> tuple[bytes, str]:
    """Balance; returns the forest and what was said."""
    _, told = balance(work, embeddings, threshold=threshold)
    return (work / "balance" / "forest.parquet").read_bytes(), told


def test_it_ends_with_the_same_forest_however_often_it_is_stopped(disk: Disk, embeddings: Path, tmp_path: Path) -> None:
    whole, _ = search(embeddings, tmp_path / "whole")
    num_saves, disk.saves = disk.saves, 0  # the other linkage is searched for the report, too
    for disk.stop_after in (1, 4, 24, 29):
        with pytest.raises(KeyboardInterrupt):
            search(embeddings, tmp_path / "stopped")
    disk.stop_after = 10**6
    found, told = search(embeddings, tmp_path / "stopped")
    assert f"Resuming the search: 29 of {NUM_JOBS} parts are done." in told
    assert found == whole
    assert disk.saves == num_saves, "nothing is searched twice"


def test_parts_that_are_lost_damaged_or_edited_are_searched_again(disk: Disk, embeddings: Path, tmp_path: Path) -> None:
    whole, _ = search(embeddings, tmp_path / "whole")
    num_saves, disk.saves, disk.stop_after = disk.saves, 0, 40
    with pytest.raises(KeyboardInterrupt):
        search(embeddings, tmp_path / "stopped")
    parts = sorted((tmp_path / "stopped").rglob(".search/*/*.npz"), key=lambda path: path.stat().st_size)[-5:]
    parts[0].unlink()
    for path, size in ((parts[1], 0), (parts[2], 200)):
        path.write_bytes(path.read_bytes()[:size])
    for path, edit in ((parts[3], lambda array: array[::-1]), (parts[4], lambda array: array[:-1])):
        with np.load(path) as saved:
            arrays = dict(saved)
        np.savez(path, **arrays | {"b": edit(arrays["b"])})
    disk.stop_after = 10**6
    found, _ = search(embeddings, tmp_path / "stopped")
    assert found == whole
    assert disk.saves == num_saves + len(parts)
