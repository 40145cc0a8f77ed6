"""Sets of rows that lie in more files than stay mapped: each file is read in order, once, by all processes together."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from balance_data import balance, make_rows, write_embeddings
from conftest import run_in_two

from clipcid_cli.formats.embeddings.rows import MAPS_KEPT, FileRows, find_npy
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.steps.balance.groups import Groups, Share, work_on_groups
from clipcid_cli.steps.balance.rows import read_rows
from clipcid_cli.steps.balance.shared_arrays import SharedArrays

# Files of 70 KiB, which are mapped; smaller ones are read whole.
NUM_FILES = 200
ROWS_A_FILE = 70
WIDTH = 512
AT_ONCE = 500

_watched: list[str] = []
_opened: list[str] = []


def _watch(event: str, given: tuple[Any, ...]) -> None:
    if event == "open" and _watched and str(given[0]).startswith(_watched[-1]):
        _opened.append(str(given[0]))


sys.addaudithook(_watch)


@contextmanager
def opened_below(folder: Path) -> Iterator[list[str]]:
    """List the files below a folder that are opened in the block, each time that they are."""
    _opened.clear()
    _watched.append(str(folder))
    yield _opened
    _watched.pop()


def write_files(folder: Path) -> np.ndarray:
    rows = make_rows(NUM_FILES * ROWS_A_FILE, WIDTH)
    folder.mkdir()
    for number, part in enumerate(np.split(rows, NUM_FILES)):
        np.save(folder / f"{number:04}.npy", part)
    return rows


def add_up(share: Share) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels and the first numbers of the rows of a share, read in small parts."""
    parts = [np.arange(at, min(at + AT_ONCE, len(share.rows))) for at in range(0, len(share.rows), AT_ONCE)]
    first = [share.read(part)[:, 0] for part in parts]
    return share.rows[share.labels], np.concatenate([np.empty(0, np.float16), *first])


def work(rank: int, folder: Path) -> tuple[list[Any], int]:
    """Work on sets of three rows from anywhere; return what all processes found, and how many files this one opened."""
    files = [find_npy(path) for path in sorted((folder / "rows").iterdir())]
    images = FileRows(files, WIDTH, as_stored=True)
    order = np.random.default_rng(0).permutation(len(images))
    labels = np.arange(len(images))
    for members in order[: len(images) // 6 * 3].reshape(-1, 3):
        labels[members] = members.min()
    with open_dist_context("cpu") as context, opened_below(folder / "rows") as opened:
        shared = SharedArrays(context, folder / "work")
        found = work_on_groups(shared, images, np.arange(len(images)), Groups.from_sets(labels), add_up)
        return [np.concatenate(each) for each in zip(*found, strict=True)], len(opened)


def test_each_file_is_opened_once_by_one_process(tmp_path: Path) -> None:
    assert NUM_FILES > MAPS_KEPT
    rows = write_files(tmp_path / "rows")
    (tmp_path / "work").mkdir()
    (labels, values), opened = work(0, tmp_path)
    members = np.random.default_rng(0).permutation(len(rows))[: len(rows) // 6 * 3].reshape(-1, 3)
    members = np.sort(members[np.argsort(members.min(axis=1))], axis=1)
    assert np.array_equal(labels, np.repeat(members[:, 0], 3))
    assert np.array_equal(values, rows[members.reshape(-1), 0])
    assert opened <= NUM_FILES
    assert not any(path.is_file() for path in (tmp_path / "work").rglob("*"))


def test_only_rows_whose_hash_may_be_anothers_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, 20_000, np.uint64)
    hashes[random.permutation(20_000)[:40]] = hashes[:2].repeat(20)
    expected = [row for row in np.argsort(hashes, kind="stable") if np.count_nonzero(hashes == hashes[row]) > 1]
    argsort, sorted_rows = np.argsort, []

    def watched(values: np.ndarray, **more: Any) -> np.ndarray:
        sorted_rows.append(len(values))
        return argsort(values, **more)

    monkeypatch.setattr(np, "argsort", watched)
    assert Groups.from_hashes(hashes).rows.tolist() == expected
    assert sum(sorted_rows) < 100


def test_threads_of_a_process_work_on_parts_of_its_groups_at_once(tmp_path: Path) -> None:
    rows = make_rows(60, 8)
    np.save(tmp_path / "rows.npy", rows)
    labels = np.arange(60) // 6 * 6
    both = threading.Barrier(2, timeout=20)

    def meet(share: Share) -> tuple[np.ndarray, ...]:
        both.wait()
        return share.rows, share.rows[share.labels], share.read(np.arange(len(share.rows)))[:, 0]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with open_dist_context("cpu") as context:
            images = FileRows([find_npy(tmp_path / "rows.npy")], 8, as_stored=True)
            groups = Groups.from_sets(labels)
            ((members, first, values),) = work_on_groups(
                SharedArrays(context, tmp_path), images, np.arange(60), groups, meet
            )
    finally:
        torch.set_num_threads(before)
    assert members.tolist() == list(range(60))
    assert np.array_equal(first, labels)
    assert np.array_equal(values, rows[:, 0])


def test_rows_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    rows = make_rows(8, 4)
    rows[1, 2], rows[3, 0], rows[5, 3], rows[6, 1] = np.inf, -np.inf, np.nan, 65504.0  # the largest float16
    np.save(tmp_path / "rows.npy", rows)
    with open_dist_context("cpu") as context:
        images = FileRows([find_npy(tmp_path / "rows.npy")], 4, as_stored=True)
        assert read_rows(SharedArrays(context, tmp_path), images).numbers.tolist() == [0, 2, 4, 6, 7]


@pytest.mark.slow
def test_processes_share_the_files_out(tmp_path: Path) -> None:
    write_files(tmp_path / "rows")
    (tmp_path / "work").mkdir()
    alone, _ = work(0, tmp_path)
    (together, opened), (nothing, opened_by_other) = run_in_two(work, tmp_path, tmp_path)
    assert nothing == []
    assert all(np.array_equal(one, other) for one, other in zip(together, alone, strict=True))
    assert max(opened, opened_by_other) <= NUM_FILES // 2 + 1


@pytest.mark.slow
def test_a_run_opens_each_of_thousands_of_files_a_few_times(tmp_path: Path) -> None:
    """Copies, sets, all their pairs, representatives and diameters lie in files anywhere."""
    rows = make_rows(30_000, 16)
    many, few = 2_000, 2
    answers = []
    for number in (many, few):
        embeddings = write_embeddings(tmp_path / f"e{number}", rows, num_files=number)
        with opened_below(embeddings / "img_emb") as opened:
            answers.append(balance(tmp_path / f"w{number}", embeddings, keep=0.5)[0])
            # Headers and hashes are read at the start, then rows: to find copies, pairs, and what sets hold.
            assert len(opened) <= 10 * number
    assert answers[0]["kept"] == answers[1]["kept"]
    for name in ("keep.parquet", "sets.parquet", "forest.parquet"):
        one, other = (pd.read_parquet(tmp_path / f"w{number}" / "balance" / name) for number in (many, few))
        files = one.columns.intersection(["shard"])  # where rows have none, these are the names of their files
        pd.testing.assert_frame_equal(one.drop(columns=files), other.drop(columns=files))
