"""A sample of the faults every day, all of them in the slow suite: nothing is lost; and the harness notices what is."""

from __future__ import annotations

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
from one_process import Outcome

from clipcid_cli.formats.atomic import write_bytes

HARNESS = Path(__file__).with_name("harness.py")


def run_harness(*arguments: str) -> dict[str, list[str]]:
    """Run faults, none of which may lose anything; return by fault in which steps it was reached."""
    done = subprocess.run([sys.executable, str(HARNESS), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    return {
        name: [step.name for step, count in zip(STEPS, counts, strict=False) if count != "–"]
        for name, _, *counts in rows
    }


def test_a_sample_of_faults_loses_nothing() -> None:
    reached = run_harness()
    assert reached["killed"] == [step.name for step in STEPS]
    for fault in FAULTS:
        assert reached[fault.name] or not fault.everyday or (fault.needs_mount and not can_mount()), fault.name


@pytest.mark.slow
@pytest.mark.parametrize("name", [fault.name for fault in FAULTS])
def test_no_fault_loses_anything(name: str) -> None:
    run_harness("--only", name, "--cases", "10000")


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
    assert killed_problems(Outcome((), -9, "", "Embedding")) == []
    assert killed_problems(Outcome((), -9, "", "Traceback (most recent call last)"))
    assert killed_problems(Outcome((), None, "", ""))


def test_half_of_a_file_that_is_renamed_before_it_is_flushed_is_lost(tmp_path: Path) -> None:
    def kill_after(write: Callable[[], None], number: int) -> None:
        process = os.fork()
        if process == 0:
            try:
                Operations(tmp_path / "log", number, after=True, act=kill).install()
                write()
            finally:
                os._exit(0)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
        assert read_operations(tmp_path / "log")[number].startswith(("replace", "rename"))

    def append_unflushed() -> None:
        with (tmp_path / "log.jsonl").open("ab") as file:
            file.write(b"half")
        (tmp_path / "log.jsonl").rename(tmp_path / "appended")

    (tmp_path / "log.jsonl").write_bytes(b"on the disk, ")
    kill_after(append_unflushed, 1)  # open, rename
    assert (tmp_path / "appended").read_bytes() == b"on the disk, ha"
    kill_after(lambda: write_bytes(tmp_path / "whole", b"whole"), 3)  # mkdir, open, fsync, replace
    assert (tmp_path / "whole").read_bytes() == b"whole"
