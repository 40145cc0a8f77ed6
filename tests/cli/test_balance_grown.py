"""`clipcid balance` after files were added, through command lines: one and two processes, and a run that is killed."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from balance_data import make_rows
from conftest import Run, start_clipcid

FILES = ("keep.parquet", "forest.parquet", "curve.csv", "sets.parquet")


def read_outputs(work: Path) -> dict[str, bytes]:
    return {name: (work / "balance" / name).read_bytes() for name in FILES}


def test_one_two_and_killed_processes_write_the_bytes_of_a_search_from_nothing(
    clipcid: Callable[..., Run], torchrun: Callable[..., Run], tmp_path: Path
) -> None:
    rows = make_rows(20_000, width=64)
    (tmp_path / "e").mkdir()
    np.save(tmp_path / "e" / "rows_1.npy", rows[:16_000])
    call = ("balance", "--embeddings", "e", "--threshold", 0.4)
    clipcid(*call, "--work", "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.copytree(tmp_path / "one", tmp_path / "killed")
    np.save(tmp_path / "e" / "rows_2.npy", rows[16_000:])
    grown = "A forest of 16,000 of the 20,000 images exists: only the others are compared."
    assert grown in " ".join(clipcid(*call, "--work", "one").stderr.split())
    torchrun(2, *call, "--work", "two")
    process = start_clipcid(*call, "--work", "killed", cwd=tmp_path)
    while process.poll() is None and not list((tmp_path / "killed" / "balance").glob(".balance-*/.search/*/*.npz")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    clipcid(*call, "--work", "killed")
    clipcid(*call, "--work", "new")
    for work in ("one", "two", "killed"):
        assert read_outputs(tmp_path / work) == read_outputs(tmp_path / "new"), work
