"""`cluster` and `balance` killed right after they saved their progress, then run again: they continue, to the same bytes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import run_command

# Three runs are forks of one process: undisturbed, killed after one of its saves, and again. The clock that paces the saves
# is 10,000 times as fast, so that a short run saves before its end; the limit of `finish` is then 300 s.
_PROGRAM = """
import importlib, json, sys, time
from pathlib import Path
real = time.monotonic
time.monotonic = lambda: 1e4 * real()
from fault_child import Operations, kill, read_operations, start
saved, which, step, *rest = sys.argv[1:]
importlib.import_module(f"clipcid_cli.steps.{step}.run")
here, log = Path(), Path("log")
def run(work, kill_at=None):
    arguments = (step, "--embeddings", "emb", "--work", work, *rest)
    return start(arguments, here, Operations(log, kill_at, after=True, act=kill).install).finish(3e6)
runs = [run("whole")]
saves = [n for n, line in enumerate(read_operations(log)) if line.startswith("replace") and saved in line]
runs += [run("broken", saves[int(which)]), run("broken")]
print(json.dumps([[found.code, found.err] for found in runs]))
"""
_HERE = Path(__file__).parent


def kill_and_resume(place: Path, command: tuple[str, ...], saved: str, which: int, folder: str) -> str:
    """Kill a run after one of its saves, run it again, and compare the files with those of an undisturbed run.

    Returns:
        The messages of the second run.
    """
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (_HERE.parents[1], _HERE)))}
    done = run_command([sys.executable, "-c", _PROGRAM, saved, str(which), *command], place, True, 900, paths)
    runs = json.loads(done.stdout)
    assert [code for code, _ in runs] == [0, -9, 0], runs
    whole, broken = (place / work / folder for work in ("whole", "broken"))
    assert sorted(path.name for path in broken.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.iterdir():
        if path.suffix in (".npy", ".parquet", ".csv"):
            assert (broken / path.name).read_bytes() == path.read_bytes(), path.name
    return str(runs[2][1])


def write_embeddings(place: Path, rows: np.ndarray) -> None:
    (place / "emb").mkdir()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(place / "emb/img_emb_0.npy", rows.astype(np.float16))


def test_cluster_continues_after_its_last_iteration(tmp_path: Path) -> None:
    write_embeddings(tmp_path, np.random.default_rng(0).normal(size=(2_000, 64)))
    command = ("cluster", "--num-clusters", "32", "--iterations", "4")
    said = kill_and_resume(tmp_path, command, "/..progress.npz.", 1, "clusters")
    assert "Resuming after 2 iterations" in said


@pytest.mark.slow
def test_balance_continues_after_the_parts_that_it_searched(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(10_000, 64))
    write_embeddings(
        tmp_path, centers[generator.integers(10_000, size=30_000)] + 0.4 * generator.normal(size=(30_000, 64))
    )
    said = kill_and_resume(tmp_path, ("balance", "--keep", "0.563"), ".npz.", 0, "balance")
    assert "Resuming the search: " in said
