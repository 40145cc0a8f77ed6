"""Dry runs, which write nothing, and finished steps. Words are for the screens to pin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from golden import SHARDS, ask, check, make_place, plain

ROWS = ("--embeddings", "rows")
STUDENT = ("--student", "student.json")
DRY_RUNS: dict[str, tuple[object, ...]] = {
    "embed": (SHARDS, "--model", "teacher", "--views", 2),
    "balance": (*ROWS, "--keep", 0.4),
    "cluster": (*ROWS, "--num-clusters", 8, "--overwrite"),
    "distill": (SHARDS, *ROWS, *STUDENT, "--preset", "cid", "--steps", 10, "--batch-size", 64),
    "eval-zeroshot": ("teacher", "data/classification", "data/retrieval"),
    "eval-linear": ("teacher", "data/classification"),
    "export": ("teacher", "--format", "open-clip", "--format", "onnx"),
}
# What a dry run estimates: only that it is there is compared.
ESTIMATES = {"pairs", "flop", "mapped", "resident", "disk", "memory_bytes", "seconds_per_step", "data_seconds_per_step"}
ESTIMATES |= {"data_samples_per_second", "bound_by"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory, the default one, with a keep list and clusters."""
    place = make_place(tmp_path_factory.mktemp("commands"))
    ask(place, "balance", *ROWS, "--keep", 0.563)
    ask(place, "cluster", *ROWS, "--num-clusters", 16)
    return place


def list_files(place: Path) -> dict[str, tuple[int, int]]:
    """List everything below a folder, with sizes and times."""
    found = {}
    for folder, folders, files in os.walk(place):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(folder, name))
            found[os.path.join(folder, name)] = status.st_size, status.st_mtime_ns
    return found


@pytest.mark.parametrize("command", DRY_RUNS)
def test_a_dry_run_writes_nothing(place: Path, command: str) -> None:
    """Nor does it make a work directory, or note in one what it looked at for the first time."""
    before = list_files(place)
    answer = ask(place, command, *DRY_RUNS[command], "--dry-run")
    without_clusters = ("--preset", "clip-kd") if command == "distill" else ()
    ask(place, command, *DRY_RUNS[command], *without_clusters, "--dry-run", "--work", "new")
    assert list_files(place) == before
    check(f"dry-run-{command}", {"json": hide_estimates(plain(answer))})


def hide_estimates(value: Any) -> Any:
    """Keep only the names of what depends on the machine's speed."""
    if isinstance(value, dict):
        return {name: "…" if name in ESTIMATES else hide_estimates(item) for name, item in value.items()}
    return [hide_estimates(item) for item in value] if isinstance(value, list) else value


def test_a_finished_step_is_done_already(place: Path) -> None:
    """Given again, it exits with 0 and answers the same; merging nothing is no error either."""
    assert plain(ask(place, "balance", *ROWS, "--keep", 0.563)) == plain(ask(place, "balance", *ROWS, "--keep", 0.563))
    answer = ask(place, "balance", *ROWS, "--keep", 1.0, "--work", "all")
    assert (answer["kept"], answer["threshold"]) == (1908, None)
