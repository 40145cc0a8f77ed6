"""A sample of the faults every day, all of them in the slow suite: nothing is lost; and the harness notices what is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fault_cases import FAULTS, killed_problems
from fault_disks import can_mount
from fault_place import STEPS, Site, read_tree
from one_process import Outcome

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
