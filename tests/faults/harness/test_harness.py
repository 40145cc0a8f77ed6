"""A sample of the faults every day, all of them in the slow suite: nothing is lost; and the harness notices what is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_cases import FAULTS, killed_problems
from fault_child import Operations, kill, read_operations
from fault_disks import can_mount
from fault_place import STEPS, Site, read_tree
from fault_tables import DOCUMENT
from one_process import Outcome

from clipcid_cli.formats.atomic import write_bytes

HARNESS = Path(__file__).with_name("harness.py")


def run_harness(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, str(HARNESS), "--json", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    reached = {name: {step for step, count in row["cases"].items() if count} for name, row in rows.items()}
    assert reached["killed"] == {step.name for step in STEPS}
    possible = {fault.name for fault in FAULTS if fault.everyday and (can_mount() or not fault.needs_mount)}
    assert possible <= {name for name, steps in reached.items() if steps}


def test_a_sample_of_faults_loses_nothing() -> None:
    run_harness()


@pytest.mark.slow
def test_no_fault_loses_anything() -> None:
    run_harness("--all", "--jobs", "2")


def test_losses_are_noticed(tmp_path: Path) -> None:
    site, step = Site(tmp_path), STEPS[0]
    for folder in (site.place, site.before(step)):
        folder.mkdir()
    for name in ("whole.npy", "half.npy", "gone.npy", "embed.json"):
        (site.place / name).write_text('{"counts": 1, "seconds": 2}')
    site.expected[step.name] = read_tree(site.place)
    assert site.compare(step) == site.find_half(step) == []
    (site.place / "embed.json").write_text('{"counts": 1, "seconds": 3}')
    (site.place / "half.npy").write_text("ha")
    (site.place / "gone.npy").unlink()
    (site.place / ".stray.partial").touch()
    assert sorted(site.compare(step)) == ["left over: .stray.partial", "missing: gone.npy", "other bytes: half.npy"]
    assert site.find_half(step) == ["half under its final name: half.npy"]


def kill_after(write: Callable[[], None], number: int, log: Path) -> None:
    process = os.fork()
    if process == 0:
        try:
            Operations(log, number, after=True, act=kill).install()
            write()
        finally:
            os._exit(0)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert read_operations(log)[number].startswith(("replace", "rename"))


def test_half_of_a_file_that_is_renamed_before_it_is_flushed_is_lost(tmp_path: Path) -> None:
    def write_unflushed() -> None:
        (tmp_path / "new").write_bytes(b"half")
        (tmp_path / "new").rename(tmp_path / "unflushed")

    kill_after(write_unflushed, 1, tmp_path / "log")  # open, rename
    assert (tmp_path / "unflushed").read_bytes() == b"ha"
    (tmp_path / "log.jsonl").write_bytes(b"on the disk, ")

    def append_unflushed() -> None:
        with (tmp_path / "log.jsonl").open("ab") as file:
            file.write(b"half")
        (tmp_path / "log.jsonl").rename(tmp_path / "appended")

    kill_after(append_unflushed, 1, tmp_path / "log")  # open, rename
    assert (tmp_path / "appended").read_bytes() == b"on the disk, ha"
    kill_after(lambda: write_bytes(tmp_path / "whole", b"whole"), 3, tmp_path / "log")  # mkdir, open, fsync, replace
    assert (tmp_path / "whole").read_bytes() == b"whole"


def test_words_of_a_killed_run_are_noticed() -> None:
    assert killed_problems(Outcome((), -9, "", "Embedding")) == []
    assert killed_problems(Outcome((), -9, "", "Traceback (most recent call last)"))
    assert killed_problems(Outcome((), None, "", ""))


def test_every_fault_has_its_line_in_the_documents() -> None:
    page = DOCUMENT.read_text(encoding="utf-8")
    for fault in FAULTS:
        assert f"- **{fault.name}**: {fault.result}" in page
